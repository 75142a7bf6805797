"""MFAS-DANet-style site adaptation: complementary features, reliable pseudo labels, a loss weight that follows stability.

Reconstruction from the abstract of arXiv 2509.23475 ("Multi-modal Face Anti-Spoofing via Domain Adaptation"), not a
reproduction: the abstract names the three parts; every formula below is ours (``methods.md`` §3). The complement lives in
the tail. By gradients only the site adapter, the complement gates and log rho move.

Not from the paper: the boundary follows the score shift of the site (``pipeline.site.shift``), nothing moves before there is
evidence of a shift, and the guards on who may teach in ``pipeline.site.trust``. Each is a setting; ``palisade bench site`` has a
row for each.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from pipeline.models import tail as tails
from pipeline.site import reservoir, shift, trust
from pipeline.site.contract import LEARNED, adam, moments, sane
from pipeline.types import Lesson, Outcome, Section

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.tail import TailOutput
    from pipeline.site.contract import Params, State
    from pipeline.types import Features

WARM_UP = 20  # steps whose median instability becomes the reference


class Config(Section):
    """Settings of ``danet``: of the reconstruction first, then our own additions."""

    kind: Literal["danet"] = "danet"
    mode: Literal["tta", "da"] = Field(
        default="tta", description="tta: stream only; da: labelled source features stay in the loss"
    )
    learn: bool = Field(default=True, description="gradients; without them only the boundary may move")
    lr: float = Field(default=3e-4, gt=0)
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
    source: float = Field(default=1.0, ge=0, description="weight of the labelled source features in mode da")
    reservoir: int = Field(default=32, ge=8, le=256)
    weight: Literal["one", "omega", "restore"] = Field(
        default="restore",
        description="of the loss: 1, following stability, and back to the last good state at the floor",
    )
    omega: float = Field(default=0.5, gt=0, description="initial loss weight")
    omega_min: float = Field(default=0.05, gt=0)
    omega_max: float = Field(default=2.0, gt=0)
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
    loosen: float = Field(default=2.0, ge=0, description="logits, most that the boundary loosens")
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

    def init(self, tail: Params) -> State:
        """Movable tensors, their last good copy, Adam moments, reservoir, score counts and stability statistics."""
        if self.mode == "da" and "replay.z" not in tail:
            raise ValueError(
                "site.mode: 'da' needs a source model with stored source features; train it again or use tta"
            )
        own = {k: v.clone() for k, v in tails.site_state(tail).items()}
        return {
            **own,
            **{f"good.{k}": own[k].clone() for k in LEARNED},
            **moments(tail, LEARNED),
            **shift.init(),
            **trust.remember_sessions(),
            **reservoir.init(self.reservoir, *tail["site.gamma"].shape),
            "step": torch.zeros((), dtype=torch.int64),
            "floor": torch.zeros((), dtype=torch.int64),
            "omega": torch.full((), self.omega),
            "instability": torch.zeros(()),
            "warm_up": torch.zeros(WARM_UP),
        }

    def step(self, tail: Params, state: State, batch: Features) -> tuple[State, Outcome]:
        """Score the batch, count its scores, and, if the site has shifted, learn from what can be trusted."""
        return self.conclude(tail, *self.observe(tail, state, batch), learn=True)

    def observe(self, tail: Params, state: State, batch: Features) -> tuple[State, Lesson]:
        """Score the batch, count its scores, follow the site's shift, and say what can be trusted."""
        batch = sane(batch)
        with torch.no_grad():
            before = tails.forward(tails.with_site_state(tail, state), batch.z, batch.present)
            source = tails.forward(tail, batch.z, batch.present)
        p = torch.sigmoid(before.logit)
        voted, disagreement = trust.vote(p, batch.present)
        state, teaches = self._within_cap(state, batch)
        state, moved = self._follow(tail, state, source.logit[:, tails.FUSED], batch, teaches)
        label, used = self._reliable(tail, before, source, voted, disagreement, batch)
        used = used * teaches * (moved & (state["session.seen"] >= self.sessions))
        known = torch.sigmoid(source.logit[:, tails.FUSED])
        return state, Lesson(batch, p[:, tails.FUSED], known, voted, disagreement, label, used)

    def conclude(self, tail: Params, state: State, lesson: Lesson, *, learn: bool) -> tuple[State, Outcome]:
        """Learn from the used samples of the batch, then remember all of them."""
        instability, restored = torch.zeros(()), torch.zeros((), dtype=torch.bool)
        if self.learn and learn:
            state, instability, restored = self._learn(tail, state, lesson)
        state = reservoir.remember(state, lesson.batch, vote=lesson.vote, source=lesson.source)
        pseudo = torch.where(lesson.used > 0, lesson.label, -1.0).to(torch.int8)
        return state, Outcome(
            lesson.score, pseudo, lesson.disagreement, state["omega"], instability, restored
        )

    def _within_cap(self, state: State, batch: Features) -> tuple[State, Tensor]:
        """[B] 1 where a sample counts at all: valid, and among the first of its session."""
        state, within = trust.capped(state, batch, cap=self.session_cap or 2**31)
        return state, within.float()

    def _follow(
        self, tail: Params, state: State, logit: Tensor, batch: Features, teaches: Tensor
    ) -> tuple[State, Tensor]:
        """Count the source's logits and move the boundary to where errors are equal → state, [] whether the site moved."""
        if "reference.logit" not in tail:
            return state, torch.ones((), dtype=torch.bool)
        state = shift.count(
            state, logit, tails.pattern_index(batch.present), teaches, half_life=self.half_life
        )
        state, found = shift.estimate(state, shift.tables(tail["reference.logit"]))
        usual = (found.attack >= self.min_attack_count) & (
            found.bona_fide >= self.min_bona_fide_ratio * found.attack
        )
        allowed = found.logit.clamp(max=self.tighten).maximum(-torch.where(usual, self.loosen, 0.0))
        trigger = -math.inf if self.trigger is None else self.trigger
        by = torch.where(
            (found.logit.abs() >= self.shift_min_logits) & (found.evidence >= trigger), allowed, 0.0
        )
        by = torch.where(state["session.seen"] >= self.sessions, by, 0.0)
        used = state["shift.count"].sum(-1)
        moved = ((by != 0) * used).sum() > 0.5 * used.sum()  # under most of what was seen
        if self.calibrate:
            pattern = torch.where(by == 0, tail["pattern"], tails.shifted_pattern(tail, by))
            state = {**state, "pattern": torch.where(batch.valid.any(), pattern, state["pattern"])}
        return state, moved | (self.trigger is None)

    def _reliable(
        self,
        tail: Params,
        before: TailOutput,
        source: TailOutput,
        voted: Tensor,
        disagreement: Tensor,
        batch: Features,
    ) -> tuple[Tensor, Tensor]:
        """(label [B] 0/1, used [B] 0/1): class-wise confidence, agreement, and a stricter rule for bona fide."""
        p = torch.sigmoid(before.logit)
        if self.labels != "vote":
            voted = p[:, tails.FUSED]
        bona_fide = voted >= 0.5
        used = batch.valid
        if self.labels != "all":
            used = used & torch.where(
                bona_fide, voted >= self.confidence_bona_fide, 1 - voted >= self.confidence_attack
            )
        if self.labels == "vote":
            used = used & (disagreement <= self.disagreement)
            if self.unanimous_bona_fide:
                used = used & (trust.unanimous(p, batch.present) | ~bona_fide)
        if self.prototypes and "replay.z" in tail:
            used = used & ((trust.prototype(tail, source.hidden) > 0.5) == bona_fide)
        if self.conformal and "reference.logit" in tail:
            attack, genuine = trust.conformal(
                tail["reference.logit"], source.logit[:, tails.FUSED], tails.pattern_index(batch.present)
            )
            typical, other = torch.where(bona_fide, genuine, attack), torch.where(bona_fide, attack, genuine)
            used = used & (typical >= self.conformal) & (other < self.conformal)
        return bona_fide.float(), used.float()

    def _learn(self, tail: Params, state: State, lesson: Lesson) -> tuple[State, Tensor, Tensor]:
        """One weighted step on the used samples → state, instability [], restored []."""
        held, present = reservoir.filled(state), state["reservoir.present"]
        certain = (1 - lesson.disagreement / math.log(2)) if self.labels == "vote" else 1.0
        weight = lesson.used * certain * _class_weight(state, lesson.label)
        taught = trust.median_of_means(
            self._gradients(tail, state, lesson), weight, lesson.batch.session, groups=self.groups or 1
        )
        own = {k: state[k] for k in LEARNED}
        steady, old = torch.func.grad(lambda own: self._steadiness(tail, state, own, held), has_aux=True)(own)
        omega = 1.0 if self.weight == "one" else state["omega"]
        used = lesson.used.any()
        grads = {k: omega * taught[k] + steady[k] for k in LEARNED}
        learned = adam(state, grads, lr=self.lr, clip=self.clip, when=used)
        new = tails.score(tails.with_site_state(tail, learned), state["reservoir.z"], present)
        instability = 0.5 * _mean(_kl(old, new), held) + 0.5 * _mean(
            ((old >= 0.5) != (new >= 0.5)).float(), held
        )
        learned, restored = self._weigh(learned, instability, measured=held.any() & used)
        return learned, instability, restored

    def _gradients(self, tail: Params, state: State, lesson: Lesson) -> Params:
        """Of every sample's cross entropy with its label, summed over the heads: [B, ...] for each learned tensor."""
        batch, count = lesson.batch, len(lesson.label)

        def loss(own: Params) -> Tensor:
            params = {**tail, **own, "pattern": state["pattern"]}
            return _cross_entropy(
                tails.forward(params, batch.z, batch.present).logit, lesson.label[:, None]
            ).sum()

        return torch.func.grad(loss)({k: state[k].expand(count, *state[k].shape) for k in LEARNED})

    def _steadiness(self, tail: Params, state: State, own: Params, held: Tensor) -> tuple[Tensor, Tensor]:
        """What holds the site near its source: KL on the reservoir and, in mode da, labelled features → loss [], scores [R]."""
        params, present = {**tail, **own}, state["reservoir.present"]
        radius = tails.forward(params, state["reservoir.z"], present).radius
        now, at_source = (
            torch.sigmoid(tails.logit({**params, "pattern": p}, radius, present)[:, tails.FUSED])
            for p in (state["pattern"], tail["pattern"])
        )
        drift = _mean(_kl(state["reservoir.source"], at_source), held)
        return self.anchor * drift + self._source_loss(tail, params), now.detach()

    def _source_loss(self, tail: Params, params: Params) -> Tensor:
        """Mode da: class-balanced cross entropy on the labelled features that came with the source model."""
        if self.mode == "tta":
            return torch.zeros(())
        label = tail["replay.label"]
        source = {**params, "pattern": tail["pattern"]}
        each = _cross_entropy(
            tails.forward(source, tail["replay.z"], tail["replay.present"]).logit[:, tails.FUSED], label
        )
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
        omega = torch.where(warm | ~measured | (self.weight == "one"), state["omega"], omega)
        floor = torch.where(
            measured, torch.where(omega <= self.omega_min, state["floor"] + 1, 0), state["floor"]
        )
        restored = (floor >= self.patience) & (self.weight == "restore")
        good = measured & ~warm & (running <= reference) & ~restored
        new: State = {
            "warm_up": warm_up,
            "step": torch.where(measured, step + 1, step),
            "instability": torch.where(restored, reference, running),
            "omega": torch.where(restored, torch.full_like(omega, self.omega), omega),
            "floor": torch.where(restored, torch.zeros_like(floor), floor),
            "adam.t": torch.where(restored, torch.zeros(()), state["adam.t"]),
        }
        for name in LEARNED:
            new[name] = torch.where(restored, state[f"good.{name}"], state[name])
            new[f"good.{name}"] = torch.where(good, state[name], state[f"good.{name}"])
            for moment in ("adam1", "adam2"):
                new[f"{moment}.{name}"] = torch.where(restored, 0.0, state[f"{moment}.{name}"])
        return {**state, **new}, restored


def _class_weight(state: State, label: Tensor) -> Tensor:
    """[B] weight that gives both classes equal mass, from the votes in the reservoir; at most 3, 1 while it is empty."""
    share = _mean((state["reservoir.vote"] >= 0.5).float(), reservoir.filled(state))
    own = torch.where(label > 0.5, share, 1 - share)
    return torch.where(state["seen"] > 0, (0.5 / own.clamp(min=1e-3)).clamp(max=3.0), 1.0)


def _cross_entropy(logit: Tensor, label: Tensor) -> Tensor:
    return torch.nn.functional.softplus(logit) - label * logit


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of Bernoulli distributions, nats."""
    p, q = p.clamp(1e-6, 1 - 1e-6), q.clamp(1e-6, 1 - 1e-6)
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    return (x * weight).sum() / weight.sum().clamp(min=1)
