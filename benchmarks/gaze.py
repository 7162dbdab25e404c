"""How good must gaze be? Noise, offset and missing recordings: `make bench NAME=gaze SEED=0`.

The patients, the network and the recipe of `mammonet`, row `cross_view_gaze`, with gaze made worse in training: every place thrown about
(`noise` of each fixation, standard deviation in mm), every picture's fixations shifted by a distance in a random direction (`offset`, mm: a calibration
that is off), or no gaze at all for a fraction of the patients (`missing`); and with less `weight` of the gaze in the loss (paper 0.5). `noise_0` is the reading's fixations as they are, the zero of the
first two. One training a level and training seed: the intervals hold what patients vary, not what trainings vary. Beside them the
network without gaze and with all of it, and `explain_truth`: with all of it, but in breasts without cancer the map that speaks *against*
cancer is compared with the gaze. Trainings that `mammonet` has finished are used again.
"""
import sys
from pathlib import Path
from joblib import Parallel, delayed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._common import Bench, cores, options
from benchmarks.mammonet import METRICS, NET, SIZE, TRAIN, estimate, folder_of, in_silico, trained
from mammo_nb.data.insilico import Settings, settings_name

LEVELS = dict(noise=(0, 5, 10, 20), offset=(5, 10, 20), missing=(.5, .75, .9), weight=(.5, 1.5, 5))

def main():
    a = options(__doc__, patients=1400, test_of=5000, epochs=7, train_seeds=[0])
    if a.test_of <= a.patients: raise SystemExit(f'gaze: --test-of {a.test_of}, more than --patients {a.patients} wanted')
    rows = {'cross_view': None, 'cross_view_gaze': None, 'explain_truth': None} | {f'{k}_{v:g}': (k, v) for k, vs in LEVELS.items() for v in vs}
    config = dict(cohort=settings_name(Settings(seed=a.seed, exams=1, shortcut=True)), patients=a.patients, test_of=a.test_of, size=SIZE, epochs=a.epochs, net=NET, train=TRAIN)
    bench = Bench('gaze', a.seed, config, f'about {round(a.patients/1000*(4+.2*a.epochs*len(rows)*len(a.train_seeds))+a.test_of/1000*2)} minutes on 2 cores, less where `mammonet` has been run', train_seeds=a.train_seeds)
    if bench.done(list(rows)[-1], METRICS[-1]): return print('  all rows are there already, for this commit and these settings')
    prepared, base = in_silico(a.patients, a.test_of, a.seed)
    folder = folder_of(base, a.epochs)
    jobs = [(r, s) for s in a.train_seeds for r in rows]
    done = dict(zip(jobs, Parallel(n_jobs=cores())(delayed(trained)(r, s, prepared, a.epochs, folder, rows[r]) for r, s in jobs)))
    for r in rows:
        each = [done[r, s] for s in a.train_seeds]
        for m in METRICS: e = estimate(each, m); bench.add(r, m, e.value, e.low, e.high, n=e.n)

if __name__ == '__main__': main()
