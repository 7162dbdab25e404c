"""Grey levels against pydicom's own modality and VOI functions, an independent reading of PS3.3 C.11; side, view and notes of whole files."""
import numpy as np
import pytest
from pydicom import DataElement, dcmread
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
import dicom_factory as factory
from mammo_nb.data.dicom import read_header, read_mammogram, read_stored
from mammo_nb.data.dicom_file import HARMLESS_MODIFIERS, MODIFIER_CODES, VIEW_CODES, code_item

def table(first, values, bits):
    item = Dataset()
    item.add_new('LUTDescriptor', 'SS' if first < 0 else 'US', [len(values), first, bits])
    item.add_new('LUTData', 'US', np.asarray(values).tolist())
    return [item]

CURVE = (np.linspace(0, 1, 4096)**.5*4095).astype(int)
WINDOWS = dict(LINEAR=dict(WindowCenter=1900, WindowWidth=2100), LINEAR_EXACT=dict(WindowCenter=1900.5, WindowWidth=2100, VOILUTFunction='LINEAR_EXACT'),
               SIGMOID=dict(WindowCenter=1900, WindowWidth=900, VOILUTFunction='SIGMOID'), narrow=dict(WindowCenter=1900, WindowWidth=2),
               threshold=dict(WindowCenter=1900, WindowWidth=1), LUT=dict(VOILUTSequence=table(0, CURVE, 12)), shifted_LUT=dict(VOILUTSequence=table(500, CURVE[:2000], 12)))
MODALITY = dict(none=dict(RescaleSlope=None, RescaleIntercept=None, RescaleType=None), one={}, shifted=dict(RescaleSlope=1, RescaleIntercept=300), rescaled=dict(RescaleSlope=.5, RescaleIntercept=700), falling=dict(RescaleSlope=-1, RescaleIntercept=4095),
                LUT=dict(RescaleSlope=None, RescaleIntercept=None, ModalityLUTSequence=table(0, CURVE[::-1], 16)))

def pydicom_grey(path):
    "The same chain by pydicom, its output range brought to [0,1]"
    ds = dcmread(path)
    m = apply_modality_lut(ds.pixel_array, ds)
    y = apply_voi_lut(m, ds).astype(float)
    if 'VOILUTSequence' in ds: return y/4095
    lo, hi = (0, 4095) if not ds.PixelRepresentation else (-2048, 2047)
    if 'ModalityLUTSequence' in ds: lo, hi = 0, 65535
    elif 'RescaleSlope' in ds: lo, hi = (ds.RescaleSlope*o + ds.RescaleIntercept for o in (lo, hi))
    return (y-lo)/(hi-lo)

@pytest.mark.filterwarnings('ignore:Applying a VOI LUT on a float input')
@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('modality', MODALITY)
def test_equals_pydicom(window, modality, tmp_path):
    if modality == 'rescaled' and 'LUT' in window: pytest.skip('pydicom cuts halves off before a table, the library rounds')
    path = factory.write(tmp_path/'x.dcm', factory.picture(), **{**MODALITY[modality], **WINDOWS[window]})
    assert np.abs(read_mammogram(path).pixels - pydicom_grey(path)).max() < 1e-6

@pytest.mark.parametrize('window', ['LINEAR', 'LINEAR_EXACT', 'SIGMOID'])
def test_signed_equals_pydicom(window, tmp_path):
    path = factory.write(tmp_path/'x.dcm', factory.picture(signed=True), signed=True, **{**WINDOWS[window], 'WindowCenter':-100})
    assert np.abs(read_mammogram(path).pixels - pydicom_grey(path)).max() < 1e-6

def test_signed_table(tmp_path):
    x = factory.picture(signed=True)
    path = factory.write(tmp_path/'x.dcm', x, signed=True, VOILUTSequence=table(-2048, CURVE, 12))
    assert np.abs(read_mammogram(path).pixels - CURVE[x.astype(int)+2048]/4095).max() < 1e-6

@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('preset', ['voi_lut', 'minmax'])
def test_monochrome1_is_the_negative(window, preset, tmp_path):
    x = factory.picture()
    a, b = (read_mammogram(factory.write(tmp_path/f'{p}.dcm', x, PhotometricInterpretation=p, **WINDOWS[window]), preset).pixels for p in ('MONOCHROME1', 'MONOCHROME2'))
    assert a.dtype == np.float32 and np.abs(a + b - 1).max() < 1e-6 and a.min() >= 0 and a.max() <= 1

def test_negative_slope_turns_minmax_and_not_raw(tmp_path):
    x = factory.picture()
    path = factory.write(tmp_path/'x.dcm', x, **MODALITY['falling'])
    assert np.abs(read_mammogram(path, 'minmax').pixels - (1 - x/4095)).max() < 1e-6
    assert np.array_equal(read_mammogram(path, 'raw').pixels, x)

def test_padding_is_black_and_no_minimum(tmp_path):
    x = factory.picture().clip(500, 3000)
    x[:, -9:] = 4000
    for photometric in ('MONOCHROME1', 'MONOCHROME2'):
        s = read_stored(factory.write(tmp_path/'x.dcm', x, PixelPaddingValue=DataElement('PixelPaddingValue', 'US', 4000), PhotometricInterpretation=photometric, WindowCenter=2000, WindowWidth=9000))
        for preset in ('voi_lut', 'minmax'):
            u = s.to_unit(s.pixels, preset)
            assert (u[:, -9:] == 0).all() and (preset == 'voi_lut' or u[:, :-9].min() == 0 and u.max() > 1-1e-6)
        assert s.used == (500, 3000) and not s.is_linear()

def test_means_of_stored_values_may_be_mapped_when_linear(tmp_path):
    "What data.prepare relies on: mean, then grey, is grey, then mean"
    s = read_stored(factory.write(tmp_path/'x.dcm', factory.picture(36, 52), WindowCenter=2048, WindowWidth=4096))
    block = lambda v: v.reshape(18, 2, 26, 2).mean((1, 3), dtype=np.float32)
    assert s.is_linear() and s.is_linear('minmax')
    assert np.abs(s.to_unit(block(s.pixels)) - block(s.to_unit(s.pixels))).max() < 1e-6
    assert not read_stored(factory.write(tmp_path/'y.dcm', factory.picture(), **WINDOWS['SIGMOID'])).is_linear()

@pytest.mark.parametrize('preset', ['voi_lut', 'minmax'])
def test_a_constant_picture(preset, tmp_path):
    m = read_mammogram(factory.write(tmp_path/'x.dcm', np.full((9, 7), 1234, np.uint16)), preset)
    assert np.isfinite(m.pixels).all() and len(np.unique(m.pixels)) == 1 and (preset == 'voi_lut' or 'all pixels are equal' in m.notes)

# ---- side, view, notes of whole files

def view_item(code, scheme, modifiers=()):
    item = code_item(code, scheme, 'a view')
    item.ViewModifierCodeSequence = [code_item(m, scheme, 'a modifier') for m in modifiers]
    return [item]

@pytest.mark.parametrize('scheme', [0, 1], ids=['SCT', 'SRT'])
@pytest.mark.parametrize('view', VIEW_CODES)
def test_every_view_code(view, scheme, tmp_path):
    path = factory.write(tmp_path/'x.dcm', factory.picture(), ViewPosition=None, PatientOrientation=None, ViewCodeSequence=view_item(VIEW_CODES[view][scheme], ['SCT', 'SRT'][scheme]))
    h = read_header(path)
    assert (h.view, h.projection, h.modifiers) == (view, view, ())

@pytest.mark.parametrize('scheme', [0, 1], ids=['SCT', 'SRT'])
@pytest.mark.parametrize('modifier', MODIFIER_CODES)
def test_every_modifier_code_is_no_ordinary_view(modifier, scheme, tmp_path):
    code = view_item(VIEW_CODES['MLO'][scheme], ['SCT', 'SRT'][scheme], [MODIFIER_CODES[modifier][scheme]])
    h = read_header(factory.write(tmp_path/'x.dcm', factory.picture(), ViewPosition='MLO', PatientOrientation=None, ViewCodeSequence=code))
    assert (h.view, h.projection) == (modifier, 'MLO') and f'{MODIFIER_CODES[modifier][2]} view of MLO' in h.notes

@pytest.mark.parametrize('code', HARMLESS_MODIFIERS)
def test_harmless_modifiers_keep_the_view(code, tmp_path):
    h = read_header(factory.write(tmp_path/'x.dcm', factory.picture(), ViewCodeSequence=view_item('399162004', 'SCT', [code])))
    assert h.view == 'CC' and HARMLESS_MODIFIERS[code] in h.notes

def test_nothing_says_anything(tmp_path):
    m = read_mammogram(factory.write(tmp_path/'x.dcm', factory.picture(), ImageLaterality=None, ViewPosition=None, ViewCodeSequence=None, PatientOrientation=None))
    assert (m.laterality, m.view, m.pixel_spacing_mm, m.spacing_source) == (None, None, None, None)
    assert 'no tag says the laterality' in m.notes and 'no tag says the view' in m.notes

@pytest.mark.parametrize('tags, side, view', [
    (dict(ImageLaterality='R', Laterality='L'), 'R', 'CC'), (dict(ImageLaterality=None, Laterality='R'), 'R', 'CC'), (dict(ImageLaterality='', Laterality='R'), 'R', 'CC'),
    (dict(ImageLaterality=None, ViewPosition=None, ViewCodeSequence=None, PatientOrientation=['P', 'FL']), 'R', 'MLO'),
    (dict(ImageLaterality=None, Laterality='L', ViewPosition=None, ViewCodeSequence=None, PatientOrientation='MLO'), 'L', 'MLO'),
    (dict(ViewPosition='MLO'), 'L', 'MLO'), (dict(ViewPosition='nonsense'), 'L', 'CC'), (dict(ViewPosition='ML'), 'L', 'ML')])
def test_order_of_trust(tags, side, view, tmp_path):
    h = read_header(factory.write(tmp_path/'x.dcm', factory.picture(), **tags))
    assert (h.laterality, h.view) == (side, view)
