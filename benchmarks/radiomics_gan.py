"""Can the MLO be drawn from the CC, and what is a drawn MLO worth? On in-silico patients: `make bench NAME=radiomics_gan SEED=0`.

The patients are those of `insilico-v1` with one exam; two of five images have a lesion. A generator reads the CC, the mask of its lesions and their radiomics, and draws the MLO with the
mask. It is trained with a critic, deep features of the offline encoder, and a radiomics loss whose predictor
beats the mean on validation patients. Test patients are seen by no training.

Rivals that need no training of a network:

- `copy_cc`: the CC itself, with its mask. `mean_mlo`: the mean MLO of the training patients, without a lesion.
- `nearest`: the MLO of the training breast whose CC is nearest in the sum of squares.

Measures, a breast each: SSIM, PSNR and L1 over the true breast, on [0, 1]. `placement_mm`: how much the distance
of the lesion from the nipple differs between the CC and the drawing, where a lesion was drawn; `empty_mask` is the
share of lesions of which none was. `radiomics_distance`: root mean square of the difference between the radiomics
of the drawn and the true MLO lesion, in standard deviations of training lesions. FID and KID name their network;
`real_mlo` is what two halves of the true test images have.

- `true_radiomics - shuffled`: the same generator, told the radiomics of other lesions.
- `with_radiomics - without`: against a generator that reads no radiomics and has no loss of them, trained alike.

Downstream: a Mammo-Net reads CC and a second image, trained on patients of which the generator saw none, three
times each. `cc_and_synthetic_mlo` reads drawings that were made *without masks and radiomics*: annotations exist
because a radiologist found something, so a drawing that was told of them tells the label. `cc_and_annotated_mlo`
shows how much: it is a leak, not a result. `cc` reads the CC twice, `cc_and_mlo` the true MLO.
`train_synthetic` is trained on drawings and tested on true MLOs; `test_synthetic` the reverse.

Intervals are from a bootstrap over patients. Images are 128 x 96 and networks small; the published ones are 256 x
256 with 64 channels. The recipe was chosen on validation patients.
"""
import sys
from pathlib import Path
import numpy as np
import pandas as pd
import torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import Bench, check_test_patients, options
from benchmarks._trainings import prepare_insilico, recipe_folder, run_jobs, weights_or_train
from mammo_nb.core.errors import InputError
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
from mammo_nb.samples.loaders import prediction_dl
from mammo_nb.samples.two_view import TwoViewDataset, two_view_dls
from mammo_nb.samples.view_synthesis import (
    ViewSynthesisDataset, fit_scaler, image_radiomics, replace_images, view_rows, view_synthesis_dls
)

SIZE = (128, 96)
COHORT = dict(exams=1)
NET = dict(width=16, depth=5, hidden=64)
TRAIN = dict(bs=8, accumulate=1, lr=2e-3, epochs=8, predictor=10, exchange=True)
CLASSIFIER = dict(epochs=8, lr=3e-3, bs=16)
CLASSIFIER_NET = dict(width=16, heads=2, head_dim=16, embed=32, hidden=16)
RAMPS = dict(gan=(.02, .05, 8), l1=5., ssim=6., radiomics=(0., .5, 2))
VERBOSE = False
MODULES = ('mammo_nb.learners.radiomics_gan', 'mammo_nb.preparation.cache')
MEASURES = ('ssim_breast', 'psnr_breast', 'l1_breast', 'placement_mm', 'empty_mask')
PATIENTS = dict(generator=450, classifier=700) # of training and validation, up to this index
KINDS = dict(with_radiomics=(True, True), without=(True, False), plain=(False, False)) # masks, radiomics
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
    masks, told = KINDS[kind]
    return view_synthesis_dls(
        prepared, rows=rows, bs=TRAIN['bs'], masks=masks, radiomics=radiomics if told else False,
        in_memory=True, seed=seed, device='cpu')

def train_generator(prepared, rows, radiomics, kind, seed, path):
    "Train a generator once; nothing is returned, the weights are in `path`"
    if path.exists():
        return
    seed_everything(seed)
    dls = generator_dls(prepared, rows, radiomics, kind, seed)
    learn = radiomics_gan_learner(
        dls, model_args=NET, predictor=TRAIN['predictor'] if KINDS[kind][1] else None,
        perceptual=False, accumulate=TRAIN['accumulate'], exchange=TRAIN['exchange'], ramps=RAMPS, patience=None, seed=seed, lr=TRAIN['lr'])
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(TRAIN['epochs'])
    if VERBOSE:
        print(kind, learn.write_results.table.iloc[[0, len(learn.write_results.rows)//2, -1]].round(3).T, learn.model.training_info['predictor_skill'])
    weights_or_train(path, learn.model, lambda model: model)

def load_generator(kind, path):
    "A trained generator"
    masks, told = KINDS[kind]
    model = RadiomicsGAN(masks=masks, radiomics=told, **NET)
    return weights_or_train(path, model, None)

def samples_of(prepared, rows, radiomics, scaler, kind='with_radiomics'):
    "The samples that a generator reads"
    masks, told = KINDS[kind]
    known = dict(radiomics=radiomics, scaler=scaler) if told else {}
    return ViewSynthesisDataset(prepared, rows, masks=masks, in_memory=True, **known)

def gather(dataset):
    "All inputs and all targets of a dataset"
    x, y = zip(*prediction_dl(dataset, bs=len(dataset)))
    return x[0], y[0]

def draw(model, inputs):
    "[N,1 or 2,H,W] drawings in [0, 1]"
    with torch.no_grad():
        parts = [model({k: v[i:i+32] for k, v in inputs.items()}) for i in range(0, len(inputs['source']), 32)]
    return torch.cat(parts)

# Rivals

def rivals(train, test):
    "Name -> [N,2,H,W] of the rivals that are not trained"
    (x, y), (own, _) = train, test
    both = lambda image, mask: torch.cat([image, mask], 1)
    distance = torch.cdist(own['source'].flatten(1), x['source'].flatten(1))
    nearest = distance.argmin(1)
    mean = y['target'].mean(0, keepdim=True).expand_as(own['source'])
    return dict(
        copy_cc=both(own['source'], own['source_mask']),
        mean_mlo=both(mean, torch.zeros_like(mean)),
        nearest=both(y['target'][nearest], y['target_mask'][nearest]))

# Measures

def radiomics_of(drawn, mask, spacing_mm):
    "[102] of a drawn lesion, NaN where there is none that can be measured"
    try:
        region = lesion_region(drawn.numpy().clip(0, 1), mask.numpy() > .5, spacing_mm=float(spacing_mm))
        return RadiomicsExtractor().values(region)
    except InputError:
        return np.full(len(RADIOMICS_NAMES), np.nan)

def lesion_distances(drawn, y):
    "[N] distance of the radiomics of drawn and true lesions, in training standard deviations"
    lesions = np.flatnonzero(y['target_mask'].flatten(1).any(1) & y['radiomics'].isfinite().any(1))
    out = np.full(len(drawn), np.nan)
    found = np.stack([radiomics_of(drawn[k, 0], drawn[k, 1], y['nipples'][k, 1, 2]) for k in lesions])
    true = np.stack([radiomics_of(y['target'][k, 0], y['target_mask'][k, 0], y['nipples'][k, 1, 2]) for k in lesions])
    out[lesions] = radiomics_distance(found, true, np.nanstd(true, axis=0))
    return out

def measure(drawn, x, y, rows):
    "Measure -> table of the breasts in which it is known"
    out = dict(drawn=drawn[:, :1], drawn_mask=drawn[:, 1:])
    numbers = compare_views(None, out, x, y)
    numbers = {name: numbers[name].numpy() for name in MEASURES}
    numbers['radiomics_distance'] = lesion_distances(drawn, y)
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

def classify(prepared, rows, test_rows, train_images, test_images, seed):
    "Train a classifier with some second images, and test it with each of others"
    seed_everything(seed)
    dls = two_view_dls(prepared, rows=rows, bs=CLASSIFIER['bs'], in_memory=True, seed=seed, device='cpu')
    for dl in dls.loaders:
        look(dl.dataset, train_images)
    learn = mammonet_learner(
        dls, 'cross_view', encoder='small', stride=8, model_args=CLASSIFIER_NET, keep_best=False, seed=seed)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(CLASSIFIER['epochs'], CLASSIFIER['lr'])
    tables = {}
    for name, images in test_images.items():
        dataset = look(TwoViewDataset(prepared, test_rows, in_memory=True), images)
        table = select_output(predict(learn, prepared, dataset=dataset), 'probability')
        table = table.assign(image_id=table.exam_id+table.laterality)
        tables[name] = table[['patient_id', 'image_id', 'label', 'value']].dropna()
    return tables

def downstream(prepared, rows, test_rows, images, seeds):
    "Variant -> one table a training"
    wanted = {}
    for first, second in LOOKS.values():
        wanted.setdefault(first, set()).add(second)
    keys = [(first, seed) for first in wanted for seed in seeds]
    jobs = [(classify, prepared, rows, test_rows, images[first], {k: images[k] for k in sorted(wanted[first])}, seed)
            for first, seed in keys]
    found = dict(zip(keys, run_jobs(jobs)))
    return {name: [found[first, seed][second] for seed in seeds] for name, (first, second) in LOOKS.items()}

# Rows

def add_difference(bench, name, a, b, metric):
    "A paired difference over the breasts in which both are known; lists: of trainings, averaged"
    pairs = [(p[p.image_id.isin(q.image_id)], q[q.image_id.isin(p.image_id)]) for p, q in zip(a, b)]
    known = set.intersection(*(set(p.image_id) for p, _ in pairs))
    a, b = ([t[t.image_id.isin(known)].reset_index(drop=True) for t in side] for side in zip(*pairs))
    bench.add_estimate(name, metric, paired_difference(a, b, weighted_mean, columns=('value',)))

def add_measures(bench, found, seeds):
    "Rows of all generators and rivals, and their differences"
    for name, tables in found.items():
        for metric in (*MEASURES, 'radiomics_distance'):
            own = [t[metric] for t in tables]
            known = set.intersection(*(set(t.image_id) for t in own))
            own = [t[t.image_id.isin(known)] for t in own]
            if known:
                bench.add_estimate(name, metric, bootstrap_ci(own, weighted_mean, columns=('value',)))
    base = found['radiomics_gan']
    every = (*MEASURES[:-1], 'radiomics_distance')
    pairs = [(f'radiomics_gan - {name}', base, found[name]*len(seeds), every) for name in ('copy_cc', 'mean_mlo', 'nearest')]
    pairs += [('true_radiomics - shuffled', base, found['shuffled'], ('radiomics_distance', 'ssim_breast')),
              ('with_radiomics - without', base, found['without'], every)]
    for name, a, b, metrics in pairs:
        for metric in metrics:
            if min(map(len, (t[metric] for t in b))):
                add_difference(bench, name, [t[metric] for t in a], [t[metric] for t in b], metric)

def add_sets(bench, drawn, true):
    "FID and KID of the drawings, and of two halves of the true images"
    network = ImageFeatures()
    half = len(true)//2
    sets = dict(radiomics_gan=(drawn[:, :1], true), real_mlo=(true[:half], true[half:]))
    for name, (a, b) in sets.items():
        found = set_distance(a, b, network)
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
        size=SIZE, net=NET, train=TRAIN, ramps=RAMPS, classifier=CLASSIFIER, classifier_net=CLASSIFIER_NET)
    return Bench('radiomics_gan', a.seed, config, 'about an hour on 2 cores, half of it to train', train_seeds=a.train_seeds)

def trained_generators(prepared, rows, radiomics, folder, seeds):
    "(kind, training seed) -> file of weights"
    paths = {(kind, seed): folder/f'{kind}_{seed}.pt' for seed in seeds for kind in KINDS}
    run_jobs([(train_generator, prepared, rows, radiomics, *key, path) for key, path in paths.items()])
    return paths

def draw_views(prepared, rows, radiomics, scaler, paths, seed, kinds):
    "Kind -> MLO image id -> drawn image, by the generators of one training seed"
    images = {}
    for kind in kinds:
        model = load_generator(kind, paths[kind, seed])
        dataset = samples_of(prepared, rows, radiomics, scaler, kind)
        drawn = draw(model, gather(dataset)[0])[:, :1]
        images[kind] = dict(zip(dataset.rows.image_id_mlo, drawn))
    return images

def main(argv=None):
    a = options(__doc__, argv, test_of=3000, train_seeds=[0, 1, 2])
    check_test_patients('radiomics_gan', PATIENTS['classifier'], a.test_of)
    bench = start(a)
    if bench.finished('cc_and_annotated_mlo - cc', 'auc'):
        return
    patients = PATIENTS['classifier']
    prepared, base = prepare_insilico(select_patients(patients, a.test_of, a.seed), f'{patients}_{a.test_of}', SIZE)
    rows, classified, tested = split_rows(prepared)
    ids = pd.concat([rows, classified, tested])[['image_id_cc', 'image_id_mlo']].to_numpy().ravel()
    radiomics = image_radiomics(prepared, ids, progress=True)
    recipe = (SIZE, NET, TRAIN, RAMPS, PATIENTS, KINDS)
    folder = recipe_folder(base, 'radiomics_gan', recipe, [train_generator, generator_dls], MODULES)
    paths = trained_generators(prepared, rows, radiomics, folder, a.train_seeds)

    scaler = fit_scaler(radiomics, rows[rows.split == 'train'])
    sets = [samples_of(prepared, part, radiomics, scaler) for part in (rows[rows.split == 'train'], tested)]
    train, (x, y) = map(gather, sets)
    found = {name: [measure(drawn, x, y, sets[1].rows)] for name, drawn in rivals(train, (x, y)).items()}
    names = dict(radiomics_gan=('with_radiomics', x), without=('without', x),
                 shuffled=('with_radiomics', {**x, 'radiomics': shuffle_lesions(x['radiomics'], a.seed)}))
    for name, (kind, inputs) in names.items():
        drawn = [draw(load_generator(kind, paths[kind, seed]), inputs) for seed in a.train_seeds]
        found[name] = [measure(d, x, y, sets[1].rows) for d in drawn]
        if name == 'radiomics_gan':
            first = drawn[0]
    add_measures(bench, found, a.train_seeds)
    add_sets(bench, first, y['target'])

    both = pd.concat([classified, tested], ignore_index=True)
    images = draw_views(prepared, both, radiomics, scaler, paths, a.train_seeds[0], ('plain', 'with_radiomics'))
    dataset = samples_of(prepared, both, radiomics, scaler)
    images |= dict(mlo=None, cc=dict(zip(dataset.rows.image_id_mlo, gather(dataset)[0]['source'])))
    add_downstream(bench, downstream(prepared, classified, tested, images, a.train_seeds))

if __name__ == '__main__':
    main()
