"""Does the risk rise as a drawn lesion grows? On in-silico patients: `make bench NAME=lesion_evolution SEED=0`.

LesionLDM draws masses of growing size into both views of healthy breasts of test patients, and LMV-Net, which saw
neither these patients nor a drawing, reads each breast with its prior exam. LesionLDM is that of `lesion_ldm`, LMV-Net
one training of `lmvnet`; both keep their weights. The patients are test patients in both cohorts.

First healthy tissue is drawn into the largest hole: this is size 0. Then a mass is drawn at the same place from the
same noise, in holes of growing size. `control` is the same with healthy tissue instead of the mass, so it shows what
the hole alone does to the risk.

- `rank_correlation`: Spearman's correlation of the size and the risk within five years along a series; the mean over
  patients.
- `risk_change`: the risk at the largest size minus that at size 0. Of `control` it is 0: its largest hole is filled
  with the same tissue as the first one.

Lesions are drawn into images of 256 x 192 pixels, and what was changed is moved to the grid of the 192 x 144 pixels
that LMV-Net reads. Intervals are from a
bootstrap over patients, of one training of each network.
"""
import sys
from math import ceil
from pathlib import Path
import numpy as np
import torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import lmvnet
from benchmarks._bench import options
from benchmarks._lesions import SIZE, start, trained
from benchmarks._trainings import load_tensors, prepare_insilico, run_jobs
from benchmarks.registration import insilico_patients, trained_network
from mammo_nb.core.geometry import map_points
from mammo_nb.core.seeding import rng_for
from mammo_nb.learners.lesion_evolution import (
    HEALTHY, draw_series, rank_correlation, risk_change, score_series, size_factors
)
from mammo_nb.preparation.resampling import resample
from mammo_nb.registration.instance_optimisation import InstanceOptimised
from mammo_nb.samples.lesion_synthesis import place_box
from mammo_nb.samples.risk import breast_history

SIZES = (0., 6., 9., 12., 15., 18.) # longer side of the box, mm
BREASTS = 40
ASKED = dict(birads='5') # beside the mass itself
SAMPLING = dict(num_inference_steps=20, guidance_scale=2.)

# Risk

def risk_network(a):
    "Prepared patients with two exams, their last exams, LMV-Net and the registration, each trained once"
    prepared, base = insilico_patients(a.patients, a.seed)
    rows = breast_history(prepared.cohort, current='last')
    known = rows.query('split != "test"').reset_index(drop=True)
    folder = lmvnet.results_folder(base, a)/'evolution'
    folder.mkdir(parents=True, exist_ok=True)
    data = prepared, known
    run_jobs([
        (lmvnet.trained_model, 'current_exam', 0, data, None, a.first_epochs, folder),
        (lmvnet.align, [data], base, a.registration_epochs, folder)])
    torch.set_num_threads(2)
    flows = load_tensors(folder/'flows.pt')
    model = lmvnet.trained_model('lmvnet', 0, data, flows, a.epochs, folder)
    net = trained_network(prepared, base, a.registration_epochs)
    return prepared, rows, model, InstanceOptimised(net, **lmvnet.REFINE)

def healthy_breasts(rows, learnt):
    "One breast a patient: without a cancer, with both views and a prior, of patients from whom nothing was learnt"
    complete = rows.filter(like='image_id').notna().all(axis=1)
    keep = (rows.split == 'test') & rows.years_to_cancer.isna() & complete & ~rows.patient_id.isin(learnt)
    return rows[keep].drop_duplicates('patient_id')[:BREASTS].reset_index(drop=True)

# Drawing

def to_grid(change, finer, coarser):
    "[K,1,h,w] a change of one preparation of an image, on the grid of a coarser one"
    affine = finer.affine @ coarser.affine.inverse
    h, w = coarser.mask.shape
    diagonal = np.arange(max(h, w))+.5
    rows, cols = map_points(affine, np.stack([diagonal, diagonal], 1)).T
    factor = finer.scale/coarser.scale
    moved = [resample(one[0].numpy(), rows[:h], cols[:w], factor) for one in change]
    return torch.from_numpy(np.stack(moved))[:, None]

def draw_one(model, finer, coarser, image_id, seed, attributes):
    "One series of an image [K,1,192,144]"
    width = ceil(max(SIZES)/finer.spacing_mm)
    box = place_box(finer.mask, (width, width), rng_for(seed, 'place', image_id))
    factors = size_factors(box, SIZES, finer.spacing_mm)
    images = draw_series(model, finer, box, factors, seed, fill=True, options=SAMPLING, **attributes)
    change = to_grid(images-torch.from_numpy(finer.image), finer, coarser)
    return (torch.from_numpy(coarser.image)+change).clamp(0, 1)

def draw_all(model, finer, coarser, ids, seed, attributes):
    "Image id -> series"
    drawn = run_jobs([
        (draw_one, model, finer.load(i), coarser.load(i), i, seed, attributes) for i in ids])
    return dict(zip(ids, drawn))

# The run

def add_rows(bench, tables):
    "All rows"
    names = dict(rank_correlation='growing_lesion', control='control', difference='growing_lesion - control')
    for row in rank_correlation(tables['growing_lesion'], tables['control']).itertuples():
        bench.add(names[row.metric], 'rank_correlation', row.value, row.ci_low, row.ci_high, n=row.n)
    for name, table in tables.items():
        for row in risk_change(table).itertuples():
            bench.add(name, f'risk_{row.metric}', row.value, row.ci_low, row.ci_high, n=row.n)

def main(argv=None):
    a = options(__doc__, argv, patients=700, train_seed=0, risk_patients=1200)
    bench = start('lesion_evolution', a, 'about 45 minutes on 2 cores, after lesion_ldm', sizes_mm=SIZES,
                  breasts=BREASTS, asked=ASKED, drawn_with=SAMPLING, risk_patients=a.risk_patients)
    if bench.finished('growing_lesion - control', 'rank_correlation'):
        return
    _, known, _, (model, _, _) = trained(a)
    own = lmvnet.parse(['--seed', str(a.seed), '--patients', str(a.risk_patients)])
    prepared, rows, risk, registration = risk_network(own)
    chosen = healthy_breasts(rows, known[known.split != 'test'].patient_id)
    cohort = prepared.cohort.select(lambda t: t.patient_id.isin(chosen.patient_id))
    finer, _ = prepare_insilico(cohort, f'evolution_{a.risk_patients}', SIZE)
    ids = [*chosen.image_id_cc, *chosen.image_id_mlo]
    tables = {}
    for name, asked in dict(growing_lesion=ASKED, control=HEALTHY).items():
        series = draw_all(model, finer, prepared, ids, a.seed, asked)
        tables[name] = score_series(risk, prepared, chosen, series, SIZES, registration=registration)
    add_rows(bench, tables)

if __name__ == '__main__':
    main()
