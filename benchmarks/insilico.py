"""Two views against one, on in-silico patients: `make bench NAME=insilico SEED=0`.

Draws `insilico-v1` for the data seed (any), trains the two-view baseline and its two single-view variants from the same
recipe with three training seeds each, and compares them on the test patients. AUC and accuracy (at the threshold that the
validation patients chose) are averaged over the training seeds; intervals are from a bootstrap over patients. The best
single view is the one with the higher AUC *on the test patients*: the choice favours the rival. The recipe was chosen on the
patients of data seed 1000, which no row of the results is measured on.

Predictions of finished trainings are kept below `.cache/`, so a stopped run goes on where it was.
"""
import sys, time
from pathlib import Path
import pandas as pd
import torch
from joblib import Parallel, delayed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._common import Bench, ROOT, cores, options
from mammo_nb.core.seeding import seed_everything
from mammo_nb.data.cache import prepare_cohort
from mammo_nb.data.insilico import Settings, insilico_cohort, settings_name, write_insilico
from mammo_nb.data.prepare import PrepareConfig
from mammo_nb.data.samples import Augment, two_view_dls
from mammo_nb.learners.two_view import predict, two_view_learner
from mammo_nb.metrics.bootstrap import auc, bootstrap_ci, paired_difference
from mammo_nb.metrics.classification import accuracy, choose_threshold
from mammo_nb.metrics.predictions import one_output
from mammo_nb.report.stages import code_hash

FLIP = .5 # only the lesion matters here, see `Augment`
VIEWS = dict(cc=('cc',), mlo=('mlo',), two_view=('cc', 'mlo'))

def trained(name, seed, prepared, epochs, folder):
    "Predictions of one training on validation and test patients; made once"
    path = folder/f'{name}_{seed}.parquet'
    if path.exists(): return pd.read_parquet(path)
    torch.set_num_threads(1) # one training a core is faster than two threads a training
    seed_everything(seed); start = time.time()
    learn = two_view_learner(two_view_dls(prepared, bs=16, seed=seed, augment=Augment(flip=FLIP)), views=VIEWS[name], seed=seed)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 3e-3)
    out = pd.concat([one_output(predict(learn, prepared, split=s), output='probability') for s in ('valid', 'test')], ignore_index=True)
    folder.mkdir(parents=True, exist_ok=True); out.to_parquet(path.with_suffix('.part')); path.with_suffix('.part').replace(path)
    print(f'  trained {name}, seed {seed}: {time.time()-start:.0f} s', flush=True)
    return out

def called(t):
    "Test predictions as 0 and 1, by the threshold that the validation patients chose"
    th = choose_threshold(t[t.split == 'valid'], rule='accuracy')
    test = t[t.split == 'test']
    return test.assign(value=(test.value >= th.value).astype(float))

def main():
    a = options(__doc__, patients=1600, epochs=10, train_seeds=[0, 1, 2])
    size, name = (192, 144), settings_name(Settings(seed=a.seed, exams=1))
    config = dict(cohort=name, patients=a.patients, size=size, epochs=a.epochs, flip=FLIP)
    bench = Bench('insilico', a.seed, config, f'about {round(a.patients/1600*(6+2.5*a.epochs*len(a.train_seeds)/3))} minutes on 2 cores, most of it to train {3*len(a.train_seeds)} models', train_seeds=a.train_seeds)
    if bench.done('two_view - best_single', 'acc'): return print('  all rows are there already, for this commit and these settings')
    base = ROOT/'.cache'/'insilico'/f'{name.replace(" ", "_")}_{a.patients}_{code_hash("mammo_nb.data.insilico")[:12]}'
    cohort = write_insilico(insilico_cohort(a.patients, a.seed, exams=1), base/'files')
    prepared = prepare_cohort(cohort, base/'prepared', PrepareConfig(size=size))
    folder = base/f'{a.epochs}_{FLIP}_{code_hash("mammo_nb.learners.two_view", "mammo_nb.data.cache")[:12]}'
    jobs = [(v, s) for s in a.train_seeds for v in ('two_view', 'cc', 'mlo')]
    done = dict(zip(jobs, Parallel(n_jobs=cores())(delayed(trained)(v, s, prepared, a.epochs, folder) for v, s in jobs)))
    runs = {v: [done[v, s] for s in a.train_seeds] for v in VIEWS}
    tables = {'auc': {v: [t[t.split == 'test'] for t in ts] for v, ts in runs.items()}, 'acc': {v: [called(t) for t in ts] for v, ts in runs.items()}}
    best = max(('cc', 'mlo'), key=lambda v: bootstrap_ci(tables['auc'][v], auc, n_boot=10).value)
    for metric, f in (('auc', auc), ('acc', accuracy)):
        for v, ts in tables[metric].items():
            e = bootstrap_ci(ts, f); bench.add(v, metric, e.value, e.low, e.high, n=e.n)
        e = paired_difference(tables[metric]['two_view'], tables[metric][best], f)
        bench.add('two_view - best_single', metric, e.value, e.low, e.high, n=e.n)

if __name__ == '__main__': main()
