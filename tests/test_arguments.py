"""Wrong arguments of the commands: one line that names the argument, exit status 2, and nothing written."""
import json
import shutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from mammo_nb.cli.evaluate import mammo_evaluate
from mammo_nb.cli.predict import mammo_predict
from mammo_nb.cli.prepare import mammo_prepare
from mammo_nb.cli.tour import mammo_tour
from mammo_nb.cli.train import mammo_train
from mammo_nb.core.files import file_sha256
from mammo_nb.insilico.files import insilico_cohort

QUIET = dict(quiet=True, workers=1)
TRAIN = dict(size='64x48', epochs=1, set='encoder=small stride=8', **QUIET)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A cohort, a model and its predictions"
    root = tmp_path_factory.mktemp('root')
    insilico_cohort(16, seed=3, exams=1, rows=192, cols=144, pixel_spacing_mm=1.25).write(root/'cohort', workers=1, progress=False)
    assert mammo_train('two_view', str(root/'cohort'), str(root/'model'), cache=str(root/'cache'), **TRAIN) == 0
    assert mammo_predict(str(root/'cohort'), str(root/'model'), out=str(root/'predictions'), overlays=False, **QUIET) == 0
    return root


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    "Calls a command in an empty folder: it must refuse in one line and write nothing there"
    monkeypatch.chdir(tmp_path)
    def call(command, *args, name, **kwargs):
        capsys.readouterr()
        status = command(*args, **kwargs)
        message = capsys.readouterr().err.strip()
        assert status == 2 and len(message.splitlines()) == 1, message
        assert name in message and command.__name__ in message, message
        assert not [*tmp_path.rglob('*')], [*tmp_path.rglob('*')]
        return message
    return call


@pytest.mark.parametrize('option', [dict(size='0x0'), dict(size='3²x48'), dict(size='x48'), dict(size='99999999x99999999'), dict(spacing_mm=float('nan')), dict(intensity='x'), dict(group='x'), dict(on_identity_mismatch='x')])
def test_prepare(option, root, refused, tmp_path):
    refused(mammo_prepare, str(root/'cohort'), str(tmp_path/'c'), name=next(iter(option)), **QUIET, **option)


@pytest.mark.parametrize('path', ['', ' ', '\0'])
def test_empty_paths_are_not_the_current_folder(path, root, refused):
    cohort, model = str(root/'cohort'), str(root/'model')
    refused(mammo_prepare, cohort, path, name='--cache', size='64x48', **QUIET)
    refused(mammo_prepare, path, 'c', name='--folder', **QUIET)
    refused(mammo_train, 'two_view', cohort, path, name='--out', **TRAIN)
    refused(mammo_predict, cohort, model, out=path, name='--out', **QUIET)
    refused(mammo_predict, cohort, path, name='--model', **QUIET)
    refused(mammo_evaluate, path, name='--predictions')
    refused(mammo_evaluate, str(root/'predictions'/'predictions.csv'), n_boot=20, out=path, name='--out')
    refused(mammo_tour, path, name='--folder', **QUIET)


@pytest.mark.parametrize('name, option', [
    ('--lr', dict(lr=0.)), ('--lr', dict(lr=-1.)), ('--lr', dict(lr=float('nan'))), ('--lr', dict(lr=float('inf'))),
    ('--seed', dict(seed=-1)), ('--seed', dict(seed=2**64)), ('--epochs', dict(epochs=0)),
    ('num_workers', dict(data='num_workers=-3')), ('num_workers', dict(data='num_workers=1000')), ('bs', dict(data='bs=0')),
    ('checkpoint_path', dict(set='checkpoint_path=/etc/passwd encoder=resnet18'))])
def test_train(name, option, root, capsys, tmp_path):
    status = mammo_train('two_view', str(root/'cohort'), str(tmp_path/'m'), cache=str(root/'cache'), **TRAIN | option)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and name in message, message
    assert not (tmp_path/'m'/'model.safetensors').exists()


CONFIGS = {
    'training is a list': lambda c: c['mammo_nb'].update(training=[1]),
    'no preparation': lambda c: c['mammo_nb']['training'].update(prepare={}),
    'half a preparation': lambda c: c['mammo_nb']['training']['prepare'].pop('crop'),
    'a number for an encoder': lambda c: c.update(encoder=5),
    'a table for an encoder': lambda c: c.update(encoder={'a': 1}),
    'a text for a width': lambda c: c.update(width='x'),
    'no views': lambda c: c.update(views=None),
    'a list for a class': lambda c: c['mammo_nb'].update(model=[1]),
    'a table for a class': lambda c: c['mammo_nb'].update(model={}),
    'an infinite size': lambda c: c['mammo_nb']['training']['prepare'].update(size=[float('inf'), 10]),
    'a text for a choice': lambda c: c['mammo_nb']['training']['prepare'].update(crop='no'),
    'a list for a choice': lambda c: c['mammo_nb']['training']['prepare'].update(enlarge=[1]),
}
TOLD = dict.fromkeys(CONFIGS, 'm/config.json') | {
    'no preparation': 'prepare', 'half a preparation': 'prepare', 'an infinite size': 'size', 'a text for a choice': 'crop',
    'a list for a choice': 'enlarge'}  # what the message names


@pytest.mark.parametrize('name', CONFIGS)
def test_a_broken_configuration(name, root, refused, tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')/'m'
    shutil.copytree(root/'model', folder)
    config = json.loads((folder/'config.json').read_text())
    CONFIGS[name](config)
    (folder/'config.json').write_text(json.dumps(config))
    refused(mammo_predict, str(root/'cohort'), str(folder), out='p', name=TOLD[name], **QUIET)


def test_a_configuration_without_an_end(root, refused, tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')/'m'
    shutil.copytree(root/'model', folder)
    (folder/'config.json').write_text('['*200_000)
    refused(mammo_predict, str(root/'cohort'), str(folder), out='p', name='config.json', **QUIET)


@pytest.mark.parametrize('buffer', [torch.tensor([1, 2, 3], dtype=torch.uint8), torch.rand(5), torch.tensor(list(b'[1]'), dtype=torch.uint8),
                                    torch.tensor(list(b'['*100_000), dtype=torch.uint8)], ids=['bytes', 'floats', 'list', 'deep'])
def test_training_information_that_is_none(buffer, root, refused, tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')/'m'
    shutil.copytree(root/'model', folder)
    weights = folder/'model.safetensors'
    save_file(load_file(weights) | dict(trained_on=buffer), weights)
    config = json.loads((folder/'config.json').read_text())
    config['mammo_nb'] |= dict(training={}, weights_sha256=file_sha256(weights))
    (folder/'config.json').write_text(json.dumps(config))
    refused(mammo_predict, str(root/'cohort'), str(folder), out='p', name='trained_on', **QUIET)


@pytest.mark.parametrize('n_boot', [0, -5, 10**12, 20.5])
def test_evaluate(n_boot, root, refused):
    refused(mammo_evaluate, str(root/'predictions'/'predictions.csv'), n_boot=n_boot, name='n_boot')


def test_a_folder_in_the_place_of_the_table_is_named(root, capsys, tmp_path):
    target = tmp_path/'metrics.csv'
    target.mkdir()
    assert mammo_evaluate(str(root/'predictions'/'predictions.csv'), n_boot=20, out=str(target)) == 2
    assert str(tmp_path) in (message := capsys.readouterr().err) and 'metrics.csv' in message and 'Traceback' not in message
    assert target.is_dir()
