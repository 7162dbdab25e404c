"""LMV-Net: its parts by hand, what may not change in training, and a training that is killed."""
import os, signal, subprocess, sys, textwrap, time
from types import SimpleNamespace
import pandas as pd, pytest, torch
import mammo_nb.core.fastai_import
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from fastai.torch_core import to_detach
from timm.layers import DropPath
from torch import nn
from mammo_nb.core.seeding import seed_everything
from mammo_nb.data.cache import prepare_cohort
from mammo_nb.data.insilico import insilico_cohort, write_insilico
from mammo_nb.data.pairs import pair_dls
from mammo_nb.data.prepare import PrepareConfig
from mammo_nb.core.errors import InputError
from mammo_nb.data.risk_samples import RiskAugment, RiskDataset, breast_history, risk_dls
from mammo_nb.learners.registration import registration_learner
from mammo_nb.data.follow_up import survival_target
from mammo_nb.learners.risk import _start_at, RiskCIndex, RiskObjective, lmvnet_learner, predict, risk_learner
from mammo_nb.learners.training import Resumable
from mammo_nb.metrics.survival import c_index
from mammo_nb.models.lmvnet import Attention, DualStreamBlock, LMVNet, LongitudinalFeatureProcessor, UnalignedRisk
from mammo_nb.models.risk import BaseRiskModel, ContinuousPosEncoding, CurrentExamRisk, CumulativeProbabilityLayer, DensityRisk, check_cumulative, cumulative_risk
from mammo_nb.registration.mammoregnet import MammoRegNet

def batch(b=2, size=(64, 48), seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f'{w}_image_{v}': torch.rand(b, 1, *size, generator=g) for v in ('cc', 'mlo') for w in ('current', 'previous')} | dict(time_gap=torch.rand(b, 1, generator=g)*4+.5)

# what training takes away

def small_net(**kwargs): seed_everything(0); return LMVNet('small', None, 8, heads=2, width=4, **kwargs)
def present(rows): return {f'present_current_{v}': torch.tensor([float(r[i]) for r in rows]) for i, v in enumerate(('cc', 'mlo'))}

def test_priors_are_taken_away_in_training_only():
    m, b = small_net(prior_dropout=1.), batch(4)
    for training, weight in ((True, 0.), (False, 1.)):
        out = m.train(training)(b)
        assert all((out[f'prior_weight_{v}'] == weight).all() for v in ('cc', 'mlo'))

def test_how_often_priors_go():  # 4000 draws: a standard deviation of .006
    m, b = small_net(prior_dropout=.2).train(), batch(4000, (1, 1))
    cc, mlo = m.presence(b)[1]
    assert abs(cc.mean() - .8) < .025 and torch.equal(cc, mlo)  # a breast loses that of both views

def test_one_view_goes_and_the_only_one_stays():
    there = [(1, 1)]*60 + [(1, 0), (0, 1)]*20
    m, b = small_net(view_dropout=1., prior_dropout=0.), batch(100, (1, 1)) | present([(1, 1)]*60 + [(1, 0), (0, 1)]*20)
    now, past = m.train().presence(b)
    assert (now.sum(0) == 1).all() and torch.equal(now.T[60:], torch.tensor(there[60:]).float())
    assert 15 < now[0, :60].sum() < 45 and torch.equal(past[..., 0], now)  # either view; a view that is gone has no prior
    assert torch.equal(m.eval().presence(b)[0].T, torch.tensor(there).float())

def test_a_breast_with_one_view_is_answered_and_taught_by_its_own_head():
    "Also by a view that training took away: the fusion hears nothing of such a breast, nor does what only the missing view has"
    for m in (small_net(view_dropout=1., prior_dropout=0., dropout=0., drop_path=0.), small_net(prior_dropout=0., dropout=0., drop_path=0.)):
        taken = m.view_dropout == 1
        out = m.train()(batch(8) if taken else batch(8) | present([(1, 0)]*8))
        there = out['present']; assert (there.sum(1) == 1).all() and (not taken or 0 < there[:, 0].sum() < 8)
        assert torch.equal(out['risk_multi'], torch.where(there[:, :1] == 1, out['risk_cc'], out['risk_mlo'])) and not torch.equal(out['risk_cc'], out['risk_mlo'])
        out['risk_multi'].sum().backward()
        assert m.fuse.weight.grad.abs().max() == 0 and m.layer.base.weight.grad.abs().max() > 0
        ffn = [max(p.grad.abs().max() for p in f.parameters()) for f in m.blocks[0].ffn]
        assert ffn[0] > 0 and (ffn[1] > 0) == taken
    m = small_net(prior_dropout=0., dropout=0., drop_path=0.).train(); m(batch(8))['risk_multi'].sum().backward(); assert m.fuse.weight.grad.abs().max() > 0

# the cumulative layer

def layer(hazards=(1, 2, 3, 4, 5), base=0.):
    m = CumulativeProbabilityLayer(3)
    with torch.no_grad(): m.hazard.weight.zero_(); m.hazard.bias.copy_(torch.tensor(hazards, dtype=torch.float32)); m.base.weight.zero_(); m.base.bias.fill_(base)
    return m

def test_hazards_add_up(): assert layer()(torch.randn(1, 3)).tolist() == [[1, 3, 6, 10, 15]]
def test_without_hazards_all_years_are_the_base(): assert (layer([0]*5, -1.25)(torch.randn(4, 3)) == -1.25).all()
def test_negative_hazards_are_none(): assert layer([1, -2, 3, -4, 5])(torch.randn(1, 3)).tolist() == [[1, 1, 4, 4, 9]]

@pytest.mark.parametrize('seed', range(5))
def test_risk_never_falls(seed):
    torch.manual_seed(seed)
    z = CumulativeProbabilityLayer(16)(torch.randn(64, 16)*3)
    p = cumulative_risk(z)
    assert (z.diff(dim=1) >= 0).all() and (p.diff(dim=1) >= 0).all() and (p > 0).all() and (p < 1).all()
    assert torch.allclose(p, z.sigmoid(), rtol=0, atol=1e-6)

def falling_by(d): return torch.tensor([[0., .5, 1], [0, .5, .5-d]])
def test_a_rounding_is_mended():
    z = falling_by(2e-6)  # 4.7e-7 in probability
    assert (z.sigmoid().diff(dim=1) < 0).any() and (cumulative_risk(z).diff(dim=1) >= 0).all() and cumulative_risk(z[1]).shape == (3,)
def test_a_fall_is_an_error():  # 2.4e-6 in probability
    with pytest.raises(InputError, match='row 1: found .*never falls'): cumulative_risk(falling_by(1e-5))
def test_no_answer_stays_none(): assert cumulative_risk(torch.full((2, 3), float('nan'))).isnan().all()
@pytest.mark.parametrize('row', ([1., 0, float('nan')], [float('nan'), 1, 0], [1, float('nan'), 0]))
def test_a_fall_beside_nan_is_an_error(row):
    with pytest.raises(InputError, match='row 0'): cumulative_risk(torch.tensor([row]))
def test_only_what_is_nan_stays_nan(): assert cumulative_risk(torch.tensor([0., float('nan'), 0])).isnan().tolist() == [False, True, False]
def test_doubles_stay_doubles(): assert cumulative_risk(torch.zeros(5, dtype=torch.float64)).dtype == torch.float64
@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float64))
def test_density_in_every_precision(dtype):
    torch.manual_seed(0); net, x = DensityRisk(), dict(density=torch.tensor([0, -1, 3]))
    with torch.no_grad(): whole, other = net(x)['risk_multi'], net.to(dtype)(x)['risk_multi']
    assert other.dtype == torch.promote_types(dtype, torch.float32) and torch.allclose(whole, other.float(), atol=.02) and not torch.equal(whole, whole[[1, 0, 2]])
def test_hazards_of_a_softmax_are_a_risk():  # as of discrete-time models: the sum is 1 but for rounding
    torch.manual_seed(0); p = (torch.randn(2000, 6)*6).softmax(1).cumsum(1)[:, :5]
    assert (p > 1).any() and (check_cumulative(p) <= 1).all() and torch.allclose(check_cumulative(p), p, rtol=0, atol=1e-6)
def test_the_answer_can_be_differentiated():  # away from roundings it is the sigmoid
    z = torch.tensor([[-1., 0, 2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cumulative_risk, z)
@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float16))
def test_half_precision_adds_up_in_32_bits(dtype):
    m = CumulativeProbabilityLayer(16).to(dtype)
    x = torch.randn(64, 16).to(dtype)*3
    z = m(x)
    assert z.dtype == torch.float32 and (z.diff(dim=1) >= 0).all()
    assert torch.equal(z, m.base(x).float() + m.hazard(x).relu().float().cumsum(1)) and not torch.equal(z, z.to(dtype).float())  # not what half precision can hold

# time

def test_time_is_exact_at_the_nodes_and_linear_between():
    e = ContinuousPosEncoding(8)
    node = torch.arange(240)*5/239
    want = torch.stack([(node[:, None]*torch.exp(-torch.arange(0, 8, 2)*torch.log(torch.tensor(1e4))/8)).sin(), (node[:, None]*torch.exp(-torch.arange(0, 8, 2)*torch.log(torch.tensor(1e4))/8)).cos()], -1).flatten(1)
    assert torch.allclose(e.code(node), want, atol=1e-4)
    assert torch.allclose(e.code((node[3:4]+node[4:5])/2), (want[3:4]+want[4:5])/2, atol=1e-4)
    assert torch.equal(e.code(torch.tensor([5., 7., 90.])), e.code(torch.tensor([5., 5., 5.])))

def test_gaps_as_a_vector_or_a_column():
    net, x = LMVNet('small', stride=8, width=4).eval(), batch()
    with torch.no_grad(): assert torch.equal(net(x)['risk_multi'], net(x | dict(time_gap=x['time_gap'][:, 0]))['risk_multi'])

# the processor

class Same(nn.Module):
    channels = 4
    def forward(self, x): return x.expand(-1, 4, -1, -1)

def test_nothing_changed_means_the_time_alone():
    p, x, gap = LongitudinalFeatureProcessor(Same(), 'abs').eval(), torch.rand(2, 1, 6, 8), torch.tensor([[1.], [3.]])
    with torch.no_grad(): f, _ = p(x, x, gap)
    assert torch.allclose(f[:, :4], f[:, 4:8]) and torch.allclose(f[:, 8:], p.time.code(gap)[..., None, None].expand(2, 4, 6, 8), atol=1e-6)

def test_a_registration_that_moves_nothing_changes_nothing():
    "The untrained network's flow (it begins with thousandths of a pixel), through warping and resizing"
    seed_everything(0)
    p, x, gap = LongitudinalFeatureProcessor(Same(), 'abs').eval(), torch.rand(2, 1, 64, 48), torch.tensor([[1.], [3.]])
    with torch.no_grad():
        flow = MammoRegNet(width=2, depth=1).eval()(x, x)['flow'][:, None]
        f, _ = p(x, x, gap, flow=flow)
    assert flow.abs().max() < .01 and torch.allclose(f[:, :4], f[:, 4:8], atol=.01)
    assert torch.allclose(f[:, 8:], p.time.code(gap)[..., None, None].expand(2, 4, 64, 48), atol=.01)

def test_the_prior_that_is_concatenated_is_the_aligned_one():
    x, flow = torch.rand(1, 1, 10, 14), torch.zeros(1, 1, 2, 10, 14); flow[:, :, 1] = 2
    with torch.no_grad(): aligned, raw = (LongitudinalFeatureProcessor(Same(), prior_mode=m).eval()(x, x, torch.ones(1, 1), flow=flow)[0][:, 4:5] for m in ('aligned', 'raw'))
    assert torch.equal(raw, x) and torch.allclose(aligned[..., :-2], x[..., 2:], atol=1e-5)

# attention

def test_attention_is_that_of_pytorch():
    torch.manual_seed(0)
    ours, theirs = Attention(24, 3, 0.).eval(), nn.MultiheadAttention(24, 3, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight])); theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
        x, y = torch.randn(2, 7, 24), torch.randn(2, 11, 24)
        want, weights = theirs(x, y, y)
        assert torch.allclose(ours(x, y), want, atol=1e-5) and torch.allclose(ours.attention_to(x, y, 4), weights[:, 4], atol=1e-6)

def test_exchanged_views_exchange_their_curves():
    net, x = LMVNet('small', stride=8, width=4).eval(), batch()
    for m in (net.blocks[0].norm1, net.blocks[0].norm2, net.blocks[0].ffn): m[1] = m[0]
    other = {k.replace('cc', '?').replace('mlo', 'cc').replace('?', 'mlo'): v for k, v in x.items()}
    with torch.no_grad(): a, b = net(x), net(other)
    assert torch.allclose(a['risk_cc'], b['risk_mlo'], atol=1e-5) and torch.allclose(a['risk_mlo'], b['risk_cc'], atol=1e-5) and not torch.allclose(a['risk_cc'], a['risk_mlo'], atol=1e-5)
    assert sum(isinstance(m, CumulativeProbabilityLayer) for m in net.modules()) == 1

def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    d, x = DropPath(.2), torch.ones(20000, 1)
    assert abs(float(d.train()(x).mean())-1) < .02 and torch.equal(d.eval()(x), x)  # standard error .0035

def test_blocks_drop_whole_paths_sample_by_sample():
    torch.manual_seed(0)
    block, there = DualStreamBlock(12, 2, dropout=0., drop_path=.5), (torch.ones(64),)*2
    views = tuple(torch.randn(1, 5, 12).expand(64, -1, -1) for _ in range(2))  # 64 times the same breast
    with torch.no_grad(): out = block.train()(views, there)[0]; alone = block.norm2[0](block.norm1[0](views[0][:1])); still = block.eval()(views, there)[0]
    kinds = lambda o: len(torch.unique((o[:, None]-o).abs().amax((2, 3)) < 1e-4, dim=0))
    assert (kinds(out), kinds(still)) == (4, 1)  # attention kept or not, FFN kept or not; in use nothing is left out
    assert (out-alone).abs().amax((1, 2)).min() < 1e-5  # both left out: two norms

# several processes

def _rank(rank, path, out):
    os.environ.update(WORLD_SIZE='2', RANK=str(rank))
    torch.distributed.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=2)
    try:
        torch.manual_seed(0); net = nn.parallel.DistributedDataParallel(DensityRisk())
        metric, (risk, time, event) = RiskCIndex(), _known()
        for part in (slice(rank*20, rank*20+10), slice(rank*20+10, rank*20+20)):
            said = SimpleNamespace(named=dict(risk_multi=risk[part]), named_targ=dict(event_times=time[part], event_observed=event[part]))
            metric.accumulate(SimpleNamespace(model=net, to_detach=to_detach, named_output=said))
        out.put(metric.value)
    finally: torch.distributed.destroy_process_group()

def _known():
    g = torch.Generator().manual_seed(0)
    return torch.randn(40, 5, generator=g).abs().cumsum(1)-2, torch.randint(0, 5, (40,), generator=g), (torch.rand(40, generator=g) < .5).long()

def test_several_processes_agree_on_the_metric_of_all_breasts(tmp_path):
    ctx = torch.multiprocessing.get_context('spawn'); out = ctx.Queue()
    ps = [ctx.Process(target=_rank, args=(r, tmp_path/'store', out)) for r in range(2)]
    for p in ps: p.start()
    found = [out.get(timeout=120) for _ in ps]
    for p in ps: p.join()
    risk, time, event = _known()
    assert found == pytest.approx([c_index(time.numpy()+1., event.numpy(), *risk.sigmoid().double().numpy().T, tau=5.)]*2, abs=1e-6)

# freezing and resuming

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('risk')
    files = write_insilico(insilico_cohort(24, seed=3, rows=96, cols=72, mm=2.5), folder/'files', workers=1, progress=False)
    return prepare_cohort(files, folder/'cache', PrepareConfig(size=(64, 48)), workers=1, progress=False)

def learner(prepared, registration=None, folder=None, cbs=None, **args):
    return lmvnet_learner(risk_dls(prepared, bs=4, seed=0, device='cpu'), registration, 'small', 8, model_args=dict(width=4, heads=2, **args), folder=folder, seed=0, lr=1e-3, warmup=5, cbs=cbs)

def test_frozen_parts_are_the_same_to_the_bit(prepared):
    seed_everything(1)
    net = MammoRegNet(width=2, depth=1)
    learn = learner(prepared, net, freeze_encoder=True)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    after = learn.model.state_dict(); changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert any(k.startswith('registration') for k in before) and any('running_mean' in k for k in before)
    assert not [k for k in changed if k.startswith(('processor.encoder', 'registration'))] and any(k.startswith('blocks') for k in changed)

SCRIPT = '''
    import sys, time
    from fastai.callback.core import Callback
    sys.path.insert(0, {tests!r})
    from test_lmvnet import learner
    from mammo_nb.data.cache import prepare_cohort
    from mammo_nb.data.cohort import Cohort
    from mammo_nb.data.prepare import PrepareConfig
    import torch
    class Slow(Callback):
        order = 300
        def after_batch(self): time.sleep({wait})
        def after_epoch(self): print('epoch', self.epoch, flush=True)
    prepared = prepare_cohort(Cohort.read({files!r}), {cache!r}, PrepareConfig(size=(64, 48)), workers=1, progress=False)
    learn = learner(prepared, folder={folder!r}, cbs=[Slow()])
    with learn.no_bar(), learn.no_logging(): learn.fit(4)
    torch.save(learn.model.state_dict(), {out!r})
'''

def script(prepared, tmp_path, name, wait=0.):
    text = SCRIPT.format(tests=os.path.dirname(__file__), files=str(prepared.cohort.root), cache=str(prepared.cache.folder), folder=str(tmp_path/name), out=str(tmp_path/f'{name}.pt'), wait=wait)
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(text)], stdout=subprocess.PIPE, text=True)

def test_a_killed_training_ends_with_the_same_weights(prepared, tmp_path):
    "SIGKILL in the middle of the third epoch, then the same command again"
    p = script(prepared, tmp_path, 'killed', wait=.2)
    for line in p.stdout:
        if line.startswith('epoch 1'): break
    time.sleep(.5); p.send_signal(signal.SIGKILL); assert p.wait() == -signal.SIGKILL
    assert (tmp_path/'killed'/'checkpoint.pt').is_file() and not (tmp_path/'killed.pt').exists()
    for name in ('killed', 'whole'):
        p = script(prepared, tmp_path, name); out = p.communicate()[0]; assert p.returncode == 0
        epochs = [l for l in out.splitlines() if l.startswith('epoch ')]
        assert epochs == [f'epoch {k}' for k in range(2 if name == 'killed' else 0, 4)], out
    a, b = (torch.load(tmp_path/f'{n}.pt', weights_only=True) for n in ('killed', 'whole'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (torch.load(tmp_path/n/'checkpoint.pt', weights_only=True) for n in ('killed', 'whole'))  # of the last epoch, whichever was the best
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in b['model']) and all(torch.equal(s[k], t[k]) for s, t in zip(a['opt']['state'], b['opt']['state'], strict=True) for k in t if isinstance(t[k], torch.Tensor))
    assert [r[:-1] for r in a['values']] == [r[:-1] for r in b['values']] and len(a['values']) == 4 and torch.equal(a['generators']['torch'], b['generators']['torch'])

# fastai's own tools

def quiet(learn):
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.logger = lambda *a, **k: None
    return learn

def test_the_tools_of_fastai(prepared, tmp_path):
    "lr_find leaves the weights as they were; accumulation, clipping, the log and saved best epochs work with ours"
    learn = quiet(learner(prepared)); learn.path = tmp_path
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.lr_find(num_it=6, show_plot=False)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    learn.fit(2, cbs=[GradientAccumulation(8), GradientClip(.1), CSVLogger(tmp_path.name), SaveModelCallback(monitor='c_index', fname='best')])
    log = pd.read_csv(tmp_path/tmp_path.name)
    assert list(log.columns) == ['epoch', 'train_loss', 'valid_loss', 'c_index', 'time'] and len(log) == 2
    assert learn.validate()[1] == pytest.approx(log.c_index.max(), abs=1e-4)

def test_predictions_in_all_their_forms(prepared, tmp_path):
    learn = quiet(learner(prepared)); learn.path = tmp_path
    learn.fit(1)
    with learn.no_bar():
        p, y, loss = learn.get_preds(with_loss=True)
        x, q, _ = learn.get_preds(with_input=True, reorder=False)
    assert torch.equal(p, q) and p.shape == y.shape == (len(learn.dls.valid_ds), 5) and loss.shape == (len(p),) and x['time_gap'].shape == (len(p), 1)
    learn.export('learner.pkl')
    assert (tmp_path/'learner.pkl').stat().st_size < 5e6  # no pictures in it
    again = load_learner(tmp_path/'learner.pkl')
    a, b = (predict(o, prepared, split='test') for o in (learn, again))
    assert a.equals(b) and len(a)

def still(fixed, moving): return fixed.new_zeros(len(fixed), 2, *fixed.shape[2:])

def test_a_model_of_aligned_priors_is_not_asked_with_others(prepared):
    dls = risk_dls(prepared, bs=4, seed=0, device='cpu', registration=still)
    learn = quiet(lmvnet_learner(dls, None, 'small', 8, model_args=dict(width=4, heads=2), seed=0)); learn.fit(1)
    with pytest.raises(InputError, match='registration'): predict(learn, prepared, split='test')
    assert len(predict(learn, prepared, split='test', registration=still))
    with pytest.raises(InputError, match='other splits'): predict(learn, prepared, split='test', samples=dls.valid_ds)
    plain = quiet(risk_learner(dls, UnalignedRisk('small', 8, width=4, heads=2))); plain.fit(1)
    assert len(predict(plain, prepared, split='test'))  # it never took the flows

def test_a_missing_view_has_no_curve_of_its_own(prepared):
    rows = breast_history(prepared.cohort, current='last')
    rows['image_id_mlo'] = rows.image_id_mlo.where(rows.index % 2 == 0)
    t = predict(CurrentExamRisk('small', 8, width=4), prepared, rows=rows)
    count = t.groupby('output').size()
    assert count['risk_mlo_year_1'] == (rows.index % 2 == 0).sum() < count['risk_cc_year_1'] == count['risk_year_1'] == len(rows)

class Plain(BaseRiskModel):
    "One layer, and nothing that keeps its logits from falling"
    def __init__(self): super().__init__(); self.net = nn.Linear(1, 5); nn.init.zeros_(self.net.weight); self.net.bias.data.copy_(torch.tensor([0., 1, 2, 1, 3]))
    def forward(self, batch): return dict(risk_multi=self.net(batch['current_image_cc'].mean((1, 2, 3))[:, None]))

class Rising(Plain):
    "Its answer never falls, whatever is trained"
    def get_primary_risk_head(self, outputs): return outputs['risk_multi'].sigmoid().cummax(1).values

def risk_learn(prepared, model): return quiet(risk_learner(risk_dls(prepared, bs=4, seed=0, device='cpu'), model, recipe=None))
def tiny(kind): return kind('small', stride=8)

def test_a_model_needs_nothing_but_the_contract(prepared):
    learn = risk_learn(prepared, Rising())
    learn.fit(1)
    assert len(predict(learn, prepared, split='test'))

class Mean(CurrentExamRisk):
    "The answer is the mean of two heads"
    def get_primary_risk_head(self, outputs): return (outputs['risk_multi'].sigmoid() + outputs['risk_cc'].sigmoid())/2

class Side(CurrentExamRisk):
    "Only the head of one view falls"
    def forward(self, batch): o = super().forward(batch); return o | dict(risk_mlo=o['risk_mlo'] - torch.arange(5.))

class Further(CurrentExamRisk):
    "Heads of its own beside those of the views: one is trained, one is not"
    def forward(self, batch): o = super().forward(batch); return o | dict(risk_own=o['risk_cc'] - torch.arange(5.), risk_score=o['risk_cc'][:, 0])
    def get_risk_heads(self, outputs, batch): return super().get_risk_heads({k: v for k, v in outputs.items() if k != 'risk_score'}, batch)

class Sum(CurrentExamRisk):
    def get_primary_risk_head(self, outputs): return 2*(2+outputs['risk_multi']).sigmoid()
class Year(CurrentExamRisk):
    def get_primary_risk_head(self, outputs): return outputs['risk_multi'][:, -1].sigmoid()
def beside(change):
    "A head of a view that is not trained, of another shape"
    class Beside(CurrentExamRisk):
        def forward(self, batch): o = super().forward(batch); return o | dict(risk_cc=change(o['risk_cc']))
        def get_risk_heads(self, outputs, batch): return dict(multi=super().get_risk_heads(outputs, batch)['multi'])
    return lambda: tiny(Beside)
class One(CurrentExamRisk):
    def get_primary_risk_head(self, outputs): return super().get_primary_risk_head(outputs)[:1]
class Bare(Plain):
    def get_primary_risk_head(self, outputs): return outputs['risk_multi'].sigmoid()

@pytest.mark.parametrize('model, says', ((lambda: tiny(Side), 'risk_mlo of Side: row 0: .*never falls'), (lambda: tiny(One), r'of One: shape: found \[1, 5\]'), *((beside(f), r'risk_cc of Beside: shape: .*\[4, 5\], breasts') for f in (lambda z: z[:1], lambda z: z[:, :3], lambda z: z[:, -1])), (lambda: tiny(Sum), 'of Sum: row 0: .*from 0 to 1'), (lambda: tiny(Year), r'of Year: shape: found \[4\], expected \[4, 5\]'), (Bare, 'of Bare: row 0: .*never falls')))
def test_what_no_table_can_be_made_of_is_refused_before_the_first_step(prepared, model, says):
    torch.manual_seed(0); learn = risk_learn(prepared, model())
    before = [o.clone() for o in learn.model.parameters()]
    with pytest.raises(InputError, match=says): learn.fit(1)
    assert all(map(torch.equal, before, learn.model.parameters()))
    with pytest.raises(InputError, match=says): predict(learn, prepared, split='test', bs=4)

def test_what_is_not_said_is_the_models_own_affair(prepared):
    learn = risk_learn(prepared, tiny(Further))
    learn.fit(1)
    assert not predict(learn, prepared, split='test').output.str.contains('own|score').any()

def test_a_missing_view_has_no_curve_though_the_model_is_silent(prepared):
    class Silent(CurrentExamRisk):
        def forward(self, batch): o = super().forward(batch); del o['present']; return o
        def get_risk_heads(self, outputs, batch): return {k: (outputs[f'risk_{k}'], batch['target'], batch['y_mask']) for k in ('multi', 'cc', 'mlo')}
    rows = breast_history(prepared.cohort, current='last')
    rows['image_id_mlo'] = rows.image_id_mlo.where(rows.index % 2 == 0)
    t = predict(tiny(Silent), prepared, rows=rows)
    assert (t.output == 'risk_mlo_year_1').sum() == (rows.index % 2 == 0).sum()

def test_the_curve_of_a_missing_view_is_nobodys():
    z = torch.zeros(2, 5); falls = z - torch.arange(5.)
    out = dict(risk_multi=z, risk_cc=z, risk_mlo=torch.stack([z[0], falls[1]]), present=torch.tensor([[1., 1], [1, 0]]))
    y = dict(target=z, y_mask=z+1)
    assert RiskObjective(DensityRisk())(out, y).isfinite()
    with pytest.raises(InputError, match='row 1'): RiskObjective(DensityRisk())(out | dict(present=torch.ones(2, 2)), y)

def test_an_answer_of_several_heads_is_for_predict(prepared):
    learn = risk_learn(prepared, tiny(Mean))
    with pytest.raises(InputError, match="it reads 'risk_cc'"): learn.get_preds()
    assert len(predict(learn, prepared, split='test'))

def test_get_preds_and_validate_refuse_it_too(prepared):
    learn = risk_learn(prepared, Bare())
    learn.loss_func.asked = True
    with pytest.raises(InputError, match='of Bare: row 0'): learn.get_preds()
    with pytest.raises(InputError, match='of Bare: row 0'): learn.validate()

def test_an_answer_without_risk_multi_is_predicted(prepared):
    class Views(CurrentExamRisk):
        def forward(self, batch): o = super().forward(batch); del o['risk_multi']; return o | dict(prior_weight_mlo=torch.tensor([[1., 0, 2]]).expand(len(o['risk_cc']), -1))
        def get_primary_risk_head(self, outputs): return cumulative_risk(outputs['risk_cc'])
    t = predict(tiny(Views), prepared, split='test')
    assert (t.value[t.output == 'priors_used'] == 2).all() and (t.output == 'risk_year_1').any()

def test_a_model_whose_risk_falls_is_refused_at_its_first_batch(prepared):
    learn = risk_learn(prepared, Plain())
    before = [o.clone() for o in learn.model.parameters()]
    with pytest.raises(InputError, match='row 0: found .*never falls'): learn.fit(1)
    assert all(map(torch.equal, before, learn.model.parameters()))
    with pytest.raises(InputError, match='never falls'): predict(learn, prepared, split='test')

def test_the_learner_gives_the_answer_of_the_model(prepared):
    class Half(CurrentExamRisk):
        def get_primary_risk_head(self, outputs): return super().get_primary_risk_head(outputs)/2
    torch.manual_seed(0); learn = quiet(risk_learner(risk_dls(prepared, bs=4, seed=0, device='cpu'), Half('small', stride=8), recipe=None))
    p, _ = learn.get_preds(); learn.model.__class__ = CurrentExamRisk
    whole, _ = learn.get_preds()
    assert torch.allclose(p*2, whole) and not torch.allclose(p, whole)

def test_how_many_have_a_prior_is_counted(prepared):
    rows = breast_history(prepared.cohort, current='all')
    assert f' {int((rows.previous_image_id_cc_1.notna() | rows.previous_image_id_mlo_1.notna()).sum())} with a prior' in repr(RiskDataset(prepared, rows)) and rows.previous_image_id_cc_1.isna().any()

def test_an_exported_registration_is_the_same(prepared, tmp_path):
    learn = quiet(registration_learner(pair_dls(prepared, bs=8, seed=0, device='cpu'), MammoRegNet(width=2, depth=1), seed=0)); learn.path = tmp_path
    learn.fit(1)
    learn.export('reg.pkl')
    assert (tmp_path/'reg.pkl').stat().st_size < 2e6
    a, b = torch.rand(2, 1, 1, 64, 48)
    again = load_learner(tmp_path/'reg.pkl').model.eval()
    with torch.no_grad(): assert torch.equal(learn.model.eval()(a, b)['flow'], again(a, b)['flow'])

# what a checkpoint, and what a model, is known by

def other_net(): seed_everything(7); return MammoRegNet(width=2, depth=1)

@pytest.fixture(scope='module')
def begun(prepared, tmp_path_factory):
    "A training that has come to its end: its folder, and its learner"
    folder = tmp_path_factory.mktemp('begun')
    seed_everything(1); learn = quiet(learner(prepared, MammoRegNet(width=2, depth=1), folder))
    learn.fit(1)
    return folder, learn

def anew(prepared, folder, net=None, dls=None, cbs=None, seed=0, model=None, **args):
    "The same learner again, or one that differs in something"
    if net is None: seed_everything(1); net = MammoRegNet(width=2, depth=1)
    dls = dls or risk_dls(prepared, bs=4, seed=0, device='cpu')
    return quiet(lmvnet_learner(dls, net, 'small', 8, model_args=dict(width=4, heads=2, **(model or {})), seed=seed, cbs=cbs, folder=folder, **{**dict(lr=1e-3, warmup=5), **args}))

def test_the_same_training_is_taken_up(begun, prepared):
    folder, first = begun
    again = anew(prepared, folder)
    again.fit(1)
    assert again.recorder.values == first.recorder.values and all(torch.equal(v, first.model.state_dict()[k]) for k, v in again.model.state_dict().items())
    again.fit(1)  # and once more, with what the training has left in the callbacks
    assert again.resumable.training_is == torch.load(folder/'checkpoint.pt', weights_only=True)['about']

OTHERS = dict(
    diff_mode=(dict(model=dict(diff_mode='abs')), 'model.processor.diff_mode'),
    prior_dropout=(dict(model=dict(prior_dropout=.5)), "model.prior_dropout: found 0.1 in the training that was begun there, expected 0.5"),
    dropout=(dict(model=dict(dropout=.1)), 'dropout'),
    frozen=(dict(model=dict(freeze_encoder=True)), 'frozen weights of processor'),
    heads=(dict(head_weights=dict(multi=2.)), 'loss'),
    recipe=(dict(recipe=None), 'optimizer'),
    warmup=(dict(warmup=6), 'warm_up.steps: found 5'),
    seed=(dict(seed=1), 'seed .as given.: found 0'),
    mixup=(dict(cbs=[MixUp(.4)]), 'mix_up: found nothing'),
    rate=(dict(lr=2e-3), 'lr'),
    clipping=(dict(cbs=[GradientClip(.1)]), 'gradient_clip: found nothing'))

@pytest.mark.parametrize('change,said', OTHERS.values(), ids=OTHERS)
def test_another_training_is_refused(begun, prepared, change, said):
    with pytest.raises(InputError, match=said) as e: anew(prepared, begun[0], **change).fit(1)
    assert 'another folder' in str(e.value) and 'checkpoint.pt' in str(e.value)

def test_another_registration_is_refused(begun, prepared):
    with pytest.raises(InputError, match='frozen weights of registration'): anew(prepared, begun[0], other_net()).fit(1)

def test_other_data_are_refused(begun, prepared):
    make = lambda **k: risk_dls(prepared, **{**dict(bs=4, seed=0, device='cpu'), **k})
    swapped = make(); t = swapped.train_ds.rows; t['exam_id'] = t.exam_id.to_numpy()[::-1]
    for dls, said in ((make(augment=None), 'RiskAugment: found RiskAugment in the training that was begun there, expected nothing'), (make(augment=RiskAugment(flip=.5)), 'RiskAugment.flip'), (make(priors=2), 'priors'), (swapped, 'train.rows'), (make(registration=still), 'flows')):
        with pytest.raises(InputError, match=said): anew(prepared, begun[0], dls=dls).fit(1)

def test_flows_of_another_registration_are_refused(prepared, tmp_path):
    moved = lambda by: lambda fixed, moving: fixed.new_full((len(fixed), 2, *fixed.shape[2:]), by)
    def make(by):
        learn = lmvnet_learner(risk_dls(prepared, bs=4, seed=0, device='cpu', registration=moved(by)), None, 'small', 8, model_args=dict(width=4, heads=2), seed=0, folder=tmp_path)
        return quiet(learn)
    make(2.).fit(1); make(2.001).fit(1)
    for by in (3., -2.):
        with pytest.raises(InputError, match='train.flows'): make(by).fit(1)

def test_validate_neither_needs_a_training_nor_takes_up_a_checkpoint(prepared, tmp_path):
    "fastai tells callbacks that a fit begins there too: the best weights stay, and nothing is written"
    learn = anew(prepared, tmp_path)
    learn.validate(); assert not list(tmp_path.iterdir())
    learn.fit(3, 1e-2); file = (tmp_path/'checkpoint.pt').read_bytes()
    for p in learn.model.parameters(): p.data.add_(.01)
    now = [p.clone() for p in learn.model.parameters()]
    with learn.no_bar(): learn.validate(); learn.get_preds()
    assert all(map(torch.equal, now, learn.model.parameters())) and (tmp_path/'checkpoint.pt').read_bytes() == file

def test_a_schedule_is_compared(prepared, tmp_path):
    make = lambda: quiet(risk_learner(risk_dls(prepared, bs=4, seed=0, device='cpu'), DensityRisk(), recipe=None, folder=tmp_path))
    make().fit_one_cycle(1, 1e-3); make().fit_one_cycle(1, 1e-3)
    with pytest.raises(InputError, match='schedule of lr'): make().fit_one_cycle(1, 2e-3)
    with pytest.raises(InputError, match='param_scheduler'): make().fit(1)

def test_checkpoints_of_an_older_version_are_refused(begun, prepared, tmp_path):
    s = torch.load(begun[0]/'checkpoint.pt', weights_only=True)
    for about in (dict(lr=s['about']['lr'], wd=s['about']['wd'], batch_size=4), {}, None):
        torch.save({k: v for k, v in s.items() if k != 'about'} | ({} if about is None else dict(about=about)), tmp_path/'checkpoint.pt')
        with pytest.raises(InputError, match='older version'): anew(prepared, tmp_path).fit(1)

def test_a_registration_is_taken_up_too(prepared, tmp_path):
    make = lambda **k: quiet(registration_learner(pair_dls(prepared, bs=8, seed=0, device='cpu'), MammoRegNet(width=2, depth=1), folder=tmp_path, seed=0, **k))
    make().fit(1); make().fit(1)
    with pytest.raises(InputError, match='loss.smooth'): make(smooth=2.).fit(1)

def small(): return LMVNet('small', None, 8, width=4, heads=2)

def test_what_a_model_was_trained_on_goes_where_its_weights_go(prepared, tmp_path):
    learn = quiet(risk_learner(risk_dls(prepared, bs=4, priors=3, seed=0, device='cpu'), small())); net = learn.model
    learn.validate(); assert net.description is None  # nothing was trained
    learn.fit(1); torch.save(net.state_dict(), tmp_path/'net.pt')
    new = small(); assert new.description is None; new.load_state_dict(torch.load(tmp_path/'net.pt', weights_only=True))
    other = prepare_cohort(prepared.cohort, prepared.cache.folder, PrepareConfig(size=(48, 64)), workers=1, progress=False)
    rows, one = (breast_history(prepared.cohort, p, current='last') for p in (3, 1))
    for m in (net, new):
        quiet(risk_learner(risk_dls(prepared, bs=4, seed=0, device='cpu'), m)).validate()  # asked only: it stays what it was
        assert m.description['training']['priors'] == 3 and m.description['training']['aligned'] is False and m.description['training']['prepare']['size'] == [64, 48]
        assert predict(m, prepared, split='test').equals(predict(m, prepared, split='test', rows=rows, priors=3))
        for args, said in ((dict(prepared=other), r'size: found \[48, 64\], expected \[64, 48\]'), (dict(priors=4), 'priors: found 4, expected 3 at most'), (dict(registration=still), 'registration'), (dict(rows=one), 'time_gap_3'),
                           (dict(samples=RiskDataset(other, rows, priors=3)), 'size'), (dict(samples=RiskDataset(prepared, rows, priors=3, registration=still)), 'flows in the samples')):
            with pytest.raises(InputError, match=said): predict(m, **{**dict(prepared=prepared, split='test'), **args})
        fewer = predict(m, prepared, split='test', priors=1)  # as it knows them from training
        assert fewer.equals(predict(m, prepared, split='test', samples=RiskDataset(prepared, one[one.split == 'test'])))
    old = {k: v for k, v in net.state_dict().items() if k != 'trained_on'}  # weights that do not say: nothing is known of them, whoever gets them
    for m in (small(), net): m.load_state_dict(old); assert m.description is None and len(predict(m, other, split='test'))
    with pytest.raises(RuntimeError, match='unexpected|Unexpected'): small().load_state_dict(old | dict(more=torch.ones(1)))

def test_baselines_are_asked_with_the_samples_of_the_others(prepared):
    "One set of samples with three priors for a comparison: the current exam reads none, density not even a picture"
    rows = breast_history(prepared.cohort, 3, current='last').query('split == "test"')
    other = prepare_cohort(prepared.cohort, prepared.cache.folder, PrepareConfig(size=(48, 64)), workers=1, progress=False)
    for net, pictures in ((CurrentExamRisk('small', 8, width=4), prepared), (DensityRisk(), other)):
        learn = quiet_fit(prepared, net)
        assert len(predict(learn, pictures, samples=RiskDataset(pictures, rows, priors=3)))
    with pytest.raises(InputError, match='size'): predict(quiet_fit(prepared, CurrentExamRisk('small', 8, width=4)), other, rows=rows)

def quiet_fit(prepared, net): learn = quiet(risk_learner(risk_dls(prepared, bs=4, seed=0, device='cpu'), net)); learn.fit(1); return learn

@pytest.mark.parametrize('gap', [float('nan'), -1.])
def test_a_prior_without_a_date_is_refused(prepared, gap):
    rows = breast_history(prepared.cohort, current='last', need_prior=True).reset_index(drop=True)
    rows.loc[1, 'time_gap_1'] = gap
    with pytest.raises(InputError, match=f'time_gap_1: found {gap} in row 1'): RiskDataset(prepared, rows)

def test_a_learner_that_was_exported_remembers_too(prepared, tmp_path):
    learn = quiet(learner(prepared)); learn.path = tmp_path; learn.fit(1)
    learn.export('learner.pkl')
    with pytest.raises(InputError, match='as they lie'): predict(load_learner(tmp_path/'learner.pkl'), prepared, split='test', registration=still)

# gaps and the start

@torch.no_grad()
def test_a_prior_of_long_ago_weighs_as_one_of_five_years():
    seed_everything(0); net = LMVNet('small', None, 8, width=4, heads=2).eval()
    b = batch(); b = dict(b, **{f'previous_image_{v}': torch.rand(2, 2, 64, 48) for v in ('cc', 'mlo')})
    asked = lambda *gap: net(dict(b, time_gap=torch.tensor([[*gap]]*2)))
    for k in ('risk_multi', 'prior_weight_cc'): assert torch.equal(asked(1., 5.)[k], asked(1., 15.)[k]) and not torch.equal(asked(1., 5.)[k], asked(1., 2.)[k])
    there = {f'present_previous_{v}': torch.tensor([[1., 0.]]*2) for v in ('cc', 'mlo')}  # the second prior does not exist, nor does its gap
    assert torch.equal(*(net(dict(b, **there, time_gap=torch.tensor([[1., g]]*2)))['risk_multi'] for g in (0., float('nan'))))

@pytest.mark.parametrize('convention', ['known', 'cumulative'])
def test_a_new_model_begins_at_the_risk_of_the_training_breasts(convention):
    "100 women, ten cancers a year, all followed: 10 % to 50 %, however the years after a cancer are masked"
    known = survival_target([*([y+.5 for y in range(5)]*10), *[float('nan')]*50], [5.]*100, convention=convention)
    model = DensityRisk(); model.layer = CumulativeProbabilityLayer(1); _start_at(model, known)
    assert torch.allclose(model.layer(torch.zeros(1, 1))[0].sigmoid(), torch.tensor([.1, .2, .3, .4, .5]), atol=1e-4)
