from __future__ import annotations

import pytest
import torch

from pipeline.config import method_config, methods
from pipeline.models import TailConfig
from pipeline.models import tail as tails
from pipeline.source import erm, rise
from pipeline.source.erm import Batch

F, DOMAINS = 16, 3


class Fake:
    """What a method sees of the objective; its trunk hands out features that were stored as frames."""

    def __init__(self, config, *, seed: int = 0) -> None:
        tail = tails.init_tail(TailConfig(width=8, rank=4), F, generator=torch.Generator().manual_seed(seed))
        self.extra = {n: t.requires_grad_() for n, t in config.extra(DOMAINS, tail).items()}
        self.tail = {n: t.clone().requires_grad_() for n, t in tail.items()}
        self.mix = torch.eye(F).requires_grad_()

    def trunk_features(self, frames: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        return torch.where(present[..., None], torch.nan_to_num(frames) @ self.mix, 0.0)

    def learned(self) -> list[torch.Tensor]:
        return [self.mix, *self.tail.values(), *self.extra.values()]


def batch(count: int = 36, *, seed: int = 0, progress: float = 0.5) -> Batch:
    """Classes differ by a shift of the first feature, domains by one of the second."""
    g = torch.Generator().manual_seed(seed)
    cell = torch.arange(count) % (2 * DOMAINS)
    label, domain = cell % 2, cell // 2
    frames = torch.randn(count, 3, F, generator=g)
    frames[..., 0] += 3.0 * label[:, None] - 1.5
    frames[..., 1] += domain[:, None]
    return Batch(frames, torch.ones(count, 3, dtype=torch.bool), label, domain, progress)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def configs():
    plain = [method_config("source", kind)(kind=kind) for kind in methods("source")]
    return [*plain, erm.Config(dropout=0.5), rise.Config(invariance="irmv1"), rise.Config(invariance="none")]


def label_of(config) -> str:
    return f"{config.kind}-{getattr(config, 'invariance', getattr(config, 'dropout', ''))}"


@pytest.mark.parametrize("config", configs(), ids=label_of)
def test_every_term_is_finite_and_pulls_at_something(config) -> None:
    model = Fake(config)
    terms = config.losses(model, batch(), generator())
    for name, term in terms.items():
        assert term.shape == (), name
        assert bool(torch.isfinite(term)), name
        grads = torch.autograd.grad(term, model.learned(), retain_graph=True, allow_unused=True)
        moved = [g for g in grads if g is not None]
        assert moved, name
        assert all(bool(torch.isfinite(g).all()) for g in moved), name
        assert sum(float(g.abs().sum()) for g in moved) > 0, name


@pytest.mark.parametrize("config", configs(), ids=label_of)
def test_terms_fall_when_learned(config) -> None:
    model = Fake(config)
    optimizer = torch.optim.Adam([p for p in model.learned() if p.requires_grad], lr=1e-2)
    first = {n: float(t.detach()) for n, t in config.losses(model, batch(), generator()).items()}
    for i in range(25):
        optimizer.zero_grad()
        torch.stack(list(config.losses(model, batch(seed=i), generator(i)).values())).sum().backward()
        optimizer.step()
        config.after_step(model.extra)
    last = {n: float(t.detach()) for n, t in config.losses(model, batch(), generator()).items()}
    assert last["risk"] < 0.8 * first["risk"]
    assert last["heads"] < first["heads"]


@pytest.mark.parametrize("name", ["compact", "angle", "synergy", "complement"])
def test_a_term_falls_when_it_alone_is_learned(name: str) -> None:
    config = rise.Config()
    model = Fake(config)
    with torch.no_grad():
        model.extra["log_rho"].fill_(-1.0)  # else no bona fide sample sticks out
    optimizer = torch.optim.Adam([p for p in model.learned() if p.requires_grad], lr=3e-3)
    course = []
    for _ in range(12):
        term = config.losses(model, batch(), generator())[name]
        course.append(float(term.detach()))
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
    assert course[-1] < 0.95 * course[0]


@pytest.mark.parametrize("config", configs(), ids=label_of)
@pytest.mark.parametrize("only", [None, "no bona fide in domain 0", "one domain", "depth missing everywhere"])
def test_holes_in_a_batch_are_no_trouble(config, only: str | None) -> None:
    model, b = Fake(config), batch()
    if only == "no bona fide in domain 0":
        b = Batch(*(t[(b.domain > 0) | (b.label == 0)] for t in b[:4]), 0.5)
    if only == "one domain":
        b = Batch(*(t[b.domain == 1] for t in b[:4]), 0.5)
    if only == "depth missing everywhere":
        frames = b.frames.clone()
        frames[:, 1] = float("nan")
        b = b._replace(frames=frames, present=torch.tensor([[True, False, True]] * len(frames)))
        b = b._replace(frames=torch.where(b.present[..., None], b.frames, 0.0))
    total = torch.stack(list(config.losses(model, b, generator()).values())).sum()
    grads = torch.autograd.grad(total, model.learned(), allow_unused=True)
    assert all(bool(torch.isfinite(g).all()) for g in grads if g is not None)


@pytest.mark.parametrize("config", [erm.Config(), rise.Config(synergy=0, complement=0, angle=0)], ids=label_of)
def test_sample_order_and_class_prior_do_not_matter(config) -> None:
    model, b = Fake(config), batch()
    whole = {n: float(t.detach()) for n, t in config.losses(model, b, generator()).items()}
    order = torch.randperm(len(b.label))
    shuffled = config.losses(model, Batch(*(t[order] for t in b[:4]), 0.5), generator())
    attacks = torch.cat([torch.arange(len(b.label)), (b.label == 0).nonzero()[:, 0].repeat(4)])
    skewed = config.losses(model, Batch(*(t[attacks] for t in b[:4]), 0.5), generator())
    for name, value in whole.items():
        assert float(shuffled[name].detach()) == pytest.approx(value, rel=1e-4), name
        assert float(skewed[name].detach()) == pytest.approx(value, rel=1e-4), name


def test_a_weight_of_zero_switches_a_term_off() -> None:
    bare = rise.Config(compact=0, angle=0, synergy=0, complement=0, invariance="none")
    assert set(bare.losses(Fake(bare), batch(), generator())) == {"risk", "heads"}


def test_margin_pushes_both_classes_off_the_sphere() -> None:
    radius, rho = torch.tensor([0.95, 1.05]), torch.ones(2)
    two = Batch(torch.zeros(2), torch.ones(2, 3), torch.tensor([1, 0]), torch.zeros(2, dtype=torch.long), 0.0)
    used = torch.ones(2, dtype=torch.bool)
    assert rise.domain_risk(radius, rho, two, used, 0.1) > rise.domain_risk(radius, rho, two, used, 0.0)


def test_compactness_asks_nothing_of_attacks() -> None:
    radius = torch.tensor([[0.5] * 4, [5.0] * 4])
    rho = torch.ones(2, 4)
    assert float(rise.compactness(radius, rho, torch.tensor([1, 0]), 0.1)) == 0
    assert float(rise.compactness(radius, rho, torch.tensor([0, 1]), 0.1)) == pytest.approx(4.1**2)


def test_pgirm_brings_the_radii_of_the_domains_together() -> None:
    config = rise.Config(alpha=0.9)
    extra = {"log_rho": torch.tensor([[0.5] * 4, [0.0] * 4, [-0.5] * 4])}
    spread = [float(extra["log_rho"].std())]
    for _ in range(60):
        config.after_step(extra)
        spread.append(float(extra["log_rho"].std()))
    assert spread[-1] < 0.05 * spread[0]
    assert float(extra["log_rho"].abs().max()) < 0.5, "they meet between, they do not run away"


def test_pgirm_leaves_a_single_domain_alone() -> None:
    extra = {"log_rho": torch.tensor([[0.3] * 4])}
    rise.Config().after_step(extra)
    assert torch.equal(extra["log_rho"], torch.tensor([[0.3] * 4]))


def test_irm_penalty_is_the_product_of_the_two_slopes() -> None:
    b = batch(24)
    logit = torch.randn(24)

    def slope(rows: torch.Tensor) -> torch.Tensor:
        w = torch.ones((), requires_grad=True)
        sides = [
            torch.nn.functional.softplus(-w * s * logit[rows & (b.label == y)]).mean() for y, s in ((0, -1), (1, 1))
        ]
        return torch.autograd.grad(0.5 * (sides[0] + sides[1]), w)[0]

    even = torch.arange(24) % 2 == 0
    b = b._replace(label=(torch.arange(24) // 2) % 2, domain=(torch.arange(24) // 4) % 3)
    wanted = torch.stack([slope(even & (b.domain == e)) * slope(~even & (b.domain == e)) for e in range(3)]).mean()
    assert float(rise.irm_penalty(logit, b)) == pytest.approx(float(wanted), rel=1e-4)


def test_sup_con_prefers_directions_by_group() -> None:
    group = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert float(rise.sup_con(apart, group, 0.1)) < float(rise.sup_con(apart[[0, 2, 1, 3]], group, 0.1))
    assert float(rise.sup_con(5 * apart, group, 0.1)) == pytest.approx(float(rise.sup_con(apart, group, 0.1)))


def test_mixing_takes_some_but_not_all_from_somebody_else() -> None:
    present = torch.ones(20, 3, dtype=torch.bool)
    present[4, 1] = False
    owner, there = rise.mix(present, generator())
    foreign = owner != torch.arange(20)[:, None]
    assert bool(foreign.any(dim=1).all())
    assert not bool(foreign.all(dim=1).any())
    assert torch.equal(there, present[owner, torch.arange(3)])


def test_retrieval_is_easy_for_the_owner_and_hard_for_a_stranger() -> None:
    keys, rows, all_ = torch.eye(4), torch.arange(4), torch.ones(4, dtype=torch.bool)
    assert float(rise.retrieve(keys, keys, rows, all_, all_, 0.1)) < 0.01
    assert float(rise.retrieve(keys, keys, rows.roll(1), all_, all_, 0.1)) > 5


def test_correlation_of_a_feature_with_itself_is_one_on_the_diagonal() -> None:
    x = torch.randn(50, 3)
    assert torch.allclose(torch.diag(rise.correlation(x, 2 * x + 1)), torch.ones(3), atol=1e-3)
    assert float(rise.correlation(x, torch.randn(50, 3)).abs().max()) < 0.6


def test_dropping_modalities_never_leaves_nothing() -> None:
    present = torch.tensor([[True, False, False], [False, True, False], [True, True, True], [False, True, True]] * 25)
    dropped = erm.drop_modalities(present, 1.0, generator())
    assert bool(dropped.any(dim=1).all())
    assert not bool((dropped & ~present).any())
    assert bool((dropped[2::4] != present[2::4]).any(dim=1).all()), "a complete sample always loses something"
    assert torch.equal(erm.drop_modalities(present, 0.0, generator()), present)


def test_the_full_score_is_the_teacher_of_the_dropped_one() -> None:
    config = rise.Config()
    model, b = Fake(config), batch()
    z = model.trunk_features(b.frames, b.present)
    full = tails.read(model.tail, z, b.present)
    rho = torch.ones(len(z), 4, requires_grad=True)
    _, kl = rise.complement_terms(model.tail, z, b.present, full, rho, generator())
    assert float(kl.detach()) > 0
    assert torch.autograd.grad(kl, full.radius, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(kl, rho, allow_unused=True)[0] is None
