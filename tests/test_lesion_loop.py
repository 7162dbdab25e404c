"The reconstruction loop: ceilings and floors that networks of known behaviour reach, and judges that are refused."
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn
from torch.nn import functional as F

from mammo_nb.core.errors import InputError
from mammo_nb.core.hub import model_version
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.lesion_ldm import lesion_ldm_learner
from mammo_nb.learners.lesion_loop import (
    LOOP_SOURCES, SHUFFLED, CycleLoss, CycleTerm, asked_classes, compare_loop, cycle_term, cycle_weights, dataset_attributes,
    decode_prediction, evaluate_loop, find_drawn, find_lesions, loop_images, loop_table, other_boxes, paste_drawn,
    shuffle_attributes)
from mammo_nb.metrics.lesion_synthesis import found_at_box
from mammo_nb.models.autoencoder import PatchAutoencoder
from mammo_nb.models.ipsidual import IpsiDualNet
from mammo_nb.models.lesion_condition import FIELDS
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


def small_model(**schedule):
    torch.manual_seed(0)
    autoencoder = PatchAutoencoder(channels=(4, 8), blocks=1, attention=False)
    return LesionLDM(autoencoder, size=16, denoiser='transformer', denoiser_args=dict(width=16, depth=1, heads=2), dim=16,
                     vit=dict(dim=16, depth=1, heads=2, patch=8), steps=2, schedule=schedule).eval()


def test_images_differ_in_the_hole_only(dls):
    model = small_model()
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


# the agreement as a loss

def small_verifier():
    torch.manual_seed(1)
    return LesionVerifier(buckets='suspicious', width=4).eval()


@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
def test_the_true_prediction_leads_back_to_the_patch(dls, prediction):
    model = small_model(prediction=prediction)
    inputs, targets = prediction_dl(dls.valid_ds, 6).one_batch()
    latent = model.autoencoder.encode(targets['image']).detach()
    t, noise = torch.tensor([0, 1, 50, 150, 250, 299]), torch.randn_like(latent)
    kept = model.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = kept.sqrt()*latent+(1-kept).sqrt()*noise
    true = noise if prediction == 'epsilon' else kept.sqrt()*noise-(1-kept).sqrt()*latent
    image = decode_prediction(model, inputs, noisy, true, t)
    expected = torch.where(inputs['mask'], model.autoencoder.decode(latent), inputs['masked_image'])
    assert torch.allclose(image, expected, atol=1e-4)
    model.mask_mode = 'roi'
    assert torch.allclose(decode_prediction(model, inputs, noisy, true, t), model.autoencoder.decode(latent), atol=1e-4)


def test_late_steps_have_no_weight():
    t = torch.arange(1000)
    weights = cycle_weights(t, 1000)
    assert (weights[:300] == .1).all() and (weights[300:] == 0).all()
    assert cycle_weights(t[:100], 100, 2., .5).sum() == 100


def test_what_was_dropped_was_not_asked(dls):
    inputs, _ = prediction_dl(dls.train_ds, 8).one_batch()
    true = verifier_targets(inputs, 'suspicious')
    forget = torch.zeros(8, len(FIELDS), dtype=torch.bool)
    forget[:4, FIELDS.index('category')] = True
    forget[4:, FIELDS.index('birads')] = True
    asked = asked_classes(inputs, forget, ('mass', 'birads'), 'suspicious')
    assert asked['mass'].tolist() == [-1]*4+true['mass'][4:].tolist()
    assert asked['birads'].tolist() == true['birads'][:4].tolist()+[-1]*4


def test_the_term_is_a_mean_over_all_samples():
    torch.manual_seed(0)
    logits, weights = dict(a=torch.randn(5, 2), b=torch.randn(5, 3)), torch.tensor([.1, 0, .1, .1, 0])
    asked = dict(a=torch.tensor([0, 1, -1, 1, 0]), b=torch.tensor([2, 0, 1, -1, -1]))
    by_hand = 0.
    for name in logits:
        for k in range(5):
            if asked[name][k] < 0: continue
            by_hand += weights[k]*-logits[name][k].log_softmax(0)[asked[name][k]]/5
    assert cycle_term(logits, asked, weights).item() == pytest.approx(by_hand.item(), rel=1e-5)


def learner(dls, cycle=None, **options):
    own = dict(seed=0, ema=None, drop=(.2, .2), metrics=CycleTerm() if cycle else None) | options
    return lesion_ldm_learner(dls, model=small_model(), cbs=cycle, **own)


def one_batch(learn, t):
    "The loss of a batch of which all steps are `t`, its parts, and the gradients"
    model, found = learn.model, {}
    model.draw_noise = lambda latent, generator=None: (latent, torch.full((len(latent),), t), torch.zeros_like(latent))
    cycle = learn.cycle_loss
    cycle.after_backward = lambda: found.update(
        loss=learn.loss.item(), raw=F.mse_loss(learn.pred, learn.yb[0]).item(), **cycle.terms,
        gradients={name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    return found


def test_parts_add_up_and_the_gradient_ends_in_the_denoiser(dls):
    verifier, rows = small_verifier(), gate()
    before = model_version(verifier)
    with_early, late = (one_batch(learner(dls, CycleLoss(verifier, rows)), t) for t in (10, 300))
    none = one_batch(learner(dls, CycleLoss(verifier, rows, weight=0.)), 10)
    assert late['cycle'] == none['cycle'] == 0 and late['loss'] == late['diffusion']
    assert with_early['cycle'] > 0
    assert with_early['loss'] == pytest.approx(with_early['diffusion']+with_early['cycle'])
    assert with_early['diffusion'] == pytest.approx(with_early['raw'])
    assert all(name.startswith('net.') for name in with_early['gradients'])
    assert any((g-none['gradients'][name]).abs().max() > 1e-9 for name, g in with_early['gradients'].items())
    assert model_version(verifier) == before and not any(p.grad is not None for p in verifier.parameters())
    assert all(p.requires_grad for p in verifier.parameters()) # the given verifier is left as it is


def test_the_log_has_the_term_and_predictions_are_drawings(dls):
    verifier = small_verifier()
    cycle = CycleLoss(verifier, gate(), weight=1., below=1.)
    learn, plain = learner(dls, cycle), learner(dls)
    for one in (learn, plain):
        with one.no_bar(), one.no_logging(): one.fit(1, 0.)
    assert list(learn.recorder.metric_names)[3] == 'cycle'
    _, valid, term = learn.recorder.values[0]
    assert valid == pytest.approx(plain.recorder.values[0][1]) and term > 0
    assert not cycle.verifier.training and learn.model.training_info['cycle_verifier'] == model_version(verifier)
    with learn.no_bar(): drawn, _ = learn.get_preds(ds_idx=1)
    assert drawn.shape == (len(dls.valid_ds), 1, 16, 16)
    with pytest.raises(InputError, match='cycle loss'): loop_table(learn.model, verifier, dls.valid_ds, gate(), MASS)


class Stop(Callback):
    "Dies after the first epoch"
    order = 10**7

    def after_epoch(self): raise KeyboardInterrupt


def test_a_training_with_the_loss_continues_and_another_one_is_refused(dls, tmp_path):
    def train(folder=None, cbs=(), **options):
        learn = learner(dls, folder=folder, metrics=CycleTerm(), cycle=[CycleLoss(small_verifier(), gate(), **options), *cbs])
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
        return model_version(learn.model)
    with pytest.raises(KeyboardInterrupt): train(tmp_path, [Stop()])
    with pytest.raises(InputError, match='cycle_loss.weight'): train(tmp_path, weight=.2)
    assert train(tmp_path) == train()


def test_measurements_of_another_verifier_open_no_gate(dls):
    verifier = small_verifier()
    other = deepcopy(verifier)
    torch.nn.init.zeros_(next(other.parameters()))
    measured = gate().assign(verifier=model_version(verifier))
    assert CycleLoss(verifier, measured).version == model_version(verifier)
    with pytest.raises(InputError, match='the measured one'): CycleLoss(other, measured)
    with pytest.raises(InputError, match='the measured one'): loop_table(painter(follow), other, dls.valid_ds, measured, MASS)


def test_without_the_gate_there_is_no_loss():
    with pytest.raises(InputError, match='birads 0.55'): CycleLoss(small_verifier(), gate(.55))
    with pytest.raises(InputError, match='below'): CycleLoss(small_verifier(), gate(), below=2.)


# a detector searches

class WhiteBox(nn.Module):
    "Finds the white pixels of an image"
    classes, training_info = 2, dict(kinds=['calcification', 'mass'])

    def forward(self, inputs):
        found = []
        for image in inputs['main'][:, 0]:
            at = (image > .99).nonzero()
            box = torch.stack([at[:, 1].min(), at[:, 0].min(), at[:, 1].max()+1, at[:, 0].max()+1]).float()
            found.append(dict(boxes=torch.stack([box, box+1]), scores=torch.tensor([.9, .8]), labels=torch.tensor([2, 1])))
        return found


def test_drawn_lesions_are_found_where_they_were_pasted(dataset):
    patches = torch.stack([dataset[i][1]['image'] for i in range(len(dataset))])
    holes = torch.stack([dataset[i][0]['mask'] for i in range(len(dataset))])
    boxes = [dataset.place_of(i)[0] for i in range(len(dataset))]
    white = torch.where(holes, 1., patches)
    found = find_drawn(WhiteBox().eval(), dataset, white, bs=5)
    asked = (dataset.rows.kinds != '').to_numpy()
    assert found.found[asked].eq(1).all() and found.found[~asked].isna().all()
    images = paste_drawn(dataset, white)
    detections = find_lesions(WhiteBox().eval(), images)
    assert [len(one['boxes']) for one in detections] == [1]*len(dataset) # of the kind `mass` only
    again = found_at_box(detections, boxes, margin=dataset.settings['margin'])
    assert np.allclose(found.iou[asked], again.iou[asked])
    elsewhere = find_drawn(WhiteBox().eval(), dataset, white, boxes=other_boxes(dataset))
    assert elsewhere.found[asked].mean() < .5
    plain = paste_drawn(dataset)
    assert all((image != own).sum() <= (4*(b[2]-b[0]+3)*(b[3]-b[1]+3)) for image, own, b in zip(images, plain, boxes))


def test_other_boxes_have_the_asked_sizes_and_lie_in_the_breast(dataset):
    for i, box in enumerate(other_boxes(dataset)):
        x0, y0, x1, y1 = dataset.place_of(i)[0]
        assert np.allclose([box[2]-box[0], box[3]-box[1]], np.clip(np.round([x1-x0, y1-y0]), 1, None))
        mask = dataset.prepared.load(dataset.rows.image_id[i]).mask
        left, top, right, bottom = box.astype(int)
        assert mask[top:bottom, left:right].mean() > .9


def test_refused_detectors():
    small = dict(width=4, stem=4, modules=(1, 1, 1), blocks=1, finest=2, sigma=3., channels=16, dim=32,
                 heads=2, roi_size=3, n_proposals=16, n_other=4, n_sampled=16)
    image = torch.rand(1, 1, 64, 64)
    with pytest.raises(InputError, match='two views'): find_lesions(IpsiDualNet(**small).eval(), image)
    single = IpsiDualNet(ipsilateral=False, **small)
    with pytest.raises(InputError, match='training mode'): find_lesions(single.train(), image)
    with pytest.raises(InputError, match='kind'): find_lesions(single.eval(), image, 'asymmetry')
    found = find_lesions(single, image)
    assert found[0]['boxes'].shape == (len(found[0]['scores']), 4)


def test_patients_from_whom_a_network_learnt_are_refused(dls, dataset):
    model, reader = painter(follow), Reader()
    learnt = dict(splits=['train', 'valid'])
    for network, name in ((model, 'model'), (reader, 'verifier')):
        network.training_info = learnt
        with pytest.raises(InputError, match=f'split of the dataset.*found train.*the {name} has not'):
            loop_table(model, reader, dataset, gate(), MASS)
        network.training_info = {}
    model.training_info = learnt
    assert len(loop_table(model, reader, dls.valid_ds, gate(), MASS))
    model.training_info = dict(mask_mode='roi')
    with pytest.raises(InputError, match='mask_mode'): loop_table(model, reader, dls.valid_ds, gate(), MASS)
