"FROC: properties of the curve, cases by hand, MONAI's curves on the same boxes, and the bootstrap against a loop that copies patients"
import numpy as np
import pandas as pd
import pytest
import torch
from torchvision.ops import box_iou

from mammo_nb.core.errors import InputError
from mammo_nb.metrics.boxes import (
    BoxMatching, box_overlaps, detections_table, mask_overlap, match_boxes, pair_hits
)
from mammo_nb.metrics.detection import froc_columns, froc_table
from mammo_nb.metrics.froc import (
    evaluate_boxes, froc_curve, froc_difference, plot_froc, recall_at_fppi
)

SIDE, CELL = 12, 40  # pixels: a lesion, and the grid on which lesions lie


def recall(table, *fppi, per='image', **kwargs):
    return recall_at_fppi(*[table[c] for c in froc_columns(per)], fppi=fppi, **kwargs)


def make_case(seed=0, n=40, skill=2., decimals=2, version='v'):
    "Findings apart from each other, and detections near and far; two patients have three images"
    rng = np.random.default_rng(seed)
    rows, boxes, scores, findings = [], [], [], []
    for k in range(2*n):
        rows.append(dict(
            patient_id=f'p{k//3:03}', exam_id=f'e{k//3:03}', laterality='LR'[k % 2], image_id=f'i{k:03}'))
        corner = rng.permutation(9)[:rng.integers(0, 3)]
        corner = np.stack([corner % 3, corner//3], 1)*CELL+5.
        findings += [(f'f{k}-{j}', f'i{k:03}', f'l{k//3}', *c, *(c+SIDE)) for j, c in enumerate(corner)]
        hits = np.repeat(corner, rng.integers(0, 3, len(corner)), 0)
        hits = hits+rng.uniform(-4, 4, hits.shape)
        away = rng.uniform(0, 100, (rng.poisson(1.2), 2))
        corner = np.concatenate([hits, away])
        logit = rng.normal(0, 1, len(corner))+skill*(np.arange(len(corner)) < len(hits))
        boxes.append(np.hstack([corner, corner+SIDE]))
        scores.append((1/(1+np.exp(-logit))).round(decimals))
    names = ['finding_id', 'image_id', 'lesion_id', 'xmin', 'ymin', 'xmax', 'ymax']
    p = detections_table(pd.DataFrame(rows), boxes, scores, 'd', 'probability', version)
    return p, pd.DataFrame(findings, columns=names), boxes, scores


def add_boxes(p, rows, **values):
    "More rows: copies of `rows` with other values"
    return pd.concat([p, rows.assign(**values)], ignore_index=True)


# ---- specification of MommiNet-v2, 5.3, check 7

def test_a_perfect_detector_has_recall_1_without_a_false_positive():
    p, findings, *_ = make_case()
    ids = p.drop_duplicates('image_id')
    groups = dict(list(findings.groupby('image_id')))
    sides = [groups.get(i, findings[:0])[['xmin', 'ymin', 'xmax', 'ymax']].to_numpy() for i in ids['image_id']]
    perfect = detections_table(ids, sides, [[.5]*len(o) for o in sides], 'd', 'probability', 'v')
    for options in (dict(), dict(matching=BoxMatching('centre')), dict(matching=BoxMatching('iop', .99))):
        assert recall(froc_table(perfect, findings, **options), 0, 1) == pytest.approx([1, 1])

@pytest.mark.parametrize('seed', range(5))
def test_duplicates_of_true_positives_leave_the_curve(seed):
    p, findings, *_ = make_case(seed)
    t = froc_table(p, findings)
    boxes = p[p['xmin'].notna()]
    false = set(np.concatenate(t['value_false'].to_list()))
    hits = boxes[~boxes['value'].isin(false)]
    assert len(hits) > 10
    more = add_boxes(p, hits, value=hits['value']*.9, xmin=hits['xmin']+1e-6)
    grid = np.linspace(0, 3, 61)
    assert np.array_equal(recall(froc_table(more, findings), *grid), recall(t, *grid))

def test_one_false_positive_on_a_normal_image_moves_fppi_by_1_over_n():
    p, findings, *_ = make_case()
    n = p['image_id'].nunique()
    normal = p[~p['image_id'].isin(findings['image_id']) & p['xmin'].notna()][:1]
    more = add_boxes(p, normal, value=1., xmin=normal['xmin']-1)  # above all others
    grid = np.linspace(0, 2, 41)
    before = recall(froc_table(p, findings), *grid)
    after = recall(froc_table(more, findings), *(grid+1/n))
    assert np.array_equal(after, before)
    assert recall(froc_table(more, findings), .999/n)[0] == 0

@pytest.mark.parametrize('interpolate', ('step', 'linear'))
@pytest.mark.parametrize('seed', range(5))
def test_recall_never_falls_with_fppi(seed, interpolate):
    p, findings, *_ = make_case(seed, decimals=1)
    values = recall(froc_table(p, findings), *np.linspace(0, 4, 200), interpolate=interpolate)
    assert (np.diff(values) >= -1e-12).all()
    assert values[-1] == recall(froc_table(p, findings), 1e9)[0]

@pytest.mark.parametrize('interpolate', ('step', 'linear'))
def test_no_predictions_have_recall_0(interpolate):
    p, findings, *_ = make_case()
    ids = p.drop_duplicates('image_id')
    empty = detections_table(ids, [[]]*len(ids), [[]]*len(ids), 'd', 'probability', 'v')
    assert recall(froc_table(empty, findings), 0, .5, 9, interpolate=interpolate).tolist() == [0, 0, 0]

# ---- ties, steps and lines

def tiny(found, false, n_images=2):
    "One patient with one image for each list of scores"
    arrays = [np.empty(len(found), dtype=object) for _ in range(2)]
    for array, lists in zip(arrays, (found, false)):
        for i, o in enumerate(lists):
            array[i] = np.array(o, dtype=float)
    return pd.DataFrame(dict(
        patient_id=[f'p{i}' for i in range(len(found))], n_images=n_images,
        n_targets=[len(o) for o in found], value_targets=arrays[0], value_false=arrays[1]))

def test_equal_scores_are_accepted_together():
    "At .5 one finding and two false positives come at once: nobody can have only the finding"
    t = tiny([[.5, -np.inf]], [[.5, .5]])
    assert recall(t, 0, .5, .99, 1).tolist() == [0, 0, 0, .5]
    assert recall(t, 0, .5, 1, 2, interpolate='linear') == pytest.approx([0, .25, .5, .5])

def test_a_line_goes_from_the_top_of_a_step_to_the_foot_of_the_next():
    "Corners (0, 0), (0, .25), (.5, .25), (.5, .75), (1, .75), (1, 1): from (0, .25) to (.5, .25), then up"
    t = tiny([[.9, .7, .6, .4]], [[.8, .5]])
    line = recall(t, 0, .25, .5, .75, 1, 5, interpolate='linear')
    assert line == pytest.approx([.25, .25, .75, .75, 1, 1])
    assert recall(t, 0, .25, .5, .75, 1, 5) == pytest.approx(line)

def test_flat_beyond_the_last_false_positive():
    t = tiny([[.9, .1, -np.inf]], [[.5]])
    for interpolate in ('step', 'linear'):
        assert recall(t, .5, 7, 1e6, interpolate=interpolate) == pytest.approx([2/3]*3)

def test_findings_below_every_false_positive_count_at_its_price():
    t = tiny([[.3]], [[.9]])
    assert recall(t, 0, .49, .5, 1).tolist() == [0, 0, 1, 1]

def test_an_unknown_reading_is_refused():
    with pytest.raises(InputError, match='interpolate'):
        recall(tiny([[.3]], [[.9]]), 1, interpolate='cubic')

# ---- MONAI as an oracle

@pytest.fixture(scope='module')
def monai_froc():
    return pytest.importorskip('monai.metrics', reason='monai, a test oracle, is not installed')

def label_image(findings, image_id):
    "Findings of an image as labels 1, 2, ..."
    out = np.zeros((140, 140), dtype=int)
    rows = findings.loc[findings['image_id'] == image_id, ['xmin', 'ymin', 'xmax', 'ymax']]
    for k, (x0, y0, x1, y1) in enumerate(rows.to_numpy(int), 1):
        out[y0:y1, x0:x1] = k
    return out

def monai_curve(monai_froc, p, findings, boxes, scores, weight=None):
    "Curve by MONAI; `weight`: how often each image counts"
    images = p['image_id'].drop_duplicates().to_list()
    false, found, n_targets = [], [], 0
    weight = [1]*len(images) if weight is None else weight
    for image_id, b, s, copies in zip(images, boxes, scores, weight):
        labels = label_image(findings, image_id)
        centre = np.floor((b[:, :2]+b[:, 2:])/2)
        y, x = centre[:, 1], centre[:, 0]
        one = monai_froc.compute_fp_tp_probs(s.astype(np.float32), y, x, labels)
        false += [one[0]]*copies
        found += [one[1]]*copies
        n_targets += one[2]*copies
    false, found = np.concatenate(false), np.concatenate(found)
    return monai_froc.compute_froc_curve_data(false, found, n_targets, sum(weight))

def as_masks(findings):
    masks = {}
    for row in findings.itertuples():
        mask = np.zeros((140, 140), dtype=bool)
        mask[int(row.ymin):int(row.ymax), int(row.xmin):int(row.xmax)] = True
        masks[row.finding_id] = mask
    return masks

@pytest.mark.parametrize('masks', (False, True))
@pytest.mark.parametrize('decimals', (1, 2, 6))
@pytest.mark.parametrize('seed', range(3))
def test_the_curve_agrees_with_monai(monai_froc, seed, decimals, masks):
    p, findings, boxes, scores = make_case(seed, decimals=decimals)
    fppi, expected = monai_curve(monai_froc, p, findings, boxes, scores)
    t = froc_table(p, findings, matching=BoxMatching('centre'), masks=as_masks(findings) if masks else None)
    order = np.lexsort((expected, fppi))
    best = pd.Series(expected).groupby(fppi).max()
    assert recall(t, *best.index) == pytest.approx(best.to_numpy())
    grid = np.linspace(0, 3, 301)
    line = np.interp(grid, fppi[order], expected[order])
    assert recall(t, *grid, interpolate='linear') == pytest.approx(line)
    score = monai_froc.compute_froc_score(fppi, expected, (.5, 1, 2))
    assert recall(t, .5, 1, 2, interpolate='linear').mean() == pytest.approx(score)

def test_resamples_agree_with_monai(monai_froc):
    p, findings, boxes, scores = make_case(3)
    t = froc_table(p, findings, matching=BoxMatching('centre'))
    patients = p.drop_duplicates('image_id')['patient_id']
    weights = np.random.default_rng(0).multinomial(len(t), [1/len(t)]*len(t), 5)
    ours = recall(t, .5, 1, 2, interpolate='linear', weight=weights)
    for w, values in zip(weights, ours):
        copies = patients.map(dict(zip(t['patient_id'], w))).to_list()
        fppi, expected = monai_curve(monai_froc, p, findings, boxes, scores, copies)
        assert values == pytest.approx(np.interp((.5, 1, 2), fppi[::-1], expected[::-1]))

# ---- the bootstrap

def naive_recall(t, limits):
    "Recall of one sample, threshold by threshold"
    found = np.concatenate(t['value_targets'].to_list())
    false = np.concatenate(t['value_false'].to_list())
    out = []
    for x in limits:
        values = [0.]
        for threshold in np.unique(np.concatenate([found[np.isfinite(found)], false])):
            if (false >= threshold).sum()/t['n_images'].sum() <= x+1e-12:
                values.append((found >= threshold).mean())
        out.append(max(values))
    return out

@pytest.mark.parametrize('levels', (3, 4096))
def test_resamples_against_a_loop_that_copies_patients(levels, monkeypatch):
    monkeypatch.setattr('mammo_nb.metrics.froc._LEVELS', levels)
    p, findings, *_ = make_case(1)
    t = froc_table(p, findings)
    weights = np.random.default_rng(2).multinomial(len(t), [1/len(t)]*len(t), 20)
    ours = recall(t, 0, .2, .5, 1, 2, weight=weights)
    expected = [naive_recall(t.loc[np.repeat(t.index, w)], (0, .2, .5, 1, 2)) for w in weights]
    assert ours == pytest.approx(np.array(expected))

@pytest.mark.parametrize('interpolate', ('step', 'linear'))
def test_parts_and_blocks_change_nothing(monkeypatch, interpolate):
    p, findings, *_ = make_case(5)
    t = froc_table(p, findings)
    weights = np.random.default_rng(2).integers(0, 3, (9, len(t)))
    grid = 0, .1, .5, 1, 4
    whole = recall(t, *grid, weight=weights, interpolate=interpolate)
    monkeypatch.setattr('mammo_nb.metrics.froc._LEVELS', 2)
    monkeypatch.setattr('mammo_nb.metrics.froc._BLOCK', 1)
    assert np.array_equal(recall(t, *grid, weight=weights, interpolate=interpolate), whole)

def test_intervals_are_quantiles_of_resampled_patients():
    p, findings, *_ = make_case(2)
    e = evaluate_boxes(p, findings, n_boot=400, seed=1).set_index('metric')
    t = froc_table(p, findings)
    rng = np.random.default_rng(7)
    draws = [t.iloc[rng.integers(0, len(t), len(t))] for _ in range(400)]
    values = np.quantile([recall(o, .5, 1, 2) for o in draws], [.025, .975], axis=0)
    assert e.loc[['recall_0.5', 'recall_1', 'recall_2'], ['low', 'high']].to_numpy().T == pytest.approx(values, abs=.04)
    assert e.loc['mean_recall', 'value'] == pytest.approx(e['value'][:3].mean())

def test_a_difference_to_itself_is_0_and_has_no_width():
    p, findings, *_ = make_case(4)
    d = froc_difference(p, p, findings, n_boot=50)
    assert (d[['value', 'low', 'high']] == 0).all(axis=None)

def test_a_difference_is_paired():
    "The interval of the difference is narrower than independent draws would give"
    a, findings, *_ = make_case(6, skill=2.)
    b = a.assign(value=(a['value']*.97).round(2), version='w')
    d = froc_difference(a, b, findings, n_boot=300).set_index('metric')
    one = evaluate_boxes(a, findings, n_boot=300).set_index('metric')
    width = lambda o: o.loc['mean_recall', 'high']-o.loc['mean_recall', 'low']
    assert width(d) < .5*width(one)

def test_trainings_are_averaged_in_a_difference():
    (a, findings, *_), (b, *_) = make_case(7), make_case(7, skill=1., version='w')
    one = froc_difference(a, b, findings, n_boot=20)['value']
    same = froc_difference([a, b], [b, b], findings, n_boot=20)['value']
    assert same.to_numpy() == pytest.approx(one.to_numpy()/2)

# ---- rules, masks and units

def test_overlaps_against_torchvision():
    rng = np.random.default_rng(0)
    a, b = (np.sort(rng.uniform(0, 50, (30, 2, 2)), 1).reshape(30, 4) for _ in range(2))
    expected = box_iou(torch.tensor(a), torch.tensor(b)).diagonal()
    assert box_overlaps(a, b)[0] == pytest.approx(expected.numpy())

def test_a_box_that_fills_its_mask_overlaps_as_a_box():
    mask = np.zeros((60, 80), dtype=bool)
    mask[10:30, 20:60] = True
    rng = np.random.default_rng(1)
    for _ in range(20):
        x, y = rng.uniform(0, 60, 2)
        box = np.array([x, y, x+rng.uniform(1, 20), min(y+rng.uniform(1, 20), 60)])
        iou, iop = box_overlaps(box[None], np.array([[20., 10, 60, 30]]))
        assert mask_overlap(box, mask) == pytest.approx((iou[0], iop[0]))

def test_a_box_over_the_border_of_the_mask_keeps_its_area():
    mask = np.ones((10, 10), dtype=bool)
    assert mask_overlap([-10, 0, 10, 10], mask) == pytest.approx((.5, .5))

def test_regions_and_masks_of_other_images_are_refused():
    with pytest.raises(InputError, match='region and mask of one image'):
        mask_overlap(np.ones((5, 5), bool), np.ones((6, 5), bool))

def test_iop_accepts_a_small_box_inside_a_large_lesion():
    small, lesion = [(10, 10, 14, 14)], [(0, 0, 40, 40)]
    assert not pair_hits(small, lesion)[0][0]
    assert pair_hits(small, lesion, BoxMatching('iop', .9))[0][0]
    assert not pair_hits(lesion, small, BoxMatching('iop', .9))[0][0]

def two_views(scores=(.9, .4)):
    "One exam: L-CC with a hit, L-MLO with a hit, R-CC with a false positive, R-MLO normal"
    rows = pd.DataFrame(dict(
        patient_id='p1', exam_id='e1', laterality=['L', 'L', 'R', 'R'], image_id=list('abcd')))
    box = (0, 0, 10, 10)
    p = detections_table(
        rows, [[box], [box], [box], []], [[scores[0]], [scores[1]], [.5], []], 'd', 'probability', 'v')
    findings = pd.DataFrame(
        [('f1', 'a', 'l1', *box), ('f2', 'b', 'l1', *box)],
        columns=['finding_id', 'image_id', 'lesion_id', 'xmin', 'ymin', 'xmax', 'ymax'])
    return p, findings

@pytest.mark.parametrize('unit, expected', [
    ('finding', [.9, .4]), ('lesion', [.9]), ('breast', [.9]), ('exam', [.9])])
def test_targets_in_any_view(unit, expected):
    p, findings = two_views()
    t = froc_table(p, findings, matching=BoxMatching(unit=unit))
    assert t['value_targets'][0].tolist() == expected

@pytest.mark.parametrize('per, first', [('image', .25), ('breast', .5), ('exam', 1)])
def test_false_positives_an_image_a_breast_an_exam(per, first):
    p, findings = two_views()
    t = froc_table(p, findings)
    assert recall(t, first*.99, first, per=per).tolist() == [.5, 1]
    many = pd.concat([p, p.assign(patient_id='p2', exam_id='e2', image_id=p['image_id']+'2')])
    both = pd.concat([findings, findings.assign(lesion_id='l2', image_id=findings['image_id']+'2')])
    e = evaluate_boxes(many, both, fppi=(first*.99, first), per=per, n_boot=20)
    assert e['value'][:2].tolist() == [.5, 1]

def test_units_that_are_not_known_are_refused():
    p, findings = two_views()
    unknown = p.assign(exam_id=None)
    with pytest.raises(InputError, match='unit: found 2 unknown breasts'):
        froc_table(unknown, findings, matching=BoxMatching(unit='breast'))
    assert froc_table(unknown, findings)['n_exams'].isna().all()
    many = pd.concat([unknown, unknown.assign(patient_id='p2', image_id=p['image_id']+'2')])
    with pytest.raises(InputError, match='n_exams: found 2 unknown of 2'):
        evaluate_boxes(many, findings, per='exam', n_boot=20)
    with pytest.raises(InputError, match='per'):
        froc_columns('patient')

def test_masks_decide_where_they_are_given():
    p, findings = two_views()
    ring = np.zeros((20, 20), dtype=bool)
    ring[:10, :10] = True
    ring[2:8, 2:8] = False
    by_centre = BoxMatching('centre')
    t = froc_table(p, findings, matching=by_centre, masks=dict(f1=ring))
    assert t['value_targets'][0].tolist() == [-np.inf, .4]
    assert sorted(t['value_false'][0]) == [.5, .9]
    t = froc_table(p, findings, matching=BoxMatching(threshold=.65), masks=dict(f1=ring))
    assert t['value_targets'][0].tolist() == [-np.inf, .4]  # 64 of 100 pixels
    t = froc_table(p, findings, matching=BoxMatching(threshold=.63), masks=dict(f1=ring))
    assert t['value_targets'][0].tolist() == [.9, .4]

def test_detected_regions_are_compared_with_masks():
    p, findings = two_views()
    ring = np.zeros((20, 20), dtype=bool)
    ring[:10, :10] = True
    ring[2:8, 2:8] = False
    strict = BoxMatching(threshold=.99)
    t = froc_table(p, findings, matching=strict, masks=dict(f1=ring), regions=[ring, None, None, None])
    assert t['value_targets'][0].tolist() == [.9, .4]
    with pytest.raises(InputError, match='regions: found no masks'):
        froc_table(p, findings, regions=[ring, None, None, None])

def test_masks_need_the_names_of_findings():
    p, findings = two_views()
    with pytest.raises(InputError, match='no finding_id'):
        froc_table(p, findings.drop(columns='finding_id'), masks={})

@pytest.mark.parametrize('one_to_one', (False, True))
@pytest.mark.parametrize('duplicates', ('ignore', 'false_positive'))
def test_the_order_of_the_rows_changes_nothing(one_to_one, duplicates):
    p, findings, *_ = make_case(8, decimals=1)
    rule = BoxMatching(one_to_one=one_to_one, duplicates=duplicates)
    grid = np.linspace(0, 3, 31)
    expected = recall(froc_table(p, findings, matching=rule), *grid)
    shuffled = p.sample(frac=1, random_state=0)
    others = findings.sample(frac=1, random_state=1)
    assert np.array_equal(recall(froc_table(shuffled, others, matching=rule), *grid), expected)

def test_one_image_and_all_images_are_matched_alike():
    p, findings, boxes, scores = make_case(9)
    t = froc_table(p, findings)
    sides, found, false = ['xmin', 'ymin', 'xmax', 'ymax'], [], []
    for image_id, b, s in zip(p['image_id'].drop_duplicates(), boxes, scores):
        targets = findings.loc[findings['image_id'] == image_id, sides].to_numpy()
        one = match_boxes(b, s, targets)
        found.append(one[0])
        false.append(one[1])
    for column, lists in (('value_targets', found), ('value_false', false)):
        assert sorted(np.concatenate(t[column].to_list())) == sorted(np.concatenate(lists))

# ---- the figure

def test_the_figure_has_a_line_and_a_band_for_each_system():
    p, findings, *_ = make_case()
    c = froc_curve(p, findings, n_boot=20)
    ax = plot_froc(dict(a=c, b=c), per='exam')
    assert [o.get_label() for o in ax.get_lines()] == ['a', 'b']
    assert len(ax.collections) == 2
    assert ax.get_xlabel() == 'false positives an exam'
    assert plot_froc(c).get_legend() is None

def test_a_curve_is_drawn_as_it_was_interpolated():
    "Lines between thresholds for `linear`, steps otherwise; band and line alike"
    p, findings, *_ = make_case()
    curves = {how: froc_curve(p, findings, n_boot=20, interpolate=how) for how in ('step', 'linear')}
    corners = {}
    for how, curve in curves.items():
        ax = plot_froc(curve)
        line, = ax.get_lines()
        assert line.get_drawstyle() == dict(step='steps-post', linear='default')[how]
        corners[how] = len(ax.collections[0].get_paths()[0].vertices)
    assert corners['step'] > 1.5*corners['linear']
    assert plot_froc(curves['step'], interpolate='linear').get_lines()[0].get_drawstyle() == 'default'
    with pytest.raises(InputError, match='interpolate'): plot_froc(curves['step'], interpolate='cubic')
