"The headers of compressed frames, one claim changed at a time."
import io, struct
import numpy as np
import pytest
import jpeg_ls
from PIL import Image
import dicom_factory as factory
from mammo_nb.dicom.codestream import FrameHeader, check_ratio, jpeg_head, rle_segments
from mammo_nb.dicom.decode import check_frame, decode_frame
from mammo_nb.dicom.file import DicomError
from mammo_nb.dicom.jpeg2000 import check_segments, check_tile_parts, j2k_head
from mammo_nb.dicom.pixel_data import fragments

J2K, RLE, LOSSLESS = '1.2.840.10008.1.2.4.90', '1.2.840.10008.1.2.5', '1.2.840.10008.1.2.4.70'
PIXELS = np.arange(64*48, dtype=np.uint16).reshape(64, 48)
BLACK = np.zeros((256, 128), np.uint16)

def pillow_jpeg(**options):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((30, 20), np.uint8)).save(buffer, 'jpeg', **options)
    return buffer.getvalue()

JPEG, PROGRESSIVE = pillow_jpeg(), pillow_jpeg(progressive=True)
SOF = JPEG.index(b'\xff\xc0')
J2K_FRAME = factory.encode(PIXELS, 'j2k', 12)
COD, SOT = J2K_FRAME.index(b'\xff\x52'), J2K_FRAME.index(b'\xff\x90')
RLE_FRAME = factory.encode(BLACK, 'rle', 12)

def refused(words, function, *args):
    with pytest.raises(DicomError) as e:
        function(*args, 'x.dcm')
    assert words in str(e.value)

# ---- JPEG and JPEG-LS

def test_the_header_of_jpegls():
    frame = jpeg_ls.encode_array(np.zeros((7, 9), np.uint16), 0)
    assert jpeg_head(frame, 'x') == FrameHeader('jpegls', 7, 9, 2, 1)

def test_fill_bytes_between_segments():
    assert jpeg_head(JPEG[:SOF] + b'\xff'*3 + JPEG[SOF:], 'x') == jpeg_head(JPEG, 'x')

@pytest.mark.parametrize('frame, words', [
    (b'GIF89a....', 'x.dcm: compressed frame: found it begins with 47494638'),
    (JPEG[:20], 'no start of frame'),
    (PROGRESSIVE, 'JPEG process SOF2'),
    (JPEG[:2] + b'\xff\xeb\0\x04JP' + JPEG[2:], 'JPEG XT'),
    (JPEG[:SOF] + JPEG[SOF:SOF+13] + JPEG[SOF:], 'two starts of frame'),
], ids=['another format', 'cut', 'progressive', 'JPEG XT', 'two sizes'])
def test_a_bad_jpeg_header(frame, words):
    refused(words, jpeg_head, frame)

# ---- JPEG 2000

@pytest.mark.parametrize('frame, words', [
    (JPEG, 'a JPEG 2000 codestream'),
    (J2K_FRAME[:30], '30 bytes, expected a SIZ segment'),
    (J2K_FRAME[:24] + bytes(8) + J2K_FRAME[32:], 'tiles 0x0'),
    (J2K_FRAME[:8] + bytes(8) + J2K_FRAME[16:], 'extent 0x0'),
    (J2K_FRAME[:43] + b'\x02\x02' + J2K_FRAME[45:], 'sub-sampling 2x2'),
], ids=['JPEG', 'cut', 'no tiles', 'no pixels', 'sub-sampled'])
def test_a_bad_siz_segment(frame, words):
    refused(words, j2k_head, frame)

def test_tiny_precincts():
    settings = J2K_FRAME[COD+5:COD+14]
    bomb = J2K_FRAME[:COD] + b'\xff\x52' + struct.pack('>H', 18) + b'\1' + settings + b'\x11'*6 + J2K_FRAME[COD+14:]
    refused('precincts of 2x2, expected at least 16x16', check_segments, bomb, 2, b'\xff\x90')

def test_a_cut_header():
    refused('in a header', check_segments, J2K_FRAME[:70], 2, b'\xff\x90')

@pytest.mark.parametrize('frame, tiles, words', [
    (J2K_FRAME[:-40] + J2K_FRAME[-2:], 1, '1 tile-parts that end at byte'),
    (J2K_FRAME[:SOT+10] + J2K_FRAME[-2:], 1, '0 tile-parts'),
    (J2K_FRAME, 0, 'tile 0'),
], ids=['hole', 'cut', 'no such tile'])
def test_bad_tile_parts(frame, tiles, words):
    refused(words, check_tile_parts, frame, tiles)

# ---- RLE

@pytest.mark.parametrize('frame, pixels, width, words', [
    (RLE_FRAME, 60000*60000, 2, 'an RLE segment of 512 bytes, expected at least 56250000 bytes'),
    (RLE_FRAME, BLACK.size, 1, '2 RLE segments, expected 1'),
    (RLE_FRAME[:600], BLACK.size, 2, 'at least 512 bytes'),
    (RLE_FRAME[:40], 1, 2, '40 bytes'),
], ids=['too large', 'wrong width', 'cut', 'cut in the header'])
def test_bad_rle_segments(frame, pixels, width, words):
    refused(words, rle_segments, frame, pixels, width)

def test_rle_in_two_fragments():
    assert np.array_equal(decode_frame([RLE_FRAME[:100], RLE_FRAME[100:]], RLE, 256, 128, 16, 'x'), BLACK)

def test_damaged_rle():
    broken = bytearray(RLE_FRAME)
    broken[64:400] = bytes(336)
    refused('x.dcm: compressed frame', decode_frame, [broken], RLE, 256, 128, 16)

# ---- all families

@pytest.mark.parametrize('coded, head, words', [
    (100, FrameHeader('lossless', 100, 100, 12, 1), 'at least 1,250 bytes'),
    (300, FrameHeader('j2k', 8000, 8000, 12, 1), 'at least 256,000 bytes'),
], ids=['lossless JPEG', 'large JPEG 2000'])
def test_a_ratio_that_is_impossible(coded, head, words):
    refused(words, check_ratio, coded, head)

def test_a_small_black_frame_is_possible():
    check_ratio(300, FrameHeader('j2k', 512, 512, 12, 1), 'x')

@pytest.mark.parametrize('frame, syntax, rows, columns, bits, words', [
    (J2K_FRAME, J2K, 65, 48, 16, '64 x 48 pixels, expected 65 x 48'),
    (J2K_FRAME, J2K, 64, 48, 8, '12 bits a pixel, expected 2 to 8'),
    (J2K_FRAME[:-20], J2K, 64, 48, 16, 'no end mark'),
    (J2K_FRAME[:24] + struct.pack('>2I', 1, 1) + J2K_FRAME[32:], J2K, 64, 48, 16, '3,072 tiles'),
    (JPEG, LOSSLESS, 30, 20, 8, 'a baseline frame, expected lossless'),
], ids=['size', 'bits', 'cut', 'tiles', 'family'])
def test_a_frame_that_contradicts_the_data_set(frame, syntax, rows, columns, bits, words):
    refused(words, check_frame, frame, syntax, rows, columns, bits)

# ---- fragments

def item(data):
    return struct.pack('<HHI', 0xFFFE, 0xE000, len(data)) + data

END = struct.pack('<HHI', 0xFFFE, 0xE0DD, 0)

@pytest.mark.parametrize('data, words', [
    (item(b'') + item(b'ab'), 'without an end'),
    (item(b'') + item(b'abcd')[:-2], '2 bytes of a fragment, expected 4 bytes'),
    (item(b'') + END, 'no fragment'),
    (b'garbage!', 'an item (FFFE,E000)'),
], ids=['no delimiter', 'cut', 'empty', 'garbage'])
def test_bad_fragments(data, words):
    refused(words, fragments, data)

def test_the_offset_table_is_no_fragment():
    assert [bytes(part) for part in fragments(item(b'') + item(b'ab') + END, 'x')] == [b'ab']
