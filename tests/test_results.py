"Files of the commands in a folder of a user: nothing of hers is replaced, and runs at once leave one complete set"
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from repo import ROOT

from mammo_nb.cli.evaluate import mammo_evaluate
from mammo_nb.cli.predict import mammo_predict
from mammo_nb.cli.prepare import mammo_prepare
from mammo_nb.cli.train import mammo_train
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import seed_everything
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.metrics.predictions import predictions_table, write_predictions
from mammo_nb.models.two_view import TwoViewNet
from mammo_nb.preparation.prepare import PrepareConfig
from mammo_nb.report.tour import TourConfig
from mammo_nb.report.tour_page import run_tour


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cohort')
    made = insilico_cohort(12, seed=3, exams=1, rows=96, cols=72, pixel_spacing_mm=2.5)
    return made.write(folder, workers=1, progress=False)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    seed_everything(0)
    net = TwoViewNet('small', stride=8)
    net.set_training_info(dict(prepare=json.loads(PrepareConfig(size=(64, 48)).text)))
    return net.save_pretrained(tmp_path_factory.mktemp('model')/'m')


def few(cohort, folder, patients):
    "A cohort of some patients"
    chosen = cohort.select(cohort.images.patient_id.isin([cohort.patients[n] for n in patients]).to_numpy())
    chosen.write(folder)
    return folder


def predict(folder, model, out, **kwargs):
    options = dict(overlays=False, workers=1, quiet=True) | kwargs
    return mammo_predict(str(folder), str(model), str(out), **options)


def shown(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('[!.]*')) if p.is_file()}


# -- files of the user

@pytest.mark.parametrize('name', ['notes.csv', 'images.csv', 'left_out.csv', 'predictions.csv', 'predictions.parquet'])
def test_predict_replaces_no_file_of_the_user(cohort, model, tmp_path, capsys, name):
    "They were replaced or removed without a word"
    few(cohort, tmp_path/'few', [0])
    (tmp_path/'o').mkdir()
    (tmp_path/'o'/name).write_bytes(b'mine')
    assert predict(tmp_path/'few', model, tmp_path/'o') == 2
    err = capsys.readouterr().err
    assert f'{name}: found files that mammo_predict did not write' in err and len(err.strip().splitlines()) == 1
    assert shown(tmp_path/'o') == {name: b'mine'}


def test_predict_replaces_no_overlay_of_the_user(cohort, model, tmp_path, capsys):
    few(cohort, tmp_path/'few', [0])
    exam = cohort.images[cohort.images.patient_id == cohort.patients[0]].exam_id.iloc[0]
    (tmp_path/'o/overlays').mkdir(parents=True)
    mine = {f'overlays/{exam}-L.png': b'mine', 'overlays/another-R.png': b'mine too'}
    for name, data in mine.items(): (tmp_path/'o'/name).write_bytes(data)
    assert predict(tmp_path/'few', model, tmp_path/'o', overlays=True) == 2
    assert f'overlays/{exam}-L.png' in capsys.readouterr().err
    assert shown(tmp_path/'o') == mine
    (tmp_path/'o'/f'overlays/{exam}-L.png').unlink()
    assert predict(tmp_path/'few', model, tmp_path/'o', overlays=True) == 0
    assert (tmp_path/'o/overlays/another-R.png').read_bytes() == b'mine too'


def test_results_that_the_user_has_edited_are_not_lost(cohort, model, tmp_path, capsys):
    few(cohort, tmp_path/'few', [0])
    assert predict(tmp_path/'few', model, tmp_path/'o') == 0
    assert predict(tmp_path/'few', model, tmp_path/'o') == 0 # as it was written
    with open(tmp_path/'o/notes.csv', 'a') as f: f.write('seen,by,two readers\n')
    before = shown(tmp_path/'o')
    assert predict(tmp_path/'few', model, tmp_path/'o') == 2
    assert 'notes.csv' in capsys.readouterr().err and shown(tmp_path/'o') == before
    (tmp_path/'o/notes.csv').rename(tmp_path/'my notes.csv')
    assert predict(tmp_path/'few', model, tmp_path/'o') == 0


@pytest.mark.parametrize('name', ['failures.csv', 'notes.csv'])
def test_prepare_replaces_no_file_of_the_user(cohort, tmp_path, capsys, name):
    few(cohort, tmp_path/'few', [0])
    def prepare(): return mammo_prepare(str(tmp_path/'few'), str(tmp_path/'c'), size='64x48', workers=1, quiet=True)
    assert prepare() == prepare() == 0
    (tmp_path/'c'/name).write_bytes(b'mine')
    assert prepare() == 2 and name in capsys.readouterr().err
    assert (tmp_path/'c'/name).read_bytes() == b'mine'


@pytest.mark.parametrize('name', ['README.md', 'config.json', 'history.csv', 'failures.csv'])
def test_train_replaces_no_file_of_the_user(cohort, tmp_path, capsys, name):
    (tmp_path/'m').mkdir()
    (tmp_path/'m'/name).write_bytes(b'mine')
    assert mammo_train('two_view', str(cohort.root), str(tmp_path/'m'), size='64x48', epochs=1, workers=1, quiet=True) == 2
    assert name in capsys.readouterr().err and shown(tmp_path/'m') == {name: b'mine'}


def test_train_runs_twice_and_keeps_an_edited_card(cohort, tmp_path, capsys):
    def train(): return mammo_train('two_view', str(cohort.root), str(tmp_path/'m'), size='64x48', epochs=1, set='encoder=small stride=8', workers=1, quiet=True)
    assert train() == 0, capsys.readouterr().err
    assert train() == 0, capsys.readouterr().err
    with open(tmp_path/'m/README.md', 'a') as f: f.write('My own remarks.\n')
    assert train() == 2 and 'README.md' in capsys.readouterr().err
    assert (tmp_path/'m/README.md').read_text().endswith('My own remarks.\n')


def test_evaluate_replaces_no_file_of_the_user(tmp_path, capsys):
    rows = pd.DataFrame(dict(patient_id=[f'p{i}' for i in range(20)], exam_id=[f'e{i}' for i in range(20)], laterality='L', label=np.arange(20) % 2))
    write_predictions(predictions_table(rows, np.linspace(0, 1, 20), 'two_view', 'probability', '1'), tmp_path/'p.csv')
    def evaluate(out): return mammo_evaluate(str(tmp_path/'p.csv'), n_boot=20, out=str(tmp_path/out))
    assert evaluate('m.csv') == evaluate('m.csv') == evaluate('other.csv') == 0
    (tmp_path/'m.csv').write_text('mine')
    assert evaluate('other.csv') == 0 # the other one is of no concern
    for out in ('m.csv', 'p.csv', '.', '..'): assert evaluate(out) == 2, out
    assert (tmp_path/'m.csv').read_text() == 'mine' and 'p.csv' in capsys.readouterr().err


def test_the_tour_replaces_no_page_of_the_user(tmp_path):
    (tmp_path/'t').mkdir()
    (tmp_path/'t/index.html').write_text('mine')
    config = TourConfig(
        n_patients=12, seed=3, size=(96, 72), epochs=1, batch_size=4, n_boot=50, n_risk_patients=24, risk_epochs=1, n_gaze_patients=20, gaze_epochs=1,
        n_three_view_patients=40, three_view_epochs=1)
    with pytest.raises(InputError, match='index.html'): run_tour(tmp_path/'t', config, workers=1, tell=lambda line: None, progress=False)
    assert (tmp_path/'t/index.html').read_text() == 'mine'


@pytest.mark.parametrize('name', ['overlays', 'images'])
def test_predict_asks_for_folders_before_the_work(cohort, model, tmp_path, capsys, name):
    "A file named like a folder of results ended the command after the earlier results were removed"
    few(cohort, tmp_path/'few', [0])
    assert predict(tmp_path/'few', model, tmp_path/'o') == 0
    (tmp_path/'o'/name).write_bytes(b'mine')
    before = shown(tmp_path/'o')
    assert predict(tmp_path/'few', model, tmp_path/'o', overlays=True) == 2
    assert f'{name}: found files that mammo_predict did not write' in capsys.readouterr().err
    assert shown(tmp_path/'o') == before


def test_a_file_in_place_of_a_folder_keeps_the_earlier_results(tmp_path):
    write_set(tmp_path, 'a')
    (tmp_path/'deep').write_bytes(b'mine')
    before = shown(tmp_path)
    with pytest.raises(InputError, match='deep: found files'), results(tmp_path, replace_all=True).new(['0.csv']) as new:
        (new/'deep/er').mkdir(parents=True)
        (new/'deep/er/1.csv').write_text('b')
    assert shown(tmp_path) == before


@pytest.mark.skipif(sys.platform == 'win32', reason='links need rights')
def test_a_link_in_place_of_a_folder_keeps_the_earlier_results(tmp_path):
    write_set(tmp_path/'o', 'a')
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'o/deep').symlink_to(tmp_path/'elsewhere')
    before = shown(tmp_path/'o')
    with pytest.raises(InputError, match='deep: found files'), results(tmp_path/'o', replace_all=True).new(['0.csv']) as new:
        (new/'deep').mkdir()
        (new/'deep/1.csv').write_text('b')
    assert shown(tmp_path/'o') == before and not list((tmp_path/'elsewhere').iterdir())


def test_evaluate_replaces_no_predictions(cohort, model, tmp_path, capsys):
    "The record of mammo_predict was taken for a leave to replace its table"
    few(cohort, tmp_path/'few', range(12))
    assert predict(tmp_path/'few', model, tmp_path/'o') == 0
    before = shown(tmp_path/'o')
    table = str(tmp_path/'o/predictions.csv')
    assert mammo_evaluate(table, n_boot=20, out=table) == 2
    assert 'predictions.csv: found files that mammo_evaluate did not write' in capsys.readouterr().err
    assert shown(tmp_path/'o') == before


# -- two runs at once, and runs that are killed

LINES = ['import sys', 'from mammo_nb.cli.predict import mammo_predict', 'if __name__ == "__main__": sys.exit(mammo_predict())']


@pytest.fixture
def start(tmp_path, model):
    "Starts mammo_predict in a process of its own"
    (tmp_path/'predict.py').write_text('\n'.join(LINES))
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), MPLBACKEND='Agg')
    processes = []

    def run(folder, out):
        line = [sys.executable, tmp_path/'predict.py', folder, '--model', model, '--out', out, '--workers', '1', '--quiet']
        processes.append(subprocess.Popen([str(word) for word in line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
        return processes[-1]
    yield run
    for process in processes:
        process.kill()
        process.wait()


def test_two_runs_at_once_leave_one_complete_set(cohort, model, tmp_path, start):
    "They shared a temporary folder: one removed the files of the other"
    alone = []
    for n, patients in enumerate([(0, 1), (2, 3)]):
        few(cohort, tmp_path/f'few{n}', patients)
        assert predict(tmp_path/f'few{n}', model, tmp_path/f'alone{n}', overlays=True) == 0
        alone.append(shown(tmp_path/f'alone{n}'))
    runs = [start(tmp_path/f'few{n}', tmp_path/'o') for n in (0, 1)]
    for run in runs: assert run.wait(200) == 0, run.communicate()[1]
    assert shown(tmp_path/'o') in alone
    assert sorted(p.name for p in (tmp_path/'o').glob('.*')) == ['.mammo.lock', '.mammo_predict.json']


def test_a_run_that_is_killed_leaves_nothing_in_the_way(cohort, model, tmp_path, start):
    few(cohort, tmp_path/'few', [0, 1])
    run = start(tmp_path/'few', tmp_path/'o')
    while run.poll() is None and not list((tmp_path/'o').glob('.mammo_predict-*/new')): time.sleep(.02)
    run.kill()
    assert run.wait(30) == -signal.SIGKILL and list((tmp_path/'o').glob('.mammo_predict-*'))
    assert predict(tmp_path/'few', model, tmp_path/'o') == 0
    assert not list((tmp_path/'o').glob('.mammo_predict-*'))


def results(folder, **kwargs):
    from mammo_nb.core.results import ResultFolder
    return ResultFolder(folder, 'mammo_predict', **kwargs)


def write_set(folder, tag, n=4):
    with results(folder, replace_all=True).new(['0.csv']) as new:
        for k in range(n): (new/f'{k}.csv').write_text(f'{tag} {k}')
        (new/f'{tag}.csv').write_text(tag)


@pytest.mark.parametrize('step', range(12))
def test_results_that_were_half_in_place_are_replaced(tmp_path, monkeypatch, step):
    "Stopped after each of the steps of replacing"
    write_set(tmp_path, 'a')
    steps, real = iter(range(100)), {name: getattr(os, name) for name in ('replace', 'unlink')}

    def stop_at(name):
        def stopping(*args, **kwargs):
            if next(steps) == step: raise KeyboardInterrupt
            return real[name](*args, **kwargs)
        return stopping
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        for name in real: patched.setattr(os, name, stop_at(name))
        write_set(tmp_path, 'b')
    left = shown(tmp_path)
    if '0.csv' in left: assert {data.split()[0] for data in left.values()} in ({b'a'}, {b'b'})
    write_set(tmp_path, 'c')
    assert shown(tmp_path) == {f'{k}.csv': f'c {k}'.encode() for k in range(4)} | {'c.csv': b'c'}


@pytest.mark.parametrize('name', ['../victim.csv', '{absolute}'])
def test_a_record_of_a_stranger_removes_nothing_outside_the_folder(tmp_path, name):
    from mammo_nb.core.files import file_sha256
    victim = tmp_path/'victim.csv'
    victim.write_text('x')
    (tmp_path/'o').mkdir()
    (tmp_path/'o/.mammo_predict.json').write_text(json.dumps({name.format(absolute=victim): [file_sha256(victim)]}))
    write_set(tmp_path/'o', 'a')
    assert victim.read_text() == 'x'


@pytest.mark.parametrize('text', ['', '[]', '{"a": 1}', 'null', '{"a": "b"}', '['*200_000])
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path/'.mammo_predict.json').write_text(text)
    with pytest.raises(ValueError, match='record as it was written'): results(tmp_path).check(['a'])


@pytest.mark.skipif(sys.platform == 'win32', reason='links need rights')
def test_a_link_is_no_result(tmp_path):
    write_set(tmp_path/'o', 'a')
    shutil.move(tmp_path/'o/1.csv', tmp_path/'kept.csv')
    (tmp_path/'o/1.csv').symlink_to(tmp_path/'kept.csv')
    with pytest.raises(ValueError, match='1.csv'): results(tmp_path/'o').check(['1.csv'])


# -- ids that end a prediction or share a file

def test_predict_with_hostile_exam_ids(cohort, model, tmp_path, capsys):
    "`$x^$` ended the command with a traceback, and three exams shared one overlay"
    few(cohort, tmp_path/'few', [0, 1, 2, 3])
    chosen = Cohort.read(tmp_path/'few')
    names = dict(zip(sorted(chosen.images.exam_id.unique()), ['$x^$', 'a/b', 'a;b', 'a*b'], strict=True))
    images = chosen.images.assign(exam_id=chosen.images.exam_id.map(names))
    Cohort(images, chosen.findings, chosen.root).write(tmp_path/'odd')
    assert predict(tmp_path/'odd', model, tmp_path/'o', overlays=True) == 0, capsys.readouterr().err
    assert len(list((tmp_path/'o/overlays').glob('*.png'))) == 8
    assert set(pd.read_csv(tmp_path/'o/predictions.csv').exam_id) == set(names.values())
