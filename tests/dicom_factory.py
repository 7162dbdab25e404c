"""Writes small DICOM files in every transfer syntax, good and bad, with nothing but what the library needs itself.

Two encoders are written out here, since no Python package has them: JPEG lossless (process 14, any predictor) and
sequential DCT JPEG with 8 or 12 bits (baseline, extended). They are plain and slow: the images are small.
"""
import io, struct
from pathlib import Path
import numpy as np
import jpeg_ls
from openjpeg.utils import encode_array as encode_j2k
from pydicom import DataElement, dcmread, dcmwrite
from pydicom.config import disable_value_validation
from pydicom.encaps import encapsulate
from pydicom.uid import UID
from rle.utils import encode_pixel_data as encode_rle
from mammo_nb.dicom.write import write_mammogram

UIDS = dict(
    implicit='1.2.840.10008.1.2', explicit='1.2.840.10008.1.2.1',
    big='1.2.840.10008.1.2.2', deflated='1.2.840.10008.1.2.1.99',
    rle='1.2.840.10008.1.2.5',
    baseline='1.2.840.10008.1.2.4.50', extended='1.2.840.10008.1.2.4.51',
    lossless='1.2.840.10008.1.2.4.57', lossless_sv1='1.2.840.10008.1.2.4.70',
    jpegls='1.2.840.10008.1.2.4.80', jpegls_near='1.2.840.10008.1.2.4.81',
    j2k='1.2.840.10008.1.2.4.90', j2k_lossy='1.2.840.10008.1.2.4.91',
)
NATIVE = ('implicit', 'explicit', 'big', 'deflated')

def image(rows=37, columns=53, bits=12, signed=False, seed=0):
    "A disc with noise and the two extreme values, stored values of `bits` bits"
    rng = np.random.default_rng(seed)
    r, c = np.mgrid[:rows, :columns]
    disc = np.clip(1-np.hypot((r-rows/2)/rows, c/columns), 0, 1)**.5
    x = .15 + .6*disc + .01*rng.standard_normal((rows, columns))
    largest = (1 << bits)-1
    x = np.clip(x*largest, 0, largest).astype(np.int64)
    x[0, 0], x[-1, -1] = 0, largest
    if signed:
        return (x - (1 << bits-1)).astype(np.int8 if bits <= 8 else np.int16)
    return x.astype(np.uint8 if bits <= 8 else np.uint16)

# ---- JPEG, written out

def _segment(marker, body):
    return struct.pack('>BBH', 0xFF, marker, len(body)+2) + body

def _fixed_codes(symbols, length):
    "A Huffman table whose codes all have the same length: {symbol: (code, length)}, and its DHT body"
    assert len(symbols) < 1 << length
    assert len(symbols) < 256
    counts = bytes(len(symbols) if i+1 == length else 0 for i in range(16))
    return {s: (i, length) for i, s in enumerate(symbols)}, counts + bytes(symbols)

def _pack(bits):
    "Bits (value, length) as bytes, with the stuffing of a JPEG scan"
    text = ''.join(f'{v:0{n}b}' for v, n in bits if n)
    text += '1'*(-len(text) % 8)
    if not text:
        return b''
    return int(text, 2).to_bytes(len(text)//8, 'big').replace(b'\xff', b'\xff\x00')

def _magnitude(v):
    "JPEG category of a difference and its additional bits (T.81 F.1.2.1)"
    n = int(abs(v)).bit_length()
    return n, (v if v >= 0 else v + (1 << n)-1)

def _predict(x, bits, predictor):
    "What each pixel is predicted to be from its neighbours (T.81 table H.1)"
    a, b, c = np.roll(x, 1, 1), np.roll(x, 1, 0), np.roll(np.roll(x, 1, 0), 1, 1)
    p = {
        1: a, 2: b, 3: c, 4: a+b-c, 5: a+((b-c) >> 1), 6: b+((a-c) >> 1), 7: (a+b) >> 1,
    }[predictor].copy()
    p[0, 1:], p[1:, 0], p[0, 0] = x[0, :-1], x[:-1, 0], 1 << bits-1
    return p

def jpeg_lossless(x, bits, predictor=1):
    "Process 14 of T.81 annex H"
    x = x.astype(np.int64) & ((1 << bits)-1)
    d = (x - _predict(x, bits, predictor)) & 0xFFFF
    d = np.where(d > 32768, d-65536, d)
    codes, dht = _fixed_codes(range(17), 5)
    out = []
    for v in d.ravel().tolist():
        n, extra = (16, 0) if v == 32768 else _magnitude(v)
        out += [codes[n], (extra, n if n < 16 else 0)]
    sof = _segment(0xC3, struct.pack('>BHHB3B', bits, *x.shape, 1, 1, 0x11, 0))
    sos = _segment(0xDA, struct.pack('>B2B3B', 1, 1, 0, predictor, 0, 0))
    return b'\xff\xd8' + _segment(0xC4, b'\0' + dht) + sof + sos + _pack(out) + b'\xff\xd9'

_BASIS = np.sqrt(2/8)*np.cos((2*np.arange(8)[None]+1)*np.arange(8)[:, None]*np.pi/16)
_BASIS[0] /= np.sqrt(2)
_ZIGZAG = sorted(range(64), key=lambda i: (i//8+i%8, i//8 if (i//8+i%8) % 2 else i%8))
_DC_CODES, _DC = _fixed_codes(range(16), 5)
_AC_CODES, _AC = _fixed_codes([0, 0xF0] + [r << 4 | s for r in range(16) for s in range(1, 15)], 9)

def _ac_bits(coefficients):
    "The codes of the 63 coefficients after the first of a block"
    out, run = [], 0
    for v in coefficients:
        if v == 0:
            run += 1
            continue
        out += [_AC_CODES[0xF0]]*(run//16)
        n, extra = _magnitude(v)
        out += [_AC_CODES[(run % 16) << 4 | n], (extra, n)]
        run = 0
    return out + ([_AC_CODES[0]] if run else [])

def jpeg_dct(x, bits, step=1):
    "Sequential DCT of T.81 annex F, 8 bits (SOF0) or 12 bits (SOF1), one quantiser step for all coefficients"
    rows, columns = x.shape
    full = np.pad(x.astype(float) - (1 << bits-1), ((0, -rows % 8), (0, -columns % 8)), mode='edge')
    out, last = [], 0
    for r in range(0, full.shape[0], 8):
        for c in range(0, full.shape[1], 8):
            q = np.rint(_BASIS @ full[r:r+8, c:c+8] @ _BASIS.T/step).astype(int).ravel()[_ZIGZAG].tolist()
            n, extra = _magnitude(q[0]-last)
            last = q[0]
            out += [_DC_CODES[n], (extra, n)] + _ac_bits(q[1:])
    tables = _segment(0xDB, b'\0' + bytes([step]*64)) + _segment(0xC4, b'\0' + _DC) + _segment(0xC4, b'\x10' + _AC)
    claim = struct.pack('>BHHB3B', bits, rows, columns, 1, 1, 0x11, 0)
    sof = _segment(0xC0 if bits == 8 else 0xC1, claim)
    sos = _segment(0xDA, struct.pack('>B2B3B', 1, 1, 0, 0, 63, 0))
    return b'\xff\xd8' + tables + sof + sos + _pack(out) + b'\xff\xd9'

# ---- frames and files

def encode(x, name, bits, near=3):
    "The bytes of one frame: native pixels or a compressed frame"
    cells = x.view(f'u{x.itemsize}')
    if name in NATIVE:
        return (cells.astype('>u2') if name == 'big' and x.itemsize == 2 else cells).tobytes()
    if name == 'rle':
        size = dict(rows=x.shape[0], columns=x.shape[1], samples_per_pixel=1, number_of_frames=1)
        return bytes(encode_rle(cells.tobytes(), bits_allocated=8*x.itemsize, byteorder='<', **size))
    if name in ('baseline', 'extended'):
        return jpeg_dct(cells, 8 if name == 'baseline' else bits)
    if name.startswith('lossless'):
        return jpeg_lossless(cells, bits, 1 if name == 'lossless_sv1' else 4)
    if name.startswith('jpegls'):
        masked = cells & cells.dtype.type((1 << bits)-1)
        return bytes(jpeg_ls.encode_array(masked, near if name == 'jpegls_near' else 0))
    options = dict(compression_ratios=[4]) if name == 'j2k_lossy' else {}
    return bytes(encode_j2k(x, bits_stored=bits, photometric_interpretation=2, codec_format=0, **options))

def write(path, x, name='explicit', bits=12, signed=False, frame=None, fragments=1, **extra):
    "A mammogram of stored values `x` in transfer syntax `name`; `extra` sets elements, `None` deletes them"
    path = Path(path)
    write_mammogram(path, np.zeros(x.shape, np.uint16), 'L', 'CC', 'P1', 'E1', bits_stored=12)
    ds = dcmread(path)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8*x.itemsize, bits, bits-1
    ds.PixelRepresentation = int(signed)
    ds.file_meta.TransferSyntaxUID = UID(UIDS[name])
    frame = encode(x, name, bits) if frame is None else frame
    native = name in NATIVE
    if native:
        ds.PixelData = frame + b'\0'*(len(frame) % 2)
    else:
        ds.PixelData = encapsulate([frame], fragments_per_frame=fragments)
    ds['PixelData'].VR = 'OW' if x.itemsize == 2 and native or name == 'implicit' else 'OB'
    ds['PixelData'].is_undefined_length = not native
    buffer = io.BytesIO()
    with disable_value_validation(): # windows that are no numbers and the like
        _set_elements(ds, extra)
        dcmwrite(buffer, ds, implicit_vr=name == 'implicit', little_endian=name != 'big', enforce_file_format=True)
    path.write_bytes(buffer.getvalue())
    return path

def _set_elements(ds, extra):
    for keyword, value in extra.items():
        if isinstance(value, DataElement):
            ds.add(value)
        elif value is not None:
            setattr(ds, keyword, value)
        elif keyword in ds:
            delattr(ds, keyword)
