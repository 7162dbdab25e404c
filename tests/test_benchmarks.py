"""Benchmarks: rows are replaced and known again, kept trainings are used again, two benchmarks run small."""
from functools import partial
from importlib import import_module

import pandas as pd
import pytest
import torch

import mammo_nb.core.fastai_import
from benchmarks import _bench, _trainings
from mammo_nb.metrics.bootstrap import Estimate
from repo import ROOT

NAMES = sorted(script.stem for script in (ROOT/'benchmarks').glob('[!_]*.py'))


@pytest.mark.parametrize('name', NAMES)
def test_every_benchmark_is_imported_and_explained(name, capsys):
    module = import_module(f'benchmarks.{name}')
    with pytest.raises(SystemExit) as stop:
        module.main(['--help'])
    assert stop.value.code == 0
    assert f'make bench NAME={name}' in module.__doc__.partition('\n')[0]


# ---- rows

@pytest.fixture
def clean(monkeypatch):
    "A clean commit, whatever the working tree"
    monkeypatch.setattr(_bench, 'commit', lambda: 'abc')


def open_bench(folder, seed=0, epochs=2, train_seeds=(0, 1)):
    return _bench.Bench('toy', seed, dict(epochs=epochs), 'no time', train_seeds, results=folder)


def values(bench):
    return [(r['variant'], r['metric'], r['data_seed'], r['value']) for r in bench.rows()]


def test_a_row_is_done_for_the_same_run_only(clean, tmp_path):
    open_bench(tmp_path).add('a', 'auc', .5)
    assert open_bench(tmp_path).done('a', 'auc')
    assert not open_bench(tmp_path).done('b', 'auc')
    assert not open_bench(tmp_path, seed=1).done('a', 'auc')
    assert not open_bench(tmp_path, epochs=3).done('a', 'auc')
    assert not open_bench(tmp_path, train_seeds=(0,)).done('a', 'auc')


def test_no_row_of_changed_code_is_done(monkeypatch, tmp_path):
    monkeypatch.setattr(_bench, 'commit', lambda: 'abc+')
    bench = open_bench(tmp_path)
    bench.add('a', 'auc', .5)
    assert not bench.done('a', 'auc')


def test_a_done_row_stays_as_it_is(clean, tmp_path):
    open_bench(tmp_path).add('a', 'auc', .5)
    open_bench(tmp_path).add('a', 'auc', .6)
    assert values(open_bench(tmp_path)) == [('a', 'auc', '0', '0.5')]


def test_a_new_row_takes_the_place_of_the_older_one(clean, tmp_path):
    for seed in (0, 1):
        for variant in 'ab':
            open_bench(tmp_path, seed).add(variant, 'auc', .5)
    open_bench(tmp_path, epochs=3).add('a', 'auc', .6)
    assert values(open_bench(tmp_path)) == [
        ('a', 'auc', '0', '0.6'), ('b', 'auc', '0', '0.5'),
        ('a', 'auc', '1', '0.5'), ('b', 'auc', '1', '0.5')]


def test_an_estimate_becomes_a_row(clean, tmp_path):
    bench = open_bench(tmp_path)
    bench.add_estimate('a', 'auc', Estimate(.51234567, .4, .6, n=20, n_groups=10))
    bench.add_estimate('b', 'auc', None)
    row, = bench.rows()
    assert tuple(row) == _bench.COLUMNS
    found = [row[k] for k in ('value', 'ci_low', 'ci_high', 'n')]
    assert found == ['0.512346', '0.4', '0.6', '20']


@pytest.mark.parametrize('name', NAMES)
def test_results_have_one_row_a_variant_metric_and_seed(name):
    rows = pd.read_csv(_bench.RESULTS/f'{name}.csv')
    assert tuple(rows) == _bench.COLUMNS
    assert not rows.duplicated(['variant', 'metric', 'data_seed']).any()


def test_the_tag_tells_recipes_apart():
    assert _bench.tag(dict(lr=1, wd=2)) == _bench.tag(dict(wd=2, lr=1))
    assert _bench.tag(dict(lr=1)) != _bench.tag(dict(lr=2))


def test_options_have_defaults_and_lists():
    a = _bench.options('doc', ['--train-seeds', '3', '4'], epochs=(2, 'help'), train_seeds=[0])
    assert vars(a) == dict(seed=0, epochs=2, train_seeds=[3, 4])


# ---- trainings

def refuse():
    raise AssertionError('trained again')


def test_tables_are_made_once(tmp_path):
    tables = [pd.DataFrame(dict(x=[1, 2])), pd.DataFrame(dict(y=[.5]))]
    made = _trainings.tables_or_train(tmp_path/'new', 'a_0', ('x', 'y'), lambda: tables)
    again = _trainings.tables_or_train(tmp_path/'new', 'a_0', ('x', 'y'), refuse)
    assert all(a.equals(b) for a, b in zip(made, again, strict=True))


def test_weights_are_trained_once(tmp_path):
    path = tmp_path/'net.pt'
    first = _trainings.weights_or_train(path, torch.nn.Linear(2, 1), lambda net: net)
    again = _trainings.weights_or_train(path, torch.nn.Linear(2, 1), refuse)
    assert torch.equal(first.weight, again.weight)
    assert not again.training


# ---- small runs, into a temporary cache and folder of results

@pytest.fixture
def small(clean, monkeypatch, tmp_path):
    monkeypatch.setattr(_trainings, 'CACHE', tmp_path/'cache')
    monkeypatch.setattr(_bench, 'RESULTS', tmp_path)
    for name in ('write_insilico', 'prepare_cohort'):
        function = getattr(_trainings, name)
        in_this_process = partial(function, workers=1, progress=False)
        monkeypatch.setattr(_trainings, name, in_this_process)
    return tmp_path


def draw_few(monkeypatch, module, size):
    "Images of few pixels"
    draw = module.insilico_cohort
    def few(n, seed, **settings):
        return draw(n, seed, rows=96, cols=72, pixel_spacing_mm=2.5, **settings)
    monkeypatch.setattr(module, 'insilico_cohort', few)
    monkeypatch.setattr(module, 'SIZE', size)


def test_two_views_against_one(small, monkeypatch, capsys):
    from benchmarks import insilico
    draw_few(monkeypatch, insilico, (64, 48))
    monkeypatch.setattr(insilico, 'run_jobs', lambda jobs: [f(*args) for f, *args in jobs])
    arguments = '--patients 20 --epochs 1 --train-seeds 0'.split()
    insilico.main(arguments)
    rows = pd.read_csv(small/'insilico.csv')
    assert set(rows.variant) == {'cc', 'mlo', 'two_view', 'two_view - best_single'}
    assert set(rows.metric) == {'auc', 'acc'}
    assert len(rows) == 8
    capsys.readouterr()
    insilico.main(arguments)
    assert 'all rows exist' in capsys.readouterr().out


def test_network_against_simpleitk(small, monkeypatch):
    from benchmarks import registration
    draw_few(monkeypatch, registration, (64, 48))
    registration.main('--patients 16 --epochs 1 --pairs 2'.split())
    rows = pd.read_csv(small/'registration.csv')
    stored = pd.read_csv(ROOT/'benchmarks'/'results'/'registration.csv')
    key = ['variant', 'metric']
    found, wanted = (set(map(tuple, t[key].to_numpy())) for t in (rows, stored))
    assert found == wanted


def test_the_other_breast_mirrored_and_aligned(small, monkeypatch):
    from benchmarks import registration_bilateral
    draw_few(monkeypatch, registration_bilateral, (64, 48))
    registration_bilateral.main('--patients 12'.split())
    rows = pd.read_csv(small/'registration_bilateral.csv')
    stored = pd.read_csv(ROOT/'benchmarks'/'results'/'registration_bilateral.csv')
    key = ['variant', 'metric']
    found, wanted = (set(map(tuple, t[key].to_numpy())) for t in (rows, stored))
    assert found == wanted
    values = rows.set_index('variant').query('metric == "tre_mm"')['value']
    assert values['identity'] > 5*values['flip'] > 5*values['contour_true_nipples']
    errors = {v: values[v] for v in ('contour', 'flip')}
    assert values['contour - flip'] == pytest.approx(errors['contour']-errors['flip'], abs=1e-4)


def test_the_category_beside_malignancy(small, monkeypatch):
    from benchmarks import malignancy
    draw_few(monkeypatch, malignancy, (64, 48))
    monkeypatch.setattr(malignancy, 'DEVELOPMENT', 12)
    monkeypatch.setattr(malignancy, 'run_jobs', lambda jobs: [f(*args) for f, *args in jobs])
    monkeypatch.setattr(malignancy, 'FIXED', dict(list(malignancy.FIXED.items())[6:8]))
    monkeypatch.setattr(malignancy, 'ROWS', {
        name: malignancy.ROWS[name] for name in ('multitask', 'binary', *malignancy.FIXED)})
    malignancy.main('--patients 12 --test-of 32 --epochs 1 --train-seeds 0'.split())
    rows = pd.read_csv(small/'malignancy.csv').set_index('variant')['value']
    stored = pd.read_csv(ROOT/'benchmarks'/'results'/'malignancy.csv')
    more = {f'fixed_{w/10:g}' for w in range(1, 10)} | {f'multitask - binary, training {s}' for s in range(3)}
    found, wanted = ({v for v in variants if not v.startswith('best_fixed:')} for variants in (rows.index, stored.variant))
    assert found | more == wanted
    best = max(malignancy.FIXED, key=lambda name: rows[name])
    assert rows[f'best_fixed: {best}'] == rows[best]
    assert rows['multitask - best_fixed'] == pytest.approx(rows['multitask']-rows[best], abs=1e-4)
