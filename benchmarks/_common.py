"""What all benchmarks share: one row format, what the machine is in words, rows that are kept when a run is stopped.

A benchmark is a script `benchmarks/<name>.py` with `--seed N`; it prints what it will cost before it begins and appends its
rows to `benchmarks/results/<name>.csv`, each as soon as it is known. Asked again, it leaves out the rows that are there
already for the same seed, configuration and commit.
"""
import argparse, csv, datetime, hashlib, json, os, platform, resource, subprocess, sys, time
from pathlib import Path

COLUMNS = ('bench', 'variant', 'metric', 'value', 'ci_low', 'ci_high', 'n', 'data_seed', 'train_seeds', 'config', 'seconds', 'peak_gib', 'machine', 'commit', 'date')
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT/'benchmarks'/'results'

def options(doc,
    **defaults # option -> its default, or (default, help); a list takes several
):
    "The command line of a benchmark: `--seed` of the patients, and whole numbers"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k, v in dict(seed=(0, 'of the patients'), **defaults).items():
        v, text = v if isinstance(v, tuple) else (v, None)
        p.add_argument(f'--{k.replace("_", "-")}', type=int, default=v, help=text, **(dict(nargs='+') if isinstance(v, list) else {}))
    return p.parse_args()

def cores():
    "Cores this process may use"
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1

def machine(gpu=None):
    "The machine in words: cores, processor, memory, GPU; never a name"
    info = Path('/proc/cpuinfo')
    models = [l.split(':', 1)[1].strip() for l in info.read_text().splitlines() if l.startswith('model name')] if info.exists() else []
    model = models[0] if models and models[0].lower() != 'unknown' else platform.machine()
    memory = f', {os.sysconf("SC_PAGE_SIZE")*os.sysconf("SC_PHYS_PAGES")/2**30:.0f} GiB memory' if hasattr(os, 'sysconf') else ''
    return f'{cores()} cores ({model}){memory}, {gpu or "no GPU used"}'

def commit():
    "Short hash of the commit; `+` after it where the working tree has other changes than results; `unknown` outside git"
    def git(*a): return subprocess.run(['git', *a], cwd=ROOT, capture_output=True, text=True)
    head = git('rev-parse', '--short=12', 'HEAD')
    if head.returncode: return 'unknown'
    changed = [l for l in git('status', '--porcelain', '--untracked-files=no').stdout.splitlines() if 'benchmarks/results/' not in l]
    return head.stdout.strip() + ('+' if changed else '')

def tag(*recipe):
    "8 hex digits for settings: part of the name of what was made with them, so that it is never taken for something else"
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:8]

def peak_gib():
    "Largest resident memory so far of this process, or of a child that has ended, GiB"
    unit = 2**30 if sys.platform == 'darwin' else 2**20
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))/unit

class Load:
    "How much of a core other programs took inside `with`: `others`, a number of cores (0 where the system does not tell)"
    def __enter__(self):
        self.before = self._look()
        return self

    def __exit__(self, *exc):
        (t0, all0, own0), (t1, all1, own1) = self.before, self._look()
        self.seconds = t1-t0
        self.others = max(0., (all1-all0) - (own1-own0))/self.seconds

    def _look(self):
        import psutil
        me, c = psutil.Process(), psutil.cpu_times()
        family = [me, *me.children(recursive=True)]
        own = sum(sum(p.cpu_times()[:4] if p is me else p.cpu_times()[:2]) for p in family)
        return time.perf_counter(), c.user + c.system + sum(getattr(c, k, 0) for k in ('nice', 'irq', 'softirq', 'steal')), own

class Bench:
    "The rows of one run of a benchmark"
    def __init__(self, name, data_seed, config, cost, train_seeds=(), gpu=None, results=RESULTS):
        self.path, self.start = Path(results)/f'{name}.csv', time.time()
        self.fixed = dict(bench=name, data_seed=str(data_seed), train_seeds=' '.join(map(str, train_seeds)), config=json.dumps(config, sort_keys=True),
                          machine=machine(gpu), commit=commit(), date=datetime.datetime.now(datetime.timezone.utc).date().isoformat())
        print(f'{name}, seed {data_seed}: {cost}', flush=True)

    def rows(self):
        "All rows of the file, as texts"
        if not self.path.exists(): return []
        with self.path.open(newline='') as f: return list(csv.DictReader(f))

    def done(self, variant, metric):
        "Whether this row is there for the same seeds, configuration and (clean) commit"
        same = ('bench', 'data_seed', 'train_seeds', 'config', 'commit')
        return not self.fixed['commit'].endswith('+') and any(r['variant'] == variant and r['metric'] == metric and all(r[k] == self.fixed[k] for k in same) for r in self.rows())

    def add(self, variant, metric, value, ci_low='', ci_high='', n='', seconds=None):
        "Append a row, now; not one that is there already"
        if self.done(variant, metric): return
        number = lambda v: v if v == '' else f'{float(v):.6g}'
        row = dict(self.fixed, variant=variant, metric=metric, value=number(value), ci_low=number(ci_low), ci_high=number(ci_high), n=n,
                   seconds=f'{time.time()-self.start if seconds is None else seconds:.1f}', peak_gib=f'{peak_gib():.2f}')
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open('a', newline='') as f:
            w = csv.DictWriter(f, COLUMNS, lineterminator='\n')
            if new: w.writeheader()
            w.writerow(row)
        shown = row['value'] if ci_low == '' else f'{row["value"]} [{row["ci_low"]}, {row["ci_high"]}]'
        print(f'  {variant}: {metric} = {shown} (n = {n})', flush=True)
