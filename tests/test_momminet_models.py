"""The networks of MommiNet-v2: checks 3, 6, 9 and 11 of its specification (5.3), maps, fusion, malignancy, sliding windows.

What is expected is computed here by hand, with NumPy, scikit-image, scikit-learn or timm itself."""
from functools import cache

import numpy as np
import pytest
import timm
import torch
from skimage.measure import label, regionprops
from sklearn.metrics import log_loss
from torch import nn

from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import seed_everything
from mammo_nb.core.vocabulary import BIRADS
from mammo_nb.losses.multitask import loss_splitter, parameter_groups
from mammo_nb.models.bidual import BiDualNet
from mammo_nb.models.freezing import is_frozen
from mammo_nb.models.fusion import IntegratedFusionNet, dual_maps, ipsidual_map
from mammo_nb.models.ipsidual import IpsiDualNet
from mammo_nb.models.malignancy import (
    ClinicalEmbedding, MalignancyNet, breast_share, find_suspicious, score_boxes, sliding_boxes
)
from mammo_nb.models.mass_maps import map_detections, paint_boxes, target_maps
from mammo_nb.samples.lesion_patches import cut_patch

NAN = float('nan')
TINY = dict(width=2, stem=4, modules=(1, 1, 1), blocks=1)
BOXES = dict(channels=8, dim=16, heads=2, roi_size=3, n_proposals=12, n_other=6, n_sampled=8)
SIZE = (64, 48)


def ipsi(**options):
    "IpsiDualNet that uses the other view, as if it had learned to"
    seed_everything(1)
    net = IpsiDualNet(**TINY | BOXES | options).eval()
    for block in net.blocks:
        for layer in (block.query, block.value):
            nn.init.normal_(layer.weight, std=.3)
    return net


def bi(**options):
    "BiDualNet that uses the other breast, as if it had learned to"
    seed_everything(2)
    net = BiDualNet(**TINY | options).eval()
    for layer in (net.merge.layers if net.merge else ()):
        nn.init.normal_(layer.weight, std=.5)
    return net


def fusion(**options):
    seed_everything(3)
    net = IntegratedFusionNet(ipsi(min_score=0.), bi(), width=8, **options).eval()
    nn.init.normal_(net.head.weight)
    return net


def views(n=2, size=SIZE, seed=0):
    "Three views of noise, and the nipples"
    rng = torch.Generator().manual_seed(seed)
    batch = {name: torch.rand(n, 1, *size, generator=rng) for name in ('main', 'ipsilateral', 'contralateral')}
    for name in ('main', 'ipsilateral'):
        batch[f'nipple_{name}'] = torch.rand(n, 1, 2, generator=rng)*40
        batch[f'spacing_{name}'] = torch.full((n,), 1.25)
    return batch


def targets(n=2):
    "A mass in the first image, none in the others"
    boxes = [torch.tensor([[10., 12., 26., 30.]]), *[torch.zeros(0, 4)]*(n-1)]
    return dict(boxes=boxes, labels=[torch.ones(len(b)) for b in boxes])


def without(inputs, *names, junk=0.):
    "Inputs in which images are missing; what lies in their place is arbitrary"
    n = len(inputs['main'])
    gone = {f'present_{name}': torch.zeros(n) for name in names}
    return inputs | gone | {name: torch.full_like(inputs[name], junk) for name in names}


@torch.no_grad()
def answer(net, inputs):
    "All numbers that a network gives for a batch, one row for each of them"
    if not isinstance(net, IpsiDualNet): return net.logits(inputs)
    first = net.propose(inputs)
    boxes = first.proposals.boxes[:len(inputs['main'])]
    return torch.cat(net.second_stage(inputs, first, boxes), 1).reshape(len(boxes), -1)

# ---- 5.3, check 3: relations between the views

@pytest.mark.parametrize('options', [{}, dict(relation=False), dict(geometry='box_location'), dict(ipsilateral=False)])
@torch.no_grad()
def test_a_detector_of_two_views_starts_as_that_of_one(options):
    single, inputs = ipsi(ipsilateral=False), views()
    single.set_training_info(dict(variant='single'))
    net = IpsiDualNet(**TINY | BOXES | options).start_from(single).eval()
    assert torch.allclose(answer(net, inputs), answer(single, inputs), atol=1e-4)
    assert net.training_info == {}  # it was trained on nothing


def test_the_first_stage_stays_and_the_second_learns():
    single = ipsi(ipsilateral=False)
    net = IpsiDualNet(**TINY | BOXES).start_from(single).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], .1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(net(views(), targets()).values()).backward()
        optimizer.step()
    changed = {name.partition('.')[0] for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {'fc1', 'fc2', 'blocks', 'classifier', 'move'}
    free = IpsiDualNet(**TINY | BOXES).start_from(single, freeze=False)
    assert all(p.requires_grad for p in free.parameters())


@pytest.mark.parametrize('options', [dict(dim=32), dict(channels=16), dict(width=4), dict(roi_size=5), dict(classes=2)])
def test_a_start_from_other_sizes_is_refused(options):
    net = IpsiDualNet(**TINY | BOXES | options)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(InputError, match='of the same sizes'):
        net.start_from(ipsi(ipsilateral=False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_start_from_something_else_is_refused():
    with pytest.raises(InputError, match='IpsiDualNet'):
        ipsi().start_from(bi())


@torch.no_grad()
def test_the_order_of_the_other_boxes_changes_nothing():
    net, inputs = ipsi(), views(1)
    first = net.propose(inputs)
    boxes = first.proposals.boxes[:1]
    straight = net.second_stage(inputs, first, boxes)[0]
    own, other = first.proposals.boxes
    order = torch.randperm(min(len(other), net.n_other))
    shuffled = first._replace(proposals=first.proposals._replace(boxes=[own, other[:net.n_other][order]]))
    assert len(order) > 2
    assert torch.allclose(net.second_stage(inputs, shuffled, boxes)[0], straight, atol=1e-5)


def test_geometry_of_the_network_by_hand():
    "log of the ratios of distances from the nipple, widths and heights, in millimetres"
    net = ipsi()
    inputs = views(1) | dict(nipple_main=torch.tensor([[[30., 40.]]]), nipple_ipsilateral=torch.tensor([[[20., 44.]]]),
                             spacing_ipsilateral=torch.tensor([2.5]))
    (values, variances), = net.compare_boxes(
        inputs, [torch.tensor([[10., 10., 20., 30.]])], [torch.tensor([[4., 20., 12., 26.]])])
    main = np.hypot(20-30, 15-40)*1.25, 10*1.25, 20*1.25
    other = np.hypot(23-20, 8-44)*2.5, 8*2.5, 6*2.5
    assert values[0, 0].numpy() == pytest.approx(np.log(np.divide(main, other)), abs=1e-5)
    assert not variances.any()


@torch.no_grad()
def test_without_other_boxes_the_head_is_two_plain_layers():
    net, inputs = ipsi(), without(views(), 'ipsilateral')
    first = net.propose(inputs)
    boxes = first.proposals.boxes
    shapes = [first.padded]*2
    features = net.roi_align(first.levels, boxes, shapes).flatten(1)
    for layer in (net.fc1, net.fc2):
        features = (features @ layer.weight.T+layer.bias).clamp(min=0)
    expected = net.classifier(features)
    assert torch.allclose(net.second_stage(inputs, first, boxes)[0], expected, atol=1e-5)


def test_true_boxes_are_never_those_of_the_other_view(monkeypatch):
    net, inputs, compared = ipsi(), views(), []
    compare = IpsiDualNet.compare_boxes
    monkeypatch.setattr(IpsiDualNet, 'compare_boxes', lambda self, x, own, other: compared.append((own, other)) or compare(self, x, own, other))
    net(inputs, targets())
    (own, other), = compared
    found = net.propose(inputs).proposals.boxes[2:]
    assert all(torch.equal(o, f[:net.n_other]) for o, f in zip(other, found))
    assert (own[0] == targets()['boxes'][0][0]).all(1).any()  # but they are among the main boxes

# ---- check 6: shared weights

@pytest.mark.parametrize('stage', [1, 2, 3])
def test_stages_of_bidual(stage):
    single, net = bi(contralateral=False), bi(concat_stage=stage)
    count = [sum(p.numel() for p in n.parameters()) for n in (single, net)]
    assert count[0] < count[1] < 1.1*count[0]
    expected = {1: (16,), 2: (2, 4), 3: (2, 4, 8)}[stage]
    assert tuple(layer.out_channels for layer in net.merge.layers) == expected
    assert all(layer.in_channels == 2*layer.out_channels for layer in net.merge.layers)
    assert net.logits(views()).shape == (2, 1, *SIZE)


def test_both_streams_of_bidual_are_one_network():
    net = bi()
    main = views()['main']
    merged = []
    hook = net.merge.register_forward_pre_hook(lambda layer, args: merged.append(args))
    net.logits(dict(main=main, contralateral=main))
    hook.remove()
    (of_main, of_other), = merged
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(of_main, of_other))
    separate = bi(shared=False)
    assert not {id(p) for p in separate.encoder.parameters()} & {id(p) for p in separate.other_encoder.parameters()}


@torch.no_grad()
def test_bidual_begins_as_the_network_of_one_image():
    seed_everything(2)
    net = BiDualNet(**TINY).eval()
    single = BiDualNet(**TINY, contralateral=False).eval()
    single.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith('merge')})
    assert torch.allclose(net.logits(views()), single.logits(views()), atol=1e-5)


@torch.no_grad()
def test_both_streams_of_ipsidual_are_one_network():
    net = ipsi()
    main = views()['main']
    first = net.propose(dict(main=main, ipsilateral=main))
    boxes = first.proposals.boxes
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(boxes[:2], boxes[2:]))

# ---- check 9: missing views

NETS = dict(ipsi=ipsi, ipsi_concatenated=lambda: ipsi(relation=False), bi=bi, bi_separate=lambda: bi(shared=False), fusion=fusion)
OTHERS = dict(ipsi=('ipsilateral',), ipsi_concatenated=('ipsilateral',), bi=('contralateral',), bi_separate=('contralateral',),
              fusion=('ipsilateral', 'contralateral'))


@pytest.mark.parametrize('name', NETS)
def test_a_missing_view_is_not_looked_at(name):
    net, inputs = NETS[name](), views()
    for gone in OTHERS[name]:
        rest = {k: v for k, v in inputs.items() if k != gone}
        expected = answer(net, rest)
        assert torch.equal(answer(net, without(inputs, gone)), expected)
        assert torch.equal(answer(net, without(inputs, gone, junk=.9)), expected)
        assert (answer(net, inputs)-expected).abs().max() > 1e-6  # it is looked at where it exists


@pytest.mark.parametrize('name', NETS)
def test_one_missing_view_in_a_batch(name):
    "Each image gets what it gets alone"
    net, inputs = NETS[name](), views()
    for gone in OTHERS[name]:
        partial = inputs | {f'present_{gone}': torch.tensor([0., 1.])}
        found = answer(net, partial)
        alone = [{k: v[i:i+1] for k, v in partial.items()} for i in range(2)]
        for row, one in zip(found, alone):
            assert torch.allclose(row, answer(net, one)[0], atol=1e-4)


@pytest.mark.parametrize('name', NETS)
def test_detections_and_losses_of_incomplete_exams(name):
    net, inputs = NETS[name](), without(views(), *OTHERS[name])
    assert [set(d) for d in net(inputs)] == [{'boxes', 'scores', 'labels'}]*2
    losses = net.train()(inputs, targets())
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@torch.no_grad()
def test_the_fallback_of_the_fusion_by_hand():
    "Without other views: the maps of two networks that read the main image alone"
    net = fusion()
    main = dict(main=views()['main'])
    painted = torch.zeros(2, 1, *SIZE)
    for i, found in enumerate(net.ipsidual.detect(main)):
        for box, score in zip(found['boxes'].numpy(), found['scores'].tolist()):
            if score <= .05: continue
            x0, y0, x1, y1 = box
            columns, rows = np.arange(SIZE[1])+.5, np.arange(SIZE[0])+.5
            inside = np.ix_((rows >= y0) & (rows <= y1), (columns >= x0) & (columns <= x1))
            view = painted[i, 0].numpy()
            view[inside] = np.maximum(view[inside], score)
    maps = dict(map_ipsidual=painted, map_bidual=net.bidual.probability(main))
    expected = net.probability(main | maps)
    assert painted.any()
    assert torch.allclose(net.probability(without(views(), 'ipsilateral', 'contralateral')), expected, atol=1e-5)


@pytest.mark.parametrize('name', ['ipsi', 'bi', 'fusion'])
def test_networks_of_a_single_view_ignore_the_others(name):
    single = dict(ipsi=lambda: ipsi(ipsilateral=False), bi=lambda: bi(contralateral=False),
                  fusion=lambda: IntegratedFusionNet(ipsi(ipsilateral=False), bi(contralateral=False), width=8).eval())[name]()
    assert torch.equal(answer(single, views()), answer(single, dict(main=views()['main'])))


def test_normal_images_alone_teach():
    "Negatives are enabled: finite losses, a gradient, no loss of boxes"
    net = ipsi().train()
    normal = dict(boxes=[torch.zeros(0, 4)]*2, labels=[torch.zeros(0)]*2)
    losses = net(views(), normal)
    assert losses['box'] == 0 and losses['proposal_box'] == 0
    sum(losses.values()).backward()
    assert net.classifier.weight.grad.any() and net.pyramid.encoder.body.conv1.weight.grad.any()

# ---- check 11: images arrive as they are

class Arrived(Exception):
    "What the first layer reads; nothing behind it is run"


def first_layer_reads(net, encoder, inputs):
    def stop(layer, args): raise Arrived(args[0])
    hook = encoder.body.conv1.register_forward_pre_hook(stop)
    try:
        net(inputs)
    except Arrived as arrived:
        return arrived.args[0]
    finally:
        hook.remove()
    raise AssertionError('the first layer was not reached')


def networks_and_encoders():
    fused = IntegratedFusionNet(ipsi(), bi(), width=8).eval()
    return [(fused.ipsidual, fused.ipsidual.pyramid.encoder), (fused.bidual, fused.bidual.encoder), (fused, fused.ipsidual.pyramid.encoder)]


@pytest.mark.parametrize('which', range(3))
def test_a_large_image_arrives_at_its_size(which):
    net, encoder = networks_and_encoders()[which]
    image = torch.rand(1, 1, 3000, 1500)
    read = first_layer_reads(net, encoder, dict(main=image))
    assert read.shape == (1, 1, 3008, 1504)
    assert torch.equal(read[..., :3000, :1500], image)
    assert not read[..., 3000:, :].any() and not read[..., 1500:].any()


@pytest.mark.parametrize('which', range(3))
@pytest.mark.parametrize('value', [0., .3, 1.])
def test_a_constant_image_is_not_shifted(which, value):
    net, encoder = networks_and_encoders()[which]
    read = first_layer_reads(net, encoder, dict(main=torch.full((1, 1, 64, 64), value)))
    assert (read == value).all()


def test_boxes_have_the_pixels_of_the_image():
    "Boxes end at the border of the image, not at that of its padding"
    found = ipsi(min_score=0.)(views(size=(50, 37)))
    boxes = torch.cat([d['boxes'] for d in found])
    assert len(boxes) and boxes.min() >= 0
    assert boxes[:, [0, 2]].max() <= 37 and boxes[:, [1, 3]].max() <= 50

# ---- maps and boxes

def some_boxes(n=6, seed=0):
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=rng)*30
    return torch.cat([corner, corner+4+12*torch.rand(n, 2, generator=rng)], 1), torch.rand(n, generator=rng)


@pytest.mark.parametrize('shape', ['hard', 'tapered', 'ellipse'])
def test_painted_boxes_pixel_by_pixel(shape):
    boxes, scores = some_boxes()
    painted = paint_boxes(boxes, scores, (40, 50), shape)
    expected = np.zeros((40, 50))
    for row in range(40):
        for column in range(50):
            for (x0, y0, x1, y1), s in zip(boxes.tolist(), scores.tolist()):
                u = (column+.5-(x0+x1)/2)/((x1-x0)/2)
                v = (row+.5-(y0+y1)/2)/((y1-y0)/2)
                r = u*u+v*v
                profile = dict(hard=max(abs(u), abs(v)) <= 1, ellipse=r <= 1, tapered=np.exp(-2*r)*(r <= 2))[shape]
                if s > .05: expected[row, column] = max(expected[row, column], s*profile)
    assert painted.numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('seed', range(3))
def test_connected_regions_are_those_of_scikit_image(seed):
    rng = np.random.default_rng(seed)
    coarse = rng.random((10, 8))**3
    values = np.kron(coarse, np.ones((4, 4))).astype('float32')
    found = map_detections(torch.from_numpy(values), threshold=.3, fraction=0, min_area=1)
    regions = regionprops(label(values > .3, connectivity=2), values)
    expected = sorted((*np.array(r.bbox)[[1, 0, 3, 2]], r.intensity_max) for r in regions)
    rows = sorted((*map(int, b), s) for b, s in zip(found['boxes'].tolist(), found['scores'].tolist()))
    assert [r[:4] for r in rows] == [tuple(map(int, e[:4])) for e in expected]
    assert [r[4] for r in rows] == pytest.approx([e[4] for e in expected])
    assert found['scores'].tolist() == sorted(found['scores'].tolist(), reverse=True)


def test_the_mean_of_the_highest_pixels():
    values = torch.zeros(20, 20)
    values[5, 5:9] = torch.tensor([.9, .8, .7, .2])
    for top, expected in ((1, .9), (2, .85), (3, .8), (9, .65)):
        found = map_detections(values, fraction=0, top=top)
        assert found['scores'].tolist() == pytest.approx([expected])


def test_targets_of_two_kinds():
    boxes = torch.tensor([[5., 5., 25., 25.], [30., 5., 40., 15.]])
    maps = target_maps(dict(boxes=[boxes], labels=[torch.tensor([2, 1])]), (40, 50), 2, 'hard')
    assert maps.shape == (1, 2, 40, 50)
    assert maps.sum((2, 3)).tolist() == [[100, 400]]

# ---- fusion

def test_a_training_step_leaves_the_frozen_networks_alone():
    "Weights and statistics, even with an optimizer over all parameters and weight decay"
    net = fusion().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), .1, weight_decay=.1)
    for seed in range(2):
        optimizer.zero_grad()
        net(views(seed=seed), targets())['map'].backward()
        optimizer.step()
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and not {k for k in changed if k.startswith(('ipsidual', 'bidual'))}
    assert {k.split('.')[0] for k in changed} == {'down', 'context', 'join', 'deep', 'rise', 'up', 'head'}
    assert is_frozen(net.ipsidual) and is_frozen(net.bidual)


def test_frozen_networks_stay_in_evaluation_mode():
    net = fusion()
    for mode in (True, False):
        assert net.train(mode) is net
        assert net.training == net.join.training == mode
        assert not any(m.training for part in (net.ipsidual, net.bidual) for m in part.modules())
    maps = net.eval().read_maps(views())
    assert all(torch.equal(a, b) for a, b in zip(net.train().read_maps(views()), maps))


def test_maps_of_the_inputs_replace_the_networks():
    "With both maps neither network predicts, but the frozen backbone of IpsiDualNet still describes the image"
    net, calls = fusion(), []
    hooks = [part.register_forward_pre_hook(lambda m, a, name=name: calls.append(name))
             for name, part in dict(rpn=net.ipsidual.rpn, merge=net.bidual.merge, encoder=net.ipsidual.pyramid.encoder).items()]
    maps = dual_maps(net.ipsidual, net.bidual, views())
    assert set(calls) >= {'rpn', 'merge'}
    calls.clear()
    given = net.logits(dict(main=views()['main']) | maps)
    assert calls == ['encoder']
    assert torch.equal(given, net.logits(views()))
    other = net.logits(views() | dict(map_bidual=1-maps['map_bidual']))
    assert (other-given).abs().max() > 1e-4
    for hook in hooks: hook.remove()


def test_maps_of_a_batch_in_which_one_is_missing_are_refused():
    net = fusion()
    for name in ('map_ipsidual', 'map_bidual'):
        for shape in ((1, 1, *SIZE), (2, 2, *SIZE), (2, 1, 32, 24)):
            with pytest.raises(InputError, match=f'inputs: {name}: found .*{shape[1]}.*, expected .*64, 48'):
                net.logits(views() | {name: torch.zeros(shape)})


@pytest.mark.parametrize('finest', [4, 2, 1])
def test_strides_and_odd_sizes(finest):
    net = IntegratedFusionNet(ipsi(finest=finest), bi(), width=8)
    inputs = views(size=(50, 37))
    assert net.logits(inputs).shape == (2, 1, 50, 37)
    net.train()(inputs, targets())['map'].backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_two_kinds_of_findings():
    net = IntegratedFusionNet(ipsi(classes=2), bi(classes=2), width=8)
    assert net.logits(views()).shape == (2, 2, *SIZE)
    both = dict(boxes=[torch.tensor([[1., 1., 9., 9.], [20., 20., 30., 30.]])]*2, labels=[torch.tensor([1, 2])]*2)
    assert net(views(), both)['map'].isfinite()
    assert ipsidual_map(net.ipsidual, views()).shape == (2, 2, *SIZE)


@pytest.mark.parametrize('make', [ipsi, lambda: ipsi(relation=False), bi, lambda: bi(shared=False), fusion])
def test_saved_and_loaded(tmp_path, make):
    net = make()
    net.set_training_info(dict(fold=3))
    net.save_pretrained(tmp_path)
    loaded = type(net).from_pretrained(tmp_path)
    assert torch.equal(answer(loaded, views()), answer(net, views()))
    assert loaded.training_info == dict(fold=3)
    if isinstance(net, IntegratedFusionNet):
        assert is_frozen(loaded.ipsidual) and is_frozen(loaded.bidual)
        assert not any(m.training for m in loaded.train().ipsidual.modules())


def test_wrong_parts_of_the_fusion_are_named():
    for arguments, what in (((bi(), ipsi()), 'ipsidual'), ((ipsi(), ipsi()), 'bidual'), ((ipsi(), bi(classes=2)), 'bidual')):
        with pytest.raises(InputError) as found:
            IntegratedFusionNet(*arguments)
        assert found.value.what == what

# ---- malignancy

SMALL = dict(encoder='small', stride=4, width=4)
CLINICAL = ('age', 'density', 'history')


def malignancy(**options):
    seed_everything(4)
    return MalignancyNet(**SMALL | options).eval()


def patches(n=5, size=24, seed=0):
    rng = torch.Generator().manual_seed(seed)
    known = dict(age=[40., 61., NAN, 80., NAN], density=[0., NAN, 3., 1., NAN], history=[0., 1., NAN, NAN, NAN])
    return dict(patch=torch.rand(n, 1, size, size, generator=rng)) | {k: torch.tensor(v[:n]) for k, v in known.items()}


def answers(labels=(1., 0., NAN, 1., 0.), birads=('5', None, '4', '0', '2')):
    return dict(label=torch.tensor(labels), birads=torch.tensor([-1 if b is None else BIRADS.index(b) for b in birads]))


@torch.no_grad()
def test_densenet_is_that_of_timm():
    "The published network: 1024 features, the mean over the last map, both heads linear"
    seed_everything(0)
    net = MalignancyNet().eval()
    published = timm.create_model('densenet121', in_chans=1).eval()
    weights = net.encoder.body.state_dict()
    own = {k.removeprefix('model.'): v for k, v in weights.items()}
    missing, unexpected = published.load_state_dict(own, strict=False)
    assert not unexpected and all(k.startswith('classifier') for k in missing)
    x = torch.rand(2, 1, 96, 96)
    features = published.forward_features((x-net.encoder.mean)/net.encoder.std).mean((2, 3))
    assert features.shape == (2, 1024)
    out = net(dict(patch=x))
    expected = features @ net.classifier.weight.T+net.classifier.bias
    assert torch.allclose(out['logits'], expected, atol=1e-4)
    assert torch.allclose(out['birads'], (features @ net.regressor.weight.T+net.regressor.bias)[:, 0], atol=1e-4)
    odds = np.exp(np.diff(expected.numpy(), axis=1)[:, 0])
    assert out['probability'].numpy() == pytest.approx(odds/(1+odds), abs=1e-5)


def test_table_of_targets_by_hand():
    steps = np.cumsum([0, 1, 1.5, 2, 1.5, 1.5, 1.8, 1.5])/10.8
    by_name = dict(zip(('1', '2', '3', '4A', '4B', '4C', '5', '6'), steps)) | {'0': NAN, '4': steps[3:6].mean()}
    found = malignancy().birads_values(torch.tensor([*range(len(BIRADS)), -1]))
    assert found.numpy() == pytest.approx([*(by_name[name] for name in BIRADS), NAN], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize('weighting', ['learned', 'fixed', 'binary'])
def test_losses_by_hand(weighting):
    net = malignancy(weighting=weighting, weight=.3)
    s1, s2 = .4, -.7
    with torch.no_grad(): net.loss.log_variance.copy_(torch.tensor([s1, s2]))
    out = {k: v.detach().numpy().astype(float) for k, v in net(patches()).items()}
    cross_entropy = log_loss([1, 0, 1, 0], out['probability'][[0, 1, 3, 4]], labels=[0, 1])
    wanted = np.array([9.3, 6., 1.])/10.8  # 5; the mean of 4A, 4B and 4C, which is 4B; 2
    squared = np.mean((out['birads'][[0, 2, 4]]-wanted)**2)
    expected = dict(
        learned=(np.exp(-s1)*cross_entropy+s1/2, (np.exp(-s2)*squared+s2)/2),
        fixed=(.3*cross_entropy, .7*squared), binary=(cross_entropy, 0))[weighting]
    found = net(patches(), answers())
    assert [found['malignancy'].item(), found['birads'].item()] == pytest.approx(expected, abs=1e-5)


def test_missing_answers_have_no_gradient():
    net = malignancy(clinical=CLINICAL).train()
    sum(net(patches(), answers(birads=[None]*5)).values()).backward()
    assert not net.regressor.weight.grad.any() and net.classifier.weight.grad.any()
    assert net.loss.log_variance.grad[0] != 0 and net.loss.log_variance.grad[1] == 0
    net.zero_grad()
    sum(net(patches(), answers(labels=[NAN]*5)).values()).backward()
    assert not net.classifier.weight.grad.any() and net.regressor.weight.grad.any()
    assert net.loss.log_variance.grad[0] == 0
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_binary_ignores_the_categories():
    net = malignancy(weighting='binary').train()
    sum(net(patches(), answers()).values()).backward()
    assert not net.regressor.weight.grad.any() and net.loss.log_variance.grad is None


def test_weight_decay_spares_the_learned_weights():
    "Also where the loss is a part of the network; each parameter is in one group"
    net = malignancy()
    with torch.no_grad(): net.loss.log_variance.copy_(torch.tensor([.4, -.7]))
    groups = parameter_groups(net, net.loss, .5)
    assert sorted(id(p) for g in groups for p in g['params']) == sorted(map(id, net.parameters()))
    optimizer = torch.optim.SGD(groups, .1)
    before = net.classifier.weight.detach().clone()
    sum(net(patches(), answers([NAN]*5, [None]*5)).values()).backward()
    optimizer.step()
    assert torch.allclose(net.classifier.weight, before*.95)
    assert torch.equal(net.loss.log_variance, torch.tensor([.4, -.7]))
    network, own = loss_splitter(net.loss)(net)
    assert own == [net.loss.log_variance] or own[0] is net.loss.log_variance
    assert not any(p is net.loss.log_variance for p in network)
    fixed = malignancy(weighting='fixed')
    assert len(parameter_groups(fixed, fixed.loss, .5)) == 1


# ---- what is known of the patient

@torch.no_grad()
def test_unknown_is_not_the_mean():
    "An unknown age adds nothing, an average age does"
    embedding = ClinicalEmbedding(('age',)).eval()
    unknown, average = (embedding(dict(age=torch.tensor([v])), torch.zeros(1)) for v in (NAN, 55.))
    assert not unknown.any() and average.any()
    first, _, second = embedding.parts['age']
    hidden = (first.weight @ torch.tensor([(70-55)/12])+first.bias).clamp(min=0)
    expected = second.weight @ hidden+second.bias
    assert torch.allclose(embedding(dict(age=torch.tensor([70.])), torch.zeros(1))[0], expected, atol=1e-6)


@torch.no_grad()
def test_known_numbers_add_up():
    embedding = ClinicalEmbedding(CLINICAL).eval()
    like, inputs = torch.zeros(5), patches()
    parts = [embedding({name: inputs[name]}, like) for name in CLINICAL]
    assert torch.allclose(embedding(inputs, like), sum(parts), atol=1e-6)


@torch.no_grad()
def test_nothing_known_is_the_patch_alone():
    net, inputs = malignancy(clinical=CLINICAL), patches()
    nothing = inputs | {name: torch.full((5,), NAN) for name in CLINICAL}
    alone = net(dict(patch=inputs['patch']))
    assert torch.equal(net(nothing)['logits'], alone['logits'])
    different = (net(inputs)['logits']-alone['logits']).abs().max(1).values > 1e-6
    assert different.tolist() == [True, True, True, True, False]  # of the last nothing is known
    assert torch.equal(malignancy()(inputs)['logits'], malignancy()(dict(patch=inputs['patch']))['logits'])


def test_hidden_numbers_in_training():
    embedding = ClinicalEmbedding(('history',), dropout=.3).train()
    told = embedding(dict(history=torch.ones(2000)), torch.zeros(2000))
    hidden = (told == 0).all(1).float().mean().item()
    assert hidden == pytest.approx(.3, abs=.05)
    assert (embedding.eval()(dict(history=torch.ones(50)), torch.zeros(50)) != 0).any(1).all()


@pytest.mark.parametrize('name, value', [('age', -1.), ('age', 999.), ('density', 4.), ('history', 9.), ('age', float('inf'))])
def test_codes_for_unknown_are_refused(name, value):
    net = malignancy(clinical=CLINICAL)
    inputs = patches()
    inputs[name] = inputs[name].clone()
    inputs[name][1] = value
    with pytest.raises(InputError, match=f'inputs: {name}: found {value}.*or NaN: unknown'):
        net(inputs)


@pytest.mark.parametrize('arguments, what', [
    (dict(clinical='weight'), 'names'), (dict(pool='peak'), 'pool'), (dict(weighting='kendall'), 'weighting'), (dict(weight=2), 'weight'),
    (dict(clinical='age', clinical_dropout=2), 'dropout'), (dict(pretrained=True), 'pretrained')])
def test_wrong_arguments_are_named(arguments, what):
    with pytest.raises(InputError) as found:
        malignancy(**arguments)
    assert found.value.what == what


@pytest.mark.parametrize('options', [{}, dict(clinical=CLINICAL), dict(weighting='fixed', weight=.4, pool='top10')])
def test_malignancy_saved_and_loaded(tmp_path, options):
    net = malignancy(**options)
    if net.loss.log_variance.requires_grad: nn.init.constant_(net.loss.log_variance, -.5)
    net.save_pretrained(tmp_path)
    loaded = MalignancyNet.from_pretrained(tmp_path)
    with torch.no_grad(): a, b = net(patches()), loaded(patches())
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert loaded.loss.sigmas == net.loss.sigmas
    assert torch.equal(loaded.birads_table.nan_to_num(9), net.birads_table.nan_to_num(9))

# ---- sliding windows

@pytest.mark.parametrize('size, side, step', [((40, 30), 10, .5), ((41, 33), 8, .5), ((30, 30), 30, .5), ((50, 20), 7.5, .25), ((25, 60), 12, 1)])
def test_every_pixel_is_in_a_box(size, side, step):
    boxes = sliding_boxes(size, side, step)
    count = np.zeros(size)
    for x0, y0, x1, y1 in boxes.numpy():
        assert -1e-4 <= x0 and x1 <= size[1]+1e-4 and -1e-4 <= y0 and y1 <= size[0]+1e-4
        assert (x1-x0, y1-y0) == pytest.approx((side, side), abs=1e-4)
        rows, columns = np.arange(size[0])+.5, np.arange(size[1])+.5
        count[np.ix_((rows >= y0) & (rows <= y1), (columns >= x0) & (columns <= x1))] += 1
    assert count.min() >= 1
    distances = np.diff(np.unique(boxes[:, 0].numpy().round(3)))
    assert len(distances) == 0 or distances.max() <= step*side+1e-3


def test_wrong_windows_are_refused():
    for arguments, what in ((((30, 20), 25), 'side'), (((30, 20), 10, 0), 'step'), (((30, 20), 10, 2), 'step')):
        with pytest.raises(InputError) as found:
            sliding_boxes(*arguments)
        assert found.value.what == what


def test_share_of_breast():
    image = torch.zeros(1, 20, 20)
    image[:, :, :10] = .5
    boxes = torch.tensor([[0., 0., 10., 10.], [5., 0., 15., 10.], [12., 3., 20., 9.]])
    assert breast_share(image, boxes).tolist() == pytest.approx([1, .5, 0])
    assert len(breast_share(image, boxes[:0])) == 0


@torch.no_grad()
def test_scores_are_those_of_single_patches():
    net = malignancy(clinical=CLINICAL)
    image = torch.rand(1, 40, 30, generator=torch.Generator().manual_seed(0))
    boxes = sliding_boxes((40, 30), 12)
    scores = score_boxes(net, image, boxes, size=24, context=2, clinical=dict(age=61), bs=5)
    assert len(scores) == len(boxes)
    for box, score in zip(boxes, scores.tolist()):
        one = dict(patch=cut_patch(image, box, 24, 2)[None], age=torch.tensor([61.]))
        assert net(one)['probability'].item() == pytest.approx(score, abs=1e-5)


class Bright(nn.Module):
    "A stand-in: the mean grey value of the middle of a patch is its probability"
    def __init__(self):
        super().__init__()
        self.register_buffer('birads_table', torch.zeros(1))

    def forward(self, inputs):
        x = inputs['patch']
        n = x.shape[-1]//4
        return dict(probability=x[..., n:-n, n:-n].mean((1, 2, 3)))


@cache
def spots():
    "A breast with two bright squares, the first one brighter; nothing at the right"
    image = torch.full((1, 60, 60), .1)
    image[:, 12:20, 8:16] = .9
    image[:, 36:44, 24:32] = .7
    image[:, :, 45:] = 0
    return image


def look(**options):
    return find_suspicious(Bright().eval(), spots(), (8,), size=16, context=2, **dict(min_score=.5) | options)


def test_bright_places_are_found():
    found = look()
    assert found['boxes'].tolist() == [[8, 12, 16, 20], [24, 36, 32, 44]]
    assert found['scores'].tolist() == pytest.approx([.9, .7], abs=1e-5)
    assert found['labels'].tolist() == [1, 1]


def test_what_was_detected_is_not_reported_again():
    detected = torch.tensor([[7., 11., 17., 21.]])
    assert look(detected=detected)['boxes'].tolist() == [[24, 36, 32, 44]]
    assert len(look(detected=torch.zeros(0, 4))['boxes']) == 2


def test_limits_of_what_is_reported():
    assert len(look(min_score=.8)['boxes']) == 1
    assert len(look(max_detections=1)['boxes']) == 1
    assert look(min_score=.95)['boxes'].shape == (0, 4)
    everything = look(min_score=0., max_detections=1000)['boxes']
    assert (everything[:, 0]+4 <= 45).all()  # at least half of each box is breast


def test_an_empty_image_and_training_mode():
    nothing = find_suspicious(Bright().eval(), torch.zeros(1, 30, 30), (8,), size=16)
    assert [tuple(v.shape) for v in nothing.values()] == [(0, 4), (0,), (0,)]
    with pytest.raises(InputError, match='net.eval'):
        find_suspicious(Bright().train(), spots(), (8,), size=16)
