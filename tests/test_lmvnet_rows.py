"""The rows of the benchmarks of LMV-Net and of the registration, on tables that can be counted by hand."""
from itertools import repeat
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import mammo_nb.core.fastai_import
from benchmarks import lmvnet as bench
from benchmarks import registration
from benchmarks._trainings import save_tensors
from mammo_nb.insilico.files import insilico_cohort, write_insilico
from mammo_nb.metrics.tables import pivot_outputs
from mammo_nb.preparation.prepare import PrepareConfig
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.registration.prior_flows import prior_flows
from mammo_nb.samples.risk import breast_history

TIMES = [.2, 1.5, 3.5, 6., 6., 6.] # a prevalent cancer, two later ones, three without
EVENTS = [1, 1, 1, 0, 0, 0]
RIGHT = [.9, .8, .7, .3, .2, .1]
WRONG = [.1, .2, .3, .7, .8, .9]
LATE = [.05, .8, .7, .3, .2, .1] # wrong for the prevalent cancer, right for the later ones
EVEN = [.5]*6
PATIENTS = [f'p{i}' for i in range(6)]


def make_risk_table(risk):
    risks = dict(zip(bench.CURVE, repeat(risk)))
    return pd.DataFrame(dict(patient_id=PATIENTS, time=TIMES, event=EVENTS, **risks))


def five_years(risk):
    "[N,5]: the same risk in all years"
    return np.repeat(np.array(risk)[:, None], 5, 1)


def value(risks, metric, other=None):
    tables = [make_risk_table(r) for r in risks]
    other = None if other is None else [make_risk_table(r) for r in other]
    return bench.estimate(tables, metric, other).value


@pytest.mark.parametrize('risk, all_cancers, later', [
    (RIGHT, 1., 1.), (WRONG, 0., 0.), (EVEN, .5, .5), (LATE, 7/12, 1.)])
def test_c_index_of_all_and_of_later_cancers(risk, all_cancers, later):
    "12 pairs: 5 with the first cancer, 4 with the second, 3 with the third, of equal weight"
    assert value([risk], 'c_index') == pytest.approx(all_cancers)
    assert value([risk], 'c_index_later') == pytest.approx(later)


def test_trainings_are_averaged():
    assert value([RIGHT, EVEN], 'c_index') == pytest.approx(.75)


def test_differences_keep_their_sign():
    assert value([RIGHT], 'c_index', [EVEN]) == pytest.approx(.5)
    assert value([WRONG], 'c_index', [EVEN]) == pytest.approx(-.5)


def test_yearly_auc():
    assert value([RIGHT], 'auc_year_2') == 1
    assert value([WRONG], 'auc_year_2') == 0


# ---- every row is made of its own predictions

def make_test_breasts():
    "Six patients with one breast each"
    years = [.2, 1.5, 3.5, np.nan, np.nan, np.nan]
    return pd.DataFrame(dict(
        patient_id=PATIENTS, exam_id=[f'e{i}' for i in range(6)], laterality='L', split='test',
        years_to_cancer=years, years_followed=6.))


def make_predictions(test, **risks):
    "Predictions of one training; risks by variant"
    tables = [bench.risk_predictions(five_years(r), test, v) for v, r in risks.items()]
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope='module')
def rows():
    "Rows of two trainings, by variant and metric"
    test = make_test_breasts()
    found = {}
    for seed, current in ((0, WRONG), (1, EVEN)):
        found['lmvnet', seed] = make_predictions(
            test, lmvnet=RIGHT, lmvnet_no_prior=LATE, lmvnet_no_mlo=WRONG)
        found['unaligned', seed] = make_predictions(test, unaligned=EVEN)
        found['density', seed] = make_predictions(test, density=EVEN)
        found['current_exam', seed] = make_predictions(
            test, current_exam=current, current_exam_no_mlo=LATE)
    rows = {}
    def add(variant, metric, value, n): rows[variant, metric] = float(value)
    def add_estimate(variant, metric, estimate): rows[variant, metric] = estimate.value
    recorder = SimpleNamespace(add=add, add_estimate=add_estimate)
    bench.add_rows(recorder, found, [0, 1], test, five_years(RIGHT))
    return rows


def test_c_index_of_every_variant(rows):
    wanted = dict(
        oracle=1, lmvnet=1, lmvnet_no_prior=7/12, lmvnet_no_mlo=0, lmvnet_half_mlo=5.5/12,
        unaligned=.5, current_exam=.25, current_exam_no_mlo=7/12, current_exam_half_mlo=3.5/12,
        density=.5)
    found = {v: c for (v, metric), c in rows.items() if metric == 'c_index' and ' - ' not in v}
    assert found == pytest.approx(wanted)


def test_c_index_of_every_difference(rows):
    wanted = {
        'lmvnet - current_exam': .75, 'lmvnet - unaligned': .5, 'lmvnet - lmvnet_no_prior': 5/12,
        'lmvnet - lmvnet_no_mlo': 1, 'lmvnet_no_prior - current_exam': 7/12-.25,
        'lmvnet_no_mlo - current_exam_no_mlo': -7/12, 'lmvnet - lmvnet_half_mlo': 6.5/12,
        'current_exam - current_exam_half_mlo': -.5/12}
    found = {v: c for (v, metric), c in rows.items() if metric == 'c_index' and ' - ' in v}
    assert found == pytest.approx(wanted)


def test_other_metrics(rows):
    assert rows['prevalent', 'share_of_events'] == pytest.approx(1/3)
    metrics = {metric for _, metric in rows}
    assert metrics >= {'brier', *(f'auc_year_{k}' for k in range(1, 6))}


# ---- what each variant reads, by models that were never trained

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two_exams')
    drawn = insilico_cohort(16, seed=4, rows=96, cols=72, pixel_spacing_mm=2.5)
    cohort = write_insilico(drawn, folder/'files', workers=1, progress=False)
    return prepare_cohort(
        cohort, folder/'cache', PrepareConfig(size=(64, 48)), workers=1, progress=False)


@pytest.fixture(scope='module')
def breasts(prepared):
    return breast_history(prepared.cohort, current='last')


def no_motion(fixed, moving):
    return fixed.new_zeros(len(fixed), 2, *fixed.shape[2:])


@pytest.fixture(scope='module')
def variants(prepared, breasts, tmp_path_factory):
    "Variant -> a row a breast with its outputs; of untrained weights"
    folder = tmp_path_factory.mktemp('weights')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, 'LMV', bench.LMV | dict(width=4))
        flows = prior_flows(prepared, breasts, no_motion, progress=False)
        save_tensors(flows, folder/'flows.pt')
        current = bench.new_model('current_exam', 0)
        save_tensors(current.state_dict(), folder/'current_exam_0.pt')
        lmvnet = bench.new_model('lmvnet', 0, current.encoder.state_dict())
        save_tensors(lmvnet.state_dict(), folder/'lmvnet_0.pt')
        data = [(prepared, breasts), (prepared, breasts)]
        tables = [bench.predictions(k, 0, data, 1, folder) for k in ('lmvnet', 'current_exam')]
    return {v: pivot_outputs(t) for table in tables for v, t in table.groupby('system')}


def test_every_variant_predicts_every_breast(variants, breasts):
    wanted = {
        'lmvnet', 'lmvnet_no_prior', 'lmvnet_no_mlo', 'current_exam', 'current_exam_no_mlo'}
    assert set(variants) == wanted
    assert all(len(t) == len(breasts) for t in variants.values())


def test_variants_read_the_views_and_priors_of_their_names(variants, breasts):
    n_priors = breasts.previous_image_id_cc_1.notna().sum()
    assert n_priors > 4
    found = {v: (t.views_used.unique().tolist(), t.priors_used.sum()) for v, t in variants.items()}
    assert found == dict(
        lmvnet=([2], n_priors), lmvnet_no_prior=([2], 0), lmvnet_no_mlo=([1], n_priors),
        current_exam=([2], 0), current_exam_no_mlo=([1], 0))


def test_without_mlo_the_cc_head_predicts(variants):
    for variant, table in variants.items():
        one_view = variant.endswith('_no_mlo')
        assert (table.risk_year_5 == table.risk_cc_year_5).all() == one_view
        assert ('risk_mlo_year_5' in table) == (not one_view)


@pytest.mark.parametrize('variant', ['lmvnet_no_mlo', 'lmvnet_no_prior'])
def test_missing_images_change_the_risk(variants, variant):
    difference = variants[variant].risk_year_5 - variants['lmvnet'].risk_year_5
    assert difference.abs().max() > 0


# ---- patients

@pytest.fixture(scope='module')
def drawn():
    "Patients to train on, and patients to test on; their tables only"
    return insilico_cohort(30, 5), bench.test_cohort(30, 80, 5)


def last_exams(drawn):
    return bench.last_exams(*(SimpleNamespace(cohort=c) for c in drawn))


def test_no_patient_is_trained_on_and_tested(drawn):
    (_, training), (_, test) = last_exams(drawn)
    first, _ = drawn
    assert set(training.split) == {'train', 'valid'}
    assert set(test.split) == {'test'}
    assert not set(training.patient_id) & set(test.patient_id)
    assert not set(test.patient_id) & set(first.images.patient_id) # nor with those left out


def test_both_breasts_are_tested_at_the_last_exam(drawn):
    _, (_, test) = last_exams(drawn)
    images = drawn[1].images
    dates = images.drop_duplicates('exam_id').set_index('exam_id').exam_date
    last = images.groupby('patient_id').exam_date.max()
    assert (test.exam_id.map(dates) == test.patient_id.map(last)).all()
    assert len(test) == 2*test.patient_id.nunique()


# ---- registration

def make_pairs(seconds):
    return pd.DataFrame(dict(patient_id=list('abcd'), seconds=seconds))


def test_a_ratio_is_of_means_and_has_the_first_table_on_top():
    rival, own = make_pairs([4., 4., 8., 8.]), make_pairs([1., 1., 1., 3.])
    ratio = registration.mean_ratio(rival, own, 'seconds')
    assert ratio.value == pytest.approx(4)
    assert ratio.low <= 4 <= ratio.high
    assert registration.mean_ratio(own, rival, 'seconds').value == pytest.approx(.25)


def test_pairs_are_of_test_patients_one_each(prepared):
    pairs = registration.test_pairs(prepared, 2)
    images = prepared.cohort.images
    assert len(pairs) == 2
    assert pairs.rows.patient_id.is_unique
    assert set(pairs.rows.patient_id) <= set(images.patient_id[images.split == 'test'])


def test_too_few_test_patients_stop_the_run(prepared):
    with pytest.raises(SystemExit, match='expected 100'):
        registration.test_pairs(prepared, 100)
