"""Flows and registrations against SimpleITK, closed forms, and shifts that are known."""
import numpy as np, pytest, torch
import SimpleITK as sitk
from mammo_nb.core.seeding import seed_everything
from mammo_nb.data.insilico import Settings, render
from mammo_nb.models.lmvnet import LongitudinalFeatureProcessor
from mammo_nb.registration.flow import folding_percent, jacobian_determinant, pixel_grid, resize_flow, warp
from mammo_nb.registration.mammoregnet import MammoRegNet, Refined, RegistrationLoss, SitkRegistration, average_flow, box_mean_of, ncc, ncc_with, refine

H, W = 40, 56  # never square

def picture(seed=0): return torch.rand(1, 1, H, W, generator=torch.Generator().manual_seed(seed))
def constant(dy, dx, size=(H, W)): return torch.tensor([dy, dx], dtype=torch.float32).view(1, 2, 1, 1).expand(1, 2, *size)

def test_no_flow_changes_nothing(): assert torch.allclose(warp(picture(), constant(0, 0)), picture(), atol=1e-4)  # coordinates are rounded to 1e-5 pixels

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16))
def test_half_precision_does_not_move_pixels(dtype):
    x = torch.rand(1, 1, 8, 1664, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = warp(x, torch.zeros(1, 2, 8, 1664, dtype=dtype))
    assert out.dtype == dtype and (out.float()-x.float()).abs().max() < 1e-2

def test_channel_0_moves_rows_and_channel_1_columns():
    x = picture()
    assert torch.allclose(warp(x, constant(1, 0))[..., :-1, :], x[..., 1:, :], atol=1e-5)
    assert torch.allclose(warp(x, constant(0, 2))[..., :-2], x[..., 2:], atol=1e-5)

def test_a_warp_is_that_of_simpleitk():
    flow = torch.randn(1, 2, 5, 7, generator=torch.Generator().manual_seed(1))*3
    flow = torch.nn.functional.interpolate(flow, size=(H, W), mode='bicubic', align_corners=True)
    x = picture()
    field = sitk.GetImageFromArray(np.moveaxis(flow[0].double().numpy()[::-1], 0, -1).copy(), isVector=True)  # (dx, dy)
    theirs = sitk.GetArrayFromImage(sitk.Resample(sitk.GetImageFromArray(x[0, 0].numpy()), sitk.DisplacementFieldTransform(field), sitk.sitkLinear, 0.))
    at = pixel_grid((H, W))+flow[0]
    inside = ((at >= 0) & (at <= torch.tensor([H-1, W-1]).view(2, 1, 1))).all(0).numpy()  # beyond the border each library has its own custom
    assert inside.mean() > .8 and np.abs(warp(x, flow)[0, 0].numpy()-theirs)[inside].max() < 1e-4

def test_features_picture_and_network_are_warped_the_same_way():
    "A picture that lay 8 rows lower and 4 columns further out: its features and the network's own picture come to lie on the fixed ones"
    class Pooled(torch.nn.Module):
        channels = 2
        def forward(self, x): return torch.nn.functional.avg_pool2d(x, 4).expand(-1, 2, -1, -1)
    y, x = pixel_grid((80, 64))
    big = (torch.sin(y/9)+torch.cos(x/7)+torch.sin((x+2*y)/23))[None, None]
    fixed, moving, flow = big[..., 8:72, 4:52], big[..., :64, :48], constant(8, 4, (64, 48))  # fixed(p) = moving(p+flow)
    enc, net = Pooled(), MammoRegNet(width=2, depth=1)
    net.flow = lambda fix, mov: (flow, torch.eye(2, 3)[None])  # what a perfect network would say
    away = lambda a, b, n: (a-b)[..., :-2*n, :-n].abs().mean()
    assert away(net(fixed, moving)['warped'], fixed, 4) < 1e-5 < .3 < away(moving, fixed, 4)
    f, g = enc(fixed), enc(moving)
    assert away(LongitudinalFeatureProcessor(enc).align(g, flow), f, 1) < .15*away(g, f, 1)  # half a cell at the border is what corners that are aligned cost
    for wrong in (-flow, flow.flip(1)): assert away(LongitudinalFeatureProcessor(enc).align(g, wrong), f, 1) > .3*away(g, f, 1)

def test_a_resized_constant_is_scaled():
    out = resize_flow(constant(4, -6), (20, 14))
    assert torch.allclose(out, constant(4*19/(H-1), -6*13/(W-1), (20, 14)), atol=1e-5)

@pytest.mark.parametrize('dy, dx, det, folded', [
    (lambda y, x: -2*y, lambda y, x: 0*x, -1, 100), (lambda y, x: -2*x, lambda y, x: 0*x, 1, 0), (lambda y, x: 0*y+3, lambda y, x: 0*x-2, 1, 0), (lambda y, x: .5*y, lambda y, x: .5*x, 2.25, 0)])
def test_jacobians_by_hand(dy, dx, det, folded):
    y, x = pixel_grid((H, W))
    flow = torch.stack([dy(y, x), dx(y, x)])[None]
    assert torch.allclose(jacobian_determinant(flow), torch.tensor(float(det)), atol=1e-4) and float(folding_percent(flow)) == folded

@pytest.mark.parametrize('window', [None, 9])
def test_correlation(window):
    x = picture()
    assert float(ncc(x, x, window)) == pytest.approx(1, abs=1e-3) and float(ncc(x, -x, window)) == pytest.approx(-1, abs=1e-3)
    assert float(ncc(x, 3*x+2, window)) == pytest.approx(1, abs=1e-3) and abs(float(ncc(x, picture(9), window))) < .2

@pytest.mark.parametrize('share', [.1, .5, .9])
def test_a_windowed_correlation_counts_tissue_out_of_sight(share):
    "Of a picture with contrast everywhere a share of the rows is kept: that share, and no more, is a match (windows over the edge aside)"
    x = torch.rand(1, 1, 200, 60, generator=torch.Generator().manual_seed(0)); cut = x.clone(); cut[..., round(200*share):, :] = .5
    assert float(ncc(x, cut, 5)) == pytest.approx(share, abs=.02) and float(ncc(cut, x, 5)) == pytest.approx(share, abs=.02)
    air = torch.nn.functional.pad(x, (20, 20, 0, 0))
    assert float(ncc(air, air, 5)) == pytest.approx(1, abs=1e-3)  # air on air is left out

def test_correlation_is_of_each_picture_and_not_of_the_batch():
    a, b = torch.cat([picture(), picture(1)]), torch.cat([picture(), 5-picture(1)])
    assert torch.allclose(ncc(a, b), torch.tensor([1., -1.]), atol=1e-4)

@pytest.mark.parametrize('shift', [(6, 0), (-3, 5)])
def test_a_network_finds_a_shift(shift):
    "Trained on one phantom that was moved by whole pixels: more correlation, and the shift to a pixel"
    seed_everything(0)
    x = torch.from_numpy(render(Settings(seed=3, rows=96, cols=64, mm=2.5), 1, 0, 'L', 'CC', noise=False).astype(np.float32)/4095)[None, None]
    x = torch.nn.functional.pad(x, (12, 12, 12, 12))[..., :112, :80]
    moving = warp(x, constant(*shift, size=x.shape[2:]))  # moving(p) = fixed(p + shift), so fixed(p) = moving(p - shift)
    net, loss = MammoRegNet(width=4, depth=1), RegistrationLoss(smooth=.2)
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(80): opt.zero_grad(); loss(net(x, moving), x).backward(); opt.step()
    with torch.no_grad(): out = net.eval()(x, moving)
    assert float(ncc(x, out['warped'])) > float(ncc(x, moving))+.3*(1-float(ncc(x, moving)))
    breast = x[0, 0] > .2
    found = [float(c[breast].median()) for c in out['flow'][0]]
    assert np.abs(np.add(found, shift)).max() < 1, found
    assert float(folding_percent(out['flow'])) < .1

def test_one_signature_for_all():
    a, b = picture(), picture(1)
    for f in (SitkRegistration('affine', steps=5), Refined(MammoRegNet(width=2, depth=1), steps=1)):
        out = f(a, b)
        assert out['flow'].shape == (1, 2, H, W) and torch.allclose(out['warped'], warp(b, out['flow']))

def test_averages_of_half_precision_do_not_overflow():
    flow = torch.full((1, 2, 40, 40), 100., dtype=torch.float16)
    assert average_flow(flow, 33).dtype == torch.float16 and torch.equal(average_flow(flow, 33), flow)

@pytest.mark.parametrize('side', (1, 3, 5, 7, 15, 33))
def test_means_of_neighbourhoods(side):
    "As average pooling, its gradient too, also where the window is larger than the picture"
    x = torch.rand(2, 3, 20, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(side), requires_grad=True)
    ours, theirs = box_mean_of((20, 13), side)(x), torch.nn.functional.avg_pool2d(x, side, 1, side//2, count_include_pad=False)
    weight = torch.rand(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (a,), (b,) = (torch.autograd.grad((o*weight).sum(), x) for o in (ours, theirs))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12) and torch.allclose(a, b, rtol=0, atol=1e-12)

def test_local_correlation_is_that_of_numpy():
    "Window by window, at the border too"
    a, b, want = picture(1), picture(2), []
    for r in range(a.shape[2]):
        for c in range(a.shape[3]):
            u, v = (o[0, 0, max(r-2, 0):r+3, max(c-2, 0):c+3].numpy().ravel().astype(float) for o in (a, b))
            want.append((u.var() > 1e-5 or v.var() > 1e-5, np.corrcoef(u, v)[0, 1] if min(u.var(), v.var()) > 1e-5 else 0.))
    want = np.array(want)
    assert float(ncc(a, b, 5)) == pytest.approx(want[:, 1].sum()/want[:, 0].sum(), abs=1e-3)
    assert torch.equal(ncc_with(a, 5)(b), ncc(a, b, 5))

def test_a_fixed_picture_with_a_gradient_can_be_refined_on():
    a, b = picture(1).requires_grad_(), picture(2)
    assert refine(torch.zeros(1, 2, *a.shape[2:]), a, b, steps=2, loss=RegistrationLoss(.05, 0., window=5)).isfinite().all()
