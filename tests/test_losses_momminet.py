"Losses of MommiNet-v2: checks 1, 2, 4 and 5 of its specification (5.3), unknown entries, half precision, and a training with fastai"
import math

import fastai.callback.progress  # adds `no_bar`
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch.nn import functional as F
from torchvision.ops import box_iou

from mammo_nb.core.errors import InputError
from mammo_nb.core.vocabulary import BIRADS
from mammo_nb.losses.detection import (
    MassMapLoss, class_focal_loss, dice_loss, diou_loss, init_prior_bias, pixel_focal_loss
)
from mammo_nb.losses.multitask import (
    BIRADS_DISTANCES, BIRADS_TARGETS, MultiTaskLoss, birads_target, exclude_from_decay,
    loss_splitter, nearest_birads, parameter_groups
)

NAN = float('nan')


def pixels(*shape, seed=0):
    "Logits and a mask"
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g), (torch.rand(*shape, generator=g) < .2).float()

# ---- 5.3, check 1: BI-RADS

def test_the_table_of_birads_targets():
    published = {'1': 0, '2': .0926, '3': .2315, '4A': .4167, '4B': .5556, '4C': .6944, '5': .8611, '6': 1}
    assert list(BIRADS_TARGETS) == list(published)
    assert {k: round(float(v), 4) for k, v in BIRADS_TARGETS.items()} == published
    assert (np.diff(list(BIRADS_TARGETS.values())) > 0).all()
    assert sum(BIRADS_DISTANCES.values()) == pytest.approx(10.8)

def test_every_category_of_the_vocabulary_has_a_target_and_comes_back():
    values = birads_target(BIRADS)
    back = dict(zip(BIRADS, nearest_birads(values)))
    assert {k: v for k, v in back.items() if v != k} == {'0': None, '4': '4B'}

@pytest.mark.parametrize('value', (0, '0', None, NAN, '', 'nan'))
def test_what_is_missing(value):
    assert np.isnan(birads_target([value])).all()

@pytest.mark.parametrize('value', ('4A', '4a', 'BI-RADS 4A', ' 4A '))
def test_spellings(value):
    assert birads_target([value])[0] == pytest.approx(.41667, abs=1e-5)

def test_four_without_a_letter_is_the_mean_of_its_parts():
    assert birads_target([4, 4., '4'])[0] == pytest.approx(birads_target(['4A', '4B', '4C']).mean())

def test_wrong_categories_are_named_together():
    with pytest.raises(InputError, match="found '4D', '9', expected 0 to 6"):
        birads_target(['1', '4D', '9', '4D'])

def test_an_empty_table_and_predictions_in_the_middle():
    assert birads_target([]).shape == (0,)
    assert nearest_birads([]) == []
    assert nearest_birads([.046, .047, -9, 9, np.inf]) == ['1', '2', '1', '6', '6']

# ---- 5.3, check 2: the weights of two tasks

def constant(cross_entropy, squared, n=3):
    z = math.log(math.expm1(cross_entropy))
    pred = dict(logits=torch.tensor([[z, 0.]]).repeat(n, 1), birads=torch.full((n,), math.sqrt(squared)))
    return pred, dict(label=torch.ones(n), birads=torch.zeros(n))

@pytest.mark.parametrize('cross_entropy, squared', [(.4, .05), (1.2, .3), (.05, 2.)])
def test_the_optimum_of_the_learned_weights(cross_entropy, squared):
    pred, targets = constant(cross_entropy, squared)
    loss = MultiTaskLoss(log_variance=(math.log(2*cross_entropy), math.log(squared)))
    loss(pred, targets).backward()
    assert loss.log_variance.grad.abs().max() < 1e-6
    free = MultiTaskLoss()
    optimizer = torch.optim.LBFGS(free.parameters(), max_iter=200, tolerance_grad=1e-9)
    def closure():
        optimizer.zero_grad()
        value = free(pred, targets)
        value.backward()
        return value
    optimizer.step(closure)
    assert free.log_variance.detach().exp().tolist() == pytest.approx([2*cross_entropy, squared], rel=1e-3)

def test_the_formula():
    pred, targets = constant(.4, .05)
    s1, s2 = -.3, .7
    expected = math.exp(-s1)*.4 + .5*math.exp(-s2)*.05 + .5*(s1+s2)
    assert MultiTaskLoss(log_variance=(s1, s2))(pred, targets).item() == pytest.approx(expected, abs=1e-6)

def some_findings(n=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    pred = dict(logits=torch.randn(n, 2, generator=g), birads=torch.rand(n, generator=g))
    label = (torch.rand(n, generator=g) < .5).float()
    return pred, dict(label=label, birads=torch.rand(n, generator=g))

def gradients(pred, targets, **kwargs):
    loss = MultiTaskLoss(**kwargs)
    pred = {k: v.clone().requires_grad_() for k, v in pred.items()}
    value = loss(pred, targets)
    value.backward()
    return value.detach(), loss.log_variance.grad, pred['logits'].grad, pred['birads'].grad

def test_missing_categories_do_not_reach_s2():
    pred, targets = some_findings()
    value, s, _, birads = gradients(pred, targets | dict(birads=torch.full((8,), NAN)))
    assert s[1] == 0
    assert (birads == 0).all()
    assert value.isfinite()
    some = targets['birads'].clone()
    some[3:] = NAN
    _, partly, *_ = gradients(pred, targets | dict(birads=some))
    first = {k: v[:3] for k, v in pred.items()}, {k: v[:3] for k, v in targets.items()}
    assert partly[1] == pytest.approx(gradients(*first)[1][1].item(), abs=1e-6)
    assert partly[0] == pytest.approx(gradients(pred, targets)[1][0].item(), abs=1e-6)

def test_missing_labels_do_not_reach_s1():
    pred, targets = some_findings()
    value, s, logits, _ = gradients(pred, targets | dict(label=torch.full((8,), NAN)))
    assert s[0] == 0
    assert (logits == 0).all()
    assert value.isfinite()

def test_predictions_that_are_not_known_do_not_count_where_the_truth_is_missing():
    pred, targets = some_findings()
    pred['birads'][0] = NAN
    targets['birads'][0] = NAN
    assert MultiTaskLoss()(pred, targets).isfinite()

@pytest.mark.parametrize('w', (.1, .5, .9))
def test_fixed_weights(w):
    pred, targets = some_findings()
    expected = w*F.cross_entropy(pred['logits'], targets['label'].long())
    expected = expected + (1-w)*F.mse_loss(pred['birads'], targets['birads'])
    assert MultiTaskLoss('fixed', w)(pred, targets).item() == pytest.approx(expected.item(), abs=1e-6)

def test_binary_ignores_the_categories():
    pred, targets = some_findings()
    loss = MultiTaskLoss('binary')
    other = targets | dict(birads=torch.full((8,), 9.))
    assert torch.equal(loss(pred, targets), loss(pred, other))
    assert not loss.log_variance.requires_grad

def test_weights_are_saved_with_the_loss():
    loss = MultiTaskLoss(log_variance=(1., 2.))
    other = MultiTaskLoss()
    other.load_state_dict(loss.state_dict())
    assert other.log_variance.tolist() == [1, 2]
    assert other.sigmas == pytest.approx([math.exp(.5), math.e])

@pytest.mark.parametrize('options', [dict(weighting='kendall'), dict(weight=1.5)])
def test_options_of_the_two_tasks(options):
    with pytest.raises(InputError, match=next(iter(options))):
        MultiTaskLoss(**options)

def test_pytorch_optimizers_do_not_decay_the_weights():
    model, loss = torch.nn.Linear(2, 3), MultiTaskLoss(log_variance=(2., 2.))
    optimizer = torch.optim.SGD(parameter_groups(model, loss, .5), lr=.1)
    for p in (*model.parameters(), *loss.parameters()):
        p.grad = torch.zeros_like(p)
    before = model.weight.detach().clone()
    optimizer.step()
    assert loss.log_variance.tolist() == [2, 2]
    assert torch.allclose(model.weight, before*.95)

class ToyHead(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 3)

    def forward(self, x):
        out = self.layer(x)
        return dict(logits=out[:, :2], birads=out[:, 2])

class NoDecay(Callback):
    def before_fit(self):
        exclude_from_decay(self.learn.opt, self.learn.loss_func)

@pytest.mark.parametrize('decay', (False, True))
def test_fastai_trains_the_weights_without_decay(decay):
    "All labels unknown: no gradient, so only decay could move the weights"
    loss = MultiTaskLoss(log_variance=(2., -2.))
    data = [(torch.randn(2), dict(label=torch.tensor(NAN), birads=torch.tensor(NAN))) for _ in range(8)]
    loaders = [torch.utils.data.DataLoader(data, batch_size=4) for _ in range(2)]
    learn = Learner(
        DataLoaders(*loaders), ToyHead(), loss_func=loss, opt_func=SGD, lr=.1, wd=.5, splitter=loss_splitter(loss),
        cbs=[] if decay else [NoDecay()])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    moved = loss.log_variance.tolist() != [2, -2]
    assert moved == decay
    assert len(learn.opt.param_lists) == 2

# ---- 5.3, check 4: DIoU

def random_boxes(n, seed):
    corner = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed))*50
    return torch.cat([corner, corner+5+torch.rand(n, 2, generator=torch.Generator().manual_seed(seed+1))*30], 1)

def test_identical_boxes_cost_nothing():
    a = random_boxes(20, 0)
    assert diou_loss(a, a).item() == pytest.approx(0, abs=1e-6)

def test_diou_by_its_formula_and_symmetric():
    a, b = random_boxes(20, 0), random_boxes(20, 5)
    for x, y in zip(a, b):
        first, last = torch.minimum(x[:2], y[:2]), torch.maximum(x[2:], y[2:])
        centre = ((x[:2]+x[2:]-y[:2]-y[2:])/2).square().sum()
        expected = 1-box_iou(x[None], y[None])[0, 0]+centre/(last-first).square().sum()
        assert diou_loss(x[None], y[None]).item() == pytest.approx(expected.item(), abs=1e-5)
        assert diou_loss(y[None], x[None]).item() == pytest.approx(expected.item(), abs=1e-5)

def test_disjoint_boxes_cost_more_than_1_and_approach():
    a, b = torch.tensor([[60., 40, 80, 60]]), torch.tensor([[0., 0, 20, 20]])
    shift = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=.5)
    assert diou_loss(a, b).item() > 1
    for _ in range(200):
        optimizer.zero_grad()
        diou_loss(a+shift.repeat(2), b).backward()
        assert shift.grad.isfinite().all()
        optimizer.step()
    assert diou_loss(a+shift.repeat(2), b).item() < .3

def test_no_boxes_have_no_loss_and_a_gradient():
    a = torch.zeros(0, 4, requires_grad=True)
    loss = diou_loss(a, torch.zeros(0, 4))
    loss.backward()
    assert loss == 0
    with pytest.raises(InputError, match='boxes'):
        diou_loss(torch.zeros(2, 4), torch.zeros(3, 4))

# ---- 5.3, check 5: focal losses

def test_without_focus_it_is_half_the_cross_entropy():
    z, y = pixels(2, 1, 8, 6)
    expected = F.binary_cross_entropy_with_logits(z, y)/2
    assert pixel_focal_loss(z, y, gamma=0, alpha=.5).item() == pytest.approx(expected.item(), abs=1e-6)
    z, y = torch.randn(30, 4), torch.randint(0, 4, (30,))
    assert class_focal_loss(z, y, 0, .5).item() == pytest.approx(F.cross_entropy(z, y).item()/2, abs=1e-6)

@pytest.mark.parametrize('divide_by', ('mean', 'positives'))
def test_perfect_predictions_cost_nothing(divide_by):
    _, y = pixels(2, 1, 8, 6)
    assert pixel_focal_loss(50*(2*y-1), y, divide_by=divide_by).item() == pytest.approx(0, abs=1e-9)
    labels = torch.tensor([0, 1, 2])
    assert class_focal_loss(50*torch.eye(3), labels, divide_by=divide_by).item() == pytest.approx(0, abs=1e-9)

@pytest.mark.parametrize('gamma', (0, .5, 2, 5))
@pytest.mark.parametrize('truth', (0, 1))
def test_the_loss_falls_with_the_probability_of_the_truth(gamma, truth):
    z = torch.linspace(-6, 6, 100)*(2*truth-1)
    y = torch.full((1, 1, 1, 1), float(truth))
    costs = torch.stack([pixel_focal_loss(o.view(1, 1, 1, 1), y, gamma) for o in z])
    assert (costs.diff() < 0).all()
    pairs = torch.stack([0*z, z], 1)
    costs = torch.stack([class_focal_loss(o[None], torch.tensor([truth]), gamma) for o in pairs])
    assert (costs.diff() < 0).all()

def test_focal_loss_by_hand():
    "A pixel of a mass with probability 0.9, and of the background with 0.4"
    z = torch.logit(torch.tensor([.9, .4])).view(1, 1, 1, 2)
    y = torch.tensor([1., 0]).view(1, 1, 1, 2)
    expected = [-.25*.1**2*math.log(.9), -.75*.4**2*math.log(.6)]
    assert pixel_focal_loss(z, y).item() == pytest.approx(sum(expected)/2, rel=1e-5)
    assert pixel_focal_loss(z, y, divide_by='positives').item() == pytest.approx(sum(expected), rel=1e-5)

@pytest.mark.parametrize('divide_by', ('mean', 'positives'))
def test_pixels_that_do_not_count_have_no_gradient(divide_by):
    z, y = pixels(2, 1, 8, 6)
    valid = torch.ones_like(z)
    valid[1] = 0
    unknown = torch.where(valid > 0, y, NAN)
    z = z.requires_grad_()
    loss = pixel_focal_loss(z, unknown, divide_by=divide_by, valid=valid)
    loss.backward()
    assert (z.grad[1] == 0).all()
    assert loss.item() == pytest.approx(pixel_focal_loss(z[:1], y[:1], divide_by=divide_by).item(), rel=1e-5)
    assert pixel_focal_loss(z, unknown, divide_by=divide_by, valid=valid[:, :, :1, :1]).isfinite()

def test_a_normal_batch_divided_by_positives_is_finite():
    z, y = pixels(2, 1, 8, 6)
    assert pixel_focal_loss(z, 0*y, divide_by='positives').isfinite()
    labels = torch.zeros(5, dtype=torch.long)
    assert class_focal_loss(torch.randn(5, 2), labels, divide_by='positives').isfinite()

def test_half_precision():
    z, y = pixels(2, 1, 8, 6)
    expected = MassMapLoss(dice_weight=1)(z, y)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert MassMapLoss(dice_weight=1)(z, y).dtype == torch.float32
        assert torch.equal(MassMapLoss(dice_weight=1)(z, y), expected)
    assert torch.isclose(MassMapLoss(dice_weight=1)(z.half(), y), expected, rtol=1e-2)
    large = pixel_focal_loss(torch.full((1, 1, 4, 4), 3e4).half(), torch.zeros(1, 1, 4, 4))
    assert large.isfinite()

@pytest.mark.parametrize('call, name', [
    (lambda z, y: pixel_focal_loss(z, y[:1]), 'targets'),
    (lambda z, y: pixel_focal_loss(z, y, alpha=2), 'alpha'),
    (lambda z, y: pixel_focal_loss(z, y, divide_by='sum'), 'divide_by'),
    (lambda z, y: class_focal_loss(z, y, divide_by='sum'), 'divide_by'),
    (lambda z, y: MassMapLoss(dice_weight=-1), 'dice_weight'),
    (lambda z, y: init_prior_bias(torch.nn.Conv2d(1, 1, 1), 0), 'prior')])
def test_wrong_options_of_detection(call, name):
    with pytest.raises(InputError, match=name):
        call(*pixels(2, 1, 8, 6))

# ---- Dice

def test_dice_by_hand_and_without_masses():
    y = torch.tensor([1., 1, 0, 0]).view(1, 1, 2, 2)
    z = torch.logit(torch.tensor([.8, .6, .2, .4])).view(1, 1, 2, 2)
    assert dice_loss(z, y).item() == pytest.approx(1-2*1.4/4, abs=1e-6)
    assert dice_loss(z, 0*y).item() == 0
    assert dice_loss(torch.cat([z, z]), torch.cat([y, 0*y])).item() == pytest.approx(dice_loss(z, y).item())
    valid = torch.tensor([1., 0, 1, 1]).view(1, 1, 2, 2)
    assert dice_loss(z, y, valid).item() == pytest.approx(1-2*.8/2.4, abs=1e-6)

def test_the_first_probability_of_a_map():
    layer = init_prior_bias(torch.nn.Conv2d(3, 1, 1), .02)
    torch.nn.init.zeros_(layer.weight)
    assert layer(torch.randn(1, 3, 2, 2)).sigmoid().tolist() == [[[[pytest.approx(.02)]*2]*2]]
