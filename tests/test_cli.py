"The commands as a shell sees them: exit status, one line of error, files; and a tour that is killed and continues"
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from fastcore.script import anno_parser
from processes import Elsewhere
import mammo_nb.cli.train as train_module
import mammo_nb.report.tour_page as tour_page
from mammo_nb.cli.evaluate import mammo_evaluate
from mammo_nb.cli.predict import mammo_predict
from mammo_nb.cli.prepare import mammo_prepare
from mammo_nb.cli.tour import mammo_tour
from mammo_nb.cli.train import mammo_train, name_options
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.cohort.datasets.folder import dicom_folder
from mammo_nb.cohort.exams import breast_table
from mammo_nb.core.errors import InputError
from mammo_nb.core.results import ResultFolder
from mammo_nb.core.seeding import seed_everything
from mammo_nb.dicom.write import write_mammogram
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.metrics.predictions import read_predictions
from mammo_nb.models.lmvnet import LMVNet
from mammo_nb.models.mammonet import MammoNet
from mammo_nb.models.two_view import TwoViewNet
from mammo_nb.preparation.prepare import PrepareConfig
from mammo_nb.registration.mammoregnet import MammoRegNet
from mammo_nb.report.tour import TourConfig
from mammo_nb.report.tour_page import run_tour

COMMANDS = dict(mammo_predict='predict', mammo_tour='tour', mammo_train='train', mammo_evaluate='evaluate', mammo_prepare='prepare')


@pytest.fixture(scope='module', autouse=True)
def scripts(tmp_path_factory):
    "The commands as files, as pip writes them"
    global SCRIPTS
    SCRIPTS = tmp_path_factory.mktemp('bin')
    for name, module in COMMANDS.items():
        lines = ['import sys', f'from mammo_nb.cli.{module} import {name}', f'if __name__ == "__main__": sys.exit({name}())', '']
        (SCRIPTS/f'{name}.py').write_text('\n'.join(lines))


def command(name, *args, cwd=None, **kwargs):
    "A command in a process of its own"
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parents[1]))
    line = [sys.executable, str(SCRIPTS/f'{name}.py'), *map(str, args)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env, **kwargs)


def finish(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def drawn_mammogram(side, view, seed, rows=160, cols=120):
    "Half an ellipse with noise"
    r, c = np.mgrid[:rows, :cols]
    breast = np.clip(1-((r-rows/2)/(rows*.4))**2-(c/(cols*.75))**2, 0, None)**.4
    x = 2500*breast + np.random.default_rng(seed).integers(0, 80, (rows, cols))
    return (x[:, ::-1] if side == 'R' else x).astype(np.uint16)


@pytest.fixture(scope='module')
def dicoms(tmp_path_factory):
    "Two patients, one view missing, one view of another kind, one broken file"
    folder = tmp_path_factory.mktemp('dicom')
    views = [(p, s, v) for p in ('A', 'B') for s in 'LR' for v in ('CC', 'MLO') if (p, s, v) != ('B', 'R', 'MLO')]
    for n, (patient, side, view) in enumerate([*views, ('B', 'R', 'ML')]):
        write_mammogram(folder/f'{n}.dcm', drawn_mammogram(side, view, n), side, view, patient_id=patient, exam_id=patient+'1', pixel_spacing_mm=.5)
    (folder/'broken.dcm').write_bytes((folder/'0.dcm').read_bytes()[:5000])
    return folder


def save_untrained(net, folder):
    "A model that was never trained, with a preparation"
    net.set_training_info(dict(prepare=json.loads(PrepareConfig(size=(64, 48)).text)))
    return net.save_pretrained(folder)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    seed_everything(0)
    return save_untrained(TwoViewNet(stride=8), tmp_path_factory.mktemp('model')/'m')


def test_predict_writes_table_overlays_and_what_it_left_out(dicoms, model, tmp_path):
    status, out, err = finish(command('mammo_predict', dicoms, '--model', model, '--out', tmp_path/'o', '--workers', 1, '--quiet'))
    assert status == 1, err  # two files were left out
    table = read_predictions(tmp_path/'o/predictions.csv')
    assert table.output.value_counts().to_dict() == dict(probability=4, probability_cc=4, probability_mlo=3)  # no row for a missing view
    assert sorted(pd.read_csv(tmp_path/'o/left_out.csv').path) == ['7.dcm', 'broken.dcm']
    assert len(list((tmp_path/'o/overlays').glob('*.png'))) == 4
    images = pd.read_csv(tmp_path/'o/images.csv')
    assert set(images.exam_id) == set(table.exam_id) and len(images) == 7
    assert 'not for clinical use' in out and err == ''


def predict_here(capsys, *args, **kwargs):
    "The same command called from Python: status, what it printed, what it printed as an error"
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in kwargs.items()}
    status = mammo_predict(*map(str, args), **plain, workers=1, quiet=True)
    return status, *capsys.readouterr()


def test_predict_of_a_cohort_and_of_files_agree(dicoms, model, tmp_path, capsys):
    cohort, _ = dicom_folder(dicoms)
    cohort.write(tmp_path/'cohort')
    tables = {}
    for name, folder in (('files', dicoms), ('cohort', tmp_path/'cohort')):
        status, out, err = predict_here(capsys, folder, model, out=tmp_path/name, format='parquet', overlays=False)
        assert status == (1 if name == 'files' else 0), err
        tables[name] = read_predictions(tmp_path/name/'predictions.parquet')
        assert not (tmp_path/name/'overlays').exists()
    pd.testing.assert_frame_equal(tables['files'], tables['cohort'])


def test_a_breast_without_a_prediction_is_listed(dicoms, tmp_path, capsys):
    "A network of the MLO views, and a breast with CC alone"
    seed_everything(0)
    net = save_untrained(MammoNet('small', views=('mlo',), stride=8), tmp_path/'mlo')
    cohort, _ = dicom_folder(dicoms)
    cohort.write(tmp_path/'cohort')
    status, out, err = predict_here(capsys, tmp_path/'cohort', net, out=tmp_path/'o', overlays=False)
    lost = cohort.images[cohort.images.groupby(['exam_id', 'laterality']).view.transform('nunique') == 1]
    assert lost[['laterality', 'view']].to_numpy().tolist() == [['R', 'CC']]
    left = pd.read_csv(tmp_path/'o/left_out.csv', dtype=str)
    assert status == 1 and left.image_id.tolist() == lost.image_id.tolist(), err
    assert left.what.tolist() == ['prediction']
    assert f'1 of 4 cases have no prediction (the model reads none of their views, or predicts NaN): {lost.exam_id.iloc[0]} R' in out
    table = read_predictions(tmp_path/'o/predictions.csv')
    assert table.output.value_counts()['probability'] == 3


def damaged_models(model, folder):
    "Copies of a model folder, each damaged in another way"
    names = dict(model=model)
    for name in ('bad', 'pickle', 'touched', 'no_weights'):
        names[name] = folder/name
        shutil.copytree(model, folder/name)
    (folder/'bad/config.json').write_text('{"format": 1}')
    torch.save(dict(a=1), folder/'pickle/model.safetensors')
    weights = (model/'model.safetensors').read_bytes()
    (folder/'touched/model.safetensors').write_bytes(weights[:-1]+bytes([weights[-1] ^ 1]))
    (folder/'no_weights/model.safetensors').unlink()
    return names


@pytest.mark.parametrize('kwargs, part', [
    (dict(), '--model'), (dict(model='nowhere'), 'nowhere'), (dict(model='{bad}'), 'configuration'), (dict(model='{pickle}'), 'checksum'),
    (dict(model='{touched}'), 'checksum'), (dict(model='{no_weights}'), 'model.safetensors'),
    (dict(model='{model}', format='doc'), 'csv, parquet'), (dict(model='{model}', group='day'), 'tags, folder')])
def test_predict_tells_what_is_wrong_in_one_line(dicoms, model, tmp_path, capsys, kwargs, part):
    names = damaged_models(model, tmp_path)
    status, out, err = predict_here(capsys, dicoms, out=tmp_path/'o', **{k: v.format(**names) for k, v in kwargs.items()})
    assert status == 2 and part in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path/'o/predictions.csv').exists()


def test_predict_of_nothing(model, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    status, _, err = predict_here(capsys, tmp_path/'empty', model, out=tmp_path/'o')
    assert status == 2 and 'none that can be used' in err

def test_predict_of_nothing_keeps_an_earlier_run(dicoms, model, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    assert predict_here(capsys, dicoms, model, out=tmp_path/'o')[0] == 1
    before = content(tmp_path/'o')
    assert predict_here(capsys, tmp_path/'empty', model, out=tmp_path/'o')[0] == 2
    assert content(tmp_path/'o') == before

# -- a folder that holds an earlier run

def content(folder):
    "Files and their bytes, without the lock and the record of the command"
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
    return {name: data for name, data in files.items() if name not in ('.mammo.lock', '.mammo_predict.json')}

def test_predict_replaces_its_own_results_and_nothing_else(dicoms, model, tmp_path, capsys):
    (tmp_path/'few').mkdir()
    for n in (0, 1): (tmp_path/f'few/{n}.dcm').write_bytes((dicoms/f'{n}.dcm').read_bytes())
    assert predict_here(capsys, dicoms, model, out=tmp_path/'o')[0] == 1
    mine = {'overlays/mine.png':b'1', 'notes.txt':b'2', 'predictions.xlsx':b'3', 'sub/left_out.csv':b'4'}
    for name, text in mine.items():
        (tmp_path/'o'/name).parent.mkdir(exist_ok=True)
        (tmp_path/'o'/name).write_bytes(text)
    assert predict_here(capsys, tmp_path/'few', model, out=tmp_path/'o', format='parquet')[0] == 0
    assert predict_here(capsys, tmp_path/'few', model, out=tmp_path/'fresh', format='parquet')[0] == 0
    assert content(tmp_path/'o') == content(tmp_path/'fresh') | mine
    assert len(list((tmp_path/'o/overlays').glob('*.png'))) == 2  # one breast, and mine

@pytest.mark.parametrize('step', ['write_overlays', 'list_notes', 'ResultFolder._place'])
@pytest.mark.parametrize('error,status', [(OSError(28, 'No space left on device'), 2), (KeyboardInterrupt(), None)])
def test_predict_that_is_stopped_leaves_the_earlier_results(dicoms, model, tmp_path, capsys, monkeypatch, step, error, status):
    (tmp_path/'one').mkdir()
    (tmp_path/'one/0.dcm').write_bytes((dicoms/'0.dcm').read_bytes())
    earlier = {'predictions.csv':b'earlier', 'overlays/x-L.png':b'earlier', 'left_out.csv':b'earlier'}
    with ResultFolder(tmp_path/'o', 'mammo_predict', replace_all=True).new() as new:
        for name, text in earlier.items():
            (new/name).parent.mkdir(exist_ok=True)
            (new/name).write_bytes(text)
    def stop(*args, **kwargs): raise error
    monkeypatch.setattr(f'mammo_nb.cli.predict.{step}', stop)
    if status is None: pytest.raises(KeyboardInterrupt, predict_here, capsys, tmp_path/'one', model, out=tmp_path/'o')
    else: assert predict_here(capsys, tmp_path/'one', model, out=tmp_path/'o')[0] == status
    assert content(tmp_path/'o') == earlier

def test_a_table_is_there_only_with_all_that_belongs_to_it(dicoms, model, tmp_path, capsys, monkeypatch):
    (tmp_path/'one').mkdir()
    (tmp_path/'one/0.dcm').write_bytes((dicoms/'0.dcm').read_bytes())
    assert predict_here(capsys, tmp_path/'one', model, out=tmp_path/'o')[0] == 0
    killed = tmp_path/'o/.mammo_predict-killed'
    killed.mkdir()
    for name in ('lock', 'predictions.parquet'): (killed/name).touch()
    real, moved = os.replace, []
    def replace(a, b):
        if Path(b).parent in (tmp_path/'o', tmp_path/'o/overlays') and Path(b).suffix != '.json':
            moved.append(Path(b).name)
            assert not (tmp_path/'o/predictions.csv').exists()
        real(a, b)
    monkeypatch.setattr(os, 'replace', replace)
    assert predict_here(capsys, tmp_path/'one', model, out=tmp_path/'o')[0] == 0
    assert moved[-1] == 'predictions.csv' and len(moved) == 5
    assert not killed.exists() and not (tmp_path/'o/predictions.parquet').exists()

@pytest.mark.parametrize('out', ['file', 'file/in'])
def test_predict_into_what_is_no_folder(dicoms, model, tmp_path, capsys, out):
    (tmp_path/'file').touch()
    status, _, err = predict_here(capsys, dicoms, model, out=tmp_path/out)
    assert status == 2 and len(err.strip().splitlines()) == 1 and 'file' in err

# -- what is said about the pictures

def prepare(capsys, folder, cache, **kwargs):
    status = mammo_prepare(str(folder), str(cache), size='64x48', workers=1, quiet=True, **kwargs)
    return status, *capsys.readouterr()

def test_notes_and_repeated_views(model, tmp_path, capsys):
    d = tmp_path/'d'
    d.mkdir()
    window = (1300, 2600)
    write_mammogram(d/'a.dcm', drawn_mammogram('L', 'CC', 0), 'L', 'CC', window=window, extra=dict(BreastImplantPresent='YES'))
    write_mammogram(d/'b.dcm', drawn_mammogram('L', 'CC', 1), 'L', 'CC', window=window)
    write_mammogram(d/'c.dcm', drawn_mammogram('L', 'MLO', 2), 'R', 'MLO', window=window)  # the chest wall is at the wrong side
    write_mammogram(d/'d.dcm', drawn_mammogram('R', 'CC', 3), 'R', 'CC', window=window)
    write_mammogram(d/'A.dcm', drawn_mammogram('R', 'CC', 3), 'R', 'CC', window=window, intent='FOR PROCESSING')
    def check(folder, out):
        notes = pd.read_csv(folder/'notes.csv').set_index('path').notes.to_dict()
        assert list(notes) == ['a.dcm', 'b.dcm', 'c.dcm'] and notes['a.dcm'] == 'implant present'
        assert 'the view is repeated in the exam: mammo_predict uses' in notes['b.dcm'] and 'the chest wall is at the left' in notes['c.dcm']
        assert '3 of 4 images have notes' in out and '1 of 4 images: prepared, but not used by mammo_predict' in out
    status, out, err = prepare(capsys, d, tmp_path/'c')
    assert status == 1 and err == '' and '1 x raw image (FOR PROCESSING)' in out
    check(tmp_path/'c', out)
    status, out, err = predict_here(capsys, d, model, out=tmp_path/'o', overlays=False)
    assert status == 1, err
    check(tmp_path/'o', out)
    assert 'A.dcm' not in pd.read_csv(tmp_path/'o/images.csv').path.tolist()

def test_raw_pictures_if_asked_for(model, tmp_path, capsys):
    (tmp_path/'d').mkdir()
    write_mammogram(tmp_path/'d/a.dcm', drawn_mammogram('L', 'CC', 0), 'L', 'CC', intent='FOR PROCESSING')
    assert prepare(capsys, tmp_path/'d', tmp_path/'c')[0] == 2
    assert prepare(capsys, tmp_path/'d', tmp_path/'c', raw=True)[0] == 0
    assert 'raw detector data' in pd.read_csv(tmp_path/'c/notes.csv').notes[0]
    assert predict_here(capsys, tmp_path/'d', model, out=tmp_path/'o', overlays=False)[0] == 2
    assert predict_here(capsys, tmp_path/'d', model, out=tmp_path/'o', overlays=False, raw=True)[0] == 0

@pytest.mark.parametrize('names,said', [((), 'none that can be used, expected'), (('a.png', 'b.TIF', 'in/c.pgm', 'd.pdf', '.e.png'), '3 PNG, TIFF or PGM files were passed over')])
def test_prepare_of_nothing(tmp_path, capsys, names, said):
    (tmp_path/'d/in').mkdir(parents=True)
    for name in names: (tmp_path/'d'/name).write_bytes(b'x')
    status, _, err = prepare(capsys, tmp_path/'d', tmp_path/'c')
    assert status == 2 and said in err and len(err.strip().splitlines()) == 1
    assert ('need a table' in err) == bool(names)

@pytest.mark.skipif(sys.platform != 'linux', reason='names that other systems refuse')
def test_one_odd_file_does_not_stop_the_others(dicoms, tmp_path, capsys):
    d = tmp_path/'d'
    d.mkdir()
    for name in ('good.dcm', ' a.dcm', 'a\\b.dcm', os.fsdecode(b'\xe9t\xe9.dcm')): (d/name).write_bytes((dicoms/'0.dcm').read_bytes())
    (d/'link').symlink_to(dicoms, target_is_directory=True)
    status, out, err = prepare(capsys, d, tmp_path/'c')
    assert status == 1 and err == '' and '1 images are prepared' in out
    assert sorted(pd.read_csv(tmp_path/'c/failures.csv').path) == [' a.dcm', '\\xe9t\\xe9.dcm', 'a\\b.dcm', 'link']

@pytest.mark.parametrize('folder,cache', [('none', 'c'), ('file', 'c'), ('d', 'file'), ('d', 'file/in')])
def test_prepare_says_what_is_wrong_in_one_line(dicoms, tmp_path, capsys, folder, cache):
    (tmp_path/'d').mkdir()
    (tmp_path/'d/0.dcm').write_bytes((dicoms/'0.dcm').read_bytes())
    (tmp_path/'file').touch()
    status, _, err = prepare(capsys, tmp_path/folder, tmp_path/cache)
    assert status == 2 and len(err.strip().splitlines()) == 1

# -- the tour

def small_tour(tell, folder):
    matplotlib.use('Agg')
    config = TourConfig(
        n_patients=12, seed=3, size=(96, 72), epochs=1, batch_size=4, n_boot=50, n_risk_patients=24, risk_epochs=1,
        n_gaze_patients=20, gaze_epochs=1, n_three_view_patients=40, three_view_epochs=1,
        n_other_view_patients=24, other_view_epochs=1, n_lesion_patients=16, lesion_epochs=1)
    run_tour(folder, config, workers=1, tell=tell, progress=False)


def test_a_tour_that_is_killed_goes_on(tmp_path):
    "In a training. That a whole tour is reused, and its page the same, is shown in report/20_tour_page.ipynb"
    tour = tmp_path/'t'
    process = Elsewhere(small_tour, tour)
    for line in process.told():
        if 'model: ...' in line: break
    time.sleep(random.Random().uniform(0, 1))
    assert process.kill() == -signal.SIGKILL
    told = Elsewhere(small_tour, tour).finish()
    for stage in ('cohort', 'prepare in-silico'):
        assert any(re.fullmatch(rf' +{stage} +[\d.]+ s  reused', line) for line in told), told
    page = (tour/'index.html').read_text()
    assert page.endswith('</html>\n') and 'What none of this shows' in page
    assert re.search(r'total [\d.]+ s, peak memory \d\.\d\d GiB', told[-1])
    stages = {d.name.rpartition('-')[0] for d in (tour/'stages').iterdir() if d.is_dir() and not d.name.startswith('.')}
    expected = {'cohort', 'gaze', 'gaze_patients', 'model', 'predictions', 'risk', 'risk_patients', 'three_view_patients', 'three_views',
        'lesion_patients', 'lesion_ldm'}
    if find_spec('radiomics'): expected |= {'other_view_patients', 'other_view'}
    assert stages == expected
    assert any('1 section skipped: The other view' in line for line in told) == (find_spec('radiomics') is None)
    assert list((tour/'stages').glob('.making-*')) == []  # nothing of the killed run lies about


def test_choices_of_the_tour(tmp_path, monkeypatch):
    "A small tour has small sections"
    asked = []
    monkeypatch.setattr(tour_page, 'run_tour', lambda *args: asked.append(args))
    assert mammo_tour(str(tmp_path/'t'), patients=30, epochs=3, seed=5, workers=1, quiet=True) == 0
    folder, config, workers, _, progress = asked[0]
    assert (folder, workers, progress) == (str(tmp_path/'t'), 1, False)
    assert (config.n_patients, config.n_risk_patients, config.n_gaze_patients, config.n_three_view_patients) == (30, 30, 30, 40)
    assert config.n_other_view_patients == 30
    assert (config.epochs, config.risk_epochs, config.gaze_epochs, config.three_view_epochs, config.seed) == (3, 3, 3, 3, 5)
    assert config.other_view_epochs == 3
    assert (config.n_lesion_patients, config.lesion_epochs) == (30, 3)


@pytest.mark.parametrize('kwargs,said', [(dict(patients=3), 'n_patients: found 3'), (dict(epochs=0), 'epochs: found 0')])
def test_a_tour_with_a_wrong_choice(tmp_path, capsys, kwargs, said):
    assert mammo_tour(str(tmp_path/'t'), **kwargs) == 2
    assert said in capsys.readouterr().err


# -- training and evaluating from a shell

def test_train_predict_and_evaluate(tmp_path, capsys):
    insilico_cohort(24, seed=3, exams=1, rows=192, cols=144, pixel_spacing_mm=1.25).write(tmp_path/'files', workers=1, progress=False)
    args = (str(tmp_path/'files'), str(tmp_path/'model'))
    options = dict(size='64x48', epochs=1, set='stride=8', workers=1, quiet=True)
    assert mammo_train('two_view', *args, **options) == 0
    assert predict_here(capsys, tmp_path/'files', tmp_path/'model', out=tmp_path/'o', overlays=False)[0] == 0
    assert mammo_evaluate(str(tmp_path/'o/predictions.csv'), split='test', n_boot=50) == 0
    assert 'auc' in capsys.readouterr().out
    weights = (tmp_path/'model/model.safetensors').read_bytes()
    assert mammo_train('two_view', *args, **options) == 0  # nothing is left to train
    assert (tmp_path/'model/model.safetensors').read_bytes() == weights


# -- what a training tells, and what it keeps

@pytest.fixture(scope='module')
def two_exams(tmp_path_factory):
    "In-silico patients with two exams, split into train, valid and test"
    folder = tmp_path_factory.mktemp('two_exams')
    cohort = insilico_cohort(24, seed=3, exams=2, rows=96, cols=72, pixel_spacing_mm=2.5)
    return cohort.write(folder, workers=1, progress=False)


@pytest.fixture
def train(two_exams, tmp_path_factory, tmp_path, capsys):
    "The command on these patients: status, output, error, and the folder of the model"
    cache = tmp_path_factory.getbasetemp()/'cache_of_two_exams'

    def run(system='two_view', folder=two_exams.root, **kwargs):
        options = dict(size='64x48', cache=str(cache), epochs=1, set='encoder=small stride=8', workers=1, quiet=True) | kwargs
        status = mammo_train(system, str(folder), str(tmp_path/'model'), **options)
        return status, *capsys.readouterr(), tmp_path/'model'
    return run


def stored_metrics(model):
    return json.loads((model/'config.json').read_text())['mammo_nb']['metrics']


def n_breasts(cohort, split):
    images = cohort.images[cohort.images.split == split]
    return len(images[['exam_id', 'laterality']].drop_duplicates())


def test_a_quiet_training_prints_a_line_an_epoch(train):
    "fastai printed a list of numbers without names"
    status, out, _, _ = train(epochs=2)
    lines = out.splitlines()
    epochs = [line for line in lines if re.match(r'epoch \d, ', line)]
    assert status == 0 and not any(line.startswith('[') for line in lines), out
    assert [line[:20] for line in epochs] == ['epoch 0, train_loss ', 'epoch 1, train_loss ']
    assert all(re.search(r'valid_loss \d\.\d{3}, auc ', line) for line in epochs), epochs


@pytest.mark.parametrize('data, split', [(None, 'valid'), ('valid=test', 'test'), ('train=valid valid=test', 'test')])
def test_metrics_are_of_the_patients_that_were_validated_on(two_exams, train, data, split):
    "With other splits they were of training patients"
    status, out, err, model = train(data=data)
    assert status == 0, err
    assert {row['n'] for row in stored_metrics(model)} == {n_breasts(two_exams, split)}
    assert f'Metrics are of the validation patients (split {split}).' in out


def test_official_splits_without_validation_patients(two_exams, train, tmp_path):
    "All was lost after the last epoch"
    images = two_exams.images
    official = Cohort(images.assign(split=images.split.replace('valid', 'test')), two_exams.findings, two_exams.root)
    official.write(tmp_path/'official')
    status, out, err, model = train(folder=tmp_path/'official', data='valid=test')
    assert status == 0, err
    assert (model/'model.safetensors').exists() and (model/'history.csv').exists()
    assert {row['n'] for row in stored_metrics(model)} == {n_breasts(official, 'test')}


def test_a_model_without_metrics_is_kept(train, monkeypatch):
    def refuse(*args, **kwargs): raise InputError('predict', 'predictions', 'NaN for all cases', 'numbers')
    monkeypatch.setattr(train_module, 'predict', refuse)
    status, out, err, model = train()
    assert status == 0, err
    assert 'The metrics of the split valid cannot be computed: predict: predictions: found NaN for all cases' in out
    assert (model/'model.safetensors').exists() and (model/'history.csv').exists()
    assert stored_metrics(model) is None and 'Metrics are' not in out


def test_a_training_lists_the_images_that_failed(two_exams, train, tmp_path):
    "It was silent about them"
    shutil.copytree(two_exams.root, tmp_path/'files')
    paths = sorted(two_exams.images.path)[::3]
    for path in paths: (tmp_path/'files'/path).write_bytes(b'garbage')
    status, out, err, model = train(folder=tmp_path/'files', cache=str(tmp_path/'cache'))
    assert status == 0, err
    assert f'{len(two_exams.images)-len(paths)} images are prepared. {len(paths)} failed, 0 files' in out
    assert sorted(pd.read_csv(model/'failures.csv').path.map(lambda path: Path(path).name)) == sorted(Path(p).name for p in paths)
    assert f'and {len(paths)-20} more' in out


def test_a_training_counts_the_cases_without_a_label(two_exams, train, tmp_path):
    images = two_exams.images
    train_images = images.split == 'train'
    followed = images.years_followed.mask(train_images & (images.laterality == 'L'))
    unknown = Cohort(images.assign(years_followed=followed), two_exams.findings, two_exams.root)
    unknown.write(tmp_path/'unknown')
    status, out, err, _ = train(folder=tmp_path/'unknown')
    labels = breast_table(unknown).query('split == "train"').label
    assert status == 0 and labels.isna().sum() > 5, err
    n = labels.notna().sum(), n_breasts(unknown, 'valid'), labels.isna().sum()
    assert '{} training and {} validation cases; {} without a known label or follow-up are excluded'.format(*n) in out


@pytest.mark.parametrize('system, kwargs, said', [
    ('two_view', dict(data='device=gpu'), '--data: options: found device=gpu (RuntimeError: '),
    ('two_view', dict(data='seed=3'), '--data: options: found seed=3 (TypeError: '),
    ('lmvnet', dict(set='encoder=small stride=8 registration=folder'), 'lmvnet_learner: registration: found \'folder\', expected a network (mn.load_model')])
def test_options_that_cannot_be_used_are_named_in_one_line(train, system, kwargs, said):
    "They ended in a traceback"
    status, _, err, _ = train(system, **kwargs)
    assert status == 2 and said in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize('option, text', [('set', 'lr=abc'), ('set', 'wd=abc'), ('set', 'metrics=auc'), ('set', 'moms=0.9'), ('data', 'num_workers=x')])
def test_options_that_the_training_would_notice_are_named(train, option, text):
    "They ended in a traceback at the first batch"
    status, _, err, _ = train(**{option: text})
    assert status == 2 and f'--{option}: {text.partition("=")[0]}: found' in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize('error', [AttributeError('a'), RuntimeError('b'), TypeError('c')])
def test_an_error_without_options_is_not_hidden(error):
    with pytest.raises(type(error)), name_options({'--data': {}}): raise error


def test_an_error_of_the_training_is_not_hidden(train, monkeypatch):
    def broken(*args, **kwargs): raise TypeError('a mistake of the library')
    monkeypatch.setattr(train_module, 'training_history', broken)
    with pytest.raises(TypeError, match='a mistake of the library'): train(data='bs=4')


# -- systems that read several exams

@pytest.fixture(scope='module')
def exam_models(tmp_path_factory):
    "A risk model and a registration, never trained"
    seed_everything(0)
    folder = tmp_path_factory.mktemp('exam_models')
    save_untrained(LMVNet('small', stride=8, width=4), folder/'lmvnet')
    save_untrained(MammoRegNet(width=4, depth=1), folder/'registration')
    return folder


def write_patients(cohort, folder, numbers, one_exam=()):
    "Some patients, of some of them only the first exam"
    patients = cohort.patients
    images = cohort.images
    first = images.exam_id.isin(images.groupby('patient_id').exam_id.first()[[patients[n] for n in one_exam]])
    cohort.select(images.patient_id.isin([patients[n] for n in numbers]) | first).write(folder)
    return folder


@pytest.mark.parametrize('system', ['lmvnet', 'registration'])
def test_prior_images_are_not_left_out(two_exams, exam_models, tmp_path, capsys, system):
    "They were listed, and the exit status was 1"
    folder = write_patients(two_exams, tmp_path/'few', [0, 1])
    status, out, err = predict_here(capsys, folder, exam_models/system, out=tmp_path/'o')
    assert status == 0, err
    assert len(pd.read_csv(tmp_path/'o/left_out.csv')) == 0 and '16 images' in out and '; 0 files left out' in out


def test_images_of_no_case_are_left_out(two_exams, exam_models, tmp_path, capsys):
    "A patient with one exam has nothing to register"
    folder = write_patients(two_exams, tmp_path/'few', [0], one_exam=[1])
    status, out, err = predict_here(capsys, folder, exam_models/'registration', out=tmp_path/'o')
    left = pd.read_csv(tmp_path/'o/left_out.csv')
    assert status == 1 and len(left) == 4, err
    assert left.image_id.str.contains(two_exams.patients[1]).all()
    assert set(left.found) == {'none: no case has this image'}


def test_an_image_of_no_pair_is_left_out_though_its_breast_is_predicted(two_exams, exam_models, tmp_path, capsys):
    "The patient's earlier exam has no MLO: the later MLO images were in no table"
    patient = two_exams.patients[0]
    images = two_exams.images[two_exams.images.patient_id == patient]
    earlier = (images.exam_date == images.exam_date.min()) & (images.view == 'MLO')
    two_exams.select(two_exams.images.image_id.isin(images.image_id[~earlier])).write(tmp_path/'few')
    status, out, err = predict_here(capsys, tmp_path/'few', exam_models/'registration', out=tmp_path/'o')
    left = pd.read_csv(tmp_path/'o/left_out.csv')
    assert status == 1 and len(left) == 2, err
    assert left.image_id.str.contains('MLO').all()


def test_paths_of_predicted_images_are_relative_to_the_table(two_exams, exam_models, tmp_path, capsys):
    folder = write_patients(two_exams, tmp_path/'few', [0])
    predict_here(capsys, folder, exam_models/'registration', out=tmp_path/'o')
    table = read_predictions(tmp_path/'o/predictions.csv')
    paths = table.path.dropna()
    assert len(paths) == 4 and set(table.output[table.path.notna()]) == {'warped'}
    assert all((tmp_path/'o'/path).is_file() for path in paths)


@pytest.mark.parametrize('format', ['csv', 'parquet'])
def test_predicted_images_of_an_earlier_run_are_replaced(two_exams, exam_models, tmp_path, capsys, format):
    "Those of another patient stayed"
    for name, n in (('first', 0), ('second', 1)):
        write_patients(two_exams, tmp_path/name, [n])
        predict_here(capsys, tmp_path/name, exam_models/'registration', out=tmp_path/'fresh'/name, format=format)
        predict_here(capsys, tmp_path/name, exam_models/'registration', out=tmp_path/'o', format=format)
        if name == 'first': (tmp_path/'o/images/mine.png').write_bytes(b'1')
        if name == 'first': (tmp_path/'o/images/warped/mine.png').write_bytes(b'2')
    mine = {'images/mine.png': b'1', 'images/warped/mine.png': b'2'}
    assert content(tmp_path/'o') == content(tmp_path/'fresh/second') | mine
    with ResultFolder(tmp_path/'fresh/second', 'mammo_predict', replace_all=True).new(): pass
    assert content(tmp_path/'fresh/second') == {} and not (tmp_path/'fresh/second/images').exists()


@pytest.mark.skipif(sys.platform == 'win32', reason='links need rights')
@pytest.mark.parametrize('link', ['images', 'images/warped'])
def test_removing_results_follows_no_link(two_exams, exam_models, tmp_path, capsys, link):
    folder = write_patients(two_exams, tmp_path/'few', [0])
    predict_here(capsys, folder, exam_models/'registration', out=tmp_path/'o')
    shutil.move(tmp_path/'o'/link, tmp_path/'elsewhere')
    (tmp_path/'o'/link).symlink_to(tmp_path/'elsewhere', target_is_directory=True)
    before = content(tmp_path/'elsewhere')
    with ResultFolder(tmp_path/'o', 'mammo_predict', replace_all=True).new(): pass
    assert content(tmp_path/'elsewhere') == before and len(before) == 4
    assert not (tmp_path/'o/predictions.csv').exists()


@pytest.mark.parametrize('name', COMMANDS)
def test_help_describes_every_option(name):
    module = import_module(f'mammo_nb.cli.{COMMANDS[name]}')
    out = anno_parser(getattr(module, name)).format_help()
    options = re.findall(r'^  (-\S.*)$', out, re.M)
    assert len(options) > 3
    for line in options:
        assert len(line.split()) > 1
    assert 'xit status' in out or name == 'mammo_tour'


def test_help_in_a_shell():
    status, out, err = finish(command('mammo_predict', '--help'))
    assert status == 0, err
    assert 'usage: ' in out and '--model' in out and 'xit status' in out
