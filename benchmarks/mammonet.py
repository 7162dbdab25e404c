"""What do a second view, fusion learning and a reader's gaze add? On in-silico patients with a shortcut: `make bench NAME=mammonet SEED=0`.

The patients are `insilico-v1` with one exam and `shortcut=True`. In *training* patients a tape mark gives away
the label in nine of ten images, each by itself, so two views give it away more surely than one. In
validation and test patients the mark is on every second image, whatever the label.

Trained is every row of Table 1 of Mammo-Net, the scan path, and Mammo-Net with the gaze of half of the
training patients, by one recipe with several training seeds. Measured are AUC and accuracy (at 0.5) of the
breasts, and for images with a malignant lesion the attention in the lesion and the pointing game, all on
test patients. Values are averaged over the training seeds. Intervals are from a bootstrap over patients, so
they contain the variation of patients, not of trainings; for the main differences, rows `..., training 0`
and so on show each training seed.

- The best single view is the one with the higher AUC on the *test* patients, a choice that favours the rival.
- Each row ends with the epoch of the best validation AUC, as in the paper. This favours networks without
  gaze: validation patients have no shortcut, so training may stop before the network relies on it.
  `auc_last` is the AUC of the last weights of the same training.
- `mean_of_views` is the mean prediction of both single-view networks: two views without interaction, but
  also two encoders, each with half as many images in a step.
- An empty map (no positive evidence) counts as a constant map; `empty_map` is their share. `pixel_auc`
  measures only the order of the cells, of empty maps too.
- `attention_both_maps` is the difference on lesions for which no map of both variants is empty, in any
  training. It has no row for fewer than ten images.

The recipe, the number of patients and of epochs were chosen on data seed 1000, before any row of another
seed was known; no row of the results is measured on it. They decide what there is to see: in batches of 8
instead of 16, a network without gaze had not found the tape after nine epochs (one training). The gain is
over a network that finds the shortcut.

Test patients cost only to draw. They are those among the next 3600 patients (a quarter), beside 60 and 15 %
of the first 1400 for training and validation. A first run of the same trainings on data seed 0 was tested on
the test patients among the first 1400, where the AUC of `cross_view_gaze - cross_view` was .019 with an
interval that touched 0. None of those patients is tested now.

Differences from the paper, beside the size of images and network:

- one cycle of a few epochs at 3e-3 from new weights (300 epochs at 1e-4 from weights of ImageNet)
- a gaze weight of 12 (0.5; the rows `weight_...` of `gaze` show what less does)
- pooling over the strongest tenth of the cells (mean)
- activation maps that also teach the weights that they are computed with
- one encoder for both views (two); so with two views it has both images of a breast in each step
- cancers weighted by a shift of the logit (a factor)
- maps always explain the class cancer (`cam_class`)

All rows have one recipe. Rate, epochs and pooling were chosen with the rows without gaze in view too, the
weight of the gaze and `create_graph` for those with gaze.
"""
import sys
from functools import partial
from pathlib import Path
import pandas as pd
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import Bench, check_test_patients, options
from benchmarks._trainings import prepare_insilico, recipe_folder, run_jobs, tables_or_train
import mammo_nb.core.fastai_import
from fastai.callback.core import Callback
from mammo_nb.cohort.exams import breast_table
from mammo_nb.core.seeding import rng_for, seed_everything
from mammo_nb.gaze.fixations import find_fixations
from mammo_nb.gaze.heatmap import perturb_gaze
from mammo_nb.insilico.config import InSilicoConfig, settings_name
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.keep_best import KeepBest
from mammo_nb.learners.mammonet import VARIANTS, attention_maps, mammonet_learner
from mammo_nb.learners.systems import predict
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.metrics.localization import localization_ci, localization_table
from mammo_nb.metrics.tables import select_output
from mammo_nb.metrics.thresholds import accuracy
from mammo_nb.metrics.weighted import auc
from mammo_nb.samples.augment import Augment
from mammo_nb.samples.two_view import two_view_dls

SIZE = (144, 112) # whole cells of the map
NET = dict(
    width=16, dilate_last=True, pool='top10', shared=True, heads=4, head_dim=16, source_pool=2,
    create_graph=True)
TRAIN = dict(
    stride=16, bs=16, flip=.5, lr=3e-3, gaze_weight=12., fusion_weight=.2, scan_weight=.1,
    n_slices=4)
PIXELS_PER_DEGREE = 20 # stored pixels a degree of vision of the in-silico reader
ROWS = (
    'cc', 'mlo', 'cross_view', 'cross_view_bfl', 'cross_view_gaze', 'mammonet',
    'mammonet_scanpath', 'half_gaze')
HALF_GAZE = ('missing', .5)
MODULES = (
    'mammo_nb.learners.mammonet', 'mammo_nb.metrics.localization', 'mammo_nb.preparation.cache')

# Data

def select_patients(patients, test_of, seed):
    "Training and validation patients among the first `patients`, test patients after them"
    cohort = insilico_cohort(max(patients, test_of), seed, exams=1, shortcut=True)
    return cohort.select(lambda t: (t.split == 'test') == (t.patient_index >= patients))

def insilico_patients(patients, test_of, seed):
    "Prepared patients with the shortcut, and their folder"
    cohort = select_patients(patients, test_of, seed)
    return prepare_insilico(cohort, f'{patients}_{test_of}', SIZE)

def degrade_gaze(kind, level, cohort, seed):
    "Function that makes gaze `missing` (a share of the patients), or adds `noise` or `offset` (mm)"
    images = cohort.images.set_index('image_id')
    def change(image_id, gaze):
        row = images.loc[image_id]
        if kind == 'missing':
            keep = rng_for(seed, kind, row.patient_id).uniform() >= level
            return gaze if keep else None
        # noise of single points, 60 a second, would only widen the blur
        points = gaze.assign(time_ms=gaze.duration_ms.cumsum())
        fixations = find_fixations(points, PIXELS_PER_DEGREE)
        pixels = level/row.pixel_spacing_mm
        return perturb_gaze(fixations, rng_for(seed, kind, image_id), **{kind: pixels})
    return change

def breasts_with_lesions(prepared):
    "Select the test breasts with a malignant lesion in an image"
    rows = breast_table(prepared.cohort)
    malignant = prepared.cohort.findings.query('pathology == "malignant"').image_id
    visible = rows.image_id_cc.isin(malignant) | rows.image_id_mlo.isin(malignant)
    return rows[(rows.split == 'test') & visible]

# Training

class LastWeights(Callback):
    "Keep the weights of the end of training, before those of the best epoch are restored"
    order = KeepBest.order-1

    def after_fit(self):
        weights = self.learn.model.state_dict()
        self.state = {k: v.detach().clone() for k, v in weights.items()}

def make_loaders(row, seed, prepared, change):
    "Loaders for training; `change`: (kind, level) of the gaze, or `None`"
    gaze = True
    if change is not None and change[0] != 'weight':
        gaze = degrade_gaze(*change, prepared.cohort, seed)
    return two_view_dls(
        prepared, bs=TRAIN['bs'], seed=seed, augment=Augment(flip=TRAIN['flip']), gaze=gaze,
        gaze_slices=TRAIN['n_slices'] if row == 'mammonet_scanpath' else 1, device='cpu',
        in_memory=True)

def make_learner(row, seed, dls, change):
    "Learner of a row; `change`: ('weight', w) for another weight of the gaze"
    variant = row if row in VARIANTS else 'cross_view_gaze'
    loss_args = dict(cam_class='truth') if row == 'explain_truth' else None
    gaze_weight = TRAIN['gaze_weight']
    if change is not None and change[0] == 'weight':
        gaze_weight = change[1]
    return mammonet_learner(
        dls, variant, 'small', TRAIN['stride'], seed=seed, model_args=NET, loss_args=loss_args,
        cbs=[LastWeights()], gaze_weight=gaze_weight, fusion_weight=TRAIN['fusion_weight'],
        scan_weight=TRAIN['scan_weight'], start=False)

def predict_test(learn, prepared):
    "Probabilities of the test breasts"
    return select_output(predict(learn, prepared, split='test'), output='probability')

def train(row, seed, prepared, epochs, change):
    "Train a row; predictions and localisation of its best weights, predictions of its last"
    seed_everything(seed)
    dls = make_loaders(row, seed, prepared, change)
    learn = make_learner(row, seed, dls, change)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, TRAIN['lr'])
    best = predict_test(learn, prepared)
    maps = attention_maps(learn, prepared, rows=breasts_with_lesions(prepared))
    localization = localization_table(maps, prepared)
    learn.model.load_state_dict(learn.last_weights.state)
    return best, localization, predict_test(learn, prepared)

def trained(row, seed, prepared, epochs, folder, change=None):
    "The three tables of one training, made once; `change`: (kind, level) of gaze or of its weight"
    name = row if change is None else f'{change[0]}_{change[1]:g}'
    make = partial(train, row, seed, prepared, epochs, change)
    return tables_or_train(folder, f'{name}_{seed}', PARTS, make)

PARTS = ('predictions', 'localization', 'last')

def results_folder(base, epochs):
    "Name the folder of trainings of these settings and this code"
    recipe = (SIZE, NET, TRAIN, epochs, PIXELS_PER_DEGREE)
    functions = (
        degrade_gaze, breasts_with_lesions, LastWeights, make_loaders, make_learner, predict_test,
        train)
    return recipe_folder(base, 'mammonet', recipe, functions, MODULES)

# Metrics; a run is a list of trainings, a training the three tables of `trained`

def threshold_half(table):
    "Predictions as 0 and 1, at one half"
    return table.assign(value=(table.value >= .5).astype(float))

def same_table(table):
    return table

BREAST_METRICS = dict( # function, what is done before, which table
    auc=(auc, same_table, 0), acc=(accuracy, threshold_half, 0), auc_last=(auc, same_table, 2))
METRICS = (
    *BREAST_METRICS, 'attention_in_lesion', 'pointing_game', 'pixel_auc', 'empty_map')

def estimate_breasts(run, metric, other=None):
    "Estimate a metric of breasts"
    function, change, part = BREAST_METRICS[metric]
    tables = [change(training[part]) for training in run]
    if other is None:
        return bootstrap_ci(tables, function)
    return paired_difference(tables, [change(training[part]) for training in other], function)

def common_images(run, other, with_maps=False):
    "Images that both variants have; `with_maps`: without those with an empty map"
    common = set(run[0][1].image_id) & set(other[0][1].image_id)
    if with_maps:
        for _, table, _ in (*run, *other):
            common -= set(table.image_id[table.empty_map > 0])
    return common

def estimate_images(run, metric, other=None):
    "Estimate a localisation metric; `None` for a difference on fewer than ten images"
    if other is None:
        return localization_ci([table for _, table, _ in run], metric)
    with_maps = metric == 'attention_both_maps'
    common = common_images(run, other, with_maps)
    if len(common) < 10:
        return None
    def select(trainings):
        return [table[table.image_id.isin(common)] for _, table, _ in trainings]
    metric = 'attention_in_lesion' if with_maps else metric
    return localization_ci(select(run), metric, select(other))

def estimate(run, metric, other=None):
    "Estimate a metric of a run, or the paired difference of two runs"
    function = estimate_breasts if metric in BREAST_METRICS else estimate_images
    return function(run, metric, other)

def mean_of_views(cc, mlo):
    "Mean predictions of two trainings, breast by breast; without attention maps"
    key = ['patient_id', 'exam_id', 'laterality']
    def mean(a, b):
        both = a.merge(b[[*key, 'value']], on=key, suffixes=('', '_mlo'), validate='one_to_one')
        value = (both.value+both.value_mlo)/2
        return both.assign(value=value).drop(columns='value_mlo')
    return mean(cc[0], mlo[0]), None, mean(cc[2], mlo[2])

# Rows

def add_differences(bench, name, run, other, metrics):
    "Add the differences of two runs"
    for metric in metrics:
        bench.add_estimate(name, metric, estimate(run, metric, other))

def add_each_training(bench, name, seeds, run, others):
    "Add the difference of each training and one or more others (their mean)"
    for metric in ('auc', 'attention_in_lesion'):
        for seed, training, other in zip(seeds, run, others):
            difference = estimate([training], metric, other)
            bench.add_estimate(f'{name}, training {seed}', metric, difference)

def add_mean_of_views(bench, runs):
    "Add the mean of two single-view networks, and cross-view attention against it"
    mean = [mean_of_views(cc, mlo) for cc, mlo in zip(runs['cc'], runs['mlo'])]
    for metric in BREAST_METRICS:
        bench.add_estimate('mean_of_views', metric, estimate(mean, metric))
        difference = estimate(runs['cross_view'], metric, mean)
        bench.add_estimate('cross_view - mean_of_views', metric, difference)

def add_chance(bench, runs):
    "Add attention at chance, and the accuracy of predicting no cancer for every breast"
    chance = estimate(runs['cross_view'], 'chance')
    bench.add_estimate('chance', 'attention_in_lesion', chance)
    best, _, last = runs['cc'][0]
    no_cancer = [(best.assign(value=0.), None, last.assign(value=0.))]
    bench.add_estimate('always_no_cancer', 'acc', estimate(no_cancer, 'acc'))

def add_comparisons(bench, runs, best):
    "Add the differences of rows; `best`: the better single view"
    pairs = (
        ('cross_view', best), ('cross_view_bfl', 'cross_view'), ('cross_view_gaze', 'cross_view'),
        ('mammonet', 'cross_view_gaze'), ('mammonet_scanpath', 'mammonet'),
        ('half_gaze', 'cross_view'))
    for a, b in pairs:
        name = f'{a} - {"best_single" if b == best else b}'
        add_differences(bench, name, runs[a], runs[b], (*METRICS, 'attention_both_maps'))
    # the mean of these runs is half of the gain over the row without gaze
    half_gain = [*runs['cross_view'], *runs['cross_view_gaze']]
    add_differences(bench, 'half_gaze - half_gain', runs['half_gaze'], half_gain, METRICS)

def add_trainings(bench, runs, best, seeds):
    "Add the main differences for each training seed"
    for a, b, name in (('cross_view', best, 'best_single'),
                       ('cross_view_gaze', 'cross_view', 'cross_view')):
        others = [[training] for training in runs[b]]
        add_each_training(bench, f'{a} - {name}', seeds, runs[a], others)
    ends = list(zip(runs['cross_view'], runs['cross_view_gaze']))
    add_each_training(bench, 'half_gaze - half_gain', seeds, runs['half_gaze'], ends)

def better_view(runs):
    "The single view with the higher AUC on the test patients"
    def score(view):
        tables = [training[0] for training in runs[view]]
        return bootstrap_ci(tables, auc, n_boot=10).value
    return max(('cc', 'mlo'), key=score)

def add_rows(bench, runs, seeds):
    "Add all rows"
    add_mean_of_views(bench, runs)
    for row, run in runs.items():
        for metric in METRICS:
            bench.add_estimate(row, metric, estimate(run, metric))
    add_chance(bench, runs)
    best = better_view(runs)
    bench.add_estimate(f'best_single: {best}', 'auc', estimate(runs[best], 'auc'))
    add_comparisons(bench, runs, best)
    add_trainings(bench, runs, best, seeds)

# The run, shared with the benchmark of gaze

def open_bench(name, a, minutes, n_models):
    "Open the results of a run"
    settings = settings_name(InSilicoConfig(seed=a.seed, exams=1, shortcut=True))
    config = dict(
        cohort=settings, patients=a.patients, test_of=a.test_of, size=SIZE, epochs=a.epochs,
        net=NET, train=TRAIN)
    cost = f'about {minutes} minutes on 2 cores, most of it to train {n_models} models'
    return Bench(name, a.seed, config, cost, train_seeds=a.train_seeds)

def run_trainings(a, rows):
    "Run all trainings; `rows`: row -> change of the gaze or `None`. Row -> list of trainings"
    prepared, base = insilico_patients(a.patients, a.test_of, a.seed)
    folder = results_folder(base, a.epochs)
    keys = [(row, seed) for seed in a.train_seeds for row in rows]
    jobs = [(trained, row, seed, prepared, a.epochs, folder, rows[row]) for row, seed in keys]
    found = dict(zip(keys, run_jobs(jobs)))
    return {row: [found[row, seed] for seed in a.train_seeds] for row in rows}

def main(argv=None):
    a = options(__doc__, argv, patients=1400, test_of=5000, epochs=7, train_seeds=[0, 1, 2])
    check_test_patients('mammonet', a.patients, a.test_of)
    n_seeds = len(a.train_seeds)
    minutes = round(a.patients/1000*(4+1.2*a.epochs*n_seeds)+a.test_of/1000*2)
    bench = open_bench('mammonet', a, minutes, len(ROWS)*n_seeds)
    last = f'half_gaze - half_gain, training {a.train_seeds[-1]}'
    if bench.finished(last, 'attention_in_lesion'):
        return
    changes = {row: HALF_GAZE if row == 'half_gaze' else None for row in ROWS}
    add_rows(bench, run_trainings(a, changes), a.train_seeds)

if __name__ == '__main__':
    main()
