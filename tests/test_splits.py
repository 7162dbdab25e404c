"""Splits: properties that must hold for any cohort, and files that were tampered with"""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
from mammo_nb.core.errors import InputError
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.cohort.exams import breast_table
from mammo_nb.cohort.leaks import (
    POLICIES, LeakError, assign_split, check_split, join_official, leaking_patients,
    patient_splits, select_split
)
from mammo_nb.core.vocabulary import SPLITS
from mammo_nb.cohort.splits import (
    carve_valid, patient_strata, read_split, split_hash, split_patients, write_split
)
from mammo_nb.samples.risk import rows_with_follow_up
from mammo_nb.samples.two_view import labelled_rows

FRACTIONS = np.array([.6, .2, .2])


def cohort(n, start=0, prefix='P', share=.25, seed=0, **columns):
    "`n` patients with a left and a right CC image, of whom a share has a malignant finding"
    ids = [f'{prefix}{i}' for i in range(start, start+n)]
    images = [dict(image_id=f'{p}-{v}', patient_id=p, exam_id=f'{p}-1', laterality=v[0], view=v[2:], path=f'{p}-{v}.png')
              for p in ids for v in ('L-CC', 'R-CC')]
    malignant = np.random.default_rng(seed).random(start+n)[start:] < share
    findings = [dict(finding_id=p, image_id=f'{p}-L-CC', pathology='malignant' if m else 'benign')
                for p, m in zip(ids, malignant)]
    return Cohort(pd.DataFrame(images).assign(**columns), pd.DataFrame(findings))


def with_other_images(c, prefix):
    "The same patients with other images"
    names = {k: prefix + c.images[k] for k in ('image_id', 'path', 'exam_id')}
    return Cohort(c.images.assign(**names))


def sizes(splits):
    return splits.value_counts().reindex(SPLITS, fill_value=0)


@pytest.mark.parametrize('n', [1, 2, 3, 5, 10, 37, 200])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_sizes_and_strata(n, seed):
    c = split_patients(cohort(n, seed=seed), seed=seed)
    check_split(c)
    splits = patient_splits(c)
    assert len(splits) == n
    assert np.abs(sizes(splits) - n*FRACTIONS).max() < 1.5
    for stratum, group in splits.groupby(patient_strata(c)):
        assert np.abs(sizes(group) - len(group)*FRACTIONS).max() < 1.5, stratum


def test_many_small_strata_do_not_fall_to_one_split():
    c = cohort(300)
    each = split_patients(c, stratify=pd.Series({p: p for p in c.patients}))
    assert sizes(patient_splits(each)).tolist() == [180, 60, 60]


def test_the_order_of_images_does_not_matter():
    c = cohort(50)
    shuffled = Cohort(c.images.sample(frac=1, random_state=0), c.findings)
    pd.testing.assert_series_equal(patient_splits(split_patients(shuffled)), patient_splits(split_patients(c)))


def test_nobody_moves_when_patients_come_one_by_one_or_in_crowds():
    c = split_patients(cohort(20))
    for start, n in ((20, 1), (21, 2), (23, 40), (63, 200)):
        before = patient_splits(c)
        c = split_patients(Cohort.concat([c, cohort(n, start)]))
        assert (patient_splits(c)[before.index] == before).all()
    assert np.abs(sizes(patient_splits(c))/len(c.patients) - FRACTIONS).max() < .02


def test_each_alone_is_the_same_in_any_cohort():
    together = patient_splits(split_patients(cohort(300), stratify=None))
    for part in (cohort(1, 7), cohort(20, 100)):
        alone = patient_splits(split_patients(part, stratify=None))
        assert (alone == together[alone.index]).all()
    assert abs((together == 'train').mean() - .6) < .1


def test_official_patients_stay_and_new_ones_fill_up():
    official = {f'P{i}': 'test' if i < 10 else 'train' for i in range(40)}
    splits = patient_splits(split_patients(assign_split(cohort(100), official)))
    assert (splits[list(official)] == pd.Series(official)).all()
    assert np.abs(sizes(splits) - [60, 20, 20]).max() <= 2


def test_a_patient_with_some_images_unassigned_gets_one_split():
    c = split_patients(cohort(10))
    half = c.images.split.where(np.arange(len(c)) % 2 == 0)
    after = split_patients(Cohort(c.images.assign(split=half), c.findings))
    assert after.images.split.notna().all()
    assert (patient_splits(after) == patient_splits(split_patients(cohort(10)))).all()


def test_the_same_in_another_process():
    code = 'import sys; sys.path.insert(0, "tests"); from test_splits import *; print(split_hash(split_patients(cohort(50))))'
    env = {'PYTHONHASHSEED': '12', 'PATH': ''}
    root = Path(__file__).parents[1]
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=env, cwd=root)
    assert out.stdout.strip() == split_hash(split_patients(cohort(50)))


def test_zero_shares():
    assert (patient_splits(split_patients(cohort(30), dict(train=1.))) == 'train').all()
    assert set(patient_splits(split_patients(cohort(30), dict(train=.5, test=.5)))) == {'train', 'test'}


@pytest.mark.parametrize('arguments, message', [
    (dict(fractions=dict(train=.5, test=.4)), 'a sum of 0.9'),
    (dict(fractions=dict(train=1, dev=0)), "found 'dev'"),
    (dict(fractions=dict(train=1.5, test=-.5)), 'a share from 0 to 1'),
    (dict(fractions=[.6, .2, .2]), 'shares by name'),
    (dict(stratify=pd.Series(dict(P0='a'))), 'no stratum for P1')])
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        split_patients(cohort(10), **arguments)


def test_a_validation_set_is_carved_once():
    official = split_patients(cohort(50), dict(train=.8, test=.2))
    with pytest.raises(InputError, match='a cohort without any'):
        carve_valid(carve_valid(official))


def test_a_validation_set_can_be_carved_by_other_strata():
    official = split_patients(cohort(100), dict(train=.8, test=.2))
    density = pd.Series({p: 'ABCD'[i % 4] for i, p in enumerate(official.patients)})
    carved = patient_splits(carve_valid(official, .25, stratify=density))
    train = patient_splits(official).loc[lambda s: s == 'train'].index
    expected = density[train].value_counts()/4
    valid = density[carved[carved == 'valid'].index].value_counts()
    assert (valid - expected).abs().max() <= 1
    assert carved[carved == 'test'].index.equals(patient_splits(official).loc[lambda s: s == 'test'].index)


TAMPER = [
    lambda d: d['patients'].update(P3='train' if d['patients']['P3'] != 'train' else 'test'),
    lambda d: d['patients'].pop('P3'),
    lambda d: d['patients'].update(P999='test'),
    lambda d: d['patients'].update(P3='dev'),
    lambda d: d.pop('sha256'),
    lambda d: d.update(sha256='0'*64),
    lambda d: d.update(patients=[])]

@pytest.mark.parametrize('change', TAMPER)
def test_tampered_files_are_refused(tmp_path, change):
    path = tmp_path/'split.json'
    write_split(split_patients(cohort(20)), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match='split.json'):
        read_split(path)


@pytest.mark.parametrize('text', ['', '[]', '{"a": 1}', '\x00', '{\n "format": 1,\n "note": "60/20/20'])
def test_files_that_are_no_split(tmp_path, text):
    (tmp_path/'x.json').write_text(text)
    with pytest.raises(InputError, match='a file made by write_split'):
        read_split(tmp_path/'x.json')


def test_a_file_that_does_not_exist(tmp_path):
    with pytest.raises(InputError):
        read_split(tmp_path/'nowhere.json')


def test_a_reformatted_file_is_still_the_split(tmp_path):
    path = tmp_path/'s.json'
    sha = write_split(split_patients(cohort(20, prefix='Ä')), path)
    content = json.loads(path.read_text())
    content['patients'] = dict(reversed(content['patients'].items()))
    path.write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')
    assert split_hash(read_split(path)) == sha


def test_patients_who_are_not_on_paper_have_no_split(tmp_path):
    write_split(split_patients(cohort(20)), tmp_path/'s.json')
    later = assign_split(cohort(5, start=18), read_split(tmp_path/'s.json'))
    assert later.images.split.isna().sum() == 6


def test_leaks_are_found_in_one_cohort_and_across_several():
    a = cohort(10, split='train', provenance='x')
    b = cohort(10, 5, split='test', provenance='x')
    assert len(leaking_patients(a, b)) == 5
    assert not len(leaking_patients(a))
    with pytest.raises(LeakError) as e:
        check_split(a, b)
    assert isinstance(e.value, InputError)
    assert e.value.patients == tuple(f'P{i}' for i in range(5, 10))


def test_a_patient_is_a_name_whatever_the_table_is_called():
    a = cohort(10, split='train', provenance='x')
    assert len(leaking_patients(a, cohort(10, 5, split='test', provenance='y'))) == 5


def test_many_leaks_are_counted():
    with pytest.raises(LeakError, match='and 5 more'):
        check_split(cohort(10, split='train'), cohort(10, split='test'))


@pytest.mark.parametrize('function', [split_patients, carve_valid, split_hash, lambda c: write_split(c, 'never.json')])
def test_a_leak_inside_a_cohort_stops_everything(function):
    a = cohort(10)
    inside = Cohort(a.images.assign(split=['train', 'valid']*10), a.findings)
    with pytest.raises(LeakError):
        function(inside)


# ---- silent failures of issue 19: a cohort without splits, rows without a split

def test_a_cohort_without_splits_is_told_from_one_without_a_split():
    with pytest.raises(InputError, match=r'no splits: all 20 rows are without, expected a cohort with splits: split_patients'):
        select_split(breast_table(cohort(10)), 'train')
    with pytest.raises(InputError, match='found only test, train, expected rows of .valid.; carve_valid'):
        select_split(breast_table(split_patients(cohort(10), dict(train=.5, test=.5))), 'valid')


def test_rows_without_a_split_column_are_told():
    rows = breast_table(split_patients(cohort(10))).drop(columns='split')
    with pytest.raises(InputError, match="my_function: rows: found no column 'split', expected rows with their split"):
        select_split(rows, 'train', 'my_function')
    assert len(select_split(rows, None)) == 20


def test_the_rows_of_a_split_are_those_of_its_patients():
    rows = breast_table(split_patients(cohort(10)))
    assert [len(select_split(rows, s)) for s in SPLITS] == [12, 4, 4]
    with pytest.raises(InputError, match='one of train, valid, test'):
        select_split(rows, 'dev')


def test_loaders_tell_a_cohort_without_splits_from_one_without_labels_or_follow_up():
    c = cohort(10)
    prepared = SimpleNamespace(cohort=c, keys=c.images.image_id.tolist())
    with pytest.raises(InputError, match='two_view_dls: split: found no splits'):
        labelled_rows(prepared, 'train')
    rows = breast_table(c).assign(years_to_cancer=1., years_followed=2.)
    with pytest.raises(InputError, match='risk_dls: split: found no splits'):
        rows_with_follow_up(rows, 'train')
    with pytest.raises(InputError, match="risk_dls: rows: found no column 'split'"):
        rows_with_follow_up(rows.drop(columns='split'), 'train')


@pytest.fixture
def official():
    "30 training, 15 test and 5 validation patients, of whom 10 and 2 are in test as well"
    train = cohort(30, split='train')
    test = with_other_images(cohort(15, 20, split='test'), 't')
    valid = with_other_images(cohort(5, 33, split='valid'), 'v')
    return [train, test, valid]


@pytest.mark.parametrize('policy', POLICIES)
def test_policies(official, policy):
    joined = join_official(official, policy)
    check_split(joined)
    lost = {'test': 0, 'train': 0, 'drop': 20 + 4}[policy]
    assert len(joined.images) == 2*(30 + 15 + 5) - lost


def test_the_policy_test_keeps_every_official_test_image(official):
    for policy in ('test', 'drop'):
        images = join_official(official, policy).images
        of_test = images.image_id.isin(official[1].images.image_id)
        assert (images.split[of_test] == 'test').all()


def test_the_policy_drop_gives_the_official_test_images_and_no_other(official):
    images = join_official(official, 'drop').images
    assert set(images.image_id[images.split == 'test']) == set(official[1].images.image_id)


def test_the_policy_train_keeps_every_training_patient(official):
    images = join_official(official, 'train').images
    assert set(images.patient_id[images.split == 'train']) == set(official[0].patients)


def test_an_unknown_policy_is_refused(official):
    with pytest.raises(InputError, match="policy: found 'mix', expected one of test, drop, train"):
        join_official(official, 'mix')
