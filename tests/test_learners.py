"""The two-view learner with fastai's own tools, model files from strangers, and what a frozen encoder may do."""
import copy, json, warnings
from types import SimpleNamespace
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np, pandas as pd, pytest, torch
import mammo_nb.core.fastai_import
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import load_learner
from fastai.metrics import RocAucMulti, accuracy_multi
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import rng_for, seed_everything
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.preparation.prepare import PrepareConfig
from mammo_nb.samples.augment import Augment
from mammo_nb.samples.two_view import TwoViewInputs, TwoViewTargets, two_view_dls
from mammo_nb.learners.keep_best import EarlyStopping, KeepBest
from mammo_nb.learners.outputs import auc_metric
from mammo_nb.learners.two_view import TwoViewLoss, two_view_learner
from mammo_nb.learners.systems import evaluate, load_model, predict
from mammo_nb.core.hub import HubModel, model_version
from mammo_nb.metrics.weighted import auc
from mammo_nb.models.lmvnet import LMVNet
from mammo_nb.models.two_view import TwoViewNet
from mammo_nb.registration.instance_optimisation import InstanceOptimised
from mammo_nb.registration.mammoregnet import MammoRegNet

SIZE = (64, 48)

class Pictures:
    "A prepared cohort of toy breasts that lives in memory: a bright disc in both views is a cancer"
    def __init__(self, n=36, seed=0, missing=()):
        images, findings, self.keys = [], [], {}
        yy, xx = np.mgrid[:SIZE[0], :SIZE[1]]
        inside = (xx/44)**2+((yy-32)/29)**2 < 1
        for p in range(n):
            split = 'train' if p < n//2 else 'valid' if p < 3*n//4 else 'test'
            for side in 'LR':
                y = (p+(side == 'R'))%2
                for view in ('CC', 'MLO'):
                    i = f'p{p}-{side}-{view}'
                    if i in missing: continue
                    r = rng_for(seed, i)
                    c = r.uniform((14, 4), (50, 30))
                    im = .35+.03*r.normal(size=SIZE)+.3*y*(np.hypot(yy-c[0], xx-c[1]) < 5)
                    self.keys[i] = np.where(inside, im.clip(.01, 1), 0).astype('float32')[None]
                    images.append(dict(image_id=i, patient_id=f'p{p}', exam_id=f'e{p}', laterality=side, view=view, path=f'{i}.png', rows=64., cols=48.,
                                       split=split, years_followed=5., provenance='toy'))
                    if y: findings.append(dict(finding_id=f'f-{i}', image_id=i, pathology='malignant'))
        self.cohort, self.config, self.failures = Cohort(pd.DataFrame(images), pd.DataFrame(findings)), PrepareConfig(size=SIZE), pd.DataFrame(columns=['image_id'])
    def load(self, image_id): return SimpleNamespace(image=self.keys[image_id])

@pytest.fixture(scope='module')
def pictures(): return Pictures(missing=('p1-L-MLO', 'p20-R-CC'))

@pytest.fixture
def make(pictures, tmp_path):
    def f(**kwargs):
        dls = two_view_dls(pictures, bs=12, seed=0, augment=None)
        learn = two_view_learner(dls, **{**dict(seed=0, path=tmp_path), **kwargs})
        learn.remove_cb(learn.progress) if hasattr(learn, 'progress') else None
        learn.logger = lambda *a, **k: None
        return learn
    return f

@pytest.fixture(scope='module')
def trained(pictures):
    learn = two_view_learner(two_view_dls(pictures, bs=12, seed=0, augment=Augment(rotate=4)), seed=0)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(10, 5e-3)
    return learn

def test_it_learns_and_predicts(trained, pictures):
    table = predict(trained, pictures, split='test')
    fused = table[table.output == 'probability']
    assert auc(fused.label.to_numpy(), fused.value.to_numpy()) > .9
    assert set(fused.laterality) == {'L', 'R'} and len(fused) == 18
    assert trained.recorder.values[-1][0] < trained.recorder.values[0][0]

def test_missing_views_in_the_table(trained, pictures):
    t = predict(trained, pictures).set_index(['patient_id', 'laterality', 'output']).value
    assert ('p1', 'L', 'probability_mlo') not in t.index and t['p1', 'L', 'probability'] == pytest.approx(t['p1', 'L', 'probability_cc'])
    assert ('p20', 'R', 'probability_cc') not in t.index and t['p20', 'R', 'probability'] == pytest.approx(t['p20', 'R', 'probability_mlo'])

def test_evidence_lies_on_the_lesion(trained, pictures):
    rows = [i for i in pictures.keys if i.endswith('CC') and (int(i[1:].split('-')[0])+('-R-' in i))%2]
    hits = 0
    for i in rows:
        r = rng_for(0, i)
        c = r.uniform((14, 4), (50, 30))
        with torch.no_grad(): _, m = trained.model.eval().encode(torch.tensor(pictures.keys[i])[None])
        at = np.array(np.unravel_index(int(m[0].argmax()), m[0].shape))*8+4
        hits += np.hypot(*(at-c)) < 10
    assert hits/len(rows) > .75, hits/len(rows)

def test_same_seed_same_model(make):
    versions = []
    for _ in range(2):
        learn = make(seed=3)
        learn.fit_one_cycle(1)
        versions.append(model_version(learn.model))
    assert versions[0] == versions[1]
    learn = make(seed=4)
    learn.fit_one_cycle(1)
    assert model_version(learn.model) != versions[0]

def test_lr_find(make):
    learn = make()
    before = model_version(learn.model)
    found = learn.lr_find(num_it=12, show_plot=False)
    assert 1e-7 < found.valley < 10 and len(learn.recorder.lrs) > 5
    assert model_version(learn.model) == before  # the weights are put back

def test_save_best_early_stop_and_log(make, tmp_path):
    learn = make()
    learn.fit(4, cbs=[SaveModelCallback(monitor='auc', fname='best'), EarlyStoppingCallback(monitor='auc', patience=1), CSVLogger(tmp_path.name)])
    assert (tmp_path/'models'/'best.pth').exists()
    log = pd.read_csv(tmp_path/tmp_path.name)
    assert list(log.columns) == ['epoch', 'train_loss', 'valid_loss', 'auc', 'time'] and 1 <= len(log) <= 4
    with learn.no_bar(): assert learn.validate()[1] == pytest.approx(log.auc.max(), abs=1e-6)  # the best one was loaded

def test_early_stopping_stops(make):
    learn = make(metrics=None)
    learn.fit(5, lr=0., cbs=EarlyStoppingCallback(monitor='auc', patience=1, min_delta=.5))
    assert len(learn.recorder.values) == 2

class StepCount(Callback):
    order = 1000
    def before_fit(self): self.steps = 0
    def after_step(self): self.steps += 1

@pytest.mark.parametrize('n_acc,steps', [(12, 3), (24, 1)])
def test_gradient_accumulation(make, n_acc, steps):
    learn = make()
    learn.add_cb(StepCount()).fit(1, cbs=GradientAccumulation(n_acc))
    assert len(learn.dls.train) == 3 and learn.step_count.steps == steps

def test_gradient_clip(make):
    norms = []
    class Norm(Callback):
        order = 500
        def before_step(self): norms.append(float(torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm()))
    make().fit(1, cbs=[GradientClip(.01), Norm()])
    assert norms and max(norms) < .0101

def test_mixed_precision(make, pictures):
    learn = make()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # on a machine without CUDA torch says that it does nothing
        learn.fit(1, cbs=MixedPrecision())
    assert np.isfinite(learn.recorder.values[-1]).all()

def test_low_precision_forward(trained, pictures):
    x = trained.dls.valid.one_batch()[0]
    net = trained.model.eval()
    with torch.no_grad():
        a = net(x)['logit']
        with torch.autocast('cpu', dtype=torch.bfloat16): b = net(x)
    assert b['logit'].dtype == torch.float32 and (a-b['logit']).abs().max() < .15
    assert torch.allclose(b['map_cc'].sum((1, 2))[b['logit_cc'].isfinite()], b['logit_cc'][b['logit_cc'].isfinite()], atol=1e-4)

def test_get_preds_in_all_its_forms(trained):
    labels = trained.dls.valid_ds.rows.label.to_numpy()
    with trained.no_bar():
        p, y, said, loss = trained.get_preds(with_decoded=True, with_loss=True)
        x, p2, y2 = trained.get_preds(with_input=True, reorder=False)
        train = trained.get_preds(ds_idx=0)
        logit, _ = trained.get_preds(act=lambda o: o)
    assert (y.numpy() == labels).all() and torch.equal(said, p) and loss.shape == p.shape
    assert torch.equal(p, p2) and x['image_cc'].shape[0] == len(p)
    assert len(train[0]) == len(trained.dls.train_ds)  # no breast of an incomplete batch is lost
    assert torch.allclose(logit.sigmoid(), p)

def test_ordinary_metrics_of_fastai(make):
    learn = make(metrics=[RocAucMulti(), auc_metric(), lambda p, t: accuracy_multi(p, t, thresh=.5)])
    learn.fit(1)
    theirs, ours, accuracy = learn.recorder.values[-1][-3:]
    assert theirs == pytest.approx(ours, abs=1e-6) and 0 <= accuracy <= 1

def test_shows(trained):
    plt.close('all')
    trained.dls.show_batch(max_n=4)
    trained.dls.valid.show_batch(max_n=2)
    with trained.no_bar(): trained.show_results(max_n=3)
    titles = [[a.get_title() for a in plt.figure(n).axes if a.get_title()] for n in plt.get_fignums()]
    assert [len(t) for t in titles] == [4, 2, 3]
    assert all(t.split(' | ')[0] in ('cancer', 'no cancer') and ' predicted 0.' in t or ' predicted 1.' in t for t in titles[2])
    plt.close('all')

def test_batches_keep_their_class(trained):
    for dl in trained.dls.loaders:
        x, y = next(iter(dl))
        assert type(x) is TwoViewInputs and type(y) is TwoViewTargets
        x, y = dl.one_batch()
        assert type(x) is TwoViewInputs and type(y) is TwoViewTargets

def test_loading_in_other_processes(pictures):
    x, y = next(iter(two_view_dls(pictures, bs=4, seed=0, augment=None, num_workers=1, in_memory=False).train))
    a, b = next(iter(two_view_dls(pictures, bs=4, seed=0, augment=None).train))
    assert type(x) is TwoViewInputs and torch.equal(x['image_cc'], a['image_cc']) and torch.equal(y['label'], b['label'])

def test_export_and_resume(trained, pictures, tmp_path, make):
    trained.path = tmp_path
    trained.export('learner.pkl')
    assert (tmp_path/'learner.pkl').stat().st_size < 5e6  # no pictures in it
    again = load_learner(tmp_path/'learner.pkl')
    t = predict(trained, pictures, split='test')
    assert np.allclose(predict(again, pictures, split='test').value, t.value)
    learn = make()
    learn.fit(1)
    learn.save('half')
    learn.fit(1)
    other = make(seed=9)
    other.create_opt()
    other.load('half')
    assert len(other.opt.state_dict()['state']) == len(learn.opt.state_dict()['state'])
    other.fit(1)

def test_a_frozen_encoder_does_not_move(make):
    learn = make(encoder='tf_efficientnet_lite0', pretrained=True, stride=8, freeze_encoder=True)
    before = copy.deepcopy(learn.model.state_dict())
    learn.fit_one_cycle(2, 1e-2)
    after = learn.model.state_dict()
    moved = [k for k in after if not torch.equal(after[k], before[k])]
    assert moved and all(k.startswith('head.') for k in moved), moved
    assert sum(k.startswith('encoder.') for k in after) > 40

def test_an_unfrozen_encoder_does_move(make):
    learn = make(encoder='test_resnet')
    before = copy.deepcopy(learn.model.state_dict())
    learn.fit(1)
    assert any(not torch.equal(v, before[k]) for k, v in learn.model.state_dict().items() if 'running_mean' in k)

def test_single_views_train_where_the_other_is_missing(make):
    for view in ('cc', 'mlo'):
        learn = make(views=(view,))
        learn.fit(1)
        assert np.isfinite(learn.recorder.values[-1]).all() and np.isfinite(model_numbers(learn.model)).all()

def model_numbers(model): return torch.cat([v.float().flatten() for v in model.state_dict().values()]).numpy()

def test_a_batch_without_any_view_teaches_nothing():
    net, loss = TwoViewNet(), TwoViewLoss()
    x = dict(image_cc=torch.zeros(2, 1, *SIZE), image_mlo=torch.zeros(2, 1, *SIZE), present_cc=torch.zeros(2), present_mlo=torch.zeros(2))
    out = net(x)
    assert out['logit'].isnan().all() and float(loss(out, dict(label=torch.ones(2)))) == 0

def test_no_gradient_from_what_is_missing():
    net, loss = TwoViewNet(), TwoViewLoss()
    x = dict(image_cc=torch.rand(3, 1, *SIZE), image_mlo=torch.rand(3, 1, *SIZE), present_cc=torch.tensor([1., 1, 0]), present_mlo=torch.tensor([0., 1, 0]))
    loss(net(x), dict(label=torch.tensor([1., 0, float('nan')]))).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)

def test_gaze_moves_with_the_picture():
    seed_everything(0)
    yy, xx = torch.meshgrid(torch.arange(64), torch.arange(48), indexing='ij')
    blob = lambda r, c: torch.exp(-((yy+.5-r)**2+(xx+.5-c)**2)/18.)[None, None].repeat(40, 1, 1, 1)
    x = TwoViewInputs(image_cc=blob(20, 30), image_mlo=blob(40, 16), present_cc=torch.ones(40), present_mlo=torch.ones(40))
    y = TwoViewTargets(label=torch.ones(40), gaze_cc=blob(20, 30), gaze_mlo=blob(40, 16), has_gaze=torch.ones(40, 2))
    a, b = Augment(gain=0, gamma=0)((x, y), split_idx=0)
    centre = lambda o: torch.stack([(o*t).sum((1, 2, 3))/o.sum((1, 2, 3)) for t in (yy, xx)], 1)
    for v in ('cc', 'mlo'):
        p, g = centre(a[f'image_{v}']), centre(b[f'gaze_{v}'])
        assert (p-g).abs().max() < .3 and (p-centre(x[f'image_{v}'])).abs().max() > 2
    assert not torch.allclose(centre(a['image_cc'])-centre(x['image_cc']), centre(a['image_mlo'])-centre(x['image_mlo']), atol=.5)  # each view on its own
    up, gaze = Augment(rotate=0, shift=0, scale=0, gain=0, gamma=0, flip=1)((x, y), split_idx=0)
    assert torch.allclose(up['image_cc'], x['image_cc'].flip(-2), atol=1e-5) and torch.allclose(gaze['gaze_mlo'], y['gaze_mlo'].flip(-2), atol=1e-5)
    half = Augment(rotate=0, shift=0, scale=0, gain=0, gamma=0, flip=.5)((x, y), split_idx=0)
    turned = {v: (centre(half[0][f'image_{v}'])-centre(x[f'image_{v}'])).abs().max(1).values > 1 for v in ('cc', 'mlo')}
    for v in ('cc', 'mlo'):
        assert 5 < turned[v].sum() < 35  # of 40; a fair coin is outside once in a million
        assert (centre(half[0][f'image_{v}'])-centre(half[1][f'gaze_{v}'])).abs().max() < .01  # the gaze goes along
    assert not torch.equal(turned['cc'], turned['mlo'])
    same = Augment()((x, y), split_idx=1)
    assert torch.equal(same[0]['image_cc'], x['image_cc'])  # validation is left alone

# the line of health after a fit

class Kill(Callback):
    "Stop as a killed process would, after an epoch"
    order = 10**7
    def __init__(self, epoch): self.last = epoch
    def after_epoch(self):
        if self.epoch == self.last: raise KeyboardInterrupt

def least_trained(): return KeepBest('train_loss', comp=np.greater)

def test_the_line_after_a_resume_is_that_of_the_kept_epoch(make, tmp_path):
    options = dict(lr=1e-4, cbs=least_trained())
    whole = make(**options)
    whole.fit(4)
    assert whole.keep_best.epoch_of_best == 0 and whole.fit_health.text.startswith('epoch 0 kept')
    options['folder'] = tmp_path/'run'
    with pytest.raises(KeyboardInterrupt): make(**options | dict(cbs=least_trained())).fit(4, cbs=Kill(1))
    for _ in range(2):  # continued, and once more when all is done
        again = make(**options | dict(cbs=least_trained()))
        again.fit(4)
        assert again.fit_health.text == whole.fit_health.text
        assert again.fit_health.warnings == whole.fit_health.warnings != []
        assert model_version(again.model) == model_version(whole.model)

def test_the_line_of_a_second_fit_is_its_own(make):
    learn = make()
    learn.fit(3)
    assert learn.fit_health.text.startswith('epoch 2 kept')
    learn.fit(1)
    assert learn.fit_health.text.startswith('epoch 0 kept') and list(learn.fit_health.epochs) == [0]
    assert 'nan' not in learn.fit_health.text and learn.fit_health.warnings

def test_the_line_never_speaks_of_another_epoch(make):
    learn = make(cbs=least_trained(), lr=1e-4)
    learn.fit(2)
    learn.fit_health.begin()
    learn.fit_health.epochs = {1: {}}
    learn.fit_health.after_fit()
    assert learn.fit_health.kept_epoch() == 0 and learn.fit_health.text is None

def test_the_line_after_an_early_stop_is_that_of_the_last_epoch(make):
    learn = make(lr=0., cbs=EarlyStopping('auc', patience=2))
    learn.fit(6)
    last = len(learn.recorder.values)-1
    assert last < 5 and learn.fit_health.text.startswith(f'epoch {last} kept')

def test_looking_at_the_validation_set_leaves_the_line(make):
    learn = make()
    learn.fit(2)
    text = learn.fit_health.text
    learn.validate()
    learn.get_preds()
    assert learn.fit_health.text == text and sorted(learn.fit_health.epochs) == [0, 1]

# model folders

@pytest.fixture
def saved(trained, tmp_path):
    return trained.model.save_pretrained(tmp_path/'m'/'two_view')


def edit(folder, own=None, **changes):
    "Change arguments, or the entry `mammo_nb`, of a configuration"
    path = folder/'config.json'
    config = json.loads(path.read_text())
    config.update(changes)
    config['mammo_nb'].update(own or {})
    path.write_text(json.dumps(config))


def test_a_model_comes_back_from_its_folder(saved, trained, pictures):
    version = json.loads((saved/'config.json').read_text())['mammo_nb']['version']
    assert model_version(load_model(saved)) == model_version(trained.model) == version
    again = predict(load_model(saved), pictures)
    assert np.allclose(again.value, predict(trained, pictures).value, atol=1e-6)
    assert sorted(p.name for p in saved.iterdir()) == ['README.md', 'config.json', 'model.safetensors']


def test_the_model_card_tells_the_cohort_and_the_metrics(trained, pictures, tmp_path):
    metrics = evaluate(predict(trained, pictures, split='test'), n_boot=20)
    text = (trained.model.save_pretrained(tmp_path/'card', metrics=metrics)/'README.md').read_text()
    for part in ('rows_sha256', 'patients', 'auc', 'ci_low', 'not for clinical use'): assert part in text


@pytest.mark.parametrize('own, changes, part', [
    (dict(format=99), {}, 'format: found 99'),
    (dict(system='five_views'), {}, "found 'five_views'"),
    (dict(model='NoSuchNet'), {}, 'NoSuchNet'),
    ({}, dict(encoder='no_such_net'), 'no_such_net'),
    ({}, dict(width=9), 'weights: found'),
    ({}, dict(lambda_=1), 'lambda_'),
    (dict(weights_sha256='0'*64), {}, 'checksum')])
def test_configurations_that_do_not_fit(saved, own, changes, part):
    edit(saved, own, **changes)
    with pytest.raises(InputError, match=part): load_model(saved)


def test_a_configuration_without_the_librarys_entry(saved):
    (saved/'config.json').write_text('{}')
    with pytest.raises(InputError, match='configuration'): load_model(saved)


def test_weights_that_are_something_else(saved):
    import hashlib
    import pickle
    weights = saved/'model.safetensors'
    for content in (b'', b'\x00'*100, pickle.dumps(print)):
        weights.write_bytes(content)
        edit(saved, dict(weights_sha256=hashlib.sha256(content).hexdigest()))
        with pytest.raises(InputError, match='model.safetensors'): load_model(saved)
    weights.unlink()
    with pytest.raises(InputError, match='no such file'): load_model(saved)


def test_a_model_with_an_encoder_of_its_own_is_not_saved(tmp_path):
    with pytest.raises(InputError, match='cannot be rebuilt'): TwoViewNet(TwoViewNet().encoder).save_pretrained(tmp_path/'m')
    assert not (tmp_path/'m').exists()


def test_pretrained_weights_are_not_needed_to_load(make, tmp_path, monkeypatch):
    learn = make(encoder='tf_efficientnet_lite0', pretrained=True)
    learn.model.save_pretrained(tmp_path/'lite')
    import mammo_nb.models.backbone as b
    monkeypatch.setattr(b, 'lite0_weights', lambda *a: pytest.fail('asked for pretrained weights'))
    assert model_version(load_model(tmp_path/'lite')) == model_version(learn.model)


def test_push_to_hub_uploads_the_folder(trained, monkeypatch):
    "The hub is replaced: what would be uploaded is looked at"
    from types import SimpleNamespace as Namespace
    import huggingface_hub.hub_mixin as hub
    uploads = []
    def upload(folder_path, **kwargs):
        uploads.append((kwargs['repo_id'], sorted(p.name for p in folder_path.iterdir())))
        return 'https://huggingface.co/owner/name/commit/1'
    api = Namespace(create_repo=lambda repo_id, **kwargs: Namespace(repo_id=repo_id), upload_folder=upload)
    monkeypatch.setattr(hub, 'HfApi', lambda **kwargs: api)
    trained.model.push_to_hub('owner/name', metrics=[dict(metric='auc', value=.9)])
    assert uploads == [('owner/name', ['README.md', 'config.json', 'model.safetensors'])]


# ---- arguments and metrics of a saved model

def a_batch():
    "A breast with one prior exam"
    views = [f'{exam}_image_{view}' for exam in ('current', 'previous') for view in ('cc', 'mlo')]
    return {name: torch.rand(2, 1, *SIZE) for name in views} | dict(time_gap=torch.ones(2, 1))


def scattered(model):
    "The model with weights that no initialisation leaves at zero"
    torch.manual_seed(1)
    for p in model.parameters(): p.data += .05*torch.randn_like(p)
    return model.eval()


@pytest.mark.parametrize('options', [
    dict(token_pool=np.int64(2)), dict(heads=np.int64(2)), dict(blocks=np.int32(2)),
    dict(width=np.int64(8)), dict(dropout=np.float32(.5), freeze_encoder=np.bool_(True))])
def test_numbers_of_numpy_come_back(options, tmp_path):
    model = scattered(LMVNet('small', None, 8, **(dict(width=4) | options)))
    model.save_pretrained(tmp_path)
    again = LMVNet.from_pretrained(tmp_path)
    assert again.model_args == model.model_args
    assert {name: model.model_args[name] for name in options} == options
    x = a_batch()
    with torch.no_grad(): assert torch.equal(model(x)['logits_fused'], again(x)['logits_fused'])


def test_a_stride_and_views_of_numpy_come_back(tmp_path):
    model = TwoViewNet('small', (np.str_('mlo'), 'cc'), np.int64(4), width=4)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert (again.stride, again.views) == (4, ('mlo', 'cc'))
    assert model_version(again) == model_version(model)


class Own(HubModel):
    "A model of a user, with an argument of any kind"
    def __init__(self, layer=None, option=None, config=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1) if layer is None else layer


@pytest.mark.parametrize('name, value', [
    ('option', np.ones(3)), ('option', torch.float16), ('option', torch.nn.ReLU), ('option', {1: 2}),
    ('option', [torch.nn.ReLU()]), ('option', SimpleNamespace()), ('config', dict(option=1))])
def test_an_argument_that_a_file_cannot_hold_is_refused_by_name(name, value, tmp_path):
    model = Own(**{name: value})
    with pytest.raises(InputError, match=f'{name} of Own: found {type(value).__name__}, .*cannot be rebuilt'):
        model.save_pretrained(tmp_path/'m')
    assert not (tmp_path/'m').exists()


def test_positional_arguments_without_a_name_are_refused(tmp_path):
    "They were saved under the names of others, and the folder could not be loaded"
    class Sizes(HubModel):
        def __init__(self, *sizes, dropout=.1):
            super().__init__()
            self.layer = torch.nn.Linear(len(sizes) or 1, 1)
    with pytest.raises(InputError, match='sizes of Sizes: found tuple'):
        Sizes(1, 2, 3).save_pretrained(tmp_path/'m')
    named = Sizes(dropout=.2)
    assert named.model_args == dict(dropout=.2) and not named.lost_args


def test_arguments_that_a_file_holds():
    options = [None, 'text', 2, .5, True, (1, 2), dict(a=[np.float64(.5)])]
    for option in options: assert not Own(option=option).lost_args
    assert copy.deepcopy(Own(option=2)).model_args == Own(option=2).model_args


def test_a_registration_that_was_set_after_construction_is_refused(tmp_path):
    model, net = LMVNet('small', None, 8, width=4), MammoRegNet(width=4, depth=1)
    model.registration = net
    with pytest.raises(InputError, match='registration of LMVNet: found MammoRegNet, set after'):
        model.save_pretrained(tmp_path/'m')
    assert not (tmp_path/'m').exists()


@pytest.mark.parametrize('refine', (False, True))
def test_a_registration_of_the_constructor_comes_back(refine, tmp_path):
    net = scattered(MammoRegNet(width=4, depth=1))
    net = InstanceOptimised(net, steps=np.int64(2)) if refine else net
    model = scattered(LMVNet('small', net, 8, width=4))
    model.save_pretrained(tmp_path)
    again = LMVNet.from_pretrained(tmp_path)
    x = a_batch()
    with torch.no_grad(): assert torch.equal(model(x)['logits_fused'], again(x)['logits_fused'])


def test_a_module_that_the_constructor_makes_is_saved(tmp_path):
    "The default `None` stands for a layer: the generator of random numbers is not touched"
    model = Own()
    state = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert model_version(Own.from_pretrained(tmp_path)) == model_version(model)
    model.layer = torch.nn.Linear(1, 2)
    with pytest.raises(InputError, match='layer of Own: found Linear, set after'): model.save_pretrained(tmp_path)


def folder_bytes(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_metrics_of_numpy_are_saved(saved):
    model = load_model(saved)
    model.save_pretrained(saved, metrics=[dict(metric='auc', value=np.float32(.7), n=np.int64(9))])
    metrics = json.loads((saved/'config.json').read_text())['mammo_nb']['metrics']
    assert metrics == [dict(metric='auc', value=float(np.float32(.7)), n=9)]
    assert '| auc | 0.700 | 9 |' in (saved/'README.md').read_text()
    assert model_version(load_model(saved)) == model_version(model)


@pytest.mark.parametrize('metrics', [
    [dict(value=object())], [dict(value=pd.Timestamp('2020-01-01'))], dict(auc=.7), [.7], 'auc'])
def test_metrics_that_cannot_be_written_leave_the_earlier_model(metrics, saved):
    before, model = folder_bytes(saved), load_model(saved)
    for p in model.parameters(): p.data.add_(1)
    with pytest.raises(InputError, match='metrics: found'): model.save_pretrained(saved, metrics=metrics)
    assert folder_bytes(saved) == before


def test_a_configuration_that_cannot_be_written_leaves_the_earlier_model(saved):
    before, model = folder_bytes(saved), load_model(saved)
    for p in model.parameters(): p.data.add_(1)
    model._hub_mixin_config['width'] = object()
    with pytest.raises(TypeError): model.save_pretrained(saved)
    assert folder_bytes(saved) == before
