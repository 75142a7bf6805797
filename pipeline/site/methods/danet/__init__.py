"""Adapts like MFAS-DANet: complementary features, reliable pseudo labels, a weight by stability.

Reconstruction from the abstract of arXiv 2509.23475 ("Multi-modal Face Anti-Spoofing via Domain Adaptation"),
not a reproduction: the abstract names the three parts; every formula is ours (``pipeline/site/README.md``).
The complement lives in the tail. By gradients only the site adapter, the complement gates and log rho move.

Not from the paper: the boundary follows the score shift of the site (``pipeline.site.shift``), nothing moves
before there is evidence of a shift, and the guards on who may teach in ``pipeline.site.trust``. Each is a
setting; ``palisade bench site`` has a row for each. This file holds the settings and imports no torch;
``algorithm`` holds what they set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.site.contract import Selective, Taught

if TYPE_CHECKING:
    from pipeline.site.contract import Params, State
    from pipeline.types import Features, Lesson, Outcome


class Config(Selective, Taught):
    """Settings of ``danet``: of the reconstruction first, then our own additions."""

    kind: str = "danet"
    mode: Literal["tta", "da"] = Field(
        default="tta", description="tta: stream only; da: labelled source features stay in the loss"
    )
    learn: bool = Field(default=True, description="gradients; without them only the boundary may move")
    lr: float = Field(default=3e-4, gt=0, description="learning rate of Adam")
    clip: float = Field(default=1.0, gt=0, description="largest global norm of a gradient")
    labels: Literal["all", "confidence", "vote"] = Field(
        default="vote", description="which pseudo labels teach"
    )
    confidence_bona_fide: float = Field(
        default=0.9, ge=0.5, le=1, description="what a bona fide pseudo label needs"
    )
    confidence_attack: float = Field(
        default=0.8, ge=0.5, le=1, description="what an attack pseudo label needs"
    )
    disagreement: float = Field(
        default=0.07, ge=0, description="nats between the heads; a label above it is not used"
    )
    unanimous_bona_fide: bool = Field(
        default=True, description="bona fide needs every present modality's head"
    )
    anchor: float = Field(default=1.0, ge=0, description="weight of KL(source || site) on the reservoir")
    source: float = Field(
        default=1.0, ge=0, description="weight of the change of the source features' logits in mode da"
    )
    reservoir: int = Field(default=32, ge=8, le=256, description="samples that a site remembers")
    weight: Literal["one", "omega", "restore"] = Field(
        default="restore",
        description="of the loss: 1, following stability, and back to the last good state at the floor",
    )
    omega: float = Field(default=0.5, gt=0, description="initial loss weight")
    omega_min: float = Field(default=0.05, gt=0, description="floor of the loss weight")
    omega_max: float = Field(default=2.0, gt=0, description="ceiling of the loss weight")
    patience: int = Field(
        default=10, ge=1, description="steps at the floor before the last good snapshot returns"
    )

    calibrate: bool = Field(
        default=True, description="move the boundary with the site's score shift, per set of sensors"
    )
    trigger: float | None = Field(
        default=1.0, ge=0, description="nats of evidence for a shift before anything moves; null: none asked"
    )
    shift_min_logits: float = Field(default=0.5, ge=0, description="logits; a smaller shift is none")
    half_life: float = Field(default=400, gt=0, description="samples after which a counted score weighs half")
    min_attack_count: float = Field(
        default=10, ge=0, description="attacks that must be in the counts before the boundary loosens"
    )
    min_bona_fide_ratio: float = Field(
        default=1.0, ge=0, description="bona fide per attack in the counts before it loosens"
    )
    loosen: float = Field(default=4.0, ge=0, description="logits, most that the boundary loosens")
    loosen_apcer: float = Field(
        default=0.01, ge=0, le=1, description="share of the source's validation attacks that it may let in"
    )
    tighten: float = Field(default=0.0, ge=0, description="logits, most that it tightens")
    prototypes: bool = Field(
        default=False, description="a pseudo label needs the nearest labelled source direction"
    )
    conformal: float | None = Field(
        default=None, gt=0, le=0.5, description="p-value a pseudo label needs; null: none asked"
    )
    session_cap: int | None = Field(
        default=2, ge=1, description="samples of one session that count; null: all"
    )
    sessions: int = Field(default=20, ge=0, description="sessions seen before anything moves")
    groups: int | None = Field(
        default=5,
        ge=2,
        le=16,
        description="groups of sessions whose median gradient is taken; null: the mean of all",
    )

    taught_steps: int = Field(default=60, ge=1, description="Adam steps in which a memory is learned anew")
    taught_lr: float = Field(default=3e-3, gt=0, description="learning rate of these steps")
    taught_hold: float = Field(
        default=8.0, ge=0, description="weight of the change of the source features' logits in these steps"
    )

    def init(self, tail: Params) -> State:
        """Returns the state of a new site: movable tensors, last good copy, moments and statistics."""
        from pipeline.site.methods.danet import algorithm

        return algorithm.init(self, tail)

    def teach(self, tail: Params, state: State) -> State:
        """Learns anew from the site's labels; counts of the stream start again beside what they teach."""
        from pipeline.site.methods.danet import algorithm

        return algorithm.teach(self, tail, state)

    def observe(self, tail: Params, state: State, batch: Features) -> tuple[State, Lesson]:
        """Scores the batch, counts its scores, follows the site's shift, and says which samples may teach."""
        from pipeline.site.methods.danet import algorithm

        return algorithm.observe(self, tail, state, batch)

    def conclude(self, tail: Params, state: State, lesson: Lesson, *, learn: bool) -> tuple[State, Outcome]:
        """Learns from the samples of the batch that may teach, then remembers all of them."""
        from pipeline.site.methods.danet import algorithm

        return algorithm.conclude(self, tail, state, lesson, learn=learn)
