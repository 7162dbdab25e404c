"The section of the tour on drawing a lesion: trained once, nothing changes outside the hole, and the lesion itself is not read"
import matplotlib
import numpy as np
import pytest
import torch
matplotlib.use('Agg')
from mammo_nb.learners.lesion_ldm import lesion_samples
from mammo_nb.models.lesion_ldm import LesionLDM
from mammo_nb.report.sections import make_section
from mammo_nb.report.tour import Tour, TourConfig
from mammo_nb.report.tour_lesions import draw_lesions, hole_means, lesion_model, lesion_patients, lesion_numbers, lesions
from mammo_nb.samples.lesion_synthesis import lesion_patches

SMALL = dict(n_patients=8, seed=3, n_boot=20, n_lesion_patients=16, lesion_epochs=1)


def small_tour(folder, **choices):
    return Tour(folder, TourConfig(**SMALL | choices), workers=1, tell=lambda line: None, progress=False)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('tour')


@pytest.fixture(scope='module')
def parts(folder):
    tour = small_tour(folder)
    prepared = lesion_patients(tour)
    model = lesion_model(tour, prepared)
    rows = lesion_patches(prepared.cohort).query("split == 'test'").drop_duplicates('patient_id').head(3).reset_index(drop=True)
    dataset = lesion_samples(prepared, rows, model)
    return model, dataset, draw_lesions(model, dataset)


def made(tour): return [o['stage'] for o in tour.stages.log if not o['reused']]


def test_the_network_is_trained_once_and_again_for_other_choices(folder, parts):
    again = small_tour(folder, n_boot=30)
    model = lesion_model(again, lesion_patients(again))
    assert made(again) == []
    for a, b in zip(model.state_dict().values(), parts[0].state_dict().values()): assert torch.equal(a, b)
    other = small_tour(folder, train_seed=1)
    lesion_model(other, lesion_patients(other))
    assert made(other) == ['lesion_ldm']


def test_outside_the_hole_all_images_are_the_true_patch(parts):
    images = parts[2]
    outside = ~images['mask']
    for name in ('mass', 'healthy'): assert torch.equal(images[name][outside], images['true'][outside])
    assert not torch.equal(images['mass'], images['healthy'])


def test_the_true_lesion_is_not_read(parts, monkeypatch):
    "The samples with the lesion still in the patch give the same drawings"
    model, dataset, images = parts
    real = LesionLDM.sample
    def sample(self, inputs, **options): return real(self, dict(inputs, masked_image=images['true']), **options)
    monkeypatch.setattr(LesionLDM, 'sample', sample)
    again = draw_lesions(model, dataset)
    for name in ('mass', 'healthy'): assert torch.equal(again[name], images[name])


def test_the_contrast_is_the_mean_over_the_pixels_of_each_hole(parts):
    model, dataset, images = parts
    each = []
    for k in range(len(dataset)):
        mask = images['mask'][k].numpy()
        each.append(images['mass'][k].numpy()[mask].mean()-images['healthy'][k].numpy()[mask].mean())
    found = hole_means(images, 'mass')-hole_means(images, 'healthy')
    np.testing.assert_allclose(found, each, atol=1e-6)
    table = lesion_numbers(model, dataset, images, 20)
    assert float(table['value'].iloc[-1].split()[0]) == pytest.approx(np.mean(each), abs=1e-3)


def test_the_section_is_whole(folder):
    html = make_section(small_tour(folder), 'Drawing a lesion', lesions).to_html()
    assert html.count('<figure>') == 1 and 'say nothing' in ' '.join(html.split())
