"Predictions with boxes: what refuses them, and FROC against a case computed by hand and against loops over all thresholds"
import numpy as np
import pandas as pd
import pytest
import torch

from mammo_nb.core.errors import InputError
from mammo_nb.core.hub import HubModel
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.systems import System, predict, register
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.metrics.boxes import BoxMatching, detections_table, match_boxes, pair_hits
from mammo_nb.metrics.detection import froc_columns, froc_table
from mammo_nb.metrics.froc import evaluate_boxes, froc_curve, mean_recall, recall_at_fppi
from mammo_nb.metrics.predictions import (
    has_box, predictions_table, read_predictions, write_predictions
)
from mammo_nb.metrics.tables import (
    aggregate, combine_outputs, pivot_outputs, select_output, with_labels
)
from mammo_nb.metrics.weighted import auc
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.samples.dataset import SampleDataset
from mammo_nb.samples.sample import Sample

FROC_COLUMNS = froc_columns()
FINDING_COLUMNS = ['image_id', 'lesion_id', 'xmin', 'ymin', 'xmax', 'ymax']

def two_boxes(scores=(.9, .2), output='probability'):
    "One image with two boxes, and one without"
    rows = pd.DataFrame(dict(
        patient_id='p1', exam_id='e1', laterality='L', image_id=['cc', 'cc', 'mlo'], label=1))
    boxes = [(0, 0, 20, 20), (30, 30, 40, 40), (np.nan,)*4]
    return predictions_table(rows, [*scores, 0.], 'detector', output, 'v', boxes=boxes)

# ---- issue 19, 8: boxes are combined correctly or refused

def test_combine_outputs_does_not_merge_two_boxes_into_one():
    t = pd.concat([two_boxes(), two_boxes(output='probability_b')])
    with pytest.raises(InputError, match=r"combine_outputs: boxes: found 4 rows with a box, .*aggregate\("):
        combine_outputs(t, ('probability', 'probability_b'), 'both')

def test_pivot_outputs_refuses_boxes_in_plain_words():
    with pytest.raises(InputError, match='pivot_outputs: boxes: found 2 rows with a box'):
        pivot_outputs(two_boxes())

@pytest.mark.parametrize('by', ('breast', 'exam', 'patient'))
def test_aggregate_combines_boxes_only_where_it_is_stated(by):
    with pytest.raises(InputError, match='aggregate: boxes: found 2 rows with a box'):
        aggregate(two_boxes(), by)
    images = aggregate(two_boxes(), 'image', 'max')
    assert aggregate(images, by, 'max')['value'].tolist() == [.9]

@pytest.mark.parametrize('how, expected', [('max', .9), ('mean', .55), ('noisy_or', 1-.1*.8)])
def test_the_score_of_an_image_with_boxes(how, expected):
    images = aggregate(two_boxes(), 'image', how)
    assert images['image_id'].tolist() == ['cc', 'mlo']
    assert images['value'].tolist() == pytest.approx([expected, 0])
    assert images['label'].tolist() == [1, 1]
    assert 'xmin' not in images
    assert len(pivot_outputs(images)) == 2

def test_bootstrap_refuses_boxes():
    t = pd.concat([two_boxes(), two_boxes().assign(patient_id='p2', exam_id='e2', label=0)])
    with pytest.raises(InputError, match='bootstrap: table 0: boxes: found 4 rows'):
        bootstrap_ci(t, auc)

def test_image_scores_of_a_detector_without_boxes_are_taken():
    "Box columns in which no row has a box are no boxes"
    t = two_boxes()[2:]
    assert len(pivot_outputs(t)) == 1
    assert aggregate(t, 'patient')['value'].tolist() == [0]

@pytest.mark.parametrize('ending', ('csv', 'parquet'))
def test_boxes_survive_a_file(tmp_path, ending):
    rows = pd.DataFrame(dict(patient_id='0012', image_id=['a', 'a', 'b']))
    boxes = [(1/3, 2/3, 10.1, 20.2), (-1.5, 0, 3, 4), (np.nan,)*4]
    t = predictions_table(rows, [.5, .25, 0], 's', 'probability', 'v', boxes=boxes)
    back = read_predictions(write_predictions(t, tmp_path/f'a.{ending}'))
    sides = ['xmin', 'ymin', 'xmax', 'ymax']
    assert np.array_equal(back[sides], np.array(boxes), equal_nan=True)

def test_labels_join_to_every_box():
    breasts = pd.DataFrame(dict(patient_id=['p1'], exam_id=['e1'], laterality=['L'], label=[0]))
    assert with_labels(two_boxes(), breasts)['label'].tolist() == [0, 0, 0]

# ---- matching

def test_the_threshold_of_the_overlap():
    boxes, target = [(10, 0, 30, 20)], [(0, 0, 20, 20)]  # 200 of 600 pixels in common
    above = [pair_hits(boxes, target, BoxMatching(threshold=t))[0][0] for t in (.33, 1/3, .34)]
    assert above == [True, False, False]
    inclusive = BoxMatching(threshold=1/3, inclusive=True)
    assert pair_hits(boxes, target, inclusive)[0][0]

@pytest.mark.parametrize('box, expected', [
    ((9, 9, 11, 11), True), ((-20, -20, 60, 60), True), ((19, 19, 23, 23), False),
    ((18, 18, 22, 22), True)])
def test_the_centre_of_the_box(box, expected):
    assert pair_hits([box], [(0, 0, 20, 20)], BoxMatching('centre'))[0][0] == expected

def test_one_box_finds_both_findings_that_it_hits():
    targets = [(0, 0, 20, 20), (5, 0, 25, 20)]
    found, false = match_boxes([(4, 0, 24, 20), (5, 0, 25, 20)], [.9, .5], targets)
    assert found.tolist() == [.9, .9]
    assert false.tolist() == []

def test_one_to_one_a_box_finds_one_finding():
    targets, rule = [(0, 0, 20, 20), (5, 0, 25, 20)], BoxMatching(one_to_one=True)
    found, false = match_boxes([(4, 0, 24, 20)], [.9], targets, rule)
    assert found.tolist() == [-np.inf, .9]  # the one that it overlaps more
    assert false.tolist() == []
    found, _ = match_boxes([(4, 0, 24, 20), (5, 0, 25, 20)], [.9, .5], targets, rule)
    assert found.tolist() == [.5, .9]

def test_an_image_without_boxes_or_findings():
    found, false = match_boxes([], [], [(0, 0, 1, 1)])
    assert (found.tolist(), false.tolist()) == ([-np.inf], [])
    found, false = match_boxes([(0, 0, 1, 1)], [.3], [])
    assert (found.tolist(), false.tolist()) == ([], [.3])

@pytest.mark.parametrize('options', [
    dict(rule='dice'), dict(threshold=0), dict(threshold=1.5), dict(duplicates='count'),
    dict(unit='pixel')])
def test_unknown_rules_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        BoxMatching(**options)

def test_lengths_of_a_detectors_lists():
    rows = pd.DataFrame(dict(patient_id=['p'], image_id=['i']))
    with pytest.raises(InputError, match='one entry an image'):
        detections_table(rows, [], [], 'd', 'probability', 'v')
    with pytest.raises(InputError, match='2 boxes and 1 scores'):
        detections_table(rows, [[(0, 0, 1, 1)]*2], [[.5]], 'd', 'probability', 'v')

# ---- FROC

def hand_case():
    """Three patients, five images, three findings.

    a: finding found at .9, false positives .8 and .3; b: finding found at .5, and again at .4;
    c: finding missed, false positive .5; d: normal, nothing; e: normal, false positive .1"""
    rows = pd.DataFrame(dict(patient_id=['p1', 'p1', 'p2', 'p2', 'p3'], image_id=list('abcde')))
    boxes = [
        [(0, 0, 10, 10), (50, 50, 60, 60), (80, 0, 90, 10)], [(1, 0, 11, 10), (0, 1, 10, 11)],
        [(70, 70, 80, 80)], [], [(5, 5, 15, 15)]]
    scores = [[.9, .8, .3], [.5, .4], [.5], [], [.1]]
    findings = pd.DataFrame([
        ('a', 'l1', 0, 0, 10, 10), ('b', 'l1', 0, 0, 10, 10), ('c', 'l2', 0, 0, 10, 10)],
        columns=FINDING_COLUMNS)
    p = detections_table(rows, boxes, scores, 'd', 'probability', 'v')
    return p, findings, rows

# (fppi, sensitivity) of every threshold by hand: at .9 one of three, no false positive; at .8 one
# false positive on five images; at .5 two of three and two false positives; at .3 three; at .1 four
CORNERS = [(0, 1/3), (.2, 1/3), (.4, 2/3), (.6, 2/3), (.8, 2/3)]

def test_froc_by_hand():
    p, findings, _ = hand_case()
    t = froc_table(p, findings)
    assert t['n_images'].tolist() == [2, 2, 1]
    assert t['n_targets'].tolist() == [2, 1, 0]
    data = [t[c] for c in FROC_COLUMNS]
    for fppi, expected in CORNERS:
        assert recall_at_fppi(*data, fppi=(fppi,)) == pytest.approx([expected])
    between = recall_at_fppi(*data, fppi=(.1, .39, .41, 9))
    assert between == pytest.approx([1/3, 1/3, 2/3, 2/3])

def test_duplicates_as_false_positives_by_hand():
    p, findings, _ = hand_case()
    t = froc_table(p, findings, matching=BoxMatching(duplicates='false_positive'))
    assert t['value_false'][0].tolist() == [.8, .3, .4]

def test_lesions_by_hand():
    "The lesion l1 is found in a at .9, so b counts no more; l2 is missed"
    p, findings, _ = hand_case()
    t = froc_table(p, findings, matching=BoxMatching(unit='lesion'))
    assert t['n_targets'].tolist() == [1, 1, 0]
    assert recall_at_fppi(*[t[c] for c in FROC_COLUMNS], fppi=(0, 9)).tolist() == [.5, .5]
    unknown = findings.assign(lesion_id=None)  # each finding is its own lesion
    assert froc_table(p, unknown, matching=BoxMatching(unit='lesion'))['n_targets'].sum() == 3
    with pytest.raises(InputError, match='no lesion_id'):
        froc_table(p, findings.drop(columns='lesion_id'), matching=BoxMatching(unit='lesion'))

def random_case(seed, n=30):
    "Boxes on a coarse grid, so that many overlap and many scores are tied"
    rng = np.random.default_rng(seed)
    rows, boxes, scores, findings = [], [], [], []
    for k in range(2*n):
        rows.append(dict(patient_id=f'p{k//2:02}', image_id=f'i{k:02}'))
        corner = rng.integers(0, 4, (rng.integers(0, 5), 2))*10.
        corner = corner + .01*np.arange(len(corner))[:, None]  # no box twice
        boxes.append(np.hstack([corner, corner+12]))
        scores.append(rng.random(len(corner)).round(1))
        for x, y in rng.integers(0, 4, (rng.integers(0, 3), 2))*10.:
            findings.append((f'i{k:02}', f'l{len(findings)}', x, y, x+12, y+12))
    p = detections_table(pd.DataFrame(rows), boxes, scores, 'd', 'probability', f'v{seed}')
    return p, pd.DataFrame(findings, columns=FINDING_COLUMNS), boxes, scores

def counts_at(threshold, findings, boxes, scores, matching):
    "Found findings and false positives at one threshold, matched from scratch"
    found = false = 0
    for k, (b, s) in enumerate(zip(boxes, scores)):
        targets = findings.loc[findings['image_id'] == f'i{k:02}', FINDING_COLUMNS[2:]].to_numpy()
        keep = s >= threshold
        best, wrong = match_boxes(b[keep], s[keep], targets, matching)
        found += np.isfinite(best).sum()
        false += len(wrong)
    return found, false

@pytest.mark.parametrize('one_to_one', (False, True))
@pytest.mark.parametrize('seed', range(3))
def test_froc_against_a_loop_over_thresholds(seed, one_to_one):
    matching = BoxMatching(one_to_one=one_to_one)
    p, findings, boxes, scores = random_case(seed)
    t = froc_table(p, findings, matching=matching)
    thresholds = np.unique(np.concatenate(scores))[::-1]
    corners = [counts_at(x, findings, boxes, scores, matching) for x in thresholds]
    for fppi in (0, .1, .25, .5, 1, 1.5, 4):
        allowed = [found for found, false in corners if false/60 <= fppi]
        expected = max(allowed, default=0)/len(findings)
        ours = recall_at_fppi(*[t[c] for c in FROC_COLUMNS], fppi=(fppi,))
        assert ours == pytest.approx([expected])

def test_a_weight_is_a_number_of_copies():
    p, findings, *_ = random_case(3)
    t = froc_table(p, findings)
    rng = np.random.default_rng(0)
    fppi = (0, .3, 1, 2)
    for w in rng.integers(0, 3, (10, len(t))):
        copies = t.loc[np.repeat(t.index, w)]
        ours = recall_at_fppi(*[t[c] for c in FROC_COLUMNS], weight=w, fppi=fppi)
        expected = recall_at_fppi(*[copies[c] for c in FROC_COLUMNS], fppi=fppi)
        assert ours == pytest.approx(expected)

def test_many_weights_in_small_blocks(monkeypatch):
    p, findings, *_ = random_case(4)
    t = froc_table(p, findings)
    data = [t[c] for c in FROC_COLUMNS]
    w = np.random.default_rng(0).integers(0, 3, (7, len(t)))
    whole = recall_at_fppi(*data, weight=w, fppi=(.5, 1))
    monkeypatch.setattr('mammo_nb.metrics.froc._BLOCK', 1)
    assert np.array_equal(recall_at_fppi(*data, weight=w, fppi=(.5, 1)), whole)

def test_normal_images_are_in_the_denominator():
    p, findings, _ = hand_case()
    normal = detections_table(
        pd.DataFrame(dict(patient_id=['p9']*5, image_id=[f'n{i}' for i in range(5)])), [[]]*5,
        [[]]*5, 'd', 'probability', 'v')
    t = froc_table(pd.concat([p, normal]), findings)
    data = [t[c] for c in FROC_COLUMNS]
    assert recall_at_fppi(*data, fppi=(.2,)) == pytest.approx([2/3])  # two on ten images

def test_no_boxes_at_all():
    rows = pd.DataFrame(dict(patient_id=['p1', 'p2'], image_id=['a', 'b']))
    p = detections_table(rows, [[], []], [[], []], 'd', 'probability', 'v')
    findings = pd.DataFrame([('a', 'l1', 0, 0, 9, 9)], columns=FINDING_COLUMNS)
    t = froc_table(p, findings)
    assert recall_at_fppi(*[t[c] for c in FROC_COLUMNS], fppi=(0, 4)).tolist() == [0, 0]

def test_images_that_were_read_without_a_row(capsys):
    p, findings, rows = hand_case()
    lost = p[p['image_id'] != 'c']
    froc_table(lost, findings)
    assert '1 of 3 findings lie in images without a prediction' in capsys.readouterr().out
    complete = froc_table(lost, findings, rows)
    assert complete['n_targets'].sum() == 3
    assert capsys.readouterr().out == ''
    with pytest.raises(InputError, match='image_id: found .a. .*, expected one of `images`'):
        froc_table(p, findings, rows[1:])

def test_findings_without_a_box_are_counted_aloud(capsys):
    p, findings, _ = hand_case()
    findings.loc[0, FINDING_COLUMNS[2:]] = np.nan
    assert froc_table(p, findings)['n_targets'].sum() == 2
    assert '1 of 3 findings have no box' in capsys.readouterr().out

def test_tables_that_are_refused():
    p, findings, _ = hand_case()
    with pytest.raises(InputError, match='no xmin'):
        froc_table(p, findings.drop(columns='xmin'))
    with pytest.raises(InputError, match='version: found v, v1'):
        froc_table(pd.concat([p, p.assign(version='v1')]), findings)
    with pytest.raises(InputError, match='an image'):
        froc_table(p.assign(image_id=None, xmin=np.nan, ymin=np.nan, xmax=np.nan, ymax=np.nan)[:1], findings)
    with pytest.raises(InputError, match='no value on all rows'):
        evaluate_boxes(p, findings[:0], n_boot=20)

def test_evaluation_of_a_detector():
    p, findings, *_ = random_case(5)
    e = evaluate_boxes(p, findings, fppi=(.5, 1), n_boot=100).set_index('metric')
    t = froc_table(p, findings)
    expected = recall_at_fppi(*[t[c] for c in FROC_COLUMNS], fppi=(.5, 1))
    assert list(e.index) == ['recall_0.5', 'recall_1', 'mean_recall']
    assert e['value'].tolist() == pytest.approx([*expected, expected.mean()])
    assert (e['low'] <= e['value']).all()
    assert (e['value'] <= e['high']).all()
    assert e['n_groups'].tolist() == [30]*3
    assert e['n_images'].tolist() == [60]*3

def test_trainings_are_averaged_and_compared():
    (a, findings, *_), (b, *_) = random_case(6), random_case(7)
    alone = [evaluate_boxes(o, findings, n_boot=20)['value'].to_numpy() for o in (a, b)]
    both = evaluate_boxes([a, b], findings, n_boot=20)['value']
    assert both.tolist() == pytest.approx(np.mean(alone, 0))
    tables = [froc_table(o, findings) for o in (a, b)]
    difference = paired_difference(*tables, mean_recall, columns=FROC_COLUMNS, n_boot=20)
    assert difference.value == pytest.approx(alone[0][-1]-alone[1][-1])

def test_other_findings_are_another_truth():
    p, findings, *_ = random_case(8)
    tables = [froc_table(p, f, quiet=True) for f in (findings, findings[1:])]
    with pytest.raises(InputError, match='table 1: n_targets'):
        paired_difference(*tables, mean_recall, columns=FROC_COLUMNS)

def test_the_curve_is_a_table_of_its_grid():
    p, findings, *_ = random_case(9)
    c = froc_curve(p, findings, fppi=(0, .5, 1), n_boot=50)
    assert c['fppi'].tolist() == [0, .5, 1]
    assert (np.diff(c['recall']) >= 0).all()
    assert (c['low'] <= c['high']).all()

# ---- from a detector to FROC: every image that was read is in the table

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('detector')
    cohort = insilico_cohort(12, seed=3, exams=1, rows=192, cols=144, pixel_spacing_mm=1.25)
    files = cohort.write(folder/'files', workers=1, progress=False)
    return prepare_cohort(files, folder/'cache', size=(64, 48), workers=1, progress=False)

class ImageDataset(SampleDataset):
    def __init__(self, prepared, rows):
        super().__init__(prepared, rows, ['image_id'])

    def __getitem__(self, i):
        return Sample(image=self.images[self.ids[i, 0]], number=torch.tensor(i)), Sample()

class ToyDetector(HubModel):
    system = 'toy_detector'

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x):
        return self.layer(x['image'].mean((1, 2, 3))[:, None])[:, 0]

COLUMNS = ['patient_id', 'exam_id', 'laterality', 'image_id', 'split']
NOTHING = torch.zeros(0, 4), torch.zeros(0)
A_BOX = torch.tensor([[5., 5, 20, 20]]), torch.tensor([.7])

def in_every_second_image(i):
    return A_BOX if i % 2 == 0 else NOTHING

def detect(prepared, boxes_of, primary='score'):
    "The predictions of a registered detector, with the boxes `(sides, scores)` of image number i"
    def outputs(model, out, x):
        return dict(score=out.sigmoid(), boxes=[boxes_of(int(i)) for i in x['number']])
    register(System(
        'toy_detector', 'boxes', ToyDetector, lambda cohort, model: cohort.images[COLUMNS],
        lambda prepared, rows, model: ImageDataset(prepared, rows), outputs, None, None, None,
        primary))
    return predict(ToyDetector(), prepared, bs=5)

@pytest.mark.parametrize('primary', ('score', 'boxes'))
def test_a_detector_that_finds_nothing_in_every_second_image(prepared, primary):
    images, findings = prepared.cohort.images, prepared.cohort.findings
    t = select_output(detect(prepared, in_every_second_image, primary), 'boxes')
    assert t['image_id'].tolist() == images['image_id'].tolist()
    assert t['value'].tolist() == pytest.approx([.7, 0]*(len(images)//2))
    assert has_box(t).tolist() == [True, False]*(len(images)//2)
    froc = froc_table(t, findings)
    assert froc['n_images'].sum() == len(images)
    assert froc['n_targets'].sum() == has_box(findings).sum() > 0

def test_a_detector_that_finds_nothing_at_all(prepared):
    t = select_output(detect(prepared, lambda i: NOTHING), 'boxes')
    assert len(t) == len(prepared.cohort.images)
    assert not has_box(t).any()
    assert t['value'].tolist() == [0]*len(t)

@pytest.fixture(scope='module')
def with_margins(prepared, tmp_path_factory):
    "Frames far wider than the stored images"
    folder = tmp_path_factory.mktemp('margins')
    return prepare_cohort(prepared.cohort, folder, size=(64, 96), workers=1, progress=False)

def test_a_box_in_the_margin_outside_the_stored_image_is_dropped(with_margins):
    outside = torch.tensor([[85., 5, 95, 20]]), torch.tensor([.9])
    both = torch.cat([outside[0], A_BOX[0]]), torch.tensor([.9, .7])
    alone = select_output(detect(with_margins, lambda i: outside), 'boxes')
    assert len(alone) == len(with_margins.cohort.images)
    assert not has_box(alone).any()
    one = select_output(detect(with_margins, lambda i: both), 'boxes')
    assert one['value'].tolist() == pytest.approx([.7]*len(alone))
    assert has_box(one).all()

def test_boxes_that_are_equal_once_cut_at_the_border_are_one(with_margins):
    wide = torch.tensor([[10., 5, 90, 20], [10., 5, 95, 20]]), torch.tensor([.3, .8])
    t = select_output(detect(with_margins, lambda i: wide), 'boxes')
    assert t['value'].tolist() == pytest.approx([.8]*len(with_margins.cohort.images))

def test_scores_that_are_not_known_are_no_prediction(prepared):
    unknown = A_BOX[0], torch.tensor([float('nan')])
    with pytest.raises(InputError, match='NaN for all'):
        detect(prepared, lambda i: unknown, 'boxes')
    t = detect(prepared, lambda i: unknown if i == 0 else A_BOX, 'boxes')
    assert set(t['image_id']) == set(prepared.cohort.images['image_id'])
    assert len(select_output(t, 'boxes')) == len(prepared.cohort.images)-1
