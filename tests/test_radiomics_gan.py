"RadiomicsGAN: sizes, what changes a drawing, and gradients of accumulated batches."
import pytest
import torch
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import seed_everything
from mammo_nb.losses.synthesis import SynthesisLoss, discriminator_terms
from mammo_nb.models.radiomics_gan import RadiomicsGAN, RadiomicsPredictor, UNetGenerator, predictor_skill

SMALL = dict(width=4, depth=3, hidden=8)


def batch(n, rows=32, cols=24, seed=0):
    rng = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=rng)
    inputs = dict(source=rand(n, 1, rows, cols), source_mask=(rand(n, 1, rows, cols) > .9).float(), radiomics=rand(n, 102)*2-1)
    return inputs, rand(n, 2, rows, cols)


@pytest.mark.parametrize('size', [(16, 16), (17, 31), (5, 3), (64, 48), (100, 33)])
@pytest.mark.parametrize('depth', [2, 3, 5])
def test_the_size_stays(size, depth):
    "Also smaller than the deepest cell"
    net = UNetGenerator(1, 1, 0, width=4, depth=depth)
    drawn = net.train()(torch.rand(2, 1, *size)*2-1)
    assert drawn.shape == (2, 1, *size) and drawn.abs().max() <= 1 and drawn.isfinite().all()


def test_an_image_of_a_batch_does_not_change_another():
    "Normalisation looks at one image"
    seed_everything(0)
    model = RadiomicsGAN(**SMALL).eval()
    with torch.no_grad():
        for layer in model.generator.film.heads: layer.weight.normal_()
        inputs, true = batch(4)
        whole, patches = model(inputs), model.judge(inputs, true)
        for k in range(4):
            one = {name: v[k:k+1] for name, v in inputs.items()}
            torch.testing.assert_close(model(one), whole[k:k+1], atol=1e-5, rtol=0)
            torch.testing.assert_close(model.judge(one, true[k:k+1])[0], patches[0][k:k+1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('part', ['generator', 'discriminator'])
def test_four_batches_of_four_have_the_gradient_of_sixteen(part):
    "In float64; without the mask term, which is no mean over images of one weight"
    seed_everything(0)
    model = RadiomicsGAN(dropout=0., **SMALL).double()
    loss = SynthesisLoss(ramps=dict(perceptual=0, radiomics=0))
    inputs, true = ({k: v.double() for k, v in batch(16)[0].items()}, batch(16)[1].double())
    inputs['source_mask'], true[:, 1:] = inputs['source_mask']*0, 0.

    def total(own, real):
        drawn = model(own)
        if part == 'generator':
            terms = loss.image_terms(drawn, real) | loss.critic_terms(*model.judge(own, drawn))
            terms.pop('ssim') # computed in float32
        else:
            copy = torch.cat([own['source'], own['source_mask']], 1)
            pairs = [model.judge(own, mlo) for mlo in (real, drawn.detach(), copy)]
            terms = discriminator_terms(*pairs)
        return sum(terms.values())

    params = list(getattr(model, part).parameters())
    whole = torch.autograd.grad(total(inputs, true), params)
    parts = [torch.autograd.grad(total({n: v[k:k+4] for n, v in inputs.items()}, true[k:k+4])/4, params) for k in range(0, 16, 4)]
    for g, *own in zip(whole, *parts):
        torch.testing.assert_close(sum(own), g, atol=1e-6*float(g.abs().max()+1e-9)+1e-12, rtol=1e-5)
    assert max(float(g.abs().max()) for g in whole) > 1e-6


def test_no_radiomics_and_zeros_are_one_thing():
    model = RadiomicsGAN(**SMALL).eval()
    inputs, _ = batch(2)
    given = dict(source=inputs['source'])
    with torch.no_grad():
        for layer in model.generator.film.heads: layer.weight.normal_()
        assert torch.equal(model(given), model(given | dict(radiomics=torch.zeros(2, 102), source_mask=torch.zeros_like(inputs['source']))))
        assert not torch.equal(model(given), model(given | dict(radiomics=inputs['radiomics'])))


@pytest.mark.parametrize('wrong', [torch.zeros(3, 102), torch.zeros(2, 5), torch.full((2, 102), float('inf'))])
def test_wrong_radiomics_are_refused(wrong):
    inputs, true = batch(2)
    model = RadiomicsGAN(**SMALL)
    for call in (lambda x: model(x), lambda x: model.judge(x, true)):
        with pytest.raises(InputError, match='radiomics'): call(inputs | dict(radiomics=wrong))


def test_the_predictor_learns_brightness_and_beats_the_mean():
    "A feature that the image shows is learnt; a shuffled one is not"
    seed_everything(0)
    level = torch.randn(200, 1)
    images = (.5+.15*level[..., None, None]+.05*torch.randn(200, 1, 16, 16)).clamp(0, 1)
    for shuffled in (False, True):
        true = level[torch.randperm(200)] if shuffled else level
        net = RadiomicsPredictor(1, 8, masks=False)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            (net(images[:150])-true[:150]).square().mean().backward()
            optimizer.step()
        with torch.no_grad(): skill = predictor_skill(net(images[150:]), true[150:], true[:150].mean(0))
        assert skill < .1 if shuffled else skill > .8
