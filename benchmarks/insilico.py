"""Two views against one, on in-silico patients: `make bench NAME=insilico SEED=0`.

Trains the two-view baseline and its two single-view variants on `insilico-v1` of the data seed. All
variants have one recipe and several training seeds. Metrics are of the test patients: AUC, and accuracy at
the threshold chosen on the validation patients. They are averaged over the training seeds; intervals are
from a bootstrap over patients.

The best single view is the one with the higher AUC on the *test* patients, a choice that favours the rival.
The recipe was chosen on data seed 1000; no row of the results is measured on it.
"""
import sys
from functools import partial
from pathlib import Path
import pandas as pd
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import Bench, options
from benchmarks._trainings import prepare_insilico, recipe_folder, run_jobs, tables_or_train
from mammo_nb.core.seeding import seed_everything
from mammo_nb.insilico.config import InSilicoConfig, settings_name
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.systems import predict
from mammo_nb.learners.two_view import two_view_learner
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.metrics.tables import select_output
from mammo_nb.metrics.thresholds import accuracy, choose_threshold
from mammo_nb.metrics.weighted import auc
from mammo_nb.samples.augment import Augment
from mammo_nb.samples.two_view import two_view_dls

FLIP = .5 # only the lesion matters here, see `Augment`
SIZE = (192, 144)
VIEWS = dict(cc=('cc',), mlo=('mlo',), two_view=('cc', 'mlo'))
METRICS = dict(auc=auc, acc=accuracy)
MODULES = ('mammo_nb.learners.two_view', 'mammo_nb.preparation.cache')

# Training

def train(variant, seed, prepared, epochs):
    "Train one variant and predict the validation and test patients"
    seed_everything(seed)
    dls = two_view_dls(prepared, bs=16, seed=seed, augment=Augment(flip=FLIP))
    learn = two_view_learner(dls, views=VIEWS[variant], seed=seed)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 3e-3)
    tables = [predict(learn, prepared, split=split) for split in ('valid', 'test')]
    fused = [select_output(t, output='probability') for t in tables]
    return [pd.concat(fused, ignore_index=True)]

def predictions(variant, seed, prepared, epochs, folder):
    "Predictions of one training, made once"
    make = partial(train, variant, seed, prepared, epochs)
    return tables_or_train(folder, f'{variant}_{seed}', ['predictions'], make)[0]

# Rows

def select_test(table):
    "Select the test patients of a table of predictions"
    return table[table.split == 'test']

def apply_threshold(table):
    "Test predictions as 0 and 1, by the threshold chosen on the validation patients"
    threshold = choose_threshold(table[table.split == 'valid'], rule='accuracy')
    test = select_test(table)
    return test.assign(value=(test.value >= threshold.value).astype(float))

def add_rows(bench, runs):
    "Add the rows of all variants, and of two views against the better single view"
    tables = dict(
        auc={v: [select_test(t) for t in ts] for v, ts in runs.items()},
        acc={v: [apply_threshold(t) for t in ts] for v, ts in runs.items()})
    best = max(('cc', 'mlo'), key=lambda v: bootstrap_ci(tables['auc'][v], auc, n_boot=10).value)
    for metric, function in METRICS.items():
        own = tables[metric]
        for variant in runs:
            bench.add_estimate(variant, metric, bootstrap_ci(own[variant], function))
        difference = paired_difference(own['two_view'], own[best], function)
        bench.add_estimate('two_view - best_single', metric, difference)

# The run

def start(a):
    "Open the results of a run"
    settings = settings_name(InSilicoConfig(seed=a.seed, exams=1))
    config = dict(
        cohort=settings, patients=a.patients, size=SIZE, epochs=a.epochs, flip=FLIP)
    n_models = len(VIEWS)*len(a.train_seeds)
    minutes = round(a.patients/1600*(6+2.5*a.epochs*len(a.train_seeds)/3))
    cost = f'about {minutes} minutes on 2 cores, most of it to train {n_models} models'
    return Bench('insilico', a.seed, config, cost, train_seeds=a.train_seeds)

def main(argv=None):
    a = options(__doc__, argv, patients=1600, epochs=10, train_seeds=[0, 1, 2])
    bench = start(a)
    if bench.finished('two_view - best_single', 'acc'):
        return
    cohort = insilico_cohort(a.patients, a.seed, exams=1)
    prepared, base = prepare_insilico(cohort, a.patients, SIZE)
    recipe = dict(epochs=a.epochs, flip=FLIP, size=SIZE)
    folder = recipe_folder(base, 'insilico', recipe, [train], MODULES)
    keys = [(v, seed) for seed in a.train_seeds for v in ('two_view', 'cc', 'mlo')]
    jobs = [(predictions, v, seed, prepared, a.epochs, folder) for v, seed in keys]
    found = dict(zip(keys, run_jobs(jobs)))
    add_rows(bench, {v: [found[v, seed] for seed in a.train_seeds] for v in VIEWS})

if __name__ == '__main__':
    main()
