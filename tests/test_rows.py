"""Rows of samples against the cohort: whose images they name, of which exam, and in which split."""
import time

import pandas as pd
import pytest
import torch
from tiny_prepared import TinyPrepared, tiny_images

import mammo_nb.core.fastai_import
from mammo_nb.cohort.exams import breast_table
from mammo_nb.cohort.leaks import LeakError
from mammo_nb.core.errors import InputError
from mammo_nb.learners.mammonet import attention_maps, choose_weights
from mammo_nb.learners.systems import predict
from mammo_nb.models.risk_baselines import CurrentExamRisk
from mammo_nb.models.two_view import TwoViewNet
from mammo_nb.registration.mammoregnet import MammoRegNet
from mammo_nb.registration.prior_flows import prior_flows
from mammo_nb.samples.dataset import SampleDataset
from mammo_nb.samples.loaders import sample_dls
from mammo_nb.samples.pairs import PairDataset, exam_pairs, pair_dls
from mammo_nb.samples.risk import RiskDataset, breast_history, risk_dls
from mammo_nb.samples.two_view import TwoViewDataset, two_view_dls

SPLITS = {'A': 'train', 'B': 'train', 'C': 'valid', 'D': 'valid', 'E': 'test', 'F': 'test'}
TWO_VIEW, RISK, PAIRS = 'two_view', 'risk', 'pairs'
DATASETS = {TWO_VIEW: TwoViewDataset, RISK: RiskDataset, PAIRS: PairDataset}
LOADERS = {TWO_VIEW: two_view_dls, RISK: risk_dls, PAIRS: pair_dls}
TABLES = {TWO_VIEW: breast_table, RISK: breast_history, PAIRS: exam_pairs}
ALL = pytest.mark.parametrize('kind', DATASETS)


@pytest.fixture
def prepared():
    return TinyPrepared(tiny_images(SPLITS))


def table(prepared, kind):
    "Rows as they should be; the first is of patient A, left breast, second exam"
    rows = TABLES[kind](prepared.cohort)
    second = (rows.exam_id == 'Ab') & (rows.laterality == 'L')
    first = rows[second].head(1)
    return pd.concat([first, rows.drop(first.index)], ignore_index=True)


def columns_of_images(rows):
    "The columns that hold image ids"
    return [name for name in rows if rows[name].astype(str).str.contains('-[LR]-').any()]


def refused(prepared, kind, rows, *words):
    "The table is refused by the data set and by the loaders, with all words"
    for build in (DATASETS[kind], LOADERS[kind]):
        prepared.loaded.clear()
        kwargs = dict(device='cpu') if build in LOADERS.values() else {}
        with pytest.raises(InputError) as error:
            build(prepared, rows=rows, **kwargs)
        for word in (build.__name__, *words):
            assert word in str(error.value)
        assert prepared.loaded == [] # not one image was read
    return error.value


def change(rows, column, value, row=0):
    rows = rows.copy()
    rows[column] = rows[column].astype(object)
    rows.loc[row, column] = value
    return rows


@ALL
def test_good_rows_pass(prepared, kind):
    rows = table(prepared, kind)
    assert len(DATASETS[kind](prepared, rows)) == len(rows)
    assert len(LOADERS[kind](prepared, rows=rows, device='cpu').train_ds)


# ---- whose image it is

@ALL
@pytest.mark.parametrize('other, found', [
    ('Eb-L-CC', "patient_id 'E'"), # a test patient
    ('Bb-L-CC', "patient_id 'B'"), # another woman of the same split
    ('Ab-R-CC', "laterality 'R'")])
def test_an_image_of_another_breast(prepared, kind, other, found):
    rows = table(prepared, kind)
    for column in columns_of_images(rows):
        given = rows.loc[0, column]
        wrong = given[0].replace('A', other[0]) + given[1:2] + other[2:4] + given[4:]
        if found.startswith('lat'): wrong = given.replace('-L-', '-R-')
        refused(prepared, kind, change(rows, column, wrong), f'{column}: found', wrong, found, 'row 0')


@ALL
def test_an_image_of_the_other_view(prepared, kind):
    rows = table(prepared, kind)
    for column in columns_of_images(rows):
        given = rows.loc[0, column]
        wrong = given.replace('CC', 'MLO') if 'CC' in given else given.replace('MLO', 'CC')
        if kind == PAIRS and column == 'fixed':
            continue # see the next test
        refused(prepared, kind, change(rows, column, wrong), f'{column}: found', 'view')


def test_pairs_have_one_view_also_without_a_column_that_names_it(prepared):
    rows = table(prepared, PAIRS)
    wrong = change(rows, 'moving', rows.moving[0].replace('CC', 'MLO')).drop(columns='view')
    refused(prepared, PAIRS, wrong, 'moving: found', 'view')


@pytest.mark.parametrize('kind, column', [
    (TWO_VIEW, 'image_id_cc'), (TWO_VIEW, 'image_id_mlo'), (RISK, 'image_id_mlo'),
    (RISK, 'previous_image_id_cc_1'), (PAIRS, 'fixed')])
def test_an_image_of_another_exam(prepared, kind, column):
    rows = table(prepared, kind)
    given = rows.loc[0, column]
    wrong = given.replace('Ab', 'Aa') if given.startswith('Ab') else given.replace('Aa', 'Ab')
    refused(prepared, kind, change(rows, column, wrong), f'{column}: found', 'exam')


@ALL
def test_rows_that_do_not_name_their_patient_still_have_one(prepared, kind):
    rows = table(prepared, kind).drop(columns=['exam_id', 'laterality'])
    last = columns_of_images(rows)[-1]
    wrong = change(rows, last, 'Eb-L-MLO').drop(columns='patient_id')
    with pytest.raises(InputError, match='patient'):
        DATASETS[kind](prepared, wrong)


# ---- time

def exchange(rows, pairs):
    "Exchange the columns of the current and of the prior exam"
    names = {a: b for a, b in pairs} | {b: a for a, b in pairs}
    return rows.rename(columns=names)


def test_prior_and_current_exchanged(prepared):
    rows = table(prepared, PAIRS)
    refused(prepared, PAIRS, exchange(rows, [('fixed', 'moving')]), 'fixed: found', 'exam')
    unnamed = exchange(rows.drop(columns='exam_id'), [('fixed', 'moving')])
    error = refused(prepared, PAIRS, unnamed, 'moving: found', 'an image of an exam before')
    assert f'in {len(rows)} of {len(rows)} rows' in str(error)


@pytest.mark.parametrize('with_ids', [True, False])
def test_prior_and_current_exchanged_in_a_history(prepared, with_ids):
    rows = table(prepared, RISK)
    rows = rows[rows.previous_exam_id_1.notna()].reset_index(drop=True)
    pairs = [(f'image_id_{v}', f'previous_image_id_{v}_1') for v in ('cc', 'mlo')]
    wrong = exchange(rows, [*pairs, ('exam_id', 'previous_exam_id_1')])
    if not with_ids: wrong = wrong.drop(columns=['exam_id', 'previous_exam_id_1'])
    refused(prepared, RISK, wrong, 'previous_image_id_cc_1: found', 'an image of an exam before')


def test_a_prior_of_the_same_exam(prepared):
    rows = table(prepared, RISK)
    for column in ('previous_image_id_cc_1', 'previous_image_id_mlo_1'):
        rows = change(rows, column, rows.loc[0, column].replace('Aa', 'Ab'))
    rows = change(rows, 'previous_exam_id_1', 'Ab')
    refused(prepared, RISK, rows, 'previous_image_id_mlo_1: found', 'an image of an exam before')


@pytest.fixture
def three_exams():
    "Two priors of each patient, a year and two years before the current exam"
    years = {letter: f'{2017+n}-06-01' for n, letter in enumerate('abc')}
    images = tiny_images(SPLITS, exams=3)
    dates = pd.to_datetime(images.exam_id.str[-1].map(years))
    return TinyPrepared(images.assign(exam_date=dates, years_to_cancer=float('nan')))


def two_priors(prepared):
    rows = breast_history(prepared.cohort, priors=2)
    return rows[rows.previous_exam_id_2.notna()].reset_index(drop=True)


@pytest.mark.parametrize('with_ids', [True, False])
def test_priors_exchanged(three_exams, with_ids):
    "The older prior stood in the place of the newer one"
    rows = two_priors(three_exams)
    assert len(RiskDataset(three_exams, rows, priors=2)) == len(rows) == 12
    pairs = [(f'previous_image_id_{v}_1', f'previous_image_id_{v}_2') for v in ('cc', 'mlo')]
    wrong = exchange(rows, [*pairs, ('previous_exam_id_1', 'previous_exam_id_2'), ('time_gap_1', 'time_gap_2')])
    if not with_ids: wrong = wrong.drop(columns=['previous_exam_id_1', 'previous_exam_id_2'])
    with pytest.raises(InputError, match='previous_image_id_cc_2: found .* of 2018-06-01 in row 0.*before 2017-06-01'):
        RiskDataset(three_exams, wrong, priors=2)


@pytest.mark.parametrize('with_dates', [True, False])
def test_one_exam_as_two_priors(three_exams, with_dates):
    rows = two_priors(three_exams)
    same = {f'previous_image_id_{v}_2': rows[f'previous_image_id_{v}_1'] for v in ('cc', 'mlo')}
    rows = rows.assign(**same, previous_exam_id_2=rows.previous_exam_id_1, time_gap_2=rows.time_gap_1)
    if not with_dates:
        three_exams = TinyPrepared(three_exams.cohort.images.assign(exam_date=pd.NaT))
    with pytest.raises(InputError, match='previous_image_id_mlo_2: found'):
        RiskDataset(three_exams, rows, priors=2)


@pytest.mark.parametrize('with_ids', [True, False])
def test_the_current_exam_as_the_second_prior_without_dates(three_exams, with_ids):
    rows = two_priors(three_exams)
    undated = TinyPrepared(three_exams.cohort.images.assign(exam_date=pd.NaT))
    current = {f'previous_image_id_{v}_2': rows[f'image_id_{v}'] for v in ('cc', 'mlo')}
    wrong = rows.assign(**current, previous_exam_id_2=rows.exam_id)
    if not with_ids: wrong = wrong.drop(columns=['previous_exam_id_1', 'previous_exam_id_2'])
    with pytest.raises(InputError, match='previous_image_id_cc_2: found'):
        RiskDataset(undated, wrong, priors=2)


def test_two_priors_of_one_day_are_accepted(three_exams):
    "A second study of the same day is ordinary"
    images = three_exams.cohort.images
    first = images.exam_id.str.endswith('a')
    same_day = images.exam_date.mask(first, pd.Timestamp('2018-06-01'))
    prepared = TinyPrepared(images.assign(exam_date=same_day))
    rows = breast_history(prepared.cohort, priors=2)
    assert len(RiskDataset(prepared, rows, priors=2)) == len(rows)


@pytest.mark.parametrize('kind, column', [(RISK, 'time_gap_1'), (PAIRS, 'time_gap')])
def test_a_gap_that_contradicts_the_dates(prepared, kind, column):
    rows = table(prepared, kind)
    for gap in (0., 3., -1.92, 700.):
        refused(prepared, kind, change(rows, column, gap), f'{column}: found {gap} in row 0', '1.92 years')
    rounded = change(rows, column, 1.9).astype({column: float})
    assert len(DATASETS[kind](prepared, rounded)) == len(rows)


def test_undated_exams_are_believed(prepared):
    images = tiny_images(SPLITS)
    rows = breast_history(prepared.cohort)
    undated = TinyPrepared(images.assign(exam_date=pd.NaT))
    assert len(RiskDataset(undated, rows)) == len(rows)


# ---- splits

@ALL
def test_the_split_of_a_row_is_that_of_the_patient(prepared, kind):
    rows = table(prepared, kind)
    test = rows.index[rows.patient_id == 'E'][0]
    wrong = change(rows, 'split', 'train', test)
    refused(prepared, kind, wrong, f'split: found train in row {test}', 'expected test')


@ALL
def test_a_patient_has_the_split_of_her_other_exams(kind):
    "One exam without a split, the other one in test"
    part = TinyPrepared(tiny_images(SPLITS | {'E': (None, 'test')}))
    rows = table(part, kind)
    unknown = TABLES[kind](part.cohort).split.isna()
    if kind == PAIRS: rows = rows.assign(split=rows.split.where(rows.patient_id != 'E', 'train'))
    else:
        assert unknown.any()
        rows = rows.assign(split=rows.split.fillna('train'))
    refused(part, kind, rows, 'found train', 'expected test')


@ALL
def test_rows_with_own_splits_for_a_cohort_without_any(kind):
    plain = TinyPrepared(tiny_images(dict.fromkeys(SPLITS)))
    rows = TABLES[kind](plain.cohort)
    rows = rows.assign(split=rows.patient_id.map(SPLITS))
    assert len(LOADERS[kind](plain, rows=rows, device='cpu').train_ds)
    left = (rows.patient_id == 'A') & (rows.laterality == 'L')
    with pytest.raises(InputError, match='one split in all rows of a patient'):
        LOADERS[kind](plain, rows=rows.assign(split=rows.split.mask(left, 'test')), device='cpu')


@ALL
def test_nothing_is_learnt_from_test_patients(prepared, kind):
    with pytest.raises(LeakError, match='nothing is learnt from test patients') as error:
        LOADERS[kind](prepared, train='test', device='cpu')
    assert error.value.patients == ('E', 'F')
    rows = TABLES[kind](prepared.cohort)
    train, test = (DATASETS[kind](prepared, rows[rows.split == s]) for s in ('train', 'test'))
    with pytest.raises(LeakError, match='nothing is learnt from test patients'):
        sample_dls([test, train], 2, device='cpu')
    with pytest.raises(LeakError, match='no patient in both'):
        sample_dls([train, train], 2, device='cpu')


def test_cohorts_that_disagree_about_a_patient(prepared):
    other = TinyPrepared(tiny_images({'A': 'test', 'C': 'valid'}))
    sets = [TwoViewDataset(p, breast_table(p.cohort).query(f'patient_id == "{k}"')) for p, k in ((prepared, 'A'), (other, 'C'))]
    with pytest.raises(LeakError, match='nothing is learnt from test patients'):
        sample_dls(sets, 2, device='cpu')


# ---- ids

@ALL
def test_an_id_that_the_cohort_never_had(prepared, kind):
    rows = table(prepared, kind)
    for wrong in ('Ab-L-cc', 'Ab-L-CC ', 7):
        for column in columns_of_images(rows):
            refused(prepared, kind, change(rows, column, wrong), f'{column}: found {wrong!r} in row 0', 'or none')


@ALL
def test_an_image_that_failed_is_missing(prepared, kind):
    rows = table(prepared, kind)
    lost = columns_of_images(rows)[-1]
    part = TinyPrepared(tiny_images(SPLITS), failed=[rows.loc[0, lost]])
    dataset = DATASETS[kind](part, rows)
    assert len(dataset) + dataset.n_excluded == len(rows)


# ---- the message

def test_all_faults_in_one_message(prepared):
    rows = table(prepared, TWO_VIEW)
    rows['image_id_cc'] = rows.image_id_cc.shift(4, fill_value='typo')
    rows.loc[rows.patient_id == 'E', 'split'] = 'train'
    error = refused(prepared, TWO_VIEW, rows, f'of {len(rows)} rows', "'typo'", 'row 0', 'row 3')
    faults = error.faults
    assert {fault.what for fault in faults} == {'image_id_cc', 'split'}
    assert f'found {len(faults)} contradictions' in str(error)
    assert str(error).count('\n') == 6 and str(error).endswith(f'and {len(faults)-5} more')
    assert [fault.row for fault in faults] == sorted(fault.row for fault in faults)


def test_a_table_without_a_column_of_images(prepared):
    for kind, column in ((TWO_VIEW, 'image_id_mlo'), (PAIRS, 'moving')):
        rows = table(prepared, kind).drop(columns=column)
        refused(prepared, kind, rows, f'rows: found no {column}')
    with pytest.raises(InputError, match='rows: found str'):
        TwoViewDataset(prepared, 'rows.csv')


# ---- the other functions that take rows

def two_view():
    return TwoViewNet('small', stride=4, width=2)


@pytest.mark.parametrize('kind, model', [
    (TWO_VIEW, two_view), (RISK, lambda: CurrentExamRisk('small', 4, width=2)),
    (PAIRS, lambda: MammoRegNet(width=2, depth=1))])
def test_predict_checks_rows_and_splits(prepared, kind, model):
    model, rows = model(), table(prepared, kind)
    if kind == PAIRS: rows = rows.drop_duplicates('fixed')
    assert len(predict(model, prepared, split='test', rows=rows))
    column = columns_of_images(rows)[0]
    with pytest.raises(InputError, match=f'{column}: found'):
        predict(model, prepared, rows=change(rows, column, 'Eb-L-CC'))
    with pytest.raises(InputError, match='split: found test in row 0'):
        predict(model, prepared, split='test', rows=change(rows, 'split', 'test'))
    leaking = TinyPrepared(tiny_images(SPLITS | {'A': ('train', 'test')}))
    with pytest.raises(LeakError, match='A .train and test.'):
        predict(model, leaking, split='test')
    with pytest.raises(LeakError):
        predict(model, prepared, split='test', dataset=DATASETS[kind](leaking, TABLES[kind](leaking.cohort)))
    with pytest.raises(InputError, match='predict: split: found no splits'):
        predict(model, TinyPrepared(tiny_images(dict.fromkeys(SPLITS))), split='test')


def test_attention_maps_check_rows_and_splits(prepared):
    rows, model = table(prepared, TWO_VIEW), two_view()
    with pytest.raises(InputError, match='image_id_cc: found'):
        attention_maps(model, prepared, rows=change(rows, 'image_id_cc', 'Eb-L-CC'))
    leaking = TinyPrepared(tiny_images(SPLITS | {'A': ('train', 'test')}))
    with pytest.raises(LeakError):
        attention_maps(model, leaking, split='test')


def test_flows_of_priors_check_rows(prepared):
    rows = table(prepared, RISK)
    zero = lambda fixed, moving: torch.zeros(len(fixed), 2, *fixed.shape[2:])
    assert len(prior_flows(prepared, rows, zero, progress=False))
    wrong = change(rows, 'previous_image_id_cc_1', 'Ea-L-CC')
    prepared.loaded.clear()
    with pytest.raises(InputError, match='prior_flows: previous_image_id_cc_1: found'):
        prior_flows(prepared, wrong, zero, progress=False)
    assert prepared.loaded == []


def test_weights_are_not_chosen_on_patients_who_are_tested():
    splits = {f'P{i:02}': 'train' for i in range(8)} | {'Q': ('train', 'test')}
    leaking = TinyPrepared(tiny_images(splits))
    with pytest.raises(LeakError, match='Q .train and test.'):
        choose_weights(leaking, None, folds=3, progress=False)


def test_folds_of_training_patients_are_no_leak():
    splits = {f'P{i:02}': 'train' for i in range(12)} | {'Y': 'valid', 'Z': 'test'}
    prepared = TinyPrepared(tiny_images(splits))
    def fit(dls, gaze_weight, fusion_weight):
        assert not {'Y', 'Z'} & {i[0] for i in prepared.loaded}
        return two_view()
    found = choose_weights(prepared, fit, (.5,), (0.,), folds=3, progress=False, bs=2, device='cpu')
    assert found.fold.tolist() == [0, 1, 2]
    assert dict(prepared.cohort.images.groupby('patient_id').split.first()) == splits


# ---- declarations, and speed

class BothBreasts(SampleDataset):
    "A breast and the same view of the other one"
    def __init__(self, prepared, rows):
        from mammo_nb.samples.rows import ImageColumn
        columns = [
            ImageColumn('image_id_cc', 'CC', 'same', 'exam_id'),
            ImageColumn('contralateral', 'CC', 'other', 'exam_id')]
        super().__init__(prepared, rows, columns)


def test_a_contralateral_image_is_of_the_other_breast(prepared):
    rows = table(prepared, TWO_VIEW)
    other = rows.image_id_cc.str.translate(str.maketrans('LR', 'RL'))
    assert len(BothBreasts(prepared, rows.assign(contralateral=other))) == len(rows)
    with pytest.raises(InputError, match="contralateral: found 'Ab-L-CC' of laterality 'L'"):
        BothBreasts(prepared, rows.assign(contralateral=rows.image_id_cc))


def test_columns_of_which_nothing_is_declared_still_belong_to_the_patient(prepared):
    class OneImage(SampleDataset):
        def __init__(self, prepared, rows):
            super().__init__(prepared, rows, ['image_id'])
    images = prepared.cohort.images
    assert len(OneImage(prepared, images)) == len(images)
    with pytest.raises(InputError, match="image_id: found 'Ea-L-CC' of patient_id 'E' in row 0"):
        OneImage(prepared, change(images, 'image_id', 'Ea-L-CC'))


def test_twenty_thousand_rows_take_a_moment():
    "Measured: 0.08 s of one core"
    patients = {f'P{i:05}': ('train', 'valid', 'test')[i % 3] for i in range(5000)}
    prepared = TinyPrepared(tiny_images(patients))
    rows = breast_history(prepared.cohort)
    assert len(rows) == 20_000
    from mammo_nb.samples.risk import history_columns
    from mammo_nb.samples.rows import check_rows
    seconds = []
    for _ in range(5):
        start = time.process_time()
        check_rows(prepared, rows, history_columns(1))
        seconds.append(time.process_time()-start)
    assert min(seconds) < .2
