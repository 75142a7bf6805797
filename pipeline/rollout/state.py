"""What the state machine remembers, what it is shown, and what it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import AwareDatetime, Field

from pipeline.rollout.plan import Plan
from pipeline.types import Section

if TYPE_CHECKING:
    from datetime import datetime


class Status(StrEnum):
    """Names the state of a rollout; README.md of this folder draws the transitions."""

    PLANNED = "planned"  # stored; nothing moves until one person approves it, or it expires
    APPROVED = "approved"  # approved once; the next reconcile starts wave 1
    STAGING = "staging"  # the sites of a wave are being pointed at their targets
    BAKING = "baking"  # the whole wave serves its targets; it must stay healthy for ``bake_seconds``
    HOLD = (
        "hold"  # something is missing (data, approvals, a freeze to end); goes on by itself once it is there
    )
    PAUSED = "paused"  # stopped by a person or by a hold that lasted too long; only a person resumes it
    ABORTING = "aborting"  # a guard or a person ended it; the rollback starts with the next step
    ROLLING_BACK = "rolling_back"  # promoted sites are being pointed back at what they served before
    COMPLETED = "completed"  # every wave has baked
    ROLLED_BACK = "rolled_back"  # no site serves its target any more, but for those that others moved since
    SUPERSEDED = "superseded"  # a newer release took over; promoted sites stay until that one moves them
    EXPIRED = "expired"  # it was not started in time; nothing was promoted


NOT_STARTED = frozenset({Status.PLANNED, Status.APPROVED})
IN_PROGRESS = frozenset({Status.STAGING, Status.BAKING, Status.HOLD})
IN_ROLLBACK = frozenset({Status.ABORTING, Status.ROLLING_BACK})
TERMINAL = frozenset({Status.COMPLETED, Status.ROLLED_BACK, Status.SUPERSEDED, Status.EXPIRED})


class RolloutError(ValueError):
    """Something the present state of a rollout does not allow."""


class Approval(Section):
    """Somebody looked at the plan and lets it start."""

    who: str
    at: AwareDatetime


class Override(Section):
    """Somebody wants to go on in spite of a hold; it counts for ``rollout.override_seconds`` once two people want it."""

    who: str
    reason: str
    at: AwareDatetime


class Rollout(Section):
    """A plan and how far it got; the whole memory of the state machine."""

    plan: Plan
    plan_hash: str
    status: Status
    wave: int = -1  # index of the last wave that was started
    since: AwareDatetime  # of the status
    baked_from: AwareDatetime | None = None  # when the whole wave was first seen to serve its target
    failed: dict[str, int] = Field(default={})  # rolled back one by one: site → wave
    joined: int = 0  # sites that were added to the last wave after the plan was made
    approvals: tuple[Approval, ...] = ()
    overrides: tuple[Override, ...] = ()
    reason: str = ""


class FailingSite(NamedTuple):
    """A promoted site that a guard wants rolled back."""

    wave: int  # index
    reason: str  # guard, number and limit


@dataclass(frozen=True)
class WaveObservation:
    """Counts the sites of a started wave, without those that failed and those that were retired."""

    sites: int
    not_serving: Mapping[str, int] = field(
        default_factory=dict[str, int]
    )  # time zone → sites without their target
    first_not_serving: str = ""  # one of these sites, for messages
    without_data: int = 0  # promoted sites with fewer than ``health_samples`` captures since
    first_without_data: str = ""  # one of these sites, for messages
    attack_presentations: int | None = (
        None  # labelled, since the promotion; None: not counted, so not required
    )


@dataclass(frozen=True)
class Observation:
    """Holds everything that the state machine decides on: the started waves and the findings of the guards."""

    waves: tuple[WaveObservation, ...] = ()
    returnable: int | None = None  # sites that a rollback still has to move; None: not counted, so not zero
    failed_returnable: int = 0  # failed sites that still serve their target
    failing: Mapping[str, FailingSite] = field(default_factory=dict[str, FailingSite])
    breach: tuple[str, ...] = ()  # findings that abort the release: site or "wave", guard, number, limit
    freeze: str = ""  # why nothing may be promoted now, e.g. the error budget; empty: it may


class Promote(Section):
    """Let the sites of ``wave`` that do not serve their target serve it, in these time zones (None = all)."""

    kind: Literal["promote"] = "promote"
    wave: int
    zones: tuple[str, ...] | None = None


class Rollback(Section):
    """Let sites that serve their target serve what the plan says they go back to: these, or all that were promoted (None).

    A site that serves something else was moved by someone later, who is not overruled.
    """

    kind: Literal["rollback"] = "rollback"
    sites: tuple[str, ...] | None = None


class Notify(Section):
    """The rollout ended, or waits for data or a person."""

    kind: Literal["notify"] = "notify"
    status: Status
    reason: str


Action = Promote | Rollback | Notify


def enter(r: Rollout, status: Status, now: datetime, **changes: object) -> Rollout:
    """``r`` in another status as of ``now``, with other changes to what it remembers."""
    return r.model_copy(update={"status": status, "since": now, **changes})
