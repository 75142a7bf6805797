"""The plan: which site is promoted to what in which wave, who stays a control, who is left out and why.

This file holds the section ``rollout``. A Plan that nobody stored is a draft.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pipeline.types import Section

if TYPE_CHECKING:
    from collections.abc import Mapping


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


def _why_not(facts: SiteFacts) -> str:
    c = facts.candidate
    if c is None:
        return "no candidate"
    if c.outcome != "pass" or c.verdict_id is None:
        return f"verdict {c.outcome}: {c.reason}" if c.verdict_id is not None else "no stored verdict"
    return "already serves it" if facts.serving == c.to else ""


def _abort_at(config: RolloutConfig, sites: int) -> int:
    return max(int(config.abort_share * sites) + 1, min(config.abort_min_sites, sites))


def _draw(seed: int, purpose: str, site: str) -> bytes:
    return hashlib.sha256(f"{seed}/{purpose}/{site}".encode()).digest()
