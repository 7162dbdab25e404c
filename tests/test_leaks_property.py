"""Whatever rows, splits and joins are asked for, no image of a test patient reaches training.

Cohorts of a few patients are drawn at random, their splits and the rows made from them are damaged,
and loaders are asked for. Either they refuse with an `InputError`, or every training sample is looked
at: its grey levels tell which images it holds. The systems are those of the registry, so a new one is
tested without a change here.
"""
import inspect
import warnings
from functools import lru_cache
from random import Random

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from tiny_prepared import TinyPrepared, tiny_findings, tiny_images

import mammo_nb.core.fastai_import
import toy_system # a system of another package
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.cohort.joining import join_table
from mammo_nb.cohort.leaks import POLICIES, join_official
from mammo_nb.core.errors import InputError
from mammo_nb.learners.systems import get_system, system_names
from mammo_nb.samples.loaders import sample_dls

SPLITS = ('train', 'valid', 'test')
PATIENTS = tuple('ABCDEFGH')
EVERY = dict(A='train', B='train', C='train', D='valid', E='valid', F='test', G='test', H='test')


def builders(*parts):
    "The systems of the registry, one of each kind of builder, by their names"
    kinds = {}
    for name in system_names():
        system = get_system(name)
        kinds.setdefault(tuple(getattr(system, part) for part in parts), []).append(system)
    return [pytest.param(systems[0], id='-'.join(s.name for s in systems)) for systems in kinds.values()]


def search(n):
    "The same draws in every run; a failure is shown as it was drawn, as to make it smaller takes minutes"
    return settings(
        max_examples=n, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck))


# ---- cohorts

ONE_SPLIT = ['train', 'train', 'valid', 'valid', 'test', 'test', None]
SOME_SPLITS = st.fixed_dictionaries({p: st.sampled_from(ONE_SPLIT) for p in PATIENTS})


def random_splits(rng):
    "A split, or none, for each patient; sometimes one for each exam of a patient"
    splits = {p: rng.choice(ONE_SPLIT) for p in PATIENTS}
    if rng.random() < .3: splits[rng.choice(PATIENTS)] = rng.choice(ONE_SPLIT), rng.choice(ONE_SPLIT)
    return splits


@lru_cache
def random_cohort(number):
    "A cohort: drawn with its splits, given them by a table, or joined from two"
    rng = Random(number)
    images = tiny_images(random_splits(rng))
    way = ('drawn', 'drawn', 'drawn', 'table', 'official', 'concat')[number % 6]
    if way == 'drawn': return Cohort(images, tiny_findings(images))
    if way == 'table':
        table = pd.DataFrame([(p, rng.choice(SPLITS)) for p in PATIENTS], columns=['patient_id', 'split'])
        return join_table(Cohort(images.assign(split=None), tiny_findings(images)), table)
    first = images.patient_id <= rng.choice(PATIENTS[2:6])
    other = tiny_images(random_splits(rng))
    other = other.assign(**{k: other[k] + 'x' for k in ('image_id', 'exam_id')}, path='x/' + other.path)
    parts = [Cohort(table, tiny_findings(table)) for table in (images[first], other)]
    return Cohort.concat(parts) if way == 'concat' else join_official(parts, rng.choice(POLICIES))


COHORTS = st.integers(0, 29).map(random_cohort)


# ---- rows

def image_columns(rows, ids):
    "The columns that hold ids of images"
    return [name for name in rows if rows[name].isin(ids).any()]


def put(rows, row, column, value):
    rows = rows.astype({column: object})
    rows.loc[row, column] = value
    return rows


def another_image(draw, rows, ids):
    column = draw(st.sampled_from(image_columns(rows, ids)))
    return put(rows, draw(st.sampled_from(rows.index.tolist())), column, draw(st.sampled_from(ids)))


def another_column(draw, rows, ids):
    "Exchange two columns of images in all rows"
    a, b = (draw(st.sampled_from(image_columns(rows, ids))) for _ in range(2))
    return rows.rename(columns={a: b, b: a})


def another_order(draw, rows, ids):
    "Turn a column against the others, as after a careless sort"
    column = draw(st.sampled_from([*image_columns(rows, ids), 'split', 'patient_id']))
    return rows.assign(**{column: np.roll(rows[column].to_numpy(object), draw(st.integers(1, 9)))})


def another_split(draw, rows, ids):
    "One row, or all rows of a patient, or all of a split"
    split = draw(st.sampled_from([*SPLITS, 'Train', None]))
    row = rows.loc[draw(st.sampled_from(rows.index.tolist()))]
    by = draw(st.sampled_from(['patient_id', 'split', 'exam_id']))
    if by not in rows or pd.isna(row[by]): return put(rows, row.name, 'split', split)
    return rows.assign(split=rows.split.astype(object).mask(rows[by] == row[by], split))


def another_patient(draw, rows, ids):
    return put(rows, draw(st.sampled_from(rows.index.tolist())), 'patient_id', draw(st.sampled_from(PATIENTS)))


def without_column(draw, rows, ids):
    names = [k for k in ('exam_id', 'laterality', 'view', 'previous_exam_id_1', 'split') if k in rows]
    if draw(st.booleans()): names.append('patient_id')
    return rows.drop(columns=draw(st.sampled_from(names)))


def careless_join(draw, rows, ids):
    "Take a column of images from another row that agrees in something"
    column = draw(st.sampled_from(image_columns(rows, ids)))
    keys = [k for k in ('laterality', 'exam_date', 'split', 'view', 'density') if k in rows]
    key = draw(st.sampled_from(keys))
    return rows.drop(columns=column).merge(rows[[key, column]], on=key).head(200)


def twice(draw, rows, ids):
    "The rows again, with another split"
    return pd.concat([rows, rows.assign(split=draw(st.sampled_from(SPLITS)))], ignore_index=True)


DAMAGES = (another_image, another_column, another_order, another_split, another_patient,
           without_column, careless_join, twice)
NEEDED = {'patient_id', 'split', 'exam_id', 'laterality'} # of a table that is damaged further


def damaged_rows(draw, system, cohort, model=None):
    "Rows of a system, of this cohort or of the same patients in other splits, and damaged"
    rows = system.cases(cohort, model).reset_index(drop=True)
    if draw(st.integers(0, 2)) == 0: rows['split'] = rows.patient_id.map(draw(SOME_SPLITS))
    ids = cohort.images.image_id.tolist()
    for _ in range(draw(st.integers(0, 3))):
        if not len(rows) or not NEEDED <= set(rows): break
        rows = draw(st.sampled_from(DAMAGES))(draw, rows, ids)
    return rows


# ---- what must hold

def held_out_patients(cohort, rows=None):
    "Whoever is a test patient: in any image of the cohort, or for whom a row says so"
    images = cohort.images
    tested = set(images.patient_id[images.split == 'test'])
    if rows is None or 'split' not in rows: return tested
    whose = images.set_index('image_id').patient_id
    asked = rows[(rows.split == 'test').to_numpy()]
    if 'patient_id' in asked: return tested | set(asked.patient_id.dropna())
    named = asked[image_columns(asked, whose.index)].to_numpy().ravel()
    return tested | set(whose.reindex(named).dropna())


def samples_of(dataset, prepared):
    "The patients of each sample"
    whose = prepared.cohort.images.set_index('image_id').patient_id
    for i in range(len(dataset)):
        images = set.union(*(prepared.ids_in(part) for part in dataset[i]))
        yield {whose[image] for image in images}


def check_loaders(dls, prepared, tested):
    "No test patient is learnt from; a sample is of one patient; no patient is in both sets"
    train, valid = ([*samples_of(dl.dataset, prepared)] for dl in (dls.train, dls.valid))
    learnt, watched = set().union(*train), set().union(*valid)
    assert not learnt & tested
    assert not learnt & watched
    assert all(len(patients) == 1 for patients in train+valid)


def loaders_of(system, prepared, **asked):
    "The loaders of a system, asked for what they know"
    known = inspect.signature(system.loaders).parameters
    asked = dict(radiomics=False) | asked # nothing is measured on images that do not exist
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return system.loaders(prepared, bs=2, device='cpu', **{k: v for k, v in asked.items() if k in known})


@pytest.mark.parametrize('system', builders('loaders'))
def test_good_rows_reach_training(system):
    "Without damage nothing is refused, and the grey levels tell the images"
    prepared = TinyPrepared(tiny_images(EVERY))
    dls = loaders_of(system, prepared, rows=system.cases(prepared.cohort, None))
    check_loaders(dls, prepared, {'F', 'G', 'H'})
    assert set().union(*samples_of(dls.train.dataset, prepared)) == {'A', 'B', 'C'}


@pytest.mark.parametrize('system', builders('loaders', 'cases'))
@search(25)
@given(data=st.data())
def test_no_image_of_a_test_patient_reaches_training(system, data):
    draw = data.draw
    cohort = draw(COHORTS)
    rows = damaged_rows(draw, system, cohort) if draw(st.integers(0, 4)) else None
    failed = ()
    if draw(st.integers(0, 4)) == 0: failed = [draw(st.sampled_from(cohort.images.image_id.tolist()))]
    prepared = TinyPrepared(cohort, failed)
    names = [(a, b) for a in SPLITS for b in SPLITS]
    train, valid = draw(st.one_of(st.just(('train', 'valid')), st.sampled_from(names)))
    try: dls = loaders_of(system, prepared, rows=rows, train=train, valid=valid)
    except InputError: return
    takes_rows = 'rows' in inspect.signature(system.loaders).parameters
    check_loaders(dls, prepared, held_out_patients(cohort, rows if takes_rows else None))


@pytest.fixture(scope='module')
def models():
    "system name -> an untrained model of its quick settings"
    made = {}
    def get(system):
        if system.name not in made:
            small = system.small.get('learner', {})
            dls = loaders_of(system, TinyPrepared(tiny_images(EVERY)))
            made[system.name] = system.learner(dls, **small).model
        return made[system.name]
    return get


@pytest.mark.parametrize('system', builders('samples', 'cases'))
@search(12)
@given(data=st.data())
def test_samples_of_any_two_tables_keep_test_patients_out(system, data, models):
    "As above, for loaders that a user makes from data sets"
    draw, model = data.draw, models(system)
    cohort = draw(COHORTS)
    prepared = TinyPrepared(cohort)
    tables = [damaged_rows(draw, system, cohort, model) for _ in range(2)]
    wanted = [draw(st.sampled_from([*SPLITS, None])) for _ in tables]
    try:
        sets = []
        for rows, split in zip(tables, wanted):
            if split and 'split' in rows: rows = rows[rows.split == split]
            sets.append(system.samples(prepared, rows.reset_index(drop=True), model))
        dls = sample_dls(sets, 2, device='cpu')
    except InputError: return
    check_loaders(dls, prepared, held_out_patients(cohort, sets[0].rows))
