"Mammo-Net's benchmark: what its rows are made of, on tables that can be counted by hand."
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
import mammo_nb.core.fastai_import
from benchmarks import mammonet as bench
from mammo_nb.core.seeding import seed_everything
from mammo_nb.data.cache import prepare_cohort
from mammo_nb.data.cohort import breasts
from mammo_nb.data.gaze import read_gaze
from mammo_nb.data.insilico import insilico_cohort, write_insilico
from mammo_nb.data.prepare import PrepareConfig
from mammo_nb.data.samples import TwoViewDataset, two_view_dls
from mammo_nb.learners.mammonet import mammonet_learner

def said(*values, label=None): # one breast a patient, the second half with cancer
    n = len(values)
    return pd.DataFrame(dict(patient_id=[f'p{i}' for i in range(n)], exam_id='e', laterality='L', label=[0.]*(n//2)+[1.]*(n-n//2) if label is None else label, value=values))

def found(values, silent=None, first=0):
    n = len(values)
    return pd.DataFrame(dict(patient_id=[f'p{i+first}' for i in range(n)], image_id=[f'i{i+first}' for i in range(n)], attention_in_lesion=values, pointing_game=0., coverage_auc=.5, silent=0. if silent is None else silent))

GOOD, BAD, HALF = said(.1, .2, .8, .9), said(.9, .8, .2, .1), said(.1, .8, .3, .9)  # AUC 1, 0, 3 of 4 pairs

def test_auc_is_of_the_best_epoch_and_auc_last_of_the_last():
    run = [(GOOD, None, BAD)]
    assert bench.estimate(run, 'auc').value == 1 and bench.estimate(run, 'auc_last').value == 0

def test_accuracy_is_at_one_half(): assert bench.estimate([(said(.4, .6, .5, .9), None, GOOD)], 'acc').value == .75

def test_seeds_are_averaged(): assert bench.estimate([(GOOD, None, GOOD), (HALF, None, GOOD)], 'auc').value == pytest.approx(.875)

def test_intervals_are_over_patients_and_pairs_are_paired():
    rng = np.random.default_rng(0); values, label = rng.random(40), np.repeat([0., 1.], 20)
    one = said(*values, label=label); both = pd.concat([one, one.assign(laterality='R')], ignore_index=True)  # a second breast that says the same adds no patient
    a, b = (bench.estimate([(t, None, t)], 'auc') for t in (one, both))
    assert a.low < a.value-.05 and (b.value, b.low, b.high) == pytest.approx((a.value, a.low, a.high)) and b.n == 2*a.n
    e = bench.estimate([(both, None, both)], 'auc', [(both, None, both)]); assert (e.value, e.low, e.high) == (0, 0, 0)
    near = both.assign(value=both['value']+.001*rng.random(80)); e = bench.estimate([(near, None, near)], 'auc', [(both, None, both)])
    assert e.high-e.low < .1*(a.high-a.low)  # the same patients are drawn for both
    pictures = found(list(rng.random(40))); two = pd.concat([pictures, pictures.assign(image_id=pictures.image_id+'mlo')], ignore_index=True)
    a, b = (bench.estimate([(one, t, one)], 'attention_in_lesion') for t in (pictures, two)); assert (b.value, b.low, b.high) == pytest.approx((a.value, a.low, a.high)) and a.low < a.value-.03

def test_half_of_the_gain_is_the_mean_of_both_ends():
    without, all_of_it, half = [(said(.9, .2, .8, .1), None, GOOD)], [(GOOD, None, GOOD)], [(HALF, None, GOOD)]
    low = bench.estimate(without, 'auc').value
    assert bench.estimate(half, 'auc', [*without, *all_of_it]).value == pytest.approx(.75-(low+1)/2)

def test_the_mean_of_two_views():
    order = BAD.iloc[::-1]  # found by its breast, not by its place
    a, nothing, last = bench.mean_of_views((GOOD, None, HALF), (order, None, HALF))
    assert a['value'].tolist() == pytest.approx([.5]*4) and nothing is None and last['value'].tolist() == HALF['value'].tolist()

def test_attention_is_compared_on_the_same_pictures():
    a, b = [(GOOD, found([.5]*12), GOOD)], [(GOOD, found([.2]*12, first=1), GOOD)]
    e = bench.estimate(a, 'attention_in_lesion', b)
    assert e.value == pytest.approx(.3) and e.n == 11
    assert bench.estimate(a, 'attention_in_lesion', [(GOOD, found([.2]*12, first=3), GOOD)]) is None  # nine pictures say nothing

def test_silent_pictures_are_left_out_where_both_should_speak():
    a, b = [(GOOD, found([.5]*12), GOOD)], [(GOOD, found([.1]*11+[.9], silent=[0.]*11+[1.]), GOOD)]
    assert bench.estimate(a, 'attention_both_speak', b).value == pytest.approx(.4) and bench.estimate(a, 'attention_in_lesion', b).value < .4

def test_patients_are_trained_on_or_tested_on_and_more_tests_change_no_training():
    few, many = (bench.chosen(40, k, 3).images for k in (100, 160))
    for t in (few, many): assert (t.split.eq('test') == (t.patient_index >= 40)).all() and not set(t.patient_id[t.split == 'test']) & set(t.patient_id[t.split != 'test'])
    assert set(few.split) == {'train', 'valid', 'test'} and few.patient_index.max() < 100 <= many.patient_index.max() < 160
    assert few[few.split != 'test'].equals(many[many.split != 'test']) and set(few.image_id) < set(many.image_id)

def test_each_training_by_itself():
    rows = {}
    class Rows:
        def add(self, variant, metric, value, *_, **__): rows[variant, metric] = value
    low, high = found([.1]*12), found([.5]*12)
    bench.training_by_training(Rows(), 'd', [3, 5], [(GOOD, high, GOOD), (HALF, low, GOOD)], [[(BAD, low, GOOD)], [(HALF, low, GOOD), (BAD, high, GOOD)]])
    assert rows == {('d, training 3', 'auc'): 1, ('d, training 5', 'auc'): pytest.approx(.75-.375), ('d, training 3', 'attention_in_lesion'): pytest.approx(.4), ('d, training 5', 'attention_in_lesion'): pytest.approx(-.2)}

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    d = tmp_path_factory.mktemp('rows')
    return prepare_cohort(write_insilico(insilico_cohort(12, seed=4, exams=1), d/'files', progress=False), d/'cache', PrepareConfig(size=(96, 72)), progress=False)

def test_no_lesion_is_left_out_and_no_healthy_breast_is_asked():
    cohort = insilico_cohort(120, seed=4, exams=1)
    some = bench.with_lesions(SimpleNamespace(cohort=cohort))
    ill = set(cohort.findings.image_id[cohort.findings.pathology == 'malignant'])
    tested = set(cohort.images.image_id[cohort.images.split == 'test'])
    pairs = [set(p) for p in some[['image_id_cc', 'image_id_mlo']].to_numpy()]
    assert ill & tested and ill & tested <= set.union(*pairs) <= tested and all(p & ill for p in pairs)

def test_gaze_goes_missing_by_patient(prepared):
    ds = TwoViewDataset(prepared, breasts(prepared.cohort), gaze=bench.worse('missing', .5, prepared.cohort, 0))
    has = pd.Series({i: g is not None for i, g in ds.gazes.items()}).groupby(prepared.cohort.images.set_index('image_id').patient_id).mean()
    assert set(has) == {0., 1.} and .2 < has.mean() < .8

def test_an_offset_has_its_length(prepared):
    im = prepared.cohort.images.iloc[0]
    g = read_gaze(prepared.cohort.file(im.gaze_path))
    still, moved = (bench.worse('offset', k, prepared.cohort, 0)(im.image_id, g)[['row', 'col']].to_numpy() for k in (0, 20))
    assert np.allclose(np.hypot(*(moved-still).T)*im.pixel_spacing_mm, 20)

def test_last_weights_are_not_those_of_the_best_epoch(prepared):
    seed_everything(0)
    learn = mammonet_learner(two_view_dls(prepared, bs=4, seed=0, device='cpu'), 'cross_view', 'small', 8, seed=0, model_args=dict(width=8, heads=2, head_dim=8, embed=16, hidden=8), cbs=[bench.LastWeights()])
    learn.keep_best.comp = lambda new, best: learn.epoch == 0  # the first epoch is called the best
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-2)
    now, last = learn.model.state_dict(), learn.last_weights.state
    assert learn.keep_best.epoch_of_best == 0 and any(not torch.equal(now[k], v) for k, v in last.items())
    assert all(torch.equal(now[k], v) for k, v in learn.keep_best.weights.items())
