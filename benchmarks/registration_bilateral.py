"""Alignment of the other breast: mirrored, and by the contour, on in-silico patients with known places: `make bench NAME=registration_bilateral SEED=0`.

Each patient of `insilico-v1` has four images. The left image of each view is the main one and is paired
with the right one. Both breasts have one shape at rest and 85 % of their tissue clusters in mirror places;
each image is positioned by a smooth displacement of its own. The place in the right image that corresponds
to a pixel of the left one is therefore known: through the breast at rest, and mirrored
(`true_bilateral_flow`). `tre_mm` is the mean distance to that place, with all pixels of the left breast as
landmarks, those of the pectoral muscle too, whose true place lies inside of the right image.

- `identity`: the right image as it was taken, chest wall at the right. `flip`: mirrored.
- `contour`: mirrored, then warped by `bilateral_flows` as MommiNet-v2 does: the contours of both breasts, and
  the nipples found on them, no manual ones. The flow is that of the library, on every fourth pixel in half
  precision. Pairs with a poor contour keep the mirrored image and are counted; `aligned_percent` is the
  share of the others.
- `contour_without_nipples`: without the nipples. `contour_true_nipples`: with the true ones.
- `nipple`: distance in mm of the nipples found on the contour from the true ones, in all four images.
- Variants with `, CC` and `, MLO` contain the images of one view.

What this does not measure: in-silico breasts are mirror images at rest, those of real women are not. So
`flip` is nearer here than it would be on real images. In-silico images also show no nipple: only
the shape of the breast and the view tell where it lies, and in MLO the true one is the most lateral point.

Nothing is trained and no setting was chosen on these patients: those of the search for nipples were fitted
to real films. Intervals are from a bootstrap over patients.
"""
import sys
from pathlib import Path
import pandas as pd
import torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._bench import Bench, options
from benchmarks._trainings import prepare_insilico
from mammo_nb.insilico.config import InSilicoConfig, settings_name
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.insilico.prepared_truth import in_field_of_view
from mammo_nb.learners.registration import mean_over_pairs
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.registration.contour import bilateral_flows, true_bilateral_flow
from mammo_nb.registration.error import flow_error
from mammo_nb.registration.flow import resize_flow
from mammo_nb.registration.nipple import nipple_error, nipple_table

SIZE = (192, 144)
NO_NIPPLE = 2. # a confidence that no nipple has
DIFFERENCES = (
    ('flip', 'identity'), ('contour', 'flip'), ('contour', 'contour_without_nipples'),
    ('contour_true_nipples', 'contour'))

# Pairs and flows

def left_right_pairs(cohort):
    "One row a patient and view: the left image and the right one"
    columns = ['patient_id', 'exam_id', 'view', 'image_id']
    images = cohort.images
    left, right = (images[images.laterality == side][columns] for side in 'LR')
    key = columns[:3]
    return left.merge(right, on=key, suffixes=('', '_contralateral'), validate='one_to_one')

def mirror_back(flow):
    "The flow [1,2,H,W] between the images before the right one was mirrored"
    columns = torch.arange(flow.shape[-1])
    found = columns+flow[:, 1]
    unmirrored = flow.shape[-1]-1-found-columns
    return torch.stack([flow[:, 0], unmirrored], 1)

def all_flows(prepared, pairs, nipples):
    "Variant -> flows of the pairs, by the library"
    def align(table, least_confidence=.4):
        return bilateral_flows(prepared, pairs, table, least_confidence, progress=False)
    return dict(
        contour=align(nipples),
        contour_without_nipples=align(nipples, NO_NIPPLE),
        contour_true_nipples=align(nipple_table(prepared, progress=False)))

# Errors

def error_mm(prepared, main, flow, true):
    "Mean error of a flow [1,2,h,w] over the breast of the main image, mm"
    p = prepared.load(main)
    inside = in_field_of_view(true[0].numpy(), p.mask)
    flow = resize_flow(flow.float(), p.mask.shape)
    return float(flow_error(flow, true, p.spacing_mm, torch.from_numpy(inside)[None]))

def pair_errors(prepared, pair, flows):
    "Variant -> error of one pair, mm"
    true = true_bilateral_flow(prepared, *pair)
    nothing = torch.zeros_like(true)
    errors = dict(
        identity=error_mm(prepared, pair[0], mirror_back(nothing), true),
        flip=error_mm(prepared, pair[0], nothing, true))
    for variant, found in flows.items():
        errors[variant] = error_mm(prepared, pair[0], found[pair][None], true)
    return errors

def error_table(prepared, pairs, flows):
    "The pairs with the error of each variant, mm"
    both = zip(pairs.image_id, pairs.image_id_contralateral)
    rows = [pair_errors(prepared, pair, flows) for pair in both]
    return pairs.join(pd.DataFrame(rows))

def nipple_errors(prepared, nipples):
    "Error of the nipples of all images, mm"
    images = prepared.cohort.images[['image_id', 'patient_id', 'view']]
    return nipple_error(nipples, prepared).merge(images, on='image_id', validate='one_to_one')

# Rows

def with_value(table, column):
    "A table with the column as `value`"
    return table.assign(value=table[column])

def add_mean(bench, variant, metric, table, column):
    "Add a mean, over all images and over those of each view"
    parts = {variant: table} | {f'{variant}, {view}': t for view, t in table.groupby('view')}
    for name, part in parts.items():
        estimate = bootstrap_ci(with_value(part, column), mean_over_pairs, columns=('value',))
        bench.add_estimate(name, metric, estimate)

def add_difference(bench, a, b, table):
    "Add the difference of two variants, over all pairs and over those of each view"
    parts = {'': table} | {f', {view}': t for view, t in table.groupby('view')}
    for end, part in parts.items():
        tables = (with_value(part, variant) for variant in (a, b))
        estimate = paired_difference(*tables, mean_over_pairs, columns=('value',))
        bench.add_estimate(f'{a} - {b}{end}', 'tre_mm', estimate)

def add_rows(bench, errors, flows, nipples):
    "Add all rows"
    for variant in ('identity', 'flip', *flows):
        add_mean(bench, variant, 'tre_mm', errors, variant)
    aligned = errors.merge(flows['contour'].table, on=['image_id', 'image_id_contralateral'])
    aligned['percent'] = 100.*aligned.aligned
    add_mean(bench, 'contour', 'aligned_percent', aligned, 'percent')
    add_mean(bench, 'nipple', 'error_mm', nipples, 'error_mm')
    for pair in DIFFERENCES:
        add_difference(bench, *pair, errors)

# The run

def main(argv=None):
    a = options(__doc__, argv, patients=300)
    settings = settings_name(InSilicoConfig(seed=a.seed, exams=1))
    config = dict(cohort=settings, patients=a.patients, size=SIZE)
    cost = f'about {round(1+a.patients/75)} minutes on 2 cores, most of it to draw the patients'
    bench = Bench('registration_bilateral', a.seed, config, cost)
    if bench.finished(f'{DIFFERENCES[-1][0]} - {DIFFERENCES[-1][1]}, MLO', 'tre_mm'):
        return
    cohort = insilico_cohort(a.patients, a.seed, exams=1)
    prepared, _ = prepare_insilico(cohort, f'{a.patients}', SIZE)
    pairs = left_right_pairs(prepared.cohort)
    nipples = nipple_table(prepared, manual=False, progress=False)
    flows = all_flows(prepared, pairs, nipples)
    errors = error_table(prepared, pairs, flows)
    add_rows(bench, errors, flows, nipple_errors(prepared, nipples))

if __name__ == '__main__':
    main()
