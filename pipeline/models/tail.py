"""Computes radial scores from trunk features by pure functions, and names the tensors that a site may move.

A reconstruction of RiSe and MFAS-DANet from their abstracts (arXiv 2511.14157, 2509.23475); where the
abstracts give no formula, it is ours. ``pipeline/source/README.md`` writes the formulas down. The tail is a
flat dict of tensors and every function takes that dict, so ``torch.func.vmap`` maps it over sites.

Shapes: z [B, M, F], present [B, M]; V = M + 1 heads (one per modality in enum order, then the fused head); S
is the modality that predicts another one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models import TailConfig

    Params = dict[str, Tensor]

KAPPA = 5.0  # steepness of the radial boundary
MIN_RADIUS = 1e-3  # smallest radius of a boundary, because its logarithm is stored
MODALITIES = 3
HEADS = MODALITIES + 1
FUSED = MODALITIES  # index of the fused head
GATE_INIT = 0.1  # share of the complement that is added to a present modality
SYNERGY_INIT = 0.1
# The tensors that separate the classes; during a fit each domain may own a copy of them.
BOUNDARY = ("log_rho", "linear")
ADAPTER = ("site.gamma", "site.beta", "site.down", "site.up")
MOVABLE = (*ADAPTER, "gate", "log_rho", "pattern")  # the tensors that a site may change
LEARNED = MOVABLE[:-1]  # by gradients; ``pattern`` follows counts of scores
# Labelled source features that a trained tail carries along; they are no parameters.
REPLAY = ("replay.z", "replay.present", "replay.label")
# What a trained tail has besides: statistics of its scores on validation (``pipeline.source.calibrate``), and
# how much the modalities' own heads say in the fused score.
REFERENCE = ("reference.logit", "reference.boundary", "reference.pool")
POOL = MODALITIES / HEADS  # reference.pool: with everything there, every head says the same
QUANTILES = 33  # number of quantiles in reference.logit, from the lowest to the highest logit
# Tensors without weight decay: decay would shrink every radius, or move the adapter from the identity.
NO_DECAY = ("fuse.out", "head.out", "log_rho", "gate", "synergy_gain", *ADAPTER)


class Completed(NamedTuple):
    """Features after the complement was added to present modalities and substituted for absent ones."""

    z: Tensor  # [B, M, F]
    complement: Tensor  # [B, M, F] prediction of modality m from the other present modalities


class TailOutput(NamedTuple):
    """The tail's outputs for a batch."""

    logit: Tensor  # [B, V] kappa * (rho - radius); P(bona fide) is its sigmoid
    radius: Tensor  # [B, V]; for linear heads the coordinate across their plane
    hidden: Tensor  # [B, D] fused feature; its direction never enters the score
    intrinsic: Tensor  # [B, M, D]
    synergy: Tensor  # [B, M, D]
    complement: Tensor  # [B, M, F]


def init_tail(config: TailConfig, features: int, *, generator: torch.Generator) -> Params:
    """Returns a fresh tail for F = ``features``, whose site adapter is the identity."""
    m, f, d, r = MODALITIES, features, config.width, config.rank
    linear = (
        {"linear": torch.randn(HEADS, d, generator=generator) / math.sqrt(d)}
        if config.head == "linear"
        else {}
    )

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    return {
        "site.gamma": torch.ones(m, f),
        "site.beta": torch.zeros(m, f),
        "site.down": normal(m, r, f),
        "site.up": torch.zeros(m, f, r),
        "complement.query": normal(m, d) * math.sqrt(d),
        "complement.key": normal(m, d, f),
        "complement.in": normal(m, m, f // 4, f),
        "complement.out": normal(m, m, f, f // 4),
        "gate": torch.full((m,), math.log(GATE_INIT / (1 - GATE_INIT))),
        "intrinsic": normal(m, d, f),
        "attend.query": normal(m, d, f),
        "attend.key": normal(m, d, f),
        "synergy": normal(m, d, 2 * f),
        "synergy_gain": torch.full((), SYNERGY_INIT),
        "fuse.in": normal(2 * d, 2 * m * d),
        "fuse.bias": torch.zeros(2 * d),
        "fuse.out": normal(d, 2 * d),
        "head.in": normal(m, d, d),
        "head.bias": torch.zeros(m, d),
        "head.out": normal(m, d, d),
        "log_rho": torch.zeros(HEADS),
        "pattern": torch.zeros(2**m),
        **linear,
    }


def site_state(tail: Params) -> Params:
    """Returns the tensors that adaptation may change; all others stay bit-equal."""
    return {name: tail[name] for name in MOVABLE}


def with_site_state(tail: Params, state: Params) -> Params:
    """Returns the tail that a site serves: ``tail`` with the movable tensors of ``state``."""
    return {**tail, **{name: state[name] for name in MOVABLE}}


def forward(params: Params, z: Tensor, present: Tensor, *, substitute: bool = True) -> TailOutput:
    """Scores a batch; a row's score depends on that row alone and on no value of an absent modality.

    Without ``substitute`` an absent modality is zeros, the baseline of the complement.
    """
    completed = complete(params, apply_adapter(params, z, present), present)
    if not substitute:
        completed = completed._replace(z=torch.where(present[..., None], completed.z, 0.0))
    intrinsic, synergy = split(params, completed.z)
    hidden, radius = radii(params, intrinsic, synergy)
    if "reference.pool" in params:
        radius = pooled(params["reference.pool"], radius, present)
    return TailOutput(
        logit(params, radius, present), radius, hidden, intrinsic, synergy, completed.complement
    )


def score(params: Params, z: Tensor, present: Tensor) -> Tensor:
    """Returns P(bona fide) [B] of the fused head."""
    return torch.sigmoid(forward(params, z, present).logit[..., FUSED])


def apply_adapter(params: Params, z: Tensor, present: Tensor) -> Tensor:
    """Applies the site adapter gamma z + beta + U relu(V LN(z)); absent modalities become exactly zero.

    The movable tensors may have a leading axis B here and below: one copy per sample, whose gradient is that
    sample's.
    """
    z = torch.where(present[..., None], z, 0.0)
    normed = torch.nn.functional.layer_norm(z, z.shape[-1:])
    low = torch.relu(torch.einsum("...mf,...mrf->...mr", normed, params["site.down"]))
    z = (
        params["site.gamma"] * z
        + params["site.beta"]
        + torch.einsum("...mr,...mfr->...mf", low, params["site.up"])
    )
    return torch.where(present[..., None], z, 0.0)


def complete(params: Params, z: Tensor, present: Tensor) -> Completed:
    """Substitutes absent modalities and enhances present ones by predictions of the other present ones.

    With no modality present the complement is zero and finite; ingest quarantines such samples.
    """
    keys = per_modality(z, params["complement.key"])
    affinity = (keys @ params["complement.query"].mT).mT / math.sqrt(keys.shape[-1])
    other = ~torch.eye(MODALITIES, dtype=torch.bool, device=z.device)
    weight = masked_softmax(affinity, present[..., None, :] & other)  # [B, M, S]
    low = torch.relu(per_modality(z, params["complement.in"].flatten(1, 2)))
    low = low.unflatten(-1, (MODALITIES, -1))  # [B, S, M, F/4]
    mixed = (weight.mT[..., None] * low).transpose(-3, -2).flatten(-2)  # [B, M, S * F/4]
    complement = per_modality(mixed, params["complement.out"].permute(1, 2, 0, 3).flatten(2))
    gate = torch.sigmoid(params["gate"])[..., None]
    absent = params.get("fill", complement)  # benchmarks give a constant [M, F] to compare with
    return Completed(torch.where(present[..., None], z + gate * complement, absent), complement)


def split(params: Params, z: Tensor) -> tuple[Tensor, Tensor]:
    """Splits completed features [B, M, F] into an intrinsic and a synergy part, each [B, M, D]."""
    weight = torch.cat([params[n] for n in ("intrinsic", "attend.query", "attend.key")], dim=1)
    intrinsic, query, keys = per_modality(z, weight).chunk(3, dim=-1)
    affinity = (query @ keys.mT) / math.sqrt(keys.shape[-1])
    other = ~torch.eye(MODALITIES, dtype=torch.bool, device=z.device)
    context = masked_softmax(affinity, other) @ z
    return intrinsic, per_modality(torch.cat([z, context], dim=-1), params["synergy"])


def radii(params: Params, intrinsic: Tensor, synergy: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the fused feature [B, D] and the radius of every head [B, V].

    No feature is normalised on the way, because all normalised features have the same radius.
    """
    joint = torch.cat([intrinsic, params["synergy_gain"] * synergy], dim=-1).flatten(-2)
    hidden = torch.relu(joint @ params["fuse.in"].T + params["fuse.bias"]) @ params["fuse.out"].T
    single = per_modality(
        torch.relu(per_modality(intrinsic, params["head.in"]) + params["head.bias"]), params["head.out"]
    )
    every = torch.cat([single, hidden[..., None, :]], dim=-2)
    return hidden, -(every * params["linear"]).sum(dim=-1) if "linear" in params else norm(every)


def pooled(share: Tensor, radius: Tensor, present: Tensor) -> Tensor:
    """Returns the radii [B, V] with a mean for the fused head's: ``share`` [] of it from present modalities.

    The heads learned apart and err apart. It is done after training: heads that learn together agree more.
    """
    there = present.to(radius.dtype)
    own = (radius[..., :FUSED] * there).sum(dim=-1) / there.sum(dim=-1).clamp(min=1)
    fused = (1 - share) * radius[..., FUSED] + share * own
    return torch.cat([radius[..., :FUSED], fused[..., None]], dim=-1)


def logit(params: Params, radius: Tensor, present: Tensor) -> Tensor:
    """Returns kappa (rho - r) per head [B, V]: positive, hence bona fide, inside the sphere.

    The fused head has a boundary of its own for every set of present modalities.
    """
    rho = params["log_rho"] + torch.nn.functional.pad(
        params["pattern"][pattern_index(present)][..., None], (FUSED, 0)
    )
    return KAPPA * ((rho if "linear" in params else torch.exp(rho)) - radius)


def shifted_pattern(params: Params, logit: Tensor) -> Tensor:
    """Returns the ``pattern`` [2^M] that lowers the fused logit of each set by ``logit`` [2^M]."""
    rho = params["log_rho"][FUSED] + params["pattern"]
    if "linear" in params:
        return params["pattern"] - logit / KAPPA
    return torch.log((torch.exp(rho) - logit / KAPPA).clamp(min=MIN_RADIUS)) - params["log_rho"][FUSED]


def pattern_index(present: Tensor) -> Tensor:
    """Returns the set of present modalities [B] as an index of ``pattern``: bit m stands for modality m."""
    return (present.long() << torch.arange(MODALITIES, device=present.device)).sum(dim=-1)


def per_modality(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies x [B, M, F] by one matrix per modality [M, D, F] and returns [B, M, D].

    It is one product per modality, because ``vmap`` folds K into its rows; one batched product would copy the
    weights K times.
    """
    return torch.stack([x[..., m, :] @ weight[m].mT for m in range(weight.shape[0])], dim=-2)


def norm(x: Tensor) -> Tensor:
    """Returns the Euclidean length over the last axis, with a finite gradient at zero."""
    return torch.sqrt(torch.sum(x * x, dim=-1) + 1e-12)


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the softmax over the last axis among the True of ``mask``; zeros where none is True."""
    x = torch.where(mask, x, -1e9)
    return torch.where(mask, torch.softmax(x, dim=-1), 0.0)
