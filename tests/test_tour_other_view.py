"The section of the tour on the other view: without PyRadiomics, without lesions, trained once, and rivals that see no test patient"
import sys

import matplotlib
import numpy as np
import pytest
matplotlib.use('Agg')
import mammo_nb.report.tour_other_view as section_module
import mammo_nb.report.tour_page as tour_page
from mammo_nb.metrics.image_quality import image_quality
from mammo_nb.metrics.tables import select_output
from mammo_nb.report.sections import make_section
from mammo_nb.report.tour import Tour, TourConfig
from mammo_nb.report.tour_other_view import (
    other_view, other_view_patients, other_view_results, predictor_text, score_images, score_rivals)
from mammo_nb.samples.view_synthesis import ViewSynthesisDataset, view_rows

SMALL = dict(n_patients=8, seed=3, epochs=1, batch_size=2, size=(96, 72), n_boot=20, n_other_view_patients=24, other_view_epochs=1)


def small_tour(folder, **choices):
    return Tour(folder, TourConfig(**SMALL | choices), workers=1, tell=lambda line: None, progress=False)


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('tour')


@pytest.fixture(scope='module')
def prepared(folder): return other_view_patients(small_tour(folder))


@pytest.fixture
def no_radiomics(monkeypatch): monkeypatch.setitem(sys.modules, 'radiomics.featureextractor', None)


def test_without_pyradiomics_the_section_says_so_and_makes_nothing(tmp_path, no_radiomics):
    tour = small_tour(tmp_path)
    section = make_section(tour, 'The other view', other_view)
    assert len(section.blocks) == 1 and section.blocks[0].startswith('<aside>')
    assert 'skipped' in section.blocks[0] and 'pip install pyradiomics-bhklab' in section.blocks[0]
    assert list(tour.skipped) == ['The other view'] and 'make radiomics' in tour.skipped['The other view']
    assert tour.stages.log == [] and list((tmp_path/'stages').iterdir()) == []


@pytest.mark.parametrize('titles, text', [(['a'], '1 section skipped: a.'), (['a', 'b'], '2 sections skipped: a, b.')])
def test_skipped_sections_are_counted(tmp_path, titles, text):
    tour = small_tour(tmp_path)
    tour.skipped = dict.fromkeys(titles, 'why')
    assert tour_page.skipped_text(tour) == text


def test_a_tour_without_pyradiomics_ends_with_the_count(tmp_path, monkeypatch, no_radiomics):
    "On its page and in its last lines; all else is there"
    few = [s for s in tour_page.find_sections() if s[1] in ('The other view', 'How this page was made')]
    monkeypatch.setattr(tour_page, 'find_sections', lambda: few)
    told = []
    page = tour_page.run_tour(tmp_path, TourConfig(**SMALL), workers=1, tell=told.append, progress=False).read_text()
    assert [line.strip() for line in told if 'section skipped' in line] == ['1 section skipped: The other view.']
    assert page.count('1 section skipped: The other view.') == 1
    assert 'pip install pyradiomics-bhklab' in page


def test_an_image_is_compared_inside_the_breast_alone(prepared):
    rows = view_rows(prepared.cohort).head(3)
    dataset = ViewSynthesisDataset(prepared, rows)
    outside = [y['target'] + .5*(y['target'] == 0) for _, y in dataset]
    found = score_images(dataset, outside, 'x').set_index('output')['value']
    assert (found['l1_breast'] == 0).all() and (found['psnr_breast'] == section_module.PSNR_LIMIT).all()
    assert (found['ssim_breast'] < 1).all()  # its window reaches over the border


def test_rivals_know_the_training_patients_and_the_cc_alone(prepared):
    "Both by hand, from the prepared images"
    rows = view_rows(prepared.cohort)
    train, test = (rows[rows.split == split].reset_index(drop=True) for split in ('train', 'test'))
    image = lambda i: np.asarray(prepared.load(i).image[0])
    found = score_rivals(prepared, ViewSynthesisDataset(prepared, train))
    mean = np.mean([image(i) for i in train.image_id_mlo], axis=0)
    for system, drawn in (('mean_mlo', [mean]*len(test)), ('copy_cc', map(image, test.image_id_cc))):
        true = [image(i) for i in test.image_id_mlo]
        expected = [image_quality(d, t, 1., t > 0)['ssim_breast'] for d, t in zip(drawn, true)]
        np.testing.assert_allclose(select_output(found, 'ssim_breast', system)['value'], expected, atol=1e-5)


def test_the_network_is_trained_once_and_again_for_other_choices(folder, tmp_path):
    pytest.importorskip('radiomics')
    tour = small_tour(folder)
    table = other_view_results(tour)[1]
    made = lambda tour: [o['stage'] for o in tour.stages.log if not o['reused']]
    again = small_tour(folder, n_boot=30)
    assert other_view_results(again)[1].equals(table) and made(again) == []
    assert other_view_results(small_tour(tmp_path))[1].equals(table)  # in another folder, from nothing
    longer = small_tour(folder, other_view_epochs=2)
    other = other_view_results(longer)[1]
    assert made(longer) == ['other_view']
    rivals = lambda t: t[t.system != 'radiomics_gan'].reset_index(drop=True)
    assert rivals(other).equals(rivals(table)) and not other.equals(table)


@pytest.mark.parametrize('skill', [None, 0., -.3, float('nan')])
def test_only_a_predictor_that_beats_the_mean_is_praised(skill):
    assert 'judges no drawing' in ' '.join(predictor_text(skill).split())
    assert '12 % less' in predictor_text(.12)


@pytest.mark.parametrize('train_seed, skill', [(5, None), (6, -.3)])
def test_a_predictor_that_learnt_nothing_judges_no_drawing(folder, monkeypatch, train_seed, skill):
    "And the section is whole all the same"
    pytest.importorskip('radiomics')
    given = []
    def learner(*args, **kwargs):
        given.append(kwargs)
        return make(*args, **kwargs)
    make = section_module.radiomics_gan_learner
    monkeypatch.setattr(section_module, 'radiomics_gan_learner', learner)
    monkeypatch.setattr(section_module, 'measure_skill', lambda model, dls: skill)
    tour = small_tour(folder, train_seed=train_seed)
    html = make_section(tour, 'The other view', other_view).to_html()
    assert len(given) == 1 and 'predictor' not in given[0]
    assert 'judges no drawing' in ' '.join(html.split()) and html.count('<figure>') == 1
