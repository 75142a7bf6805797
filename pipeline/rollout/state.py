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
RETURNING = frozenset({Status.ABORTING, Status.ROLLING_BACK})
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


class Failing(NamedTuple):
    """A promoted site that does harm."""

    wave: int
    reason: str  # guard, number and limit


@dataclass(frozen=True)
class WaveObservation:
    """A started wave now, without its failed and its retired sites."""

    sites: int
    late: Mapping[str, int] = field(
        default_factory=dict[str, int]
    )  # by time zone: sites that do not serve their target
    first_late: str = ""
    silent: int = 0  # promoted sites without enough data since
    first_silent: str = ""
    presentations: int | None = (
        None  # labelled attack presentations since the promotion; None: nobody counts them
    )


@dataclass(frozen=True)
class Observation:
    """What is known now, of the waves that were started."""

    waves: tuple[WaveObservation, ...] = ()
    on: int | None = None  # sites that serve their target and could go back; None: not looked at
    unreturned: int = 0  # of those the failed ones
    failing: Mapping[str, Failing] = field(default_factory=dict[str, Failing])
    breach: tuple[str, ...] = ()  # a guard that stops the release: site or wave, guard, number, limit
    freeze: str = ""  # why nothing is promoted at present, e.g. the fleet's error budget


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
