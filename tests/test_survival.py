"Survival metrics against cases computed by hand, against loops over all pairs, and against scikit-survival"
from functools import partial

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sksurv.metrics import (
    brier_score, concordance_index_censored, concordance_index_ipcw, cumulative_dynamic_auc
)
from sksurv.nonparametric import kaplan_meier_estimator

from mammo_nb.cohort.labels import survival_target
from mammo_nb.core.errors import InputError
from mammo_nb.metrics.bootstrap import bootstrap_ci, paired_difference
from mammo_nb.metrics.concordance import c_index
from mammo_nb.metrics.predictions import predictions_table, read_predictions, write_predictions
from mammo_nb.metrics.risk import evaluate_risk
from mammo_nb.metrics.risk_by_year import (
    auc_by_year, auc_cumulative, brier_by_year, eo_ratio, plot_risk_calibration
)
from mammo_nb.metrics.survival import (
    censoring_survival, check_survival, risk_table, survival_curve, time_and_event
)

matplotlib.use('Agg')

def patients(n=400, seed=0, noise=.7, censored=True):
    "Times, events and a noisy risk of n patients"
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n)
    cancer = rng.exponential(5*np.exp(-risk))
    leave = rng.uniform(.5, 8, n) if censored else np.full(n, np.inf)
    predicted = 1/(1+np.exp(-(risk+noise*rng.normal(size=n))))
    return np.minimum(cancer, leave), cancer <= leave, predicted

def structured(time, event):
    "Times and events in the form of scikit-survival"
    rows = list(zip(np.asarray(event) == 1, time))
    return np.array(rows, dtype=[('event', bool), ('time', float)])

# ---- targets

TARGETS = [
    (1, np.nan, '11111', '10000', 0, 1), (3, np.nan, '00111', '11100', 2, 1),
    (np.nan, 2, '00000', '11000', 1, 0), (6, 9, '00000', '11111', 4, 0),
    (0, 0, '11111', '10000', 0, 1)]

@pytest.mark.parametrize('cancer, followed, target, mask, year, observed', TARGETS)
@pytest.mark.parametrize('convention', ['known', 'mirai'])
def test_the_table_of_targets(cancer, followed, target, mask, year, observed, convention):
    t = survival_target([cancer], [followed], censoring=convention)
    digits = lambda key: ''.join(str(int(v)) for v in t[key][0])
    assert digits('target') == target
    assert digits('y_mask') == mask
    assert int(t['event_times'][0]) == year
    assert int(t['event_observed'][0]) == observed

# ---- concordance

@pytest.mark.parametrize('seed', range(4))
def test_uno_is_that_of_scikit_survival(seed):
    time, event, predicted = patients(seed=seed)
    y = structured(time, event)
    expected = concordance_index_ipcw(y, y, predicted, tau=5.)[0]
    assert abs(c_index(time, event, predicted, tau=5.) - expected) < 1e-10

@pytest.mark.parametrize('seed', range(4))
def test_harrell_is_that_of_scikit_survival(seed):
    time, event, predicted = patients(seed=seed)
    expected = concordance_index_censored(event, time, predicted)[0]
    assert abs(c_index(time, event, predicted, convention='harrell') - expected) < 1e-10

def still_followed(time, event, at):
    "G(t-): a product over the times at which somebody left"
    g = 1.
    for u in sorted(set(time[~event])):
        if u < at:
            leaving = (~event & (time == u)).sum()
            staying = ((time > u) | ((time == u) & ~event)).sum()
            g *= 1-leaving/staying
    return g

def test_uno_by_loops_over_all_pairs():
    time, event, predicted = patients(60, seed=5)
    time, predicted = np.round(time, 1)+.05, np.round(predicted, 1)  # ties in both
    won = pairs = 0.
    for i in np.flatnonzero(event & (time <= 5)):
        w = still_followed(time, event, time[i])**-2
        for j in range(len(time)):
            if time[i] < time[j] or (time[i] == time[j] and not event[j]):
                pairs += w
                won += w*((predicted[i] > predicted[j]) + .5*(predicted[i] == predicted[j]))
    assert abs(c_index(time, event, predicted, tau=5.)-won/pairs) < 1e-12

def mirai_by_loops(time, event, curves):
    "Mirai's sum, pair by pair, with the survival curve of the events"
    cancer_year, followed = np.ceil(time-1e-9), np.floor(time+1e-9)
    t = np.clip(np.where(event, cancer_year, followed), 1, 5)
    event = event & (np.where(event, cancer_year, 0) <= 5)
    factors = {u: 1-((t == u) & event).sum()/(t >= u).sum() for u in np.unique(t)}
    free = {u: np.prod([f for v, f in factors.items() if v <= u]) for u in factors}
    won = pairs = 0.
    for i in np.flatnonzero(event):
        for j in np.flatnonzero((t > t[i]) | ((t == t[i]) & ~event)):
            a, b = curves[i, int(t[j])-1], curves[j, int(t[j])-1]
            w = free[t[j]]**-2
            pairs += w
            won += w*((a > b) + .5*(a == b))
    return won/pairs

def test_mirai_by_loops_over_all_pairs():
    time, event, _ = patients(150, seed=6)
    curves = np.sort(np.random.default_rng(4).uniform(0, .2, (150, 5)), 1)
    ours = c_index(time, event, *curves.T, convention='mirai')
    assert ours == pytest.approx(mirai_by_loops(time, event, curves), abs=1e-10)

@pytest.mark.parametrize('convention', ['uno', 'harrell', 'mirai'])
def test_a_constant_is_one_half_and_order_is_all(convention):
    time, event, predicted = patients(300, seed=2)
    c = partial(c_index, time, event, convention=convention, tau=5.)
    rising = np.sort(np.random.default_rng(0).uniform(size=5))
    assert c(np.full(300, .3)) == .5
    assert c(*[np.full(300, v) for v in rising]) == .5  # the same curve for everybody
    curves = [predicted*k/5 for k in range(1, 6)]
    changed = [np.log(f)*k+k for k, f in enumerate(curves, 1)]  # another rising change a year
    assert c(*curves) == pytest.approx(c(*changed), abs=1e-12)
    assert c(predicted) + c(-predicted) == pytest.approx(1, abs=1e-12)

@pytest.mark.parametrize('convention', ['uno', 'harrell'])
def test_perfect_is_one_and_reversed_is_zero(convention):
    time, event, _ = patients(200, seed=3)
    assert c_index(time, event, -time, convention=convention) == 1
    assert c_index(time, event, time, convention=convention) == 0

def test_without_censoring_uno_is_harrell_and_nobody_is_weighted():
    time, event, predicted = patients(seed=4, censored=False)
    harrell = c_index(time, event, predicted, convention='harrell')
    assert event.all()
    assert c_index(time, event, predicted) == pytest.approx(harrell, abs=1e-12)
    assert (censoring_survival(time, event, time) == 1).all()
    assert survival_curve(time, event)[1][-1] == 0  # the curve of the events is no weight

def test_many_weights_at_once():
    time, event, predicted = patients(200)
    w = np.random.default_rng(1).integers(0, 3, (6, 200)).astype(float)
    metrics = [partial(c_index, tau=5), partial(brier_by_year, year=4), partial(eo_ratio, year=4),
               partial(auc_cumulative, year=4), partial(auc_by_year, year=4)]
    for metric in metrics:
        one_by_one = [metric(time, event, predicted, weight=v) for v in w]
        assert metric(time, event, predicted, weight=w) == pytest.approx(one_by_one, abs=1e-12)

def test_unknown_conventions_are_refused():
    with pytest.raises(InputError, match='one of uno, harrell, mirai'):
        c_index([1, 2], [1, 0], [.1, .2], convention='public')

# ---- by year

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('year', [2., 4., 5.])
def test_cumulative_auc_and_brier_are_those_of_scikit_survival(seed, year):
    time, event, predicted = patients(seed=seed)
    y = structured(time, event)
    area = cumulative_dynamic_auc(y, y, predicted, [year])[0][0]
    error = brier_score(y, y, 1-predicted, [year])[1][0]
    assert abs(auc_cumulative(time, event, predicted, year=year) - area) < 1e-10
    assert abs(brier_by_year(time, event, predicted, year=year) - error) < 1e-10

@pytest.mark.parametrize('ties', [False, True])
def test_expected_over_observed_is_that_of_the_kaplan_meier_of_scikit_survival(ties):
    time, event, predicted = patients(1000, seed=6)
    if ties:  # cancers and leavers at the same time, and at the year itself
        time = np.ceil(time*4)/4
    times, free = kaplan_meier_estimator(event, time)
    our_times, our_free = survival_curve(time, event)
    assert (len(times) < 40) == ties
    assert np.array_equal(our_times, times)
    assert np.abs(our_free-free).max() < 1e-12
    for year in (2., 3.3, 5.):
        share = 1-free[times <= year][-1]
        ratio = eo_ratio(time, event, predicted, year=year)
        assert ratio == pytest.approx(predicted.mean()/share, abs=1e-12)
        constant = np.full(1000, share)
        assert eo_ratio(time, event, constant, year=year) == pytest.approx(1, abs=1e-12)

def test_expected_over_observed_by_hand():
    # year 1: 6 at risk, 1 cancer, 5/6 free; year 2: 5, 1 (and one leaves after the cancer), 4/6
    # year 3: 3, 1, 4/9; the other two stay until 4
    time, event, predicted = [1, 2, 2, 3, 4, 4], [1, 1, 0, 1, 0, 0], [.9, .6, .3, .6, .3, .3]
    shares = {1: 1/6, 2: 1/3, 2.5: 1/3, 3: 5/9, 3.9: 5/9}
    for year, share in shares.items():
        ratio = eo_ratio(time, event, predicted, year=year)
        assert ratio == pytest.approx(.5/share, abs=1e-12)

# ---- the inclusion rule of Mirai

def test_auc_by_year_by_hand():
    #       cancer .8, 2.0 | left 2.0, 1.9 | cancer 2.6 | left 4
    time, event = [.8, 2., 2., 1.9, 2.6, 4.], [1, 1, 0, 0, 1, 0]
    predicted = [.5, .2, .2, .9, .4, .1]
    area = lambda year: auc_by_year(time, event, predicted, year=year)
    # year 2: positive .5 (.8) and .2 (2.0, at the year itself); negative .2 (followed for exactly
    # 2), .4 (cancer later) and .1; who left at 1.9 is neither. .5 wins 3 of 3; .2 ties with .2,
    # loses to .4 and wins against .1: 4.5 of 6
    assert area(2) == 4.5/6
    # year 3: positive .5, .2, .4; negative only .1: 3 of 3. Year 4: followed for exactly 4 is
    # still a negative. Year 5: no negative
    assert area(3) == 1
    assert area(4) == 1
    assert np.isnan(area(5))
    # year 1: positive .5; negative .2, .2, .9, .4, .1, the cancer of year 2 among them: 4 of 5
    assert area(1) == 4/5

@pytest.mark.parametrize('whole', [False, True])
def test_auc_by_year_takes_the_patients_that_mirai_takes(whole):
    rng = np.random.default_rng(8)
    cancer, leave = rng.exponential(6, 500), rng.uniform(1, 8, 500)
    if whole:
        cancer, leave = np.ceil(cancer), np.floor(leave)
    time, event = np.minimum(cancer, leave), cancer <= leave
    predicted = np.sort(rng.uniform(size=(500, 5)), 1)
    t = survival_target(np.where(event, time, np.nan), np.where(event, np.nan, time))
    last = t['event_times'].numpy()  # years from 0, as Mirai counts them
    gold = t['event_observed'].numpy() == 1
    for k in range(5):
        positive, negative = gold & (last <= k), last >= k
        keep = positive | negative
        assert 0 < positive.sum() < keep.sum()
        assert keep.sum() < 500 or k == 0
        expected = roc_auc_score(positive[keep], predicted[keep, k])
        ours = auc_by_year(time, event, predicted[:, k], year=k+1)
        assert ours == pytest.approx(expected, abs=1e-12)

def test_the_c_index_of_mirai_by_hand():
    # whole years: A cancer in 1 (.7), B cancer in 3 (2.4), C left in 3 (3.9), D in 5 (5.2),
    # E in 1 (.5: a follow-up below a year counts as one), F in 5 (its cancer of 6.1 is too late)
    time, event = np.array([.7, 2.4, 3.9, 5.2, .5, 6.1]), np.array([1, 1, 0, 0, 0, 1])
    predicted = np.array([
        [.20, .25, .30, .35, .40],  # A
        [.10, .20, .50, .55, .60],  # B
        [.10, .20, .30, .90, .95],  # C
        [.05, .06, .07, .08, .10],  # D
        [.10, .80, .85, .90, .95],  # E
        [.01, .02, .03, .30, .60]])  # F
    # Kaplan-Meier of the *cancers*: 1 of 6 in year 1, 1 of the 4 left in year 3, so
    # S(1) = 5/6 and S(3) = S(5) = 5/6*3/4 = 5/8; a pair weighs 1/S(year of the later)^2
    # A-E (year 1): .20 > .10 right, 36/25; all others weigh 64/25:
    # A-B (3): .30 < .50 wrong | A-C (3): .30 = .30 half | A-D (5): .40 > .10 right
    # A-F (5): .40 < .60 wrong | B-C (3): .50 > .30 right | B-D (5): .60 > .10 right
    # B-F (5): .60 = .60 half
    by_hand = (36+64*(3+2/2))/(36+64*7)
    mirai = partial(c_index, convention='mirai')
    assert mirai(time, event, *predicted.T) == pytest.approx(by_hand, abs=1e-12)
    w, again = np.array([1., 1, 1, 2, 2, 2]), [0, 1, 2, 3, 3, 4, 4, 5, 5]
    twice = mirai(time[again], event[again], *predicted[again].T)
    assert mirai(time, event, *predicted.T, weight=w) == pytest.approx(twice, abs=1e-12)
    assert abs(c_index(time, event, *predicted.T)-by_hand) > .01

# ---- where nobody is observed beyond the year

@pytest.mark.parametrize('metric', [brier_by_year, auc_cumulative])
def test_without_anybody_beyond_the_year_there_is_no_value(metric):
    time = np.array([1., 1, 2, 2, 2, 2, 2])  # whole years, all controls left at 2
    event = np.array([1, 0, 1, 0, 0, 0, 0])
    predicted = np.array([1, .5, .9, .2, .3, .4, .5])
    values = [metric(time, event, predicted, year=k) for k in (1, 2, 3, 4, 5)]
    assert np.isfinite(values[0])
    assert np.isnan(values[1:]).all()
    # everybody at 100 % is no perfect score
    assert np.isnan(metric(time, event, np.ones(7), year=2))

def test_scikit_survival_refuses_such_a_year_and_kaplan_meier_knows_it():
    time, event = np.array([1., 1, 2, 2, 2, 2, 2]), np.array([1, 0, 1, 0, 0, 0, 0])
    y = structured(time, event)
    with pytest.raises(ValueError):
        brier_score(y, y, np.zeros(7), [2.])
    # the share at 2, where six are still there, is 1 - 6/7 * 4/5; nothing is known after
    ratios = [eo_ratio(time, event, np.full(7, .5), year=k) for k in (1, 2, 3)]
    assert ratios[:2] == pytest.approx([.5/(1/7), .5/(11/35)], abs=1e-12)
    assert np.isnan(ratios[2])
    assert brier_by_year(time, event, np.zeros(7), year=1) == pytest.approx(1/7)
    assert eo_ratio(time, event, np.full(7, 1/7), year=1) == pytest.approx(1)
    # known to be free for 2 years is enough here
    assert auc_by_year(time, event, np.array([1, .5, .9, .2, .3, .4, .5]), year=2) == 1

def cut_at_five():
    "400 patients with follow-up cut at exactly five years"
    time, event, predicted = patients(seed=9)
    event = event & (time <= 5)
    ids = dict(patient_id=[f'{i:03}' for i in range(400)], exam_id='1', laterality='L')
    t = pd.DataFrame(ids).assign(time=np.minimum(time, 5), event=event.astype(float))
    return t.assign(**{f'risk_year_{k}': predicted*k/5 for k in range(1, 6)})

def test_follow_up_cut_at_exactly_five_years():
    t = cut_at_five()
    truth, risk = (t['time'], t['event']), t['risk_year_5']
    y = structured(*truth)
    assert np.isnan(brier_by_year(*truth, risk, year=5))
    assert np.isnan(auc_cumulative(*truth, risk, year=5))
    assert np.isfinite(eo_ratio(*truth, risk, year=5))
    for year in (4., 4.99):
        expected = brier_score(y, y, 1-risk, [year])[1][0]
        assert brier_by_year(*truth, risk, year=year) == pytest.approx(expected, abs=1e-10)
    e = evaluate_risk(t, n_boot=50).set_index('metric')
    missing = e['value'].isna()
    assert set(e.index[missing]) == {'brier_5', 'auc_cumulative_5'}
    assert e[missing]['why'].str.contains('no value on all rows').all()
    assert (e['low'] <= e['high'])[~missing].all()

def test_a_group_that_all_got_a_cancer_is_known():
    rng = np.random.default_rng(0)
    time, predicted = rng.uniform(.1, 4.9, 55), np.full(55, 8/9)
    all_cancers = np.ones(55)
    assert brier_by_year(time, all_cancers, predicted, year=5) == pytest.approx(1/81)
    assert eo_ratio(time, all_cancers, predicted, year=5) == pytest.approx(8/9)
    assert np.isnan(auc_cumulative(time, all_cancers, predicted, year=5))  # nobody is without
    event = np.ones(55)
    event[time.argmax()] = 0  # the last patient left: the rest of the story is unknown
    assert np.isnan(brier_by_year(time, event, predicted, year=5))
    assert np.isnan(eo_ratio(time, event, predicted, year=5))

def test_one_late_cancer_after_all_others_left():
    "The curve falls to 0, but nothing is known of year 5"
    event, time = np.append(np.zeros(199), 1), np.append(np.full(199, 4.), 4.9)
    assert np.isnan(brier_by_year(time, event, np.full(200, .1), year=5))
    assert np.isnan(eo_ratio(time, event, np.full(200, .1), year=5))

def test_the_figure_of_two_groups_that_are_known():
    time = np.concatenate([np.full(55, 7.), np.random.default_rng(0).uniform(.1, 4.9, 55)])
    t = pd.DataFrame(dict(
        patient_id=range(110), time=time, event=np.repeat([0, 1], 55),
        risk_year_5=np.repeat([.1, .9], 55)))
    points = plot_risk_calibration(t, groups=2, n_boot=10).containers
    heights = [float(p.lines[0].get_ydata()[0]) for p in points]
    assert heights == pytest.approx([0, 1])

@pytest.mark.parametrize('year, points', [(5, 4), (3, 5)])
def test_a_group_in_which_nobody_is_followed_has_no_point(year, points):
    t = cut_at_five()
    low = t['risk_year_5'] <= t['risk_year_5'].quantile(.2)
    t.loc[low, 'time'] = t['time'][low].clip(upper=3.)
    assert len(plot_risk_calibration(t, year, n_boot=20).containers) == points

def test_an_unknown_event_has_no_figure():
    with pytest.raises(InputError, match='plot_risk_calibration: event: found nan in row 0'):
        plot_risk_calibration(cut_at_five().assign(event=np.nan))

@pytest.mark.parametrize('metric', [brier_by_year, auc_cumulative])
def test_a_resample_without_anybody_beyond_the_year_is_drawn_again(metric):
    t = cut_at_five()
    t.loc[t.index[t['time'] == 5][0], 'time'] = 5.5  # one patient
    truth, risk = (t['time'], t['event']), t['risk_year_5']
    at_five = partial(metric, year=5)
    w = np.ones((3, 400))
    w[1, t['time'] == 5.5] = 0
    w[2, t['time'] == 5.5] = 7
    values = at_five(*truth, risk, weight=w)
    assert np.isnan(values).tolist() == [False, True, False]
    assert values[0] == pytest.approx(at_five(*truth, risk), abs=1e-12)
    e = bootstrap_ci(t, at_five, columns=('time', 'event', 'risk_year_5'), n_boot=200)
    assert 70 < e.n_redrawn < 180  # a share of 1/e of the draws
    assert np.isfinite([e.low, e.high]).all()

def test_the_truth_of_a_simulation():
    "Censored estimates against the outcome of patients who never leave"
    rng = np.random.default_rng(3)
    hazard = .06*np.exp(rng.normal(0, .9, 6000))
    cancer, leave = rng.exponential(1/hazard), rng.uniform(1, 7, 6000)
    time, event = np.minimum(cancer, leave), cancer <= leave
    predicted = 1-np.exp(-hazard*np.exp(rng.normal(0, .7, 6000))*4)
    everybody = np.ones(6000)
    full = c_index(cancer, everybody, predicted, tau=4)
    assert abs(c_index(time, event, predicted, tau=4)-full) < .02
    for year in (2, 4):
        area = roc_auc_score(cancer <= year, predicted)
        assert abs(auc_cumulative(time, event, predicted, year=year)-area) < .02

# ---- what is unknown is refused

METRICS = dict(
    c_index=c_index, mirai=partial(c_index, convention='mirai'),
    auc_by_year=partial(auc_by_year, year=2), auc_cumulative=partial(auc_cumulative, year=2),
    brier_by_year=partial(brier_by_year, year=2), eo_ratio=partial(eo_ratio, year=2),
    survival_curve=lambda t, e, r: survival_curve(t, e),
    censoring_survival=lambda t, e, r: censoring_survival(t, e, [2.]))
UNKNOWN = [
    ('time', np.nan), ('time', -.1), ('time', np.inf), ('event', np.nan), ('event', None),
    ('event', 2), ('event', -1), ('event', 'yes'), ('risk', np.nan), ('risk', None)]
GOOD = dict(time=[1., 2, 3, 4], event=[1, 0, 1, 0], risk=[.4, .3, .2, .1])

@pytest.mark.parametrize('name', METRICS)
def test_lists_series_and_tensors_are_taken(name):
    metric = METRICS[name]
    metric(*GOOD.values())
    metric(*[pd.Series(v, index=list('dcba')) for v in GOOD.values()])
    metric(GOOD['time'], np.array(GOOD['event']) == 1, torch.tensor(GOOD['risk']))

@pytest.mark.parametrize('name', METRICS)
@pytest.mark.parametrize('what, value', UNKNOWN)
def test_what_is_unknown_is_refused_by_argument_and_row(name, what, value):
    if what == 'risk' and name in ('survival_curve', 'censoring_survival'):
        return
    bad = GOOD | {what: [*GOOD[what][:2], value, value]}
    where = 'c_index' if name == 'mirai' else name
    message = rf'^{where}: {what}: found {value} in row 2 \(and 1 more rows\), expected .*'
    with pytest.raises(InputError, match=message):
        METRICS[name](*bad.values())

def test_other_types_of_times_and_events():
    time, event = torch.tensor([1, 2]), torch.tensor([1., 0])
    assert check_survival('demo', time, event)[0].tolist() == [1, 2]
    time, event = pd.Series([1, 2], index=[7, 8]), pd.array([1, 0], dtype='Int64')
    assert check_survival('demo', time, event)[1].tolist() == [True, False]

@pytest.mark.parametrize('unknown', [np.nan, None, pd.NA, 2, 'yes'])
def test_an_event_is_one_or_zero(unknown):
    message = rf'event: found {unknown} in row 1, expected 1 \(cancer\) or 0 \(censored\)'
    with pytest.raises(InputError, match=message):
        check_survival('demo', [1, 2.], [1, unknown])

def test_shapes_and_several_risks():
    with pytest.raises(InputError, match=r'event: found shape \(3,\), expected shape \(2,\)'):
        check_survival('demo', [1, 2.], [1, 0, 1])
    with pytest.raises(InputError, match='risk 2 of 2: found nan in row 0'):
        check_survival('demo', [1, 2.], [1, 0], [.1, .2], [np.nan, .3])

def test_the_truth_of_all_patients_must_be_filtered_first():
    truth = time_and_event(pd.DataFrame(dict(
        years_to_cancer=[1., np.nan, np.nan], years_followed=[np.nan, np.nan, 4.])))
    message = 'time: found nan in row 1, expected years from 0 on; exclude breasts without known follow-up'
    with pytest.raises(InputError, match=message):
        c_index(truth['time'], truth['event'], [.3, .2, .1])
    known = truth.dropna(subset='time')
    assert c_index(known['time'], known['event'], [.3, .1]) == 1
    with pytest.raises(InputError, match='risk 2 of 2: found nan in row 1'):
        c_index(known['time'], known['event'], [.3, .1], [.3, np.nan])

# ---- tables of risks

def risk_rows(**columns):
    ids = dict(patient_id=['a', 'b', 'c'], exam_id=['1', '2', '3'], laterality='L', split='test')
    years = dict(years_to_cancer=[2., np.nan, np.nan], years_followed=[5., 4., np.nan])
    return pd.DataFrame({**ids, 'label': np.nan, **years, **columns})

def test_predictions_without_a_breast_are_told_apart_from_breasts_without_follow_up(capsys):
    rows = risk_rows()
    predictions = predictions_table(rows, np.array([.3, .2, .1]), 's', 'risk_year_1', 'm')
    assert risk_table(predictions, rows)['patient_id'].tolist() == ['a', 'b']
    assert '1 of 3 breasts have neither' in capsys.readouterr().out
    assert risk_table(predictions, rows[1:])['patient_id'].tolist() == ['b']
    out = capsys.readouterr().out
    assert '1 of 3 predicted breasts have no row' in out
    assert '1 of 2 breasts have neither' in out
    with pytest.raises(InputError, match='none of the 3 breasts that were predicted'):
        risk_table(predictions, rows.assign(exam_id=['4', '5', '6']))

def test_a_patient_last_followed_on_the_day_of_the_exam_is_excluded(capsys):
    rows = risk_rows(years_followed=[np.nan, 0., 3])
    predictions = predictions_table(rows, [.3, .2, .1], 's', 'risk_year_1', 'm')
    assert risk_table(predictions)['patient_id'].tolist() == ['a', 'c']
    assert '1 of 3 breasts have neither' in capsys.readouterr().out

def test_a_table_without_risks_is_refused():
    predictions = predictions_table(risk_rows(), [.3, .2, .1], 's', 'probability', 'm')
    with pytest.raises(InputError, match='expected risk_year_1'):
        risk_table(predictions, risk_rows())

def test_evaluate_risk_takes_a_predictions_table_from_a_file(tmp_path, capsys):
    t = cut_at_five()
    rows = t.assign(
        exam_id=t['patient_id'], years_followed=t['time'],
        years_to_cancer=t['time'].where(t['event'] == 1),
        density=np.tile(list('AB'), 200))
    outputs = [predictions_table(rows, t[f'risk_year_{k}'], 's', f'risk_year_{k}', 'm')
               for k in range(1, 6)]
    predictions = pd.concat(outputs, ignore_index=True)
    back = read_predictions(write_predictions(predictions, tmp_path/'p.csv'))
    breasts = rows[['patient_id', 'exam_id', 'laterality', 'years_to_cancer', 'years_followed']]
    tables = back, risk_table(predictions, breasts)
    direct, joined = (evaluate_risk(o, n_boot=20) for o in tables)
    pd.testing.assert_frame_equal(direct, joined)
    pd.testing.assert_frame_equal(direct, evaluate_risk([back, back], n_boot=20))
    by_hand = evaluate_risk(t, n_boot=20)
    pd.testing.assert_frame_equal(direct, by_hand)
    assert capsys.readouterr().out == ''

def test_a_year_that_no_row_knows_is_still_a_column():
    rows = risk_rows(years_to_cancer=np.nan, years_followed=[1., 2., 3.])
    predictions = predictions_table(rows, [.3, .2, .1], 's', 'risk_year_1', 'm')
    table = risk_table(predictions)
    assert table['event'].tolist() == [0, 0, 0]
    assert table['time'].tolist() == [1, 2, 3]

@pytest.mark.parametrize('change, expected', [
    (lambda t: t[['time', 'event', 'patient_id']], 'as from risk_table'),
    (lambda t: t.drop(columns='time'), 'columns: found'),
    (lambda t: t.assign(event=t['event'].where(t.index != 3)), 'evaluate_risk: event: found nan in row 3'),
    (lambda t: t.assign(risk_year_3=t['risk_year_3'].where(t.index != 7)), 'risk 3 of 5: found nan in row 7')])
def test_tables_that_cannot_be_evaluated(change, expected):
    with pytest.raises(InputError, match=expected):
        evaluate_risk(change(cut_at_five()), n_boot=20)

def test_strata_that_are_unknown():
    t = cut_at_five()
    with pytest.raises(InputError, match='race: found no such column'):
        evaluate_risk(t, by='race')
    with pytest.raises(InputError, match='race: found unknown for every breast'):
        evaluate_risk(t.assign(race=None), by='race')

def test_a_better_model_is_better_on_the_same_resampled_patients():
    time, event, good = patients(1200, seed=5, noise=.2)
    worse = np.random.default_rng(0).permutation(good)
    t = pd.DataFrame(dict(patient_id=[f'{i}' for i in range(1200)], time=time, event=event*1.))
    five = partial(c_index, tau=5.)
    columns = ('time', 'event', 'value')
    a, b = t.assign(value=good), t.assign(value=worse)
    assert paired_difference(a, b, five, columns=columns, n_boot=300).low > 0
