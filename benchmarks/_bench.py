"""Command line, machine, commit and rows of results: what every benchmark shares.

A benchmark is a script `benchmarks/<name>.py` with the option `--seed`. It prints its cost first and
writes each row to `benchmarks/results/<name>.csv` as soon as it is known. A second run for the same seeds,
configuration and commit leaves out the rows that exist.
"""
import argparse
import csv
import datetime
import hashlib
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
import psutil
from mammo_nb.core.files import atomic_path
from mammo_nb.core.monitor import usable_cores

COLUMNS = (
    'bench', 'variant', 'metric', 'value', 'ci_low', 'ci_high', 'n', 'data_seed', 'train_seeds',
    'config', 'seconds', 'peak_gib', 'machine', 'commit', 'date')
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT/'benchmarks'/'results'
GIB = 2**30

# The run

def options(
    doc, # shown by `--help`
    argv=None, # arguments; `None`: those of the command
    **defaults # option -> default, or (default, help); a list takes several values
):
    "Parse the command line of a benchmark: `--seed` and other whole numbers"
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = dict(seed=(0, 'of the data')) | defaults
    for name, default in defaults.items():
        text = None
        if isinstance(default, tuple):
            default, text = default
        several = dict(nargs='+') if isinstance(default, list) else {}
        flag = '--' + name.replace('_', '-')
        parser.add_argument(flag, type=int, default=default, help=text, **several)
    return parser.parse_args(argv)

def check_test_patients(name, patients, test_of):
    "Stop unless patients remain to test on"
    if test_of <= patients:
        raise SystemExit(f'{name}: --test-of {test_of}, expected more than --patients {patients}')

def tag(*recipe):
    "Eight hex digits of a recipe, for the names of files made with it"
    text = json.dumps(recipe, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]

# The machine

def _processor():
    "The name of the processor"
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    if names and names[0].lower() != 'unknown':
        return names[0]
    return platform.machine()

def machine():
    "Describe the machine by cores, processor and memory; never by its name"
    memory = psutil.virtual_memory().total/GIB
    return f'{usable_cores()} cores ({_processor()}), {memory:.0f} GiB memory, no GPU used'

def _git(*args):
    return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True)

def commit():
    "Short hash of the commit; `+` after it if tracked files other than results differ from it"
    head = _git('rev-parse', '--short=12', 'HEAD')
    if head.returncode:
        return 'unknown'
    status = _git('status', '--porcelain', '--untracked-files=no').stdout.splitlines()
    changed = any('benchmarks/results/' not in line for line in status)
    return head.stdout.strip() + ('+' if changed else '')

def peak_gib():
    "Largest resident memory so far of this process, or of a child that has ended, GiB"
    unit = GIB if sys.platform == 'darwin' else 2**20
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(w).ru_maxrss for w in processes)/unit

class Load:
    "Cores that other programs used inside the `with` block, as `others`, and the `seconds` of the block"
    def __enter__(self):
        self.before = self._measure()
        return self

    def __exit__(self, *exc):
        clock, total, own = (b-a for a, b in zip(self.before, self._measure()))
        self.seconds = clock
        self.others = max(0., total-own)/clock

    def _measure(self):
        "Wall clock, CPU seconds of the machine, CPU seconds of this process and its children"
        me = psutil.Process()
        own = sum(me.cpu_times()[:4])
        for child in me.children(recursive=True):
            own += sum(child.cpu_times()[:2])
        times = psutil.cpu_times()
        kinds = ('user', 'system', 'nice', 'irq', 'softirq', 'steal')
        total = sum(getattr(times, kind, 0) for kind in kinds)
        return time.perf_counter(), total, own

# The rows

def _number(value):
    return value if value == '' else f'{float(value):.6g}'

class Bench:
    "The rows of one run of a benchmark"
    def __init__(self,
        name, # of the benchmark and of its file
        data_seed, # of the data
        config, # all settings that a row depends on
        cost, # in words, printed first
        train_seeds=(), # of the trainings
        results=None # folder; `None`: `RESULTS`
    ):
        self.path = Path(results or RESULTS)/f'{name}.csv'
        self.start = time.time()
        self.run = dict(
            bench=name, data_seed=str(data_seed), train_seeds=' '.join(map(str, train_seeds)),
            config=json.dumps(config, sort_keys=True), machine=machine(), commit=commit(),
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat())
        print(f'{name}, seed {data_seed}: {cost}', flush=True)

    def rows(self):
        "Read all rows of the file, as texts"
        if not self.path.exists():
            return []
        with self.path.open(newline='') as f:
            return list(csv.DictReader(f))

    def done(self, variant, metric):
        "Whether this row exists for the same seeds, configuration and clean commit"
        if self.run['commit'].endswith('+'):
            return False
        same = ('bench', 'data_seed', 'train_seeds', 'config', 'commit')
        wanted = {k: self.run[k] for k in same} | dict(variant=variant, metric=metric)
        return any(wanted.items() <= row.items() for row in self.rows())

    def finished(self, variant, metric):
        "Whether the last row of a run exists; prints so"
        done = self.done(variant, metric)
        if done:
            print('  all rows exist for this commit and these settings')
        return done

    def add(self, variant, metric, value, ci_low='', ci_high='', n='', seconds=None):
        "Write a row, in place of an older one of the same variant, metric and data seed"
        if self.done(variant, metric):
            return
        seconds = time.time()-self.start if seconds is None else seconds
        row = dict(
            self.run, variant=variant, metric=metric, value=_number(value),
            ci_low=_number(ci_low), ci_high=_number(ci_high), n=str(n),
            seconds=f'{seconds:.1f}', peak_gib=f'{peak_gib():.2f}')
        self._replace(row)
        interval = '' if ci_low == '' else f' [{row["ci_low"]}, {row["ci_high"]}]'
        print(f'  {variant}: {metric} = {row["value"]}{interval} (n = {n})', flush=True)

    def add_estimate(self, variant, metric, estimate):
        "Write the row of an `Estimate`; nothing for `None`"
        if estimate is None:
            return
        self.add(variant, metric, estimate.value, estimate.low, estimate.high, n=estimate.n)

    def _replace(self, row):
        "Put a row at the place of the older one, or at the end, and write the file whole"
        def key(r): return r['variant'], r['metric'], r['data_seed']
        rows = self.rows()
        older = [i for i, r in enumerate(rows) if key(r) == key(row)]
        rows = [r for r in rows if key(r) != key(row)]
        rows.insert(older[0] if older else len(rows), row)
        with atomic_path(self.path) as part, part.open('w', newline='') as f:
            writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)
