"""What do a second view, fusion learning and a reader's gaze add? On in-silico patients with a shortcut: `make bench NAME=mammonet SEED=0`.

Draws `insilico-v1` with one exam and `shortcut=True` for the data seed (any): in *training* patients a tape mark gives the label
away in nine of ten pictures (each for itself: two views of a breast give it away more surely than one); in validation and test patients it is
on every second picture, whatever the label. Trains every row of
Table 1 of Mammo-Net, the scan path, and Mammo-Net with the gaze of half of the training patients, by one recipe with three training
seeds each. AUC and accuracy (at 0.5) of the breasts, attention in the lesion and pointing game of the pictures with a malignant
lesion, of the test patients; averaged over the training seeds, intervals from a bootstrap over patients: they hold what patients vary, not what trainings vary. For
the differences that matter most, rows `..., training 0` and so on tell each training seed by itself. The best single view is the
one with the higher AUC *on the test patients*: the choice favours the rival. Every row ends with the epoch of the best validation AUC,
as in the paper. That favours the networks without gaze: validation patients are free of the shortcut, so a network may stop before it
leans on it. `auc_last` is the AUC of the same training's last weights, for those who have no such patients. `mean_of_views` is the mean of what the two single-view
networks say: two views that do not look at each other, but also two encoders that have seen half as many pictures in each step. A map
on which nothing speaks for cancer counts as one that is even everywhere (`silent`: the share of such lesions; `coverage_auc` asks for the order of the cells
only, of silent maps too); `attention_both_speak` is
the difference on the lesions on which neither of two rows is silent, in no training; no row where these are fewer than ten. The recipe, the number of patients and that of epochs were chosen on data seed
1000, before any row of another seed was known; no row of the results is measured on it. They decide what there is to see: in batches of
8 instead of 16 a network without gaze had not found the tape after nine epochs (one training). The gain is that over a network that
finds the shortcut.

Test patients cost only to draw: there are as many as the next 3600 patients hold (a quarter), beside 60 and 15 % of the first 1400 to
train and validate on. A first run of the same trainings on data seed 0 was tested on the test patients among the first 1400, and the AUC
of `cross_view_gaze - cross_view` was .019 with an interval that touched 0. None of those patients is tested on now: a larger test that
held them would start with what asked for it.

What differs from the paper beside the size of pictures and network: one cycle of a few epochs at 3e-3 from new weights (300 at 1e-4 from
weights of ImageNet), a weight of the gaze of 12 (paper 0.5; the rows `weight_...` of `gaze` show what less does), pooling over the strongest
tenth of the cells (mean), activation maps that also teach the weights that they are made with, one encoder for both views (two; it also
means that in two-view rows the encoder sees both pictures of a breast in each step, in single-view rows one), breasts with cancer weighed
by a shift of the logit (a factor), and every map is asked where something speaks for cancer (`explain`). All rows have one recipe. Rate,
epochs and pooling were chosen with the rows without gaze in view too, the weight of the gaze and `create_graph` for those with it.

What is finished is kept below `.cache/`, so a stopped run goes on where it was.
"""
import inspect, sys, time
from pathlib import Path
import pandas as pd, torch
from joblib import Parallel, delayed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._common import Bench, ROOT, cores, options, tag
from fastai.callback.core import Callback
from mammo_nb.core.seeding import rng_for, seed_everything
from mammo_nb.data.cache import prepare_cohort
from mammo_nb.data.cohort import breasts
from mammo_nb.data.gaze import disturb_gaze, find_fixations
from mammo_nb.data.insilico import Settings, insilico_cohort, settings_name, write_insilico
from mammo_nb.data.prepare import PrepareConfig
from mammo_nb.data.samples import Augment, two_view_dls
from mammo_nb.learners.mammonet import VARIANTS, attention_maps, mammonet_learner
from mammo_nb.learners.training import KeepBest
from mammo_nb.learners.two_view import predict
from mammo_nb.metrics.bootstrap import auc, bootstrap_ci, paired_difference
from mammo_nb.metrics.classification import accuracy
from mammo_nb.metrics.localization import localization_ci, localization_table
from mammo_nb.metrics.predictions import one_output
from mammo_nb.report.stages import code_hash

SIZE = (144, 112) # whole cells of the map
NET = dict(width=16, dense=True, pool='peak', shared=True, heads=4, head_dim=16, source_pool=2, create_graph=True)
TRAIN = dict(stride=16, bs=16, flip=.5, lr=3e-3, gaze_weight=12., fusion_weight=.2, scan_weight=.1, slices=4)
PER_DEGREE = 20 # stored pixels a degree of vision of the in-silico reader
ROWS = ('cc', 'mlo', 'cross_view', 'cross_view_bfl', 'cross_view_gaze', 'mammonet', 'mammonet_scanpath', 'half_gaze')

def chosen(patients, test_of, seed):
    "Of the first `patients` those to train and validate on, of those after them, up to `test_of`, those to test on"
    cohort = insilico_cohort(max(patients, test_of), seed, exams=1, shortcut=True)
    return cohort.select(lambda t: (t.split == 'test') == (t.patient_index >= patients))

def in_silico(patients, test_of, seed):
    "The patients with the shortcut, written and prepared once; their folder"
    name = settings_name(Settings(seed=seed, exams=1, shortcut=True))
    base = ROOT/'.cache'/'insilico'/f'{name.replace(" ", "_")}_{patients}_{test_of}_{code_hash("mammo_nb.data.insilico")[:12]}'
    cohort = write_insilico(chosen(patients, test_of, seed), base/'files')
    return prepare_cohort(cohort, base/'prepared', PrepareConfig(size=SIZE)), base

def worse(kind, level, cohort, seed):
    "Gaze of a worse recording: `missing` (a fraction of the patients has none), `noise` or `offset` (mm)"
    im = cohort.images.set_index('image_id')
    def change(image_id, gaze):
        r = im.loc[image_id]
        if kind == 'missing': return gaze if rng_for(seed, kind, r.patient_id).uniform() >= level else None
        looks = find_fixations(gaze.assign(time_ms=gaze.duration_ms.cumsum()), per_degree=PER_DEGREE) # noise of single points, 60 a second, would only widen the blur
        return disturb_gaze(looks, rng_for(seed, kind, image_id), **{kind: level/r.pixel_spacing_mm})
    return change

def with_lesions(prepared):
    "The test breasts that have a malignant lesion in a picture: where a map can be right or wrong"
    rows, ids = breasts(prepared.cohort), set(prepared.cohort.findings.query('pathology == "malignant"').image_id)
    return rows[(rows.split == 'test') & (rows.image_id_cc.isin(ids) | rows.image_id_mlo.isin(ids))]

class LastWeights(Callback):
    "Keeps the weights of the end of training, before those of the best epoch are put back"
    order = KeepBest.order-1
    def after_fit(self): self.state = {k: v.detach().clone() for k, v in self.learn.model.state_dict().items()}

def trained(row, seed, prepared, epochs, folder, spoiled=None):
    "Test predictions, localisation and predictions of the last weights of one training; made once. `spoiled`: (kind, level) of the gaze of `cross_view_gaze`, or its `weight`"
    name = row if spoiled is None else f'{spoiled[0]}_{spoiled[1]:g}'
    paths = [folder/f'{name}_{seed}_{k}.parquet' for k in ('said', 'found', 'last')]
    if all(p.exists() for p in paths): return tuple(pd.read_parquet(p) for p in paths)
    torch.set_num_threads(1) # one training a core is faster than two threads a training
    seed_everything(seed); start = time.time()
    heavy = spoiled is not None and spoiled[0] == 'weight'
    gaze = True if spoiled is None or heavy else worse(*spoiled, prepared.cohort, seed)
    dls = two_view_dls(prepared, bs=TRAIN['bs'], seed=seed, augment=Augment(flip=TRAIN['flip']), gaze=gaze, gaze_slices=TRAIN['slices'] if row == 'mammonet_scanpath' else 1, device='cpu', in_memory=True)
    learn = mammonet_learner(dls, row if row in VARIANTS else 'cross_view_gaze', 'small', TRAIN['stride'], seed=seed, model_args=NET, loss_args=dict(explain='truth') if row == 'explain_truth' else None, cbs=[LastWeights()], fusion_weight=TRAIN['fusion_weight'], scan_weight=TRAIN['scan_weight'], gaze_weight=spoiled[1] if heavy else TRAIN['gaze_weight'])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, TRAIN['lr'])
    asked = lambda: one_output(predict(learn, prepared, split='test'), output='probability')
    out = [asked(), localization_table(attention_maps(learn, prepared, rows=with_lesions(prepared)), prepared)]
    learn.model.load_state_dict(learn.last_weights.state); out.append(asked())
    folder.mkdir(parents=True, exist_ok=True)
    for p, t in zip(paths, out): t.to_parquet(p.with_suffix('.part')); p.with_suffix('.part').replace(p)
    print(f'  trained {row}, seed {seed}: {time.time()-start:.0f} s, best epoch {learn.keep_best.epoch_of_best+1} of {epochs}', flush=True)
    return out

def folder_of(base, epochs):
    "Where trainings of these settings and of this code are kept"
    recipe = tag(SIZE, NET, TRAIN, epochs, PER_DEGREE, inspect.getsource(worse), inspect.getsource(trained), inspect.getsource(LastWeights), inspect.getsource(with_lesions))
    return base/f'mammonet_{recipe}_{code_hash("mammo_nb.learners.mammonet", "mammo_nb.metrics.localization", "mammo_nb.data.cache")[:12]}'

def mean_of_views(cc, mlo):
    "Predictions of two networks, averaged breast by breast; no attention map"
    key = ['patient_id', 'exam_id', 'laterality']
    def mean(a, b):
        t = a.merge(b[[*key, 'value']], on=key, suffixes=('', '_mlo'), validate='one_to_one')
        return t.assign(value=(t.value+t.value_mlo)/2).drop(columns='value_mlo')
    return mean(cc[0], mlo[0]), None, mean(cc[2], mlo[2])

def called(t): return t.assign(value=(t.value >= .5).astype(float))
SAID = dict(auc=(auc, lambda t: t, 0), acc=(accuracy, called, 0), auc_last=(auc, lambda t: t, 2)) # metric -> its function, what is done before, which table

def estimate(a, metric, b=None):
    "A metric of one row of the table, or the paired difference of two"
    if metric not in SAID:
        both = None if b is None else set(a[0][1].image_id) & set(b[0][1].image_id)  # a single-view row has the pictures of its view
        if metric == 'attention_both_speak': both -= {i for _, f, _ in (*a, *b) for i in f.image_id[f.silent > 0]}; metric = 'attention_in_lesion'
        if both is not None and len(both) < 10: return None
        found = lambda r: [f if both is None else f[f.image_id.isin(both)] for _, f, _ in r]
        return localization_ci(found(a), metric, None if b is None else found(b))
    f, table, which = SAID[metric]
    said = lambda r: [table(o[which]) for o in r]
    return bootstrap_ci(said(a), f) if b is None else paired_difference(said(a), said(b), f)

METRICS = ('auc', 'acc', 'auc_last', 'attention_in_lesion', 'pointing_game', 'coverage_auc', 'silent')

def training_by_training(bench, name, seeds, a, b):
    "The difference of a row and one or more others (their mean), for each training seed"
    for m in ('auc', 'attention_in_lesion'):
        for k, x, y in zip(seeds, a, b):
            e = estimate([x], m, y)
            if e is not None: bench.add(f'{name}, training {k}', m, e.value, e.low, e.high, n=e.n)

def main():
    a = options(__doc__, patients=1400, test_of=5000, epochs=7, train_seeds=[0, 1, 2])
    name = settings_name(Settings(seed=a.seed, exams=1, shortcut=True))
    if a.test_of <= a.patients: raise SystemExit(f'mammonet: --test-of {a.test_of}, more than --patients {a.patients} wanted')
    config = dict(cohort=name, patients=a.patients, test_of=a.test_of, size=SIZE, epochs=a.epochs, net=NET, train=TRAIN)
    bench = Bench('mammonet', a.seed, config, f'about {round(a.patients/1000*(4+1.2*a.epochs*len(a.train_seeds))+a.test_of/1000*2)} minutes on 2 cores, most of it to train {len(ROWS)*len(a.train_seeds)} models', train_seeds=a.train_seeds)
    if bench.done(f'half_gaze - half_gain, training {a.train_seeds[-1]}', 'attention_in_lesion'): return print('  all rows are there already, for this commit and these settings')
    prepared, base = in_silico(a.patients, a.test_of, a.seed)
    folder = folder_of(base, a.epochs)
    jobs = [(r, s) for s in a.train_seeds for r in ROWS]
    done = dict(zip(jobs, Parallel(n_jobs=cores())(delayed(trained)(r, s, prepared, a.epochs, folder, ('missing', .5) if r == 'half_gaze' else None) for r, s in jobs)))
    runs = {r: [done[r, s] for s in a.train_seeds] for r in ROWS}
    for m in SAID:
        both = [mean_of_views(done['cc', s], done['mlo', s]) for s in a.train_seeds]
        e = estimate(both, m); bench.add('mean_of_views', m, e.value, e.low, e.high, n=e.n)
        e = estimate(runs['cross_view'], m, both); bench.add('cross_view - mean_of_views', m, e.value, e.low, e.high, n=e.n)
    for r, each in runs.items():
        for m in METRICS: e = estimate(each, m); bench.add(r, m, e.value, e.low, e.high, n=e.n)
    e = estimate(runs['cross_view'], 'chance'); bench.add('chance', 'attention_in_lesion', e.value, e.low, e.high, n=e.n)
    nobody = [tuple(t if t is None else t.assign(value=0.) for t in (o[0], None, o[2])) for o in runs['cc'][:1]] # the accuracy of calling nobody ill
    e = estimate(nobody, 'acc'); bench.add('nobody_ill', 'acc', e.value, e.low, e.high, n=e.n)
    gain = [*runs['cross_view'], *runs['cross_view_gaze']] # their mean is half of the gain above the row without gaze
    best = max(('cc', 'mlo'), key=lambda v: bootstrap_ci([o[0] for o in runs[v]], auc, n_boot=10).value)
    e = estimate(runs[best], 'auc'); bench.add(f'best_single: {best}', 'auc', e.value, e.low, e.high, n=e.n)
    for x, y, text in (('cross_view', best, 'best_single'), ('cross_view_bfl', 'cross_view', None), ('cross_view_gaze', 'cross_view', None), ('mammonet', 'cross_view_gaze', None), ('mammonet_scanpath', 'mammonet', None), ('half_gaze', 'cross_view', None)):
        for m in (*METRICS, 'attention_both_speak'):
            e = estimate(runs[x], m, runs[y])
            if e is not None: bench.add(f'{x} - {text or y}', m, e.value, e.low, e.high, n=e.n)
    for m in METRICS:
        e = estimate(runs['half_gaze'], m, gain)
        if e is not None: bench.add('half_gaze - half_gain', m, e.value, e.low, e.high, n=e.n)
    for x, y, text in (('cross_view', best, 'best_single'), ('cross_view_gaze', 'cross_view', 'cross_view')): training_by_training(bench, f'{x} - {text}', a.train_seeds, runs[x], [[o] for o in runs[y]])
    training_by_training(bench, 'half_gaze - half_gain', a.train_seeds, runs['half_gaze'], list(zip(runs['cross_view'], runs['cross_view_gaze'])))

if __name__ == '__main__': main()
