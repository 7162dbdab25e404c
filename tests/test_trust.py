"""A model folder of someone else: nothing but arguments of the model, and nothing that opens a path or an address."""
import json
import pickle
import shutil
import pytest
import timm
import torch
from mammo_nb.core.errors import InputError
from mammo_nb.core.hub import HubModel, MODELS
from mammo_nb.learners.systems import load_model
from mammo_nb.models.encoders import ENCODER_OPTIONS, make_encoder
from mammo_nb.models.lmvnet import LMVNet, UnalignedRisk
from mammo_nb.models.mammonet import MammoNet
from mammo_nb.models.risk_baselines import CurrentExamRisk
from mammo_nb.models.two_view import TwoViewNet
from mammo_nb.registration.mammoregnet import MammoRegNet

BUILDERS = {
    'two_view': lambda: TwoViewNet('resnet18', stride=16, drop_path_rate=.1),
    'mammonet': lambda: MammoNet('resnet18'),
    'current_exam': lambda: CurrentExamRisk('resnet18'),
    'lmvnet': lambda: LMVNet('resnet18'),
    'unaligned': lambda: UnalignedRisk('resnet18', blocks=1),
    'registration': lambda: MammoRegNet(),
}
PLANTED = {
    'pretrained_cfg_overlay': dict(url='http://192.0.2.1/weights.pth'),
    'pretrained_cfg': dict(file='planted.pth'),
    'checkpoint_path': 'planted.pth',
    'cache_dir': '/',
    'features_only': False,
    'nonsense': 1,
}


class Opened:
    "Tells by its existence that a pickle was opened"
    def __reduce__(self): return open, ('opened', 'w')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('models')
    return {name: build().save_pretrained(root/name) for name, build in BUILDERS.items()}


def changed(folder, to, **args):
    shutil.copytree(folder, to)
    config = json.loads((to/'config.json').read_text())
    (to/'config.json').write_text(json.dumps(config | args))
    return to


def never(*args, **kwargs): raise AssertionError('timm was asked to build something')


@pytest.mark.parametrize('option', PLANTED)
@pytest.mark.parametrize('name', BUILDERS)
def test_no_other_argument_reaches_timm(name, option, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'planted.pth').write_bytes(pickle.dumps(Opened()))
    folder = changed(folders[name], tmp_path/'m', **{option: PLANTED[option]})
    monkeypatch.setattr(timm, 'create_model', never)
    for load in (HubModel.from_pretrained, load_model):
        with pytest.raises(InputError) as e: load(folder)
        assert option in str(e.value) and 'config.json' in str(e.value) and '192.0.2.1' not in str(e.value)
    assert not (tmp_path/'opened').exists()


@pytest.mark.parametrize('wish', [True, 'hub', 'package', 1])
def test_no_download_of_other_weights(wish, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(timm, 'create_model', never)
    with pytest.raises(InputError, match='pretrained'): HubModel.from_pretrained(changed(folders['two_view'], tmp_path/'m', pretrained=wish))


@pytest.mark.parametrize('encoder', ['hf-hub:owner/model', 'local-dir:/etc', '/etc/passwd', 'no_such'])
def test_the_name_of_an_encoder_is_a_name(encoder, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(timm, 'create_model', never)
    with pytest.raises(InputError, match='timm'): HubModel.from_pretrained(changed(folders['two_view'], tmp_path/'m', encoder=encoder))


@pytest.mark.parametrize('args', [[1, 2], 'x', None, 7])
def test_arguments_of_an_inner_model(args, folders, tmp_path):
    inner = dict(model='TwoViewNet', args=args)
    with pytest.raises(InputError, match='arguments'): HubModel.from_pretrained(changed(folders['lmvnet'], tmp_path/'m', registration=inner))


def test_an_inner_model_is_checked_too(folders, tmp_path):
    inner = dict(model='TwoViewNet', args=dict(encoder='resnet18', checkpoint_path='planted.pth'))
    with pytest.raises(InputError, match="TwoViewNet: found 'checkpoint_path'"):
        HubModel.from_pretrained(changed(folders['lmvnet'], tmp_path/'m', registration=inner))


@pytest.mark.parametrize('name', BUILDERS)
def test_own_folders_load(name, folders):
    model = HubModel.from_pretrained(folders[name])
    built = BUILDERS[name]()
    assert type(model) is type(built)
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [(k, v.shape) for k, v in built.state_dict().items()]


def test_options_of_the_encoder_come_back(folders):
    first, = [m for m in HubModel.from_pretrained(folders['two_view']).modules() if type(m).__name__ == 'DropPath'][:1]
    assert first.drop_prob > 0


def test_no_option_opens_anything():
    "What timm resolves to files or addresses is on no list"
    dangerous = {'checkpoint_path', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_strict', 'cache_dir', 'scriptable', 'features_only', 'kwargs_filter'}
    assert not dangerous & set(ENCODER_OPTIONS)
    for cls in MODELS.values(): assert not dangerous & set(cls.config_options)
    with pytest.raises(InputError, match='checkpoint_path'): make_encoder('resnet18', checkpoint_path='planted.pth')
    with pytest.raises(InputError, match='checkpoint_path'): TwoViewNet('resnet18', checkpoint_path='planted.pth')
    assert isinstance(make_encoder('resnet18', drop_path_rate=.1), torch.nn.Module)
