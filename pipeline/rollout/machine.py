"""Carries a plan out: one pure function from the stored rollout and an observation to the next step.

``advance`` is level-triggered: it derives the actions from the stored Rollout and the present observation of
the sites, not from events, so a repeated or crashed reconcile changes nothing. README.md of this folder draws
the states.

A failing site is rolled back alone and stays out (``failed``). More than ``abort_share`` of a wave failing
aborts if they are ``abort_min_sites`` or the whole wave, else it holds; a breach always aborts. A wave begins
only with the approvals that its share needs, outside freeze windows and within the sites' nights. It ends
only with data from its sites: without data it holds, and a hold past its deadline waits for a person. Two
people may override a hold for a while, never an approval or a breach. A rollback needs no report and no
approval; a site goes back to what it served last under a completed release, else to the source model.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from pipeline.rollout.calendar import DAY, active_freeze, waiting_since, zones_at_night
from pipeline.rollout.operators import approvals_needed, approvers, override_active
from pipeline.rollout.state import (
    IN_PROGRESS,
    NOT_STARTED,
    TERMINAL,
    Action,
    Notify,
    Observation,
    Promote,
    Rollback,
    Rollout,
    Status,
    WaveObservation,
    enter,
)

if TYPE_CHECKING:
    from datetime import datetime

    Step = tuple[Rollout, tuple[Action, ...]]


def advance(r: Rollout, observation: Observation, now: datetime) -> Step:
    """Returns the rollout after this step and the actions to carry out now.

    Idempotent: the same observation gives the same state and actions.
    """
    if r.status in TERMINAL:
        return r, ()
    if now < r.since:
        r, stopped = _turned_back(r, now)
        if stopped:
            return r, stopped
    if r.status in NOT_STARTED:
        if _over(r.since, now, r.plan.config.expire_seconds):
            return _end(r, Status.EXPIRED, now, "not started in time; plan again")
        if r.status == Status.PLANNED:
            return r, ()
        r = enter(r, Status.STAGING, now, wave=0)
    if r.status in IN_PROGRESS or r.status == Status.PAUSED:
        r = _latch(r, observation)
        why = _abort_reason(r, observation)
        if not why:
            return _promote_waves(r, observation, now)
        r = enter(r, Status.ABORTING, now, reason=why)
    return _roll_back(r, observation, now)


def _turned_back(r: Rollout, now: datetime) -> Step:
    """Restarts every wait at ``now`` after the clock went back; a wave in progress holds once and says so."""
    gap = (r.since - now).total_seconds()
    r = r.model_copy(update={"since": now, "baked_from": r.baked_from and now})
    if r.status not in IN_PROGRESS:
        return r, ()
    reason = f"the clock went back by {gap:.0f} s: wave {r.wave + 1} bakes anew"
    return enter(r, Status.HOLD, now, reason=reason), (Notify(status=Status.HOLD, reason=reason),)


def _promote_waves(r: Rollout, observation: Observation, now: datetime) -> Step:
    p, c = r.plan, r.plan.config
    if r.wave >= len(p.waves):
        promoted = sum(w.sites for w in observation.waves)
        return _end(r, Status.COMPLETED, now, f"{promoted} of {promoted + len(r.failed)} sites promoted")
    back: tuple[Action, ...] = (
        (Rollback(sites=tuple(sorted(r.failed))),) if _unreturned(r, observation) else ()
    )
    if r.status == Status.PAUSED:
        return r, back
    wave = observation.waves[r.wave] if r.wave < len(observation.waves) else None
    if wave is None or wave.not_serving:
        return _stage(r, observation, wave, now, back)
    if r.baked_from is None:
        r = enter(r, Status.BAKING, now, baked_from=now, reason="")
    assert r.baked_from is not None
    if now - r.baked_from < timedelta(seconds=c.bake_seconds):
        return (r if r.status == Status.BAKING else enter(r, Status.BAKING, now)), back
    blocked = _blocked(r, observation) or (
        f"{observation.failed_returnable} failed sites are not rolled back yet" if back else ""
    )
    if blocked and not (override_active(r, now) and not back):
        return _hold(r, now, blocked, back)
    next_wave = enter(r, Status.STAGING, now, wave=r.wave + 1, baked_from=None, reason="")
    return _promote_waves(next_wave, observation, now)


def _stage(
    r: Rollout,
    observation: Observation,
    wave: WaveObservation | None,
    now: datetime,
    back: tuple[Action, ...],
) -> Step:
    """Promotes the sites of the wave that do not serve their target yet, where and while that is allowed."""
    c = r.plan.config
    gate = _gate(r, observation, now)
    if gate:
        return _hold(r, now, gate, back)
    if r.status == Status.HOLD and (wave is None or sum(wave.not_serving.values()) == wave.sites):
        r = enter(r, Status.STAGING, now, reason="")  # the gate that held it is open
    zones = zones_at_night(c.night, r.plan.zones, now)
    promote = (Promote(wave=r.wave, zones=zones),) if zones is None or zones else ()
    allowed = c.stage_seconds + (DAY.total_seconds() if c.night else 0)
    if wave is None or (r.status == Status.STAGING and not _over(r.since, now, allowed)):
        return r, back + promote
    late = sum(wave.not_serving.values())
    return _hold(
        r,
        now,
        f"{late} sites of wave {r.wave + 1} do not serve their candidate, first {wave.first_not_serving}",
        back + promote,
    )


def _gate(r: Rollout, observation: Observation, now: datetime) -> str:
    """Returns why nothing may be promoted now; empty where it may."""
    share, approved = r.plan.waves[r.wave].share, len(approvers(r))
    if approved < (needed := approvals_needed(r.plan, r.wave)):
        return (
            f"wave {r.wave + 1} reaches {share:.0%} of the fleet: {approved} of {needed} people approved; "
            f"somebody else has to say `palisade rollout approve {r.plan_hash[:8]}`"
        )
    if override_active(r, now):
        return ""
    if observation.freeze:
        return observation.freeze
    window = active_freeze(r.plan.config.freeze, now)
    return f"no promotions until {window.end:%Y-%m-%d %H:%M} UTC: {window.reason}" if window else ""


def _hold(r: Rollout, now: datetime, why: str, actions: tuple[Action, ...]) -> Step:
    c = r.plan.config
    if r.status != Status.HOLD:
        return enter(r, Status.HOLD, now, reason=why), (*actions, Notify(status=Status.HOLD, reason=why))
    waited_from = waiting_since(c.freeze, r.since, now)
    if active_freeze(c.freeze, now) is None and _over(waited_from, now, c.hold_seconds):
        r, notes = _end(r, Status.PAUSED, now, f"held too long: {why}")
        return r, tuple(a for a in actions if not isinstance(a, Promote)) + notes
    return r.model_copy(update={"reason": why}), actions


def _roll_back(r: Rollout, observation: Observation, now: datetime) -> Step:
    if observation.returnable == 0:
        return _end(r, Status.ROLLED_BACK, now, r.reason)
    return (r if r.status == Status.ROLLING_BACK else enter(r, Status.ROLLING_BACK, now)), (
        Rollback(sites=None),
    )


def _unreturned(r: Rollout, observation: Observation) -> bool:
    return observation.failed_returnable > 0 or any(site in r.failed for site in observation.failing)


def _latch(r: Rollout, observation: Observation) -> Rollout:
    """Adds newly failing sites to ``failed`` for good: once rolled back, a site reports on another state."""
    new = {site: f.wave for site, f in observation.failing.items() if site not in r.failed}
    return r.model_copy(update={"failed": {**r.failed, **new}}) if new else r


def _abort_reason(r: Rollout, observation: Observation) -> str:
    if observation.breach:
        return observation.breach[0]
    for i, count in _failed_per_wave(r):
        wave = r.plan.waves[i]
        if count >= wave.abort_at:
            why = next((f"; {f.reason}" for _, f in sorted(observation.failing.items()) if f.wave == i), "")
            return f"{count} of {wave.sites} sites of wave {i + 1} fail; {wave.abort_at} abort{why}"
    return ""


def _blocked(r: Rollout, observation: Observation) -> str:
    """Returns why the wave cannot end though it has baked; empty where it can."""
    c = r.plan.config
    for i, count in _failed_per_wave(r):
        if count > c.abort_share * r.plan.waves[i].sites:
            return f"{count} of {r.plan.waves[i].sites} sites of wave {i + 1} fail"
    for i, w in enumerate(observation.waves[: r.wave + 1]):
        if w.without_data > c.missing_share * w.sites:
            first = w.first_without_data
            return f"no data from {w.without_data} of {w.sites} sites of wave {i + 1}, first {first}"
    w = observation.waves[r.wave]
    if w.attack_presentations is not None and w.attack_presentations < c.health_presentations:
        return (
            f"wave {r.wave + 1} saw {w.attack_presentations} labelled attack presentations, "
            f"rollout.health_presentations wants {c.health_presentations}; "
            "record what the red team presents in data.labels"
        )
    return ""


def _failed_per_wave(r: Rollout) -> list[tuple[int, int]]:
    counts = dict.fromkeys(range(min(r.wave + 1, len(r.plan.waves))), 0)
    for wave in r.failed.values():
        counts[wave] = counts.get(wave, 0) + 1
    return sorted(counts.items())


def _over(since: datetime, now: datetime, seconds: float) -> bool:
    return now - since > timedelta(seconds=seconds)


def _end(r: Rollout, status: Status, now: datetime, reason: str) -> Step:
    return enter(r, status, now, reason=reason), (Notify(status=status, reason=reason),)
