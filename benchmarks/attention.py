"""Attention that is never written down, at the full size of the source: `make bench NAME=attention`.

One dual-stream block of LMV-Net with 3328 tokens of 1536 channels for each view (2048 x 1664 pixels at stride 32), one breast,
a forward pass as for a prediction, and a step of forward and backward: ours, and the same block with the same weights whose attention
matrices are written to memory. Each runs in a process of its own, in turn; memory is the growth of the process over its size before.
Before them one forward pass of the whole model, registration included, on pictures of that size. The seed is of the numbers that go in.
"""
import argparse, json, resource, statistics, subprocess, sys, threading, time
from pathlib import Path
import psutil, torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._common import Bench, cores
from mammo_nb.models.lmvnet import Attention, DualStreamBlock, LMVNet
from mammo_nb.registration.mammoregnet import MammoRegNet

TOKENS, DIM, HEADS, PICTURE = 3328, 1536, 4, (2048, 1664)

class Materialised(Attention):
    "The textbook: all weights, then all sums"
    def forward(self, x, y):
        k, v = self.kv(y).chunk(2, -1)
        q, k, v = map(self.split, (self.q(x), k, v))
        w = (q @ k.transpose(-1, -2)/q.shape[-1]**.5).softmax(-1)
        return self.out((w @ v).transpose(1, 2).flatten(2))

class Peak:
    "The largest growth of this process inside `with`, GiB, looked at every millisecond"
    def __enter__(self):
        self.me, self.on = psutil.Process(), True
        self.base = self.most = self.me.memory_info().rss
        self.thread = threading.Thread(target=self.watch); self.thread.start()
        return self
    def watch(self):
        while self.on: self.most = max(self.most, self.me.memory_info().rss); time.sleep(.001)
    def __exit__(self, *exc): self.on = False; self.thread.join(); self.gib = (max(self.most, self.me.memory_info().rss)-self.base)/2**30

def block_step(kind, seed):
    "Memory and seconds of a step, and of a forward pass as for a prediction"
    torch.manual_seed(seed)
    block = DualStreamBlock(DIM, HEADS, dropout=0., drop_path=0.)
    if kind == 'materialised':
        for name in ('self_mha', 'cross_mha'):
            m = Materialised(DIM, HEADS, 0.); m.load_state_dict(getattr(block, name).state_dict()); setattr(block, name, m)
    views, there = tuple(torch.randn(1, TOKENS, DIM, requires_grad=True) for _ in range(2)), (torch.ones(1),)*2
    for p in (*block.parameters(), *views): p.grad = torch.zeros_like(p)  # there in every step but the first
    def step():
        a, b = block(views, there)
        (a.square().mean()+b.square().mean()).backward()
        return a.detach()
    def forward():
        with torch.no_grad(): return block(views, there)[0]
    found = {}
    for name, f in (('forward', forward), ('step', step)):
        with Peak() as p: out = f()  # the first time: nothing is kept from an earlier one
        start = time.perf_counter(); f()
        found |= {f'{name}_gib': p.gib, f'{name}_seconds': time.perf_counter()-start}
    return found | dict(check=[float(v) for v in out[0, 0, :8]])

def whole(seed):
    "Memory of a forward pass of the whole model, and the peak of the process"
    torch.manual_seed(seed)
    net = LMVNet(registration=MammoRegNet(shrink=2)).eval()
    x = {f'{w}_image_{v}': torch.rand(1, 1, *PICTURE) for v in ('cc', 'mlo') for w in ('current', 'previous')} | dict(time_gap=torch.ones(1, 1))
    with torch.no_grad(), Peak() as p: start = time.perf_counter(); out = net(x)
    assert out['risk_multi'].shape == (1, 5) and bool(out['risk_multi'].isfinite().all())
    return dict(gib=p.gib, seconds=time.perf_counter()-start, process_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**30 if sys.platform == 'darwin' else 2**20))

def child(*args):
    out = subprocess.run([sys.executable, __file__, *map(str, args)], capture_output=True, text=True)
    if out.returncode: raise SystemExit(out.stderr)
    return json.loads(out.stdout.strip().splitlines()[-1])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seed', type=int, default=0, help='of the numbers that go in'); p.add_argument('--rounds', type=int, default=3); p.add_argument('--child', choices=('sdpa', 'materialised', 'whole'))
    a = p.parse_args()
    if a.child: return print(json.dumps(whole(a.seed) if a.child == 'whole' else block_step(a.child, a.seed)))
    bench = Bench('attention', a.seed, dict(tokens=TOKENS, dim=DIM, heads=HEADS, picture=PICTURE, rounds=a.rounds, threads=cores()), 'about 8 minutes')
    if not bench.done('lmvnet', 'process_gib'):
        full = child('--child', 'whole', '--seed', a.seed)
        for metric, k in (('forward_gib', 'gib'), ('forward_seconds', 'seconds'), ('process_gib', 'process_gib')): bench.add('lmvnet', metric, full[k], n=1)
    if bench.done('sdpa / materialised', 'time_ratio'): return print('  all rows are there already, for this commit and these settings')
    runs = [{k: child('--child', k, '--seed', a.seed) for k in ('sdpa', 'materialised')} for _ in range(a.rounds)]
    for r in runs: assert all(abs(x-y) < 1e-3 for x, y in zip(r['sdpa']['check'], r['materialised']['check'])), 'the two blocks disagree'
    for k in ('sdpa', 'materialised'):
        for m in ('forward_gib', 'forward_seconds', 'step_gib', 'step_seconds'): bench.add(k, m, statistics.median(r[k][m] for r in runs), n=len(runs))
    for metric, k in (('forward_memory_ratio', 'forward_gib'), ('forward_time_ratio', 'forward_seconds'), ('peak_memory_ratio', 'step_gib'), ('time_ratio', 'step_seconds')):
        each = [r['sdpa'][k]/r['materialised'][k] for r in runs]
        bench.add('sdpa / materialised', metric, statistics.median(each), min(each), max(each), n=len(each))

if __name__ == '__main__': main()
