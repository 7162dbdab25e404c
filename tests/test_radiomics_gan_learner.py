"RadiomicsGAN in a fastai Learner: two optimizers, gradients that add up, a training that is stopped, and what a prediction may know."

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback

from mammo_nb.core.errors import InputError
from mammo_nb.core.hub import model_version
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.radiomics_gan import (
    compare_views, measure_predictor, radiomics_gan_learner, synthesis_samples, train_predictor
)
from mammo_nb.learners.systems import evaluate, predict
from mammo_nb.losses.synthesis import discriminator_terms
from mammo_nb.models.radiomics_gan import RadiomicsGAN
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.preparation.radiomics import RADIOMICS_NAMES
from mammo_nb.samples.view_synthesis import view_rows, view_synthesis_dls

SMALL = dict(width=4, depth=3, hidden=8)
QUIET = dict(seed=0, perceptual=False, patience=None)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gan')
    cohort = insilico_cohort(24, seed=3, exams=1, benign=1., rows=192, cols=144, pixel_spacing_mm=1.25)
    files = cohort.write(folder/'files', workers=1, progress=False)
    return prepare_cohort(files, folder/'cache', size=(64, 48), workers=1, progress=False)


@pytest.fixture(scope='module')
def images(prepared):
    "Radiomics that are the size of the lesion"
    findings = prepared.cohort.findings.drop_duplicates('image_id')
    values = np.repeat(findings.diameter_mm.to_numpy()[:, None], 102, 1)
    table = pd.DataFrame(values, columns=list(RADIOMICS_NAMES))
    table = table.assign(image_id=findings.image_id.to_numpy(), n_lesions=1, n_failed=0)
    return table.merge(prepared.cohort.images[['image_id', 'patient_id', 'split']], on='image_id')


def fit(learn, epochs=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn


class Gradients(Callback):
    "Keep the gradients of both networks at the first step, before they are clipped"
    order = 11

    def before_step(self):
        if hasattr(self, 'kept'): return
        self.kept = {n: p.grad.clone() for n, p in self.learn.model.named_parameters() if p.grad is not None}


def one_step(prepared, images, bs, accumulate, size=16):
    rows = view_rows(prepared.cohort)
    train = rows[rows.split == 'train'].head(size)
    rows = pd.concat([train, rows[rows.split == 'valid']])
    dls = view_synthesis_dls(prepared, bs=bs, rows=rows, radiomics=images, augment=None, seed=0, device='cpu')
    assert len(dls.train_ds) == size
    learn = radiomics_gan_learner(
        dls, model_args=SMALL | dict(dropout=0.), noise=0., accumulate=accumulate, cbs=Gradients(), **QUIET)
    with torch.no_grad():
        for head in learn.model.generator.film.heads: head.weight.normal_(generator=torch.Generator().manual_seed(1))
    fit(learn)
    return learn


def test_four_batches_of_four_are_one_batch_of_sixteen(prepared, images):
    "Through the learner: both gradients at the step. float32, so equal to 1e-4 of the largest"
    four, sixteen = (one_step(prepared, images, bs, n) for bs, n in ((4, 4), (16, 1)))
    assert four.gradients.kept.keys() == sixteen.gradients.kept.keys()
    for part in ('generator', 'discriminator'):
        names = [n for n in four.gradients.kept if n.startswith(part)]
        assert len(names) == len(list(getattr(four.model, part).named_parameters()))
        most = max(float(sixteen.gradients.kept[n].abs().max()) for n in names)
        for name in names:
            torch.testing.assert_close(
                four.gradients.kept[name], sixteen.gradients.kept[name], atol=1e-4*most, rtol=1e-3)


def test_only_the_last_batch_would_be_another_gradient(prepared, images):
    "What the public code does: without accumulation the first step is that of four samples"
    four, sixteen = (one_step(prepared, images, bs, n) for bs, n in ((4, 1), (16, 1)))
    name = 'generator.last.weight'
    difference = (four.gradients.kept[name]-sixteen.gradients.kept[name]).abs().max()
    assert difference > .01*sixteen.gradients.kept[name].abs().max()


def test_the_critic_has_the_gradient_of_its_own_loss(prepared, images):
    "What the generator asks of it leaves no gradient in it"
    learn = one_step(prepared, images, 16, 1)
    again = one_step(prepared, images, 16, 1)
    again.model.load_state_dict(learn.model.state_dict())
    dls = learn.dls
    model = radiomics_gan_learner(dls, model_args=SMALL | dict(dropout=0.), noise=0., accumulate=1, **QUIET).model
    with torch.no_grad():
        for head in model.generator.film.heads: head.weight.normal_(generator=torch.Generator().manual_seed(1))
    x, y = (type(b)({k: torch.stack([dls.train_ds[i][j][k] for i in range(16)]) for k in b}) for j, b in enumerate(dls.train_ds[0]))
    drawn = model(x).detach()
    judged = [model.judge(x, image) for image in (model.target(y), drawn, model.source(x))]
    sum(discriminator_terms(*judged).values()).backward()
    for name, p in model.discriminator.named_parameters():
        torch.testing.assert_close(learn.gradients.kept[f'discriminator.{name}'], p.grad, atol=1e-5, rtol=1e-3)


class Stop(Callback):
    "Kill the training in the middle of an epoch"
    order = 1

    def after_batch(self):
        if self.epoch == 2 and self.training: raise KeyboardInterrupt


@pytest.mark.parametrize('accumulate', [1, 3])
def test_killed_and_resumed_is_the_same(prepared, images, tmp_path, accumulate):
    "Weights of both networks, both optimizers, and results.csv"
    def new(folder, **kwargs):
        dls = view_synthesis_dls(prepared, radiomics=images, bs=4, seed=0, device='cpu')
        return radiomics_gan_learner(
            dls, model_args=SMALL, accumulate=accumulate, folder=folder, predictor=30, **QUIET, **kwargs)
    whole = fit(new(tmp_path/'whole'), 4)
    with pytest.raises(KeyboardInterrupt): fit(new(tmp_path/'parts', cbs=Stop()), 4)
    parts = fit(new(tmp_path/'parts'), 4)
    assert model_version(parts.model) == model_version(whole.model)
    states = [learn.step_critic.second.state_dict()['state'] for learn in (whole, parts)]
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
    tables = [pd.read_csv(tmp_path/name/'results.csv') for name in ('whole', 'parts')]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert tables[0].epoch.tolist() == [1, 2, 3, 4]


def test_parts_of_every_epoch_add_up(prepared, images):
    dls = view_synthesis_dls(prepared, radiomics=images, bs=4, seed=0, device='cpu')
    back_dls = view_synthesis_dls(prepared, views=('mlo', 'cc'), radiomics=False, bs=4, device='cpu')
    back = radiomics_gan_learner(back_dls, model_args=SMALL, **QUIET).model
    learn = fit(radiomics_gan_learner(dls, model_args=SMALL, predictor=30, back=back, seed=0, patience=None), 3)
    table = learn.write_results.table
    parts = table[['loss_GAN', 'loss_L1', 'loss_percep', 'loss_rad', 'loss_view', 'loss_SSIM', 'loss_mask', 'loss_cycle']]
    np.testing.assert_allclose(parts.sum(axis=1), table.loss_G, rtol=1e-5)
    assert (parts.iloc[-1] > 0).all()
    losses = [float(values[0]) for values in learn.recorder.values]
    assert np.isfinite(losses).all()
    assert list(table)[:10] == 'epoch loss_G loss_D loss_GAN loss_L1 loss_percep loss_rad val_L1 val_SSIM val_PSNR'.split()


def test_exchange_asks_for_the_radiomics_of_other_lesions(prepared, images):
    "Half of the term is that of the own radiomics, half that of the next lesion of the batch, by hand"
    dls = view_synthesis_dls(prepared, radiomics=images, bs=8, augment=None, seed=0, device='cpu')
    learn = radiomics_gan_learner(dls, model_args=SMALL, predictor=30, exchange=True, **QUIET)
    model, cb = learn.model.eval(), learn.adversarial_terms
    with torch.no_grad():
        for head in model.generator.film.heads: head.weight.normal_(generator=torch.Generator().manual_seed(1))
    cb.inputs, _ = dls.one_batch()
    told = cb.inputs['radiomics']
    lesions = (told != 0).any(1)
    assert 2 <= int(lesions.sum()) < len(told)
    with torch.no_grad():
        term = float(cb.radiomics_term(model, model(cb.inputs)))
        values = []
        for asked in (told[lesions], told[lesions].roll(1, 0)):
            own = {name: v[lesions] for name, v in cb.inputs.items()} | dict(radiomics=asked)
            values.append(float((model.predictor(model(own))-asked).abs().mean()))
    assert term == pytest.approx(sum(values)/2, rel=1e-4)


def test_both_optimizers_follow_the_schedule(prepared):
    dls = view_synthesis_dls(prepared, radiomics=False, bs=4, seed=0, device='cpu')
    learn = radiomics_gan_learner(dls, model_args=SMALL, accumulate=1, **QUIET)
    start = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    assert learn.step_critic.second.hypers[-1]['lr'] == learn.opt.hypers[-1]['lr']
    for part in ('generator', 'discriminator'):
        assert any(not torch.equal(p, start[n]) for n, p in learn.model.named_parameters() if n.startswith(part))


def test_a_search_for_a_learning_rate_changes_nothing(prepared):
    "Neither the weights nor the moments of the critic"
    dls = view_synthesis_dls(prepared, radiomics=False, bs=4, seed=0, device='cpu')
    learn = fit(radiomics_gan_learner(dls, model_args=SMALL, accumulate=1, **QUIET))
    before = model_version(learn.model), [dict(s) for s in learn.step_critic.second.state_dict()['state']]
    before[1][0]['grad_avg'] = before[1][0]['grad_avg'].clone()
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=20, show_plot=False)
    assert model_version(learn.model) == before[0]
    assert torch.equal(learn.step_critic.second.state_dict()['state'][0]['grad_avg'], before[1][0]['grad_avg'])
    fit(learn)


def test_without_pyradiomics_the_error_says_what_to_do(prepared, monkeypatch):
    def missing(*args, **kwargs): raise ImportError('Radiomics needs the package pyradiomics-bhklab')
    monkeypatch.setattr('mammo_nb.samples.view_synthesis.extract_radiomics', missing)
    with pytest.raises(InputError, match='radiomics=False'):
        view_synthesis_dls(prepared, bs=4, device='cpu')


def test_a_predictor_must_beat_the_mean(prepared, images):
    "Shuffled radiomics cannot be learnt: on held-out patients it is no better, and refused"
    shuffled = images.copy()
    names = list(RADIOMICS_NAMES)
    rng = np.random.default_rng(0)
    shuffled[names] = rng.normal(size=(len(shuffled), 102))
    for table, good in ((images, True), (shuffled, False)):
        dls = view_synthesis_dls(prepared, radiomics=table, bs=4, seed=0, device='cpu')
        torch.manual_seed(0)
        model = RadiomicsGAN(**SMALL)
        skill = train_predictor(model, dls, 40)
        assert (skill > 0) == good and skill == measure_predictor(model, dls)
        if good: radiomics_gan_learner(dls, model_args=SMALL, predictor=model, **QUIET)
        else:
            with pytest.raises(InputError, match='beats the mean'):
                radiomics_gan_learner(dls, model_args=SMALL, predictor=model, **QUIET)


def test_a_breast_without_mlo_is_drawn_and_not_compared(prepared):
    dls = view_synthesis_dls(prepared, radiomics=False, bs=4, seed=0, device='cpu')
    model = radiomics_gan_learner(dls, model_args=SMALL, **QUIET).model
    rows = view_rows(prepared.cohort).head(6)
    lost = rows.assign(image_id_mlo=[None, *rows.image_id_mlo[1:]])
    whole, part = (predict(model, prepared, rows=r) for r in (rows, lost))
    value = lambda t, name: t[t.output == name]['value'].to_numpy()
    np.testing.assert_allclose(value(part, 'mean_intensity'), value(whole, 'mean_intensity'), rtol=1e-6)
    assert len(value(part, 'mean_intensity')) == 6 and len(value(part, 'ssim')) == 5
    np.testing.assert_allclose(value(part, 'ssim'), value(whole, 'ssim')[1:], rtol=1e-6)
    assert evaluate(part.assign(split='test'), n_boot=20).query("metric == 'ssim'").n.item() == 5


def test_numbers_of_equal_images_are_perfect(prepared):
    "The true view as a drawing, against hand-known values"
    dls = view_synthesis_dls(prepared, radiomics=False, bs=4, seed=0, device='cpu')
    model = RadiomicsGAN(**SMALL)
    dataset = synthesis_samples(prepared, view_rows(prepared.cohort).head(8), model)
    x, y = (type(b)({k: torch.stack([dataset[i][j][k] for i in range(8)]) for k in b}) for j, b in enumerate(dataset[0]))
    out = dict(drawn=y['target'], drawn_mask=y['target_mask'])
    found = compare_views(model, out, x, y)
    for name in ('ssim', 'ssim_breast'): assert np.allclose(found[name], 1)
    for name in ('l1', 'l1_breast', 'l1_sum'): assert np.allclose(found[name], 0)
    assert np.allclose(found['psnr'], 100)
    placed = found['placement_mm'][found['placement_mm'].isfinite()]
    assert len(placed) and placed.max() < 15 # a mass is at one distance from the nipple in both views


def test_the_condition_of_a_prediction_is_read_from_one_view(prepared, images, monkeypatch):
    "Only lesions of the CC are measured, and the scale is that of the training"
    asked = []
    def measure(prepared, ids, progress=False, spacing_mm=None):
        asked.extend(ids)
        return images[images.image_id.isin(ids)]
    monkeypatch.setattr('mammo_nb.learners.radiomics_gan.image_radiomics', measure)
    dls = view_synthesis_dls(prepared, radiomics=images, bs=4, seed=0, device='cpu')
    model = radiomics_gan_learner(dls, model_args=SMALL, **QUIET).model
    rows = view_rows(prepared.cohort)
    dataset = synthesis_samples(prepared, rows, model)
    assert set(asked) == set(rows.image_id_cc)
    own = dataset.rows.image_id_cc.isin(dls.train_ds.rows.image_id_cc).to_numpy()
    order = dls.train_ds.rows.image_id_cc.tolist()
    conditions = pd.Series(list(dataset.conditions[own]), dataset.rows.image_id_cc[own]).loc[order]
    np.testing.assert_array_equal(np.stack(conditions), dls.train_ds.conditions)


# ---- what went wrong in silence


def test_fit_has_the_momentum_of_the_source(prepared):
    "fastai's own is .9, which `fit` would take"
    dls = view_synthesis_dls(prepared, radiomics=False, bs=4, seed=0, device='cpu')
    learn = fit(radiomics_gan_learner(dls, model_args=SMALL, accumulate=1, **QUIET))
    for opt in (learn.opt, learn.step_critic.second): assert opt.hypers[-1]['mom'] == .5


def test_gradients_of_an_earlier_training_are_forgotten(prepared, images):
    "Five batches and three accumulated ones leave two over"
    class First(Callback):
        order = -100
        def before_batch(self):
            if hasattr(self, 'left'): return
            self.left = [float(p.grad.abs().max()) for p in self.learn.model.parameters() if p.grad is not None]
    dls = view_synthesis_dls(prepared, radiomics=images, bs=4, seed=0, device='cpu')
    learn = fit(radiomics_gan_learner(dls, model_args=SMALL, accumulate=3, **QUIET))
    over = [float(p.grad.abs().max()) for p in learn.model.parameters() if p.grad is not None]
    assert max(over) > 0
    learn.add_cb(First())
    fit(learn)
    assert max(learn.first.left, default=0.) == 0


@pytest.mark.parametrize('what, given', [('masks', dict(masks=False, radiomics=False)), ('radiomics', dict(radiomics=False))])
def test_a_model_that_reads_more_than_the_loaders_give_is_refused(prepared, what, given):
    dls = view_synthesis_dls(prepared, bs=4, device='cpu', **given)
    model = RadiomicsGAN(radiomics=what == 'radiomics', **SMALL)
    with pytest.raises(InputError, match=f'loaders with {what}'):
        radiomics_gan_learner(dls, model=model, **QUIET)


def test_a_cycle_needs_a_model_that_reads_the_drawings(prepared, images):
    "One with radiomics would get zeros, one of other images would see another breast"
    dls = view_synthesis_dls(prepared, radiomics=images, bs=4, seed=0, device='cpu')
    with pytest.raises(InputError, match='no more than what is drawn'):
        radiomics_gan_learner(dls, model_args=SMALL, back=RadiomicsGAN(('mlo', 'cc'), **SMALL), **QUIET)
    back = RadiomicsGAN(('mlo', 'cc'), radiomics=False, **SMALL)
    back.set_training_info(dls.description | dict(prepare={'size': [1, 1]}))
    with pytest.raises(InputError, match='another preparation'):
        radiomics_gan_learner(dls, model_args=SMALL, back=back, **QUIET)


def test_a_cycle_with_another_model_is_another_training(prepared):
    "Two models of the other direction differ in the run configuration"
    dls = view_synthesis_dls(prepared, radiomics=False, bs=4, seed=0, device='cpu')
    configs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        back = RadiomicsGAN(('mlo', 'cc'), radiomics=False, **SMALL)
        learn = radiomics_gan_learner(dls, model_args=SMALL, back=back, **QUIET)
        configs.append(learn.adversarial_terms.run_config())
    assert configs[0] != configs[1]


def test_a_cohort_without_annotations_is_reported(prepared, capsys):
    "All breasts are drawn as healthy ones, which nobody knows"
    cohort = prepared.cohort
    model = RadiomicsGAN(radiomics=False, **SMALL)
    rows = view_rows(cohort)
    healthy = rows[~rows.image_id_cc.isin(cohort.findings.image_id)]
    synthesis_samples(prepared, rows, model)
    assert 'annotated lesion' not in capsys.readouterr().out
    synthesis_samples(prepared, healthy, model)
    assert f'none of {len(healthy)} images has an annotated lesion' in capsys.readouterr().out


def test_radiomics_that_nobody_could_measure_are_refused(prepared, images):
    "Without a pixel spacing every lesion is unknown: the condition was zeros, without a word"
    unknown = images.assign(n_lesions=0, n_failed=1)
    with pytest.raises(InputError, match='spacing_mm'):
        view_synthesis_dls(prepared, radiomics=unknown, bs=4, device='cpu')


def test_the_exposure_stays_where_radiomics_depend_on_it(prepared, images):
    with_radiomics = view_synthesis_dls(prepared, radiomics=images, bs=4, device='cpu').augment
    without = view_synthesis_dls(prepared, radiomics=False, bs=4, device='cpu').augment
    assert (with_radiomics.gain, with_radiomics.gamma) == (0, 0) and without.gain > 0


def test_the_summed_error_is_on_the_published_scale(prepared):
    "Images in [-1, 1]: twice the sum of those in [0, 1]"
    model = RadiomicsGAN(radiomics=False, **SMALL)
    dataset = synthesis_samples(prepared, view_rows(prepared.cohort).head(2), model)
    x, y = (type(b)({k: torch.stack([dataset[i][j][k] for i in range(2)]) for k in b}) for j, b in enumerate(dataset[0]))
    drawn = (y['target']+.1).clamp(max=1)
    found = compare_views(model, dict(drawn=drawn, drawn_mask=y['target_mask']), x, y)
    expected = 2*(drawn-y['target']).abs().sum((1, 2, 3)).double()
    torch.testing.assert_close(found['l1_sum'], expected, rtol=1e-4, atol=1e-3)


def test_masks_grow_in_training_only(prepared):
    seen = []
    class Note(Callback):
        order = -40
        def before_batch(self): seen.append((self.training, float(self.learn.xb[0]['source_mask'].float().sum())))
    sums = []
    for loose in (0, 3):
        dls = view_synthesis_dls(prepared, radiomics=False, bs=4, augment=None, seed=0, device='cpu')
        fit(radiomics_gan_learner(dls, model_args=SMALL, loose=loose, accumulate=1, cbs=Note(), **QUIET))
        sums.append([sum(n for training, n in seen if training == part) for part in (True, False)])
        seen.clear()
    (narrow, valid), (wide, same) = sums
    assert wide > 1.5*narrow > 0 and same == valid > 0
