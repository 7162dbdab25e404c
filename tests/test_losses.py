"Losses: what unknown entries teach (nothing), half precision, several processes, and each check of Mammo-Net's specification"
import math

import numpy as np
import pytest
import torch
from processes import SERVER
from torch.nn import functional as F

from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import seed_everything
from mammo_nb.losses.attention import gaussian_pyramid, pixel_norm, pyramid_loss, scanpath_loss
from mammo_nb.losses.contrastive import FUSION_DIRECTIONS, bidirectional_fusion_loss
from mammo_nb.losses.mammonet import MammoNetLoss
from mammo_nb.losses.survival import RiskLoss, masked_bce

# ---- risk

def test_what_is_masked_changes_neither_loss_nor_gradient():
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1., 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    target = torch.randint(0, 2, (3, 5), generator=g).float()
    flipped = torch.where(mask > 0, target, 1-target)
    unknown = torch.where(mask > 0, target, torch.nan)
    found = []
    for t in (target, flipped, unknown):
        logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
        loss = masked_bce(logits, t, mask)
        loss.backward()
        found.append((loss.detach(), logits.grad))
    loss, grad = found[0]
    assert all(torch.equal(o, loss) for o, _ in found)
    assert all(torch.equal(o, grad) for _, o in found)
    assert (grad[mask == 0] == 0).all()
    known = logits.detach()[mask > 0], target[mask > 0]
    assert torch.allclose(loss, F.binary_cross_entropy_with_logits(*known))

def test_an_empty_mask_is_zero_and_no_nan():
    logits = torch.randn(2, 5, requires_grad=True)
    nothing = torch.full((2, 5), torch.nan), torch.zeros(2, 5)
    loss = RiskLoss()(dict(fused=(logits, *nothing)))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()

def test_shapes_and_heads_of_a_risk_loss():
    z = torch.randn(3, 5)
    with pytest.raises(InputError, match=r'one shape \[B,Y\]'):
        masked_bce(z, z[:, :3], z)
    with pytest.raises(InputError, match='reduction'):
        masked_bce(z, z, z, 'sum')
    with pytest.raises(InputError, match='heads: found none'):
        RiskLoss()({})

# ---- the pyramid

def test_pyramid_levels_keep_mass_and_halve():
    x = torch.rand(2, 1, 64, 32)
    levels = gaussian_pyramid(x)
    assert [tuple(o.shape[2:]) for o in levels] == [(64, 32), (32, 16), (16, 8), (8, 4)]
    assert all(abs(float(o.mean()-x.mean())) < .02 for o in levels)

def test_pyramid_loss_in_half_precision_and_with_extreme_units():
    h, r, has = torch.randn(2, 24, 18), torch.rand(2, 1, 24, 18), torch.ones(2)
    expected = pyramid_loss(h, r, has)
    for scale in (1e-12, 1e12):
        assert torch.isclose(pyramid_loss(h*scale, r, has), expected, rtol=1e-3)
    assert torch.isclose(pyramid_loss(h.half(), r, has), expected, rtol=2e-2)

def test_pyramid_loss_by_hand_on_one_level():
    h, r = torch.randn(1, 24, 18), torch.rand(1, 1, 24, 18)
    normal = lambda a: np.maximum((a-a.mean())/a.std(), 0)
    expected = ((normal(h[0].numpy())-normal(r[0, 0].numpy()))**2).mean()
    assert abs(float(pyramid_loss(h, r, torch.ones(1), levels=1))-expected) < 1e-3

def test_constant_maps_have_no_loss_and_a_finite_gradient():
    attention, gaze = torch.full((3, 24, 18), .3), torch.full((3, 1, 24, 18), .7)
    assert abs(float(pyramid_loss(attention, gaze, torch.ones(3)))) < 1e-6
    flat = torch.zeros(2, 12, 9, requires_grad=True)
    pyramid_loss(flat, torch.rand(2, 1, 24, 18), torch.ones(2)).backward()
    assert flat.grad.isfinite().all()
    assert pixel_norm(torch.full((1, 1, 4, 4), -7.)).max() < 1e-3

def test_slices_of_a_reading_add_up():
    h, r, has = torch.randn(3, 24, 18), torch.rand(3, 1, 24, 18), torch.ones(3)
    slices = torch.stack([r[:, 0]*.3, r[:, 0]*.7], 1)
    assert torch.isclose(pyramid_loss(h, slices, has), pyramid_loss(h, r, has), atol=1e-5)

def test_gaze_that_was_moved_off_the_image_is_no_gaze():
    h, r = torch.randn(3, 12, 9), torch.rand(3, 1, 24, 18)
    without = pyramid_loss(h, r, torch.tensor([1., 0, 1]))
    moved = torch.cat([r[:1], r[1:2]*0, r[2:]])
    assert torch.isclose(pyramid_loss(h, moved, torch.ones(3)), without, atol=1e-6)
    each = pyramid_loss(h, r, torch.tensor([1., 0, 1]), reduction='none')
    assert each[1] == 0
    assert torch.isclose(each.sum()/2, without, atol=1e-6)

def test_nothing_to_look_at_is_zero_with_a_gradient_of_zero():
    h = torch.randn(3, 12, 9, requires_grad=True)
    loss = pyramid_loss(h, torch.zeros(3, 1, 24, 18), torch.zeros(3))
    loss.backward()
    assert loss == 0
    assert not h.grad.any()

@pytest.mark.parametrize('options, expected', [
    (dict(reduction='sum'), 'reduction'), (dict(levels=0), 'levels')])
def test_options_of_the_pyramid_loss(options, expected):
    with pytest.raises(InputError, match=expected):
        pyramid_loss(torch.randn(2, 12, 9), torch.rand(2, 1, 12, 9), torch.ones(2), **options)

# ---- the scan path

def test_a_breast_without_gaze_has_no_scan_path():
    maps = torch.randn(2, 2, 24, 18, requires_grad=True)
    gaze = torch.rand(2, 2, 24, 18)
    scanpath_loss(maps, gaze, torch.tensor([1., 0])).backward()
    assert maps.grad[0].any()
    assert not maps.grad[1].any()

def test_the_parts_of_a_scan_path_are_as_many_as_those_of_the_gaze():
    with pytest.raises(InputError, match='number of breasts and of parts'):
        scanpath_loss(torch.randn(1, 1, 8, 8), torch.rand(1, 2, 8, 8), torch.ones(1))
    with pytest.raises(InputError, match='reduction'):
        scanpath_loss(torch.randn(1, 2, 8, 8), torch.rand(1, 2, 8, 8), torch.ones(1), 'sum')

# ---- fusion learning

BOUNDS = {2: .1269, 4: .5827, 8: 1.1732, 16: 1.8185, 32: 2.4884}

@pytest.mark.parametrize('b', BOUNDS)
def test_fusion_loss_cannot_be_beaten(b):
    "An optimiser comes to the bound from above, and stays there"
    best = math.log(1+(b-1)*math.exp(-b/(b-1)))
    assert math.isclose(best, BOUNDS[b], abs_tol=1e-4)
    seed_everything(b)
    x = torch.randn(b, 32, requires_grad=True)
    optimizer = torch.optim.Adam([x], .1)
    for _ in range(400):
        loss = bidirectional_fusion_loss(x, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert best-1e-5 < float(loss.detach()) < best+.02

def test_a_symmetric_matrix_has_no_direction():
    p = torch.randn(6, 5)
    losses = [bidirectional_fusion_loss(p, p, d) for d in FUSION_DIRECTIONS]
    assert all(torch.isclose(o, losses[0], atol=1e-6) for o in losses)

def test_the_two_directions_differ():
    seed_everything(0)
    p, q = torch.randn(6, 5), torch.randn(6, 5)
    forward, backward, _ = (bidirectional_fusion_loss(p, q, d) for d in FUSION_DIRECTIONS)
    assert abs(forward-backward) > 1e-3

def test_arguments_of_fusion_learning():
    p, q = torch.randn(6, 5), torch.randn(6, 5)
    with pytest.raises(InputError, match=r'two of \[B,D\]'):
        bidirectional_fusion_loss(p, q[:2])
    with pytest.raises(InputError, match='temperature'):
        bidirectional_fusion_loss(p, q, temperature=0)

# ---- Mammo-Net

def test_options_of_mammonets_loss():
    for options in (dict(gaze_weight=-1), dict(direction='up'), dict(cam_class='benign'),
                    dict(reduction='sum'), dict(pos_weight=0)):
        with pytest.raises(InputError, match=next(iter(options))):
            MammoNetLoss(**options)

def mammonet_batch(views=('cc', 'mlo')):
    n = len(views)
    pred = dict(logit=torch.randn(4), present=torch.ones(n, 4))
    pred |= {f'cam_{v}': torch.randn(4, 12, 9) for v in views}
    pred |= dict(vectors=[torch.randn(4, 8)]*n, predicted=[torch.randn(4, 8)]*n)
    targets = {f'gaze_{v}': torch.rand(4, 1, 12, 9) for v in ('cc', 'mlo')}
    return pred, targets | dict(label=torch.tensor([1., 0, 1, 0]), has_gaze=torch.ones(4, 2))

@pytest.mark.parametrize('views', [('cc',), ('mlo',)])
def test_a_model_of_one_view_has_all_terms(views):
    terms = MammoNetLoss().terms(*mammonet_batch(views))
    assert list(terms) == ['bce', 'gaze', 'fusion']
    assert all(v.isfinite() for v in terms.values())

def test_fusion_learning_of_a_missing_view():
    pred, targets = mammonet_batch()
    seed_everything(1)
    pred['vectors'], pred['predicted'] = ([torch.randn(4, 8) for _ in range(2)] for _ in range(2))
    pred['present'] = torch.tensor([[1., 1, 1, 1], [1, 1, 0, 1]])
    rest = [0, 1, 3]
    (p, q), (s, t) = zip(pred['vectors'], pred['predicted'])
    expected = bidirectional_fusion_loss(p, q) + bidirectional_fusion_loss(s[rest], t[rest])
    assert torch.isclose(MammoNetLoss().fusion_term(pred), expected, atol=1e-5)

def test_fusion_learning_needs_a_model_with_it():
    pred, targets = mammonet_batch()
    with pytest.raises(InputError, match=r'0, or a MammoNet\(fusion=True\)'):
        MammoNetLoss().terms(pred | dict(predicted=[]), targets)

# ---- half precision

def gradient(loss, x, scale, **autocast):
    "Gradient of a loss under float16, with the scale of a gradient scaler"
    x = x.clone().requires_grad_()
    with torch.autocast('cpu', torch.float16, **autocast):
        value = loss(x)
    return torch.autograd.grad(value*scale, x)[0]/scale

@pytest.mark.parametrize('unit', (1., 1e-4, 1e-7))
@pytest.mark.parametrize('name', ('pyramid', 'scanpath', 'fusion'))
def test_the_gaze_term_survives_half_precision(unit, name):
    "At the first scale of a gradient scaler, with activation maps as small as those of large images"
    cam, gaze, has = torch.randn(4, 12, 9)*unit, torch.rand(4, 3, 12, 9), torch.ones(4)
    loss, x = dict(
        pyramid=(lambda o: pyramid_loss(o, gaze[:, :1], has), cam),
        scanpath=(lambda o: scanpath_loss(o, gaze, has), cam[:, None].expand(-1, 3, -1, -1)),
        fusion=(lambda o: bidirectional_fusion_loss(o, gaze[:, 0].flatten(1)), cam.flatten(1)),
    )[name]
    expected = gradient(loss, x, 1., enabled=False)
    largest = float(expected.abs().max())
    assert largest > 0
    assert torch.allclose(gradient(loss, x, 2.**16), expected, rtol=1e-3, atol=largest*1e-4)

# ---- two processes

PRESENT = (
    None, (1., 0., 1., 1., 0., 1., 1., 1.),
    (1., 1., 0., 1., 0., 0., 0., 0.))  # the second process has no such view at all
CASES = [(d, p) for d in FUSION_DIRECTIONS for p in PRESENT]

def vectors():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*size, generator=g) for size in ((8, 6), (8, 6), (6, 6))]

def fusion_and_gradient(rows, direction, present):
    "Loss and gradient of some breasts of a batch of 8, as one vector"
    p, q, w = vectors()
    w.requires_grad_()
    if present is not None:
        present = torch.tensor(present)[rows]
    loss = bidirectional_fusion_loss(p[rows] @ w, q[rows] @ w.T, direction, .3, present)
    gradient, = torch.autograd.grad(loss, w)
    return torch.stack([loss.detach(), *gradient.flatten()])

def mammonet_and_gradient(rows, uneven):
    "All terms of Mammo-Net's loss; `uneven`: gaze of 9 of 16 views, one label unknown"
    g = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(*size, generator=g)
    w = vectors()[2].requires_grad_()
    cams = {f'cam_{v}': torch.einsum('bihw,ij->bhw', draw(8, 6, 8, 8), w) for v in ('cc', 'mlo')}
    scans = {f'scan_{v}': torch.einsum('bikhw,ij->bkhw', draw(8, 6, 3, 8, 8), w) for v in ('cc', 'mlo')}
    pairs = [(draw(8, 6) @ w, draw(8, 6) @ w.T) for _ in range(2)]
    gaze = {k: draw(8, 3, 8, 8).abs() for k in ('gaze_cc', 'gaze_mlo')}
    logit, label, has_gaze = (draw(8, 6) @ w).sum(1), (draw(8) > 0).float(), torch.ones(8, 2)
    if uneven:
        has_gaze[4:] = 0
        has_gaze[6, 1] = 1
        label[2] = torch.nan
    pred = {k: v[rows] for k, v in (cams | scans | dict(logit=logit)).items()}
    pred['present'] = torch.ones(2, 8)[:, rows]
    pred['vectors'], pred['predicted'] = ([o[i][rows] for o in pairs] for i in range(2))
    targets = {k: v[rows] for k, v in (gaze | dict(label=label, has_gaze=has_gaze)).items()}
    loss = MammoNetLoss(.5, .2, .1, 2.)(pred, targets)
    gradient, = torch.autograd.grad(loss, w)
    return torch.stack([loss.detach(), *gradient.flatten()])

def mean_of_processes(values):
    "What distributed training does"
    torch.distributed.all_reduce(values)
    return (values/2).tolist()

def answers(rank):
    "What one of two processes finds with its half of the batch"
    rows = slice(rank*4, rank*4+4)
    fusion = {case: mean_of_processes(fusion_and_gradient(rows, *case)) for case in CASES}
    whole = {k: mean_of_processes(mammonet_and_gradient(rows, k)) for k in (False, True)}
    p, q, _ = vectors()
    with pytest.raises(InputError) as refused:
        bidirectional_fusion_loss(p[:3+rank], q[:3+rank])
    return fusion, whole, str(refused.value)

def process(rank, store, out, finished):
    address = f'file://{store}'
    torch.distributed.init_process_group('gloo', init_method=address, rank=rank, world_size=2)
    try:
        out.put((rank, answers(rank)))
    except BaseException as e:
        out.put((rank, f'{type(e).__name__}: {e}'))
        raise
    finished.wait(240)  # no process leaves while the other may still listen

@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    "The answers of the first process; both must have come to an end"
    out, finished = SERVER.Queue(), SERVER.Event()
    store = tmp_path_factory.mktemp('processes')/'store'
    arguments = [(rank, store, out, finished) for rank in range(2)]
    processes = [SERVER.Process(target=process, args=a, daemon=True) for a in arguments]
    for p in processes:
        p.start()
    found = dict(out.get(timeout=240) for _ in processes)
    finished.set()
    for p in processes:
        p.join(60)
    assert all(isinstance(o, tuple) for o in found.values()), found
    return found[0]

@pytest.mark.parametrize('direction, present', CASES)
def test_two_processes_have_the_fusion_loss_of_one(two_processes, direction, present):
    whole = fusion_and_gradient(slice(0, 8), direction, present)
    assert np.allclose(two_processes[0][direction, present], whole, atol=1e-5)
    if present is not None:  # and that of the breasts that have the view
        keep = torch.tensor(present) > 0
        p, q, w = vectors()
        alone = bidirectional_fusion_loss(p[keep] @ w, q[keep] @ w.T, direction, .3)
        assert torch.isclose(whole[0], alone)

@pytest.mark.parametrize('uneven', (False, True))
def test_two_processes_have_the_loss_of_mammonet_of_one(two_processes, uneven):
    whole = mammonet_and_gradient(slice(0, 8), uneven)
    assert np.allclose(two_processes[1][uneven], whole, atol=1e-5)

def test_processes_with_unequal_batches_are_refused(two_processes):
    assert '[3, 4] breasts on the processes' in two_processes[2]
