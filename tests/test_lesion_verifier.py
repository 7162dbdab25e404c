"The verifier: what it learns from, what it is measured by, and when it is refused."
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from mammo_nb.core.errors import InputError
from mammo_nb.core.vocabulary import KINDS
from mammo_nb.insilico.files import insilico_cohort, write_insilico
from mammo_nb.learners.lesion_verifier import (
    BalancedAccuracy, check_verifier, measure_verifier, passing_heads, predict_heads, row_targets,
    split_heads, verifier_learner, verifier_samples)
from mammo_nb.models.lesion_verifier import (
    BIRADS_BUCKETS, VERIFIER_HEADS, LesionVerifier, class_weights, head_classes, verifier_targets,
    verifier_terms)
from mammo_nb.preparation.prepare import PrepareConfig
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.samples.lesion_synthesis import ATTRIBUTES, lesion_dls

TINY = dict(model_args=dict(width=4), buckets='suspicious', seed=0)


@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    folder = tmp_path_factory.mktemp('verifier')
    cohort = insilico_cohort(20, seed=4, exams=1, rows=192, cols=144, pixel_spacing_mm=1.25)
    files = write_insilico(cohort, folder/'files', format='png', workers=1, progress=False)
    prepared = prepare_cohort(files, folder/'cache', PrepareConfig(size=(192, 144)), workers=1, progress=False)
    return lesion_dls(prepared, bs=8, size=32, context=None, seed=0, device='cpu', num_workers=0)


def batch(n=6, seed=0):
    "Attributes of patches, all known"
    rng = np.random.default_rng(seed)
    category = torch.tensor(rng.integers(0, 2, (n, len(KINDS))), dtype=torch.float32)
    numbers = {name: torch.tensor(rng.integers(0, k, n)) for name, k in ATTRIBUTES.items()}
    return numbers | dict(category=category)


@pytest.mark.parametrize('buckets, expected', [('three', [0, 0, 0, 1, 2, -1]), ('suspicious', [0, 0, 0, 1, 1, -1])])
def test_buckets(buckets, expected):
    x = dict(category=torch.ones(6, 4), birads=torch.arange(6), density=torch.zeros(6), view=torch.zeros(6))
    targets = verifier_targets(x, buckets)
    assert targets['birads'].tolist() == expected
    assert max(BIRADS_BUCKETS[buckets])+1 == head_classes(buckets)['birads']
    with pytest.raises(InputError, match='buckets'): LesionVerifier(buckets='five')


def test_healthy_tissue_has_no_category_to_grade():
    x = dict(category=torch.tensor([[0.]*4, [0, 1, 0, 0], [torch.nan]*4]), birads=torch.tensor([0, 3, 4]),
             density=torch.tensor([4, 0, 3]), view=torch.tensor([2, 0, 1]))
    targets = verifier_targets(x)
    assert targets['mass'].tolist() == [0, 0, -1]
    assert targets['birads'].tolist() == [-1, 1, 2]
    assert targets['density'].tolist() == [-1, 0, 3] and targets['view'].tolist() == [-1, 0, 1]


def test_class_weights_balance_the_loss():
    target = torch.tensor([0]*9+[1]*3+[-1]*5)
    weights = class_weights(target, 4)
    assert weights.tolist() == pytest.approx([12/18, 2, 0, 0])
    assert weights[target[target >= 0]].mean().item() == pytest.approx(1)
    assert class_weights(torch.full((3,), -1), 2).tolist() == [0, 0]


def test_terms_are_those_of_pytorch_without_unknown_targets():
    torch.manual_seed(0)
    logits, target = torch.randn(8, 3), torch.tensor([0, 1, 2, -1, -1, 0, 0, 1])
    weights = torch.tensor([.5, 1., 2.])
    term = verifier_terms(dict(x=logits), dict(x=target), dict(x=weights))['x']
    known = target >= 0
    each = F.cross_entropy(logits[known], target[known], weights, reduction='none')
    assert term.item() == pytest.approx(each.mean().item())
    other = logits.clone()
    other[~known] = 100.
    assert verifier_terms(dict(x=other), dict(x=target), dict(x=weights))['x'].item() == pytest.approx(term.item())


def test_unknown_heads_have_no_gradient():
    model = LesionVerifier(width=4)
    x = batch() | dict(density=torch.full((6,), ATTRIBUTES['density']))
    sum(verifier_terms(model(torch.rand(6, 1, 32, 32)), verifier_targets(x)).values()).backward()
    assert not model.heads['density'].weight.grad.any()
    assert model.heads['mass'].weight.grad.any() and model.heads['view'].weight.grad.any()


@pytest.mark.parametrize('encoder, options', [('small', dict(width=4)), ('small', dict(width=4, sigma=4)),
                                              ('resnet10t', dict(stride=16))])
def test_encoders_save_and_load(encoder, options, tmp_path):
    torch.manual_seed(0)
    model = LesionVerifier(encoder, buckets='suspicious', **options).eval()
    image = torch.rand(2, 1, 64, 64)
    assert {k: v.shape[1] for k, v in model(image).items()} == head_classes('suspicious')
    model.save_pretrained(tmp_path)
    again = LesionVerifier.from_pretrained(tmp_path)
    for name, logits in model(image).items(): assert torch.equal(logits, again(image)[name])


def test_brightness_reaches_the_small_encoder():
    "The density of a patch is lost where only local contrast is read"
    torch.manual_seed(0)
    a, b = torch.full((1, 1, 32, 32), .3), torch.full((1, 1, 32, 32), .6)
    plain, contrast = LesionVerifier(width=4).eval(), LesionVerifier(width=4, sigma=6).eval()
    read, lost = ((model(a)['density']-model(b)['density']).abs().max() for model in (plain, contrast))
    assert read > 1e-5 and lost < read/10


def test_targets_of_rows_are_those_of_the_batches(dls):
    model = LesionVerifier(width=4).eval()
    true = predict_heads(model, dls.valid_ds)[1]
    for name, values in row_targets(dls.valid_ds.rows).items():
        assert values.tolist() == true[name].tolist()


def test_the_verifier_reads_the_whole_patch(dls):
    "Without the lesion in it there would be nothing to verify"
    model = LesionVerifier(width=4).eval()
    predicted = predict_heads(model, dls.valid_ds)[0]
    images = torch.stack([dls.valid_ds[i][1]['image'] for i in range(len(dls.valid_ds))])
    again = model.predict_attributes(images)
    for name in VERIFIER_HEADS: assert predicted[name].tolist() == again[name].tolist()


def test_a_learner_fits_predicts_and_measures(dls, tmp_path):
    learn = verifier_learner(dls, **TINY)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 3e-3)
    names = list(learn.recorder.metric_names)[1:-1]
    assert names[2:] == [f'{head}_balanced' for head in VERIFIER_HEADS]+['balanced']
    with learn.no_bar(): logits, targets = learn.get_preds(ds_idx=1)
    heads = split_heads(logits, learn.model.classes)
    predicted, true = predict_heads(learn.model.eval(), dls.valid_ds)
    assert targets.shape == (len(dls.valid_ds), 4)
    for k, name in enumerate(VERIFIER_HEADS):
        assert heads[name].argmax(1).tolist() == predicted[name].tolist()
        assert targets[:, k].tolist() == true[name].tolist()
    table = measure_verifier(learn.model, dls, n_boot=50)
    assert list(table['head']) == list(VERIFIER_HEADS)
    best = max(row[-1] for row in learn.recorder.values)
    assert table.balanced_accuracy.mean() == pytest.approx(best) # the best epoch was kept
    learn.show_results(max_n=2)
    learn.model.save_pretrained(tmp_path)
    again = verifier_samples(dls.valid_ds.prepared, dls.valid_ds.rows, LesionVerifier.from_pretrained(tmp_path))
    assert again.settings == dls.valid_ds.settings


def test_the_loss_has_the_weights_of_the_training_rows(dls):
    learn = verifier_learner(dls, **TINY)
    targets = row_targets(dls.train_ds.rows, 'suspicious')
    for name, n in head_classes('suspicious').items():
        assert torch.equal(learn.loss_func.weights[name], class_weights(targets[name], n))
        weighted = learn.loss_func.weights[name][targets[name][targets[name] >= 0]]
        assert weighted.mean().item() == pytest.approx(1)


def test_a_verifier_learns_what_is_there(dls):
    "Bright squares are masses: after a few epochs the gate lets this head pass"
    torch.manual_seed(0)
    n = 200
    mass = torch.arange(n) % 2
    image = .3+.05*torch.rand(n, 1, 32, 32)
    image[mass == 1, :, 10:16, 10:16] += .4
    category = torch.zeros(n, len(KINDS))
    category[:, 0] = mass
    x = dict(category=category, **{k: torch.full((n,), v) for k, v in ATTRIBUTES.items()})
    model = LesionVerifier(width=4)
    opt = torch.optim.Adam(model.parameters(), 5e-3)
    targets = verifier_targets(x)
    for _ in range(80):
        loss = sum(verifier_terms(model(image[:100]), {k: v[:100] for k, v in targets.items()}).values())
        opt.zero_grad()
        loss.backward()
        opt.step()
    predicted = model.eval().predict_attributes(image[100:])['mass']
    assert (predicted == mass[100:]).float().mean() > .95


def table(values, low, chance):
    "A table as from `measure_verifier`"
    return pd.DataFrame(dict(head=list(VERIFIER_HEADS)[:len(values)], balanced_accuracy=values,
                             balanced_accuracy_low=low, balanced_accuracy_high=1., chance=chance))


def test_the_gate():
    good = table([.7, .45, .36], [.55, .35, .26], [.5, 1/3, .25])
    assert passing_heads(good) == dict(mass=True, birads=True, density=True)
    assert check_verifier(good, heads=('mass', 'density')) == ('mass', 'density')
    weak = table([.59, .45, .36], [.55, .30, .26], [.5, 1/3, .25])
    assert passing_heads(weak) == dict(mass=False, birads=False, density=True)
    with pytest.raises(InputError) as error: check_verifier(weak, heads=('mass', 'birads', 'density'))
    assert 'mass 0.59' in str(error.value) and 'birads 0.45' in str(error.value)
    assert 'density' not in str(error.value)
    assert passing_heads(weak, margin=.05)['mass']
    assert not passing_heads(table([1.], [1.], [1.]))['mass'] # one class only


def test_the_gate_names_heads_that_were_not_measured():
    with pytest.raises(InputError, match='heads'): check_verifier(table([.9], [.8], [.5]), heads=('density',))


def test_a_collapsed_verifier_is_refused(dls):
    "The most frequent class for every patch: a high accuracy where classes are unequal, and refused"
    model = LesionVerifier(width=4, buckets='suspicious').eval()
    for name, head in model.heads.items():
        torch.nn.init.zeros_(head.weight)
        target = row_targets(dls.train_ds.rows, 'suspicious')[name]
        head.bias.data = torch.bincount(target[target >= 0], minlength=head.out_features).float()
    measured = measure_verifier(model, dls.train_ds, n_boot=50)
    assert np.allclose(measured.accuracy, measured.majority)
    assert np.allclose(measured.balanced_accuracy, measured.chance)
    assert not any(passing_heads(measured).values())
    with pytest.raises(InputError, match='mass.*birads.*density.*view'): check_verifier(measured)


def test_balanced_accuracy_over_batches(dls):
    learn = verifier_learner(dls, **TINY, metrics=[BalancedAccuracy('mass')])
    with learn.no_bar(): value = learn.validate()[1]
    measured = measure_verifier(learn.model.eval(), dls, n_boot=10).set_index('head')
    assert value == pytest.approx(measured.balanced_accuracy['mass'])


def test_a_head_without_labels_is_measured_as_nothing_and_refused(dls):
    model = LesionVerifier(width=4, buckets='suspicious').eval()
    rows = dls.train_ds.rows.assign(density=np.nan)
    measured = measure_verifier(model, verifier_samples(dls.train_ds.prepared, rows, model), n_boot=20)
    row = measured.set_index('head').loc['density']
    assert row.n == 0 and np.isnan(row.balanced_accuracy)
    assert not passing_heads(measured)['density']
    with pytest.raises(InputError, match='density nan'): check_verifier(measured, heads=('density',))


def test_training_mode_is_refused():
    with pytest.raises(InputError, match='eval'): LesionVerifier(width=4).predict_attributes(torch.rand(1, 1, 32, 32))
