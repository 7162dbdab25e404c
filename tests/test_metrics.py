"Metrics against other implementations, on random and on degenerate tables, and their speed against a plain loop"
import json
import math
import time
from functools import partial

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import sklearn.metrics as skm
from sklearn.linear_model import LogisticRegression

from mammo_nb.core.errors import InputError
from mammo_nb.metrics.bootstrap import bootstrap_ci, bootstrap_values, paired_difference
from mammo_nb.metrics.calibration import (
    Calibrator, brier, calibration_table, expected_calibration_error, fit_calibrator
)
from mammo_nb.metrics.classification import evaluate_classification
from mammo_nb.metrics.localization import (
    localization_ci, localization_table, localize, on_grid, positive_attention,
    show_attention
)
from mammo_nb.metrics.predictions import (
    REQUIRED_COLUMNS, check_predictions, predictions_table, read_predictions,
    write_predictions
)
from mammo_nb.metrics.roc import roc_band, roc_points, sensitivity_at
from mammo_nb.metrics.tables import (
    aggregate, combine_outputs, noisy_or, pivot_outputs, select_output, with_labels
)
from mammo_nb.metrics.thresholds import (
    accuracy, at_threshold, balanced_accuracy, choose_threshold, known_labels, sensitivity,
    specificity
)
from mammo_nb.metrics.weighted import auc, patient_weights

matplotlib.use('Agg')

def table(n=60, seed=0, d=1.5, split=None, digits=None, version='v0'):
    "Predictions of both breasts of n patients"
    rng = np.random.default_rng(seed)
    label = (rng.random(2*n) < .4).astype(float)
    label[:2] = 0, 1
    value = 1/(1+np.exp(-(d*label+rng.normal(size=2*n))))
    if digits is not None:
        value = value.round(digits)
    patients = np.repeat([f'p{i:04d}' for i in range(n)], 2)
    rows = pd.DataFrame(dict(patient_id=patients, laterality=['L', 'R']*n, label=label))
    if split is not None:
        rows['split'] = split
    return predictions_table(rows, value, 'demo', 'probability', version)

def labels_and_values(t):
    return t['label'].to_numpy(), t['value'].to_numpy()

def small(**columns):
    "Four breasts of two patients"
    ids = dict(
        patient_id=['p1', 'p1', 'p2', 'p2'], exam_id=['e1', 'e1', 'e2', 'e2'],
        laterality=['L', 'R', 'L', 'R'], image_id=None)
    who = dict(system='two_view', output='probability', value=[.9, .2, .1, .4], version='seed0')
    return pd.DataFrame(ids).assign(**{**who, **columns})

# ---- the schema

@pytest.mark.parametrize('column', REQUIRED_COLUMNS)
def test_a_missing_column_is_named(column):
    with pytest.raises(InputError, match=f'no {column}'):
        check_predictions(table().drop(columns=column))

@pytest.mark.parametrize('column,value,expected', [
    ('value', -.01, 'probability'), ('value', 1.01, 'probability'), ('value', math.inf, 'finite'),
    ('value', math.nan, 'a value in every row'), ('laterality', 'left', 'L or R'),
    ('laterality', 'B', 'L or R'), ('patient_id', None, 'a value in every row'),
    ('patient_id', 7, 'text'), ('split', 'validation', 'train, valid, test'),
    ('label', .5, '0, 1 or NaN'), ('label', 2, '0, 1 or NaN'),
    ('version', None, 'a value in every row'), ('image_id', 3, 'text')])
def test_one_bad_cell_is_found_by_row_and_column(column, value, expected):
    texts = ('patient_id', 'laterality', 'split', 'version', 'image_id')
    t = table(split='test').astype({c: object for c in texts})
    t.loc[17, column] = value
    with pytest.raises(InputError, match=f'row 17 .*{column}.*{expected}'):
        check_predictions(t)

def test_the_number_of_further_bad_rows_is_told():
    with pytest.raises(InputError, match=r'patient_id: found 1 \(and 3 more rows\), expected text'):
        check_predictions(small(patient_id=[1, 1, 2, 2]))

def test_a_repeated_row_is_refused():
    t = small()
    with pytest.raises(InputError, match='repeats an earlier one'):
        check_predictions(pd.concat([t, t.iloc[:1]]))

def test_a_repeated_column_is_refused():
    t = small()
    with pytest.raises(InputError, match='value twice'):
        check_predictions(pd.concat([t, t[['value']]], axis=1))

def test_a_patient_in_two_splits_is_refused():
    with pytest.raises(InputError, match='split: found .* each patient in one split only'):
        check_predictions(small(split=['train', 'test', 'valid', 'valid']))

def test_an_exam_of_two_patients_is_refused():
    with pytest.raises(InputError, match='an exam of one patient'):
        check_predictions(small(exam_id='a'))

def test_values_that_are_no_floats_are_refused():
    with pytest.raises(InputError, match='float numbers'):
        check_predictions(small(value=['x']*4))

def test_one_value_a_row():
    with pytest.raises(InputError, match='one a row'):
        predictions_table(small(), [.8], 's', 'probability', 'v')
    with pytest.raises(InputError, match='a probability'):
        predictions_table(small(), [8, 1, 1, 1], 's', 'probability', 'v')

def test_rows_of_detections_differ_by_their_boxes():
    one = table(3).assign(image_id='i', output='score', ymin=0., ymax=9.)
    t = pd.concat([one.assign(xmin=x, xmax=x+5) for x in (1., 2.)], ignore_index=True)
    check_predictions(t)
    with pytest.raises(InputError, match='repeats an earlier one'):
        check_predictions(t.assign(xmin=1., xmax=6.))

@pytest.mark.parametrize('boxes,expected', [
    ((0, 0, 5, np.nan), 'four finite sides of a box'), ((0, 0, np.inf, 5), 'four finite sides'),
    ((5, 0, 5, 5), 'xmin < xmax'), ((0, 9, 5, 5), 'ymin < ymax')])
def test_a_box_that_is_none_is_refused(boxes, expected):
    rows = pd.DataFrame(dict(patient_id=['p'], image_id=['i']))
    with pytest.raises(InputError, match=expected):
        predictions_table(rows, [.5], 's', 'probability', 'v', boxes=[boxes])

def test_a_box_lies_in_an_image():
    rows = pd.DataFrame(dict(patient_id=['p']))
    with pytest.raises(InputError, match='the image of the box'):
        predictions_table(rows, [.5], 's', 'probability', 'v', boxes=[(0, 0, 5, 5)])

def test_an_image_has_boxes_or_says_that_it_has_none():
    rows = pd.DataFrame(dict(patient_id=['p', 'p'], image_id=['i', 'i']))
    boxes = [(0, 0, 5, 5), (np.nan,)*4]
    with pytest.raises(InputError, match='this image has other rows with boxes'):
        predictions_table(rows, [.5, 0], 's', 'probability', 'v', boxes=boxes)

def test_boxes_have_four_sides():
    with pytest.raises(InputError, match='boxes: found shape'):
        predictions_table(small(), [.5]*4, 's', 'probability', 'v', boxes=[(0, 0, 5)]*4)
    with pytest.raises(InputError, match='no ymax'):
        check_predictions(small(image_id='i', xmin=1., ymin=1., xmax=2.))

# ---- columns that travel along

def test_years_of_the_truth_travel_with_the_predictions(tmp_path):
    rows = small(years_to_cancer=[.5, np.nan, np.nan, np.nan], years_followed=[np.nan, 3, 2.5, 1/3])
    t = predictions_table(rows, [.1, .2, .3, .4], 's', 'risk_year_1', 'v')
    assert t['years_followed'].tolist()[1:] == [3, 2.5, 1/3]
    for ending in ('csv', 'parquet'):
        back = read_predictions(write_predictions(t, tmp_path/f'a.{ending}'))
        assert list(back) == list(t)
        assert back['years_followed'].tolist()[1:] == [3, 2.5, 1/3]
        assert back['years_to_cancer'].isna().tolist() == [False, True, True, True]

@pytest.mark.parametrize('column', ('years_to_cancer', 'years_followed'))
@pytest.mark.parametrize('years', (-.1, np.inf, 'soon'))
def test_years_below_zero_are_refused(column, years):
    t = small(**{column: pd.Series([1., 2, years, 3], dtype=object)})
    with pytest.raises(InputError, match=f'row 2 .*{column}: found .*, expected years from 0 on'):
        check_predictions(t)

def test_paths_of_written_images_travel_with_the_predictions(tmp_path):
    paths = ['mlo/a.png', None, 'b.png', None]
    t = predictions_table(small(), [1.]*4, 'gan', 'realism', 'v', paths=paths)
    for ending in ('csv', 'parquet'):
        back = read_predictions(write_predictions(t, tmp_path/f'a.{ending}'))
        assert back['path'].isna().tolist() == [False, True, False, True]
        assert back['path'].dropna().tolist() == ['mlo/a.png', 'b.png']

def test_the_path_of_the_source_image_is_not_taken_for_one_that_was_written():
    rows = small(path='source.dcm')
    assert 'path' not in predictions_table(rows, [1.]*4, 's', 'probability', 'v')

@pytest.mark.parametrize('path', ('/tmp/a.png', '../a.png', 'a/../../b.png', 'a\\b.png', 'C:/a.png', '', 3))
def test_a_path_out_of_the_folder_is_refused(path):
    with pytest.raises(InputError, match='row 0 .*path: found'):
        check_predictions(small(path=[path, None, None, None]))

# ---- files

@pytest.mark.parametrize('ending', ('csv', 'parquet'))
def test_file_round_trip_is_exact(tmp_path, ending):
    t = table(200, split='valid')
    t.loc[5, 'label'] = np.nan
    back = read_predictions(write_predictions(t, tmp_path/f'a.{ending}'))
    assert list(back.columns) == list(t.columns)
    assert back['value'].tolist() == t['value'].tolist()
    for column in t.columns:
        assert back[column].isna().tolist() == t[column].isna().tolist(), column
    assert back['patient_id'].tolist() == t['patient_id'].tolist()

def test_patients_with_leading_zeros_and_the_initials_na(tmp_path):
    for ids in (['0012', '0012', '7', '7'], ['NA', 'NA', 'null', 'null']):
        t = small(patient_id=ids, exam_id=None)
        assert read_predictions(write_predictions(t, tmp_path/'a.csv'))['patient_id'].tolist() == ids

def test_other_file_endings_are_refused():
    with pytest.raises(InputError, match='one of .csv, .parquet'):
        write_predictions(small(), 'predictions.xlsx')

def test_a_damaged_file_is_an_input_error(tmp_path):
    damaged = {'a.parquet': b'PAR1 no', 'b.csv': b'patient_id\n\xff\xfe,\n', 'c.csv': b''}
    for name, data in damaged.items():
        (tmp_path/name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            read_predictions(tmp_path/name)
    path = write_predictions(table(3), tmp_path/'d.csv')
    path.write_text(path.read_text().replace('demo', '', 1))
    with pytest.raises(InputError, match='d.csv.*system'):
        read_predictions(path)

def test_a_file_that_is_missing_or_lacks_columns(tmp_path):
    with pytest.raises(InputError, match='none.csv: file: found nothing'):
        read_predictions(tmp_path/'none.csv')
    (tmp_path/'bad.csv').write_text('patient_id,value\n0012,3\n')
    with pytest.raises(InputError, match='no exam_id'):
        read_predictions(tmp_path/'bad.csv')

def test_a_table_that_breaks_the_schema_leaves_the_old_file(tmp_path):
    path = write_predictions(small(), tmp_path/'a.csv')
    before = path.read_bytes()
    with pytest.raises(InputError):
        write_predictions(small(value=[2.]*4), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ['a.csv']

# ---- joining, selecting, combining

def test_labels_join_whatever_the_order_and_index():
    t = table()
    breasts = t[['patient_id', 'laterality', 'label']].assign(split='test')
    breasts['exam_id'] = 'e-' + breasts['patient_id']
    p = t.drop(columns='label').assign(exam_id=breasts['exam_id'])
    mixed = p.sample(frac=1, random_state=0)
    joined = with_labels(mixed, breasts.sample(frac=1, random_state=1))
    assert joined.index.tolist() == mixed.index.tolist()
    assert joined.sort_index()['label'].tolist() == t['label'].tolist()

def test_a_table_of_breasts_that_does_not_fit_is_refused():
    p, breasts = small(), small(label=0)
    with pytest.raises(InputError, match='one row for a breast'):
        with_labels(p, pd.concat([breasts, breasts]))
    with pytest.raises(InputError, match='no label'):
        with_labels(p, breasts.drop(columns='label'))
    with pytest.raises(InputError, match='a breast of the cohort'):
        with_labels(p, breasts[1:])

def test_years_are_joined_with_the_labels():
    breasts = small(label=0, years_followed=[1., 2, 3, 4])
    assert with_labels(small(), breasts)['years_followed'].tolist() == [1, 2, 3, 4]

def test_an_output_that_is_missing_is_named():
    with pytest.raises(InputError, match="output: found 'risk', expected one of probability"):
        select_output(small(), 'risk')

def test_aggregation_does_not_depend_on_the_order():
    t = table(20)
    t['exam_id'] = t['patient_id']
    mixed = t.sample(frac=1, random_state=0)
    for how in ('mean', 'max', 'noisy_or'):
        a, b = (aggregate(o, 'patient', how).sort_values('patient_id') for o in (t, mixed))
        np.testing.assert_allclose(a['value'], b['value'], rtol=1e-12)
    noisy, largest = (aggregate(t, 'patient', how)['value'] for how in ('noisy_or', 'max'))
    assert (noisy >= largest - 1e-12).all()
    assert len(pivot_outputs(t)) == 40

def test_the_truth_of_an_exam():
    rows = small(
        label=[1, 0, 0, np.nan], split='test', years_to_cancer=[2., np.nan, np.nan, np.nan],
        years_followed=[np.nan, 5, 5, 4])
    exams = aggregate(rows, 'exam')
    assert exams['label'].isna().tolist() == [False, True]
    assert exams['years_to_cancer'].tolist()[0] == 2
    assert exams['years_followed'].isna().tolist() == [True, False]
    assert exams['years_followed'].tolist()[1] == 4
    assert exams['split'].tolist() == ['test', 'test']

def test_years_of_a_patient_with_two_exams_are_unknown():
    rows = small(exam_id=['e1', 'e2', 'e3', 'e3'], years_followed=[5., 3, 4, 4])
    years = aggregate(rows, 'patient')['years_followed']
    assert years.isna().tolist() == [True, False]
    assert years.tolist()[1] == 4

def test_unknown_ways_to_combine_are_refused():
    with pytest.raises(InputError, match='one of mean, max, noisy_or'):
        aggregate(small(), 'patient', 'median')
    with pytest.raises(InputError, match='probabilities'):
        aggregate(small(output='logit', value=[3., 2, 1, 0]), 'patient', 'noisy_or')
    with pytest.raises(InputError, match='outputs'):
        combine_outputs(small(), ('probability', 'probability_cc'), 'x')
    with pytest.raises(InputError, match=r'probabilities in \[0, 1\]'):
        noisy_or([.5, 3])

# ---- bootstrap

@pytest.mark.parametrize('digits', (None, 1, 0))
def test_auc_is_that_of_scikit_learn(digits):
    rng = np.random.default_rng(1)
    for seed in range(5):
        y, v = labels_and_values(table(40, seed, digits=digits))
        w = rng.integers(0, 4, (8, len(y)))
        expected = [skm.roc_auc_score(y, v, sample_weight=o) for o in w]
        np.testing.assert_allclose(auc(y, v, w), expected, atol=1e-12)
        fpr, tpr, _ = skm.roc_curve(y, v, drop_intermediate=False)
        np.testing.assert_allclose(roc_points(y, v)[0], fpr, atol=1e-12)
        np.testing.assert_allclose(roc_points(y, v)[1], tpr, atol=1e-12)

def test_intervals_agree_with_scipy_for_a_mean():
    t = table(150)
    left = t[t['laterality'] == 'L']
    mean = lambda value, weight: float(np.average(value, weights=weight))
    ours = bootstrap_ci(left, mean, columns=('value',), n_boot=4000)
    theirs = scipy.stats.bootstrap(
        (left['value'].to_numpy(),), np.mean, n_resamples=4000, method='percentile', rng=0)
    assert abs(ours.low-theirs.confidence_interval.low) < .004
    assert abs(ours.high-theirs.confidence_interval.high) < .004

def test_bootstrap_equals_copying_patients():
    t = table(30)
    codes = np.repeat(np.arange(30), 2)
    for w in patient_weights(codes, 30, 20, np.random.default_rng(3)):
        copies = t.loc[np.repeat(t.index, w.astype(int))]
        expected = skm.roc_auc_score(copies['label'], copies['value'])
        assert math.isclose(auc(t['label'], t['value'], w), expected, abs_tol=1e-12)

def test_paired_difference_is_narrower_and_seeds_average():
    a = table(100)
    noise = np.random.default_rng(0).normal(0, .02, len(a))
    b = a.assign(value=np.clip(a['value']+noise, 0, 1), version='v1')
    difference, one, other = paired_difference(a, b, auc), bootstrap_ci(a, auc), bootstrap_ci(b, auc)
    width = min(one.high-one.low, other.high-other.low)
    assert math.isclose(difference.value, one.value-other.value, abs_tol=1e-12)
    assert difference.high-difference.low < .5*width
    assert math.isclose(bootstrap_ci([a, b], auc).value, (one.value+other.value)/2, abs_tol=1e-12)

def test_a_system_against_itself_and_in_another_order():
    a = table(30)
    same = paired_difference(a, a, auc, n_boot=50)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    mixed = a.sample(frac=1, random_state=0)
    assert bootstrap_ci(mixed, auc, n_boot=50) == bootstrap_ci(a, auc, n_boot=50)

def test_redrawn_resamples_are_counted_exactly():
    t = table(40)
    t['label'] = (t['patient_id'] == 'p0003').astype(float)
    _, replicates, n_redrawn = bootstrap_values([t], auc, n_boot=500)
    assert replicates.shape == (1, 500)
    assert n_redrawn > 0
    assert abs(n_redrawn/(n_redrawn+500) - (1-1/40)**40) < .08
    assert bootstrap_values([t], auc, n_boot=100)[2] < n_redrawn
    assert bootstrap_ci(t, auc, n_boot=500).n_redrawn == n_redrawn

def test_too_few_patients_of_a_class_stop_with_an_error():
    t = table(4)
    t['label'] = [0., 0, 0, 0, 0, 0, 0, 1]
    def only_if_everybody_was_drawn(label, value, weight):
        return 1. if (weight > 0).all() else math.nan
    with pytest.raises(InputError, match='without a value'):
        bootstrap_ci(t, only_if_everybody_was_drawn)
    one_patient = t[['laterality', 'label', 'value']].assign(patient_id='p').iloc[6:]
    with pytest.raises(InputError, match='at least 2'):
        bootstrap_ci(one_patient, auc)

@pytest.mark.parametrize('change,expected', [
    (lambda t: [t.assign(label=np.nan)], 'label: found 60 unknown of 60'),
    (lambda t: [pd.concat([t, t.assign(version='seed1')])], 'found seed1, v0, expected one'),
    (lambda t: [pd.concat([t, t])], 'each row once'),
    (lambda t: [t, t.assign(label=1-t['label'])], 'table 1: label'),
    (lambda t: [t, t.iloc[1:]], 'the same rows as table 0'),
    (lambda t: [t.drop(columns='label')], 'no label'),
    (lambda t: [t.assign(label=0.)], 'both classes')])
def test_tables_that_would_give_a_wrong_interval_are_refused(change, expected):
    with pytest.raises(InputError, match=expected):
        bootstrap_values(change(table(30)), auc)

@pytest.mark.parametrize('options,expected', [
    (dict(method='magic'), 'one of percentile, bca'), (dict(level=95), 'level: found 95'),
    (dict(n_boot=1), 'n_boot')])
def test_options_of_an_interval(options, expected):
    with pytest.raises(InputError, match=expected):
        bootstrap_ci(table(10), auc, **options)

def test_bca_needs_two_patients_of_each_class():
    t = table(20)
    t['label'] = (t['patient_id'] == 'p0003').astype(float)
    with pytest.raises(InputError, match='a class with one patient only'):
        bootstrap_ci(t, auc, method='bca', n_boot=50)

def test_a_vector_is_for_bootstrap_values():
    two = lambda label, value, weight: np.array([1., 2])
    assert bootstrap_values([table(10)], two, n_boot=20)[1].shape == (1, 20, 2)
    with pytest.raises(InputError, match='see bootstrap_values'):
        bootstrap_ci(table(10), two, n_boot=20)

def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter()-start

def test_resampling_is_faster_than_a_loop():
    t = table(1000)
    w = patient_weights(np.repeat(np.arange(1000), 2), 1000, 20, np.random.default_rng(0))
    def loop():
        for o in w:
            skm.roc_auc_score(t['label'], t['value'], sample_weight=o)
    ours = min(seconds(lambda: bootstrap_ci(t, auc, n_boot=2000)) for _ in range(3))
    plain = 100*min(seconds(loop) for _ in range(3))
    assert plain/ours > 4, f'{plain/ours:.1f} times faster than a loop over scikit-learn'

# ---- thresholds

def test_thresholds_never_come_from_or_go_to_the_wrong_rows():
    valid, test = table(50, 1, split='valid'), table(50, 2, split='test')
    threshold = choose_threshold(valid)
    mixed = pd.concat([valid, test.assign(patient_id='q'+test['patient_id'])])
    for bad in (test, table(50, 1, split='train'), mixed, valid.assign(split=None)):
        with pytest.raises(InputError, match='not tested'):
            choose_threshold(bad)
        with pytest.raises(InputError, match='not tested'):
            fit_calibrator(bad)
    with pytest.raises(InputError, match='other rows'):
        evaluate_classification(valid, threshold, n_boot=20)
    with pytest.raises(InputError, match='demo, for which the threshold was chosen'):
        at_threshold(accuracy, threshold, test.assign(system='another'))
    assert evaluate_classification(test, threshold, n_boot=20)['n'].eq(100).all()

@pytest.mark.parametrize('change,options,expected', [
    (lambda t: t.drop(columns='split'), {}, 'no such column'),
    (lambda t: t[t['label'] == 0], {}, 'both classes'),
    (lambda t: t, dict(rule='best'), 'one of youden'),
    (lambda t: t, dict(rule='sensitivity', target=90), 'target'),
    (lambda t: t.assign(version=['v0', 'v1']*50), {}, 'see select_output')])
def test_rows_on_which_no_threshold_can_be_chosen(change, options, expected):
    with pytest.raises(InputError, match=expected):
        choose_threshold(change(table(50, 1, split='valid')), **options)

def test_a_threshold_needs_rows_with_a_split():
    threshold = choose_threshold(table(50, 1, split='valid'))
    with pytest.raises(InputError, match='no such column'):
        at_threshold(accuracy, threshold, table(20))

@pytest.mark.parametrize('rule', ('youden', 'accuracy', 'sensitivity', 'specificity'))
@pytest.mark.parametrize('digits', (None, 1))
def test_threshold_rules_against_brute_force(rule, digits):
    metrics = (sensitivity, specificity, accuracy)
    for seed in range(4):
        t = table(25, seed, split='valid', digits=digits)
        y, v = labels_and_values(t)
        chosen = choose_threshold(t, rule, .8).value
        cuts = np.r_[np.unique(v), 2]
        sens, spec, acc = (np.array([f(y, v, threshold=c) for c in cuts]) for f in metrics)
        my_sens, my_spec, my_acc = (float(f(y, v, threshold=chosen)) for f in metrics)
        if rule == 'youden':
            assert math.isclose(my_sens+my_spec, (sens+spec).max())
        if rule == 'accuracy':
            assert math.isclose(my_acc, acc.max())
        if rule == 'sensitivity':
            assert my_sens >= .8
            assert math.isclose(my_spec, spec[sens >= .8].max())
        if rule == 'specificity':
            assert my_spec >= .8
            assert math.isclose(my_sens, sens[spec >= .8].max())

@pytest.mark.parametrize('metric,theirs', [
    (sensitivity, skm.recall_score), (specificity, partial(skm.recall_score, pos_label=0)),
    (accuracy, skm.accuracy_score), (balanced_accuracy, skm.balanced_accuracy_score)])
def test_metrics_at_a_threshold_are_those_of_scikit_learn(metric, theirs):
    y, v = labels_and_values(table(80))
    w = np.random.default_rng(0).integers(0, 3, (7, len(y)))
    assert math.isclose(metric(y, v, threshold=.3), theirs(y, v >= .3), abs_tol=1e-12)
    expected = [theirs(y, v >= .3, sample_weight=o) for o in w]
    np.testing.assert_allclose(metric(y, v, w, threshold=.3), expected, atol=1e-12)

def test_unknown_labels_are_counted_and_left_out(capsys):
    t = table(30, split='test')
    t.loc[[3, 8], 'label'] = np.nan
    assert len(known_labels(t)) == 58
    assert '2 of 60 rows have an unknown label' in capsys.readouterr().out
    assert evaluate_classification(t, n_boot=20)['n'].eq(58).all()
    with pytest.raises(InputError, match='2 unknown of 60'):
        bootstrap_ci(t, auc)
    with pytest.raises(InputError, match='no label'):
        known_labels(t.drop(columns='label'))

# ---- ROC curves

def test_sensitivity_at_is_the_step_below_the_grid():
    grid = np.linspace(0, 1, 37)
    for seed in range(5):
        y, v = labels_and_values(table(30, seed))  # no ties: all steps are vertical
        fpr, tpr, _ = skm.roc_curve(y, v, drop_intermediate=False)
        expected = [tpr[fpr <= g+1e-12].max() for g in grid]
        np.testing.assert_allclose(sensitivity_at(y, v, grid=grid), expected, atol=1e-12)

def test_the_area_under_the_steps_is_the_auc():
    y, v = labels_and_values(table(200))
    grid = np.linspace(0, 1, 2001)[:-1]+2.5e-4
    assert abs(sensitivity_at(y, v, grid=grid).mean()-auc(y, v)) < 2e-3

def test_the_curve_lies_in_its_band():
    band = roc_band(table(100), n_boot=200)
    assert (band['low'] <= band['sensitivity']+1e-9).mean() > .97
    assert (band['high'] >= band['sensitivity']-1e-9).mean() > .97
    assert band['sensitivity'].iloc[-1] == 1

# ---- calibration

def test_calibration_conserves_rows_and_sums():
    t = table(80)
    for strategy in ('uniform', 'quantile'):
        c = calibration_table(t, 7, strategy, n_boot=50)
        assert c['n'].sum() == len(t)
        assert math.isclose((c['n']*c['observed']).sum(), t['label'].sum())
        assert math.isclose((c['n']*c['mean_value']).sum(), t['value'].sum())
        assert (c['observed_low'] <= c['observed']+1e-9).all()
        assert (c['observed'] <= c['observed_high']+1e-9).all()

def test_calibration_at_the_outer_edges():
    y = np.array([0., 1])
    assert expected_calibration_error(y, np.array([0., 1])) == 0
    assert expected_calibration_error(1-y, np.array([0., 1])) == 1

def test_the_calibration_error_of_copies():
    y, v = labels_and_values(table(80))
    w = np.random.default_rng(0).integers(0, 3, len(y))
    copies = expected_calibration_error(np.repeat(y, w), np.repeat(v, w))
    assert math.isclose(expected_calibration_error(y, v, w), copies, abs_tol=1e-12)

def test_unknown_strategies_and_methods_are_refused():
    with pytest.raises(InputError, match='one of uniform, quantile'):
        calibration_table(table(10), strategy='equal')
    with pytest.raises(InputError, match='one of logistic, isotonic'):
        fit_calibrator(table(10, split='valid'), 'spline')
    with pytest.raises(InputError, match='both classes'):
        fit_calibrator(table(10, split='valid').assign(label=0.))

def test_a_calibrated_model_stays_as_it_is():
    numbers = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        p = rng.beta(1, 2, 4000)
        label = (rng.random(4000) < p).astype(float)
        patients = [f'p{i}' for i in range(4000)]
        rows = pd.DataFrame(dict(patient_id=patients, label=label, split='valid'))
        t = predictions_table(rows, p, 'demo', 'probability', 'v')
        numbers.append(fit_calibrator(t).numbers)
        logit = np.log(p/(1-p))[:, None]
        plain = LogisticRegression(C=np.inf).fit(logit, label)  # without Platt's softened targets
        assert np.allclose(numbers[-1], [plain.coef_[0, 0], plain.intercept_[0]], atol=.005)
        assert np.abs(fit_calibrator(t, 'isotonic')(p)-p).mean() < .04
    slope, intercept = np.mean(numbers, 0)
    assert abs(slope-1) < .05
    assert abs(intercept) < .05

def test_isotonic_recalibration_rises_and_is_stored_as_json():
    t = table(100, split='valid')
    calibrator = fit_calibrator(t, 'isotonic')
    grid = np.linspace(0, 1, 99)
    assert (np.diff(calibrator(grid)) >= 0).all()
    stored = Calibrator(**json.loads(json.dumps(calibrator.__dict__)))
    assert stored(grid).tolist() == calibrator(grid).tolist()

def test_separable_classes_give_probabilities_inside():
    t = table(50, split='valid')
    calibrator = fit_calibrator(t.assign(value=np.where(t['label'] == 1, .9, .1)))
    assert calibrator(.9) < 1
    assert calibrator(.1) > 0

def test_brier_decomposes():
    "Murphy: Brier = reliability - resolution + uncertainty, exact when every bin holds one value"
    rng = np.random.default_rng(0)
    v = rng.choice([.1, .35, .6, .9], 500)
    y = (rng.random(500) < v).astype(float)
    groups = [(v == u, u) for u in np.unique(v)]
    reliability = sum(rows.mean()*(u-y[rows].mean())**2 for rows, u in groups)
    resolution = sum(rows.mean()*(y[rows].mean()-y.mean())**2 for rows, _ in groups)
    uncertainty = y.mean()*(1-y.mean())
    assert math.isclose(brier(y, v), reliability-resolution+uncertainty)

def test_constant_values_have_no_information():
    t = table(30).assign(value=.5)
    e = bootstrap_ci(t, auc, n_boot=100)
    assert (e.value, e.low, e.high) == (.5, .5, .5)
    assert bootstrap_ci(t, auc, n_boot=100, method='percentile').n_redrawn == 0
    assert bootstrap_ci(t, partial(sensitivity, threshold=.5), n_boot=50).value == 1

# ---- localisation

def lesion_and_breast():
    yy, xx = np.mgrid[:96, :72]
    breast = (xx/66)**2+((yy-48)/44)**2 < 1
    lesion = (xx-30)**2+(yy-40)**2 < 64
    beyond = (xx-64)**2+(yy-48)**2 < 64
    return lesion, breast, beyond

def test_the_middle_of_a_map_stays_the_middle():
    cells = np.arange(12.).reshape(4, 3)
    assert math.isclose(on_grid(cells, (8, 6))[2:6, 2:4].mean(), cells.mean(), abs_tol=1e-9)

def test_intersection_over_union_by_hand():
    bar = np.zeros((8, 8))
    bar[2:4, 2:6] = 1
    assert math.isclose(localize(bar, bar.T > 0)['iou'], 4/12)  # 4 pixels of 12 in common

@pytest.mark.parametrize('attention', (np.ones((96, 72)), -np.ones((12, 9))))
def test_an_outline_that_leaves_the_breast_still_has_its_chance(attention):
    lesion, breast, beyond = lesion_and_breast()
    assert (beyond & ~breast).any()
    found = localize(attention, lesion | beyond, breast)
    assert math.isclose(found['attention_in_lesion'], found['chance'], abs_tol=1e-9)
    assert math.isclose(found['pointing_game'], found['chance'], abs_tol=1e-9)

def test_an_empty_map_is_not_drawn_as_an_even_one_and_no_map_paints_the_air():
    "Issue 19, 6"
    lesion, breast, _ = lesion_and_breast()
    even, empty = np.ones((12, 9)), np.zeros((12, 9))
    assert positive_attention(empty, breast.shape, breast).max() == 0
    assert positive_attention(even, breast.shape, breast)[~breast].max() == 0
    _, (left, right) = plt.subplots(1, 2)
    drawn = show_attention(.4*breast, even, breast, ax=left).images
    assert drawn[1].get_array()[~breast, 3].max() == 0  # transparent
    assert len(show_attention(.4*breast, empty, breast, ax=right).images) == 1
    assert right.texts[0].get_text() == 'empty map'
    plt.close('all')
    scores = [localize(m, lesion, breast) for m in (even, empty)]
    assert [s['empty_map'] for s in scores] == [0, 1]

def test_shapes_of_map_and_mask():
    lesion, _, _ = lesion_and_breast()
    with pytest.raises(InputError, match='shapes'):
        localize(np.ones(72), lesion)

class NoImages:
    "A prepared cohort of which only the table of images is asked"
    class cohort:
        images = pd.DataFrame(dict(image_id=['a']))

def test_a_map_of_an_unknown_image_is_refused():
    with pytest.raises(InputError, match='found nobody'):
        localization_table({'nobody': np.ones((2, 2))}, NoImages())

def test_an_unknown_localisation_metric_is_refused():
    with pytest.raises(InputError, match='metric'):
        localization_ci(pd.DataFrame(), 'luck')
