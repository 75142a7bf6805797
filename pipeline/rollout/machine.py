"""The state machine that carries a plan out. It is asked repeatedly.

planned → approved → staging(w) → baking(w) → staging(w+1) … → completed; hold and paused between; aborting →
rolling_back → rolled_back; superseded, expired. ``advance`` is level-triggered: from the stored Rollout, what each site
serves now and the health reports it derives what to do now, so a repeated or crashed tick changes nothing.

A site that fails is rolled back by itself and stays out (``failed``). More than ``abort_share`` of a wave failing
aborts when they are ``abort_min_sites`` or the whole wave, else it holds; a ceiling breach always aborts. A wave ends
only with data from its sites; silence holds, and a hold past its deadline waits for a person. Rollback needs no health
report; it goes to what the site served last under a completed release, else to the source model.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.rollout.waves import Plan, Pointer, plan_hash
from pipeline.types import Section

if TYPE_CHECKING:
    from collections.abc import Sequence


class Status(StrEnum):
    """Where a rollout is."""

    PLANNED = "planned"
    APPROVED = "approved"
    STAGING = "staging"
    BAKING = "baking"
    HOLD = "hold"
    PAUSED = "paused"
    ABORTING = "aborting"
    ROLLING_BACK = "rolling_back"
    COMPLETED = "completed"
    ROLLED_BACK = "rolled_back"
    SUPERSEDED = "superseded"
    EXPIRED = "expired"


WAITING = frozenset({Status.PLANNED, Status.APPROVED})
FLYING = frozenset({Status.STAGING, Status.BAKING, Status.HOLD})
TERMINAL = frozenset({Status.COMPLETED, Status.ROLLED_BACK, Status.SUPERSEDED, Status.EXPIRED})


class RolloutError(ValueError):
    """Something the present state of a rollout does not allow."""


class Rollout(Section):
    """A plan and how far it got; the whole memory of the state machine."""

    plan: Plan
    plan_hash: str
    status: Status
    wave: int = -1  # index of the last wave that was started
    since: datetime  # of the status
    baked_from: datetime | None = None  # when the whole wave was first seen to serve its target
    failed: tuple[str, ...] = ()  # rolled back one by one; sorted
    approved_by: str = ""
    reason: str = ""


class HealthReport(Section):
    """One site since it serves its target. A report about what it served before must not be passed on."""

    health: Literal["ok", "failing", "no_data"]
    breach: bool = False  # a ceiling is exceeded
    reasons: tuple[str, ...] = ()


class WaveEvidence(Section):
    """What is known now; a site that is not in ``health`` has no data."""

    serving: dict[str, Pointer]
    health: dict[str, HealthReport] = Field(default={})


class Promote(Section):
    """Let ``site`` serve its candidate."""

    kind: Literal["promote"] = "promote"
    site: str
    to: Pointer
    verdict_id: str


class Rollback(Section):
    """Let ``site`` serve what it served before."""

    kind: Literal["rollback"] = "rollback"
    site: str
    to: Pointer


class Notify(Section):
    """The rollout ended, or waits for a person."""

    kind: Literal["notify"] = "notify"
    status: Status
    reason: str


Action = Promote | Rollback | Notify


def start(plan: Plan, now: datetime) -> Rollout:
    """A planned rollout; it does nothing until it is approved."""
    return Rollout(plan=plan, plan_hash=plan_hash(plan), status=Status.PLANNED, since=now)


def approve(r: Rollout, *, hash: str, who: str, now: datetime) -> Rollout:
    """Let it start. ``hash`` must be that of the stored plan: what was looked at is what runs."""
    if hash != r.plan_hash:
        raise RolloutError(f"plan hash {hash[:12]}: the stored plan is {r.plan_hash[:12]}; plan again and look at it")
    if r.status != Status.PLANNED:
        return r if r.status == Status.APPROVED else _refuse(r, "approved")
    return _to(r, Status.APPROVED, now, approved_by=who)


def pause(r: Rollout, *, reason: str, now: datetime) -> Rollout:
    """Stop promoting; what was promoted stays."""
    if r.status == Status.PAUSED:
        return r
    return _to(r, Status.PAUSED, now, reason=reason) if r.status in FLYING else _refuse(r, "paused")


def resume(r: Rollout, *, now: datetime) -> Rollout:
    """Go on with the wave that was paused; it bakes anew."""
    return _to(r, Status.STAGING, now, baked_from=None) if r.status == Status.PAUSED else _refuse(r, "resumed")


def abort(r: Rollout, *, reason: str, now: datetime) -> Rollout:
    """End it and go back. Also takes back a completed rollout; during a rollback it changes nothing."""
    if r.status in {Status.ABORTING, Status.ROLLING_BACK}:
        return r
    if r.status in {Status.SUPERSEDED, Status.EXPIRED}:
        return _refuse(r, "rolled back")
    return _to(r, Status.ABORTING, now, reason=reason)


def supersede(r: Rollout, *, by: str, now: datetime) -> Rollout:
    """A newer release takes over; promoted sites stay where they are until that one moves them."""
    if r.status in TERMINAL or r.status in {Status.ABORTING, Status.ROLLING_BACK}:
        return _refuse(r, "superseded")
    return _to(r, Status.SUPERSEDED, now, reason=f"superseded by {by}")


def advance(r: Rollout, evidence: WaveEvidence, now: datetime) -> tuple[Rollout, tuple[Action, ...]]:
    """What to do now; asking again with the same evidence gives the same state, promotions and rollbacks."""
    if now < r.since:  # the clock went back: waiting starts anew and does not last until the old time comes again
        r = r.model_copy(update={"since": now, "baked_from": r.baked_from and now})
    if r.status in WAITING:
        if _over(r.since, now, r.plan.config.expire_seconds):
            return _end(r, Status.EXPIRED, now, "not started in time; plan again")
        if r.status == Status.PLANNED:
            return r, ()
        r = _to(r, Status.STAGING, now, wave=0)
    if r.status in FLYING or r.status == Status.PAUSED:
        r = _latch(r, evidence)
        why = _abort_reason(r, evidence)
        if not why:
            return _fly(r, evidence, now)
        r = _to(r, Status.ABORTING, now, reason=why)
    if r.status in {Status.ABORTING, Status.ROLLING_BACK}:
        return _roll_back(r, evidence, now)
    return r, ()


def _fly(r: Rollout, e: WaveEvidence, now: datetime) -> tuple[Rollout, tuple[Action, ...]]:
    p, c = r.plan, r.plan.config
    if r.wave >= len(p.waves):
        return _end(r, Status.COMPLETED, now, f"{len(p.targets) - len(r.failed)} of {len(p.targets)} sites promoted")
    back = _returns(r, r.failed, e)
    failed = set(r.failed)
    late = [s for s in p.waves[r.wave].sites if s not in failed and e.serving.get(s) != p.targets[s].to]
    if r.status == Status.PAUSED:
        return r, back
    promote = tuple(Promote(site=s, to=p.targets[s].to, verdict_id=p.targets[s].verdict_id) for s in late)
    if late:
        blocked = f"{len(late)} sites of wave {r.wave + 1} do not serve their candidate, first {late[0]}"
        if r.status == Status.STAGING and not _over(r.since, now, c.stage_seconds):
            return r, back + promote
    else:
        if r.baked_from is None:
            r = _to(r, Status.BAKING, now, baked_from=now)
        assert r.baked_from is not None
        if now - r.baked_from < timedelta(seconds=c.bake_seconds):
            return (r if r.status == Status.BAKING else _to(r, Status.BAKING, now)), back
        blocked = _blocked(r, e) or (f"{len(back)} failed sites are not rolled back yet" if back else "")
    if not blocked:
        return _fly(_to(r, Status.STAGING, now, wave=r.wave + 1, baked_from=None, reason=""), e, now)
    if r.status != Status.HOLD:
        r = _to(r, Status.HOLD, now, reason=blocked)
    elif _over(r.since, now, c.hold_seconds):
        r, notes = _end(r, Status.PAUSED, now, f"held too long: {blocked}")
        return r, back + notes
    return r, back + promote


def _roll_back(r: Rollout, e: WaveEvidence, now: datetime) -> tuple[Rollout, tuple[Action, ...]]:
    todo = _returns(r, _promoted(r), e)
    if not todo:
        return _end(r, Status.ROLLED_BACK, now, r.reason)
    return (r if r.status == Status.ROLLING_BACK else _to(r, Status.ROLLING_BACK, now)), todo


def _returns(r: Rollout, sites: Sequence[str], e: WaveEvidence) -> tuple[Rollback, ...]:
    """Rollbacks of the sites that serve their target, or of which nobody knows what they serve.

    A site that serves something else was moved by someone later, who is not overruled.
    """
    targets = ((s, r.plan.targets[s]) for s in sites)
    return tuple(Rollback(site=s, to=t.back) for s, t in targets if e.serving.get(s, t.to) == t.to != t.back)


def _latch(r: Rollout, e: WaveEvidence) -> Rollout:
    """A site that failed once stays out: after its rollback its reports are about something else."""
    now_failing = {s for s, h in _reports(r, e) if h.health == "failing"}
    if now_failing <= set(r.failed):
        return r
    return r.model_copy(update={"failed": tuple(sorted(now_failing | set(r.failed)))})


def _abort_reason(r: Rollout, e: WaveEvidence) -> str:
    for site, report in _reports(r, e):
        if report.breach:
            return f"{site} exceeds a ceiling: {'; '.join(report.reasons) or 'no reason given'}"
    for i, count in enumerate(_failed_per_wave(r)):
        wave = r.plan.waves[i]
        if count >= wave.abort_at:
            return f"{count} of {len(wave.sites)} sites of wave {i + 1} fail; {wave.abort_at} abort"
    return ""


def _blocked(r: Rollout, e: WaveEvidence) -> str:
    """Why the wave cannot end though it has baked."""
    c, failed = r.plan.config, set(r.failed)
    for i, count in enumerate(_failed_per_wave(r)):
        wave = r.plan.waves[i]
        if count > c.abort_share * len(wave.sites):
            return f"{count} of {len(wave.sites)} sites of wave {i + 1} fail"
        silent = [s for s in wave.sites if s not in failed and (s not in e.health or e.health[s].health != "ok")]
        if len(silent) > c.missing_share * len(wave.sites):
            return f"no data from {len(silent)} of {len(wave.sites)} sites of wave {i + 1}, first {silent[0]}"
    return ""


def _reports(r: Rollout, e: WaveEvidence) -> list[tuple[str, HealthReport]]:
    """Reports of promoted sites about their target."""
    targets = r.plan.targets
    known = ((s, e.health[s]) for s in _promoted(r) if s in e.health)
    return [(s, h) for s, h in known if e.serving.get(s, targets[s].to) == targets[s].to]


def _promoted(r: Rollout) -> list[str]:
    return [s for w in r.plan.waves[: r.wave + 1] for s in w.sites]


def _failed_per_wave(r: Rollout) -> list[int]:
    failed = set(r.failed)
    return [sum(s in failed for s in w.sites) for w in r.plan.waves[: r.wave + 1]]


def _over(since: datetime, now: datetime, seconds: float) -> bool:
    return now - since > timedelta(seconds=seconds)


def _to(r: Rollout, status: Status, now: datetime, **changes: object) -> Rollout:
    return r.model_copy(update={"status": status, "since": now, **changes})


def _end(r: Rollout, status: Status, now: datetime, reason: str) -> tuple[Rollout, tuple[Action, ...]]:
    return _to(r, status, now, reason=reason), (Notify(status=status, reason=reason),)


def _refuse(r: Rollout, what: str) -> Rollout:
    raise RolloutError(f"rollout of {r.plan.release} is {r.status}; it cannot be {what}")
