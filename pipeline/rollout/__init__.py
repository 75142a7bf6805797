"""How a release travels over the fleet: a plan with explicit site ids, and a state machine that is asked repeatedly.

Pure: no clock, file, network or chance.
"""

from __future__ import annotations

from pipeline.rollout.machine import (
    FLYING,
    TERMINAL,
    WAITING,
    Action,
    HealthReport,
    Notify,
    Promote,
    Rollback,
    Rollout,
    RolloutError,
    Status,
    WaveEvidence,
    abort,
    advance,
    approve,
    pause,
    resume,
    start,
    supersede,
)
from pipeline.rollout.waves import (
    Candidate,
    Excluded,
    Plan,
    PlanDiff,
    Pointer,
    RolloutConfig,
    SiteFacts,
    Target,
    Wave,
    choose_controls,
    diff,
    plan,
    plan_hash,
)

__all__ = [
    "FLYING", "TERMINAL", "WAITING", "Action", "Candidate", "Excluded", "HealthReport", "Notify", "Plan", "PlanDiff",
    "Pointer", "Promote", "Rollback", "Rollout", "RolloutConfig", "RolloutError", "SiteFacts", "Status", "Target", "Wave",
    "WaveEvidence", "abort", "advance", "approve", "choose_controls", "diff", "pause", "plan", "plan_hash", "resume",
    "start", "supersede",
]  # fmt: skip
