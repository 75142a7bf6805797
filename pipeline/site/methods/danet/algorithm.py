"""Computes the steps of ``danet`` as pure functions of its settings, the tail and a site's state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pipeline.models import tail as tails
from pipeline.site import reservoir, shift, taught, trust
from pipeline.site.adam import adam, moments
from pipeline.site.trust import sane
from pipeline.types import Lesson, Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.tail import TailOutput
    from pipeline.site.contract import Params, State
    from pipeline.site.methods.danet import Config
    from pipeline.types import Features

SEEN = 20  # samples that a set of sensors must have shown before its boundary moves
WARM_UP = 20  # steps whose median instability becomes the reference


def init(config: Config, tail: Params) -> State:
    """Returns a new site's movable tensors, last good copy, Adam moments, memory and statistics."""
    if config.mode == "da" and "replay.z" not in tail:
        raise ValueError(
            "site.mode: 'da' needs a source model with stored source features; train it again or use tta"
        )
    movable = {k: v.clone() for k, v in tails.site_state(tail).items()}
    return {
        **movable,
        **{f"good.{k}": movable[k].clone() for k in tails.LEARNED},
        **moments(tail, tails.LEARNED),
        **shift.init(),
        **trust.remember_sessions(),
        **reservoir.init(config.reservoir, *tail["site.gamma"].shape),
        **taught.init(config.taught, tail),
        "step": torch.zeros((), dtype=torch.int64),
        "floor": torch.zeros((), dtype=torch.int64),
        "omega": torch.full((), config.omega),
        "instability": torch.zeros(()),
        "warm_up": torch.zeros(WARM_UP),
    }


def teach(config: Config, tail: Params, state: State) -> State:
    """Starts anew at what the labels in the memory teach; sessions and the reservoir of the stream stay.

    Counts of scores and gradients of the stream belong to the base that they were measured on.
    """
    movable = taught.learn(
        tail, state, taught.Teaching(config.taught_steps, config.taught_lr, config.taught_hold)
    )
    kept = {
        n: t for n, t in state.items() if n.startswith(("taught.", "reservoir.", "session.")) or n == "seen"
    }
    source = tails.score({**tail, **movable}, state["reservoir.z"], state["reservoir.present"])
    return {
        **taught.restart({**init(config, tail), **kept}, movable),
        **{f"good.{n}": movable[n] for n in tails.LEARNED},
        "reservoir.source": torch.where(reservoir.filled(state) > 0, source, state["reservoir.source"]),
    }


def observe(config: Config, tail: Params, state: State, batch: Features) -> tuple[State, Lesson]:
    """Scores the batch, counts its scores, follows the site's shift, and marks the samples that may teach."""
    batch = sane(batch)
    with torch.no_grad():
        before = tails.forward(tails.with_site_state(tail, state), batch.z, batch.present)
        source = tails.forward(taught.base(tail, state), batch.z, batch.present)
    p = torch.sigmoid(before.logit)
    voted, disagreement = trust.vote(p, batch.present)
    state, teaches = _within_cap(config, state, batch)
    state, moved = _follow(config, tail, state, source.logit[:, tails.FUSED], batch, teaches)
    label, used = _reliable(config, tail, before, source, voted, disagreement, batch)
    used = used * teaches * (moved & (state["session.seen"] >= config.sessions))
    source_score = torch.sigmoid(source.logit[:, tails.FUSED])
    return state, Lesson(batch, p[:, tails.FUSED], source_score, voted, disagreement, label, used)


def conclude(
    config: Config, tail: Params, state: State, lesson: Lesson, *, learn: bool
) -> tuple[State, Outcome]:
    """Learns from the used samples of the batch, then remembers all of them."""
    instability, restored = torch.zeros(()), torch.zeros((), dtype=torch.bool)
    if config.learn and learn:
        state, instability, restored = _learn(config, tail, state, lesson)
    state = reservoir.remember(state, lesson.batch, vote=lesson.vote, source=lesson.source)
    pseudo = torch.where(lesson.used > 0, lesson.label, -1.0).to(torch.int8)
    return state, Outcome(lesson.score, pseudo, lesson.disagreement, state["omega"], instability, restored)


def _within_cap(config: Config, state: State, batch: Features) -> tuple[State, Tensor]:
    """Returns [B], 1 where a sample counts: valid, and among the first of its session."""
    state, within = trust.capped(state, batch, cap=config.session_cap or 2**31)
    return state, within.float()


def _follow(
    config: Config, tail: Params, state: State, logit: Tensor, batch: Features, teaches: Tensor
) -> tuple[State, Tensor]:
    """Counts the source's logits and moves the boundary to equal errors.

    Returns the state, and [] whether the site's scores have moved.
    """
    if "reference.logit" not in tail:
        return state, torch.ones((), dtype=torch.bool)
    state = shift.count(state, logit, tails.pattern_index(batch.present), teaches, half_life=config.half_life)
    state, estimate = shift.estimate(state, shift.tables(tail["reference.logit"]))
    usual = (estimate.attack >= config.min_attack_count) & (
        estimate.bona_fide >= config.min_bona_fide_ratio * estimate.attack
    )
    limit = shift.affordable(tail["reference.logit"], config.loosen_apcer).clamp(max=config.loosen)
    usual = usual & ~taught.both(state)  # labels of both classes have said where the boundary is
    allowed = estimate.logit.clamp(max=config.tighten).maximum(-torch.where(usual, limit, 0.0))
    trigger = -math.inf if config.trigger is None else config.trigger
    by = torch.where(
        (estimate.logit.abs() >= config.shift_min_logits) & (estimate.evidence >= trigger), allowed, 0.0
    )
    used = state["shift.count"].sum(-1)
    by = torch.where((state["session.seen"] >= config.sessions) & (used >= SEEN), by, 0.0)
    moved = ((by != 0) * used).sum() > 0.5 * used.sum()  # under most of what was seen
    if config.calibrate:
        base = taught.base(tail, state)
        pattern = torch.where(by == 0, base["pattern"], tails.shifted_pattern(base, by))
        state = {**state, "pattern": torch.where(batch.valid.any(), pattern, state["pattern"])}
    return state, moved | (config.trigger is None)


def _reliable(
    config: Config,
    tail: Params,
    before: TailOutput,
    source: TailOutput,
    voted: Tensor,
    disagreement: Tensor,
    batch: Features,
) -> tuple[Tensor, Tensor]:
    """Returns (label [B] 0/1, used [B] 0/1) by confidence and agreement, stricter for bona fide."""
    p = torch.sigmoid(before.logit)
    if config.labels != "vote":
        voted = p[:, tails.FUSED]
    bona_fide = voted >= 0.5
    used = batch.valid
    if config.labels != "all":
        used = used & torch.where(
            bona_fide, voted >= config.confidence_bona_fide, 1 - voted >= config.confidence_attack
        )
    if config.labels == "vote":
        used = used & (disagreement <= config.disagreement)
        if config.unanimous_bona_fide:
            used = used & (trust.unanimous(p, batch.present) | ~bona_fide)
    if config.prototypes and "replay.z" in tail:
        used = used & ((trust.prototype(tail, source.hidden) > 0.5) == bona_fide)
    if config.conformal and "reference.logit" in tail:
        attack, genuine = trust.conformal(
            tail["reference.logit"], source.logit[:, tails.FUSED], tails.pattern_index(batch.present)
        )
        typical, other = torch.where(bona_fide, genuine, attack), torch.where(bona_fide, attack, genuine)
        used = used & (typical >= config.conformal) & (other < config.conformal)
    return bona_fide.float(), used.float()


def _learn(config: Config, tail: Params, state: State, lesson: Lesson) -> tuple[State, Tensor, Tensor]:
    """Takes one weighted step on the used samples; returns state, instability [], restored []."""
    held, present = reservoir.filled(state), state["reservoir.present"]
    certain = (1 - lesson.disagreement / math.log(2)) if config.labels == "vote" else 1.0
    weight = lesson.used * certain * _class_weight(state, lesson.label)
    taught = trust.median_of_means(
        _gradients(config, tail, state, lesson), weight, lesson.batch.session, groups=config.groups or 1
    )
    learnable = {k: state[k] for k in tails.LEARNED}
    steady, old = torch.func.grad(
        lambda learnable: _steadiness(config, tail, state, learnable, held), has_aux=True
    )(learnable)
    omega = 1.0 if config.weight == "one" else state["omega"]
    used = lesson.used.any()
    grads = {k: omega * taught[k] + steady[k] for k in tails.LEARNED}
    learned = adam(state, grads, lr=config.lr, clip=config.clip, when=used)
    new = tails.score(tails.with_site_state(tail, learned), state["reservoir.z"], present)
    instability = 0.5 * _mean(_kl(old, new), held) + 0.5 * _mean(((old >= 0.5) != (new >= 0.5)).float(), held)
    learned, restored = _weigh(config, learned, instability, measured=held.any() & used)
    return learned, instability, restored


def _gradients(config: Config, tail: Params, state: State, lesson: Lesson) -> Params:
    """Returns each sample's gradient of the cross entropy summed over heads: [B, ...] per learned tensor."""
    batch, count = lesson.batch, len(lesson.label)

    def loss(learnable: Params) -> Tensor:
        params = {**tail, **learnable, "pattern": state["pattern"]}
        return _cross_entropy(
            tails.forward(params, batch.z, batch.present).logit, lesson.label[:, None]
        ).sum()

    return torch.func.grad(loss)({k: state[k].expand(count, *state[k].shape) for k in tails.LEARNED})


def _steadiness(
    config: Config, tail: Params, state: State, learnable: Params, held: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the loss [] that holds the site near its source, and the scores [R] of the reservoir.

    It is the KL on the reservoir and, in mode da, the change of the logits of labelled source features.
    """
    params, present = {**tail, **learnable}, state["reservoir.present"]
    radius = tails.forward(params, state["reservoir.z"], present).radius
    now, at_source = (
        torch.sigmoid(tails.logit({**params, "pattern": p}, radius, present)[:, tails.FUSED])
        for p in (state["pattern"], tail["pattern"])
    )
    drift = _mean(_kl(state["reservoir.source"], at_source), held)
    if config.mode == "tta":
        return config.anchor * drift, now.detach()
    source = {**params, "pattern": tail["pattern"]}  # what the source features are measured with
    return config.anchor * drift + config.source * taught.held(tail)(source), now.detach()


def _weigh(config: Config, state: State, instability: Tensor, *, measured: Tensor) -> tuple[State, Tensor]:
    """Moves omega with the running instability; after ``patience`` steps at the floor it restores.

    A restore brings back the last good tensors and clears the Adam moments.
    """
    step = state["step"]
    warm = step < WARM_UP
    slot = torch.arange(WARM_UP) == step
    warm_up = torch.where(slot & measured, instability, state["warm_up"])
    running = torch.where(measured, 0.9 * state["instability"] + 0.1 * instability, state["instability"])
    reference = warm_up.median().clamp(min=1e-6)
    factor = torch.exp(0.2 * ((reference - running) / reference).clamp(-5, 1))
    omega = (state["omega"] * factor).clamp(config.omega_min, config.omega_max)
    omega = torch.where(warm | ~measured | (config.weight == "one"), state["omega"], omega)
    floor = torch.where(
        measured, torch.where(omega <= config.omega_min, state["floor"] + 1, 0), state["floor"]
    )
    restored = (floor >= config.patience) & (config.weight == "restore")
    good = measured & ~warm & (running <= reference) & ~restored
    new: State = {
        "warm_up": warm_up,
        "step": torch.where(measured, step + 1, step),
        "instability": torch.where(restored, reference, running),
        "omega": torch.where(restored, torch.full_like(omega, config.omega), omega),
        "floor": torch.where(restored, torch.zeros_like(floor), floor),
        "adam.t": torch.where(restored, torch.zeros(()), state["adam.t"]),
    }
    for name in tails.LEARNED:
        new[name] = torch.where(restored, state[f"good.{name}"], state[name])
        new[f"good.{name}"] = torch.where(good, state[name], state[f"good.{name}"])
        for moment in ("adam1", "adam2"):
            new[f"{moment}.{name}"] = torch.where(restored, 0.0, state[f"{moment}.{name}"])
    return {**state, **new}, restored


def _class_weight(state: State, label: Tensor) -> Tensor:
    """Returns weights [B] that give both classes equal mass, from the reservoir's votes; at most 3.

    The weight is 1 while the reservoir is empty.
    """
    share = _mean((state["reservoir.vote"] >= 0.5).float(), reservoir.filled(state))
    class_share = torch.where(label > 0.5, share, 1 - share)
    return torch.where(state["seen"] > 0, (0.5 / class_share.clamp(min=1e-3)).clamp(max=3.0), 1.0)


def _cross_entropy(logit: Tensor, label: Tensor) -> Tensor:
    return torch.nn.functional.softplus(logit) - label * logit


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Returns KL(p || q) of Bernoulli distributions, nats."""
    p, q = p.clamp(1e-6, 1 - 1e-6), q.clamp(1e-6, 1 - 1e-6)
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    return (x * weight).sum() / weight.sum().clamp(min=1)
