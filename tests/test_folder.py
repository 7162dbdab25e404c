"""Folders of DICOM files: odd names, links, what may not be read, and raw images"""
import os
import sys
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import stable_hash
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.cohort.datasets.folder import dicom_files, dicom_folder, other_pictures
from mammo_nb.cohort.joining import join_table, pseudonym
from mammo_nb.dicom.file import BoundedReader
from mammo_nb.dicom.write import write_mammogram

PIXELS = np.arange(64*48, dtype=np.uint16).reshape(64, 48)


def put(path, side='L', view='CC', **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_mammogram(path, PIXELS, side, view, **kwargs)


def reasons(left_out):
    return dict(zip(left_out.path, left_out.what))


# ---- which files

def test_what_is_no_mammogram_is_listed_and_the_rest_is_read(tmp_path):
    folder = tmp_path/'d'
    good = put(folder/'ä ö.dcm', patient_id='Müller^Änne')
    (folder/'text.dcm').write_text('not an image')
    (folder/'empty.dcm').touch()
    (folder/'cut.dcm').write_bytes(good.read_bytes()[:300])
    (folder/'folder.dcm').mkdir()
    (folder/'note.txt').write_text('x')
    cohort, left_out = dicom_folder(folder)
    assert cohort.images.path.tolist() == ['ä ö.dcm']
    assert cohort.file(cohort.images.image_id[0]).is_file()
    assert sorted(left_out.path) == ['cut.dcm', 'empty.dcm', 'text.dcm']
    assert left_out.notna().all().all()
    assert 'Müller' not in cohort.images.to_csv()


@pytest.mark.skipif(os.name == 'nt', reason='links and pipes')
def test_links_that_lead_out_and_pipes_are_not_followed(tmp_path):
    outside = put(tmp_path/'secret/a.dcm')
    folder = tmp_path/'d'
    put(folder/'b.dcm', 'R')
    (folder/'link.dcm').symlink_to(outside)
    (folder/'dir').symlink_to(outside.parent, target_is_directory=True)
    (folder/'dead.dcm').symlink_to(tmp_path/'nowhere')
    os.mkfifo(folder/'pipe')  # opening it would wait for ever
    cohort, left_out = dicom_folder(folder)
    assert cohort.images.path.tolist() == ['b.dcm']
    assert reasons(left_out)['link.dcm'] == 'link'
    assert 'dead.dcm' in set(left_out.path)


@pytest.mark.skipif(os.name == 'nt', reason='links')
def test_linked_folders_and_circles_are_listed(tmp_path):
    outside = put(tmp_path/'secret/a.dcm')
    folder = tmp_path/'d'
    put(folder/'in/b.dcm', 'R')
    (folder/'dir').symlink_to(outside.parent, target_is_directory=True)
    (folder/'in/up').symlink_to(folder, target_is_directory=True)
    (folder/'.hidden').symlink_to(folder, target_is_directory=True)
    (folder/'round.dcm').symlink_to(folder/'round.dcm')
    cohort, left_out = dicom_folder(folder)
    assert cohort.images.path.tolist() == ['in/b.dcm']
    assert reasons(left_out) == {'dir': 'link', 'in/up': 'link', 'round.dcm': 'file'}
    assert left_out.found[left_out.path == 'dir'].item() == 'a link to a folder: not followed'


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_a_file_that_may_not_be_read_is_listed(tmp_path):
    put(tmp_path/'a.dcm')
    put(tmp_path/'b.dcm', 'R').chmod(0)
    cohort, left_out = dicom_folder(tmp_path)
    assert len(cohort) == 1
    assert left_out.path.tolist() == ['b.dcm']


def refusing(real, name, error):
    "A function that opens anything but the file with this name"
    def opened(path, *args, **kwargs):
        if Path(path).name == name:
            raise error
        return real(path, *args, **kwargs)
    return opened


def test_what_may_not_be_opened_is_listed(tmp_path, monkeypatch):
    put(tmp_path/'a.dcm')
    put(tmp_path/'shut/b.dcm')
    put(tmp_path/'noname', 'R')
    denied = PermissionError(13, 'Permission denied', str(tmp_path/'shut'))
    broken = OSError(5, 'Input/output error', str(tmp_path/'noname'))
    monkeypatch.setattr(os, 'scandir', refusing(os.scandir, 'shut', denied))
    monkeypatch.setattr('builtins.open', refusing(open, 'noname', broken))
    monkeypatch.setattr('mammo_nb.dicom.file.BoundedReader', refusing(BoundedReader, 'noname', broken))
    cohort, left_out = dicom_folder(tmp_path)
    assert cohort.images.path.tolist() == ['a.dcm']
    assert reasons(left_out) == {'shut': 'folder', 'noname': 'file'}
    assert set(left_out.found) == {'Permission denied', 'Input/output error'}


def test_hidden_files_are_ignored(tmp_path):
    put(tmp_path/'.hidden/a.dcm')
    put(tmp_path/'._a.dcm')
    put(tmp_path/'b')
    assert [p.name for p in dicom_files(tmp_path)] == ['b']  # no ending, but it begins like DICOM


def test_other_images_are_found_by_their_ending(tmp_path):
    for name in ('a.png', 'b.TIF', 'c.jpg'):
        (tmp_path/name).touch()
    assert [p.name for p in other_pictures(tmp_path)] == ['a.png', 'b.TIF']


@pytest.mark.parametrize('name, found', [('nowhere', 'found nothing'), ('letter.txt', 'found a file')])
def test_a_folder_that_is_none(tmp_path, name, found):
    (tmp_path/'letter.txt').write_text('Dear colleague')
    with pytest.raises(InputError, match=found):
        dicom_folder(tmp_path/name)


def test_an_empty_folder_is_an_empty_cohort(tmp_path):
    assert len(dicom_folder(tmp_path)[0]) == 0


@pytest.mark.parametrize('arguments, message', [(dict(group='day'), 'one of tags, folder'), (dict(provenance=' x'), 'provenance')])
def test_a_wrong_argument_is_no_odd_file(tmp_path, arguments, message):
    put(tmp_path/'a.dcm')
    with pytest.raises(InputError, match=message):
        dicom_folder(tmp_path, **arguments)


# ---- patients and exams

def test_patients_and_exams_by_tags(tmp_path):
    files = [('1', 'a', '20200101'), ('1', 'b', '20210101'), ('2', 'a', '20200101'), (' 1 ', 'c', '20220101')]
    for n, (patient, exam, day) in enumerate(files):
        put(tmp_path/f'{n}.dcm', patient_id=patient, exam_id=exam, exam_date=day)
    images = dicom_folder(tmp_path)[0].images
    assert images.patient_id.nunique() == 2  # blanks round an ID are not another person
    assert images.exam_id.nunique() == 4
    assert images.image_id.is_unique
    assert images.exam_date.dt.year.tolist() == [2020, 2021, 2020, 2022]
    assert dicom_folder(tmp_path)[0].images.equals(images)


def test_repeated_images_are_kept_under_two_names(tmp_path):
    for n in (1, 2):
        put(tmp_path/f'{n}.dcm', patient_id='x', exam_id='e')
    images = dicom_folder(tmp_path)[0].images
    assert [i.split('-', 2)[2] for i in images.image_id] == ['L-CC', 'L-CC-2']


def test_empty_ids_need_folders(tmp_path):
    put(tmp_path/'x/1.dcm', extra=dict(PatientID=''))
    put(tmp_path/'y/1.dcm', extra=dict(PatientID=''))
    cohort, left_out = dicom_folder(tmp_path)
    assert len(cohort) == 0
    assert left_out.what.tolist() == ['PatientID']*2
    assert left_out.expected.str.contains("group='folder'").all()
    assert dicom_folder(tmp_path, 'folder')[0].patients == ['x', 'y']


# ---- one odd file

ODD_NAMES = [' a.dcm', 'a.dcm ', 'a\\b.dcm', 'C:x.dcm', os.fsdecode(b'\xe9t\xe9.dcm'), ' in/a.dcm']

@pytest.mark.skipif(sys.platform != 'linux', reason='names that other systems refuse')
@pytest.mark.parametrize('name', ODD_NAMES)
def test_a_name_that_no_table_takes_is_listed_and_the_rest_is_read(tmp_path, name):
    for n in range(5):
        put(tmp_path/f'good {n}.dcm', exam_id=f'{n}')
    put(tmp_path/name, 'R')
    cohort, left_out = dicom_folder(tmp_path)
    assert len(cohort) == 5
    assert left_out.what.tolist() == ['path']
    assert left_out.notna().all().all()
    assert left_out.path[0] == os.fsencode(name).decode(errors='backslashreplace')
    left_out.to_csv(tmp_path/'left.csv')  # it can be written
    assert len(dicom_folder(tmp_path, 'folder')[0]) == 5


@pytest.mark.parametrize('mm', [8, .001])
def test_an_impossible_pixel_spacing_is_a_note(tmp_path, mm):
    put(tmp_path/'a.dcm', pixel_spacing_mm=mm)
    put(tmp_path/'b.dcm', 'R', pixel_spacing_mm=.1)
    cohort, left_out = dicom_folder(tmp_path)
    assert len(left_out) == 0
    assert cohort.images.pixel_spacing_mm.isna().tolist() == [True, False]
    assert f'pixel spacing is {mm:g} mm, expected 0.005 to 5: ignored' in cohort.images.notes[0]
    assert 'spacing' not in cohort.images.notes[1]


# ---- raw images

OTHER = {'FOR PROCESSING': 'FOR PRESENTATION', 'FOR PRESENTATION': 'FOR PROCESSING'}
RAW = 'raw image (FOR PROCESSING)'

@pytest.mark.parametrize('first', OTHER)
def test_the_image_for_reading_is_taken_whatever_the_names(tmp_path, first):
    put(tmp_path/'1.dcm', intent=first)
    put(tmp_path/'2.dcm', intent=OTHER[first])
    put(tmp_path/'3.dcm', 'R', intent='FOR PROCESSING')
    processed, raw = ('1.dcm', '2.dcm') if first == 'FOR PRESENTATION' else ('2.dcm', '1.dcm')
    cohort, left_out = dicom_folder(tmp_path)
    assert cohort.images.path.tolist() == [processed]
    assert reasons(left_out) == {raw: RAW, '3.dcm': RAW}
    cohort, left_out = dicom_folder(tmp_path, raw=True)
    assert dict(zip(cohort.images.path, cohort.images.intent)) == {processed: 'FOR PRESENTATION', '3.dcm': 'FOR PROCESSING'}
    assert left_out.path.tolist() == [raw]


def test_raw_images_are_told_by_the_sop_class_too(tmp_path):
    put(tmp_path/'a.dcm', intent='FOR PROCESSING', extra=dict(PresentationIntentType=None))
    assert dicom_folder(tmp_path)[1].what.tolist() == [RAW]


def test_a_raw_image_alone_is_taken_with_a_note(tmp_path):
    put(tmp_path/'a.dcm', intent='FOR PROCESSING')
    images = dicom_folder(tmp_path, raw=True)[0].images
    assert images.intent.tolist() == ['FOR PROCESSING']
    assert 'raw detector data' in images.notes[0]


def test_notes_of_the_header_are_kept_through_writing(tmp_path):
    put(tmp_path/'a.dcm', window=(100, 200), extra=dict(BreastImplantPresent='YES', PartialView='YES', BurnedInAnnotation='YES'))
    put(tmp_path/'b.dcm', 'R', window=(100, 200))
    dicom_folder(tmp_path)[0].write(tmp_path/'c')
    notes = Cohort.read(tmp_path/'c').images.notes
    assert notes[0].startswith('implant present; partial view')
    assert 'burnt' in notes[0]
    assert notes.isna().tolist() == [False, True]


# ---- silent failures of issue 19: default pseudonyms made a merge on the patient's number match nothing, in silence

def followup(*numbers, **columns):
    return pd.DataFrame(dict(mrn=list(numbers))).assign(years_followed=3., **columns)


@pytest.fixture
def two_patients(tmp_path):
    "A cohort of patients MRN 4711 and MRN 4712, an exam each, by default with pseudonyms"
    put(tmp_path/'1.dcm', patient_id='MRN 4711', exam_id='a', extra=dict(AccessionNumber='ACC 1'))
    put(tmp_path/'2.dcm', patient_id='MRN 4712', exam_id='b', extra=dict(AccessionNumber='ACC 2'))
    return dicom_folder(tmp_path)[0]


def test_a_table_with_hospital_numbers_joins_a_cohort_with_pseudonyms(two_patients):
    table = followup('MRN 4711', 'MRN 4712', smoker=[True, False])
    joined = join_table(two_patients, table, names=dict(mrn='patient_id'))
    assert joined.images.years_followed.tolist() == [3., 3.]
    assert dict(zip(joined.images.patient_id, joined.images.smoker)) == {pseudonym('MRN 4711'): True, pseudonym('MRN 4712'): False}
    assert 'MRN' not in joined.images.to_csv()


def test_a_table_of_other_patients_is_refused_with_examples_of_both(two_patients):
    with pytest.raises(InputError) as e:
        join_table(two_patients, followup('4711', '4712'), names=dict(mrn='patient_id'))
    first = sorted(two_patients.patients)[0]
    assert f'no value in common: the cohort has {first}' in e.value.found
    assert 'the table' in e.value.found


def test_the_accession_number_is_kept_as_a_pseudonym(two_patients):
    assert two_patients.images.accession.tolist() == [pseudonym(f'ACC {n}', 'accession') for n in (1, 2)]
    assert 'ACC' not in two_patients.images.to_csv()


def test_a_table_of_exams_joins_on_the_accession_number(two_patients):
    reports = pd.DataFrame(dict(accession=['ACC 2', 'ACC 1'], density=['C', 'B']))
    assert join_table(two_patients, reports, on='accession').images.density.tolist() == ['B', 'C']


def test_without_pseudonyms_both_numbers_are_plain(tmp_path):
    put(tmp_path/'1.dcm', patient_id='MRN 4711', extra=dict(AccessionNumber='ACC 1'))
    images = dicom_folder(tmp_path, pseudonyms=False)[0].images
    assert images[['patient_id', 'accession']].values.tolist() == [['MRN 4711', 'ACC 1']]


def test_no_accession_number_is_unknown(tmp_path):
    put(tmp_path/'1.dcm')
    assert dicom_folder(tmp_path)[0].images.accession.isna().all()


def test_pseudonyms_of_your_own(tmp_path):
    put(tmp_path/'1.dcm', patient_id='MRN 4711', exam_id='a', extra=dict(AccessionNumber='ACC 1'))
    put(tmp_path/'2.dcm', patient_id='MRN 4712', exam_id='b')
    by_function = dicom_folder(tmp_path, pseudonyms=lambda number: f'study-{number[-1]}')[0]
    assert by_function.patients == ['study-1', 'study-2']
    assert by_function.images.exam_id.str.startswith('study-').all()
    assert by_function.images.accession[0] == pseudonym('ACC 1', 'accession')
    by_table, left_out = dicom_folder(tmp_path, pseudonyms={'MRN 4711': 'study-1'})
    assert by_table.patients == ['study-1']
    assert left_out.found.tolist() == ['no pseudonym (None)']


def test_numbers_match_however_they_were_read(tmp_path):
    put(tmp_path/'1.dcm', patient_id='4711')
    cohort = dicom_folder(tmp_path)[0]
    for number in (4711, 4711., ' 4711 ', np.int64(4711)):
        assert join_table(cohort, followup(number), names=dict(mrn='patient_id')).images.years_followed.tolist() == [3.]


def test_pseudonyms_are_those_of_earlier_cohorts():
    assert pseudonym('MRN 4711') == f'P{stable_hash("patient", "MRN 4711"):032x}'[:13]


def test_patients_without_a_row_are_counted(two_patients, capsys):
    joined = join_table(two_patients, followup('MRN 4711'), names=dict(mrn='patient_id'))
    assert joined.images.years_followed.isna().sum() == 1
    assert '1 of 2 keys (patient_id) of the cohort have no row in the table' in capsys.readouterr().out


def test_unknown_keys_match_nothing(tmp_path):
    put(tmp_path/'1.dcm', exam_id='a', extra=dict(AccessionNumber='ACC 1'))
    put(tmp_path/'2.dcm', exam_id='b')
    reports = pd.DataFrame(dict(accession=['ACC 1', None], density=['B', 'C']))
    assert join_table(dicom_folder(tmp_path)[0], reports, on='accession').images.density.isna().tolist() == [False, True]


@pytest.mark.parametrize('table, arguments, message', [
    (followup('MRN 4711', 'MRN 4711'), dict(names=dict(mrn='patient_id')), 'one row for each patient_id'),
    (followup('MRN 4711'), {}, 'no such column in the table, expected one of mrn, years_followed'),
    (followup('MRN 4711', view='CC'), dict(names=dict(mrn='patient_id')), 'column view: found values in the cohort already'),
    (followup('MRN 4711', laterality='R'), dict(names=dict(mrn='patient_id'), on=['patient_id', 'laterality']), 'no value in common'),
    (followup('MRN 4711', years=-1).drop(columns='years_followed').rename(columns=dict(years='years_followed')), dict(names=dict(mrn='patient_id')), 'years_followed')])
def test_tables_that_do_not_fit_are_refused(two_patients, table, arguments, message):
    with pytest.raises(InputError, match=message):
        join_table(two_patients, table, **arguments)
