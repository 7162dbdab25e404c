"What is committed, and that the files that say the same thing agree."
import ast, configparser, re, shutil, subprocess, sys
from importlib.util import module_from_spec, spec_from_file_location
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repo import ROOT, files

CFG = configparser.ConfigParser(delimiters=['='])
CFG.read(ROOT/'settings.ini', encoding='utf-8')
CFG = CFG['DEFAULT']
PINS = dict(re.findall(r'^([\w.-]+)==(\S+)$', (ROOT/'constraints.txt').read_text(), re.M))
FILES = files()
BINARY = ('.png', '.svg', '.ico', '.dcm')
FORBIDDEN = ('.dcm', '.dicom', '.nii', '.pt', '.pth', '.ckpt', '.safetensors', '.onnx', '.npy', '.npz', '.pkl', '.zip', '.gz', '.tar', '.whl', '.pyc')
MACHINE = re.compile(r'(?<![\w.@~-])/(?:root|home/\w+|Users/\w+|work|workspace|mnt|nfs)/|[A-Z]:\\\\?Users\\')

def text(name): return (ROOT/name).read_text(encoding='utf-8')
def requirements(*keys): return [Requirement(r) for k in keys for r in CFG[k].split()]

# ---- what may be committed

def test_no_large_file():
    assert [f'{n}: {(ROOT/n).stat().st_size:,} bytes' for n in FILES if (ROOT/n).is_file() and (ROOT/n).stat().st_size > 1_500_000] == []

def test_the_project_stays_small():
    assert sum((ROOT/n).stat().st_size for n in FILES if (ROOT/n).is_file()) < 40e6

def test_no_patient_data_and_no_weights(): assert [n for n in FILES if n.lower().endswith(FORBIDDEN)] == []

def test_pictures_are_small(): assert [n for n in FILES if n.endswith(BINARY) and (ROOT/n).stat().st_size > 60_000] == []

def machine_paths(s): return sorted({m[0] for m in MACHINE.finditer(s)})

def test_no_path_of_a_machine():
    found = {}
    for n in FILES:
        if n.endswith(BINARY) or n == 'tests/test_guards_files.py' or not (ROOT/n).is_file(): continue
        s = text(n)
        if n.endswith('.ipynb'): s = re.sub(r'"image/png": "[^"]*"', '', s)
        if hits := machine_paths(s): found[n] = hits
    assert found == {}

@pytest.mark.parametrize('bad', ['see /home/anna/x.py', 'open("/root/a")', 'C:\\Users\\anna', '/Users/anna/x', '"/work/data"', '/mnt/big/x'])
def test_a_path_of_a_machine_is_seen(bad): assert machine_paths(bad)

@pytest.mark.parametrize('fine', ['https://a.org/home/anna', 'exam/work/x', '~/work/', 'a/home/b', '/usr/share/dict', '</root>'])
def test_other_paths_are_fine(fine): assert not machine_paths(fine)

# ---- settings, pins, imports

@pytest.mark.parametrize('req', requirements('requirements', 'dev_requirements', 'radiomics_requirements'), ids=str)
def test_every_requirement_is_pinned_inside_its_range(req):
    pins = {canonicalize_name(k): v for k, v in PINS.items()}
    assert canonicalize_name(req.name) in pins and req.specifier.contains(pins[canonicalize_name(req.name)])

def test_every_line_of_the_constraints_is_a_pin():
    lines = [l for l in text('constraints.txt').splitlines() if l.strip() and not l.startswith('#')]
    names = [canonicalize_name(l.split('==')[0]) for l in lines]
    assert len(lines) == len(PINS) == len(set(names)), 'a line is no pin, or a package is named twice'

def test_what_is_installed_is_what_is_pinned():
    "The environment of this run is the locked set: whatever of it is installed has the pinned version"
    from importlib.metadata import PackageNotFoundError, version
    wrong = {}
    for name, pin in PINS.items():
        try: found = version(name)
        except PackageNotFoundError: continue
        if found.split('+')[0] != pin: wrong[name] = f'{found}, pinned {pin}'
    assert wrong == {}

def third_party(root):
    "Top names that the package imports, also inside functions, as `{name: file}`; a name given to `optional_import` counts too"
    res = {}
    for p in sorted(root.rglob('*.py')):
        for n in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            names = []
            if isinstance(n, ast.Import): names = [a.name for a in n.names]
            elif isinstance(n, ast.ImportFrom) and not n.level: names = [n.module]
            elif isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'optional_import' and isinstance(n.args[0], ast.Constant): names = [n.args[0].value]
            for m in names: res.setdefault(m.split('.')[0], p.name)
    return {k: v for k, v in res.items() if k not in sys.stdlib_module_names and k != 'mammo_nb'}

def test_every_import_is_required():
    from importlib.metadata import packages_distributions
    known = packages_distributions()
    have = {canonicalize_name(r.name) for r in requirements('requirements', 'radiomics_requirements')}
    alias = {'radiomics': ['pyradiomics-bhklab']}
    missing = {k: v for k, v in third_party(ROOT/'mammo_nb').items() if not have & {canonicalize_name(d) for d in known.get(k, alias.get(k, [k]))}}
    assert missing == {}, 'imported, but not in the requirements of settings.ini'

def test_a_missing_requirement_is_seen(tmp_path):
    (tmp_path/'a.py').write_text('import os\ndef f():\n    import cupy.linalg\n    from . import b\n    optional_import("faiss", "search")')
    assert set(third_party(tmp_path)) == {'cupy', 'faiss'}

def test_one_version():
    version = CFG['version']
    assert f'__version__ = "{version}"' in text('mammo_nb/__init__.py').replace("'", '"')
    assert yaml.safe_load(text('CITATION.cff'))['version'] == version
    assert re.search(rf'^## {re.escape(version)}\b', text('CHANGELOG.md'), re.M)

def test_one_licence():
    assert CFG['license'] == 'apache2' and yaml.safe_load(text('CITATION.cff'))['license'] == 'Apache-2.0'
    assert 'Apache License' in text('LICENSE') and 'END OF TERMS AND CONDITIONS' in text('LICENSE')

def test_commands_exist():
    for line in filter(None, map(str.strip, CFG['console_scripts'].splitlines())):
        name, target = line.split('=')
        module, function = target.split(':')
        tree = ast.parse(text(module.replace('.', '/') + '.py'))
        assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, f'{name}: no {function} in {module}'

# ---- the rest of the house

@pytest.mark.parametrize('name', [n for n in FILES if n.endswith(('.yml', '.yaml', '.cff'))])
def test_yaml_parses(name): assert isinstance(yaml.safe_load(text(name)), dict)

def test_workflows_do_what_a_person_does():
    test, site = (yaml.safe_load(text(f'.github/workflows/{n}.yml')) for n in ('test', 'site'))
    steps = lambda job: ' '.join(s.get('run', '') + s.get('uses', '') for s in job['steps'])
    assert 'make test' in steps(test['jobs']['test']) and 'make tour' in steps(test['jobs']['tour'])
    assert CFG['min_python'] in test['jobs']['test']['strategy']['matrix']['python']
    assert 'make docs' in steps(site['jobs']['publish']) and 'quarto-actions/setup' in steps(site['jobs']['publish'])

def test_ci_runs_make_test():
    run = ROOT/'.ci/run'
    assert run.stat().st_mode & 0o111 and 'make test' in run.read_text()

@pytest.mark.parametrize('code, refused', [
    ("socket.create_connection(('192.0.2.1', 9), timeout=1)", True), ("socket.socket().connect(('198.51.100.7', 80))", True),
    ("urllib.request.urlopen('http://example.org', timeout=1)", True), ("socket.getaddrinfo('localhost', 80)", False),
    ("s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())", False)])
def test_notebooks_and_tests_have_no_network(code, refused):
    env = {'PYTHONPATH': str(ROOT/'.ci/offline'), 'no_proxy': '*'}
    r = subprocess.run([sys.executable, '-c', f'import socket, urllib.request\n{code}'], env=env, capture_output=True, text=True)
    assert ('no network in tests' in r.stderr) == refused and (r.returncode != 0) == refused, r.stderr

def test_notebooks_are_merged_by_nbdev(): assert '*.ipynb merge=nbdev-merge' in text('.gitattributes').splitlines()

def test_every_target_is_explained():
    targets = re.search(r'^\.PHONY: (.*)$', text('Makefile'), re.M)[1].split()
    told = subprocess.run(['make', '-s', 'help'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [t for t in targets if t not in ('help', 'readme') and f'make {t} ' not in told] == []

def test_an_old_python_is_refused_in_one_line(tmp_path):
    "The check runs under any Python; here with a version that only pretends to be old"
    code = "import sys; sys.version_info = (3, 9, 0, 'final', 0); exec(open(sys.argv[1]).read())"
    r = subprocess.run([sys.executable, '-c', code, str(ROOT/'.ci/python.py')], capture_output=True, text=True)
    assert r.returncode == 1 and '3.11 or newer' in r.stderr and len(r.stderr.splitlines()) == 1

def test_docs_without_quarto_says_so(tmp_path):
    "With a PATH that has everything but Quarto, and the environment taken as installed"
    for tool in ('make', 'sh', 'bash', 'echo', 'touch', 'test'):
        if where := shutil.which(tool): (tmp_path/tool).symlink_to(where)
    r = subprocess.run(['make', '-s', '-o', '.venv/.installed', 'docs', 'PYTHON=python3'], cwd=ROOT, env={'PATH': str(tmp_path)}, capture_output=True, text=True)
    assert r.returncode != 0 and 'Quarto is not installed' in r.stdout

def test_bench_lists_what_there_is():
    r = subprocess.run([sys.executable, '.ci/bench.py', '', ''], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0 and all(p.stem in r.stdout for p in (ROOT/'benchmarks').glob('[!_]*.py'))
    r = subprocess.run([sys.executable, '.ci/bench.py', 'no_such', ''], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 1 and "no benchmark is called 'no_such'" in r.stdout

# ---- README

@pytest.fixture(scope='module')
def readme():
    spec = spec_from_file_location('readme', ROOT/'.ci/readme.py')
    m = module_from_spec(spec)
    spec.loader.exec_module(m)
    return m

def test_readme_is_in_sync(readme): assert readme.stale() == [], 'run make readme'

def test_readme_says_what_it_must(readme):
    s = readme.make()['README.md'].decode()
    for words in ('not for clinical use', 'make tour', 'make test', '![', 'LMV-Net', 'Mammo-Net', 'MommiNet-v2', 'radiomics GAN', 'latent diffusion', '## Limits'):
        assert words in s, words

def test_readme_rewrites_links(readme):
    assert readme.relink('[a](core/x.ipynb) [b](https://x.org/y) [c](#limits) ![d](images/e.png)') == '[a](nbs/core/x.ipynb) [b](https://x.org/y) [c](#limits) ![d](nbs/images/e.png)'

def test_an_unmade_image_is_seen(readme, monkeypatch, tmp_path):
    for n in ('nbs/index.ipynb', 'README.md', *(f'nbs/images/{p.name}' for p in (ROOT/'nbs/images').iterdir())):
        (tmp_path/n).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/n).write_bytes((ROOT/n).read_bytes())
    monkeypatch.setattr(readme, 'ROOT', tmp_path)
    (tmp_path/'nbs/images/index-99.png').write_bytes(b'')
    (tmp_path/'README.md').write_text('edited by hand')
    assert readme.stale() == ['README.md', 'nbs/images/index-99.png']
