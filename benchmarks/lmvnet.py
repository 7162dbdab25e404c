"""Does a prior exam help, and must it be aligned? On in-silico patients: `make bench NAME=lmvnet SEED=0`.

Trains on `insilico-v1` with two exams: the registration, without labels, and then with several training
seeds the risk models. All have the same images, augmentation, loss and choice of the epoch.

- `current_exam`: CC and MLO of the current exam. The next two start from its encoder.
- `lmvnet`: with the aligned prior. `unaligned`: with the prior as it lies.
- `lmvnet_no_prior`: the trained `lmvnet`, tested without priors.
- `lmvnet_no_mlo`, `current_exam_no_mlo`: tested without the MLO view, current and prior. They were trained
  with both views of every breast (`view_dropout=0`) and predict with the CC head. Up to commit 98912cc the
  fused head predicted, at chance.
- `lmvnet_half_mlo`, `current_exam_half_mlo`: every second patient has no MLO view. This also contains the
  cost of a different level of risk with one view.
- `density`: density alone. `oracle`: the risk of a reader who sees all that the images contain.

Tested is every breast of the test patients at their last exam. Metrics are averaged over the training seeds.
Intervals are from a bootstrap over patients, so they contain the variation of patients, not of trainings.
The recipe was chosen on data seed 1000; no row of the results is measured on it. But another recipe was
sought because the first one (stride 8, a shorter training), measured on seed 0, gained nothing from the
aligned prior.

Test patients cost much less than trainings. They are those among the patients from 1200 to 5000, beside 60
and 15 % of the first 1200 for training and validation. Up to commit c726d01 they were among the first 1200.
The five runs of this recipe then, which differ by rounding and small changes of the code, put
`lmvnet_no_prior - current_exam` between -.004 [-.024, .017] and .021 [-.000, .043]: too few patients to
exclude a loss of .02. None of those patients is tested now.

What the metrics measure:

- A patient's last exam is most often the one at which the cancer is found. So `c_index` is mostly *detection*
  (`prevalent`: the share of the events within half a year). `c_index_later` excludes these breasts, as
  `exclude_before_years` does; few cancers remain, hardly visible yet.
- `lmvnet` and `unaligned` train on for four epochs, so `lmvnet - unaligned` is a clean comparison, while
  `lmvnet - current_exam` also contains the gain of four more epochs and of the attention.
  `lmvnet_no_prior` estimates that gain. It is no perfect control: only a fifth of its training samples had no
  prior.
- `eo_ratio_5` is the mean predicted risk of five years by the true share. The masked loss predicts too low
  risks where cancers come early (see `cohort.labels`), so these risks are for ranking.
"""
import sys
import time
from functools import partial
from pathlib import Path
import pandas as pd
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import Bench, check_test_patients, options
from benchmarks._trainings import (
    load_tensors, prepare_insilico, recipe_folder, run_jobs, save_tensors, tables_or_train,
    weights_or_train
)
from benchmarks.registration import (
    ADAM, LOSS, NET, REFINE, SIZE, insilico_patients, trained_network
)
from mammo_nb.core.seeding import seed_everything
from mammo_nb.insilico.config import InSilicoConfig, settings_name
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.insilico.oracle import oracle_risk
from mammo_nb.learners.risk import risk_learner
from mammo_nb.learners.systems import predict
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.metrics.concordance import c_index
from mammo_nb.metrics.predictions import predictions_table
from mammo_nb.metrics.risk_by_year import auc_by_year, brier_by_year, eo_ratio
from mammo_nb.metrics.survival import risk_table
from mammo_nb.models.lmvnet import LMVNet, UnalignedRisk
from mammo_nb.models.risk_baselines import CurrentExamRisk, DensityRisk
from mammo_nb.registration.instance_optimisation import InstanceOptimised
from mammo_nb.registration.prior_flows import prior_flows
from mammo_nb.samples.augment import Augment
from mammo_nb.samples.risk import RiskDataset, breast_history, risk_dls

YEARS = range(1, 6)
LMV = dict(
    width=16, stride=4, token_pool=2, dropout=0., weight_dropout=0., drop_path=.1, prior_dropout=.2)
SAMPLES = dict(bs=16, augment=dict(flip=.5), wd=.01, encoder_lr_factor=.3, dropout=.1)
RATE = dict(current_exam=3e-3, density=1e-2, lmvnet=1e-3, unaligned=1e-3)
WITH_PRIORS = ('lmvnet', 'unaligned') # they start from the encoder of `current_exam`
MODULES = (
    'mammo_nb.learners.risk', 'mammo_nb.learners.registration', 'mammo_nb.preparation.cache')

# Data

def test_cohort(patients, test_of, seed):
    "Draw the test patients after the first `patients`, up to `test_of`"
    cohort = insilico_cohort(test_of, seed)
    return cohort.select(lambda t: (t.split == 'test') & (t.patient_index >= patients))

test_cohort.__test__ = False # not a test of pytest

def last_exams(prepared, tested):
    "(prepared, rows) for training and validation, and (prepared, rows) for the test"
    rows, test_rows = (breast_history(p.cohort, current='last') for p in (prepared, tested))
    rows = rows.query('split != "test"').reset_index(drop=True)
    return (prepared, rows), (tested, test_rows)

def align(data, base, epochs, folder):
    "Train the registration and compute the flows of all priors, once"
    path = folder/'flows.pt'
    if path.exists():
        return
    start = time.time()
    net = trained_network(data[0][0], base, epochs)
    registration = InstanceOptimised(net, **REFINE)
    flows = {}
    for prepared, rows in data:
        flows |= prior_flows(prepared, rows, registration)
    save_tensors(flows, path)
    print(f'  aligned all priors in {time.time()-start:.0f} s', flush=True)

# Training

def new_model(kind, seed, encoder=None):
    "Make a model; `encoder`: weights to start from"
    seed_everything(seed)
    if kind == 'density':
        return DensityRisk()
    if kind == 'current_exam':
        return CurrentExamRisk(
            'small', LMV['stride'], dropout=SAMPLES['dropout'], width=LMV['width'])
    if kind == 'unaligned':
        model = UnalignedRisk('small', **LMV)
    else:
        model = LMVNet('small', registration=None, **LMV)
    model.processor.encoder.load_state_dict(encoder)
    return model

def wait_for(path):
    "Wait for a file of another job; such jobs stand before in the queue"
    while not path.exists():
        time.sleep(1)
    return load_tensors(path)

def start_encoder(kind, seed, folder):
    "Weights of the trained encoder of `current_exam`; `None` for models that start new"
    if kind not in WITH_PRIORS:
        return None
    weights = wait_for(folder/f'current_exam_{seed}.pt')
    prefix = 'encoder.'
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

def make_loaders(kind, prepared, rows, flows, seed):
    "Loaders for training; density reads no image and has no augmentation"
    augment = None if kind == 'density' else Augment(**SAMPLES['augment'])
    return risk_dls(
        prepared, bs=SAMPLES['bs'], rows=rows, augment=augment, seed=seed, device='cpu',
        in_memory=True, flows=flows)

def train(kind, seed, data, flows, epochs, folder, model):
    "Train a new model"
    dls = make_loaders(kind, *data, flows, seed)
    factor = SAMPLES['encoder_lr_factor'] if kind in WITH_PRIORS else 1
    learn = risk_learner(
        dls, model, recipe=None, encoder_lr_factor=factor, lr=RATE[kind], wd=SAMPLES['wd'],
        folder=folder/f'{kind}_{seed}')
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs)
    return learn.model

def trained_model(kind, seed, data, flows, epochs, folder):
    "The model of one training, trained once"
    encoder = start_encoder(kind, seed, folder)
    model = new_model(kind, seed, encoder)
    make = partial(train, kind, seed, data, flows, epochs, folder)
    return weights_or_train(folder/f'{kind}_{seed}.pt', model, make)

# Test

def without(rows, part):
    "Rows in which the images of some columns are missing"
    return rows.assign(**{c: None for c in rows if part in c})

def predict_variant(model, prepared, rows, flows, variant):
    "Predict with flows that were computed before"
    samples = RiskDataset(prepared, rows, model.years, in_memory=False, flows=flows)
    table = predict(model, prepared, dataset=samples)
    return table.assign(system=variant)

def test_variants(kind, model, prepared, rows, flows):
    "Predict with a model, and where asked for without priors and without the MLO view"
    tables = [predict_variant(model, prepared, rows, flows, kind)]
    if kind == 'lmvnet':
        no_prior = without(rows, 'previous_image_id')
        tables.append(predict_variant(model, prepared, no_prior, None, 'lmvnet_no_prior'))
    if kind in ('lmvnet', 'current_exam'):
        no_mlo = without(rows, 'image_id_mlo')
        tables.append(predict_variant(model, prepared, no_mlo, flows, f'{kind}_no_mlo'))
    return pd.concat(tables, ignore_index=True)

test_variants.__test__ = False # not a test of pytest

def train_and_test(kind, seed, data, epochs, folder):
    "Train a model and predict the test patients"
    flows = wait_for(folder/'flows.pt') if kind == 'lmvnet' else None
    model = trained_model(kind, seed, data[0], flows, epochs, folder)
    return [test_variants(kind, model, *data[1], flows)]

def predictions(kind, seed, data, epochs, folder):
    "Predictions of one training for the test patients, made once"
    make = partial(train_and_test, kind, seed, data, epochs, folder)
    return tables_or_train(folder, f'{kind}_{seed}', ['predictions'], make)[0]

def risk_predictions(risk, rows, system):
    "Make a predictions table of known risks [N,Y]"
    tables = [
        predictions_table(rows, risk[:, year-1], system, f'risk_year_{year}', 'truth')
        for year in YEARS]
    return pd.concat(tables, ignore_index=True)

# Metrics

PREVALENT_YEARS = .5 # a cancer that is found earlier was visible at the exam
CURVE = [f'risk_year_{year}' for year in YEARS]
METRICS = dict(c_index=(partial(c_index, tau=5.), CURVE))
METRICS |= dict(c_index_later=METRICS['c_index'])
METRICS |= {
    f'auc_year_{year}': (partial(auc_by_year, year=year), [f'risk_year_{year}'])
    for year in YEARS}
METRICS |= dict(
    brier=(partial(brier_by_year, year=5), ['risk_year_5']),
    eo_ratio_5=(partial(eo_ratio, year=5), ['risk_year_5']))
COMPARISONS = (
    ('lmvnet', 'current_exam'), ('lmvnet', 'unaligned'), ('lmvnet', 'lmvnet_no_prior'),
    ('lmvnet', 'lmvnet_no_mlo'), ('lmvnet_no_prior', 'current_exam'),
    ('lmvnet_no_mlo', 'current_exam_no_mlo'), ('lmvnet', 'lmvnet_half_mlo'),
    ('current_exam', 'current_exam_half_mlo'))

def exclude_prevalent(table):
    "Leave out breasts whose cancer is found within half a year"
    keep = (table.event == 0) | (table.time >= PREVALENT_YEARS)
    return table[keep].reset_index(drop=True)

def estimate(tables, metric, other=None):
    "Estimate a metric of risk tables, one a training, or the difference to `other`"
    function, risks = METRICS[metric]
    columns = ('time', 'event', *risks)
    if metric == 'c_index_later':
        tables = [exclude_prevalent(t) for t in tables]
        other = None if other is None else [exclude_prevalent(t) for t in other]
    if other is None:
        return bootstrap_ci(tables, function, columns=columns)
    return paired_difference(tables, other, function, columns=columns)

# Rows

def half(table, other):
    "A table with the risks of every second patient from `other`"
    key = ['exam_id', 'laterality']
    assert table[key].equals(other[key])
    second = table.patient_id.isin(sorted(table.patient_id.unique())[::2])
    risks = [c for c in table if c.startswith('risk_year_')]
    return table.assign(**{c: table[c].where(~second, other[c]) for c in risks})

def select_variant(found, seeds, variant, truth):
    "The risk tables of one variant, one a training seed"
    kind = variant.removesuffix('_no_prior').removesuffix('_no_mlo')
    tables = []
    for seed in seeds:
        table = found[kind, seed]
        tables.append(risk_table(table[table.system == variant], truth, quiet=True))
    return tables

def risk_tables(found, seeds, test, oracle):
    "Variant -> risk tables, one a training seed"
    truth = test.assign(split='test')
    known = risk_predictions(oracle, test, 'oracle')
    runs = dict(oracle=[risk_table(known, truth, quiet=True)])
    for variant in ('lmvnet', 'lmvnet_no_prior', 'lmvnet_no_mlo', 'unaligned', 'current_exam',
                    'current_exam_no_mlo', 'density'):
        runs[variant] = select_variant(found, seeds, variant, truth)
        if variant.endswith('_no_mlo'):
            kind = variant.removesuffix('_no_mlo')
            both = zip(runs[kind], runs[variant])
            runs[f'{kind}_half_mlo'] = [half(a, b) for a, b in both]
    return runs

def add_rows(bench, found, seeds, test, oracle):
    "Add all rows, from the predictions of all trainings"
    runs = risk_tables(found, seeds, test, oracle)
    for variant, tables in runs.items():
        for metric in METRICS:
            bench.add_estimate(variant, metric, estimate(tables, metric))
    for a, b in COMPARISONS:
        for metric in ('c_index', 'c_index_later'):
            difference = estimate(runs[a], metric, runs[b])
            bench.add_estimate(f'{a} - {b}', metric, difference)
    cancers = runs['oracle'][0].query('event == 1 and time <= 5')
    prevalent = (cancers.time < PREVALENT_YEARS).mean()
    bench.add('prevalent', 'share_of_events', prevalent, n=len(cancers))

# The run

def parse(argv=None):
    "Read the command line"
    a = options(
        __doc__, argv, patients=1200, test_of=5000, epochs=(4, 'of lmvnet and unaligned'),
        first_epochs=(10, 'of current_exam'), registration_epochs=2, train_seeds=[0, 1, 2])
    check_test_patients('lmvnet', a.patients, a.test_of)
    return a

def expected_minutes(a):
    "Estimate the cost of a run on 2 cores"
    a_seed = .3*a.first_epochs+1.5*a.epochs
    training = 8+2*a.registration_epochs+len(a.train_seeds)*a_seed
    return round(a.patients/1200*training+a.test_of/1000*2.5)

def start(a):
    "Open the results of a run"
    config = dict(
        cohort=settings_name(InSilicoConfig(seed=a.seed)), patients=a.patients, test_of=a.test_of,
        size=SIZE, epochs=[a.first_epochs, a.epochs, a.registration_epochs], rates=RATE, net=NET,
        loss=LOSS, adam=ADAM, refine=REFINE, samples=SAMPLES, **LMV)
    n_models = 3*len(a.train_seeds)
    cost = f'about {expected_minutes(a)} minutes on 2 cores, most of it to train {n_models} models'
    return Bench('lmvnet', a.seed, config, cost, train_seeds=a.train_seeds)

def results_folder(base, a):
    "Name the folder of trainings of these settings and this code"
    recipe = (
        SIZE, SAMPLES, LMV, RATE, NET, LOSS, ADAM, REFINE, a.first_epochs, a.epochs,
        a.registration_epochs, a.test_of)
    functions = (
        trained_network, test_cohort, last_exams, align, new_model, start_encoder, make_loaders,
        train, without, predict_variant, test_variants)
    return recipe_folder(base, 'risk', recipe, functions, MODULES)

def run_trainings(a, data, base, folder):
    "Run all trainings; jobs that wait for files of others stand behind them in the queue"
    epochs = dict(
        current_exam=a.first_epochs, density=a.first_epochs, lmvnet=a.epochs, unaligned=a.epochs)
    keys = [('current_exam', seed) for seed in a.train_seeds]
    keys += [(kind, seed) for seed in a.train_seeds for kind in ('unaligned', 'lmvnet', 'density')]
    jobs = [(predictions, kind, seed, data, epochs[kind], folder) for kind, seed in keys]
    jobs.insert(1, (align, data, base, a.registration_epochs, folder))
    results = run_jobs(jobs)
    del results[1]
    return dict(zip(keys, results))

def main(argv=None):
    a = parse(argv)
    bench = start(a)
    if bench.finished('prevalent', 'share_of_events'):
        return
    prepared, base = insilico_patients(a.patients, a.seed)
    tested, _ = prepare_insilico(
        test_cohort(a.patients, a.test_of, a.seed), f'test_{a.patients}_{a.test_of}', SIZE)
    data = last_exams(prepared, tested)
    found = run_trainings(a, data, base, results_folder(base, a))
    _, test = data[1]
    add_rows(bench, found, a.train_seeds, test, oracle_risk(tested.cohort, test))

if __name__ == '__main__':
    main()
