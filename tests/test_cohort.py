"""Cohort: hostile tables and files, large tables, round trips"""
import json
import time
import warnings
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from mammo_nb.core.errors import InputError
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.cohort.checks import TableError
from mammo_nb.cohort.exams import breast_table, count_cohort
from mammo_nb.cohort.hanging import show_exam
from mammo_nb.cohort.leaks import check_split, leaking_patients
from mammo_nb.cohort.schema import FINDING_COLUMNS, IMAGE_COLUMNS, example_tables
from mammo_nb.cohort.splits import carve_valid, patient_strata, split_patients
from mammo_nb.dicom.write import write_mammogram


def images(n=8, **columns):
    "Exams of four images, one for each patient"
    views = ('R-CC', 'L-CC', 'R-MLO', 'L-MLO')
    rows = [dict(image_id=f'i{i}', patient_id=f'p{i//4}', exam_id=f'e{i//4}', laterality=views[i % 4][0], view=views[i % 4][2:],
                 path=f'p{i//4}/{i}.dcm', rows=100, cols=80, provenance='test') for i in range(n)]
    return pd.DataFrame(rows).assign(**columns)


def findings(n=4, **columns):
    rows = [dict(finding_id=f'f{i}', image_id=f'i{i}', xmin=1, ymin=2, xmax=3, ymax=4, kind='mass', pathology='benign')
            for i in range(n)]
    return pd.DataFrame(rows).assign(**columns)


def assert_same_tables(a, b):
    pd.testing.assert_frame_equal(a.images, b.images, check_exact=True, check_freq=True)
    pd.testing.assert_frame_equal(a.findings, b.findings, check_exact=True, check_freq=True)


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close('all')


# ---- to a folder and back

EXTRA = dict(
    count=np.arange(8),
    flag=[True, False]*4,
    when=pd.date_range('2001-01-01', periods=8),
    share=np.linspace(0, 1, 8, dtype='float32'),
    word=['ä', None, '', 'x']*2,
    small=np.arange(8, dtype='int8'),
    maybe=pd.array([1, None]*4, dtype='Int64'),
    group=pd.Categorical(['a', 'b']*4),
    exam_date=pd.Timestamp('2020-02-29'),
    pixel_spacing_mm=1/3,
    nipple_row=[1/7]*8,
    nipple_col=np.nextafter(1, 2))


def test_every_dtype_survives_the_round_trip(tmp_path):
    c = Cohort(images(**EXTRA), findings(xmax=np.nextafter(3, 4)), tmp_path)
    back = Cohort.read(c.write(tmp_path/'t'))
    assert_same_tables(c, back)
    assert c.images.dtypes.astype(str).tolist() == back.images.dtypes.astype(str).tolist()


def test_a_second_round_trip_gives_the_same_bytes(tmp_path):
    c = Cohort(images(**EXTRA), findings(), tmp_path)
    Cohort.read(c.write(tmp_path/'t')).write(tmp_path/'u')
    for name in ('images.parquet', 'findings.parquet'):
        assert (tmp_path/'t'/name).read_bytes() == (tmp_path/'u'/name).read_bytes()


@pytest.mark.parametrize('n', [0, 1])
def test_round_trip_of_almost_nothing(tmp_path, n):
    c = Cohort(images(n*4), findings(n), tmp_path)
    back = Cohort.read(c.write(tmp_path))
    pd.testing.assert_frame_equal(c.images, back.images)
    pd.testing.assert_frame_equal(c.findings, back.findings)
    assert len(back.summary()) >= 1
    assert len(breast_table(back)) == 2*n
    assert len(back.exams()) == n
    assert 'missing views' in back._repr_html_()


def test_an_empty_cohort_counts_nothing():
    assert Cohort(pd.DataFrame()).summary().loc['all'].sum() == 0


def test_the_tables_given_are_not_changed():
    im, fi = images(), findings()
    before = im.copy(), fi.copy()
    c = Cohort(im, fi)
    c.images.loc[0, 'density'] = 'A'
    pd.testing.assert_frame_equal(im, before[0])
    pd.testing.assert_frame_equal(fi, before[1])


def test_broken_folders(tmp_path):
    folder = Cohort(images(), findings(), tmp_path).write(tmp_path)
    good = (folder/'images.parquet').read_bytes()
    for cut in (0, 4, len(good)//2, len(good)-1):
        (folder/'images.parquet').write_bytes(good[:cut])
        with pytest.raises(InputError, match='images.parquet: table: found .* expected a Parquet table'):
            Cohort.read(folder)


def test_a_folder_with_another_table(tmp_path):
    folder = Cohort(images(), findings(), tmp_path).write(tmp_path)
    pd.DataFrame(dict(a=[1])).to_parquet(folder/'images.parquet')
    with pytest.raises(InputError, match="no 'image_id'"):
        Cohort.read(folder)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match='FileNotFoundError'):
        Cohort.read(tmp_path/'nowhere')


def test_a_broken_cohort_json(tmp_path):
    folder = Cohort(images(), root=tmp_path).write(tmp_path)
    (folder/'cohort.json').write_text('{')
    with pytest.raises(InputError, match='a file made by Cohort.write; or give root'):
        Cohort.read(folder)


def test_write_leaves_no_half_tables(tmp_path, monkeypatch):
    c = Cohort(images(), findings(), tmp_path)
    c.write(tmp_path)
    before = (tmp_path/'images.parquet').read_bytes()

    def dies(self, path, *args, **kwargs):
        Path(path).write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(pd.DataFrame, 'to_parquet', dies)
    with pytest.raises(OSError):
        c.select("view == 'CC'").write(tmp_path)
    monkeypatch.undo()
    assert (tmp_path/'images.parquet').read_bytes() == before
    assert len(Cohort.read(tmp_path)) == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ['cohort.json', 'findings.parquet', 'images.parquet']


def test_no_table_is_replaced_before_both_are_complete(tmp_path, monkeypatch):
    c = Cohort(images(), findings(), tmp_path)
    c.write(tmp_path)
    whole = pd.DataFrame.to_parquet

    def second_dies(self, path, *args, **kwargs):
        if 'finding_id' in self:
            raise OSError('disk full')
        whole(self, path, *args, **kwargs)

    monkeypatch.setattr(pd.DataFrame, 'to_parquet', second_dies)
    with pytest.raises(OSError):
        c.select("view == 'CC'").write(tmp_path)
    monkeypatch.undo()
    assert len(Cohort.read(tmp_path)) == 8


# ---- what is refused

WRONG = dict(
    image_twice=(lambda: Cohort(images(image_id='a')), 'column image_id', 'each value once'),
    path_twice=(lambda: Cohort(images(path='a.dcm')), 'column path', 'each value once'),
    no_patient=(lambda: Cohort(images(patient_id=[None]*8)), 'column patient_id', 'a value in every row'),
    number_as_id=(lambda: Cohort(images(patient_id=range(8))), 'column patient_id', 'text'),
    empty_id=(lambda: Cohort(images(exam_id='')), 'column exam_id', 'text without blanks'),
    blank=(lambda: Cohort(images(density='A ')), 'column density', 'text without blanks'),
    line_break=(lambda: Cohort(images(path=[f'{i}.dcm\n' for i in range(8)])), 'column path', 'text without blanks'),
    bool_size=(lambda: Cohort(images(rows=True)), 'column rows', 'a number'),
    text_size=(lambda: Cohort(images(rows='100')), 'column rows', 'a number'),
    negative=(lambda: Cohort(images(rows=-3)), 'column rows', 'from 1'),
    half_a_pixel=(lambda: Cohort(images(rows=100.5)), 'column rows', 'a whole number'),
    infinite=(lambda: Cohort(images(years_followed=np.inf)), 'column years_followed', 'number'),
    spacing_in_metres=(lambda: Cohort(images(pixel_spacing_mm=7e-5)), 'column pixel_spacing_mm', 'from 0.005'),
    date_as_text=(lambda: Cohort(images(exam_date='2020-01-01')), 'column exam_date', 'a date'),
    date_with_zone=(lambda: Cohort(images(exam_date=pd.Timestamp('2020-01-01', tz='UTC'))), 'column exam_date', 'without time zone'),
    other_view=(lambda: Cohort(images(view='ML')), 'column view', 'CC, MLO'),
    birads_4D=(lambda: Cohort(images(birads='4D')), 'column birads', '4C'),
    birads_number=(lambda: Cohort(images(birads=4)), 'column birads', 'text'),
    split=(lambda: Cohort(images(split='training')), 'column split', 'train, valid, test'),
    nul=(lambda: Cohort(images(gaze_path='a\0b')), 'column gaze_path', 'a POSIX path'),
    unc=(lambda: Cohort(images(gaze_path='//host/x')), 'column gaze_path', 'a POSIX path'),
    half_a_nipple=(lambda: Cohort(images(nipple_row=5.)), 'column nipple_row', 'both or neither'),
    nipple_outside=(lambda: Cohort(images(nipple_row=5., nipple_col=81.)), 'column nipple_row', 'a point inside the image'),
    kind=(lambda: Cohort(images(), findings(kind='lump')), 'column kind', 'mass'),
    pathology=(lambda: Cohort(images(), findings(pathology='BENIGN')), 'column pathology', 'benign, malignant'),
    box_turned=(lambda: Cohort(images(), findings(xmin=5)), 'column xmin', 'xmin < xmax'),
    box_flat=(lambda: Cohort(images(), findings(ymin=4)), 'column xmin', 'ymin < ymax'),
    box_left=(lambda: Cohort(images(), findings(xmin=-1)), 'column xmin', 'from 0'),
    box_of_three=(lambda: Cohort(images(), findings(xmin=np.nan)), 'column xmin', 'four sides of a box or none'),
    box_outside=(lambda: Cohort(images(), findings(xmax=81)), 'column xmax', 'a box inside the image'),
    orphan=(lambda: Cohort(images(), findings(image_id='nobody')), 'column image_id', 'a row of the images table'),
    lesion_of_two=(lambda: Cohort(images(), findings(8, lesion_id='x')), 'column lesion_id', 'one patient_id'),
    lesion_of_both_sides=(lambda: Cohort(images(), findings(2, lesion_id='x')), 'column lesion_id', 'one laterality'),
    exam_of_two=(lambda: Cohort(images(exam_id='e')), 'column exam_id', 'one patient_id'),
    exam_on_two_days=(lambda: Cohort(images(4, exam_date=pd.date_range('2020-01-01', periods=4))), 'column exam_id', 'one exam_date'),
    patient_of_two_sets=(lambda: Cohort(images(4, provenance=['a', 'b']*2)), 'column patient_id', 'one provenance'),
    column_twice=(lambda: Cohort(pd.concat([images(), images()[['rows']]], axis=1)), 'columns', 'each column once'),
    no_column=(lambda: Cohort(images().drop(columns='laterality')), 'columns', "'laterality'"),
    column_name=(lambda: Cohort(images().assign(x=1).rename(columns={'x': 3})), 'columns', 'a text'),
    mixed_extra=(lambda: Cohort(images(note=[1, 'a']*4)), 'column note', 'text'))

@pytest.mark.parametrize('name', WRONG)
def test_refused(name):
    make, what, expected = WRONG[name]
    with pytest.raises(InputError) as e:
        make()
    assert e.value.what == what
    assert expected in e.value.expected, str(e.value)
    assert e.value.where.split()[0] in ('images', 'findings')


@pytest.mark.parametrize('path', ['/etc/passwd', '../b.dcm', 'x/../../b.dcm', 'C:/b.dcm', r'x\b.dcm', './b.dcm', 'x//b.dcm'])
def test_paths_that_leave_the_root_are_refused(path):
    with pytest.raises(InputError, match='a POSIX path below the root'):
        Cohort(images(4).assign(path=['a.dcm', 'b.dcm', 'c.dcm', path]))


def test_messages_name_place_value_and_remedy():
    im, fi = example_tables()
    with pytest.raises(InputError) as e:
        Cohort(im, fi.assign(image_id=['P9', *fi.image_id[1:]]))
    assert str(e.value) == ("findings table, row 0 (finding_id 'f1'): column image_id: found image_id 'P9', "
                            'expected the image_id of a row of the images table')


def test_an_exam_of_two_patients_names_both():
    im, fi = example_tables()
    im.loc[8, 'exam_id'] = 'P1a'
    with pytest.raises(InputError, match="exam_id 'P1a' with patient_id P1 and P2, expected one patient_id for each exam_id"):
        Cohort(im, fi)


def test_prior_and_current_exam_exchanged():
    im, fi = example_tables()
    im.loc[4:7, 'exam_date'] = pd.Timestamp('2018-06-01')
    im.loc[[5, 7], 'years_to_cancer'] = 1.
    with pytest.raises(InputError, match='are prior and current exchanged'):
        Cohort(im, fi)


def test_a_second_cancer_years_after_the_first_is_allowed():
    im, fi = example_tables()
    im.loc[4:7, 'exam_date'] = pd.Timestamp('2023-01-01')
    im.loc[[5, 7], 'years_to_cancer'] = 1.
    assert len(Cohort(im, fi)) == 11


def test_the_row_in_the_error_is_the_row_of_the_table():
    im = images(20_000).assign(density='B')
    im.loc[[15_003, 17_000], 'density'] = 'E'
    with pytest.raises(InputError) as e:
        Cohort(im)
    assert e.value.where == "images table, row 15003 (image_id 'i15003')"
    assert e.value.expected.endswith('1 more row like it')


def test_validate_checks_tables_that_were_changed_in_place():
    c = Cohort(images())
    c.images.loc[0, 'density'] = 'E'
    with pytest.raises(InputError, match='density'):
        c.validate()


# ---- silent failures of issue 19: one fault at a time, and raw AttributeErrors

def foreign_tables():
    "Tables with faults of types, values and relations"
    im, fi = example_tables()
    im = im.rename(columns=dict(laterality='side')).assign(density='2', rows='120')
    return im, fi.assign(pathology='BENIGN', xmax=fi.xmin)


def test_a_cohort_tells_all_faults_of_its_tables_at_once():
    with pytest.raises(TableError) as e:
        Cohort(*foreign_tables())
    faults = [(f.where.split()[0], f.columns[0]) for f in e.value.faults]
    assert faults == [('images', 'laterality'), ('images', 'rows'), ('images', 'density'), ('findings', 'pathology'), ('findings', 'xmin')]
    message = str(e.value)
    assert message.startswith('5 faults in the tables of a cohort:\n- images table: columns: found no ')
    for fault in e.value.faults:
        assert str(fault) in message


def test_a_missing_column_is_told_with_the_columns_that_are_there():
    im, fi = foreign_tables()
    with pytest.raises(TableError) as e:
        Cohort(im, fi)
    last = str(e.value).splitlines()[-1]
    assert last == f'columns of the images table: {", ".join(im)}'


def test_all_missing_columns_are_told():
    with pytest.raises(TableError) as e:
        Cohort(pd.DataFrame(dict(image_id=['a'], file=['a.png'])))
    assert [f.columns[0] for f in e.value.faults] == ['patient_id', 'exam_id', 'laterality', 'view', 'path']
    assert 'columns of the images table: image_id, file' in str(e.value)


def test_names_that_cannot_be_told_apart_do_not_hide_other_faults():
    im = pd.concat([images(density='2'), images()[['rows']]], axis=1).assign(x=1).rename(columns={'x': 3})
    with pytest.raises(TableError) as e:
        Cohort(im)
    assert [f.found for f in e.value.faults] == ["'rows' twice", '3', "'2'"]


def test_one_fault_is_told_in_one_line():
    with pytest.raises(TableError) as e:
        Cohort(images(density='2'))
    assert len(e.value.faults) == 1
    assert str(e.value) == str(e.value.faults[0])


def test_a_cohort_of_a_folder_name_is_refused():
    with pytest.raises(InputError, match='Cohort.read'):
        Cohort('data/cohort')


class Prepared:
    "What a prepared cohort looks like: it holds a cohort, and is none"
    def __init__(self, cohort):
        self.cohort = cohort


TAKES_A_COHORT = dict(breast_table=breast_table, patient_strata=patient_strata, split_patients=split_patients, check_split=check_split,
                      leaking_patients=leaking_patients, carve_valid=carve_valid, count_cohort=count_cohort)

@pytest.mark.parametrize('name', TAKES_A_COHORT)
def test_a_prepared_cohort_in_place_of_a_cohort_is_told(name):
    with pytest.raises(InputError, match='cohort: found a Prepared, expected a Cohort; pass its attribute `.cohort`'):
        TAKES_A_COHORT[name](Prepared(Cohort(images())))


@pytest.mark.parametrize('value, found', [('folder', "'folder'"), (None, 'a NoneType'), (images(), 'a DataFrame')])
def test_anything_else_in_place_of_a_cohort_is_told(value, found):
    with pytest.raises(InputError, match=f'breast_table: cohort: found {found}, expected a Cohort'):
        breast_table(value)


@pytest.mark.parametrize('column', ['label', 'Cancer', 'pathology'])
def test_a_label_column_in_the_images_table_is_not_ignored_without_a_word(column):
    with pytest.warns(UserWarning, match=f"'{column}' is kept, but not used as a label. Labels come from the pathology of the findings"):
        c = Cohort(images(**{column: 'malignant'}))
    assert breast_table(c).label.isna().all()
    assert (c.images[column] == 'malignant').all()


def test_the_warning_of_a_label_column_names_the_line_of_the_user():
    with pytest.warns(UserWarning) as caught:
        Cohort(images(label=1))
    assert Path(caught[0].filename).name == 'test_cohort.py'


def test_the_warning_of_a_label_column_is_not_repeated_for_every_part():
    with pytest.warns(UserWarning) as caught:
        Cohort(images(label=1)).summary()
    assert len(caught) == 1


def test_a_table_without_labels_is_made_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Cohort(images(age=50), findings())


# ---- files

def test_root_elsewhere(tmp_path):
    (tmp_path/'data').mkdir()
    c = Cohort(images(), root=tmp_path/'data')
    back = Cohort.read(c.write(tmp_path/'tables'))
    assert back.file('i0') == (tmp_path/'data').resolve()/'p0'/'0.dcm'
    assert json.loads((tmp_path/'tables'/'cohort.json').read_text())['root'] == (tmp_path/'data').as_posix()
    assert Cohort.read(tmp_path/'tables', root=tmp_path).file('i0').parent.parent == tmp_path.resolve()


def test_a_folder_with_its_tables_can_be_moved(tmp_path):
    Cohort(images(), root=tmp_path/'here').write(tmp_path/'here')
    (tmp_path/'here').rename(tmp_path/'there')
    assert Cohort.read(tmp_path/'there').file('i0') == (tmp_path/'there').resolve()/'p0'/'0.dcm'


def test_a_root_that_is_a_link_is_fine(tmp_path):
    (tmp_path/'data').mkdir()
    (tmp_path/'link').symlink_to(tmp_path/'data')
    assert Cohort(images(), root=tmp_path/'link').file('i0') == (tmp_path/'data').resolve()/'p0'/'0.dcm'


def test_links_that_leave_the_root(tmp_path):
    (tmp_path/'root').mkdir()
    (tmp_path/'else').mkdir()
    (tmp_path/'else'/'0.dcm').touch()
    (tmp_path/'root'/'p0').symlink_to(tmp_path/'else')
    with pytest.raises(InputError, match='below the root'):
        Cohort(images(), root=tmp_path/'root').file('i0')


@pytest.mark.parametrize('name', ['../x', '/etc/passwd', 'a/../../x', '.'])
def test_file_refuses_names_outside_the_root(name):
    with pytest.raises(InputError, match='a file below the root'):
        Cohort(images()).file(name)


# ---- parts and wholes

def test_concat_keeps_types_and_files(tmp_path):
    a = Cohort(images(4, age=50), findings(1, mask_path='m.png'), tmp_path/'a')
    b = Cohort(images(8).iloc[4:], None, tmp_path/'b')
    c = Cohort.concat([a, b])
    assert [c.file(f'i{i}') for i in (0, 4)] == [a.file('i0'), b.file('i4')]
    assert c.file(c.findings.mask_path[0]) == a.file('m.png')
    assert [str(c.images[k].dtype) for k in IMAGE_COLUMNS] == [o.dtype for o in IMAGE_COLUMNS.values()]
    assert [str(c.findings[k].dtype) for k in FINDING_COLUMNS] == [o.dtype for o in FINDING_COLUMNS.values()]
    assert c.images.age.isna().sum() == 4


def test_concat_of_nothing_and_of_halves():
    c = Cohort(images(), findings())
    assert len(Cohort.concat([])) == 0
    halves = [c.select(c.images.patient_id == p) for p in c.patients]
    pd.testing.assert_frame_equal(Cohort.concat(halves).findings, c.findings)


def test_concat_refuses_ids_that_clash():
    c = Cohort(images())
    with pytest.raises(InputError, match='each value once'):
        Cohort.concat([c, c])
    renamed = images(provenance='other').assign(image_id=lambda t: t.image_id + 'x', path=lambda t: t.path + 'x')
    with pytest.raises(InputError, match="patient_id 'p0' with provenance test and other"):
        Cohort.concat([c, Cohort(renamed)])
    with pytest.raises(InputError, match='one for each of 1 cohorts'):
        Cohort.concat([c], keys=['a', 'b'])


def test_select_with_a_series_of_another_index():
    c = Cohort(images(), findings())
    assert len(c.select(c.images.patient_id == 'p1')) == 4
    assert len(c.select("patient_id == 'p1' and view == 'CC'")) == 2


@pytest.mark.parametrize('which, message', [
    ([True]*3, 'a boolean for each of the 8 images'),
    ('rows', 'a boolean for each of the 8 images'),
    ('densty == "C"', 'a query over image_id, patient_id')])
def test_select_refuses(which, message):
    with pytest.raises(InputError, match=message):
        Cohort(images()).select(which)


def test_an_empty_part_is_still_typed():
    c = Cohort(images(), findings())
    empty = c.select(np.zeros(8, bool))
    assert list(empty.images.dtypes) == list(c.images.dtypes)


# ---- exams and breasts

def test_a_second_exam_on_the_same_day_is_no_prior():
    im, _ = example_tables()
    again = im[im.exam_id == 'P1b'].assign(exam_id='P1c', image_id=lambda t: 'c' + t.image_id, path=lambda t: 'c/' + t.path)
    exams = Cohort(pd.concat([im, again])).exams().set_index('exam_id')
    assert exams.previous_exam_id[['P1b', 'P1c']].tolist() == ['P1a', 'P1a']


def test_without_dates_no_exam_has_a_prior():
    im, _ = example_tables()
    assert Cohort(im.drop(columns='exam_date')).exams().previous_exam_id.isna().all()


def test_a_view_taken_twice_is_counted():
    im, _ = example_tables()
    again = im.iloc[:1].assign(image_id='again', path='again.png')
    assert Cohort(pd.concat([im, again])).summary().loc['all', 'repeated views'] == 1


def test_extra_columns_of_the_findings_do_not_mix_with_those_of_the_images():
    im, fi = example_tables()
    extra = fi.assign(patient_id='x', laterality='x', exam_id='x', rows=1, cols=1)
    pd.testing.assert_frame_equal(breast_table(Cohort(im, extra)), breast_table(Cohort(im, fi)))


def test_breasts_with_one_view_only():
    b = breast_table(Cohort(images().query("laterality == 'L' and view == 'MLO'")))
    assert b.image_id_cc.isna().all()
    assert b.image_id_mlo.tolist() == ['i3', 'i7']
    assert b.label.isna().all()


def test_a_large_cohort_is_quick():
    n = 80_000
    start = time.perf_counter()
    c = Cohort(images(n), findings(n))
    c.exams()
    breast_table(c)
    c.summary()
    c.missing_views()
    assert time.perf_counter() - start < 60   # some 5 s on one core: nothing is done row by row in Python


# ---- the hanging

LEFT = np.zeros((400, 200), 'float32')
LEFT[50:350, :150] = .5

def test_show_exam_scales_all_images_alike():
    axs = show_exam({'L-CC': LEFT, 'R-CC': LEFT[:, ::-1], 'R-MLO': LEFT[:300]}, boxes={'R-CC': [[120, 100, 150, 160]]})
    assert {a.get_xlim() for a in axs.ravel()} == {(0, 200)}
    assert {a.get_ylim() for a in axs.ravel()} == {(400, 0)}
    assert axs[0, 0].patches[0].get_x() == 120            # a right breast stored the usual way is drawn as stored
    assert axs[1, 0].images[0].get_extent() == [0, 200, 350, 50]


def test_show_exam_mirrors_the_chest_wall_to_the_middle():
    drawn = show_exam({'R-MLO': LEFT[:300]})[1, 0].images[0].get_array()
    assert drawn[:, -1].max() > 0
    assert drawn[:, 0].max() == 0


def test_show_exam_draws_images_as_stored():
    axs = show_exam({'R-CC': LEFT}, chest_wall='stored')
    assert axs[0, 0].images[0].get_array()[:, 0].max() > 0


def test_show_exam_mirrors_boxes_of_prepared_images():
    axs = show_exam({'R-CC': LEFT}, boxes={'R-CC': [[0, 0, 10, 10]]}, chest_wall='left')
    assert axs[0, 0].patches[0].get_x() == 190


def test_show_exam_of_nothing():
    assert all('missing' in a.texts[-1].get_text() for a in show_exam({}).ravel())


def test_show_exam_refuses_channels():
    with pytest.raises(InputError, match=r'an image \[H,W\]'):
        show_exam({'L-CC': np.zeros((3, 4, 2))})


def test_a_cohort_refuses_to_draw_what_it_does_not_know():
    im, fi = example_tables()
    c = Cohort(im, fi)
    with pytest.raises(InputError, match='one of P1a, P1b, P2a'):
        c.show_exam('P9')
    with pytest.raises(InputError, match='found 60 x 90, expected 120 x 90 as in the images table'):
        c.show_exam('P1b', read=lambda p: np.ones((60, 90)))


def test_a_cohort_shows_dicom_and_png_files(tmp_path):
    x = np.zeros((100, 80), 'uint16')
    x[20:80, :50] = 2000
    im = images(4)
    im.loc[im.image_id == 'i1', 'path'] = 'p0/1.png'
    c = Cohort(im, findings(2), tmp_path)
    for o in c.images.itertuples():
        path = c.file(o.image_id)
        path.parent.mkdir(exist_ok=True)
        pixels = x if o.laterality == 'L' else x[:, ::-1]
        if path.suffix == '.png':
            Image.fromarray(pixels).save(path)
        else:
            write_mammogram(path, pixels, o.laterality, o.view, window=(1000, 2000))
    axs = c.show_exam('e0')
    assert [len(a.images) for a in axs.ravel()] == [1]*4
    assert [len(a.patches) for a in axs.ravel()] == [1, 1, 0, 0]
    assert axs[0, 1].images[0].get_array().max() == pytest.approx(2000/65535)
    assert axs[1, 1].images[0].get_array().max() == pytest.approx(1, abs=.01)
    c.file('i0').unlink()
    with pytest.raises(InputError, match='0.dcm'):
        c.show_exam('e0')
