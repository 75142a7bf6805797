"""Computes anytime-valid statistics: tests and bounds that may be read after every presentation.

An e-value is a number >= 0 whose mean under the null hypothesis is at most 1; an e-process is an e-value at
every stopping time. By Ville's inequality (1939), under the null it ever reaches 1/alpha with probability at
most alpha, so looking often costs no alpha. All values are logarithms (nats) and vectorised over leading
axes. Nothing is drawn at random, so the same counts always give the same number.

Sources: Howard, Ramdas, McAuliffe and Sekhon 2021 (time-uniform confidence sequences); Waudby-Smith and
Ramdas 2024 (estimating means of bounded random variables by betting); Wang and Ramdas 2022 (e-BH); Vovk and
Wang 2021 (merging e-values); Vovk, Nouretdinov and Gammerman 2003 (conformal martingales); Bar, Shaer and
Romano 2024 (POEM, a betting martingale on the entropy of test samples); Schirmer, Jazbec, Naesseth and
Nalisnick 2025 (monitoring risks under adaptation).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

# The alternatives to a Bernoulli null have its odds times exp(TILT); APCER rising from 2 to 10 % is a tilt of
# 1.69.
TILT: Floats = np.geomspace(1 / 16, 6.0, 16)
# The prior over log(TILT) is a Cauchy: narrow around the usual tilts, with tails that give every tilt some
# weight.
PRIOR_CENTRE, PRIOR_SCALE = 1.8, 0.5
BETS: Floats = np.array([0.05, 0.1, 0.2, 0.4, 0.8])  # stakes on a departure from uniformity
BISECTIONS = 50
OTHER_HOURS_WEIGHT = 20.0  # the rate of the other hours counts as this many presentations of an hour
BASELINE_CONFIDENCE = 0.95  # one-sided confidence of an hour's baseline
EDGE = 1e-9  # smallest distance of a probability from 0 and 1


def bernoulli_e(errors: ArrayLike, n: ArrayLike, null: ArrayLike) -> Floats:
    """Returns the log e-value of H0 "an error has probability at most ``null``" from ``errors`` of ``n``.

    The arguments broadcast. Guarantee: as presentations arrive this is an e-process, whatever the rates below
    ``null`` are and however they change (Ville). It is a mixture of likelihood ratios over alternatives q
    whose odds are exp(TILT) times those of the null. Only the counts matter, not their order, so it can be
    recomputed from stored counts. It rises with the errors and falls with the null. Raises ValueError for
    counts or a null out of range.
    """
    s, m, p = np.broadcast_arrays(_floats(errors), _floats(n), _floats(null))
    if not ((s >= 0) & (s <= m)).all() or not ((p > 0) & (p < 1)).all():
        raise ValueError("counts with 0 <= errors <= n and a null in (0, 1) are needed")
    return _tilt_mixture(s, m[..., None] * np.log1p(p[..., None] * np.expm1(TILT)))


def paired_e(worse: ArrayLike, better: ArrayLike) -> Floats:
    """Returns the log e-value of H0 "a discordant pair is worse with probability at most 1/2".

    The counts broadcast. E = int_{1/2}^1 q^worse (1 - q)^better dq / (1/2 * (1/2)^t) with t = worse + better,
    the uniform mixture of the likelihood ratios against 1/2. Guarantee: an e-process over the discordant
    pairs (Ville); concordant pairs carry no evidence. Raises ValueError for negative counts.
    """
    w, b = np.broadcast_arrays(_floats(worse), _floats(better))
    if (w < 0).any() or (b < 0).any():
        raise ValueError("counts of discordant pairs are 0 or more")
    # imported here, because it is too slow for readers of the configuration
    from scipy.special import betaincc, betaln  # pyright: ignore

    t = w + b
    with np.errstate(divide="ignore"):
        tail: Floats = np.log(betaincc(w + 1, b + 1, 0.5))
    exact: Floats = (t + 1) * np.log(2.0) + betaln(w + 1, b + 1) + tail
    # -log1p(t) is the value at worse = 0, a lower bound that takes over where the tail underflows
    return np.maximum(exact, -np.log1p(t))


def two_sample_e(x: ArrayLike, n: ArrayLike, y: ArrayLike, m: ArrayLike) -> Floats:
    """Returns the log e-value of H0 "the rate of ``x`` in ``n`` is at most the rate of ``y`` in ``m``".

    The counts broadcast. Guarantee: an e-process in any order of presentations, as long as each group has one
    rate. It is universal inference (Wasserman, Ramdas and Balakrishnan 2020): Jeffreys' mixture of each
    group, divided by the largest likelihood that the null allows.
    """
    from scipy.special import betaln, xlogy  # pyright: ignore

    a, c, b, d = np.broadcast_arrays(*map(_floats, (x, n, y, m)))

    def best(k: Floats, of: Floats) -> Floats:
        return _floats(xlogy(k, k) + xlogy(of - k, of - k) - xlogy(of, of))

    mixture = _floats(betaln(a + 0.5, c - a + 0.5) + betaln(b + 0.5, d - b + 0.5)) - 2 * np.log(np.pi)
    return mixture - np.where(a * d <= b * c, best(a, c) + best(b, d), best(a + b, c + d))


def merge(log_e: ArrayLike, axis: int = -1) -> Floats:
    """Returns the log of the mean of e-values along ``axis``; raises ValueError where there are none.

    Guarantee: an e-value of the intersection of the nulls under any dependence, and essentially the only
    symmetric way to merge (Vovk and Wang 2021). The e-processes of a fixed set merge to an e-process; when
    the set grows, the test starts anew.
    """
    x = _floats(log_e)
    if not x.shape[axis]:
        raise ValueError("nothing to merge: at least one e-value is needed")
    return _log_sum(x, axis) - np.log(x.shape[axis])


def merge_few(log_e: ArrayLike, share: float, axis: int = -1) -> Floats:
    """Returns a log e-value along ``axis`` with the most power where about ``share`` of the nulls are wrong.

    It is the mean of ``merge``, which one very large e-value moves, and the product of 1 - share + share * e,
    which several large ones move together. Guarantee: an e-process if every presentation's probability of an
    error, given everything seen anywhere before it, is at most its null; sites may depend on each other in
    any other way.
    """
    x = _floats(log_e)
    product = np.logaddexp(np.log1p(-share), np.log(share) + x).sum(axis=axis)
    return np.logaddexp(merge(x, axis), product) - np.log(2.0)


def e_bh(log_e: ArrayLike, fdr: float) -> NDArray[np.intp]:
    """Returns the ascending indices of the hypotheses [S] that e-BH rejects at false discovery rate ``fdr``.

    Guarantee: the expected share of true nulls among the rejected is at most ``fdr`` under any dependence
    (Wang and Ramdas 2022).
    """
    x = _floats(log_e)
    order = np.argsort(-x, kind="stable")
    enough = (
        x[order] + np.log(np.arange(1, len(x) + 1)) >= np.log(len(x) / fdr)
        if len(x)
        else np.zeros(0, np.bool_)
    )
    count = int(np.flatnonzero(enough)[-1]) + 1 if enough.any() else 0
    return np.sort(order[:count])


def bernoulli_cs(errors: ArrayLike, n: ArrayLike, alpha: float) -> tuple[Floats, Floats]:
    """Returns the (lower, upper) confidence sequence of a Bernoulli probability, one-sided at ``alpha`` each.

    The counts broadcast. Guarantee: P(the lower bound ever exceeds the probability) <= alpha, and likewise
    for the upper bound, so 2 alpha together. The lower bound is the largest null that ``bernoulli_e`` rejects
    at 1/alpha (Howard et al. 2021), so the test and the interval never contradict each other.
    """
    s, m = np.broadcast_arrays(_floats(errors), _floats(n))
    return _lower_bound(s, m, alpha), 1 - _lower_bound(m - s, m, alpha)


def mean_cs(x: ArrayLike, alpha: float) -> tuple[Floats, Floats]:
    """Returns (lower, upper) [..., T] of the mean of ``x`` [..., T] after each value, two-sided at ``alpha``.

    Guarantee: with probability 1 - alpha the mean lies between the bounds at every t, for any values in [0,
    1] with one conditional mean. It is the predictable plug-in empirical-Bernstein confidence sequence
    (Waudby-Smith and Ramdas 2024, Theorem 2), intersected over time. It covers neither the mean of a drifting
    stream nor the running mean. Raises ValueError for values outside [0, 1].
    """
    v = _floats(x)
    if not ((v >= 0) & (v <= 1)).all():
        raise ValueError("values in [0, 1] are needed")
    t: Floats = np.arange(1.0, v.shape[-1] + 1)
    mean: Floats = (0.5 + np.cumsum(v, axis=-1)) / (t + 1)
    variance: Floats = (0.25 + np.cumsum((v - mean) ** 2, axis=-1)) / (t + 1)
    first = np.full((*v.shape[:-1], 1), 0.5)
    before = np.concatenate([first, mean[..., :-1]], axis=-1)
    spread = np.concatenate([first / 2, variance[..., :-1]], axis=-1)
    bet = np.minimum(np.sqrt(2 * np.log(2 / alpha) / (spread * t * np.log1p(t))), 0.5)
    total = np.cumsum(bet, axis=-1)
    cost = np.cumsum(4 * (v - before) ** 2 * (-np.log1p(-bet) - bet) / 4, axis=-1)
    centre, width = np.cumsum(bet * v, axis=-1) / total, (np.log(2 / alpha) + cost) / total
    lower = np.maximum.accumulate(np.clip(centre - width, 0, 1), axis=-1)
    return lower, np.minimum.accumulate(np.clip(centre + width, 0, 1), axis=-1)


def conformal(calibration: ArrayLike, x: ArrayLike) -> Floats:
    """Returns conformal p-values [T]: the rank of each ``x`` [T] among calibration [N] and earlier ``x``.

    Guarantee: independent and uniform on [0, 1] as long as calibration and stream are exchangeable (Vovk et
    al. 2003). The reference grows with the stream, because a fixed calibration sample would in time differ
    measurably from its own distribution. A fixed pseudo-random sequence breaks ties and places a value within
    its rank, so the same input gives the same bits.
    """
    reference, place = sorted(_floats(calibration).tolist()), np.random.Generator(np.random.PCG64(0))
    values = _floats(x).tolist()
    ranks: list[tuple[int, int, int]] = []
    for v in values:
        low, high = bisect_left(reference, v), bisect_right(reference, v)
        ranks.append((low, high - low + 1, len(reference) + 1))
        insort(reference, v)
    below, same, count = np.asarray(ranks, np.float64).reshape(-1, 3).T
    return (below + place.random(len(values)) * same) / count


def drift(u: ArrayLike) -> tuple[Floats, Floats]:
    """Returns (log wealth, its running maximum) [..., T] of bets against independent, uniform ``u`` [..., T].

    Guarantee: under uniformity the wealth is a martingale that starts at 1, so its maximum reaches 1/alpha
    with probability at most alpha (Ville). One half bets on a change of location (2u - 1), the other on a
    change of spread (12 (u - 1/2)^2 - 1), both upwards and downwards and with several stakes. The wealth
    concentrates on the stakes that win, so the mixture adapts (POEM learns a single stake by gradients
    instead). Raises ValueError for values outside [0, 1].
    """
    v = _floats(u)
    if not ((v >= 0) & (v <= 1)).all():
        raise ValueError("values in [0, 1] are needed")
    location, spread = 2 * v - 1, (12 * (v - 0.5) ** 2 - 1) / 2
    stakes = np.concatenate([-BETS, BETS]).reshape(-1, 1, *[1] * v.ndim)
    wealth = merge(merge(np.cumsum(np.log1p(stakes * np.stack([location, spread])), axis=-1), axis=0), axis=0)
    return wealth, np.maximum.accumulate(np.maximum(wealth, 0.0), axis=-1)


def ratchet(accepted: ArrayLike, hour: ArrayLike, baseline: ArrayLike, kappa: float) -> tuple[Floats, Floats]:
    """Returns (log e-value, its running maximum) [T] of H0 "bona fide calls follow the site's usual hours".

    ``accepted`` [T] is 0/1, ``hour`` [T] 0-23, and ``baseline`` [24, 2] holds (calls, bona fide calls) of
    earlier windows per hour of the day. The null of an hour is ``allowed_rates``: the upper 95 % bound of the
    hour's rate, with the odds times 1 + kappa. Guarantee: if the baseline was fixed before the first of these
    calls, this is an e-process for every sequence whose conditional rates stay below the allowed ones (Ville;
    a likelihood ratio with a predictable null), so calls that only follow the hours of the day never count as
    drift. An underestimated baseline (5 % of the hours at kappa = 0) is covered by kappa, not by the bound
    alone. Raises ValueError for shapes that do not fit.
    """
    a, h, counts = _floats(accepted), np.asarray(hour, np.intp), _floats(baseline)
    if counts.shape != (24, 2) or a.shape != h.shape:
        raise ValueError(
            f"a baseline [24, 2] and one hour per call are needed, given {counts.shape} and {h.shape}"
        )
    null = allowed_rates(counts, kappa)[h]
    cost = np.cumsum(np.log1p(null[:, None] * np.expm1(TILT)), axis=0)
    path = _tilt_mixture(np.cumsum(a), cost)
    return path, np.maximum.accumulate(np.maximum(path, 0.0))


def allowed_rates(baseline: Floats, kappa: float) -> Floats:
    """Returns the highest rate of bona fide calls per hour of the day [24] under the null of ``ratchet``.

    The rate of the other hours counts as OTHER_HOURS_WEIGHT presentations of each hour, so an hour without
    data gets the rate of the others.
    """
    from scipy.special import betaincinv  # pyright: ignore

    n, yes = baseline.T
    others = (yes.sum() - yes + 0.5) / (n.sum() - n + 1)
    upper: Floats = betaincinv(
        yes + OTHER_HOURS_WEIGHT * others + 0.5,
        n - yes + OTHER_HOURS_WEIGHT * (1 - others) + 0.5,
        BASELINE_CONFIDENCE,
    )
    odds = (1 + kappa) * upper / np.maximum(1 - upper, EDGE)
    return np.clip(odds / (1 + odds), EDGE, 1 - EDGE)


def _floats(x: ArrayLike) -> Floats:
    return np.asarray(x, np.float64)


def _tilt_mixture(errors: Floats, cost: Floats) -> Floats:
    """Returns the log of the mixture over TILT of exp(errors * TILT - cost).

    ``cost`` [..., tilts] is the log normaliser: the sum over calls of log(1 + null * (exp(TILT) - 1)).
    """
    prior = -np.log1p((np.log(TILT / PRIOR_CENTRE) / PRIOR_SCALE) ** 2)
    return _log_sum(errors[..., None] * TILT - cost + (prior - _log_sum(prior, -1)), -1)


def _log_sum(x: Floats, axis: int) -> Floats:
    """Returns the log of the sum of exp(x) along ``axis``, in a third of the time of scipy's logsumexp."""
    top = x.max(axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.squeeze(top, axis) + np.log(np.exp(x - top).sum(axis=axis))


def _lower_bound(errors: Floats, n: Floats, alpha: float) -> Floats:
    """Returns the largest null that is rejected at 1/alpha, 0 where none is.

    Found by bisection, because ``bernoulli_e`` falls with the null.
    """
    low, high = np.zeros(errors.shape), np.ones(errors.shape)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        rejected = bernoulli_e(errors, n, np.clip(middle, EDGE, 1 - EDGE)) >= -np.log(alpha)
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return low
