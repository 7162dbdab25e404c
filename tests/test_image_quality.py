"Image quality against scikit-image and torchmetrics, and what a careless implementation would get wrong."
import numpy as np
import pandas as pd
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torchmetrics.functional.image import structural_similarity_index_measure

from mammo_nb.core.errors import InputError
from mammo_nb.losses.synthesis import SynthesisLoss, ssim_loss
from mammo_nb.metrics.bootstrap import bootstrap_ci
from mammo_nb.metrics.image_quality import (
    evaluate_images, image_quality, l1, nipple_distance, psnr, radiomics_distance, set_distance,
    ssim, ssim_map
)
from mammo_nb.metrics.predictions import predictions_table
from mammo_nb.metrics.weighted import weighted_mean


@pytest.fixture(params=[(96, 72), (64, 64), (7, 11)])
def pair(request):
    rng = np.random.default_rng(0)
    true = rng.random(request.param)
    return (true+rng.normal(0, .1, true.shape)).clip(0, 1), true


@pytest.mark.parametrize('scale', [1, 2, 255])
def test_psnr_is_that_of_scikit_image(pair, scale):
    drawn, true = (scale*image for image in pair)
    assert psnr(drawn, true, scale) == pytest.approx(peak_signal_noise_ratio(true, drawn, data_range=scale), abs=1e-9)


def test_ssim_is_that_of_scikit_image_and_its_windows(pair):
    drawn, true = pair
    whole, local = ssim_map(drawn, true, 1)
    assert whole == pytest.approx(structural_similarity(true, drawn, data_range=1), abs=1e-12)
    # one window by hand, with sample variances
    a, b = (image[:7, :7].ravel() for image in (drawn, true))
    ma, mb, (va, vb), cov = a.mean(), b.mean(), (a.var(ddof=1), b.var(ddof=1)), np.cov(a, b)[0, 1]
    by_hand = (2*ma*mb+.01**2)*(2*cov+.03**2)/((ma**2+mb**2+.01**2)*(va+vb+.03**2))
    assert local[3, 3] == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize('size', [(7, 7), (32, 9), (96, 72)])
@pytest.mark.parametrize('sd', [.02, .1, .3])
def test_the_loss_is_one_minus_the_metric(size, sd):
    "The value of scikit-image, and of torchmetrics with the same window but for its borders"
    rng = np.random.default_rng(1)
    true = rng.random(size)
    drawn = true+rng.normal(0, sd, true.shape)
    tensors = [torch.tensor(image)[None, None] for image in (drawn, true)]
    assert 1-float(ssim_loss(*tensors)) == pytest.approx(ssim(drawn, true, 1), abs=1e-5)
    assert 1-float(ssim_loss(*tensors)) == pytest.approx(structural_similarity(true, drawn, data_range=1.), abs=1e-5)


def test_the_gradient_of_the_loss_is_that_of_torchmetrics():
    "On the inner windows, with the variances of a population: up to the factor 49/48"
    rng = np.random.default_rng(2)
    true, drawn = (torch.tensor(image, dtype=torch.float32)[None, None] for image in rng.random((2, 40, 32)))
    own, other = drawn.clone().requires_grad_(), drawn.clone().requires_grad_()
    ssim_loss(own, true).backward()
    options = dict(data_range=1., gaussian_kernel=False, kernel_size=7, return_full_image=True)
    _, local = structural_similarity_index_measure(other, true, **options)
    (1-local[..., 3:-3, 3:-3].mean()).backward()
    inner = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    a, b = own.grad[inner].flatten(), other.grad[inner].flatten()
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > .999
    assert float(a.norm()/b.norm()) == pytest.approx(1, abs=.05)


def test_data_range_is_mandatory():
    image = np.zeros((8, 8))
    for function in (psnr, ssim, ssim_map, image_quality):
        with pytest.raises(TypeError, match='data_range'): function(image, image)


def test_shapes_and_values_are_checked():
    image = np.zeros((8, 8))
    with pytest.raises(InputError, match='of one shape'): l1(image, image[:7])
    with pytest.raises(InputError, match='mask'): l1(image, image, image[:7])
    with pytest.raises(InputError, match='not finite'): psnr(image*np.nan, image, 1)


def test_regions_ignore_what_is_outside():
    rng = np.random.default_rng(3)
    true, mask = rng.random((40, 30)), np.zeros((40, 30), bool)
    mask[12:25, 10:20] = True
    drawn = np.where(mask, true, 1-true)
    found = image_quality(drawn, true, 1, breast=mask)
    assert found['l1_breast'] == 0 and found['psnr_breast'] == np.inf and found['l1'] > .1
    inner = np.zeros_like(mask)
    inner[15:22, 13:17] = True # windows that do not reach outside
    assert ssim(drawn, true, 1, inner) == pytest.approx(1)


class Pixels(nn.Module):
    name = 'four pixels'
    def forward(self, x): return x.flatten(1)[:, :4]


def test_fid_is_the_formula():
    rng = np.random.default_rng(4)
    a, b = rng.random((2, 80, 1, 8, 8))
    found = set_distance(a, b, Pixels())
    fa, fb = (o.reshape(80, -1)[:, :4].astype(np.float32).astype(float) for o in (a, b))
    from scipy.linalg import sqrtm
    sa, sb = np.cov(fa.T), np.cov(fb.T)
    expected = np.square(fa.mean(0)-fb.mean(0)).sum() + np.trace(sa+sb-2*sqrtm(sa@sb).real)
    assert found['fid'] == pytest.approx(expected, abs=1e-8)
    assert found['network'] == 'four pixels' and (found['n_drawn'], found['n_true']) == (80, 80)


def test_kid_is_reproducible_and_leaves_the_generator():
    a, b = torch.rand(2, 30, 1, 8, 8)
    state = torch.get_rng_state()
    first, second = (set_distance(a, b, Pixels(), subset_size=10) for _ in range(2))
    assert first == second and torch.equal(state, torch.get_rng_state())


def test_one_image_is_no_set():
    with pytest.raises(InputError, match='number of images'): set_distance(torch.rand(1, 1, 8, 8), torch.rand(5, 1, 8, 8), Pixels())


def test_nipple_distance_by_hand():
    mask = np.zeros((20, 20))
    mask[3, 4] = 1
    assert nipple_distance(mask, (7.5, 7.5), .5) == pytest.approx(.5*np.hypot(4, 3))
    assert np.isnan(nipple_distance(mask, (np.nan, 1), .5))


def test_radiomics_distance_refuses_other_shapes():
    with pytest.raises(InputError, match='shapes'): radiomics_distance(np.zeros((2, 3)), np.zeros((2, 4)), np.ones(3))


def test_intervals_are_over_patients():
    ids = pd.DataFrame(dict(patient_id=['a', 'a', 'a', 'b', 'c'], laterality=['L', 'R', 'L', 'L', 'L'],
                            exam_id=['1', '1', '2', '3', '4']))
    table = predictions_table(ids, [.1, .1, .1, .9, .8], 'gan', 'ssim_breast', 'v')
    row = evaluate_images(table, n_boot=100, seed=3).iloc[0]
    e = bootstrap_ci(table, weighted_mean, n_boot=100, seed=3, columns=('value',))
    assert (row.value, row.ci_low, row.ci_high, row.n) == (e.value, e.low, e.high, 5)


def test_a_missing_term_is_no_zero():
    "A weight of 0 leaves a term out; the others are as before"
    drawn, true = torch.rand(2, 3, 2, 24, 24)
    all_terms, fewer = SynthesisLoss(), SynthesisLoss(ramps=dict(ssim=0, mask=0))
    a, b = all_terms.image_terms(drawn, true), fewer.image_terms(drawn, true)
    assert set(a) == {'l1', 'ssim', 'mask'} and set(b) == {'l1'} and a['l1'] == b['l1']


@pytest.mark.parametrize('name', ['l1', 'ssim', 'mask'])
def test_every_image_term_moves_the_drawing(name):
    torch.manual_seed(0)
    drawn = torch.rand(2, 2, 24, 24).requires_grad_()
    true = torch.rand(2, 2, 24, 24).round()
    SynthesisLoss().image_terms(drawn, true)[name].backward()
    channel = 1 if name == 'mask' else 0
    assert drawn.grad[:, channel].abs().max() > 0 and drawn.grad[:, 1-channel].abs().max() == 0
