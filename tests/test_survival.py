"""Survival targets and metrics against hand-computed cases, against loops over all pairs, and against scikit-survival."""
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from sklearn.metrics import roc_auc_score
from sksurv.metrics import brier_score, concordance_index_censored, concordance_index_ipcw, cumulative_dynamic_auc
from sksurv.nonparametric import kaplan_meier_estimator
from mammo_nb.core.errors import InputError
from mammo_nb.data.follow_up import survival_target
from mammo_nb.losses.survival import RiskLoss, masked_bce
from mammo_nb.metrics.bootstrap import bootstrap_ci
from mammo_nb.metrics.predictions import predictions_table
from mammo_nb.metrics.survival import auc_by_year, auc_cumulative, brier_by_year, c_index, evaluate_risk, expected_over_observed, followed_before, plot_risk_calibration, risk_table, survival_curve, survival_truth

def women(n=400, seed=0, noise=.7, censored=True):
    "Times, events and a noisy risk of n women; `sksurv` takes them as a structured array"
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n)
    ill = rng.exponential(5*np.exp(-risk)); left = rng.uniform(.5, 8, n) if censored else np.full(n, np.inf)
    time, event = np.minimum(ill, left), ill <= left
    said = 1/(1+np.exp(-(risk+noise*rng.normal(size=n))))
    return time, event, said, np.array(list(zip(event, time)), dtype=[('event', bool), ('time', float)])

# targets

@pytest.mark.parametrize('to, followed, target, mask, year, seen', [
    (1, np.nan, '11111', '10000', 0, 1), (3, np.nan, '00111', '11100', 2, 1), (np.nan, 2, '00000', '11000', 1, 0), (6, 9, '00000', '11111', 4, 0), (0, 0, '11111', '10000', 0, 1)])
@pytest.mark.parametrize('convention', ['known', 'mirai'])
def test_the_table_of_targets(to, followed, target, mask, year, seen, convention):
    t = survival_target([to], [followed], convention=convention)
    text = lambda k: ''.join(str(int(v)) for v in t[k][0])
    assert (text('target'), text('y_mask'), int(t['event_times'][0]), int(t['event_observed'][0])) == (target, mask, year, seen)

def test_what_is_masked_changes_neither_loss_nor_gradient():
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1., 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    target, found = torch.randint(0, 2, (3, 5), generator=g).float(), []
    for t in (target, torch.where(mask > 0, target, 1-target), torch.where(mask > 0, target, torch.nan)):
        l = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
        loss = masked_bce(l, t, mask); loss.backward(); found.append((loss.detach(), l.grad))
    assert all(torch.equal(a, found[0][0]) and torch.equal(b, found[0][1]) for a, b in found)
    assert (found[0][1][mask == 0] == 0).all()
    by_hand = torch.nn.functional.binary_cross_entropy_with_logits(l.detach()[mask > 0], target[mask > 0])
    assert torch.allclose(found[0][0], by_hand)

def test_an_empty_mask_is_zero_and_no_nan():
    l = torch.randn(2, 5, requires_grad=True)
    loss = RiskLoss()(dict(multi=(l, torch.full((2, 5), torch.nan), torch.zeros(2, 5))))
    loss.backward()
    assert loss == 0 and (l.grad == 0).all()

# concordance

@pytest.mark.parametrize('seed', range(4))
def test_uno_is_that_of_scikit_survival(seed):
    time, event, said, y = women(seed=seed)
    assert abs(c_index(time, event, said, tau=5.) - concordance_index_ipcw(y, y, said, tau=5.)[0]) < 1e-10

@pytest.mark.parametrize('seed', range(4))
def test_harrell_is_that_of_scikit_survival(seed):
    time, event, said, y = women(seed=seed)
    assert abs(c_index(time, event, said, convention='harrell') - concordance_index_censored(event, time, said)[0]) < 1e-10

def test_uno_by_loops_over_all_pairs():
    time, event, said, _ = women(60, seed=5); time = np.round(time, 1)+.05  # ties in time
    said = np.round(said, 1)  # ties in risk
    def left(t):  # chance to be still followed just before t: a product over the times at which somebody left
        g = 1.
        for u in sorted(set(time[~event])):
            if u < t: g *= 1-(~event & (time == u)).sum()/((time > u) | ((time == u) & ~event)).sum()
        return g
    top = bottom = 0.
    for i in np.flatnonzero(event & (time <= 5)):
        for j in range(len(time)):
            if time[i] < time[j] or (time[i] == time[j] and not event[j]):
                w = left(time[i])**-2; bottom += w; top += w*((said[i] > said[j]) + .5*(said[i] == said[j]))
    assert abs(c_index(time, event, said, tau=5.)-top/bottom) < 1e-12

@pytest.mark.parametrize('convention', ['uno', 'harrell', 'mirai'])
def test_a_constant_is_one_half_and_order_is_all(convention):
    time, event, said, _ = women(300, seed=2)
    c = lambda *r: c_index(time, event, *r, convention=convention, tau=5.)
    assert c(np.full(300, .3)) == .5
    rising = np.sort(np.random.default_rng(0).uniform(size=5))
    assert c(*[np.full(300, v) for v in rising]) == .5  # the same curve for everyone
    five = [said*k/5 for k in range(1, 6)]
    assert c(*five) == pytest.approx(c(*[np.log(f)*k+k for k, f in enumerate(five, 1)]), abs=1e-12)  # rising maps, another one a year

def test_perfect_is_one_and_reversed_is_zero():
    time, event, _, _ = women(200, seed=3)
    for convention in ('uno', 'harrell'): assert (c_index(time, event, -time, convention=convention), c_index(time, event, time, convention=convention)) == (1., 0.)

def test_without_censoring_uno_is_harrell_and_nobody_is_weighted():
    time, event, said, _ = women(seed=4, censored=False)
    assert event.all() and c_index(time, event, said) == pytest.approx(c_index(time, event, said, convention='harrell'), abs=1e-12)
    assert (followed_before(time, event, time) == 1).all()  # of censoring; the curve of the events is no weight
    assert survival_curve(time, event)[1][-1] == 0

# by year

@pytest.mark.parametrize('seed', range(3))
def test_cumulative_auc_and_brier_are_those_of_scikit_survival(seed):
    time, event, said, y = women(seed=seed)
    for year in (2., 4., 5.):
        assert abs(auc_cumulative(time, event, said, year=year) - cumulative_dynamic_auc(y, y, said, [year])[0][0]) < 1e-10
        assert abs(brier_by_year(time, event, said, year=year) - brier_score(y, y, 1-said, [year])[1][0]) < 1e-10

@pytest.mark.parametrize('ties', [False, True])
def test_expected_over_observed_is_that_of_the_kaplan_meier_of_scikit_survival(ties):
    time, event, said, _ = women(1000, seed=6)
    if ties: time = np.ceil(time*4)/4  # quarters of a year: cancers and leavers at the same time, and at the year itself
    times, free = kaplan_meier_estimator(event, time)
    assert (len(times) < 40) == ties
    ours = survival_curve(time, event)
    assert np.array_equal(ours[0], times) and np.abs(ours[1]-free).max() < 1e-12
    for year in (2., 3.3, 5.):
        share = 1-free[times <= year][-1]
        assert expected_over_observed(time, event, said, year=year) == pytest.approx(said.mean()/share, abs=1e-12)
        assert expected_over_observed(time, event, np.full(1000, share), year=year) == pytest.approx(1, abs=1e-12)

def test_expected_over_observed_by_hand():
    # year: at risk, cancers -> free; 1: 6, 1 -> 5/6; 2: 5, 1 (and one leaves, after the cancer) -> 4/6; 3: 3, 1 -> 4/9; the other two are there until 4
    time, event, said = [1, 2, 2, 3, 4, 4], [1, 1, 0, 1, 0, 0], [.9, .6, .3, .6, .3, .3]
    for year, share in ((1, 1/6), (2, 1/3), (2.5, 1/3), (3, 5/9), (3.9, 5/9)): assert expected_over_observed(time, event, said, year=year) == pytest.approx(.5/share, abs=1e-12)

# the inclusion rule of Mirai

def test_auc_by_year_by_hand():
    #       cancer .8, 2.0 | left 2.0, 1.9 | cancer 2.6 | left 4
    time, event, said = [.8, 2., 2., 1.9, 2.6, 4.], [1, 1, 0, 0, 1, 0], [.5, .2, .2, .9, .4, .1]
    # year 2: positive .5 (.8), .2 (2.0, at the year itself); negative .2 (followed for exactly 2), .4 (cancer later), .1; who left at 1.9 is neither
    # .5 wins 3 of 3; .2 ties with .2, loses to .4, wins against .1: 4.5 of 6
    assert auc_by_year(time, event, said, year=2) == 4.5/6
    # year 3: positive .5, .2, .4; negative only .1: 3 of 3. Year 4: followed for exactly 4 is a negative still. Year 5: no negative
    assert auc_by_year(time, event, said, year=3) == auc_by_year(time, event, said, year=4) == 1 and np.isnan(auc_by_year(time, event, said, year=5))
    # year 1: positive .5; negative .2, .2, .9, .4, .1, the cancer of year 2 among them: 4 of 5
    assert auc_by_year(time, event, said, year=1) == 4/5

@pytest.mark.parametrize('whole', [False, True])
def test_auc_by_year_takes_whom_mirai_takes(whole):
    rng = np.random.default_rng(8)
    ill, left = rng.exponential(6, 500), rng.uniform(1, 8, 500)
    if whole: ill, left = np.ceil(ill), np.floor(left)
    time, event = np.minimum(ill, left), ill <= left
    said = np.sort(rng.uniform(size=(500, 5)), 1)
    t = survival_target(np.where(event, time, np.nan), np.where(event, np.nan, time))
    last, gold = t['event_times'].numpy(), t['event_observed'].numpy() == 1  # years from 0, as Mirai counts them
    for k in range(5):
        positive, negative = gold & (last <= k), last >= k
        keep = positive | negative
        assert 0 < positive.sum() < keep.sum() < 500 or k == 0
        assert auc_by_year(time, event, said[:, k], year=k+1) == pytest.approx(roc_auc_score(positive[keep], said[keep, k]), abs=1e-12)

def test_the_c_index_of_mirai_by_hand():
    # whole years: A cancer in 1 (.7), B cancer in 3 (2.4), C left in 3 (3.9), D in 5 (5.2), E in 1 (.5: a follow-up below a year counts as one), F in 5 (its cancer of 6.1 is too late)
    time, event = [.7, 2.4, 3.9, 5.2, .5, 6.1], [1, 1, 0, 0, 0, 1]
    said = np.array([[.20, .25, .30, .35, .40],  # A
                     [.10, .20, .50, .55, .60],  # B
                     [.10, .20, .30, .90, .95],  # C
                     [.05, .06, .07, .08, .10],  # D
                     [.10, .80, .85, .90, .95],  # E
                     [.01, .02, .03, .30, .60]]) # F
    # Kaplan-Meier of the *cancers*: 1 of 6 in year 1, 1 of the 4 left in year 3: S(1) = 5/6, S(3) = S(5) = 5/6*3/4 = 5/8; a pair weighs 1/S(year of the later)^2
    # A-E (year 1): .20 > .10 right, 36/25 | A-B (3): .30 < .50 wrong, 64/25 | A-C (3): .30 = .30 half | A-D (5): .40 > .10 right | A-F (5): .40 < .60 wrong
    # B-C (3): .50 > .30 right | B-D (5): .60 > .10 right | B-F (5): .60 = .60 half; all of them 64/25
    by_hand = (36+64*(3+2/2))/(36+64*7)
    assert c_index(time, event, *said.T, convention='mirai') == pytest.approx(by_hand, abs=1e-12)
    # the second half of the followed twice as often is the same as twice the rows
    w, again = np.array([1., 1, 1, 2, 2, 2]), [0, 1, 2, 3, 3, 4, 4, 5, 5]
    assert c_index(time, event, *said.T, weight=w, convention='mirai') == pytest.approx(c_index(np.take(time, again), np.take(event, again), *said[again].T, convention='mirai'), abs=1e-12)
    assert abs(c_index(time, event, *said.T)-by_hand) > .01  # in the year of the earlier one, weighed by who left

# where nobody is observed beyond the year

def test_without_anybody_beyond_the_year_there_is_no_value():
    time, event = np.array([1., 1, 2, 2, 2, 2, 2]), np.array([1, 0, 1, 0, 0, 0, 0])  # whole years, all controls left at 2
    y = np.array(list(zip(event == 1, time)), dtype=[('event', bool), ('time', float)])
    for f in (brier_by_year, auc_cumulative):
        found = [f(time, event, np.array([1, .5, .9, .2, .3, .4, .5]), year=k) for k in (1, 2, 3, 4, 5)]
        assert np.isfinite(found[0]) and np.isnan(found[1:]).all(), f
        assert np.isnan(f(time, event, np.ones(7), year=2)), f  # everybody at 100 %: not a perfect score
    with pytest.raises(ValueError): brier_score(y, y, np.zeros(7), [2.])  # nor for scikit-survival
    # Kaplan-Meier knows the share at 2, where six are there still: 1 - 6/7 * 4/5; and nothing after
    said = [expected_over_observed(time, event, np.full(7, .5), year=k) for k in (1, 2, 3)]
    assert said[:2] == pytest.approx([.5/(1/7), .5/(11/35)], abs=1e-12) and np.isnan(said[2])
    assert brier_by_year(time, event, np.zeros(7), year=1) == pytest.approx(1/7) and expected_over_observed(time, event, np.full(7, 1/7), year=1) == pytest.approx(1)
    assert auc_by_year(time, event, np.array([1, .5, .9, .2, .3, .4, .5]), year=2) == 1  # known to be free for 2 years is enough here

def cut_at_five():
    time, event, said, _ = women(seed=9)
    time, event = np.minimum(time, 5), event & (time <= 5)
    table = pd.DataFrame(dict(patient_id=[f'{i:03}' for i in range(400)], exam_id='1', laterality='L', time=time, event=event.astype(float)))
    return table.assign(**{f'risk_year_{k}': said*k/5 for k in range(1, 6)})

def test_follow_up_cut_at_exactly_five_years():
    t = cut_at_five(); y = np.array(list(zip(t.event == 1, t.time)), dtype=[('event', bool), ('time', float)])
    assert all(np.isnan(f(t.time, t.event, t.risk_year_5, year=5)) for f in (brier_by_year, auc_cumulative)) and np.isfinite(expected_over_observed(t.time, t.event, t.risk_year_5, year=5))
    for year in (4., 4.99): assert brier_by_year(t.time, t.event, t.risk_year_5, year=year) == pytest.approx(brier_score(y, y, 1-t.risk_year_5, [year])[1][0], abs=1e-10)
    e = evaluate_risk(t, n_boot=50).set_index('metric')
    assert set(e.index[e.value.isna()]) == {f'{m}_5' for m in ('brier', 'auc_cumulative')}
    assert e[e.value.isna()].why.str.contains('no value on all rows').all() and (e.low <= e.high)[e.value.notna()].all()

def test_a_group_that_all_got_a_cancer_is_known():
    rng = np.random.default_rng(0)
    time, said = rng.uniform(.1, 4.9, 55), np.full(55, 8/9)
    assert brier_by_year(time, np.ones(55), said, year=5) == pytest.approx(1/81) and expected_over_observed(time, np.ones(55), said, year=5) == pytest.approx(8/9)
    assert np.isnan(auc_cumulative(time, np.ones(55), said, year=5))  # there is nobody without
    event = np.ones(55); event[time.argmax()] = 0  # the last one left: what became of her is not known
    assert np.isnan(brier_by_year(time, event, said, year=5)) and np.isnan(expected_over_observed(time, event, said, year=5))
    few, when = np.append(np.zeros(199), 1), np.append(np.full(199, 4.), 4.9)  # one late cancer after all others left: the curve falls to 0, but nothing is known of year 5
    assert np.isnan(brier_by_year(when, few, np.full(200, .1), year=5)) and np.isnan(expected_over_observed(when, few, np.full(200, .1), year=5))
    t = pd.DataFrame(dict(patient_id=range(110), time=np.concatenate([np.full(55, 7.), time]), event=np.repeat([0, 1], 55), risk_year_5=np.repeat([.1, .9], 55)))
    points = [c for c in plot_risk_calibration(t, groups=2, n_boot=10).containers]
    assert [float(c.lines[0].get_ydata()[0]) for c in points] == pytest.approx([0, 1])

@pytest.mark.parametrize('metric', [brier_by_year, auc_cumulative])
def test_a_resample_without_anybody_beyond_the_year_is_drawn_again(metric):
    t = cut_at_five(); t.loc[t.index[t.time == 5][0], 'time'] = 5.5  # one woman
    f, w = partial(metric, year=5), np.ones((3, 400)); w[1, t.time == 5.5] = 0; w[2, t.time == 5.5] = 7
    found = f(t.time, t.event, t.risk_year_5, weight=w)
    assert np.isnan(found).tolist() == [False, True, False] and found[0] == pytest.approx(f(t.time, t.event, t.risk_year_5), abs=1e-12)
    e = bootstrap_ci(t, f, columns=('time', 'event', 'risk_year_5'), n_boot=200)
    assert 70 < e.redrawn < 180 and np.isfinite([e.low, e.high]).all()  # a share of 1/e of the draws

# what is not known is refused

ASK = dict(c_index=lambda t, e, r: c_index(t, e, r), mirai=lambda t, e, r: c_index(t, e, r, convention='mirai'), auc_by_year=lambda t, e, r: auc_by_year(t, e, r, year=2), auc_cumulative=lambda t, e, r: auc_cumulative(t, e, r, year=2),
           brier_by_year=lambda t, e, r: brier_by_year(t, e, r, year=2), expected_over_observed=lambda t, e, r: expected_over_observed(t, e, r, year=2), survival_curve=lambda t, e, r: survival_curve(t, e), followed_before=lambda t, e, r: followed_before(t, e, [2.]))

@pytest.mark.parametrize('name', ASK)
@pytest.mark.parametrize('what, value', [('time', np.nan), ('time', -.1), ('time', np.inf), ('event', np.nan), ('event', None), ('event', 2), ('event', -1), ('event', 'yes'), ('risk', np.nan), ('risk', None)])
def test_what_is_not_known_is_refused_by_argument_and_row(name, what, value):
    good = dict(time=[1., 2, 3, 4], event=[1, 0, 1, 0], risk=[.4, .3, .2, .1])
    ASK[name](*good.values()); ASK[name](*[pd.Series(v, index=list('dcba')) for v in good.values()]); ASK[name](good['time'], np.array(good['event']) == 1, torch.tensor(good['risk']))
    if what == 'risk' and name in ('survival_curve', 'followed_before'): return
    bad = good | {what: [*good[what][:2], value, value]}
    with pytest.raises(InputError, match=rf'^{"c_index" if name == "mirai" else name}: {what}: found {value} in row 2 \(and 1 more rows\), expected .*'):
        ASK[name](*bad.values())

def test_the_truth_of_all_women_must_be_filtered_first():
    truth = survival_truth(pd.DataFrame(dict(years_to_cancer=[1., np.nan, np.nan], years_followed=[np.nan, np.nan, 4.])))
    with pytest.raises(InputError, match='time: found nan in row 1, expected years from 0 on; leave women without known follow-up out first'): c_index(truth.time, truth.event, [.3, .2, .1])
    known = truth.dropna(subset='time')
    assert c_index(known.time, known.event, [.3, .1]) == 1
    with pytest.raises(InputError, match='risk 2 of 2: found nan in row 1'): c_index(known.time, known.event, [.3, .1], [.3, np.nan])
    with pytest.raises(InputError, match='evaluate_risk: event: found nan in row 3'): evaluate_risk(cut_at_five().assign(event=lambda t: t.event.where(t.index != 3)))

def test_a_group_that_nobody_is_followed_in_has_no_point():
    import matplotlib; matplotlib.use('Agg')
    t = cut_at_five(); low = t.risk_year_5 <= t.risk_year_5.quantile(.2); t.loc[low, 'time'] = t.time[low].clip(upper=3.)
    assert len(plot_risk_calibration(t, 5, n_boot=20).containers) == 4 and len(plot_risk_calibration(t, 3, n_boot=20).containers) == 5


def test_predictions_without_a_breast_are_told_apart_from_breasts_without_follow_up(capsys):
    rows = pd.DataFrame(dict(patient_id=['a', 'b', 'c'], exam_id=['1', '2', '3'], laterality='L', split='test', label=np.nan, years_to_cancer=[2., np.nan, np.nan], years_followed=[5., 4., np.nan]))
    said = predictions_table(rows, np.array([.3, .2, .1]), 's', 'risk_year_1', 'm')
    assert risk_table(said, rows).patient_id.tolist() == ['a', 'b'] and '1 of 3 breasts have neither' in capsys.readouterr().out
    assert risk_table(said, rows[1:]).patient_id.tolist() == ['b']
    out = capsys.readouterr().out
    assert '1 of 3 predicted breasts have no row' in out and '1 of 2 breasts have neither' in out
    with pytest.raises(InputError, match='none of the 3 breasts that were predicted'): risk_table(said, rows.assign(exam_id=['4', '5', '6']))
