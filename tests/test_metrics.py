"Metrics against other implementations, on random and on degenerate tables, and their speed against the plain way"
import math, time
from functools import partial
import numpy as np, pandas as pd, pytest, scipy.stats
import sklearn.metrics as skm
from sklearn.linear_model import LogisticRegression
from mammo_nb.core.errors import InputError
from mammo_nb.metrics.predictions import (REQUIRED_COLUMNS, aggregate, check_predictions, noisy_or, one_output, predictions_table, read_predictions,
                                          wide, with_labels, write_predictions)
from mammo_nb.metrics.bootstrap import auc, bootstrap_ci, bootstrap_values, paired_difference, patient_weights
from mammo_nb.metrics.classification import (accuracy, at_threshold, brier, calibration_table, choose_threshold, evaluate,
                                             expected_calibration_error, fit_calibrator, known_labels, roc_points, sensitivity, sensitivity_at, specificity)

def table(n=60, seed=0, d=1.5, split=None, digits=None, version='v0'):
    "n patients, both breasts"
    r = np.random.default_rng(seed)
    y = (r.random(2*n) < .4).astype(float)
    y[:2] = 0, 1
    v = 1/(1+np.exp(-(d*y+r.normal(size=2*n))))
    rows = pd.DataFrame(dict(patient_id=np.repeat([f'p{i:04d}' for i in range(n)], 2), laterality=['L', 'R']*n, label=y))
    if split is not None: rows['split'] = split
    return predictions_table(rows, v if digits is None else v.round(digits), 'demo', 'probability', version)

# -- predictions

@pytest.mark.parametrize('column', REQUIRED_COLUMNS)
def test_a_missing_column_is_named(column):
    with pytest.raises(InputError, match=f'no {column}'): check_predictions(table().drop(columns=column))

@pytest.mark.parametrize('column,value,expected', [
    ('value', -.01, 'probability'), ('value', 1.01, 'probability'), ('value', math.inf, 'finite'), ('value', math.nan, 'a value in every row'),
    ('laterality', 'left', 'L or R'), ('patient_id', None, 'a value in every row'), ('patient_id', 7, 'text'), ('split', 'validation', 'train, valid, test'),
    ('label', .5, '0, 1 or NaN'), ('version', None, 'a value in every row'), ('image_id', 3, 'text')])
def test_one_bad_cell_is_found_by_row_and_column(column, value, expected):
    t = table(split='test').astype({c: object for c in ('patient_id', 'laterality', 'split', 'version', 'image_id')})
    t.loc[17, column] = value
    with pytest.raises(InputError, match=f'row 17 .*{column}.*{expected}'): check_predictions(t)

def test_rows_of_detections_differ_by_their_boxes():
    t = pd.concat([table(3).assign(image_id='i', output='score', xmin=x, ymin=0., xmax=x+5, ymax=9.) for x in (1., 2.)], ignore_index=True)
    check_predictions(t)
    with pytest.raises(InputError, match='repeats an earlier one'): check_predictions(t.assign(xmin=1., xmax=6.))

def test_labels_join_whatever_the_order_and_index():
    t = table()
    b = t[['patient_id', 'exam_id', 'laterality', 'label']].assign(exam_id='e', split='test')
    b['exam_id'] = 'e-' + b['patient_id']; p = t.drop(columns='label').assign(exam_id=b['exam_id'])
    mixed = p.sample(frac=1, random_state=0)
    got = with_labels(mixed, b.sample(frac=1, random_state=1))
    assert got.index.tolist() == mixed.index.tolist()
    assert got.sort_index()['label'].tolist() == t['label'].tolist()

@pytest.mark.parametrize('end', ('csv', 'parquet'))
def test_file_round_trip_is_exact(tmp_path, end):
    t = table(200, split='valid')
    t.loc[5, 'label'] = np.nan
    back = read_predictions(write_predictions(t, tmp_path/f'a.{end}'))
    assert list(back.columns) == list(t.columns)
    assert back['value'].tolist() == t['value'].tolist()
    for c in t.columns: assert back[c].isna().tolist() == t[c].isna().tolist(), c
    assert back['patient_id'].tolist() == t['patient_id'].tolist()

def test_a_damaged_file_is_an_input_error(tmp_path):
    for name, data in (('a.parquet', b'PAR1 no'), ('b.csv', b'patient_id\n\xff\xfe,\n'), ('c.csv', b'')):
        (tmp_path/name).write_bytes(data)
        with pytest.raises(InputError, match=name): read_predictions(tmp_path/name)
    p = write_predictions(table(3), tmp_path/'d.csv')
    p.write_text(p.read_text().replace('demo', '', 1))
    with pytest.raises(InputError, match='d.csv.*system'): read_predictions(p)

def test_aggregation_does_not_depend_on_the_order():
    t = table(20)
    t['exam_id'] = t['patient_id']
    for how in ('mean', 'max', 'noisy_or'):
        a, b = (aggregate(o, 'patient', how).sort_values('patient_id', ignore_index=True) for o in (t, t.sample(frac=1, random_state=0)))
        np.testing.assert_allclose(a['value'], b['value'], rtol=1e-12)
    assert (aggregate(t, 'patient', 'noisy_or')['value'] >= aggregate(t, 'patient', 'max')['value'] - 1e-12).all()
    assert len(wide(t)) == 40

# -- bootstrap

@pytest.mark.parametrize('digits', (None, 1, 0))
def test_auc_is_scikit_learns(digits):
    r = np.random.default_rng(1)
    for seed in range(5):
        t = table(40, seed, digits=digits)
        y, v = t['label'].to_numpy(), t['value'].to_numpy()
        w = r.integers(0, 4, (8, len(y)))
        np.testing.assert_allclose(auc(y, v, w), [skm.roc_auc_score(y, v, sample_weight=o) for o in w], atol=1e-12)
        a, b = roc_points(y, v), skm.roc_curve(y, v, drop_intermediate=False)
        np.testing.assert_allclose(a[0], b[0], atol=1e-12); np.testing.assert_allclose(a[1], b[1], atol=1e-12)

def test_intervals_agree_with_scipy_for_a_mean():
    t = table(150)
    one = t[t['laterality'] == 'L']
    mine = bootstrap_ci(one, lambda value, weight: float(np.average(value, weights=weight)), columns=('value',), n_boot=4000)
    theirs = scipy.stats.bootstrap((one['value'].to_numpy(),), np.mean, n_resamples=4000, method='percentile', rng=0).confidence_interval
    assert abs(mine.low-theirs.low) < .004 and abs(mine.high-theirs.high) < .004

def test_bootstrap_equals_copying_patients():
    t = table(30)
    rng = np.random.default_rng(3)
    codes = np.repeat(np.arange(30), 2)
    for w in patient_weights(codes, 30, 20, rng):
        copies = t.loc[np.repeat(t.index, w.astype(int))]
        assert math.isclose(auc(t['label'], t['value'], w), skm.roc_auc_score(copies['label'], copies['value']), abs_tol=1e-12)

def test_paired_difference_is_narrower_and_seeds_average():
    a = table(100); b = a.assign(value=np.clip(a['value']+np.random.default_rng(0).normal(0, .02, len(a)), 0, 1), version='v1')
    d, ea, eb = paired_difference(a, b, auc), bootstrap_ci(a, auc), bootstrap_ci(b, auc)
    assert math.isclose(d.value, ea.value-eb.value, abs_tol=1e-12)
    assert d.high-d.low < .5*min(ea.high-ea.low, eb.high-eb.low)
    assert math.isclose(bootstrap_ci([a, b], auc).value, (ea.value+eb.value)/2, abs_tol=1e-12)

def test_redrawn_resamples_are_counted_exactly():
    t = table(40)
    t['label'] = (t['patient_id'] == 'p0003').astype(float)
    full = bootstrap_values([t], auc, n_boot=500)
    assert full[1].shape == (1, 500) and full[2] > 0
    assert abs(full[2]/(full[2]+500) - (1-1/40)**40) < .08
    part = bootstrap_values([t], auc, n_boot=100)
    assert part[2] < full[2]

def test_too_few_patients_of_a_class_stop_with_an_error():
    t = table(4); t['label'] = [0., 0, 0, 0, 0, 0, 0, 1]
    def only_if_all_there(label, value, weight): return 1. if (weight > 0).all() else math.nan
    with pytest.raises(InputError, match='without a value'): bootstrap_ci(t, only_if_all_there)
    with pytest.raises(InputError, match='at least 2'): bootstrap_ci(t[['laterality', 'label', 'value']].assign(patient_id='p').iloc[6:], auc)

def test_fast_enough_and_small_enough():
    t = table(1000)
    assert len(t) == 2000
    w = patient_weights(np.repeat(np.arange(1000), 2), 1000, 20, np.random.default_rng(0))
    best = lambda f: min(_timed(f) for _ in range(3))
    ours = best(lambda: bootstrap_ci(t, auc, n_boot=2000))
    plain = 100*best(lambda: [skm.roc_auc_score(t['label'], t['value'], sample_weight=o) for o in w])
    assert plain/ours > 4, f'{plain/ours:.1f} times faster than a loop over scikit-learn'

def _timed(f):
    start = time.perf_counter(); f(); return time.perf_counter()-start

# -- classification

def test_thresholds_never_come_from_or_go_to_the_wrong_rows():
    valid, test = table(50, 1, split='valid'), table(50, 2, split='test')
    th = choose_threshold(valid)
    for bad in (test, table(50, 1, split='train'), pd.concat([valid, test.assign(patient_id='q'+test['patient_id'])]), valid.assign(split=None)):
        with pytest.raises(InputError, match='not tested'): choose_threshold(bad)
        with pytest.raises(InputError, match='not tested'): fit_calibrator(bad)
    with pytest.raises(InputError, match='other rows'): evaluate(valid, th, n_boot=20)
    with pytest.raises(InputError, match='whose threshold'): at_threshold(accuracy, th, test.assign(system='another'))
    assert evaluate(test, th, n_boot=20)['n'].eq(100).all()

@pytest.mark.parametrize('rule', ('youden', 'accuracy', 'sensitivity', 'specificity'))
@pytest.mark.parametrize('digits', (None, 1))
def test_threshold_rules_against_brute_force(rule, digits):
    for seed in range(4):
        t = table(25, seed, split='valid', digits=digits)
        y, v = t['label'].to_numpy(), t['value'].to_numpy()
        got = choose_threshold(t, rule, .8).value
        cuts = np.r_[np.unique(v), 2]
        se, sp, ac = (np.array([f(y, v, threshold=c) for c in cuts]) for f in (sensitivity, specificity, accuracy))
        mine = [float(f(y, v, threshold=got)) for f in (sensitivity, specificity, accuracy)]
        if rule == 'youden': assert math.isclose(mine[0]+mine[1], (se+sp).max())
        if rule == 'accuracy': assert math.isclose(mine[2], ac.max())
        if rule == 'sensitivity': assert mine[0] >= .8 and math.isclose(mine[1], sp[se >= .8].max())
        if rule == 'specificity': assert mine[1] >= .8 and math.isclose(mine[0], se[sp >= .8].max())

def test_unknown_labels_are_counted_and_left_out(capsys):
    t = table(30, split='test'); t.loc[[3, 8], 'label'] = np.nan
    assert len(known_labels(t)) == 58
    assert '2 of 60 rows have an unknown label' in capsys.readouterr().out
    assert evaluate(t, n_boot=20)['n'].eq(58).all()
    with pytest.raises(InputError, match='2 unknown of 60'): bootstrap_ci(t, auc)

def test_calibration_conserves_rows_and_sums():
    t = table(80)
    for strategy in ('uniform', 'quantile'):
        c = calibration_table(t, 7, strategy, n_boot=50)
        assert c['n'].sum() == len(t)
        assert math.isclose((c['n']*c['observed']).sum(), t['label'].sum())
        assert math.isclose((c['n']*c['mean_value']).sum(), t['value'].sum())
        assert ((c['observed_low'] <= c['observed']+1e-9) & (c['observed'] <= c['observed_high']+1e-9)).all()
    y, v = np.array([0., 1]), np.array([0., 1])
    assert expected_calibration_error(y, v) == 0 and expected_calibration_error(1-y, v) == 1  # also at the outer edges

def test_a_perfectly_calibrated_model_stays_as_it_is():
    found = []
    for seed in range(6):
        r = np.random.default_rng(seed); n = 4000; p = r.beta(1, 2, n)
        rows = pd.DataFrame(dict(patient_id=[f'p{i}' for i in range(n)], label=(r.random(n) < p).astype(float), split='valid'))
        t = predictions_table(rows, p, 'demo', 'probability', 'v')
        found.append(fit_calibrator(t).numbers)
        plain = LogisticRegression(C=np.inf).fit(np.log(p/(1-p))[:, None], t['label'])  # without Platt's softened targets
        assert np.allclose(found[-1], [plain.coef_[0, 0], plain.intercept_[0]], atol=.005)
        assert np.abs(fit_calibrator(t, 'isotonic')(p)-p).mean() < .04
    slope, intercept = np.mean(found, 0)
    assert abs(slope-1) < .05 and abs(intercept) < .05

def test_brier_decomposes():
    "Murphy: Brier = reliability - resolution + uncertainty, exact when every bin holds one value"
    r = np.random.default_rng(0); v = r.choice([.1, .35, .6, .9], 500); y = (r.random(500) < v).astype(float)
    rel = sum((v == u).mean()*(u-y[v == u].mean())**2 for u in np.unique(v))
    res = sum((v == u).mean()*(y[v == u].mean()-y.mean())**2 for u in np.unique(v))
    assert math.isclose(brier(y, v), rel-res+y.mean()*(1-y.mean()))

def test_sensitivity_at_is_the_step_below_the_grid():
    for seed in range(5):
        t = table(30, seed)
        y, v = t['label'].to_numpy(), t['value'].to_numpy()
        fpr, tpr, _ = skm.roc_curve(y, v, drop_intermediate=False)
        grid = np.linspace(0, 1, 37)
        np.testing.assert_allclose(sensitivity_at(y, v, grid=grid), [tpr[fpr <= g+1e-12].max() for g in grid], atol=1e-12)  # no ties: steps

def test_constant_values_say_nothing():
    t = table(30).assign(value=.5)
    e = bootstrap_ci(t, auc, n_boot=100)
    assert (e.value, e.low, e.high) == (.5, .5, .5)
    assert bootstrap_ci(t, auc, n_boot=100, method='percentile').redrawn == 0
    assert bootstrap_ci(t, partial(sensitivity, threshold=.5), n_boot=50).value == 1
