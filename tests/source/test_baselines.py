from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from pipeline.models import TailConfig
from pipeline.models import tail as tails
from pipeline.source.contract import Batch, SourceMethod
from pipeline.source.losses import (
    PAIRS,
    domain_risks,
    logistic_loss,
    mean_over_domains,
    sup_con,
    with_domain_boundaries,
)
from pipeline.source.methods import ctnet, dadm, imagine, irm, lirr, mmdg, pmrl, sda, vrex

F, D, B = 16, 8, 24
HEADS = ("radial", "linear")
EVERY = torch.ones(B, tails.MODALITIES, dtype=torch.bool)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(present: torch.Tensor = EVERY, *, seed: int = 0, progress: float = 0.5) -> Batch:
    """Two domains; features that were stored as frames."""
    cell = torch.arange(B) % 4
    frames = torch.randn(B, tails.MODALITIES, F, generator=generator(seed)) + (cell % 2)[:, None, None]
    return Batch(frames, present, cell % 2, cell // 2, progress)


class Stored:
    """What a method sees of the objective, with a trunk that returns its input."""

    def __init__(self, config: SourceMethod, head: str = "radial") -> None:
        tail = tails.init_tail(TailConfig(head=head, width=D, rank=4), F, generator=generator())
        self.tail = {n: t.requires_grad_() for n, t in tail.items()}
        self.extra = {n: t.requires_grad_() for n, t in config.extra(2, tail).items()}

    def trunk_features(self, frames: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        return frames


@pytest.mark.parametrize("kind,term", [(irm, "irm"), (vrex, "variance")])
def test_the_penalty_waits_for_its_share_of_the_schedule(kind, term: str) -> None:
    def at(progress: float, **over: float) -> float:
        config = kind.Config(**over)
        return float(config.losses(Stored(config), batch(progress=progress), generator())[term].detach())

    assert at(0.5) == pytest.approx(10 * at(0.49), rel=1e-5)
    assert at(0.49, penalty=0.1) == pytest.approx(at(0.5, penalty=0.1)), "a small weight need not wait"
    assert at(0.9, penalty=0) == 0


def test_vrex_is_zero_for_equal_risks_and_falls_when_learned() -> None:
    config = vrex.Config()
    model, b = Stored(config), batch()
    same = b._replace(
        frames=b.frames[torch.arange(B) // 4 * 4 + b.label]
    )  # both domains hold the same samples
    assert float(config.losses(model, same, generator())["variance"].detach()) < 1e-8
    assert float(config.losses(model, b, generator())["variance"].detach()) > 1e-3
    optimizer = torch.optim.Adam([model.tail["fuse.in"]], lr=1e-2)
    course = []
    for _ in range(15):
        term = config.losses(model, b, generator())["variance"]
        course.append(float(term.detach()))
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
    assert course[-1] < 0.6 * course[0]


vectors = st.integers(0, 999).map(lambda seed: torch.randn(2, 5, generator=generator(seed)))


@given(pair=vectors)
def test_corr_keeps_the_part_that_agrees_and_drops_the_conflict(pair: torch.Tensor) -> None:
    a, b = pair
    kept = mmdg.corr(b, a)
    if float(a @ b) > 0:
        assert torch.allclose(kept, float(kept @ a / (a @ a)) * a, atol=1e-5), "along a"
        assert float((b - kept) @ a) == pytest.approx(0, abs=1e-4)
    else:
        assert float(kept @ a) == pytest.approx(0, abs=1e-4)
        assert torch.allclose(b - kept, float((b - kept) @ a / (a @ a)) * a, atol=1e-5)
    assert float(kept @ a) >= -1e-4, "never against a"


def test_corr_with_nothing_is_finite() -> None:
    zero, b = torch.zeros(3), torch.tensor([1.0, 2, 3])
    assert torch.equal(mmdg.corr(b, zero), b)
    assert torch.equal(mmdg.corr(zero, b), zero)


def test_regrad_by_hand() -> None:
    g = torch.tensor([[1.0, 0], [1, 1], [-1, 1]])
    u = torch.tensor([0.5, 0.25, 1.0])
    slow = [
        g[1] + 0.5 * torch.tensor([0.5, 0.5]) + 1.0 * g[2],  # g2 is orthogonal to g1: nothing to project away
        g[2] + 0.5 * torch.tensor([0.5, 0.5]) + 0.25 * g[1],
    ]
    fast = 0.5 * g[0] + g[1] + g[2]  # orthogonal to the sum of the others
    assert torch.allclose(mmdg.regrad(g, u, 0), (fast + slow[0] + slow[1]) / 3)


@given(scale=st.lists(st.floats(0.1, 9), min_size=3, max_size=3), fast=st.integers(0, 2))
def test_regrad_leaves_equal_directions_of_certain_modalities_alone(scale: list[float], fast: int) -> None:
    g = torch.tensor(scale)[:, None] * torch.tensor([1.0, -2, 3])
    assert torch.allclose(mmdg.regrad(g, torch.ones(3), fast), g.sum(dim=0), rtol=1e-4)


def test_an_uncertain_modality_helps_less() -> None:
    g = torch.tensor([[1.0, 0], [1, 0.5], [1, -0.5]])
    sure, unsure = mmdg.regrad(g, torch.ones(3), 1), mmdg.regrad(g, torch.tensor([0.0, 1, 1]), 1)
    assert float(unsure[0]) < float(sure[0])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("missing", [None, 1])
def test_the_gradient_of_the_shared_weights_is_regrads(head: str, missing: int | None) -> None:
    config = mmdg.Config(rebalance=0.7)
    model = Stored(config, head)
    present = EVERY & (torch.arange(tails.MODALITIES) != missing) if missing is not None else EVERY
    b = batch(present)
    config.losses(model, b, generator(5))["rebalance"].backward()
    alone = mmdg.single_modality_risks(model.tail, b.frames, b)
    read = tails.forward(model.tail, b.frames, b.present)
    certain = mmdg.certainty(model.tail, read, b.present, config.dropout, config.passes, generator(5))
    names = [n for n in mmdg.SHARED if n in model.tail]
    assert names[:3] == ["fuse.in", "fuse.bias", "fuse.out"] and ("linear" in names) == (head == "linear")
    grads = [torch.autograd.grad(r, [model.tail[n] for n in names], retain_graph=True) for r in alone]
    g = torch.stack([torch.cat([x.flatten() for x in parts]) for parts in grads])
    risks = [math.inf if m == missing else float(alone[m].detach()) for m in range(3)]
    wanted = config.rebalance * mmdg.regrad(g, certain, risks.index(min(risks)))
    found = torch.cat([model.tail[n].grad.flatten() for n in names])
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(found, config.rebalance * g.sum(dim=0), atol=1e-4), (
        "the modulation does something"
    )
    own = torch.autograd.grad(config.rebalance * alone.sum(), model.tail["intrinsic"])[0]
    assert torch.allclose(model.tail["intrinsic"].grad, own, atol=1e-6), (
        "what is not shared keeps its gradient"
    )


def test_the_zero_term_is_exactly_zero() -> None:
    model, b = Stored(mmdg.Config()), batch()
    alone = mmdg.single_modality_risks(model.tail, b.frames, b)
    assert (
        float(mmdg.gradient_correction(model.tail, alone, torch.ones(3), b.present.any(dim=0)).detach()) == 0
    )


def test_certainty_is_one_for_a_head_that_dropout_cannot_move() -> None:
    model, b = Stored(mmdg.Config()), batch()
    with torch.no_grad():
        model.tail["head.out"][2] = 0
        read = tails.forward(model.tail, b.frames, b.present)
        certain = mmdg.certainty(model.tail, read, b.present, 0.3, 8, generator())
    assert float(certain[2]) == pytest.approx(1, abs=1e-6)
    assert bool((certain[:2] < 0.99).all() and (certain >= 0).all())


def test_certainty_is_what_is_left_of_the_mean_deviation_over_the_samples_that_have_the_modality() -> None:
    model, present = Stored(mmdg.Config()), EVERY.clone()
    present[10:, 1] = False
    with torch.no_grad():
        read = tails.forward(model.tail, batch().frames, present)
        certain = mmdg.certainty(model.tail, read, present, 0.3, 2, generator())
        p = []
        for kept in torch.rand(2, B, 3, D, generator=generator()) >= 0.3:
            radius = tails.radii(model.tail, kept * read.intrinsic / 0.7, read.synergy)[1]
            p.append(torch.sigmoid(tails.logit(model.tail, radius, present)))
    half = (p[0] - p[1]).abs()[:, :3] / 2  # the deviation of two numbers
    assert torch.allclose(
        certain, 1 - 2 * torch.stack([half[:, 0].mean(), half[:10, 1].mean(), half[:, 2].mean()])
    )


def test_prototypes_begin_at_the_first_mean_and_move_a_fifth_of_the_way() -> None:
    group, zero = torch.arange(B) % 2, torch.zeros(3, 3, D)
    a, b = (torch.randn(B, 3, D, generator=generator(s)) for s in (0, 1))
    first = mmdg.update_prototypes(zero, a.requires_grad_(), group, EVERY)
    assert not first.requires_grad
    assert torch.allclose(first[1, 1], a[group == 1, 1].mean(dim=0), atol=1e-6)
    assert not bool(first[:, 2].any()), "a group that was never seen"
    second = mmdg.update_prototypes(first, b, group, EVERY)
    assert torch.allclose(second[1, 1], 0.8 * first[1, 1] + 0.2 * b[group == 1, 1].mean(dim=0), atol=1e-6)
    half = EVERY.clone()
    half[:, 1] = False
    assert torch.equal(mmdg.update_prototypes(first, b, group, half)[1], first[1]), (
        "an absent modality teaches nothing"
    )


def test_losses_keep_the_prototypes_in_extra_and_give_them_no_gradient() -> None:
    config = mmdg.Config()
    model, b = Stored(config), batch()
    optimizer = torch.optim.AdamW(model.extra.values(), lr=0.1, weight_decay=0)
    torch.stack(list(config.losses(model, b, generator()).values())).sum().backward()
    seen = model.extra["prototype"].detach().clone()
    live = tails.forward(model.tail, b.frames, b.present).intrinsic[b.label == 1].mean(dim=0)
    assert torch.allclose(seen[:, 0], live.detach(), atol=1e-5)
    optimizer.step()
    assert torch.equal(model.extra["prototype"], seen)


def test_single_side_is_small_beside_the_own_prototype() -> None:
    prototypes = torch.zeros(3, 3, D)
    prototypes[:, 0, 0], prototypes[:, 1, 0] = 10.0, -10.0
    at = torch.zeros(2, 3, D)
    at[..., 0] = 10.0
    right, wrong = mmdg.single_side_loss(prototypes, at, torch.tensor([0, 1])).unbind(0)
    assert float(right.max()) < 1e-4
    assert float(wrong.min()) > 15
    assert float(mmdg.single_side_loss(prototypes, at, torch.tensor([0, 0])).max()) < 1e-4, (
        "the unseen one is no rival"
    )


def bound(a: torch.Tensor, b: torch.Tensor) -> float:
    both = torch.ones(len(a), dtype=torch.bool)
    return math.log(len(a)) + float(
        dadm.match_log_p(normalize(a, dim=1), normalize(b, dim=1), both, 0.1).mean()
    )


@settings(max_examples=20)
@given(seed=st.integers(0, 99))
def test_the_information_bound_rises_with_dependence_and_never_passes_log_n(seed: int) -> None:
    a, noise = (torch.randn(B, D, generator=generator(s)) for s in (seed, seed + 1000))
    course = [bound(a, r * a + (1 - r) * noise) for r in (0.0, 0.4, 0.7, 1.0)]
    assert course == sorted(course)
    assert course[0] < 1.0 < course[-1] <= math.log(B) + 1e-5


def test_the_modality_that_the_others_recognise_gets_the_weight() -> None:
    shared = torch.randn(B, D, generator=generator())
    odd = torch.randn(B, D, generator=generator(1))
    intrinsic = torch.stack([shared, odd, shared], dim=1).requires_grad_()
    _, weight = dadm.alignment(intrinsic, EVERY, 0.1)
    assert not weight.requires_grad
    assert torch.allclose(weight.mean(dim=1), torch.ones(B))
    assert float(weight[:, 1].mean()) < 0.5 < 1.0 < float(weight[:, 0].mean())


def test_weights_are_shared_among_those_there_and_one_for_a_modality_alone() -> None:
    present = EVERY.clone()
    present[:8, 1:], present[8:16, 0] = False, False
    _, weight = dadm.alignment(torch.randn(B, 3, D, generator=generator()), present, 0.1)
    assert torch.equal(weight[:8, 0], torch.ones(8))
    assert torch.allclose(weight[8:16, 1:], torch.ones(8, 2)), (
        "two that are compared to each other alone are equal"
    )
    assert torch.allclose((weight * present).sum(dim=1), present.sum(dim=1).float())


@pytest.mark.parametrize("head", HEADS)
def test_dadm_weighs_the_modality_heads_and_widens_angles_where_a_modality_is_there(head: str) -> None:
    config = dadm.Config()
    model, present = Stored(config, head), EVERY.clone()
    present[5:, 1] = False
    b = batch(present)
    terms = config.losses(model, b, generator())
    read = tails.forward(with_domain_boundaries(model, b), b.frames, b.present)
    _, weight = dadm.alignment(read.intrinsic, present, config.temperature)
    loss = weight * logistic_loss(read.logit, b.label[:, None])[:, :3]
    wanted = config.heads * mean_over_domains(loss, b, present).sum()
    assert float(terms["heads"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    angles = [
        sup_con(read.intrinsic[seen, m], b.label[seen], config.temperature, margin=config.margin)
        for m, seen in enumerate(present.unbind(dim=1))
    ]
    assert float(terms["angle"].detach()) == pytest.approx(float(0.1 * sum(angles).detach() / 3), rel=1e-4)


def test_absent_rows_do_not_enter_the_bound() -> None:
    a, b = (normalize(torch.randn(B, D, generator=generator(s)), dim=1) for s in (0, 1))
    both = torch.arange(B) % 3 > 0
    part = dadm.match_log_p(a, b, both, 0.1)[both]
    assert torch.allclose(part, dadm.match_log_p(a[both], b[both], both[both], 0.1), atol=1e-6)


def along(step: torch.Tensor) -> torch.Tensor:
    """Intrinsic features [B, M, D] of which each modality lies a step [B, D] further than the one before."""
    start = torch.randn(len(step), 1, D, generator=generator())
    return start + torch.arange(3)[:, None] * step[:, None]


def test_equal_live_transitions_are_consistent_and_only_attacks_that_share_them_are_pushed() -> None:
    b, way = batch(), torch.zeros(D)
    way[0] = 2.0
    live = (b.label == 1)[:, None]

    def terms(attack: torch.Tensor) -> list[float]:
        return [float(t) for t in ctnet.transition_terms(along(torch.where(live, way, attack)), b, 0.5)]

    assert terms(way) == pytest.approx([0, 0.5], abs=1e-5)
    assert terms(-way) == pytest.approx([0, 0], abs=1e-5)
    assert terms(way.roll(1)) == pytest.approx([0, 0], abs=1e-5), "a right angle is far enough"
    scattered = torch.where(live, torch.randn(B, D, generator=generator(1)), way)
    assert float(ctnet.transition_terms(along(scattered), b, 0.5)[0]) > 0.3


def test_the_live_transition_is_the_mean_over_domains_however_many_samples_they_have() -> None:
    b = batch()
    ways = torch.eye(D)[b.domain]
    half = torch.where((b.domain == 0) | (torch.arange(B) < 8), 1, 0).bool()
    few = Batch(b.frames[half], b.present[half], b.label[half], b.domain[half], 0.5)
    consistent = [
        float(ctnet.transition_terms(along(w), x, 0.5)[0]) for w, x in ((ways, b), (ways[half], few))
    ]
    assert consistent == pytest.approx([1 - math.sqrt(0.5)] * 2, rel=1e-4)


def test_transitions_have_unit_length_and_a_direction() -> None:
    x = torch.randn(B, 3, D, generator=generator())
    step = ctnet.transitions(x)
    assert torch.allclose(step.norm(dim=-1), torch.ones(B, len(PAIRS)), atol=1e-5)
    assert torch.allclose(step[:, 1], normalize(x[:, 2] - x[:, 0], dim=-1), atol=1e-5)


def test_auxiliary_features_are_learned_from_rgb_and_their_targets_stay() -> None:
    model = Stored(ctnet.Config())
    z = batch().frames.clone().requires_grad_()
    ctnet.rgb_prediction_loss(model.tail, z, EVERY).backward()
    assert bool(z.grad[:, 0].any())
    assert not bool(z.grad[:, 1:].any())
    blind = EVERY.clone()
    blind[:, 0] = False
    assert float(ctnet.rgb_prediction_loss(model.tail, z, blind).detach()) == 0
    linear = z.detach().clone()
    linear[:, 1:] = linear[:, :1].roll(1, dims=-1)
    optimizer = torch.optim.Adam([model.tail["complement.in"], model.tail["complement.out"]], lr=1e-2)
    course = []
    for _ in range(30):
        gap = ctnet.rgb_prediction_loss(model.tail, linear, EVERY)
        course.append(float(gap.detach()))
        optimizer.zero_grad()
        gap.backward()
        optimizer.step()
    assert course[-1] < 0.6 * course[0]


def moved_only(terms: dict[str, torch.Tensor], name: str, tensors: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that a term has a gradient for."""
    grads = torch.autograd.grad(terms[name], list(tensors.values()), retain_graph=True, allow_unused=True)
    return {n for n, g in zip(tensors, grads) if g is not None and bool(g.any())}


def test_a_sample_moves_as_its_class_varies_within_domains() -> None:
    b, z = batch(), torch.zeros(B, tails.MODALITIES, F)
    z[..., 0], z[..., 1] = (
        5.0 * b.label[:, None],
        9.0 * b.domain[:, None],
    )  # what tells classes and domains apart
    own = torch.where(b.label == 1, 2, 3)
    z.scatter_add_(2, own[:, None, None].expand(-1, 3, 1), torch.randn(B, 3, 1, generator=generator()))
    step = sda.vicinal_steps(z, b, torch.randn(B, B, generator=generator()))
    for label, axis in ((1, 2), (0, 3)):
        along = step[b.label == label].abs().amax(dim=(0, 1))
        assert float(along[axis]) > 0.5
        assert float(along[torch.arange(F) != axis].max()) < 1e-5


def test_the_steps_have_the_covariance_of_the_class_over_all_modalities() -> None:
    b, z = batch(), torch.randn(B, tails.MODALITIES, F, generator=generator())
    z[:, 1] = 2 * z[:, 0]
    steps = torch.stack([sda.vicinal_steps(z, b, row.expand(B, B))[1] for row in torch.eye(B)]).flatten(1)
    assert int(b.label[1]) == 1
    cells = [z[(b.label == 1) & (b.domain == e)].flatten(1) for e in range(2)]
    deviation = torch.cat([c - c.mean(dim=0) for c in cells])
    assert torch.allclose(steps.T @ steps, deviation.T @ deviation / len(deviation), atol=1e-4)
    assert torch.allclose(steps[:, F : 2 * F], 2 * steps[:, :F], atol=1e-5), "modalities move together"


def test_sda_without_strength_is_irm_on_the_samples_themselves() -> None:
    b = batch(progress=0.6)

    def terms(kind, **over: float) -> dict[str, float]:
        config = kind.Config(**over)
        losses = config.losses(Stored(config), b, generator())
        return {n: float(t.detach()) for n, t in losses.items()}

    plain, still, moved = terms(irm), terms(sda, strength=0), terms(sda)
    assert (still["risk"], still["vicinal_irm"]) == pytest.approx((plain["risk"], plain["irm"]))
    assert still["vicinal"] == pytest.approx(still["risk"])
    assert moved["risk"] == still["risk"], "the samples themselves stay in the loss"
    assert abs(moved["vicinal"] - still["vicinal"]) > 1e-3 < abs(moved["vicinal_irm"] - still["vicinal_irm"])


def dominance(rows: torch.Tensor, present: tuple[bool, ...] = (True, True, True)) -> float:
    seen = torch.tensor([present])
    unit = pmrl.unit_rows(rows[None], seen)
    return float(pmrl.dominance_loss(unit, seen, 0.3)[0])


@given(seed=st.integers(0, 99))
def test_the_leading_value_is_largest_for_equal_directions_and_smallest_for_orthogonal_ones(
    seed: int,
) -> None:
    rows = torch.randn(3, D, generator=generator(seed))
    length = torch.tensor([[0.1], [1.0], [7.0]])
    least, most = dominance(length * rows[:1]), dominance(length * torch.eye(3, D))
    assert least == pytest.approx(math.log1p(2 * math.exp((1e-3 - math.sqrt(3)) / 0.3)), rel=1e-3)
    assert most == pytest.approx(math.log(3), rel=1e-4)
    assert least - 1e-5 <= dominance(rows) <= most + 1e-5


def test_an_absent_modality_has_no_singular_value() -> None:
    rows = torch.eye(3, D)
    assert dominance(rows, (True, False, True)) == pytest.approx(math.log(2), rel=1e-4)
    assert dominance(rows, (False, True, False)) == pytest.approx(0, abs=1e-6)
    config, alone = pmrl.Config(), EVERY.clone()
    alone[:, 1:] = False
    assert float(config.losses(Stored(config), batch(alone), generator())["align"].detach()) == 0


def test_learning_the_leading_value_turns_modalities_onto_one_line() -> None:
    config, b = pmrl.Config(), batch()
    model = Stored(config)
    optimizer = torch.optim.Adam([model.tail["intrinsic"]], lr=1e-2)

    def alignment() -> float:
        unit = normalize(tails.forward(model.tail, b.frames, b.present).intrinsic, dim=-1)
        return float((unit @ unit.mT).abs().mean().detach())

    before = alignment()
    for _ in range(40):
        optimizer.zero_grad()
        config.losses(model, b, generator())["align"].backward()
        optimizer.step()
    assert before < 0.6 < 0.8 < alignment()


def test_the_leading_direction_is_that_of_the_decomposition_on_the_side_of_the_modalities() -> None:
    unit = pmrl.unit_rows(torch.randn(B, 3, D, generator=generator()), EVERY)
    leading = pmrl.leading_direction(unit)
    right = torch.linalg.svd(unit).Vh[:, 0]
    assert torch.allclose((leading * right).sum(dim=1).abs(), torch.ones(B), atol=1e-4)
    same = torch.randn(B, 1, D, generator=generator(1)).expand(-1, 3, -1)
    found = pmrl.leading_direction(pmrl.unit_rows(same, EVERY))
    assert torch.allclose(found, normalize(same[:, 0], dim=1), atol=1e-4)


def test_samples_on_one_direction_are_as_close_as_can_be() -> None:
    every, some = torch.ones(D, dtype=torch.bool), torch.arange(D) < 3
    one = torch.eye(D)[:1].expand(D, D)
    assert float(pmrl.separation(one, every, 0.1)) == pytest.approx(math.log(D))
    assert float(pmrl.separation(one, some, 0.1)) == pytest.approx(math.log(3))
    assert float(pmrl.separation(torch.eye(D), every, 0.1)) < 1e-3


def twins(seed: int = 0) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Two domains that hold the same samples, with their fused logits and features."""
    b, index = batch(), torch.arange(B) // 4 * 2 + torch.arange(B) % 2
    drawn = torch.randn(B // 2, D + 1, generator=generator(seed))[index]
    return b, drawn[:, 0], drawn[:, 1:]


@given(seed=st.integers(0, 99), scale=st.floats(0, 3))
def test_equal_domains_gain_nothing_by_predictors_of_their_own(seed: int, scale: float) -> None:
    b, logit, hidden = twins(seed)
    predictor = scale * torch.randn(2, D + 1, generator=generator(seed + 1000))
    assert float(lirr.invariance_gap(logit, hidden, predictor, b)) <= 1e-6
    shared = predictor[:1].expand(2, -1)
    assert float(lirr.invariance_gap(logit, hidden, shared, b)) == pytest.approx(0, abs=1e-6)


def test_domains_that_need_other_boundaries_gain_and_their_predictors_learn_it() -> None:
    b, logit, hidden = twins()
    hidden[:, 0] = (2.0 * b.label - 1) * (2.0 * b.domain - 1)  # the cue turns round between the domains
    predictor = torch.zeros(2, D + 1, requires_grad=True)
    optimizer = torch.optim.Adam([predictor], lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        (-lirr.invariance_gap(logit, hidden, predictor, b)).backward()
        optimizer.step()
    gap = float(lirr.invariance_gap(logit, hidden, predictor, b).detach())
    risk = float(domain_risks(logit, b, EVERY[:, 0]).mean())
    assert 0.4 * risk < gap < risk


def test_the_representation_descends_the_gap_and_the_predictors_ascend_it() -> None:
    config = lirr.Config()
    model = Stored(config)
    terms = config.losses(model, batch(), generator())
    every = {**model.tail, **model.extra}
    assert "predictor" not in moved_only(terms, "gap", every)
    assert {"intrinsic", "fuse.out", "log_rho"} <= moved_only(terms, "gap", every)
    assert moved_only(terms, "predictor", every) == {"predictor"}
    assert float(terms["predictor"].detach()) == pytest.approx(-float(terms["gap"].detach()) / config.gap)


def test_the_distance_of_domains_is_zero_for_equal_ones_and_knows_no_class_prior() -> None:
    b, _, x = twins()
    used = EVERY[:, 0]
    assert abs(float(lirr.energy_distance(x, b, used))) < 1e-5
    apart = x + b.domain[:, None]
    far = float(lirr.energy_distance(apart, b, used))
    assert far > float(lirr.energy_distance(x + 0.3 * b.domain[:, None], b, used)) > 0.01
    index = torch.cat([torch.arange(B), ((b.label == 1) & (b.domain == 0)).nonzero()[:, 0].repeat(4)])
    skewed = Batch(b.frames[index], b.present[index], b.label[index], b.domain[index], 0.5)
    assert float(lirr.energy_distance(apart[index], skewed, used[index])) == pytest.approx(far, rel=1e-4)
    no_attacks = (b.label == 1) | (b.domain == 0)
    assert float(lirr.energy_distance(apart, b, no_attacks)) == 0, "a domain without a class is left out"


def test_the_imagination_learns_from_features_and_the_complement_from_the_imagination() -> None:
    config = imagine.Config()
    model = Stored(config)
    terms = config.losses(model, batch(), generator())
    every = {**model.tail, **model.extra}
    assert moved_only(terms, "imagination", every) == set(model.extra)
    student = {n for n in model.tail if n.startswith("complement.")}
    assert moved_only(terms, "complement", every) - set(tails.ADAPTER) == student
    assert student <= moved_only(terms, "missing", every)
    assert not set(model.extra) & set(model.tail), "a served tail holds nothing of the network"


def test_what_the_network_imagines_is_what_the_tail_comes_to_substitute() -> None:
    config = imagine.Config()
    model = Stored(config)
    z = torch.randn(B, 1, F, generator=generator()).expand(-1, 3, -1)
    z = torch.stack([z[:, 0], z[:, 1].roll(1, dims=-1), z[:, 2].flip(-1)], dim=1)
    b = batch()._replace(frames=z)
    alone = EVERY & torch.tensor([True, False, False])

    def error() -> float:
        with torch.no_grad():
            substitute = tails.complete(model.tail, z * alone[..., None], alone).complement
            return float(imagine.relative_error(substitute, z, ~alone))

    student = [t for n, t in model.tail.items() if n.startswith("complement.")]
    optimizer = torch.optim.Adam([*student, *model.extra.values()], lr=1e-2)
    before = error()
    for i in range(150):
        terms = config.losses(model, b, generator(i))
        optimizer.zero_grad()
        (terms["imagination"] + terms["complement"]).backward()
        optimizer.step()
    assert error() < 0.6 * before


def test_the_network_imagines_from_nothing_but_what_is_left() -> None:
    network = imagine.Config().extra(2, Stored(imagine.Config()).tail)
    z, left = batch().frames, EVERY.clone()
    left[:, 1] = False
    other = z.clone()
    other[:, 1] = 1e3
    assert torch.equal(imagine.imagine(network, z, left), imagine.imagine(network, other, left))


def test_equal_moments_of_invariant_features_are_no_discrepancy() -> None:
    maps = torch.randn(1, D, F, generator=generator()).expand(3, -1, -1)
    z = torch.randn(B, 1, F, generator=generator()).expand(-1, 3, -1)
    assert float(imagine.moment_discrepancy(maps, z, EVERY)) < 1e-4
    shuffled = torch.stack([z[:, 0], z[:, 1].roll(1, dims=0), z[:, 2]], dim=1)
    assert float(imagine.moment_discrepancy(maps, shuffled, EVERY)) < 1e-4, "samples need not be matched"
    shifted = z + torch.tensor([0.0, 1.0, 0.0])[:, None]
    far = float(imagine.moment_discrepancy(maps, shifted, EVERY))
    assert far > 0.3
    blind = EVERY & torch.tensor([True, False, True])
    assert float(imagine.moment_discrepancy(maps, shifted, blind)) < 1e-4
