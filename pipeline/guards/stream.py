"""Measures a window of a site's stream without labels, once, as counts and e-values that are stored.

The source distribution is the source model's scores of the anchor set under the stream's usual modalities.
Samples called bona fide are compared with anchor samples called bona fide, attacks with attacks, because a
site's share of attacks is not the anchor set's. Scores are online: each was taken before the sample was
learned from. Captures of one session are not exchangeable, so only the first capture of a session counts.
Every window is tested anew, at its own alpha.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.guards.records import Hours, Stream
from pipeline.stats import sequential

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.guards.limits import GuardsConfig

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]
    Ints = NDArray[np.integer]

MODALITIES = 3
CALIBRATION = 30  # anchor presentations below which there is no source distribution
TINY = 1e-6  # scores are clipped to [TINY, 1 - TINY] before their entropy is taken


class SiteHistory(NamedTuple):
    """Carries what earlier verdicts measured of a site into its next window."""

    baseline: Hours = ()  # of earlier windows that did not fail
    born: str | None = None  # ISO time at which the state left the source model
    age_days: float | None = None  # since ``born``
    sessions: int = 0  # that the state has learned from


class WindowScores(NamedTuple):
    """Holds the scores of a window of N samples in stream order, and what was learned from each."""

    score: Floats  # [N] online, before the sample was learned from
    champion: Floats  # [N] by the state that the site serves
    candidate: Floats  # [N] by the state at the end of the window
    pseudo_label: Ints  # [N] 1 bona fide, 0 attack, -1 not learned from
    disagreement: Floats  # [N] between the heads, nats
    session: Ints  # [N] salted session id
    present: Ints  # [N] bit masks, bit m = modality m
    hour: Ints  # [N] UTC hour of the day, 0-23


def measure_stream(
    limits: GuardsConfig,
    window: WindowScores,
    source: Floats,
    threshold: float,
    *,
    history: SiteHistory,
    steps: int | None,
) -> Stream:
    """Returns the evidence of one window without labels.

    ``source`` [A] are the source model's scores of the anchor set under the stream's usual modalities,
    ``threshold`` the score from which a sample is called bona fide, ``steps`` the optimizer steps of the
    candidate. Of ``limits`` only ratchet.kappa, risk.alpha and collapse.calls enter the measurement, so a
    replay under other limits keeps these three.
    """
    _, first, session = np.unique(window.session, return_index=True, return_inverse=True)
    first = np.sort(first)
    taught = window.pseudo_label >= 0
    modalities = np.bitwise_count(window.present[taught])
    candidate, champion = window.candidate >= threshold, window.champion >= threshold
    newest = slice(-limits.collapse.calls, None)
    online = window.score >= threshold
    ratchet = _ratchet(limits, online[first], window.hour[first], history.baseline)
    return Stream(
        sessions=len(first),
        sessions_before=history.sessions,
        taught_bona_fide=int((window.pseudo_label == 1).sum()),
        taught_attack=int((window.pseudo_label == 0).sum()),
        taught_session=int(np.bincount(session[taught], minlength=1).max()),
        taught_modalities=tuple(np.bincount(modalities, minlength=MODALITIES + 1)[1:].tolist()),
        taught_disagreement=float(window.disagreement[taught].max()) if taught.any() else None,
        flips_bona_fide=int((candidate & ~champion).sum()),
        flips_attack=int((champion & ~candidate).sum()),
        last=len(candidate[newest]),
        last_bona_fide=int(candidate[newest].sum()),
        last_champion=int(champion[newest].sum()),
        **_against_source(
            limits,
            window.score[first[window.present[first] == usual_modalities(window.present)]],
            source,
            threshold,
        ),
        ratchet=ratchet,
        baseline=history.baseline,
        hours=_hours(online[first], window.hour[first]),
        born=history.born,
        age_days=history.age_days,
        steps=steps,
    )


def usual_modalities(present: Ints) -> int:
    """Returns the bit mask of modalities that most of the samples [N] show; 0 without samples."""
    return int(np.argmax(np.bincount(present, minlength=1)))


def add_hours(baseline: Hours, hours: Hours) -> Hours:
    """Returns the sum of both counts, hour by hour."""
    if not baseline or not hours:
        return baseline or hours
    return tuple((n + m, a + b) for (n, a), (m, b) in zip(baseline, hours, strict=True))


def _against_source(
    limits: GuardsConfig, score: Floats, source: Floats, threshold: float
) -> dict[str, float]:
    """Returns drift and proxy risk of the scores [S] of S sessions; empty without a source distribution."""
    reference = _reference(source.tobytes(), threshold, limits.risk.alpha)
    if reference is None or not len(score):
        return {}
    accepted = score >= threshold
    share = float(accepted.mean())
    return {
        "drift_entropy": _drift(reference.entropy, _entropy(score[accepted])),
        "drift_attack": _drift(reference.attack, 1 - score[~accepted]),
        "risk_lower": float(sequential.mean_cs(_proxy_risk(score, accepted), limits.risk.alpha)[0][-1]),
        "risk_source": share * reference.risk_bona_fide + (1 - share) * reference.risk_attack,
    }


class _Reference(NamedTuple):
    """Holds the source distribution that a stream is compared with."""

    entropy: Floats  # of anchor samples called bona fide, ascending
    attack: Floats  # P(attack) of anchor samples called attack, ascending
    risk_bona_fide: float  # upper bound of the mean proxy risk of anchor samples called bona fide
    risk_attack: float  # of those called attack


@lru_cache(maxsize=64)  # one for each set of modalities that sites usually show
def _reference(scores: bytes, threshold: float, alpha: float) -> _Reference | None:
    score = np.frombuffer(scores, np.float64)
    accepted = score >= threshold
    if min(accepted.sum(), (~accepted).sum()) < CALIBRATION:
        return None
    shuffle = np.random.Generator(np.random.PCG64(0))  # sealed sets are sorted by species
    order = shuffle.permutation(len(score))
    risk, shuffled = _proxy_risk(score, accepted)[order], accepted[order]
    upper = [float(sequential.mean_cs(risk[k], alpha)[1][-1]) for k in (shuffled, ~shuffled)]
    return _Reference(np.sort(_entropy(score[accepted])), np.sort(1 - score[~accepted]), *upper)


def _proxy_risk(score: Floats, accepted: Bools) -> Floats:
    """Returns the probability that each call is wrong by its own score."""
    return np.clip(np.where(accepted, 1 - score, score), 0, 1)


def _entropy(p: Floats) -> Floats:
    p = np.clip(p, TINY, 1 - TINY)
    return -p * np.log(p) - (1 - p) * np.log1p(-p)


def _drift(calibration: Floats, x: Floats) -> float:
    return float(sequential.drift(sequential.conformal(calibration, x))[1][-1]) if len(x) else 0.0


def _ratchet(limits: GuardsConfig, accepted: Bools, hour: Ints, baseline: Hours) -> float | None:
    if not len(accepted) or sum(n for n, _ in baseline) < limits.ratchet.baseline_min:
        return None
    return float(sequential.ratchet(accepted, hour, baseline, limits.ratchet.kappa)[1][-1])


def _hours(accepted: Bools, hour: Ints) -> Hours:
    sessions, bona_fide = (np.bincount(h, minlength=24).tolist() for h in (hour, hour[accepted]))
    return tuple(zip(sessions, bona_fide, strict=True))
