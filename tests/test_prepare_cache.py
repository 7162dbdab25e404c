"""The cache is never stale, never half-written, and the same whoever fills it."""
import os, subprocess, sys, time
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from mammo_nb.core.errors import InputError
from mammo_nb.data import cache as module
from mammo_nb.data.cache import Cache, prepare_cohort
from mammo_nb.data.cohort import Cohort
from mammo_nb.data.dicom_file import write_mammogram
from mammo_nb.data.prepare import PrepareConfig

CONFIG = PrepareConfig(size=(96, 64))

def draw(path, seed=0, side='L', rows=300, cols=200):
    y, x = np.mgrid[:rows, :cols]
    inside = np.clip(1 - (x/(.6*cols))**2 - ((y-.5*rows)/(.4*rows))**2, 0, None)**.4
    px = (3000*inside + (inside > 0)*np.random.default_rng(seed).integers(0, 600, (rows, cols))).astype(np.uint16)
    return write_mammogram(path, px if side == 'L' else px[:, ::-1].copy(), side, 'CC', pixel_spacing_mm=.5)

def cohort_of(folder, n=8):
    for i in range(n): draw(folder/f'{i}.dcm', i, 'LR'[i % 2])
    return Cohort(pd.DataFrame([dict(image_id=str(i), patient_id=f'p{i//2}', exam_id=f'e{i//2}', laterality='LR'[i % 2], view='CC', path=f'{i}.dcm') for i in range(n)]), None, folder)

def entries(cache): return {p.name: p.read_bytes() for p in Path(cache).glob('entries/*/*')}

@pytest.fixture
def trusting(monkeypatch): monkeypatch.setattr(module, '_RACY_NS', 0)

def test_changed_file_with_same_size_and_mtime(tmp_path, trusting):
    cache, path = Cache(tmp_path/'c'), draw(tmp_path/'a.dcm', 0)
    first = cache.prepare(path, 'L', CONFIG)
    assert cache.find(path, 'L', CONFIG)[0] and cache.make(path, 'L', CONFIG)[2] is False
    old = os.stat(path)
    time.sleep(.05)
    draw(path, 1)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))  # in place: ctime tells
    assert os.stat(path).st_size == old.st_size and os.stat(path).st_mtime_ns == old.st_mtime_ns
    assert cache.find(path, 'L', CONFIG) == (None, None)
    second, made = cache.make(path, 'L', CONFIG)[1:]
    assert made and np.abs(second.image-first.image).max() > .01
    old = os.stat(path)
    draw(tmp_path/'b.dcm', 2)
    os.utime(tmp_path/'b.dcm', ns=(old.st_atime_ns, old.st_mtime_ns))
    os.replace(tmp_path/'b.dcm', path)  # moved over it: the inode tells
    assert cache.find(path, 'L', CONFIG) == (None, None) and cache.make(path, 'L', CONFIG)[2]

def test_young_files_are_not_believed(tmp_path):
    "A file system whose time stands still: the second content comes in the same tick as the first"
    cache, path = Cache(tmp_path/'c'), draw(tmp_path/'a.dcm', 0)
    cache.checksum(path)
    assert not list((tmp_path/'c'/'sources').glob('*/*'))

def test_every_parameter_is_in_the_key(tmp_path):
    cache = Cache(tmp_path/'c')
    base = dict(size=(96, 64), preset='voi_lut', window=0, crop=True, margin=.01, spacing_mm=None, enlarge=False, on_mismatch='follow')
    assert set(base) == set(PrepareConfig.__dataclass_fields__)
    other = dict(size=(96, 65), preset='minmax', window='SHARP', crop=False, margin=.02, spacing_mm=.5, enlarge=True, on_mismatch='raise')
    keys = [cache.key('a'*64, 'L', PrepareConfig(**base))] + [cache.key('a'*64, 'L', PrepareConfig(**base | {k: v})) for k, v in other.items()]
    keys += [cache.key('b'*64, 'L', PrepareConfig(**base)), cache.key('a'*64, 'R', PrepareConfig(**base)), cache.key('a'*64, None, PrepareConfig(**base))]
    assert len(set(keys)) == len(keys)

def test_changed_code_is_another_key(tmp_path, monkeypatch):
    cache = Cache(tmp_path/'c')
    a = cache.key('a'*64, 'L', CONFIG)
    from mammo_nb.data import prepare, voi
    for m in (prepare, voi, module):  # one that is used directly, one by data.dicom, and the reader of PNG files
        copy = tmp_path/'changed.py'
        copy.write_text(Path(m.__file__).read_text(encoding='utf-8') + '\nX = 1\n', encoding='utf-8')
        monkeypatch.setattr(m, '__file__', str(copy))
        assert cache.key('a'*64, 'L', CONFIG) == a  # this process still runs the code that it imported
        monkeypatch.setattr(module, '_CODE', module._hash_code())  # a process that starts now
        assert cache.key('a'*64, 'L', CONFIG) != a
        monkeypatch.undo()
    assert cache.key('a'*64, 'L', CONFIG) == a

@pytest.mark.parametrize('harm', ['cut', 'empty', 'bit', 'other'])
def test_a_broken_entry_is_made_again(tmp_path, harm):
    cache, path = Cache(tmp_path/'c'), draw(tmp_path/'a.dcm')
    key, good, _ = cache.make(path, 'L', CONFIG)
    file = cache.entry(key)
    data = file.read_bytes()
    flipped = bytearray(data); flipped[len(data)//3] ^= 1
    file.write_bytes(dict(cut=data[:len(data)//2], empty=b'', bit=bytes(flipped), other=os.urandom(len(data)))[harm])
    assert cache.load(key) is None
    again, made = cache.make(path, 'L', CONFIG)[1:]
    assert made and (again.image == good.image).all() and file.read_bytes() == data

def test_a_broken_memo_is_no_harm(tmp_path, trusting):
    cache, path = Cache(tmp_path/'c'), draw(tmp_path/'a.dcm')
    key = cache.make(path, 'L', CONFIG)[0]
    memo, = (tmp_path/'c'/'sources').glob('*/*')
    for text in (b'', b'{', b'[1]', b'{"sha256": "x"}', b'{"identity": [0, 0, 0, 0], "sha256": "0"}'):
        memo.write_bytes(text)
        assert cache.make(path, 'L', CONFIG)[0] == key

def test_one_bad_file_among_good_ones(tmp_path):
    cohort = cohort_of(tmp_path)
    (tmp_path/'3.dcm').write_bytes((tmp_path/'3.dcm').read_bytes()[:20_000])
    (tmp_path/'5.dcm').write_bytes(b'\0'*1000)
    (tmp_path/'6.dcm').unlink()
    for workers in (1, 2):
        p = prepare_cohort(cohort, tmp_path/f'c{workers}', CONFIG, workers, progress=False)
        assert p.failures.image_id.tolist() == ['3', '5', '6'] and len(p) == p.made == 5
        assert (p.failures.drop(columns='image_id').map(len) > 0).all(axis=None)
        assert all(f.path.endswith(f'{f.image_id}.dcm') for f in p.failures.itertuples())
    assert entries(tmp_path/'c1') == entries(tmp_path/'c2')
    draw(tmp_path/'3.dcm', 3, 'R')  # mended
    p = prepare_cohort(cohort, tmp_path/'c1', CONFIG, 1, progress=False)
    assert p.failures.image_id.tolist() == ['5', '6'] and (p.made, p.reused) == (1, 5)

def test_no_image_at_all(tmp_path):
    cohort = cohort_of(tmp_path, 2)
    for i in range(2): (tmp_path/f'{i}.dcm').write_bytes(b'nothing')
    p = prepare_cohort(cohort, tmp_path/'c', CONFIG, 1, progress=False)
    assert len(p) == 0 and len(p.failures) == 2 and len(p.cohort) == 0

def test_two_processes_fill_one_cache(tmp_path):
    (tmp_path/'d').mkdir()
    cohort = cohort_of(tmp_path/'d', 12)
    cohort.write(tmp_path/'d')
    clean = prepare_cohort(cohort, tmp_path/'clean', CONFIG, 1, progress=False)
    code = ('import sys; from mammo_nb.data.cohort import Cohort; from mammo_nb.data.cache import prepare_cohort; from mammo_nb.data.prepare import PrepareConfig\n'
            'p = prepare_cohort(Cohort.read(sys.argv[1]), sys.argv[2], PrepareConfig(size=(96, 64)), 1, progress=False); print(len(p), len(p.failures))')
    run = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'d'), str(tmp_path/'both')], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [r.communicate(timeout=120)[0].strip() for r in run] == ['12 0']*3
    assert entries(tmp_path/'both') == entries(tmp_path/'clean') and len(clean) == 12
    assert not list((tmp_path/'both'/'tmp').iterdir())

def test_sweep_spares_the_living(tmp_path):
    "Writers and sweepers at the same time: nobody loses a file that is being written"
    code = ('import sys, time; from mammo_nb.data.cache import Cache\n'
            'c = Cache(sys.argv[1]); end = time.time() + 1.5; n = 0\n'
            'while time.time() < end:\n    c._put(c.entry(f"{n % 7:02}{sys.argv[2]}"), b"x"*1000); c.sweep(); n += 1\n'
            'print(n)')
    run = [subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'c'), str(i)], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(3)]
    for r in run:
        out, err = r.communicate(timeout=60)
        assert r.returncode == 0 and int(out) > 20, err
    assert not list((tmp_path/'c'/'tmp').iterdir())
    assert all(p.read_bytes() == b'x'*1000 for p in (tmp_path/'c'/'entries').glob('*/*'))

def test_load_follows_the_file(tmp_path):
    cohort = cohort_of(tmp_path, 2)
    p = prepare_cohort(cohort, tmp_path/'c', CONFIG, 1, progress=False)
    before = p.load('0').image
    draw(tmp_path/'0.dcm', 77)
    assert np.abs(p.load('0').image-before).max() > .01  # changed: never the old picture
    (tmp_path/'1.dcm').write_bytes(b'gone bad')
    with pytest.raises(InputError): p.load('1')

def test_a_path_that_leads_out(tmp_path):
    "A link out of the cohort's folder is a failure, not a way out"
    (tmp_path/'d').mkdir()
    cohort = cohort_of(tmp_path/'d', 2)
    (tmp_path/'d'/'1.dcm').rename(tmp_path/'out.dcm')
    (tmp_path/'d'/'1.dcm').symlink_to(tmp_path/'out.dcm')
    p = prepare_cohort(cohort, tmp_path/'c', CONFIG, 1, progress=False)
    assert p.failures.image_id.tolist() == ['1'] and 'below the root' in p.failures.expected[0] and list(p.keys) == ['0']
