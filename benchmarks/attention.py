"""Attention without a matrix of weights in memory, at the full size of the source: `make bench NAME=attention`.

Measured are LMV-Net's parts with 3328 tokens of 1536 channels a view (2048 x 1664 pixels at stride 32), for one
breast: the attention of one view to the other, and the whole dual-stream block (four attentions, two FFNs).
Each as a forward pass at inference and as a training step, forward and backward, without dropout.

- `sdpa`: ours. Attention weights are never written to memory, and inference goes in chunks of 512 rows.
- `sdpa_all_rows`: ours without the chunks; in a training step they are the same.
- `materialised`: the textbook with the same weights. Attention matrices are written to memory, one equation
  after the other for all tokens.
- `lmvnet`: one forward pass of the whole model, with a registration on images of half the size.

Each measurement has a process of its own, in turn. Memory is the growth of the process over its size before.
A value is the median of the rounds, its interval their range. `peak_memory_ratio` and `time_ratio` are those
of the block's forward pass; the names of the others say their part. The seed is that of the inputs.
"""
import resource
import statistics
import sys
import time
from pathlib import Path
import torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import GIB, Bench, options
from benchmarks._memory import Peak, in_new_process
from mammo_nb.core.monitor import usable_cores
from mammo_nb.models.attention import Attention
from mammo_nb.models.dual_stream import DualStreamBlock
from mammo_nb.models.lmvnet import LMVNet
from mammo_nb.registration.mammoregnet import MammoRegNet

TOKENS, DIM, HEADS = 3328, 1536, 4
SIZE = (2048, 1664)

# The textbook

class Materialised(Attention):
    "Attention with all weights in memory"
    def split(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, target, source):
        k, v = self.kv(source).chunk(2, -1)
        q, k, v = map(self.split, (self.q(target), k, v))
        weights = (q @ k.transpose(-1, -2)/q.shape[-1]**.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

class MaterialisedBlock(DualStreamBlock):
    "The equations of the block, one after the other, for all tokens"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.self_mha = Materialised(DIM, HEADS, 0.)
        self.cross_mha = Materialised(DIM, HEADS, 0.)

    def forward(self, views, present):
        out = []
        for i, (x, other, exists) in enumerate(zip(views, views[::-1], present[::-1])):
            found = self.self_mha(x, x) + self.cross_mha(x, other)*exists.view(-1, 1, 1)
            y = self.norm1[i](x + self.path(self.drop(found)))
            out.append(self.norm2[i](y + self.path(self.ffn[i](y))))
        return tuple(out)

# One measurement, in a process of its own

def new_block(kind, phase, seed):
    "The block of one variant, with the same weights for all variants"
    torch.manual_seed(seed)
    block = DualStreamBlock(DIM, HEADS, dropout=0., drop_path=0.)
    if kind == 'materialised':
        weights = block.state_dict()
        block = MaterialisedBlock(DIM, HEADS, dropout=0., drop_path=0.)
        block.load_state_dict(weights)
    # without dropout, training mode differs from inference by the chunks only
    return block.train(phase == 'step' or kind == 'sdpa_all_rows')

def random_tokens(n, seed):
    "Tokens of CC and MLO"
    torch.manual_seed(seed)
    return tuple(torch.randn(1, n, DIM, requires_grad=True) for _ in range(2))

def run_part(block, part, phase, views):
    "One forward pass, or one training step"
    with torch.set_grad_enabled(phase == 'step'):
        if part == 'block':
            out = block(views, (torch.ones(1), torch.ones(1)))
        else:
            out = (block.cross_mha(*views),)
    if phase == 'step':
        sum(o.square().mean() for o in out).backward()
    return [o.detach() for o in out]

def least_seconds(run, n):
    "The fastest of `n` runs"
    times = []
    for _ in range(n):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter()-start)
    return min(times)

def measure(kind, part, phase, seed):
    "Memory and seconds of one part in one phase, and some outputs for a check"
    block = new_block(kind, phase, seed)
    small, views = random_tokens(16, seed+2), random_tokens(TOKENS, seed+1)
    for p in (*block.parameters(), *views):
        p.grad = torch.zeros_like(p) # exists in every step but the first
    run_part(block, part, phase, small) # loads the libraries; nothing of the full size is kept
    with Peak() as peak:
        out = run_part(block, part, phase, views)
    n = 3 if part == 'attention' else 1
    seconds = least_seconds(lambda: run_part(block, part, phase, views), n)
    check = [float(v) for o in out for v in o[0, ::TOKENS//13, 5]]
    return dict(gib=peak.gib, seconds=seconds, check=check)

def measure_model(seed):
    "Memory and seconds of a forward pass of the whole model, and the peak of the process"
    torch.manual_seed(seed)
    net = LMVNet(registration=MammoRegNet(shrink=2)).eval()
    names = [f'{exam}_image_{view}' for view in ('cc', 'mlo') for exam in ('current', 'previous')]
    batch = {name: torch.rand(1, 1, *SIZE) for name in names} | dict(time_gap=torch.ones(1, 1))
    with torch.no_grad(), Peak() as peak:
        start = time.perf_counter()
        logits = net(batch)['logits_fused']
    seconds = time.perf_counter()-start
    assert logits.shape == (1, 5)
    assert logits.isfinite().all()
    unit = GIB if sys.platform == 'darwin' else 2**20
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/unit
    return dict(forward_gib=peak.gib, forward_seconds=seconds, process_gib=process)

# Rows

def check_outputs(run, part):
    "All variants compute the same"
    for found in run.values():
        for a, b in zip(found['check'], run['materialised']['check'], strict=True):
            assert abs(a-b) < 1e-3, f'{part}: the outputs differ'

def add_part(bench, part, phase, runs):
    "Add the rows of one part in one phase; `runs`: a dict of variants a round"
    kinds = list(runs[0])
    for kind in kinds:
        for metric in ('gib', 'seconds'):
            value = statistics.median(run[kind][metric] for run in runs)
            bench.add(kind, f'{part}_{phase}_{metric}', value, n=len(runs))
    for kind in kinds[:-1]:
        for name, metric in (('peak_memory_ratio', 'gib'), ('time_ratio', 'seconds')):
            ratios = [run[kind][metric]/run['materialised'][metric] for run in runs]
            bench.add(
                f'{kind} / materialised', prefix(part, phase)+name, statistics.median(ratios),
                min(ratios), max(ratios), n=len(ratios))

def prefix(part, phase):
    "Begin of the name of a ratio; none for the block's forward pass"
    return '' if (part, phase) == ('block', 'forward') else f'{part}_{phase}_'

def run_rounds(bench, part, phase, rounds, seed):
    "Measure all variants of one part in one phase, in turn"
    kinds = ['sdpa', 'sdpa_all_rows', 'materialised']
    if phase == 'step':
        kinds.remove('sdpa_all_rows')
    if bench.done(f'{kinds[-2]} / materialised', f'{prefix(part, phase)}time_ratio'):
        return
    runs = []
    for _ in range(rounds):
        run = {kind: in_new_process(measure, kind, part, phase, seed) for kind in kinds}
        check_outputs(run, part)
        runs.append(run)
    add_part(bench, part, phase, runs)

def main(argv=None):
    a = options(__doc__, argv, seed=(0, 'of the inputs'), rounds=3)
    config = dict(
        tokens=TOKENS, dim=DIM, heads=HEADS, picture=SIZE, rounds=a.rounds, threads=usable_cores(),
        registration=dict(shrink=2))
    bench = Bench('attention', a.seed, config, 'about 15 minutes')
    if not bench.done('lmvnet', 'process_gib'):
        for metric, value in in_new_process(measure_model, a.seed).items():
            bench.add('lmvnet', metric, value, n=1)
    for part in ('attention', 'block'):
        for phase in ('forward', 'step'):
            run_rounds(bench, part, phase, a.rounds, a.seed)

if __name__ == '__main__':
    main()
