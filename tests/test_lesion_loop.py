"The reconstruction loop: ceilings and floors that networks of known behaviour reach, and judges that are refused."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from mammo_nb.core.errors import InputError
from mammo_nb.core.hub import model_version
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.lesion_loop import (
    LOOP_SOURCES, SHUFFLED, compare_loop, dataset_attributes, evaluate_loop, loop_images, loop_table, shuffle_attributes)
from mammo_nb.models.autoencoder import PatchAutoencoder
from mammo_nb.models.lesion_ldm import LesionLDM
from mammo_nb.models.lesion_verifier import LesionVerifier, verifier_targets
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.samples.lesion_synthesis import lesion_dls
from mammo_nb.samples.loaders import prediction_dl

MASS = ('mass',)


@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    folder = tmp_path_factory.mktemp('loop')
    cohort = insilico_cohort(12, seed=4, exams=1, benign=1., rows=96, cols=72, pixel_spacing_mm=2.5)
    files = cohort.write(folder/'files', workers=1, progress=False)
    prepared = prepare_cohort(files, folder/'cache', size=(96, 72), workers=1, progress=False)
    return lesion_dls(prepared, bs=8, size=16, context=None, augment=None, seed=0, device='cpu', num_workers=0)


@pytest.fixture(scope='module')
def dataset(dls): return dls.train_ds


class Reader(nn.Module):
    "Sees a mass where a pixel is white"
    buckets, training_info = 'suspicious', {}

    def predict_attributes(self, image):
        mass = (image.amax((1, 2, 3)) > .99).long()
        return {name: mass for name in ('mass', 'birads', 'density', 'view')}


def painter(paint):
    "A network that fills the hole with one grey level"
    def draw(inputs, seed, **options):
        grey = paint(inputs, seed).view(-1, 1, 1, 1)
        return torch.where(inputs['mask'].bool(), grey, .5*inputs['masked_image'])
    autoencoder = SimpleNamespace(encode=lambda image: image, decode=lambda latent: latent)
    return SimpleNamespace(draw=draw, autoencoder=autoencoder, device='cpu', training_info={})


def follow(inputs, seed): return inputs['category'][:, 0].float()


def ignore(inputs, seed): return torch.tensor([float(s % 2) for s in seed])


def gate(value=.9, low=.8):
    "A table as from `measure_verifier`"
    return pd.DataFrame(dict(head=['mass', 'birads', 'density', 'view'], balanced_accuracy=value, balanced_accuracy_low=low,
                             balanced_accuracy_high=1., chance=.5))


def accuracy(table, source):
    own = table[table.source == source]
    return (own.label == own['value']).mean()


@pytest.mark.parametrize('n', [2, 3, 50])
def test_shuffling_is_one_cycle_of_whole_rows(n):
    x = {name: torch.arange(n) for name in SHUFFLED}
    y = shuffle_attributes(x | dict(box=torch.arange(n), mask=torch.arange(n)), seed=3)
    at, steps = 0, 0
    while steps == 0 or at != 0: at, steps = int(y['birads'][at]), steps+1
    assert steps == n
    for name in SHUFFLED: assert torch.equal(y[name], y['birads'])
    for name in ('box', 'mask'): assert torch.equal(y[name], torch.arange(n))
    assert torch.equal(x['birads'], torch.arange(n)) # the given ones are as they were
    again = shuffle_attributes(x, seed=3)
    assert torch.equal(again['view'], y['view'])


def test_attributes_of_a_dataset_are_those_of_its_batches(dataset):
    inputs, _ = prediction_dl(dataset, len(dataset)).one_batch()
    for name, values in dataset_attributes(dataset).items(): assert torch.equal(values, inputs[name])


def test_a_network_that_follows(dataset):
    table = loop_table(painter(follow), Reader(), dataset, gate(), MASS, seed=2, bs=5)
    own = dataset_attributes(dataset)['category'][:, 0]
    other = shuffle_attributes(dataset_attributes(dataset), 2)['category'][:, 0]
    assert accuracy(table, 'drawn') == accuracy(table, 'followed') == 1
    assert accuracy(table, 'shuffled') == pytest.approx((own == other).float().mean().item())
    assert list(table.source.unique()) == list(LOOP_SOURCES)
    assert len(table) == len(LOOP_SOURCES)*len(dataset)
    gain = compare_loop(table, n_boot=100).set_index('difference').loc['drawn - shuffled']
    assert gain.ci_low > 0


def test_a_network_that_does_not_listen_is_at_the_floor(dataset):
    table = loop_table(painter(ignore), Reader(), dataset, gate(), MASS, bs=5)
    columns = ['patient_id', 'sample', 'label', 'value']
    drawn, floor = (table[table.source == name][columns].reset_index(drop=True) for name in ('drawn', 'shuffled'))
    assert drawn.equals(floor)
    gain = compare_loop(table, n_boot=100).set_index('difference').loc['drawn - shuffled']
    assert gain.value == gain.ci_low == gain.ci_high == 0


def test_surroundings_raise_the_floor_too(dataset):
    "A network that reads the answer outside the hole agrees with what was asked, and gains nothing by being asked"
    answers = {}
    for i in range(len(dataset)):
        x, _ = dataset[i]
        answers[x['masked_image'].sum().item()] = float(x['category'][0])
    def read(inputs, seed): return torch.tensor([answers[x.sum().item()] for x in inputs['masked_image']])
    table = loop_table(painter(read), Reader(), dataset, gate(), MASS)
    assert accuracy(table, 'drawn') == accuracy(table, 'shuffled') == 1
    assert accuracy(table, 'followed') < 1 # compared with attributes of others it looks like chance


def test_batches_do_not_change_the_table(dataset):
    tables = [loop_table(painter(ignore), Reader(), dataset, gate(), MASS, bs=bs) for bs in (3, 64)]
    assert tables[0].equals(tables[1])


def test_controls_are_marked(dataset):
    table = loop_table(painter(follow), Reader(), dataset, gate(), ('mass', 'density'))
    found = evaluate_loop(table, n_boot=20)
    assert found.groupby('attribute').in_hole.first().to_dict() == dict(mass=True, density=False)
    real = found[(found.source == 'real') & (found.attribute == 'mass')].iloc[0]
    images = torch.stack([dataset[i][1]['image'] for i in range(len(dataset))])
    predicted = Reader().predict_attributes(images)['mass']
    true = verifier_targets(dataset_attributes(dataset))['mass']
    assert real.accuracy == pytest.approx((predicted == true).float().mean().item())


def test_images_differ_in_the_hole_only(dls):
    torch.manual_seed(0)
    autoencoder = PatchAutoencoder(channels=(4, 8), blocks=1, attention=False)
    model = LesionLDM(autoencoder, size=16, denoiser='transformer', denoiser_args=dict(width=16, depth=1, heads=2), dim=16,
                      vit=dict(dim=16, depth=1, heads=2, patch=8), steps=2).eval()
    inputs, targets = prediction_dl(dls.valid_ds, 4).one_batch()
    other = shuffle_attributes(inputs)
    images = loop_images(model, inputs, targets['image'], {name: other[name] for name in SHUFFLED}, seed=1)
    outside = ~inputs['mask']
    for image in images.values(): assert torch.equal(image[outside], inputs['masked_image'][outside])
    assert torch.equal(images['real'], targets['image'])
    assert torch.equal(images['drawn'], model.draw(inputs, seed=1))
    assert torch.equal(images['shuffled'], model.draw(other, seed=1))


def test_refused_judges(dataset, dls):
    model, reader = painter(follow), Reader()
    with pytest.raises(InputError, match='mass 0.55'): loop_table(model, reader, dataset, gate(.55), MASS)
    verifier = LesionVerifier(width=4).eval()
    model.training_info = dict(cycle_verifier=model_version(verifier))
    with pytest.raises(InputError, match='cycle loss'): loop_table(model, verifier, dataset, gate(), MASS)
    for name, value in dict(size=32, context=2., fixed_mm=40., margin=.5, limits=[1, 2]).items():
        verifier.set_training_info(dls.description | {name: value})
        with pytest.raises(InputError, match=f'{name} of the dataset'):
            loop_table(painter(follow), verifier, dataset, gate(), MASS)
    verifier.set_training_info(dls.description | dict(prepare=dls.description['prepare'] | dict(size=[1, 2])))
    with pytest.raises(InputError, match='prepared images'): loop_table(painter(follow), verifier, dataset, gate(), MASS)
    untrained = LesionVerifier(width=4)
    with pytest.raises(InputError, match='training mode'): loop_table(painter(follow), untrained, dataset, gate(), MASS)
