"Lesions that grow, counterfactual pairs, and the risk that a risk model predicts for them."
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from mammo_nb.core.errors import InputError
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.lesion_evolution import (
    HEALTHY, add_paired_image, as_pipeline, counterfactual_pair, draw_at_box, draw_series,
    drawn_dataset, growing_boxes, patient_means, rank_correlation, risk_change,
    score_drawn, score_series, size_factors)
from mammo_nb.learners.systems import predict
from mammo_nb.models.autoencoder import PatchAutoencoder
from mammo_nb.models.lesion_ldm import LesionLDM
from mammo_nb.models.lesion_pipeline import draw_settings, lesion_inputs
from mammo_nb.models.lmvnet import LMVNet
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.samples.lesion_synthesis import LesionSynthesisDataset, hole_mask, lesion_patches, paste_patch
from mammo_nb.samples.risk import RiskDataset, breast_history

BOX = (20, 30, 32, 40)


def tiny_ldm(**options):
    "An untrained network whose weights are random everywhere, so that it reads its condition"
    torch.manual_seed(0)
    model = LesionLDM(
        PatchAutoencoder(channels=(4, 8), blocks=1, attention=False), size=16, dim=16, steps=2,
        denoiser='transformer', denoiser_args=dict(width=16, depth=1, heads=2),
        vit=dict(dim=16, depth=1, heads=2, patch=8), **options)
    for parameter in model.net.parameters(): parameter.data += .3*torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope='module')
def model(): return tiny_ldm()


@pytest.fixture(scope='module')
def image(): return torch.rand(1, 96, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('evolution')
    cohort = insilico_cohort(5, seed=3, exams=3, benign=1., rows=192, cols=144, pixel_spacing_mm=1.25)
    files = cohort.write(folder/'files', workers=1, progress=False)
    return prepare_cohort(files, folder/'cache', size=(96, 80), workers=1, progress=False)


@pytest.fixture(scope='module')
def risk():
    torch.manual_seed(0)
    return LMVNet('small', stride=8, width=4, heads=2).eval()


@pytest.fixture(scope='module')
def rows(prepared):
    rows = breast_history(prepared.cohort, current='last')
    return rows[rows.image_id_cc.notna() & rows.previous_image_id_cc_1.notna()].reset_index(drop=True)


def test_boxes_grow_around_one_middle():
    boxes = growing_boxes(BOX, (None, 0, .5, 2), (96, 64))
    assert np.isnan(boxes[:2]).all()
    assert boxes[2].tolist() == [23, 32.5, 29, 37.5] and boxes[3].tolist() == [14, 25, 38, 45]
    with pytest.raises(InputError, match='4.33 at most'): growing_boxes(BOX, (1, 5), (96, 64))
    with pytest.raises(InputError, match='factors'): growing_boxes(BOX, (-1,))
    with pytest.raises(InputError, match='factors'): growing_boxes(BOX, (np.nan,))
    with pytest.raises(InputError, match='xmin < xmax'): growing_boxes((20, 30, 20, 40), (1,))
    np.testing.assert_allclose(size_factors(BOX, (0, 3, 12), .5), [0, .5, 2])


@pytest.mark.parametrize('settings', [
    dict(context=3.), dict(context=2., limits=(20, 30)), dict(context=None), dict(fixed_mm=25.), dict(margin=.5)])
def test_windows_are_those_of_training(prepared, settings):
    settings = dict(size=16, limits=None) | settings
    dataset = LesionSynthesisDataset(prepared, lesion_patches(prepared.cohort), **settings)
    model = tiny_ldm()
    model.set_training_info(dataset.settings)
    assert len(dataset)
    for i in range(len(dataset)):
        box, window = dataset.place_of(i)
        about = prepared.load(dataset.rows.image_id[i])
        own = draw_settings(model, box, about.scale, about.spacing_mm)
        side = max(box[2]-box[0], box[3]-box[1])
        width = 16 if own['context'] is None else round(own['context']*side)
        assert width == window[2]-window[0] and own['margin'] == dataset.settings['margin']


def test_what_windows_need_must_be_known():
    model = tiny_ldm()
    assert draw_settings(model, BOX) == dict(context=3., margin=.25)
    for info in (dict(context=3., limits=[10, 20]), dict(context=3., fixed_mm=30.)):
        model.set_training_info(info)
        with pytest.raises(InputError, match='give a Prepared image'): draw_settings(model, BOX)


def test_the_pipeline_cuts_windows_as_in_training(image):
    model, options = tiny_ldm(), dict(num_inference_steps=2, seed=3)
    pipeline = as_pipeline(model)
    for context in (None, 2.):
        model.set_training_info(dict(context=context, margin=.1))
        drawn = pipeline.draw_in(image, BOX, options=options, kinds='mass')
        inputs, window = lesion_inputs(image, BOX, 16, context, .1, kinds='mass')
        filled = paste_patch(image, pipeline(inputs, **options).images[0], window)
        hole = hole_mask(BOX, image.shape[-2:], .1)
        assert torch.equal(drawn, torch.where(hole, filled, image))
    model.set_training_info(dict(context=3., limits=[10, 20]))
    with pytest.raises(InputError, match='give a Prepared image'): pipeline.draw_in(image, BOX, kinds='mass')
    assert pipeline.draw_in(image, BOX, dict(scale=1.), options, kinds='mass').shape == image.shape


@pytest.mark.parametrize('fill', [False, True])
def test_series(model, image, fill):
    factors = (None, .5, 1, 1.5)
    series = draw_series(model, image, BOX, factors, seed=4, fill=fill, birads='5')
    assert series.shape == (4, *image.shape)
    outside = ~hole_mask(growing_boxes(BOX, factors)[-1], image.shape[-2:])
    for one in series: assert torch.equal(one[outside], image[outside])
    assert torch.equal(series[0], image) != fill
    for a, b in zip(series, series[1:]): assert not torch.equal(a, b)
    for one, box in zip(series[1:], growing_boxes(BOX, factors)[1:]): # each has a hole of its own
        own = ~hole_mask(box, image.shape[-2:])
        assert torch.equal(one[own], series[0][own])
    again = draw_series(model, image, BOX, factors, seed=4, fill=fill, birads='5')
    assert torch.equal(series, again)
    other = draw_series(model, image, BOX, factors, seed=5, fill=fill, birads='5')
    assert not torch.equal(series[1:], other[1:])


def test_a_filled_series_does_not_read_the_largest_hole(model, image):
    hole = hole_mask(growing_boxes(BOX, (1.5,))[0], image.shape[-2:])
    hidden = torch.where(hole, 1-image, image)
    same = [draw_series(model, one, BOX, (0, .5, 1.5), fill=True) for one in (image, hidden)]
    assert torch.equal(*same)
    without = [draw_series(model, one, BOX, (0, .5, 1.5)) for one in (image, hidden)]
    assert not torch.equal(without[0][1], without[1][1])


def test_one_drawing_is_that_of_the_pipeline(model, image):
    pipeline = as_pipeline(model)
    options = dict(num_inference_steps=2, guidance_scale=1., seed=3)
    expected = pipeline.draw_in(image, BOX, options=options, kinds='mass', birads='4')
    assert torch.equal(draw_at_box(pipeline, image, BOX, 3, birads='4'), expected)
    assert torch.equal(draw_series(model, image, BOX, (1,), 3, birads='4')[0], expected)
    more = draw_at_box(model, image, BOX, 3, options=dict(num_inference_steps=3), birads='4')
    assert not torch.equal(more, expected)
    with pytest.raises(InputError, match='does not see the hole'): as_pipeline(tiny_ldm(mask_mode='roi'))
    with pytest.raises(InputError, match='at least one above 0'): draw_series(model, image, BOX, (0,))


def test_counterfactuals(model, image):
    hole = hole_mask(BOX, image.shape[-2:])
    hidden = torch.where(hole, 1-image, image)
    for change, attributes in (('lesion', dict(birads='4')), ('margins', {})):
        pair = counterfactual_pair(model, image, BOX, change, 2, **attributes)
        a, b = pair.values()
        assert torch.equal(a[~hole], image[~hole]) and torch.equal(b[~hole], image[~hole])
        assert not torch.equal(a, b)
        blind = counterfactual_pair(model, hidden, BOX, change, 2, **attributes)
        for name in pair: assert torch.equal(pair[name][hole], blind[name][hole])
    assert [*pair] == ['benign', 'malignant']
    healthy = draw_at_box(model, image, BOX, 2, **HEALTHY)
    assert torch.equal(counterfactual_pair(model, image, BOX, 'lesion', 2)['without_lesion'], healthy)


def test_versions_of_ones_own(model, image):
    same = counterfactual_pair(model, image, BOX, dict(a=dict(birads='3'), b=dict(birads='3')))
    assert torch.equal(same['a'], same['b'])
    with pytest.raises(InputError, match='change'): counterfactual_pair(model, image, BOX, 'size')
    with pytest.raises(InputError, match='have their own'):
        counterfactual_pair(model, image, BOX, 'margins', birads='4')


def test_one_image_is_replaced_and_no_other(prepared, risk, rows):
    image_id = rows.image_id_mlo[0]
    drawn = torch.rand(1, *prepared.config.size)
    dataset = drawn_dataset(risk, prepared, rows, {image_id: drawn})
    assert dataset.rows.exam_id.tolist() == [rows.exam_id[0]] and dataset.rows.laterality[0] == rows.laterality[0]
    inputs, true = dataset[0][0], RiskDataset(prepared, dataset.rows)[0][0]
    assert inputs.keys() == true.keys()
    differ = [name for name in inputs if not torch.equal(inputs[name], true[name])]
    assert differ == ['current_image_mlo'] and torch.equal(inputs['current_image_mlo'], drawn)


def test_images_that_can_not_be_replaced_are_refused(prepared, risk, rows):
    drawn = torch.rand(1, *prepared.config.size)
    for name in (rows.previous_image_id_cc_1[0], 'nobody'):
        with pytest.raises(InputError, match='ids of current images'): score_drawn(risk, prepared, rows, {name: drawn})
    every = breast_history(prepared.cohort)
    both = {rows.image_id_cc[0]: drawn, rows.previous_image_id_cc_1[0]: drawn}
    with pytest.raises(InputError, match='prior of another row'): score_drawn(risk, prepared, every, both)
    with pytest.raises(InputError, match='finite'):
        score_drawn(risk, prepared, rows, {rows.image_id_cc[0]: drawn[:, 1:]})


def test_scores_of_series(prepared, risk, rows):
    ids = rows.image_id_cc[:3].tolist()
    true = {i: torch.from_numpy(prepared.load(i).image) for i in ids}
    series = {i: torch.stack([image, 1-image]) for i, image in true.items()}
    table = score_series(risk, prepared, rows, series, (0, 8), year=3)
    assert [*table] == ['patient_id', 'series', 'size', 'risk'] and len(table) == 6
    direct = predict(risk, prepared, rows=rows[:3]).query("output == 'risk_year_3'")['value'].tolist()
    np.testing.assert_allclose(table.risk[table['size'] == 0], direct, rtol=1e-6)
    changed = score_drawn(risk, prepared, rows, {ids[1]: series[ids[1]][1]}).query("output == 'risk_year_3'")
    np.testing.assert_allclose(table.risk[table['size'] == 8].iloc[1], changed['value'].iloc[0], rtol=1e-6)
    assert not np.allclose(table.risk[:3], table.risk[3:], atol=0, rtol=1e-6)
    with pytest.raises(InputError, match='found 2, expected 3'): score_series(risk, prepared, rows, series, (0, 1, 2))
    with pytest.raises(InputError, match='year'): score_series(risk, prepared, rows, series, (0, 1), year=9)


def hand_made(seed=0, noise=.2):
    "Series of 12 patients, two for every third, with ties"
    rng = np.random.default_rng(seed)
    parts = []
    for k in range(12):
        for s in range(1+(k % 3 == 0)):
            size = np.array([0, 5, 5, 10, 15, 20])
            value = (size/100+rng.normal(0, noise, 6)).round(1)
            parts.append(pd.DataFrame(dict(patient_id=f'P{k}', series=f'S{s}', size=size, risk=value)))
    return pd.concat(parts, ignore_index=True)


def test_rank_correlation_is_that_of_scipy():
    table = hand_made()
    by_patient = {}
    for (patient, _), own in table.groupby(['patient_id', 'series']):
        by_patient.setdefault(patient, []).append(spearmanr(own['size'], own.risk).statistic)
    expected = np.mean([np.mean(values) for values in by_patient.values()])
    found = rank_correlation(table, n_boot=200)
    np.testing.assert_allclose(found['value'], [expected])
    assert found.n.tolist() == [12] and (found.ci_low < found['value']).all() and (found.ci_high > found['value']).all()
    shuffled = table.sample(frac=1, random_state=1)
    np.testing.assert_allclose(rank_correlation(shuffled, n_boot=200)['value'], [expected])
    squared = table.assign(risk=np.exp(table.risk)) # only ranks count
    np.testing.assert_allclose(rank_correlation(squared, n_boot=200)['value'], [expected])


def test_a_control_is_subtracted_patient_by_patient():
    table, control = hand_made(), hand_made(1)
    found = rank_correlation(table, control, n_boot=200).set_index('metric')['value']
    assert [*found.index] == ['rank_correlation', 'control', 'difference']
    np.testing.assert_allclose(found.difference, found.rank_correlation-found.control)
    same = rank_correlation(table, table, n_boot=200).set_index('metric').loc['difference']
    assert same['value'] == same.ci_low == same.ci_high == 0


def test_constant_and_single_series():
    table = pd.DataFrame(dict(
        patient_id=[*'AABBC'], series='s', size=[0, 1, 0, 1, 1], risk=[.1, .2, .3, .3, .5]))
    found = rank_correlation(table, n_boot=100)
    assert found.n[0] == 2 and found['value'][0] == pytest.approx(.5) # 1 and 0; one size says nothing


def test_change_of_risk():
    table = hand_made()
    first = table[table['size'] == 0].groupby('patient_id').risk.mean()
    last = table[table['size'] == 20].groupby('patient_id').risk.mean()
    found = risk_change(table, n_boot=100).set_index('metric')['value']
    np.testing.assert_allclose(found[['first', 'last', 'change']], [first.mean(), last.mean(), (last-first).mean()])
    assert patient_means(table, len)['P1'] == 6


def test_a_paired_image_is_read_and_nan_is_absent(image):
    model = tiny_ldm(extra_dim=5)
    inputs = dict(masked_image=torch.rand(2, 1, 16, 16), mask=torch.ones(2, 1, 16, 16, dtype=torch.bool))
    size = 16//model.autoencoder.cell
    noisy, t = torch.randn(2, model.autoencoder.latent_channels, size, size), torch.tensor([500, 500])
    embedding = torch.randn(5)
    given = [inputs, *(add_paired_image(model, inputs, e) for e in (
        [None, None], [embedding, None], [embedding+1, None], [embedding.tolist(), None]))]
    with torch.no_grad(): without, absent, one, other, listed = (model(x, noisy, t) for x in given)
    assert torch.equal(absent, without)
    assert not torch.allclose(one[0], without[0]) and not torch.allclose(one[0], other[0])
    torch.testing.assert_close(one[1], without[1])
    torch.testing.assert_close(listed, one)
    assert 'report' not in inputs


def test_paired_images_that_do_not_fit():
    inputs = dict(masked_image=torch.rand(1, 1, 16, 16))
    model = tiny_ldm(extra_dim=5)
    with pytest.raises(InputError, match='extra_dim=0'): add_paired_image(tiny_ldm(), inputs, [None])
    with pytest.raises(InputError, match='one a patch'): add_paired_image(model, inputs, [None, None])
    with pytest.raises(InputError, match='embeddings'): add_paired_image(model, inputs, [torch.zeros(4)])
