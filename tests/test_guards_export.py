"mammo_nb/ is what the notebooks say: in a copy, nbdev_clean and nbdev_export change nothing."
import pytest
from repo import ROOT, copy_tree, git, nbdev

def clean_and_export(tree, home):
    home.mkdir(exist_ok=True)
    for command in ('nbdev_clean', 'nbdev_export'):
        r = nbdev(command, cwd=tree, home=home)
        assert r.returncode == 0, r.stderr
        assert 'Failed to clean' not in r.stderr, r.stderr
    return git('status', '--porcelain', cwd=tree).splitlines()

@pytest.fixture(scope='module')
def tree(tmp_path_factory): return copy_tree(tmp_path_factory.mktemp('copy'))

def test_clean_and_export_leave_no_diff(tree, tmp_path):
    changed = clean_and_export(tree, tmp_path/'home')
    assert changed == [], 'run `make export` and commit what it changes:\n' + git('diff', '--stat', cwd=tree)

def test_an_edited_module_is_seen(tree, tmp_path):
    p = tree/'mammo_nb/core/errors.py'
    git('checkout', '-q', '.', cwd=tree)
    p.write_text(p.read_text().replace('found {self.found}', 'got {self.found}'))
    git('add', '-A', cwd=tree)
    git('-c', 'user.name=guard', '-c', 'user.email=guard@localhost', 'commit', '-q', '-m', 'edited by hand', cwd=tree)
    assert ' M mammo_nb/core/errors.py' in clean_and_export(tree, tmp_path/'home')

def test_an_edited_module_can_be_carried_back(tmp_path):
    "What CONTRIBUTING.md says under 'I edited the .py, now what'"
    tree = copy_tree(tmp_path/'copy')
    p = tree/'mammo_nb/core/errors.py'
    p.write_text(p.read_text().replace('found {self.found}', 'got {self.found}'))
    (tmp_path/'home').mkdir()
    r = nbdev('nbdev_update', cwd=tree, home=tmp_path/'home')
    assert r.returncode == 0, r.stderr
    assert 'got {self.found}' in (tree/'nbs/core/01_errors.ipynb').read_text()
    changed = {l[3:] for l in clean_and_export(tree, tmp_path/'home')}
    assert 'mammo_nb/core/errors.py' in changed and 'got {self.found}' in p.read_text()

def test_the_modules_on_disk_are_the_notebooks():
    from repo import module_of, notebooks, read
    wanted = {'mammo_nb/' + m.replace('.', '/') + '.py' for m in map(module_of, map(read, notebooks())) if m}
    there = {str(p.relative_to(ROOT)) for p in (ROOT/'mammo_nb').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py')}
    assert there == wanted
