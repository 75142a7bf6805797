"""The tail: pure functions from trunk features to radial scores, and the part of it that a site may move.

RiSe-style and MFAS-DANet-style reconstruction from the papers' abstracts (arXiv 2511.14157, 2509.23475); the formulas are
ours where the abstracts give none. Everything is a function of a flat dict of tensors, so ``torch.func`` maps it over sites.

Shapes: z [B, M, F], present [B, M], heads V = M + 1 (one per modality in enum order, the fused head last).
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
MIN_RADIUS = 1e-3  # radius: its logarithm is stored
MODALITIES = 3
HEADS = MODALITIES + 1
FUSED = MODALITIES
GATE_INIT = 0.1  # how much a complement adds to a modality that is there
SYNERGY_INIT = 0.1
BOUNDARY = (
    "log_rho",
    "linear",
)  # what decides between the classes, of which a domain may own a copy during a fit
MOVABLE = ("site.gamma", "site.beta", "site.down", "site.up", "gate", "log_rho", "pattern")
LEARNED = MOVABLE[:-1]  # by gradients; ``pattern`` follows counts of scores
REPLAY = (
    "replay.z",
    "replay.present",
    "replay.label",
)  # labelled source features a trained tail carries; no parameters
REFERENCE = (
    "reference.logit",
    "reference.boundary",
)  # what source validation says of its scores; see ``calibrate``
QUANTILES = 33  # of reference.logit, from the lowest to the highest
NO_DECAY = (
    "fuse.out",
    "head.out",
    "log_rho",
    "gate",
    "synergy_gain",
    "site.gamma",
    "site.beta",
    "site.down",
    "site.up",
)


class Completed(NamedTuple):
    """Features after the complement."""

    z: Tensor  # [B, M, F]
    complement: Tensor  # [B, M, F] what the other present modalities say about m


class TailOutput(NamedTuple):
    """What the tail makes of a batch."""

    logit: Tensor  # [B, V] kappa * (rho - radius); P(bona fide) = sigmoid
    radius: Tensor  # [B, V] or, of linear heads, the coordinate across their plane
    hidden: Tensor  # [B, D] fused feature; its direction never enters the score
    intrinsic: Tensor  # [B, M, D]
    synergy: Tensor  # [B, M, D]
    complement: Tensor  # [B, M, F]


def init_tail(config: TailConfig, features: int, *, generator: torch.Generator) -> Params:
    """Fresh tail for F = ``features``; the site adapter in it is the identity."""
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
    """The tensors that adaptation may change; everything else stays bit-equal."""
    return {name: tail[name] for name in MOVABLE}


def with_site_state(tail: Params, state: Params) -> Params:
    """``tail`` as one site serves it: with the movable tensors of ``state``."""
    return {**tail, **{name: state[name] for name in MOVABLE}}


def forward(params: Params, z: Tensor, present: Tensor, *, substitute: bool = True) -> TailOutput:
    """Score a batch. A row's score depends on that row alone and on no value of an absent modality.

    Without ``substitute`` an absent modality is zeros: what the complement is compared to.
    """
    completed = complete(params, apply_adapter(params, z, present), present)
    if not substitute:
        completed = completed._replace(z=torch.where(present[..., None], completed.z, 0.0))
    intrinsic, synergy = split(params, completed.z)
    hidden, radius = radii(params, intrinsic, synergy)
    return TailOutput(
        logit(params, radius, present), radius, hidden, intrinsic, synergy, completed.complement
    )


def score(params: Params, z: Tensor, present: Tensor) -> Tensor:
    """[B] P(bona fide) of the fused head."""
    return torch.sigmoid(forward(params, z, present).logit[..., FUSED])


def apply_adapter(params: Params, z: Tensor, present: Tensor) -> Tensor:
    """Site adapter: gamma z + beta + U relu(V LN(z)); absent modalities become exactly zero.

    The movable tensors may have a leading axis B here and below: a copy for each sample, whose gradients are the samples'.
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
    """Substitute absent modalities and enhance present ones by what the others predict for them.

    With nothing present the complement is zero and finite; such samples are quarantined before they get here.
    """
    keys = per_modality(z, params["complement.key"])
    affinity = (keys @ params["complement.query"].mT).mT / math.sqrt(keys.shape[-1])
    other = ~torch.eye(MODALITIES, dtype=torch.bool, device=z.device)
    weight = masked_softmax(affinity, present[..., None, :] & other)  # [B, M, K]
    low = torch.relu(per_modality(z, params["complement.in"].flatten(1, 2))).unflatten(
        -1, (MODALITIES, -1)
    )  # [B, K, M, Q]
    mixed = (weight.mT[..., None] * low).transpose(-3, -2).flatten(-2)  # [B, M, K * Q]
    complement = per_modality(mixed, params["complement.out"].permute(1, 2, 0, 3).flatten(2))
    gate = torch.sigmoid(params["gate"])[..., None]
    absent = params.get("fill", complement)  # [M, F] a constant in its place, for comparisons
    return Completed(torch.where(present[..., None], z + gate * complement, absent), complement)


def split(params: Params, z: Tensor) -> tuple[Tensor, Tensor]:
    """Completed features [B, M, F] → intrinsic and synergy parts, each [B, M, D]."""
    own = torch.cat([params[n] for n in ("intrinsic", "attend.query", "attend.key")], dim=1)
    intrinsic, query, keys = per_modality(z, own).chunk(3, dim=-1)
    affinity = (query @ keys.mT) / math.sqrt(keys.shape[-1])
    other = ~torch.eye(MODALITIES, dtype=torch.bool, device=z.device)
    context = masked_softmax(affinity, other) @ z
    return intrinsic, per_modality(torch.cat([z, context], dim=-1), params["synergy"])


def radii(params: Params, intrinsic: Tensor, synergy: Tensor) -> tuple[Tensor, Tensor]:
    """Fused feature [B, D] and the radius of every head [B, V]; nothing is normalised, or there would be one radius."""
    joint = torch.cat([intrinsic, params["synergy_gain"] * synergy], dim=-1).flatten(-2)
    hidden = torch.relu(joint @ params["fuse.in"].T + params["fuse.bias"]) @ params["fuse.out"].T
    single = per_modality(
        torch.relu(per_modality(intrinsic, params["head.in"]) + params["head.bias"]), params["head.out"]
    )
    every = torch.cat([single, hidden[..., None, :]], dim=-2)
    return hidden, -(every * params["linear"]).sum(dim=-1) if "linear" in params else norm(every)


def logit(params: Params, radius: Tensor, present: Tensor) -> Tensor:
    """kappa (rho - r) per head: inside the sphere is bona fide. The fused head has a radius per set of modalities."""
    rho = params["log_rho"] + torch.nn.functional.pad(
        params["pattern"][pattern_index(present)][..., None], (FUSED, 0)
    )
    return KAPPA * ((rho if "linear" in params else torch.exp(rho)) - radius)


def shifted_pattern(params: Params, logit: Tensor) -> Tensor:
    """The ``pattern`` [2^M] with which the fused logit under every set of modalities is lower by ``logit`` [2^M]."""
    rho = params["log_rho"][FUSED] + params["pattern"]
    if "linear" in params:
        return params["pattern"] - logit / KAPPA
    return torch.log((torch.exp(rho) - logit / KAPPA).clamp(min=MIN_RADIUS)) - params["log_rho"][FUSED]


def pattern_index(present: Tensor) -> Tensor:
    """[B] which modalities are there, as a number: bit m = modality m."""
    return (present.long() << torch.arange(MODALITIES, device=present.device)).sum(dim=-1)


def per_modality(x: Tensor, weight: Tensor) -> Tensor:
    """[B, M, F] times a matrix for each modality [M, D, F] → [B, M, D].

    One product a modality: under ``vmap`` they fold K into the rows, where one batched product would copy the weights K times.
    """
    return torch.stack([x[..., m, :] @ weight[m].mT for m in range(weight.shape[0])], dim=-2)


def norm(x: Tensor) -> Tensor:
    """Euclidean length over the last axis with a finite gradient at zero."""
    return torch.sqrt(torch.sum(x * x, dim=-1) + 1e-12)


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis where ``mask``; all zero where nothing is allowed."""
    x = torch.where(mask, x, -1e9)
    return torch.where(mask, torch.softmax(x, dim=-1), 0.0)
