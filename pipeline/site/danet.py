"""MFAS-DANet-style site adaptation: complementary features, reliable pseudo labels, a loss weight that follows stability.

Reconstruction from the abstract of arXiv 2509.23475 ("Multi-modal Face Anti-Spoofing via Domain Adaptation"), not a
reproduction: the abstract names the three parts; every formula below is ours (``methods.md`` §3). The complement lives in
the tail. Only the site adapter, the complement gates and log rho move.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.site import adam, entropy, moments, sane
from pipeline.types import Outcome, Section

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.site import Params, State
    from pipeline.types import Features

WARM_UP = 20  # steps whose median instability becomes the reference
SUBSTITUTED = 0.2  # extra uncertainty of a head that reads a substituted modality
SHARPNESS = 0.2  # temperature of the vote


class Config(Section):
    """Settings of ``danet``; the three ``use_*`` switches are for ablation."""

    kind: Literal["danet"] = "danet"
    mode: Literal["tta", "da"] = Field(
        default="tta", description="tta: stream only; da: labelled source features stay in the loss"
    )
    lr: float = Field(default=1e-3, gt=0)
    clip: float = Field(default=1.0, gt=0, description="largest global norm of a gradient")
    confidence_bona_fide: float = Field(default=0.9, ge=0.5, le=1, description="vote a bona fide pseudo label needs")
    confidence_attack: float = Field(default=0.8, ge=0.5, le=1, description="vote an attack pseudo label needs")
    disagreement: float = Field(default=0.07, ge=0, description="nats; a label above it is not used")
    unanimous_bona_fide: bool = Field(default=True, description="bona fide needs every present modality's head")
    anchor: float = Field(default=1.0, ge=0, description="weight of KL(source || site) on the reservoir")
    source: float = Field(default=1.0, ge=0, description="weight of the labelled source features in mode da")
    reservoir: int = Field(default=32, ge=8, le=256)
    omega: float = Field(default=0.5, gt=0, description="initial loss weight")
    omega_min: float = Field(default=0.05, gt=0)
    omega_max: float = Field(default=2.0, gt=0)
    patience: int = Field(default=10, ge=1, description="steps at the floor before the last good snapshot returns")
    use_vote: bool = True
    use_omega: bool = True
    use_restore: bool = True

    def init(self, tail: Params) -> State:
        """Movable tensors, their last good copy, Adam moments, reservoir and stability statistics."""
        if self.mode == "da" and "replay.z" not in tail:
            raise ValueError(
                "site.mode: 'da' needs a source model with stored source features; train it again or use tta"
            )
        own = {k: v.clone() for k, v in tails.movable(tail).items()}
        shape = tail["site.gamma"].shape
        return {
            **own,
            **{f"good.{k}": v.clone() for k, v in own.items()},
            **moments(tail, tails.MOVABLE),
            "reservoir.z": torch.zeros(self.reservoir, *shape),
            "reservoir.present": torch.zeros(self.reservoir, shape[0], dtype=torch.bool),
            "reservoir.vote": torch.zeros(self.reservoir),
            "seen": torch.zeros((), dtype=torch.int64),
            "step": torch.zeros((), dtype=torch.int64),
            "omega": torch.full((), self.omega),
            "instability": torch.zeros(()),
            "warm_up": torch.zeros(WARM_UP),
            "floor": torch.zeros((), dtype=torch.int64),
        }

    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Score the batch, label what can be trusted, take one weighted step, measure what it did to the reservoir."""
        batch = sane(batch)
        before = tails.read(tails.moved(tail, state), batch.z, batch.present)
        vote, disagreement = _vote(torch.sigmoid(before.logit), batch.present)
        label, used = self._reliable(torch.sigmoid(before.logit), vote, disagreement, batch)
        trust = used * ((1 - disagreement / math.log(2)) if self.use_vote else 1.0) * _class_weight(state, label)
        held = _filled(state)

        def loss(own: Params) -> tuple[Tensor, Tensor]:
            params = {**tail, **own}
            logit = tails.read(params, batch.z, batch.present).logit
            pseudo = (trust[:, None] * _cross_entropy(logit, label[:, None])).sum() / used.sum().clamp(min=1)
            memory = tails.score(params, state["reservoir.z"], state["reservoir.present"])
            source = tails.score(tail, state["reservoir.z"], state["reservoir.present"])
            drift = (_kl(source, memory) * held).sum() / held.sum().clamp(min=1)
            return state["omega"] * pseudo + self.anchor * drift + self._source_loss(tail, params), memory

        grads, old = torch.func.grad(loss, has_aux=True)({k: state[k] for k in tails.MOVABLE})
        learned = adam(state, grads, lr=self.lr, clip=self.clip, when=used.any())
        new = tails.score(tails.moved(tail, learned), state["reservoir.z"], state["reservoir.present"])
        instability = 0.5 * _mean(_kl(old, new), held) + 0.5 * _mean(((old >= 0.5) != (new >= 0.5)).float(), held)
        learned, restored = self._weigh(learned, instability, measured=held.any() & used.any())
        learned = _remember(learned, batch, vote)
        pseudo = torch.where(used > 0, label, -1.0).to(torch.int8)
        score = torch.sigmoid(before.logit[:, tails.FUSED])
        return learned, Outcome(score, pseudo, disagreement, learned["omega"], instability, restored)

    def _reliable(self, p: Tensor, vote: Tensor, disagreement: Tensor, batch: Features) -> tuple[Tensor, Tensor]:
        """(label [B] 0/1, used [B] 0/1): class-wise confidence, agreement, and a stricter rule for bona fide."""
        if not self.use_vote:
            vote = p[:, tails.FUSED]
            disagreement = torch.zeros_like(disagreement)
        bona_fide = vote >= 0.5
        sure = torch.where(bona_fide, vote >= self.confidence_bona_fide, 1 - vote >= self.confidence_attack)
        reliable = sure & (disagreement <= self.disagreement) & batch.valid
        if self.unanimous_bona_fide and self.use_vote:
            agree = ((p[:, : tails.FUSED] >= 0.5) | ~batch.present).all(-1) & (p[:, tails.FUSED] >= 0.5)
            reliable = reliable & (agree | ~bona_fide)
        return bona_fide.float(), reliable.float()

    def _source_loss(self, tail: Params, params: Params) -> Tensor:
        """Mode da: class-balanced cross entropy on the labelled features that came with the source model."""
        if self.mode == "tta":
            return torch.zeros(())
        label = tail["replay.label"]
        each = _cross_entropy(tails.read(params, tail["replay.z"], tail["replay.present"]).logit[:, tails.FUSED], label)
        return self.source * 0.5 * (_mean(each, label) + _mean(each, 1 - label))

    def _weigh(self, state: State, instability: Tensor, *, measured: Tensor) -> tuple[State, Tensor]:
        """Move omega with the running instability; at the floor for ``patience`` steps go back to the good snapshot."""
        step = state["step"]
        warm = step < WARM_UP
        slot = torch.arange(WARM_UP) == step
        warm_up = torch.where(slot & measured, instability, state["warm_up"])
        running = torch.where(measured, 0.9 * state["instability"] + 0.1 * instability, state["instability"])
        reference = warm_up.median().clamp(min=1e-6)
        factor = torch.exp(0.2 * ((reference - running) / reference).clamp(-5, 1))
        omega = (state["omega"] * factor).clamp(self.omega_min, self.omega_max)
        omega = torch.where(warm | ~measured, state["omega"], omega) if self.use_omega else state["omega"]
        floor = torch.where(measured, torch.where(omega <= self.omega_min, state["floor"] + 1, 0), state["floor"])
        restored = (floor >= self.patience) & torch.tensor(self.use_restore)
        good = measured & ~warm & (running <= reference) & ~restored
        new: State = {
            "warm_up": warm_up,
            "step": torch.where(measured, step + 1, step),
            "instability": torch.where(restored, reference, running),
            "omega": torch.where(restored, torch.full_like(omega, self.omega), omega),
            "floor": torch.where(restored, torch.zeros_like(floor), floor),
            "adam.t": torch.where(restored, torch.zeros(()), state["adam.t"]),
        }
        for name in tails.MOVABLE:
            new[name] = torch.where(restored, state[f"good.{name}"], state[name])
            new[f"good.{name}"] = torch.where(good, state[name], state[f"good.{name}"])
            for moment in ("adam1", "adam2"):
                new[f"{moment}.{name}"] = torch.where(restored, 0.0, state[f"{moment}.{name}"])
        return {**state, **new}, restored


def _vote(p: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Heads' P(bona fide) [B, V] → uncertainty-weighted vote [B] and weighted Jensen-Shannon disagreement [B], nats."""
    substituted = torch.cat([~present, torch.zeros_like(present[:, :1])], dim=-1)
    uncertainty = (entropy(p) / math.log(2) + SUBSTITUTED * substituted).clamp(max=1)
    weight = torch.softmax(-uncertainty / SHARPNESS, dim=-1)
    vote = (weight * p).sum(-1)
    return vote, (entropy(vote) - (weight * entropy(p)).sum(-1)).clamp(min=0)


def _class_weight(state: State, label: Tensor) -> Tensor:
    """[B] weight that gives both classes equal mass, from the votes in the reservoir; at most 3, 1 while it is empty."""
    share = _mean((state["reservoir.vote"] >= 0.5).float(), _filled(state))
    own = torch.where(label > 0.5, share, 1 - share)
    return torch.where(state["seen"] > 0, (0.5 / own.clamp(min=1e-3)).clamp(max=3.0), 1.0)


def _filled(state: State) -> Tensor:
    """[R] 1 for the reservoir slots that hold a sample."""
    size = state["reservoir.vote"].shape[0]
    return (torch.arange(size) < state["seen"]).float()


def _remember(state: State, batch: Features, vote: Tensor) -> State:
    """Reservoir sampling (Vitter's algorithm R) with a hash of the running count in the place of a random generator."""
    z, present, votes, seen = (state[k] for k in ("reservoir.z", "reservoir.present", "reservoir.vote", "seen"))
    slots = torch.arange(votes.shape[0])
    for i in range(batch.valid.shape[0]):
        draw = ((seen * 2654435761 + 1013904223) % 4294967296) % (seen + 1)
        slot = torch.where(seen < votes.shape[0], seen, draw)
        here = (slots == slot) & batch.valid[i]
        z = torch.where(here[:, None, None], batch.z[i], z)
        present = torch.where(here[:, None], batch.present[i], present)
        votes = torch.where(here, vote[i], votes)
        seen = seen + batch.valid[i]
    return {**state, "reservoir.z": z, "reservoir.present": present, "reservoir.vote": votes, "seen": seen}


def _cross_entropy(logit: Tensor, label: Tensor) -> Tensor:
    return torch.nn.functional.softplus(logit) - label * logit


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of Bernoulli distributions, nats."""
    p, q = p.clamp(1e-6, 1 - 1e-6), q.clamp(1e-6, 1 - 1e-6)
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    return (x * weight).sum() / weight.sum().clamp(min=1)
