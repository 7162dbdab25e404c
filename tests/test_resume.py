"""Trainings that are killed and started again, the best epoch, averaged weights, warm-up: on a toy learner with two optimizers."""
import copy, os, pickle, re, shutil, signal, subprocess, sys, textwrap, time
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from processes import Elsewhere
from torch import nn
import mammo_nb.core.fastai_import
from fastai.callback.core import Callback, CancelEpochException, CancelFitException
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, TrackerCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.metrics import mse
from fastai.optimizer import Adam, OptimWrapper
from fastai.vision.augment import RandTransform
from fasttransform import ItemTransform
from torchvision.transforms.v2 import RandomRotation
from mammo_nb.cohort.cohort import Cohort
from mammo_nb.core.describe import describe_value
from mammo_nb.core.errors import InputError
from mammo_nb.core.seeding import seed_everything
from mammo_nb.insilico.files import insilico_cohort
from mammo_nb.learners.keep_best import (
    EarlyStopping, KeepBest, ReduceOnPlateau, TrainingOnly, is_fitting, unwrap_model
)
from mammo_nb.learners.mammonet import mammonet_learner
from mammo_nb.learners.resume import ResumeTraining, read_checkpoint
from mammo_nb.learners.risk import density_learner, lmvnet_learner
from mammo_nb.learners.run_config import (
    callback_config, compare_runs, data_config, dataset_config, flatten_config, flow_pairs, flow_summary, frozen_weights,
    named_callbacks, optimizer_config, run_config_of, schedule_config
)
from mammo_nb.learners.training_state import (
    callback_state, generator_states, gradient_states, load_optimizer_state, optimizer_state
)
from mammo_nb.learners.two_view import two_view_learner
from mammo_nb.learners.warm_up import WarmUp
from mammo_nb.learners.weight_average import WeightAverage
from mammo_nb.models.freezing import freeze_module
from mammo_nb.preparation.prepared_cohort import prepare_cohort
from mammo_nb.registration.prior_flows import prior_pairs
from mammo_nb.samples.augment import Augment
from mammo_nb.samples.risk import breast_history, risk_dls
from mammo_nb.samples.two_view import two_view_dls
from toy_system import grey_dls, grey_learner

class Critic(Callback):
    "A second model with an optimizer of its own, stepped in every training batch, as in a GAN"
    def __init__(self, kind='torch'):
        self.critic = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
        parameters = list(self.critic.parameters())
        self.critic_opt = torch.optim.Adam(parameters, lr=.01) if kind == 'torch' else Adam(parameters, lr=.01)

    def after_loss(self):
        if not self.training: return
        predicted = self.critic(self.learn.x)
        error = (predicted-self.learn.loss_grad.detach()).square().mean()
        self.critic_opt.zero_grad()
        error.backward()
        self.critic_opt.step()
        self.learn.loss_grad = self.learn.loss_grad + .01*self.critic(self.learn.pred).detach().mean()*self.learn.pred.mean()

    def resume_state(self): return dict(critic=self.critic.state_dict(), opt=optimizer_state(self.critic_opt))

    def load_resume_state(self, state):
        self.critic.load_state_dict(state['critic'])
        load_optimizer_state(self.critic_opt, state['opt'])

def line_learner(cbs=(), seed=0, lr=.05, dropout=.2, more=(), opt_func=Adam):
    "A small network on a line with noise; dropout, so that random numbers matter"
    x = torch.linspace(-1, 1, 64)[:, None]
    y = 2*x + 1 + .3*torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    seed_everything(seed)
    loaders = [TfmdDL(list(zip(x[i::2], y[i::2])), bs=8, shuffle=i == 0, num_workers=0) for i in (0, 1)]
    net = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1), *more)
    cbs = [cb if isinstance(cb, Callback) else cb() for cb in cbs]  # those that draw random numbers are made here
    return Learner(DataLoaders(*loaders, device='cpu'), net, nn.functional.mse_loss, lr=lr, metrics=mse, cbs=cbs, opt_func=opt_func)

def fit(learn, epochs=6, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, **kwargs)
    return learn

def weights(learn):
    "All weights of the model, and of the critic if there is one"
    modules = [learn.model] + ([learn.critic.critic] if hasattr(learn, 'critic') else [])
    return torch.cat([value.detach().flatten() for module in modules for value in module.state_dict().values()])

class HalveAfterFirstEpoch(Callback):
    "What a plateau does, and a look at the validation set"
    order = 60
    def after_epoch(self):
        if not is_fitting(self.learn) or self.epoch: return
        for group in self.opt.hypers: group['lr'] /= 2
        with self.learn.no_bar(), self.learn.no_logging(): self.learn.validate()

def everything(critic='torch'):
    "All callbacks with a state"
    plateau = ReduceOnPlateau('mse', comp=np.less, patience=1, factor=2)
    early = EarlyStopping('mse', comp=np.less, patience=5)
    best = KeepBest('mse', comp=np.less)
    return [HalveAfterFirstEpoch(), best, plateau, early, WarmUp(20), WeightAverage(.9), lambda: Critic(critic)]

class KillAfter(TrackerCallback):
    "Interrupt after the checkpoint of an epoch was written"
    order = ResumeTraining.order+1
    def __init__(self, epoch):
        super().__init__()
        self.last = epoch
    def after_epoch(self):
        if is_fitting(self.learn) and self.learn.epoch == self.last: raise KeyboardInterrupt

def interrupted(learn, epochs=6):
    with pytest.raises(KeyboardInterrupt): fit(learn, epochs)

# killed and started again

class Slow(Callback):
    "Tell when an epoch has ended; wait after each batch, so that there is time to kill"
    order = 300
    def __init__(self, tell, wait): self.tell, self.wait = tell, wait
    def after_batch(self): time.sleep(self.wait)
    def after_epoch(self):
        if is_fitting(self.learn): self.tell(self.learn.resume_training.position)

def train_line(tell, folder, critic, wait=0., seed=0):
    "Train with all callbacks, and keep the weights"
    resume = ResumeTraining(folder, dict(system='line', seed=0))
    learn = fit(line_learner([*everything(critic), GradientAccumulation(20), resume, Slow(tell, wait)], seed=seed), 5)
    torch.save(weights(learn), folder.with_suffix('.pt'))

@pytest.mark.parametrize('critic', ('torch', 'fastai'))
def test_a_killed_training_ends_with_the_same_weights(tmp_path, critic):
    "SIGKILL in the middle of the third epoch; the restart has another seed, so all must come from the checkpoint"
    process = Elsewhere(train_line, tmp_path/'killed', critic, .1)
    for epoch in process.told():
        if epoch == 1: break
    time.sleep(.25)
    assert process.kill() == -signal.SIGKILL
    assert (tmp_path/'killed'/'checkpoint.pt').is_file() and not (tmp_path/'killed.pt').exists()
    for name, first in (('killed', 2), ('whole', 0)):
        process = Elsewhere(train_line, tmp_path/name, critic, 0., 99 if first else 0)
        assert process.finish() == list(range(first, 5))
    killed, whole = (torch.load(tmp_path/f'{name}.pt', weights_only=True) for name in ('killed', 'whole'))
    assert torch.equal(killed, whole)
    a, b = (read_checkpoint(tmp_path/name/'checkpoint.pt') for name in ('killed', 'whole'))
    assert a['recorder'] == b['recorder'] and a['train_iter'] == b['train_iter']
    assert torch.equal(a['generators']['torch'], b['generators']['torch'])
    averages = [saved['callbacks']['weight_average']['other'] for saved in (a, b)]
    assert all(torch.equal(averages[0][k], averages[1][k]) for k in averages[1])

@pytest.mark.parametrize('epoch', range(6))
def test_interrupted_after_each_epoch(tmp_path, epoch):
    whole = fit(line_learner(everything()))
    interrupted(line_learner([*everything(), ResumeTraining(tmp_path), KillAfter(epoch)]))
    again = fit(line_learner([*everything(), ResumeTraining(tmp_path)], seed=99))
    assert torch.equal(weights(whole), weights(again))
    assert whole.recorder.values == again.recorder.values

def test_resuming_itself_changes_nothing(tmp_path):
    plain = fit(line_learner(everything()))
    watched = fit(line_learner([*everything(), ResumeTraining(tmp_path)]))
    assert torch.equal(weights(plain), weights(watched))

def test_gradients_that_wait_for_the_next_epoch(tmp_path):
    "With 32 samples an epoch and a step every 24, a third of an epoch's gradients belong to the next"
    make = lambda *cbs: line_learner([Critic, GradientAccumulation(24), ResumeTraining(tmp_path), *cbs], seed=0)
    whole = fit(line_learner([Critic, GradientAccumulation(24)]), 4)
    interrupted(make(KillAfter(1)), 4)
    saved = read_checkpoint(tmp_path/'checkpoint.pt')
    assert saved['callbacks']['gradient_accumulation']['count'] > 0
    assert any(gradient.ndim for gradient in saved['gradients'].values())
    assert torch.equal(weights(whole), weights(fit(make(), 4)))

class TwoHeads(nn.Module):
    "The second head is used in the first epoch only"
    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(1, 1), nn.Linear(1, 1), 0
    def forward(self, x):
        self.calls += self.training
        return self.a(x) + self.b(x) if self.calls <= 4 else self.a(x)

def test_a_parameter_that_is_no_longer_used_still_decays(tmp_path):
    "fastai steps a parameter with a gradient of zeros, by momentum and weight decay; a restart must do so too"
    def make(*cbs):
        learn = line_learner(cbs)
        torch.manual_seed(0)
        learn.model = TwoHeads()
        return learn
    whole = fit(make(), 3)
    interrupted(make(ResumeTraining(tmp_path), KillAfter(0)), 3)
    again = make(ResumeTraining(tmp_path))
    again.model.calls = 4
    assert torch.equal(weights(whole), weights(fit(again, 3)))

def test_a_pytorch_optimizer_is_resumed(tmp_path):
    def opt_func(params, **kwargs): return OptimWrapper(params, torch.optim.AdamW, **kwargs)
    whole = fit(line_learner(opt_func=opt_func))
    interrupted(line_learner([ResumeTraining(tmp_path), KillAfter(2)], opt_func=opt_func))
    again = fit(line_learner([ResumeTraining(tmp_path)], seed=9, opt_func=opt_func))
    assert torch.equal(weights(whole), weights(again))

def test_a_schedule_is_resumed_and_compared(tmp_path):
    def cycle(learn, lr=.05):
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, lr)
        return learn
    whole = cycle(line_learner([WarmUp(20)]))
    with pytest.raises(KeyboardInterrupt): cycle(line_learner([WarmUp(20), ResumeTraining(tmp_path), KillAfter(1)]))
    again = line_learner([WarmUp(20), ResumeTraining(tmp_path)], seed=3)
    assert torch.equal(weights(whole), weights(cycle(again)))
    assert torch.equal(weights(whole), weights(cycle(again)))  # the same learner once more
    with pytest.raises(InputError, match='schedule.lr: .*before.*now'): cycle(line_learner([WarmUp(20), ResumeTraining(tmp_path)]), .1)
    with pytest.raises(InputError, match='schedule.lr: .*before, not set now'): fit(line_learner([WarmUp(20), ResumeTraining(tmp_path)]), 4)

def test_stages(tmp_path):
    "Two fits of one learner, each with a folder; interrupted in the second"
    def run(name, *cbs, seed=0):
        learn = line_learner([Critic], seed=seed)
        fit(learn, 2, cbs=[WeightAverage(.9), ResumeTraining(tmp_path/name/'1')])
        return fit(learn, 4, lr=.01, cbs=[KeepBest(), ResumeTraining(tmp_path/name/'2'), *cbs])
    whole = run('whole')
    with pytest.raises(KeyboardInterrupt): run('killed', KillAfter(1))
    assert torch.equal(weights(whole), weights(run('killed', seed=7)))

def test_no_part_of_a_file_is_left_behind(tmp_path):
    fit(line_learner([ResumeTraining(tmp_path)]), 2)
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoint.pt']

# early ends, and looks at the validation set

class StopBefore(Callback):
    "End a training before an epoch"
    def __init__(self, epoch): self.first_missing = epoch
    def before_epoch(self):
        if is_fitting(self.learn) and self.epoch == self.first_missing: raise CancelFitException()

class StopAtOnce(Callback):
    def before_fit(self): raise CancelFitException()

def test_an_early_end_is_an_end(tmp_path):
    early = fit(line_learner([*everything(), ResumeTraining(tmp_path), StopBefore(3)]))
    again = fit(line_learner([*everything(), ResumeTraining(tmp_path)]))
    assert torch.equal(weights(early), weights(again)) and len(again.recorder.values) == 3

def test_early_stopping_is_an_end(tmp_path):
    make = lambda: line_learner([EarlyStopping('mse', comp=np.less, patience=1), KeepBest(), ResumeTraining(tmp_path)], lr=0.)
    first, again = fit(make()), fit(make())
    assert len(first.recorder.values) == len(again.recorder.values) == 2
    assert torch.equal(weights(first), weights(again))

def test_a_fit_that_never_began_leaves_the_file_alone(tmp_path):
    learn = fit(line_learner([ResumeTraining(tmp_path)]), 2)
    before = (tmp_path/'checkpoint.pt').read_bytes()
    learn.add_cb(StopAtOnce())
    fit(learn, 9)
    assert (tmp_path/'checkpoint.pt').read_bytes() == before

def test_validate_takes_up_no_checkpoint(tmp_path):
    learn = line_learner([*everything(), ResumeTraining(tmp_path)])
    with learn.no_bar(): learn.validate()
    assert not list(tmp_path.iterdir())
    fit(learn, 2)
    before = (tmp_path/'checkpoint.pt').read_bytes()
    for parameter in learn.model.parameters(): parameter.data.add_(.01)
    changed = weights(learn)
    with learn.no_bar():
        learn.validate()
        learn.get_preds()
    assert torch.equal(weights(learn), changed)
    assert (tmp_path/'checkpoint.pt').read_bytes() == before

class Ask(Callback):
    "Evaluate in the middle of a training"
    order = 100
    def before_fit(self):
        if is_fitting(self.learn): self.errors = []
    def after_epoch(self):
        if not is_fitting(self.learn): return
        self.errors.append(self.recorder.values[-1][-1])
        if len(self.errors) == 5:
            with self.learn.no_bar(), self.learn.no_logging(): self.learn.validate()

def test_a_look_in_between_disturbs_nothing(tmp_path):
    learn = fit(line_learner([*everything(), ResumeTraining(tmp_path), Ask()]))
    assert read_checkpoint(tmp_path/'checkpoint.pt')['done'] == len(learn.ask.errors) == 6
    with learn.no_bar(): assert learn.validate()[1] == pytest.approx(min(learn.ask.errors), abs=1e-6)

def test_skipped_and_short_epochs_are_not_tracked(tmp_path):
    late = fit(line_learner([KeepBest('mse', comp=np.less), ResumeTraining(tmp_path)]), 4, start_epoch=2)
    assert [len(values) for values in late.recorder.values] == [0, 0, 3, 3]
    assert late.keep_best.epoch_of_best >= 2
    short = fit(line_learner([KeepBest('mse', comp=np.less), ShortEpochCallback()]), 2)
    assert short.keep_best.weights is None

def test_the_learning_rate_finder_is_no_training(tmp_path):
    learn = line_learner([*everything(), ResumeTraining(tmp_path/'run')])
    learn.path = tmp_path
    before = weights(learn)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=8, show_plot=False)
    assert torch.equal(weights(learn)[:-13], before[:-13]) and not (tmp_path/'run').exists()  # all but the critic's

# other runs and other files

def test_every_difference_is_listed(tmp_path):
    fit(line_learner([*everything(), ResumeTraining(tmp_path, dict(seed=0, model=dict(dropout=.2)))]), 2)
    other = line_learner([*everything()[:-3], WarmUp(15), WeightAverage(.5), Critic, GradientClip(.1), ResumeTraining(tmp_path, dict(seed=1, model=dict(dropout=.3)))], lr=7.)
    with pytest.raises(InputError) as error: fit(other, 3)
    for text in ('epochs: 2 before, 3 now', 'seed: 0 before, 1 now', 'model.dropout: 0.2 before, 0.3 now', 'optimizer.lr: [0.05] before, [7.0] now',
                 'callbacks.warm_up.steps: 20 before, 15 now', 'callbacks.weight_average.decay: 0.9 before, 0.5 now',
                 'callbacks.gradient_clip: not set before, GradientClip now', 'expected the same run, or another folder'):
        assert text in str(error.value)
    assert 'batch_size' not in str(error.value)

def test_a_measured_value_has_a_tolerance(tmp_path):
    make = lambda mean: line_learner([ResumeTraining(tmp_path, dict(flows=[mean, -2.]), tolerances=dict(flows=.01))])
    fit(make(2.), 1)
    fit(make(2.001), 1)
    for mean in (3., -2.):
        with pytest.raises(InputError, match='flows: .*before'): fit(make(mean), 1)

def test_another_model_is_refused(tmp_path):
    fit(line_learner([ResumeTraining(tmp_path)]), 1)
    other = line_learner([ResumeTraining(tmp_path)], more=[nn.BatchNorm1d(1, affine=False)])
    with pytest.raises(InputError, match=r'(?s)checkpoint.pt: weights: found .*running_mean'): fit(other, 1)

class Evil:
    "Code that runs where a pickle is loaded without care"
    def __reduce__(self): return (os.mkdir, ('executed',))

def test_hostile_and_foreign_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path/'checkpoint.pt'
    def write_evil(): torch.save(dict(format=4, run=Evil()), file)
    contents = (lambda: file.write_bytes(b''), lambda: file.write_bytes(b'no checkpoint'), lambda: file.write_bytes(pickle.dumps(Evil())),
                write_evil, lambda: torch.save([1, 2], file), lambda: torch.save(dict(format=4, done=1), file))
    for write in contents:
        write()
        learn = line_learner([ResumeTraining(tmp_path)])
        before = weights(learn)
        with pytest.raises(InputError, match='checkpoint.pt'): fit(learn, 1)
        assert torch.equal(weights(learn), before)
    assert not (tmp_path/'executed').exists()

def test_older_formats_are_refused(tmp_path):
    fit(line_learner([ResumeTraining(tmp_path)]), 1)
    saved = read_checkpoint(tmp_path/'checkpoint.pt')
    for version in (None, 1, 2, 3, 4, 5):
        torch.save(saved | dict(format=version), tmp_path/'checkpoint.pt')
        with pytest.raises(InputError, match=f'format: found {version}, expected 6; delete the file'): fit(line_learner([ResumeTraining(tmp_path)]), 1)

# the run configuration

def test_configurations_of_callbacks():
    config = callback_config([MixUp(.4), GradientAccumulation(8), EarlyStoppingCallback(patience=3), Callback()])
    assert config['mix_up.alpha'] == '0.4' and config['gradient_accumulation.n_acc'] == '8' and config['early_stopping.patience'] == '3'
    assert set(callback_config([MixUp(.9)]).values()) != set(callback_config([MixUp(.4)]).values())
    assert list(named_callbacks([KeepBest('a'), KeepBest('b'), WarmUp(1)])) == ['warm_up', 'keep_best', 'keep_best_2']

def test_frozen_weights_are_described_and_others_are_not():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(.2))
    assert frozen_weights(net) == {}
    before = frozen_weights(freeze_module(net))
    assert list(before) == ['0', '1'] and before == frozen_weights(net.eval())
    net[1].running_mean.add_(1)
    after = frozen_weights(net)
    assert before['0'] == after['0'] and before['1'] != after['1']
    net[0].weight.requires_grad_(True)
    assert frozen_weights(net)['0'] not in (before['0'], None)

def test_only_plain_values():
    for value in (torch.ones(1), {1, 2}, object(), np.ones(2), WarmUp(3)):
        with pytest.raises(InputError, match='run configuration: model.x: found'): flatten_config(dict(model=dict(x=value)))
    flat = flatten_config(dict(a=np.float32(.5), b=(1, None), c=dict(d=True), e={}))
    assert flat == {'a': .5, 'b': [1, None], 'c.d': True}

def test_comparisons():
    assert compare_runs(dict(a=[1., -2.]), dict(a=[1.001, -2.]), dict(a=.01)) == []
    for other in ([1.1, -2.], [1.], 'text', None, [1., 2.]): assert len(compare_runs(dict(a=[1., -2.]), dict(a=other), dict(a=.01))) == 1
    assert compare_runs(dict(a=1), dict(a='1')) == ['a: 1 before, 1 now']

def test_optimizers_are_told_apart():
    parameters = lambda: nn.Linear(2, 1).parameters()
    configs = [flatten_config(optimizer_config(opt)) for opt in (
        Adam(parameters(), lr=.1), Adam(parameters(), lr=.1, decouple_wd=False), Adam(parameters(), lr=.1, sqr_mom=.9),
        torch.optim.Adam(parameters(), lr=.1), OptimWrapper(parameters(), torch.optim.SGD, lr=.1))]
    assert all(compare_runs(a, b) for i, a in enumerate(configs) for b in configs[:i])
    assert compare_runs(configs[0], flatten_config(optimizer_config(Adam(parameters(), lr=.1)))) == []

def test_the_state_of_an_optimizer_goes_to_its_parameters():
    class Meta:
        "An optimizer whose parameter is on another device"
        def all_params(self): return [(torch.empty(2, device='meta'),)]
        def load_state_dict(self, state): self.loaded = state
    opt = Meta()
    load_optimizer_state(opt, dict(state=[dict(grad_avg=torch.ones(2), step=3)], hypers=[]))
    assert opt.loaded['state'][0]['grad_avg'].device.type == 'meta' and opt.loaded['state'][0]['step'] == 3

# the best epoch, averages, warm-up

def test_early_stopping_and_plateau_ignore_validate():
    learn = fit(line_learner([EarlyStopping('mse'), ReduceOnPlateau('mse')], lr=0.), 4)
    assert len(learn.recorder.values) == 2
    with learn.no_bar(): assert len(learn.validate()) == 2

def test_an_unknown_metric_is_named():
    with pytest.raises(InputError, match='one of train_loss, valid_loss, mse'): fit(line_learner([KeepBest('auc')]), 1)

def test_an_average_is_that_of_numpy():
    "With BatchNorm, so that buffers are averaged and counters copied"
    class Record(Callback):
        order = WeightAverage.order+1
        def before_fit(self): self.steps = [self.copy()]
        def copy(self): return {k: v.double().numpy().copy() for k, v in self.learn.model.state_dict().items()}
        def after_step(self): self.steps.append(self.copy())
    learn = fit(line_learner([WeightAverage(.8), Record()], more=[nn.BatchNorm1d(1)]), 3)
    average = learn.record.steps[0]
    for step in learn.record.steps[1:]: average = {k: .8*average[k]+.2*v if v.dtype != int and 'num_batches' not in k else v for k, v in step.items()}
    for name, value in learn.model.state_dict().items(): assert np.allclose(value.numpy(), average[name], atol=1e-6), name

def test_an_average_of_one_part():
    learn = fit(line_learner([WeightAverage(.9, part='3')]), 2)
    assert list(learn.weight_average.other) == ['weight', 'bias']
    plain = fit(line_learner(), 2)
    assert torch.equal(learn.model[0].weight, plain.model[0].weight) and not torch.equal(learn.model[3].weight, plain.model[3].weight)

def test_an_average_does_not_change_the_training():
    class Trained(Callback):
        order = WeightAverage.order-1
        def before_validate(self): self.last = self.learn.model[0].weight.clone()
    averaged, plain = fit(line_learner([WeightAverage(.9), Trained()])), fit(line_learner([Trained()]))
    assert torch.equal(averaged.trained.last, plain.trained.last)

def test_an_interrupted_training_ends_with_the_average():
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.epoch == 1 and self.iter == 2: raise CancelFitException()
    learn = fit(line_learner([WeightAverage(.9), Stop()]), 3)
    assert learn.weight_average.averaged
    assert not torch.equal(learn.model[0].weight, learn.weight_average.other['0.weight'])

@pytest.mark.parametrize('decay', (-.1, 1.5, float('nan')))
def test_decays_out_of_range(decay):
    with pytest.raises(InputError, match='decay'): WeightAverage(decay)

class Rates(Callback):
    "The learning rate of each training batch"
    order = 90
    def before_fit(self):
        if is_fitting(self.learn): self.seen = []
    def before_batch(self):
        if self.training and is_fitting(self.learn): self.seen.append(self.opt.hypers[0]['lr'])

def rates(*cbs, epochs=3, lr=.3): return fit(line_learner([*cbs, Rates()], lr=lr), epochs).rates.seen

@pytest.mark.parametrize('steps', (-1, 2.5))
def test_steps_of_a_warm_up_are_checked(steps):
    with pytest.raises(InputError, match=f'steps: found {steps}'): WarmUp(steps)

def test_a_warm_up_follows_a_rate_that_is_cut():
    first, rest = [.03*k for k in (1, 2, 3, 4)], [.015*k for k in (5, 6, 7, 8, 9, 10, 10, 10)]
    assert rates(WarmUp(10), HalveAfterFirstEpoch()) == pytest.approx(first+rest, abs=1e-12)

def test_an_epoch_that_is_cut_short_leaves_the_full_rate():
    class Cut(TrackerCallback):
        def __init__(self): super().__init__()
        def after_batch(self):
            if self.training and self.epoch == 1 and self.iter == 2: raise CancelEpochException()
        def after_epoch(self):
            if self.epoch == 0: self.opt.set_hyper('lr', .6)
    seen = rates(WarmUp(10), Cut())
    assert seen[:7] == pytest.approx([.03*k for k in (1, 2, 3, 4)]+[.06*k for k in (5, 6, 7)], abs=1e-12)

def test_a_fit_that_broke_leaves_no_rate_behind():
    class Break(Callback):
        def after_batch(self):
            if self.training and self.iter == 1: raise RuntimeError('full')
    learn = line_learner([WarmUp(10), Break()], lr=.3)
    with pytest.raises(RuntimeError, match='full'): fit(learn, 2)
    learn.remove_cb(Break)
    learn.add_cb(Rates())
    learn.lr = .01
    fit(learn, 2)
    assert learn.rates.seen == pytest.approx([.001*k for k in range(1, 9)], abs=1e-12)
    assert learn.opt.hypers[0]['lr'] == .01

def test_the_full_rate_is_there_between_epochs():
    learn = fit(line_learner([WarmUp(10)], lr=.3), 2)
    assert learn.opt.hypers[0]['lr'] == .3
    assert learn.recorder.lrs == pytest.approx([.03*k for k in range(1, 9)])
    plateau = ReduceLROnPlateau('valid_loss', patience=0, min_delta=1e9, min_lr=.1)
    assert fit(line_learner([WarmUp(100), plateau], lr=.3), 2).opt.hypers[0]['lr'] == pytest.approx(.1)

def test_a_rate_of_zero_stays_zero(): assert set(rates(WarmUp(10), lr=0.)) == {0.}

# other data in the same folder

def insilico_files(folder):
    cohort = insilico_cohort(24, seed=3, exams=2, rows=96, cols=72, pixel_spacing_mm=2.5)
    return cohort.write(folder, workers=1, progress=False)

def prepare(root, cache, size=(64, 48)):
    return prepare_cohort(Cohort.read(root), cache, size=size, workers=1, progress=False)

@pytest.fixture(scope='module')
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    insilico_files(folder/'files')
    return folder

@pytest.fixture(scope='module')
def images(places): return prepare(places/'files', places/'cache')

def exchange(places):
    "The same cohort, in which the files of the CC images changed places"
    root = places/'exchanged'
    if not root.exists():
        shutil.copytree(places/'files', root)
        paths = sorted(root.glob('**/*-CC.dcm'))
        contents = [path.read_bytes() for path in paths]
        for path, content in zip(paths, contents[7:]+contents[:7]): path.write_bytes(content)
    return prepare(root, places/'cache')

LOADERS = dict(bs=4, seed=0, device='cpu')
TINY = dict(encoder='small', stride=8, model_args=dict(width=4), seed=0)
MAMMONET = dict(width=4, heads=2, head_dim=8, embed=16, hidden=8)

def two_view(images, folder, **kwargs): return two_view_learner(two_view_dls(images, **LOADERS | kwargs), folder=folder, **TINY)

def gazed(images, folder, gaze=True, **kwargs):
    dls = two_view_dls(images, gaze=gaze, **LOADERS | kwargs)
    return mammonet_learner(dls, 'cross_view_gaze', folder=folder, **TINY | dict(model_args=MAMMONET))

def density(images, folder, **kwargs): return density_learner(risk_dls(images, **LOADERS | kwargs), recipe=None, seed=0, folder=folder)

def moved(images, folder, by=0., shape='constant'):
    "LMV-Net with flows that are the same everywhere, or opposite in both halves"
    flow = torch.full((2, 16, 12), by)
    if shape == 'opposite': flow[:, 8:] *= -1
    flows = dict.fromkeys(prior_pairs(images, breast_history(images.cohort)), flow.half())
    return lmvnet_learner(risk_dls(images, flows=flows, **LOADERS), recipe=None, folder=folder, **TINY)

def grey(images, folder): return grey_learner(grey_dls(images, seed=0, device='cpu'), seed=0, folder=folder)

class Noise(ItemTransform):
    "An augmentation with the repr of every other one"
    split_idx = 0
    def __init__(self, strength):
        super().__init__()
        self.strength = strength
    def encodes(self, b):
        b[0]['image_cc'] = b[0]['image_cc'] + self.strength*torch.randn_like(b[0]['image_cc'])
        return b

class NoisyAugment(Augment):
    "An augmentation with the repr of its base"
    def __init__(self, noise):
        super().__init__()
        self.noise = noise

def backwards(image_id, gaze): return gaze.iloc[::-1]

OTHER_DATA = dict( # name: learner, its loaders, those of another run, what differs
    censoring=(density, {}, dict(censoring='cumulative'), 'settings.censoring: known before, cumulative now'),
    targets=(density, {}, dict(censoring='cumulative'), 'train.settings.targets'),
    gaze_sigma=(gazed, {}, dict(gaze_sigma=30.), 'settings.gaze_sigma: 6.0 before, 30.0 now'),
    gaze_function=(gazed, {}, dict(gaze=backwards), 'settings.gaze: True before, backwards'),
    gaze_lambda=(gazed, dict(gaze=lambda i, gaze: gaze[:9]), dict(gaze=lambda i, gaze: gaze[:8]), 'settings.gaze: <lambda>'),
    transform=(two_view, dict(augment=Noise(.1)), dict(augment=Noise(.5)), 'strength=0.5'),
    subclass=(two_view, dict(augment=NoisyAugment(.1)), dict(augment=NoisyAugment(.5)), 'noise=0.5'),
    opposite_flows=(moved, {}, dict(by=3., shape='opposite'), 'train.flows'),
    other_flows=(moved, dict(by=2.), dict(by=2.1), 'train.flows'))

def begin(learn):
    "Train the first of two epochs"
    learn.add_cb(KillAfter(0))
    interrupted(learn, 2)

@pytest.mark.parametrize('name', OTHER_DATA)
def test_other_data_are_refused(name, images, tmp_path):
    make, before, now, part = OTHER_DATA[name]
    begin(make(images, tmp_path, **before))
    with pytest.raises(InputError, match='another run') as error: fit(make(images, tmp_path, **now), 2)
    assert part in str(error.value)
    assert len(fit(make(images, tmp_path, **before), 2).recorder.values) == 2

@pytest.mark.parametrize('make', (two_view, density, grey))
def test_other_pixels_under_the_same_ids_are_refused(make, images, places, tmp_path):
    begin(make(images, tmp_path))
    with pytest.raises(InputError, match='data.train.images: .* before'): fit(make(exchange(places), tmp_path), 2)

def test_other_pixels_of_a_system_that_says_nothing(images, places, tmp_path):
    "The toy system gives only its name and seed to `ResumeTraining`"
    begin(grey(images, tmp_path))
    with pytest.raises(InputError, match='data.description.prepare.size'): fit(grey(prepare(places/'files', places/'cache', (32, 24)), tmp_path), 2)

@pytest.mark.parametrize('change', ['reversed', 'exchanged', 'one more'])
def test_changes_of_few_flows_are_seen(change):
    "Only every twelfth of 96 flows was looked at, and nobody counted them"
    g = torch.Generator().manual_seed(0)
    flows = {(f'{k:02}', 'prior'): torch.randn(2, 1, 1, generator=g).expand(2, 8, 6) for k in range(96)}
    first, second = ('01', 'prior'), ('02', 'prior')
    other = dict(flows)
    if change == 'reversed': other[first] = -flows[first]
    if change == 'exchanged': other |= {first: flows[second], second: flows[first]}
    if change == 'one more': other['96', 'prior'] = torch.zeros(2, 8, 6)
    named = [{'data.train.flows': flow_summary(o), 'pairs': flow_pairs(o)} for o in (flows, other)]
    assert compare_runs(*named)
    assert not compare_runs(named[0], {'data.train.flows': flow_summary({k: 1.001*v for k, v in flows.items()}), 'pairs': flow_pairs(flows)})

def test_flows_may_move_in_their_last_digits(images, tmp_path):
    begin(moved(images, tmp_path, by=2.))
    fit(moved(images, tmp_path, by=2.005), 2)

def test_other_gaze_files_are_refused(images, places, tmp_path):
    "The first point of each reading is gone"
    begin(gazed(images, tmp_path/'run'))
    shutil.copytree(places/'files', tmp_path/'files')
    for name in set(images.cohort.images.gaze_path.dropna()):
        path = tmp_path/'files'/name
        path.write_text(re.sub(r'\[\[\d+, \d+\], ', '[', path.read_text(), count=1))
    changed = prepare(tmp_path/'files', places/'cache')
    with pytest.raises(InputError, match='data.train.gaze_files: .* before'): fit(gazed(changed, tmp_path/'run'), 2)

def cut(image_id, gaze): return gaze[:9]

def train_gazed(images, folder, *cbs):
    learn = gazed(images, folder, gaze=lambda i, gaze: cut(i, gaze), augment=Noise(.1))
    for cb in cbs: learn.add_cb(cb)
    return learn

CONTINUE = '''
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    from test_resume import fit, prepare, train_gazed, weights
    learn = train_gazed(prepare({files!r}, {cache!r}), {folder!r})
    torch.save(weights(fit(learn, 3)), {out!r})
'''

def test_the_same_call_in_another_process_with_moved_files_continues(places, images, tmp_path):
    "Another process has other addresses and another order of sets"
    interrupted(train_gazed(images, tmp_path/'run', KillAfter(0)), 3)
    for name in ('files', 'cache'): shutil.copytree(places/name, tmp_path/'moved'/name)
    here = dict(tests=os.path.dirname(__file__), files=str(tmp_path/'moved/files'), cache=str(tmp_path/'moved/cache'))
    text = textwrap.dedent(CONTINUE.format(**here, folder=str(tmp_path/'run'), out=str(tmp_path/'continued.pt')))
    hash_seed = str(int(os.environ.get('PYTHONHASHSEED', 0))+1)
    done = subprocess.run([sys.executable, '-c', text], capture_output=True, text=True, env=os.environ | dict(PYTHONHASHSEED=hash_seed))
    assert done.returncode == 0, done.stderr[-2000:]
    whole = fit(train_gazed(images, tmp_path/'whole'), 3)
    assert torch.equal(torch.load(tmp_path/'continued.pt', weights_only=True), weights(whole))
    assert read_checkpoint(tmp_path/'run'/'checkpoint.pt')['done'] == 3

# descriptions of values

def test_values_that_differ_have_other_descriptions():
    class Slow(Noise): rate = 2
    class Slower(Noise): rate = 3
    def cut(n): return lambda gaze: gaze[:n]
    values = [1, '1', [1], ['1'], {1}, {1: 2}, None, 'nan', b'1', np.zeros(2), np.zeros(3), np.zeros(2, int), torch.zeros(2), Noise, Noise(.1), Noise(.2),
              Slow(.1), Slower(.1), cut(1), cut(2), partial(cut, 1), partial(cut, 2), Noise(.1).encodes, nn.Linear(1, 1), nn.Linear(1, 1), len, max]
    descriptions = [describe_value(value) for value in values]
    assert len({repr(text) for text in descriptions}) == len(values)
    assert all(isinstance(text, (str, int)) or text is None for text in descriptions)

class Slots:
    __slots__ = 'share', 'more'
    def __init__(self, share): self.share = share

def with_member(**members): return type('Strengths', (Noise,), dict(members, __module__=__name__, __qualname__='Strengths'))(.1)

@pytest.mark.parametrize('a, b', [
    (nn.Dropout(.1), nn.Dropout(.5)), (RandomRotation(5), RandomRotation(45)), (nn.Sequential(nn.Dropout(.1)), nn.Sequential(nn.Dropout(.2))),
    (with_member(strengths=[.1, .2]), with_member(strengths=[.5, .9])), (with_member(kernel=np.zeros(2)), with_member(kernel=np.ones(2))),
    (pd.Timestamp('2020-01-01'), pd.Timestamp('2021-01-01')), (pd.Timedelta(1), pd.Timedelta(2)), (Slots(1), Slots(2))])
def test_settings_of_every_kind_are_seen(a, b):
    "Modules without weights, lists of a class, dates and slots were all equal"
    assert describe_value(a) != describe_value(b)
    assert describe_value(a) == describe_value(copy.deepcopy(a))

def test_the_state_of_a_transform_is_no_setting():
    "fastai's transforms keep what they drew last, and generators show their address"
    class Shift(RandTransform):
        def __init__(self):
            super().__init__(p=.5)
            self.rng = np.random.default_rng(0)
    shift = Shift()
    before = describe_value(shift)
    shift.do = not shift.do
    assert describe_value(shift) == before == describe_value(Shift()) and ' at 0x' not in before

def test_a_function_is_what_it_does():
    "Its docstring, and globals that share a name with an attribute, changed it"
    def make(text, **more):
        names = dict(more)
        exec(text, names)
        return describe_value(names['cut'])
    plain = make("def cut(gaze):\n    'one'\n    return gaze.head(9)")
    assert make("def cut(gaze):\n    'another'\n    return gaze.head(9)") == plain
    assert make("def cut(gaze):\n    'one'\n    return gaze.head(9)", head=5) == plain
    assert make("def cut(gaze):\n    'one'\n    return gaze.head(8)") != plain
    assert make('def cut(gaze): return gaze[:n[0]]', n=(1,)) != make('def cut(gaze): return gaze[:n[0]]', n=(2,))

def test_images_in_memory_or_not_are_the_same(images):
    "A dataset inside another one was described by its tensors"
    class Wrapped(list):
        def __init__(self, base): self.base, self.rows = base, base.rows
    one, other = (Wrapped(two_view_dls(images, in_memory=m, **LOADERS).train_ds) for m in (True, False))
    assert dataset_config(one) == dataset_config(other)

def test_a_class_of_the_same_name_with_other_code_is_another_one():
    def make(factor):
        class Scale(ItemTransform): pass
        exec(f'def encodes(self, b): return {factor}*b', names := {})
        Scale.encodes = names['encodes']
        return describe_value(Scale())
    assert make(2) == make(2) and make(2) != make(3)

def test_a_dataset_may_describe_itself():
    class Own(list):
        rows = pd.DataFrame(dict(patient_id=['a']))
        def __init__(self): self.cache = object()
        def run_config(self): return dict(years=5)
    assert dataset_config(Own())['settings'] == dict(years=5)
