"""Defines the memory of the state machine, its input, and its actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import AwareDatetime, Field

from pipeline.rollout.plan import Plan
from pipeline.types import PalisadeError, Section

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


class RolloutError(PalisadeError, ValueError):
    """A step that the present state of a rollout does not allow; the message is one line."""


class Approval(Section):
    """Records that one person looked at the plan with this hash and lets it start."""

    who: str
    at: AwareDatetime


class Override(Section):
    """Records one person's wish to go on in spite of a hold; two people's count, for ``override_seconds``."""

    who: str
    reason: str
    at: AwareDatetime


class Rollout(Section):
    """Holds a plan and how far it got: the whole memory of the state machine, stored as JSON."""

    plan: Plan
    plan_hash: str
    status: Status
    wave: int = -1  # index of the newest wave that was started
    since: AwareDatetime  # when it entered the status
    baked_from: AwareDatetime | None = None  # when the whole wave was first observed to serve its targets
    failed: dict[str, int] = Field(default={})  # sites that were rolled back alone → index of their wave
    joined: int = 0  # sites that were added to the last wave after the plan was made
    approvals: tuple[Approval, ...] = ()
    overrides: tuple[Override, ...] = ()
    reason: str = ""  # why it holds, paused or ended


class FailingSite(NamedTuple):
    """A promoted site that a guard wants rolled back."""

    wave: int  # index
    reason: str  # guard, number and limit


@dataclass(frozen=True)
class WaveObservation:
    """Counts the sites of a started wave, without those that failed and those that were retired."""

    sites: int
    # sites that do not serve their target, by time zone
    not_serving: Mapping[str, int] = field(default_factory=dict[str, int])
    first_not_serving: str = ""  # one of these sites, for messages
    without_data: int = 0  # promoted sites with fewer than ``health_samples`` captures since
    first_without_data: str = ""  # one of these sites, for messages
    attack_presentations: int | None = (
        None  # labelled, since the promotion; None: not counted, so not required
    )


@dataclass(frozen=True)
class Observation:
    """Holds everything that the state machine decides on: the started waves and the findings of the
    guards."""

    waves: tuple[WaveObservation, ...] = ()
    returnable: int | None = None  # sites that a rollback still has to move; None: not counted, so not zero
    failed_returnable: int = 0  # failed sites that still serve their target
    failing: Mapping[str, FailingSite] = field(default_factory=dict[str, FailingSite])
    breach: tuple[str, ...] = ()  # findings that abort the release: site or "wave", guard, number, limit
    freeze: str = ""  # why nothing may be promoted now, e.g. the error budget; empty: it may


class Promote(Section):
    """Points the sites of ``wave`` at their targets, those in the time zones ``zones`` (None: all)."""

    kind: Literal["promote"] = "promote"
    wave: int
    zones: tuple[str, ...] | None = None


class Rollback(Section):
    """Points sites that serve their target at what they go back to: ``sites``, or all promoted ones (None).

    A site that serves something else is left alone: a later release or a person moved it.
    """

    kind: Literal["rollback"] = "rollback"
    sites: tuple[str, ...] | None = None


class Notify(Section):
    """Tells people that the rollout ended, or that it waits for data or for a person."""

    kind: Literal["notify"] = "notify"
    status: Status
    reason: str


Action = Promote | Rollback | Notify


def enter(r: Rollout, status: Status, now: datetime, **changes: object) -> Rollout:
    """Returns ``r`` in ``status`` since ``now``, with ``changes`` to its other fields."""
    return r.model_copy(update={"status": status, "since": now, **changes})
