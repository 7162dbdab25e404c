"What the repo guards share: where things are, and the rules as functions of a folder, so that each rule can be shown a bad example too."
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [('core',), ('dicom',), ('cohort',), ('preparation',), ('gaze', 'insilico'), ('samples',), ('registration',), ('losses', 'metrics'), ('models',), ('learners',), ('report', 'cli'),
          ('tutorials', 'course')]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}

def git(*args, cwd=ROOT):
    return subprocess.run(['git', *args], cwd=cwd, capture_output=True, text=True, check=True).stdout

def files(root=ROOT):
    "Every file of the project: tracked, or new and not ignored; without those that are deleted and not yet committed"
    names = git('ls-files', '-z', '-c', '-o', '--exclude-standard', cwd=root).split('\0')
    return sorted({n for n in names if n and os.path.lexists(Path(root)/n)})

def copy_tree(target, root=ROOT):
    "The project as it stands on the disk, as a repository of its own with one commit"
    target.mkdir(parents=True, exist_ok=True)
    for name in files(root):
        (target/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path(root)/name, target/name, follow_symlinks=False)
    who = ['-c', 'user.name=guard', '-c', 'user.email=guard@localhost', '-c', 'commit.gpgsign=false']
    for args in (['init', '-q'], ['add', '-A', '-f'], [*who, 'commit', '-q', '--no-verify', '-m', 'as it stands']): git(*args, cwd=target)
    return target

def nbdev(command, *args, cwd, path=None, home):
    "A command of nbdev in a folder, as a person would run it (not as a test)"
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    bin = Path(sys.executable).parent
    env.update(HOME=str(home), PATH=os.pathsep.join(map(str, [*(path or []), bin, env.get('PATH', '')])), PYTHONPATH=str(cwd))
    return subprocess.run([str(bin/command), *args], cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)

# ---- notebooks

def notebooks(root=ROOT):
    nbs = Path(root)/'nbs'
    return [p for p in sorted(nbs.rglob('*.ipynb')) if not any(o.startswith(('_', '.')) for o in p.relative_to(nbs).parts)]

def read(path): return json.loads(Path(path).read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])
def directives(cell):
    "The words after `#|` at the top of a code cell, as `{name: rest}`"
    res = {}
    if cell['cell_type'] != 'code': return res
    for line in source(cell).splitlines():
        if not line.strip(): continue
        m = re.match(r'^#\s*\|\s*([\w-]+):?\s*(.*)$', line)
        if not m: break
        res[m[1]] = m[2]
    return res

def exported(cell): return bool({'export', 'exporti', 'exports'} & set(directives(cell)))
def module_of(cells): return next((directives(c)['default_exp'].strip() for c in cells if 'default_exp' in directives(c)), None)

# ---- floors

def imports(path, package):
    "The modules of our own package that a file imports anywhere, also inside functions, as `(line, dotted name)`"
    for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(n, ast.Import):
            for a in n.names: yield n.lineno, a.name
        elif isinstance(n, ast.ImportFrom):
            base = package.split('.')[:len(package.split('.'))-n.level+1] if n.level else []
            name = '.'.join([*base, *([n.module] if n.module else [])])
            for a in n.names: yield n.lineno, f'{name}.{a.name}'

def upward(lib):
    "Imports that point up, and folders that have no floor"
    for p in sorted(lib.rglob('*.py')):
        rel = p.relative_to(lib)
        if rel.name == '_modidx.py': continue
        room = rel.parts[0] if len(rel.parts) > 1 else None
        if room and room not in FLOOR:
            yield f'{rel}: the folder {room} has no floor'
            continue
        package = '.'.join([lib.name, *rel.parts[:-1]])
        for line, name in imports(p, package):
            parts = name.split('.')
            if parts[0] != lib.name or len(parts) < 2 or not (lib/parts[1]).is_dir(): continue
            if FLOOR.get(parts[1], 99) > (FLOOR[room] if room else FLOOR['core']):
                yield f'{rel}:{line}: {room or "the package itself"} imports {name}, which is on a higher floor'
