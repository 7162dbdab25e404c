"""VinDr-Mammo: tables that are refused with all their faults, findings of several categories, and files through `mn.prepare`"""
import json
import re
import numpy as np
import pandas as pd
import pytest
import mammo_nb as mn
from mammo_nb.core.errors import InputError
from mammo_nb.cohort.datasets.vindr_mammo import (
    VINDR_FILES, VINDR_KINDS, parse_finding_categories, read_vindr_metadata, vindr_mammo
)
from mammo_nb.cohort.leaks import leaking_patients
from mammo_nb.dicom.mammogram import read_mammogram
from mammo_nb.dicom.write import write_mammogram
from mammo_nb.samples.lesion_synthesis import KINDS, encode_attributes, lesion_patches
from repo import ROOT

ROWS, COLS = 176, 140
BOX = (40.5, 70.25, 72., 98.)
SIDES = ('xmin', 'ymin', 'xmax', 'ymax')


def study(name, split='training', birads=1):
    "The four images of a study"
    return pd.DataFrame([
        dict(study_id=name, series_id='s', image_id=f'{name}{side}{view}'.lower(), laterality=side, view_position=view,
             height=ROWS, width=COLS, breast_birads=f'BI-RADS {birads}', breast_density='DENSITY C', split=split)
        for side in 'LR' for view in ('CC', 'MLO')])


def annotated(images, *annotations):
    "The findings table: (image_id, categories, BI-RADS, box), and `No Finding` for the other images"
    marked = pd.DataFrame([(i, c, b, *box) for i, c, b, box in annotations],
                          columns=['image_id', 'finding_categories', 'finding_birads', *SIDES])
    t = images.merge(marked, on='image_id', how='left')
    return t.fillna(dict(finding_categories="['No Finding']"))


def changed(table, **cells):
    "A table with other values: `column={row: value}`"
    t = table.astype(object)
    for column, values in cells.items():
        for row, value in values.items():
            t.iloc[row, t.columns.get_loc(column)] = value
    return t


def put(folder, breasts, findings=None):
    "Write both tables; the folder"
    breasts.to_csv(folder/VINDR_FILES['breasts'], index=False)
    (annotated(breasts) if findings is None else findings).to_csv(folder/VINDR_FILES['findings'], index=False)
    return folder


IMAGES = pd.concat([study('a1', birads=4), study('b2'), study('f6', 'test', 3)], ignore_index=True)
MASS = ('a1lcc', "['Mass']", 'BI-RADS 4', BOX)


def read(folder, breasts=IMAGES, findings=None, **kwargs):
    return vindr_mammo(put(folder, breasts, findings), check=False, **kwargs)


def message(folder, breasts=IMAGES, findings=None, **kwargs):
    "The message of a refused pair of tables"
    with pytest.raises(InputError) as e:
        read(folder, breasts, findings, **kwargs)
    return str(e.value)


# ---- categories

def test_every_category_is_known_alone_and_with_others():
    assert parse_finding_categories(str(list(VINDR_KINDS))) == tuple(VINDR_KINDS)
    for word in (*VINDR_KINDS, 'No Finding'):
        assert parse_finding_categories(f"['{word}']") == parse_finding_categories(f'["{word}"]') == (word,)


HOSTILE = [
    "__import__('os').system('touch pwned')", "[__import__('os').system('touch pwned')]", "['Mass'].clear()", "['Mass'*99]",
    "['Mass' 'Mass']", "['Mass', ]", "[['Mass']]", "('Mass',)", "{'Mass'}", 'Mass', '[]', '', "['mass']", "['Mass\\n']",
    "['Mass'", "['Mass', 'Mass']", "['Mass', 'No Finding']", "['Cyst']", "['Mass]", "['Mass\"]", "[b'Mass']", "['Mass']\n",
    '['*100_000, "['" + 'a'*1_000_000 + "']", "['Mass'" + ", 'Mass'"*100_000 + ']', "[" + ' '*100_000, "['Mass\0']", '\x1b[31m', None, 3,
]


@pytest.mark.parametrize('text', HOSTILE, ids=range(len(HOSTILE)))
def test_a_text_that_is_no_list_of_known_words_is_refused_and_not_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as e:
        parse_finding_categories(text)
    assert len(str(e.value)) < 500
    assert str(e.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_category_in_a_table_names_file_and_row(tmp_path):
    text = message(tmp_path, findings=annotated(IMAGES, ('a1lcc', HOSTILE[0], 'BI-RADS 4', BOX)))
    assert f'{VINDR_FILES["findings"]}, row 2: column finding_categories: found "__import__' in text
    assert 'column xmin' not in text  # the box of a row whose categories are unknown is no second fault


def test_several_categories_are_several_findings_of_one_lesion(tmp_path):
    both = "['Mass', 'Suspicious Calcification']"
    c = read(tmp_path, findings=annotated(IMAGES, ('a1lcc', both, 'BI-RADS 4', BOX), ('a1lcc', "['Mass']", 'BI-RADS 3', (1, 2, 3, 4.5))))
    first = c.findings[c.findings.lesion_id == 'a1lcc_1']
    assert first.kind.tolist() == ['mass', 'calcification']
    assert first[list(SIDES)].to_numpy().tolist() == [list(BOX)]*2
    assert first.birads.tolist() == ['4', '4']
    assert c.findings.lesion_id.tolist() == ['a1lcc_1', 'a1lcc_1', 'a1lcc_2']
    assert c.findings.finding_id.is_unique


def test_kinds(tmp_path):
    rows = [('a1lcc', str([word]), 'BI-RADS 3', BOX) for word in VINDR_KINDS]
    c = read(tmp_path, findings=annotated(IMAGES, *rows))
    assert c.findings.kind.tolist() == ['mass', 'calcification', 'asymmetry', 'asymmetry', 'asymmetry', 'distortion']
    assert c.findings.category.tolist() == list(VINDR_KINDS)[:6]


def test_skin_nipple_and_nodes_are_counted_and_kept_with_the_image(tmp_path, capsys):
    words = "['Skin Thickening', 'Mass', 'Nipple Retraction']"
    c = read(tmp_path, findings=annotated(IMAGES, ('a1lcc', words, None, BOX), ('b2rcc', "['Skin Thickening']", None, BOX)))
    assert '2 x Skin Thickening, 1 x Nipple Retraction' in capsys.readouterr().out
    assert c.findings.kind.tolist() == ['mass']
    assert c.findings.categories.tolist() == ['Skin Thickening; Mass; Nipple Retraction']
    assert c.images.set_index('image_id').other_findings.dropna().to_dict() == {
        'a1lcc': 'Nipple Retraction; Skin Thickening', 'b2rcc': 'Skin Thickening'}


# ---- what the columns become

def test_an_image(tmp_path):
    image = read(tmp_path, findings=annotated(IMAGES, MASS)).images.set_index('image_id').loc['a1rmlo']
    expected = dict(patient_id='a1', exam_id='a1', laterality='R', view='MLO', path='images/a1/a1rmlo.dicom', rows=ROWS, cols=COLS,
                    density='C', birads='4', provenance='VinDr-Mammo')
    assert {k: image[k] for k in expected} == expected
    assert image[['exam_date', 'pixel_spacing_mm', 'years_to_cancer', 'years_followed', 'other_findings']].isna().all()


def test_the_side_comes_from_its_own_column(tmp_path):
    swapped = IMAGES.assign(laterality=IMAGES.laterality.map(dict(L='R', R='L')))
    c = read(tmp_path, swapped)
    assert (c.images.laterality == swapped.laterality).all()
    assert c.images.laterality.value_counts().to_dict() == dict(L=6, R=6)


def test_birads_is_never_a_pathology(tmp_path):
    c = read(tmp_path, IMAGES.assign(breast_birads='BI-RADS 5'), annotated(IMAGES.assign(breast_birads='BI-RADS 5'),
                                                                         ('a1lcc', "['Mass']", 'BI-RADS 5', BOX)))
    assert c.findings.birads.tolist() == ['5']
    assert c.findings.pathology.isna().all()
    assert mn.breast_table(c).label.isna().all()


def test_a_finding_without_birads_has_none(tmp_path):
    c = read(tmp_path, findings=annotated(IMAGES, ('a1lcc', "['Mass']", None, BOX)))
    assert c.findings.birads.isna().all()


def test_no_finding_makes_none_and_the_table_may_have_no_finding_at_all(tmp_path):
    c = read(tmp_path)
    assert (len(c), len(c.findings)) == (12, 0)


def test_one_row_an_image_however_many_annotations(tmp_path):
    c = read(tmp_path, findings=annotated(IMAGES, MASS, MASS, ('a1lcc', "['Asymmetry']", 'BI-RADS 3', (0, 0, COLS, ROWS))))
    assert (len(c), len(c.findings)) == (12, 3)


# ---- faults

def test_all_faults_of_both_tables_at_once(tmp_path):
    breasts = changed(IMAGES, breast_density={0: 'DENSITY E'}, split={5: 'train'}, height={3: '12.5'}, image_id={4: '../../etc'})
    findings = changed(annotated(IMAGES, MASS), laterality={1: 'left'}, finding_birads={0: '4'}, xmin={0: 'wide'})
    text = message(tmp_path, breasts, findings)
    for where in (f'{VINDR_FILES["breasts"]}, row 2: column breast_density', f'{VINDR_FILES["breasts"]}, row 7: column split',
                  f'{VINDR_FILES["breasts"]}, row 5: column height', f'{VINDR_FILES["breasts"]}, row 6: column image_id',
                  f'{VINDR_FILES["findings"]}, row 3: column laterality', f'{VINDR_FILES["findings"]}, row 2: column finding_birads',
                  f'{VINDR_FILES["findings"]}, row 2: column xmin'):
        assert where in text


@pytest.mark.parametrize('column, value', [
    ('laterality', 'B'), ('laterality', None), ('view_position', 'L CC'), ('view_position', 'ML'), ('breast_birads', 'BI-RADS 0'),
    ('breast_birads', None), ('breast_density', 'C'), ('split', 'valid'), ('height', 0), ('height', 'inf'), ('width', -3),
    ('width', None), ('study_id', None), ('study_id', '..'), ('study_id', 'a/b'), ('image_id', 'a b'), ('image_id', '-x')])
def test_a_value_of_another_edition_is_refused(tmp_path, column, value):
    assert f'{VINDR_FILES["breasts"]}, row 3: column {column}' in message(tmp_path, changed(IMAGES, **{column: {1: value}}))


@pytest.mark.parametrize('cells, expected', [
    (dict(xmin=None), 'column xmin: found nothing, expected a number'),
    (dict(ymax='nan'), "column ymax: found 'nan', expected a number"),
    (dict(ymax='inf'), "column ymax: found 'inf', expected a number"),
    (dict(xmin=72), "column xmin: found xmin '72', xmax '72.0', expected xmin < xmax"),
    (dict(ymin=99), 'expected ymin < ymax'),
    (dict(xmin=-.5), "column xmin: found '-0.5', expected at least 0"),
    (dict(xmax=COLS+.01), f"column xmax: found xmax '140.01', width '{COLS}', expected xmax <= width"),
    (dict(ymax=ROWS+1), f"column ymax: found ymax '177', height '{ROWS}', expected ymax <= height"),
])
def test_a_bad_box_is_refused(tmp_path, cells, expected):
    bad = changed(annotated(IMAGES, MASS), **{k: {0: v} for k, v in cells.items()})
    text = message(tmp_path, findings=bad)
    assert f'{VINDR_FILES["findings"]}, row 2: ' in text
    assert expected in text
    assert 'faults' not in text  # nothing else is wrong


def test_a_box_where_nothing_was_found_is_refused(tmp_path):
    text = message(tmp_path, findings=changed(annotated(IMAGES), ymin={2: 7}))
    assert "row 4: column ymin: found '7', expected nothing in a row of No Finding" in text


def test_more_rows_with_the_same_fault_are_counted(tmp_path):
    assert 'row 3: column laterality: found \'left\', expected one of L, R; 2 more rows like it' in message(
        tmp_path, changed(IMAGES, laterality={1: 'left', 2: 'left', 7: 'right'}))


def test_boxes_beyond_the_image_can_be_clipped(tmp_path, capsys):
    beyond = annotated(IMAGES, ('a1lcc', "['Mass']", 'BI-RADS 4', (-3.5, 10, 50, ROWS+9)), MASS)
    c = read(tmp_path, findings=beyond, on_outside_box='clip')
    assert '1 boxes reach beyond' in capsys.readouterr().out
    assert c.findings[list(SIDES)].to_numpy().tolist() == [[0, 10, 50, ROWS], list(BOX)]


def test_a_box_outside_altogether_cannot_be_clipped(tmp_path):
    outside = annotated(IMAGES, ('a1lcc', "['Mass']", 'BI-RADS 4', (COLS+5, 10, COLS+50, 20)))
    assert 'expected xmin < xmax in the image' in message(tmp_path, findings=outside, on_outside_box='clip')


def test_duplicate_images(tmp_path):
    text = message(tmp_path, pd.concat([IMAGES, IMAGES[:1]]), annotated(IMAGES))
    assert f"{VINDR_FILES['breasts']}, row 14: column image_id: found 'a1lcc', expected every image once" in text


def test_an_image_of_two_studies(tmp_path):
    text = message(tmp_path, IMAGES, changed(annotated(IMAGES), study_id={0: 'b2'}))
    assert "row 2: column study_id: found study_id 'b2', image_id 'a1lcc', expected the study_id that" in text


def test_images_of_one_table_only(tmp_path):
    text = message(tmp_path, IMAGES[1:], annotated(IMAGES[:-1]))
    assert f"{VINDR_FILES['breasts']}, row 12: column image_id: found 'f6rmlo', expected an image of {VINDR_FILES['findings']}" in text
    assert f"{VINDR_FILES['findings']}, row 2: column image_id: found 'a1lcc', expected an image of {VINDR_FILES['breasts']}" in text


@pytest.mark.parametrize('column, value', [('laterality', 'R'), ('view_position', 'MLO'), ('breast_birads', 'BI-RADS 2'), ('height', 99),
                                           ('breast_density', 'DENSITY A'), ('split', 'test')])
def test_tables_that_contradict_each_other(tmp_path, column, value):
    text = message(tmp_path, findings=changed(annotated(IMAGES), **{column: {0: value}}))
    assert f'{VINDR_FILES["findings"]}, row 2: column {column}: ' in text
    assert f'expected the {column} that {VINDR_FILES["breasts"]} has for the image' in text


def test_an_image_with_and_without_a_finding(tmp_path):
    both = pd.concat([annotated(IMAGES, MASS), annotated(IMAGES)[:1]])
    assert 'row 14: column finding_categories' in message(tmp_path, findings=both)


def test_a_study_in_two_splits(tmp_path):
    text = message(tmp_path, changed(IMAGES, split={2: 'test'}))
    assert "row 4: column split: found split 'test', study_id 'a1', expected one split a study" in text


def test_a_missing_table_and_a_missing_column(tmp_path):
    with pytest.raises(InputError, match='a table of VinDr-Mammo'):
        vindr_mammo(tmp_path)
    with pytest.raises(InputError, match='no laterality, split'):
        vindr_mammo(put(tmp_path, IMAGES.drop(columns=['laterality', 'split']), annotated(IMAGES)))


@pytest.mark.parametrize('content', [b'', b'\x89PNG\r\n\x1a\n\x00\xff', b'a,b\n1,2,3\n1\n"', 'study_id\nÄ\n'.encode('utf-16')])
def test_what_is_no_table(tmp_path, content):
    put(tmp_path, IMAGES)
    (tmp_path/VINDR_FILES['findings']).write_bytes(content)
    with pytest.raises(InputError, match=VINDR_FILES['findings']):
        vindr_mammo(tmp_path)


def test_a_byte_order_mark_and_other_columns_do_no_harm(tmp_path):
    put(tmp_path, IMAGES.assign(more=1))
    table = tmp_path/VINDR_FILES['breasts']
    table.write_bytes(b'\xef\xbb\xbf' + table.read_bytes())
    assert len(vindr_mammo(tmp_path, check=False)) == 12


def test_a_wrong_argument_is_refused_before_files_are_looked_for(tmp_path):
    with pytest.raises(InputError, match='valid'):
        vindr_mammo(tmp_path, valid=1)
    with pytest.raises(InputError, match='on_outside_box'):
        vindr_mammo(tmp_path, on_outside_box='drop')


# ---- splits

def many(n=60):
    "`n` training studies of three BI-RADS assessments, and 20 test studies"
    train = [study(f't{i:03}', birads=(1, 1, 2, 2, 5)[i % 5]) for i in range(n)]
    return pd.concat(train + [study(f'x{i:03}', 'test') for i in range(20)], ignore_index=True)


def test_the_official_test_studies_are_the_test_patients(tmp_path):
    images = many()
    c = read(tmp_path, images)
    official = images.drop_duplicates('study_id').set_index('study_id').split
    split = c.images.drop_duplicates('patient_id').set_index('patient_id').split
    assert (split == 'test').equals(official == 'test')
    assert split.value_counts().to_dict() == dict(train=48, valid=12, test=20)
    assert leaking_patients(c).empty


def test_validation_has_its_share_of_every_assessment(tmp_path):
    c = read(tmp_path, many())
    worst = c.images.groupby('patient_id').birads.max()
    valid = c.images[c.images.split == 'valid'].patient_id.unique()
    shares = worst[valid].value_counts().to_dict()
    assert {k: abs(n - expected) <= 1 for (k, n), expected in zip(sorted(shares.items()), (4.8, 4.8, 2.4))} == dict.fromkeys('125', True)


def test_the_split_depends_on_tables_and_seed_alone(tmp_path):
    images = many()
    first = read(tmp_path, images).images.set_index('image_id').split
    assert read(tmp_path, images).images.set_index('image_id').split.equals(first)
    shuffled = images.sample(frac=1, random_state=3)
    again = read(tmp_path, shuffled).images.set_index('image_id').split
    assert again[first.index].equals(first)
    assert not read(tmp_path, images, seed=1).images.set_index('image_id').split.equals(first)
    for name in ('t001', 't040', 'x003'):
        (tmp_path/'images'/name).mkdir(parents=True)
        (tmp_path/'images'/name/f'{name}lcc.dicom').touch()
    some = vindr_mammo(tmp_path).images.set_index('image_id').split
    assert len(some) == 3
    assert some.equals(first[some.index])


def test_without_validation(tmp_path):
    assert set(read(tmp_path, valid=0).images.split) == {'train', 'test'}
    assert set(read(tmp_path, study('f6', 'test')).images.split) == {'test'}


# ---- metadata

def headers(**columns):
    return pd.DataFrame({'SOP Instance UID': IMAGES.image_id} | columns)


def test_spacing_and_machine(tmp_path):
    put(tmp_path, IMAGES)
    spacing = ['[0.07, 0.07]']*11 + [None]
    headers(**{'Imager Pixel Spacing': spacing, 'Manufacturer': ' SIEMENS '}).sample(frac=1, random_state=0).to_csv(
        tmp_path/'metadata.csv', index=False)
    images = vindr_mammo(tmp_path, check=False).images
    assert images.pixel_spacing_mm.tolist()[:11] == [.07]*11
    assert np.isnan(images.pixel_spacing_mm[11])
    assert set(images.manufacturer) == {'SIEMENS'}
    assert images.model.isna().all()
    assert vindr_mammo(tmp_path, check=False, metadata=False).images.pixel_spacing_mm.isna().all()


def test_a_table_of_headers_without_the_columns_tells_nothing(tmp_path):
    put(tmp_path, IMAGES)
    pd.DataFrame(dict(a=[1])).to_csv(tmp_path/'metadata.csv', index=False)
    assert vindr_mammo(tmp_path, check=False).images.pixel_spacing_mm.isna().all()


@pytest.mark.parametrize('text, mm', [('0.1', .1), ('[0.1,0.1]', .1), ("('0.1', '0.1')", .1), ('0.1\\0.1', .1), ('.1', .1)])
def test_spellings_of_a_spacing(tmp_path, text, mm):
    headers(**{'Imager Pixel Spacing': text}).to_csv(tmp_path/'metadata.csv', index=False)
    assert set(read_vindr_metadata(tmp_path/'metadata.csv').pixel_spacing_mm) == {mm}


@pytest.mark.parametrize('text', ['[0.1, 0.2]', '0', 'nan', '-0.1', '[0.1, 0.1, 0.1]', '__import__("os")', '1'*100_000 + 'x'])
def test_what_is_no_spacing(tmp_path, text):
    headers(**{'Imager Pixel Spacing': ['0.1']*3 + [text]*9}).to_csv(tmp_path/'metadata.csv', index=False)
    with pytest.raises(InputError, match='metadata.csv, row 5: column Imager Pixel Spacing.*metadata=False; 8 more rows') as e:
        read_vindr_metadata(tmp_path/'metadata.csv')
    assert len(str(e.value)) < 500


def test_an_image_with_two_headers(tmp_path):
    t = pd.concat([headers(Manufacturer='A'), headers(Manufacturer='A')[:2], headers(Manufacturer='B')[3:4]])
    t.to_csv(tmp_path/'metadata.csv', index=False)
    with pytest.raises(InputError, match="row 16: column SOP Instance UID: found SOP Instance UID 'a1rmlo'.*Manufacturer 'B'"):
        read_vindr_metadata(tmp_path/'metadata.csv')
    t[:14].to_csv(tmp_path/'metadata.csv', index=False)
    assert len(read_vindr_metadata(tmp_path/'metadata.csv')) == 12


# ---- files

def pixels(side, box=None):
    "Stored values [H,W], 12 bits: a half breast at its chest wall, with a bright box"
    y, x = np.mgrid[:ROWS, :COLS] + .5
    depth = np.clip(1 - np.hypot(x/110, (y-88)/80), 0, 1)
    light = .6*depth**.5
    if side == 'R':
        light = light[:, ::-1].copy()
    if box is not None:
        x0, y0, x1, y1 = np.rint(box).astype(int)
        light[y0:y1, x0:x1] = 1
    return np.rint(4095*light).astype(np.uint16)


def write_images(folder, images, boxes, photometric):
    for row in images.itertuples():
        path = folder/'images'/row.study_id/f'{row.image_id}.dicom'
        path.parent.mkdir(parents=True, exist_ok=True)
        values = pixels(row.laterality, boxes.get(row.image_id))
        if photometric == 'MONOCHROME1':
            values = 4095 - values
        write_mammogram(path, values, row.laterality, row.view_position, patient_id=row.study_id, exam_id=row.study_id,
                        pixel_spacing_mm=.5, photometric=photometric, window=(2048, 4096))


def test_files_of_both_photometric_interpretations_through_prepare(tmp_path):
    images = pd.concat([study('a1'), study('f6', 'test')], ignore_index=True)
    boxes = {'a1lcc': BOX, 'f6rmlo': (70., 60., 100., 90.)}
    both = "['Suspicious Calcification', 'Mass']"
    rows = [(i, both, 'BI-RADS 4', b) for i, b in boxes.items()]
    put(tmp_path, images, annotated(images, *rows))
    write_images(tmp_path, images[images.study_id == 'a1'], boxes, 'MONOCHROME1')
    write_images(tmp_path, images[images.study_id == 'f6'], boxes, 'MONOCHROME2')
    prepared = mn.prepare(mn.vindr_mammo(tmp_path), tmp_path/'cache', size=(88, 70), workers=1, progress=False)
    assert len(prepared.failures) == 0
    assert (len(prepared.cohort), len(prepared.cohort.findings)) == (8, 4)
    for image_id in boxes:
        image = prepared.load(image_id).image.squeeze()
        first, second = prepared.boxes(image_id)
        assert np.array_equal(first, second)  # two findings, one box
        x0, y0, x1, y1 = np.rint(first).astype(int)
        inside = image[y0+1:y1-1, x0+1:x1-1]
        assert inside.min() > .9  # bright inside the box, whichever way the file stores it
    left, right = prepared.load('a1rcc').image, prepared.load('f6rcc').image
    assert np.abs(left - right).max() < .02  # MONOCHROME1 and MONOCHROME2 give the same image


def test_the_file_of_an_image_is_found_and_is_bright_on_dark(tmp_path):
    images = study('a1')
    put(tmp_path, images)
    write_images(tmp_path, images, {}, 'MONOCHROME1')
    c = vindr_mammo(tmp_path)
    m = read_mammogram(c.file('a1lcc'))
    assert (m.pixels.shape, m.pixels[88, 5] > m.pixels[2, -2]) == ((ROWS, COLS), True)


def test_images_without_a_file_are_counted(tmp_path, capsys):
    put(tmp_path, IMAGES, annotated(IMAGES, MASS))
    write_images(tmp_path, IMAGES[1:5], {}, 'MONOCHROME2')
    c = vindr_mammo(tmp_path)
    assert '8 of 12 images' in capsys.readouterr().out
    assert (len(c), len(c.findings)) == (4, 0)


def test_tables_in_another_folder(tmp_path):
    (tmp_path/'tables').mkdir()
    put(tmp_path/'tables', IMAGES)
    write_images(tmp_path, IMAGES, {}, 'MONOCHROME2')
    assert len(vindr_mammo(tmp_path, tmp_path/'tables')) == 12


def test_no_file_at_all_is_an_error(tmp_path):
    put(tmp_path, IMAGES)
    with pytest.raises(InputError, match='none of the 12 files.*images/<study_id>/<image_id>.dicom'):
        vindr_mammo(tmp_path)


def test_an_image_of_another_size_than_its_table_is_refused(tmp_path):
    images = study('a1').assign(height=ROWS*2)
    put(tmp_path, images)
    write_images(tmp_path, images, {}, 'MONOCHROME2')
    with pytest.raises(InputError, match='size|rows'):
        mn.prepare(vindr_mammo(tmp_path), tmp_path/'cache', size=(88, 70), workers=1, progress=False)


def test_it_round_trips(tmp_path):
    c = read(tmp_path, findings=annotated(IMAGES, MASS, ('b2rcc', "['Skin Thickening']", None, BOX)))
    back = mn.Cohort.read(c.write(tmp_path/'stored'))
    pd.testing.assert_frame_equal(back.images, c.images)
    pd.testing.assert_frame_equal(back.findings, c.findings)


# ---- the card

def test_the_card_names_the_columns_that_are_read():
    columns = pd.read_csv(ROOT/'data_manifests'/'vindr_mammo'/'columns.csv')
    named = set(columns.column[columns.table == 'both']) - {'series_id'}
    breasts, findings = (set(t) - {'series_id'} for t in (IMAGES, annotated(IMAGES)))
    assert named == breasts
    assert named | set(columns.column[columns.table == 'findings']) == findings


def test_the_counts_of_the_card_fit_each_other():
    t = pd.read_csv(ROOT/'data_manifests'/'vindr_mammo'/'counts.csv')
    n = t.set_index(['of', 'what']).number
    for words in (('training', 'test'), ('CC', 'MLO'), [f'DENSITY {k}' for k in 'ABCD'], [f'BI-RADS {k}' for k in '12345']):
        assert sum(n['breasts', f'rows with {w}'] for w in words) == n['breasts', 'rows']
    assert n['findings', 'rows with No Finding'] + n['findings', 'rows with a box'] == n['findings', 'rows']
    assert n['breasts', 'rows'] == 4*n['breasts', 'studies']


# ---- LesionLDM

def test_a_row_of_two_categories_is_one_lesion_with_both(tmp_path):
    "82 rows of the published table name a calcification and a mass: one patch, with both asked for"
    findings = annotated(IMAGES, ('a1lcc', "['Suspicious Calcification', 'Mass']", 'BI-RADS 4', BOX), ('f6rmlo', "['Mass']", 'BI-RADS 3', BOX))
    rows = lesion_patches(read(tmp_path, findings=findings))
    asked = {row.image_id: encode_attributes(row._asdict())['category'] for row in rows.itertuples(index=False)}
    assert len(rows) == 2
    assert {k for k, value in zip(KINDS, asked['a1lcc']) if value} == {'mass', 'calcification'}
    assert {k for k, value in zip(KINDS, asked['f6rmlo']) if value} == {'mass'}



TINY = dict(
    autoencoder=dict(epochs=1, model_args=dict(channels=(4, 8), blocks=1, attention=False)),
    diffusion=dict(epochs=1, ema=.9, model_args=dict(
        denoiser='transformer', denoiser_args=dict(width=16, depth=1, heads=2), dim=16, steps=2,
        vit=dict(dim=16, depth=1, heads=2, patch=8))))


def tutorial_call():
    "The code of the tutorial on drawing lesions that is not run there"
    cells = json.loads((ROOT/'nbs/tutorials/25_drawing_a_lesion.ipynb').read_text(encoding='utf-8'))['cells']
    text = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown')
    block, = [b for b in re.findall(r'```python\n(.*?)```', text, re.DOTALL) if 'vindr_mammo' in b]
    return block


def test_the_call_of_the_tutorial_on_drawing_lesions(tmp_path, monkeypatch):
    "It runs as it is written, with smaller images and networks, and the drawings keep what lies outside the box"
    images = pd.concat([study(f't{i}', birads=(1, 4)[i % 2]) for i in range(12)] + [study('x0', 'test', 4), study('x1', 'test', 4)],
                       ignore_index=True)
    marked = images[images.breast_birads.str.endswith('4') & (images.view_position == 'CC')].image_id
    folder = tmp_path/'vindr-mammo'
    folder.mkdir()
    put(folder, images, annotated(images, *[(i, "['Mass']", 'BI-RADS 4', BOX) for i in marked]))
    write_images(folder, images, dict.fromkeys(marked, BOX), 'MONOCHROME2')
    code = tutorial_call()
    for old, new in (('size=(1024, 768)', 'size=(88, 70)'), ('size=224', 'size=16'), ('bs=16', 'bs=4')):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    train = mn.train_lesion_ldm
    monkeypatch.setattr(mn, 'train_lesion_ldm', lambda *args, **options: train(*args, settings=TINY, **options), raising=False)
    found = dict(mn=mn)
    exec(code, found)
    rows = lesion_patches(found['cohort'])
    assert len(rows) == len(marked) and set(rows.kinds) == {'mass'} and set(rows.birads) == {'4'}
    assert sorted(p.name for p in (tmp_path/'lesions').iterdir()) == ['model', 'model_index.json', 'scheduler']
    assert len(list((tmp_path/'drawn').iterdir())) >= 1
