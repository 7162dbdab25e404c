"Folders as people hand them over: links, pipes, locked and broken files, odd names, the same numbers twice"
import os, sys
from pathlib import Path
import numpy as np, pytest
from mammo_nb.core.errors import InputError
from mammo_nb.data.cohort import Cohort
from mammo_nb.data.datasets.folder import dicom_files, dicom_folder
from mammo_nb.data.dicom_file import BoundedReader, write_mammogram

PX = np.arange(64*48, dtype=np.uint16).reshape(64, 48)

def put(path, side='L', view='CC', **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_mammogram(path, PX, side, view, **kwargs)

def test_what_is_no_mammogram_is_listed_and_the_rest_is_read(tmp_path):
    good = put(tmp_path/'d/ä ö.dcm', patient_id='Müller^Änne')
    (tmp_path/'d/text.dcm').write_text('not a picture'); (tmp_path/'d/empty.dcm').touch()
    (tmp_path/'d/cut.dcm').write_bytes(good.read_bytes()[:300]); (tmp_path/'d/folder.dcm').mkdir(); (tmp_path/'d/note.txt').write_text('x')
    cohort, left = dicom_folder(tmp_path/'d')
    assert cohort.images.path.tolist() == ['ä ö.dcm'] and cohort.file(cohort.images.image_id[0]).is_file()
    assert sorted(left.path) == ['cut.dcm', 'empty.dcm', 'text.dcm']
    assert 'Müller' not in cohort.images.to_csv() and left.notna().all().all()

@pytest.mark.skipif(os.name == 'nt', reason='links and pipes')
def test_links_that_lead_out_and_pipes_are_not_followed(tmp_path):
    out = put(tmp_path/'secret/a.dcm'); (tmp_path/'d').mkdir()
    put(tmp_path/'d/b.dcm', 'R')
    (tmp_path/'d/link.dcm').symlink_to(out); (tmp_path/'d/dir').symlink_to(out.parent, target_is_directory=True); (tmp_path/'d/dead.dcm').symlink_to(tmp_path/'nowhere')
    os.mkfifo(tmp_path/'d/pipe')  # opening it would wait for ever
    cohort, left = dicom_folder(tmp_path/'d')
    assert cohort.images.path.tolist() == ['b.dcm']
    assert dict(zip(left.path, left.what))['link.dcm'] == 'link' and 'dead.dcm' in set(left.path)

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_a_file_that_may_not_be_read_is_listed(tmp_path):
    put(tmp_path/'a.dcm'); put(tmp_path/'b.dcm', 'R').chmod(0)
    cohort, left = dicom_folder(tmp_path)
    assert len(cohort) == 1 and left.path.tolist() == ['b.dcm']

def test_patients_and_exams_by_tags(tmp_path):
    for n, (p, e, day) in enumerate([('1', 'a', '20200101'), ('1', 'b', '20210101'), ('2', 'a', '20200101'), (' 1 ', 'c', '20220101')]): put(tmp_path/f'{n}.dcm', patient_id=p, exam_id=e, exam_date=day)
    cohort, _ = dicom_folder(tmp_path)
    im = cohort.images
    assert im.patient_id.nunique() == 2 and im.exam_id.nunique() == 4  # blanks round an ID are not another person
    assert len(set(im.image_id)) == 4 and im.exam_date.dt.year.tolist() == [2020, 2021, 2020, 2022]
    assert dicom_folder(tmp_path)[0].images.equals(im)

def test_empty_ids_need_folders(tmp_path):
    put(tmp_path/'x/1.dcm', extra=dict(PatientID='')); put(tmp_path/'y/1.dcm', extra=dict(PatientID=''))
    with pytest.raises(InputError, match='found nothing'): dicom_folder(tmp_path/'z')
    cohort, left = dicom_folder(tmp_path)
    assert len(cohort) == 0 and left.what.tolist() == ['PatientID']*2 and left.expected.str.contains("group='folder'").all()
    assert dicom_folder(tmp_path, 'folder')[0].patients == ['x', 'y']

def test_hidden_files_are_left_alone(tmp_path):
    put(tmp_path/'.hidden/a.dcm'); put(tmp_path/'._a.dcm'); put(tmp_path/'b')
    assert [p.name for p in dicom_files(tmp_path)] == ['b']  # no ending, but it says DICM

# -- one odd file, and what nobody looks into

def reasons(left): return dict(zip(left.path, left.what))

@pytest.mark.skipif(sys.platform != 'linux', reason='names that other systems refuse')
@pytest.mark.parametrize('name', [' a.dcm', 'a.dcm ', 'a\\b.dcm', 'C:x.dcm', os.fsdecode(b'\xe9t\xe9.dcm'), ' in/a.dcm'])
def test_a_name_that_no_table_takes_is_listed_and_the_rest_is_read(tmp_path, name):
    for n in range(5): put(tmp_path/f'good {n}.dcm', exam_id=f'{n}')
    put(tmp_path/name, 'R')
    cohort, left = dicom_folder(tmp_path)
    assert len(cohort) == 5 and left.what.tolist() == ['path'] and left.notna().all().all()
    assert left.path[0] == os.fsencode(name).decode(errors='backslashreplace')
    left.to_csv(tmp_path/'left.csv')  # it can be written
    assert len(dicom_folder(tmp_path, 'folder')[0]) == 5

@pytest.mark.parametrize('mm', [8, .001])
def test_an_impossible_pixel_spacing_is_a_note(tmp_path, mm):
    put(tmp_path/'a.dcm', pixel_spacing_mm=mm); put(tmp_path/'b.dcm', 'R', pixel_spacing_mm=.1)
    cohort, left = dicom_folder(tmp_path)
    assert len(left) == 0 and cohort.images.pixel_spacing_mm.isna().tolist() == [True, False]
    assert f'pixel spacing is {mm:g} mm, expected 0.005 to 5: ignored' in cohort.images.notes[0] and 'spacing' not in cohort.images.notes[1]

def test_a_wrong_argument_is_no_odd_file(tmp_path):
    put(tmp_path/'a.dcm')
    with pytest.raises(InputError, match='provenance'): dicom_folder(tmp_path, provenance=' x')

@pytest.mark.skipif(os.name == 'nt', reason='links')
def test_linked_folders_and_circles_are_listed(tmp_path):
    out = put(tmp_path/'secret/a.dcm'); d = tmp_path/'d'; put(d/'in/b.dcm', 'R')
    (d/'dir').symlink_to(out.parent, target_is_directory=True); (d/'in/up').symlink_to(d, target_is_directory=True); (d/'.hidden').symlink_to(d, target_is_directory=True)
    (d/'round.dcm').symlink_to(d/'round.dcm')
    cohort, left = dicom_folder(d)
    assert cohort.images.path.tolist() == ['in/b.dcm'] and reasons(left) == {'dir':'link', 'in/up':'link', 'round.dcm':'file'}
    assert left.found[left.path == 'dir'].item() == 'a link to a folder: not followed'

def test_what_may_not_be_opened_is_listed(tmp_path, monkeypatch):
    put(tmp_path/'a.dcm'); put(tmp_path/'shut/b.dcm'); put(tmp_path/'noname', 'R')
    def refuse(real, name, error):
        def opened(path, *args, **kwargs):
            if Path(path).name == name: raise error
            return real(path, *args, **kwargs)
        return opened
    monkeypatch.setattr(os, 'scandir', refuse(os.scandir, 'shut', PermissionError(13, 'Permission denied', str(tmp_path/'shut'))))
    broken = OSError(5, 'Input/output error', str(tmp_path/'noname'))
    monkeypatch.setattr('builtins.open', refuse(open, 'noname', broken))
    monkeypatch.setattr('mammo_nb.data.dicom_file.BoundedReader', refuse(BoundedReader, 'noname', broken))
    cohort, left = dicom_folder(tmp_path)
    assert cohort.images.path.tolist() == ['a.dcm'] and reasons(left) == {'shut':'folder', 'noname':'file'}
    assert set(left.found) == {'Permission denied', 'Input/output error'}

# -- raw pictures

@pytest.mark.parametrize('first', ['FOR PROCESSING', 'FOR PRESENTATION'])
def test_the_picture_that_is_read_is_taken_whatever_the_names(tmp_path, first):
    other = {'FOR PROCESSING':'FOR PRESENTATION', 'FOR PRESENTATION':'FOR PROCESSING'}[first]
    put(tmp_path/'1.dcm', intent=first); put(tmp_path/'2.dcm', intent=other); put(tmp_path/'3.dcm', 'R', intent='FOR PROCESSING')
    shown, raw = ('1.dcm', '2.dcm') if first == 'FOR PRESENTATION' else ('2.dcm', '1.dcm')
    cohort, left = dicom_folder(tmp_path)
    assert cohort.images.path.tolist() == [shown] and reasons(left) == {raw:'raw picture (FOR PROCESSING)', '3.dcm':'raw picture (FOR PROCESSING)'}
    cohort, left = dicom_folder(tmp_path, raw=True)
    assert dict(zip(cohort.images.path, cohort.images.intent)) == {shown:'FOR PRESENTATION', '3.dcm':'FOR PROCESSING'} and left.path.tolist() == [raw]

def test_raw_pictures_are_told_by_the_sop_class_too(tmp_path):
    put(tmp_path/'a.dcm', intent='FOR PROCESSING', extra=dict(PresentationIntentType=None))
    assert dicom_folder(tmp_path)[1].what.tolist() == ['raw picture (FOR PROCESSING)']

def test_notes_of_the_header_are_kept_through_writing(tmp_path):
    put(tmp_path/'a.dcm', window=(100, 200), extra=dict(BreastImplantPresent='YES', PartialView='YES', BurnedInAnnotation='YES')); put(tmp_path/'b.dcm', 'R', window=(100, 200))
    dicom_folder(tmp_path)[0].write(tmp_path/'c')
    notes = Cohort.read(tmp_path/'c').images.notes
    assert notes[0] == 'implant present; partial view: not the whole breast; text is burnt into the picture' and notes.isna().tolist() == [False, True]
