"""How few steps draw as well as a thousand? On in-silico patients: `make bench NAME=sampling SEED=0`.

One LesionLDM, that of `lesion_ldm`, fills the same holes of test patients with three samplers, from the same noise.
Each job fills 16 holes with all of them and takes the time of each, one thread a job, so all run under the same load.

- `speed_ratio`: seconds of DDPM with 1000 steps by those of the other sampler; the mean over the jobs of its
  logarithm, with an interval from a bootstrap over jobs.
- `agreement_difference`: agreement of the drawings with what was asked (see `lesion_ldm`), minus that of DDPM, with an
  interval from a bootstrap over patients.
"""
import inspect
import sys
import time
from pathlib import Path
import numpy as np
import pandas as pd
import torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import options, tag
from benchmarks._lesions import (
    HEADS, agreement, ask_other, draw_part, gather, part_of, samples, start, trained
)
from benchmarks._trainings import load_tensors, run_jobs, save_tensors
from mammo_nb.core.seeding import rng_for
from mammo_nb.learners.lesion_verifier import check_verifier, measure_verifier
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.metrics.weighted import weighted_mean

SLOW = 'ddpm_1000'
SAMPLERS = dict(
    ddpm_1000=dict(steps=1000, scheduler='ddpm'), ddim_50=dict(steps=50, scheduler='ddim'),
    dpmsolver_20=dict(steps=20, scheduler='dpmsolver'))
GUIDANCE = 2.
BATCH = 16 # holes of a job

def time_samplers(model, inputs, seeds):
    "Drawings of each sampler, and its seconds"
    found = {}
    for name, sampler in SAMPLERS.items():
        begin = time.perf_counter()
        drawn = draw_part(model, inputs, seeds, sampler | dict(guidance=GUIDANCE))
        found |= {name: drawn, f'{name} seconds': torch.tensor(time.perf_counter()-begin)}
    return found

def draw_all(model, inputs):
    "Drawings of all samplers [N,1,S,S] and their seconds in each job [J]"
    jobs = []
    for numbers in torch.arange(len(inputs['mask'])).split(BATCH):
        jobs.append((time_samplers, model, part_of(inputs, numbers), numbers.tolist()))
    parts, joined = run_jobs(jobs), {}
    for name in SAMPLERS:
        joined[name] = torch.cat([part[name] for part in parts])
        joined[f'{name} seconds'] = torch.stack([part[f'{name} seconds'] for part in parts])
    return joined

def add_sampler(bench, name, seconds, n, table):
    "Time and agreement of one sampler"
    bench.add(name, 'seconds_per_patch', float(seconds.sum())/n, n=n)
    bench.add_estimate(name, 'attribute_agreement', bootstrap_ci(table, weighted_mean, columns=('value',)))

def add_ratio(bench, name, slow, fast):
    "How many times faster, over jobs"
    logs = np.log(slow.numpy()/fast.numpy())
    jobs = pd.DataFrame(dict(patient_id=[str(k) for k in range(len(logs))], value=logs))
    e = bootstrap_ci(jobs.assign(image_id=jobs.patient_id), weighted_mean, columns=('value',))
    bench.add(name, 'speed_ratio', *np.exp([e.value, e.low, e.high]), n=e.n)

def add_rows(bench, found, verifier, asked, rows):
    "All rows"
    tables = {name: agreement(verifier, found[name], asked, rows) for name in SAMPLERS}
    for name, table in tables.items():
        add_sampler(bench, name, found[f'{name} seconds'], len(rows), table)
    for name in SAMPLERS:
        if name == SLOW:
            continue
        pair = f'{name} / {SLOW}'
        add_ratio(bench, pair, found[f'{SLOW} seconds'], found[f'{name} seconds'])
        e = paired_difference([tables[name]], [tables[SLOW]], weighted_mean, columns=('value',))
        bench.add_estimate(pair, 'agreement_difference', e)

def main(argv=None):
    a = options(__doc__, argv, patients=700, train_seed=0, holes=(64, 'of test patients'))
    bench = start('sampling', a, 'about 10 minutes on 2 cores, after lesion_ldm', samplers=SAMPLERS, holes=a.holes)
    if bench.finished(f'{list(SAMPLERS)[-1]} / {SLOW}', 'agreement_difference'):
        return
    prepared, rows, folder, (model, verifier, _) = trained(a)
    tested = samples(prepared, rows[rows.split == 'test'])
    check_verifier(measure_verifier(verifier, tested), heads=HEADS)
    mixed = tested.rows.iloc[rng_for(a.seed, 'holes').permutation(len(tested))] # masses and healthy tissue
    chosen = mixed.drop_duplicates('patient_id')[:a.holes]
    wanted = samples(prepared, ask_other(chosen, a.seed))
    asked, _ = gather(wanted)
    recipe = tag(SAMPLERS, GUIDANCE, BATCH, a.seed, a.holes, inspect.getsource(time_samplers))
    path = folder/f'samplers_{a.train_seed}_{recipe}.pt'
    if not path.exists():
        save_tensors(draw_all(model, asked), path)
    add_rows(bench, load_tensors(path), verifier, asked, wanted.rows)

if __name__ == '__main__':
    main()
