"Written files: reproducible to the byte, legal, and without a person in them."
import shutil, subprocess
import numpy as np
import pytest
from pydicom import dcmread
import dicom_factory as factory
from mammo_nb.dicom.file import DicomError
from mammo_nb.dicom.write import write_mammogram

X = factory.image()
OPTIONS = dict(
    laterality='R', view='MLO', patient_id='P7', exam_id='E2', exam_date='2021-05-06',
    pixel_spacing_mm=.085, window=(1900, 3000),
)

def written(path, **options):
    return dcmread(write_mammogram(path, X, **{**OPTIONS, **options}))

def test_the_same_call_writes_the_same_bytes(tmp_path):
    a, b = (write_mammogram(tmp_path/f'{name}.dcm', X, **OPTIONS) for name in 'ab')
    assert a.read_bytes() == b.read_bytes()

def test_nobody_is_in_a_written_file(tmp_path):
    ds = written(tmp_path/'a.dcm')
    assert ds.PatientName == ''
    assert ds.PatientBirthDate == ''
    assert ds.PatientIdentityRemoved == 'YES'
    assert ds.file_meta.ImplementationVersionName == 'MAMMO_NB'

def test_a_study_is_one_exam(tmp_path):
    study = written(tmp_path/'a.dcm').StudyInstanceUID
    assert written(tmp_path/'b.dcm', view='CC').StudyInstanceUID == study
    assert written(tmp_path/'c.dcm', exam_id='E3').StudyInstanceUID != study

@pytest.mark.parametrize('view, orientation', [
    ('CC', ['P', 'L']), ('MLO', ['P', 'FL']), ('ML', ['P', 'F']), ('XCCL', ['P', 'L']),
])
def test_the_directions_of_a_right_breast(view, orientation, tmp_path):
    assert list(written(tmp_path/'a.dcm', view=view).PatientOrientation) == orientation

@pytest.mark.parametrize('options, words', [
    (dict(bits_stored=10), '0 to 1023 (10 bits)'),
    (dict(bits_stored=8), '9 to 16'),
    (dict(pixels=X/2.), 'unsigned integers [H,W]'),
    (dict(pixels=X[None]), 'unsigned integers [H,W]'),
    (dict(intent='FOR FUN'), 'FOR PRESENTATION or FOR PROCESSING'),
    (dict(transfer_syntax='1.2.3'), 'transfer_syntax: found 1.2.3'),
])
def test_what_cannot_be_written(options, words, tmp_path):
    with pytest.raises(DicomError) as e:
        write_mammogram(tmp_path/'a.dcm', **{**OPTIONS, 'pixels':X, **options})
    assert words in str(e.value)

@pytest.mark.parametrize('intent', ['FOR PRESENTATION', 'FOR PROCESSING'])
@pytest.mark.parametrize('view', ['CC', 'MLO', 'ML', 'XCCL', 'SPOT'])
def test_dciodvfy_finds_no_error(view, intent, tmp_path):
    "The validator of dicom3tools, an independent reading of PS3.3"
    if shutil.which('dciodvfy') is None:
        pytest.skip('dciodvfy is not installed (Debian package dicom3tools)')
    window = (1900, 3000) if intent == 'FOR PRESENTATION' else None
    path = write_mammogram(tmp_path/'x.dcm', X, **{**OPTIONS, 'view':view, 'intent':intent, 'window':window})
    result = subprocess.run(['dciodvfy', str(path)], capture_output=True, text=True)
    assert 'Error' not in result.stdout + result.stderr, result.stdout + result.stderr
