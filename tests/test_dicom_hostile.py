"Bad files: each raises `DicomError` with the right words, in under a second, without the memory that it claims."
import io, os, struct, subprocess, sys, time, tracemalloc, zlib
from pathlib import Path
os.environ['RUST_BACKTRACE'] = '0'  # a backtrace of the RLE decoder's panic would cost most of the second
import numpy as np
import pytest
from pydicom.dataset import Dataset
import dicom_factory as factory
from dicom_factory import write
from mammo_nb.core.errors import InputError
from mammo_nb.dicom.header import read_header
from mammo_nb.dicom.mammogram import read_mammogram
from mammo_nb.dicom.file import DicomError

X, X8 = factory.image(37, 53), factory.image(37, 53, bits=8)   # 1,961 pixels
BAD = {}   # name -> (makes the file, words of the error)

def bad(*words):
    def register(f):
        BAD[f.__name__] = f, words
        return f
    return register

def patch(path, old, new):
    "Replace the one occurrence of some bytes"
    data = path.read_bytes()
    assert data.count(old) == 1, data.count(old)
    path.write_bytes(data.replace(old, new))

def cut(path, n):
    path.write_bytes(path.read_bytes()[:n])

def before_pixels(path):
    return path.read_bytes().rindex(b'\xe0\x7f\x10\x00')

def relabel(path, uid):
    "Change the transfer syntax in the file meta information and nothing else"
    data, value = path.read_bytes(), uid.encode() + b'\0'*(len(uid) % 2)
    at = data.index(struct.pack('<HH2s', 2, 0x10, b'UI'))
    old, length = struct.unpack('<H', data[at+6:at+8])[0], struct.unpack('<I', data[140:144])[0]
    data = data[:at+6] + struct.pack('<H', len(value)) + value + data[at+8+old:]
    path.write_bytes(data[:140] + struct.pack('<I', length + len(value) - old) + data[144:])

def us(element, value):
    return struct.pack('<HH2sHH', 0x28, element, b'US', 2, value)   # of group 0028, explicit little endian

def frame(name, bits=12):
    return factory.encode(X8 if name == 'baseline' else X, name, bits)

def sized(name, rows, columns, frame=None, **kw):
    "A file of `X` that claims another size, frame and all"
    return lambda p: write(p, X, name, frame=frame, Rows=rows, Columns=columns, **kw)

# ---- not a DICOM file

@bad('file: found nothing', 'a DICOM file')
def missing(p):
    assert not p.exists()

@bad('file: found a folder')
def folder(p):
    p.mkdir()

@bad('first 132 bytes', 'found 0 bytes', "'DICM' at byte 128")
def empty(p):
    p.write_bytes(b'')

@bad('first 132 bytes', 'without DICM')
def png(p):
    p.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(500))

@bad('first 132 bytes', 'found 100 bytes')
def shorter_than_a_preamble(p):
    p.write_bytes(bytes(100))

@bad('TransferSyntaxUID (0002,0010): found nothing')
def only_a_preamble(p):
    p.write_bytes(bytes(128) + b'DICM')

@bad('TransferSyntaxUID (0002,0010): found nothing')
def garbage_after_the_preamble(p):
    p.write_bytes(bytes(128) + b'DICM' + np.random.default_rng(0).bytes(3000))

@bad('TransferSyntaxUID (0002,0010): found MPEG2', 'one of Implicit VR Little Endian')
def video(p):
    relabel(write(p, X), '1.2.840.10008.1.2.4.100')

@bad('TransferSyntaxUID (0002,0010): found 1.2.3.4.5', 'JPEG 2000')
def unknown_syntax(p):
    relabel(write(p, X), '1.2.3.4.5')

@bad('TransferSyntaxUID (0002,0010): found 2 values')
def two_syntaxes(p):
    relabel(write(p, X), '1.2.840.10008.1.2\\1.2.840.10008.1.2.1')

# ---- cut off

@bad('PixelData (7FE0,0010)', '3,422 bytes, then the end of the file', '3,922 bytes')
def cut_in_the_pixels(p):
    cut(write(p, X), -500)

@bad('found nothing, expected')
def cut_in_the_header(p):
    cut(write(p, X), 700)

@bad('PixelData (7FE0,0010): found the end of the file', 'pixel data')
def no_pixels(p):
    cut(write(p, X), before_pixels(p))

@bad('expected elements as PS3.5 lays them out')
def cut_in_the_head_of_the_pixels(p):
    cut(write(p, X), before_pixels(p) + 9)

@bad('PixelData (7FE0,0010)', 'bytes of a fragment')
def cut_in_a_fragment(p):
    cut(write(p, X, 'rle'), -500)

@bad('PixelData (7FE0,0010)', 'without an end', '(FFFE,E0DD)')
def no_delimiter(p):
    cut(write(p, X, 'jpegls'), -8)

@bad('PixelData (7FE0,0010): found (0000,0000)', 'an item (FFFE,E000)')
def no_items(p):
    cut(write(p, X, 'rle'), before_pixels(p) + 12)
    p.write_bytes(p.read_bytes() + bytes(100))

@bad('PixelData (7FE0,0010)', 'no fragment')
def no_fragment(p):
    cut(write(p, X, 'rle'), before_pixels(p) + 12)
    p.write_bytes(p.read_bytes() + struct.pack('<HHIHHI', 0xFFFE, 0xE000, 0, 0xFFFE, 0xE0DD, 0))

@bad('deflated data set')
def deflate_garbage(p):
    data = write(p, X, 'deflated').read_bytes()
    at = 144 + struct.unpack('<I', data[140:144])[0]
    p.write_bytes(data[:at] + b'\xff'*(len(data)-at))

@bad('found nothing, expected')
def deflate_damaged(p):
    data = write(p, X, 'deflated').read_bytes()
    at = 444 + struct.unpack('<I', data[140:144])[0]
    p.write_bytes(data[:at] + b'\xff'*(len(data)-at))

@bad('PixelData (7FE0,0010)', 'then the end of the file', '3,922 bytes')
def deflate_cut(p):
    cut(write(p, X, 'deflated'), -800)

@bad('compressed frame', 'no end mark')
def jpeg_cut(p):
    write(p, X, 'lossless_sv1', frame=frame('lossless_sv1')[:-400])

@bad('compressed frame', 'no end mark')
def jpegls_cut(p):
    write(p, X, 'jpegls', frame=frame('jpegls')[:-400])

@bad('compressed frame', 'no end mark')
def j2k_cut(p):
    write(p, X, 'j2k', frame=frame('j2k')[:-400])

@bad('compressed frame', 'tile-parts that end at byte')
def j2k_with_a_hole(p):
    write(p, X, 'j2k', frame=frame('j2k')[:500] + frame('j2k')[900:])

@bad('compressed frame', 'before the segment was completely decoded')
def rle_cut(p):
    write(p, X, 'rle', frame=frame('rle')[:2070])

# ---- not a mammogram

@bad('Modality (0008,0060): found CT', 'MG (mammography)')
def ct(p):
    write(p, X, Modality='CT', SOPClassUID='1.2.840.10008.5.1.4.1.1.2')

@bad('Modality (0008,0060): found nothing')
def no_modality(p):
    write(p, X, Modality=None)

@bad('SOPClassUID (0008,0016): found breast tomosynthesis', 'a single mammogram')
def tomosynthesis(p):
    write(p, X, SOPClassUID='1.2.840.10008.5.1.4.1.1.13.1.3', NumberOfFrames=60)

@bad('SOPClassUID (0008,0016): found multi-frame secondary capture (word)')
def multi_frame_capture(p):
    write(p, X, SOPClassUID='1.2.840.10008.5.1.4.1.1.7.3', NumberOfFrames=2)

@bad('NumberOfFrames (0028,0008): found a multi-frame object of 60 frames')
def multi_frame(p):
    write(p, X, NumberOfFrames=60)

@bad('SOPClassUID (0008,0016): found Enhanced SR Storage')
def report(p):
    write(p, X, SOPClassUID='1.2.840.10008.5.1.4.1.1.88.22')

@bad('SOPClassUID (0008,0016): found nothing')
def no_class(p):
    write(p, X)
    data = p.read_bytes()
    at = data.index(b'\x08\x00\x16\x00UI')
    n = 8 + struct.unpack('<H', data[at+6:at+8])[0]
    p.write_bytes(data[:at] + data[at+n:])

@bad('SamplesPerPixel (0028,0002): found 3', '1 (grey)')
def colour(p):
    write(p, X8, bits=8, SamplesPerPixel=3)

@bad('PhotometricInterpretation (0028,0004): found RGB', 'MONOCHROME1 or MONOCHROME2')
def rgb(p):
    write(p, X8, bits=8, PhotometricInterpretation='RGB')

# ---- sizes and bits

@bad('PixelData (7FE0,0010): found 3,922 bytes', '3,996 bytes (rows x columns x bytes a pixel)')
def too_few_pixels(p):
    sized('explicit', 37, 54)(p)

@bad('PixelData (7FE0,0010): found 3,922 bytes', '3,848 bytes')
def too_many_pixels(p):
    sized('explicit', 37, 52)(p)

@bad('PixelData (7FE0,0010): found 3,922 bytes', '1,961 bytes')
def half_the_bits(p):
    write(p, X, bits=8, BitsAllocated=8)

@bad('Rows (0028,0010): found 60000', '1 to 16384')
def absurd_rows(p):
    sized('explicit', 60000, 53)(p)

@bad('Columns (0028,0011): found 0', '1 to 16384')
def no_columns(p):
    sized('explicit', 37, 0)(p)

@bad('Rows (0028,0010): found nothing', 'a whole number')
def no_rows(p):
    write(p, X, Rows=None)

@bad('Rows (0028,0010) x Columns (0028,0011): found 16384 x 16384', 'at most 134,217,728 pixels')
def absurd_area(p):
    sized('explicit', 16384, 16384)(p)

@bad('PixelData (7FE0,0010): found 3,922 bytes', '255,919,344 bytes')
def a_claim_of_a_quarter_gigabyte(p):
    sized('explicit', 16284, 7858)(p)

@bad('PixelData (7FE0,0010)', '3,922 bytes, then the end of the file', '255,919,344 bytes')
def a_claim_of_a_quarter_gigabyte_twice(p):
    sized('explicit', 16284, 7858)(p)
    head = b'\xe0\x7f\x10\x00OW\0\0'
    patch(p, head + struct.pack('<I', 3922), head + struct.pack('<I', 255919344))

@bad('expected')
def an_element_of_four_gigabytes(p):
    honest = b'LO' + struct.pack('<H', 40) + b'A'*40
    patch(write(p, X, Manufacturer='A'*40), honest, b'UT\0\0' + struct.pack('<I', 0xFFFFFFF0) + b'A'*36)

@bad('Rows (0028,0010): found a value that cannot be read', 'a whole number')
def rows_of_three_bytes(p):
    patch(write(p, X), us(0x10, 37), struct.pack('<HH2sH', 0x28, 0x10, b'US', 3) + b'\x25\0\0')

@bad('Rows (0028,0010): found 2 values', 'one value')
def two_rows(p):
    write(p, X, Rows=[37, 37])

@bad('BitsAllocated (0028,0100): found 12', '8 or 16')
def twelve_bits_allocated(p):
    write(p, X, BitsAllocated=12)

@bad('BitsAllocated (0028,0100): found 32', '8 or 16')
def thirty_two_bits(p):
    write(p, X, BitsAllocated=32)

@bad('BitsStored (0028,0101): found 17', '1 to 16')
def more_stored_than_allocated(p):
    write(p, X, BitsStored=17)

@bad('HighBit (0028,0102): found 3', '11 to 15')
def high_bit_too_low(p):
    write(p, X, HighBit=3)

@bad('PixelRepresentation (0028,0103): found 7', '0 (unsigned) or 1 (signed)')
def odd_representation(p):
    write(p, X, PixelRepresentation=7)

# ---- pixels that are not what the syntax says

@bad('(7FE0,0008), pixels of another type', 'whole-number pixel data')
def float_pixels(p):
    patch(write(p, X), b'\xe0\x7f\x10\x00OW', b'\xe0\x7f\x08\x00OF')

@bad('PixelData (7FE0,0010): found 3,922 bytes in one run', 'RLE Lossless')
def plain_pixels_called_rle(p):
    relabel(write(p, X), '1.2.840.10008.1.2.5')

@bad('PixelData (7FE0,0010): found fragments', 'Explicit VR Little Endian')
def rle_called_plain(p):
    relabel(write(p, X, 'rle'), '1.2.840.10008.1.2.1')

@bad('compressed frame: found it begins with ff4fff51', 'a JPEG frame')
def j2k_called_jpegls(p):
    write(p, X, 'jpegls', frame=frame('j2k'))

@bad('compressed frame: found a lossless frame', 'baseline or extended')
def lossless_called_baseline(p):
    write(p, X8, 'baseline', 8, frame=factory.jpeg_lossless(X8, 8))

@bad('compressed frame: found 37 x 53 pixels', '37 x 54')
def jpeg_of_another_size(p):
    sized('lossless', 37, 54)(p)

@bad('compressed frame: found 60000 x 60000 pixels', '37 x 53')
def j2k_that_claims_seven_gigabytes(p):
    f = frame('j2k')
    write(p, X, 'j2k', frame=f[:8] + struct.pack('>II', 60000, 60000) + f[16:])

@bad('compressed frame', 'at least 500,000 bytes for 12500 x 10000 pixels')
def j2k_bomb(p):
    f = frame('j2k')
    sized('j2k', 12500, 10000, f[:8] + struct.pack('>6I', 10000, 12500, 0, 0, 10000, 12500) + f[32:])(p)

@bad('compressed frame', 'at least 15,625,000 bytes for 12500 x 10000 pixels')
def jpeg_bomb(p):
    f = frame('lossless_sv1')
    at = f.index(b'\xff\xc3') + 5
    sized('lossless_sv1', 12500, 10000, f[:at] + struct.pack('>HH', 12500, 10000) + f[at+4:])(p)

@bad('compressed frame', 'at least 500,000 bytes')
def jpegls_bomb(p):
    f = frame('jpegls')
    at = f.index(b'\xff\xf7') + 5
    sized('jpegls', 12500, 10000, f[:at] + struct.pack('>HH', 12500, 10000) + f[at+4:])(p)

@bad('compressed frame: found an RLE segment of', 'at least 1953125 bytes for 125,000,000 pixels')
def rle_bomb(p):
    sized('rle', 12500, 10000)(p)

@bad('compressed frame: found 1,961 tiles', 'at most 64')
def j2k_of_tiny_tiles(p):
    f = frame('j2k')
    write(p, X, 'j2k', frame=f[:24] + struct.pack('>II', 1, 1) + f[32:])

@bad('compressed frame: found precincts of 2x2', 'at least 16x16')
def j2k_of_tiny_precincts(p):
    "Forty kilobytes, a black image of nine million pixels: gigabytes in openjpeg"
    x = np.zeros((3000, 3000), np.uint16)
    f = factory.encode(x, 'j2k', 12)
    at = f.index(b'\xff\x52')
    precincts = struct.pack('>HB', 18, 1) + f[at+5:at+14] + b'\x11'*6
    write(p, x, 'j2k', frame=f[:at+2] + precincts + f[at+14:-2] + bytes(40000) + f[-2:])

@bad('compressed frame: found 3 components')
def jpeg_in_colour(p):
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(np.dstack([X8]*3)).save(buffer, 'jpeg')
    write(p, X8, 'baseline', 8, frame=buffer.getvalue())

@bad('compressed frame: found 12 bits a pixel', '2 to 8')
def twelve_bits_in_eight(p):
    write(p, X8, 'j2k', 8, frame=frame('j2k'))

@bad('compressed frame: found 3 RLE segments', '2 (bytes a pixel)')
def rle_of_three_segments(p):
    f = frame('rle')
    write(p, X, 'rle', frame=struct.pack('<I', 3) + f[4:])

@bad('compressed frame: found RLE segments at')
def rle_offsets_out_of_the_frame(p):
    f = frame('rle')
    write(p, X, 'rle', frame=f[:8] + struct.pack('<I', 10**6) + f[12:])

@bad('compressed frame: found PanicException')
def rle_runs_over_the_end(p):
    f = bytearray(frame('rle'))
    f[64:464] = b'\x81\x07'*200
    write(p, X, 'rle', frame=bytes(f))

@bad('compressed frame', 'can decode')
def jpeg_of_noise(p):
    f = frame('lossless')
    at = f.index(b'\xff\xc4')
    write(p, X, 'lossless', frame=f[:at+4] + b'\xee'*24 + f[at+28:])

# ---- grey levels

def grey(name, *words, **kw):
    BAD[name] = (lambda p: write(p, X, **kw)), words

def window(name, *words, center=2000, width=None, function=None):
    grey(name, *words, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)

CENTER, WIDTH = 'WindowCenter (0028,1050)', 'WindowWidth (0028,1051)'
window('nan_window', f'{WIDTH}: found nan', 'a finite number', width='NaN')
window('nan_center', f'{CENTER}: found nan', 'a finite number', center='NaN', width=100)
window('endless_window', f'{WIDTH}: found inf', 'a finite number', width='1e999')
window('empty_window', f'{CENTER}: found nothing', 'a number', center='', width='')
window('window_without_width', f'{WIDTH}: found nothing')
window('window_of_width_zero', f'{WIDTH}: found 0.0', 'at least 1 for LINEAR', width=0)
window('negative_window', f'{WIDTH}: found -5.0', 'above 0 for SIGMOID', width=-5, function='SIGMOID')
window('two_centers_one_width', f'{WIDTH}: found 1 values', '2, as many as WindowCenter', center=[1, 2], width=3)
window('unknown_function', 'VOILUTFunction (0028,1056): found GAMMA', 'LINEAR, LINEAR_EXACT, SIGMOID',
       width=3, function='GAMMA')
grey('slope_zero', 'RescaleSlope (0028,1053): found 0.0', 'not 0', RescaleSlope=0)
grey('nan_intercept', 'RescaleIntercept (0028,1052): found nan', RescaleIntercept='nan')

@bad('WindowCenter (0028,1050): found a value that cannot be read', 'a number')
def window_in_words(p):
    patch(write(p, X, WindowCenter='12345678', WindowWidth=3), b'12345678', b'brighter')

def lut(n, first, bits, data):
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [n, first, bits], np.array(data, '<u2').tobytes()
    return [item]

@bad('VOILUTSequence (0028,3010) LUTData (0028,3006): found 3 entries', '200, as LUTDescriptor')
def lut_too_short(p):
    write(p, X, VOILUTSequence=lut(200, 0, 12, [1, 2, 3]))

@bad('ModalityLUTSequence (0028,3000) LUTDescriptor (0028,3002): found 40 bits', '1 to 16 bits')
def lut_of_forty_bits(p):
    write(p, X, ModalityLUTSequence=lut(3, 0, 40, [1, 2, 3]))

@bad('VOILUTSequence (0028,3010) LUTDescriptor (0028,3002): found 2 values', 'three numbers')
def lut_without_descriptor(p):
    item = lut(3, 0, 12, [1, 2, 3])
    item[0].LUTDescriptor = [3, 0]
    write(p, X, VOILUTSequence=item)

# ---- bombs

@bad('PixelData (7FE0,0010): found 3,922 bytes', '255,919,344 bytes')
def deflated_claim(p):
    sized('deflated', 16284, 7858)(p)

@bad('expected')
def deflate_bomb(p):
    "A megabyte that inflates to a gigabyte, in an element before the pixels"
    data = write(p, X, 'deflated').read_bytes()
    at = 144 + struct.unpack('<I', data[140:144])[0]
    z = zlib.compressobj(9, wbits=-15)
    out = [z.compress(struct.pack('<HH2sHI', 8, 0x3010, b'UT', 0, 1 << 30))]
    out += [z.compress(bytes(1 << 20)) for _ in range(256)]
    p.write_bytes(data[:at] + b''.join(out) + z.flush())

@bad('expected')
def a_thousand_sequences(p):
    "Sequences nested in sequences until the reader's stack is full"
    data = write(p, X).read_bytes()
    at = data.index(b'\x08\x00\x16\x00UI')
    sequence = struct.pack('<HH2sHI', 8, 0x1140, b'SQ', 0, 0xFFFFFFFF) + struct.pack('<HHI', 0xFFFE, 0xE000, 0xFFFFFFFF)
    p.write_bytes(data[:at] + sequence*3000 + data[at:])

def header_with(element, name='explicit', deflated=False):
    "A file with one more element before its pixels"
    def make(p):
        data = write(p, X, 'deflated' if deflated else name).read_bytes()
        if not deflated:
            at = before_pixels(p)
            return p.write_bytes(data[:at] + element + data[at:])
        at = 144 + struct.unpack('<I', data[140:144])[0]
        body = zlib.decompress(data[at:], -15)
        end = body.rindex(b'\xe0\x7f\x10\x00')
        z = zlib.compressobj(9, wbits=-15)
        p.write_bytes(data[:at] + z.compress(body[:end] + element + body[end:]) + z.flush())
    return make

def items(tag, n):
    "A sequence of empty items, of undefined length"
    head = struct.pack('<HH2sHI', *tag, b'SQ', 0, 0xFFFFFFFF)
    return head + struct.pack('<HHI', 0xFFFE, 0xE000, 0)*n + struct.pack('<HHI', 0xFFFE, 0xE0DD, 0)

PARTS = ('data set: found more than 16,000 elements and items', 'as PS3.5 lays them out')
CHARSETS = struct.pack('<HH2sHI', 8, 5, b'UT', 0, 3_000_000) + b'A\\'*1_500_000
BAD['empty_items'] = header_with(items((0x54, 0x220), 100_000)), PARTS
BAD['deflated_items'] = header_with(items((0x54, 0x220), 450_000), deflated=True), PARTS
BAD['deflated_elements'] = header_with(struct.pack('<HH2sH', 0x54, 9, b'UI', 0)*450_000, deflated=True), PARTS
BAD['character_sets'] = header_with(CHARSETS, deflated=True), ('bytes of character sets',)
BAD['items_of_a_table'] = (header_with(struct.pack('<HH2sHI', 0x28, 0x3010, b'SQ', 0, 800_000)
                                       + struct.pack('<HHI', 0xFFFE, 0xE000, 0)*100_000),
                           ('VOILUTSequence (0028,3010): found a value that cannot be read',))

@bad('PixelData (7FE0,0010)', 'more than 16,384 fragments')
def empty_fragments(p):
    write(p, X, 'rle')
    data, at = p.read_bytes(), before_pixels(p) + 12
    p.write_bytes(data[:at] + struct.pack('<HHI', 0xFFFE, 0xE000, 0)*100_000 + data[at:])

@bad('deflated data set', 'at least 511,838 bytes for 255,919,344 bytes of pixels')
def deflated_pixels(p):
    "A quarter of a gigabyte of black pixels in as many kilobytes"
    sized('explicit', 16284, 7858)(p)
    relabel(p, '1.2.840.10008.1.2.1.99')
    data, end = p.read_bytes(), before_pixels(p)
    start = 144 + struct.unpack('<I', data[140:144])[0]
    z = zlib.compressobj(9, wbits=-15)
    head = data[start:end] + b'\xe0\x7f\x10\x00OW\0\0' + struct.pack('<I', 255919344)
    body = [z.compress(head)] + [z.compress(bytes(1 << 20)) for _ in range(245)]
    p.write_bytes(data[:start] + b''.join(body) + z.flush())

# ---- all of them

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    root, out = tmp_path_factory.mktemp('hostile'), {}
    for name,(make,_) in BAD.items():
        make(root/f'{name}.dcm')
        out[name] = root/f'{name}.dcm'
    return out

def test_there_are_enough():
    assert len(BAD) >= 25

@pytest.mark.parametrize('name', BAD)
def test_the_right_error(name, files):
    "Seconds of this process, and bytes in a second reading: tracing them makes Python several times slower"
    path, words = files[name], BAD[name][1]
    start = time.process_time()
    with pytest.raises(DicomError) as e:
        read_mammogram(path)
    seconds = time.process_time() - start
    tracemalloc.start()
    try:
        with pytest.raises(DicomError):
            read_mammogram(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    for w in (path.name, *words):
        assert w in str(e.value)
    assert isinstance(e.value, InputError) and e.value.where == str(path) and e.value.what and e.value.expected
    size = path.stat().st_size if path.is_file() else 0
    assert seconds < 1 and peak < 3*size + 12e6, (seconds, peak)

@pytest.mark.parametrize('name', BAD)
def test_the_header_reader_agrees(name, files):
    "Nothing of the pixels is decoded, so a bad frame goes unseen; all else raises the same error"
    try:
        read_header(files[name])
    except DicomError as e:
        assert all(w in str(e) for w in BAD[name][1])
    else:
        pixels = ('compressed frame', 'fragment', 'without an end', 'an item')
        assert any(w in ' '.join(BAD[name][1]) for w in pixels)

def python(program, *args):
    "Run a program in a process of its own"
    command = [sys.executable, '-c', program, *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)

UNDER_A_LIMIT = '''
import resource, sys
from pathlib import Path
from mammo_nb.dicom.mammogram import read_mammogram
from mammo_nb.dicom.file import DicomError
size = int(next(l for l in open('/proc/self/status') if l.startswith('VmSize')).split()[1])*1024
resource.setrlimit(resource.RLIMIT_AS, (size + (96 << 20),)*2)
for p in sorted(Path(sys.argv[1]).iterdir()):
    try: read_mammogram(p); print(p.name, 'was read')
    except DicomError as e: n = str(e)
    except BaseException as e: print(p.name, type(e).__name__, e)

print('done')
'''

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc to know how much memory a process has')
def test_under_a_memory_limit(files):
    "All of them in one process that may take 96 MiB more than after importing, with what C and Rust allocate"
    root = next(iter(files.values())).parent
    r = python(UNDER_A_LIMIT, str(root))
    assert r.stdout.split('\n')[:-1] == ['done'], r.stdout + r.stderr[-2000:]

FUZZ = '''
import sys
sys.path.insert(0, 'tests')
import numpy as np, dicom_factory as factory
from pathlib import Path
from mammo_nb.dicom.mammogram import read_stored
from mammo_nb.dicom.file import DicomError
name, path = sys.argv[1], Path(sys.argv[2])
bits, rng, n = 8 if name == 'baseline' else 12, np.random.default_rng(7), [0, 0]
good = bytearray(factory.write(path, factory.image(bits=bits), name, bits).read_bytes())
for i in range(150):
    data = bytearray(good)
    for _ in range(rng.integers(1, 6)): data[rng.integers(132, len(data))] = rng.integers(256)
    path.write_bytes(data[:rng.integers(len(data))] if rng.random() < .2 else data)
    try: n[0] += read_stored(path).pixels.shape == (37, 53)
    except DicomError: n[1] += 1

print('read', n[0], 'refused', n[1])
'''

@pytest.mark.parametrize('name', factory.UIDS)
def test_random_damage(name, tmp_path):
    "150 files with a few random bytes changed or their end missing: an image or a `DicomError`, never a crash"
    r = python(FUZZ, name, str(tmp_path/'x.dcm'))
    assert r.returncode == 0, r.stderr[-2000:]
    read, refused = int(r.stdout.split()[1]), int(r.stdout.split()[3])
    assert refused >= 20 and read + refused <= 150 and 'Warning' not in r.stderr

# ---- a broken window is not the end

def test_a_broken_window_can_be_left_out(tmp_path):
    path = write(tmp_path/'x.dcm', X, WindowCenter='', WindowWidth='')
    assert read_mammogram(path, 'minmax', window=None).pixels.max() == 1
    assert read_header(path, window=None).view == 'CC'
    with pytest.raises(DicomError):
        read_mammogram(path, 'minmax')
