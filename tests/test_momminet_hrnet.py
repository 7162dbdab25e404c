"""HRNet for two views: sizes, strides, missing images, and the checks of MommiNet-v2 on them."""
import pytest
import timm
import torch
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import seed_everything
from mammo_nb.models.hrnet import HRNet, SMALL_HRNET, pad_images, run_siamese, stack_branches

TINY = dict(width=2, stem=2, modules=(1, 1, 1), blocks=1)


def first_inputs(net, call):
    "What the first layer of the backbone reads during a call"
    read = []
    hook = net.body.conv1.register_forward_pre_hook(lambda layer, args: read.append(args[0]))
    with torch.no_grad():
        call()
    hook.remove()
    return read


def test_a_large_image_reaches_the_backbone_at_its_size():
    net = HRNet(**TINY).eval()
    image = torch.rand(1, 1, 3000, 1500)
    read, = first_inputs(net, lambda: net(image))
    assert read.shape == (1, 1, 3008, 1504)
    assert torch.equal(read[..., :3000, :1500], image)
    assert not read[..., 3000:, :].any() and not read[..., 1500:].any()


def test_a_constant_image_is_not_shifted():
    net = HRNet(**TINY).eval()
    for value in (0., .25, 1.):
        read, = first_inputs(net, lambda: net(torch.full((1, 1, 64, 64), value)))
        assert (read == value).all()


@pytest.mark.parametrize('finest', [4, 2, 1])
@pytest.mark.parametrize('size', [(64, 64), (50, 37), (192, 144), (31, 5)])
def test_every_size_and_stride(finest, size):
    net = HRNet(**TINY, finest=finest).eval()
    with torch.no_grad():
        maps = net(torch.rand(1, 1, *size))
    padded = pad_images(torch.zeros(1, 1, *size), net.strides[-1]).shape[-2:]
    for m, stride, channels in zip(maps, net.strides, net.channels):
        assert m.shape == (1, channels, padded[0]//stride, padded[1]//stride)
    assert stack_branches(maps).shape[1] == 2+4+8+16


def test_the_published_network_has_the_tensors_of_timm():
    "So the weights of the hub can be loaded"
    with torch.device('meta'):
        net, published = HRNet('hrnet_w18_small'), timm.create_model('hrnet_w18_small')
    own = {k: tuple(v.shape) for k, v in net.body.state_dict().items()}
    theirs = {k: tuple(v.shape) for k, v in published.state_dict().items()}
    different = {k for k in own if own[k] != theirs.get(k)}
    assert different == {'conv1.weight'}  # one grey channel


def test_pretrained_filters_are_summed_over_the_colours(tmp_path):
    "The path of the hub, with a file in its place"
    seed_everything(0)
    colours = timm.create_model('hrnet_w18_small')
    torch.save(colours.state_dict(), tmp_path/'w.pth')
    made = timm.create_model

    def create(name, **kwargs):
        assert kwargs['pretrained'] is True
        return made(name, **kwargs, pretrained_cfg_overlay=dict(file=str(tmp_path/'w.pth')))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, 'create_model', create)
        net = HRNet('hrnet_w18_small', pretrained=True)
    expected = colours.conv1.weight.sum(1, keepdim=True)
    assert torch.allclose(net.body.conv1.weight, expected, atol=1e-6)
    assert torch.equal(net.body.stage4[0].branches[0][0].conv1.weight, colours.stage4[0].branches[0][0].conv1.weight)


@pytest.mark.parametrize('error', [OSError('no route to host'), RuntimeError('No pretrained weights exist')])
def test_weights_that_cannot_be_had_are_an_error(monkeypatch, error):
    def create(*args, **kwargs): raise error
    monkeypatch.setattr(timm, 'create_model', create)
    with pytest.raises(InputError, match=f'HRNet hrnet_w48: pretrained weights: found .*{error}'):
        HRNet(pretrained=True)


@pytest.mark.parametrize('arguments, what', [
    (dict(name='resnet18'), 'name'), (dict(name='hrnet_w99'), 'name'), (dict(pretrained='package'), 'pretrained'),
    (dict(pretrained=True, width=4), 'pretrained'), (dict(finest=3), 'finest'), (dict(width=0), 'width')])
def test_wrong_arguments_are_named(arguments, what):
    with pytest.raises(InputError) as found:
        HRNet(**arguments)
    assert found.value.what == what


@pytest.mark.parametrize('training', [False, True])
def test_missing_images_are_never_read(training):
    "Neither in the maps nor in the statistics of BatchNorm"
    seed_everything(0)
    net = HRNet(**TINY).train(training)
    main, other = torch.rand(2, 3, 1, 64, 64)
    present = torch.tensor([1., 0., 1.])
    junk = other.clone()
    junk[1] = 1e6
    states = []
    for image in (other, junk):
        copy = HRNet(**TINY).train(training)
        copy.load_state_dict(net.state_dict())
        maps = run_siamese(copy, main, image, present, together=training)
        states.append((maps, copy.state_dict()))
    (maps, state), (junk_maps, junk_state) = states
    for a, b in zip([*maps[0], *maps[1]], [*junk_maps[0], *junk_maps[1]]):
        assert torch.equal(a, b)
    assert all(torch.equal(state[k], junk_state[k]) for k in state)
    assert all(not m[1].any() for m in maps[1])
    nobody = run_siamese(net, main, other, torch.zeros(3), together=training)[1]
    assert all(not m.any() and len(m) == 3 for m in nobody)


def test_gradients_reach_the_stem_from_both_images():
    net = HRNet(**SMALL_HRNET).train()
    pair = torch.rand(2, 2, 1, 48, 32, requires_grad=True)
    of_main, of_other = run_siamese(net, *pair, torch.ones(2), together=True)
    sum(m.square().sum() for m in of_main+of_other).backward()
    assert net.body.conv1.weight.grad.any()
    assert pair.grad[0].any() and pair.grad[1].any()
