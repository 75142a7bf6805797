"""What a site's own stream shows without labels, measured once and stored as counts and e-values.

The source distribution is the anchor set under the source model, shown the modalities that the stream usually shows: what
the stream is called bona fide is compared with what of the anchor set is called so, and attacks with attacks, since a
site's share of attacks is not the anchor set's. Scores are those taken online, each before it was learned from. Captures
of one session are not exchangeable: the first of each speaks for it. Every window is tested anew, at its own alpha.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.guards.reason import Measured
from pipeline.stats import sequential
from pipeline.types import Section

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.guards.limits import GuardsConfig

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]
    Ints = NDArray[np.integer]

MODALITIES = 3
CALIBRATION = 30  # anchor presentations below which there is no source distribution
TINY = 1e-6  # scores nearer to 0 or 1 have no lower entropy
Hours = tuple[tuple[int, int], ...]  # [24] (sessions, those called bona fide)


class Stream(Section):
    """Evidence without labels; None = not measured, as in what earlier versions stored."""

    sessions: int | None = None  # of the window
    sessions_before: int = 0  # that the state had seen before it
    taught_bona_fide: int = 0  # samples that taught, by their pseudo label
    taught_attack: int = 0
    taught_session: int = 0  # most of them of one session
    taught_modalities: tuple[int, ...] = ()  # of them with 1, 2, ... modalities
    taught_disagreement: Measured = None  # nats, the most of them
    flips_bona_fide: int = 0  # attack for the champion, bona fide for the candidate
    flips_attack: int = 0
    last: int = 0  # newest calls, at most collapse.calls
    last_bona_fide: int = 0  # of them by the candidate
    last_champion: int = 0  # and by the champion
    drift_entropy: Measured = None  # log e-values, the most within the window
    drift_attack: Measured = None
    risk_lower: Measured = None  # of the mean proxy risk
    risk_source: Measured = None  # upper bound of the source's, at the stream's share of calls
    ratchet: Measured = None  # log e-value, the most within the window; None without a baseline
    baseline: Hours = ()  # of earlier windows that did not fail
    hours: Hours = ()  # of this window
    born: str | None = None  # when the state left the source model
    age_days: Measured = None  # since then
    steps: int | None = None


class SiteHistory(NamedTuple):
    """What is known of a site before its window."""

    baseline: Hours = ()
    born: str | None = None
    age_days: float | None = None
    sessions: int = 0


class WindowScores(NamedTuple):
    """A window of N samples and what was made of them."""

    score: Floats  # [N] online, before learning
    champion: Floats  # [N]
    candidate: Floats  # [N]
    pseudo_label: Ints  # [N] 1, 0, or -1: did not teach
    disagreement: Floats  # [N]
    session: Ints  # [N]
    present: Ints  # [N] bit masks, bit m = modality m
    hour: Ints  # [N] of the day


def measure_stream(
    limits: GuardsConfig,
    seen: WindowScores,
    source: Floats,
    threshold: float,
    *,
    history: SiteHistory,
    steps: int | None,
) -> Stream:
    """Measure a window; ``source`` holds the source model's scores of the anchor set under the usual modalities of the stream.

    kappa, the alpha of ``risk`` and the calls of ``collapse`` shape what is measured, so they stay as they were.
    """
    _, first, place = np.unique(seen.session, return_index=True, return_inverse=True)
    first = np.sort(first)
    taught = seen.pseudo_label >= 0
    modalities = np.bitwise_count(seen.present[taught])
    calls, before = seen.candidate >= threshold, seen.champion >= threshold
    newest = slice(-limits.collapse.calls, None)
    online = seen.score >= threshold
    ratchet = _ratchet(limits, online[first], seen.hour[first], history.baseline)
    return Stream(
        sessions=len(first),
        sessions_before=history.sessions,
        taught_bona_fide=int((seen.pseudo_label == 1).sum()),
        taught_attack=int((seen.pseudo_label == 0).sum()),
        taught_session=int(np.bincount(place[taught], minlength=1).max()),
        taught_modalities=tuple(np.bincount(modalities, minlength=MODALITIES + 1)[1:].tolist()),
        taught_disagreement=float(seen.disagreement[taught].max()) if taught.any() else None,
        flips_bona_fide=int((calls & ~before).sum()),
        flips_attack=int((before & ~calls).sum()),
        last=len(calls[newest]),
        last_bona_fide=int(calls[newest].sum()),
        last_champion=int(before[newest].sum()),
        **_against_source(
            limits,
            seen.score[first[seen.present[first] == usual_modalities(seen.present)]],
            source,
            threshold,
        ),
        ratchet=ratchet,
        baseline=history.baseline,
        hours=_hours(online[first], seen.hour[first]),
        born=history.born,
        age_days=history.age_days,
        steps=steps,
    )


def usual_modalities(present: Ints) -> int:
    """The set of modalities that most samples [N] show, as a bit mask; 0 without samples."""
    return int(np.argmax(np.bincount(present, minlength=1)))


def add_hours(baseline: Hours, hours: Hours) -> Hours:
    """Both together, hour by hour."""
    if not baseline or not hours:
        return baseline or hours
    return tuple((n + m, a + b) for (n, a), (m, b) in zip(baseline, hours, strict=True))


def _against_source(
    limits: GuardsConfig, score: Floats, source: Floats, threshold: float
) -> dict[str, float]:
    """Drift within each call, and the proxy risk: how likely a call is wrong by its own score."""
    known, called = _source(source.tobytes(), threshold, limits.risk.alpha), score >= threshold
    if known is None or not len(score):
        return {}
    share = float(called.mean())
    return {
        "drift_entropy": _drift(known.entropy, _entropy(score[called])),
        "drift_attack": _drift(known.attack, 1 - score[~called]),
        "risk_lower": float(sequential.mean_cs(_doubt(score, called), limits.risk.alpha)[0][-1]),
        "risk_source": share * known.doubt_bona_fide + (1 - share) * known.doubt_attack,
    }


class _Source(NamedTuple):
    entropy: Floats  # of what is called bona fide, ascending
    attack: Floats  # P(attack) of what is called attack, ascending
    doubt_bona_fide: float  # upper bound of the mean proxy risk of what is called so
    doubt_attack: float


@lru_cache(maxsize=64)  # one for each set of modalities that sites usually show
def _source(scores: bytes, threshold: float, alpha: float) -> _Source | None:
    score = np.frombuffer(scores, np.float64)
    called = score >= threshold
    if min(called.sum(), (~called).sum()) < CALIBRATION:
        return None
    order = np.random.Generator(np.random.PCG64(0)).permutation(
        len(score)
    )  # sealed sets are sorted by species
    doubt, shuffled = _doubt(score, called)[order], called[order]
    upper = [float(sequential.mean_cs(doubt[k], alpha)[1][-1]) for k in (shuffled, ~shuffled)]
    return _Source(np.sort(_entropy(score[called])), np.sort(1 - score[~called]), *upper)


def _doubt(score: Floats, called: Bools) -> Floats:
    return np.clip(np.where(called, 1 - score, score), 0, 1)


def _entropy(p: Floats) -> Floats:
    p = np.clip(p, TINY, 1 - TINY)
    return -p * np.log(p) - (1 - p) * np.log1p(-p)


def _drift(calibration: Floats, x: Floats) -> float:
    return float(sequential.drift(sequential.conformal(calibration, x))[1][-1]) if len(x) else 0.0


def _ratchet(limits: GuardsConfig, called: Bools, hour: Ints, baseline: Hours) -> float | None:
    if not len(called) or sum(n for n, _ in baseline) < limits.ratchet.baseline_min:
        return None
    return float(sequential.ratchet(called, hour, baseline, limits.ratchet.kappa)[1][-1])


def _hours(called: Bools, hour: Ints) -> Hours:
    n, yes = (np.bincount(h, minlength=24).tolist() for h in (hour, hour[called]))
    return tuple(zip(n, yes, strict=True))
