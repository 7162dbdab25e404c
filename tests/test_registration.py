"""Flows and registrations against SimpleITK, closed forms, and shifts that are known."""
import json
import numpy as np, pandas as pd, pytest, torch
import SimpleITK as sitk
from torch.nn import functional as F
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import seed_everything
from mammo_nb.insilico.config import InSilicoConfig
from mammo_nb.insilico.ground_truth import known_flow, truth
from mammo_nb.insilico.images import render
from mammo_nb.models.longitudinal import LongitudinalFeatureProcessor
from mammo_nb.registration.error import (
    checkerboard, flow_error, show_registration, target_registration_error
)
from mammo_nb.registration.flow import compose, pixel_grid, resize_flow, sample_flow, warp
from mammo_nb.registration.folding import folding_percent, invert, jacobian_determinant
from mammo_nb.registration.instance_optimisation import (
    InstanceOptimised, average_flow, optimise_flow
)
from mammo_nb.registration.losses import RegistrationLoss, box_mean, ncc, ncc_with
from mammo_nb.registration.mammoregnet import MammoRegNet, affine_flow
from mammo_nb.registration.prior_flows import prior_flows
from mammo_nb.registration.simpleitk import SitkRegistration

H, W = 40, 56  # never square

def random_image(seed=0, size=(H, W)):
    return torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(seed))

def constant(dy, dx, size=(H, W)):
    "The same displacement everywhere"
    return torch.tensor([dy, dx], dtype=torch.float32).view(1, 2, 1, 1).expand(1, 2, *size)

def as_field(flow):
    "A flow [1,2,H,W] as SimpleITK wants it: (dx, dy) in the last dimension"
    channels = np.moveaxis(flow[0].double().numpy()[::-1], 0, -1)
    return sitk.GetImageFromArray(channels.copy(), isVector=True)

@pytest.fixture(scope='module')
def exams():
    "Two exams of a breast with the true flow, and its settings"
    settings = InSilicoConfig(rows=192, cols=144, pixel_spacing_mm=1.25, motion=.5)
    images = []
    for exam in (0, 1):
        breast = truth(settings, 3, exam, 'L', 'CC').breast
        pixels = np.where(breast, render(settings, 3, exam, 'L', 'CC')/4095, 0)
        images.append(torch.from_numpy(pixels).float()[None, None])
    flow = torch.from_numpy(known_flow(settings, 3, 'L', 'CC'))[None]
    return *images, flow, settings

# warping

def test_no_flow_changes_nothing():
    "Up to the rounding of coordinates, 1e-5 pixels"
    assert torch.allclose(warp(random_image(), constant(0, 0)), random_image(), atol=1e-4)

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16))
def test_half_precision_does_not_move_pixels(dtype):
    x = random_image(size=(8, 1664)).to(dtype)
    out = warp(x, torch.zeros(1, 2, 8, 1664, dtype=dtype))
    assert out.dtype == dtype
    assert (out.float()-x.float()).abs().max() < 1e-2

def test_channel_0_moves_rows_and_channel_1_columns():
    x = random_image()
    assert torch.allclose(warp(x, constant(1, 0))[..., :-1, :], x[..., 1:, :], atol=1e-5)
    assert torch.allclose(warp(x, constant(0, 2))[..., :-2], x[..., 2:], atol=1e-5)

def test_a_warp_is_that_of_simpleitk():
    "Where the flow points into the image; beyond its border each library has its own convention"
    coarse = torch.randn(1, 2, 5, 7, generator=torch.Generator().manual_seed(1))*3
    flow = F.interpolate(coarse, size=(H, W), mode='bicubic', align_corners=True)
    x = random_image()
    transform = sitk.DisplacementFieldTransform(as_field(flow))
    resampled = sitk.Resample(sitk.GetImageFromArray(x[0, 0].numpy()), transform, sitk.sitkLinear, 0.)
    origin = pixel_grid((H, W))+flow[0]
    last = torch.tensor([H-1, W-1]).view(2, 1, 1)
    inside = ((origin >= 0) & (origin <= last)).all(0).numpy()
    difference = np.abs(warp(x, flow)[0, 0].numpy()-sitk.GetArrayFromImage(resampled))
    assert inside.mean() > .8
    assert difference[inside].max() < 1e-4

@pytest.mark.parametrize('flow, mode, message', (
    (torch.zeros(1, 3, H, W), 'bilinear', r'flow: found shape \[1, 3, 40, 56\], expected \[B,2,H,W\]'),
    (torch.zeros(2, H, W), 'bilinear', r'found shape \[2, 40, 56\]'),
    (constant(0, 0), 'cubic', "mode: found 'cubic'")))
def test_what_cannot_be_warped(flow, mode, message):
    with pytest.raises(InputError, match=message): warp(random_image(), flow, mode)

def test_other_mistakes_with_flows():
    with pytest.raises(InputError, match='found 2 flows, expected one'): sample_flow(torch.zeros(2, 2, 5, 3), [(1, 1)])
    with pytest.raises(InputError, match='5 x 4'): compose(constant(0, 0), constant(0, 0, (5, 4)))
    with pytest.raises(InputError, match='size'): resize_flow(constant(0, 0), (0, 4))

class Pooled(torch.nn.Module):
    "An encoder that only averages"
    channels = 2
    def forward(self, x): return F.avg_pool2d(x, 4).expand(-1, 2, -1, -1)

def test_features_image_and_network_are_warped_the_same_way():
    "An image that lay 8 rows lower and 4 columns further out: its features and the network's own image come to lie on the fixed ones"
    y, x = pixel_grid((80, 64))
    big = (torch.sin(y/9)+torch.cos(x/7)+torch.sin((x+2*y)/23))[None, None]
    fixed, moving = big[..., 8:72, 4:52], big[..., :64, :48]
    flow = constant(8, 4, (64, 48))  # fixed(p) = moving(p+flow)
    encoder, net = Pooled(), MammoRegNet(width=2, depth=1)
    net.predict_flow = lambda of_fixed, of_moving: (flow, torch.eye(2, 3)[None])  # a perfect network
    def difference(a, b, cells): return (a-b)[..., :-2*cells, :-cells].abs().mean()
    assert difference(net(fixed, moving)['warped'], fixed, 4) < 1e-5
    assert difference(moving, fixed, 4) > .3
    features, prior = encoder(fixed), encoder(moving)
    before = difference(prior, features, 1)
    align = LongitudinalFeatureProcessor(encoder).align
    assert difference(align(prior, flow), features, 1) < .15*before  # aligned corners cost half a cell at the border
    for wrong in (-flow, flow.flip(1)): assert difference(align(prior, wrong), features, 1) > .3*before

def test_a_resized_constant_is_scaled():
    expected = constant(4*19/(H-1), -6*13/(W-1), (20, 14))
    assert torch.allclose(resize_flow(constant(4, -6), (20, 14)), expected, atol=1e-5)

# folding, inverse, errors

def linear(dy, dx):
    "A flow from two functions of rows and columns"
    y, x = pixel_grid((H, W))
    return torch.stack([dy(y, x), dx(y, x)])[None]

@pytest.mark.parametrize('flow, determinant, folded', (
    (linear(lambda y, x: -2*y, lambda y, x: 0*x), -1, 100),
    (linear(lambda y, x: -2*x, lambda y, x: 0*x), 1, 0),
    (linear(lambda y, x: 0*y+3, lambda y, x: 0*x-2), 1, 0),
    (linear(lambda y, x: .5*y, lambda y, x: .5*x), 2.25, 0)))
def test_jacobians_by_hand(flow, determinant, folded):
    assert torch.allclose(jacobian_determinant(flow), torch.tensor(float(determinant)), atol=1e-4)
    assert float(folding_percent(flow)) == folded

def test_the_determinant_needs_two_pixels():
    with pytest.raises(InputError, match='at least 2 x 2'): jacobian_determinant(torch.zeros(1, 2, 1, 9))

def test_inverses():
    assert torch.allclose(invert(constant(3., -2.)), constant(-3., 2.), atol=1e-5)
    stretched = linear(lambda y, x: 3*(y-20), lambda y, x: 0*x)
    with pytest.raises(InputError, match='after 3 steps'): invert(stretched, steps=3)

def test_landmarks_that_do_not_fit():
    points = [(1., 2.), (3., 4.)]
    with pytest.raises(InputError, match='2 in the fixed image and 1 in the moving one'): target_registration_error(constant(0, 0), points, points[1:], 1.)
    with pytest.raises(InputError, match='pixel_spacing_mm'): target_registration_error(constant(0, 0), points, points, 0)
    with pytest.raises(InputError, match='the same size'): checkerboard(torch.zeros(3, 4), torch.zeros(4, 3))

def test_the_error_of_a_constant():
    error = flow_error(constant(3, 4), constant(0, 0), .5)
    assert float(error) == pytest.approx(2.5)
    left = torch.zeros(1, H, W)
    left[..., :10] = 1
    half = torch.cat([constant(3, 4)[..., :10], constant(0, 0)[..., 10:]], 3)
    assert float(flow_error(half, constant(0, 0), 1., left)) == pytest.approx(5)

def test_drawings_are_made_in_any_shape(exams):
    fixed, moving, flow, _ = exams
    axs = show_registration(fixed[0, 0], moving[0], flow[0], title='pair', arrows=0)
    assert len(axs) == 5 and not axs[0].collections

# correlation

@pytest.mark.parametrize('window', (None, 9))
def test_correlation(window):
    x = random_image()
    assert float(ncc(x, x, window)) == pytest.approx(1, abs=1e-3)
    assert float(ncc(x, -x, window)) == pytest.approx(-1, abs=1e-3)
    assert float(ncc(x, 3*x+2, window)) == pytest.approx(1, abs=1e-3)
    assert abs(float(ncc(x, random_image(9), window))) < .2

@pytest.mark.parametrize('share', (.1, .5, .9))
def test_a_windowed_correlation_counts_tissue_out_of_sight(share):
    "Of an image with contrast everywhere a share of the rows is kept: that share, and no more, is a match (windows over the edge aside)"
    x = random_image(size=(200, 60))
    cut = x.clone()
    cut[..., round(200*share):, :] = .5
    assert float(ncc(x, cut, 5)) == pytest.approx(share, abs=.02)
    assert float(ncc(cut, x, 5)) == pytest.approx(share, abs=.02)
    air = F.pad(x, (20, 20, 0, 0))
    assert float(ncc(air, air, 5)) == pytest.approx(1, abs=1e-3)  # air on air does not count

def test_correlation_is_of_each_image_and_not_of_the_batch():
    a = torch.cat([random_image(), random_image(1)])
    b = torch.cat([random_image(), 5-random_image(1)])
    assert torch.allclose(ncc(a, b), torch.tensor([1., -1.]), atol=1e-4)

def test_local_correlation_is_that_of_numpy():
    "Window by window, at the border too"
    a, b, counts, total = random_image(1), random_image(2), 0, 0.
    for r, c in np.ndindex(H, W):
        u, v = (x[0, 0, max(r-2, 0):r+3, max(c-2, 0):c+3].numpy().ravel().astype(float) for x in (a, b))
        counts += u.var() > 1e-5 or v.var() > 1e-5
        if min(u.var(), v.var()) > 1e-5: total += np.corrcoef(u, v)[0, 1]
    assert float(ncc(a, b, 5)) == pytest.approx(total/counts, abs=1e-3)
    assert torch.equal(ncc_with(a, 5)(b), ncc(a, b, 5))

@pytest.mark.parametrize('window, message', ((4, 'an odd number'), (1, 'window'), (2.5, 'window')))
def test_windows_that_are_none(window, message):
    with pytest.raises(InputError, match=message): ncc(random_image(), random_image(), window)

def test_images_of_two_sizes_are_refused():
    with pytest.raises(InputError, match='the same shape'): ncc(random_image(), random_image(size=(H, 20)))

@pytest.mark.parametrize('side', (1, 3, 5, 7, 15, 33))
def test_means_of_neighbourhoods(side):
    "As average pooling, its gradient too, also where the window is larger than the image"
    x = torch.rand(2, 3, 20, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(side), requires_grad=True)
    ours = box_mean((20, 13), side)(x)
    pooled = F.avg_pool2d(x, side, 1, side//2, count_include_pad=False)
    weight = torch.rand(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (ours_gradient,), (pooled_gradient,) = (torch.autograd.grad((o*weight).sum(), x) for o in (ours, pooled))
    assert torch.allclose(ours, pooled, rtol=0, atol=1e-12)
    assert torch.allclose(ours_gradient, pooled_gradient, rtol=0, atol=1e-12)

def test_means_have_second_derivatives():
    x = torch.rand(1, 1, 8, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(box_mean((8, 7), 5), x)
    assert torch.autograd.gradgradcheck(box_mean((8, 7), 5), x)

@pytest.mark.parametrize('weight', ('smooth', 'fold', 'inverse'))
def test_negative_weights_are_refused(weight):
    with pytest.raises(InputError, match=f'{weight}: found -1'): RegistrationLoss(**{weight: -1})

# the network

def test_an_affine_flow_is_that_of_pytorch():
    "PyTorch's own affine grid, in (x, y)"
    x = random_image()
    ours = warp(x, affine_flow(torch.tensor([[[1., 0, .5], [0, .5, 0]]]), (H, W)))
    grid = F.affine_grid(torch.tensor([[[.5, 0, 0], [0, 1, .5]]]), x.shape, align_corners=True)
    assert torch.allclose(ours, F.grid_sample(x, grid, align_corners=True), atol=1e-4)

@pytest.mark.parametrize('size', ((50, 70), (40, 16), (33, 100)))
@pytest.mark.parametrize('settings', (dict(shrink=2), dict(finest=2), dict(inverse=True), dict(shrink=2, finest=3)))
def test_images_of_any_size(size, settings):
    with torch.no_grad(): out = MammoRegNet(width=2, depth=1, **settings)(random_image(0, size), random_image(1, size))
    assert out['flow'].shape == (1, 2, *size) and out['warped'].shape == (1, 1, *size)

@pytest.mark.parametrize('settings', (dict(finest=4), dict(width=1), dict(depth=0), dict(shrink=1.5), dict(window=0)))
def test_networks_that_cannot_be_built(settings):
    with pytest.raises(InputError, match=f'MammoRegNet: {next(iter(settings))}'): MammoRegNet(**settings)

def test_a_network_is_built_from_plain_values():
    "Its arguments survive JSON, and the same arguments give the same parameters"
    settings = dict(width=4, depth=1, window=3, inverse=True, shrink=2, finest=1)
    seed_everything(0)
    a = MammoRegNet(**settings)
    seed_everything(0)
    b = MammoRegNet(**json.loads(json.dumps(settings)))
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())

@pytest.mark.parametrize('shift', ((6, 0), (-3, 5)))
def test_a_network_finds_a_shift(shift):
    "Trained on one phantom that was moved by whole pixels: more correlation, and the shift to a pixel"
    seed_everything(0)
    settings = InSilicoConfig(seed=3, rows=96, cols=64, pixel_spacing_mm=2.5)
    pixels = render(settings, 1, 0, 'L', 'CC', noise=False).astype(np.float32)/4095
    fixed = F.pad(torch.from_numpy(pixels)[None, None], (12, 12, 12, 12))[..., :112, :80]
    moving = warp(fixed, constant(*shift, size=fixed.shape[2:]))  # so fixed(p) = moving(p - shift)
    net, loss = MammoRegNet(width=4, depth=1), RegistrationLoss(smooth=.2)
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(80):
        opt.zero_grad()
        loss(net(fixed, moving), fixed).backward()
        opt.step()
    with torch.no_grad(): out = net.eval()(fixed, moving)
    before, after = float(ncc(fixed, moving)), float(ncc(fixed, out['warped']))
    assert after > before+.3*(1-before)
    breast = fixed[0, 0] > .2
    found = [float(channel[breast].median()) for channel in out['flow'][0]]
    assert np.abs(np.add(found, shift)).max() < 1, found
    assert float(folding_percent(out['flow'])) < .1

# instance optimisation and SimpleITK

def test_one_signature_for_all():
    a, b = random_image(), random_image(1)
    optimised = InstanceOptimised(MammoRegNet(width=2, depth=1), steps=1)
    for registration in (SitkRegistration('affine', steps=5), SitkRegistration('affine', steps=5, shrink=2), optimised):
        out = registration(a, b)
        assert out['flow'].shape == (1, 2, H, W)
        assert torch.allclose(out['warped'], warp(b, out['flow']))

def test_averages_of_half_precision_do_not_overflow():
    flow = torch.full((1, 2, 40, 40), 100., dtype=torch.float16)
    averaged = average_flow(flow, 33)
    assert averaged.dtype == torch.float16
    assert torch.equal(averaged, flow)

def test_a_constant_stays_when_it_is_averaged():
    assert torch.allclose(average_flow(constant(2., -1.), 5), constant(2., -1.))

def test_independent_errors_of_neighbours_cancel(exams):
    "17 x 17 of them, less what the true flow bends, also where the work is done on half the size"
    fixed, moving, flow, settings = exams
    noisy = flow + torch.randn(flow.shape, generator=torch.Generator().manual_seed(0))
    averaged = optimise_flow(noisy, fixed, moving, steps=0, average=17, shrink=2)
    before, after = (flow_error(f, flow, settings.pixel_spacing_mm, fixed[:, 0] > 0) for f in (noisy, averaged))
    assert after < .3*before

def test_a_fixed_image_with_a_gradient_can_be_optimised_on():
    a, b = random_image(1).requires_grad_(), random_image(2)
    flow = optimise_flow(torch.zeros(1, 2, H, W), a, b, steps=2, loss=RegistrationLoss(.05, 0., window=5))
    assert flow.isfinite().all()

def test_optimisation_leaves_its_inputs_alone(exams):
    fixed, moving, flow, _ = exams
    start = torch.zeros_like(flow)
    copies = [x.clone() for x in (start, fixed, moving)]
    with torch.no_grad(): optimise_flow(start, fixed, moving, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(copies, (start, fixed, moving)))

# flows of all priors

class Prepared:
    "Six prepared images in memory, two of which have priors"
    def __init__(self):
        self.keys = {f'{view}{exam}': random_image(exam, (33, 20))[0].numpy() for view in ('cc', 'mlo') for exam in range(3)}
        self.config = type('Config', (), dict(size=(33, 20), text='{}'))
        images = [dict(image_id=f'{view}{exam}', patient_id='p', exam_id=f'e{exam}', exam_date=f'{2020-exam}-01-01', laterality='L', view=view.upper(), path=f'{view}{exam}.png') for view in ('cc', 'mlo') for exam in range(3)]
        self.cohort = Cohort(pd.DataFrame(images).astype(dict(exam_date='datetime64[us]')))
        self.failures = pd.DataFrame(dict(image_id=['lost']))
    def load(self, image_id): return type('Prepared image', (), dict(image=self.keys[image_id]))

@pytest.fixture
def rows():
    "One breast at two exams; the earlier has an image that was not prepared, and no second prior exam"
    columns = ['image_id_cc', 'image_id_mlo', 'previous_image_id_cc_1', 'previous_image_id_mlo_1', 'previous_image_id_cc_2', 'previous_image_id_mlo_2']
    return pd.DataFrame([['cc0', 'mlo0', 'cc1', 'mlo1', 'cc2', 'mlo2'], ['cc1', 'lost', 'cc2', 'mlo2', None, None]], columns=columns)

def test_flows_of_priors_are_asked_once_and_in_batches(rows, monkeypatch):
    import mammo_nb.registration.prior_flows as page
    monkeypatch.setattr(page, 'check_prepared', lambda prepared, where: prepared)
    asked = []
    def registration(fixed, moving):
        asked.append(len(fixed))
        return dict(flow=(moving.mean((2, 3))-fixed.mean((2, 3)))[..., None, None].expand(-1, 2, 33, 20))
    flows = prior_flows(Prepared(), rows, registration, bs=2, progress=False)
    assert list(flows) == [('cc0', 'cc1'), ('cc0', 'cc2'), ('cc1', 'cc2'), ('mlo0', 'mlo1'), ('mlo0', 'mlo2')]
    assert asked == [2, 2, 1]
    images = Prepared().keys
    for (a, b), flow in flows.items():
        assert flow.shape == (2, 9, 5) and flow.dtype == torch.float16
        shift = images[b].mean()-images[a].mean()
        assert flow[:, 0, 0].tolist() == pytest.approx([shift*8/32, shift*4/19], abs=1e-3)

def test_no_pairs_no_flows(rows, monkeypatch):
    import mammo_nb.registration.prior_flows as page
    monkeypatch.setattr(page, 'check_prepared', lambda prepared, where: prepared)
    flows = prior_flows(Prepared(), rows.drop(columns=rows.columns[2:]), torch.add, progress=False)
    assert flows == {}
