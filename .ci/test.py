"""`make test`: the repo guards, every notebook, then pytest, on two cores. The last line is `N passed, M failed`, with `, K skipped` when something was.

A notebook runs through the engine of nbdev_test (`nbdev.test.test_nb`), two at a time, each in a process of its own: nothing
leaks from one to the next, and one that is killed or hangs fails alone. The processes are forked from one that has imported
the large libraries (`PRELOAD`) and nothing of ours, which saves half of the time. pytest runs in two processes (pytest-xdist).
Nothing may be left behind: a new untracked file fails too.
"""
import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from needs import missing_needs

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
SLOW, LIMIT, PYTEST_LIMIT = 60, 300, 2400  # seconds: a notebook over the first is named at the end, one over the second is stopped
PRELOAD = ['nbdev.test', 'torch', 'torchvision', 'fastcore.all', 'pandas', 'pandera.pandas', 'matplotlib.pyplot', 'scipy.ndimage', 'scipy.stats',
           'sklearn.metrics', 'sklearn.model_selection', 'skimage.measure', 'timm', 'torchmetrics', 'pydicom', 'joblib', 'huggingface_hub']


def environment():
    """The same for everyone: one thread a process, no network (.ci/offline), a fixed hash seed.

    glibc gives large blocks back to the system at once and asks for them again at the next step of a training; told to keep
    them, it saves a fifth of the time. Other systems ignore this.
    """
    memory = {'MALLOC_MMAP_THRESHOLD_': str(2**32), 'MALLOC_TRIM_THRESHOLD_': str(2**32), 'MALLOC_TOP_PAD_': str(2**26)}
    threads = {k: '1' for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')}
    same = {'PYTHONHASHSEED': '0', 'HF_HUB_OFFLINE': '1', 'PYTHONDONTWRITEBYTECODE': '1', 'COLUMNS': '100'}
    python_path = f'{ROOT}{os.pathsep}{ROOT/".ci/offline"}'
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ.get("PATH", "")}'
    return {**os.environ, **memory, **threads, **same, 'PYTHONPATH': python_path, 'PATH': path}


class Peak(threading.Thread):
    "Samples the memory of all child processes together, every second"

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.stopped = 0, threading.Event()

    def run(self):
        while not self.stopped.wait(1):
            self.peak = max(self.peak, self.now())

    def now(self):
        total = 0
        for process in psutil.Process().children(recursive=True):
            try:
                memory = process.memory_full_info()
            except psutil.Error:
                continue  # it ended meanwhile
            total += getattr(memory, 'pss', memory.uss)  # shared pages are counted once
        return total


# ---- notebooks

def notebooks(names=()):
    if names:
        return [Path(n).resolve() for n in names]
    hidden = lambda path: any(part.startswith(('_', '.')) for part in path.relative_to(NBS).parts)
    return [path for path in sorted(NBS.rglob('*.ipynb')) if not hidden(path)]


def test_one(path, log):
    "In a process of its own: one notebook through nbdev; what it prints goes to a file"
    os.setsid()
    multiprocessing.set_start_method('fork', force=True)  # for what the notebook starts: the default, as without a server
    with open(log, 'wb') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(NBS)
    try:
        from nbdev.config import get_config
        from nbdev.test import test_nb
        ok, _ = test_nb(Path(path), skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    except BaseException:
        traceback.print_exc()
        ok = False
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(not ok)


def run_notebook(server, path, folder):
    "`(path, passed, seconds, text)` of a notebook"
    start, log = time.time(), folder/f'{path.relative_to(ROOT).as_posix().replace("/", "-")}.log'
    process = server.Process(target=test_one, args=(str(path), str(log)))
    process.start()
    process.join(LIMIT)
    stopped = process.is_alive()
    try:
        os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
    except ProcessLookupError:
        pass  # the usual case: all have ended
    process.join()
    text = log.read_text(errors='replace') if log.exists() else ''
    if stopped:
        text += f'\nstopped after {LIMIT} s'
    elif process.exitcode not in (0, 1):
        text += f'\nended with status {process.exitcode}'
    return path, process.exitcode == 0, time.time() - start, text


def skip_notebooks(paths):
    "`(those to run, number skipped)`; prints what is missing for the others"
    missing = {path: missing_needs(path) for path in paths}
    for path, names in missing.items():
        if names:
            print(f'skipped           {path.relative_to(ROOT)}: {", ".join(names)} not installed', flush=True)
    run = [path for path in paths if not missing[path]]
    return run, len(paths) - len(run)


def run_notebooks(names, workers):
    passed, failed, slow = 0, [], []
    paths, skipped = skip_notebooks(notebooks(names))
    server = multiprocessing.get_context('forkserver')
    server.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        run = lambda path: run_notebook(server, path, Path(folder))
        for path, ok, seconds, text in pool.map(run, paths):
            name = path.relative_to(ROOT)
            print(f'{"ok" if ok else "FAILED":6} {seconds:6.1f} s  {name}', flush=True)
            passed += ok
            if not ok:
                failed.append(str(name))
                print(text[-6000:], flush=True)
            if seconds > SLOW:
                slow.append(f'{name} ({seconds:.0f} s)')
    if slow:
        print(f'over {SLOW} s (the aim for one notebook alone on 2 cores): ' + ', '.join(slow))
    return passed, failed, skipped


# ---- pytest

def run_pytest(files, workers, share='worksteal'):
    """`(passed, failed, skipped)` of pytest, from its own report.

    With `share='worksteal'` each process has a half of the tests, and helps the other at the end; with `'loadfile'` the tests
    of a file stay in one process.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder)/'report.xml'
        options = ['-q', '-p', 'no:cacheprovider', '--continue-on-collection-errors', '--durations=12', '-o', 'faulthandler_timeout=600',
                   '-n', str(workers), '--dist', share, f'--junitxml={report}', f'--basetemp={folder}/tmp', '-o', 'junit_family=xunit1']
        command = [sys.executable, '-m', 'pytest', *options, *map(str, files)]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, 'MPLBACKEND': 'Agg'}, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            status = process.wait(PYTEST_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return 0, [f'pytest was stopped after {PYTEST_LIMIT} s'], 0
        if not report.exists():
            return 0, [f'pytest ended with status {status} and no report'], 0
        cases = list(ET.parse(report).getroot().iter('testcase'))
    bad = [c for c in cases if c.find('failure') is not None or c.find('error') is not None]
    failed = [f'{c.get("classname") or c.get("file")}::{c.get("name")}' for c in bad]
    skipped = sum(c.find('skipped') is not None for c in cases if c not in bad)
    if status not in (0, 5) and not failed:
        failed = [f'pytest ended with status {status}']
    return len(cases) - len(bad) - skipped, failed, skipped


# ---- all

def untracked():
    command = ['git', 'ls-files', '-o', '--exclude-standard']
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return set(listed.stdout.splitlines())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workers', type=int, default=2, help='processes at a time')
    parser.add_argument('--only', choices=['guards', 'notebooks', 'pytest'], help='one of the three parts')
    parser.add_argument('names', nargs='*', help='notebooks, all if none is named')
    options = parser.parse_args()
    start, before, peak = time.time(), untracked(), Peak()
    peak.start()
    guards = sorted((ROOT/'tests').glob('test_guards_*.py'))
    tests = [path for path in sorted((ROOT/'tests').glob('test_*.py')) if path not in guards]
    parts = dict(
        guards=lambda: run_pytest(guards, options.workers, 'loadfile'),
        notebooks=lambda: run_notebooks(options.names, options.workers),
        pytest=lambda: run_pytest(tests, options.workers))
    passed, failed, skipped = 0, [], 0
    for part in [options.only] if options.only else parts:
        began = time.time()
        print(f'\n== {part}', flush=True)
        n, bad, skip = parts[part]()
        passed, failed, skipped = passed + n, failed + bad, skipped + skip
        print(f'== {part}: {n} passed, {len(bad)} failed, {skip} skipped, {time.time()-began:.0f} s', flush=True)
    left = sorted(untracked() - before)
    if left:
        failed.append('files left behind: ' + ', '.join(left[:10]))
    peak.stopped.set()
    if failed:
        print('\nfailed:', *failed, sep='\n  ')
    print(f'\ntime {time.time()-start:.0f} s, peak memory {peak.peak/2**30:.1f} GiB')
    print(f'{passed} passed, {len(failed)} failed' + (f', {skipped} skipped' if skipped else ''))
    return 1 if failed or not passed else 0


if __name__ == '__main__':
    if os.environ.get('PYTHONHASHSEED') != '0':  # read by Python at its start: begin again
        os.execve(sys.executable, [sys.executable, *sys.argv], environment())
    os.environ.update(environment())
    sys.exit(main())
