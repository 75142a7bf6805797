"""Trains like RiSe: an invariant radial boundary (AsyIRM) and synergy disentanglement (MMSD).

A *reconstruction from the abstract* of RiSe (arXiv 2511.14157), whose body we could not read. From the
abstract: the boundary is a sphere in radial space that is invariant over domains and fits asymmetric classes
(compact bona fide, attacks anywhere outside), domain cues stay in angular space, and a self-supervised task
mixes modalities across samples and disentangles. Ours: every formula below. PG-IRM follows SA-FAS (Sun et al.
2023), IRMv1 Arjovsky et al. 2019, SupCon Khosla et al. 2020.

This file holds the settings and imports no torch; ``terms`` holds the loss terms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.source.contract import SourceMethod

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model, Params


class Config(SourceMethod):
    """``source.kind: rise``. A weight of 0 switches its term off and saves its cost."""

    kind: str = "rise"
    invariance: Literal["pgirm", "irmv1", "both", "none"] = Field(
        default="pgirm", description="how the boundary becomes invariant over domains"
    )
    margin: float = Field(
        default=0.05, ge=0, le=0.9, description="mu: bona fide inside rho - mu, attacks outside rho + mu"
    )
    compact: float = Field(default=0.03, ge=0, description="weight of compact bona fide")
    angle: float = Field(default=0.03, ge=0, description="weight of the contrast of directions")
    angle_groups: Literal["domains", "attacks"] = Field(
        default="domains",
        description="what the contrast tells apart: both classes of every domain, or one bona fide of all "
        "domains from the attacks of each",
    )
    angle_modalities: float = Field(
        default=0.0, ge=0, description="weight inside angle of the same contrast for each modality alone"
    )
    synergy: float = Field(default=0.03, ge=0, description="weight of MMSD")
    decorrelate: float = Field(default=0.1, ge=0, description="weight of the disentanglement inside MMSD")
    complement: float = Field(default=0.3, ge=0, description="weight of predicting absent modalities")
    consistency: float = Field(
        default=0.5, ge=0, description="weight of full-to-dropped KL inside the complement term"
    )
    patterns: Literal["drawn", "all"] = Field(
        default="drawn",
        description="modalities that the complement term does without: a set drawn per sample, or every set, "
        "weighted in proportion to its KL",
    )
    temperature: float = Field(default=0.1, gt=0, description="temperature of the contrast")
    alpha: float = Field(
        default=0.995, gt=0, le=1, description="pgirm: share of its own radius a domain keeps per step"
    )
    irm: float = Field(
        default=1.0, ge=0, description="irmv1: penalty weight after the first half of the schedule"
    )

    def extra(self, domains: int, tail: Params) -> Params:
        """Returns the boundary of every head for each domain (``pgirm``); the model gets their mean."""
        from pipeline.source.losses import domain_boundaries

        return domain_boundaries(domains, tail) if self.invariance in ("pgirm", "both") else {}

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """Returns the weighted terms of the objective by name."""
        from pipeline.source.methods.rise.terms import loss_terms

        return loss_terms(self, model, batch, generator)

    def after_step(self, extra: Params) -> None:
        """Moves the domains' radii towards each other, until one serves all domains (PG-IRM)."""
        from pipeline.source.losses import pg_irm_step

        pg_irm_step(extra, self.alpha)
