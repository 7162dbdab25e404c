"Runs one benchmark, or lists them: `make bench NAME=prepare SEED=1`."
import ast, subprocess, sys
from pathlib import Path

def main(name, seed):
    here = Path(__file__).resolve().parents[1]
    known = {p.stem: p for p in sorted((here/'benchmarks').glob('[!_]*.py'))}
    if name in known:
        return subprocess.call([sys.executable, str(known[name]), *(['--seed', seed] if seed else [])], cwd=here)
    print(f'make bench: no benchmark is called {name!r}.' if name else 'make bench NAME=x [SEED=n] runs one of:')
    for k, p in known.items():
        print(f'  {k:12} {(ast.get_docstring(ast.parse(p.read_text(encoding="utf-8"))) or "").strip().splitlines()[0]}')
    if not known: print('  (there is none yet)')
    return 1 if name else 0

if __name__ == '__main__': sys.exit(main(*(sys.argv[1:] + ['', ''])[:2]))
