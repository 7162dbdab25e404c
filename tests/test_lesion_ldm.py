"LesionLDM: no pixel of the hole reaches the condition; the schedule, guidance, pasting and seeds are what they claim; folders are safe."
import hashlib
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
)
from torch import nn

from mammo_nb.core.errors import InputError
from mammo_nb.core.hub import model_version
from mammo_nb.core.seeding import seed_everything, stable_hash
from mammo_nb.metrics.image_quality import psnr
from mammo_nb.models.autoencoder import PatchAutoencoder
from mammo_nb.models.denoiser import TransformerDenoiser, UNetDenoiser
from mammo_nb.models.freezing import is_frozen
from mammo_nb.models.lesion_condition import FIELDS, draw_forget, forget_attributes, unknown_attributes
from mammo_nb.models.lesion_ldm import LesionLDM, content_seeds
from mammo_nb.models import lesion_ldm
from mammo_nb.models.lesion_pipeline import LesionPipeline, lesion_inputs
from mammo_nb.models.noise import SAMPLERS, amplitudes, make_scheduler, prediction_target, recover_latent

SIZES = dict(
    transformer=dict(width=32, depth=1, heads=4),
    unet=dict(channels=(8, 16), attention=(False, True), blocks=1, heads=4))
SMALL = dict(size=16, dim=16, vit=dict(dim=16, depth=1, heads=2, patch=8), steps=3)


def make_model(denoiser='transformer', **options):
    "A small model whose output depends on everything it reads"
    seed_everything(0)
    autoencoder = PatchAutoencoder(channels=(8, 8), blocks=1, attention=False)
    model = LesionLDM(autoencoder, denoiser=denoiser, denoiser_args=SIZES[denoiser], **SMALL | options)
    with torch.no_grad():
        for p in model.net.parameters():
            if not p.any(): nn.init.normal_(p, std=.2)
    return model.eval()


@pytest.fixture(scope='module', params=SIZES)
def model(request): return make_model(request.param)


def make_batch(n=3, seed=0):
    "Inputs, and the whole patches"
    g = torch.Generator().manual_seed(seed)
    image = torch.rand(n, 1, 16, 16, generator=g)
    mask = torch.zeros(n, 1, 16, 16, dtype=torch.bool)
    mask[:, :, 4:11, 5:13] = True
    known = dict(
        density=torch.arange(n) % 5, view=torch.arange(n) % 3, laterality=torch.arange(n) % 3, birads=torch.arange(n) % 6,
        category=torch.rand(n, 4, generator=g).round(), box=torch.tensor([[.4, .3, .7, .6]]).repeat(n, 1))
    return known | dict(masked_image=torch.where(mask, 0., image), mask=mask), image


def same(one, other): return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def of(inputs, chosen): return {name: value[chosen] for name, value in inputs.items()}


# nothing of the hole reaches the condition: first of all

@torch.no_grad()
def test_pixels_in_the_hole_change_neither_condition_nor_sample(model):
    inputs, image = make_batch()
    mask = inputs['mask']
    condition, drawn = model.condition(inputs), model.sample(inputs, steps=3, seed=5, guidance=2.)
    for content in (image, 1-image, torch.full_like(image, 7.), torch.full_like(image, torch.nan)):
        other = inputs | dict(masked_image=torch.where(mask, content, image))
        assert same(model.condition(other), condition)
        again = model.sample(other, steps=3, seed=5, guidance=2.)
        assert torch.equal(again[mask], drawn[mask])


@torch.no_grad()
def test_pixels_in_the_hole_do_not_change_the_default_seed(model):
    inputs, image = make_batch()
    whole = inputs | dict(masked_image=image)
    mask = inputs['mask']
    assert torch.equal(model(whole)[mask], model(inputs)[mask])


@torch.no_grad()
def test_pixels_around_the_hole_change_condition_and_sample(model):
    inputs, image = make_batch()
    mask = inputs['mask']
    other = inputs | dict(masked_image=torch.where(mask, 0., 1-image))
    before, after = model.condition(inputs), model.condition(other)
    assert not torch.equal(before['masked'], after['masked']) and not torch.equal(before['tokens'], after['tokens'])
    one, two = (model.sample(own, steps=3, seed=5)[mask] for own in (inputs, other))
    assert not torch.equal(one, two)


def test_the_condition_has_no_gradient_in_the_hole(model):
    inputs, image = make_batch()
    known = image.clone().requires_grad_()
    tokens = model.condition(inputs | dict(masked_image=known))['tokens']
    tokens.square().sum().backward()
    assert not known.grad[inputs['mask']].any()
    assert known.grad[~inputs['mask']].any()


@torch.no_grad()
def test_the_condition_of_the_public_code_fails_the_leak_test():
    leaking = make_model(mask_mode='roi')
    inputs, image = make_batch()
    one, two = (inputs | dict(masked_image=torch.where(inputs['mask'], shown, 0.)) for shown in (image, 1-image))
    assert not same(leaking.condition(one), leaking.condition(two))


@torch.no_grad()
def test_nothing_but_the_named_entries_is_read(model):
    inputs, image = make_batch()
    more = inputs | dict(image=image, target=image, label=torch.ones(3))
    assert same(model.condition(more), model.condition(inputs))
    assert content_seeds(more) == content_seeds(inputs)


# the schedule

def test_the_last_step_of_the_published_schedule():
    scheduler = make_scheduler()
    exact = np.prod(1-np.linspace(1e-4, .02, 1000))
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(exact, rel=1e-4)
    signal, noise = amplitudes(scheduler, torch.tensor([999]))
    assert signal.item() == pytest.approx(.00635, abs=1e-5)
    assert (1-scheduler.betas[-1]).sqrt().item() == pytest.approx(.990, abs=1e-3) # the early public code


@pytest.mark.parametrize('t', (0, 100, 500, 999))
def test_noise_keeps_the_variance_and_the_right_correlation(t):
    scheduler = make_scheduler()
    z, eps = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(t)).double()
    noisy = scheduler.add_noise(z, eps, torch.tensor([t]))
    correlation = torch.corrcoef(torch.stack([noisy, z]))[0, 1].item()
    assert noisy.var().item() == pytest.approx(1, abs=.02)
    assert correlation == pytest.approx(scheduler.alphas_cumprod[t].sqrt().item(), abs=.01)


@pytest.mark.parametrize('prediction', ('epsilon', 'v_prediction'))
def test_the_clean_latent_comes_back_exactly(prediction):
    scheduler = make_scheduler(prediction=prediction)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    z, eps = torch.randn(2, 5, 4, 6, 3).double()
    t = torch.tensor([0, 10, 400, 900, 999])
    noisy = scheduler.add_noise(z, eps, t)
    target = prediction_target(scheduler, z, eps, t)
    assert (recover_latent(scheduler, noisy, target, t)-z).abs().max() < 1e-9


def oracle(kind, start, z, steps, **schedule):
    "Where a sampler arrives that is told the exact target of each step"
    scheduler = make_scheduler(kind, **schedule)
    scheduler.set_timesteps(steps)
    x = start
    for t in scheduler.timesteps:
        signal, noise = amplitudes(scheduler, t.view(1))
        eps = (x-signal*z)/noise
        x = scheduler.step(prediction_target(scheduler, z, eps, t.view(1)), t, x, generator=torch.Generator().manual_seed(int(t))).prev_sample
    return x


@pytest.mark.parametrize('schedule', (dict(), dict(prediction='v_prediction', zero_terminal=True), dict(betas='cosine')), ids=str)
@pytest.mark.parametrize('kind', SAMPLERS)
def test_an_oracle_leads_every_sampler_to_the_clean_latent(kind, schedule):
    z, start = torch.randn(2, 2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    assert (oracle(kind, start, z, 20, **schedule)-z).abs().max() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize('kind', SAMPLERS)
@pytest.mark.parametrize('blend', (True, False))
def test_an_oracle_in_place_of_the_denoiser_is_sampled_to_its_latent(kind, blend, model, monkeypatch):
    "The loop of the model itself; cells around the hole are those of the masked image if they are blended in"
    inputs, _ = make_batch()
    scheduler = model.sampling_scheduler(kind, 20)
    told = model.condition(inputs)
    z = torch.randn(told['masked'].shape, generator=torch.Generator().manual_seed(1))
    def target(x, t, *args):
        signal, noise = amplitudes(scheduler, t.view(1))
        return prediction_target(scheduler, z, (x-signal*z)/noise, t.view(1))
    monkeypatch.setattr(model, 'guided_noise', target)
    drawn = model.sample_latents(inputs, scheduler, 2., [torch.Generator().manual_seed(k) for k in range(3)], blend=blend)
    known = lesion_ldm._known_cells(told['hole']) if blend else torch.zeros_like(z, dtype=torch.bool)
    assert (drawn-torch.where(known, told['masked'], z)).abs().max() < 1e-3


@torch.no_grad()
def test_ddim_without_new_noise_is_deterministic(model, monkeypatch):
    "With eta 0 the global generator, from which steps without one draw, does not matter; with eta 1 it does"
    inputs, _ = make_batch()
    monkeypatch.setattr(lesion_ldm, '_step_options', lambda scheduler, generators, eta: dict(eta=eta))
    def draw(later, eta):
        torch.manual_seed(later)
        return model.sample(inputs, steps=4, seed=1, eta=eta)
    assert torch.equal(draw(0, 0.), draw(1, 0.))
    assert not torch.equal(draw(0, 1.), draw(1, 1.))


# guidance and condition

@torch.no_grad()
def test_guidance_one_is_conditional_and_zero_unconditional(model):
    inputs, _ = make_batch()
    nothing = inputs | unknown_attributes(3)
    sample = lambda own, g: model.sample(own, steps=3, seed=2, guidance=g)
    assert torch.equal(sample(inputs, 0), sample(nothing, 1))
    assert torch.allclose(sample(nothing, 3.), sample(nothing, 1), atol=1e-3)
    assert not torch.equal(sample(inputs, 1), sample(inputs, 0))
    assert not torch.equal(sample(inputs, 3.), sample(inputs, 1))


@torch.no_grad()
@pytest.mark.parametrize('name', FIELDS)
def test_every_attribute_can_be_unknown_and_matters(name, model):
    inputs, _ = make_batch()
    unknown = unknown_attributes(3)[name]
    inputs = inputs | dict(density=inputs['density'] % 4, view=inputs['view'] % 2, laterality=inputs['laterality'] % 2, birads=inputs['birads'] % 5)
    k = FIELDS.index(name)
    forget = torch.zeros(3, len(FIELDS), dtype=torch.bool)
    forget[:, k] = True
    dropped = model.condition(inputs, forget)
    assert same(dropped, model.condition(inputs | {name: unknown}))
    without = {other: value for other, value in inputs.items() if other != name}
    assert same(dropped, model.condition(without))
    assert not torch.equal(dropped['pooled'], model.condition(inputs)['pooled'])
    assert dropped['tokens'].isfinite().all()


@pytest.mark.parametrize('kind', SIZES)
def test_unknown_attributes_have_finite_gradients(kind):
    model = make_model(kind)
    inputs, image = make_batch(4)
    model.loss(inputs, image, forget=draw_forget(4, .5, .5)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.net.parameters())
    assert all(p.grad is None for p in model.autoencoder.parameters())


def test_forgetting_keeps_types_and_other_entries():
    inputs, _ = make_batch()
    forgotten = forget_attributes(inputs, torch.ones(3, 1, dtype=torch.bool))
    assert {k: v.dtype for k, v in forgotten.items()} == {k: v.dtype for k, v in inputs.items()}
    assert forgotten['mask'] is inputs['mask'] and inputs['box'].isfinite().all()


@pytest.mark.parametrize('make', (
    lambda: UNetDenoiser(dim=8, **SIZES['unet']), lambda: TransformerDenoiser(dim=8, **SIZES['transformer'])), ids=list(SIZES)[::-1])
def test_a_new_denoiser_ignores_step_attributes_and_tokens_until_it_has_learnt(make):
    seed_everything(0)
    net = make()
    given = dict(
        noisy=torch.randn(2, 4, 8, 8), t=torch.tensor([3, 900]), masked=torch.randn(2, 4, 8, 8), hole=torch.rand(2, 1, 8, 8),
        tokens=torch.randn(2, 5, 8), pooled=torch.randn(2, 8))
    changes = dict(t=torch.tensor([500, 500]), tokens=-given['tokens'], pooled=-given['pooled'])

    def changed():
        with torch.no_grad():
            return [not torch.allclose(net(**given | {k: v}), net(**given), atol=1e-6) for k, v in changes.items()]
    assert changed() == [False]*3
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    (net(**given)-torch.randn(2, 4, 8, 8)).square().mean().backward()
    optimizer.step()
    assert changed() == [True]*3


# drawing

@pytest.mark.parametrize('kind', SAMPLERS)
@pytest.mark.parametrize('guidance', (0, 1, 2.5))
def test_pixels_outside_the_hole_are_the_original_ones(kind, guidance, model):
    inputs, image = make_batch()
    mask = inputs['mask']
    drawn = model.sample(inputs, steps=3, scheduler=kind, guidance=guidance)
    assert torch.equal(drawn[~mask], image[~mask])
    assert drawn.isfinite().all() and drawn.min() >= 0 and drawn.max() <= 1


@pytest.mark.parametrize('blend', (True, False))
def test_a_patch_without_a_hole_comes_back(blend, model):
    inputs, image = make_batch()
    mask = inputs['mask'].clone()
    mask[1] = False
    one = inputs | dict(masked_image=torch.where(mask, 0., image), mask=mask)
    drawn = model.sample(one, steps=2, blend=blend)
    assert torch.equal(drawn[1], image[1]) and not torch.equal(drawn[0], image[0])
    none = inputs | dict(masked_image=image, mask=mask & False)
    assert torch.equal(model.sample(none, steps=2), image)


@pytest.mark.parametrize('scheduler', (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler), ids=lambda s: s.__name__)
def test_other_schedulers_of_diffusers(scheduler, model):
    inputs, image = make_batch()
    own = scheduler.from_config(model.scheduler.config)
    a, b = (model.sample(inputs, steps=4, scheduler=own, seed=3) for _ in range(2))
    assert torch.equal(a, b) and a.isfinite().all()
    assert torch.equal(a[~inputs['mask']], image[~inputs['mask']])


@pytest.mark.parametrize('kind', SAMPLERS)
def test_sampling_without_signal_at_the_end(kind):
    model = make_model(schedule=dict(prediction='v_prediction', zero_terminal=True))
    inputs, _ = make_batch()
    assert model.sample(inputs, steps=5, scheduler=kind).isfinite().all()


def test_a_drawing_depends_on_its_seed_and_not_on_its_batch(model):
    inputs, _ = make_batch(4)
    whole = model.sample(inputs, seed=9, steps=3)
    for k in range(4):
        alone = model.sample(of(inputs, slice(k, k+1)), seed=[stable_hash(9, k)], steps=3)
        assert torch.allclose(alone, whole[k:k+1], atol=1e-4)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(model(of(inputs, order)), model(inputs)[order], atol=1e-4)
    twice = {name: value[:1].repeat(2, *[1]*(value.ndim-1)) for name, value in inputs.items()}
    one, two = model.sample(twice, seed=0, steps=3)
    assert not torch.equal(one, two)


def test_global_generators_are_left_alone(model):
    inputs, _ = make_batch()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    model.sample(inputs, steps=2, eta=1.)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize('wrong, words', (
    (dict(seed=[1]), 'one number, or 3'), (dict(steps=0), 'steps'), (dict(guidance=-1), 'guidance'),
    (dict(scheduler=make_scheduler(prediction='v_prediction')), 'as in the training'), (dict(scheduler=make_scheduler(steps=10)), 'as in the training'),
    (dict(scheduler=make_scheduler(betas='cosine')), 'other betas'), (dict(scheduler=make_scheduler(beta_end=.2)), 'other betas'),
    (dict(scheduler=DDIMScheduler()), 'clip_sample'), (dict(scheduler='dpmsolver', eta=.5), 'eta')))
def test_wrong_arguments_of_a_sampling(wrong, words, model):
    with pytest.raises(InputError, match=words): model.sample(make_batch()[0], **wrong)


def test_a_box_in_pixels_and_a_wrong_class_are_refused(model):
    inputs, _ = make_batch()
    for wrong in (dict(box=inputs['box']*16), dict(density=torch.tensor([0, 5, 1]))):
        with pytest.raises(InputError, match='AttributeEmbedder'): model.sample(inputs | wrong, steps=2)


def test_a_peak_of_one_on_minus_one_to_one_is_six_decibels_short():
    a, b = np.random.default_rng(0).random((2, 20, 20))
    right, published = psnr(2*a-1, 2*b-1, 2.), psnr(2*a-1, 2*b-1, 1.)
    assert psnr(a, b, 1.) == pytest.approx(right)
    assert right-published == pytest.approx(6.0206, abs=1e-3)


# the autoencoder

def test_the_latent_scale_is_measured_and_saved(tmp_path):
    model = PatchAutoencoder(channels=(8, 8), blocks=1, attention=False).eval()
    images = torch.rand(6, 1, 16, 16)
    scale = model.measure_scale(images.split(2))
    assert model.encode(images).std().item() == pytest.approx(1, abs=.02)
    model.save_pretrained(tmp_path)
    again = PatchAutoencoder.from_pretrained(tmp_path)
    assert again.latent_scale.item() == pytest.approx(scale) and torch.equal(again(images)['image'], model(images)['image'])


@pytest.mark.parametrize('shape', ((1, 1, 15, 16), (1, 1, 16, 18), (1, 3, 16, 16), (1, 16, 16)))
def test_sides_that_are_no_whole_number_of_cells_are_refused(shape):
    with pytest.raises(InputError, match='multiples of 4'):
        PatchAutoencoder(channels=(8, 8, 8), blocks=1, attention=False).encode(torch.zeros(shape))


def test_training_leaves_the_autoencoder_as_it_is():
    model = make_model().train()
    before = model_version(model.autoencoder)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    inputs, image = make_batch()
    net = model_version(model.net)
    for _ in range(2):
        model.loss(inputs, image).backward()
        optimizer.step()
    assert model_version(model.autoencoder) == before and is_frozen(model.autoencoder)
    assert model_version(model.net) != net


# the pipeline

SCRIPT = '''
import hashlib, sys, torch
torch.set_num_threads(1)
from mammo_nb.models.lesion_pipeline import LesionPipeline
pipe = LesionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
inputs = torch.load(sys.argv[2], weights_only=True)
images = pipe(inputs, num_inference_steps=3, guidance_scale=2., seed=7).images
print(type(pipe.scheduler).__name__, hashlib.sha256(images.numpy().tobytes()).hexdigest())
'''


@pytest.fixture
def pipe(model):
    made = LesionPipeline.from_model(model)
    made.set_progress_bar_config(disable=True)
    return made


def test_a_pipeline_draws_the_same_bytes_in_a_new_process(pipe, tmp_path):
    inputs, _ = make_batch()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path/'pipe')
    torch.save(inputs, tmp_path/'inputs.pt')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    own = pipe(inputs, num_inference_steps=3, guidance_scale=2., seed=7).images
    torch.set_num_threads(threads)
    command = [sys.executable, '-c', SCRIPT, str(tmp_path/'pipe'), str(tmp_path/'inputs.pt')]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path)))
    assert done.returncode == 0, done.stderr[-800:]
    assert done.stdout.split() == ['DPMSolverMultistepScheduler', hashlib.sha256(own.numpy().tobytes()).hexdigest()]


def test_a_folder_has_weights_as_safetensors_only(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    kinds = {p.suffix for p in tmp_path.rglob('*') if p.is_file()}
    assert kinds == {'.json', '.md', '.safetensors'}
    with pytest.raises(InputError, match='safetensors only'): pipe.save_pretrained(tmp_path, safe_serialization=False)


class Explode:
    def __reduce__(self): return (os.mkdir, ('exploded',))


def test_pickles_in_a_folder_are_never_read(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained(tmp_path/'pipe')
    for name in ('model/pytorch_model.bin', 'model/model.pkl', 'scheduler/scheduler.bin', 'pipeline.pt'):
        (tmp_path/'pipe'/name).write_bytes(pickle.dumps(Explode()))
    (tmp_path/'pipe'/'model'/'mammo_nb.models.lesion_ldm.py').write_text('raise SystemExit')
    LesionPipeline.from_pretrained(tmp_path/'pipe')
    (tmp_path/'pipe'/'model'/'model.safetensors').unlink()
    with pytest.raises(InputError, match='model.safetensors'): LesionPipeline.from_pretrained(tmp_path/'pipe')
    assert not (tmp_path/'exploded').exists()


@pytest.mark.parametrize('change, words', (
    (dict(scheduler=['os', 'system']), 'a scheduler of diffusers'),
    (dict(scheduler=['diffusers', 'UNet2DConditionModel']), 'a scheduler of diffusers'),
    (dict(scheduler=['diffusers', 'logging']), 'a scheduler of diffusers'),
    (dict(scheduler=None), 'model_index.json'), (dict(_class_name='StableDiffusionPipeline'), 'LesionPipeline')))
def test_an_index_that_names_something_else_is_refused(change, words, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    path = tmp_path/'model_index.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=words): LesionPipeline.from_pretrained(tmp_path)


def test_a_configuration_that_names_foreign_weights_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    path = tmp_path/'model'/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(checkpoint_path='other.pth')))
    with pytest.raises(InputError, match='checkpoint_path'): LesionPipeline.from_pretrained(tmp_path)


def test_a_saved_scheduler_can_be_replaced(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    own = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert isinstance(LesionPipeline.from_pretrained(tmp_path).scheduler, DDIMScheduler)
    assert isinstance(LesionPipeline.from_pretrained(tmp_path, scheduler=own).scheduler, EulerDiscreteScheduler)


def test_a_scheduler_that_limits_latents_is_refused(pipe):
    "What diffusers makes of the settings of DPM-Solver"
    model = pipe.model
    dpm = make_scheduler('dpmsolver', **model.schedule)
    with pytest.raises(InputError, match='clip_sample.*not limited'):
        model.sample(make_batch()[0], steps=2, scheduler=DDIMScheduler.from_config(dpm.config))
    own = DDIMScheduler.from_config(dpm.config, clip_sample=False)
    assert model.sample(make_batch()[0], steps=2, scheduler=own).isfinite().all()


def test_words_are_read_in_any_spelling_and_never_ignored():
    image, box = torch.rand(1, 96, 64), (20, 30, 32, 40)
    told = lesion_inputs(image, box, 16, density='B', laterality='L', view='CC', birads='5', kinds='mass')[0]
    same = lesion_inputs(image, box, 16, density='b', laterality='left', view='cc', birads=5, kinds=('mass',))[0]
    for name, value in told.items(): assert torch.equal(value, same[name]), name
    unknown = lesion_inputs(image, box, 16, density=None, laterality=float('nan'), view=None, birads=float('nan'), kinds=None)[0]
    nothing = lesion_inputs(image, box, 16)[0]
    for name, value in nothing.items(): assert torch.equal(value.nan_to_num(-1), unknown[name].nan_to_num(-1)), name
    for name, wrong in dict(density='E', laterality='both', view='side', birads='7', kinds='lump').items():
        with pytest.raises(InputError, match='lump' if name == 'kinds' else name): lesion_inputs(image, box, 16, **{name: wrong})


def test_grey_levels_and_holes_that_do_not_fit_are_refused(pipe):
    image = torch.rand(1, 96, 64)
    with pytest.raises(InputError, match='grey levels of 0 to 1'): pipe.draw_in(255*image, (20, 30, 32, 40), kinds='mass')
    for context in (None, 1.2):
        with pytest.raises(InputError, match='inside the window'): lesion_inputs(image, (10, 20, 40, 60), 16, context)
    with pytest.raises(InputError, match='schedular'): LesionPipeline.from_pretrained('x', schedular='ddim')


def test_the_place_of_a_lesion_does_not_depend_on_the_resolution():
    shares = []
    for k in (1, 2, 3):
        image = torch.rand(1, 96*k, 64*k)
        inputs, _ = lesion_inputs(image, (20*k, 30*k, 32*k, 40*k), 16, context=4)
        shares.append(inputs['box'][0])
        assert inputs['mask'].any() and not inputs['masked_image'][inputs['mask']].any()
    assert torch.allclose(shares[0], shares[1], atol=.02) and torch.allclose(shares[0], shares[2], atol=.02)


@pytest.mark.parametrize('box', ((0, 0, 9, 9), (50, 80, 64, 96), (10, 12, 30, 18)))
def test_a_lesion_in_an_image_changes_its_hole_only(box, pipe):
    image = torch.rand(1, 96, 64)
    out = pipe.draw_in(image, box, options=dict(num_inference_steps=2), kinds='mass', birads='4')
    x0, y0, x1, y1 = box
    dx, dy = .25*(x1-x0)+1, .25*(y1-y0)+1
    changed = (out != image)[0].nonzero()
    assert len(changed) and (changed[:, 0] >= y0-dy).all() and (changed[:, 0] < y1+dy).all()
    assert (changed[:, 1] >= x0-dx).all() and (changed[:, 1] < x1+dx).all()


# reports

@torch.no_grad()
def test_whole_numbers_of_a_category_are_dropped_too(model):
    inputs, _ = make_batch()
    whole = inputs | dict(category=inputs['category'].long())
    for forget in (False, True):
        own, other = (model.condition(i, forget)['tokens'] for i in (inputs, whole))
        torch.testing.assert_close(own, other)


@torch.no_grad()
def test_a_report_is_dropped_with_all_attributes():
    "Guidance 0 draws without any condition, so no report changes it; guidance 1 reads the report"
    model, (inputs, _) = make_model(extra_dim=5), make_batch()
    told = inputs | dict(report=torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(0)))
    drawn = {}
    for guidance in (0., 1.):
        drawn[guidance] = [model.sample(own, steps=3, seed=5, guidance=guidance) for own in (inputs, told)]
    torch.testing.assert_close(*drawn[0.], atol=1e-5, rtol=0)
    assert (drawn[1.][0]-drawn[1.][1]).abs().max() > 1e-3
    with pytest.raises(InputError, match='report.*made with extra_dim'):
        make_model().sample(told, steps=3)
