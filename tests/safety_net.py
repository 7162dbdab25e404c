"""What the library computes, as numbers, from fixed seeds: a net under changes that may only move,
rename and restyle.

    python tests/safety_net.py                          compare with the reference, say what differs
    python tests/safety_net.py --only mammonet lmvnet   some parts only
    python tests/safety_net.py --write                  write the reference, tests/safety_net.json

A part is a function of this file that returns entries, `{name: value}`. A value is a number, a text
or a list of them, and every digit of a number counts. Where a change renames something that an
entry is named after, or may move the last digits, `RENAMED` and `TOLERANCE` say so.
"""
import argparse
import copy
import hashlib
import json
import math
import platform
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import fastai
import numpy as np
import pandas as pd
import scipy
import SimpleITK
import timm
import torch
from threadpoolctl import threadpool_limits

from mammo_nb.core.seeding import rng_for, seed_everything, stable_hash
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.cohort.exams import breast_table
from mammo_nb.cohort.datasets.two_exams import two_exams
from mammo_nb.cohort.labels import survival_target
from mammo_nb.gaze.heatmap import perturb_gaze, gaze_to_heatmap
from mammo_nb.gaze.fixations import find_fixations
from mammo_nb.gaze.miceye import miceye_samples
from mammo_nb.gaze.readings import read_gaze
from mammo_nb.gaze.miceye import read_miceye
from mammo_nb.insilico.config import InSilicoConfig
from mammo_nb.insilico.patients import draw_patient
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.insilico.ground_truth import known_flow, truth
from mammo_nb.insilico.images import render
from mammo_nb.insilico.tables import truth_table
from mammo_nb.insilico.files import write_insilico
from mammo_nb.insilico.oracle import oracle_risk
from mammo_nb.insilico.prepared_truth import prepared_flow
from mammo_nb.samples.pairs import exam_pairs, pair_dls
from mammo_nb.preparation.prepare import PrepareConfig
from mammo_nb.samples.risk import breast_history, risk_dls
from mammo_nb.samples.augment import Augment
from mammo_nb.samples.two_view import two_view_dls
from mammo_nb.cohort.leaks import assign_split
from mammo_nb.cohort.splits import carve_valid, split_hash, split_patients
from mammo_nb.learners.mammonet import VARIANTS, attention_maps, mammonet_learner
from mammo_nb.learners.registration import evaluate_registration, registration_learner
from mammo_nb.learners.risk import lmvnet_learner, risk_learner
from mammo_nb.learners.systems import load_model, predict
from mammo_nb.learners.two_view import two_view_learner
from mammo_nb.losses.attention import pyramid_loss, scanpath_loss
from mammo_nb.losses.contrastive import bidirectional_fusion_loss
from mammo_nb.losses.survival import masked_bce
from mammo_nb.metrics.weighted import auc
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.metrics.calibration import brier, calibration_table
from mammo_nb.metrics.thresholds import choose_threshold
from mammo_nb.metrics.classification import evaluate_classification
from mammo_nb.metrics.calibration import fit_calibrator
from mammo_nb.metrics.roc import roc_band, roc_points, sensitivity_at
from mammo_nb.preparation.annotations import read_lesion_mask
from mammo_nb.metrics.localization import localization_ci, localization_table
from mammo_nb.metrics.tables import aggregate, combine_outputs
from mammo_nb.metrics.predictions import predictions_table
from mammo_nb.metrics.risk_by_year import auc_by_year, auc_cumulative, brier_by_year
from mammo_nb.metrics.concordance import c_index
from mammo_nb.metrics.risk import evaluate_risk
from mammo_nb.metrics.risk_by_year import eo_ratio
from mammo_nb.metrics.survival import censoring_survival
from mammo_nb.metrics.survival import risk_table, survival_curve
from mammo_nb.models.lmvnet import UnalignedRisk
from mammo_nb.models.risk_baselines import CurrentExamRisk, DensityRisk
from mammo_nb.registration.prior_flows import prior_flows
from mammo_nb.registration.flow import compose
from mammo_nb.registration.error import flow_error
from mammo_nb.registration.folding import folding_percent, invert
from mammo_nb.registration.folding import jacobian_determinant
from mammo_nb.registration.flow import resize_flow, warp
from mammo_nb.registration.mammoregnet import MammoRegNet
from mammo_nb.registration.instance_optimisation import InstanceOptimised
from mammo_nb.registration.losses import RegistrationLoss
from mammo_nb.registration.simpleitk import SitkRegistration
from mammo_nb.registration.instance_optimisation import average_flow
from mammo_nb.registration.losses import ncc

REFERENCE = Path(__file__).with_name('safety_net.json')

# What may differ by how much, relative: `{'two_view/small/losses': 1e-6}`; the rest by nothing.
# Heads are computed in another order, so the last digits of sums move. The largest relative move is that
# of an attention share of 2.4e-5, by 2.8e-10: 1.2e-5.
TOLERANCE = {'two_view/': 1e-12, 'mammonet/': 1e-6, 'localization/': 2e-5}

# On another processor, relative to the largest number of an entry. The largest seen is 8e-6, AMD against Intel.
ELSEWHERE = 1e-4

# Parts of the names of the reference's entries that are called otherwise by now: `{old: new}`.
RENAMED = {
    'losses/fusion/mmim': 'losses/fusion/view_to_fused',
    'losses/fusion/paper': 'losses/fusion/fused_to_view',
    '/p_now/': '/p_prevalent/',
    '/coverage_auc': '/pixel_auc',
    '/silent': '/empty_map',
    '/redrawn': '/n_redrawn',
}

PATIENTS = 16
EXAMS = 3
DETECTOR = dict(exams=EXAMS, rows=96, cols=72, pixel_spacing_mm=2.5)
SIZE = (96, 72)
SEED = 6
SMALL_MAMMONET = dict(width=8, heads=2, head_dim=8, embed=16, hidden=8)
SMALL_LMVNET = dict(width=4, heads=2)
FOLDER = tempfile.TemporaryDirectory(prefix='safety-net-')


# ---- values

def digest(text):
    "A short checksum of a text or of bytes"
    data = text.encode() if isinstance(text, str) else text
    return hashlib.sha256(data).hexdigest()[:16]


def as_array(values):
    "A NumPy array of whatever holds numbers"
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def numbers(values):
    "All numbers of an array, as a list"
    return [float(v) for v in as_array(values).astype(np.float64).ravel()]


def spread(values, count=4):
    "Some numbers of an array, evenly chosen"
    flat = as_array(values).ravel()
    if not len(flat):
        return []
    places = np.linspace(0, len(flat)-1, min(count, len(flat))).round().astype(int)
    return numbers(flat[places])


def summary(name, values):
    """An entry for an array that is too large to be written down: its shape, the sums of the
    numbers, of their squares and of the numbers weighed by their places, and some of them."""
    array = as_array(values)
    exact = array.astype(np.float64).ravel()
    sums = np.nansum([exact, exact**2, exact*np.cos(np.arange(exact.size))], axis=1)
    shape = 'x'.join(str(n) for n in array.shape)
    return {name: [shape, *numbers(sums), *spread(array)]}


def picture(name, values):
    "Entries for pixels: a summary and a checksum"
    array = np.ascontiguousarray(as_array(values))
    about = f'{array.dtype} {array.shape}'.encode()
    return summary(name, array) | {f'{name}/sha256': digest(about+array.tobytes())}


def column_text(value):
    "One cell of a table as a text"
    if pd.isna(value):
        return ''
    if isinstance(value, pd.Timestamp):
        return value.isoformat()
    if isinstance(value, (float, np.floating)):
        return repr(float(value))
    return str(value)


def table(name, frame):
    "Entries for a table, column by column; texts also by which of them are the same"
    found = {f'{name}/rows': len(frame)}
    for column in frame.columns:
        values = frame[column]
        if pd.api.types.is_float_dtype(values):
            values = values.round(9)
        key = f'{name}/{column}'
        found[f'{key}/sha256'] = digest('\n'.join(column_text(v) for v in values))
        if pd.api.types.is_numeric_dtype(values):
            exact = values.to_numpy(np.float64)
            found[f'{key}/numbers'] = [float(np.nansum(exact)), *spread(exact, 3)]
        else:
            codes = pd.factorize(values)[0]
            found[f'{key}/pattern'] = digest(' '.join(map(str, codes)))
            found[f'{key}/first'] = column_text(values.iloc[0]) if len(values) else ''
    return found


def numeric_table(name, frame, left_out=()):
    "Entries for a small table of results: the numbers of each column"
    found = {f'{name}/rows': len(frame)}
    for column in frame.columns:
        if column in left_out:
            continue
        if pd.api.types.is_numeric_dtype(frame[column]):
            found[f'{name}/{column}'] = numbers(frame[column].to_numpy(np.float64))
        else:
            found[f'{name}/{column}'] = digest('\n'.join(map(column_text, frame[column])))
    return found


def said(name, predictions):
    """Entries for a predictions table: the names of its outputs, and of each, by position, the
    number of rows, two sums and some values."""
    outputs = list(predictions['output'].unique())
    found = {f'{name}/outputs': outputs}
    for position, output in enumerate(outputs):
        rows = predictions[predictions['output'] == output]
        values = rows['value'].to_numpy(np.float64)
        sums = [math.fsum(values), math.fsum(values*np.cos(np.arange(len(values))))]
        found[f'{name}/output {position}'] = [len(values), *sums, *spread(values)]
    return found


def weights(name, model):
    """Entries for the weights of a model, whatever they are called: tensors, numbers, and their
    sums, plain, without signs and weighed by place. Their names are an entry of their own."""
    kept = model.state_dict()
    tensors = [v.detach().double().reshape(-1) for v in kept.values() if v.is_floating_point()]
    places = [torch.arange(len(v), dtype=torch.float64).cos() for v in tensors]
    return {
        name: [
            len(tensors),
            sum(len(v) for v in tensors),
            math.fsum(float(v.sum()) for v in tensors),
            math.fsum(float(v.abs().sum()) for v in tensors),
            math.fsum(float((v*c).sum()) for v, c in zip(tensors, places)),
        ],
        f'{name}/names': digest('\n'.join(sorted(kept))),
    }


def estimate(result):
    "The numbers of an estimate with its interval"
    return [result.value, result.low, result.high, result.n, result.n_groups, result.n_redrawn]


# ---- what the parts share

@contextmanager
def one_thread():
    "One thread for everything, so that sums are always in the same order"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


@lru_cache
def written_cohort():
    "In-silico patients with their files"
    cohort = insilico_cohort(PATIENTS, seed=SEED, **DETECTOR)
    return write_insilico(cohort, Path(FOLDER.name)/'files', workers=1, progress=False)


@lru_cache
def prepared_cohort():
    "Their prepared pictures; one view of a few breasts is missing, and one density is not known"
    cohort = written_cohort()
    place = np.arange(len(cohort.images))
    cohort = cohort.select(~np.isin(place % 37, (5, 11)))
    first = cohort.images['patient_id'].iloc[0]
    cohort.images.loc[cohort.images['patient_id'] == first, 'density'] = np.nan
    folder = Path(FOLDER.name)/'cache'
    return prepare_cohort(cohort, folder, PrepareConfig(size=SIZE), workers=1, progress=False)


@lru_cache
def real_exams():
    "The two real exams"
    return two_exams()


@lru_cache
def last_breasts():
    "The breasts at the last exam of each patient"
    rows = breast_table(prepared_cohort().cohort)
    newest = rows.groupby('patient_id')['exam_date'].transform('max')
    return rows[rows['exam_date'] == newest].reset_index(drop=True)


def last_history(priors):
    "The same with their past"
    return breast_history(prepared_cohort().cohort, priors=priors, current='last')


def few(rows):
    "Some of these rows, for large networks: three breasts with a cancer and three without, a split"
    rows = rows.assign(ill=rows['years_to_cancer'].notna())
    return rows.groupby(['split', 'ill']).head(3).drop(columns='ill').reset_index(drop=True)


@lru_cache
def some_registration():
    "A registration network that moves something: random weights, all of them disturbed"
    seed_everything(11)
    network = MammoRegNet(width=2, depth=1)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(.03*torch.randn(parameter.shape, generator=generator))
    return network.eval()


def some_pictures(count):
    "Prepared pictures `[count,1,H,W]`"
    prepared = prepared_cohort()
    ids = prepared.cohort.images['image_id'].iloc[:count]
    return torch.stack([torch.from_numpy(prepared.load(i).image.copy()) for i in ids])


def some_flow(count, size=SIZE, pixels=4.):
    "Smooth random flows `[count,2,H,W]`"
    generator = torch.Generator().manual_seed(13)
    coarse = torch.randn(count, 2, 4, 3, generator=generator)*pixels
    return torch.nn.functional.interpolate(coarse, size=size, mode='bicubic', align_corners=True)


def batch_entries(name, batch):
    "Entries for the inputs and targets of a batch"
    found = {}
    for part, values in zip(('inputs', 'targets'), batch):
        for key, tensor in values.items():
            found |= summary(f'{name}/{part}/{key}', tensor)
    return found


def first_batch(loaders):
    "The first training batch, augmented from a seed"
    seed_everything(21)
    return loaders.train.one_batch()


def first_loss(learner, batch):
    "The loss of a batch in training, on a copy of the model"
    inputs, targets = batch
    model = copy.deepcopy(learner.model).train()
    seed_everything(22)
    return float(learner.loss_func(model(inputs), targets).detach())


def first_pair_loss(learner, batch):
    "The same for a registration network"
    inputs, targets = batch
    model = copy.deepcopy(learner.model).train()
    seed_everything(22)
    outputs = model(inputs['fixed'], inputs['moving'])
    return float(learner.loss_func(outputs, targets['fixed']).detach())


def fit_quietly(learner, epochs, one_cycle=False):
    "The learner's own training, without a word"
    seed_everything(23)
    with learner.no_bar(), learner.no_logging():
        if one_cycle:
            learner.fit_one_cycle(epochs)
        else:
            learner.fit(epochs)


def follow(name, learner, answers, loss=first_loss, epochs=1, one_cycle=False):
    """Entries for a system before and after a training.

    `answers(name, model)` returns the entries of what the model says.
    """
    learner.model.eval()
    found = weights(f'{name}/weights/untrained', learner.model)
    found |= answers(f'{name}/predictions/untrained', learner.model)
    found[f'{name}/loss of the first batch'] = loss(learner, first_batch(learner.dls))
    fit_quietly(learner, epochs, one_cycle)
    found[f'{name}/metrics'] = list(learner.recorder.metric_names[1:-1])
    found[f'{name}/losses'] = numbers(learner.recorder.values)
    found[f'{name}/rates'] = [float(group['lr']) for group in learner.opt.hypers]
    found |= weights(f'{name}/weights/trained', learner.model)
    found |= answers(f'{name}/predictions/trained', learner.model)
    return found


# ---- data

def cohort():
    "The in-silico cohort: its tables, its truth and some of its pixels"
    drawn = insilico_cohort(PATIENTS, seed=SEED, **DETECTOR)
    found = table('cohort/images', drawn.images)
    found |= table('cohort/findings', drawn.findings)
    found |= table('cohort/breasts', breast_table(drawn))
    found |= table('cohort/history', breast_history(drawn, priors=2))
    found |= table('cohort/exams', drawn.exams())
    found |= table('cohort/pairs', exam_pairs(drawn))
    settings = InSilicoConfig(seed=SEED, **DETECTOR)
    found |= table('cohort/truth', truth_table(settings, PATIENTS))
    for index, exam, side, view in ((0, 0, 'L', 'CC'), (3, 1, 'R', 'MLO'), (7, 2, 'R', 'CC')):
        name = f'cohort/picture {index} {exam} {side} {view}'
        found |= picture(name, render(settings, index, exam, side, view))
        known = truth(settings, index, exam, side, view)
        found |= picture(f'{name}/breast', known.breast)
        found |= summary(f'{name}/known flow', known_flow(settings, index, side, view))
    other = insilico_cohort(6, seed=1, exams=1, prevalence=.8, shortcut=True)
    found |= table('cohort/other findings', other.findings)
    found |= picture('cohort/other picture', render(InSilicoConfig(seed=1, exams=1), 2, 0, 'R', 'MLO'))
    found['cohort/patient'] = digest(repr(draw_patient(settings, 3)))
    return found


def prepared():
    "Prepared pictures of in-silico patients: pixels, masks, boxes, in several ways"
    cohort = written_cohort()
    marked = cohort.images['image_id'].isin(cohort.findings['image_id'])
    chosen = cohort.select((marked & (np.arange(len(cohort.images)) % 9 == 0)).to_numpy())
    configs = {
        'plain': PrepareConfig(size=SIZE),
        'small': PrepareConfig(size=(64, 48), margin=.1, intensity='minmax'),
        'large': PrepareConfig(size=(160, 128), enlarge=True),
        'whole': PrepareConfig(size=(64, 64), crop=False),
        'spaced': PrepareConfig(size=(80, 64), spacing_mm=4.),
    }
    found = {}
    for name, config in configs.items():
        found |= prepared_entries(f'prepared/{name}', chosen, config, 3)
    return found


def prepared_entries(name, cohort, config, count):
    "Entries for some prepared pictures of a cohort"
    folder = Path(FOLDER.name)/'other cache'
    done = prepare_cohort(cohort, folder, config, workers=1, progress=False)
    found = {f'{name}/pictures': [len(done), len(done.failures)]}
    ids = list(done.cohort.images['image_id'])
    for position, image_id in enumerate(ids):
        kept = done.load(image_id)
        key = f'{name}/{position}'
        found[f'{key}/map'] = numbers(kept.affine.matrix)
        found[f'{key}/boxes'] = numbers(done.boxes(image_id))
        if position < count:
            found |= picture(f'{key}/image', kept.image)
            found |= picture(f'{key}/mask', kept.mask)
            found[f'{key}/points'] = numbers(kept.points([[10.5, 20.25], [40., 33.]]))
            found[f'{key}/points back'] = numbers(kept.inverse_points([[10.5, 20.25], [40., 33.]]))
            found[f'{key}/spacing'] = [kept.spacing_mm or 0., kept.scale, float(kept.mirrored)]
            found[f'{key}/notes'] = list(kept.notes)
    return found


def real():
    "The two real exams: their tables and prepared pictures"
    cohort = real_exams()
    found = table('real/images', cohort.images.drop(columns='path'))
    found |= table('real/findings', cohort.findings)
    found |= prepared_entries('real/small', cohort, PrepareConfig(size=SIZE), 8)
    found |= prepared_entries('real/large', cohort, PrepareConfig(size=(384, 288)), 8)
    found |= prepared_entries('real/raw', cohort, PrepareConfig(size=SIZE, intensity='minmax'), 2)
    found |= prepared_entries('real/whole', cohort, PrepareConfig(size=SIZE, crop=False), 2)
    return found


def gaze():
    "Logs of readers, fixations and maps"
    cohort = written_cohort()
    found = {}
    for position in (0, 30, 61):
        row = cohort.images.iloc[position]
        path = cohort.file(row['gaze_path'])
        name = f'gaze/{position}'
        looks = read_gaze(path)
        found[f'{name}/columns'] = list(looks.columns)
        found |= summary(f'{name}/looks', looks[['row', 'col', 'duration_ms']].to_numpy())
        log = read_miceye(path)[0]
        found |= summary(f'{name}/log', log['points'])
        samples = miceye_samples(log)
        found |= summary(f'{name}/samples', samples[['row', 'col']].to_numpy())
        points, durations = looks[['row', 'col']], looks['duration_ms']
        for method in ('dispersion', 'velocity'):
            rests = find_fixations(samples, 9., method)
            places = rests[['row', 'col', 'duration_ms']].to_numpy()
            found |= summary(f'{name}/fixations by {method}', places)
        for n_slices in (1, 3):
            heat, seen = gaze_to_heatmap(points, durations, (96, 72), 5., stride=4, n_slices=n_slices)
            found |= summary(f'{name}/map of {n_slices}', heat)
        worse = perturb_gaze(looks, rng_for(0, 'worse'), noise=3., offset=5., keep=.7)
        found |= summary(f'{name}/worse', worse[['row', 'col', 'duration_ms']].to_numpy())
    return found


def seeds():
    "Random numbers by purpose, splits and follow-up targets"
    drawn = insilico_cohort(PATIENTS, seed=SEED, **DETECTOR)
    split = split_patients(assign_split(drawn, {}), seed=3)
    carved = carve_valid(drawn.select("split != 'valid'"), .3, seed=3)
    found = {
        'seeds/stable hash': str(stable_hash(1, 'patient', 7)),
        'seeds/random': numbers(rng_for(5, 'purpose', 2).random(4)),
        'seeds/split': list(split.images['split']),
        'seeds/split/hash': split_hash(split),
        'seeds/carved': list(carved.images['split']),
        'seeds/generator': numbers([seed_everything(4), torch.rand(1).item(), np.random.rand()]),
    }
    rows = breast_history(drawn, priors=1)
    for convention in ('known', 'mirai', 'cumulative'):
        targets = survival_target(rows['years_to_cancer'], rows['years_followed'], 5, convention)
        for key, tensor in targets.items():
            found |= summary(f'seeds/follow-up/{convention}/{key}', tensor)
    found |= summary('seeds/oracle', oracle_risk(drawn, rows.iloc[:12], 5))
    return found


def samples():
    "First batches of all loaders, augmented"
    pictures = prepared_cohort()
    plain = two_view_dls(pictures, bs=8, seed=1, device='cpu')
    found = batch_entries('samples/two_view', first_batch(plain))
    found['samples/two_view/sizes'] = [len(plain.train_ds), len(plain.valid_ds), plain.n_excluded]
    found |= batch_entries('samples/two_view/valid', plain.valid.one_batch())
    augment = Augment(rotate=12, shift=.1, scale=.15, gain=.2, gamma=.2, flip=.5)
    looked = two_view_dls(pictures, bs=8, gaze=True, gaze_slices=3, augment=augment, seed=1,
                          device='cpu')
    found |= batch_entries('samples/gaze', first_batch(looked))
    rows = breast_history(pictures.cohort, 2)
    flows = prior_flows(pictures, rows, some_registration(), progress=False)
    moved = risk_dls(pictures, bs=6, priors=2, flows=flows, seed=2,
                     augment=Augment(flip=.5), device='cpu')
    found |= batch_entries('samples/risk', first_batch(moved))
    found['samples/risk/sizes'] = [len(moved.train_ds), len(moved.valid_ds), moved.n_excluded]
    found |= batch_entries('samples/risk/valid', moved.valid.one_batch())
    lying = risk_dls(pictures, bs=6, years=3, priors=1, censoring='mirai', seed=2, device='cpu')
    found |= batch_entries('samples/risk as it lies', first_batch(lying))
    pairs = pair_dls(pictures, bs=6, seed=3, device='cpu')
    found |= batch_entries('samples/pairs', first_batch(pairs))
    found |= batch_entries('samples/pairs/valid', pairs.valid.one_batch())
    return found


# ---- systems of two views

def two_view_answers(name, model):
    "What a model of two views says about the validation patients"
    return said(name, predict(model, prepared_cohort(), split='valid'))


def few_two_view_answers(name, model):
    "The same of some of them"
    rows = few(last_breasts())
    return said(name, predict(model, prepared_cohort(), split='valid', rows=rows))


def two_view_loaders(bs=64, some=lambda rows: rows, **kwargs):
    "The last exams; with a large batch all training breasts are one step"
    rows = some(last_breasts())
    return two_view_dls(prepared_cohort(), bs=bs, rows=rows, seed=1, device='cpu', **kwargs)


def two_view():
    "The two-view baseline"
    ways = {
        'small': dict(),
        'one view': dict(views=('cc',), pool='mean'),
        'resnet18': dict(encoder='resnet18', stride=16),
        'frozen': dict(freeze_encoder=True, class_weight=None, view_weight=0.),
    }
    found = {}
    for name, how in ways.items():
        learner = two_view_learner(two_view_loaders(), seed=2, **how)
        found |= follow(f'two_view/{name}', learner, two_view_answers)
    learner = two_view_learner(two_view_loaders(bs=8), seed=2)
    long = follow('two_view/longer', learner, two_view_answers, epochs=3, one_cycle=True)
    return found | long | saved('two_view/saved', learner.model)


def saved(name, model):
    "A model that was written and read, and what it was told of the training"
    again = load_model(model.save_pretrained(Path(FOLDER.name)/'model'))
    cohort = again.training_info['cohort']
    found = weights(f'{name}/weights', again)
    found |= two_view_answers(f'{name}/predictions', again)
    found[f'{name}/training'] = [cohort[k] for k in ('patients', 'cases', 'cancers')]
    return found


def mammonet():
    "Mammo-Net, every row of the ablation"
    found = {}
    for variant in VARIANTS:
        asked = dict(gaze=True, gaze_slices=3) if 'gaze' in VARIANTS[variant] else {}
        learner = mammonet_learner(two_view_loaders(**asked), variant, 'small', 8, start=False,
                                   model_args=SMALL_MAMMONET, seed=3, lr=1e-3)
        found |= follow(f'mammonet/{variant}', learner, two_view_answers)
    learner = mammonet_learner(two_view_loaders(some=few, gaze=True), seed=3, start=False)
    found |= follow('mammonet/resnet18', learner, few_two_view_answers)
    options = SMALL_MAMMONET | dict(shared=True, source_pool=2, pool='top10', create_graph=True)
    learner = mammonet_learner(two_view_loaders(bs=8, gaze=True), 'mammonet', 'small', 8, start=False,
                               model_args=options, seed=3, lr=1e-3)
    longer = follow('mammonet/longer', learner, two_view_answers, epochs=2, one_cycle=True)
    return found | longer | saved('mammonet/saved', learner.model)


def losses():
    "Losses on fixed tensors"
    generator = torch.Generator().manual_seed(31)
    first, second = torch.randn(2, 8, 6, generator=generator)
    maps = torch.randn(4, 3, 12, 9, generator=generator)
    looks = torch.rand(4, 3, 12, 9, generator=generator)
    there = torch.tensor([1., 0., 1., 1., 1., 1., 0., 1.])
    target = (torch.rand(8, 6, generator=generator) > .5).float()
    known = (torch.rand(8, 6, generator=generator) > .3).float()
    found = {}
    for direction in ('fused_to_view', 'view_to_fused', 'symmetric'):
        loss = bidirectional_fusion_loss(first, second, direction, .3, there)
        found[f'losses/fusion/{direction}'] = float(loss)
    has_gaze = torch.tensor([1., 0., 1., 1.])
    found['losses/pyramid'] = float(pyramid_loss(maps[:, 0], looks, has_gaze))
    found['losses/scanpath'] = float(scanpath_loss(maps, looks, has_gaze))
    found['losses/masked'] = numbers(masked_bce(first, target, known))
    return found


# ---- registration

@lru_cache
def some_pairs():
    "Each last picture of one view with the one before"
    rows = exam_pairs(prepared_cohort().cohort, 'previous')
    rows = rows[rows['exam_id'].isin(last_breasts()['exam_id'])]
    return rows[rows['view'] == 'MLO'].reset_index(drop=True)


@lru_cache
def known_pairs():
    "The validation pairs with their known flows"
    return pair_dls(prepared_cohort(), rows=some_pairs(), seed=3, device='cpu').valid_ds


def pair_answers(name, model):
    "What a registration does to the validation pairs"
    result = evaluate_registration(model, known_pairs())
    columns = ('tre_mm', 'folding_percent', 'sd_log_jacobian', 'ncc_before', 'ncc')
    found = numeric_table(name, result[list(columns)])
    fixed = some_pictures(2)
    with torch.no_grad():
        flow = model(fixed, fixed.flip(0))['flow']
    return found | summary(f'{name}/flow', flow)


def registration():
    "The registration network and its learner"
    ways = {
        'plain': (dict(width=2, depth=2), dict()),
        'window': (dict(width=2, depth=1, window=3), dict(window=9, smooth=.2, fold=1.)),
        'inverse': (dict(width=2, depth=1, inverse=True, shrink=2, finest=1), dict(inverse=.5)),
    }
    found = {}
    for name, (network, how) in ways.items():
        loaders = pair_dls(prepared_cohort(), bs=64, rows=some_pairs(), seed=3, device='cpu')
        seed_everything(4)
        learner = registration_learner(loaders, MammoRegNet(**network), seed=4, lr=1e-3, **how)
        found |= follow(f'registration/{name}', learner, pair_answers, first_pair_loss)
    found |= weights('registration/disturbed/weights', some_registration())
    found |= pair_answers('registration/disturbed/predictions', some_registration())
    return found


def flows():
    "What is done with flows, and registrations without a network"
    pictures = some_pictures(4)
    fixed, moving = pictures[:2], pictures[2:]
    flow, other = some_flow(2), some_flow(4)[2:]*.5
    inside = (fixed[:, 0] > 0)
    found = summary('flows/warp', warp(moving, flow))
    found |= summary('flows/warp border', warp(moving, flow, padding='border'))
    found |= summary('flows/resize', resize_flow(flow, (40, 30)))
    found |= summary('flows/compose', compose(flow, other))
    found |= summary('flows/invert', invert(flow*.2))
    found |= summary('flows/jacobian', jacobian_determinant(flow))
    found |= summary('flows/average', average_flow(flow, 7))
    found['flows/folding'] = numbers(folding_percent(flow*3, inside))
    found['flows/error'] = numbers(flow_error(flow, other, 1., inside))
    for window in (None, 5, 9):
        found[f'flows/ncc {window}'] = numbers(ncc(fixed, moving, window))
        loss = RegistrationLoss(.5, 10., window=window)
        outputs = dict(flow=flow, warped=warp(moving, flow))
        found[f'flows/loss {window}'] = float(loss(outputs, fixed))
    refined = InstanceOptimised(some_registration(), steps=4)
    found |= summary('flows/refined', refined(fixed, moving)['flow'])
    for method in ('affine', 'bspline', 'demons'):
        done = SitkRegistration(method, steps=5)(fixed[:1], moving[:1])
        found |= summary(f'flows/{method}', done['flow'])
    kept = prepared_cohort()
    pair = exam_pairs(kept.cohort, 'last').iloc[5]
    found |= summary('flows/known', prepared_flow(kept, pair['fixed'], pair['moving']))
    return found


# ---- risk

def risk_answers(name, model, **kwargs):
    "What a risk model says about the validation patients at their last exam"
    return said(name, predict(model, prepared_cohort(), bs=16, split='valid', **kwargs))


def few_risk_answers(name, model):
    "The same of some of them"
    rows = few(last_history(1))
    return said(name, predict(model, prepared_cohort(), bs=16, split='valid', rows=rows))


def risk_loaders(priors=1, bs=64, some=lambda rows: rows, registration=None, **kwargs):
    "The last exams; with a large batch all training breasts are one step"
    rows = some(last_history(priors))
    if registration is not None:
        kwargs['flows'] = prior_flows(prepared_cohort(), rows, registration, progress=False)
    return risk_dls(prepared_cohort(), bs=bs, priors=priors, rows=rows, seed=5, device='cpu',
                    **kwargs)


def lmvnet():
    "LMV-Net: with a registration, with flows from the loaders, and as priors lie"
    network = some_registration()
    small = dict(encoder='small', stride=8, seed=6, lr=1e-3, warmup=2)
    options = SMALL_LMVNET | dict(diff_mode='abs', prior_mode='raw', token_pool=2, blocks=2,
                                  view_dropout=.5, prior_dropout=.4, weight_dropout=.1)
    found = {}

    learner = lmvnet_learner(risk_loaders(2), network, model_args=SMALL_LMVNET, **small)
    answers = partial(risk_answers, priors=2)
    found |= follow('lmvnet/registration', learner, answers)

    loaders = risk_loaders(2, registration=network)
    learner = lmvnet_learner(loaders, model_args=SMALL_LMVNET, **small)
    answers = partial(risk_answers, priors=2, registration=network)
    found |= follow('lmvnet/flows', learner, answers)

    learner = lmvnet_learner(risk_loaders(1), model_args=SMALL_LMVNET, **small)
    found |= follow('lmvnet/not aligned', learner, risk_answers)

    learner = lmvnet_learner(risk_loaders(1), network, model_args=options, **small)
    found |= follow('lmvnet/options', learner, risk_answers)

    learner = lmvnet_learner(risk_loaders(1, some=few), network, seed=6, warmup=2, encoder_lr_factor=.1)
    found |= follow('lmvnet/resnet18', learner, few_risk_answers)

    loaders = risk_loaders(1, bs=8, registration=network)
    learner = lmvnet_learner(loaders, model_args=SMALL_LMVNET, recipe=None, **small)
    answers = partial(risk_answers, registration=network)
    return found | follow('lmvnet/longer', learner, answers, epochs=2, one_cycle=True)


def risk():
    "The baselines of LMV-Net"
    models = {
        'unaligned': partial(UnalignedRisk, 'small', 8, **SMALL_LMVNET),
        'current exam': partial(CurrentExamRisk, 'small', 8, width=4),
        'density': DensityRisk,
    }
    found = {}
    for name, make in models.items():
        seed_everything(7)
        learner = risk_learner(risk_loaders(1), make(), lr=1e-2, warmup=1)
        found |= follow(f'risk/{name}', learner, risk_answers)
        truth_of = last_history(1)
        answers = predict(learner.model, prepared_cohort(), bs=16)
        result = evaluate_risk(risk_table(answers, truth_of, quiet=True), n_boot=20)
        found |= numeric_table(f'risk/{name}/evaluation', result, ('why',))
    return found


# ---- metrics

def fixed_predictions(system, shift):
    "A made-up predictions table: two pictures of each of 60 breasts of 30 patients"
    random = np.random.default_rng(41)
    place = np.arange(120)
    patient = place//4
    label = (random.random(60) < .35).astype(float)[place//2]
    value = 1/(1+np.exp(-(random.normal(size=120)+1.2*label-.5+shift*random.normal(size=120))))
    things = pd.DataFrame(dict(
        patient_id=[f'p{i:02d}' for i in patient],
        exam_id=[f'e{i:02d}' for i in patient],
        laterality=np.where(place//2 % 2, 'R', 'L'),
        image_id=[f'i{i:03d}' for i in place],
        split=np.where(patient < 12, 'valid', 'test'),
        label=label,
    ))
    return predictions_table(things, np.round(value, 1), system, 'probability', 'one')


def metrics():
    "Classification metrics of a fixed table"
    whole = fixed_predictions('first', .3)
    other = fixed_predictions('second', 1.)
    valid, test = (whole[whole['split'] == s].reset_index(drop=True) for s in ('valid', 'test'))
    other = other[other['split'] == 'test'].reset_index(drop=True)
    found = {}
    for rule in ('youden', 'accuracy', 'sensitivity', 'specificity'):
        threshold = choose_threshold(valid, rule)
        found[f'metrics/threshold/{rule}'] = threshold.value
        result = evaluate_classification(test, threshold, n_boot=50)
        found |= numeric_table(f'metrics/evaluation/{rule}', result, ('text',))
    found['metrics/bca'] = estimate(bootstrap_ci(test, auc, n_boot=50, method='bca'))
    found['metrics/several'] = estimate(bootstrap_ci([test, other], brier, n_boot=50))
    found['metrics/difference'] = estimate(paired_difference(test, other, auc, n_boot=50))
    label, value = test['label'].to_numpy(), test['value'].to_numpy()
    found['metrics/roc'] = numbers(np.concatenate(roc_points(label, value)))[::5]
    found['metrics/sensitivity'] = numbers(sensitivity_at(label, value, grid=(.1, .2, .5)))
    found |= numeric_table('metrics/band', roc_band(test, n_boot=30, points=6))
    for strategy in ('uniform', 'quantile'):
        bins = calibration_table(test, 5, strategy, n_boot=30)
        found |= numeric_table(f'metrics/calibration/{strategy}', bins)
    for method in ('logistic', 'isotonic'):
        found[f'metrics/calibrator/{method}'] = numbers(fit_calibrator(valid, method)(value[:12]))
    for by in ('breast', 'exam', 'patient'):
        for how in ('mean', 'max', 'noisy_or'):
            values = aggregate(test, by, how)['value']
            found |= summary(f'metrics/aggregate/{by} {how}', values)
    both = pd.concat([test, test.assign(output='probability_cc', value=1-test['value'])])
    joined = combine_outputs(both, ('probability', 'probability_cc'), 'probability_max', 'max')
    found |= summary('metrics/combined', joined['value'])
    return found


def survival():
    "Survival metrics of fixed times"
    random = np.random.default_rng(42)
    time_to = np.round(random.exponential(4., 80), 1)
    event = (random.random(80) < .5).astype(float)
    score = np.round(-time_to+random.normal(size=80)*2)
    risks = np.sort(1/(1+np.exp(-(score[:, None]/3+random.normal(size=(80, 5))))), 1)
    risks = np.round(risks, 2)
    frame = pd.DataFrame(dict(patient_id=[f'p{i//2:02d}' for i in range(80)], time=time_to,
                              event=event))
    for year in range(5):
        frame[f'risk_year_{year+1}'] = risks[:, year]
    found = {}
    for convention in ('uno', 'harrell', 'mirai'):
        name = f'survival/c index/{convention}'
        found[name] = float(c_index(time_to, event, *risks.T, tau=5., convention=convention))
    found['survival/c index/score'] = float(c_index(time_to, event, score))
    for year in (1, 3, 5):
        last = risks[:, year-1]
        found[f'survival/year {year}'] = [
            float(metric(time_to, event, last, year=year))
            for metric in (auc_by_year, auc_cumulative, brier_by_year, eo_ratio)
        ]
    found |= summary('survival/curve', survival_curve(time_to, event)[1])
    found['survival/followed'] = numbers(censoring_survival(time_to, event, [1., 2.5, 5.]))
    found |= numeric_table('survival/evaluation', evaluate_risk(frame, n_boot=30), ('why',))
    return found


def localization():
    "Attention maps of untrained models against the lesions"
    kept = prepared_cohort()
    found = {}
    tables = {}
    learners = {
        'two_view': two_view_learner(two_view_loaders(), seed=8),
        'mammonet': mammonet_learner(two_view_loaders(), 'cross_view', 'small', 8, seed=8, start=False,
                                     model_args=SMALL_MAMMONET),
    }
    for name, learner in learners.items():
        maps = attention_maps(learner.model, kept, 'train', rows=last_breasts())
        found |= summary(f'localization/{name}/maps', np.stack(list(maps.values())))
        tables[name] = localization_table(maps, kept, tolerance_mm=5.)
        found |= numeric_table(f'localization/{name}', tables[name])
    for metric in ('attention_in_lesion', 'pointing_game', 'iou', 'pixel_auc'):
        one = localization_ci(tables['two_view'], metric, n_boot=50)
        both = localization_ci(tables['two_view'], metric, tables['mammonet'], n_boot=50)
        found[f'localization/interval/{metric}'] = estimate(one)
        found[f'localization/difference/{metric}'] = estimate(both)
    lesion = read_lesion_mask(kept, tables['two_view']['image_id'].iloc[0])
    return found | picture('localization/lesion', lesion)


PARTS = (cohort, prepared, real, gaze, seeds, samples, two_view, mammonet, losses, registration,
         flows, lmvnet, risk, metrics, survival, localization)
PART = {part.__name__: part for part in PARTS}


# ---- running and comparing

def made_with():
    "What the last digits may depend on"
    return dict(
        python=platform.python_version(), machine=platform.machine(), system=platform.system(),
        vectors=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__,
        numpy=np.__version__, scipy=scipy.__version__, pandas=pd.__version__,
        fastai=fastai.__version__, timm=timm.__version__, sitk=SimpleITK.__version__,
    )


def plain(value):
    "A value as it comes back from a file"
    return json.loads(json.dumps(value))


def compute(name):
    "The entries of a part"
    with one_thread():
        seed_everything(0)
        found = PART[name]()
    astray = [key for key in found if key.split('/')[0] != name]
    if astray:
        raise ValueError(f'entries of another part: {astray}')
    return plain(found)


def write_reference(path, entries):
    "One line an entry"
    lines = [f'{json.dumps(key)}: {json.dumps(value)}' for key, value in entries.items()]
    body = ',\n'.join(lines)
    about = json.dumps(made_with())
    text = f'{{"made_with": {about},\n"entries": {{\n{body}\n}}}}\n'
    Path(path).write_text(text, encoding='utf-8')


def read_reference(path=REFERENCE):
    "Entries under the names of today, and what they were made with"
    kept = json.loads(Path(path).read_text(encoding='utf-8'))
    entries = {}
    for key, value in kept['entries'].items():
        for old, new in RENAMED.items():
            key = key.replace(old, new)
        entries[key] = value
    return entries, kept['made_with']


def same(old, new, tolerance):
    "Are two values the same? Numbers may differ by a part of the larger one"
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(same(a, b, tolerance) for a, b in zip(old, new))
    if isinstance(old, (int, float)) and isinstance(new, (int, float)):
        if math.isnan(old) or math.isnan(new):
            return math.isnan(old) and math.isnan(new)
        return old == new or abs(old-new) <= tolerance*max(abs(old), abs(new))
    return old == new


def tolerance_of(key):
    "How far an entry may be from the reference, relative; 0: every digit counts"
    return next((value for start, value in TOLERANCE.items() if key.startswith(start)), 0.)


def difference(key, old, new):
    "A line about an entry that is not what it was"
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) > 4:
        at = [i for i, (a, b) in enumerate(zip(old, new)) if not same(a, b, 0)]
        shown = ', '.join(f'[{i}] {old[i]!r} -> {new[i]!r}' for i in at[:3])
        return f'{key}: {len(at)} of {len(old)} differ: {shown}'
    return f'{key}: {old!r} -> {new!r}'


def nearly_same(old, new):
    "Are two values the same up to what another processor does to the last digits? Of a checksum nothing is known"
    many = isinstance(old, list) and isinstance(new, list)
    if not many:
        return nearly_same([old], [new])
    numbers = [abs(v) for v in old if isinstance(v, (int, float)) and math.isfinite(v)]
    allowed = ELSEWHERE*max(numbers, default=0)
    close = lambda a, b: isinstance(a, (int, float)) and isinstance(b, (int, float)) and abs(a-b) <= allowed
    return len(old) == len(new) and all(same(a, b, 0) or close(a, b) for a, b in zip(old, new))


def differences(old, new, parts, elsewhere=False):
    "Lines about all entries of some parts that differ, are missing or are new; `elsewhere`: that no other processor explains"
    lines = []
    for key, value in old.items():
        if key.split('/')[0] not in parts:
            continue
        if key not in new:
            lines.append(f'{key}: missing, was {str(value)[:80]}')
        elif elsewhere and (key.endswith('/sha256') or nearly_same(value, new[key])):
            continue
        elif not same(value, new[key], tolerance_of(key)):
            lines.append(difference(key, value, new[key]))
    lines += [f'{key}: new, {str(new[key])[:80]}' for key in new if key not in old]
    return lines


def report(lines, before):
    "One message about all differences"
    other = {k: (before.get(k), v) for k, v in made_with().items() if before.get(k) != v}
    head = f'{len(lines)} entries differ (old -> new):'
    if other:
        head += f'\nthe reference was made elsewhere, last digits may differ: {other}'
    return '\n'.join([head, *lines])


def main():
    "Compare, or write"
    parser = argparse.ArgumentParser(description='What the library computes, as numbers.')
    parser.add_argument('--only', nargs='+', choices=list(PART), default=list(PART))
    parser.add_argument('--write', action='store_true', help='write the reference')
    parser.add_argument('--file', default=REFERENCE, help='another reference than the own one')
    chosen = parser.parse_args()
    entries = {}
    broken = []
    for name in chosen.only:
        start = time.process_time()
        try:
            entries |= compute(name)
        except Exception:
            traceback.print_exc()
            broken.append(name)
        print(f'{name}: {time.process_time()-start:.1f} s', file=sys.stderr)
    if broken:
        print(f'broken: {", ".join(broken)}')
    if chosen.write:
        if broken:
            sys.exit('nothing written')
        old = read_reference(chosen.file)[0] if Path(chosen.file).exists() else {}
        rest = {k: v for k, v in old.items() if k.split('/')[0] not in chosen.only}
        write_reference(chosen.file, dict(sorted({**rest, **entries}.items())))
        print(f'{len(entries)} entries written')
        return
    reference, before = read_reference(chosen.file)
    ran = [name for name in chosen.only if name not in broken]
    lines = differences(reference, entries, ran)
    print(report(lines, before) if lines else f'{len(entries)} entries are what they were')
    sys.exit(bool(lines or broken))


if __name__ == '__main__':
    main()
