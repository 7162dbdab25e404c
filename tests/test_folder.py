"Folders as people hand them over: links, pipes, locked and broken files, odd names, the same numbers twice"
import os
from pathlib import Path
import numpy as np, pytest
from mammo_nb.core.errors import InputError
from mammo_nb.data.datasets.folder import dicom_files, dicom_folder
from mammo_nb.data.dicom_file import write_mammogram

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
