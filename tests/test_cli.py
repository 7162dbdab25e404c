"The commands as a shell sees them: exit status, one line of error, files; and a tour that is killed and goes on"
import json, os, random, re, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from mammo_nb.cli.commands import mammo_predict, mammo_tour
from mammo_nb.core.seeding import seed_everything
from mammo_nb.data.datasets.folder import dicom_folder
from mammo_nb.data.dicom_file import write_mammogram
from mammo_nb.data.prepare import PrepareConfig
from mammo_nb.learners.two_view import save_model
from mammo_nb.metrics.predictions import read_predictions
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
    assert [d.name.rpartition('-')[0] for d in sorted((tmp_path/'t/stages').iterdir()) if d.is_dir() and not d.name.startswith('.')] == ['cohort', 'model', 'predictions']
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
