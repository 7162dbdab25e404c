"""Maps of earlier networks as a part of three-view samples: they come by image id, move with the main image, and never go amiss."""
import pandas as pd
import pytest
import torch
from tiny_prepared import SIZE, TinyPrepared, tiny_images

from mammo_nb.core.errors import InputError
from mammo_nb.samples.augment import Augment
from mammo_nb.samples.sample import collate_samples
from mammo_nb.samples.three_views import MASS_MAPS, ThreeViewDataset, three_view_cases


def prepared_and_maps():
    prepared = TinyPrepared(tiny_images(dict(p1='train', p2='valid'), exams=1))
    rows = three_view_cases(prepared.cohort)
    maps = {}
    for k, image_id in enumerate(rows.image_id):
        maps[image_id] = {name: torch.full((1, *SIZE), (k+1)/10+j/100) for j, name in enumerate(MASS_MAPS)}
    return prepared, rows, maps


def dataset(maps, **options):
    prepared, rows, _ = prepared_and_maps()
    ds = ThreeViewDataset(prepared, rows, maps=maps, in_memory=False, **options)
    ds.annotations = {i: dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0), nipple=None, spacing_mm=1.) for i in rows.image_id}
    return ds


def test_each_image_gets_its_own_maps():
    maps = prepared_and_maps()[2]
    ds = dataset(maps)
    for i, image_id in enumerate(ds.rows.image_id):
        x, _ = ds[i]
        assert all(torch.equal(x[name], maps[image_id][name]) for name in MASS_MAPS)
    x, _ = collate_samples([ds[0], ds[1]])
    assert x['map_bidual'].shape == (2, 1, *SIZE)
    assert not set(MASS_MAPS) & set(dataset(None)[0][0])


def test_maps_of_16_bits_come_as_32():
    maps = {i: {name: m.half() for name, m in both.items()} for i, both in prepared_and_maps()[2].items()}
    assert dataset(maps)[0][0]['map_ipsidual'].dtype == torch.float32


def test_missing_maps_are_counted():
    maps = prepared_and_maps()[2]
    first, second, *_ = maps
    rest = {k: v for k, v in maps.items() if k not in (first, second)}
    with pytest.raises(InputError, match=f'maps: found none for 2 main images, such as {first}'):
        dataset(rest)


@pytest.mark.parametrize('wrong', [None, torch.zeros(1, 16, 12)])
@pytest.mark.parametrize('name', MASS_MAPS)
def test_maps_of_another_size_are_named(name, wrong):
    maps = prepared_and_maps()[2]
    last = list(maps)[-1]
    maps[last] = maps[last] | {name: wrong}
    with pytest.raises(InputError, match=f'maps of {last}: {name}'):
        dataset(maps)


def test_maps_move_with_the_main_image():
    "Here with an image that is its own map: both change alike, except for exposure"
    maps = prepared_and_maps()[2]
    ds = dataset(maps)
    batch = collate_samples([ds[i] for i in range(4)])
    x = batch[0]
    place = torch.zeros(4, 1, *SIZE)
    place[:, :, 8:20, 6:16] = 1
    x['main'], x['map_ipsidual'], x['map_bidual'] = place.clone(), place.clone(), place.clone()
    torch.manual_seed(0)
    moved = Augment(gain=0, gamma=0, flip=.5).encodes(batch)[0]
    assert torch.allclose(moved['map_ipsidual'], moved['main'], atol=1e-5)
    assert torch.equal(moved['map_ipsidual'], moved['map_bidual'])
    assert not torch.equal(moved['main'], place)


def test_an_exported_learner_takes_no_maps_along():
    parts = dataset(prepared_and_maps()[2]).empty_parts()
    assert parts['maps'] is None and parts['flows'] is None
    assert parts['annotations'] == {} and isinstance(parts['findings'], pd.DataFrame)
