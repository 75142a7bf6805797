"""Guarantees by simulation, looked at after every presentation; invariants by property."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import quad
from scipy.special import gammaln

from pipeline.stats import sequential as seq

ALPHA = 0.01
LOG = -np.log(ALPHA)


def first(paths, limit=LOG):
    """[R] presentations until the limit is reached, infinity where it never is."""
    hit = paths >= limit
    return np.where(hit.any(1), hit.argmax(1) + 1, np.inf)


def at_most(alpha, runs):
    """The highest share that ``runs`` runs of a rate of ``alpha`` show: four standard errors more."""
    return alpha + 4 * np.sqrt(alpha * (1 - alpha) / runs)


@pytest.mark.parametrize("null", [0.02, 0.07, 0.5])
def test_a_rate_at_its_null_is_rejected_by_alpha_at_most(null):
    rng = np.random.default_rng(1)
    errors = np.cumsum(rng.random((2000, 300)) < null, axis=1)
    assert (first(seq.bernoulli_e(errors, np.arange(1, 301), null)) < np.inf).mean() <= at_most(ALPHA, 2000)


def test_a_rate_that_changes_below_its_null_is_not_rejected_more_often():
    rng = np.random.default_rng(2)
    rate = np.where(np.arange(300) % 100 < 50, 0.001, 0.02)
    errors = np.cumsum(rng.random((2000, 300)) < rate, axis=1)
    assert (first(seq.bernoulli_e(errors, np.arange(1, 301), 0.02)) < np.inf).mean() <= ALPHA


def test_two_to_ten_percent_is_seen_as_fast_as_promised():
    rng = np.random.default_rng(3)
    errors = np.cumsum(rng.random((3000, 300)) < 0.1, axis=1)
    found = first(seq.bernoulli_e(errors, np.arange(1, 301), 0.02))
    assert np.median(found) <= 72
    assert np.quantile(found, 0.95) <= 199


def test_pairs_without_a_direction_are_rejected_by_alpha_at_most():
    rng = np.random.default_rng(4)
    worse = np.cumsum(rng.random((3000, 300)) < 0.5, axis=1)
    paths = seq.paired_e(worse, np.arange(1, 301) - worse)
    assert (first(paths) < np.inf).mean() <= at_most(ALPHA, 3000)


def test_a_clear_direction_is_found_within_a_few_pairs():
    rng = np.random.default_rng(5)
    worse = np.cumsum(rng.random((3000, 200)) < 0.85, axis=1)
    assert np.median(first(seq.paired_e(worse, np.arange(1, 201) - worse))) <= 25


def test_healthy_waves_whose_sites_move_together_are_stopped_by_alpha_at_most():
    """The merged e-value of 20 sites that all see the same presentations half of the time."""
    rng = np.random.default_rng(6)
    own, same = rng.random((500, 20, 300)), rng.random((500, 1, 300))
    errors = np.cumsum(np.where(rng.random((500, 1, 300)) < 0.5, same, own) < 0.02, axis=2)
    merged = seq.merge(seq.bernoulli_e(errors, np.arange(1, 301), 0.02), axis=1)
    assert (first(merged) < np.inf).mean() <= at_most(ALPHA, 500)


def test_few_bad_sites_stop_a_wave():
    rng = np.random.default_rng(7)
    rate = np.where(np.arange(100) < 5, 0.1, 0.02)[:, None]
    errors = np.cumsum(rng.random((100, 100, 150)) < rate, axis=2)
    found = first(seq.merge(seq.bernoulli_e(errors, np.arange(1, 151), 0.02), axis=1))
    assert np.median(found) <= 75
    assert (found < np.inf).mean() >= 0.95


@pytest.mark.parametrize("p", [0.002, 0.02, 0.3, 0.9])
def test_bernoulli_bounds_cover_at_every_look(p):
    rng = np.random.default_rng(8)
    looks = np.array([1, 2, 3, 5, 10, 20, 50, 100, 200, 400])
    errors = np.cumsum(rng.random((1000, 400)) < p, axis=1)[:, looks - 1]
    lower, upper = seq.bernoulli_cs(errors, looks, 0.05)
    assert (lower > p).any(1).mean() <= at_most(0.05, 1000)
    assert (upper < p).any(1).mean() <= at_most(0.05, 1000)


def test_bernoulli_bounds_agree_with_the_e_process_and_become_narrow():
    lower, upper = seq.bernoulli_cs([12, 200, 0, 40], [100, 10_000, 40, 40], 0.01)
    assert lower[:2] == pytest.approx([0.0384, 0.0149], abs=1e-3)
    assert upper[1] - lower[1] < 0.012
    assert lower[2] == 0
    assert upper[3] == 1
    assert seq.bernoulli_e(12, 100, lower[0] * 0.999) >= LOG > seq.bernoulli_e(12, 100, lower[0] * 1.001)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, shape: rng.random(shape),
        lambda rng, shape: (rng.random(shape) < 0.1).astype(float),
        lambda rng, shape: rng.beta(0.5, 20, shape),
    ],
)
def test_mean_bounds_cover_at_every_step_and_become_narrow(draw):
    rng = np.random.default_rng(9)
    x = draw(rng, (2000, 1000))
    mean = x.mean()  # two million draws: nearer to the truth than any bound
    lower, upper = seq.mean_cs(x, 0.05)
    assert ((lower > mean) | (upper < mean)).any(1).mean() <= 0.05
    assert np.median(upper[:, -1] - lower[:, -1]) < 0.1


def test_exchangeable_scores_are_no_drift():
    rng = np.random.default_rng(10)
    u = np.stack([seq.conformal(rng.beta(2, 5, 60), rng.beta(2, 5, 150)) for _ in range(1500)])
    assert (seq.drift(u)[1][:, -1] >= LOG).mean() <= ALPHA
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.01


def test_scores_with_ties_are_no_drift():
    rng = np.random.default_rng(11)
    u = np.stack([seq.conformal(rng.integers(0, 4, 60), rng.integers(0, 4, 150)) for _ in range(1500)])
    assert (seq.drift(u)[1][:, -1] >= LOG).mean() <= at_most(ALPHA, 1500)


@pytest.mark.parametrize("shift", [lambda x: x + 0.8, lambda x: x - 0.8, lambda x: 3 * x, lambda x: x / 3])
def test_a_move_or_another_spread_is_drift(shift):
    rng = np.random.default_rng(12)
    u = np.stack([seq.conformal(rng.normal(size=500), shift(rng.normal(size=200))) for _ in range(100)])
    assert (seq.drift(u)[1][:, -1] >= LOG).mean() >= 0.9


def test_the_hours_of_the_day_are_no_ratchet():
    """1,000 sites accept 90 % by day and 40 % by night for a baseline of two weeks, then for two more."""
    rng = np.random.default_rng(13)
    rate = np.where((np.arange(24) > 7) & (np.arange(24) < 20), 0.9, 0.4)
    found: list[float] = []
    for _ in range(1000):
        seen = rng.binomial(20, rate)
        hour = np.sort(rng.integers(0, 24, 300))
        path, top = seq.ratchet(
            rng.random(300) < rate[hour], hour, np.stack([np.full(24, 20), seen], axis=1), 0.5
        )
        assert top[-1] >= path.max()
        found.append(top[-1])
    assert np.mean(np.array(found) >= LOG) <= ALPHA


def test_a_rising_accept_rate_is_a_ratchet_and_a_falling_one_is_not():
    rng = np.random.default_rng(14)
    hour, baseline = rng.integers(0, 24, 400), np.tile([200.0, 140.0], (24, 1))
    assert seq.ratchet(rng.random(400) < 0.95, hour, baseline, 0.5)[1][-1] > LOG
    assert seq.ratchet(rng.random(400) < 0.3, hour, baseline, 0.5)[1][-1] < 1


def test_hours_without_a_baseline_are_as_the_others():
    baseline = np.zeros((24, 2))
    assert (seq.allowed_rates(baseline, 0.5) > 0.6).all()  # nothing is known: nearly everything is allowed
    baseline[8:18] = [100, 50]
    limit = seq.allowed_rates(baseline, 0.5)
    assert limit[3] == pytest.approx(0.75, abs=0.05)
    assert 0.6 < limit[10] < limit[3]


@pytest.mark.slow
def test_e_bh_keeps_its_rate_under_dependence():
    """200 hypotheses that share one factor, 20 of them false."""
    rng = np.random.default_rng(15)
    false, share, power = np.arange(200) < 20, [], []
    for _ in range(2000):
        z = np.sqrt(0.6) * rng.normal() + np.sqrt(0.4) * rng.normal(size=200) + np.where(false, 4.0, 0.0)
        found = seq.e_bh(3 * z - 4.5, 0.05)  # the likelihood ratio of a mean of 3
        share.append(float((~false[found]).mean()) if len(found) else 0.0)
        power.append(false[found].sum() / 20)
    assert np.mean(share) <= 0.05
    assert np.mean(power) > 0.3


def test_e_bh_by_hand():
    assert seq.e_bh(np.log([100.0, 1.0, 30.0, 0.1]), 0.05).tolist() == [0]  # needs 80, 40, 26.7, 20
    assert seq.e_bh(np.log([100.0, 1.0, 41.0, 0.1]), 0.05).tolist() == [0, 2]
    assert seq.e_bh([], 0.05).tolist() == []
    assert seq.e_bh([np.log(19)], 0.05).tolist() == []


def test_the_paired_formula_is_the_one_of_the_guards():
    for worse, better in ((0, 0), (5, 1), (2, 9), (40, 3)):
        t = worse + better
        area = quad(lambda q, w=worse, b=better: q**w * (1 - q) ** b, 0.5, 1)[0]
        assert seq.paired_e(worse, better) == pytest.approx(np.log(area / 0.5 ** (t + 1)))
    assert seq.paired_e(0, 5000) == pytest.approx(-np.log(5001))
    assert np.isfinite(seq.paired_e(1, 10**6))


counts = st.integers(0, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
nulls = st.floats(0.001, 0.95)


@given(counts, nulls, nulls)
def test_more_errors_say_more_and_a_higher_null_less(pair, a, b):
    errors, n = pair
    low, high = sorted((a, b))
    assert seq.bernoulli_e(errors, n, low) >= seq.bernoulli_e(errors, n, high) - 1e-9
    assert seq.bernoulli_e(errors + 1, n + 1, a) > seq.bernoulli_e(errors, n + 1, a)
    assert seq.bernoulli_e(0, 0, a) == pytest.approx(0)
    assert seq.bernoulli_e(0, n, a) <= 1e-12


@given(st.integers(0, 500), st.integers(0, 500))
def test_pairs_weigh_against_each_other(worse, better):
    here = seq.paired_e(worse, better)
    assert seq.paired_e(worse + 1, better) > here
    assert seq.paired_e(worse, better + 1) < here
    assert seq.paired_e(0, 0) == pytest.approx(0)


@given(counts, st.integers(1, 40), st.floats(0.001, 0.2))
def test_an_e_value_has_mean_one_at_its_null(pair, n, null):
    """Exactly, over all outcomes of n presentations."""
    k = np.arange(n + 1)
    weight = np.exp(
        gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + k * np.log(null) + (n - k) * np.log1p(-null)
    )
    assert np.sum(weight * np.exp(seq.bernoulli_e(k, n, null))) == pytest.approx(1, rel=1e-6)
    half = weight_of(n)
    assert np.sum(half * np.exp(seq.paired_e(k, n - k))) == pytest.approx(1, rel=1e-6)
    errors, m = pair
    lower, upper = seq.bernoulli_cs(errors, m, 0.05)
    assert 0 <= lower <= upper <= 1
    assert lower <= (errors / m if m else 0) <= upper + 1e-12


def weight_of(n):
    return np.exp(
        gammaln(n + 1) - gammaln(np.arange(n + 1) + 1) - gammaln(n - np.arange(n + 1) + 1) - n * np.log(2)
    )


@settings(max_examples=50)
@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(-700, 700)), st.floats(0.01, 0.5))
def test_merging_and_e_bh_do_not_ask_for_order(log_e, fdr):
    order = np.random.default_rng(0).permutation(len(log_e))
    assert seq.merge(log_e[order]) == pytest.approx(seq.merge(log_e))
    assert log_e.mean() - 1e-9 <= seq.merge(log_e) <= log_e.max() + 1e-9
    chosen = seq.e_bh(log_e, fdr)
    assert sorted(log_e[order][seq.e_bh(log_e[order], fdr)]) == sorted(log_e[chosen])
    assert (log_e[chosen] >= np.log(1 / fdr) - 1e-9).all()
    if len(chosen):
        assert log_e[chosen].min() >= np.delete(log_e, chosen).max(initial=-np.inf)


@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1)))
def test_mean_bounds_narrow_and_drift_starts_at_one(x):
    lower, upper = seq.mean_cs(x, 0.05)
    assert (np.diff(lower) >= 0).all() and (np.diff(upper) <= 0).all()
    again = seq.drift(x)
    assert np.array_equal(again, seq.drift(x.copy()))
    assert (again[1] >= np.maximum(again[0], 0) - 1e-12).all()
    assert seq.drift(np.full(1, 0.5))[0][0] == pytest.approx(np.log1p(0), abs=0.2)


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_two_groups_of_one_rate_are_told_apart_by_alpha_at_most(rate):
    rng = np.random.default_rng(16)
    t = np.arange(1, 301)
    a, b = (np.cumsum(rng.random((1000, 300)) < rate, axis=1) for _ in range(2))
    assert (first(seq.two_sample_e(a, t, b, t)) < np.inf).mean() <= at_most(ALPHA, 1000)
    worse = np.cumsum(rng.random((200, 300)) < rate + 0.3, axis=1)
    assert (first(seq.two_sample_e(worse, t, b[:200], t)) < np.inf).mean() > 0.95
    assert (seq.two_sample_e(b[:200], t, worse, t) < LOG).all()


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="errors <= n"):
        seq.bernoulli_e(3, 2, 0.1)
    with pytest.raises(ValueError, match="null in"):
        seq.bernoulli_e(1, 2, 0)
    with pytest.raises(ValueError, match="discordant"):
        seq.paired_e(-1, 2)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        seq.mean_cs([1.5], 0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        seq.drift([-0.1])
    with pytest.raises(ValueError, match="24"):
        seq.ratchet([1], [3], np.zeros((23, 2)), 0.5)
    with pytest.raises(ValueError, match="at least one"):
        seq.merge([])
