"LMV-Net's and the registration's benchmarks: what their rows are made of, on tables that can be counted by hand."
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
import mammo_nb.core.fastai_import
from benchmarks import lmvnet as bench, registration
from mammo_nb.data.cache import prepare_cohort
from mammo_nb.data.insilico import insilico_cohort, write_insilico
from mammo_nb.data.prepare import PrepareConfig
from mammo_nb.data.risk_samples import RiskDataset, breast_history
from mammo_nb.metrics.predictions import wide

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
    found |= {('unaligned', s): says([.5]*6, 'unaligned') for s in (0, 1)} | {('current_exam', s): pd.concat([says([WRONG, [.5]*6][s], 'current_exam'), says(LATE, 'current_exam_no_mlo')], ignore_index=True) for s in (0, 1)} | {('density', s): says([.5]*6, 'density') for s in (0, 1)}
    bench.report(SimpleNamespace(add=lambda v, m, value, *_, **__: rows.update({(v, m): float(value)})), found, [0, 1], test, np.repeat(np.array(RIGHT)[:, None], 5, 1))
    c = {k: v for (k, m), v in rows.items() if m == 'c_index'}
    assert c == pytest.approx({'oracle': 1, 'lmvnet': 1, 'lmvnet_no_prior': 7/12, 'lmvnet_no_mlo': 0, 'lmvnet_half_mlo': 5.5/12, 'unaligned': .5, 'current_exam': .25, 'current_exam_no_mlo': 7/12, 'current_exam_half_mlo': 3.5/12, 'density': .5, 'lmvnet - current_exam': .75, 'lmvnet - unaligned': .5, 'lmvnet - lmvnet_no_prior': 5/12, 'lmvnet - lmvnet_no_mlo': 1, 'lmvnet_no_prior - current_exam': 7/12-.25, 'lmvnet_no_mlo - current_exam_no_mlo': -7/12, 'lmvnet - lmvnet_half_mlo': 6.5/12, 'current_exam - current_exam_half_mlo': -.5/12})
    assert rows['prevalent', 'share_of_events'] == pytest.approx(1/3) and {m for _, m in rows} >= {'brier', *(f'auc_year_{k}' for k in range(1, 6))}

def test_the_questions_are_those_of_the_rows(monkeypatch, tmp_path):
    "By models that were never trained: what each row was answered from, and by which head"
    cohort = write_insilico(insilico_cohort(16, seed=4, rows=96, cols=72, mm=2.5), tmp_path/'files', workers=1, progress=False)
    prepared = prepare_cohort(cohort, tmp_path/'cache', PrepareConfig(size=(64, 48)), workers=1, progress=False)
    rows = breast_history(prepared.cohort, current='last'); assert rows.previous_image_id_cc_1.notna().sum() > 4
    monkeypatch.setattr(bench, 'LMV', bench.LMV | dict(width=4)); still = lambda fixed, moving: fixed.new_zeros(len(fixed), 2, *fixed.shape[2:])
    torch.save(bench.prior_flows(RiskDataset(prepared, rows, in_memory=False), still, progress=False), tmp_path/'flows.pt')
    first = bench.model_of('current_exam', 0); torch.save(first.state_dict(), tmp_path/'current_exam_0.pt')
    torch.save(bench.model_of('lmvnet', 0, first.encoder.state_dict()).state_dict(), tmp_path/'lmvnet_0.pt')
    said = {k: bench.said(k, 0, [(prepared, rows), (prepared, rows)], 1, tmp_path) for k in ('lmvnet', 'current_exam')}
    tables = {k: wide(t) for ts in said.values() for k, t in ts.groupby('system')}
    assert set(tables) == {'lmvnet', 'lmvnet_no_prior', 'lmvnet_no_mlo', 'current_exam', 'current_exam_no_mlo'} and all(len(t) == len(rows) for t in tables.values())
    priors = rows.previous_image_id_cc_1.notna().sum()
    assert {k: (t.views_used.unique().tolist(), t.priors_used.sum()) for k, t in tables.items()} == {'lmvnet': ([2], priors), 'lmvnet_no_prior': ([2], 0), 'lmvnet_no_mlo': ([1], priors), 'current_exam': ([2], 0), 'current_exam_no_mlo': ([1], 0)}
    for k, t in tables.items(): assert (t.risk_year_5 == t.risk_cc_year_5).all() == k.endswith('_no_mlo') and ('risk_mlo_year_5' in t) == (not k.endswith('_no_mlo'))
    assert (tables['lmvnet_no_mlo'].risk_year_5-tables['lmvnet'].risk_year_5).abs().max() > 0 and (tables['lmvnet_no_prior'].risk_year_5-tables['lmvnet'].risk_year_5).abs().max() > 0

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
