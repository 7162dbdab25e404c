"""How fast is FROC with intervals? Against MONAI's curve in a loop over the resamples: `make bench NAME=froc SEED=0`.

Both sides start with the same boxes and scores of in-silico readings and end with recall at 0.5, 1 and 2 false
positives an image on each of the resamples of patients:

- `mammo_nb`: `evaluate_boxes`, one call: checks, matching and all resamples
- `monai`: `compute_fp_tp_probs` once for each image, then `compute_froc_curve_data` for each resample. A few
  resamples are measured and scaled up to all of them
- `monai / mammo_nb`: the ratio of the two times in the same run

With `continuous` all scores differ, as those of a network do. With `rounded` they have three decimals, which favours
MONAI: its time grows with the number of different scores. MONAI is needed for the comparison only.
"""
import sys
import time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import pandas as pd
from benchmarks._bench import Bench, options
from mammo_nb.core.seeding import rng_for
from mammo_nb.metrics.boxes import BoxMatching, detections_table
from mammo_nb.metrics.froc import FPPI, evaluate_boxes

SIZE, LESION = 256, 32 # pixels of a label image, and of a lesion
DECIMALS = dict(rounded=3, continuous=None)

def make_reading(n_images, n_boxes, decimals, seed):
    "Images (four a patient), findings in every third one, boxes and scores"
    rng = rng_for(seed, 'froc bench')
    k = np.arange(n_images)
    rows = pd.DataFrame(dict(patient_id=[f'p{i//4:05}' for i in k], image_id=[f'i{i:05}' for i in k]))
    corner = rng.uniform(0, SIZE-LESION, (n_images, n_boxes, 2)).round()
    scores = rng.normal(size=(n_images, n_boxes))
    lesion = k % 3 == 0
    found = lesion & (rng.random(n_images) < .9) # the first box lies on the lesion
    findings = rows[lesion].assign(**dict(zip(('xmin', 'ymin'), corner[lesion, 0].T)))
    findings = findings.assign(xmax=findings['xmin']+LESION, ymax=findings['ymin']+LESION)
    corner[lesion & ~found, 0] = (corner[lesion & ~found, 0]+SIZE/2) % (SIZE-LESION)
    scores[found, 0] += 3
    scores = 1/(1+np.exp(-scores))
    if decimals:
        scores = scores.round(decimals)
    corner = corner+.25+.001*np.arange(n_boxes)[:, None] # no box twice, no centre on a border
    return rows, findings, np.concatenate([corner, corner+LESION], 2), scores.astype(np.float32)

def monai_images(monai, rows, findings, boxes, scores):
    "Probabilities of false positives and of targets for each image, and the number of targets"
    lesions = findings.set_index('image_id')[['xmin', 'ymin']].astype(int)
    out = []
    for image_id, b, s in zip(rows['image_id'], boxes, scores):
        labels = np.zeros((SIZE, SIZE), dtype=int)
        if image_id in lesions.index:
            x, y = lesions.loc[image_id]
            labels[y:y+LESION, x:x+LESION] = 1
        x, y = (b[:, :2]+b[:, 2:]).T/2
        out.append(monai.compute_fp_tp_probs(s, y, x, labels))
    return out

def monai_recall(monai, images):
    "Recall of one resample"
    false, found, n_targets = zip(*images)
    curve = monai.compute_froc_curve_data(
        np.concatenate(false), np.concatenate(found), sum(n_targets), len(images))
    fppi, recall = (o[::-1] for o in curve)
    return np.interp(FPPI, fppi, recall)

def run_ours(rows, findings, boxes, scores, n_boot):
    start = time.perf_counter()
    p = detections_table(rows, boxes, scores, 'detector', 'probability', 'v')
    e = evaluate_boxes(p, findings, matching=BoxMatching('centre'), interpolate='linear', n_boot=n_boot)
    return e['value'].to_numpy()[:-1], time.perf_counter()-start

def run_monai(monai, rows, findings, boxes, scores, n_boot, n_measured, seed):
    "Recall on all images, and the seconds of all resamples estimated from a few"
    start = time.perf_counter()
    images = monai_images(monai, rows, findings, boxes, scores)
    matching = time.perf_counter()-start
    value = monai_recall(monai, images)
    rng = rng_for(seed, 'froc bench resamples')
    patients = [images[i:i+4] for i in range(0, len(images), 4)]
    start = time.perf_counter()
    for _ in range(n_measured):
        drawn = [one for i in rng.integers(len(patients), size=len(patients)) for one in patients[i]]
        monai_recall(monai, drawn)
    return value, matching+(time.perf_counter()-start)/n_measured*n_boot

def main(argv=None):
    a = options(__doc__, argv, images=5000, boxes=20, resamples=1000, measured=(3, 'resamples that MONAI computes'))
    import monai.metrics as monai
    config = dict(images=a.images, boxes=a.boxes, resamples=a.resamples, measured=a.measured)
    bench = Bench('froc', a.seed, config, 'two minutes')
    for name, decimals in DECIMALS.items():
        reading = make_reading(a.images, a.boxes, decimals, a.seed)
        ours, seconds = run_ours(*reading, a.resamples)
        theirs, other = run_monai(monai, *reading, a.resamples, a.measured, a.seed)
        difference = np.abs(ours-theirs).max()
        bench.add(f'monai / mammo_nb, {name}', 'seconds', other/seconds)
        bench.add(f'mammo_nb, {name}', 'seconds', seconds)
        bench.add(f'monai, {name}', 'seconds', other)
        bench.add(f'mammo_nb - monai, {name}', 'largest_difference', difference)

if __name__ == '__main__':
    main()
