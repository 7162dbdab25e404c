"""Hostile DICOM files made by mutation, and a reader of them that keeps all that the library says.

Run as a program it reads the files that are named on its standard input, under a limit of memory, and prints a line of
JSON for each: what became of it, the seconds, and every word that left the library.
"""
import io, json, logging, resource, struct, sys, time, traceback, warnings, zlib
from dataclasses import dataclass, replace
from pathlib import Path
import numpy as np
from pydicom import dcmread
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
import dicom_factory as factory

SEED = 20
MEMORY, SECONDS = 500 << 20, 5

PLANTED = dict(
    PatientName='Zyxwvut^Quentin', PatientID='MRN-7730194', PatientBirthDate='19430817', PatientAddress='Elmenhorst 12',
    OtherPatientIDs='SSN-5550123', PatientTelephoneNumbers='0815-4711997', PatientComments='afraid of needles',
    PatientMotherBirthName='Grimaldi', InstitutionName='Kloster Ettal Klinik', InstitutionAddress='Ammergau',
    ReferringPhysicianName='Brackwasser^Odo', OperatorsName='Tekla^Anna', StationName='KABINE-SIEBEN',
    DeviceSerialNumber='998877665', AccessionNumber='ACC-60718293', StudyID='STUDIE-55', StudyDate='20170923',
    StudyDescription='fuer Frau Zyxwvut', SeriesDescription='Zyxwvut L CC', ImageComments='Quentin, 2. Aufnahme',
    StudyInstanceUID='1.2.826.0.1.3680043.77301945.1',
)
WORDS = ('zyxwvut', 'quentin', '7730194', '19430817', 'elmenhorst', '5550123', '4711997', 'needles', 'grimaldi', 'kloster',
         'ettal', 'ammergau', 'brackwasser', 'tekla', 'kabine', '998877665', '60718293', 'studie', '20170923', 'aufnahme')
TYPED = ('Zyxwvut, Quentin, born 19430817', 'ZYXWVUT^QUENTIN', '19430817', 'zyxwvut', '1.2.826.0.1.3680043.77301945.1',
         'Kloster Ettal Klinik\\Brackwasser', 'MRN-7730194')

# ---- good files, full of names

def _table(n, bits):
    item = Dataset()
    item.LUTDescriptor, item.LUTExplanation = [n, 0, bits], 'NORMAL'
    item.LUTData = np.linspace(0, (1 << bits)-1, n).astype('<u2').tobytes()
    return item

def _code(value):
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, 'SRT', 'a view'
    return item

def _view():
    item = _code('R-10242')
    item.ViewModifierCodeSequence = [_code('R-40AB3')]
    return item

def _request():
    item = Dataset()
    item.RequestingPhysician, item.RequestedProcedureComments = 'Brackwasser^Odo', 'Frau Zyxwvut'
    return item

SHAPE = (40, 36)
WITH = dict(
    ViewCodeSequence=[_view()], RequestAttributesSequence=[_request()], Manufacturer='ACME', WindowCenter=[2000, 1000],
    WindowWidth=[3000, 500], WindowCenterWidthExplanation=['NORMAL', 'HARDER'], ImagerPixelSpacing=[.07, .07],
    EstimatedRadiographicMagnificationFactor=1.05, ImageLaterality='L', ViewPosition='CC', PatientOrientation=['A', 'R'],
)

@dataclass
class Parts:
    "A file in parts: preamble and meta information, the data set up to the pixels, the pixel element"
    name: str       # of the transfer syntax, in `factory.UIDS`
    head: bytes
    body: bytes
    pixels: bytes

    @property
    def order(self): return '>' if self.name == 'big' else '<'

    def bytes(self):
        data = self.body + self.pixels
        if self.name == 'deflated':
            z = zlib.compressobj(9, wbits=-15)
            data = z.compress(data) + z.flush()
        return self.head + data

def good_file(folder, name, **tags):
    "A good file in a transfer syntax, in parts"
    bits = 8 if name == 'baseline' else 12
    x = factory.image(*SHAPE, bits=bits)
    data = factory.write(folder/'good.dcm', x, name, bits, **{**PLANTED, **WITH, **tags}).read_bytes()
    end = 144 + struct.unpack('<I', data[140:144])[0]
    body = data[end:]
    if name == 'deflated':
        body = zlib.decompress(body, -15)
    at = body.rindex(b'\x7f\xe0\0\x10' if name == 'big' else b'\xe0\x7f\x10\0')
    return Parts(name, data[:end], body[:at], body[at:])

LONG = (b'OB', b'OW', b'SQ', b'UN', b'UT', b'OF', b'OD', b'UC', b'UR')

def elements(parts):
    "(where the tag begins, tag, where the length is, its bytes, where the value begins, length) at the top level"
    at, body, order = 0, parts.body, parts.order
    while at + 8 <= len(body):
        tag = struct.unpack(order+'HH', body[at:at+4])
        if parts.name == 'implicit' or body[at+4:at+6] in LONG:
            where = at + (4 if parts.name == 'implicit' else 8)
            n = struct.unpack(order+'I', body[where:where+4])[0]
            size = 4
        else:
            where, size = at+6, 2
            n = struct.unpack(order+'H', body[where:where+2])[0]
        yield at, tag, where, size, where+size, n
        at = where + size + n

# ---- mutations: each a function of (random numbers, parts) that gives the bytes of a file

MUTATIONS = []

def mutation(f):
    MUTATIONS.append(f)
    return f

def pick(rng, things):
    things = list(things)
    return things[rng.integers(len(things))]

def put(data, at, new):
    return data[:at] + new + data[at+len(new):]

@mutation
def some_bytes(rng, p):
    data = p.bytes()
    for _ in range(rng.integers(1, 8)):
        data = put(data, int(rng.integers(132, len(data))), bytes([rng.integers(256)]))
    return data

@mutation
def bytes_of_the_header(rng, p):
    body = p.body
    for _ in range(rng.integers(1, 6)):
        body = put(body, int(rng.integers(len(body))), bytes([pick(rng, (0, 1, 255, 92, 94, rng.integers(256)))]))
    return replace(p, body=body).bytes()

@mutation
def bytes_of_the_frame(rng, p):
    pixels = p.pixels
    for _ in range(rng.integers(1, 6)):
        pixels = put(pixels, int(rng.integers(8, min(len(pixels), 200))), bytes([rng.integers(256)]))
    return replace(p, pixels=pixels).bytes()

@mutation
def one_byte_of_a_length(rng, p):
    "The fault that put a name into an error: an element that swallows those after it"
    _, _, where, size, _, _ = pick(rng, elements(p))
    value = pick(rng, (0, 1, 2, 16, 63, 64, 100, 127, 200, 255, rng.integers(256)))
    return replace(p, body=put(p.body, int(where + rng.integers(size)), bytes([value]))).bytes()

def _code_elements(p):
    wanted = {(8, 5), (8, 8), (8, 0x16), (8, 0x60), (8, 0x68), (0x18, 0x5101), (0x20, 0x20), (0x20, 0x62), (0x28, 4),
              (0x28, 0x1050), (0x28, 0x1051), (0x28, 0x1055), (8, 0x70), (0x18, 0x1164)}
    return [e for e in elements(p) if e[1] in wanted]

@mutation
def a_code_that_swallows(rng, p):
    _, _, where, size, _, n = pick(rng, _code_elements(p))
    length = struct.pack(p.order + ('H' if size == 2 else 'I'), n + 2*int(rng.integers(1, 200)))
    return replace(p, body=put(p.body, where, length)).bytes()

@mutation
def a_whole_length(rng, p):
    _, _, where, size, _, _ = pick(rng, elements(p))
    largest = (1 << 8*size) - 1
    value = pick(rng, (0, 1, largest, largest-1, largest//2, rng.integers(largest)))
    return replace(p, body=put(p.body, where, struct.pack(p.order + 'HI'[size//4], int(value)))).bytes()

@mutation
def a_tag(rng, p):
    "An element under the tag of another one: a name as a code, a date as a number"
    one, other = pick(rng, elements(p)), pick(rng, _code_elements(p))
    return replace(p, body=put(p.body, one[0], struct.pack(p.order+'HH', *other[1]))).bytes()

@mutation
def a_type(rng, p):
    at, *_ = pick(rng, elements(p))
    vr = pick(rng, (b'PN', b'LO', b'DS', b'IS', b'US', b'UL', b'FD', b'OB', b'UT', b'SQ', b'UN', b'AT', b'ZZ', b'\0\0'))
    return replace(p, body=put(p.body, at+4, vr)).bytes()

@mutation
def elements_moved(rng, p):
    "Elements that are gone, twice there, or in another order"
    cuts = [e[0] for e in elements(p)] + [len(p.body)]
    blocks = [p.body[a:b] for a, b in zip(cuts, cuts[1:])]
    for _ in range(rng.integers(1, 4)):
        i, j = rng.integers(len(blocks), size=2)
        what = rng.integers(3)
        if what == 0:
            blocks.pop(i)
        else:
            blocks.insert(i, blocks[j] if what == 1 else blocks.pop(j))
    return replace(p, body=b''.join(blocks)).bytes()

@mutation
def cut(rng, p):
    data = p.bytes()
    return data[:int(rng.integers(len(data)))]

@mutation
def cut_and_filled(rng, p):
    data = p.bytes()
    at = int(rng.integers(132, len(data)))
    return data[:at] + pick(rng, (b'\0', b'\xff', b'\xfe\xff\0\xe0\0\0\0\0'))*int(rng.integers(1, 4000))

@mutation
def fragments(rng, p):
    "Items of an encapsulated frame, or native pixels that claim to be one"
    item, end = b'\xfe\xff\0\xe0', b'\xfe\xff\xdd\xe0\0\0\0\0'
    start = 8 if p.name == 'implicit' else 12
    head, frame = p.pixels[:start], p.pixels[start:]
    empty = item + bytes(4)
    choices = [
        head + empty*int(rng.integers(1, 9)) + frame,
        head + empty*20000 + end,
        head + frame.replace(item, bytes(4), 1),
        head + frame.replace(item, end, 1),
        head + frame[:-8],
        put(p.pixels, start-4, b'\xff\xff\xff\xff'),
        put(p.pixels, start-4, struct.pack(p.order+'I', int(rng.integers(1 << 32)))),
        put(p.pixels, min(start+4, len(p.pixels)-4), struct.pack('<I', int(rng.integers(1 << 20)))),
        put(p.pixels, min(start+12, len(p.pixels)-4), struct.pack('<I', int(pick(rng, (0, 7, 1 << 31, (1 << 32)-1))))),
    ]
    return replace(p, pixels=pick(rng, choices)).bytes()

FRAMES = {}

def frame_of(name, bits, signed):
    "A frame in some coding, made once"
    if (name, bits, signed) not in FRAMES:
        x = factory.image(*SHAPE, bits=bits, signed=signed)
        FRAMES[name, bits, signed] = x, factory.encode(x, name, bits)
    return FRAMES[name, bits, signed]

def _rewritten(p, frame=None, **tags):
    "The file of a family, written again with other elements or another frame"
    path = Path(good_file.folder)/'again.dcm'
    bits = 8 if p.name == 'baseline' else 12
    x = factory.image(*SHAPE, bits=bits)
    with disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        factory.write(path, x, p.name, bits, frame=frame, **{**PLANTED, **WITH, **tags})
    return path.read_bytes()

@mutation
def header_against_frame(rng, p):
    tags = dict(
        Rows=pick(rng, (0, 1, 39, 41, 80, 16384, 60000)), Columns=pick(rng, (0, 1, 35, 37, 72, 16384)),
        BitsAllocated=pick(rng, (1, 8, 12, 16, 32)), BitsStored=pick(rng, (0, 1, 7, 8, 10, 13, 16, 17)),
        HighBit=pick(rng, (0, 7, 9, 12, 15, 16)), PixelRepresentation=pick(rng, (0, 1, 2)),
        NumberOfFrames=pick(rng, (0, 1, 2, 77301945)), SamplesPerPixel=pick(rng, (0, 1, 3)),
    )
    keys = rng.permutation(list(tags))[:rng.integers(1, 4)]
    return _rewritten(p, **{str(k): tags[k] for k in keys})

@mutation
def a_frame_of_other_bits(rng, p):
    "Precision and sign of the frame are not those of the header"
    bits, signed = int(pick(rng, (8, 10, 12, 14, 16))), bool(rng.integers(2))
    name = 'lossless' if p.name == 'baseline' or p.name == 'extended' else p.name
    return _rewritten(replace(p, name=name), frame_of(name, bits, signed)[1])

@mutation
def a_frame_of_another_family(rng, p):
    name = pick(rng, ('explicit', 'rle', 'lossless', 'jpegls', 'j2k'))
    return _rewritten(p, frame_of(name, 12, False)[1])

@mutation
def another_syntax(rng, p):
    uid = pick(rng, (*factory.UIDS.values(), *TYPED, '1.2.840.10008.1.2.4.100', ''))
    old = factory.UIDS[p.name].encode()
    at = p.head.rindex(old)
    size = len(old) + len(old) % 2
    return replace(p, head=put(p.head, at, uid.encode()[:size].ljust(size, b'\0'))).bytes()

@mutation
def typed_text(rng, p):
    "Texts of people in fields for codes, identifiers and numbers"
    keywords = ('Modality', 'SOPClassUID', 'PhotometricInterpretation', 'ImageLaterality', 'Laterality', 'ViewPosition',
                'PatientOrientation', 'PresentationIntentType', 'ImageType', 'BodyPartExamined', 'VOILUTFunction',
                'PresentationLUTShape', 'PixelSpacingCalibrationType', 'BurnedInAnnotation', 'SpecificCharacterSet')
    return _rewritten(p, **{pick(rng, keywords): pick(rng, TYPED) for _ in range(2)})

@mutation
def numbers(rng, p):
    "Windows, scales and spacings at the ends of what can be written"
    values = ('1e308', '-1e308', '1e-308', '0', '-1', '1', '0.5', '1e12', 'NaN', 'inf', '19430817', '1e9', '', '7730194')
    keywords = ('RescaleSlope', 'RescaleIntercept', 'EstimatedRadiographicMagnificationFactor')
    tags = {k: pick(rng, values) for k in keywords if rng.random() < .3}
    tags |= {k: [pick(rng, values)]*int(rng.integers(1, 3)) for k in ('WindowCenter', 'WindowWidth', 'ImagerPixelSpacing')
             if rng.random() < .5}
    return _rewritten(p, **tags, VOILUTFunction=pick(rng, (None, 'LINEAR', 'LINEAR_EXACT', 'SIGMOID')))

@mutation
def tables(rng, p):
    item = _table(int(pick(rng, (1, 16, 4096))), 16)
    n = len(item.LUTData)//2
    first = int(pick(rng, (0, 100, 65535)))
    item.LUTDescriptor = [int(pick(rng, (n, n, n+1, 0))), first, int(pick(rng, (8, 10, 12, 16, 16, 0, 17)))]
    keyword = pick(rng, ('VOILUTSequence', 'ModalityLUTSequence'))
    return _rewritten(p, **{keyword: [item]*int(rng.integers(1, 3))})

@mutation
def many_parts(rng, p):
    "Empty items and elements by the ten thousand, in sequences that are read and in others"
    if p.name in ('implicit', 'big'):
        return cut(rng, p)
    n = 32000 if p.name != 'deflated' else 400000
    item = struct.pack('<HHI', 0xFFFE, 0xE000, 0)
    parts = pick(rng, (item*n, item[:4] + struct.pack('<I', 8*n) + struct.pack('<HH2sH', 8, 0x14, b'UI', 0)*n))
    tag = pick(rng, ((8, 0x1140), (0x28, 0x3010), (0x54, 0x220)))
    endless = bool(rng.integers(2))
    length = 0xFFFFFFFF if endless else len(parts)
    element = struct.pack('<HH2sHI', *tag, b'SQ', 0, length) + parts
    if endless:
        element += struct.pack('<HHI', 0xFFFE, 0xE0DD, 0)
    return replace(p, body=p.body + element).bytes()

def hostile_files(folder, each):
    "`each` files of every family of mutations, written into a folder: name -> path"
    folder = Path(folder)
    good_file.folder = folder
    rng = np.random.default_rng(SEED)
    bases = {name: good_file(folder, name) for name in factory.UIDS}
    paths = {}
    for mutate in MUTATIONS:
        for i in range(each):
            base = bases[list(bases)[i % len(bases)]]
            path = folder/f'{mutate.__name__}-{i:03d}-{base.name}.dcm'
            path.write_bytes(mutate(rng, base))
            paths[path.stem] = path
    for name in ('good.dcm', 'again.dcm'):
        (folder/name).unlink(missing_ok=True)
    return paths

# ---- reading

def sane(stored, unit):
    "What is wrong with an image that was read, in words; nothing if it is a good one"
    g = stored.header.geometry
    low, high = (-(1 << g.bits_stored-1), 1 << g.bits_stored-1) if g.signed else (0, 1 << g.bits_stored)
    yield from (['shape'] if stored.pixels.shape != (g.rows, g.columns) else [])
    yield from (['stored value'] if stored.pixels.min() < low or stored.pixels.max() >= high else [])
    for preset, grey in unit.items():
        fine = np.isfinite(grey).all() and grey.min() >= 0 and grey.max() <= 1
        yield from ([] if fine and grey.dtype == np.float32 else [preset])

def read_one(path):
    "(`read`, `refused` or what went wrong; every text of the result)"
    from mammo_nb.core.errors import InputError
    from mammo_nb.dicom.mammogram import read_stored
    try:
        stored = read_stored(path)
        unit = {preset: stored.to_unit(stored.pixels, preset) for preset in ('voi_lut', 'minmax')}
    except InputError as e:
        said = [str(e), repr(e), repr(vars(e)), traceback.format_exc()]
        return ('MemoryError' if 'MemoryError' in str(e) else 'refused'), said
    except BaseException as e:
        return f'{type(e).__name__}: {e}', [traceback.format_exc()]
    wrong = list(sane(stored, unit))
    header = stored.header
    said = [repr(header.notes), repr(replace(header, tags={}))]
    if not path.stem.startswith(('a_tag', 'typed_text', 'numbers')): # else the file says so, in the right place
        said += [repr(header.tags), repr(stored.transfer)]
    return (f'wrong {", ".join(wrong)}' if wrong else 'read'), said

def main():
    "Read the files named on the standard input"
    import mammo_nb.dicom.mammogram # before the limit is set
    size = int(next(l for l in open('/proc/self/status') if l.startswith('VmSize')).split()[1])*1024
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,)*2)
    log = io.StringIO()
    logging.basicConfig(stream=log, level=logging.DEBUG)
    for line in sys.stdin:
        path = Path(line.strip())
        log.seek(0)
        log.truncate()
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter('always')
            outcome, said = read_one(path)
        seconds = time.perf_counter() - start
        said += [log.getvalue(), *(str(w.message) for w in warned)]
        print(json.dumps(dict(name=path.stem, outcome=outcome, seconds=seconds, said='\n'.join(said))), flush=True)

if __name__ == '__main__':
    main()
