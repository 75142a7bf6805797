"""Trains like IF-MMIN: an imagination network predicts absent modalities and teaches the complement.

Zuo et al., "Exploiting modality-invariant feature for robust multimodal emotion recognition with missing
modalities", ICASSP 2023 (arXiv 2210.15359). From the abstract: invariant features, learned by the central
moment discrepancy between modalities, help an imagination network to predict missing modalities across the
gap between modalities. A reconstruction on this tail. Our reading: the invariant feature of a sample is the
mean over its modalities of one linear map each; the network is two cascaded residual blocks on the features
that are there and that mean. A served tail has no place for such a network, so it is a teacher that only
training has: the tail's complement is distilled from what it imagines, and the fused head learns on samples
that lost modalities.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.source.contract import SourceMethod
from pipeline.source.losses import PAIRS, drop_modalities, head_risks, risk_terms

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from pipeline.source.contract import Batch, Model, Params

CASCADE = 2  # residual blocks of the imagination network


class Config(SourceMethod):
    """``source.kind: imagine``."""

    kind: str = "imagine"
    imagination: float = Field(default=1.0, ge=0, description="weight of the imagination network's own error")
    invariant: float = Field(default=0.1, ge=0, description="weight of equal moments of invariant features")
    complement: float = Field(default=0.3, ge=0, description="weight of the complement's distance to it")
    missing: float = Field(default=0.3, ge=0, description="weight of the fused risk with modalities dropped")
    dropout: float = Field(
        default=1.0, ge=0, le=1, description="share of samples that lose one or two modalities for this"
    )

    def extra(self, domains: int, tail: Params) -> Params:
        """Returns the imagination network; nothing of it is in the model."""
        g = torch.Generator().manual_seed(0)
        d, features = tail["intrinsic"].shape[1:]
        every = tails.MODALITIES * features

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g) / math.sqrt(shape[-1])

        return {
            "invariant": normal(tails.MODALITIES, d, features),
            "imagine.in": normal(CASCADE, features, every + d),
            "imagine.out": normal(CASCADE, every, features),
        }

    def losses(self, model: Model, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        z = model.trunk_features(batch.frames, batch.present)
        risk = head_risks(tails.forward(model.tail, z, batch.present).logit, batch, batch.present)
        left = drop_modalities(batch.present, self.dropout, generator)
        lost = batch.present & ~left
        short = tails.forward(model.tail, z, left)
        fixed = torch.where(batch.present[..., None], z.detach(), 0.0)
        imagined = imagine(model.extra, fixed, left)
        substitute = tails.complete(model.tail, tails.apply_adapter(model.tail, fixed, left), left).complement
        # The teacher guesses where the student has to; a modality that a domain lacks is guessed as well.
        guessed = ~left & left.any(dim=1, keepdim=True)
        return {
            **risk_terms(self, risk),
            "imagination": self.imagination * relative_error(imagined, fixed, lost),
            "invariant": self.invariant * moment_discrepancy(model.extra["invariant"], fixed, batch.present),
            "complement": self.complement * relative_error(substitute, imagined.detach(), guessed),
            "missing": self.missing * head_risks(short.logit, batch, left)[tails.FUSED],
        }


def imagine(network: Params, z: Tensor, left: Tensor) -> Tensor:
    """Returns all modalities' features [B, M, F] as imagined from those in ``left`` [B, M]."""
    z = torch.where(left[..., None], z, 0.0)
    invariant = tails.per_modality(z, network["invariant"]).sum(dim=1) / left.sum(dim=1, keepdim=True).clamp(
        min=1
    )
    state = z.flatten(1)
    for inside, outside in zip(network["imagine.in"], network["imagine.out"], strict=True):
        state = state + torch.relu(torch.cat([state, invariant], dim=1) @ inside.T) @ outside.T
    return state.view_as(z)


def relative_error(prediction: Tensor, target: Tensor, used: Tensor) -> Tensor:
    """Returns the squared error of predictions [B, M, F] in units of the target's power, where ``used``."""
    used = used[..., None].to(target.dtype)
    power = (used * target.square()).sum().clamp(min=1e-6)
    return (used * (prediction - target).square()).sum() / power


def moment_discrepancy(maps: Tensor, z: Tensor, present: Tensor) -> Tensor:
    """Returns the mean distance of two modalities' invariant features in mean and spread, of unit length.

    Central moment discrepancy (Zellinger et al., ICLR 2017), of the first two orders, over the samples that
    have both modalities.
    """
    feature = tails.per_modality(torch.where(present[..., None], z, 0.0), maps)
    unit = feature / tails.norm(feature)[..., None]
    terms = []
    for k, m in PAIRS:
        both = (present[:, k] & present[:, m])[:, None].to(z.dtype)
        size = both.sum().clamp(min=1)
        mean = [(both * unit[:, i]).sum(dim=0) / size for i in (k, m)]
        spread = [
            (both * (unit[:, i] - mu).square()).sum(dim=0) / size for i, mu in zip((k, m), mean, strict=True)
        ]
        terms.append(tails.norm(mean[0] - mean[1]) + tails.norm(spread[0] - spread[1]))
    return torch.stack(terms).mean()
