"""Computes the loss terms of ``rise`` from its settings, the model and a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from pipeline.models import tail as tails
from pipeline.source.losses import (
    drop_modalities,
    head_risks,
    irm_penalty,
    masked_mean,
    risk_terms,
    sup_con,
    with_domain_boundaries,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model, Params
    from pipeline.source.methods.rise import Config


def loss_terms(config: Config, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
    """Returns the weighted terms of the objective by name; ``generator`` draws what is mixed and dropped."""
    tail = with_domain_boundaries(model, batch)
    z = model.trunk_features(batch.frames, batch.present)
    full = tails.forward(tail, z, batch.present)
    risk = head_risks(full.logit, batch, batch.present, config.margin)
    terms = risk_terms(config, risk)
    if config.compact:
        terms["compact"] = config.compact * compactness(
            full.logit[:, tails.FUSED], batch.label, config.margin
        )
    if config.invariance in ("irmv1", "both") and config.irm:
        weight = config.irm * min(1.0, 2 * batch.progress)
        terms["irm"] = weight * irm_penalty(full.logit[:, tails.FUSED], batch)
    if config.angle:
        terms["angle"] = config.angle * angle_term(config, full, batch)
    if config.synergy:
        mixed = mix(batch, generator)
        intrinsic, synergy = split_mixed(tail, z, mixed)
        retrieval, decorrelated = synergy_terms(
            intrinsic, synergy, full, batch.present, mixed, config.temperature
        )
        terms["synergy"] = config.synergy * (retrieval + config.decorrelate * decorrelated)
    if config.complement:
        complement = complement_terms if config.patterns == "drawn" else all_patterns_terms
        reconstruct, kl = complement(tail, z, batch.present, full, generator)
        terms["complement"] = config.complement * (reconstruct + config.consistency * kl)
    return terms


def angle_term(config: Config, full: tails.TailOutput, batch: Batch) -> Tensor:
    """Returns the contrast of the fused directions, and of each modality's intrinsic ones, by group.

    With ``attacks`` bona fide of all domains are one group, attacks of each domain one of their own: bona
    fide is one class, attacks keep their domain (MMDG++).
    """
    group = 2 * batch.domain + batch.label
    if config.angle_groups == "attacks":
        group = torch.where(batch.label == 1, 2 * batch.domain.max() + 2, group)
    term = sup_con(full.hidden, group, config.temperature)
    if config.angle_modalities:
        each = [
            sup_con(full.intrinsic[:, m], group, config.temperature, used=batch.present[:, m])
            for m in range(tails.MODALITIES)
        ]
        term = term + config.angle_modalities * torch.stack(each).mean()
    return term


def compactness(logit: Tensor, label: Tensor, margin: float) -> Tensor:
    """Returns the mean squared distance of bona fide samples outside the inner sphere.

    Attacks must only be outside.
    """
    return masked_mean(torch.relu(margin - logit / tails.KAPPA) ** 2, label == 1)


class Mixed(NamedTuple):
    """Samples that took some modalities from another sample."""

    owner: Tensor  # [B, M] whose modality it is
    present: Tensor  # [B, M]


def mix(batch: Batch, generator: Generator) -> Mixed:
    """Replaces a random part of every sample's modalities by another sample's, across domains and classes.

    The trunk reads modalities apart, so mixing its features is mixing the images, without another image pass.
    """
    count = len(batch.label)
    order = torch.randperm(count, generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # one cycle: no sample is its own partner
    subset = torch.randint(1, 2**tails.MODALITIES - 1, (count,), generator=generator)
    swap = (subset[:, None] >> torch.arange(tails.MODALITIES)) & 1 == 1
    owner = torch.where(swap, other[:, None], torch.arange(count)[:, None]).to(batch.label.device)
    return Mixed(owner, batch.present.gather(0, owner))


def split_mixed(tail: Params, z: Tensor, mixed: Mixed) -> tuple[Tensor, Tensor]:
    """Returns (intrinsic, synergy) [B, M, D] of the mixed samples."""
    modality = torch.arange(tails.MODALITIES, device=z.device)
    adapted = tails.apply_adapter(tail, z[mixed.owner, modality], mixed.present)
    return tails.split(tail, tails.complete(tail, adapted, mixed.present).z)


def synergy_terms(
    intrinsic: Tensor,
    synergy: Tensor,
    full: tails.TailOutput,
    present: Tensor,
    mixed: Mixed,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Returns the two terms of MMSD, which use no label: retrieval of owners, and decorrelation.

    Retrieval finds each intrinsic feature's owner; decorrelation keeps intrinsic and synergy features apart.
    """
    retrieval = [
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
    return torch.stack(retrieval).mean(), torch.stack(apart).mean()


def retrieval_loss(
    query: Tensor, keys: Tensor, owner: Tensor, present: Tensor, candidate: Tensor, temperature: float
) -> Tensor:
    """Returns the cross entropy of finding row ``owner`` among ``keys`` by cosine.

    The mean is over the rows that are present; only present rows are candidates.
    """
    similarity = (
        torch.nn.functional.normalize(query, dim=1)
        @ torch.nn.functional.normalize(keys, dim=1).T
        / temperature
    )
    similarity = torch.where(candidate[None], similarity, -1e9)
    return masked_mean(torch.nn.functional.cross_entropy(similarity, owner, reduction="none"), present)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Returns the correlation [D, D] of a's and b's components over the batch."""
    a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    scale = torch.sqrt((a * a).sum(dim=0) + 1e-6)[:, None] * torch.sqrt((b * b).sum(dim=0) + 1e-6)[None]
    return a.T @ b / scale


def complement_terms(
    tail: Params, z: Tensor, present: Tensor, full: tails.TailOutput, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Returns the two complement terms: prediction of present modalities, and consistency after dropping.

    The full score is the teacher (stop-gradient): learning to do without a sensor must not spoil the verdict
    with it.
    """
    return _without(tail, z, present, drop_modalities(present, 1.0, generator), full)


def all_patterns_terms(
    tail: Params, z: Tensor, present: Tensor, full: tails.TailOutput, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Returns the two complement terms over every set of modalities, each weighted by its share of the KL.

    What is hard to do without is practised most (after MMA-FAS); nothing is drawn.
    """
    everything = 2**tails.MODALITIES - 1
    modality = torch.arange(tails.MODALITIES, device=z.device)
    sets = [(left >> modality & 1).bool() for left in range(1, everything)]
    kept = [torch.where((present & s).any(dim=1, keepdim=True), present & s, present) for s in sets]
    both = [_without(tail, z, present, dropped, full) for dropped in kept]
    reconstruct, kl = (torch.stack(terms) for terms in zip(*both, strict=True))
    share = kl.detach() / kl.detach().sum().clamp(min=1e-6)
    return (share * reconstruct).sum(), (share * kl).sum()


def _without(
    tail: Params, z: Tensor, present: Tensor, dropped: Tensor, full: tails.TailOutput
) -> tuple[Tensor, Tensor]:
    fixed = {n: t.detach() if n in tails.BOUNDARY else t for n, t in tail.items()}
    part = tails.forward(fixed, z, dropped)
    gap = 1 - torch.nn.functional.cosine_similarity(part.complement, z.detach(), dim=-1)  # [B, M]
    predictable = present & (
        dropped.sum(dim=1, keepdim=True) - dropped.long() > 0
    )  # someone else is left to predict it
    reconstruct = torch.stack(
        [masked_mean(gap[:, m], predictable[:, m]) for m in range(tails.MODALITIES)]
    ).sum()
    teacher, student = full.logit[:, tails.FUSED].detach(), part.logit[:, tails.FUSED]
    log = torch.nn.functional.logsigmoid
    p = torch.sigmoid(teacher)
    kl = p * (log(teacher) - log(student)) + (1 - p) * (log(-teacher) - log(-student))
    return reconstruct, masked_mean(kl, (dropped != present).any(dim=1))
