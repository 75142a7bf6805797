"""How a release travels over the fleet: a plan with explicit site ids, and a state machine that is asked repeatedly.

Pure: no clock, file, network or chance. This file holds the section ``rollout``. A Plan that nobody stored is a draft.

planned → approved → staging(w) → baking(w) → staging(w+1) … → completed; hold and paused between; aborting →
rolling_back → rolled_back; superseded, expired. ``advance`` is level-triggered: from the stored Rollout, what each site
serves now and the health reports it derives what to do now, so a repeated or crashed tick changes nothing.

A site that fails is rolled back by itself and stays out (``failed``). More than ``abort_share`` of a wave failing
aborts when they are ``abort_min_sites`` or the whole wave, else it holds; a ceiling breach always aborts. A wave ends
only with data from its sites; silence holds, and a hold past its deadline waits for a person. Rollback needs no health
report; it goes to what the site served last under a completed release, else to the source model.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pipeline.types import Section

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class RolloutConfig(Section):
    """Section ``rollout``."""

    waves: tuple[float, ...] = Field(default=(0.01, 0.05, 0.2, 0.5, 1.0), description="cumulative shares of the fleet")
    stage_seconds: float = Field(default=600, ge=0, description="time for the sites of a wave to take the new state")
    bake_seconds: float = Field(default=3600, ge=0, description="time a wave must do well before the next one")
    hold_seconds: float = Field(default=86_400, ge=0, description="a hold longer than this is paused for a person")
    expire_seconds: float = Field(default=86_400, gt=0, description="a plan not started by then expires")
    rollback_seconds: float = Field(default=300, gt=0, description="bound for sites to take a rollback")
    abort_share: float = Field(default=0.02, ge=0, lt=1, description="more than this of a wave failing aborts")
    abort_min_sites: int = Field(default=5, ge=1, description="and at least so many sites, or the whole wave")
    missing_share: float = Field(default=0.0, ge=0, lt=1, description="share of a wave that may end it without data")
    control_share: float = Field(default=0.05, ge=0, lt=1, description="sites kept on the source model for good")
    control_min_sites: int = Field(default=10, ge=1, description="strata smaller than this need no control")
    health_samples: int = Field(
        default=50, ge=0, description="captures a promoted site must bring before it counts as data"
    )
    stratum: str = Field(default="", description="tag whose values are the strata of the controls; empty = one stratum")
    seed: int = 0

    @model_validator(mode="after")
    def _rising(self) -> RolloutConfig:
        if not self.waves or self.waves[-1] != 1 or list(self.waves) != sorted({w for w in self.waves if w > 0}):
            raise ValueError(f"waves {list(self.waves)}: rising shares above 0 that end with 1.0 are needed")
        return self


class RolloutError(ValueError):
    """Something the present state of a rollout does not allow."""


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


class Pointer(Section):
    """What a site serves: a state of the ledger, or the bare source model (``state_id`` None)."""

    state_id: str | None
    source_version: int


class Candidate(Section):
    """What a site may be promoted to, with its stored verdict."""

    to: Pointer
    verdict_id: str | None
    outcome: Literal["pass", "fail", "hold"]
    reason: str = ""


class SiteFacts(Section):
    """What the plan needs of one site. ``last_good`` was served under a release that completed and still passes."""

    serving: Pointer | None
    last_good: Pointer | None = None
    candidate: Candidate | None = None
    control: bool = False


class Target(Section):
    """One planned site."""

    to: Pointer
    back: Pointer  # where a rollback goes
    verdict_id: str


class Excluded(Section):
    """Why a site is in no wave."""

    reason: str
    verdict_id: str | None = None


class Wave(Section):
    """Sites promoted together; ``abort_at`` failing sites abort the rollout."""

    share: float
    sites: tuple[str, ...]
    abort_at: int


class Plan(Section):
    """What will happen, site by site. Sites that join later wait for the next release."""

    release: str
    waves: tuple[Wave, ...]
    targets: dict[str, Target]
    controls: tuple[str, ...]
    excluded: dict[str, Excluded]
    duration_seconds: float  # predicted: staging and baking of every wave
    rollback_seconds: float
    config: RolloutConfig


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


class PlanDiff(Section):
    """What plan b does otherwise than plan a."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    retargeted: tuple[str, ...]
    moved: dict[str, tuple[int, int]]  # site → wave index in a, in b


def plan(release: str, sites: Mapping[str, SiteFacts], source_version: int, config: RolloutConfig) -> Plan:
    """Waves over the sites whose candidate has a passing verdict; the same inputs give the same plan.

    ``source_version`` is the source model that sites without a good earlier version go back to.
    """
    excluded: dict[str, Excluded] = {}
    targets: dict[str, Target] = {}
    for site, facts in sorted(sites.items()):
        if facts.control:
            continue
        why = _why_not(facts)
        c = facts.candidate
        if why or c is None or c.verdict_id is None:
            excluded[site] = Excluded(reason=why or "no candidate", verdict_id=c.verdict_id if c else None)
        else:
            good = facts.last_good if facts.last_good != c.to else None
            back = good or Pointer(state_id=None, source_version=source_version)
            targets[site] = Target(to=c.to, back=back, verdict_id=c.verdict_id)
    order = sorted(targets, key=lambda site: (_draw(config.seed, release, site), site))
    waves: list[Wave] = []
    start = 0
    for share in config.waves:
        end = len(order) if share == 1 else max(1, int(share * len(order)))
        if members := tuple(sorted(order[start:end])):
            waves.append(Wave(share=share, sites=members, abort_at=_abort_at(config, len(members))))
        start = max(start, end)
    return Plan(
        release=release, waves=tuple(waves), targets=targets, excluded=excluded, config=config,
        controls=tuple(s for s, f in sorted(sites.items()) if f.control),
        duration_seconds=len(waves) * (config.stage_seconds + config.bake_seconds),
        rollback_seconds=config.rollback_seconds,
    )  # fmt: skip


def choose_controls(tags: Mapping[str, Mapping[str, str]], config: RolloutConfig) -> tuple[str, ...]:
    """Control sites: ``control_share`` of every stratum, at least one where it has ``control_min_sites``.

    Taken in an order that depends on the site id only, so that a growing fleet keeps the controls it has.
    """
    strata: dict[str, list[str]] = {}
    for site, tag in tags.items():
        strata.setdefault(tag.get(config.stratum, ""), []).append(site)
    chosen: list[str] = []
    for members in strata.values():
        least = 1 if len(members) >= config.control_min_sites and config.control_share > 0 else 0
        members.sort(key=lambda site: (_draw(config.seed, "control", site), site))
        chosen += members[: max(least, int(config.control_share * len(members)))]
    return tuple(sorted(chosen))


def plan_hash(plan: Plan) -> str:
    """sha256 of the plan as canonical JSON: what ``apply`` must name."""
    text = json.dumps(plan.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def diff(a: Plan, b: Plan) -> PlanDiff:
    """What ``b`` does otherwise than ``a``."""
    wave_a, wave_b = ({s: i for i, w in enumerate(p.waves) for s in w.sites} for p in (a, b))
    both = sorted(wave_a.keys() & wave_b.keys())
    return PlanDiff(
        added=tuple(sorted(wave_b.keys() - wave_a.keys())), removed=tuple(sorted(wave_a.keys() - wave_b.keys())),
        retargeted=tuple(s for s in both if a.targets[s].to != b.targets[s].to),
        moved={s: (wave_a[s], wave_b[s]) for s in both if wave_a[s] != wave_b[s]},
    )  # fmt: skip


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


def _abort_at(config: RolloutConfig, sites: int) -> int:
    return max(int(config.abort_share * sites) + 1, min(config.abort_min_sites, sites))


def _why_not(facts: SiteFacts) -> str:
    c = facts.candidate
    if c is None:
        return "no candidate"
    if c.outcome != "pass" or c.verdict_id is None:
        return f"verdict {c.outcome}: {c.reason}" if c.verdict_id is not None else "no stored verdict"
    return "already serves it" if facts.serving == c.to else ""


def _draw(seed: int, purpose: str, site: str) -> bytes:
    return hashlib.sha256(f"{seed}/{purpose}/{site}".encode()).digest()


def _over(since: datetime, now: datetime, seconds: float) -> bool:
    return now - since > timedelta(seconds=seconds)


def _to(r: Rollout, status: Status, now: datetime, **changes: object) -> Rollout:
    return r.model_copy(update={"status": status, "since": now, **changes})


def _end(r: Rollout, status: Status, now: datetime, reason: str) -> tuple[Rollout, tuple[Action, ...]]:
    return _to(r, status, now, reason=reason), (Notify(status=status, reason=reason),)


def _refuse(r: Rollout, what: str) -> Rollout:
    raise RolloutError(f"rollout of {r.plan.release} is {r.status}; it cannot be {what}")
