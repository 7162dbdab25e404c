"""Risk models: the cumulative layer and the time code by hand, what training takes away, and what a missing
view or prior may not change."""
import pytest
import torch
from timm.layers import DropPath
from torch import nn
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import seed_everything
from mammo_nb.models.cumulative import CumulativeProbabilityLayer, check_cumulative, cumulative_risk
from mammo_nb.models.dual_stream import DualStreamBlock
from mammo_nb.models.encoders import make_encoder
from mammo_nb.models.lmvnet import LMVNet, UnalignedRisk
from mammo_nb.models.longitudinal import LongitudinalFeatureProcessor
from mammo_nb.models.risk import BaseRiskModel
from mammo_nb.models.risk_baselines import CurrentExamRisk, DensityRisk
from mammo_nb.models.time_encoding import ContinuousPosEncoding
from mammo_nb.registration.mammoregnet import MammoRegNet

VIEWS = 'cc', 'mlo'

def batch(b=2, size=(64, 48), seed=0, priors=1):
    generator = torch.Generator().manual_seed(seed)
    channels = dict(current=1, previous=priors)
    images = {f'{exam}_image_{v}': torch.rand(b, n, *size, generator=generator) for v in VIEWS for exam, n in channels.items()}
    return images | dict(time_gap=torch.rand(b, priors, generator=generator)*4+.5)

def present(rows):
    "Presence of the current views: one (CC, MLO) a breast"
    return {f'present_current_{v}': torch.tensor([float(row[i]) for row in rows]) for i, v in enumerate(VIEWS)}

def small_net(**kwargs):
    seed_everything(0)
    return LMVNet('small', None, 8, heads=2, width=4, **kwargs)

# ---- what training takes away

def test_priors_are_taken_away_in_training_only():
    net, x = small_net(prior_dropout=1.), batch(4)
    for training, weight in ((True, 0.), (False, 1.)):
        out = net.train(training)(x)
        assert all((out[f'prior_weight_{v}'] == weight).all() for v in VIEWS)


def test_how_often_priors_go():
    "4000 draws: a standard deviation of .006"
    net = small_net(prior_dropout=.2).train()
    cc, mlo = net.used_images(batch(4000, (1, 1)))[1]
    assert abs(cc.mean()-.8) < .025
    assert torch.equal(cc, mlo)  # a breast loses those of both views


def test_one_view_goes_and_the_only_one_stays():
    rows = [(1, 1)]*60 + [(1, 0), (0, 1)]*20
    net, x = small_net(view_dropout=1., prior_dropout=0.), batch(100, (1, 1)) | present(rows)
    current, priors = net.train().used_images(x)
    assert (current.sum(0) == 1).all()
    assert torch.equal(current.T[60:], torch.tensor(rows[60:]).float())
    assert 15 < current[0, :60].sum() < 45  # either view
    assert torch.equal(priors[..., 0], current)  # a view that is gone has no prior
    assert torch.equal(net.eval().used_images(x)[0].T, torch.tensor(rows).float())


NO_DROPOUT = dict(prior_dropout=0., dropout=0., drop_path=0.)

@pytest.mark.parametrize('taken', [True, False])
def test_one_view_is_answered_and_trained_by_its_own_head(taken):
    "Also by a view that training took away: the fusion learns nothing from such a breast"
    net = small_net(view_dropout=float(taken), **NO_DROPOUT).train()
    x = batch(8) if taken else batch(8) | present([(1, 0)]*8)
    out = net(x)
    exists = out['present']
    assert (exists.sum(1) == 1).all()
    own = torch.where(exists[:, :1] == 1, out['logits_cc'], out['logits_mlo'])
    assert torch.equal(out['logits_fused'], own)
    assert not torch.equal(out['logits_cc'], out['logits_mlo'])
    out['logits_fused'].sum().backward()
    assert not net.fuse.weight.grad.any()
    assert net.layer.base.weight.grad.any()
    reached = [any(p.grad.any() for p in ffn.parameters()) for ffn in net.blocks[0].ffn]
    assert reached == [True, taken]


def test_both_views_train_the_fusion():
    net = small_net(**NO_DROPOUT).train()
    net(batch(8))['logits_fused'].sum().backward()
    assert net.fuse.weight.grad.any()


@pytest.mark.parametrize('name', ['prior_dropout', 'view_dropout'])
def test_chances_are_checked(name):
    with pytest.raises(InputError, match=f'LMVNet: {name}: found 2'): LMVNet(**{name: 2})

# ---- the cumulative layer

def layer(hazards=(1, 2, 3, 4, 5), base=0.):
    "A layer with given increments"
    m = CumulativeProbabilityLayer(3)
    with torch.no_grad():
        m.hazard.weight.zero_()
        m.hazard.bias.copy_(torch.tensor(hazards, dtype=torch.float32))
        m.base.weight.zero_()
        m.base.bias.fill_(base)
    return m


def test_hazards_add_up():
    assert layer()(torch.randn(1, 3)).tolist() == [[1, 3, 6, 10, 15]]


def test_without_hazards_all_years_are_the_base():
    assert (layer([0]*5, -1.25)(torch.randn(4, 3)) == -1.25).all()


def test_negative_hazards_are_none():
    assert layer([1, -2, 3, -4, 5])(torch.randn(1, 3)).tolist() == [[1, 1, 4, 4, 9]]


def test_at_least_one_year():
    with pytest.raises(InputError, match='years: found 0'): CumulativeProbabilityLayer(4, 0)


@pytest.mark.parametrize('seed', range(5))
def test_risk_never_falls(seed):
    torch.manual_seed(seed)
    z = CumulativeProbabilityLayer(16)(torch.randn(64, 16)*3)
    p = cumulative_risk(z)
    assert (z.diff(dim=1) >= 0).all() and (p.diff(dim=1) >= 0).all()
    assert (p > 0).all() and (p < 1).all()
    assert torch.allclose(p, z.sigmoid(), rtol=0, atol=1e-6)


@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_half_precision_adds_up_in_32_bits(dtype):
    m = CumulativeProbabilityLayer(16).to(dtype)
    x = torch.randn(64, 16).to(dtype)*3
    z = m(x)
    assert z.dtype == torch.float32 and (z.diff(dim=1) >= 0).all()
    assert torch.equal(z, m.base(x).float() + m.hazard(x).relu().float().cumsum(1))
    assert not torch.equal(z, z.to(dtype).float())  # not what half precision can hold

# ---- checked probabilities

def falling_by(d): return torch.tensor([[0., .5, 1], [0, .5, .5-d]])

def test_a_rounding_is_repaired():
    z = falling_by(2e-6)  # 4.7e-7 in probability
    assert (z.sigmoid().diff(dim=1) < 0).any()
    assert (cumulative_risk(z).diff(dim=1) >= 0).all()
    assert cumulative_risk(z[1]).shape == (3,)


def test_a_fall_is_an_error():
    "2.4e-6 in probability"
    with pytest.raises(InputError, match='row 1: found .*never falls'): cumulative_risk(falling_by(1e-5))


def test_the_wrong_row_is_shown():
    z = torch.tensor([[0., 1, 2], [0, .3, .3-1e-5]])
    with pytest.raises(InputError, match=r'row 1: found \[0.5, 0.5744425, 0.5744'): cumulative_risk(z)


def test_no_answer_stays_none():
    assert cumulative_risk(torch.full((2, 3), torch.nan)).isnan().all()


@pytest.mark.parametrize('row', ([1., 0, torch.nan], [torch.nan, 1, 0], [1, torch.nan, 0]))
def test_a_fall_beside_nan_is_an_error(row):
    with pytest.raises(InputError, match='row 0'): cumulative_risk(torch.tensor([row]))


def test_only_what_is_nan_stays_nan():
    risk = cumulative_risk(torch.tensor([0., torch.nan, 0]))
    assert risk.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize('risk', ([-.1, .5], [.5, 1.1]))
def test_a_risk_outside_0_to_1_is_an_error(risk):
    with pytest.raises(InputError, match='from 0 to 1'): check_cumulative(torch.tensor(risk))


def test_doubles_stay_doubles():
    assert cumulative_risk(torch.zeros(5, dtype=torch.float64)).dtype == torch.float64


def test_hazards_of_a_softmax_are_a_risk():
    "As of discrete-time models: the sum is 1 but for rounding"
    torch.manual_seed(0)
    p = (torch.randn(2000, 6)*6).softmax(1).cumsum(1)[:, :5]
    checked = check_cumulative(p)
    assert (p > 1).any() and (checked <= 1).all()
    assert torch.allclose(checked, p, rtol=0, atol=1e-6)


def test_the_answer_can_be_differentiated():
    "Away from roundings it is the sigmoid"
    z = torch.tensor([[-1., 0, 2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cumulative_risk, z)

# ---- the contract and the baselines

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float64))
def test_density_in_every_precision(dtype):
    torch.manual_seed(0)
    net, x = DensityRisk(), dict(density=torch.tensor([0, -1, 3]))
    with torch.no_grad():
        whole = net(x)['logits_fused']
        other = net.to(dtype)(x)['logits_fused']
    assert other.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(whole, other.float(), atol=.02)
    assert not torch.equal(whole, whole[[1, 0, 2]])


def test_the_contract_is_abstract():
    with pytest.raises(TypeError, match='abstract'): BaseRiskModel()


def test_one_head_without_views():
    net = DensityRisk()
    out = net(dict(density=torch.tensor([0, 3, -1, 3])))
    heads = net.get_risk_heads(out, dict(target=torch.zeros(4, 5), y_mask=torch.ones(4, 5)))
    assert list(heads) == ['fused']
    assert torch.allclose(net.get_primary_risk_head(out), out['logits_fused'].sigmoid())


def test_training_information_goes_where_the_model_is():
    net = DensityRisk().to('meta')
    net.set_training_info(dict(priors=2))
    assert net.trained_on.device.type == 'meta'  # as several GPUs ask for


def test_a_breast_without_views_trains_nothing():
    net, x = CurrentExamRisk('small', stride=8).eval(), batch(3)
    out = net(x | present([(1, 1), (0, 0), (1, 1)]))
    heads = net.get_risk_heads(out, dict(target=torch.zeros(3, 5), y_mask=torch.ones(3, 5)))
    for _, _, mask in heads.values(): assert mask.sum(1).tolist() == [5, 0, 5]


@torch.no_grad()
def test_the_current_exam_answers_from_one_view():
    net, x = CurrentExamRisk('small', stride=8).eval(), batch(3)
    both = net(x)['logits_fused']
    cc = net(x | present([(1, 0)]*3))
    mlo = net(x | present([(0, 1)]*3))
    assert torch.allclose(cc['logits_fused'], cc['logits_cc'], atol=1e-6)
    assert torch.allclose(mlo['logits_fused'], mlo['logits_mlo'], atol=1e-6)
    mixed = net(x | present([(1, 1), (1, 0), (0, 1)]))['logits_fused']
    assert torch.allclose(mixed, torch.stack([both[0], cc['logits_cc'][1], mlo['logits_mlo'][2]]), atol=1e-6)
    assert (both-cc['logits_cc']).abs().min() > 1e-6


@torch.no_grad()
def test_the_other_view_changes_the_fused_answer_only():
    net, x = CurrentExamRisk('small', stride=8).eval(), batch(3)
    a, b = net(x), net(x | dict(current_image_mlo=torch.rand(3, 1, 64, 48)))
    assert (a['logits_fused']-b['logits_fused']).abs().max() > 1e-6
    assert torch.allclose(a['logits_cc'], b['logits_cc'], atol=1e-6)

# ---- time

def code_by_hand(years, dim=8):
    angles = years[:, None]*torch.exp(-torch.arange(0, dim, 2)*torch.log(torch.tensor(1e4))/dim)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def test_time_is_exact_at_the_nodes_and_linear_between():
    encoding, nodes = ContinuousPosEncoding(8), torch.arange(240)*5/239
    expected = code_by_hand(nodes)
    assert torch.allclose(encoding.code(nodes), expected, atol=1e-4)
    between = (expected[3:4]+expected[4:5])/2
    assert torch.allclose(encoding.code((nodes[3:4]+nodes[4:5])/2), between, atol=1e-4)
    assert torch.equal(encoding.code(torch.tensor([5., 7., 90.])), encoding.code(torch.tensor([5., 5., 5.])))


def test_one_time_a_breast():
    with pytest.raises(InputError, match=r'years: found shape \[2, 3\], expected \[B\] or \[B,1\]'):
        ContinuousPosEncoding(8).code(torch.zeros(2, 3))


@torch.no_grad()
def test_gaps_as_a_vector_or_a_column():
    net, x = small_net().eval(), batch()
    column = net(x)['logits_fused']
    vector = net(x | dict(time_gap=x['time_gap'][:, 0]))['logits_fused']
    assert torch.equal(column, vector)


@torch.no_grad()
def test_a_prior_of_long_ago_counts_as_one_of_five_years():
    net, x = small_net().eval(), batch(priors=2)
    def answer(*gap): return net(x | dict(time_gap=torch.tensor([[*gap]]*2)))
    five, fifteen, two = answer(1., 5.), answer(1., 15.), answer(1., 2.)
    for name in ('logits_fused', 'prior_weight_cc'):
        assert torch.equal(five[name], fifteen[name])
        assert not torch.equal(five[name], two[name])


@torch.no_grad()
@pytest.mark.parametrize('gap', [0., torch.nan])
def test_the_gap_of_a_missing_prior_does_not_matter(gap):
    net, x = small_net().eval(), batch(priors=2)
    x |= {f'present_previous_{v}': torch.tensor([[1., 0.]]*2) for v in VIEWS}
    answers = [net(x | dict(time_gap=torch.tensor([[1., g]]*2)))['logits_fused'] for g in (3., gap)]
    assert torch.equal(*answers)

# ---- the processor

class Same(nn.Module):
    channels = 4
    def forward(self, x): return x.expand(-1, 4, -1, -1)


def codes(processor, gap, size):
    return processor.time.code(gap)[..., None, None].expand(2, 4, *size)


@torch.no_grad()
def test_no_change_leaves_the_time_alone():
    processor = LongitudinalFeatureProcessor(Same(), 'abs').eval()
    x, gap = torch.rand(2, 1, 6, 8), torch.tensor([[1.], [3.]])
    f, _ = processor(x, x, gap)
    assert torch.allclose(f[:, :4], f[:, 4:8])
    assert torch.allclose(f[:, 8:], codes(processor, gap, (6, 8)), atol=1e-6)


@torch.no_grad()
def test_a_registration_that_moves_nothing_changes_nothing():
    "The untrained network's flow (it begins with thousandths of a pixel), through warping and resizing"
    seed_everything(0)
    processor = LongitudinalFeatureProcessor(Same(), 'abs').eval()
    x, gap = torch.rand(2, 1, 64, 48), torch.tensor([[1.], [3.]])
    flow = MammoRegNet(width=2, depth=1).eval()(x, x)['flow'][:, None]
    f, _ = processor(x, x, gap, flow=flow)
    assert flow.abs().max() < .01
    assert torch.allclose(f[:, :4], f[:, 4:8], atol=.01)
    assert torch.allclose(f[:, 8:], codes(processor, gap, (64, 48)), atol=.01)


@torch.no_grad()
def test_the_prior_that_is_stacked_is_the_aligned_one():
    x, flow = torch.rand(1, 1, 10, 14), torch.zeros(1, 1, 2, 10, 14)
    flow[:, :, 1] = 2
    def stacked(mode):
        processor = LongitudinalFeatureProcessor(Same(), prior_mode=mode).eval()
        return processor(x, x, torch.ones(1, 1), flow=flow)[0][:, 4:5]
    assert torch.equal(stacked('raw'), x)
    assert torch.allclose(stacked('aligned')[..., :-2], x[..., 2:], atol=1e-5)


def test_a_missing_prior_does_not_reach_the_statistics_of_a_batch():
    encoder = make_encoder('small', 8, width=4)
    processor = LongitudinalFeatureProcessor(encoder, dropout=0.).train()
    x, exists = torch.rand(2, 1, 64, 48), torch.tensor([[1.], [0.]])
    def features(second): return processor(x, torch.stack([x[1], second]), torch.ones(2, 1), exists)[0].detach()
    assert torch.allclose(features(x[0]*0), features(x[0]*5), atol=1e-6)


@pytest.mark.parametrize('args, says', [(dict(diff_mode='squared'), 'one of signed, abs'), (dict(prior_mode='warped'), 'one of aligned, raw')])
def test_modes_are_checked(args, says):
    with pytest.raises(InputError, match=says): LongitudinalFeatureProcessor(Same(), **args)


@torch.no_grad()
def test_priors_do_not_train_the_registration():
    processor = LongitudinalFeatureProcessor(Same())
    with torch.enable_grad():
        flow = torch.zeros(1, 2, 6, 8, requires_grad=True)
        assert not processor.align(torch.rand(1, 4, 6, 8), flow).requires_grad

# ---- attention blocks

def tie_views(net):
    "Give both views the same norms and feed-forward network"
    for layers in (net.blocks[0].norm1, net.blocks[0].norm2, net.blocks[0].ffn): layers[1] = layers[0]


@torch.no_grad()
def test_exchanged_views_exchange_their_curves():
    net, x = small_net().eval(), batch()
    tie_views(net)
    other = {k.replace('cc', '?').replace('mlo', 'cc').replace('?', 'mlo'): v for k, v in x.items()}
    a, b = net(x), net(other)
    assert torch.allclose(a['logits_cc'], b['logits_mlo'], atol=1e-5)
    assert torch.allclose(a['logits_mlo'], b['logits_cc'], atol=1e-5)
    assert not torch.allclose(a['logits_cc'], a['logits_mlo'], atol=1e-5)
    assert sum(isinstance(m, CumulativeProbabilityLayer) for m in net.modules()) == 1


def test_drop_path_keeps_the_mean():
    "Standard error .0035"
    torch.manual_seed(0)
    path, x = DropPath(.2), torch.ones(20000, 1)
    assert abs(float(path.train()(x).mean())-1) < .02
    assert torch.equal(path.eval()(x), x)


@torch.no_grad()
def test_blocks_drop_whole_paths_sample_by_sample():
    "64 times the same breast: attention kept or not, FFN kept or not; at inference nothing is left out"
    torch.manual_seed(0)
    block, exist = DualStreamBlock(12, 2, dropout=0., drop_path=.5), (torch.ones(64),)*2
    views = tuple(torch.randn(1, 5, 12).expand(64, -1, -1) for _ in range(2))
    out = block.train()(views, exist)[0]
    still = block.eval()(views, exist)[0]
    skipped = block.norm2[0](block.norm1[0](views[0][:1]))
    def n_kinds(o): return len(torch.unique((o[:, None]-o).abs().amax((2, 3)) < 1e-4, dim=0))
    assert (n_kinds(out), n_kinds(still)) == (4, 1)
    assert (out-skipped).abs().amax((1, 2)).min() < 1e-5  # both left out: two norms

# ---- what does not exist does not matter

@torch.no_grad()
def test_pixels_of_a_missing_view_do_not_matter():
    net, x = small_net().eval(), batch() | dict(present_current_mlo=torch.tensor([1., 0.]))
    other = x['current_image_mlo'].clone()
    other[1] = 9.
    a, b = net(x), net(x | dict(current_image_mlo=other))
    assert torch.allclose(a['logits_fused'], b['logits_fused'], atol=1e-6)


@torch.no_grad()
def test_pixels_of_a_missing_prior_do_not_matter():
    net, x = small_net().eval(), batch()
    x |= {f'present_previous_{v}': torch.zeros(2, 1) for v in VIEWS}
    other = {f'previous_image_{v}': torch.rand(2, 1, 64, 48) for v in VIEWS}
    assert torch.equal(net(x)['logits_fused'], net(x | other)['logits_fused'])


@torch.no_grad()
def test_mlo_alone_is_answered_by_its_head():
    net, x = small_net().eval(), batch() | dict(present_current_cc=torch.tensor([0., 1.]))
    out = net(x)
    assert torch.equal(out['logits_fused'][0], out['logits_mlo'][0])


@torch.no_grad()
def test_without_alignment_flows_are_ignored():
    x = batch() | {f'flow_{v}': torch.full((2, 1, 2, 64, 48), 8.) for v in VIEWS}
    net = UnalignedRisk('small', 8, width=4, heads=2).eval()
    assert torch.equal(net(x)['logits_fused'], net(batch())['logits_fused'])
    assert not net.uses_batch_flow and small_net().uses_batch_flow
