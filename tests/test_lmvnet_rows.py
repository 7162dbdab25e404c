"LMV-Net's and the registration's benchmarks: what their rows are made of, on tables that can be counted by hand."
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
import mammo_nb.core.fastai_import
from benchmarks import lmvnet as bench, registration
from mammo_nb.data.cache import prepare_cohort
from mammo_nb.data.insilico import insilico_cohort, write_insilico
from mammo_nb.data.prepare import PrepareConfig
from mammo_nb.data.risk_samples import breast_history

TIMES, EVENTS = [.2, 1.5, 3.5, 6., 6., 6.], [1, 1, 1, 0, 0, 0]  # found now, two later cancers, three that are followed
RIGHT, WRONG = [.9, .8, .7, .3, .2, .1], [.1, .2, .3, .7, .8, .9]
LATE = [.05, .8, .7, .3, .2, .1]  # wrong about the cancer that is there to be seen, and right about the later ones

def table(risk, times=TIMES, events=EVENTS):
    return pd.DataFrame(dict(patient_id=[f'p{i}' for i in range(len(risk))], time=times, event=events, **{f'risk_year_{k}': risk for k in range(1, 6)}))

@pytest.mark.parametrize('risk,want,later', [(RIGHT, 1., 1.), (WRONG, 0., 0.), ([.5]*6, .5, .5), (LATE, 7/12, 1.)])
def test_c_index_and_that_of_later_cancers(risk, want, later):
    "12 pairs: 5 with the first cancer, 4 with the second, 3 with the third; nobody is censored before the last, so every pair weighs the same"
    assert bench.estimate([table(risk)], 'c_index').value == pytest.approx(want)
    assert bench.estimate([table(risk)], 'c_index_later').value == pytest.approx(later)

def test_trainings_are_averaged_and_differences_keep_their_sign():
    right, wrong, flat = ([table(r)] for r in (RIGHT, WRONG, [.5]*6))
    assert bench.estimate([*right, *flat], 'c_index').value == pytest.approx(.75)
    assert bench.estimate(right, 'c_index', flat).value == pytest.approx(.5) and bench.estimate(wrong, 'c_index', flat).value == pytest.approx(-.5)
    assert bench.estimate(right, 'auc_year_2').value == 1 and bench.estimate(wrong, 'auc_year_2').value == 0

def test_every_row_is_made_of_its_own_predictions():
    rows, test = {}, pd.DataFrame(dict(patient_id=[f'p{i}' for i in range(6)], exam_id=[f'e{i}' for i in range(6)], laterality='L', split='test', years_to_cancer=[.2, 1.5, 3.5, np.nan, np.nan, np.nan], years_followed=6.))
    says = lambda risk, kind: bench.known_outputs(np.repeat(np.array(risk)[:, None], 5, 1), test, kind)
    found = {('lmvnet', s): pd.concat([says(RIGHT, 'lmvnet'), says(LATE, 'lmvnet_no_prior'), says(WRONG, 'lmvnet_no_mlo')], ignore_index=True) for s in (0, 1)}
    found |= {('unaligned', s): says([.5]*6, 'unaligned') for s in (0, 1)} | {('current_exam', 0): says(WRONG, 'current_exam'), ('current_exam', 1): says([.5]*6, 'current_exam')} | {('density', s): says([.5]*6, 'density') for s in (0, 1)}
    bench.report(SimpleNamespace(add=lambda v, m, value, *_, **__: rows.update({(v, m): float(value)})), found, [0, 1], test, np.repeat(np.array(RIGHT)[:, None], 5, 1))
    c = {k: v for (k, m), v in rows.items() if m == 'c_index'}
    assert c == pytest.approx({'oracle': 1, 'lmvnet': 1, 'lmvnet_no_prior': 7/12, 'lmvnet_no_mlo': 0, 'unaligned': .5, 'current_exam': .25, 'density': .5, 'lmvnet - current_exam': .75, 'lmvnet - unaligned': .5, 'lmvnet - lmvnet_no_prior': 5/12, 'lmvnet - lmvnet_no_mlo': 1, 'lmvnet_no_prior - current_exam': 7/12-.25})
    assert rows['prevalent', 'share_of_events'] == pytest.approx(1/3) and {m for _, m in rows} >= {'brier', *(f'auc_year_{k}' for k in range(1, 6))}

def test_nobody_is_trained_on_and_tested_on(monkeypatch):
    "By the tables of the cohorts; no picture is drawn"
    monkeypatch.setattr(bench, 'write_insilico', lambda cohort, folder: cohort); monkeypatch.setattr(bench, 'prepare_cohort', lambda cohort, *_: SimpleNamespace(cohort=cohort))
    first = SimpleNamespace(cohort=insilico_cohort(60, 5)); (_, learn), (_, test) = bench.pictures_of(first, bench.unseen(60, 160, 5))
    assert len(learn) and len(test) and not set(learn.patient_id) & set(test.patient_id) and set(learn.split) == {'train', 'valid'} and set(test.split) == {'test'}
    assert not set(test.patient_id) & set(first.cohort.images.patient_id)  # not even with those who were left out
    last = lambda p: p.images.groupby('patient_id').exam_date.max()
    drawn = insilico_cohort(160, 5); dates = drawn.images.drop_duplicates('exam_id').set_index('exam_id').exam_date
    assert (test.exam_id.map(dates) == test.patient_id.map(last(drawn))).all() and len(test) == 2*test.patient_id.nunique()

def test_a_ratio_is_of_the_means_and_has_the_right_side_up():
    pairs = lambda seconds: pd.DataFrame(dict(patient_id=list('abcd'), seconds=seconds))
    rival, ours = pairs([4., 4., 8., 8.]), pairs([1., 1., 1., 3.])
    e = registration.ratio(rival, ours, 'seconds'); assert e.value == pytest.approx(4) and e.low <= 4 <= e.high
    assert registration.ratio(ours, rival, 'seconds').value == pytest.approx(.25)

def test_pairs_are_of_test_patients_one_each(tmp_path):
    cohort = write_insilico(insilico_cohort(24, seed=4, rows=96, cols=72, mm=2.5), tmp_path/'files', workers=1, progress=False)
    ds = registration.unseen(prepare_cohort(cohort, tmp_path/'cache', PrepareConfig(size=(64, 48)), workers=1, progress=False), 3)
    assert len(ds) == 3 and ds.rows.patient_id.is_unique and set(ds.rows.split) == {'test'}
    assert set(ds.rows.patient_id) <= set(cohort.images.patient_id[cohort.images.split == 'test'])
    with pytest.raises(SystemExit, match='100 wanted'): registration.unseen(ds.prepared, 100)
