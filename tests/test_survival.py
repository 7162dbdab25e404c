"""Survival targets and metrics against hand-computed cases, against loops over all pairs, and against scikit-survival."""
import numpy as np, pytest, torch
from sksurv.metrics import brier_score, concordance_index_censored, concordance_index_ipcw, cumulative_dynamic_auc
from mammo_nb.data.follow_up import survival_target
from mammo_nb.losses.survival import RiskLoss, masked_bce
from mammo_nb.metrics.survival import auc_cumulative, brier_by_year, c_index, expected_over_observed, followed_before, survival_curve

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

def test_expected_over_observed_of_the_true_share_is_one():
    time, event, _, _ = women(4000, seed=6)
    times, free = survival_curve(time, event)
    share = 1-free[np.searchsorted(times, 5., side='right')-1]
    assert expected_over_observed(time, event, np.full(4000, share), year=5) == pytest.approx(1, abs=1e-12)
