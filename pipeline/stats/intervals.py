"""Computes bootstrap intervals of error rates over clusters of samples and over training seeds.

Frames of one video and videos of one subject are not independent, so the bootstrap draws whole clusters. A
draw is a row of weights (how often each cluster was drawn), and a rate is the ratio of two weighted sums of
counts per cluster, so thousands of draws cost one matrix product. All intervals are 95 % percentile
intervals; draws that lack a class are left out. Drawing clusters and seeds together makes the interval too
wide rather than too narrow where runs disagree sample by sample (Owen, Ann. Appl. Stat. 2007).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

DRAWS = 2000
MAX_WEIGHTS = 2**21  # weights in memory at once where every sample needs one of its own


class MetricError(PalisadeError, ValueError):
    """Arrays from which the requested number cannot be computed; the message is one line."""


class Interval(NamedTuple):
    """A 95 % percentile bootstrap interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A number with its 95 % interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


class Calls(NamedTuple):
    """The calls of one method on one target domain: R runs (one per seed) over the same n samples."""

    wrong: NDArray[np.bool_]  # [R, n] True where the sample was called the other class
    label: NDArray[np.int64]  # [n] 1 bona fide, 0 attack
    cluster: NDArray[np.generic]  # [n] subject, with all its videos and their frames


class Paired(NamedTuple):
    """Difference between the mean HTER of methods A and B on the same samples."""

    difference: Estimate  # A - B; negative where A errs less
    relative: Estimate  # 1 - A / B, the share of B's error that A avoids


def calls(score: ArrayLike, label: ArrayLike, cluster: ArrayLike, threshold: ArrayLike) -> Calls:
    """Returns the calls of ``score`` [R, n] (or [n]) at ``threshold`` [R]; a NaN score is called an attack.

    Each run's threshold comes from other data. Raises MetricError where the shapes or the labels do not fit.
    """
    s, y = np.atleast_2d(np.asarray(score, np.float64)), np.asarray(label, np.int64)
    t = np.broadcast_to(np.asarray(threshold, np.float64), len(s))
    result = Calls((s >= t[:, None]) != (y == 1), y, np.asarray(cluster))
    _check(result)
    return result


def mean_hter(targets: Sequence[Calls], *, samples: int = DRAWS, seed: int = 0) -> Estimate:
    """Returns the HTER of one method: the mean over ``targets`` of the mean over their runs."""
    values, draws = _hters([targets], samples, seed)
    return _estimate(float(values[0]), draws[0])


def paired_bootstrap(
    a: Sequence[Calls], b: Sequence[Calls], *, samples: int = DRAWS, seed: int = 0
) -> Paired:
    """Compares the mean HTER of method ``a`` with that of ``b`` on the same targets, samples and seeds.

    Every draw takes the same clusters and the same runs for both, so difficulty that both share cancels out.
    Raises MetricError where the targets differ.
    """
    values, draws = _hters([a, b], samples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Paired(
            _estimate(float(values[0] - values[1]), draws[0] - draws[1]),
            _estimate(float(1 - values[0] / values[1]), 1 - draws[0] / draws[1]),
        )


def hter_interval(calls: Calls, *, samples: int = DRAWS, seed: int = 0) -> Interval:
    """Returns the interval of the HTER on one target."""
    return Interval(*mean_hter([calls], samples=samples, seed=seed)[1:])


def auc_interval(
    score: ArrayLike, label: ArrayLike, cluster: ArrayLike, *, samples: int = DRAWS, seed: int = 0
) -> Interval:
    """Returns the interval of the area under the ROC curve, ties counted half; NaN if any score is NaN."""
    s, y = np.asarray(score, np.float64), np.asarray(label, np.int64)
    if np.isnan(s).any():
        return Interval(float("nan"), float("nan"))
    _, index = np.unique(np.asarray(cluster), return_inverse=True)
    order = np.argsort(s)
    starts = np.unique(s[order], return_index=True)[1]  # of each distinct score
    real, index = (y == 1)[order], index[order]
    weights = cluster_weights(int(index.max()) + 1, samples, np.random.default_rng(seed))
    draws: list[Floats] = []
    for part in np.array_split(weights, max(1, samples * len(s) // MAX_WEIGHTS)):
        drawn = part[:, index]
        good = np.add.reduceat(drawn * real, starts, axis=1)  # [draws, distinct scores]
        bad = np.add.reduceat(drawn * ~real, starts, axis=1)
        below = np.cumsum(bad, axis=1) - bad / 2
        with np.errstate(invalid="ignore"):
            draws.append((good * below).sum(axis=1) / (good.sum(axis=1) * bad.sum(axis=1)))
    return Interval(*_estimate(float("nan"), np.concatenate(draws))[1:])


def cluster_weights(clusters: int, samples: int, rng: np.random.Generator) -> Floats:
    """Returns [samples, clusters]: how often each cluster occurs in a draw with replacement."""
    picks = rng.integers(clusters, size=(samples, clusters)) + clusters * np.arange(samples)[:, None]
    return (
        np.bincount(picks.ravel(), minlength=samples * clusters).reshape(samples, clusters).astype(np.float64)
    )


def _hters(methods: Sequence[Sequence[Calls]], samples: int, seed: int) -> tuple[Floats, Floats]:
    """Returns the mean HTER of every method as measured [methods] and in every draw [methods, samples]."""
    rng = np.random.default_rng(seed)
    values: list[list[float]] = []
    draws: list[list[Floats]] = []
    if not methods[0] or len({len(m) for m in methods}) > 1:
        raise MetricError(
            f"every method needs the same targets, at least one; given {[len(m) for m in methods]}"
        )
    for same in zip(*methods, strict=True):
        _check(*same)
        _, index = np.unique(same[0].cluster, return_inverse=True)
        clusters, runs = int(index.max()) + 1, len(same[0].wrong)
        weights = cluster_weights(clusters, samples, rng)
        # A bootstrap over R runs underestimates their variance by (R - 1) / R, which matters at three seeds;
        # drawing R - 1 of them corrects it (Rao and Wu, JASA 1988).
        picks = rng.integers(runs, size=(samples, max(1, runs - 1)))
        values.append([float(_rates(c, index, np.ones((1, clusters))).mean()) for c in same])
        draws.append(
            [np.take_along_axis(_rates(c, index, weights), picks, axis=1).mean(axis=1) for c in same]
        )
    return np.mean(values, axis=0), np.mean(draws, axis=0)


def _rates(c: Calls, index: NDArray[np.intp], weights: Floats) -> Floats:
    """Returns [draws, R], the HTER of every run under every row of cluster ``weights``.

    NaN stands where a class was not drawn.
    """
    rates: list[Floats] = []
    for label in (0, 1):
        of_class = c.label == label
        n = np.bincount(index[of_class], minlength=weights.shape[1])
        errors = np.stack(
            [np.bincount(index[of_class], weights=w[of_class], minlength=weights.shape[1]) for w in c.wrong]
        )
        with np.errstate(invalid="ignore"):
            rates.append((weights @ errors.T) / (weights @ n)[:, None])
    return (rates[0] + rates[1]) / 2


def _estimate(value: float, draws: Floats) -> Estimate:
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) else (np.nan, np.nan)
    return Estimate(value, float(low), float(high))


def _check(first: Calls, *others: Calls) -> None:
    n = first.wrong.shape[1] if first.wrong.ndim == 2 else -1
    if not len(first.wrong) or not n or first.label.shape != (n,) or first.cluster.shape != (n,):
        raise MetricError(
            "calls: runs x samples, a label and a cluster per sample are needed; "
            f"given shapes {first.wrong.shape}, {first.label.shape} and {first.cluster.shape}"
        )
    if not np.isin(first.label, (0, 1)).all():
        raise MetricError("label: 1 (bona fide) and 0 (attack) are allowed; leave unknown samples out")
    for c in others:
        shapes = c.wrong.shape == first.wrong.shape
        if (
            not shapes
            or not np.array_equal(c.label, first.label)
            or not np.array_equal(c.cluster, first.cluster)
        ):
            raise MetricError(
                "methods are compared on the same samples and over as many seeds; "
                f"given runs x samples {first.wrong.shape} and {c.wrong.shape}"
            )
