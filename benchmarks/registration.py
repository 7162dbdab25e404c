"""Aligning a prior: network against SimpleITK, on in-silico pairs with known flows: `make bench NAME=registration SEED=0`.

Draws `insilico-v1` with two exams for the data seed (any), trains `MammoRegNet` on the training patients without any label,
and asks each registration for the flow of 100 pairs of test patients (a patient each, sides and views in turn). `tre_mm` is the
mean target registration error with every pixel of the breast as a landmark; seconds are of a whole call for one pair, both
with all cores. SimpleITK is its affine map (three scales) and then Thirion's demons at one scale, with the smoothing that served it best; its B-spline was three times
slower and twice as far off on the patients of data seed 1000. `simpleitk_half` is the same on pictures of half the size, which is
what the network and its refinement work on: the fairer rival in speed. `simpleitk_long` is that with 240 iterations instead of 60 (three
times as many of the demons), in about the time of `simpleitk`: the fairer rival in error (on data seed 1000: 60 iterations 1.16 mm whole and 1.20 half, 120 half
1.13, 240 half 1.08; 30 whole 1.28, so fewer would not do). The recipe was chosen on the same data seed, which no row of the results
is measured on (so the figures of that seed above are notes of the choice, not results); but that another refinement was sought is because the one before had been measured on seed 0, where it lost to SimpleITK.
The optimiser is fastai's Adam with fastai's constants (`ADAM`), not those of the source, which are the default of `registration_learner`.

`mammoregnet` is one forward pass; `mammoregnet_refined` is that, averaged over a neighbourhood, and then ten steps of descent on
each pair, on a coarse grid and pictures of half the size (`Refined`).
The trained network is kept below `.cache/`, so a stopped run goes on where it was.
"""
import inspect, sys
from functools import partial
from pathlib import Path
import numpy as np
import torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks._common import Bench, ROOT, cores, options, tag
from mammo_nb.core.seeding import seed_everything
from mammo_nb.data.cache import prepare_cohort
from mammo_nb.data.insilico import Settings, insilico_cohort, settings_name, write_insilico
from mammo_nb.data.pairs import PairDataset, exam_pairs, pair_dls
from mammo_nb.data.prepare import PrepareConfig
from mammo_nb.learners.registration import Adam, evaluate_registration, registration_learner
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.registration.mammoregnet import MammoRegNet, Refined, SitkRegistration
from mammo_nb.report.stages import code_hash

SIZE = (192, 144)
NET = dict(depth=2, shrink=2, finest=1)
LOSS = dict(window=15, smooth=.1)
ADAM = dict(decouple_wd=False, sqr_mom=.99, eps=1e-5)
REFINE = dict(steps=10, lr=.6, stride=32, average=33, shrink=2, window=5)

def in_silico(patients, seed):
    "Prepared patients with two exams, and the folder that they are in; made once"
    name = settings_name(Settings(seed=seed))
    base = ROOT/'.cache'/'insilico'/f'{name.replace(" ", "_")}_{patients}_{code_hash("mammo_nb.data.insilico")[:12]}'
    cohort = write_insilico(insilico_cohort(patients, seed), base/'files')
    return prepare_cohort(cohort, base/'prepared', PrepareConfig(size=SIZE)), base

def trained(prepared, base, epochs, seed=0):
    "The registration network of a cohort; trained once, for this benchmark and that of LMV-Net"
    folder = base/f'registration_{tag(SIZE, NET, LOSS, ADAM, epochs, seed, inspect.getsource(trained))}_{code_hash("mammo_nb.learners.registration", "mammo_nb.registration.mammoregnet")[:12]}'
    path = folder/'mammoregnet.pt'
    seed_everything(seed); net = MammoRegNet(**NET)
    if path.exists(): net.load_state_dict(torch.load(path, map_location='cpu', weights_only=True)); return net.eval()
    dls = pair_dls(prepared, bs=8, seed=seed, known=False)
    learn = registration_learner(dls, net, **LOSS, opt_func=partial(Adam, **ADAM), seed=seed, folder=folder)
    with learn.no_bar(): learn.fit_one_cycle(epochs, 1e-3)
    torch.save(learn.model.state_dict(), path.with_suffix('.part')); path.with_suffix('.part').replace(path)
    return learn.model.eval()

def unseen(prepared, n):
    "One pair of each of `n` test patients, the four pictures of an exam in turn"
    rows = exam_pairs(prepared.cohort, 'last').query('split == "test"')
    each = [g.iloc[i % len(g)] for i, (_, g) in enumerate(rows.groupby('patient_id'))][:n]
    if len(each) < n: raise SystemExit(f'registration: {len(each)} test patients, {n} wanted: more --patients')
    return PairDataset(prepared, rows.loc[[r.name for r in each]], known=True)

def main():
    a = options(__doc__, patients=1200, epochs=2, pairs=100)
    config = dict(cohort=settings_name(Settings(seed=a.seed)), patients=a.patients, size=SIZE, epochs=a.epochs, pairs=a.pairs, net=NET, loss=LOSS, adam=ADAM, refine=REFINE)
    bench = Bench('registration', a.seed, config, f'about {round(3+a.patients/1200*(9+3*a.epochs))} minutes on 2 cores, most of it to draw the patients and to train', train_seeds=(0,))
    if bench.done('mammoregnet_refined - simpleitk_long', 'tre_mm'): return print('  all rows are there already, for this commit and these settings')
    prepared, base = in_silico(a.patients, a.seed)
    net = trained(prepared, base, a.epochs)
    ds = unseen(prepared, a.pairs)
    ways = dict(identity=None, simpleitk=SitkRegistration('demons', smooth=4.), simpleitk_half=SitkRegistration('demons', smooth=2., shrink=2), simpleitk_long=SitkRegistration('demons', smooth=2., shrink=2, steps=240), mammoregnet=net, mammoregnet_refined=Refined(net, **REFINE))
    found = {k: evaluate_registration(f, ds, threads=cores()) for k, f in ways.items()}
    value = lambda k, c: found[k].assign(value=found[k][c])
    ci = lambda k, c: bootstrap_ci(value(k, c), mean, columns=('value',))
    for k in ways:
        for c in ('tre_mm', 'folding_percent', 'seconds'): e = ci(k, c); bench.add(k, c, e.value, e.low, e.high, n=e.n)
    for k in ('mammoregnet', 'mammoregnet_refined'):
        e = ratio(found[k], found['identity'], 'tre_mm'); bench.add(f'{k} / identity', 'tre_ratio', e.value, e.low, e.high, n=e.n)
        for rival in ('simpleitk', 'simpleitk_half', 'simpleitk_long'):
            e = ratio(found[rival], found[k], 'seconds'); bench.add(f'{k} / {rival}', 'speed_ratio', e.value, e.low, e.high, n=e.n)
            e = paired_difference(value(k, 'tre_mm'), value(rival, 'tre_mm'), mean, columns=('value',)); bench.add(f'{k} - {rival}', 'tre_mm', e.value, e.low, e.high, n=e.n)

def mean(value, weight=None): return float(np.average(value, weights=weight))
def ratio(ours, theirs, column):
    "Ratio of two means over the same pairs, drawn together"
    def f(a, b, weight=None): return float(np.average(a, weights=weight)/np.average(b, weights=weight))
    return bootstrap_ci(ours.assign(a=ours[column], b=theirs[column]), f, columns=('a', 'b'))

if __name__ == '__main__': main()
