"Grey levels against pydicom's own modality and VOI functions, an independent reading of PS3.3 C.11."
from dataclasses import replace
import numpy as np
import pytest
from pydicom import DataElement, dcmread
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
import dicom_factory as factory
from mammo_nb.core.errors import InputError
from mammo_nb.dicom.file import DicomError
from mammo_nb.dicom.grey_levels import Transfer, read_transfer
from mammo_nb.dicom.mammogram import read_mammogram, read_stored
from mammo_nb.dicom.voi import LARGEST, Lut, Window, choose_voi, read_lut, read_vois, read_windows

def table(first, values, bits):
    item = Dataset()
    item.add_new('LUTDescriptor', 'SS' if first < 0 else 'US', [len(values), first, bits])
    item.add_new('LUTData', 'US', np.asarray(values).tolist())
    return [item]

CURVE = (np.linspace(0, 1, 4096)**.5*4095).astype(int)
WINDOWS = {
    'LINEAR': dict(WindowCenter=1900, WindowWidth=2100),
    'LINEAR_EXACT': dict(WindowCenter=1900.5, WindowWidth=2100, VOILUTFunction='LINEAR_EXACT'),
    'SIGMOID': dict(WindowCenter=1900, WindowWidth=900, VOILUTFunction='SIGMOID'),
    'narrow': dict(WindowCenter=1900, WindowWidth=2),
    'threshold': dict(WindowCenter=1900, WindowWidth=1),
    'LUT': dict(VOILUTSequence=table(0, CURVE, 12)),
    'shifted_LUT': dict(VOILUTSequence=table(500, CURVE[:2000], 12)),
}
NO_RESCALE = dict(RescaleSlope=None, RescaleIntercept=None)
MODALITY = {
    'none': dict(NO_RESCALE, RescaleType=None),
    'one': {},
    'shifted': dict(RescaleSlope=1, RescaleIntercept=300),
    'rescaled': dict(RescaleSlope=.5, RescaleIntercept=700),
    'falling': dict(RescaleSlope=-1, RescaleIntercept=4095),
    'LUT': dict(NO_RESCALE, ModalityLUTSequence=table(0, CURVE[::-1], 16)),
}

def largest_difference(a, b):
    return np.abs(a - b).max()

# ---- against pydicom

def pydicom_grey(path):
    "The same chain by pydicom, its output range brought to [0,1]"
    ds = dcmread(path)
    values = apply_modality_lut(ds.pixel_array, ds)
    grey = apply_voi_lut(values, ds).astype(float)
    if 'VOILUTSequence' in ds:
        return grey/4095
    low, high = (-2048, 2047) if ds.PixelRepresentation else (0, 4095)
    if 'ModalityLUTSequence' in ds:
        low, high = 0, 65535
    elif 'RescaleSlope' in ds:
        low, high = (ds.RescaleSlope*value + ds.RescaleIntercept for value in (low, high))
    return (grey-low)/(high-low)

@pytest.mark.filterwarnings('ignore:Applying a VOI LUT on a float input')
@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('modality', MODALITY)
def test_equals_pydicom(window, modality, tmp_path):
    if modality == 'rescaled' and 'LUT' in window:
        pytest.skip('pydicom cuts halves off before a table, the library rounds')
    path = factory.write(tmp_path/'x.dcm', factory.image(), **{**MODALITY[modality], **WINDOWS[window]})
    assert largest_difference(read_mammogram(path).pixels, pydicom_grey(path)) < 1e-6

@pytest.mark.parametrize('window', ['LINEAR', 'LINEAR_EXACT', 'SIGMOID'])
def test_signed_equals_pydicom(window, tmp_path):
    tags = {**WINDOWS[window], 'WindowCenter':-100}
    path = factory.write(tmp_path/'x.dcm', factory.image(signed=True), signed=True, **tags)
    assert largest_difference(read_mammogram(path).pixels, pydicom_grey(path)) < 1e-6

def test_signed_table(tmp_path):
    x = factory.image(signed=True)
    path = factory.write(tmp_path/'x.dcm', x, signed=True, VOILUTSequence=table(-2048, CURVE, 12))
    assert largest_difference(read_mammogram(path).pixels, CURVE[x.astype(int)+2048]/4095) < 1e-6

# ---- whole files

@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('preset', ['voi_lut', 'minmax'])
def test_monochrome1_is_the_negative(window, preset, tmp_path):
    images = []
    for photometric in ('MONOCHROME1', 'MONOCHROME2'):
        tags = dict(WINDOWS[window], PhotometricInterpretation=photometric)
        path = factory.write(tmp_path/f'{photometric}.dcm', factory.image(), **tags)
        images.append(read_mammogram(path, preset).pixels)
    negative, positive = images
    assert negative.dtype == np.float32
    assert np.abs(negative + positive - 1).max() < 1e-6
    assert negative.min() >= 0
    assert negative.max() <= 1

def test_negative_slope_turns_minmax_and_not_raw(tmp_path):
    x = factory.image()
    path = factory.write(tmp_path/'x.dcm', x, **MODALITY['falling'])
    assert largest_difference(read_mammogram(path, 'minmax').pixels, 1 - x/4095) < 1e-6
    assert np.array_equal(read_mammogram(path, 'raw').pixels, x)

@pytest.mark.parametrize('photometric', ['MONOCHROME1', 'MONOCHROME2'])
def test_padding_is_black_and_no_minimum(photometric, tmp_path):
    x = factory.image().clip(500, 3000)
    x[:, -9:] = 4000
    padding = DataElement('PixelPaddingValue', 'US', 4000)
    tags = dict(PixelPaddingValue=padding, PhotometricInterpretation=photometric, WindowCenter=2000, WindowWidth=9000)
    stored = read_stored(factory.write(tmp_path/'x.dcm', x, **tags))
    for preset in ('voi_lut', 'minmax'):
        grey = stored.to_unit(stored.pixels, preset)
        assert (grey[:, -9:] == 0).all()
        if preset == 'minmax':
            assert grey[:, :-9].min() == 0
            assert grey.max() > 1-1e-6
    assert stored.used == (500, 3000)
    assert not stored.is_linear()

def test_means_of_stored_values_may_be_mapped_when_linear(tmp_path):
    "What prepare.prepare relies on: grey of the means is the mean of the grey levels"
    stored = read_stored(factory.write(tmp_path/'x.dcm', factory.image(36, 52), WindowCenter=2048, WindowWidth=4096))
    def block_means(values):
        return values.reshape(18, 2, 26, 2).mean((1, 3), dtype=np.float32)
    assert stored.is_linear()
    assert stored.is_linear('minmax')
    ours = stored.to_unit(block_means(stored.pixels))
    assert largest_difference(ours, block_means(stored.to_unit(stored.pixels))) < 1e-6

def test_a_curve_is_not_linear(tmp_path):
    assert not read_stored(factory.write(tmp_path/'y.dcm', factory.image(), **WINDOWS['SIGMOID'])).is_linear()

@pytest.mark.parametrize('preset', ['voi_lut', 'minmax'])
def test_a_constant_image(preset, tmp_path):
    mammogram = read_mammogram(factory.write(tmp_path/'x.dcm', np.full((9, 7), 1234, np.uint16)), preset)
    assert np.isfinite(mammogram.pixels).all()
    assert len(np.unique(mammogram.pixels)) == 1
    assert ('all pixels are equal' in mammogram.notes) == (preset == 'minmax')

def test_an_unknown_preset(tmp_path):
    path = factory.write(tmp_path/'x.dcm', factory.image())
    with pytest.raises(InputError, match="preset: found 'log', expected one of raw, minmax, voi_lut"):
        read_mammogram(path, 'log')

# ---- windows and tables

def with_window(center, width, function=None):
    ds = Dataset()
    ds.WindowCenter, ds.WindowWidth = center, width
    if function:
        ds.VOILUTFunction = function
    return ds

@pytest.mark.parametrize('ds, words', [
    (with_window(1, .5), 'WindowWidth (0028,1051): found 0.5, expected a finite number, at least 1'),
    (with_window('', ''), 'WindowCenter (0028,1050): found nothing'),
    (with_window([1, 2], 3), 'found 1 values, expected 2'),
    (with_window(1, 3, 'CURVED'), 'VOILUTFunction (0028,1056): found CURVED'),
])
def test_a_window_that_maps_nothing(ds, words):
    with pytest.raises(DicomError) as e:
        read_windows(ds, 'x.dcm')
    assert words in str(e.value)

def test_a_narrow_sigmoid_is_allowed():
    assert read_windows(with_window(1, .5, 'SIGMOID'), 'x')[0].width == .5

def test_a_window_of_width_one_is_a_threshold():
    assert Window(10, 1)(np.array([9, 10])).tolist() == [0, 1]

def test_windows_with_fewer_names_than_windows():
    ds = with_window([1, 2], [3, 4])
    ds.WindowCenterWidthExplanation = 'NORMAL'
    assert [window.name for window in read_windows(ds, 'x')] == ['NORMAL', '']

def lut_item(descriptor):
    item = Dataset()
    item.LUTDescriptor, item.LUTData, item.LUTExplanation = descriptor, [0, 100, 200, 255], 'NORMAL'
    return item

@pytest.mark.parametrize('signed, first', [(True, -6), (False, 65530)])
def test_the_first_input_has_the_sign_of_the_pixels(signed, first):
    assert read_lut(lut_item([4, 65530, 8]), signed, 'VOILUTSequence', 'x').first == first

@pytest.mark.parametrize('descriptor, words', [
    ([5, 10, 8], 'VOILUTSequence (0028,3010) LUTData (0028,3006): found 4 entries, expected 5'),
    ([4, 10, 99], 'found 99 bits, expected 1 to 16 bits'),
])
def test_a_table_that_contradicts_itself(descriptor, words):
    with pytest.raises(DicomError) as e:
        read_lut(lut_item(descriptor), False, 'VOILUTSequence', 'x.dcm')
    assert words in str(e.value)

def test_equal_tables():
    a, b = (read_lut(lut_item([4, 10, 8]), False, 'VOILUTSequence', 'x') for _ in range(2))
    assert a == b
    assert a != replace(b, name='HARDER')

@pytest.mark.parametrize('choice, words', [
    ('SOFT', "x.dcm: window: found 'SOFT', expected an explanation among [0: NORMAL, 1: no explanation]"),
    (3, 'window: found 3, expected an index among'),
    ([0], 'expected an index or an explanation'),
    (True, 'expected an index or an explanation'),
])
def test_a_choice_that_is_not_offered(choice, words):
    ds = with_window(1, 2)
    ds.VOILUTSequence = [lut_item([4, 10, 8])]
    with pytest.raises(DicomError) as e:
        choose_voi(read_vois(ds, False, 'x'), choice, 'x.dcm')
    assert words in str(e.value)

# ---- the chain

CHAIN = Transfer((0, 4095), slope=2, intercept=-100, voi=Window(1000, 2000))
SQUARE = Lut(0, (np.linspace(0, 1, 4096)**2*4095).astype(np.uint16), 12)
CHAINS = {
    'line': CHAIN,
    'negative': replace(CHAIN, inverted=True),
    'S-curve': replace(CHAIN, voi=Window(1000, 2000, 'SIGMOID')),
    'table': replace(CHAIN, voi=SQUARE),
    'modality table': Transfer((0, 4095), table=SQUARE),
    'no window': replace(CHAIN, voi=None),
    'padding': replace(CHAIN, inverted=True, padding=(0, 40)),
    'signed': Transfer((-2048, 2047), voi=Window(0, 4096)),
}

@pytest.mark.parametrize('kind', [np.int16, np.float32])
@pytest.mark.parametrize('name', CHAINS)
def test_the_fast_way_equals_the_definition(name, kind):
    chain = CHAINS[name]
    values = np.arange(chain.stored[0], chain.stored[1]+1)
    assert largest_difference(chain.to_unit(values.astype(kind)), chain.exact(values)) < 1e-6

def test_the_smallest_used_value_is_exactly_black():
    for low in range(0, 3000, 7):
        chain = replace(CHAIN, used=(low, 4000))
        assert chain.to_unit(np.array([low]), 'minmax')[0] == 0

def test_a_table_is_no_line():
    assert replace(CHAIN, voi=SQUARE).line() is None
    assert replace(CHAIN, table=SQUARE).line() is None

@pytest.mark.parametrize('preset, words', [('minmax', 'the range of the image'), ('log', "preset: found 'log'")])
def test_a_preset_that_cannot_be_applied(preset, words):
    with pytest.raises(InputError, match=words):
        CHAIN.exact(np.array([0]), preset)

# ---- from the elements of a file

def test_a_window_that_is_not_looked_at_may_be_broken():
    transfer, notes = read_transfer(with_window('', ''), 12, True, 'x', window=None)
    assert transfer.stored == (-2048, 2047)
    assert notes == []

def test_a_presentation_lut_that_contradicts():
    ds = with_window(1, 2)
    ds.PhotometricInterpretation, ds.PresentationLUTShape = 'MONOCHROME1', 'IDENTITY'
    notes = read_transfer(ds, 12, False, 'x')[1]
    assert notes == ['PresentationLUTShape IDENTITY contradicts MONOCHROME1: the latter is followed']

def test_a_slope_of_zero():
    ds = Dataset()
    ds.RescaleSlope = 0
    with pytest.raises(DicomError) as e:
        read_transfer(ds, 12, False, 'x.dcm')
    assert 'x.dcm: RescaleSlope (0028,1053): found 0.0, expected a finite number, not 0' in str(e.value)

# ---- nothing leaves [0,1]

@pytest.mark.parametrize('bits, words', [
    (10, 'VOILUTSequence (0028,3010) LUTData (0028,3006): found outputs up to 4095, expected at most 1023: 10 bits'),
    (11, 'expected at most 2047: 11 bits, as LUTDescriptor (0028,3002) says'),
])
def test_a_table_above_its_bits(bits, words, tmp_path):
    path = factory.write(tmp_path/'x.dcm', factory.image(), VOILUTSequence=table(0, CURVE, bits))
    with pytest.raises(DicomError) as e:
        read_mammogram(path)
    assert words in str(e.value)

@pytest.mark.parametrize('tags, words', [
    (dict(WindowCenter=0, WindowWidth='1e308'), 'WindowWidth (0028,1051): found 1e+308'),
    (dict(WindowCenter='-1e308', WindowWidth=10), 'WindowCenter (0028,1050): found -1e+308'),
    (dict(WindowCenter=0, WindowWidth='1e-300', VOILUTFunction='LINEAR_EXACT'), 'WindowWidth (0028,1051): found 1e-300'),
    (dict(RescaleSlope='1e308'), 'RescaleSlope (0028,1053): found 1e+308'),
    (dict(RescaleSlope='1e-320'), 'RescaleSlope (0028,1053): found 1e-320'),
    (dict(RescaleIntercept='1e300'), 'RescaleIntercept (0028,1052): found 1e+300'),
])
def test_numbers_beyond_arithmetic(tags, words, tmp_path):
    with pytest.raises(DicomError) as e:
        read_mammogram(factory.write(tmp_path/'x.dcm', factory.image(), **tags))
    assert words in str(e.value)

ENDS = (-LARGEST, -4095, -1/LARGEST, 0, 1/LARGEST, 2000.5, LARGEST)

@pytest.mark.parametrize('function', ['LINEAR', 'LINEAR_EXACT', 'SIGMOID'])
@pytest.mark.parametrize('slope', [-LARGEST, -1., 1/LARGEST, 1., LARGEST])
@pytest.mark.filterwarnings('error')
def test_every_accepted_window_stays_in_range(function, slope):
    "At the ends of what is accepted, and for values between whole numbers"
    values = (np.arange(4096, dtype=np.uint16), np.linspace(0, 4095, 999, dtype=np.float32))
    widths = [w for w in (1/LARGEST, .5, 1, 1+1e-9, 300, LARGEST) if w >= 1 or function != 'LINEAR']
    for center, intercept in ((c, i) for c in ENDS for i in ENDS):
        for width in widths:
            chain = Transfer((0, 4095), slope, intercept, voi=Window(center, width, function))
            for x in values:
                grey = chain.to_unit(x)
                assert grey.min() >= 0 and grey.max() <= 1, (center, width, intercept) # also refuses NaN
