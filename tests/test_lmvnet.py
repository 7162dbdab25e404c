"""The learner of LMV-Net: what may not change in training, and a training that is killed."""
import os, signal, time
from types import SimpleNamespace
import pandas as pd, pytest, torch
import mammo_nb.core.fastai_import
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from fastai.torch_core import to_detach
from processes import SERVER, Elsewhere
from torch import nn
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.core.seeding import seed_everything
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.insilico.files import insilico_cohort, write_insilico
from mammo_nb.samples.pairs import pair_dls
from mammo_nb.preparation.prepare import PrepareConfig
from mammo_nb.core.errors import InputError
from mammo_nb.registration.prior_flows import prior_flows
from mammo_nb.samples.augment import Augment
from mammo_nb.samples.risk import RiskDataset, breast_history, risk_dls
from mammo_nb.learners.registration import evaluate_registration, registration_learner
from mammo_nb.cohort.labels import survival_target
from mammo_nb.learners.risk import (
    start_at_risk, RiskCIndex, RiskObjective, lmvnet_learner, risk_learner
)
from mammo_nb.learners.systems import predict
from mammo_nb.learners.resume import ResumeTraining
from mammo_nb.metrics.concordance import c_index
from mammo_nb.models.lmvnet import LMVNet, UnalignedRisk
from mammo_nb.models.risk import BaseRiskModel
from mammo_nb.models.risk_baselines import CurrentExamRisk, DensityRisk
from mammo_nb.models.cumulative import CumulativeProbabilityLayer, cumulative_risk
from mammo_nb.registration.instance_optimisation import InstanceOptimised
from mammo_nb.registration.mammoregnet import MammoRegNet

# several processes

def _rank(rank, path, out):
    os.environ.update(WORLD_SIZE='2', RANK=str(rank))
    torch.distributed.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        net = nn.parallel.DistributedDataParallel(DensityRisk())
        metric, (risk, time, event) = RiskCIndex(), _known()
        for part in (slice(rank*20, rank*20+10), slice(rank*20+10, rank*20+20)):
            said = SimpleNamespace(named=dict(logits_fused=risk[part]), named_targ=dict(event_times=time[part], event_observed=event[part]))
            metric.accumulate(SimpleNamespace(model=net, to_detach=to_detach, select_output=said))
        out.put(metric.value)
    finally: torch.distributed.destroy_process_group()

def _known():
    g = torch.Generator().manual_seed(0)
    return torch.randn(40, 5, generator=g).abs().cumsum(1)-2, torch.randint(0, 5, (40,), generator=g), (torch.rand(40, generator=g) < .5).long()

def test_several_processes_agree_on_the_metric_of_all_breasts(tmp_path):
    out = SERVER.Queue()
    ps = [SERVER.Process(target=_rank, args=(r, tmp_path/'store', out)) for r in range(2)]
    for p in ps: p.start()
    found = [out.get(timeout=120) for _ in ps]
    for p in ps: p.join()
    risk, time, event = _known()
    assert found == pytest.approx([c_index(time.numpy()+1., event.numpy(), *risk.sigmoid().double().numpy().T, tau=5.)]*2, abs=1e-6)

# freezing and resuming

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('risk')
    files = write_insilico(insilico_cohort(24, seed=3, rows=96, cols=72, pixel_spacing_mm=2.5), folder/'files', workers=1, progress=False)
    return prepare_cohort(files, folder/'cache', PrepareConfig(size=(64, 48)), workers=1, progress=False)

def learner(prepared, registration=None, folder=None, cbs=None, freeze_encoder=False, **args):
    return lmvnet_learner(risk_dls(prepared, bs=4, seed=0, device='cpu'), registration, 'small', 8, model_args=dict(width=4, heads=2, **args), freeze_encoder=freeze_encoder, folder=folder, seed=0, lr=1e-3, warmup=5, cbs=cbs)

def test_frozen_parts_are_the_same_to_the_bit(prepared):
    seed_everything(1)
    net = MammoRegNet(width=2, depth=1)
    learn = learner(prepared, net, freeze_encoder=True)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2)
    after = learn.model.state_dict()
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert any(k.startswith('registration') for k in before) and any('running_mean' in k for k in before)
    assert not [k for k in changed if k.startswith(('processor.encoder', 'registration'))] and any(k.startswith('blocks') for k in changed)

class Slow(Callback):
    "Tell when an epoch has ended; wait after each batch, so that there is time to kill"
    order = 300
    def __init__(self, tell, wait): self.tell, self.wait = tell, wait
    def after_batch(self): time.sleep(self.wait)
    def after_epoch(self): self.tell(self.epoch)

def train_risk(tell, files, cache, folder, wait=0.):
    "Train from the files, and keep the weights"
    prepared = prepare_cohort(Cohort.read(files), cache, PrepareConfig(size=(64, 48)), workers=1, progress=False)
    learn = learner(prepared, folder=folder, cbs=[Slow(tell, wait)])
    with learn.no_bar(), learn.no_logging(): learn.fit(4)
    torch.save(learn.model.state_dict(), folder.with_suffix('.pt'))

def test_a_killed_training_ends_with_the_same_weights(prepared, tmp_path):
    "SIGKILL in the middle of the third epoch, then the same call again"
    places = prepared.cohort.root, prepared.cache.folder
    process = Elsewhere(train_risk, *places, tmp_path/'killed', .2)
    for epoch in process.told():
        if epoch == 1: break
    time.sleep(.5)
    assert process.kill() == -signal.SIGKILL
    assert (tmp_path/'killed'/'checkpoint.pt').is_file() and not (tmp_path/'killed.pt').exists()
    for name, first in (('killed', 2), ('whole', 0)):
        assert Elsewhere(train_risk, *places, tmp_path/name).finish() == list(range(first, 4))
    a, b = (torch.load(tmp_path/f'{n}.pt', weights_only=True) for n in ('killed', 'whole'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (torch.load(tmp_path/n/'checkpoint.pt', weights_only=True) for n in ('killed', 'whole'))  # of the last epoch, whichever was the best
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in b['model']) and all(torch.equal(s[k], t[k]) for s, t in zip(a['optimizer']['state'], b['optimizer']['state'], strict=True) for k in t if isinstance(t[k], torch.Tensor))
    assert [r[:-1] for r in a['recorder']['values']] == [r[:-1] for r in b['recorder']['values']] and len(a['recorder']['values']) == 4 and torch.equal(a['generators']['torch'], b['generators']['torch'])

# fastai's own tools

def quiet(learn):
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.logger = lambda *a, **k: None
    return learn

def test_the_tools_of_fastai(prepared, tmp_path):
    "lr_find leaves the weights as they were; accumulation, clipping, the log and saved best epochs work with ours"
    learn = quiet(learner(prepared))
    learn.path = tmp_path
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.lr_find(num_it=6, show_plot=False)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    learn.fit(2, cbs=[GradientAccumulation(8), GradientClip(.1), CSVLogger(tmp_path.name), SaveModelCallback(monitor='c_index', fname='best')])
    log = pd.read_csv(tmp_path/tmp_path.name)
    assert list(log.columns) == ['epoch', 'train_loss', 'valid_loss', 'c_index', 'time'] and len(log) == 2
    assert learn.validate()[1] == pytest.approx(log.c_index.max(), abs=1e-4)

def test_predictions_in_all_their_forms(prepared, tmp_path):
    learn = quiet(learner(prepared))
    learn.path = tmp_path
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


def dls_with_flows(prepared, registration, priors=1, **kwargs):
    "Loaders whose priors a registration has aligned"
    rows = breast_history(prepared.cohort, priors)
    flows = prior_flows(prepared, rows, registration, progress=False)
    return risk_dls(prepared, priors=priors, rows=rows, flows=flows, **dict(bs=4, seed=0, device='cpu') | kwargs)

def test_a_model_of_aligned_priors_is_not_asked_with_others(prepared):
    dls = dls_with_flows(prepared, still)
    learn = quiet(lmvnet_learner(dls, None, 'small', 8, model_args=dict(width=4, heads=2), seed=0))
    learn.fit(1)
    with pytest.raises(InputError, match='registration'): predict(learn, prepared, split='test')
    assert len(predict(learn, prepared, split='test', registration=still))
    with pytest.raises(InputError, match='other splits|split'): predict(learn, prepared, split='test', dataset=dls.valid_ds)
    plain = quiet(risk_learner(dls, UnalignedRisk('small', 8, width=4, heads=2)))
    plain.fit(1)
    assert len(predict(plain, prepared, split='test'))  # it never took the flows

def test_a_missing_view_has_no_curve_of_its_own(prepared):
    rows = breast_history(prepared.cohort, current='last')
    rows['image_id_mlo'] = rows.image_id_mlo.where(rows.index % 2 == 0)
    t = predict(CurrentExamRisk('small', 8, width=4), prepared, rows=rows)
    count = t.groupby('output').size()
    assert count['risk_mlo_year_1'] == (rows.index % 2 == 0).sum() < count['risk_cc_year_1'] == count['risk_year_1'] == len(rows)

class Plain(BaseRiskModel):
    "One layer, and nothing that keeps its logits from falling"
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 5)
        nn.init.zeros_(self.net.weight)
        self.net.bias.data.copy_(torch.tensor([0., 1, 2, 1, 3]))
    def forward(self, batch): return dict(logits_fused=self.net(batch['current_image_cc'].mean((1, 2, 3))[:, None]))

class Rising(Plain):
    "Its answer never falls, whatever is trained"
    def get_primary_risk_head(self, outputs): return outputs['logits_fused'].sigmoid().cummax(1).values

def risk_learn(prepared, model): return quiet(risk_learner(risk_dls(prepared, bs=4, seed=0, device='cpu'), model, recipe=None))
def tiny(kind): return kind('small', stride=8)

def test_a_model_needs_nothing_but_the_contract(prepared):
    learn = risk_learn(prepared, Rising())
    learn.fit(1)
    assert len(predict(learn, prepared, split='test'))

class Mean(CurrentExamRisk):
    "The answer is the mean of two heads"
    def get_primary_risk_head(self, outputs): return (outputs['logits_fused'].sigmoid() + outputs['logits_cc'].sigmoid())/2

class Side(CurrentExamRisk):
    "Only the head of one view falls"
    def forward(self, batch):
        o = super().forward(batch)
        return o | dict(logits_mlo=o['logits_mlo'] - torch.arange(5.))

class Further(CurrentExamRisk):
    "Heads of its own beside those of the views: one is trained, one is not"
    def forward(self, batch):
        o = super().forward(batch)
        return o | dict(logits_own=o['logits_cc'] - torch.arange(5.), logits_score=o['logits_cc'][:, 0])
    def get_risk_heads(self, outputs, batch): return super().get_risk_heads({k: v for k, v in outputs.items() if k != 'logits_score'}, batch)

class Sum(CurrentExamRisk):
    def get_primary_risk_head(self, outputs): return 2*(2+outputs['logits_fused']).sigmoid()
class Year(CurrentExamRisk):
    def get_primary_risk_head(self, outputs): return outputs['logits_fused'][:, -1].sigmoid()
def beside(change):
    "A head of a view that is not trained, of another shape"
    class Beside(CurrentExamRisk):
        def forward(self, batch):
            o = super().forward(batch)
            return o | dict(logits_cc=change(o['logits_cc']))
        def get_risk_heads(self, outputs, batch): return dict(fused=super().get_risk_heads(outputs, batch)['fused'])
    return lambda: tiny(Beside)
class One(CurrentExamRisk):
    def get_primary_risk_head(self, outputs): return super().get_primary_risk_head(outputs)[:1]
class Bare(Plain):
    def get_primary_risk_head(self, outputs): return outputs['logits_fused'].sigmoid()

@pytest.mark.parametrize('model, says', ((lambda: tiny(Side), 'logits_mlo of Side: row 0: .*never falls'), (lambda: tiny(One), r'of One: shape: found \[1, 5\]'), *((beside(f), r'logits_cc of Beside: shape: .*\[4, 5\], breasts') for f in (lambda z: z[:1], lambda z: z[:, :3], lambda z: z[:, -1])), (lambda: tiny(Sum), 'of Sum: row 0: .*from 0 to 1'), (lambda: tiny(Year), r'of Year: shape: found \[4\], expected \[4, 5\]'), (Bare, 'of Bare: row 0: .*never falls')))
def test_what_no_table_can_be_made_of_is_refused_before_the_first_step(prepared, model, says):
    torch.manual_seed(0)
    learn = risk_learn(prepared, model())
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
        def forward(self, batch):
            o = super().forward(batch)
            del o['present']
            return o
        def get_risk_heads(self, outputs, batch): return {k: (outputs[f'logits_{k}'], batch['target'], batch['y_mask']) for k in ('fused', 'cc', 'mlo')}
    rows = breast_history(prepared.cohort, current='last')
    rows['image_id_mlo'] = rows.image_id_mlo.where(rows.index % 2 == 0)
    t = predict(tiny(Silent), prepared, rows=rows)
    assert (t.output == 'risk_mlo_year_1').sum() == (rows.index % 2 == 0).sum()

def test_the_curve_of_a_missing_view_is_nobodys():
    z = torch.zeros(2, 5)
    falls = z - torch.arange(5.)
    out = dict(logits_fused=z, logits_cc=z, logits_mlo=torch.stack([z[0], falls[1]]), present=torch.tensor([[1., 1], [1, 0]]))
    y = dict(target=z, y_mask=z+1)
    assert RiskObjective(DensityRisk())(out, y).isfinite()
    with pytest.raises(InputError, match='row 1'): RiskObjective(DensityRisk())(out | dict(present=torch.ones(2, 2)), y)

def test_an_answer_of_several_heads_is_for_predict(prepared):
    learn = risk_learn(prepared, tiny(Mean))
    with pytest.raises(InputError, match="it reads 'logits_cc'"): learn.get_preds()
    assert len(predict(learn, prepared, split='test'))

def test_get_preds_and_validate_refuse_it_too(prepared):
    learn = risk_learn(prepared, Bare())
    learn.loss_func.checked = True
    with pytest.raises(InputError, match='of Bare: row 0'): learn.get_preds()
    with pytest.raises(InputError, match='of Bare: row 0'): learn.validate()

def test_an_answer_without_logits_fused_is_predicted(prepared):
    class Views(CurrentExamRisk):
        def forward(self, batch):
            o = super().forward(batch)
            del o['logits_fused']
            return o | dict(prior_weight_mlo=torch.tensor([[1., 0, 2]]).expand(len(o['logits_cc']), -1))
        def get_primary_risk_head(self, outputs): return cumulative_risk(outputs['logits_cc'])
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
    torch.manual_seed(0)
    learn = quiet(risk_learner(risk_dls(prepared, bs=4, seed=0, device='cpu'), Half('small', stride=8), recipe=None))
    p, _ = learn.get_preds()
    learn.model.__class__ = CurrentExamRisk
    whole, _ = learn.get_preds()
    assert torch.allclose(p*2, whole) and not torch.allclose(p, whole)

def test_how_many_have_a_prior_is_counted(prepared):
    rows = breast_history(prepared.cohort, current='all')
    assert f' {int((rows.previous_image_id_cc_1.notna() | rows.previous_image_id_mlo_1.notna()).sum())} with a prior' in repr(RiskDataset(prepared, rows)) and rows.previous_image_id_cc_1.isna().any()

def test_an_exported_registration_is_the_same(prepared, tmp_path):
    learn = quiet(registration_learner(pair_dls(prepared, bs=8, seed=0, device='cpu'), MammoRegNet(width=2, depth=1), seed=0))
    learn.path = tmp_path
    learn.fit(1)
    learn.export('reg.pkl')
    assert (tmp_path/'reg.pkl').stat().st_size < 2e6
    a, b = torch.rand(2, 1, 1, 64, 48)
    again = load_learner(tmp_path/'reg.pkl').model.eval()
    with torch.no_grad(): assert torch.equal(learn.model.eval()(a, b)['flow'], again(a, b)['flow'])

# what a checkpoint, and what a model, is known by

def other_net():
    seed_everything(7)
    return MammoRegNet(width=2, depth=1)

@pytest.fixture(scope='module')
def begun(prepared, tmp_path_factory):
    "A training that has come to its end: its folder, and its learner"
    folder = tmp_path_factory.mktemp('begun')
    seed_everything(1)
    learn = quiet(learner(prepared, MammoRegNet(width=2, depth=1), folder))
    learn.fit(1)
    return folder, learn

def anew(prepared, folder, net=None, dls=None, cbs=None, seed=0, model=None, **args):
    "The same learner again, or one that differs in something"
    if net is None:
        seed_everything(1)
        net = MammoRegNet(width=2, depth=1)
    dls = dls or risk_dls(prepared, bs=4, seed=0, device='cpu')
    return quiet(lmvnet_learner(dls, net, 'small', 8, model_args=dict(width=4, heads=2, **(model or {})), seed=seed, cbs=cbs, folder=folder, **{**dict(lr=1e-3, warmup=5), **args}))

def test_the_same_training_is_taken_up(begun, prepared):
    folder, first = begun
    again = anew(prepared, folder)
    again.fit(1)
    assert again.recorder.values == first.recorder.values and all(torch.equal(v, first.model.state_dict()[k]) for k, v in again.model.state_dict().items())
    again.fit(1)  # and once more, with what the training has left in the callbacks

OTHERS = dict(
    diff_mode=(dict(model=dict(diff_mode='abs')), 'model.diff_mode: signed before, abs now'),
    prior_dropout=(dict(model=dict(prior_dropout=.5)), 'model.prior_dropout: 0.1 before, 0.5 now'),
    dropout=(dict(model=dict(dropout=.1)), 'model.dropout'),
    frozen=(dict(freeze_encoder=True), 'frozen'),
    heads=(dict(head_weights=dict(fused=2.)), 'head_weights'),
    recipe=(dict(recipe=None), 'recipe'),
    warmup=(dict(warmup=6), 'warm_up'),
    seed=(dict(seed=1), 'seed: 0 before, 1 now'),
    mixup=(dict(cbs=[MixUp(.4)]), 'mix_up|MixUp'),
    rate=(dict(lr=2e-3), 'lr'),
    clipping=(dict(cbs=[GradientClip(.1)]), 'gradient_clip|GradientClip'))

@pytest.mark.parametrize('change,said', OTHERS.values(), ids=OTHERS)
def test_another_training_is_refused(begun, prepared, change, said):
    with pytest.raises(InputError, match=said) as e: anew(prepared, begun[0], **change).fit(1)
    assert 'checkpoint.pt' in str(e.value)

def test_another_registration_is_refused(begun, prepared):
    with pytest.raises(InputError, match='frozen'): anew(prepared, begun[0], other_net()).fit(1)

def test_other_data_are_refused(begun, prepared):
    def make(**kwargs): return risk_dls(prepared, **dict(bs=4, seed=0, device='cpu') | kwargs)
    fewer = make(rows=breast_history(prepared.cohort)[2:])
    cases = ((make(augment=None), 'augment'), (make(augment=Augment(flip=.5)), 'augment'), (make(priors=2), 'priors'), (fewer, 'samples'),
             (dls_with_flows(prepared, still), 'flows'))
    for dls, part in cases:
        with pytest.raises(InputError, match=part): anew(prepared, begun[0], dls=dls).fit(1)

def test_flows_of_another_registration_are_refused(prepared, tmp_path):
    moved = lambda by: lambda fixed, moving: fixed.new_full((len(fixed), 2, *fixed.shape[2:]), by)
    def make(by):
        learn = lmvnet_learner(dls_with_flows(prepared, moved(by)), None, 'small', 8, model_args=dict(width=4, heads=2), seed=0, folder=tmp_path)
        return quiet(learn)
    make(2.).fit(1)
    make(2.001).fit(1)
    for by in (3., -2.):
        with pytest.raises(InputError, match='flows'): make(by).fit(1)

def test_validate_neither_needs_a_training_nor_takes_up_a_checkpoint(prepared, tmp_path):
    "fastai tells callbacks that a fit begins there too: the best weights stay, and nothing is written"
    learn = anew(prepared, tmp_path)
    learn.validate()
    assert not list(tmp_path.iterdir())
    learn.fit(3, 1e-2)
    file = (tmp_path/'checkpoint.pt').read_bytes()
    for p in learn.model.parameters(): p.data.add_(.01)
    now = [p.clone() for p in learn.model.parameters()]
    with learn.no_bar():
        learn.validate()
        learn.get_preds()
    assert all(map(torch.equal, now, learn.model.parameters())) and (tmp_path/'checkpoint.pt').read_bytes() == file

def test_a_schedule_is_compared(prepared, tmp_path):
    make = lambda: quiet(risk_learner(risk_dls(prepared, bs=4, seed=0, device='cpu'), DensityRisk(), recipe=None, folder=tmp_path))
    make().fit_one_cycle(1, 1e-3)
    make().fit_one_cycle(1, 1e-3)
    with pytest.raises(InputError, match='lr|schedule'): make().fit_one_cycle(1, 2e-3)
    with pytest.raises(InputError, match='param_scheduler|schedule'): make().fit(1)

def test_a_registration_is_taken_up_too(prepared, tmp_path):
    make = lambda **k: quiet(registration_learner(pair_dls(prepared, bs=8, seed=0, device='cpu'), MammoRegNet(width=2, depth=1), folder=tmp_path, seed=0, **k))
    make().fit(1)
    make().fit(1)
    with pytest.raises(InputError, match='loss.smooth'): make(smooth=2.).fit(1)

def small(): return LMVNet('small', None, 8, width=4, heads=2)

def test_what_a_model_was_trained_on_goes_where_its_weights_go(prepared, tmp_path):
    learn = quiet(risk_learner(risk_dls(prepared, bs=4, priors=3, seed=0, device='cpu'), small()))
    net = learn.model
    learn.validate()
    assert not net.training_info  # nothing was trained
    learn.fit(1)
    torch.save(net.state_dict(), tmp_path/'net.pt')
    new = small()
    assert not new.training_info
    new.load_state_dict(torch.load(tmp_path/'net.pt', weights_only=True))
    other = prepare_cohort(prepared.cohort, prepared.cache.folder, PrepareConfig(size=(48, 64)), workers=1, progress=False)
    rows, one = (breast_history(prepared.cohort, p, current='last') for p in (3, 1))
    for m in (net, new):
        quiet(risk_learner(risk_dls(prepared, bs=4, seed=0, device='cpu'), m)).validate()  # asked only: it stays what it was
        assert m.training_info['priors'] == 3 and m.training_info['aligned'] is False and m.training_info['prepare']['size'] == [64, 48]
        assert predict(m, prepared, split='test').equals(predict(m, prepared, split='test', rows=rows, priors=3))
        for args, said in ((dict(prepared=other), r'size: found \[48, 64\], expected \[64, 48\]'), (dict(priors=4), 'priors: found 4, expected 3 at most'), (dict(registration=still), 'registration'), (dict(rows=one), 'time_gap_3'),
                           (dict(dataset=RiskDataset(other, rows[rows.split == 'test'], priors=3)), 'size'), (dict(dataset=RiskDataset(prepared, rows[rows.split == 'test'], priors=3, flows=prior_flows(prepared, rows[rows.split == 'test'], still, progress=False))), 'not aligned')):
            with pytest.raises(InputError, match=said): predict(m, **{**dict(prepared=prepared, split='test'), **args})
        fewer = predict(m, prepared, split='test', priors=1)  # as it knows them from training
        assert fewer.equals(predict(m, prepared, split='test', dataset=RiskDataset(prepared, one[one.split == 'test'])))
    old = {k: v for k, v in net.state_dict().items() if k != 'trained_on'}  # weights that do not say: nothing is known of them, whoever gets them
    for m in (small(), net):
        m.load_state_dict(old)
        assert not m.training_info and len(predict(m, other, split='test'))
    with pytest.raises(RuntimeError, match='unexpected|Unexpected'): small().load_state_dict(old | dict(more=torch.ones(1)))

def test_baselines_are_asked_with_the_samples_of_the_others(prepared):
    "One set of samples with three priors for a comparison: the current exam reads none, density not even a picture"
    rows = breast_history(prepared.cohort, 3, current='last').query('split == "test"')
    other = prepare_cohort(prepared.cohort, prepared.cache.folder, PrepareConfig(size=(48, 64)), workers=1, progress=False)
    for net, pictures in ((CurrentExamRisk('small', 8, width=4), prepared), (DensityRisk(), other)):
        learn = quiet_fit(prepared, net)
        assert len(predict(learn, pictures, dataset=RiskDataset(pictures, rows, priors=3)))
    with pytest.raises(InputError, match='size'): predict(quiet_fit(prepared, CurrentExamRisk('small', 8, width=4)), other, rows=rows)

def quiet_fit(prepared, net):
    learn = quiet(risk_learner(risk_dls(prepared, bs=4, seed=0, device='cpu'), net))
    learn.fit(1)
    return learn

@pytest.mark.parametrize('gap', [float('nan'), -1.])
def test_a_prior_without_a_date_is_refused(prepared, gap):
    rows = breast_history(prepared.cohort, current='last', require_prior=True).reset_index(drop=True)
    rows.loc[1, 'time_gap_1'] = gap
    with pytest.raises(InputError, match=f'time_gap_1: found {gap} in row 1'): RiskDataset(prepared, rows)

def test_a_learner_that_was_exported_remembers_too(prepared, tmp_path):
    learn = quiet(learner(prepared))
    learn.path = tmp_path
    learn.fit(1)
    learn.export('learner.pkl')
    with pytest.raises(InputError, match='not aligned'): predict(load_learner(tmp_path/'learner.pkl'), prepared, split='test', registration=still)

# the start

@pytest.mark.parametrize('censoring', ['known', 'cumulative'])
def test_a_new_model_begins_at_the_risk_of_the_training_breasts(censoring):
    "100 women, ten cancers a year, all followed: 10 % to 50 %, however the years after a cancer are masked"
    known = survival_target([*([y+.5 for y in range(5)]*10), *[float('nan')]*50], [5.]*100, censoring=censoring)
    model = DensityRisk()
    model.layer = CumulativeProbabilityLayer(1)
    start_at_risk(model.layer, known)
    assert torch.allclose(model.layer(torch.zeros(1, 1))[0].sigmoid(), torch.tensor([.1, .2, .3, .4, .5]), atol=1e-4)


# -- registrations that do not fit

@pytest.fixture(scope='module')
def foreign_registration():
    "A registration network that was trained on smaller images"
    network = MammoRegNet(width=4, depth=1)
    network.set_training_info(dict(prepare=dict(size=[32, 24])))
    return network


def test_a_registration_of_other_images_is_refused_wherever_it_aligns(prepared, foreign_registration):
    rows = breast_history(prepared.cohort)
    pairs = pair_dls(prepared, bs=2, device='cpu').valid_ds
    for where, call in dict(
            lmvnet_learner=lambda: learner(prepared, foreign_registration),
            prior_flows=lambda: prior_flows(prepared, rows, foreign_registration, progress=False),
            evaluate_registration=lambda: evaluate_registration(foreign_registration, pairs)).items():
        with pytest.raises(InputError, match=rf'{where}: prepared images, size: found \[64, 48\], expected \[32, 24\]'):
            call()


def test_an_optimised_registration_is_that_of_its_network(prepared, foreign_registration):
    with pytest.raises(InputError, match='prepared images, size'):
        learner(prepared, InstanceOptimised(foreign_registration))


def test_a_learner_is_taken_as_its_network_and_a_folder_is_refused(prepared):
    trained = registration_learner(pair_dls(prepared, bs=2, device='cpu'), model_args=dict(width=4, depth=1))
    assert learner(prepared, trained).model.registration is trained.model
    with pytest.raises(InputError, match='lmvnet_learner: registration: found .*mn.load_model'):
        learner(prepared, 'models/registration')
    with pytest.raises(InputError, match='LMVNet: registration: found function'):
        learner(prepared, lambda fixed, moving: fixed)
