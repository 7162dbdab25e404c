"""Numbers of processes, processes whose parent was killed, and disks without room."""
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
import psutil
import pytest
from mammo_nb.cli.predict import mammo_predict
from mammo_nb.cli.prepare import mammo_prepare
from mammo_nb.cli.tour import mammo_tour
from mammo_nb.cli.train import mammo_train
from mammo_nb.core.errors import InputError
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.preparation.prepared_cohort import prepare_cohort

ROOT = Path(__file__).parents[1]
WRONG = [0, -3, 1000]
ENV = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "In-silico patients as files"
    folder = tmp_path_factory.mktemp('cohort')
    insilico_cohort(6, seed=3, exams=1, rows=192, cols=144, pixel_spacing_mm=1.25).write(folder, workers=1, progress=False)
    return folder


# ---- how many

@pytest.mark.parametrize('workers', WRONG)
def test_commands_refuse_the_number_before_any_work(workers, folder, tmp_path, capsys):
    cache, out = tmp_path/'cache', tmp_path/'out'
    model = str(tmp_path/'model')
    calls = {
        'mammo_prepare': lambda: mammo_prepare(str(folder), str(cache), workers=workers),
        'mammo_train': lambda: mammo_train('two_view', str(folder), str(out), cache=str(cache), workers=workers),
        'mammo_predict': lambda: mammo_predict(str(folder), model, out=str(out), workers=workers),
        'mammo_tour': lambda: mammo_tour(str(out), workers=workers),
    }
    for name, call in calls.items():
        assert call() == 2, name
        message = capsys.readouterr().err
        assert name in message and 'workers' in message and repr(workers) in message, message
    assert not list(tmp_path.rglob('*')), 'something was begun'


@pytest.mark.parametrize('workers', [*WRONG, 1.5, 'two', True])
def test_the_library_refuses_the_number(workers, folder, tmp_path):
    from mammo_nb.cohort.cohort import Cohort
    with pytest.raises(InputError, match='workers'):
        prepare_cohort(Cohort.read(folder), tmp_path/'cache', size=(64, 48), workers=workers)
    drawn = insilico_cohort(2, seed=3, exams=1, rows=192, cols=144, pixel_spacing_mm=1.25)
    with pytest.raises(InputError, match='workers'):
        drawn.write(tmp_path/'drawn', workers=workers)
    assert not (tmp_path/'drawn').exists()


# ---- processes whose parent is gone

SLEEPERS = """
import os, sys, time
from mammo_nb.core.workers import in_workers
if __name__ == '__main__':
    jobs = [(600,)]*4
    sys.stdout.write('begun\\n'); sys.stdout.flush()
    for _ in in_workers(time.sleep, jobs, workers=2): pass
"""
DRAWING = """
import sys
from mammo_nb.insilico.files import insilico_cohort
if __name__ == '__main__':
    insilico_cohort(400, seed=1, exams=2).write(sys.argv[1], workers=2, progress=False)
"""


def children(process):
    try:
        return [p for p in psutil.Process(process.pid).children(recursive=True) if 'resource_tracker' not in ' '.join(p.cmdline())]
    except psutil.NoSuchProcess:
        return []


def alive(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.skipif(sys.platform == 'win32', reason='needs signals')
@pytest.mark.parametrize('script', [SLEEPERS, DRAWING], ids=['asleep', 'at work'])
def test_workers_end_with_a_killed_parent(script, tmp_path):
    file = tmp_path/'program.py'
    file.write_text(script)
    process = subprocess.Popen([sys.executable, str(file), str(tmp_path/'drawn')], env=ENV, start_new_session=True, stdout=subprocess.DEVNULL)
    end, found = time.time()+90, []
    while time.time() < end and len(found) < 2:
        time.sleep(.2)
        found = children(process)
    assert len(found) >= 2 and process.poll() is None
    time.sleep(4) # the workers have begun their first jobs
    found = children(process)
    os.kill(process.pid, signal.SIGKILL) # the parent alone
    process.wait(30)
    end = time.time()+30
    while time.time() < end and alive(found): time.sleep(.2)
    left = alive(found)
    for p in left: p.kill()
    assert not left, left


# ---- disks without room

FULL = """
import resource, sys
from mammo_nb.cli.prepare import mammo_prepare
if __name__ == '__main__':
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(mammo_prepare(*sys.argv[2:4], size='64x48', workers=int(sys.argv[4]), quiet=True))
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='needs limits of the system')
@pytest.mark.parametrize('workers', [1, 2])
def test_a_cache_without_room_is_named_and_no_file_is_blamed(workers, folder, tmp_path):
    "Files of more than 4 KiB cannot be written, as on a full disk; an entry has 15"
    file, cache = tmp_path/'program.py', tmp_path/'cache'
    file.write_text(FULL)
    done = subprocess.run([sys.executable, str(file), '4096', str(folder), str(cache), str(workers)], env=ENV, capture_output=True, text=True, timeout=120)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stderr[-2000:]
    assert lines[-1].startswith('mammo_prepare:') and str(cache) in lines[-1] and os.strerror(errno.EFBIG) in lines[-1], lines
    assert '.dcm' not in done.stderr and 'Traceback' not in done.stderr
    assert not list(cache.rglob('failures.csv')) and not list((cache/'tmp').iterdir())
    assert mammo_prepare(str(folder), str(cache), size='64x48', workers=1, quiet=True) == 0 # with room, it goes on


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_a_full_disk_names_the_target(tmp_path):
    from mammo_nb.core.files import atomic_path
    target = tmp_path/'predictions.csv'
    with pytest.raises(OSError) as e:
        with atomic_path(target) as part:
            part.symlink_to('/dev/full')
            part.write_text('x')
    assert e.value.errno == errno.ENOSPC and e.value.filename == str(target)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == 'win32', reason='needs limits of the system')
def test_weights_that_cannot_be_written_name_their_file(tmp_path):
    from mammo_nb.models.two_view import TwoViewNet
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = TwoViewNet()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        with pytest.raises(OSError, match='model.safetensors'): model.save_pretrained(tmp_path/'model')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not [p for p in (tmp_path/'model').iterdir() if p.name == 'config.json']


def test_other_errors_stay_what_they_are(tmp_path):
    from mammo_nb.core.files import atomic_path
    for error in (KeyError('x'), ValueError('y'), InputError('a', 'b', 'c', 'd'), FileNotFoundError(2, 'no', 'source.dcm')):
        with pytest.raises(type(error)) as e:
            with atomic_path(tmp_path/'t.csv'): raise error
        assert e.value is error
