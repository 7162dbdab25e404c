"Run one benchmark, or list them: `make bench NAME=prepare SEED=1`."
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def list_benchmarks():
    "Name -> script"
    scripts = sorted((ROOT/'benchmarks').glob('[!_]*.py'))
    return {script.stem: script for script in scripts}

def first_line(script):
    "The first line of the docstring of a script"
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding='utf-8')))
    return (docstring or '').strip().partition('\n')[0]

def print_list(name, scripts):
    "Print what can be run"
    if name:
        print(f'make bench: no benchmark is called {name!r}.')
    else:
        print('make bench NAME=x [SEED=n] runs one of:')
    for known, script in scripts.items():
        print(f'  {known:12} {first_line(script)}')

def main(name='', seed=''):
    scripts = list_benchmarks()
    if name not in scripts:
        print_list(name, scripts)
        return 1 if name else 0
    arguments = ['--seed', seed] if seed else []
    return subprocess.call([sys.executable, str(scripts[name]), *arguments], cwd=ROOT)

if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:3]))
