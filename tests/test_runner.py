"`make test` and `make notebooks` themselves, on a small project made here: what fails is counted, and the last line says so."
import base64, io, json, re, shutil, subprocess, sys
from importlib.util import module_from_spec, spec_from_file_location
import numpy as np
import pytest
from PIL import Image
from repo import ROOT, git

def notebook(*sources):
    cells = [dict(cell_type='code', execution_count=None, id=f'{i:08x}', metadata={}, outputs=[], source=s.splitlines(keepends=True)) for i, s in enumerate(sources)]
    return json.dumps(dict(cells=cells, metadata=dict(kernelspec=dict(display_name='python3', language='python', name='python3')), nbformat=4, nbformat_minor=5), indent=1)

@pytest.fixture
def project(tmp_path):
    "A project with the runners of this one"
    root = tmp_path/'project'
    for folder in ('nbs/a', 'tests', 'small'): (root/folder).mkdir(parents=True)
    shutil.copytree(ROOT/'.ci', root/'.ci', ignore=shutil.ignore_patterns('__pycache__'))
    (root/'settings.ini').write_text('[DEFAULT]\nrepo = small\nlib_name = small\nuser = nobody\nnbs_path = nbs\nlib_path = small\ndoc_path = _docs\ntst_flags = slow\nversion = 0.0.1\n')
    (root/'small/__init__.py').write_text('')
    (root/'nbs/a/01_good.ipynb').write_text(notebook('x = 1', 'assert x == 1'))
    (root/'tests/test_guards_a.py').write_text('def test_guard(): assert True\n')
    (root/'tests/test_b.py').write_text('import pytest\ndef test_one(): assert True\ndef test_two(): pytest.skip("no data")\n')
    git('init', '-q', cwd=root)
    git('add', '-A', cwd=root)
    return root

def run(root, *args):
    r = subprocess.run([sys.executable, '.ci/test.py', *args], cwd=root, capture_output=True, text=True, timeout=300)
    return r.returncode, r.stdout.splitlines(), r.stdout + r.stderr

def test_all_good(project):
    rc, lines, text = run(project)
    assert rc == 0 and lines[-1] == '3 passed, 0 failed, 1 skipped', text
    assert re.fullmatch(r'time \d+ s, peak memory \d+\.\d GiB', lines[-2])

def test_every_way_to_fail_is_counted(project):
    (project/'nbs/a/02_bad.ipynb').write_text(notebook('assert False, "not this"'))
    (project/'nbs/a/03_killed.ipynb').write_text(notebook('import os, signal\nos.kill(os.getpid(), signal.SIGKILL)'))
    (project/'nbs/a/04_online.ipynb').write_text(notebook('import urllib.request\nurllib.request.urlopen("http://192.0.2.1", timeout=1)'))
    (project/'nbs/a/_05_parked.ipynb').write_text(notebook('assert False'))
    (project/'tests/test_guards_b.py').write_text('def test_guard(): assert False\n')
    (project/'tests/test_c.py').write_text('import pytest\n@pytest.fixture\ndef f(): raise ValueError\ndef test_error(f): pass\ndef test_left(): open("left.txt", "w").close()\n')
    (project/'tests/test_d.py').write_text('import no_such_module\n')
    git('add', '-A', cwd=project)
    rc, lines, text = run(project)
    assert rc == 1 and lines[-1] == '4 passed, 7 failed, 1 skipped', text
    for what in ('nbs/a/02_bad.ipynb', 'nbs/a/03_killed.ipynb', 'nbs/a/04_online.ipynb', 'tests.test_guards_b::test_guard', 'test_error', 'test_d', 'files left behind: left.txt'):
        assert any(what in l for l in lines[lines.index('failed:'):]), what
    assert 'not this' in text and 'no network in tests: 192.0.2.1' in text and 'ended with status -9' in text

def test_a_notebook_without_what_it_needs_is_skipped_and_counted(project):
    "`#| needs:` in a cell; with the module it runs"
    (project/'nbs/a/02_needs.ipynb').write_text(notebook('x = 1', '#| hide\n#| needs: no_such_module\nassert False'))
    (project/'nbs/a/03_has.ipynb').write_text(notebook('#| needs: json\nx = 1', 'assert x == 1'))
    git('add', '-A', cwd=project)
    rc, lines, text = run(project, '--only', 'notebooks')
    assert rc == 0 and lines[-1] == '2 passed, 0 failed, 1 skipped', text
    assert any('02_needs.ipynb: no_such_module not installed' in line for line in lines)
    rc, text = store(project)
    assert rc == 0 and '02_needs.ipynb: no_such_module not installed' in text, text

def test_nothing_at_all_is_a_failure(project):
    for p in (*project.glob('tests/*'), *project.glob('nbs/a/*')): p.unlink()
    rc, lines, _ = run(project)
    assert rc == 1 and lines[-1] == '0 passed, 0 failed'

# ---- make hooks

def test_notebooks_merge_cell_by_cell(project, tmp_path):
    "Two people change two cells and the name of the kernel; git merges them through the hook, with no environment activated"
    nb, env = project/'nbs/a/01_good.ipynb', {'HOME': str(tmp_path), 'PATH': '/usr/bin:/bin'}
    me = ['-c', 'user.name=a', '-c', 'user.email=a@localhost']
    (project/'.gitattributes').write_text((ROOT/'.gitattributes').read_text())
    (project/'.gitignore').write_text((ROOT/'.gitignore').read_text())
    nb.write_text(notebook('x = 1', 'y = 2'))
    git('add', '-A', cwd=project)
    git(*me, 'commit', '-qm', 'both', cwd=project)
    main = git('branch', '--show-current', cwd=project).strip()
    r = subprocess.run([sys.executable, '.ci/hooks.py'], cwd=project, env=env, capture_output=True, text=True)
    assert r.returncode == 0 and 'Hooks are installed' in r.stdout, r.stdout + r.stderr
    git('checkout', '-qb', 'other', cwd=project)
    said = lambda text, who: text.replace('"display_name": "python3"', f'"display_name": "{who}"')  # plain git would call this a conflict
    nb.write_text(said(notebook('x = 1', 'y = 3'), 'theirs'))
    git(*me, 'commit', '-qam', 'second cell', cwd=project)
    git('checkout', '-q', main, cwd=project)
    nb.write_text(said(notebook('x = 0', 'y = 2'), 'ours'))
    git(*me, 'commit', '-qam', 'first cell', cwd=project)
    r = subprocess.run(['git', *me, 'merge', '-q', '-m', 'merged', 'other'], cwd=project, env=env, capture_output=True, text=True)
    assert r.returncode == 0 and 'not found' not in r.stderr, r.stdout + r.stderr
    assert [''.join(c['source']) for c in json.loads(nb.read_text())['cells']] == ['x = 0', 'y = 3']
    assert git('status', '--porcelain', cwd=project) == ''

# ---- make notebooks

def store(root, *args):
    r = subprocess.run([sys.executable, '.ci/notebooks.py', *args], cwd=root, capture_output=True, text=True, timeout=300)
    return r.returncode, r.stdout

def test_outputs_are_stored_and_stay_the_same(project):
    nb = project/'nbs/a/01_good.ipynb'
    nb.write_text(notebook('{"b", "a", "c"}', 'import random, sys; print(hash("x"))', 'object()'))
    assert store(project, str(nb))[0] == 0
    first = nb.read_bytes()
    assert store(project, str(nb))[0] == 0 and nb.read_bytes() == first
    assert store(project, '--check', str(nb))[0] == 0
    cells = json.loads(first)['cells']
    assert cells[0]['outputs'] and cells[0]['execution_count'] is None and '0x' not in str(cells[2]['outputs'])

@pytest.mark.parametrize('source, said', [('1/0', 'ZeroDivisionError'), ('import sys; print("oh", file=sys.stderr)', 'stderr'), ('print("x"*900_000)', 'limit 800,000')])
def test_a_bad_notebook_is_left_as_it_was(project, source, said):
    nb = project/'nbs/a/01_good.ipynb'
    nb.write_text(notebook('1 + 1', source))
    before = nb.read_bytes()
    rc, text = store(project, str(nb))
    assert rc == 1 and said in text and nb.read_bytes() == before

def test_what_changes_from_run_to_run_is_named(project):
    nb = project/'nbs/a/01_good.ipynb'
    nb.write_text(notebook('1 + 1', 'import time', 'time.time_ns()'))
    assert store(project, str(nb))[0] == 0
    rc, text = store(project, '--check', str(nb))
    assert rc == 1 and 'would change: cell 2' in text
    assert not list(nb.parent.glob('.*'))

# ---- figures

@pytest.fixture(scope='module')
def store_script():
    spec = spec_from_file_location('notebooks', ROOT/'.ci/notebooks.py')
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_a_stored_figure_keeps_its_greys_and_a_thin_coloured_line(store_script):
    "A smooth image with noise, a white margin, and a cyan line of one pixel"
    grey = np.linspace(0, 255, 300)[:, None] + np.random.default_rng(0).normal(0, 3, (300, 300))
    figure = np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, 2)
    figure[:20] = 255
    figure[150, 50:250] = 0, 255, 255
    buffer = io.BytesIO()
    Image.fromarray(figure).save(buffer, 'PNG')
    stored = store_script.as_palette(base64.b64encode(buffer.getvalue()).decode())
    image = Image.open(io.BytesIO(base64.b64decode(stored)))
    found = np.asarray(image.convert('RGB')).astype(int)
    assert image.mode == 'P'
    assert (found[:20] == 255).all()
    assert np.abs(found[150, 50:250] - (0, 255, 255)).max() <= 2
    assert np.abs(found - figure).max() <= 2  # half a step between 64 levels of grey

def test_a_figure_with_too_many_colours_is_stored_as_it_is(store_script):
    rows, cols = np.mgrid[:256, :256].astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([rows, cols, rows ^ cols], 2)).save(buffer, 'PNG')
    png = base64.b64encode(buffer.getvalue()).decode()
    assert store_script.as_palette(png) == png
