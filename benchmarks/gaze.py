"""How good must gaze be? Noise, offset and missing recordings: `make bench NAME=gaze SEED=0`.

The patients, network and recipe are those of the row `cross_view_gaze` of `mammonet`. Gaze is made worse
in training only:

- `noise_...`: each fixation moves by noise with this standard deviation, mm; `noise_0`: fixations as they are,
  the reference of noise and offset
- `offset_...`: all fixations of an image move by this distance in a random direction, mm, as after a wrong
  calibration
- `missing_...`: this share of the patients has no gaze
- `weight_...`: another weight of the gaze in the loss (paper: 0.5)
- `cross_view`, `cross_view_gaze`: without gaze, and with all of it
- `explain_truth`: with all gaze, but in breasts without cancer the map of evidence *against* cancer is
  compared with the gaze

There is one training for each level and training seed, so intervals contain the variation of patients, not
of trainings. Finished trainings of `mammonet` are used again.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import check_test_patients, options
from benchmarks.mammonet import METRICS, estimate, open_bench, run_trainings

LEVELS = dict(noise=(0, 5, 10, 20), offset=(5, 10, 20), missing=(.5, .75, .9), weight=(.5, 1.5, 5))

def changes():
    "Row -> (kind, level) of what is changed, or `None`"
    rows = dict(cross_view=None, cross_view_gaze=None, explain_truth=None)
    for kind, levels in LEVELS.items():
        rows |= {f'{kind}_{level:g}': (kind, level) for level in levels}
    return rows

def main(argv=None):
    a = options(__doc__, argv, patients=1400, test_of=5000, epochs=7, train_seeds=[0])
    check_test_patients('gaze', a.patients, a.test_of)
    rows = changes()
    n_models = len(rows)*len(a.train_seeds)
    minutes = round(a.patients/1000*(4+.2*a.epochs*n_models)+a.test_of/1000*2)
    bench = open_bench('gaze', a, minutes, n_models)
    if bench.finished(list(rows)[-1], METRICS[-1]):
        return
    for row, run in run_trainings(a, rows).items():
        for metric in METRICS:
            bench.add_estimate(row, metric, estimate(run, metric))

if __name__ == '__main__':
    main()
