"""Is a prior worth reading, and does it have to be aligned? On in-silico patients: `make bench NAME=lmvnet SEED=0`.

Draws `insilico-v1` with two exams for the data seed (any). On the training patients it trains, without labels, the registration,
and with three training seeds each: `current_exam` (CC and MLO of now), then from its encoder `lmvnet` (with the aligned prior) and
`unaligned` (the same with the prior as it lies), all three with the same pictures, augmentation, loss and choice of the epoch.
`lmvnet_no_prior` is the trained `lmvnet` asked without priors, `lmvnet_no_mlo` and `current_exam_no_mlo` without the MLO view, now and before (they were
trained with both views of every breast, `view_dropout=0`, and answer with the CC head; up to commit 98912cc the fused head answered, at chance); in `lmvnet_half_mlo` and `current_exam_half_mlo` every second
patient has no MLO: what one view says less and what it says lower cost together; `density` knows the density alone; `oracle` is the risk of a
reader who sees all that the pictures contain (`data.known_truth`). Every breast of the test patients at their last exam; metrics
are averaged over the training seeds, intervals are from a bootstrap over patients (so they hold what patients vary, not what
trainings vary). The recipe was chosen on data seed 1000, which no row of the results is measured on; but that another recipe was sought
at all is because the one before (stride 8, a shorter training) had been measured on seed 0, where the aligned prior gained nothing.

Test patients cost much less than trainings: those among the patients from 1200 to 5000, beside 60 and 15 % of the first 1200 to train
and validate on. Up to commit c726d01 the test patients were those of the first 1200, and the five runs of this recipe in the results, which differ by
rounding and by small changes of the code, put `lmvnet_no_prior - current_exam` between -.004 [-.024, .017] and .021 [-.000, .043]: too few
to say that it is not worse by .02. None of them is tested on now.

What the numbers are of: a patient's last exam is most often the one at which her cancer is found, so nearly all events lie at
that exam, and `c_index` is for the greater part *detection* (the row `prevalent` has the share of the events that come within half a
year). `c_index_later` leaves these breasts out, as `exclude_prevalent` does: what is left are few cancers, hardly visible yet.
`lmvnet` and `unaligned` begin from the best encoder of `current_exam` and train on for four epochs, so `lmvnet - unaligned` is a clean
comparison, and `lmvnet - current_exam` holds what four more epochs and the attention give as well. `lmvnet_no_prior` says how much that
may be: the same network, asked without priors. It is no perfect control, as only a fifth of its training samples had none.
`expected_over_observed_5` is the mean said risk of five years by the true share: the masked loss says too little where cancers come
early (`data.follow_up` has the sum), so the percentages of these models are for ranking.

What is finished is kept below `.cache/`, so a stopped run goes on where it was.
"""
import inspect, sys, time
from functools import partial
from pathlib import Path
import pandas as pd, torch
from joblib import Parallel, delayed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._common import Bench, ROOT, cores, options, tag
from benchmarks.registration import ADAM, LOSS, NET, REFINE, SIZE, in_silico, trained as trained_registration
from mammo_nb.core.seeding import seed_everything
from mammo_nb.data.cache import prepare_cohort
from mammo_nb.data.insilico import Settings, insilico_cohort, settings_name, write_insilico
from mammo_nb.data.known_truth import oracle_risk
from mammo_nb.data.prepare import PrepareConfig
from mammo_nb.data.risk_samples import RiskAugment, RiskDataset, breast_history, prior_flows, risk_dls
from mammo_nb.learners.risk import predict, risk_learner
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.metrics.predictions import predictions_table
from mammo_nb.metrics.survival import auc_by_year, brier_by_year, c_index, expected_over_observed, risk_table
from mammo_nb.models.lmvnet import LMVNet, UnalignedRisk
from mammo_nb.models.risk import CurrentExamRisk, DensityRisk
from mammo_nb.registration.mammoregnet import Refined
from mammo_nb.report.stages import code_hash

YEARS = range(1, 6)
LMV = dict(width=16, stride=4, token_pool=2, dropout=0., weight_dropout=0., drop_path=.1, prior_dropout=.2)
SAMPLES = dict(bs=16, augment=dict(flip=.5), wd=.01, encoder_rate=.3, dropout=.1)
RATE = dict(current_exam=3e-3, density=1e-2, lmvnet=1e-3, unaligned=1e-3)

def loaders(prepared, rows, flows, seed, augment=True):
    dls = risk_dls(prepared, bs=SAMPLES['bs'], rows=rows, augment=RiskAugment(**SAMPLES['augment']) if augment else None, seed=seed, device='cpu', in_memory=True)
    for ds in (dls.train_ds, dls.valid_ds): ds.flows = flows
    return dls

def model_of(kind, seed, encoder=None):
    "A new model; `encoder`: weights to begin with"
    seed_everything(seed)
    if kind == 'density': return DensityRisk()
    if kind == 'current_exam': return CurrentExamRisk('small', LMV['stride'], dropout=SAMPLES['dropout'], width=LMV['width'])
    net = (UnalignedRisk if kind == 'unaligned' else partial(LMVNet, registration=None))('small', **LMV)
    net.processor.encoder.load_state_dict(encoder)
    return net

def one_core(f, *args):
    "One training a core is faster than two threads a training"
    torch.set_num_threads(1)
    return f(*args)

def replaced(path, write):
    "A file that is there whole or not at all"
    write(path.with_suffix('.part')); path.with_suffix('.part').replace(path)

def unseen(patients, test_of, seed):
    "The test patients beyond the first `patients`, up to `test_of`; prepared once"
    name = settings_name(Settings(seed=seed))
    base = ROOT/'.cache'/'insilico'/f'{name.replace(" ", "_")}_test_{patients}_{test_of}_{code_hash("mammo_nb.data.insilico")[:12]}'
    cohort = insilico_cohort(test_of, seed).select(lambda t: (t.split == 'test') & (t.patient_index >= patients))
    return prepare_cohort(write_insilico(cohort, base/'files'), base/'prepared', PrepareConfig(size=SIZE))

def pictures_of(prepared, tested):
    "(prepared, rows) to train and validate on, and to test on: each breast at its last exam"
    rows = [breast_history(p.cohort, current='last') for p in (prepared, tested)]
    return (prepared, rows[0].query('split != "test"').reset_index(drop=True)), (tested, rows[1])

def align(pictures, base, epochs, folder):
    "Train the registration and ask it for every pair; made once. `pictures`: (prepared, rows) to train on, and to test on"
    path, start = folder/'flows.pt', time.time()
    if path.exists(): return
    net = Refined(trained_registration(pictures[0][0], base, epochs), **REFINE)
    flows = {k: f for p, rows in pictures for k, f in prior_flows(RiskDataset(p, rows, in_memory=False), net).items()}
    replaced(path, lambda p: torch.save(flows, p))
    print(f'  trained the registration, aligned all priors: {time.time()-start:.0f} s', flush=True)

def train(kind, seed, prepared, rows, epochs, folder):
    "The model of one training, and the flows of its priors; trained once"
    weights, first, begins = folder/f'{kind}_{seed}.pt', folder/f'current_exam_{seed}.pt', kind in ('lmvnet', 'unaligned')
    needs = [first] * begins + [folder/'flows.pt'] * (kind == 'lmvnet')
    while not all(f.exists() for f in needs): time.sleep(1)
    start, load = time.time(), partial(torch.load, map_location='cpu', weights_only=True)
    flows = load(folder/'flows.pt') if kind == 'lmvnet' else None
    encoder = None if not begins else {k.removeprefix('encoder.'): v for k, v in load(first).items() if k.startswith('encoder.')}
    model = model_of(kind, seed, encoder)
    if weights.exists(): model.load_state_dict(load(weights)); return model, flows
    dls = loaders(prepared, rows, flows, seed, augment=kind != 'density')  # density sees no picture
    learn = risk_learner(dls, model, recipe=None, encoder_rate=SAMPLES['encoder_rate'] if encoder else 1, lr=RATE[kind], wd=SAMPLES['wd'], folder=folder/f'{kind}_{seed}')
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    replaced(weights, lambda p: torch.save(learn.model.state_dict(), p))
    print(f'  trained {kind}, seed {seed}: {time.time()-start:.0f} s, best epoch {learn.keep_best.epoch_of_best+1} of {epochs}', flush=True)
    return learn.model, flows

def said(kind, seed, pictures, epochs, folder):
    "Predictions of one training for the test patients; made once"
    path, (tested, test) = folder/f'{kind}_{seed}.parquet', pictures[1]
    if path.exists(): return pd.read_parquet(path)
    model, flows = train(kind, seed, *pictures[0], epochs, folder)
    out, less = [ask(model, tested, test, flows, kind)], lambda which: test.assign(**{c: None for c in test if which in c})
    if kind == 'lmvnet': out.append(ask(model, tested, less('previous_image_id'), None, 'lmvnet_no_prior'))
    if kind in ('lmvnet', 'current_exam'): out.append(ask(model, tested, less('image_id_mlo'), flows, f'{kind}_no_mlo'))
    out = pd.concat(out, ignore_index=True)
    replaced(path, out.to_parquet)
    return out

def ask(model, prepared, rows, flows, system):
    "Predictions with flows that were computed before"
    ds = RiskDataset(prepared, rows, model.years, in_memory=False); ds.flows = flows
    return predict(model, prepared, system=system, samples=ds)

def known_outputs(risk, rows, system):
    "A predictions table of risks that no model said"
    return pd.concat([predictions_table(rows, risk[:, k-1], system, f'risk_year_{k}', 'truth') for k in YEARS], ignore_index=True)

LATER = .5 # years; an earlier cancer was there to be seen
METRICS = {m: (partial(c_index, tau=5.), [f'risk_year_{k}' for k in YEARS]) for m in ('c_index', 'c_index_later')} | {f'auc_year_{k}': (partial(auc_by_year, year=k), [f'risk_year_{k}']) for k in YEARS} | {'brier': (partial(brier_by_year, year=5), ['risk_year_5']), 'expected_over_observed_5': (partial(expected_over_observed, year=5), ['risk_year_5'])}

def estimate(tables, metric, other=None):
    f, columns = METRICS[metric]
    if metric == 'c_index_later': tables, other = ([t[(t.event == 0) | (t.time >= LATER)].reset_index(drop=True) for t in ts] if ts else ts for ts in (tables, other))
    columns = ('time', 'event', *columns)
    return bootstrap_ci(tables, f, columns=columns) if other is None else paired_difference(tables, other, f, columns=columns)

def main():
    a = options(__doc__, patients=1200, test_of=5000, epochs=(4, 'of lmvnet and unaligned'), first_epochs=(10, 'of current_exam'), registration_epochs=2, train_seeds=[0, 1, 2])
    if a.test_of <= a.patients: raise SystemExit(f'lmvnet: --test-of {a.test_of}, more than --patients {a.patients} wanted')
    config = dict(cohort=settings_name(Settings(seed=a.seed)), patients=a.patients, test_of=a.test_of, size=SIZE, epochs=[a.first_epochs, a.epochs, a.registration_epochs], rates=RATE, net=NET, loss=LOSS, adam=ADAM, refine=REFINE, samples=SAMPLES, **LMV)
    bench = Bench('lmvnet', a.seed, config, f'about {round(a.patients/1200*(8+2*a.registration_epochs+len(a.train_seeds)*(.3*a.first_epochs+1.5*a.epochs))+a.test_of/1000*2.5)} minutes on 2 cores, most of it to train {3*len(a.train_seeds)} models', train_seeds=a.train_seeds)
    if bench.done('prevalent', 'share_of_events'): return print('  all rows are there already, for this commit and these settings')
    prepared, base = in_silico(a.patients, a.seed)
    pictures = pictures_of(prepared, unseen(a.patients, a.test_of, a.seed))
    code = code_hash('mammo_nb.learners.risk', 'mammo_nb.learners.registration', 'mammo_nb.data.cache')[:12]
    folder = base/f'risk_{tag(SIZE, SAMPLES, LMV, RATE, NET, LOSS, ADAM, REFINE, a.first_epochs, a.epochs, a.registration_epochs, a.test_of, *map(inspect.getsource, (trained_registration, train, said, ask, align, unseen, pictures_of, loaders, model_of)))}_{code}'; folder.mkdir(parents=True, exist_ok=True)
    epochs = dict(current_exam=a.first_epochs, density=a.first_epochs, lmvnet=a.epochs, unaligned=a.epochs)
    # those that begin from another's encoder, or need the flows, stand behind these in the queue and wait for their files
    jobs = [('current_exam', s) for s in a.train_seeds] + [(k, s) for s in a.train_seeds for k in ('unaligned', 'lmvnet', 'density')]
    calls = [delayed(one_core)(said, k, s, pictures, epochs[k], folder) for k, s in jobs]
    calls.insert(1, delayed(one_core)(align, pictures, base, a.registration_epochs, folder))
    done = Parallel(n_jobs=cores())(calls)
    found = dict(zip(jobs, [*done[:1], *done[2:]]))
    tested, test = pictures[1]
    report(bench, found, a.train_seeds, test, oracle_risk(tested.cohort, test))

def half(table, other):
    "`table`, with the risks of every second patient from `other`"
    second, key = table.patient_id.isin(sorted(table.patient_id.unique())[::2]), ['exam_id', 'laterality']
    assert table[key].equals(other[key])
    return table.assign(**{c: table[c].where(~second, other[c]) for c in table if c.startswith('risk_year_')})

def report(bench, found, seeds, test, oracle):
    "All rows, from the predictions of all trainings"
    truth = test.assign(split='test')
    table = lambda t: risk_table(t, truth, quiet=True)
    runs = {'oracle': [table(known_outputs(oracle, test, 'oracle'))]}
    for kind in ('lmvnet', 'lmvnet_no_prior', 'lmvnet_no_mlo', 'unaligned', 'current_exam', 'current_exam_no_mlo', 'density'):
        source = kind.removesuffix('_no_prior').removesuffix('_no_mlo')
        runs[kind] = [table(found[source, s][found[source, s].system == kind]) for s in seeds]
        if kind.endswith('_no_mlo'): runs[f'{source}_half_mlo'] = [half(*both) for both in zip(runs[source], runs[kind])]
    for kind, ts in runs.items():
        for m in METRICS: e = estimate(ts, m); bench.add(kind, m, e.value, e.low, e.high, n=e.n)
    for a, b in (('lmvnet', 'current_exam'), ('lmvnet', 'unaligned'), ('lmvnet', 'lmvnet_no_prior'), ('lmvnet', 'lmvnet_no_mlo'), ('lmvnet_no_prior', 'current_exam'), ('lmvnet_no_mlo', 'current_exam_no_mlo'), ('lmvnet', 'lmvnet_half_mlo'), ('current_exam', 'current_exam_half_mlo')):
        for m in ('c_index', 'c_index_later'): e = estimate(runs[a], m, runs[b]); bench.add(f'{a} - {b}', m, e.value, e.low, e.high, n=e.n)
    ill = runs['oracle'][0].query('event == 1 and time <= 5')
    bench.add('prevalent', 'share_of_events', (ill.time < LATER).mean(), n=len(ill))

if __name__ == '__main__': main()
