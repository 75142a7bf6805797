"""Applies people's steps to a rollout: start, approve, override, pause, resume, retry, abort, join."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from pipeline.rollout.plan import Plan, plan_hash
from pipeline.rollout.state import (
    IN_PROGRESS,
    IN_ROLLBACK,
    NOT_STARTED,
    TERMINAL,
    Approval,
    Override,
    Rollout,
    RolloutError,
    Status,
    enter,
)

if TYPE_CHECKING:
    from datetime import datetime


def start(plan: Plan, now: datetime) -> Rollout:
    """Returns the rollout of a new plan; it does nothing until it is approved."""
    return Rollout(plan=plan, plan_hash=plan_hash(plan), status=Status.PLANNED, since=now)


def approve(r: Rollout, *, hash: str, who: str, now: datetime) -> Rollout:
    """Returns ``r`` with one more person's approval; the first lets it start.

    ``hash`` must be the stored plan's: the plan that somebody looked at is the one that runs. Raises
    RolloutError.
    """
    if hash != r.plan_hash:
        raise RolloutError(
            f"plan hash {hash[:12]}: the stored plan is {r.plan_hash[:12]}; plan again and look at it"
        )
    if r.status in TERMINAL | IN_ROLLBACK:
        return _refuse(r, "approved")
    if who not in approvers(r):
        r = r.model_copy(update={"approvals": (*r.approvals, Approval(who=who, at=now))})
    return enter(r, Status.APPROVED, now) if r.status == Status.PLANNED else r


def approvers(r: Rollout) -> frozenset[str]:
    """Returns the names of the people who approved."""
    return frozenset(a.who for a in r.approvals)


def approvals_needed(plan: Plan, wave: int) -> int:
    """Returns how many people must have approved before the wave with index ``wave`` begins: 1 or 2."""
    from_share, sites = plan.config.second_approval_from_share, [w.sites for w in plan.waves]
    reached = max(plan.waves[wave].share, sum(sites[: wave + 1]) / max(sum(sites), 1))  # few sites round up
    return 2 if from_share is not None and reached >= from_share else 1


def override(r: Rollout, *, who: str, reason: str, now: datetime) -> Rollout:
    """Returns ``r`` with one person's wish to go on in spite of a hold; two people's count.

    It stands in for missing data or presentations, for failed sites that are too few to abort, and for a
    freeze; never for an approval, a breach or a failed site that is not rolled back yet. Raises RolloutError.
    """
    if not reason.strip():
        raise RolloutError("an override needs a reason; say why with --reason")
    if r.status not in IN_PROGRESS | {Status.PAUSED}:
        return _refuse(r, "overridden")
    others = tuple(o for o in r.overrides if o.who != who and _lasts(r, o, now))
    return r.model_copy(update={"overrides": (*others, Override(who=who, reason=reason, at=now))})


def override_active(r: Rollout, now: datetime) -> bool:
    """Returns whether the overrides of two people are in force."""
    return len({o.who for o in r.overrides if _lasts(r, o, now)}) >= 2


def pause(r: Rollout, *, reason: str, now: datetime) -> Rollout:
    """Stops promoting; promoted sites keep their targets."""
    if r.status == Status.PAUSED:
        return r
    return enter(r, Status.PAUSED, now, reason=reason) if r.status in IN_PROGRESS else _refuse(r, "paused")


def resume(r: Rollout, *, now: datetime) -> Rollout:
    """Goes on with the wave that was paused; it bakes anew."""
    if r.status != Status.PAUSED:
        return _refuse(r, "resumed")
    return enter(r, Status.STAGING, now, baked_from=None, reason="")


def retry(r: Rollout, *, now: datetime) -> Rollout:
    """Promotes the failed sites of the present wave again, after a person found the cause; the wave bakes
    anew.

    Failed sites of earlier waves stay out: their wave is over, and the next release plans them again.
    """
    if r.status not in IN_PROGRESS | {Status.PAUSED}:
        return _refuse(r, "retried")
    earlier = {site: wave for site, wave in r.failed.items() if wave != r.wave}
    if len(earlier) == len(r.failed):
        raise RolloutError(
            f"no site of wave {r.wave + 1} failed; those of earlier waves wait for the next release"
        )
    return enter(r, Status.STAGING, now, baked_from=None, failed=earlier, reason="")


def abort(r: Rollout, *, reason: str, now: datetime) -> Rollout:
    """Ends the rollout and rolls it back, also a completed one; during a rollback it changes nothing."""
    if r.status in IN_ROLLBACK:
        return r
    if r.status in {Status.SUPERSEDED, Status.EXPIRED}:
        return _refuse(r, "rolled back")
    return enter(r, Status.ABORTING, now, reason=reason)


def supersede(r: Rollout, *, by: str, now: datetime) -> Rollout:
    """Ends the rollout in favour of a newer release; promoted sites stay until that one moves them."""
    if r.status in TERMINAL | IN_ROLLBACK:
        return _refuse(r, "superseded")
    return enter(r, Status.SUPERSEDED, now, reason=f"superseded by {by}")


def open_to_joiners(r: Rollout) -> bool:
    """Returns whether sites may still join: the last wave takes them until it begins."""
    return (r.status in NOT_STARTED | IN_PROGRESS | {Status.PAUSED}) and r.wave < len(r.plan.waves) - 1


def join(r: Rollout, *, count: int) -> Rollout:
    """Returns ``r`` with ``count`` more sites in its last wave; raises RolloutError once that began."""
    if not open_to_joiners(r):
        return _refuse(r, "joined any more")
    return r.model_copy(update={"joined": r.joined + count}) if count else r


def _lasts(r: Rollout, o: Override, now: datetime) -> bool:
    return o.at <= now < o.at + timedelta(seconds=r.plan.config.override_seconds)


def _refuse(r: Rollout, what: str) -> Rollout:
    raise RolloutError(f"rollout of {r.plan.release} is {r.status}; it cannot be {what}")
