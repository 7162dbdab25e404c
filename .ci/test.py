"""`make test`: the repo guards, every notebook, then pytest. The last line is `N passed, M failed`, with `, K skipped` when something was.

A notebook runs through the engine of nbdev_test (`nbdev.test.test_nb`), two at a time, each in a process of its own: nothing leaks from one
to the next, and one that is killed or hangs fails alone. Nothing may be left behind: a new untracked file fails too.
"""
import argparse, os, subprocess, sys, tempfile, threading, time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import psutil

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
SLOW, LIMIT, PYTEST_LIMIT = 60, 300, 2400  # seconds: a notebook over the first is named at the end, one over the second is stopped

def environment():
    "The same for everyone: one thread a process, no network (.ci/offline), a fixed hash seed"
    threads = {k: '1' for k in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')}
    return {**os.environ, **threads, 'PYTHONHASHSEED': '0', 'HF_HUB_OFFLINE': '1', 'PYTHONDONTWRITEBYTECODE': '1', 'COLUMNS': '100',
            'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT/".ci/offline"}',
            'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ.get("PATH", "")}'}

class Peak(threading.Thread):
    "Samples the memory of all child processes together, every half second"
    def __init__(self): super().__init__(daemon=True); self.peak, self.stopped = 0, threading.Event()
    def run(self):
        while not self.stopped.wait(.5): self.peak = max(self.peak, self.now())
    def now(self):
        total = 0
        for p in psutil.Process().children(recursive=True):
            try:
                m = p.memory_full_info()
                total += getattr(m, 'pss', m.uss)  # shared pages are counted once
            except psutil.Error: continue  # it ended meanwhile
        return total

def notebooks(names=()):
    if names: return [Path(n).resolve() for n in names]
    return [p for p in sorted(NBS.rglob('*.ipynb')) if not any(o.startswith(('_', '.')) for o in p.relative_to(NBS).parts)]

def test_one(path):
    "In the child process: one notebook through nbdev"
    from nbdev.config import get_config
    from nbdev.test import test_nb
    ok, _ = test_nb(Path(path), skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    return not ok

def run_notebook(path):
    start, cmd = time.time(), [sys.executable, __file__, '--one', str(path)]
    proc = subprocess.Popen(cmd, cwd=NBS, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            errors='replace', start_new_session=True)
    try: text, _ = proc.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(proc.pid, 9); text = proc.communicate()[0] + f'\nstopped after {LIMIT} s'
    rc = proc.returncode
    return path, rc == 0, time.time()-start, text if rc in (0, 1) else f'{text}\nended with status {rc}'

def run_notebooks(names, workers):
    passed, failed, slow = 0, [], []
    with ThreadPoolExecutor(workers) as pool:
        for path, ok, secs, text in pool.map(run_notebook, notebooks(names)):
            name = path.relative_to(ROOT)
            print(f'{"ok" if ok else "FAILED":6} {secs:6.1f} s  {name}', flush=True)
            passed += ok
            if not ok: failed.append(str(name)); print(text[-6000:], flush=True)
            if secs > SLOW: slow.append(f'{name} ({secs:.0f} s)')
    if slow: print(f'over {SLOW} s (the aim for one notebook alone on 2 cores): ' + ', '.join(slow))
    return passed, failed

def run_pytest(files):
    "pytest in one process; `(passed, failed, skipped)` from its own report"
    with tempfile.TemporaryDirectory() as d:
        report = Path(d)/'report.xml'
        cmd = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '--continue-on-collection-errors', '--durations=8', '-o', 'faulthandler_timeout=600', f'--junitxml={report}', f'--basetemp={d}/tmp',
               '-o', 'junit_family=xunit1', *map(str, files)]
        proc = subprocess.Popen(cmd, cwd=ROOT, env={**environment(), 'MPLBACKEND': 'Agg'}, stdin=subprocess.DEVNULL, start_new_session=True)
        try: rc = proc.wait(PYTEST_LIMIT)
        except subprocess.TimeoutExpired: os.killpg(proc.pid, 9); return 0, [f'pytest was stopped after {PYTEST_LIMIT} s'], 0
        if not report.exists(): return 0, [f'pytest ended with status {rc} and no report'], 0
        cases = list(ET.parse(report).getroot().iter('testcase'))
    bad = [c for c in cases if c.find('failure') is not None or c.find('error') is not None]
    failed = [f'{c.get("classname") or c.get("file")}::{c.get("name")}' for c in bad]
    skipped = sum(c.find('skipped') is not None for c in cases if c not in bad)
    if rc not in (0, 5) and not failed: failed = [f'pytest ended with status {rc}']
    return len(cases) - len(bad) - skipped, failed, skipped

def untracked():
    r = subprocess.run(['git', 'ls-files', '-o', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    return set(r.stdout.splitlines())

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--one', help='used inside: run this notebook here'); p.add_argument('--workers', type=int, default=2)
    p.add_argument('--only', choices=['guards', 'notebooks', 'pytest'], help='one of the three parts')
    p.add_argument('names', nargs='*', help='notebooks, all if none is named')
    a = p.parse_args()
    if a.one: return test_one(a.one)
    start, before, peak = time.time(), untracked(), Peak()
    peak.start()
    guards = sorted((ROOT/'tests').glob('test_guards_*.py'))
    tests = [t for t in sorted((ROOT/'tests').glob('test_*.py')) if t not in guards]
    passed, failed, skipped = 0, [], 0
    for part in ('guards', 'notebooks', 'pytest') if not a.only else (a.only,):
        t = time.time()
        print(f'\n== {part}', flush=True)
        n, bad, skip = (*run_notebooks(a.names, a.workers), 0) if part == 'notebooks' else run_pytest(guards if part == 'guards' else tests)
        passed, failed, skipped = passed+n, failed+bad, skipped+skip
        print(f'== {part}: {n} passed, {len(bad)} failed, {skip} skipped, {time.time()-t:.0f} s', flush=True)
    left = sorted(untracked() - before)
    if left: failed.append('files left behind: ' + ', '.join(left[:10]))
    peak.stopped.set()
    if failed: print('\nfailed:', *failed, sep='\n  ')
    print(f'\ntime {time.time()-start:.0f} s, peak memory {peak.peak/2**30:.1f} GiB')
    print(f'{passed} passed, {len(failed)} failed' + (f', {skipped} skipped' if skipped else ''))
    return 1 if failed or not passed else 0

if __name__ == '__main__': sys.exit(main())
