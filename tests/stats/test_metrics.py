"""Rates, thresholds and curves against scikit-learn, scipy and hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, norm
from sklearn.metrics import balanced_accuracy_score, det_curve, roc_auc_score, roc_curve

from pipeline.stats import metrics

grid = st.integers(0, 12).map(lambda i: i / 12)  # few values, so that ties are common


@st.composite
def scored(draw):
    real = draw(st.lists(grid, min_size=1, max_size=30))
    attack = draw(st.lists(grid, min_size=1, max_size=30))
    return np.array(real + attack), np.array([1] * len(real) + [0] * len(attack))


@given(scored())
def test_auc_and_det_agree_with_sklearn(data):
    score, label = data
    assert metrics.auc(score, label) == pytest.approx(roc_auc_score(label, score))
    fpr, tpr, threshold = roc_curve(label, score, drop_intermediate=False)
    det = metrics.det_curve(score, label)
    assert det.threshold[:-1] == pytest.approx(threshold[1:][::-1])
    assert det.far[::-1] == pytest.approx(fpr)
    assert 1 - det.frr[::-1] == pytest.approx(tpr)
    for limit in (0.0, 0.1, 0.5):
        assert metrics.tpr_at_fpr(score, label, limit) == pytest.approx(tpr[fpr <= limit].max())


@given(scored())
def test_eer_threshold_balances_the_errors_best(data):
    score, label = data
    t = metrics.eer_threshold(score, label)
    far, frr = metrics.far_frr(score, label, t)
    det = metrics.det_curve(score, label)
    assert abs(far - frr) == pytest.approx(np.abs(det.far - det.frr).min())
    assert (
        metrics.eer(score, label)
        == pytest.approx((far + frr) / 2)
        == pytest.approx(metrics.hter(score, label, t))
    )
    if len(np.unique(score)) > 1:  # not decided by rounding
        assert metrics.far_frr(score.astype(np.float32), label, t) == (far, frr)
    else:  # no lower score to keep away from: the threshold is the score itself and accepts everything
        assert (t, far, frr) == (score[0], 1, 0)


def smoothed_hter(logit, label, domain, at, spread):
    def accepted(of):
        each = [norm.sf(at, loc=logit[of & (domain == d)], scale=spread).mean() for d in set(domain[of])]
        return np.mean(each)

    return (accepted(label == 0) + 1 - accepted(label == 1)) / 2


@given(scored(), st.integers(1, 3), st.sampled_from([0.1, 0.5, 2.0]), st.randoms(use_true_random=False))
def test_transfer_threshold_is_the_best_for_domains_whose_scores_lie_elsewhere(data, domains, spread, random):
    logit, label = 6 * data[0] - 3, data[1]
    domain = np.array([random.randrange(domains) for _ in label])
    t = metrics.transfer_threshold(logit, label, domain, spread=spread)
    ours = smoothed_hter(logit, label, domain, t, spread)
    grid = np.linspace(logit.min(), logit.max(), 101)
    assert ours <= min(smoothed_hter(logit, label, domain, at, spread) for at in grid) + 1e-3
    shifted = metrics.transfer_threshold(logit + 5, label, domain, spread=spread)
    assert shifted == pytest.approx(t + 5, abs=1e-6)
    twice = np.concatenate([np.arange(len(label)), np.flatnonzero(domain == domain[0])])  # it weighs no more
    again = metrics.transfer_threshold(logit[twice], label[twice], domain[twice], spread=spread)
    assert again == pytest.approx(t)


def test_transfer_threshold_lies_in_the_middle_of_a_gap():
    logit, label = np.array([-9.0, -8.0, 8.0, 9.0]), np.array([0, 0, 1, 1])
    assert metrics.transfer_threshold(logit, label, ["a"] * 4) == pytest.approx(0, abs=1e-6)
    with pytest.raises(metrics.MetricError, match="one per sample"):
        metrics.transfer_threshold(logit, label, ["a"])


@given(scored(), st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.5, 1.0]))
def test_apcer_threshold_is_the_lowest_that_holds_for_every_species(data, limit):
    score, label = data
    pai = ["bona_fide" if y else "ab"[i % 2] for i, y in enumerate(label)]
    t = metrics.apcer_threshold(score, label, pai, limit)
    worst = metrics.max_apcer(metrics.apcer_by_species(score, label, pai, t))[1]
    assert worst <= limit + 1e-12
    below = score[score < t]
    if len(below):  # the next lower call would exceed the limit
        assert metrics.max_apcer(metrics.apcer_by_species(score, label, pai, below.max()))[1] > limit


@given(st.integers(0, 200), st.integers(0, 200))
def test_clopper_pearson_is_the_beta_quantile(k, more):
    n = k + more
    lower, upper = metrics.clopper_pearson(k, n)
    assert upper == pytest.approx(beta.ppf(0.95, k + 1, n - k) if k < n else 1.0)
    assert lower == pytest.approx(beta.ppf(0.05, k, n - k + 1) if k else 0.0)


@pytest.mark.parametrize(
    "errors, n, upper", [(0, 150, 0.0198), (1, 150, 0.0312), (0, 300, 0.0099), (1, 300, 0.0157)]
)
def test_clopper_pearson_sizes_of_the_guards(errors, n, upper):
    assert metrics.rate(errors, n).upper95 == pytest.approx(upper, abs=5e-5)


def test_apcer_is_per_species_and_its_worst():
    score = [0.9, 0.2, 0.9, 0.1, 0.1, 0.1, 0.9]
    label = [0, 0, 0, 0, 0, 0, 1]
    pai = ["mask", "mask", "print", "print", "print", "print", "bona_fide"]
    found = metrics.apcer_by_species(score, label, pai, 0.5)
    assert {k: (r.errors, r.n) for k, r in found.items()} == {"mask": (1, 2), "print": (1, 4)}
    assert metrics.max_apcer(found) == ("mask", 0.5)
    assert metrics.far_frr(score, label, 0.5) == (pytest.approx(2 / 6), 0.0)


def test_score_at_the_threshold_is_bona_fide_and_nan_is_attack():
    assert metrics.bpcer([0.5, 0.499, math.nan], [1, 1, 1], 0.5)[:2] == (2, 3)
    assert metrics.apcer_by_species([0.5, math.nan], [0, 0], ["a", "a"], 0.5)["a"].errors == 1


def test_small_species_are_merged_and_named():
    pai = ["a"] * 40 + ["b"] * 3 + ["c"] * 2 + ["bona_fide"] * 5
    names, merged = metrics.merge_small(pai, [0] * 45 + [1] * 5)
    assert merged == ("b", "c")
    assert list(names[40:]) == ["other"] * 5 + ["bona_fide"] * 5


def test_report_of_a_known_case():
    rng = np.random.default_rng(0)
    label = np.repeat([1, 0], [200, 160])
    score = np.clip(rng.normal(np.where(label, 0.7, 0.3), 0.15), 0, 1)
    pai = np.array(["bona_fide"] * 200 + ["print"] * 100 + ["mask"] * 50 + ["rare"] * 10)
    video = [f"v{i // 10}" for i in range(360)]
    got = metrics.report(score, label, pai, 0.5, groups=video)
    assert set(got.species) == {"print", "mask", "other"}
    assert got.merged == ("rare",)
    assert got.max_apcer == max(r.rate for r in got.species.values())
    assert got.bpcer == got.bona_fide.errors / 200
    assert got.auc == pytest.approx(roc_auc_score(label, score))
    assert got.hter_interval is not None
    assert got.hter_interval.low <= got.hter <= got.hter_interval.high
    assert got.bpcer10_oracle <= got.bpcer20_oracle <= got.bpcer100_oracle
    assert got == metrics.report(score, label, pai, 0.5, groups=video)  # seeded


def test_report_of_one_class_is_nan_where_undefined():
    got = metrics.report([0.9, 0.1], [1, 1], ["bona_fide"] * 2, 0.5)
    assert got.bpcer == 0.5
    assert math.isnan(got.auc)
    assert math.isnan(got.hter)
    assert math.isnan(got.max_apcer)
    assert got.worst_species == ""


@given(scored(), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_hter_and_det_agree_with_sklearn(data, threshold):
    score, label = data
    assert metrics.hter(score, label, threshold) == pytest.approx(
        1 - balanced_accuracy_score(label, score >= threshold)
    )
    far, frr, at = det_curve(label, score)  # sklearn leaves out what is not on the hull of the steps
    ours = metrics.det_curve(score, label)
    known = {t: (a, r) for t, a, r in zip(*ours, strict=True)}
    for t, a, r in zip(at, far, frr, strict=True):
        if t in known:
            assert known[t] == pytest.approx((a, r))


@given(scored(), scored(), st.sampled_from([0.01, 0.05, 0.1, 0.5]))
def test_bpcer_at_dev_chooses_nothing_on_what_it_measures(data, dev, limit):
    score, label = data
    dev_score, dev_label = dev
    pai = ["bona_fide" if y else "ab"[i % 2] for i, y in enumerate(dev_label)]
    got = metrics.bpcer_at_dev(score, label, dev_score, dev_label, pai, limit)
    t = metrics.apcer_threshold(dev_score, dev_label, pai, limit)
    assert got == np.mean(score[label == 1] < t)
    kept = label == 1  # the attacks of the measured data have no say
    assert metrics.bpcer_at_dev(score[kept], label[kept], dev_score, dev_label, pai, limit) == got
    own = metrics.bpcer_at_dev(dev_score, dev_label, dev_score, dev_label, pai, limit)
    assert own == metrics.bpcer_at_apcer(dev_score, dev_label, pai, limit)


def test_bpcer_at_dev_is_unknown_without_development_attacks():
    assert math.isnan(metrics.bpcer_at_dev([0.5], [1], [0.5], [1], ["bona_fide"], 0.05))


def test_report_merges_rare_species_of_the_development_set():
    label = np.repeat([1, 0], [100, 100])
    score = np.linspace(1, 0, 200)
    pai = ["bona_fide"] * 100 + ["print"] * 99 + ["rare"]
    dev = metrics.Dev(
        np.where(np.arange(200) == 199, 0.9, score), label, pai
    )  # one rare attack that scores high
    got = metrics.report(score, label, pai, 0.5, dev=dev, min_species=30)
    alone = metrics.report(score, label, pai, 0.5, dev=dev, min_species=1)
    assert got.bpcer10 == alone.bpcer10 > got.bpcer10_oracle  # a species of one still counts, as "other"
    many = metrics.report(score, label, pai, 0.5, dev=dev._replace(pai=["bona_fide"] * 100 + ["print"] * 100))
    assert many.bpcer10 < got.bpcer10
    assert many.bpcer10 <= many.bpcer20 <= many.bpcer100
    assert math.isnan(metrics.report(score, label, pai, 0.5).bpcer20)


@pytest.mark.parametrize(
    "score, label, message",
    [
        ([0.1, 0.2], [1], "equally long"),
        ([0.1, 0.2], [1, -1], "leave unknown samples out"),
        ([0.1, 0.2], [1, 1], "both classes"),
        ([math.nan, 0.2], [1, 0], "finite"),
    ],
)
def test_mistakes_are_named(score, label, message):
    with pytest.raises(metrics.MetricError, match=message):
        metrics.eer_threshold(score, label)
