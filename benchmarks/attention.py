"""Attention that is never written down, at the full size of the source: `make bench NAME=attention`.

LMV-Net with 3328 tokens of 1536 channels for each view (2048 x 1664 pixels at stride 32), one breast: one attention of one view to the
other, and the whole dual-stream block (four attentions, two FFNs), each as a forward pass for a prediction and as a training step of
forward and backward without dropout. `sdpa` is ours: attention whose weights are never written to memory, and a prediction in pieces of
512 rows. `sdpa_all_rows` is ours without the pieces (in a training step they are the same). `materialised` is the textbook, with the same
weights: attention matrices written to memory, one equation after the other for all tokens. Each runs
in a process of its own, in turn; memory is the growth of the process over its size before. A value is the median of the rounds, its
interval the least and the greatest of them. `peak_memory_ratio` and `time_ratio` are those
of the block's forward pass; the others say what they are of. Before them one forward pass of the whole model, with a registration that
works on pictures of half the size, on pictures of that size. The seed is of the numbers that go in.
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

class MaterialisedBlock(DualStreamBlock):
    "The equations of the block as they stand, one after the other, for all tokens"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.self_mha, self.cross_mha = (Materialised(DIM, HEADS, 0.) for _ in range(2))

    def forward(self, views, there):
        out = []
        for i, (x, other, seen) in enumerate(zip(views, views[::-1], there[::-1])):
            a = self.self_mha(x, x) + self.cross_mha(x, other)*seen.view(-1, 1, 1)
            y = self.norm1[i](x + self.path(self.drop(a)))
            out.append(self.norm2[i](y + self.path(self.ffn[i](y))))
        return tuple(out)

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

def measure(kind, part, phase, seed):
    "Memory and seconds of one part in one phase"
    torch.manual_seed(seed)
    block = DualStreamBlock(DIM, HEADS, dropout=0., drop_path=0.)
    if kind == 'materialised': weights, block = block.state_dict(), MaterialisedBlock(DIM, HEADS, dropout=0., drop_path=0.); block.load_state_dict(weights); del weights
    block.train(phase == 'step' or kind == 'sdpa_all_rows') # without dropout there is no other difference than the pieces
    def tokens(n, seed): torch.manual_seed(seed); return tuple(torch.randn(1, n, DIM, requires_grad=True) for _ in range(2))
    def forward(views): return block(views, (torch.ones(1),)*2) if part == 'block' else (block.cross_mha(*views),)
    def run(views):
        with torch.set_grad_enabled(phase == 'step'): out = forward(views)
        if phase == 'step': sum(o.square().mean() for o in out).backward()
        return [o.detach() for o in out]
    small, views = tokens(16, seed+2), tokens(TOKENS, seed+1)
    for p in (*block.parameters(), *views): p.grad = torch.zeros_like(p)  # there in every step but the first
    run(small)  # the libraries are loaded; nothing of the size in question is kept
    with Peak() as p: out = run(views)
    times = []
    for _ in range(3 if part == 'attention' else 1): start = time.perf_counter(); run(views); times.append(time.perf_counter()-start)
    return dict(gib=p.gib, seconds=min(times), check=[float(v) for o in out for v in o[0, ::TOKENS//13, 5]])

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
    p.add_argument('--seed', type=int, default=0, help='of the numbers that go in'); p.add_argument('--rounds', type=int, default=3); p.add_argument('--child', nargs='+', help='one measurement, for the parent')
    a = p.parse_args()
    if a.child: return print(json.dumps(whole(a.seed) if a.child == ['whole'] else measure(*a.child, a.seed)))
    bench = Bench('attention', a.seed, dict(tokens=TOKENS, dim=DIM, heads=HEADS, picture=PICTURE, rounds=a.rounds, threads=cores(), registration=dict(shrink=2)), 'about 15 minutes')
    if not bench.done('lmvnet', 'process_gib'):
        full = child('--seed', a.seed, '--child', 'whole')
        for metric, k in (('forward_gib', 'gib'), ('forward_seconds', 'seconds'), ('process_gib', 'process_gib')): bench.add('lmvnet', metric, full[k], n=1)
    for part in ('attention', 'block'):
        for phase in ('forward', 'step'):
            kinds = ('sdpa', 'materialised') if phase == 'step' else ('sdpa', 'sdpa_all_rows', 'materialised')
            name = '' if (part, phase) == ('block', 'forward') else f'{part}_{phase}_'
            if bench.done(f'{kinds[-2]} / materialised', f'{name}time_ratio'): continue
            runs = [{k: child('--seed', a.seed, '--child', k, part, phase) for k in kinds} for _ in range(a.rounds)]
            for r in runs: assert all(abs(x-y) < 1e-3 for k in kinds for x, y in zip(r[k]['check'], r['materialised']['check'], strict=True)), f'{part}: they disagree'
            for k in kinds:
                for m in ('gib', 'seconds'): bench.add(k, f'{part}_{phase}_{m}', statistics.median(r[k][m] for r in runs), n=len(runs))
            for k in kinds[:-1]:
                for metric, m in (('peak_memory_ratio', 'gib'), ('time_ratio', 'seconds')):
                    each = [r[k][m]/r['materialised'][m] for r in runs]
                    bench.add(f'{k} / materialised', name+metric, statistics.median(each), min(each), max(each), n=len(each))

if __name__ == '__main__': main()
