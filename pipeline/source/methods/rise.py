"""RiSe-style source training: an invariant radial boundary (AsyIRM) and synergy disentanglement (MMSD).

A *reconstruction from the abstract* of RiSe (arXiv 2511.14157), whose body we could not read. From the abstract: the
boundary is a sphere in radial space that is invariant over domains and fits asymmetric classes (compact bona fide,
attacks anywhere outside), domain cues stay in angular space, and a self-supervised task mixes modalities across samples
and disentangles. Ours: every formula below. PG-IRM follows SA-FAS (Sun et al. 2023), IRMv1 Arjovsky et al. 2019, SupCon
Khosla et al. 2020.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.source.contract import (
    Schedule,
    domain_boundaries,
    drop_modalities,
    head_risks,
    irm_penalty,
    masked_mean,
    pg_irm_step,
    sup_con,
    with_domain_boundaries,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model, Params


class Config(Schedule):
    """``source.kind: rise``. A weight of 0 switches its term off and saves its cost."""

    kind: Literal["rise"] = "rise"  # pyright: ignore[reportIncompatibleVariableOverride]
    invariance: Literal["pgirm", "irmv1", "none"] = "pgirm"
    margin: float = Field(
        default=0.1, ge=0, le=0.9, description="mu: bona fide inside rho - mu, attacks outside rho + mu"
    )
    compact: float = Field(default=0.1, ge=0)
    angle: float = Field(default=0.1, ge=0)
    synergy: float = Field(default=0.1, ge=0, description="weight of MMSD")
    decorrelate: float = Field(default=0.1, ge=0, description="weight of the disentanglement inside MMSD")
    complement: float = Field(default=0.3, ge=0)
    consistency: float = Field(
        default=0.5, ge=0, description="weight of full-to-dropped KL inside the complement term"
    )
    temperature: float = Field(default=0.1, gt=0)
    alpha: float = Field(
        default=0.995, gt=0, le=1, description="pgirm: share of its own radius a domain keeps per step"
    )
    irm: float = Field(
        default=1.0, ge=0, description="irmv1: penalty weight after the first half of the schedule"
    )

    def extra(self, domains: int, tail: Params) -> Params:
        """``pgirm``: the boundary of every head for each domain. The model gets their mean in the end."""
        return domain_boundaries(domains, tail) if self.invariance == "pgirm" else {}

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        tail = with_domain_boundaries(model, batch)
        z = model.trunk_features(batch.frames, batch.present)
        full = tails.forward(tail, z, batch.present)
        risk = head_risks(full.logit, batch, batch.present, self.margin)
        terms = self.risk_terms(risk)
        if self.compact:
            terms["compact"] = self.compact * compactness(
                full.logit[:, tails.FUSED], batch.label, self.margin
            )
        if self.invariance == "irmv1" and self.irm:
            weight = self.irm * min(1.0, 2 * batch.progress)
            terms["irm"] = weight * irm_penalty(full.logit[:, tails.FUSED], batch)
        if self.angle:
            terms["angle"] = self.angle * sup_con(
                full.hidden, 2 * batch.domain + batch.label, self.temperature
            )
        if self.synergy:
            mixed = mix(batch, generator)
            intrinsic, synergy = split_mixed(tail, z, mixed)
            own, decorrelated = synergy_terms(
                intrinsic, synergy, full, batch.present, mixed, self.temperature
            )
            terms["synergy"] = self.synergy * (own + self.decorrelate * decorrelated)
        if self.complement:
            reconstruct, kl = complement_terms(tail, z, batch.present, full, generator)
            terms["complement"] = self.complement * (reconstruct + self.consistency * kl)
        return terms

    def after_step(self, extra: Params) -> None:
        """PG-IRM: one radius comes to serve all domains."""
        pg_irm_step(extra, self.alpha)


def compactness(logit: Tensor, label: Tensor, margin: float) -> Tensor:
    """Bona fide samples outside the inner sphere, squared; attacks are asked for nothing but to be outside."""
    return masked_mean(torch.relu(margin - logit / tails.KAPPA) ** 2, label == 1)


class Mixed(NamedTuple):
    """Samples that have some modalities from another sample."""

    owner: Tensor  # [B, M] whose modality it is
    present: Tensor  # [B, M]


def mix(batch: Batch, generator: Generator) -> Mixed:
    """Take some (not none, not all) modalities of every sample from another, across domains and classes.

    The trunk reads modalities apart, so mixing its features is mixing the images, without another image pass.
    """
    count = len(batch.label)
    order = torch.randperm(count, generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # one cycle: no sample is its own partner
    taken = torch.randint(1, 2**tails.MODALITIES - 1, (count,), generator=generator)
    swap = (taken[:, None] >> torch.arange(tails.MODALITIES)) & 1 == 1
    owner = torch.where(swap, other[:, None], torch.arange(count)[:, None]).to(batch.label.device)
    return Mixed(owner, batch.present.gather(0, owner))


def split_mixed(tail: Params, z: Tensor, mixed: Mixed) -> tuple[Tensor, Tensor]:
    """(intrinsic, synergy) [B, M, D] of the mixed samples."""
    modality = torch.arange(tails.MODALITIES, device=z.device)
    own = tails.apply_adapter(tail, z[mixed.owner, modality], mixed.present)
    return tails.split(tail, tails.complete(tail, own, mixed.present).z)


def synergy_terms(
    intrinsic: Tensor,
    synergy: Tensor,
    full: tails.TailOutput,
    present: Tensor,
    mixed: Mixed,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """MMSD without a label: find each intrinsic feature's owner, keep intrinsic and synergy features uncorrelated."""
    own = [
        retrieval_loss(
            intrinsic[:, m],
            full.intrinsic[:, m].detach(),
            mixed.owner[:, m],
            mixed.present[:, m],
            present[:, m],
            temperature,
        )
        for m in range(tails.MODALITIES)
    ]
    apart = [correlation(intrinsic[:, m], synergy[:, m]).square().mean() for m in range(tails.MODALITIES)]
    return torch.stack(own).mean(), torch.stack(apart).mean()


def retrieval_loss(
    query: Tensor, keys: Tensor, owner: Tensor, there: Tensor, candidate: Tensor, temperature: float
) -> Tensor:
    """Cross entropy of finding row ``owner`` among ``keys`` by cosine; over rows that are there, among candidates."""
    similarity = (
        torch.nn.functional.normalize(query, dim=1)
        @ torch.nn.functional.normalize(keys, dim=1).T
        / temperature
    )
    similarity = torch.where(candidate[None], similarity, -1e9)
    return masked_mean(torch.nn.functional.cross_entropy(similarity, owner, reduction="none"), there)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """[D, D] correlation over the batch of a's and b's components."""
    a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    scale = torch.sqrt((a * a).sum(dim=0) + 1e-6)[:, None] * torch.sqrt((b * b).sum(dim=0) + 1e-6)[None]
    return a.T @ b / scale


def complement_terms(
    tail: Params, z: Tensor, present: Tensor, full: tails.TailOutput, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Predict what is there from the others, and judge a sample with modalities taken away as if it were complete.

    The full score is the teacher (stop-gradient): learning to do without a sensor must not spoil the verdict with it.
    """
    dropped = drop_modalities(present, 1.0, generator)
    fixed = {n: t.detach() if n in tails.BOUNDARY else t for n, t in tail.items()}
    part = tails.forward(fixed, z, dropped)
    gap = 1 - torch.nn.functional.cosine_similarity(part.complement, z.detach(), dim=-1)  # [B, M]
    known = present & (
        dropped.sum(dim=1, keepdim=True) - dropped.long() > 0
    )  # someone else is left to predict it
    reconstruct = torch.stack([masked_mean(gap[:, m], known[:, m]) for m in range(tails.MODALITIES)]).sum()
    teacher, student = full.logit[:, tails.FUSED].detach(), part.logit[:, tails.FUSED]
    log = torch.nn.functional.logsigmoid
    p = torch.sigmoid(teacher)
    kl = p * (log(teacher) - log(student)) + (1 - p) * (log(-teacher) - log(-student))
    return reconstruct, masked_mean(kl, (dropped != present).any(dim=1))
