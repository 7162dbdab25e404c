"""Killing `mammo_prepare` at any moment and starting it again gives the cache of one clean run."""
import os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
from mammo_nb.data.dicom_file import write_mammogram

N_FILES, N_KILLS = 24, 10
SCRIPT = 'import sys\nfrom mammo_nb.cli.commands import mammo_prepare\nif __name__ == "__main__": sys.exit(mammo_prepare())\n'  # as pip writes it

def draw(path, side, view, patient, seed, rows=1200, cols=900):
    y, x = np.mgrid[:rows, :cols]
    inside = np.clip(1 - (x/(.6*cols))**2 - ((y-.5*rows)/(.4*rows))**2, 0, None)**.4
    pixels = (3000*inside + (inside > 0)*np.random.default_rng(seed).integers(0, 600, (rows, cols))).astype(np.uint16)
    write_mammogram(path, pixels if side == 'L' else pixels[:, ::-1].copy(), side, view, patient_id=patient, pixel_spacing_mm=.1)

@pytest.fixture(scope='module')
def dicom(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dicom')
    for i in range(N_FILES): draw(folder/f'{i:02}.dcm', 'LR'[i % 2], ('CC', 'MLO')[i//2 % 2], f'p{i//4}', i)
    (folder/'99.dcm').write_bytes((folder/'00.dcm').read_bytes()[:40_000])
    return folder

def start(dicom, cache):
    script = cache.parent/'mammo_prepare.py'
    script.write_text(SCRIPT)
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))
    args = [sys.executable, str(script), str(dicom), str(cache), '--size', '256x192', '--workers', '2', '--quiet']
    return subprocess.Popen(args, env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def entries(cache): return {p.relative_to(cache).as_posix(): p.read_bytes() for p in sorted(cache.glob('entries/*/*'))}
def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)

@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='needs process groups')
def test_killed_ten_times(dicom, tmp_path):
    clean = tmp_path/'clean'
    t = time.time()
    p = start(dicom, clean)
    out, _ = p.communicate(timeout=120)
    whole = time.time()-t
    assert p.returncode == 1 and f'{N_FILES} images are prepared: 0 reused, {N_FILES} made' in out, out
    reference = entries(clean)
    assert len(reference) == N_FILES

    rng, cache, seen, killed = np.random.default_rng(0), tmp_path/'cache', [], 0
    for _ in range(N_KILLS):
        p = start(dicom, cache)
        # a random moment; most of them after the first entry has come, for before that there is only the start of Python
        until = time.time() + whole
        if rng.random() < .8:
            while time.time() < until and p.poll() is None and len(list(cache.glob('entries/*/*'))) <= (seen[-1] if seen else 0): time.sleep(.002)
            time.sleep(rng.uniform(0, .08))
        else: time.sleep(rng.uniform(0, .5*whole))
        killed += p.poll() is None
        kill(p) if p.poll() is None else p.communicate()
        part = entries(cache)
        assert all(reference[k] == v for k, v in part.items())  # nothing half-written under a name that is read
        seen.append(len(part))
    assert killed >= N_KILLS//2 and any(0 < n < N_FILES for n in seen), seen  # it was killed in the middle of things

    p = start(dicom, cache)
    out, _ = p.communicate(timeout=120)
    assert p.returncode == 1, out
    assert f'{N_FILES} images are prepared: {seen[-1]} reused, {N_FILES-seen[-1]} made' in out, out
    assert entries(cache) == reference
    assert list((cache/'tmp').iterdir()) == []
    assert (cache/'failures.csv').read_bytes() == (clean/'failures.csv').read_bytes()
