"""Published numbers are copied right: what a paper says twice is the same twice, and its sums add up.

Variants of MommiNet-v2 have the names of our rows; `_v1` is the version of the paper before it.
"""
import math

import pandas as pd
import pytest

from repo import ROOT

FOLDER = ROOT/'benchmarks'/'published'
RECALLS = ['recall_0.5', 'recall_1', 'recall_2']


@pytest.fixture(scope='module')
def momminet():
    return pd.read_csv(FOLDER/'momminet.csv')


def row(table, dataset, name, variant, pairs=None):
    t = table.query('dataset == @dataset and table == @name and variant == @variant')
    t = t if pairs is None else t[t['pairs'] == pairs]
    assert len(t) == 1, (dataset, name, variant, pairs)
    return t[RECALLS].iloc[0]


@pytest.mark.parametrize('path', sorted(FOLDER.glob('*.csv')), ids=lambda p: p.stem)
def test_every_table_names_its_source_and_no_row_twice(path):
    table = pd.read_csv(path)
    assert table['source'].notna().all()
    numbers = table.select_dtypes('number').columns
    assert not table.drop(columns=numbers).duplicated().any()

def test_all_rows_of_the_tables_are_there(momminet):
    found = momminet.groupby(['dataset', 'table']).size().to_dict()
    assert found == {
        ('DDSM', 'networks'): 14, ('DDSM', 'concat_stage'): 3, ('in-house', 'networks'): 4,
        ('in-house', 'concat_stage'): 3, ('in-house', 'geometry'): 3}

def test_recalls_lie_between_0_and_1_and_rise_with_false_positives(momminet):
    values = momminet[RECALLS]
    assert (values.isna() | ((values > 0) & (values < 1))).all(axis=None)
    complete = values.dropna()
    assert len(complete) == len(values)-3  # the stages of DDSM have recall at 0.5 only
    assert (complete.diff(axis=1).iloc[:, 1:] > 0).all(axis=None)

SAME = [
    ('in-house', 'concat_stage', 'bi_stage_3', 'bi', 'bilateral', RECALLS),
    ('in-house', 'geometry', 'ipsi_nipple', 'ipsi', 'ipsilateral', RECALLS),
    ('DDSM', 'concat_stage', 'bi_stage_3', 'bi', 'bilateral', RECALLS[:1])]

@pytest.mark.parametrize('dataset, name, variant, network, pairs, columns', SAME)
def test_what_two_tables_say_is_the_same(momminet, dataset, name, variant, network, pairs, columns):
    again = row(momminet, dataset, name, variant)
    first = row(momminet, dataset, 'networks', network, pairs)
    assert again[columns].tolist() == first[columns].tolist()

@pytest.mark.parametrize('dataset, column', [
    *[('DDSM', c) for c in RECALLS[:1]], *[('in-house', c) for c in RECALLS]])
def test_later_stages_are_better(momminet, dataset, column):
    stages = momminet.query('dataset == @dataset and table == "concat_stage"')
    assert stages['variant'].tolist() == ['bi_stage_1', 'bi_stage_2', 'bi_stage_3']
    assert stages[column].is_monotonic_increasing

def test_the_order_of_the_geometries(momminet):
    t = momminet[momminet['table'] == 'geometry'].set_index('variant')
    for column in RECALLS:
        assert t[column].idxmax() == 'ipsi_nipple'
        assert t[column].idxmin() == 'ipsi_image_centre'

def test_three_views_do_not_surpass_all_pairs(momminet):
    "The paper says so, and its table does not: at one false positive an image the bilateral network is better"
    tri = row(momminet, 'DDSM', 'networks', 'tri')
    bi = row(momminet, 'DDSM', 'networks', 'bi', 'bilateral')
    assert tri['recall_1'] < bi['recall_1']
    assert tri['recall_0.5'] > bi['recall_0.5']
    assert tri['recall_2'] > bi['recall_2']

def test_the_second_version_is_better_on_its_own_pairs(momminet):
    "And not on the others, nor with both"
    v = lambda variant, pairs: row(momminet, 'DDSM', 'networks', variant, pairs)
    assert (v('bi', 'bilateral') >= v('bi_v1', 'bilateral')).all()
    assert (v('ipsi', 'ipsilateral') > v('ipsi_v1', 'ipsilateral')).all()
    assert v('bi', 'ipsilateral')['recall_1'] < v('bi_v1', 'ipsilateral')['recall_1']
    assert v('ipsi', 'bilateral')['recall_2'] < v('ipsi_v1', 'bilateral')['recall_2']

def test_images_are_four_a_case_and_parts_add_up():
    t = pd.read_csv(FOLDER/'momminet_images.csv').set_index('dataset')
    parts = ['train', 'valid', 'test']
    assert (t['images'] == 4*t['cases']).all()
    assert (t[[f'images_{p}' for p in parts]].sum(axis=1) == t['images']).all()
    ddsm = t.loc['DDSM']
    assert sum(ddsm[f'cases_{p}'] for p in parts) == ddsm['cases']
    assert all(ddsm[f'images_{p}'] == 4*ddsm[f'cases_{p}'] for p in parts)

def test_published_intervals_are_too_narrow_for_patients():
    "An AUC of 390 patches has a standard error of about 0.015 (Hanley and McNeil); the intervals are of +-0.003"
    t = pd.read_csv(FOLDER/'momminet_malignancy.csv').set_index('variant')
    assert t['auc'].idxmax() == 'multitask'
    n = 390/2
    auc = t.loc['multitask', 'auc']
    q1, q2 = auc/(2-auc), 2*auc**2/(1+auc)
    error = math.sqrt((auc*(1-auc)+(n-1)*(q1+q2-2*auc**2))/n**2)
    width = t.loc['multitask', 'ci_high']-t.loc['multitask', 'ci_low']
    assert error > .01
    assert width < .6*error
    complete = t.dropna()
    assert ((complete['ci_low'] < complete['auc']) & (complete['auc'] < complete['ci_high'])).all()
