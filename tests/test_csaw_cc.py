"""CSAW-CC: tables that are refused, and priors as the samples of a risk model see them"""
import pandas as pd
import pytest
from mammo_nb.core.errors import InputError
from mammo_nb.cohort.datasets.csaw_cc import csaw_cc, read_csaw_table
from mammo_nb.samples.risk import breast_history


def write(folder, exams, **columns):
    "A table with four images for each exam (patient, year, side of the cancer, timing)"
    rows = [dict(anon_patientid=p, exam_year=y, anon_filename=f'{p:05d}_{y}_{s[0]}_{v}_1.dcm', imagelaterality=s, viewposition=v,
                 x_case=int(side is not None), x_cancer_laterality=side, rad_timing=timing)
            for p, y, side, timing in exams for s in ('Left', 'Right') for v in ('CC', 'MLO')]
    pd.DataFrame(rows).assign(**columns).to_csv(folder/'t.csv', index=False)
    return folder/'t.csv'


EXAMS = [(2, 2010, 'Left', 3), (2, 2012, 'Left', 3), (2, 2014, 'Left', 1), (7, 2009, None, None), (7, 2013, None, None)]


def test_a_table_that_does_not_exist():
    with pytest.raises(InputError, match='the table of CSAW-CC'):
        read_csaw_table('nothing.csv')


def test_a_missing_column_is_named(tmp_path):
    table = write(tmp_path, EXAMS)
    pd.read_csv(table).drop(columns='rad_timing').to_csv(table, index=False)
    with pytest.raises(InputError, match='no rad_timing'):
        read_csaw_table(table)


@pytest.mark.parametrize('column, value', [('viewposition', 'ML'), ('imagelaterality', 'L'), ('x_case', 2), ('rad_timing', 4), ('exam_year', None)])
def test_values_of_another_edition_are_refused(tmp_path, column, value):
    with pytest.raises(InputError, match=f'{column} in row 2'):
        read_csaw_table(write(tmp_path, EXAMS, **{column: value}))


def test_a_case_needs_the_side_of_its_cancer(tmp_path):
    with pytest.raises(InputError, match='nothing for case 2, expected a side for every case'):
        read_csaw_table(write(tmp_path, EXAMS, x_cancer_laterality=None))


def test_a_cancer_on_both_sides(tmp_path):
    c = csaw_cc(tmp_path, write(tmp_path, [(3, 2012, 'Both', 1)]), check=False)
    assert (c.images.years_to_cancer == 0).all()


def test_exams_after_the_diagnosis_have_no_years_to_cancer(tmp_path):
    c = csaw_cc(tmp_path, write(tmp_path, [(3, 2012, 'Left', 1), (3, 2014, 'Left', 3)]), check=False)
    later = c.images[c.images.exam_date.dt.year == 2014]
    assert later.years_to_cancer.isna().all()
    assert (later.years_followed == 0).all()


def test_a_follow_up_longer_than_a_life_is_refused(tmp_path):
    with pytest.raises(InputError, match='followed_after_last'):
        csaw_cc(tmp_path, write(tmp_path, EXAMS), followed_after_last=51)


def test_images_without_a_file_are_counted(tmp_path, capsys):
    table = write(tmp_path, EXAMS)
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/read_csaw_table(table).anon_filename[0]).touch()
    assert len(csaw_cc(tmp_path, table)) == 1
    assert '19 of 20 images' in capsys.readouterr().out


def test_priors_of_a_risk_model(tmp_path):
    rows = breast_history(csaw_cc(tmp_path, write(tmp_path, EXAMS), check=False))
    left = rows[(rows.patient_id == 'CSAW-2') & (rows.laterality == 'L')].sort_values('exam_date')
    assert left.years_to_cancer.tolist() == [4, 2, 0]
    assert left.time_gap_1.round().tolist()[1:] == [2, 2]
