"Training of LesionLDM: latents are never stale and never an input, averages, resumed and killed stages, and no leak from a cohort to a drawing."
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback

from mammo_nb.core.errors import InputError
from mammo_nb.core.hub import model_version
from mammo_nb.core.seeding import seed_everything
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.lesion_autoencoder import autoencoder_learner, mean_rows
from mammo_nb.learners.lesion_ldm import (
    LatentDataset, compare_lesions, compute_latents, evaluate_lesions, latent_key, lesion_ldm_learner, lesion_samples, read_latents, with_latents,
    write_latents
)
from mammo_nb.learners.lesion_stages import train_lesion_ldm
from mammo_nb.learners.systems import predict
from mammo_nb.models.autoencoder import PatchAutoencoder
from mammo_nb.models.lesion_ldm import LesionLDM
from mammo_nb.preparation.prepared_cohort import PreparedCohort, prepare_cohort
from mammo_nb.samples.lesion_synthesis import LesionAugment, hole_mask, lesion_dls, lesion_patches
from mammo_nb.samples.loaders import prediction_dl

PATCHES = dict(bs=8, size=16, limits=None, seed=0, device='cpu')
AUTOENCODER = dict(channels=(4, 8), blocks=1, attention=False)
SIZES = dict(
    denoiser='transformer', denoiser_args=dict(width=16, depth=1, heads=2), dim=16, steps=3, vit=dict(dim=16, depth=1, heads=2, patch=8))


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lesions')
    cohort = insilico_cohort(16, seed=3, exams=1, benign=1., rows=192, cols=144, pixel_spacing_mm=1.25)
    files = cohort.write(folder/'files', workers=1, progress=False)
    return prepare_cohort(files, folder/'cache', size=(96, 72), workers=1, progress=False)


@pytest.fixture(scope='module')
def autoencoder(prepared):
    learn = autoencoder_learner(lesion_dls(prepared, **PATCHES), model_args=AUTOENCODER, seed=0)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 3e-3)
    return learn.model


def make_learner(prepared, autoencoder, augment=None, **options):
    dls = lesion_dls(prepared, augment=augment, **PATCHES)
    return lesion_ldm_learner(dls, autoencoder, model_args=SIZES, seed=0, ema=options.pop('ema', .9), **options)


def fit(learn, epochs=1, lr=3e-3):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr)
    return learn


class ChangedHole:
    "A prepared cohort in whose images the hole of one lesion has other pixels"
    def __init__(self, prepared, row, margin=.25):
        self.base, self.row, self.margin = prepared, row, margin

    def __getattr__(self, name): return getattr(self.base, name)

    def load(self, image_id):
        image = self.base.load(image_id)
        if image_id != self.row.image_id: return image
        corners = self.row[['xmin', 'ymin', 'xmax', 'ymax']].to_numpy(float)
        hole = hole_mask(image.boxes([corners], clip=False)[0], image.image.shape[-2:], self.margin).numpy()
        changed = np.where(hole, np.random.default_rng(0).random(image.image.shape), image.image).astype(np.float32)
        changed_image = type(image).__new__(type(image))
        changed_image.__dict__.update(image.__dict__ | dict(image=changed))
        return changed_image


@pytest.mark.parametrize('shift', (0., .5))
def test_a_lesion_in_the_image_changes_no_drawing(shift, prepared, autoencoder, monkeypatch):
    "From the prepared image to the drawing, through dataset, resampling and model"
    model = LesionLDM(autoencoder, size=16, **SIZES).eval()
    model.set_training_info(lesion_dls(prepared, augment=None, **PATCHES, shift=shift).description)
    rows = lesion_patches(prepared.cohort).head(4)
    expected, _ = prediction_dl(lesion_samples(prepared, rows, model)).one_batch()
    drawn = model.draw(expected)
    real = PreparedCohort.load
    for k in range(4):
        row = rows.iloc[k]
        changed = ChangedHole(prepared, row)
        changed.base = type('Real', (), dict(load=lambda self, i: real(prepared, i)))()
        monkeypatch.setattr(PreparedCohort, 'load', lambda self, i: changed.load(i))
        inputs, targets = prediction_dl(lesion_samples(prepared, rows.iloc[k:k+1], model)).one_batch()
        monkeypatch.setattr(PreparedCohort, 'load', real)
        _, truth = prediction_dl(lesion_samples(prepared, rows.iloc[k:k+1], model)).one_batch()
        assert not torch.equal(targets['image'], truth['image']) # the change is real
        for name in inputs: assert torch.equal(inputs[name][0], expected[name][k]), name
        assert torch.allclose(model.draw(inputs)[0][inputs['mask'][0]], drawn[k][inputs['mask'][0]], atol=1e-4)


# latents

def test_latents_are_no_inputs(prepared, autoencoder):
    learn = make_learner(prepared, autoencoder)
    inputs, targets = learn.dls.one_batch()
    assert not {'latent', 'masked_latent', 'image'} & set(inputs)
    assert {'latent', 'masked_latent', 'image'} <= set(targets)
    assert all(isinstance(d, LatentDataset) for d in (learn.dls.train_ds, learn.dls.valid_ds))


def test_latents_belong_to_their_patches(prepared, autoencoder):
    cached = with_latents(lesion_dls(prepared, augment=None, **PATCHES), autoencoder)
    for _ in range(2):
        inputs, targets = cached.train.one_batch()
        with torch.no_grad():
            for name, image in dict(latent=targets['image'], masked_latent=inputs['masked_image']).items():
                assert torch.allclose(autoencoder.encode(image), targets[name], atol=1e-4)


def test_cached_latents_give_the_losses_of_fresh_ones(prepared, autoencoder, monkeypatch):
    cached = fit(make_learner(prepared, autoencoder), 2, lr=0.)
    import mammo_nb.learners.lesion_ldm as module
    monkeypatch.setattr(module, 'with_latents', lambda dls, *rest: dls)
    fresh = fit(make_learner(prepared, autoencoder), 2, lr=0.)
    assert not isinstance(fresh.dls.train_ds, LatentDataset)
    losses = [[float(v) for v in learn.recorder.losses] for learn in (cached, fresh)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert float(cached.recorder.values[-1][1]) == pytest.approx(float(fresh.recorder.values[-1][1]), abs=1e-4)


@pytest.mark.parametrize('change', (
    dict(size=24), dict(context=4.), dict(margin=.4), dict(shift=.1), dict(window_seed=1), dict(healthy=0.), dict(mask_mode='roi')), ids=str)
def test_latents_of_other_patches_are_refused(change, prepared, autoencoder):
    dls = lesion_dls(prepared, augment=None, **PATCHES)
    other = lesion_dls(prepared, augment=None, **PATCHES | change)
    latents = [compute_latents(autoencoder, d) for d in (dls.train_ds, dls.valid_ds)]
    with pytest.raises(InputError, match='these patches'): with_latents(other, autoencoder, latents)


def test_latents_of_another_autoencoder_or_other_images_are_refused(prepared, autoencoder):
    dls = lesion_dls(prepared, augment=None, **PATCHES)
    latents = [compute_latents(autoencoder, d) for d in (dls.train_ds, dls.valid_ds)]
    other = PatchAutoencoder(**AUTOENCODER)
    with pytest.raises(InputError, match='this autoencoder'): with_latents(dls, other, latents)
    again = PatchAutoencoder(**AUTOENCODER)
    again.load_state_dict(autoencoder.state_dict())
    assert latent_key(again.eval(), dls.train_ds) == latents[0]['key']
    again.latent_scale.mul_(2)
    assert latent_key(again, dls.train_ds) != latents[0]['key']
    first, *others = prepared.keys.values()
    keys = dict(zip(prepared.keys, [*others, first]))
    exchanged = PreparedCohort(prepared.cohort, prepared.cache, prepared.config, keys, prepared.failures)
    with pytest.raises(InputError, match='these patches'):
        with_latents(lesion_dls(exchanged, augment=None, **PATCHES), autoencoder, latents)


def test_latents_survive_a_file_and_a_foreign_file_is_refused(prepared, autoencoder, tmp_path):
    dls = lesion_dls(prepared, augment=None, **PATCHES)
    latents = compute_latents(autoencoder, dls.valid_ds)
    write_latents(latents, tmp_path/'a.safetensors')
    again = read_latents(tmp_path/'a.safetensors')
    assert again['key'] == latents['key'] and torch.equal(again['latent'], latents['latent'])
    with pytest.raises(InputError, match='latents'): LatentDataset(dls.train_ds, again, autoencoder)


def test_latents_of_augmented_patches_are_refused(prepared, autoencoder):
    dls = lesion_dls(prepared, augment=LesionAugment(), **PATCHES)
    with pytest.raises(InputError, match='augment=None'): with_latents(dls, autoencoder)
    learn = fit(make_learner(prepared, autoencoder, augment=True))
    assert np.isfinite(learn.recorder.values[-1][1])


# training

def test_only_condition_and_denoiser_are_trained(prepared, autoencoder):
    learn = make_learner(prepared, autoencoder)
    before = {name: p.clone() for name, p in learn.model.named_parameters()}
    version = model_version(autoencoder)
    fit(learn, 2)
    changed = {name for name, p in learn.model.named_parameters() if not torch.equal(p, before[name])}
    assert model_version(learn.model.autoencoder) == version == learn.model.training_info['autoencoder']
    assert changed and all(name.startswith('net.') for name in changed)
    assert any('condition.image.vit' in name for name in changed) and any('tables' in name for name in changed)


def test_the_model_ends_with_the_average_of_its_weights(prepared, autoencoder):
    averaged, plain = (fit(make_learner(prepared, autoencoder, ema=ema), 3) for ema in (.99, None))
    assert averaged.weight_average.averaged
    assert model_version(averaged.model.net) != model_version(plain.model.net)
    trained = averaged.weight_average.other # the weights of the last step
    assert all(torch.equal(value, plain.model.net.state_dict()[name]) for name, value in trained.items())


def test_validation_has_the_same_noise_in_every_epoch(prepared, autoencoder):
    learn = fit(make_learner(prepared, autoencoder), 2, lr=0.)
    losses = [float(row[1]) for row in learn.recorder.values]
    assert losses[0] == losses[1]


def test_attributes_are_dropped_in_training_only(prepared, autoencoder):
    learn = make_learner(prepared, autoencoder, drop=(1., 0.))
    seen = {True: [], False: []}
    noise = learn.noise_latents
    forget = noise.forget
    noise.forget = lambda n: seen[bool(noise.training)].append(forget(n)) or seen[bool(noise.training)][-1]
    fit(learn)
    assert all(f.all() for f in seen[True]) and not any(f.any() for f in seen[False])
    assert seen[True] and seen[False]


def test_a_run_with_other_drops_or_another_autoencoder_is_not_continued(prepared, autoencoder, tmp_path):
    fit(make_learner(prepared, autoencoder, folder=tmp_path))
    seed_everything(5)
    other = PatchAutoencoder(**AUTOENCODER)
    for learn in (make_learner(prepared, autoencoder, folder=tmp_path, drop=(.3, .1)), make_learner(prepared, other, folder=tmp_path)):
        with pytest.raises(InputError, match='another run'): fit(learn)


def test_an_exported_learner_has_no_patches(prepared, autoencoder, tmp_path):
    from fastai.learner import load_learner
    learn = fit(make_learner(prepared, autoencoder))
    learn.path = tmp_path
    learn.export('model.pkl')
    again = load_learner(tmp_path/'model.pkl')
    assert len(again.dls.train_ds) == 0 and not again.dls.train_ds.latents
    assert model_version(again.model) == model_version(learn.model)


# numbers

def test_two_lesions_of_an_image_are_two_rows(prepared, autoencoder, tmp_path):
    learn = make_learner(prepared, autoencoder)
    rows = lesion_patches(prepared.cohort).drop_duplicates('patient_id').head(2)
    rows = pd.concat([rows, rows.assign(finding_id='other', xmin=rows.xmin-8, xmax=rows.xmax-8)], ignore_index=True)
    table = predict(learn, prepared, rows=rows, folder=tmp_path)
    drawn = table[table.output == 'drawn']
    assert len(drawn) == 4 and drawn.path.nunique() == 4 and all((tmp_path/p).is_file() for p in drawn.path)
    metrics = evaluate_lesions(table, n_boot=20)
    assert set(metrics.n) == {4}


def test_means_have_intervals_over_patients_and_leave_unknown_numbers_out():
    patients = ['a', 'a', 'b', 'c']
    table = mean_rows(dict(x=[1., 2, 3, np.nan], y=[np.nan]*4), patients, n_boot=50)
    assert table.metric.tolist() == ['x'] and table.n.tolist() == [3] and table.value.item() == 2
    assert table.ci_low.item() <= 2 <= table.ci_high.item()


# stages

SETTINGS = dict(autoencoder=dict(epochs=2, model_args=AUTOENCODER), diffusion=dict(epochs=3, lr=2e-3, ema=.9, model_args=SIZES))
KILLED = '''
import os, signal, sys
from fastai.callback.core import Callback
from mammo_nb.learners.lesion_stages import train_lesion_ldm
sys.path.insert(0, sys.argv[3])
import test_lesion_ldm_learner as t
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.cohort.cohort import Cohort
class Kill(Callback):
    order = 10**7
    def after_epoch(self):
        if (self.n_epoch, self.epoch) == (int(sys.argv[4]), int(sys.argv[5])): os.kill(os.getpid(), signal.SIGKILL)
import pickle
prepared = pickle.load(open(sys.argv[2], 'rb'))
train_lesion_ldm(prepared, sys.argv[1], t.SETTINGS, cbs=Kill(), say=lambda line: None, **{k: v for k, v in t.PATCHES.items() if k != 'seed'})
'''


def test_killed_stages_end_with_the_same_weights(prepared, tmp_path):
    "A real SIGKILL in the first stage, another one in the last"
    import pickle
    options = {k: v for k, v in PATCHES.items() if k != 'seed'}
    whole = train_lesion_ldm(prepared, tmp_path/'whole', SETTINGS, say=lambda line: None, **options)
    (tmp_path/'prepared.pkl').write_bytes(pickle.dumps(prepared))
    here = os.path.dirname(__file__)
    for epochs, epoch in ((2, 0), (3, 1)):
        command = [sys.executable, '-c', KILLED, tmp_path/'killed', tmp_path/'prepared.pkl', here, str(epochs), str(epoch)]
        environment = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path))
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
        assert done.returncode == -signal.SIGKILL, done.stderr[-800:]
    lines = []
    again = train_lesion_ldm(prepared, tmp_path/'killed', SETTINGS, say=lines.append, **options)
    assert [line.split('] ')[1] for line in lines] == ['autoencoder: reused', 'latents: reused', 'diffusion: ...']
    assert model_version(again) == model_version(whole)


# ---- callbacks of stages

class Scaled(Callback):
    "Multiplies the loss of a stage, so it changes what is learnt"
    def __init__(self, factor): self.factor, self.fits = factor, []
    def run_config(self): return dict(factor=self.factor)
    def before_fit(self): self.fits.append(type(self.model).__name__)


def test_callbacks_of_one_stage(prepared, tmp_path):
    "They see their stage only, and other settings of theirs train it again"
    options = {k: v for k, v in PATCHES.items() if k != 'seed'}
    def run(factor):
        cb, lines = Scaled(factor), []
        settings = SETTINGS | dict(diffusion=SETTINGS['diffusion'] | dict(cbs=cb))
        train_lesion_ldm(prepared, tmp_path, settings, say=lines.append, **options)
        return cb.fits, [line.split('] ')[1] for line in lines]
    assert run(1.) == (['LesionLDM'], ['autoencoder: ...', 'latents: ...', 'diffusion: ...'])
    assert run(1.) == ([], ['autoencoder: reused', 'latents: reused', 'diffusion: reused'])
    assert run(2.) == (['LesionLDM'], ['autoencoder: reused', 'latents: reused', 'diffusion: ...'])


# ---- numbers

def test_what_is_drawn_in_the_hole_does_not_change_numbers_of_its_surroundings(prepared, autoencoder):
    "Equal outside the hole: SSIM is exactly 1, although its windows reach into the hole"
    model = LesionLDM(autoencoder, size=16, **SIZES).eval()
    dataset = lesion_samples(prepared, lesion_patches(prepared.cohort)[:4], model)
    inputs, targets = prediction_dl(dataset, 4).one_batch()
    decoded = torch.where(inputs['mask'], 1-targets['image'], targets['image'])
    found = compare_lesions(model, dict(drawn=decoded, decoded=decoded), inputs, targets)
    known = found['ssim_outside'][found['ssim_outside'].isfinite()]
    assert len(known) and (known == 1).all()
    assert (found['l1_hole'] > 0).all()


def test_of_one_patient_there_is_a_mean_without_an_interval():
    row, = mean_rows(dict(a=[1., 3.]), ['p', 'p']).to_dict('records')
    assert (row['value'], row['n']) == (2, 2) and np.isnan(row['ci_low']) and np.isnan(row['ci_high'])
