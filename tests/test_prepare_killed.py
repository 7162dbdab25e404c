"""Killing `mammo_prepare` at any moment and starting it again gives the cache of one clean run."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
import numpy as np
import pytest
from mammo_nb.dicom.write import write_mammogram

N_FILES, N_KILLS = 24, 10
# as pip writes it
SCRIPT = """
import sys
from mammo_nb.cli.prepare import mammo_prepare
if __name__ == '__main__':
    sys.exit(mammo_prepare())
"""

def draw(path, side, view, patient, seed, rows=1200, cols=900):
    y, x = np.mgrid[:rows, :cols]
    depth = np.clip(1 - (x/(.6*cols))**2 - ((y-.5*rows)/(.4*rows))**2, 0, None)**.4
    grain = np.random.default_rng(seed).integers(0, 600, (rows, cols))
    pixels = (3000*depth + (depth > 0)*grain).astype(np.uint16)
    pixels = pixels if side == 'L' else pixels[:, ::-1].copy()
    write_mammogram(path, pixels, side, view, patient_id=patient, pixel_spacing_mm=.1)

@pytest.fixture(scope='module')
def dicom(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dicom')
    for i in range(N_FILES):
        draw(folder/f'{i:02}.dcm', 'LR'[i % 2], ('CC', 'MLO')[i//2 % 2], f'p{i//4}', i)
    (folder/'99.dcm').write_bytes((folder/'00.dcm').read_bytes()[:40_000])
    return folder

def start(dicom, cache):
    script = cache.parent/'mammo_prepare.py'
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')])
    args = [sys.executable, str(script), str(dicom), str(cache), '--size', '256x192', '--workers', '2', '--quiet']
    return subprocess.Popen(args, env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=path), start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def run(dicom, cache):
    "The exit status and all output of a run that nobody kills"
    process = start(dicom, cache)
    out, _ = process.communicate(timeout=120)
    return process.returncode, out

def count(cache):
    return len(list(cache.glob('entries/*/*')))

def entries(cache):
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in sorted(cache.glob('entries/*/*'))}

def wait_for_an_entry(process, cache, seconds):
    "Wait until the run has written one more entry, or has ended"
    before, end = count(cache), time.time() + seconds
    while time.time() < end and process.poll() is None and count(cache) <= before:
        time.sleep(.002)

def kill(process):
    "Whether it was still running"
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    return running

@pytest.mark.skipif(not hasattr(os, 'killpg'), reason='needs process groups')
def test_killed_ten_times(dicom, tmp_path):
    clean, cache = tmp_path/'clean', tmp_path/'cache'
    began = time.time()
    status, out = run(dicom, clean)
    whole_run = time.time()-began
    reference = entries(clean)
    assert status == 1, out
    assert f'{N_FILES} images are prepared: 0 from the cache, {N_FILES} new' in out
    assert len(reference) == N_FILES

    rng, n_entries, killed = np.random.default_rng(0), [], 0
    for _ in range(N_KILLS):
        process = start(dicom, cache)
        # a random moment; most of them after the first entry has come, for before that there is only the start of Python
        if rng.random() < .8:
            wait_for_an_entry(process, cache, whole_run)
            time.sleep(rng.uniform(0, .08))
        else:
            time.sleep(rng.uniform(0, .5*whole_run))
        killed += kill(process)
        part = entries(cache)
        assert all(reference[name] == data for name, data in part.items()) # nothing half-written under a name that is read
        n_entries.append(len(part))
    assert killed >= N_KILLS//2
    assert any(0 < n < N_FILES for n in n_entries), n_entries # it was killed in the middle of things

    status, out = run(dicom, cache)
    assert status == 1, out
    assert f'{N_FILES} images are prepared: {n_entries[-1]} from the cache, {N_FILES-n_entries[-1]} new' in out
    assert entries(cache) == reference
    assert not list((cache/'tmp').iterdir())
    assert (cache/'failures.csv').read_bytes() == (clean/'failures.csv').read_bytes()
