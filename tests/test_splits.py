"""Splits: properties that must hold for any cohort, and files that were tampered with"""
import json, subprocess, sys
import numpy as np
import pandas as pd
import pytest
from mammo_nb.core.errors import InputError
from mammo_nb.data.cohort import Cohort
from mammo_nb.data.splits import (LeakError, SPLITS, POLICIES, assign_split, carve_valid, check_split, join_official, leaking_patients, patient_strata, read_split,
                                  split_hash, split_patients, write_split)


def cohort(n, start=0, prefix='P', share=.25, seed=0, **columns):
    ids = [f'{prefix}{i}' for i in range(start, start+n)]
    im = pd.DataFrame([dict(image_id=f'{p}-{v}', patient_id=p, exam_id=f'{p}-1', laterality=v[0], view=v[2:], path=f'{p}-{v}.png') for p in ids for v in ('L-CC', 'R-CC')]).assign(**columns)
    bad = np.random.default_rng(seed).random(start+n)[start:] < share
    fi = pd.DataFrame([dict(finding_id=p, image_id=f'{p}-L-CC', pathology='malignant' if b else 'benign') for p, b in zip(ids, bad)])
    return Cohort(im, fi)


def who(c): return c.images.drop_duplicates('patient_id').set_index('patient_id').split


@pytest.mark.parametrize('n', [1, 2, 3, 5, 10, 37, 200])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_sizes_and_strata(n, seed):
    c = split_patients(cohort(n, seed=seed), seed=seed)
    check_split(c)
    w = who(c)
    assert w.notna().all() and len(w) == n
    f = np.array([.6, .2, .2])
    assert np.abs(w.value_counts().reindex(SPLITS, fill_value=0) - n*f).max() < 1.5
    for s, g in w.groupby(patient_strata(c)): assert np.abs(g.value_counts().reindex(SPLITS, fill_value=0) - len(g)*f).max() < 1.5, s


def test_nobody_moves_when_patients_come_one_by_one_or_in_crowds():
    c = split_patients(cohort(20))
    for start, n in ((20, 1), (21, 2), (23, 40), (63, 200)):
        before, c = who(c), split_patients(Cohort.concat([c, cohort(n, start)]))
        assert (who(c)[before.index] == before).all()
    counts = who(c).value_counts()[list(SPLITS)] / len(c.patients)
    assert np.abs(counts - [.6, .2, .2]).max() < .02


def test_each_alone_is_the_same_in_any_cohort():
    all_of_them = who(split_patients(cohort(300), stratify=None))
    for part in (cohort(1, 7), cohort(20, 100)): assert (who(split_patients(part, stratify=None)) == all_of_them[part.patients]).all()
    assert abs((all_of_them == 'train').mean() - .6) < .1


def test_official_patients_stay_and_new_ones_fill_up():
    c = assign_split(cohort(100), {f'P{i}': 'test' if i < 10 else 'train' for i in range(40)})
    w = who(split_patients(c))
    assert (w[[f'P{i}' for i in range(10)]] == 'test').all() and (w[[f'P{i}' for i in range(10, 40)]] == 'train').all()
    assert np.abs(w.value_counts()[list(SPLITS)] - [60, 20, 20]).max() <= 2


def test_a_patient_with_some_pictures_unassigned_gets_one_split():
    c = split_patients(cohort(10))
    c = Cohort(c.images.assign(split=c.images.split.where(np.arange(len(c)) % 2 == 0)), c.findings)
    after = split_patients(c)
    assert after.images.split.notna().all() and (who(after) == who(split_patients(cohort(10)))).all()


def test_the_same_in_another_process():
    code = 'import sys; sys.path.insert(0, "tests"); from test_splits import *; print(split_hash(split_patients(cohort(50))))'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env={'PYTHONHASHSEED': '12', 'PATH': ''}, cwd=__import__('pathlib').Path(__file__).parents[1])
    assert out.stdout.strip() == split_hash(split_patients(cohort(50)))


def test_zero_shares():
    w = who(split_patients(cohort(30), dict(train=1.)))
    assert (w == 'train').all()
    assert set(who(split_patients(cohort(30), dict(train=.5, test=.5)))) == {'train', 'test'}


@pytest.mark.parametrize('change', [lambda d: d['patients'].update(P3='train' if d['patients']['P3'] != 'train' else 'test'), lambda d: d['patients'].pop('P3'), lambda d: d['patients'].update(P999='test'),
                                    lambda d: d['patients'].update(P3='dev'), lambda d: d.pop('sha256'), lambda d: d.update(sha256='0'*64), lambda d: d.update(patients=[])])
def test_tampered_files_are_refused(tmp_path, change):
    p = tmp_path/'split.json'
    write_split(split_patients(cohort(20)), p)
    d = json.loads(p.read_text()); change(d); p.write_text(json.dumps(d))
    with pytest.raises(InputError, match='split.json'): read_split(p)


def test_files_that_are_no_split(tmp_path):
    for text in ('', '[]', '{"a": 1}', '\x00'):
        (tmp_path/'x.json').write_text(text)
        with pytest.raises(InputError): read_split(tmp_path/'x.json')
    with pytest.raises(InputError): read_split(tmp_path/'nowhere.json')


def test_a_reformatted_file_is_still_the_split(tmp_path):
    c = split_patients(cohort(20, prefix='Ä'))
    sha = write_split(c, tmp_path/'s.json')
    d = json.loads((tmp_path/'s.json').read_text()); d['patients'] = dict(reversed(d['patients'].items()))
    (tmp_path/'s.json').write_text(json.dumps(d, ensure_ascii=False), encoding='utf-8')
    assert split_hash(read_split(tmp_path/'s.json')) == sha


def test_leaks_are_found_in_one_cohort_and_across_several():
    a, b = cohort(10, split='train', provenance='x'), cohort(10, 5, split='test', provenance='x')
    assert len(leaking_patients(a, b)) == 5 and not len(leaking_patients(a))
    assert len(leaking_patients(a, cohort(10, 5, split='test', provenance='y'))) == 5  # a name is a patient, whatever the table is called
    with pytest.raises(LeakError) as e: check_split(a, b)
    assert isinstance(e.value, InputError) and e.value.patients == tuple(f'P{i}' for i in range(5, 10))
    inside = Cohort(a.images.assign(split=['train', 'valid']*10), a.findings)
    for f in (split_patients, carve_valid, split_hash, lambda c: write_split(c, 'never.json')):
        with pytest.raises(LeakError): f(inside)


@pytest.mark.parametrize('policy', POLICIES)
def test_policies(policy):
    train = cohort(30, split='train')
    test = cohort(15, 20, split='test')
    test = Cohort(test.images.assign(image_id='t' + test.images.image_id, path='t' + test.images.path, exam_id='t' + test.images.exam_id))
    valid = cohort(5, 33, split='valid')
    valid = Cohort(valid.images.assign(image_id='v' + valid.images.image_id, path='v' + valid.images.path, exam_id='v' + valid.images.exam_id))
    c = join_official([train, test, valid], policy)
    check_split(c)
    im = c.images
    lost = {'test': 0, 'train': 0, 'drop': 20 + 4}[policy]     # 10 patients of train and 2 of valid (P33, P34) are in test: two pictures each
    assert len(im) == 2*(30 + 15 + 5) - lost
    assert (im.set_index('image_id').split.filter(regex='^t') == 'test').all() == (policy != 'train')
    if policy == 'drop': assert set(im.image_id[im.split == 'test']) == set(test.images.image_id)
    if policy == 'train': assert set(im.patient_id[im.split == 'train']) == set(train.patients)
