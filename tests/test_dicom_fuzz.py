"""Hundreds of hostile DICOM files, made by mutation with a fixed seed: each is a good image or one `InputError`.

No file may take more than 5 s or 500 MB, and nothing of the planted names, dates and numbers may leave it: not in an error,
a note, a warning, a log or a traceback, and not in the table of files that a folder left out.
"""
import json, os, subprocess, sys
from pathlib import Path
import pytest
import dicom_fuzzer as fuzzer
from mammo_nb.cohort.datasets.folder import dicom_folder

EACH = 30
pytestmark = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc to know how much memory a process has')

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return fuzzer.hostile_files(tmp_path_factory.mktemp('fuzz'), EACH)

def start(paths):
    "A process that reads some files"
    environment = {**os.environ, 'RUST_BACKTRACE': '0', 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([sys.executable, fuzzer.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], env=environment)
    return process, '\n'.join(map(str, paths))

@pytest.fixture(scope='module')
def results(files):
    "name -> what became of the file; and what went to the terminal"
    process, names = start(files.values())
    out, errors = process.communicate(names, timeout=300)
    assert process.returncode == 0, f'after {out.splitlines()[-1:]}: {errors[-2000:]}'
    rows = map(json.loads, out.splitlines())
    return {row['name']: row for row in rows}, errors

def test_there_are_enough(files):
    assert len(files) >= 500

def test_each_is_a_good_image_or_one_error(files, results):
    rows, _ = results
    assert list(rows) == list(files)
    wrong = {name: row['outcome'] for name, row in rows.items() if row['outcome'] not in ('read', 'refused')}
    assert wrong == {}

def test_both_happen(results):
    "Else the mutations would be too strong, or too weak, to tell anything"
    outcomes = [row['outcome'] for row in results[0].values()]
    assert outcomes.count('read') > 100
    assert outcomes.count('refused') > 200

def test_none_takes_long(results):
    assert {name: row['seconds'] for name, row in results[0].items() if row['seconds'] > fuzzer.SECONDS} == {}

def test_nothing_of_hers_in_a_message(results):
    rows, errors = results
    said = {name: row['said'].replace(str(name), '').lower() for name, row in rows.items()} | {'terminal': errors.lower()}
    found = {name: [w for w in fuzzer.WORDS if w in text] for name, text in said.items()}
    assert {name: words for name, words in found.items() if words} == {}

def test_nothing_of_hers_in_the_table_of_a_folder(files, capfd):
    folder = next(iter(files.values())).parent
    cohort, left_out = dicom_folder(folder)
    text = left_out.to_csv() + ''.join(capfd.readouterr()) + cohort.images.get('notes', left_out.path).to_csv()
    assert [word for word in fuzzer.WORDS if word in text.lower()] == []
    assert len(left_out) > 200
