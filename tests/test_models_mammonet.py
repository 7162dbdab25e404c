"""Mammo-Net: the checks of its specification on views, maps and gradients."""
import pytest
import torch
from torch import nn
import mammo_nb.models.mammonet as module
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import seed_everything
from mammo_nb.losses.attention import pyramid_loss
from mammo_nb.models.mammonet import MammoNet

SMALL = dict(stride=8, width=8, heads=2, head_dim=8)

def images(size=(64, 48), n=2):
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return {f'image_{v}': torch.rand(n, 1, *size, generator=g) for v, g in zip(('cc', 'mlo'), generators)}


@pytest.mark.parametrize('backbone, stride', [('resnet18', 32), ('tf_efficientnet_lite0', 32), ('small', 8)])
def test_gradient_of_the_activation_maps_reaches_the_first_layer(backbone, stride):
    seed_everything(0)
    net = MammoNet(backbone, stride=stride).train()
    out = net(images((128, 96)))
    cams = torch.cat([out['cam_cc'], out['cam_mlo']])
    assert not cams.isnan().any()
    pyramid_loss(cams, torch.rand(4, 1, 16, 12), torch.ones(4)).backward()
    for half in net.first:
        first = next(p for p in half.parameters() if p.dim() == 4)
        assert first.grad.any()
    assert all(p.grad is None or not p.grad.any() for p in net.head.parameters())  # its weights are constants


def test_maps_cover_the_image_exactly(monkeypatch):
    "75 columns are 9.4 cells of 8: of ten cells the last looks over the border, and the map that is given out does not"
    def columns(score, maps, create_graph):
        return [torch.zeros_like(m[:, 0]) + torch.arange(m.shape[3])*8. + 4 for m in maps]  # each cell holds its column
    monkeypatch.setattr(module, 'grad_cam', columns)
    net = MammoNet('small', **SMALL).eval()
    net.shift = 0.
    cam = net(images((96, 75), 1))['cam_cc']
    assert cam.shape == (1, 12, 10)
    expected = (torch.arange(10)+.5)*7.5
    assert torch.allclose(cam[0, :, 1:-1], expected[1:-1].expand(12, 8))


@torch.no_grad()
@pytest.mark.parametrize('shared', [False, True])
def test_views_are_exchanged_before_either_changes(shared):
    seed_everything(0)
    net = MammoNet('small', shared=shared, **SMALL).eval()
    if not shared:
        for layers in (net.first, net.attend, net.last): layers[1] = layers[0]
    x = images()
    turned = dict(image_cc=x['image_mlo'], image_mlo=x['image_cc'])
    (cc, mlo), (turned_cc, turned_mlo) = net.features(x)[0], net.features(turned)[0]
    assert torch.allclose(cc, turned_mlo, atol=1e-5) and torch.allclose(mlo, turned_cc, atol=1e-5)
    assert not torch.allclose(cc, mlo, atol=1e-3)


@torch.no_grad()
def test_the_order_in_which_views_are_named_changes_nothing():
    x = images()
    def answer(views):
        seed_everything(0)
        net = MammoNet('small', views, **SMALL).eval()
        return net.model_args, net(x)
    (_, a), (_, b) = answer(('cc', 'mlo')), answer(['mlo', 'cc'])
    assert a.keys() == b.keys()
    for name in ('logit', 'fused', 'cam_cc', 'cam_mlo'): assert torch.equal(a[name], b[name])


def test_its_configuration_makes_it_again():
    net = MammoNet('small', views=['mlo', 'cc'], fusion=False, n_slices=2, **SMALL)
    again = MammoNet(**net.model_args)
    assert again.model_args == net.model_args
    assert again.state_dict().keys() == net.state_dict().keys()
    assert set(net.model_args) >= {'encoder', 'views', 'width', 'create_graph'}
    assert not {'self', 'kwargs'} & set(net.model_args)


def test_outputs_under_half_precision_have_32_bits():
    seed_everything(0)
    net = MammoNet('small', stride=8).train()
    with torch.autocast('cpu', torch.float16): out = net(images((96, 72)))
    assert out['logit'].dtype == out['cam_cc'].dtype == torch.float32


def test_a_missing_view_does_not_reach_the_statistics_of_a_batch():
    net = MammoNet('small', dropout=0., **SMALL).train()
    x = images() | dict(present_mlo=torch.tensor([1., 0.]))
    def logit(second): return net(x | dict(image_mlo=torch.stack([x['image_mlo'][0], second])))['logit'].detach()
    assert torch.allclose(logit(torch.zeros(1, 64, 48)), logit(torch.rand(1, 64, 48)*3), atol=1e-6)


@torch.no_grad()
def test_pixels_of_a_missing_view_do_not_matter():
    net = MammoNet('small', **SMALL).eval()
    x = images() | dict(present_mlo=torch.tensor([1., 0.]))
    zeros = x['image_mlo']*torch.tensor([1., 0.]).view(2, 1, 1, 1)
    a, b = net(x), net(x | dict(image_mlo=zeros))
    assert torch.allclose(a['logit'], b['logit'], atol=1e-6)


@torch.no_grad()
def test_every_tensor_counts_breasts_along_its_first_axis():
    "Several GPUs put their parts together along it"
    out = MammoNet('small', n_slices=3, **SMALL).eval()(images())
    for value in out.values():
        tensors = value if isinstance(value, list) else [value]
        assert all(len(t) == 2 for t in tensors)


def test_an_encoder_that_is_no_row_is_refused():
    with pytest.raises(InputError, match='one after another'): MammoNet('hrnet_w18_small', stride=4)


@pytest.mark.parametrize('views', [(), ('cc', 'cc'), ('lat',)])
def test_views_that_do_not_exist_are_refused(views):
    with pytest.raises(InputError, match='MammoNet: views'): MammoNet('small', views=views)


@torch.no_grad()
def test_one_view_has_no_attention():
    net = MammoNet('small', views=('mlo',), fusion=False, **SMALL).eval()
    out = net(dict(image_mlo=images()['image_mlo']))
    assert net.attend is None and len(net.first) == 1
    assert set(out) >= {'logit', 'cam_mlo'} and 'cam_cc' not in out
