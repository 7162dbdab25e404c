"""Tables that contradict their files: other sizes, other patients, other spellings, one file twice. Nothing is guessed."""
import shutil
import time
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from mammo_nb.cli.prepare import mammo_prepare
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.cohort.datasets.folder import dicom_folder
from mammo_nb.cohort.leaks import assign_split, check_split
from mammo_nb.core.errors import InputError
from mammo_nb.dicom.write import write_mammogram
from mammo_nb.preparation.annotations import read_lesion_mask, read_nipple
from mammo_nb.preparation.prepared_cohort import prepare_cohort

SIZE = (240, 160)
SMALL = dict(size=(64, 48), workers=1, progress=False)
BOX = dict(xmin=40., ymin=100., xmax=60., ymax=120.)


def breast(seed=0, size=SIZE):
    "A drawn left breast [H,W] uint8 with a lesion in `BOX`"
    rows, cols = size
    y, x = np.mgrid[:rows, :cols] + .5
    depth = np.clip(1 - (x/(.6*cols))**2 - ((y-.5*rows)/(.4*rows))**2, 0, None)**.4
    lesion = np.hypot(y-110*rows/240, x-50*cols/160) < 10*rows/240
    grain = np.random.default_rng(seed).integers(0, 20, size)
    return (150*depth + (depth > 0)*grain + 60*lesion).astype(np.uint8)


@pytest.fixture
def tables(tmp_path):
    "Images and findings tables of two views as PNG files of 240 x 160 pixels, with size and a box"
    rows = []
    for k, view in enumerate(('CC', 'MLO')):
        Image.fromarray(breast(k)).save(tmp_path/f'{view}.png')
        rows.append(dict(image_id=view, patient_id='p', exam_id='e', laterality='L', view=view, path=f'{view}.png',
                         rows=240., cols=160., nipple_row=120., nipple_col=90., pixel_spacing_mm=.5))
    findings = [dict(finding_id=f'f{v}', image_id=v, pathology='malignant') | BOX for v in ('CC', 'MLO')]
    return pd.DataFrame(rows), pd.DataFrame(findings)


def halved(images, findings, factor=.5):
    "Both tables as of images of half the size"
    places = ['rows', 'cols', 'nipple_row', 'nipple_col']
    images = images.assign(**images[places]*factor, pixel_spacing_mm=images.pixel_spacing_mm/factor)
    return images, findings.assign(**findings[list(BOX)]*factor)


def entries(folder):
    return list(folder.glob('entries/*/*'))


# ---- a table of another resolution

def test_a_table_of_another_resolution_is_refused_before_anything_is_prepared(tables, tmp_path):
    with pytest.raises(InputError) as e:
        prepare_cohort(Cohort(*halved(*tables), tmp_path), tmp_path/'c', **SMALL)
    message = str(e.value)
    assert "'CC'" in message and 'MLO' in message  # all images at once
    assert 'found 240 x 160, expected 120 x 80 as in the images table' in message
    assert "on_size_mismatch='scale'" in message
    assert entries(tmp_path/'c') == []


def test_dicom_files_and_cached_images_are_compared_too(tmp_path):
    write_mammogram(tmp_path/'a.dcm', breast().astype(np.uint16), 'L', 'CC')
    row = dict(image_id='a', patient_id='p', exam_id='e', laterality='L', view='CC', path='a.dcm')
    wrong = Cohort(pd.DataFrame([row | dict(rows=480., cols=320.)]), root=tmp_path)
    with pytest.raises(InputError, match='found 240 x 160, expected 480 x 320'):
        prepare_cohort(wrong, tmp_path/'c', **SMALL)
    time.sleep(2.1)  # else the cache does not trust the time of the file, and prepares it again
    for _ in range(2):
        assert len(prepare_cohort(Cohort(pd.DataFrame([row]), root=tmp_path), tmp_path/'c', **SMALL)) == 1
    with pytest.raises(InputError, match='found 240 x 160, expected 480 x 320'):
        prepare_cohort(wrong, tmp_path/'c', **SMALL)


def test_one_number_of_a_size_is_compared_alone(tables, tmp_path):
    images, _ = tables
    cohort = Cohort(images.assign(rows=np.nan, cols=100.), root=tmp_path)
    with pytest.raises(InputError, match='expected nan x 100 as in the images table'):
        prepare_cohort(cohort, tmp_path/'c', **SMALL)


def test_tables_of_another_resolution_are_scaled_on_request(tables, tmp_path):
    right = prepare_cohort(Cohort(*tables, tmp_path), tmp_path/'c', **SMALL)
    scaled = prepare_cohort(Cohort(*halved(*tables), tmp_path), tmp_path/'c', on_size_mismatch='scale', **SMALL)
    for view in ('CC', 'MLO'):
        assert np.allclose(scaled.boxes(view), right.boxes(view))
        assert read_nipple(scaled, view) == pytest.approx(read_nipple(right, view))
        assert scaled.load(view).spacing_mm == pytest.approx(right.load(view).spacing_mm)
    pd.testing.assert_frame_equal(scaled.cohort.images, right.cohort.images)
    pd.testing.assert_frame_equal(scaled.cohort.findings, right.cohort.findings)


@pytest.mark.parametrize('table, file', [((150, 100), (301, 201)), ((301, 201), (150, 100)), ((2294, 1914), (239, 199))])
def test_sizes_that_were_rounded_scale(tmp_path, table, file):
    Image.fromarray(breast(size=file)).save(tmp_path/'a.png')
    row = dict(image_id='a', patient_id='p', exam_id='e', laterality='L', view='CC', path='a.png', rows=float(table[0]), cols=float(table[1]))
    whole = dict(finding_id='f', image_id='a', xmin=0., ymin=0., xmax=row['cols'], ymax=row['rows'])
    cohort = Cohort(pd.DataFrame([row]), pd.DataFrame([whole]), tmp_path)
    prepared = prepare_cohort(cohort, tmp_path/'c', on_size_mismatch='scale', **SMALL)
    assert prepared.cohort.findings[['ymax', 'xmax']].values.tolist() == [[*map(float, file)]]


@pytest.mark.parametrize('table', [(160, 240), (240, 150), (123, 80), (np.nan, 80)], ids=str)
def test_sizes_that_one_factor_does_not_explain_are_never_scaled(tables, tmp_path, table):
    images, _ = tables
    images = images.assign(rows=float(table[0]), cols=float(table[1]), nipple_row=np.nan, nipple_col=np.nan)
    with pytest.raises(InputError, match='up to one factor for rows and columns'):
        prepare_cohort(Cohort(images, root=tmp_path), tmp_path/'c', on_size_mismatch='scale', **SMALL)


def test_boxes_and_nipples_outside_an_image_are_refused_where_the_table_has_no_size(tables, tmp_path):
    images, findings = tables
    images = images.assign(rows=np.nan, cols=np.nan, nipple_row=[np.nan, 300.], nipple_col=[np.nan, 50.])
    findings.loc[0, ['xmin', 'xmax']] = 150., 170.
    with pytest.raises(InputError) as e:
        prepare_cohort(Cohort(images, findings, tmp_path), tmp_path/'c', **SMALL)
    assert 'found xmax 170, ymax 120, expected a place inside the stored image of 240 x 160' in str(e.value)
    assert "row 1 (image_id 'MLO')" in str(e.value)
    assert entries(tmp_path/'c') == []


def test_a_file_exchanged_for_one_of_another_size_is_not_loaded(tables, tmp_path):
    images, findings = tables
    with_size = prepare_cohort(Cohort(images, findings, tmp_path), tmp_path/'c', **SMALL)
    without = images.assign(rows=np.nan, cols=np.nan, nipple_row=np.nan, nipple_col=np.nan)
    without = prepare_cohort(Cohort(without, findings, tmp_path), tmp_path/'c', **SMALL)
    Image.fromarray(breast(size=(90, 60))).save(tmp_path/'CC.png')
    for prepared in (with_size, without):
        with pytest.raises(InputError, match='CC.png: size of the stored image: found 90 x 60'):
            prepared.boxes('CC')


def test_a_broken_file_stays_a_failure(tables, tmp_path):
    (tmp_path/'CC.png').write_bytes(b'no image')
    prepared = prepare_cohort(Cohort(*tables, tmp_path), tmp_path/'c', **SMALL)
    assert prepared.failures.image_id.tolist() == ['CC']
    assert prepared.cohort.images.image_id.tolist() == ['MLO']


def test_a_wrong_rule_is_named(tables, tmp_path):
    with pytest.raises(InputError, match='on_size_mismatch'):
        prepare_cohort(Cohort(*tables, tmp_path), tmp_path/'c', on_size_mismatch='guess', **SMALL)


def test_masks_have_the_size_of_the_image_or_of_the_scaled_table(tables, tmp_path):
    y, x = np.mgrid[:240, :160] + .5
    disc = np.hypot(y-110, x-50) < 20
    Image.fromarray(disc).save(tmp_path/'mask.png')
    Image.fromarray(disc[::2, ::2]).save(tmp_path/'half.png')
    images, findings = tables
    right = Cohort(images, findings.assign(mask_path='mask.png'), tmp_path)
    prepared = prepare_cohort(right, tmp_path/'c', **SMALL)
    images, findings = halved(images, findings)
    for name in ('mask.png', 'half.png'):
        half = Cohort(images, findings.assign(mask_path=name), tmp_path)
        scaled = prepare_cohort(half, tmp_path/'c', on_size_mismatch='scale', **SMALL)
        a, b = read_lesion_mask(prepared, 'CC'), read_lesion_mask(scaled, 'CC')
        assert (a & b).sum()/(a | b).sum() > (.99 if name == 'mask.png' else .9)
    prepared.cohort.findings['mask_path'] = 'half.png'
    with pytest.raises(InputError, match=r'half.png: size of the mask: found \(120, 80\)'):
        read_lesion_mask(prepared, 'CC')


def test_an_exam_is_shown_with_boxes_that_fit(tables, tmp_path):
    def box_of(cohort, **kwargs):
        axs = cohort.show_exam('e', read=lambda path: np.asarray(Image.open(path)), **kwargs)
        return axs[0, 1].patches[0].get_bbox().extents
    half = Cohort(*halved(*tables), tmp_path)
    with pytest.raises(InputError, match='found 240 x 160, expected 120 x 80'):
        box_of(half)
    assert np.allclose(box_of(half, on_size_mismatch='scale'), box_of(Cohort(*tables, tmp_path)))
    images, findings = tables
    unknown = Cohort(images.assign(rows=np.nan, cols=np.nan), findings.assign(ymax=300.), tmp_path)
    with pytest.raises(InputError, match='a place inside the stored image of 240 x 160'):
        box_of(unknown)


def test_the_command_refuses_and_scales(tables, tmp_path, capsys):
    folder = str(Cohort(*halved(*tables), tmp_path).write(tmp_path))
    options = dict(size='64x48', workers=1, quiet=True)
    assert mammo_prepare(folder, str(tmp_path/'c'), **options) == 2
    assert 'expected 120 x 80 as in the images table' in capsys.readouterr().err
    assert mammo_prepare(folder, str(tmp_path/'c'), on_size_mismatch='scale', **options) == 0


# ---- folders against the tags of their files

def put(path, patient='MRN 4711', day='2024-05-02', side='L', view='CC', **extra):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.arange(64*48, dtype=np.uint16).reshape(64, 48)
    return write_mammogram(path, pixels, side, view, patient_id=patient, exam_date=day, extra=extra or None)


def refused(folder, **options):
    "The message about a folder, without any identity in it"
    with pytest.raises(InputError) as e:
        dicom_folder(folder, 'folder', **options)
    message = str(e.value)
    for hers in ('4711', '4712', 'MRN', '2024', '2025'):
        assert hers not in message
    return message


def test_two_women_in_one_folder_are_refused(tmp_path):
    put(tmp_path/'a/1.dcm')
    put(tmp_path/'a/2.dcm', 'MRN 4712', view='MLO')
    message = refused(tmp_path)
    assert 'folder a: PatientID: found 2 patients in one folder: a/1.dcm, a/2.dcm' in message
    assert "on_identity_mismatch='folder' or 'tags'" in message


def test_one_woman_in_two_folders_is_refused(tmp_path):
    put(tmp_path/'a/1.dcm')
    put(tmp_path/'b/1.dcm', side='R')
    put(tmp_path/'c/1.dcm', 'MRN 4712')
    assert 'found one patient in 2 folders: a, b, expected' in refused(tmp_path)


def test_all_contradictions_are_named_at_once(tmp_path):
    put(tmp_path/'a/1.dcm')
    put(tmp_path/'a/2.dcm', 'MRN 4712', view='MLO')
    put(tmp_path/'b/1.dcm', side='R')
    put(tmp_path/'c/1.dcm', 'MRN 5')
    put(tmp_path/'c/2.dcm', 'MRN 5', '2025-05-02', view='MLO')
    message = refused(tmp_path)
    assert message.startswith('3 faults')
    assert 'folder c: StudyDate: found days apart in one folder: c/1.dcm and c/2.dcm' in message


def test_a_study_past_midnight_is_one_exam(tmp_path):
    put(tmp_path/'a/1.dcm')
    put(tmp_path/'a/2.dcm', day='2024-05-03', view='MLO')
    assert len(dicom_folder(tmp_path, 'folder')[0].exams()) == 1


def test_spellings_of_a_number_are_one_patient(tmp_path):
    put(tmp_path/'a/1.dcm', 'MRN 4711')
    put(tmp_path/'a/2.dcm', 'mrn04711', view='MLO')
    assert len(dicom_folder(tmp_path, 'folder')[0]) == 2
    put(tmp_path/'b/1.dcm', 'MRN4711')
    assert 'found one patient in 2 folders: a, b' in refused(tmp_path)


@pytest.mark.parametrize('word', ['', 'ANONYMOUS', 'anonymized', 'Removed', '0000', 'XXXX', 'n/a'])
def test_files_without_an_identity_stay_usable(tmp_path, word):
    for name in ('a/1', 'a/2', 'b/1', 'b/2'):
        put(tmp_path/f'{name}.dcm', view='CC' if name[-1] == '1' else 'MLO', PatientID=word)
    assert dicom_folder(tmp_path, 'folder')[0].patients == ['a', 'b']


def test_an_identity_for_each_image_names_its_patient_by_what_comes_before_side_and_view(tmp_path):
    for patient in ('P_00173', 'P_00820'):
        for side, word in (('L', 'LEFT'), ('R', 'RIGHT')):
            for view in ('CC', 'MLO'):
                put(tmp_path/patient/f'{side}{view}.dcm', f'Mass-Test_{patient}_{word}_{view}', side=side, view=view)
    assert dicom_folder(tmp_path, 'folder')[0].patients == ['P_00173', 'P_00820']
    put(tmp_path/'again/1.dcm', 'Mass-Test_P_00173_LEFT_CC')
    assert 'one patient in 2 folders: P_00173, again' in refused(tmp_path)


def test_one_number_in_all_files_may_be_one_woman_or_an_anonymised_set(tmp_path):
    for name in ('a', 'b', 'c'):
        put(tmp_path/name/'1.dcm')
    assert 'one patient in 3 folders' in refused(tmp_path)
    assert dicom_folder(tmp_path, 'folder', on_identity_mismatch='folder')[0].patients == ['a', 'b', 'c']
    by_tags = dicom_folder(tmp_path, 'folder', on_identity_mismatch='tags')[0]
    assert (len(by_tags.patients), by_tags.images.exam_id.nunique()) == (1, 3)


def test_by_tags_two_women_in_one_folder_are_two_patients(tmp_path):
    put(tmp_path/'a/1.dcm')
    put(tmp_path/'a/2.dcm', 'MRN 4712')
    put(tmp_path/'b/1.dcm')
    put(tmp_path/'b/2.dcm', PatientID='', view='MLO')  # the other patient of its folder is known
    images = dicom_folder(tmp_path, 'folder', on_identity_mismatch='tags', pseudonyms=False)[0].images
    assert images.patient_id.tolist() == ['MRN 4711', 'MRN 4712', 'MRN 4711', 'MRN 4711']
    assert images.exam_id.tolist() == ['MRN 4711-a', 'MRN 4712-a', 'MRN 4711-b', 'MRN 4711-b']
    put(tmp_path/'a/3.dcm', PatientID='', view='MLO')
    with pytest.raises(InputError, match='empty in a/3.dcm'):
        dicom_folder(tmp_path, 'folder', on_identity_mismatch='tags')


def test_by_tags_folders_without_an_identity_are_patients(tmp_path):
    put(tmp_path/'a/1.dcm')
    put(tmp_path/'b/1.dcm', PatientID='')
    patients = dicom_folder(tmp_path, 'folder', on_identity_mismatch='tags', pseudonyms=False)[0].patients
    assert patients == ['MRN 4711', 'b']


def test_the_command_has_the_option(tmp_path, capsys):
    for k, name in enumerate('ab'):
        pixels = np.repeat(np.repeat(breast(k), 2, 0), 2, 1).astype(np.uint16)
        (tmp_path/'d'/name).mkdir(parents=True)
        write_mammogram(tmp_path/'d'/name/'1.dcm', pixels, 'L', 'CC', patient_id='MRN 4711')
    options = dict(size='64x48', workers=1, quiet=True, group='folder')
    assert mammo_prepare(str(tmp_path/'d'), str(tmp_path/'c'), **options) == 2
    error = capsys.readouterr().err
    assert 'one patient in 2 folders: a, b' in error and '4711' not in error
    assert mammo_prepare(str(tmp_path/'d'), str(tmp_path/'c'), on_identity_mismatch='folder', **options) == 0


def test_days_apart_are_refused_by_tags_too_without_a_number(tmp_path):
    put(tmp_path/'a/1.dcm')
    put(tmp_path/'a/2.dcm', day='2025-05-02')
    assert 'days apart in one folder: a/1.dcm and a/2.dcm' in refused(tmp_path, on_identity_mismatch='tags')
    assert len(dicom_folder(tmp_path, 'folder', on_identity_mismatch='folder')[0]) == 2


def test_names_are_compared_where_numbers_are_empty_and_never_quoted(tmp_path):
    put(tmp_path/'a/1.dcm', PatientID='', PatientName='Doe^Jane', PatientBirthDate='19600102')
    put(tmp_path/'a/2.dcm', PatientID='', PatientName='Roe^Mary', PatientBirthDate='19600102', view='MLO')
    put(tmp_path/'b/1.dcm', PatientID='', PatientName='DOE^JANE', PatientBirthDate='19600102')
    put(tmp_path/'c/1.dcm', PatientID='', PatientName='Doe^Jane', PatientBirthDate='19700102')  # another of this name
    message = refused(tmp_path)
    assert '2 patients in one folder: a/1.dcm, a/2.dcm' in message and 'one patient in 2 folders: a, b,' in message
    images = dicom_folder(tmp_path, 'folder', on_identity_mismatch='tags', pseudonyms=False)[0].images
    assert images.patient_id.nunique() == 3
    for hers in ('Doe', 'Roe', 'Jane', 'Mary', '1960'):
        assert hers.lower() not in (message + images.to_csv()).lower()


def test_files_of_nobody_are_patients_of_their_folders_by_tags(tmp_path):
    for name in 'ab':
        put(tmp_path/name/'1.dcm', PatientID='ANONYMOUS', PatientName='')
    assert dicom_folder(tmp_path, 'folder', on_identity_mismatch='tags')[0].patients == ['a', 'b']


JANE = dict(PatientName='Doe^Jane', PatientBirthDate='19600102')
MARY = dict(PatientName='Roe^Mary', PatientBirthDate='19610102')


@pytest.mark.parametrize('number', ['1', 'TEST', 'DEMO', '-', '?', '000', '', 'ANON', 'anon-anon'])
def test_two_women_with_one_dummy_number_are_refused(tmp_path, number):
    put(tmp_path/'a/1.dcm', PatientID=number, **JANE)
    put(tmp_path/'a/2.dcm', PatientID=number, view='MLO', **MARY)
    message = refused(tmp_path)
    assert 'a/1.dcm, a/2.dcm' in message
    if number in ('1', 'TEST', 'DEMO'):  # a number that tells nobody apart is not to be believed either
        for options in (dict(group='folder', on_identity_mismatch='tags'), dict(group='tags')):
            with pytest.raises(InputError, match='one number for 2 names or birth dates: a/1.dcm, a/2.dcm'):
                dicom_folder(tmp_path, **options)
        assert len(dicom_folder(tmp_path, on_identity_mismatch='tags')[0].patients) == 1
    else:
        assert len(dicom_folder(tmp_path, 'folder', on_identity_mismatch='tags')[0].patients) == 2
    assert len(dicom_folder(tmp_path, 'folder', on_identity_mismatch='folder')[0].patients) == 1


def test_a_number_that_is_missing_in_one_folder_is_that_of_the_same_person(tmp_path):
    put(tmp_path/'a/1.dcm', **JANE)
    put(tmp_path/'b/1.dcm', PatientID='', view='MLO', **JANE)
    assert 'one patient in 2 folders: a, b,' in refused(tmp_path)
    images = dicom_folder(tmp_path, 'folder', on_identity_mismatch='tags', pseudonyms=False)[0].images
    assert images.patient_id.tolist() == ['MRN 4711', 'MRN 4711']
    assert images.exam_id.nunique() == 2


def test_one_person_with_two_numbers_is_refused(tmp_path):
    put(tmp_path/'a/1.dcm', **JANE)
    put(tmp_path/'b/1.dcm', 'MRN 4712', view='MLO', **JANE)
    assert '2 numbers for one name and birth date: a/1.dcm, b/1.dcm' in refused(tmp_path)
    with pytest.raises(InputError, match='2 numbers for one name and birth date'):
        dicom_folder(tmp_path)
    assert len(dicom_folder(tmp_path, on_identity_mismatch='tags')[0].patients) == 2


@pytest.mark.parametrize('group', ['tags', 'folder'])
def test_a_new_name_with_number_and_birth_date_is_the_same_woman(tmp_path, group):
    put(tmp_path/'a/1.dcm', **JANE)
    put(tmp_path/'a/2.dcm', view='MLO', **JANE | dict(PatientName='Jones^Jane'))
    assert len(dicom_folder(tmp_path, group)[0].patients) == 1
    put(tmp_path/'a/3.dcm', side='R', **JANE | dict(PatientName='Jones^Jane', PatientBirthDate='19500101'))
    with pytest.raises(InputError, match='one number for 2 names or birth dates'):
        dicom_folder(tmp_path, group)


def test_a_dummy_number_with_a_dummy_birth_date_is_two_women(tmp_path):
    for k, name in enumerate(('Doe^Jane', 'Roe^Mary')):
        put(tmp_path/f'a/{k}.dcm', 'TEST', view=('CC', 'MLO')[k], PatientName=name, PatientBirthDate='19000101')
    for group in ('tags', 'folder'):
        with pytest.raises(InputError, match='one number for 2 names or birth dates: a/0.dcm, a/1.dcm'):
            dicom_folder(tmp_path, group)


@pytest.mark.parametrize('one, two', [
    (JANE, dict(PatientName='Doe^Jane', PatientBirthDate='')), (dict(PatientName='DOE^JANE^M'), dict(PatientName='DOE^JANE')),
    (dict(PatientName='DOE, JANE'), dict(PatientName='DOE^JANE')), (dict(PatientName='Exam 1'), dict(PatientName='Exam 2')),
    (dict(PatientName='Yamada^Tarou'), dict(PatientName='Yamada^Tarou=X^Y')), (JANE, JANE | dict(PatientBirthDate='1960.01.02'))], ids=str)
@pytest.mark.parametrize('group', ['tags', 'folder'])
def test_ordinary_spellings_of_one_woman_are_accepted(tmp_path, group, one, two):
    put(tmp_path/'a/1.dcm', **one)
    put(tmp_path/'a/2.dcm', view='MLO', **two)
    assert len(dicom_folder(tmp_path, group)[0].patients) == 1


def test_an_anonymised_set_with_one_name_and_one_date(tmp_path):
    for k in range(3):
        put(tmp_path/f'{k}/1.dcm', f'P{k+1}', PatientName='PATIENT', PatientBirthDate='19000101')
    for group in ('tags', 'folder'):
        assert len(dicom_folder(tmp_path, group)[0].patients) == 3


def test_a_missing_number_is_not_filled_by_a_name_alone(tmp_path):
    put(tmp_path/'a/1.dcm', PatientName='Doe^Jane')
    put(tmp_path/'b/1.dcm', PatientID='', PatientName='Doe^Jane')
    assert len(dicom_folder(tmp_path, 'folder', on_identity_mismatch='tags')[0].patients) == 2


def test_a_name_of_dashes_takes_no_time(tmp_path):
    put(tmp_path/'a/1.dcm', PatientName='-'*16000 + 'l')
    start = time.process_time()
    dicom_folder(tmp_path)
    assert time.process_time() - start < 1


def test_names_without_a_birth_date_do_not_join_two_numbers(tmp_path):
    put(tmp_path/'a/1.dcm', PatientName='Doe^Jane')
    put(tmp_path/'b/1.dcm', 'MRN 4712', PatientName='Doe^Jane')
    for group in ('tags', 'folder'):
        assert len(dicom_folder(tmp_path, group)[0].patients) == 2


@pytest.mark.parametrize('name', ['ANONYMOUS', 'Anonymous^Anonymous', 'unknown', '^^^^', '?', 'REMOVED^'])
def test_names_of_nobody_join_no_folders(tmp_path, name):
    put(tmp_path/'a/1.dcm', PatientID='', PatientName=name)
    put(tmp_path/'b/1.dcm', PatientID='', PatientName=name)
    for rule in ('raise', 'tags', 'folder'):
        assert dicom_folder(tmp_path, 'folder', on_identity_mismatch=rule)[0].patients == ['a', 'b']


@pytest.mark.parametrize('name', ['DOE^JANE', 'Doe^Jane^^', 'doe^jane^^^^', ' Doe ^ Jane'])
def test_a_name_is_one_in_every_spelling(tmp_path, name):
    put(tmp_path/'a/1.dcm', PatientID='', **JANE)
    put(tmp_path/'b/1.dcm', PatientID='', **JANE | dict(PatientName=name))
    assert 'one patient in 2 folders: a, b,' in refused(tmp_path)
    assert len(dicom_folder(tmp_path, 'folder', on_identity_mismatch='tags')[0].patients) == 1


# ---- ids that differ only by case, leading zeros, blanks or form

SIMILAR = [('P17', 'p17'), ('P17', 'P017'), ('17', '0017'), ('P17', 'P 17'), ('P17', 'P\u200b17'), ('P17', 'P\u00a017'), ('P17', 'P\ufeff17'),
           ('Jos\u00e9', 'Jose\u0301'), ('P17', '\uff30\uff11\uff17'), ('Stra\u00dfe', 'STRASSE'), ('P1-7', 'P01-07'), ('P\u00ad17', 'P17'),
           *[('P17', f'P{c}17') for c in '\ufe0f\u034f\u180b\u3164\u115f\u2800\U000e0101'], *[('P1-7', f'P1{c}7') for c in '\u2010\u2011\u2013\u2212\ufe63\uff0d']]
DIFFERENT = [('P17', 'P170'), ('P17', 'P1-7'), ('P1.7', 'P17'), ('P10', 'P1'), ('0', 'P0'), ('Jos\u00e9', 'Jose'), ('a_b', 'a-b'), ('P', 'P0')]


def two_patients(one, two, **columns):
    "An images table of two patients, in training and in test"
    return pd.DataFrame(dict(image_id=['i', 'j'], patient_id=[one, two], exam_id=['e', 'f'], laterality='L', view='CC',
                             path=['i.png', 'j.png'], split=['train', 'test'])).assign(**columns)


@pytest.mark.parametrize('one, two', SIMILAR, ids=ascii)
def test_similar_ids_are_refused_and_named(one, two):
    with pytest.raises(InputError) as e:
        Cohort(two_patients(one, two))
    assert f'{ascii(one)} and {ascii(two)}' in str(e.value)
    assert "on_similar_ids='allow'" in str(e.value)


@pytest.mark.parametrize('one, two', DIFFERENT, ids=ascii)
def test_different_ids_are_different_patients(one, two):
    assert len(Cohort(two_patients(one, two)).patients) == 2


def test_all_pairs_are_named_at_once():
    images = pd.concat([two_patients(f'P{k}', f'p{k}', image_id=[f'i{k}', f'j{k}'], path=[f'i{k}', f'j{k}'], exam_id=[f'e{k}', f'f{k}'])
                        for k in range(3)], ignore_index=True)
    with pytest.raises(InputError) as e:
        Cohort(images)
    assert all(f"'P{k}' and 'p{k}'" in str(e.value) for k in range(3))


@pytest.mark.parametrize('column', ['exam_id', 'image_id'])
def test_similar_exams_and_images_of_one_patient_are_refused(column):
    same = two_patients('P1', 'P1', split='train').assign(**{column: ['X1', 'x01']})
    with pytest.raises(InputError, match="'X1' and 'x01'"):
        Cohort(same)
    assert len(Cohort(two_patients('P1', 'P2').assign(**{column: ['X1', 'x01']}))) == 2  # no patient is mixed up


def test_similar_lesions_of_one_patient_are_refused():
    findings = pd.DataFrame(dict(finding_id=['f', 'g'], image_id=['i', 'j'], lesion_id=['A', 'a']))
    with pytest.raises(InputError, match="'A' and 'a'"):
        Cohort(two_patients('P1', 'P1', split='train'), findings)


def test_ids_that_really_differ_are_allowed_and_stay_so(tmp_path):
    cohort = Cohort(two_patients('a', 'A'), root=tmp_path, on_similar_ids='allow')
    back = Cohort.read(cohort.write(tmp_path))
    selected = back.select("laterality == 'L'").validate()
    again = assign_split(selected, {'a': 'train', 'A': 'test'})
    check_split(again)
    check_split(again.select("split == 'train'"), again.select("split == 'test'"))
    assert again.patients == ['A', 'a']
    other = again.with_tables(again.images.assign(path=['k.png', 'l.png']))
    assert len(Cohort.concat([again, other], keys=['x', 'y']).patients) == 4
    with pytest.raises(InputError, match='on_similar_ids'):
        Cohort(two_patients('a', 'b'), on_similar_ids='yes')


def test_similar_ids_of_two_cohorts_leak():
    train, test = (Cohort(two_patients('P17', 'P18', split='train')), Cohort(two_patients('p17', 'P19', split='test')))
    with pytest.raises(InputError, match="'P17' and 'p17'"):
        check_split(train, test)
    check_split(train, Cohort(two_patients('P20', 'P19', split='test')))


@pytest.mark.parametrize('form', ['P{:06d}', 'MRN {}', 'M\u00fcller {}'])
def test_a_hundred_thousand_ids_take_seconds(form):
    n = 100_000
    ids = pd.Series([form.format(i) for i in range(n)])
    images = pd.DataFrame(dict(image_id=ids, patient_id=ids, exam_id=ids, laterality='L', view='CC', path=[f'{i}' for i in range(n)]))
    start = time.process_time()
    Cohort(images)
    assert time.process_time() - start < 20
    images.loc[n-1, 'patient_id'] = images.patient_id[0].lower() + '\u200b'
    with pytest.raises(InputError, match='rows 0, 99999: column patient_id'):
        Cohort(images)


def test_similar_patient_numbers_are_refused_though_pseudonyms_hide_them(tmp_path):
    put(tmp_path/'1.dcm', 'MRN 4711')
    put(tmp_path/'2.dcm', 'mrn 04711', side='R')
    put(tmp_path/'3.dcm', 'MRN 4712')
    with pytest.raises(InputError) as e:
        dicom_folder(tmp_path)
    assert 'similar numbers in 1.dcm, 2.dcm' in str(e.value)
    assert '471' not in str(e.value)
    assert len(dicom_folder(tmp_path, on_similar_ids='allow')[0].patients) == 3
    one = dicom_folder(tmp_path, pseudonyms=lambda number: 'P' + number[-1])[0]
    assert one.patients == ['P1', 'P2']  # who gives both spellings one name has decided


# ---- one file, two images

def two_files(folder, name='copy.png', **columns):
    "A table of two images whose files have the same bytes"
    Image.fromarray(breast()).save(folder/'a.png')
    shutil.copy(folder/'a.png', folder/name)
    images = pd.DataFrame(dict(image_id=['i', 'j'], patient_id='P1', exam_id='e', laterality='L', view='CC', path=['a.png', name]))
    return Cohort(images.assign(**columns), root=folder)


@pytest.mark.parametrize('columns', [
    dict(patient_id=['P1', 'P2'], exam_id=['e', 'f']), dict(laterality=['L', 'R']), dict(view=['CC', 'MLO']), dict(exam_id=['e', 'f'])],
    ids=['patients', 'sides', 'views', 'exams'])
def test_one_file_as_two_images_is_refused_before_anything_is_prepared(tmp_path, columns):
    with pytest.raises(InputError) as e:
        prepare_cohort(two_files(tmp_path, **columns), tmp_path/'c', **SMALL)
    assert 'files of the same content: i (P1, e, L, CC) and j (' in str(e.value)
    assert entries(tmp_path/'c') == []


def test_all_pairs_of_one_file_are_named(tmp_path):
    rows = []
    for k in range(6):
        Image.fromarray(breast(k//2)).save(tmp_path/f'{k}.png')
        rows.append(dict(image_id=f'i{k}', patient_id=f'P{k}', exam_id=f'e{k}', laterality='L', view='CC', path=f'{k}.png'))
    with pytest.raises(InputError) as e:
        prepare_cohort(Cohort(pd.DataFrame(rows), root=tmp_path), tmp_path/'c', **SMALL)
    assert all(f'i{k} (P{k}, e{k}, L, CC) and i{k+1} (P{k+1}' in str(e.value) for k in (0, 2, 4))


def test_a_view_that_an_exam_holds_twice_is_no_fault(tmp_path):
    assert len(prepare_cohort(two_files(tmp_path), tmp_path/'c', **SMALL)) == 2


def test_files_that_differ_in_one_byte_are_two_images(tmp_path):
    a, b = (breast().astype(np.uint16) for _ in 'ab')
    b[121, 31] += 1
    for name, pixels in (('a', a), ('b', b)):
        write_mammogram(tmp_path/f'{name}.dcm', pixels, 'L', 'CC')
    images = pd.DataFrame(dict(image_id=['i', 'j'], patient_id=['P1', 'P2'], exam_id=['e', 'f'], laterality='L', view='CC', path=['a.dcm', 'b.dcm']))
    assert len(prepare_cohort(Cohort(images, root=tmp_path), tmp_path/'c', **SMALL)) == 2


def test_a_copy_is_found_by_the_checksums_of_the_cache(tmp_path):
    alone = two_files(tmp_path, exam_id=['e', 'f'], patient_id=['P1', 'P2'])
    time.sleep(2.1)  # the cache keeps checksums of files that have settled
    for image_id in 'ij':
        prepare_cohort(alone.select(alone.images.image_id == image_id), tmp_path/'c', **SMALL)
    with pytest.raises(InputError, match='files of the same content'):
        prepare_cohort(alone, tmp_path/'c', **SMALL)


def test_files_that_are_no_images_fail_alone(tmp_path):
    cohort = two_files(tmp_path, exam_id=['e', 'f'], patient_id=['P1', 'P2'])
    for name in ('a.png', 'copy.png'):
        (tmp_path/name).write_bytes(b'')
    assert prepare_cohort(cohort, tmp_path/'c', **SMALL).failures.image_id.tolist() == ['i', 'j']
