"""Placeholder; being written."""

from __future__ import annotations

from pydantic import Field

from pipeline.types import Section


class RolloutConfig(Section):
    """Section ``rollout``: how a release travels over the fleet."""

    waves: tuple[float, ...] = Field(default=(0.01, 0.05, 0.2, 0.5, 1.0), min_length=1)
    stage_seconds: float = Field(default=600, ge=0)
    bake_seconds: float = Field(default=3600, ge=0)
    hold_seconds: float = Field(default=86_400, ge=0)
    expire_seconds: float = Field(default=86_400, gt=0)
    rollback_seconds: float = Field(default=300, gt=0)
    abort_share: float = Field(default=0.02, ge=0, le=1)
    abort_min_sites: int = Field(default=5, ge=1)
    missing_share: float = Field(default=0.0, ge=0, lt=1)
    control_share: float = Field(default=0.05, ge=0, lt=1)
    control_min_sites: int = Field(default=10, ge=1)
    stratum: str = ""
    seed: int = 0
