"""Cohort: hostile tables and files, large tables, round trips"""
import json, os, time
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from mammo_nb.core.errors import InputError
from mammo_nb.data.cohort import BOX, FINDING_COLUMNS, IMAGE_COLUMNS, Cohort, breasts, show_exam


def images(n=8, **columns):
    views = ('R-CC', 'L-CC', 'R-MLO', 'L-MLO')
    return pd.DataFrame([dict(image_id=f'i{i}', patient_id=f'p{i//4}', exam_id=f'e{i//4}', laterality=views[i % 4][0], view=views[i % 4][2:], path=f'p{i//4}/{i}.dcm',
                              rows=100, cols=80, provenance='test') for i in range(n)]).assign(**columns)


def findings(n=4, **columns):
    return pd.DataFrame([dict(finding_id=f'f{i}', image_id=f'i{i}', xmin=1, ymin=2, xmax=3, ymax=4, kind='mass', pathology='benign') for i in range(n)]).assign(**columns)


def test_every_dtype_survives_the_round_trip(tmp_path):
    extra = dict(count=np.arange(8), flag=[True, False]*4, when=pd.date_range('2001-01-01', periods=8), share=np.linspace(0, 1, 8, dtype='float32'),
                 word=['ä', None, '', 'x']*2, small=np.arange(8, dtype='int8'), maybe=pd.array([1, None]*4, dtype='Int64'), group=pd.Categorical(['a', 'b']*4))
    c = Cohort(images(exam_date=pd.Timestamp('2020-02-29'), pixel_spacing_mm=1/3, nipple_row=[1/7]*8, nipple_col=np.nextafter(1, 2), **extra), findings(xmax=np.nextafter(3, 4)), tmp_path)
    back = Cohort.read(c.write(tmp_path/'t'))
    for a, b in ((c.images, back.images), (c.findings, back.findings)):
        pd.testing.assert_frame_equal(a, b, check_exact=True, check_freq=True)
        assert a.dtypes.astype(str).tolist() == b.dtypes.astype(str).tolist()
    assert back.write(tmp_path/'u') and all((tmp_path/'t'/n).read_bytes() == (tmp_path/'u'/n).read_bytes() for n in ('images.parquet', 'findings.parquet'))


@pytest.mark.parametrize('n', [0, 1])
def test_round_trip_of_almost_nothing(tmp_path, n):
    c = Cohort(images(n*4), findings(n), tmp_path)
    back = Cohort.read(c.write(tmp_path))
    pd.testing.assert_frame_equal(c.images, back.images); pd.testing.assert_frame_equal(c.findings, back.findings)
    assert len(back.summary()) >= 1 and len(breasts(back)) == 2*n and len(back.exams()) == n and isinstance(back._repr_html_(), str)


def test_the_tables_given_are_not_changed():
    im, fi = images(), findings()
    before = im.copy(), fi.copy()
    c = Cohort(im, fi)
    c.images.loc[0, 'density'] = 'A'
    pd.testing.assert_frame_equal(im, before[0]); pd.testing.assert_frame_equal(fi, before[1])


WRONG = dict(
    image_twice=(lambda: Cohort(images(image_id='a')), 'column image_id', 'each value once'),
    path_twice=(lambda: Cohort(images(path='a.dcm')), 'column path', 'each value once'),
    no_patient=(lambda: Cohort(images(patient_id=[None]*8)), 'column patient_id', 'a value in every row'),
    number_as_id=(lambda: Cohort(images(patient_id=range(8))), 'column patient_id', 'text'),
    empty_id=(lambda: Cohort(images(exam_id='')), 'column exam_id', 'text without blanks'),
    blank=(lambda: Cohort(images(density='A ')), 'column density', 'text without blanks'),
    bool_size=(lambda: Cohort(images(rows=True)), 'column rows', 'a number'),
    negative=(lambda: Cohort(images(rows=-3)), 'column rows', 'from 1'),
    infinite=(lambda: Cohort(images(years_followed=np.inf)), 'column years_followed', 'number'),
    spacing_in_metres=(lambda: Cohort(images(pixel_spacing_mm=7e-5)), 'column pixel_spacing_mm', 'from 0.005'),
    date_as_text=(lambda: Cohort(images(exam_date='2020-01-01')), 'column exam_date', 'a date'),
    date_with_zone=(lambda: Cohort(images(exam_date=pd.Timestamp('2020-01-01', tz='UTC'))), 'column exam_date', 'without time zone'),
    birads_4D=(lambda: Cohort(images(birads='4D')), 'column birads', '4C'),
    birads_number=(lambda: Cohort(images(birads=4)), 'column birads', 'text'),
    split=(lambda: Cohort(images(split='training')), 'column split', 'train, valid, test'),
    nul=(lambda: Cohort(images(gaze_path='a\0b')), 'column gaze_path', 'a POSIX path'),
    unc=(lambda: Cohort(images(gaze_path='//host/x')), 'column gaze_path', 'a POSIX path'),
    kind=(lambda: Cohort(images(), findings(kind='lump')), 'column kind', 'mass'),
    box_turned=(lambda: Cohort(images(), findings(xmin=5)), 'column xmin', 'xmin < xmax'),
    box_flat=(lambda: Cohort(images(), findings(ymin=4)), 'column xmin', 'ymin < ymax'),
    box_left=(lambda: Cohort(images(), findings(xmin=-1)), 'column xmin', 'from 0'),
    orphan=(lambda: Cohort(images(), findings(image_id='nobody')), 'column image_id', 'a row of the images table'),
    lesion_of_two=(lambda: Cohort(images(), findings(8, lesion_id='x')), 'column lesion_id', 'one patient_id'),
    column_twice=(lambda: Cohort(pd.concat([images(), images()[['rows']]], axis=1)), 'columns', 'each column once'),
    no_column=(lambda: Cohort(images().drop(columns='laterality')), 'columns', "'laterality'"),
    column_name=(lambda: Cohort(images().assign(**{'x': 1}).rename(columns={'x': 3})), 'columns', 'a text'),
    mixed_extra=(lambda: Cohort(images(note=[1, 'a']*4)), 'column note', 'text'))

@pytest.mark.parametrize('name', WRONG)
def test_refused(name):
    make, what, expected = WRONG[name]
    with pytest.raises(InputError) as e: make()
    assert e.value.what == what and expected in e.value.expected, str(e.value)
    assert e.value.where.split()[0] in ('images', 'findings')


def test_the_row_in_the_error_is_the_row_of_the_table():
    im = images(20_000); im['density'] = 'B'
    im.loc[[15_003, 17_000], 'density'] = 'E'
    with pytest.raises(InputError) as e: Cohort(im)
    assert e.value.where == "images table, row 15003 (image_id 'i15003')" and e.value.expected.endswith('1 more rows like it')


def test_broken_folders(tmp_path):
    folder = Cohort(images(), findings(), tmp_path).write(tmp_path)
    good = (folder/'images.parquet').read_bytes()
    for cut in (0, 4, len(good)//2, len(good)-1):
        (folder/'images.parquet').write_bytes(good[:cut])
        with pytest.raises(InputError, match='images.parquet'): Cohort.read(folder)
    pd.DataFrame(dict(a=[1])).to_parquet(folder/'images.parquet')
    with pytest.raises(InputError, match="no 'image_id'"): Cohort.read(folder)


def test_write_leaves_no_half_tables(tmp_path, monkeypatch):
    c = Cohort(images(), findings(), tmp_path)
    c.write(tmp_path); before = (tmp_path/'images.parquet').read_bytes()
    def dies(self, path, *a, **k): Path(path).write_bytes(b'half'); raise OSError('disk full')
    monkeypatch.setattr(pd.DataFrame, 'to_parquet', dies)
    with pytest.raises(OSError): c.select("view == 'CC'").write(tmp_path)
    monkeypatch.undo()
    assert (tmp_path/'images.parquet').read_bytes() == before and len(Cohort.read(tmp_path)) == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ['cohort.json', 'findings.parquet', 'images.parquet']


def test_root_elsewhere(tmp_path):
    (tmp_path/'data').mkdir(); (tmp_path/'link').symlink_to(tmp_path/'data')
    c = Cohort(images(), root=tmp_path/'data')
    back = Cohort.read(c.write(tmp_path/'tables'))
    assert back.file('i0') == (tmp_path/'data').resolve()/'p0'/'0.dcm'
    assert json.loads((tmp_path/'tables'/'cohort.json').read_text())['root'] == (tmp_path/'data').as_posix()
    assert Cohort(images(), root=tmp_path/'link').file('i0') == (tmp_path/'data').resolve()/'p0'/'0.dcm'   # a root that is a link is fine
    assert Cohort.read(tmp_path/'tables', root=tmp_path).file('i0').parent.parent == tmp_path.resolve()


def test_links_that_leave_the_root(tmp_path):
    (tmp_path/'root').mkdir(); (tmp_path/'else').mkdir(); (tmp_path/'else'/'0.dcm').touch()
    (tmp_path/'root'/'p0').symlink_to(tmp_path/'else')
    with pytest.raises(InputError, match='below the root'): Cohort(images(), root=tmp_path/'root').file('i0')


def test_concat_keeps_types_and_files(tmp_path):
    a = Cohort(images(4, age=50), findings(1, mask_path='m.png'), tmp_path/'a')
    b = Cohort(images(8).iloc[4:], None, tmp_path/'b')
    c = Cohort.concat([a, b])
    assert [c.file(f'i{i}') for i in (0, 4)] == [a.file('i0'), b.file('i4')] and c.file(c.findings.mask_path[0]) == a.file('m.png')
    assert [str(c.images[k].dtype) for k in IMAGE_COLUMNS] == [o.dtype for o in IMAGE_COLUMNS.values()]
    assert [str(c.findings[k].dtype) for k in FINDING_COLUMNS] == [o.dtype for o in FINDING_COLUMNS.values()]
    assert c.images.age.isna().sum() == 4 and len(Cohort.concat([])) == 0


def test_select_with_a_series_of_another_index():
    c = Cohort(images(), findings())
    assert len(c.select(c.images.patient_id == 'p1')) == 4 and len(c.select("patient_id == 'p1' and view == 'CC'")) == 2
    with pytest.raises(InputError): c.select([True]*3)
    with pytest.raises(InputError): c.select('rows')    # numbers, not booleans


def test_a_large_cohort_is_quick():
    n = 80_000
    start = time.perf_counter()
    c = Cohort(images(n), findings(n))
    c.exams(), breasts(c), c.summary(), c.missing_views()
    assert time.perf_counter() - start < 60   # some 5 s on one core: nothing is done row by row in Python


def test_breasts_with_one_view_only():
    b = breasts(Cohort(images().query("laterality == 'L' and view == 'MLO'")))
    assert b.image_id_cc.isna().all() and b.image_id_mlo.tolist() == ['i3', 'i7'] and b.label.isna().all()


def test_show_exam_scales_and_hangs(tmp_path):
    import matplotlib.pyplot as plt
    left = np.zeros((400, 200), 'float32'); left[50:350, :150] = .5
    axs = show_exam({'L-CC': left, 'R-CC': left[:, ::-1], 'R-MLO': left[:300]}, boxes={'R-CC': [[120, 100, 150, 160]]}, chest='auto')
    assert {a.get_xlim() for a in axs.ravel()} == {(0, 200)} and {a.get_ylim() for a in axs.ravel()} == {(400, 0)}
    assert axs[0, 0].patches[0].get_x() == 120            # a right breast stored the usual way is drawn as stored
    assert axs[1, 0].images[0].get_extent() == [0, 200, 350, 50]
    assert axs[1, 0].images[0].get_array()[:, -1].max() > 0 and axs[1, 0].images[0].get_array()[:, 0].max() == 0   # mirrored: chest wall to the middle
    plt.close('all')
    axs = show_exam({'R-CC': left}, chest='stored'); assert axs[0, 0].images[0].get_array()[:, 0].max() > 0; plt.close('all')
    axs = show_exam({'R-CC': left}, boxes={'R-CC': [[0, 0, 10, 10]]}, chest='left'); assert axs[0, 0].patches[0].get_x() == 190; plt.close('all')
    axs = show_exam({}); assert all('missing' in a.texts[-1].get_text() for a in axs.ravel()); plt.close('all')


def test_a_cohort_shows_dicom_and_png_files(tmp_path):
    import matplotlib.pyplot as plt
    from PIL import Image
    from mammo_nb.data.dicom_file import write_mammogram
    x = np.zeros((100, 80), 'uint16'); x[20:80, :50] = 2000
    im = images(4); im.loc[im.image_id == 'i1', 'path'] = 'p0/1.png'
    c = Cohort(im, findings(2), tmp_path)
    for o in c.images.itertuples():
        p = c.file(o.image_id); p.parent.mkdir(exist_ok=True)
        pixels = x if o.laterality == 'L' else x[:, ::-1]
        if p.suffix == '.png': Image.fromarray(pixels).save(p)
        else: write_mammogram(p, pixels, o.laterality, o.view, window=(1000, 2000))
    axs = c.show_exam('e0')
    assert [len(a.images) for a in axs.ravel()] == [1]*4 and [len(a.patches) for a in axs.ravel()] == [1, 1, 0, 0]
    assert axs[0, 1].images[0].get_array().max() == pytest.approx(2000/65535) and axs[1, 1].images[0].get_array().max() == pytest.approx(1, abs=.01)
    plt.close('all')
    c.file('i0').unlink()
    with pytest.raises(InputError, match='0.dcm'): c.show_exam('e0')
    plt.close('all')
