"""The cache is never stale, never half-written, and the same whoever fills it."""
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.core.errors import InputError
from mammo_nb.dicom import grey_levels
from mammo_nb.dicom.write import write_mammogram
import mammo_nb.preparation.breast_mask as breast_mask_module
from mammo_nb.preparation import cache as module
import mammo_nb.preparation.prepare as prepare_module
from mammo_nb.preparation.cache import Cache, CacheError, pack_entry, read_pixels, unpack_entry
from mammo_nb.preparation.prepare import PrepareConfig, prepare
from mammo_nb.preparation.prepared_cohort import PreparedCohort, prepare_cohort
from mammo_nb.preparation.sources import image_size

CONFIG = PrepareConfig(size=(96, 64))
ROOT = Path(__file__).parents[1]

def draw(path, seed=0, side='L', rows=300, cols=200):
    y, x = np.mgrid[:rows, :cols]
    depth = np.clip(1 - (x/(.6*cols))**2 - ((y-.5*rows)/(.4*rows))**2, 0, None)**.4
    grain = np.random.default_rng(seed).integers(0, 600, (rows, cols))
    pixels = (3000*depth + (depth > 0)*grain).astype(np.uint16)
    return write_mammogram(path, pixels if side == 'L' else pixels[:, ::-1].copy(), side, 'CC', pixel_spacing_mm=.5)

def draw_cohort(folder, n=8):
    rows = []
    for i in range(n):
        side = 'LR'[i % 2]
        draw(folder/f'{i}.dcm', i, side)
        rows.append(dict(image_id=str(i), patient_id=f'p{i//2}', exam_id=f'e{i//2}', laterality=side, view='CC', path=f'{i}.dcm'))
    return Cohort(pd.DataFrame(rows), None, folder)

def prepare_quietly(cohort, folder, workers=1):
    return prepare_cohort(cohort, folder, CONFIG, workers, progress=False)

def entries(cache):
    return {path.name: path.read_bytes() for path in Path(cache).glob('entries/*/*')}

@pytest.fixture
def trusting(monkeypatch):
    "A cache that keeps the checksum of a file at once"
    monkeypatch.setattr(module, '_RACY_NS', 0)

@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path/'c')

@pytest.fixture
def film(tmp_path):
    return draw(tmp_path/'a.dcm')

# ---- reading

def test_broken_png_files(tmp_path, film, monkeypatch):
    good = tmp_path/'good.png'
    Image.fromarray(read_pixels(film).pixels.astype(np.uint16)).save(good)
    (tmp_path/'text.png').write_text('no image')
    (tmp_path/'cut.png').write_bytes(good.read_bytes()[:2000])
    for name in ('text.png', 'cut.png'):
        with pytest.raises(InputError, match=f'{name}: image: found'):
            read_pixels(tmp_path/name)
    with pytest.raises(FileNotFoundError):
        read_pixels(tmp_path/'missing.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(InputError, match='like that of a decompression bomb'):
        read_pixels(good)


GREY = {'png': {}, 'pgm': {}, 'tif': {}, 'lzw.tif': dict(compression='tiff_lzw'), 'deflate.tif': dict(compression='tiff_deflate')}


@pytest.mark.parametrize('ending', GREY)
def test_damaged_bytes_of_a_plain_image_are_a_failure_of_the_file(tmp_path, ending, capfd):
    "Pillow's ValueError, TypeError and others ended the command"
    rng = np.random.default_rng(0)
    path = tmp_path/f'a.{ending}'
    Image.fromarray(rng.integers(0, 256, (40, 30), dtype=np.uint8)).save(path, **GREY[ending])
    good, outcomes = path.read_bytes(), set()
    for _ in range(600):
        data = bytearray(good)
        for _ in range(rng.integers(1, 5)):  # headers and directories lie at both ends
            end = rng.integers(0, min(60, len(data))) if rng.random() < .6 else rng.integers(max(0, len(data)-200), len(data))
            data[end] = rng.integers(0, 256)
        path.write_bytes(data[:rng.integers(0, len(data))] if rng.random() < .1 else data)
        size = image_size(path)
        assert size is None or (isinstance(size, tuple) and len(size) == 2)
        try:
            outcomes.add(read_pixels(path).dtype.kind)
        except InputError as e:
            assert str(path) in str(e)
            assert e.found.endswith(' of Pillow') or e.found.startswith(('mode', 'a ')) or ' images' in e.found  # no bytes of the file
            outcomes.add('refused')
    assert outcomes == {'u', 'refused'}


def test_one_damaged_png_among_good_ones(tmp_path):
    rows, image = [], np.zeros((96, 72), np.uint8)
    image[20:80, :40] = 150
    for k in range(3):
        Image.fromarray(image+np.uint8(k)).save(tmp_path/f'{k}.png')
        rows.append(dict(image_id=f'i{k}', patient_id=f'p{k}', exam_id=f'e{k}', laterality='L', view='CC', path=f'{k}.png', rows=96., cols=72.))
    data = bytearray((tmp_path/'1.png').read_bytes())
    data[11] = 5  # the length of the header
    (tmp_path/'1.png').write_bytes(data)
    prepared = prepare_cohort(Cohort(pd.DataFrame(rows), root=tmp_path), tmp_path/'c', size=(64, 48), workers=1, progress=False)
    assert prepared.failures.image_id.tolist() == ['i1']

# ---- entries

def test_every_flipped_bit_is_noticed(film):
    done = prepare(read_pixels(film), 'L', CONFIG)
    data = pack_entry(done)
    for i in range(0, len(data), 37):
        bad = bytearray(data)
        bad[i] ^= 4
        try:
            found = unpack_entry(bytes(bad))
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError):
            continue
        assert (found.image == done.image).all() # or it changed nothing (a blank in the header)
        assert (found.mask == done.mask).all()
        assert found.affine == done.affine

def test_cut_entries_are_noticed(film):
    data = pack_entry(prepare(read_pixels(film), 'L', CONFIG))
    for n in (0, 7, 8, 100, len(data)//2, len(data)-1):
        with pytest.raises((ValueError, KeyError, TypeError)):
            unpack_entry(data[:n])

@pytest.mark.parametrize('harm', ['cut', 'empty', 'bit', 'other'])
def test_a_broken_entry_is_prepared_again(cache, film, harm):
    key, good, _ = cache.get_or_prepare(film, 'L', CONFIG)
    file = cache.entry(key)
    data = file.read_bytes()
    flipped = bytearray(data)
    flipped[len(data)//3] ^= 1
    file.write_bytes(dict(cut=data[:len(data)//2], empty=b'', bit=bytes(flipped), other=os.urandom(len(data)))[harm])
    assert cache.load(key) is None
    _, again, was_prepared = cache.get_or_prepare(film, 'L', CONFIG)
    assert was_prepared
    assert (again.image == good.image).all()
    assert file.read_bytes() == data

# ---- changed files

def test_changed_file_with_same_size_and_mtime(cache, film, tmp_path, trusting):
    first = cache.prepare(film, 'L', CONFIG)
    assert cache.lookup(film, 'L', CONFIG)[0]
    assert cache.get_or_prepare(film, 'L', CONFIG)[2] is False
    old = os.stat(film)
    time.sleep(.05)
    draw(film, 1)
    os.utime(film, ns=(old.st_atime_ns, old.st_mtime_ns)) # in place: ctime tells
    assert (os.stat(film).st_size, os.stat(film).st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    assert cache.lookup(film, 'L', CONFIG) == (None, None)
    _, second, was_prepared = cache.get_or_prepare(film, 'L', CONFIG)
    assert was_prepared
    assert np.abs(second.image-first.image).max() > .01

def test_a_file_moved_over_another(cache, film, tmp_path, trusting):
    cache.prepare(film, 'L', CONFIG)
    old = os.stat(film)
    other = draw(tmp_path/'b.dcm', 2)
    os.utime(other, ns=(old.st_atime_ns, old.st_mtime_ns))
    os.replace(other, film) # the inode tells
    assert cache.lookup(film, 'L', CONFIG) == (None, None)
    assert cache.get_or_prepare(film, 'L', CONFIG)[2]

def test_a_touched_file_is_the_same_file(cache, film):
    cache.prepare(film, 'L', CONFIG)
    past = time.time()-1000
    os.utime(film, (past, past))
    assert cache.get_or_prepare(film, 'L', CONFIG)[2] is False

def test_young_files_are_not_trusted(cache, film):
    "A file system whose time stands still: the second content comes in the same tick as the first"
    cache.checksum(film)
    assert not list((cache.folder/'sources').glob('*/*'))

def test_a_file_that_changes_while_it_is_read(cache, film, monkeypatch):
    looks = iter(range(99))
    monkeypatch.setattr(module, '_identity', lambda path: [next(looks), 0, 0, 0])
    with pytest.raises(InputError, match='changes while it is read'):
        cache.get_or_prepare(film, 'L', CONFIG)

def test_a_broken_memo_is_no_harm(cache, film, trusting):
    key = cache.get_or_prepare(film, 'L', CONFIG)[0]
    memo, = (cache.folder/'sources').glob('*/*')
    for text in (b'', b'{', b'[1]', b'{"sha256": "x"}', b'{"identity": [0, 0, 0, 0], "sha256": "0"}'):
        memo.write_bytes(text)
        assert cache.get_or_prepare(film, 'L', CONFIG)[0] == key

# ---- keys

def test_every_parameter_is_in_the_key(cache):
    base = dict(size=(96, 64), intensity='voi_lut', window=0, crop=True, margin=.01, spacing_mm=None, enlarge=False, on_laterality_mismatch='follow')
    other = dict(size=(96, 65), intensity='minmax', window='SHARP', crop=False, margin=.02, spacing_mm=.5, enlarge=True, on_laterality_mismatch='raise')
    assert set(base) == set(other) == set(PrepareConfig.__dataclass_fields__)
    config = PrepareConfig(**base)
    keys = [cache.key(sha256, side, config) for sha256, side in (('a'*64, 'L'), ('b'*64, 'L'), ('a'*64, 'R'), ('a'*64, None))]
    keys += [cache.key('a'*64, 'L', PrepareConfig(**base | {k: v})) for k, v in other.items()]
    assert len(set(keys)) == len(keys) == 12

@pytest.mark.parametrize('changed', [prepare_module, breast_mask_module, grey_levels, module], ids=lambda m: m.__name__)
def test_changed_code_is_another_key(cache, tmp_path, monkeypatch, changed):
    "Of a module that is used directly, one that it uses, one that dicom.mammogram uses, and the reader of PNG files"
    before = cache.key('a'*64, 'L', CONFIG)
    copy = tmp_path/'changed.py'
    copy.write_text(Path(changed.__file__).read_text(encoding='utf-8') + '\nX = 1\n', encoding='utf-8')
    monkeypatch.setattr(changed, '__file__', str(copy))
    assert cache.key('a'*64, 'L', CONFIG) == before # this process still runs the code that it imported
    monkeypatch.setattr(module, '_CODE', module._hash_code()) # a process that starts now
    assert cache.key('a'*64, 'L', CONFIG) != before

@pytest.mark.parametrize('library', ['pylibjpeg', 'scikit-image'])
def test_another_version_of_a_library_is_another_key(monkeypatch, library):
    before = module._hash_code()
    monkeypatch.setattr(module, 'version', lambda name: '0.0' if name == library else metadata.version(name))
    assert module._hash_code() != before

# ---- writing

def test_a_full_disk_leaves_nothing_behind(cache, monkeypatch):
    def full(*paths):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('os.replace', full)
    with pytest.raises(CacheError, match='No space'):
        cache.write(cache.entry('ab'), b'x')
    assert not list((cache.folder/'tmp').iterdir())
    assert not entries(cache.folder)

def start(code, *args):
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

WRITE_AND_SWEEP = """
import sys, time
from mammo_nb.preparation.cache import Cache
cache, end, n = Cache(sys.argv[1]), time.time() + 1.5, 0
while time.time() < end:
    cache.write(cache.entry(f'{n % 7:02}{sys.argv[2]}'), b'x'*1000)
    cache.sweep()
    n += 1
print(n)
"""

def test_sweep_spares_the_living(tmp_path):
    "Writers and sweepers at the same time: nobody loses a file that is being written"
    running = [start(WRITE_AND_SWEEP, tmp_path/'c', i) for i in range(3)]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert int(out) > 20
    assert not list((tmp_path/'c'/'tmp').iterdir())
    assert set(entries(tmp_path/'c').values()) == {b'x'*1000}

PREPARE_A_COHORT = """
import sys
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.preparation.prepared_cohort import prepare_cohort
prepared = prepare_cohort(Cohort.read(sys.argv[1]), sys.argv[2], size=(96, 64), workers=1, progress=False)
print(len(prepared), len(prepared.failures))
"""

def test_several_processes_fill_one_cache(tmp_path):
    (tmp_path/'d').mkdir()
    cohort = draw_cohort(tmp_path/'d', 12)
    cohort.write(tmp_path/'d')
    clean = prepare_quietly(cohort, tmp_path/'clean')
    running = [start(PREPARE_A_COHORT, tmp_path/'d', tmp_path/'shared') for _ in range(3)]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ['12 0']*3
    assert len(clean) == 12
    assert entries(tmp_path/'shared') == entries(tmp_path/'clean')
    assert not list((tmp_path/'shared'/'tmp').iterdir())

# ---- cohorts

def test_one_bad_file_among_good_ones(tmp_path):
    cohort = draw_cohort(tmp_path)
    (tmp_path/'3.dcm').write_bytes((tmp_path/'3.dcm').read_bytes()[:20_000])
    (tmp_path/'5.dcm').write_bytes(b'\0'*1000)
    (tmp_path/'6.dcm').unlink()
    for workers in (1, 2):
        p = prepare_quietly(cohort, tmp_path/f'c{workers}', workers)
        assert p.failures.image_id.tolist() == ['3', '5', '6']
        assert len(p) == p.n_prepared == 5
        assert (p.failures.drop(columns='image_id').map(len) > 0).all(axis=None)
        assert all(row.path.endswith(f'{row.image_id}.dcm') for row in p.failures.itertuples())
    assert entries(tmp_path/'c1') == entries(tmp_path/'c2')
    draw(tmp_path/'3.dcm', 3, 'R') # mended
    p = prepare_quietly(cohort, tmp_path/'c1')
    assert p.failures.image_id.tolist() == ['5', '6']
    assert (p.n_prepared, p.n_cached) == (1, 5)

def test_no_image_at_all(tmp_path):
    cohort = draw_cohort(tmp_path, 2)
    for i in range(2):
        (tmp_path/f'{i}.dcm').write_bytes(b'nothing')
    p = prepare_quietly(cohort, tmp_path/'c')
    assert (len(p), len(p.failures), len(p.cohort)) == (0, 2, 0)

def test_load_follows_the_file(tmp_path):
    p = prepare_quietly(draw_cohort(tmp_path, 2), tmp_path/'c')
    before = p.load('0').image
    draw(tmp_path/'0.dcm', 77)
    assert np.abs(p.load('0').image-before).max() > .01 # changed: never the old image
    (tmp_path/'1.dcm').write_bytes(b'gone bad')
    with pytest.raises(InputError):
        p.load('1')

def test_load_without_the_file(tmp_path):
    p = prepare_quietly(draw_cohort(tmp_path, 2), tmp_path/'c')
    before = p.load('0').image
    (tmp_path/'0.dcm').unlink()
    assert (p.load('0').image == before).all()
    p.cache.entry(p.keys['0']).unlink()
    with pytest.raises(InputError, match='neither the file nor'):
        p.load('0')
    with pytest.raises(KeyError):
        p.load('no such image')

def test_a_path_that_leads_out(tmp_path):
    "A link out of the cohort's folder is a failure, not a way out"
    (tmp_path/'d').mkdir()
    cohort = draw_cohort(tmp_path/'d', 2)
    (tmp_path/'d'/'1.dcm').rename(tmp_path/'out.dcm')
    (tmp_path/'d'/'1.dcm').symlink_to(tmp_path/'out.dcm')
    p = prepare_quietly(cohort, tmp_path/'c')
    assert p.failures.image_id.tolist() == ['1']
    assert 'below the root' in p.failures.expected[0]
    assert list(p.keys) == ['0']

def test_config_or_keyword_arguments(tmp_path):
    cohort = draw_cohort(tmp_path, 2)
    by_config = prepare_quietly(cohort, tmp_path/'c')
    by_keywords = prepare_cohort(cohort, by_config.cache, size=(96, 64), workers=1, progress=False)
    assert isinstance(by_keywords, PreparedCohort)
    assert by_keywords.keys == by_config.keys
    assert by_keywords.n_cached == 2
    with pytest.raises(InputError, match='either a config or keyword arguments'):
        prepare_cohort(cohort, tmp_path/'c', CONFIG, size=(96, 64))
    with pytest.raises(InputError, match='a PrepareConfig'):
        prepare_cohort(cohort, tmp_path/'c', (96, 64))
    with pytest.raises(TypeError, match='sizes'):
        prepare_cohort(cohort, tmp_path/'c', sizes=(96, 64))

@pytest.mark.parametrize('what', ['data/files', Path('data/files'), pd.DataFrame(dict(image_id=['a'])), None], ids=lambda o: type(o).__name__)
def test_what_is_no_cohort_is_refused_by_name(tmp_path, what):
    "It was an AttributeError of somewhere inside"
    with pytest.raises(InputError, match='prepare_cohort: cohort: found .* expected a Cohort, for example Cohort.read'):
        prepare_cohort(what, tmp_path/'c')
    assert not (tmp_path/'c').exists()

# ---- plain images

def palette_image(greys, **more):
    "Numbers 0 to 255, and a palette with the grey values"
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert('P')
    image.putpalette([int(grey) for grey in greys for _ in 'rgb'])
    return image

@pytest.mark.parametrize('ending', ['png', 'tif'])
def test_a_grey_palette_is_looked_up(ending, tmp_path):
    greys = np.random.default_rng(0).permutation(256)
    palette_image(greys).save(tmp_path/f'x.{ending}')
    assert np.array_equal(read_pixels(tmp_path/f'x.{ending}').ravel(), greys)

def test_a_palette_of_colours_is_refused(tmp_path):
    image = palette_image(range(256))
    image.putpalette([i % 256 for i in range(768)])
    image.save(tmp_path/'x.png')
    with pytest.raises(InputError, match='a palette of colours, expected 8 or 16 bits of grey'):
        read_pixels(tmp_path/'x.png')

def test_a_transparent_palette_is_refused(tmp_path):
    palette_image(range(256)).save(tmp_path/'x.png', transparency=3)
    with pytest.raises(InputError, match='a palette of colours'):
        read_pixels(tmp_path/'x.png')

def test_a_negative_and_a_series_in_a_tiff_file(tmp_path):
    grey = Image.fromarray(np.full((9, 9), 5, np.uint16))
    grey.save(tmp_path/'negative.tif', tiffinfo={262: 0})
    with pytest.raises(InputError, match='WhiteIsZero'):
        read_pixels(tmp_path/'negative.tif')
    grey.save(tmp_path/'series.tif', save_all=True, append_images=[grey])
    with pytest.raises(InputError, match='found 2 images, expected one image'):
        read_pixels(tmp_path/'series.tif')

def test_a_plain_image_has_no_windows(tmp_path):
    Image.fromarray(np.full((9, 9), 5, np.uint8)).save(tmp_path/'x.png')
    with pytest.raises(InputError, match="window: found 'NORMAL', expected 0"):
        read_pixels(tmp_path/'x.png', PrepareConfig(window='NORMAL'))

@pytest.mark.parametrize('ending', ['png', 'pgm', 'tif'])
def test_intensity_of_a_plain_image(ending, film, tmp_path):
    "The same pixels in a DICOM file give the same image, if all its bits are used"
    pixels = read_pixels(film).pixels.astype(np.uint16) + 700
    Image.fromarray(pixels).save(tmp_path/f'x.{ending}')
    write_mammogram(tmp_path/'x.dcm', pixels, 'L', 'CC', bits_stored=16)
    config = PrepareConfig(size=(96, 64), intensity='minmax')
    ours, theirs = (prepare(read_pixels(tmp_path/f'x.{e}', config), 'L', config) for e in (ending, 'dcm'))
    assert np.abs(ours.image - theirs.image).max() < 1e-6
    assert ours.image.max() > .8
    whole = prepare(read_pixels(tmp_path/f'x.{ending}'), 'L', PrepareConfig(size=(96, 64)))
    assert np.array_equal(whole.mask, ours.mask)
    assert whole.image.max() < .2
