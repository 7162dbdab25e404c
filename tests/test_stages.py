"Stages that are killed, damaged or run twice at once; the hash of the code they depend on"
import os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest
from mammo_nb.core.code_hash import code_hash, code_modules
from mammo_nb.core.stages import Stages

# -- killed

WORK = '''
import sys, time
from pathlib import Path
from mammo_nb.core.stages import Stages
def make(folder):
    for i in range(20):
        (folder/f'{i}.txt').write_text(str(i)*1000)
        time.sleep(.02)
with Stages(sys.argv[1]) as stages:
    print('begun', flush=True)
    print(stages.run('work', dict(a=1), make), flush=True)
'''
WHOLE = {f'{i}.txt': str(i)*1000 for i in range(20)}

def start_work(folder):
    "Run `WORK` in a process of its own"
    command = [sys.executable, '-c', WORK, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def finish(process):
    "The output of a process that must succeed"
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out

def content(folder):
    return {path.name: path.read_text() for path in folder.rglob('*.txt')}

@pytest.mark.skipif(os.name == 'nt', reason='no SIGKILL on Windows')
def test_a_killed_stage_is_made_again_whole(tmp_path):
    rng = random.Random(0)
    for _ in range(4):
        process = start_work(tmp_path)
        assert process.stdout.readline() == 'begun\n'
        time.sleep(rng.uniform(0, .35))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.communicate()
        for folder in tmp_path.glob('work-*'): # a result is whole or absent
            assert content(folder) == WHOLE
    out = finish(start_work(tmp_path))
    assert content(Path(out.splitlines()[-1])) == WHOLE

def test_two_processes_do_not_work_in_one_folder(tmp_path):
    with Stages(tmp_path, lambda line: None):
        process = start_work(tmp_path)
        _, err = process.communicate(timeout=60)
        assert process.returncode != 0
        assert 'one run at a time' in err
    finish(start_work(tmp_path))

def test_what_a_killed_run_left_is_removed(tmp_path):
    (tmp_path/'.making-step-x1').mkdir()
    with Stages(tmp_path, lambda line: None) as stages:
        assert stages.log == []
    assert list(tmp_path.glob('.making-*')) == []

# -- damaged

class Step:
    "A step that counts how often it is made"
    def __init__(self, folder):
        self.folder, self.n_made, self.lines = folder, 0, []

    def make(self, folder):
        self.n_made += 1
        (folder/'a.bin').write_bytes(bytes(1000))
        (folder/'b').mkdir()
        (folder/'b/c.bin').write_bytes(b'c')

    def run(self, key=None):
        key = dict(k=[1, 2.5, 'ü', None]) if key is None else key
        return Stages(self.folder, self.lines.append).run('x', key, self.make)

DAMAGE = {
    'changed': lambda folder: (folder/'a.bin').write_bytes(bytes(999)+b'\1'),
    'lost': lambda folder: (folder/'b/c.bin').unlink(),
    'too many': lambda folder: (folder/'more').touch(),
    'no stamp': lambda folder: (folder/'stage.json').unlink(),
    'half a stamp': lambda folder: (folder/'stage.json').write_text('{"key"'),
    'empty stamp': lambda folder: (folder/'stage.json').write_text('{}'),
    'another stamp': lambda folder: (folder/'stage.json').write_text('[]'),
}

@pytest.mark.parametrize('name', DAMAGE)
def test_a_damaged_result_is_never_reused(name, tmp_path):
    step = Step(tmp_path)
    folder = step.run()
    DAMAGE[name](folder)
    step.run()
    assert step.n_made == 2
    assert (folder/'a.bin').read_bytes() == bytes(1000)
    assert (folder/'b/c.bin').read_bytes() == b'c'
    step.run()
    assert step.n_made == 2

def test_the_reason_is_reported(tmp_path):
    step = Step(tmp_path)
    DAMAGE['changed'](step.run())
    step.run()
    assert any('made again, a.bin was changed' in line for line in step.lines)

def test_another_key_replaces_the_result(tmp_path):
    step = Step(tmp_path)
    first, second = step.run(dict(k=1)), step.run(dict(k=2))
    assert step.n_made == 2
    assert not first.exists()
    assert list(tmp_path.iterdir()) == [second]

def test_a_failed_step_leaves_nothing(tmp_path):
    kept = Step(tmp_path).run()
    def fail(folder):
        (folder/'half').write_text('x')
        raise RuntimeError('stopped')
    with pytest.raises(RuntimeError, match='stopped'):
        Stages(tmp_path, lambda line: None).run('other', {}, fail)
    assert list(tmp_path.iterdir()) == [kept]

# -- the hash of the code

def test_the_key_reaches_the_end():
    assert code_hash('mammo_nb.core.stages') != code_hash('mammo_nb.report.page')
    modules = set(code_modules('mammo_nb.insilico.files'))
    assert {'mammo_nb.insilico.patients', 'mammo_nb.dicom.write', 'mammo_nb.dicom.file'} <= modules
    assert {'mammo_nb.core.geometry', 'mammo_nb.core.errors'} <= modules
    assert not any(module.startswith(('mammo_nb.metrics', 'mammo_nb.report')) for module in modules)

def test_a_page_runs_on_its_own_part_of_the_library():
    assert 'mammo_nb.core.errors' in code_modules('mammo_nb.report.page')
    assert len(code_hash('mammo_nb.report.page')) == 16
