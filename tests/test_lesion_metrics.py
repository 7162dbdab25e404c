"Metrics of drawn lesions against cases computed by hand, and what they must refuse."
import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.metrics import balanced_accuracy_score

from mammo_nb.core.errors import InputError
from mammo_nb.metrics.lesion_synthesis import (
    agreement_references, agreement_table, class_accuracy, class_balanced_accuracy, diversity,
    evaluate_agreement, found_at_box, memorisation, memorisation_table, nearest_crops, region_crops)


@pytest.mark.parametrize('seed', range(5))
def test_balanced_accuracy_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    label, value = rng.integers(0, 4, (2, 50))
    assert class_balanced_accuracy(label, value) == pytest.approx(balanced_accuracy_score(label, value))
    weight = rng.integers(0, 3, (6, 50))
    many = class_balanced_accuracy(label, value, weight)
    for one, w in zip(many, weight):
        repeated = np.repeat(np.arange(50), w)
        assert one == pytest.approx(balanced_accuracy_score(label[repeated], value[repeated]))
        assert class_accuracy(label, value, w) == pytest.approx((label == value)[repeated].mean())


def test_the_collapsed_verifier_of_vindr():
    "65.5 % majority and 20 % balanced, however the other categories are distributed"
    for others in ((900, 300, 163, 50), (1410, 1, 1, 1), (354, 353, 353, 353)):
        label = np.repeat(range(5), [2682, *others])
        assert len(label) == 4095
        value = np.zeros(4095, int)
        references = agreement_references(label, value)
        assert round(100*class_accuracy(label, value), 1) == round(100*references['majority'], 1) == 65.5
        assert class_balanced_accuracy(label, value) == pytest.approx(.2)
        assert references['chance'] == pytest.approx(.2)


def test_a_classifier_of_one_class_on_421_images():
    label = np.repeat([1, 0, 2], [286, 100, 35])
    value = np.ones(421, int)
    assert round(100*class_accuracy(label, value), 4) == 67.9335
    assert class_balanced_accuracy(label, value) == pytest.approx(1/3)


def test_shuffled_is_the_mean_over_permutations():
    rng = np.random.default_rng(0)
    label, value = rng.choice(3, (2, 40), p=[.6, .3, .1])
    found = np.mean([class_accuracy(rng.permutation(label), value) for _ in range(4000)])
    assert agreement_references(label, value)['shuffled'] == pytest.approx(found, abs=.005)


def test_agreement_leaves_unknown_conditions_out():
    rows = pd.DataFrame(dict(patient_id=list('aabb')))
    table = agreement_table(rows, dict(x=[0, -1, 1, 1], y=[-1]*4), dict(x=[0, 0, 1, 0], y=[0]*4))
    assert table['sample'].tolist() == [0, 2, 3] and set(table.attribute) == {'x'}
    result = evaluate_agreement(table, n_boot=50)
    assert result.accuracy.item() == pytest.approx(2/3) and result.n.item() == 3
    assert result.balanced_accuracy.item() == pytest.approx(.75)
    with pytest.raises(InputError, match='3 asked'): agreement_table(rows, dict(x=[0, 1, 1]), dict(x=[0]*4))


def test_one_patient_has_no_interval():
    table = agreement_table(pd.DataFrame(dict(patient_id=['a']*4)), dict(x=[0, 0, 1, 1]), dict(x=[0, 1, 1, 1]))
    row = evaluate_agreement(table, n_boot=50).iloc[0]
    assert row.accuracy == .75 and np.isnan([row.accuracy_low, row.balanced_accuracy_high]).all()


def test_intervals_are_over_patients():
    "Ten equal patches of a patient are no more evidence than one"
    rng = np.random.default_rng(0)
    right = rng.random(40) < .7
    one = pd.DataFrame(dict(patient_id=[f'P{i}' for i in range(40)]))
    ten = one.loc[np.repeat(range(40), 10)].reset_index(drop=True)
    results = []
    for rows, ok in ((one, right), (ten, np.repeat(right, 10))):
        label = np.arange(len(ok)) % 2
        table = agreement_table(rows, dict(x=label), dict(x=np.where(ok, label, 1-label)))
        results.append(evaluate_agreement(table, n_boot=500).iloc[0])
    widths = [r.accuracy_high-r.accuracy_low for r in results]
    assert widths[0] == pytest.approx(widths[1], rel=.15)


def test_a_resample_without_a_class_counts_the_others():
    label, value = np.array([0, 0, 1]), np.array([0, 1, 1])
    assert class_balanced_accuracy(label, value, np.array([[1, 1, 0], [0, 0, 1]])).tolist() == [.5, 1]
    assert np.isnan(class_balanced_accuracy(label, value, np.zeros(3)))


def test_found_at_box_by_hand():
    box = [10, 10, 20, 20]
    cases = [
        (dict(boxes=[[10, 10, 20, 20]], scores=[.1]), 1, 1.),
        (dict(boxes=[[10, 10, 20, 12]], scores=[.9]), 0, .2), # exactly 0.2 is not above it
        (dict(boxes=[[10, 10, 20, 13]], scores=[.9]), 1, .3),
        (dict(boxes=[[22, 10, 24, 20]], scores=[.9]), np.nan, np.nan), # its middle is outside the hole
        (dict(boxes=[], scores=[]), np.nan, np.nan),
        (dict(boxes=[[10, 10, 20, 20], [0, 0, 30, 30]], scores=[.5, .9]), 0, 1/9),
        (dict(boxes=[[10, 10, 20, 20], [40, 40, 60, 60]], scores=[.5, .9]), 1, 1.)]
    table = found_at_box([d for d, _, _ in cases], [box]*len(cases))
    for row, (_, found, iou) in zip(table.itertuples(), cases):
        if np.isnan(iou): assert row.found == 0 and np.isnan(row.iou) and np.isnan(row.score)
        else: assert (row.found, row.iou) == (found, pytest.approx(iou))


def test_found_at_box_does_not_depend_on_the_unit():
    box, found = np.array([[10, 10, 20, 20.]]), np.array([[12, 9, 22, 18.]])
    for factor in (1, 1/64, 7):
        table = found_at_box([dict(boxes=found*factor, scores=[1.])], box*factor)
        assert table.iou.item() == pytest.approx(64/126)
    assert found_at_box([dict(boxes=[], scores=[])], [[np.nan]*4]).found.isna().all()
    with pytest.raises(InputError, match='2 boxes'): found_at_box([dict(boxes=[], scores=[])], np.zeros((2, 4)))


def test_diversity_of_the_hole_alone():
    a = np.full((24, 24), .5)
    b = a.copy()
    b[4:8, 4:8] += .3
    mask = np.zeros((24, 24), bool)
    mask[16:] = True
    assert diversity([a, b], mask) == pytest.approx(0, abs=1e-9)
    assert diversity([a, b]) > .01
    assert diversity([a, b], ~mask) > diversity([a, b])
    with pytest.raises(InputError, match='samples'): diversity([a])


def lesions(n, seed, size=48):
    noise = np.random.default_rng(seed).random((n, size, size))
    return gaussian_filter(noise, (0, 3, 3))


def test_region_crops_are_standardised_and_follow_the_box():
    images = lesions(5, 0)
    boxes = np.array([[.25, .25, .75, .75]]*5)
    crops = region_crops(images, boxes, 24)
    assert crops.shape == (5, 576)
    assert np.allclose(crops.mean(1), 0) and np.allclose(crops.std(1), 1)
    region = images[:, 12:36, 12:36].reshape(5, -1)
    expected = (region-region.mean(1, keepdims=True))/region.std(1, keepdims=True)
    assert np.allclose(crops, expected)
    assert not region_crops(np.ones((1, 8, 8)), [[0, 0, 1, 1]]).any()
    assert np.isfinite(region_crops(images[:1], [[.999, .999, 1, 1]])).all()


def test_distance_is_that_of_the_correlation():
    "Root mean square of two standardised regions: sqrt(2-2r)"
    crops = region_crops(lesions(12, 1), [[0, 0, 1, 1]]*12)
    distance, nearest = nearest_crops(crops[:4], crops[4:])
    r = np.corrcoef(crops)[:4, 4:]
    assert (nearest == r.argmax(1)).all()
    assert np.allclose(distance, np.sqrt(2-2*r.max(1)))
    again = nearest_crops(crops[:4], crops[4:], bs=3)
    assert np.allclose(again[0], distance)


def test_copies_are_seen_at_another_place_in_another_exposure():
    train = lesions(60, 2)
    boxes = np.array([[.25, .25, .5, .5]]*60)
    moved = .1+.6*np.roll(train, (12, 6), (1, 2))
    moved_boxes = boxes+[.125, .25, .125, .25]
    real, new = lesions(60, 3), lesions(60, 4)
    crops = [region_crops(i, b) for i, b in ((moved, moved_boxes), (real, boxes), (train, boxes), (new, boxes))]
    copied = memorisation_table(*crops[:3])
    assert copied.nearest[copied.source == 'drawn'].tolist() == list(range(60))
    summary = memorisation(copied)
    assert summary['share_near'] == 1 and summary['real_near'] == pytest.approx(.05, abs=.02)
    assert summary['ratio'] < 1e-6 and summary['n_drawn'] == summary['n_real'] == 60
    fresh = memorisation(memorisation_table(crops[3], *crops[1:3]))
    assert fresh['share_near'] < .2 and fresh['ratio'] == pytest.approx(1, abs=.1)


def test_metrics_import_no_model():
    import ast
    import mammo_nb.metrics.lesion_synthesis as module
    tree = ast.parse(open(module.__file__).read())
    names = [n.module or '' for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert not any(word in name for name in names for word in ('models', 'samples', 'learners'))
