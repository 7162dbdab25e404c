"`make hooks`: nbdev's git and Jupyter hooks, with the commands of .venv, so that they also work where it is not activated."
import os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def main():
    bin = Path(sys.executable).parent
    subprocess.run([str(bin/'nbdev_install_hooks')], cwd=ROOT, check=True, env={**os.environ, 'PATH': f'{bin}{os.pathsep}{os.environ.get("PATH", "")}'})
    for p, name in ((ROOT/'.gitconfig', 'nbdev_merge'), (ROOT/'.git/hooks/post-merge', 'nbdev_trust')):
        s = p.read_text()
        p.write_text(s.replace(f'driver = {name} ', f'driver = "{bin/name}" ').replace(f'\n{name}', f'\n"{bin/name}"'))
    print('They run the commands in', bin)

if __name__ == '__main__': sys.exit(main())
