"The commands as a shell sees them: exit status, one line of error, files; and a tour that is killed and goes on"
import json, os, random, re, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from mammo_nb.cli import commands
from mammo_nb.cli.commands import mammo_predict, mammo_prepare, mammo_tour
from mammo_nb.core.seeding import seed_everything
from mammo_nb.data.datasets.folder import dicom_folder
from mammo_nb.data.dicom_file import write_mammogram
from mammo_nb.data.prepare import PrepareConfig
from mammo_nb.learners.two_view import save_model
from mammo_nb.metrics.predictions import read_predictions
from mammo_nb.models.mammonet import MammoNet
from mammo_nb.models.two_view import TwoViewNet

@pytest.fixture(scope='module', autouse=True)
def scripts(tmp_path_factory):
    "The commands as files, as pip writes them"
    global SCRIPTS
    SCRIPTS = tmp_path_factory.mktemp('bin')
    for name in ('mammo_predict', 'mammo_tour'):
        (SCRIPTS/f'{name}.py').write_text(f'import sys\nfrom mammo_nb.cli.commands import {name}\nif __name__ == "__main__": sys.exit({name}())\n')

def command(name, *args, cwd=None, **kwargs):
    "A command in a process of its own"
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parents[1]))
    return subprocess.Popen([sys.executable, str(SCRIPTS/f'{name}.py'), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env, **kwargs)

def done(p, timeout=300):
    out, err = p.communicate(timeout=timeout)
    return p.returncode, out, err

def picture(side, view, seed, rows=160, cols=120):
    r, c = np.mgrid[:rows, :cols]
    x = 2500*(np.clip(1-((r-rows/2)/(rows*.4))**2-(c/(cols*.75))**2, 0, None)**.4) + np.random.default_rng(seed).integers(0, 80, (rows, cols))
    return (x[:, ::-1] if side == 'R' else x).astype(np.uint16)

@pytest.fixture(scope='module')
def dicoms(tmp_path_factory):
    "Two patients, one view missing, one view of another kind, one broken file"
    d = tmp_path_factory.mktemp('dicom')
    for n, (pid, s, v) in enumerate([(p, s, v) for p in ('A', 'B') for s in 'LR' for v in ('CC', 'MLO') if (p, s, v) != ('B', 'R', 'MLO')] + [('B', 'R', 'ML')]):
        write_mammogram(d/f'{n}.dcm', picture(s, v, n), s, v, patient_id=pid, exam_id=pid+'1', pixel_spacing_mm=.5)
    (d/'broken.dcm').write_bytes((d/'0.dcm').read_bytes()[:5000])
    return d

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    seed_everything(0)
    net = TwoViewNet(stride=8)
    net.description = dict(training=dict(prepare=json.loads(PrepareConfig(size=(64, 48)).text)))
    return save_model(net, tmp_path_factory.mktemp('model')/'m')

def test_predict_writes_table_overlays_and_what_it_left_out(dicoms, model, tmp_path):
    status, out, err = done(command('mammo_predict', dicoms, '--model', model, '--out', tmp_path/'o', '--workers', 1, '--quiet'))
    assert status == 1, err  # two files were left out
    t = read_predictions(tmp_path/'o/predictions.csv')
    assert t.output.value_counts().to_dict() == dict(probability=4, probability_cc=4, probability_mlo=3)  # no row for the view that is not there
    assert sorted(pd.read_csv(tmp_path/'o/left_out.csv').path) == ['7.dcm', 'broken.dcm']
    assert len(list((tmp_path/'o/overlays').glob('*.png'))) == 4
    named = pd.read_csv(tmp_path/'o/images.csv')
    assert set(named.exam_id) == set(t.exam_id) and len(named) == 7
    assert 'not for clinical use' in out and err == ''

def here(capsys, *args, **kwargs):
    "The same command called from Python: status, what it printed, what it complained"
    status = mammo_predict(*map(str, args), **{k: str(v) if isinstance(v, Path) else v for k, v in kwargs.items()}, workers=1, quiet=True)
    return status, *capsys.readouterr()

def test_predict_of_a_cohort_and_of_files_agree(dicoms, model, tmp_path, capsys):
    cohort, _ = dicom_folder(dicoms)
    cohort.write(tmp_path/'cohort'); got = {}
    for name, folder in (('files', dicoms), ('cohort', tmp_path/'cohort')):
        status, out, err = here(capsys, folder, model, out=tmp_path/name, format='parquet', overlays=False)
        assert status == (1 if name == 'files' else 0), err
        got[name] = read_predictions(tmp_path/name/'predictions.parquet')
        assert not (tmp_path/name/'overlays').exists()
    pd.testing.assert_frame_equal(got['files'], got['cohort'])

def test_a_breast_without_an_answer_is_left_out_and_said(dicoms, tmp_path, capsys):
    "A network of the MLO views, and a breast with CC alone"
    seed_everything(0); net = MammoNet('small', views=('mlo',), stride=8)
    net.description = dict(training=dict(prepare=json.loads(PrepareConfig(size=(64, 48)).text)))
    cohort, _ = dicom_folder(dicoms); cohort.write(tmp_path/'cohort')
    status, out, err = here(capsys, tmp_path/'cohort', save_model(net, tmp_path/'mlo'), out=tmp_path/'o', overlays=False)
    lost = cohort.images[cohort.images.groupby(['exam_id', 'laterality']).view.transform('nunique') == 1]; assert lost[['laterality', 'view']].to_numpy().tolist() == [['R', 'CC']]
    left = pd.read_csv(tmp_path/'o/left_out.csv', dtype=str)
    assert status == 1 and left.image_id.tolist() == lost.image_id.tolist() and left.what.tolist() == ['answer'], err
    assert f'1 of 4 breasts have no row (no answer: the model reads none of their views, or says NaN): {lost.exam_id.iloc[0]} R' in out and '1 files without' in out
    t = read_predictions(tmp_path/'o/predictions.csv'); assert t.output.value_counts()['probability'] == 3

@pytest.mark.parametrize('kwargs,said', [
    (dict(), '--model'), (dict(model='nowhere'), 'nowhere.json'), (dict(model='{bad}'), 'description'), (dict(model='{pickle}'), 'checksum'), (dict(model='{touched}'), 'checksum'),
    (dict(model='{model}', format='doc'), 'csv, parquet'), (dict(model='{model}', group='day'), 'tags, folder')])
def test_predict_says_what_is_wrong_in_one_line(dicoms, model, tmp_path, capsys, kwargs, said):
    (tmp_path/'bad.json').write_text('{"format": 1}'); (tmp_path/'bad.safetensors').write_bytes(b'')
    (tmp_path/'pickle.json').write_text(model.read_text()); torch.save(dict(a=1), tmp_path/'pickle.safetensors')
    weights = model.with_suffix('.safetensors').read_bytes()
    (tmp_path/'touched.json').write_text(model.read_text()); (tmp_path/'touched.safetensors').write_bytes(weights[:-1]+bytes([weights[-1]^1]))
    names = dict(model=model, **{k: tmp_path/k for k in ('bad', 'pickle', 'touched')})
    status, out, err = here(capsys, dicoms, out=tmp_path/'o', **{k: v.format(**names) for k, v in kwargs.items()})
    assert status == 2 and said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path/'o/predictions.csv').exists()

def test_predict_of_nothing(model, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    status, _, err = here(capsys, tmp_path/'empty', model, out=tmp_path/'o')
    assert status == 2 and 'none that can be used' in err

def test_predict_of_nothing_keeps_an_earlier_run(dicoms, model, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    assert here(capsys, dicoms, model, out=tmp_path/'o')[0] == 1
    before = content(tmp_path/'o')
    assert here(capsys, tmp_path/'empty', model, out=tmp_path/'o')[0] == 2
    assert content(tmp_path/'o') == before

# -- a folder that holds an earlier run

def content(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}

def test_predict_replaces_its_own_results_and_nothing_else(dicoms, model, tmp_path, capsys):
    (tmp_path/'few').mkdir()
    for n in (0, 1): (tmp_path/f'few/{n}.dcm').write_bytes((dicoms/f'{n}.dcm').read_bytes())
    assert here(capsys, dicoms, model, out=tmp_path/'o')[0] == 1
    mine = {'overlays/mine.png':b'1', 'notes.txt':b'2', 'predictions.xlsx':b'3', 'sub/left_out.csv':b'4'}
    for name, text in mine.items(): (tmp_path/'o'/name).parent.mkdir(exist_ok=True); (tmp_path/'o'/name).write_bytes(text)
    assert here(capsys, tmp_path/'few', model, out=tmp_path/'o', format='parquet')[0] == 0
    assert here(capsys, tmp_path/'few', model, out=tmp_path/'fresh', format='parquet')[0] == 0
    assert content(tmp_path/'o') == content(tmp_path/'fresh') | mine
    assert len(list((tmp_path/'o/overlays').glob('*.png'))) == 2  # one breast, and mine

@pytest.mark.parametrize('step', ['_write_overlays', '_list_notes', '_take_place'])
@pytest.mark.parametrize('error,status', [(OSError(28, 'No space left on device'), 2), (KeyboardInterrupt(), None)])
def test_predict_that_is_stopped_leaves_the_earlier_results(dicoms, model, tmp_path, capsys, monkeypatch, step, error, status):
    (tmp_path/'one').mkdir(); (tmp_path/'one/0.dcm').write_bytes((dicoms/'0.dcm').read_bytes()); (tmp_path/'o').mkdir()
    earlier = {'predictions.csv':b'earlier', 'overlays/x-L.png':b'earlier', 'left_out.csv':b'earlier'}
    for name, text in earlier.items(): (tmp_path/'o'/name).parent.mkdir(exist_ok=True); (tmp_path/'o'/name).write_bytes(text)
    def stop(*args): raise error
    monkeypatch.setattr(commands, step, stop)
    if status is None: pytest.raises(KeyboardInterrupt, here, capsys, tmp_path/'one', model, out=tmp_path/'o')
    else: assert here(capsys, tmp_path/'one', model, out=tmp_path/'o')[0] == status
    assert content(tmp_path/'o') == earlier

def test_a_table_is_there_only_with_all_that_belongs_to_it(dicoms, model, tmp_path, capsys, monkeypatch):
    (tmp_path/'one').mkdir(); (tmp_path/'one/0.dcm').write_bytes((dicoms/'0.dcm').read_bytes())
    assert here(capsys, tmp_path/'one', model, out=tmp_path/'o')[0] == 0
    (tmp_path/'o/.mammo_predict').mkdir(); (tmp_path/'o/.mammo_predict/predictions.parquet').write_text('of a run that was killed')
    real, moved = os.replace, []
    def replace(a, b):
        if Path(b).parent == tmp_path/'o' or Path(b).parent.name == 'overlays': moved.append(Path(b).name); assert not (tmp_path/'o/predictions.csv').exists()
        real(a, b)
    monkeypatch.setattr(commands.os, 'replace', replace)
    assert here(capsys, tmp_path/'one', model, out=tmp_path/'o')[0] == 0
    assert moved[-1] == 'predictions.csv' and len(moved) == 5
    assert not (tmp_path/'o/.mammo_predict').exists() and not (tmp_path/'o/predictions.parquet').exists()

@pytest.mark.parametrize('out', ['file', 'file/in'])
def test_predict_into_what_is_no_folder(dicoms, model, tmp_path, capsys, out):
    (tmp_path/'file').touch()
    status, _, err = here(capsys, dicoms, model, out=tmp_path/out)
    assert status == 2 and len(err.strip().splitlines()) == 1 and 'file' in err

# -- what is said about the pictures

def prepare(capsys, folder, cache, **kwargs):
    status = mammo_prepare(str(folder), str(cache), size='64x48', workers=1, quiet=True, **kwargs)
    return status, *capsys.readouterr()

def test_notes_and_repeated_views(model, tmp_path, capsys):
    d = tmp_path/'d'; d.mkdir(); window = (1300, 2600)
    write_mammogram(d/'a.dcm', picture('L', 'CC', 0), 'L', 'CC', window=window, extra=dict(BreastImplantPresent='YES'))
    write_mammogram(d/'b.dcm', picture('L', 'CC', 1), 'L', 'CC', window=window)
    write_mammogram(d/'c.dcm', picture('L', 'MLO', 2), 'R', 'MLO', window=window)  # the chest wall is at the wrong side
    write_mammogram(d/'d.dcm', picture('R', 'CC', 3), 'R', 'CC', window=window)
    write_mammogram(d/'A.dcm', picture('R', 'CC', 3), 'R', 'CC', window=window, intent='FOR PROCESSING')
    def check(folder, out):
        notes = pd.read_csv(folder/'notes.csv').set_index('path').notes.to_dict()
        assert list(notes) == ['a.dcm', 'b.dcm', 'c.dcm'] and notes['a.dcm'] == 'implant present'
        assert 'the view is repeated in the exam: mammo_predict uses' in notes['b.dcm'] and 'the chest wall is at the left' in notes['c.dcm']
        assert '3 of 4 pictures have notes' in out and '1 of 4 pictures: prepared, but not used by mammo_predict' in out
    status, out, err = prepare(capsys, d, tmp_path/'c')
    assert status == 1 and err == '' and '1 x raw picture (FOR PROCESSING)' in out
    check(tmp_path/'c', out)
    status, out, err = here(capsys, d, model, out=tmp_path/'o', overlays=False)
    assert status == 1, err
    check(tmp_path/'o', out)
    assert 'A.dcm' not in pd.read_csv(tmp_path/'o/images.csv').path.tolist()

def test_raw_pictures_if_asked_for(model, tmp_path, capsys):
    (tmp_path/'d').mkdir()
    write_mammogram(tmp_path/'d/a.dcm', picture('L', 'CC', 0), 'L', 'CC', intent='FOR PROCESSING')
    assert prepare(capsys, tmp_path/'d', tmp_path/'c')[0] == 2
    assert prepare(capsys, tmp_path/'d', tmp_path/'c', raw=True)[0] == 0
    assert 'raw detector data' in pd.read_csv(tmp_path/'c/notes.csv').notes[0]
    assert here(capsys, tmp_path/'d', model, out=tmp_path/'o', overlays=False)[0] == 2
    assert here(capsys, tmp_path/'d', model, out=tmp_path/'o', overlays=False, raw=True)[0] == 0

@pytest.mark.parametrize('names,said', [((), 'none that can be used, expected'), (('a.png', 'b.TIF', 'in/c.pgm', 'd.pdf', '.e.png'), '3 PNG, TIFF or PGM files were passed over')])
def test_prepare_of_nothing(tmp_path, capsys, names, said):
    (tmp_path/'d/in').mkdir(parents=True)
    for name in names: (tmp_path/'d'/name).write_bytes(b'x')
    status, _, err = prepare(capsys, tmp_path/'d', tmp_path/'c')
    assert status == 2 and said in err and len(err.strip().splitlines()) == 1
    assert ('need a table' in err) == bool(names)

@pytest.mark.skipif(sys.platform != 'linux', reason='names that other systems refuse')
def test_one_odd_file_does_not_stop_the_others(dicoms, tmp_path, capsys):
    d = tmp_path/'d'; d.mkdir()
    for name in ('good.dcm', ' a.dcm', 'a\\b.dcm', os.fsdecode(b'\xe9t\xe9.dcm')): (d/name).write_bytes((dicoms/'0.dcm').read_bytes())
    (d/'link').symlink_to(dicoms, target_is_directory=True)
    status, out, err = prepare(capsys, d, tmp_path/'c')
    assert status == 1 and err == '' and '1 images are prepared' in out
    assert sorted(pd.read_csv(tmp_path/'c/failures.csv').path) == [' a.dcm', '\\xe9t\\xe9.dcm', 'a\\b.dcm', 'link']

@pytest.mark.parametrize('folder,cache', [('none', 'c'), ('file', 'c'), ('d', 'file'), ('d', 'file/in')])
def test_prepare_says_what_is_wrong_in_one_line(dicoms, tmp_path, capsys, folder, cache):
    (tmp_path/'d').mkdir(); (tmp_path/'d/0.dcm').write_bytes((dicoms/'0.dcm').read_bytes()); (tmp_path/'file').touch()
    status, _, err = prepare(capsys, tmp_path/folder, tmp_path/cache)
    assert status == 2 and len(err.strip().splitlines()) == 1

# -- the tour

TOUR = ('--patients', 12, '--seed', 3, '--epochs', 1, '--workers', 1, '--quiet')

def test_a_tour_that_is_killed_goes_on_and_a_second_one_reuses(tmp_path):
    p = command('mammo_tour', '--folder', tmp_path/'t', *TOUR)
    while 'cohort: ...' not in p.stdout.readline(): assert p.poll() is None
    time.sleep(random.Random().uniform(.5, 4)); p.kill(); p.communicate()  # in the middle of the first stage, or a little later
    status, out, err = done(command('mammo_tour', '--folder', tmp_path/'t', *TOUR))
    assert status == 0, err
    page = (tmp_path/'t/index.html').read_text()
    assert page.endswith('</html>\n') and 'What none of this shows' in page
    assert re.search(r'peak memory \d\.\d\d GiB', out) and re.search(r'total [\d.]+ s', out)
    assert [d.name.rpartition('-')[0] for d in sorted((tmp_path/'t/stages').iterdir()) if d.is_dir() and not d.name.startswith('.')] == ['cohort', 'followed', 'gaze', 'model', 'predictions', 'risk', 'watched']
    status, again, err = done(command('mammo_tour', '--folder', tmp_path/'t', *TOUR))
    assert status == 0, err
    for stage in ('cohort', 'prepare in-silico', 'prepare real', 'model', 'predictions'): assert re.search(rf'^  {stage} +[\d.]+ s  reused$', again, re.M), again
    cut = lambda d: d[:d.index('How this page was made</h2>')]
    assert cut((tmp_path/'t/index.html').read_text()) == cut(page)  # the same page
    assert list((tmp_path/'t/stages').glob('.making-*')) == []  # nothing of the killed runs lies about

@pytest.mark.parametrize('kwargs,said', [(dict(patients=3), 'n_patients: found 3'), (dict(epochs=0), 'epochs: found 0')])
def test_a_tour_with_a_wrong_choice(tmp_path, capsys, kwargs, said):
    assert mammo_tour(str(tmp_path/'t'), **kwargs) == 2
    assert said in capsys.readouterr().err
