"""Defines the settings of releases: the section ``rollout``."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from pipeline.rollout.calendar import Freeze, check_night
from pipeline.types import Section


class RolloutConfig(Section):
    """Holds the section ``rollout``; a plan stores it, so later changes do not reach a running release."""

    waves: tuple[float, ...] = Field(
        default=(0.01, 0.05, 0.2, 0.5, 1.0), description="cumulative shares of the fleet"
    )
    stage_seconds: float = Field(
        default=600, ge=0, description="time for the sites of a wave to take the new state"
    )
    bake_seconds: float = Field(
        default=3600, ge=0, description="time a wave must do well before the next one"
    )
    hold_seconds: float = Field(
        default=86_400, ge=0, description="a hold longer than this is paused for a person"
    )
    expire_seconds: float = Field(default=86_400, gt=0, description="a plan not started by then expires")
    rollback_seconds: float = Field(default=300, gt=0, description="bound for sites to take a rollback")
    override_seconds: float = Field(default=3600, gt=0, description="an override lasts so long")
    abort_share: float = Field(
        default=0.02, ge=0, lt=1, description="more than this of a wave failing aborts"
    )
    abort_min_sites: int = Field(default=5, ge=1, description="and at least so many sites, or the whole wave")
    missing_share: float = Field(
        default=0.0, ge=0, lt=1, description="share of a wave that may end it without data"
    )
    second_approval_from_share: float | None = Field(
        default=0.5,
        gt=0,
        le=1,
        description="waves up to this share or more need approvals of two people; null = none do",
    )
    control_share: float = Field(
        default=0.05, ge=0, lt=1, description="sites kept on the source model for good"
    )
    control_min_sites: int = Field(default=10, ge=1, description="strata smaller than this need no control")
    strata: tuple[str, ...] = Field(
        default=(),
        description="tags, e.g. [region, hardware]: every wave holds its share of each of their combinations",
    )
    caps: dict[str, float] = Field(
        default={},
        description="tag → most sites of one of its values in one wave: a share below 1, or a number",
    )
    night: Annotated[str | None, AfterValidator(check_night)] = Field(
        default=None,
        description="promote only then, HH:MM-HH:MM in the time zone of the site's tag tz (default UTC)",
    )
    freeze: tuple[Freeze, ...] = Field(
        default=(), description="windows {start, end, reason} without promotions"
    )
    health_samples: int = Field(
        default=50, ge=0, description="captures a promoted site must bring before it counts as data"
    )
    health_presentations: int = Field(
        default=100,
        ge=0,
        description="labelled attack presentations that a wave must have seen before it ends",
    )
    presentations_per_day: float = Field(
        default=40,
        gt=0,
        description="labelled attack presentations of a site per day, for what a plan says it detects",
    )
    rebase_samples: int = Field(
        default=512,
        ge=1,
        description="newest samples of a site that its state is fitted anew on for a new source model",
    )
    seed: int = Field(default=0, description="seed of the choice of control sites and waves")

    @model_validator(mode="after")
    def _rising(self) -> RolloutConfig:
        if (
            not self.waves
            or self.waves[-1] != 1
            or list(self.waves) != sorted({w for w in self.waves if w > 0})
        ):
            raise ValueError(f"waves {list(self.waves)}: rising shares above 0 that end with 1.0 are needed")
        if low := [tag for tag, cap in self.caps.items() if cap <= 0]:
            raise ValueError(f"caps.{low[0]}: above 0 is needed: a share below 1, or a number of sites")
        return self
