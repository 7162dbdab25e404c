"""Checkpoints that were damaged or cut off, and entries of the cache in the place of others."""
import shutil
import numpy as np
import pandas as pd
import pytest
import torch
import mammo_nb.core.fastai_import
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from torch import nn
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import seed_everything
from mammo_nb.dicom.write import write_mammogram
from mammo_nb.learners.resume import ResumeTraining, read_checkpoint
from mammo_nb.preparation.cache import Cache, unpack_entry
from mammo_nb.preparation.prepare import PrepareConfig
from mammo_nb.preparation.prepared_cohort import prepare_cohort

# ---- checkpoints

REMEDY = 'delete the file to begin anew, or use another folder'


def learner(folder, seed=0):
    "A line through points, with a checkpoint"
    seed_everything(seed)
    x = torch.linspace(-1, 1, 32)[:, None]
    loaders = [TfmdDL(list(zip(x[i::2], 2*x[i::2])), bs=8, num_workers=0) for i in (0, 1)]
    net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
    return Learner(DataLoaders(*loaders, device='cpu'), net, nn.functional.mse_loss, lr=.01,
                   cbs=[ResumeTraining(folder)])


def fit(learn, epochs=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    fit(learner(folder))
    return (folder/'checkpoint.pt').read_bytes()


def refused(folder, data):
    "The error of a training with these bytes as its checkpoint; nothing is trained, nothing is written"
    file = folder/'checkpoint.pt'
    file.write_bytes(data)
    learn = learner(folder)
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(InputError) as e: fit(learn)
    assert all(map(torch.equal, before, learn.model.parameters()))
    assert file.read_bytes() == data and [p.name for p in folder.iterdir()] == ['checkpoint.pt']
    message = str(e.value)
    assert 'checkpoint.pt: ' in message and REMEDY in message
    return message


def test_every_changed_byte_of_a_checkpoint_is_noticed(whole, tmp_path):
    "Most bytes are weights: PyTorch reads them without a doubt, and the training goes on with wrong ones"
    rng = np.random.default_rng(0)
    for i in [len(whole)-1, 0, *rng.choice(len(whole), 60, replace=False), len(whole)//2]:
        bad = bytearray(whole)
        bad[i] ^= 1 << int(rng.integers(8))
        (tmp_path/'checkpoint.pt').write_bytes(bad)
        with pytest.raises(InputError, match='checkpoint.pt: checksum: found'): read_checkpoint(tmp_path/'checkpoint.pt')
    assert 'the file is damaged' in refused(tmp_path, bytes(bad))


@pytest.mark.parametrize('kept', [0, 1, 100, .5, -100, -75, -74, -73, -1])
def test_a_checkpoint_that_was_cut_off_is_refused(whole, tmp_path, kept):
    n = int(kept*len(whole)) if isinstance(kept, float) else kept % len(whole)
    refused(tmp_path, whole[:n])


def test_bytes_after_the_end_are_noticed(whole, tmp_path):
    refused(tmp_path, whole+b'\0')


def test_a_checkpoint_of_before_is_refused_by_its_format(whole, tmp_path):
    "Those of format 5 had no checksum"
    file = tmp_path/'checkpoint.pt'
    file.write_bytes(whole)
    saved = read_checkpoint(file)
    torch.save(saved | dict(format=5), file)
    assert 'format: found 5' in refused(tmp_path, file.read_bytes())
    torch.save(saved, file) # by hand
    assert 'checksum: found none' in refused(tmp_path, file.read_bytes())


def test_a_whole_checkpoint_is_taken_and_replaced(whole, tmp_path):
    (tmp_path/'checkpoint.pt').write_bytes(whole)
    once = fit(learner(tmp_path, seed=5))
    assert len(once.recorder.values) == 2 # nothing was left to train
    assert (tmp_path/'checkpoint.pt').read_bytes() == whole
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['done'] == 2 # a file of PyTorch, as before


# ---- entries of the cache

CONFIG = PrepareConfig(size=(96, 64))


def draw(path, seed):
    y, x = np.mgrid[:300, :200]
    depth = np.clip(1 - (x/120)**2 - ((y-150)/120)**2, 0, None)**.4
    grain = np.random.default_rng(seed).integers(0, 600, (300, 200))
    return write_mammogram(path, (3000*depth + (depth > 0)*grain).astype(np.uint16), 'L', 'CC', pixel_spacing_mm=.5)


@pytest.fixture
def films(tmp_path):
    return [draw(tmp_path/f'{i}.dcm', i) for i in (0, 1)]


def test_an_entry_in_the_place_of_another_image_is_refused(films, tmp_path):
    "Its checksum is right: the pixels of another woman came back without a word"
    cache = Cache(tmp_path/'c')
    (first, _, _), (second, other, _) = [cache.get_or_prepare(film, 'L', CONFIG) for film in films]
    shutil.copy(cache.entry(second), cache.entry(first))
    for read in (lambda: cache.load(first), lambda: cache.prepare(films[0], 'L', CONFIG)):
        with pytest.raises(InputError, match='the entry of another image .*delete entries/') as e: read()
        assert e.value.where == str(cache.entry(first))
    assert (cache.load(second).image == other.image).all()
    cache.entry(first).unlink() # as the message says
    assert cache.get_or_prepare(films[0], 'L', CONFIG)[2]


def test_an_entry_renamed_to_other_parameters_is_refused(films, tmp_path):
    cache, other = Cache(tmp_path/'c'), PrepareConfig(size=(96, 64), crop=False)
    key, _, _ = cache.get_or_prepare(films[0], 'L', CONFIG)
    wanted = cache.key(cache.checksum(films[0]), 'L', other)
    cache.entry(wanted).parent.mkdir(exist_ok=True)
    cache.entry(key).rename(cache.entry(wanted))
    with pytest.raises(InputError, match='cache entry: found the entry of another image or preparation'):
        cache.prepare(films[0], 'L', other)


def test_an_entry_says_its_key(films, tmp_path):
    cache = Cache(tmp_path/'c')
    key, done, _ = cache.get_or_prepare(films[0], 'L', CONFIG)
    data = cache.entry(key).read_bytes()
    assert (unpack_entry(data, key).image == done.image).all()
    with pytest.raises(InputError, match='key'): unpack_entry(data, 'f'*64)


@pytest.mark.parametrize('workers', [1, 2])
def test_a_cohort_lists_the_image_whose_entry_is_not_its_own(films, tmp_path, workers, monkeypatch):
    monkeypatch.setattr('mammo_nb.preparation.cache._RACY_NS', 0)
    rows = [dict(image_id=str(i), patient_id=f'p{i}', exam_id=f'e{i}', laterality='L', view='CC', path=f'{i}.dcm') for i in (0, 1)]
    cohort = Cohort(pd.DataFrame(rows), None, tmp_path)
    prepared = prepare_cohort(cohort, tmp_path/'c', CONFIG, 1, progress=False)
    first, second = (prepared.cache.entry(prepared.keys[str(i)]) for i in (0, 1))
    shutil.copy(second, first)
    with pytest.raises(InputError, match='cache entry'): prepared.load('0')
    again = prepare_cohort(cohort, tmp_path/'c', CONFIG, workers, progress=False)
    assert list(again.keys) == ['1']
    [failure] = again.failures.itertuples()
    assert failure.image_id == '0' and failure.what == 'cache entry' and first.name in failure.expected
