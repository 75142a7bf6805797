"""Defines the limits of every guard: the section ``guards``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.types import Section


class PatternLimit(Section):
    """Highest upper bounds of one missing-modality pattern."""

    apcer: float = Field(default=0.07, gt=0, le=1, description="highest upper bound of the APCER")
    bpcer: float = Field(default=0.15, gt=0, le=1, description="highest upper bound of the BPCER")


class Ceiling(PatternLimit):
    """Guard ``ceiling``: bounds on the candidate alone. Default APCER: NIST SP 800-63A-4, IAPAR < 0.07."""

    advisory: bool = Field(default=False, description="its findings are reported and never decide")
    apcer_target: float | None = Field(default=0.02, description="exceeding it is reported, never decisive")
    patterns: tuple[str, ...] = Field(default=(), description="patterns it applies to; empty = all")
    per_pattern: dict[str, PatternLimit] = Field(default={}, description="other limits for these patterns")


class NonInferiority(Section):
    """Guard ``noninferiority``: how much worse than the champion a candidate may be, in shares of
    presentations."""

    advisory: bool = Field(default=False, description="its findings are reported and never decide")
    attacks: float = Field(default=0.005, gt=0, le=1, description="all attacks of a pattern together")
    worst_species: float = Field(default=0.01, gt=0, le=1, description="attacks of any one species")
    bona_fide: float = Field(default=0.01, gt=0, le=1, description="bona fide of a pattern")
    patterns: tuple[str, ...] = Field(default=(), description="patterns it applies to; empty = all")
    under_resolved: Literal["floor", "hold"] = Field(
        default="floor", description="cells too small for the margin"
    )


class TrustRegion(Section):
    """Guard ``trust``: how far adaptation may move a site."""

    advisory: bool = Field(default=False, description="its findings are reported and never decide")
    rho: float = Field(
        default=0.1,
        gt=0,
        description="|theta_c - theta_0| / |theta_0|; theta_0: source, or what labels taught",
    )
    margin: float = Field(
        default=1.5, gt=0, description="fall of the mean attack margin of any species, logits"
    )


class NoData(Section):
    """Guard ``no_data``: what is missing holds. It cannot be advisory."""

    stream_min: int = Field(default=100, ge=0, description="samples of the stream behind a candidate")
    anchor_min: int = Field(default=30, ge=1, description="anchor presentations per species and pattern")
    stale_seconds: float = Field(
        default=86_400, gt=0, description="age of the newest sample that still counts"
    )
    max_holds: int = Field(default=2, ge=0, description="more holds in a row than this abort")


class Shadow(Section):
    """Guard ``shadow``, of sites since their promotion: e-processes on labelled attack presentations, tested
    per wave."""

    advisory: bool = Field(default=False, description="its findings are reported and never decide")
    apcer: float = Field(default=0.02, gt=0, lt=1, description="APCER that is no reason to stop")
    alpha: float = Field(
        default=0.002,
        gt=0,
        lt=1,
        description="healthy waves that may be stopped; five waves: 1 % of healthy releases",
    )
    alpha_site: float = Field(
        default=0.001, gt=0, lt=1, description="healthy sites that may be taken back, ever"
    )


class Risk(Section):
    """Guard ``risk``: proxy risk of the stream (the mean error that its scores admit) against the anchor
    set's."""

    advisory: bool = Field(
        default=True, description="its findings are reported and never decide"
    )  # a shifted site is less certain than the source is at home: to be set per fleet
    epsilon: float = Field(default=0.02, ge=0, lt=1, description="how much higher its lower bound may be")
    alpha: float = Field(
        default=0.01, gt=0, lt=1, description="false alarms per window, both bounds together"
    )


class Drift(Section):
    """Guard ``drift``: betting martingales on entropy and attack score against the source distribution."""

    advisory: bool = Field(
        default=True, description="its findings are reported and never decide"
    )  # a shift is what adaptation is for
    alpha: float = Field(default=0.01, gt=0, lt=1, description="false alarms per window and kind of score")


class Ratchet(Section):
    """Guard ``ratchet``: the rate of bona fide calls against the site's own hours of the day. An alarm
    fails."""

    advisory: bool = Field(default=False, description="its findings are reported and never decide")
    kappa: float = Field(default=0.5, ge=0, description="how much the odds of a bona fide call may rise")
    alpha: float = Field(default=0.01, gt=0, lt=1, description="false alarms per window")
    baseline_min: int = Field(default=200, ge=1, description="earlier sessions before anything is compared")


class Influence(Section):
    """Guard ``influence``: how much of an update may come from one place. Of samples that taught."""

    advisory: bool = Field(default=False, description="its findings are reported and never decide")
    per_session: int = Field(default=2, ge=1, description="samples of one session that may teach")
    share: float = Field(
        default=0.05, gt=0, le=1, description="of a window's teaching samples from one session"
    )
    sessions: int = Field(default=20, ge=0, description="sessions that a window with an update needs")


class Labels(Section):
    """Guard ``labels``: what the site learned from may not be one class, nor be disputed."""

    advisory: bool = Field(default=False, description="its findings are reported and never decide")
    bona_fide: float = Field(
        default=0.99, gt=0, le=1, description="share of pseudo labels that may be bona fide"
    )
    disagreement: float = Field(
        default=0.07, ge=0, description="nats between the heads on a sample that taught"
    )
    minimum: int = Field(default=50, ge=1, description="pseudo labels before their shares are judged")


class Presentations(Section):
    """Guard ``presentations``: the site's own labels. Those that judge may not get worse; those that teach
    may not all look reversed."""

    advisory: bool = Field(default=False, description="its findings are reported and never decide")
    alpha: float = Field(
        default=0.1, gt=0, lt=1, description="false alarms of a sign test that more got worse than better"
    )
    reversed: float = Field(
        default=0.6,
        gt=0.5,
        le=1,
        description="share of pairs of a bona fide and an attack that teach which the source ranks otherwise",
    )
    minimum: int = Field(default=8, ge=1, description="labels of a class before they are judged")


class ModalityFloor(Section):
    """Guard ``modality``: samples with fewer modalities may move normalisation only, so none of them may
    teach."""

    advisory: bool = Field(default=False, description="its findings are reported and never decide")
    modalities: int = Field(default=2, ge=1, le=3, description="modalities that a teaching sample needs")
    share: float = Field(default=0.0, ge=0, le=1, description="of teaching samples that may show fewer")


class Collapse(Section):
    """Guard ``collapse``: nearly every call the same, where the champion's calls on the same samples are
    not."""

    advisory: bool = Field(default=False, description="its findings are reported and never decide")
    share: float = Field(default=0.99, gt=0.5, le=1, description="of the last calls that may be of one class")
    calls: int = Field(default=200, ge=1, description="newest calls it looks at; fewer are not judged")
    min_gap: float = Field(
        default=0.02, ge=0, le=1, description="least gap to the champion's share: an untypical prior"
    )
    flips: float = Field(
        default=0.5, gt=0, le=1, description="of the window's calls that may change either way"
    )


class Expiry(Section):
    """Guard ``expiry``: candidates and states do not live for ever."""

    advisory: bool = Field(default=False, description="its findings are reported and never decide")
    candidate_hours: float = Field(default=24.0, gt=0, description="unpromoted")
    state_days: float = Field(default=30.0, gt=0, description="since the state left the source model")
    state_steps: int = Field(default=10_000, ge=1, description="steps since then")


class Controls(Section):
    """Guard ``controls``: promoted sites against those that stay on the source model, per stratum."""

    advisory: bool = Field(default=False, description="its findings are reported and never decide")
    fdr: float = Field(default=0.05, gt=0, lt=1, description="false findings among the findings (e-BH)")


class Budget(Section):
    """Guard ``budget``: errors of the fleet against what a month (30 days) allows; burning too fast freezes
    promotions."""

    advisory: bool = Field(default=False, description="its findings are reported and never decide")
    allowed: float = Field(
        default=0.01, gt=0, lt=1, description="share of a month's presentations that may go wrong"
    )
    burn_1h: float = Field(default=0.02, gt=0, le=1, description="of the month's budget, burnt within 1 h")
    burn_6h: float = Field(default=0.10, gt=0, le=1, description="of the month's budget, burnt within 6 h")
    alpha: float = Field(default=0.001, gt=0, lt=1, description="doubt left that it burns that fast")


class GuardsConfig(Section):
    """Section ``guards``."""

    ceiling: Ceiling = Ceiling()
    noninferiority: NonInferiority = NonInferiority()
    trust: TrustRegion = TrustRegion()
    no_data: NoData = NoData()
    shadow: Shadow = Shadow()
    risk: Risk = Risk()
    drift: Drift = Drift()
    ratchet: Ratchet = Ratchet()
    influence: Influence = Influence()
    labels: Labels = Labels()
    presentations: Presentations = Presentations()
    modality: ModalityFloor = ModalityFloor()
    collapse: Collapse = Collapse()
    expiry: Expiry = Expiry()
    controls: Controls = Controls()
    budget: Budget = Budget()


def of_source(limits: GuardsConfig) -> GuardsConfig:
    """``limits`` as a bare source model is judged by them: it has no stream, and no distance from itself."""
    no_data, trust = (
        limits.no_data.model_copy(update={"stream_min": 0}),
        limits.trust.model_copy(update={"advisory": True}),
    )
    return limits.model_copy(update={"no_data": no_data, "trust": trust})
