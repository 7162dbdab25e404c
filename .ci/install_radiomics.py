"""Installs the extra `radiomics` where it can be built, and says what is missing where not: `make radiomics`.

PyRadiomics is on PyPI as source only. Building it takes a C compiler and the headers of Python, and some 20 seconds. Without
it everything else works; its notebooks and tests are skipped and counted. The exit status is 0 either way.
"""
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 'Radiomics are left out: {}. All else works; notebooks and tests of radiomics are skipped. Afterwards: make radiomics'
COMPILER = 'no C compiler was found (Debian and Ubuntu: apt-get install build-essential; macOS: xcode-select --install; ' \
    'Windows: Build Tools for Visual Studio)'
HEADERS = 'the headers of Python were not found (Debian and Ubuntu: apt-get install python3-dev)'

def requirements():
    "What the extra asks for, as in settings.ini"
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']['radiomics_requirements'].split()

def is_installed():
    "Whether the distribution is here; its version is that of constraints.txt"
    try:
        version('pyradiomics-bhklab')
    except PackageNotFoundError:
        return False
    return True

def find_compiler():
    "The C compiler that a build would use, or another that is there; `None` without one"
    wanted = [os.environ.get('CC'), sysconfig.get_config_var('CC'), 'cc', 'gcc', 'clang']
    names = [shlex.split(name)[0] for name in wanted if name and name.strip()]
    return next((name for name in names if shutil.which(name)), None)

def what_is_missing():
    "What a build would lack, in words; `None`: nothing"
    if os.name == 'nt':
        return None # the build finds its compiler itself, or says that there is none
    if find_compiler() is None:
        return COMPILER
    header = Path(sysconfig.get_path('include'))/'Python.h'
    return None if header.exists() else HEADERS

def build():
    "Install with pip; what it said where it failed, else `None`"
    command = [sys.executable, '-m', 'pip', 'install', '--disable-pip-version-check', '--progress-bar', 'off', '-c',
               str(ROOT/'constraints.txt'), *requirements()]
    env = dict(os.environ, CC=find_compiler() or '')
    if not env['CC']:
        del env['CC']
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    return None if process.returncode == 0 else (process.stdout + process.stderr).strip()[-1500:]

def main():
    if is_installed():
        return 0
    missing = what_is_missing()
    if missing:
        print(SKIPPED.format(missing))
        return 0
    print('Building the extra radiomics (about 20 seconds)', flush=True)
    said = build()
    if said:
        print(said)
        print(SKIPPED.format('the build failed, see above'))
    return 0

if __name__ == '__main__':
    sys.exit(main())
