"""Anytime-valid statistics: they may be looked at after every presentation, and stopped on, without spending the alpha.

An e-value is a number >= 0 whose mean under the null hypothesis is at most 1; an e-process is one at every stopping time.
By Ville's inequality (1939) it ever reaches 1/alpha with probability at most alpha under the null. Everything is in logs
(nats) and vectorised over leading axes; nothing draws at random, so the same counts always give the same number.

Sources: Howard, Ramdas, McAuliffe and Sekhon 2021 (time-uniform confidence sequences); Waudby-Smith and Ramdas 2024
(estimating means of bounded random variables by betting); Wang and Ramdas 2022 (e-BH); Vovk and Wang 2021 (merging
e-values); Vovk, Nouretdinov and Gammerman 2003 (conformal martingales); Bar, Shaer and Romano 2024 (POEM, a betting
martingale on the entropy of test samples); Schirmer, Jazbec, Naesseth and Nalisnick 2025 (monitoring risks under adaptation).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

# What the alternatives of a Bernoulli null are: its odds times exp(TILT). APCER 2 -> 10 % is a tilt of 1.69.
TILT: Floats = np.geomspace(1 / 16, 6.0, 16)
PRIOR_CENTRE, PRIOR_SCALE = (
    1.8,
    0.5,
)  # the prior over log(TILT) is a Cauchy: tight where it matters, heavy enough to miss nothing
BETS: Floats = np.array([0.05, 0.1, 0.2, 0.4, 0.8])  # stakes on a departure from uniformity
BISECTIONS = 50
OTHER_HOURS_WEIGHT = 20.0  # presentations that the rate of the other hours weighs in an hour's own baseline
BASELINE_CONFIDENCE = 0.95  # one-sided confidence of an hour's baseline
EDGE = 1e-9


def bernoulli_e(errors: ArrayLike, n: ArrayLike, null: ArrayLike) -> Floats:
    """Log e-value of H0 "an error has probability at most ``null``", from counts that broadcast: ``errors`` of ``n``.

    Guarantee: as presentations arrive this is an e-process, whatever the rates below ``null`` are and however they change
    (Ville): a mixture over alternatives q with odds exp(TILT) times those of the null, each a likelihood ratio. Only the
    counts matter, not their order, so it is recomputed from what is stored. Rises with errors, falls with the null.
    """
    s, m, p = np.broadcast_arrays(_floats(errors), _floats(n), _floats(null))
    if not ((s >= 0) & (s <= m)).all() or not ((p > 0) & (p < 1)).all():
        raise ValueError("counts with 0 <= errors <= n and a null in (0, 1) are needed")
    return _tilt_mixture(s, m[..., None] * np.log1p(p[..., None] * np.expm1(TILT)))


def paired_e(worse: ArrayLike, better: ArrayLike) -> Floats:
    """Log e-value of H0 "a discordant pair is at most as often worse as better", from counts that broadcast.

    E = int_{1/2}^1 q^worse (1 - q)^better dq / (1/2 * (1/2)^t), t = worse + better: the uniform mixture of the likelihood
    ratios against 1/2. Guarantee: an e-process over the discordant pairs (Ville); concordant ones say nothing.
    """
    w, b = np.broadcast_arrays(_floats(worse), _floats(better))
    if (w < 0).any() or (b < 0).any():
        raise ValueError("counts of discordant pairs are 0 or more")
    from scipy.special import betaincc, betaln  # pyright: ignore  # an import too slow for readers of the configuration

    t = w + b
    with np.errstate(divide="ignore"):
        tail: Floats = np.log(betaincc(w + 1, b + 1, 0.5))
    exact: Floats = (t + 1) * np.log(2.0) + betaln(w + 1, b + 1) + tail
    return np.maximum(
        exact, -np.log1p(t)
    )  # its value at worse = 0, where the tail underflows: never too large


def two_sample_e(x: ArrayLike, n: ArrayLike, y: ArrayLike, m: ArrayLike) -> Floats:
    """Log e-value of H0 "the rate behind ``x`` of ``n`` is at most that behind ``y`` of ``m``", from counts that broadcast.

    Guarantee: an e-process in any order of presentations, each group's of one rate: universal inference (Wasserman, Ramdas
    and Balakrishnan 2020), Jeffreys' mixture of each group over the largest likelihood that the null allows.
    """
    from scipy.special import betaln, xlogy  # pyright: ignore

    a, c, b, d = np.broadcast_arrays(*map(_floats, (x, n, y, m)))

    def best(k: Floats, of: Floats) -> Floats:
        return _floats(xlogy(k, k) + xlogy(of - k, of - k) - xlogy(of, of))

    mixture = _floats(betaln(a + 0.5, c - a + 0.5) + betaln(b + 0.5, d - b + 0.5)) - 2 * np.log(np.pi)
    return mixture - np.where(a * d <= b * c, best(a, c) + best(b, d), best(a + b, c + d))


def merge(log_e: ArrayLike, axis: int = -1) -> Floats:
    """Log of the mean of e-values along ``axis``.

    Guarantee: an e-value of the intersection of the nulls under any dependence; essentially the only symmetric way
    (Vovk and Wang 2021). e-processes of a fixed set merge to an e-process; a set that grows is tested anew as it grows.
    """
    x = _floats(log_e)
    if not x.shape[axis]:
        raise ValueError("nothing to merge: at least one e-value is needed")
    return _log_sum(x, axis) - np.log(x.shape[axis])


def merge_few(log_e: ArrayLike, share: float, axis: int = -1) -> Floats:
    """Log of an e-value along ``axis`` against "some of these nulls are wrong", most powerful where about ``share`` are.

    The mean of two: ``merge``, which one very large e-value moves, and the product of 1 - share + share * e, which several
    large ones move together. Guarantee: an e-process when every presentation's chance of an error, given all that was seen
    anywhere before it, is at most its null; sites may depend on each other in any other way.
    """
    x = _floats(log_e)
    product = np.logaddexp(np.log1p(-share), np.log(share) + x).sum(axis=axis)
    return np.logaddexp(merge(x, axis), product) - np.log(2.0)


def e_bh(log_e: ArrayLike, fdr: float) -> NDArray[np.intp]:
    """Indices of the hypotheses [S] that e-BH rejects, ascending.

    Guarantee: the expected share of true nulls among them is at most ``fdr``, under any dependence (Wang and Ramdas 2022).
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
    """(lower, upper) of a Bernoulli probability from counts that broadcast; each side holds at ``alpha`` on its own.

    Guarantee: P(the lower bound ever exceeds the probability) <= alpha, and so for the upper one: together 2 alpha. A bound
    is the null that ``bernoulli_e`` does not yet reject at 1/alpha (Howard et al. 2021), so both always agree.
    """
    s, m = np.broadcast_arrays(_floats(errors), _floats(n))
    return _lower_bound(s, m, alpha), 1 - _lower_bound(m - s, m, alpha)


def mean_cs(x: ArrayLike, alpha: float) -> tuple[Floats, Floats]:
    """(lower, upper) [..., T] of the mean of values [..., T] in [0, 1] after each of them; two-sided at ``alpha``.

    Guarantee: with probability 1 - alpha the mean lies between them at every t, for any values in [0, 1] with one
    conditional mean: the predictable plug-in empirical-Bernstein confidence sequence (Waudby-Smith and Ramdas 2024,
    Theorem 2), intersected over time. The mean of a drifting stream is not covered; the running one is not claimed.
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
    """Conformal p-values [T] of ``x`` [T]: the rank of each among the calibration sample [N] and what came before it.

    Guarantee: independent and uniform on [0, 1] as long as calibration and stream are exchangeable (Vovk et al. 2003); a
    calibration sample that does not grow would in time be told from its own distribution. Place within a rank, and
    with it ties, is taken from a fixed pseudo-random sequence: the same input gives the same bits.
    """
    known, place = sorted(_floats(calibration).tolist()), np.random.Generator(np.random.PCG64(0))
    values = _floats(x).tolist()
    ranks: list[tuple[int, int, int]] = []
    for v in values:
        low, high = bisect_left(known, v), bisect_right(known, v)
        ranks.append((low, high - low + 1, len(known) + 1))
        insort(known, v)
    below, same, count = np.asarray(ranks, np.float64).reshape(-1, 3).T
    return (below + place.random(len(values)) * same) / count


def drift(u: ArrayLike) -> tuple[Floats, Floats]:
    """(log wealth, its running maximum) [..., T] of bets against "the values [..., T] are independent and uniform".

    Guarantee: the wealth is a martingale from 1 under uniformity, so its maximum reaches 1/alpha with probability at most
    alpha (Ville). Half of it is bet on a move (2u - 1), half on a change of spread (12 (u - 1/2)^2 - 1), both ways and with
    several stakes; wealth flows to the stakes that win, so the bets adapt (a mixture; POEM learns one stake by gradients).
    """
    v = _floats(u)
    if not ((v >= 0) & (v <= 1)).all():
        raise ValueError("values in [0, 1] are needed")
    move, spread = 2 * v - 1, (12 * (v - 0.5) ** 2 - 1) / 2
    stakes = np.concatenate([-BETS, BETS]).reshape(-1, 1, *[1] * v.ndim)
    wealth = merge(merge(np.cumsum(np.log1p(stakes * np.stack([move, spread])), axis=-1), axis=0), axis=0)
    return wealth, np.maximum.accumulate(np.maximum(wealth, 0.0), axis=-1)


def ratchet(accepted: ArrayLike, hour: ArrayLike, baseline: ArrayLike, kappa: float) -> tuple[Floats, Floats]:
    """(log e-value, its running maximum) [T] of H0 "calls of bona fide are not more frequent than this site's hours allow".

    ``accepted`` [T] 0/1, ``hour`` [T] 0-23 and ``baseline`` [24, 2], the (calls, bona fide of them) of earlier windows. The
    null of an hour is its baseline with the odds times 1 + kappa. The baseline is the upper 95 % bound of the hour's rate,
    the other hours' rate standing in for EARLIER presentations of it; hours of which nothing is known are as the others.
    Guarantee: given a baseline that was fixed before the first of these calls, an e-process for every sequence whose
    conditional rates stay below the allowed ones (Ville; a likelihood ratio with a predictable null): calls
    that only follow the hours of the day never count as drift. A site whose baseline is itself underestimated (5 % of
    the hours at kappa = 0) is covered by kappa, not by the bound alone.
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
    """Highest rate of bona fide calls per hour of the day [24] that ``ratchet`` takes for usual."""
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
    """Log of the mixture over TILT of exp(errors * TILT - cost); ``cost`` [..., tilts] is what a null of each call expects."""
    prior = -np.log1p((np.log(TILT / PRIOR_CENTRE) / PRIOR_SCALE) ** 2)
    return _log_sum(errors[..., None] * TILT - cost + (prior - _log_sum(prior, -1)), -1)


def _log_sum(x: Floats, axis: int) -> Floats:
    """Log of the sum of exp(x); scipy's takes three times as long."""
    top = x.max(axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.squeeze(top, axis) + np.log(np.exp(x - top).sum(axis=axis))


def _lower_bound(errors: Floats, n: Floats, alpha: float) -> Floats:
    """Largest null that is rejected at 1/alpha, 0 where none is: ``bernoulli_e`` falls with the null, so by bisection."""
    low, high = np.zeros(errors.shape), np.ones(errors.shape)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        rejected = bernoulli_e(errors, n, np.clip(middle, EDGE, 1 - EDGE)) >= -np.log(alpha)
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return low
