"""The rows of the benchmark of Mammo-Net, on tables that can be counted by hand."""
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import mammo_nb.core.fastai_import
from benchmarks import mammonet as bench
from mammo_nb.cohort.exams import breast_table
from mammo_nb.core.seeding import seed_everything
from mammo_nb.gaze.readings import read_gaze
from mammo_nb.insilico.files import insilico_cohort, write_insilico
from mammo_nb.learners.mammonet import mammonet_learner
from mammo_nb.preparation.prepare import PrepareConfig
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.samples.two_view import TwoViewDataset, two_view_dls


def make_breasts(*values, label=None):
    "Predictions for one breast a patient; the second half has cancer"
    n = len(values)
    if label is None:
        label = [0.]*(n//2) + [1.]*(n-n//2)
    patients = [f'p{i}' for i in range(n)]
    return pd.DataFrame(dict(
        patient_id=patients, exam_id='e', laterality='L', label=label, value=values))


def make_images(values, empty_map=0., first=0):
    "Localisation of one image a patient"
    numbers = range(first, first+len(values))
    return pd.DataFrame(dict(
        patient_id=[f'p{i}' for i in numbers], image_id=[f'i{i}' for i in numbers],
        attention_in_lesion=values, pointing_game=0., pixel_auc=.5, empty_map=empty_map))


GOOD = make_breasts(.1, .2, .8, .9) # AUC 1
BAD = make_breasts(.9, .8, .2, .1) # 0
HALF = make_breasts(.1, .8, .3, .9) # 3 of 4 pairs


# ---- metrics

def test_auc_is_of_the_best_epoch_and_auc_last_of_the_last():
    run = [(GOOD, None, BAD)]
    assert bench.estimate(run, 'auc').value == 1
    assert bench.estimate(run, 'auc_last').value == 0


def test_accuracy_is_at_one_half():
    run = [(make_breasts(.4, .6, .5, .9), None, GOOD)]
    assert bench.estimate(run, 'acc').value == .75


def test_trainings_are_averaged():
    run = [(GOOD, None, GOOD), (HALF, None, GOOD)]
    assert bench.estimate(run, 'auc').value == pytest.approx(.875)


def test_half_of_the_gain_is_the_mean_of_both_ends():
    low = (make_breasts(.9, .2, .8, .1), None, GOOD)
    high = (GOOD, None, GOOD)
    half = [(HALF, None, GOOD)]
    ends = (bench.estimate([low], 'auc').value + 1)/2
    assert bench.estimate(half, 'auc', [low, high]).value == pytest.approx(.75-ends)


def test_the_mean_of_two_views_matches_breasts_not_rows():
    reversed_rows = BAD.iloc[::-1]
    best, maps, last = bench.mean_of_views((GOOD, None, HALF), (reversed_rows, None, HALF))
    assert best['value'].tolist() == pytest.approx([.5]*4)
    assert maps is None
    assert last['value'].tolist() == HALF['value'].tolist()


# ---- intervals

@pytest.fixture(scope='module')
def forty():
    "Predictions for one breast of 40 patients, and for two that agree"
    rng = np.random.default_rng(0)
    one = make_breasts(*rng.random(40), label=np.repeat([0., 1.], 20))
    both = pd.concat([one, one.assign(laterality='R')], ignore_index=True)
    near = both.assign(value=both['value'] + .001*rng.random(80))
    images = make_images(list(rng.random(40)))
    return SimpleNamespace(one=one, both=both, near=near, images=images)


def same_interval(a, b):
    return (b.value, b.low, b.high) == pytest.approx((a.value, a.low, a.high))


def test_intervals_of_breasts_are_over_patients(forty):
    a, b = (bench.estimate([(t, None, t)], 'auc') for t in (forty.one, forty.both))
    assert a.low < a.value-.05
    assert same_interval(a, b)
    assert b.n == 2*a.n


def test_intervals_of_images_are_over_patients(forty):
    images = forty.images
    second = images.assign(image_id=images.image_id+'mlo')
    two = pd.concat([images, second], ignore_index=True)
    runs = ([(forty.one, t, forty.one)] for t in (images, two))
    a, b = (bench.estimate(run, 'attention_in_lesion') for run in runs)
    assert same_interval(a, b)
    assert a.low < a.value-.03


def test_differences_draw_the_same_patients_for_both(forty):
    single = bench.estimate([(forty.one, None, forty.one)], 'auc')
    run = [(forty.both, None, forty.both)]
    zero = bench.estimate(run, 'auc', run)
    assert (zero.value, zero.low, zero.high) == (0, 0, 0)
    small = bench.estimate([(forty.near, None, forty.near)], 'auc', run)
    assert small.high-small.low < .1*(single.high-single.low)


# ---- attention

def test_attention_is_compared_on_the_same_images():
    run = [(GOOD, make_images([.5]*12), GOOD)]
    other = [(GOOD, make_images([.2]*12, first=1), GOOD)]
    difference = bench.estimate(run, 'attention_in_lesion', other)
    assert difference.value == pytest.approx(.3)
    assert difference.n == 11


def test_fewer_than_ten_common_images_give_no_difference():
    run = [(GOOD, make_images([.5]*12), GOOD)]
    other = [(GOOD, make_images([.2]*12, first=3), GOOD)]
    assert bench.estimate(run, 'attention_in_lesion', other) is None


def test_images_with_an_empty_map_are_left_out_where_both_maps_are_compared():
    run = [(GOOD, make_images([.5]*12), GOOD)]
    empty_map = [0.]*11 + [1.]
    other = [(GOOD, make_images([.1]*11+[.9], empty_map), GOOD)]
    assert bench.estimate(run, 'attention_both_maps', other).value == pytest.approx(.4)
    assert bench.estimate(run, 'attention_in_lesion', other).value < .4


def test_differences_of_each_training():
    rows = {}
    def add_estimate(variant, metric, estimate): rows[variant, metric] = estimate.value
    low, high = make_images([.1]*12), make_images([.5]*12)
    run = [(GOOD, high, GOOD), (HALF, low, GOOD)]
    others = [[(BAD, low, GOOD)], [(HALF, low, GOOD), (BAD, high, GOOD)]]
    recorder = SimpleNamespace(add_estimate=add_estimate)
    bench.add_each_training(recorder, 'd', [3, 5], run, others)
    assert rows == pytest.approx({
        ('d, training 3', 'auc'): 1, ('d, training 5', 'auc'): .75-.375,
        ('d, training 3', 'attention_in_lesion'): .4,
        ('d, training 5', 'attention_in_lesion'): -.2})


# ---- patients

@pytest.fixture(scope='module')
def drawn():
    "The same training patients with few and with many test patients"
    return [bench.select_patients(40, test_of, 3).images for test_of in (100, 160)]


def test_patients_are_trained_on_or_tested(drawn):
    for images in drawn:
        test = images.split == 'test'
        assert (test == (images.patient_index >= 40)).all()
        assert not set(images.patient_id[test]) & set(images.patient_id[~test])


def test_more_test_patients_change_no_training(drawn):
    few, many = drawn
    assert set(few.split) == {'train', 'valid', 'test'}
    assert few.patient_index.max() < 100 <= many.patient_index.max() < 160
    assert few[few.split != 'test'].equals(many[many.split != 'test'])
    assert set(few.image_id) < set(many.image_id)


def test_maps_are_computed_for_every_test_breast_with_a_lesion_and_no_other():
    cohort = insilico_cohort(120, seed=4, exams=1)
    rows = bench.breasts_with_lesions(SimpleNamespace(cohort=cohort))
    malignant = cohort.findings[cohort.findings.pathology == 'malignant']
    lesions = set(malignant.image_id)
    tested = set(cohort.images.image_id[cohort.images.split == 'test'])
    pairs = [set(p) for p in rows[['image_id_cc', 'image_id_mlo']].to_numpy()]
    assert lesions & tested
    assert lesions & tested <= set.union(*pairs) <= tested
    assert all(p & lesions for p in pairs)


# ---- gaze and weights

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('rows')
    drawn = insilico_cohort(12, seed=4, exams=1)
    cohort = write_insilico(drawn, folder/'files', workers=1, progress=False)
    return prepare_cohort(
        cohort, folder/'cache', PrepareConfig(size=(96, 72)), workers=1, progress=False)


def test_gaze_is_missing_by_patient(prepared):
    cohort = prepared.cohort
    change = bench.degrade_gaze('missing', .5, cohort, 0)
    samples = TwoViewDataset(prepared, breast_table(cohort), gaze=change)
    has_gaze = pd.Series({i: gaze is not None for i, gaze in samples.gaze_maps.items()})
    patients = cohort.images.set_index('image_id').patient_id
    share = has_gaze.groupby(patients).mean()
    assert set(share) == {0., 1.}
    assert .2 < share.mean() < .8


def test_an_offset_has_its_length(prepared):
    cohort = prepared.cohort
    row = cohort.images.iloc[0]
    gaze = read_gaze(cohort.file(row.gaze_path))
    changes = (bench.degrade_gaze('offset', level, cohort, 0) for level in (0, 20))
    before, after = (c(row.image_id, gaze)[['row', 'col']].to_numpy() for c in changes)
    distance = np.hypot(*(after-before).T)*row.pixel_spacing_mm
    assert np.allclose(distance, 20)


def test_last_weights_are_not_those_of_the_best_epoch(prepared):
    seed_everything(0)
    dls = two_view_dls(prepared, bs=4, seed=0, device='cpu')
    small = dict(width=8, heads=2, head_dim=8, embed=16, hidden=8)
    learn = mammonet_learner(
        dls, 'cross_view', 'small', 8, seed=0, model_args=small, cbs=[bench.LastWeights()])
    learn.keep_best.comp = lambda new, best: learn.epoch == 0 # the first epoch counts as the best
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 1e-2)
    restored, last = learn.model.state_dict(), learn.last_weights.state
    assert learn.keep_best.epoch_of_best == 0
    assert any(not torch.equal(restored[k], v) for k, v in last.items())
    assert all(torch.equal(restored[k], v) for k, v in learn.keep_best.weights.items())
