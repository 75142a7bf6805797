"""Computes the error rates of presentation attack detection after ISO/IEC 30107-3 from arrays of scores.

A score is P(bona fide). A presentation is called bona fide iff ``score >= threshold``, so a NaN score is
called an attack. Comparisons are made in float64.

* APCER of a PAI species: share of its attack presentations that are called bona fide. Species are never
  pooled under this name; the figure of a system is its worst species.
* BPCER: share of bona fide presentations that are called attacks.
* FAR pools all attacks and serves the EER threshold and HTER only.
* BPCER10, 20, 100: BPCER at the threshold where the worst species has APCER 10, 5, 1 %. The threshold comes
  from development scores; ``*_oracle`` chooses it on the measured data itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.stats.intervals import Interval, MetricError, auc_interval, calls, hter_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]
    Names = Sequence[str] | NDArray[np.str_]

BONA_FIDE = 1
OTHER = "other"  # name of the species that were merged
HARM = 0.01  # a site is harmed where its HTER (or worst APCER) rises by more than this
MIN_SPECIES = 30  # presentations; a species with fewer says little, so such species are merged and listed
SPREAD = 1.0  # logits; how far the scores of another site lie off, when a threshold is chosen for it
ABOVE_TOP = 1e-6  # a threshold this far above the top score rejects it in float32 too


class Rate(NamedTuple):
    """Errors of n presentations with one-sided 95 % Clopper-Pearson bounds; ``rate`` is NaN when n is 0."""

    errors: int
    n: int
    rate: float
    lower95: float
    upper95: float


class Dev(NamedTuple):
    """Scores of the development set (source validation), on which thresholds may be chosen."""

    score: ArrayLike  # [n]
    label: ArrayLike  # [n]
    pai: Names  # [n]


class Det(NamedTuple):
    """Detection error trade-off by rising threshold: FAR falls from 1 to 0 while FRR rises from 0 to 1."""

    threshold: Floats
    far: Floats
    frr: Floats


@dataclass(frozen=True)
class PadReport:
    """One evaluation at a threshold from other data; ``eer`` and ``*_oracle`` choose theirs on this data."""

    threshold: float
    n_bona_fide: int
    n_attack: int
    hter: float
    auc: float
    eer: float  # oracle
    bpcer: float
    max_apcer: float
    worst_species: str
    bona_fide: Rate
    species: dict[str, Rate]
    merged: tuple[str, ...]  # species with too few presentations, counted together as "other"
    bpcer10: float  # NaN without development scores
    bpcer20: float
    bpcer100: float
    bpcer10_oracle: float
    bpcer20_oracle: float
    bpcer100_oracle: float
    tpr_at_fpr_1e2: float
    tpr_at_fpr_1e3: float
    hter_interval: Interval | None  # bootstrap over groups, 95 %
    auc_interval: Interval | None


def report(
    score: ArrayLike,
    label: ArrayLike,
    pai: Names,
    threshold: float,
    *,
    dev: Dev | None = None,
    groups: Names | None = None,
    min_species: int = MIN_SPECIES,
    samples: int = 1000,
    seed: int = 0,
) -> PadReport:
    """Returns every figure of one evaluation at ``threshold``; NaN where a missing class leaves it undefined.

    ``groups`` (video or subject per sample) adds bootstrap intervals, ``dev`` BPCER10, 20 and 100. Raises
    MetricError for shapes or labels that do not fit.
    """
    s, y = _check(score, label)
    names, merged = merge_small(pai, y, min_species)
    by_species = apcer_by_species(s, y, names, threshold)
    (worst, top), bona_fide = max_apcer(by_species), bpcer(s, y, threshold)
    hters = aucs = None
    if groups is not None and 0 < bona_fide.n < len(y):
        hters = hter_interval(calls(s, y, groups, threshold), samples=samples, seed=seed)
        aucs = auc_interval(s, y, groups, samples=samples, seed=seed)
    honest, oracle = _bpcer_at_limits(s, y, names, dev, min_species)
    return PadReport(
        threshold=float(threshold),
        n_bona_fide=bona_fide.n,
        n_attack=len(y) - bona_fide.n,
        hter=hter(s, y, threshold),
        auc=auc(s, y),
        eer=eer(s, y),
        bpcer=bona_fide.rate,
        max_apcer=top,
        worst_species=worst,
        bona_fide=bona_fide,
        species=by_species,
        merged=merged,
        bpcer10=honest[0],
        bpcer20=honest[1],
        bpcer100=honest[2],
        bpcer10_oracle=oracle[0],
        bpcer20_oracle=oracle[1],
        bpcer100_oracle=oracle[2],
        tpr_at_fpr_1e2=tpr_at_fpr(s, y, 1e-2),
        tpr_at_fpr_1e3=tpr_at_fpr(s, y, 1e-3),
        hter_interval=hters,
        auc_interval=aucs,
    )


def _bpcer_at_limits(
    s: Floats, y: NDArray[np.int64], names: NDArray[np.str_], dev: Dev | None, min_species: int
) -> tuple[list[float], list[float]]:
    """Returns BPCER10, 20 and 100 with the threshold of ``dev``, and with the threshold of these data."""
    limits = (0.1, 0.05, 0.01)
    both = len(set(y.tolist())) == 2
    oracle = [bpcer_at_apcer(s, y, names, a) if both else math.nan for a in limits]
    if dev is None:
        return [math.nan] * len(limits), oracle
    species, _ = merge_small(dev.pai, dev.label, min_species)
    return [bpcer_at_dev(s, y, dev.score, dev.label, species, a) for a in limits], oracle


def clopper_pearson(errors: ArrayLike, n: ArrayLike, *, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Returns the exact one-sided lower and upper bounds of a binomial rate, each at ``confidence``.

    The bounds are 0 and 1 where n is 0.
    """
    from scipy.special import betaincinv  # pyright: ignore  # here: too slow for readers of the configuration

    k, m = np.broadcast_arrays(np.asarray(errors, np.float64), np.asarray(n, np.float64))
    with np.errstate(invalid="ignore"):
        lower = np.where(k > 0, betaincinv(np.maximum(k, 1), m - k + 1, 1 - confidence), 0.0)
        upper = np.where(k < m, betaincinv(k + 1, np.maximum(m - k, 1), confidence), 1.0)
    return lower, upper


def rate(errors: int, n: int) -> Rate:
    """Returns ``errors`` of ``n`` as a Rate with its bounds."""
    lower, upper = clopper_pearson(errors, n)
    return Rate(int(errors), int(n), errors / n if n else math.nan, float(lower), float(upper))


def merge_small(
    pai: Names, label: ArrayLike, minimum: int = MIN_SPECIES
) -> tuple[NDArray[np.str_], tuple[str, ...]]:
    """Returns the species of each sample, small ones renamed ``other``, and the names of those merged.

    A species is small if it has fewer than ``minimum`` attack presentations.
    """
    names = np.asarray(pai, dtype=np.str_)
    y = np.asarray(label)
    if names.shape != y.shape:
        raise MetricError(f"pai: {names.shape[0]} names for {y.shape[0]} labels; one per sample is needed")
    species, count = np.unique(names[y != BONA_FIDE], return_counts=True)
    merged = tuple(str(s) for s in species[count < minimum])
    small = np.isin(names, merged) & (y != BONA_FIDE)
    return np.where(small, OTHER, names), merged


def apcer_by_species(score: ArrayLike, label: ArrayLike, pai: Names, threshold: float) -> dict[str, Rate]:
    """Returns the APCER of every PAI species among the attacks, with its bounds."""
    s, y = _check(score, label)
    names = np.asarray(pai, dtype=np.str_)
    attack = y != BONA_FIDE
    species, index = np.unique(names[attack], return_inverse=True)
    n = np.bincount(index, minlength=len(species))
    errors = np.bincount(index, weights=s[attack] >= threshold, minlength=len(species))
    return {str(name): rate(int(errors[i]), int(n[i])) for i, name in enumerate(species)}


def max_apcer(species: dict[str, Rate]) -> tuple[str, float]:
    """Returns the worst species and its APCER; ("", NaN) without attacks."""
    worst = max(species, key=lambda name: species[name].rate, default="")
    return worst, species[worst].rate if worst else math.nan


def bpcer(score: ArrayLike, label: ArrayLike, threshold: float) -> Rate:
    """Returns the share of bona fide presentations that are called attacks, with its bounds."""
    s, y = _check(score, label)
    real = s[y == BONA_FIDE]
    return rate(int(np.sum(~(real >= threshold))), len(real))


def far_frr(score: ArrayLike, label: ArrayLike, threshold: float) -> tuple[float, float]:
    """Returns FAR (share of all attacks called bona fide) and FRR (share of bona fide called attack).

    NaN where the class is missing.
    """
    s, y = _check(score, label)
    accepted = s >= threshold
    return _mean(accepted[y != BONA_FIDE]), _mean(~accepted[y == BONA_FIDE])


def hter(score: ArrayLike, label: ArrayLike, threshold: float) -> float:
    """Returns the half total error rate (FAR + FRR) / 2, attacks pooled."""
    return float(np.mean(far_frr(score, label, threshold)))


def det_curve(score: ArrayLike, label: ArrayLike) -> Det:
    """Returns FAR and FRR with each distinct score as the threshold, and with one above all scores.

    Raises MetricError unless both classes are there and all scores are finite.
    """
    s, y = _check(score, label)
    real, attack = np.sort(s[y == BONA_FIDE]), np.sort(s[y != BONA_FIDE])
    if not len(real) or not len(attack):
        raise MetricError(
            f"both classes are needed; given {len(real)} bona fide and {len(attack)} attack presentations"
        )
    if not np.isfinite(s).all():
        raise MetricError(f"scores must be finite; {int((~np.isfinite(s)).sum())} of {len(s)} are not")
    threshold = np.unique(s)
    threshold = np.append(threshold, threshold[-1] + ABOVE_TOP)
    far = 1 - np.searchsorted(attack, threshold, side="left") / len(attack)
    frr = np.searchsorted(real, threshold, side="left") / len(real)
    return Det(threshold, far, frr)


def eer_threshold(score: ArrayLike, label: ArrayLike) -> float:
    """Returns the threshold with the smallest |FAR - FRR|; at a tie the one with the smaller sum of errors.

    The threshold lies half way to the next lower score, so that rounding changes no call. Where all scores
    are equal there is no lower one and the threshold is that score. Raises MetricError as ``det_curve`` does.
    """
    curve = det_curve(score, label)
    i, t = _eer_index(curve), curve.threshold
    return _midpoint(float(t[i - 1]), float(t[i])) if 0 < i < len(t) - 1 else float(t[i])


def transfer_threshold(logit: ArrayLike, label: ArrayLike, domain: Names, *, spread: float = SPREAD) -> float:
    """Returns the threshold that is expected to give the smallest HTER on a domain that is not among these.

    Each domain counts the same, and each logit as a normal distribution of deviation ``spread``, because on
    another domain the scores lie elsewhere: a few samples decide the EER threshold of pooled scores, all of
    them this one. Of equally good ones it is the middle. Raises MetricError as ``det_curve`` does.
    """
    from scipy.special import ndtr  # pyright: ignore  # here: too slow for readers of the configuration

    curve = det_curve(logit, label)
    s, y = _check(logit, label)
    if (names := np.asarray(domain)).shape != y.shape:
        raise MetricError(f"domain: {names.shape[0]} names for {y.shape[0]} labels; one per sample is needed")
    cells = [[s[(y == c) & (names == d)] for d in np.unique(names[y == c])] for c in (BONA_FIDE, 0)]

    def best(tried: Floats) -> tuple[float, float]:
        """Returns the middle of the best of ``tried``, and their distance."""
        real, attack = (
            np.mean([ndtr((tried[:, None] - of[None]) / spread).mean(axis=1) for of in cell], axis=0)
            for cell in cells
        )
        error = (real + 1 - attack) / 2
        return float(np.mean(tried[error <= error.min() + 1e-9])), float(tried[1] - tried[0])

    low, high = float(curve.threshold[0]), float(curve.threshold[-1])
    near, step = best(np.linspace(low, high, 257))
    return best(np.linspace(near - step, near + step, 129))[0]


def eer(score: ArrayLike, label: ArrayLike) -> float:
    """Returns (FAR + FRR) / 2 at the EER threshold of the same data, an oracle; NaN where undefined."""
    try:
        curve = det_curve(score, label)
    except MetricError:
        return math.nan
    i = _eer_index(curve)
    return float((curve.far[i] + curve.frr[i]) / 2)


def apcer_threshold(score: ArrayLike, label: ArrayLike, pai: Names, apcer: float) -> float:
    """Returns the lowest threshold at which no species exceeds ``apcer``.

    Applied to development data it fixes BPCER10, 20 and 100 without looking at the measured data.
    """
    s, y = _check(score, label)
    names, attack = np.asarray(pai, dtype=np.str_), y != BONA_FIDE
    bound = -np.inf  # the highest score that must be rejected
    for name in np.unique(names[attack]):
        scores = s[attack & (names == name)]
        allowed = int(np.floor(apcer * len(scores) + 1e-9))
        scores = np.sort(scores[~np.isnan(scores)])[::-1]
        if allowed < len(scores):
            bound = max(bound, scores[allowed])
    if bound == -np.inf:
        return float(np.nanmin(s))
    above = s[s > bound]
    return _midpoint(bound, float(above.min())) if len(above) else float(bound + ABOVE_TOP)


def bpcer_at_apcer(score: ArrayLike, label: ArrayLike, pai: Names, apcer: float) -> float:
    """Returns the BPCER where the worst species has APCER <= ``apcer`` on the same data, an oracle figure.

    ``apcer`` 0.05 gives BPCER20.
    """
    return bpcer(score, label, apcer_threshold(score, label, pai, apcer)).rate


def bpcer_at_dev(
    score: ArrayLike,
    label: ArrayLike,
    dev_score: ArrayLike,
    dev_label: ArrayLike,
    dev_pai: Names,
    apcer: float,
) -> float:
    """Returns the BPCER at the threshold that gives the worst development species APCER <= ``apcer``.

    NaN if the development set has no attack. APCER of the measured data may be higher, because species that
    the development set lacks may score higher than those that the threshold was fixed on.
    """
    if not (np.asarray(dev_label) != BONA_FIDE).any():
        return math.nan
    return bpcer(score, label, apcer_threshold(dev_score, dev_label, dev_pai, apcer)).rate


def auc(score: ArrayLike, label: ArrayLike) -> float:
    """Returns P(bona fide score > attack score) + P(tie) / 2, by mid-ranks.

    NaN where a class is missing or a score is NaN.
    """
    s, y = _check(score, label)
    real = y == BONA_FIDE
    n, m = int(real.sum()), int((~real).sum())
    if not n or not m or np.isnan(s).any():
        return math.nan
    _, index, count = np.unique(s, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[index]
    return float((rank[real].sum() - n * (n + 1) / 2) / (n * m))


def tpr_at_fpr(score: ArrayLike, label: ArrayLike, fpr: float) -> float:
    """Returns the largest share of bona fide accepted while at most ``fpr`` of all attacks are.

    It is an oracle figure, because the measured data choose the threshold. NaN where undefined.
    """
    try:
        curve = det_curve(score, label)
    except MetricError:
        return math.nan
    return float(1 - curve.frr[curve.far <= fpr + 1e-12].min())


def _check(score: ArrayLike, label: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    s, y = np.asarray(score, np.float64), np.asarray(label, np.int64)
    if s.ndim != 1 or s.shape != y.shape:
        raise MetricError(
            f"score and label must be two equally long rows; given shapes {s.shape} and {y.shape}"
        )
    if not np.isin(y, (0, 1)).all():
        raise MetricError("label: 1 (bona fide) and 0 (attack) are allowed; leave unknown samples out")
    return s, y


def _mean(values: NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _eer_index(curve: Det) -> int:
    gap = np.abs(curve.far - curve.frr)
    return int(np.lexsort((curve.far + curve.frr, np.round(gap, 12)))[0])


def _midpoint(rejected: float, accepted: float) -> float:
    middle = (rejected + accepted) / 2
    return middle if middle > rejected else accepted
