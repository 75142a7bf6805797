"""The limits of every guard: the section ``guards``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.types import Section


class PatternLimit(Section):
    """Highest upper bounds of one missing-modality pattern."""

    apcer: float = Field(default=0.07, gt=0, le=1)
    bpcer: float = Field(default=0.15, gt=0, le=1)


class Ceiling(PatternLimit):
    """Guard ``ceiling``: bounds on the candidate alone. Default APCER: NIST SP 800-63A-4, IAPAR < 0.07."""

    advisory: bool = False
    apcer_target: float | None = Field(default=0.02, description="exceeding it is reported, never decisive")
    patterns: tuple[str, ...] = Field(default=(), description="patterns it applies to; empty = all")
    per_pattern: dict[str, PatternLimit] = Field(default={}, description="other limits for these patterns")


class NonInferiority(Section):
    """Guard ``noninferiority``: how much worse than the champion a candidate may be, in shares of presentations."""

    advisory: bool = False
    attacks: float = Field(default=0.005, gt=0, le=1, description="all attacks of a pattern together")
    worst_species: float = Field(default=0.01, gt=0, le=1)
    bona_fide: float = Field(default=0.01, gt=0, le=1)
    patterns: tuple[str, ...] = Field(default=(), description="patterns it applies to; empty = all")
    under_resolved: Literal["floor", "hold"] = Field(default="floor", description="cells too small for the margin")


class TrustRegion(Section):
    """Guard ``trust``: how far adaptation may move a site."""

    advisory: bool = False
    rho: float = Field(default=0.1, gt=0, description="|theta_c - theta_0| / |theta_0|")
    margin: float = Field(default=0.5, gt=0, description="fall of the mean attack margin of any species, logits")


class NoData(Section):
    """Guard ``no_data``: what is missing holds. It cannot be advisory."""

    n_min: int = Field(default=100, ge=0, description="samples of the stream behind a candidate")
    anchor_min: int = Field(default=30, ge=1, description="anchor presentations per species and pattern")
    stale_seconds: float = Field(default=86_400, gt=0)
    max_holds: int = Field(default=2, ge=0, description="more holds in a row than this abort")


class GuardsConfig(Section):
    """Section ``guards``."""

    ceiling: Ceiling = Ceiling()
    noninferiority: NonInferiority = NonInferiority()
    trust: TrustRegion = TrustRegion()
    no_data: NoData = NoData()
