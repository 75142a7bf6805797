"""Judges evidence without labels: these guards may fail or hold a candidate, and never pass it.

A number within its limit gives no finding; it is in the evidence. What an earlier version did not measure is
not judged. A failed candidate is left behind and the site learns on from its champion, so an alarm of
``ratchet`` freezes the site and cannot loosen what it accepts.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import numpy as np

from pipeline.guards.records import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from pipeline.guards.limits import Expiry, GuardsConfig
    from pipeline.guards.records import Call, Evidence, Stream


def unlabelled(limits: GuardsConfig, evidence: Evidence) -> Iterator[Reason]:
    """Yields the findings on one candidate."""
    s = evidence.stream
    if s.sessions is None:
        return
    yield from _influence(limits, s, evidence.stream_n)
    yield from _labels(limits, s)
    yield from _modality(limits, s)
    yield from _collapse(limits, s, evidence.stream_n)
    yield from _drift(limits, s)
    yield from _risk(limits, s)
    yield from _ratchet(limits, s)
    yield from _aged(limits.expiry, s)


def expired(limits: GuardsConfig, made_at: datetime, now: datetime) -> Reason | None:
    """Returns why a candidate made at ``made_at`` may not be promoted any more; None while it may."""
    hours, limit = (now - made_at) / timedelta(hours=1), limits.expiry.candidate_hours
    if hours <= limit:
        return None
    text = (
        f"the candidate is {hours:.1f} h old and was not promoted, at most {limit:g} h are allowed; "
        "adapt again"
    )
    return _finding("expiry", "fail", "candidate", hours, limit, text, advisory=limits.expiry.advisory)


def _influence(limits: GuardsConfig, s: Stream, n: int) -> Iterator[Reason]:
    rule, taught = limits.influence, s.taught_bona_fide + s.taught_attack
    if s.taught_session > rule.per_session:
        text = f"one session taught {s.taught_session} samples, at most {rule.per_session} are allowed"
        yield _finding(
            "influence", "fail", "session", s.taught_session, rule.per_session, text, advisory=rule.advisory
        )
    share = s.taught_session / n if n else 0.0
    if s.taught_session > 1 and share > rule.share:
        text = f"one session taught {s.taught_session} of the window's {n} samples, limit {rule.share:.1%}"
        yield _finding("influence", "fail", "window", share, rule.share, text, advisory=rule.advisory)
    sessions = s.sessions_before + (s.sessions or 0)
    if taught and sessions < rule.sessions:
        text = f"{taught} samples taught after {sessions} sessions, an update needs {rule.sessions}"
        yield _finding("influence", "hold", "sessions", sessions, rule.sessions, text, advisory=rule.advisory)


def _labels(limits: GuardsConfig, s: Stream) -> Iterator[Reason]:
    rule, taught = limits.labels, s.taught_bona_fide + s.taught_attack
    if taught >= rule.minimum and s.taught_bona_fide > rule.bona_fide * taught:
        share = s.taught_bona_fide / taught
        text = f"{s.taught_bona_fide} of {taught} pseudo labels are bona fide, limit {rule.bona_fide:.1%}"
        yield _finding("labels", "hold", "pseudo labels", share, rule.bona_fide, text, advisory=rule.advisory)
    most = s.taught_disagreement
    if most is not None and most > rule.disagreement + 1e-6:  # stored scores are single precision
        text = (
            f"a sample taught with {most:.3f} nats between its heads, at most {rule.disagreement:.3f} "
            "are allowed"
        )
        yield _finding(
            "labels", "fail", "disagreement", most, rule.disagreement, text, advisory=rule.advisory
        )


def _modality(limits: GuardsConfig, s: Stream) -> Iterator[Reason]:
    rule, taught = limits.modality, sum(s.taught_modalities)
    few = sum(s.taught_modalities[: rule.modalities - 1])
    if few > rule.share * taught:
        text = (
            f"{few} of {taught} samples that taught show fewer than {rule.modalities} modalities, "
            f"limit {rule.share:.1%}"
        )
        yield _finding("modality", "fail", "stream", few / taught, rule.share, text, advisory=rule.advisory)


def _collapse(limits: GuardsConfig, s: Stream, n: int) -> Iterator[Reason]:
    rule = limits.collapse
    if s.last >= rule.calls:
        share, champion = s.last_bona_fide / s.last, s.last_champion / s.last
        if max(share, 1 - share) > rule.share and abs(share - champion) >= rule.min_gap:
            text = (
                f"{share:.1%} of the last {s.last} calls are bona fide, the champion's {champion:.1%}; "
                "at most "
                f"{rule.share:.1%} may be of one class: reset the boundary first, everything the second time"
            )
            yield _finding(
                "collapse", "fail", "calls", max(share, 1 - share), rule.share, text, advisory=rule.advisory
            )
    flips = s.flips_bona_fide + s.flips_attack
    if n and flips > rule.flips * n:
        text = (
            f"{flips} of {n} calls differ from the champion's ({s.flips_bona_fide} to bona fide), "
            f"limit {rule.flips:.1%}"
        )
        yield _finding("collapse", "hold", "flips", flips / n, rule.flips, text, advisory=rule.advisory)


def _drift(limits: GuardsConfig, s: Stream) -> Iterator[Reason]:
    rule, measured = limits.drift, {"entropy": s.drift_entropy, "attack score": s.drift_attack}
    limit, shifted = float(-np.log(rule.alpha)), False
    for what, log_e in measured.items():
        if log_e is not None and log_e >= limit:
            shifted = True
            text = f"the {what} has left the source distribution: log e-value {log_e:.2f}, limit {limit:.2f}"
            yield _finding("drift", "hold", what, log_e, limit, text, advisory=rule.advisory)
    known = [e for e in measured.values() if e is not None]
    if known and not shifted and s.taught_bona_fide + s.taught_attack:
        text = (
            "no shift from the source distribution, so no need to adapt: log e-value "
            f"{max(known):.2f} of {limit:.2f}"
        )
        yield _finding("drift", "hold", "no shift", max(known), limit, text, advisory=True)


def _risk(limits: GuardsConfig, s: Stream) -> Iterator[Reason]:
    rule = limits.risk
    if s.risk_lower is not None and s.risk_source is not None and s.risk_lower > s.risk_source + rule.epsilon:
        limit = s.risk_source + rule.epsilon
        text = (
            f"proxy risk is at least {s.risk_lower:.2%}, the source's at most {s.risk_source:.2%} + "
            f"{rule.epsilon:.2%}"
        )
        yield _finding("risk", "fail", "stream", s.risk_lower, limit, text, advisory=rule.advisory)


def _ratchet(limits: GuardsConfig, s: Stream) -> Iterator[Reason]:
    limit = float(-np.log(limits.ratchet.alpha))
    if s.ratchet is not None and s.ratchet >= limit:
        n, yes = (sum(h[k] for h in s.hours) for k in (0, 1))
        m, usual = (sum(h[k] for h in s.baseline) for k in (0, 1))
        text = (
            f"{yes} of {n} sessions are called bona fide, {usual} of {m} before, by hour of the day: log "
            "e-value "
            f"{s.ratchet:.2f}, limit {limit:.2f}; the site stays as it is"
        )
        yield _finding(
            "ratchet", "fail", "accept rate", s.ratchet, limit, text, advisory=limits.ratchet.advisory
        )


def _aged(rule: Expiry, s: Stream) -> Iterator[Reason]:
    for number, limit, unit in ((s.age_days, rule.state_days, "days"), (s.steps, rule.state_steps, "steps")):
        if number is not None and number > limit:
            text = (
                f"{number:.0f} {unit} since the state left the source model, at most {limit:g}: start "
                "from it again"
            )
            yield _finding("expiry", "fail", "state", number, limit, text, advisory=rule.advisory)


def _finding(
    guard: str, call: Call, where: str, number: float, limit: float, text: str, *, advisory: bool
) -> Reason:
    return Reason(
        guard=guard, call=call, where=where, number=number, limit=limit, text=text, advisory=advisory
    )
