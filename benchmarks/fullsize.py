"""One pair of mammograms at full size through BiDualNet: `make bench NAME=fullsize`.

Two images of 3000 x 1500 pixels, HRNet of width 48, one forward pass on the CPU. Measured are seconds and memory:

- `siamese`: the streams of both breasts share their weights, as in MommiNet-v2
- `separate`: each stream has weights of its own, and the maps are concatenated in the same way

Each measurement has a process of its own, in turn. `peak_gib` is the growth of the process during the pass,
`process_gib` its largest size, weights included. A value is the median of the rounds; the interval of a ratio is
its range over the rounds. The seed is that of images and weights.
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
from mammo_nb.models.bidual import BiDualNet

SIZE, SMALL = (3000, 1500), (64, 64)
KINDS = dict(siamese=True, separate=False) # whether the weights are shared

def random_pair(size, seed):
    "A main and a contralateral image"
    torch.manual_seed(seed)
    return dict(main=torch.rand(1, 1, *size), contralateral=torch.rand(1, 1, *size))

def measure(kind, seed):
    "Memory, seconds and number of weights of one pass"
    torch.manual_seed(seed)
    net = BiDualNet('hrnet_w48', shared=KINDS[kind]).eval()
    net.probability(random_pair(SMALL, seed)) # loads the libraries
    pair = random_pair(SIZE, seed)
    with Peak() as peak:
        start = time.perf_counter()
        out = net.probability(pair)
        seconds = time.perf_counter()-start
    assert out.shape == (1, 1, *SIZE)
    unit = GIB if sys.platform == 'darwin' else 2**20
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/unit
    weights = sum(p.numel() for p in net.parameters())/1e6
    return dict(seconds=seconds, peak_gib=peak.gib, process_gib=process, million_weights=weights)

def add_rows(bench, runs):
    "Add the rows; `runs`: a dict of kinds a round"
    metrics = list(runs[0]['siamese'])
    for kind in KINDS:
        for metric in metrics:
            values = [run[kind][metric] for run in runs]
            bench.add(kind, metric, statistics.median(values), n=len(runs))
    for metric in metrics:
        ratios = [run['siamese'][metric]/run['separate'][metric] for run in runs]
        bench.add('siamese / separate', f'{metric}_ratio', statistics.median(ratios),
                  min(ratios), max(ratios), n=len(ratios))

def main(argv=None):
    a = options(__doc__, argv, seed=(0, 'of images and weights'), rounds=3)
    config = dict(size=SIZE, encoder='hrnet_w48', rounds=a.rounds, threads=usable_cores())
    bench = Bench('fullsize', a.seed, config, 'about 5 minutes')
    if bench.finished('siamese / separate', 'million_weights_ratio'):
        return
    runs = []
    for _ in range(a.rounds):
        runs.append({kind: in_new_process(measure, kind, a.seed) for kind in KINDS})
    add_rows(bench, runs)

if __name__ == '__main__':
    main()
