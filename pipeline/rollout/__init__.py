"""How a release travels over the fleet: a plan with explicit site ids, and a state machine that is asked repeatedly.

Pure: no clock, file, network or chance.
"""

from __future__ import annotations

from pipeline.rollout.calendar import Freeze
from pipeline.rollout.machine import advance
from pipeline.rollout.people import (
    abort,
    approve,
    approved,
    join,
    needed,
    open_to_joiners,
    overridden,
    override,
    pause,
    resume,
    retry,
    start,
    supersede,
)
from pipeline.rollout.settings import RolloutConfig
from pipeline.rollout.state import (
    FLYING,
    RETURNING,
    TERMINAL,
    WAITING,
    Action,
    Bring,
    Failing,
    Notify,
    Promote,
    Rollout,
    RolloutError,
    Seen,
    Status,
    WaveSeen,
)
from pipeline.rollout.waves import (
    CONTROL,
    Candidate,
    Draft,
    Excluded,
    Plan,
    PlanDiff,
    Pointer,
    SiteFacts,
    Target,
    Wave,
    choose_controls,
    diff,
    plan,
    plan_hash,
    roster,
)

__all__ = [
    "CONTROL", "FLYING", "RETURNING", "TERMINAL", "WAITING", "Action", "Bring", "Candidate", "Draft", "Excluded", "Failing",
    "Freeze", "Notify", "Plan", "PlanDiff", "Pointer", "Promote", "Rollout", "RolloutConfig", "RolloutError", "Seen", "SiteFacts",
    "Status", "Target", "Wave", "WaveSeen", "abort", "advance", "approve", "approved", "choose_controls", "diff", "join",
    "needed", "open_to_joiners", "overridden", "override", "pause", "plan", "plan_hash", "resume", "retry", "roster", "start",
    "supersede",
]  # fmt: skip
