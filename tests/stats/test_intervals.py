"""Bootstrap draws against the plain way of drawing them, and what their intervals must be worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from pipeline.stats import intervals, metrics
from pipeline.stats.intervals import Calls


def target(rng, *, subjects=40, frames=4, runs=3, bona_fide=0.1, attack=0.2, spread=0.0, seeds=0.02) -> Calls:
    """Half of the videos are attacks; ``spread`` makes whole videos hard together, ``seeds`` whole runs."""
    label = np.tile(np.repeat([1, 0], frames), subjects)
    subject = np.repeat([f"s{i:03d}" for i in range(subjects)], 2 * frames)
    rate = np.where(label, bona_fide, attack) + np.repeat(rng.normal(0, spread, 2 * subjects), frames)
    return Calls(rng.random(len(label)) < rate + rng.normal(0, seeds, runs)[:, None], label, subject)


def width(x) -> float:
    return x[-1] - x[-2]


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 9))
def test_weights_are_draws_of_whole_clusters(seed, clusters, samples):
    got = intervals.cluster_weights(clusters, samples, np.random.default_rng(seed))
    assert got.shape == (samples, clusters)
    assert (got.sum(axis=1) == clusters).all()
    picks = np.random.default_rng(seed).integers(clusters, size=(samples, clusters))
    assert (got == [np.bincount(p, minlength=clusters) for p in picks]).all()


@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 3))
def test_mean_hter_is_the_plain_mean(seed, runs, targets):
    rng = np.random.default_rng(seed)
    every = [target(rng, subjects=3 + i, runs=runs) for i in range(targets)]
    plain = [[1 - balanced_accuracy_score(c.label, c.label ^ w) for w in c.wrong] for c in every]
    got = intervals.mean_hter(every, samples=50)
    assert got.value == pytest.approx(np.mean([np.mean(p) for p in plain]))
    assert got.low <= got.high


def test_draws_are_those_of_concatenated_clusters():
    rng = np.random.default_rng(4)
    c = target(rng, subjects=8, runs=1, spread=0.2)
    weights = intervals.cluster_weights(8, 30, np.random.default_rng(0))
    members = [np.flatnonzero(c.cluster == name) for name in np.unique(c.cluster)]
    drawn = [np.concatenate([members[g] for g in range(8) for _ in range(int(w[g]))]) for w in weights]
    plain = [1 - balanced_accuracy_score(c.label[i], (c.label ^ c.wrong[0])[i]) for i in drawn]
    got = intervals.hter_interval(c, samples=30)
    assert got == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])))
    score = np.round(rng.random(len(c.label)) + 0.3 * c.label, 1)  # ties
    plain = [roc_auc_score(c.label[i], score[i]) for i in drawn]
    assert intervals.auc_interval(score, c.label, c.cluster, samples=30) == pytest.approx(
        tuple(np.quantile(plain, [0.025, 0.975]))
    )


def test_auc_interval_does_not_depend_on_how_draws_are_split(monkeypatch):
    rng = np.random.default_rng(0)
    c, score = target(rng), rng.random(320)
    whole = intervals.auc_interval(score, c.label, c.cluster, samples=64)
    monkeypatch.setattr(intervals, "MAX_WEIGHTS", 1000)
    assert intervals.auc_interval(score, c.label, c.cluster, samples=64) == whole
    assert all(
        map(math.isnan, intervals.auc_interval(np.where(score > 0.9, np.nan, score), c.label, c.cluster))
    )


def test_copies_of_frames_add_no_certainty():
    rng = np.random.default_rng(1)
    one = target(rng, frames=1, runs=1)
    many = Calls(np.repeat(one.wrong, 9, axis=1), np.repeat(one.label, 9), np.repeat(one.cluster, 9))
    assert intervals.mean_hter([many]) == pytest.approx(intervals.mean_hter([one]))
    naive = many._replace(cluster=np.arange(len(many.label)))
    assert width(intervals.mean_hter([many])) > 2 * width(intervals.mean_hter([naive]))


@pytest.mark.parametrize("seeds", [0.0, 0.06])
def test_intervals_cover_the_truth_as_often_as_they_say(seeds):
    rng = np.random.default_rng(2)
    held = 0
    for i in range(200):
        every = [target(rng, frames=3, bona_fide=0.3, attack=0.4, spread=0.12, seeds=seeds) for _ in range(2)]
        got = intervals.mean_hter(every, samples=200, seed=i)
        held += got.low <= 0.35 <= got.high
    assert 0.89 <= held / 200 <= 0.99


def test_seeds_that_disagree_widen_the_interval():
    rng = np.random.default_rng(3)
    c = target(rng, subjects=200, runs=3)
    level = np.array([0.05, 0.15, 0.30])[:, None]  # the same samples, three very different trainings
    apart = c._replace(wrong=rng.random(c.wrong.shape) < level)
    half = width(intervals.mean_hter([apart])) / 2
    assert half > width(intervals.mean_hter([c]))
    assert half == pytest.approx(1.96 * np.std(level, ddof=1) / math.sqrt(3), rel=0.35)


def test_one_seed_fewer_is_drawn_than_there_are():
    only = Calls(
        np.repeat([[False], [False], [False], [True]], 2, axis=1), np.array([0, 1]), np.array(["s", "s"])
    )
    assert intervals.mean_hter([only]) == pytest.approx((1 / 4, 0, 2 / 3))  # of three draws, not of four


def test_paired_interval_of_correlated_methods_is_narrower():
    rng = np.random.default_rng(5)
    worse = [target(rng, spread=0.15, attack=0.4, bona_fide=0.3) for _ in range(3)]
    better = [
        c._replace(wrong=c.wrong & (rng.random(c.wrong.shape) < 0.8)) for c in worse
    ]  # mends a fifth of the errors
    got = intervals.paired_bootstrap(better, worse)
    a, b = intervals.mean_hter(better), intervals.mean_hter(worse)
    assert got.difference.value == pytest.approx(a.value - b.value)
    assert got.relative.value == pytest.approx(1 - a.value / b.value)
    assert width(got.difference) < 0.6 * math.hypot(width(a), width(b))
    assert got.difference.low <= got.difference.value <= got.difference.high < 0
    assert 0.12 < got.relative.low < 0.2 < got.relative.high < 0.28


@given(st.integers(0, 99))
def test_pairing_is_antisymmetric_and_zero_against_itself(seed):
    rng = np.random.default_rng(seed)
    a = [target(rng, subjects=6), target(rng, subjects=9)]
    b = [c._replace(wrong=rng.permuted(c.wrong, axis=1)) for c in a]
    ab, ba = (intervals.paired_bootstrap(x, y, samples=60).difference for x, y in ((a, b), (b, a)))
    assert ab == pytest.approx((-ba.value, -ba.high, -ba.low))
    assert intervals.paired_bootstrap(a, a, samples=60).difference == pytest.approx((0, 0, 0))


def test_calls_are_those_of_the_metrics():
    score = np.array([[0.5, 0.4, 0.9, math.nan], [0.5, 0.4, 0.9, 0.1]])
    label = [1, 1, 0, 1]
    made = intervals.calls(score, label, list("aabb"), [0.5, 0.3])
    assert made.wrong.tolist() == [[False, True, True, True], [False, False, True, True]]
    plain = [metrics.hter(s, label, t) for s, t in zip(score, (0.5, 0.3), strict=True)]
    assert intervals.mean_hter([made], samples=20).value == pytest.approx(np.mean(plain))


def test_unknown_stays_unknown():
    one = Calls(np.zeros((1, 4), bool), np.ones(4, np.int64), np.arange(4))  # no attack
    assert all(map(math.isnan, intervals.mean_hter([one], samples=20)))
    never = target(np.random.default_rng(0), bona_fide=-1, attack=-1)  # B without error: no share of it
    got = intervals.paired_bootstrap([never], [never], samples=20)
    assert got.difference == (0, 0, 0)
    assert all(map(math.isnan, got.relative))


GOOD = target(np.random.default_rng(0))


@pytest.mark.parametrize(
    "a, b, message",
    [
        ([GOOD], [], "the same targets"),
        ([], [], "at least one"),
        ([GOOD], [target(np.random.default_rng(0), runs=2)], "as many seeds"),
        ([GOOD], [GOOD._replace(cluster=GOOD.cluster[::-1])], "same samples"),
        ([GOOD], [GOOD._replace(label=1 - GOOD.label)], "same samples"),
        ([GOOD._replace(label=GOOD.label[1:])], [GOOD], "shapes"),
        ([GOOD._replace(wrong=GOOD.wrong[0])], [GOOD], "shapes"),
        ([GOOD._replace(wrong=GOOD.wrong[:0])], [GOOD], "runs x samples"),
        ([GOOD._replace(label=GOOD.label - 1)], [GOOD], "leave unknown samples out"),
    ],
)
def test_mistakes_are_named(a, b, message):
    with pytest.raises(metrics.MetricError, match=message):
        intervals.paired_bootstrap(a, b)
