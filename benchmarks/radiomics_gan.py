"""Can the MLO be drawn from the CC, and what is a drawn MLO worth? On in-silico patients: `make bench NAME=radiomics_gan SEED=0`.

The patients are those of `insilico-v1` with one exam; two of five images have a lesion. A generator reads the CC,
the mask of its lesions and their radiomics, and draws the MLO with its mask. It is trained with a critic, and with a
radiomics loss whose predictor beats the mean on validation patients. Test patients are seen by no training.

Rivals that need no training of a network:

- `copy_cc`: the CC itself, with its mask. `mean_mlo`: the mean MLO of the training patients, without a lesion.
- `nearest`: the MLO of the training breast whose CC is nearest in the sum of squares.

Measures, a breast each: SSIM, PSNR and L1 over the true breast, on [0, 1]. `placement_mm`: how much the distance
of the lesion from the nipple differs between the CC and the drawing, where a lesion was drawn; `empty_mask` is the
share of lesions of which none was. `radiomics_distance`: root mean square of the difference between the radiomics
of the drawn and the true MLO lesion, as z-scores of training lesions that are cut off at 5. A drawn lesion of fewer
than 4 pixels is not measured. FID and KID name their network; `real_mlo` is what two halves of the true test images
have; all sets are compared with the second half of the true ones, and are of the patients of the first half.

- `true_radiomics - shuffled`: the same generator, told the radiomics of other lesions. Only lesions that are drawn
  with both count.
- `with_radiomics - without`: against a generator that reads no radiomics and has no loss of them.

In training the masks that a generator with radiomics reads grow by 0 to 6 pixels, as loose annotations do, so that
it learns size and shape of a lesion from the radiomics. Without this the drawings of true and of shuffled radiomics
hardly differ: the mask shows both. `without` has only the mask, and learns from masks as they are.

Downstream: a Mammo-Net reads CC and a second image, trained on patients of which the generator saw none, three
times each. `cc_and_synthetic_mlo` reads drawings that were made *without masks and radiomics*: annotations exist
because a radiologist found something, so a drawing that was told of them tells the label. `cc_and_annotated_mlo`
shows how much: it is a leak, not a result. `cc` reads the CC twice, `cc_and_mlo` the true MLO.
`train_synthetic` is trained on drawings and tested on true MLOs; `test_synthetic` the reverse.

Values are means over the training seeds. Intervals are from a bootstrap over patients. Images are 128 x 96 and
networks small; the published ones are 256 x 256 with 64 channels, and train with deep features. The recipe was
chosen on patients of training and validation with an index from 450 to 699, of whom no generator learns.
There the strong radiomics loss (weight 2, with `exchange`) gave the largest difference of true and shuffled
radiomics. A weight of 0.1 without `exchange` was run on the test patients too: it gave -0.023 [-0.048, 0.006].
"""
import logging
import sys
import warnings
from functools import partial
from pathlib import Path
import numpy as np
import pandas as pd
import torch
HERE = Path(__file__).resolve().parent # not on the path: a file in it has the name of PyRadiomics' package
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or '.').resolve() != HERE)]
from benchmarks._bench import Bench, check_test_patients, options
from benchmarks._trainings import (
    prepare_insilico, recipe_folder, run_jobs, tables_or_train, weights_or_train
)
from mammo_nb.core.errors import InputError
from mammo_nb.core.optional import optional_import
from mammo_nb.core.seeding import seed_everything
from mammo_nb.insilico.config import InSilicoConfig, settings_name
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.mammonet import mammonet_learner
from mammo_nb.learners.radiomics_gan import compare_views, radiomics_gan_learner
from mammo_nb.learners.systems import predict
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.metrics.image_quality import radiomics_distance, set_distance
from mammo_nb.metrics.tables import select_output
from mammo_nb.metrics.weighted import auc, weighted_mean
from mammo_nb.models.feature_maps import ImageFeatures
from mammo_nb.models.radiomics_gan import RadiomicsGAN
from mammo_nb.preparation.radiomics import RADIOMICS_NAMES, RadiomicsExtractor, lesion_region
from mammo_nb.samples.augment import Augment
from mammo_nb.samples.loaders import prediction_dl
from mammo_nb.samples.two_view import TwoViewDataset, two_view_dls
from mammo_nb.samples.view_synthesis import (
    ViewSynthesisDataset, fit_scaler, image_radiomics, replace_images, view_rows, view_synthesis_dls
)

SIZE = (128, 96)
COHORT = dict(exams=1)
NET = dict(width=16, depth=5, hidden=64)
TRAIN = dict(bs=8, lr=2e-3, epochs=8)
OPTIONS = dict(perceptual=False, accumulate=1, patience=None, exchange=True)
AUGMENT = dict(rotate=4, shift=.03, scale=.04, gain=0., gamma=0.)
PREDICTOR = 20 # epochs
CLASSIFIER = dict(epochs=8, lr=3e-3, bs=16)
CLASSIFIER_NET = dict(width=16, heads=2, head_dim=16, embed=32, hidden=16)
RAMPS = dict(gan=(.02, .05, 8), l1=5., ssim=6., radiomics=(0., 2., 2))
SMALLEST = 4 # pixels of a lesion that is measured
MODULES = ('mammo_nb.learners.radiomics_gan', 'mammo_nb.preparation.cache')
MEASURES = ('ssim_breast', 'psnr_breast', 'l1_breast', 'placement_mm', 'empty_mask')
PATIENTS = dict(generator=450, classifier=700) # of training and validation, up to this index
KINDS = dict( # masks, radiomics, pixels by which masks grow in training
    with_radiomics=(True, True, 6), without=(True, False, 0), plain=(False, False, 0))
LOOKS = dict( # what the classifier reads beside the CC, in training and in test
    cc=('cc', 'cc'), cc_and_mlo=('mlo', 'mlo'), cc_and_synthetic_mlo=('plain', 'plain'),
    cc_and_annotated_mlo=('with_radiomics', 'with_radiomics'),
    train_synthetic=('plain', 'mlo'), test_synthetic=('mlo', 'plain'))

# Data

def select_patients(patients, test_of, seed):
    "Training and validation patients among the first `patients`, test patients after them"
    cohort = insilico_cohort(max(patients, test_of), seed, **COHORT)
    return cohort.select(lambda t: (t.split == 'test') == (t.patient_index >= patients))

def split_rows(prepared):
    "Breasts of the generator, of the classifier, and of the test"
    rows = view_rows(prepared.cohort)
    index = prepared.cohort.images.drop_duplicates('patient_id').set_index('patient_id').patient_index
    index = rows.patient_id.map(index)
    is_test = rows.split == 'test'
    of_generator = ~is_test & (index < PATIENTS['generator'])
    parts = of_generator, ~is_test & ~of_generator, is_test
    return [rows[part].reset_index(drop=True) for part in parts]

# Generators

def generator_dls(prepared, rows, radiomics, kind, seed):
    "Loaders of a generator"
    masks, with_radiomics, _ = KINDS[kind]
    return view_synthesis_dls(
        prepared, rows=rows, bs=TRAIN['bs'], masks=masks, radiomics=radiomics if with_radiomics else False,
        augment=Augment(**AUGMENT), in_memory=True, seed=seed, device='cpu')

def train_generator(prepared, rows, radiomics, kind, seed, path):
    "Train a generator once; nothing is returned, the weights are in `path`"
    if path.exists():
        return
    seed_everything(seed)
    dls = generator_dls(prepared, rows, radiomics, kind, seed)
    _, with_radiomics, loose = KINDS[kind]
    learn = radiomics_gan_learner(
        dls, model_args=NET, predictor=PREDICTOR if with_radiomics else None, ramps=RAMPS, loose=loose,
        seed=seed, lr=TRAIN['lr'], **OPTIONS)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(TRAIN['epochs'])
    weights_or_train(path, learn.model, lambda model: model)

def load_generator(kind, path):
    "A trained generator"
    masks, with_radiomics, _ = KINDS[kind]
    model = RadiomicsGAN(masks=masks, radiomics=with_radiomics, **NET)
    return weights_or_train(path, model, None)

def samples_of(prepared, rows, radiomics, scaler, kind='with_radiomics'):
    "The samples that a generator reads"
    masks, with_radiomics, _ = KINDS[kind]
    known = dict(radiomics=radiomics, scaler=scaler) if with_radiomics else {}
    return ViewSynthesisDataset(prepared, rows, masks=masks, in_memory=True, **known)

def gather(dataset):
    "All inputs and all targets of a dataset"
    x, y = zip(*prediction_dl(dataset, bs=len(dataset)))
    return x[0], y[0]

def draw(model, inputs):
    "[N,1 or 2,H,W] drawings in [0, 1]"
    parts = []
    for i in range(0, len(inputs['source']), 32):
        batch = {name: values[i:i+32] for name, values in inputs.items()}
        with torch.no_grad():
            parts.append(model(batch))
    return torch.cat(parts)

# Rivals

def rivals(train, test):
    "Name -> [N,2,H,W] of the rivals that are not trained"
    (x, y), (own, _) = train, test
    def both(image, mask): return torch.cat([image, mask], 1)
    distance = torch.cdist(own['source'].flatten(1), x['source'].flatten(1))
    nearest = distance.argmin(1)
    mean = y['target'].mean(0, keepdim=True).expand_as(own['source'])
    return dict(
        copy_cc=both(own['source'], own['source_mask']),
        mean_mlo=both(mean, torch.zeros_like(mean)),
        nearest=both(y['target'][nearest], y['target_mask'][nearest]))

# Measures

def radiomics_of(image, mask, spacing_mm):
    "[102] of a lesion, NaN where there is none that can be measured"
    inside = mask.numpy() > .5
    unknown = np.full(len(RADIOMICS_NAMES), np.nan)
    if inside.sum() < SMALLEST:
        return unknown
    try:
        region = lesion_region(image.numpy().clip(0, 1), inside, spacing_mm=float(spacing_mm))
    except InputError:
        return unknown
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Mean of empty slice') # textures of a few pixels
        warnings.filterwarnings('ignore', 'invalid value encountered')
        return RadiomicsExtractor().values(region)

def z_scores(values, scaler):
    "[N,102] z-scores, cut off; NaN where a feature is unknown or constant in training"
    scale = np.where(scaler.std > 0, scaler.std, np.nan)
    return np.clip((np.stack(values)-scaler.mean)/scale, -scaler.limit, scaler.limit)

def lesion_distances(drawn, y, scaler):
    "[N] distance of the radiomics of drawn and true lesions; NaN where one of them is unknown"
    lesions = np.flatnonzero(y['target_mask'].flatten(1).any(1) & y['radiomics'].isfinite().any(1))
    pairs = []
    for k in lesions:
        spacing_mm = y['nipples'][k, 1, 2]
        found = radiomics_of(drawn[k, 0], drawn[k, 1], spacing_mm)
        true = radiomics_of(y['target'][k, 0], y['target_mask'][k, 0], spacing_mm)
        pairs.append((found, true))
    found, true = (z_scores(values, scaler) for values in zip(*pairs))
    out = np.full(len(drawn), np.nan)
    out[lesions] = radiomics_distance(found, true, np.ones(len(RADIOMICS_NAMES)))
    return out

def measure(drawn, x, y, rows, scaler):
    "Measure -> table of the breasts in which it is known"
    out = dict(drawn=drawn[:, :1], drawn_mask=drawn[:, 1:])
    numbers = compare_views(None, out, x, y)
    numbers = {name: numbers[name].numpy() for name in MEASURES}
    numbers['radiomics_distance'] = lesion_distances(drawn, y, scaler)
    ids = dict(patient_id=rows.patient_id, image_id=rows.image_id_mlo)
    return {name: pd.DataFrame(ids | dict(value=values)).dropna() for name, values in numbers.items()}

def shuffle_lesions(radiomics, seed):
    "Give each lesion the radiomics of another one"
    lesions = np.flatnonzero((radiomics != 0).any(1))
    order = np.random.default_rng(seed).permutation(len(lesions))
    order = np.where(order == np.arange(len(lesions)), np.roll(order, 1), order)
    shuffled = radiomics.clone()
    shuffled[lesions] = radiomics[lesions[order]]
    return shuffled

# Classifiers

def look(dataset, images):
    "A dataset whose MLO images are replaced; `None`: the true ones"
    return dataset if images is None else replace_images(dataset, images)

def train_classifier(prepared, rows, test_rows, train_images, test_images, seed):
    "Train a classifier with some second images; its predictions with each of others"
    seed_everything(seed)
    dls = two_view_dls(prepared, rows=rows, bs=CLASSIFIER['bs'], in_memory=True, seed=seed, device='cpu')
    for dl in dls.loaders:
        look(dl.dataset, train_images)
    learn = mammonet_learner(
        dls, 'cross_view', encoder='small', stride=8, model_args=CLASSIFIER_NET, keep_best=False, seed=seed)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(CLASSIFIER['epochs'], CLASSIFIER['lr'])
    tables = []
    for images in test_images:
        dataset = look(TwoViewDataset(prepared, test_rows, in_memory=True), images)
        table = select_output(predict(learn, prepared, dataset=dataset), 'probability')
        table = table.assign(image_id=table.exam_id+table.laterality)
        tables.append(table[['patient_id', 'image_id', 'label', 'value']].dropna().reset_index(drop=True))
    return tables

def classify(folder, first, seconds, images, prepared, rows, test_rows, seed):
    "Second image of the test -> predictions of a classifier that was trained with the image `first`, once"
    test_images = [images[name] for name in seconds]
    train = partial(train_classifier, prepared, rows, test_rows, images[first], test_images, seed)
    return dict(zip(seconds, tables_or_train(folder, f'{first}_{seed}', seconds, train)))

def downstream(folder, prepared, rows, test_rows, images, seeds):
    "Variant -> one table a training"
    wanted = {}
    for first, second in LOOKS.values():
        wanted.setdefault(first, set()).add(second)
    keys = [(first, seed) for first in wanted for seed in seeds]
    jobs = []
    for first, seed in keys:
        seconds = sorted(wanted[first])
        own = {name: images[name] for name in {first, *seconds}}
        jobs.append((classify, folder, first, seconds, own, prepared, rows, test_rows, seed))
    found = dict(zip(keys, run_jobs(jobs)))
    return {name: [found[first, seed][second] for seed in seeds] for name, (first, second) in LOOKS.items()}

# Rows

def common_breasts(a, b):
    "The tables of both sides, with the breasts that all of them know, in one order"
    tables = [*a, *b]
    known = set.intersection(*(set(t.image_id) for t in tables))
    kept = [t[t.image_id.isin(known)].sort_values('image_id').reset_index(drop=True) for t in tables]
    return kept[:len(a)], kept[len(a):]

def add_difference(bench, name, a, b, metric):
    "A paired difference over the breasts that are known in all trainings of both sides"
    a, b = common_breasts(a, b)
    if len(a[0]):
        bench.add_estimate(name, metric, paired_difference(a, b, weighted_mean, columns=('value',)))

def add_values(bench, found):
    "Rows of all generators and rivals"
    for name, tables in found.items():
        for metric in (*MEASURES, 'radiomics_distance'):
            own, _ = common_breasts([t[metric] for t in tables], [])
            if len(own[0]):
                bench.add_estimate(name, metric, bootstrap_ci(own, weighted_mean, columns=('value',)))

def add_differences(bench, found, n_seeds):
    "The paired differences of the generator with rivals, shuffled radiomics and without radiomics"
    every = ('ssim_breast', 'psnr_breast', 'l1_breast', 'placement_mm', 'radiomics_distance')
    pairs = [(f'radiomics_gan - {name}', found[name]*n_seeds, every) for name in ('copy_cc', 'mean_mlo', 'nearest')]
    pairs.append(('true_radiomics - shuffled', found['shuffled'], ('radiomics_distance', 'ssim_breast')))
    pairs.append(('with_radiomics - without', found['without'], every))
    for name, others, metrics in pairs:
        for metric in metrics:
            own, other = ([t[metric] for t in tables] for tables in (found['radiomics_gan'], others))
            add_difference(bench, name, own, other, metric)

def add_sets(bench, images, true, patients):
    "FID and KID of drawings and rivals of the first half of the patients, against the true images of the second"
    network = ImageFeatures()
    in_first = patients.isin(patients.unique()[:patients.nunique()//2]).to_numpy()
    for name, own in (images | dict(real_mlo=true)).items():
        found = set_distance(own[in_first, :1], true[~in_first], network)
        for metric in ('fid', 'kid'):
            bench.add(f'{name}, {found["network"]}', metric, found[metric], n=found['n_drawn'])

def add_downstream(bench, tables):
    "AUC of the classifiers, and what the second image adds"
    for name, own in tables.items():
        bench.add_estimate(name, 'auc', bootstrap_ci(own, auc))
    for name in ('cc_and_synthetic_mlo', 'cc_and_mlo', 'cc_and_annotated_mlo'):
        bench.add_estimate(f'{name} - cc', 'auc', paired_difference(tables[name], tables['cc'], auc))

# The run

def start(a):
    "Open the results of a run"
    config = dict(
        cohort=settings_name(InSilicoConfig(seed=a.seed, **COHORT)), patients=PATIENTS, test_of=a.test_of,
        size=SIZE, net=NET, train=TRAIN, options=OPTIONS, augment=AUGMENT, predictor=PREDICTOR, ramps=RAMPS,
        classifier=CLASSIFIER, classifier_net=CLASSIFIER_NET)
    cost = 'about 70 minutes on 2 cores: half of it trains seven generators, a third twelve classifiers'
    return Bench('radiomics_gan', a.seed, config, cost, train_seeds=a.train_seeds)

def trained_generators(prepared, rows, radiomics, folder, seeds):
    "(kind, training seed) -> file of weights; `plain` serves the classifiers only, and is trained once"
    keys = [(kind, seed) for seed in seeds for kind in ('with_radiomics', 'without')] + [('plain', seeds[0])]
    paths = {key: folder/f'{key[0]}_{key[1]}.pt' for key in keys}
    run_jobs([(train_generator, prepared, rows, radiomics, *key, path) for key, path in paths.items()])
    return paths

def by_image(dataset, images):
    "MLO image id -> its second image, each with memory of its own, so that a process gets no more than its share"
    return {image_id: image.clone() for image_id, image in zip(dataset.rows.image_id_mlo, images)}

def draw_views(prepared, rows, radiomics, scaler, paths, seed, kinds):
    "Kind -> MLO image id -> drawn image, by the generators of one training seed"
    images = {}
    for kind in kinds:
        model = load_generator(kind, paths[kind, seed])
        dataset = samples_of(prepared, rows, radiomics, scaler, kind)
        drawn = draw(model, gather(dataset)[0])[:, :1]
        images[kind] = by_image(dataset, drawn)
    return images

def measure_all(bench, prepared, rows, tested, radiomics, paths, seeds):
    "Add the rows of drawings and rivals"
    train_rows = rows[rows.split == 'train']
    scaler, mlo_scaler = (fit_scaler(radiomics, train_rows, view) for view in ('cc', 'mlo'))
    sets = [samples_of(prepared, part, radiomics, scaler) for part in (train_rows, tested)]
    train, (x, y) = map(gather, sets)
    def measured(drawn): return measure(drawn, x, y, sets[1].rows, mlo_scaler)
    images = rivals(train, (x, y))
    found = {name: [measured(drawn)] for name, drawn in images.items()}
    shuffled = {**x, 'radiomics': shuffle_lesions(x['radiomics'], int(bench.run['data_seed']))}
    names = dict(
        radiomics_gan=('with_radiomics', x), shuffled=('with_radiomics', shuffled),
        without=('without', x))
    for name, (kind, inputs) in names.items():
        drawn = [draw(load_generator(kind, paths[kind, seed]), inputs) for seed in seeds]
        found[name] = [measured(own) for own in drawn]
        images[name] = drawn[0]
    del images['shuffled']
    add_sets(bench, images, y['target'], sets[1].rows.patient_id)
    add_values(bench, found)
    add_differences(bench, found, len(seeds))
    return scaler

def main(argv=None):
    a = options(__doc__, argv, test_of=3000, train_seeds=[0, 1, 2])
    check_test_patients('radiomics_gan', PATIENTS['classifier'], a.test_of)
    bench = start(a)
    if bench.finished('cc_and_annotated_mlo - cc', 'auc'):
        return
    optional_import('radiomics', 'Radiomics', 'pyradiomics-bhklab').setVerbosity(logging.ERROR)
    patients = PATIENTS['classifier']
    chosen = select_patients(patients, a.test_of, a.seed)
    prepared, base = prepare_insilico(chosen, f'{patients}_{a.test_of}', SIZE)
    rows, classified, tested = split_rows(prepared)
    ids = pd.concat([rows, classified, tested])[['image_id_cc', 'image_id_mlo']].to_numpy().ravel()
    radiomics = image_radiomics(prepared, ids, progress=True)
    recipe = (SIZE, NET, TRAIN, OPTIONS, AUGMENT, PREDICTOR, RAMPS, PATIENTS, KINDS)
    folder = recipe_folder(base, 'radiomics_gan', recipe, [train_generator, generator_dls], MODULES)
    folder.mkdir(parents=True, exist_ok=True)
    paths = trained_generators(prepared, rows, radiomics, folder, a.train_seeds)
    scaler = measure_all(bench, prepared, rows, tested, radiomics, paths, a.train_seeds)

    both = pd.concat([classified, tested], ignore_index=True)
    kinds = ('plain', 'with_radiomics')
    images = draw_views(prepared, both, radiomics, scaler, paths, a.train_seeds[0], kinds)
    dataset = samples_of(prepared, both, radiomics, scaler)
    images |= dict(mlo=None, cc=by_image(dataset, gather(dataset)[0]['source']))
    recipe = (recipe, CLASSIFIER, CLASSIFIER_NET, LOOKS)
    modules = (*MODULES, 'mammo_nb.learners.mammonet')
    folder = recipe_folder(base, 'radiomics_gan_classifiers', recipe, [train_classifier, look], modules)
    tables = downstream(folder, prepared, classified, tested, images, a.train_seeds)
    add_downstream(bench, tables)

if __name__ == '__main__':
    main()
