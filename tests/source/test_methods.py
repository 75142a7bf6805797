from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import method_config, methods
from pipeline.models import TailConfig
from pipeline.models import tail as tails
from pipeline.source import losses as source
from pipeline.source.contract import Batch, SourceMethod
from pipeline.source.methods import erm
from pipeline.source.methods.rise import Config as RiseConfig
from pipeline.source.methods.rise import terms as rise

F, D, DOMAINS = 16, 8, 3
HEADS = ("radial", "linear")
DRAWN = {  # terms that depend on which samples, modalities and directions were drawn
    "synergy",
    "complement",
    "vicinal",
    "vicinal_irm",
    "imagination",
    "missing",
}
PRIOR_FREE = {"risk", "heads", "variance", "consistency", "inconsistency", "rebalance"}


class Fake:
    """An objective whose trunk hands out features that were stored as frames, absent ones too."""

    def __init__(self, config: SourceMethod, head: str = "radial", *, seed: int = 0) -> None:
        shape = TailConfig(head=head, width=D, rank=4)
        tail = tails.init_tail(shape, F, generator=torch.Generator().manual_seed(seed))
        self.extra = {n: t.requires_grad_() for n, t in config.extra(DOMAINS, tail).items()}
        self.tail = {n: t.clone().requires_grad_() for n, t in tail.items()}
        self.mix = torch.eye(F).requires_grad_()

    def trunk_features(self, frames: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        return frames @ self.mix

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


def rows(b: Batch, index: torch.Tensor) -> Batch:
    return Batch(b.frames[index], b.present[index], b.label[index], b.domain[index], b.progress)


def without(b: Batch, *modalities: int) -> Batch:
    present = b.present.clone()
    present[:, list(modalities)] = False
    return b._replace(present=present)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def configs() -> list[SourceMethod]:
    plain = [method_config("source", kind)(kind=kind) for kind in methods("source")]
    ways = [RiseConfig(invariance=i) for i in ("irmv1", "both", "none")]
    asked = RiseConfig(invariance="both", angle_groups="attacks", angle_modalities=1.0, patterns="all")
    return [*plain, erm.Config(dropout=0.5), *ways[:1], *ways[2:], asked]


def label_of(config: SourceMethod) -> str:
    return f"{config.kind}-{getattr(config, 'invariance', getattr(config, 'dropout', ''))}".rstrip("-")


def values(config: SourceMethod, b: Batch, head: str, *, seed: int = 0) -> dict[str, float]:
    """Loss terms of a fresh model."""
    return {n: float(t.detach()) for n, t in config.losses(Fake(config, head), b, generator(seed)).items()}


every_method = pytest.mark.parametrize("config", configs(), ids=label_of)
both_heads = pytest.mark.parametrize("head", HEADS)


@every_method
@both_heads
def test_every_term_is_finite_and_pulls_at_something(config, head: str) -> None:
    model = Fake(config, head)
    terms = config.losses(model, batch(), generator())
    for name, term in terms.items():
        assert term.shape == (), name
        assert bool(torch.isfinite(term)), name
        grads = torch.autograd.grad(term, model.learned(), retain_graph=True, allow_unused=True)
        moved = [g for g in grads if g is not None]
        assert moved, name
        assert all(bool(torch.isfinite(g).all()) for g in moved), name
        assert sum(float(g.abs().sum()) for g in moved) > 0, name


@every_method
@both_heads
def test_terms_fall_when_learned(config, head: str) -> None:
    model = Fake(config, head)
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


HOLES = {
    "no bona fide in domain 0": lambda b: rows(b, (b.domain > 0) | (b.label == 0)),
    "no bona fide at all": lambda b: rows(b, b.label == 0),
    "one domain": lambda b: rows(b, b.domain == 1),
    "one sample in a cell": lambda b: rows(
        b, (b.domain > 0) | (b.label == 0) | (torch.arange(len(b.label)) == 1)
    ),
    "one row": lambda b: rows(b, torch.arange(1)),
    "depth missing everywhere": lambda b: without(b, 1),
    "RGB missing everywhere": lambda b: without(b, 0),
    "infrared alone": lambda b: without(b, 0, 1),
    "nothing at all": lambda b: without(b, 0, 1, 2),
}


@every_method
@both_heads
@pytest.mark.parametrize("hole", HOLES)
def test_holes_in_a_batch_are_no_trouble(config, head: str, hole: str) -> None:
    total_is_finite(config, head, HOLES[hole](batch()))


@every_method
@settings(max_examples=8)
@given(data=st.data())
def test_any_batch_is_finite(config, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 9))
    flags = st.lists(st.booleans(), min_size=3 * count, max_size=3 * count)
    cells = st.lists(st.integers(0, 2 * DOMAINS - 1), min_size=count, max_size=count)
    cell, present = torch.tensor(data.draw(cells)), torch.tensor(data.draw(flags)).view(count, 3)
    b = Batch(batch(count).frames, present, cell % 2, cell // 2, data.draw(st.floats(0, 1)))
    total_is_finite(config, data.draw(st.sampled_from(HEADS)), b)


def total_is_finite(config: SourceMethod, head: str, b: Batch) -> None:
    model = Fake(config, head)
    total = torch.stack(list(config.losses(model, b, generator()).values())).sum()
    assert bool(torch.isfinite(total))
    for g in torch.autograd.grad(total, model.learned(), allow_unused=True):
        assert g is None or bool(torch.isfinite(g).all())


@every_method
@both_heads
def test_an_absent_modality_changes_no_loss(config, head: str) -> None:
    present = torch.tensor([[(k >> m) & 1 == 1 for m in range(3)] for k in (7, 1, 2, 3, 4, 5, 6)])[
        torch.arange(36) % 7
    ]
    b = batch()._replace(present=present)
    loud = b._replace(frames=torch.where(present[..., None], b.frames, 1e3 * torch.randn(b.frames.shape)))
    assert values(config, b, head) == values(config, loud, head)


@pytest.mark.parametrize("config", [c for c in configs() if label_of(c) != "erm-0.5"], ids=label_of)
@both_heads
def test_the_order_of_samples_does_not_matter(config, head: str) -> None:
    b = batch(37)
    shuffled = values(config, rows(b, torch.randperm(37, generator=generator())), head)
    for name, value in values(config, b, head).items():
        if name not in DRAWN:
            assert shuffled[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("domain", range(DOMAINS))
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("kind", [k for k in methods("source") if k != "erm"])
def test_the_class_prior_of_a_domain_moves_no_risk(kind: str, label: int, domain: int) -> None:
    config, b = method_config("source", kind)(kind=kind), batch()
    twice = torch.cat(
        [torch.arange(36), ((b.label == label) & (b.domain == domain)).nonzero()[:, 0].repeat(3)]
    )
    skewed, free = (
        values(config, rows(b, twice), "radial"),
        PRIOR_FREE - ({"heads"} if kind == "dadm" else set()),
    )
    for name, value in values(config, b, "radial").items():
        if name in free:
            assert skewed[name] == pytest.approx(value, rel=1e-4), name


@every_method
def test_smoothed_labels_reach_the_risk_of_every_method(config) -> None:
    b = batch()
    plain, smoothed = (values(config, b._replace(smoothing=e), "radial") for e in (0.0, 0.1))
    assert plain["risk"] != smoothed["risk"]


@settings(max_examples=20)
@given(seed=st.integers(0, 99), smoothing=st.floats(0.01, 0.4), margin=st.floats(0, 0.5))
def test_a_smoothed_label_counts_in_part_as_the_other_class(
    seed: int, smoothing: float, margin: float
) -> None:
    g = generator(seed)
    logit, label = 3 * torch.randn(12, generator=g), torch.arange(12) % 2
    signed = torch.where(label == 1, logit, -logit) - tails.KAPPA * margin
    plus = torch.nn.functional.softplus
    expected = (1 - smoothing) * plus(-signed) + smoothing * plus(signed)
    assert torch.allclose(source.logistic_loss(logit, label, margin, smoothing), expected, atol=1e-5)


def test_class_priors_do_not_move_erm() -> None:
    b = batch()
    attacks = torch.cat([torch.arange(36), (b.label == 0).nonzero()[:, 0].repeat(4)])
    plain, skewed = values(erm.Config(), b, "radial"), values(erm.Config(), rows(b, attacks), "radial")
    assert skewed == pytest.approx(plain, rel=1e-4)


def test_domain_risks_are_means_of_class_means() -> None:
    b, logit = batch(), torch.randn(36, generator=generator())
    used = torch.rand(36, generator=generator(1)) < 0.7
    wanted = []
    for e in range(DOMAINS):
        sides = [(b.label == y) & (b.domain == e) & used for y in (0, 1)]
        wanted.append(
            0.5
            * sum(torch.nn.functional.softplus((1 - 2 * y) * logit[c]).mean() for y, c in enumerate(sides))
        )
    assert torch.allclose(source.domain_risks(logit, b, used), torch.stack(wanted))


def test_a_domain_without_a_modality_does_not_dilute_its_heads_risk() -> None:
    b, logit = batch(), torch.randn(36, tails.HEADS, generator=generator())
    hole = b._replace(present=b.present & ~((b.domain == 2)[:, None] & torch.tensor([False, True, False])))
    there = rows(b, b.domain < 2)
    assert float(source.head_risks(logit, hole, hole.present)[1]) == pytest.approx(
        float(source.head_risks(logit[b.domain < 2], there, there.present)[1])
    )


def test_margin_pushes_both_classes_off_the_sphere() -> None:
    logit, label = tails.KAPPA * torch.tensor([0.05, -0.05]), torch.tensor([1, 0])
    assert bool((source.logistic_loss(logit, label, 0.1) > source.logistic_loss(logit, label)).all())


@given(seed=st.integers(0, 99), alpha=st.floats(0.05, 0.99), name=st.sampled_from(tails.BOUNDARY))
def test_pull_together_contracts_and_stays_between(seed: int, alpha: float, name: str) -> None:
    shape = (DOMAINS, tails.HEADS) if name == "log_rho" else (DOMAINS, tails.HEADS, D)
    before = torch.randn(shape, generator=generator(seed))
    extra = {name: before.clone()}
    source.pg_irm_step(extra, alpha)
    after = extra[name]
    spread = [(t[:, None] - t[None]).abs().amax(dim=(0, 1)) for t in (before, after)]
    if name == "log_rho":
        assert bool((spread[1] < spread[0]).all())
    diameter = [
        (t.view(DOMAINS, tails.HEADS, -1)[:, None] - t.view(DOMAINS, tails.HEADS, -1)[None])
        .norm(dim=-1)
        .amax()
        for t in (before, after)
    ]
    assert diameter[1] <= diameter[0]
    assert bool((after <= before.amax(dim=0) + 1e-5).all())
    assert bool((after >= before.amin(dim=0) - 1e-5).all())


@pytest.mark.parametrize("kind", ["rise", "pgirm", "dadm"])
def test_the_boundaries_of_the_domains_meet(kind: str) -> None:
    config = method_config("source", kind)(kind=kind, alpha=0.9)
    extra = {"log_rho": torch.tensor([[0.5] * 4, [0.0] * 4, [-0.5] * 4])}
    for _ in range(60):
        config.after_step(extra)
    assert float(extra["log_rho"].std()) < 0.05 * 0.5
    alone = {"log_rho": torch.tensor([[0.3] * 4])}
    config.after_step(alone)
    assert torch.equal(alone["log_rho"], torch.tensor([[0.3] * 4]))


@pytest.mark.parametrize("kind", ["rise", "pgirm", "dadm"])
@both_heads
def test_every_sample_meets_the_boundary_of_its_domain(kind: str, head: str) -> None:
    config, b = method_config("source", kind)(kind=kind), batch()
    model = Fake(config, head)
    before = float(config.losses(model, b, generator())["risk"].detach())
    with torch.no_grad():
        for n in model.extra:
            model.tail[n].fill_(3.0)  # stood in for
    assert float(config.losses(model, b, generator())["risk"].detach()) == before
    name = "linear" if head == "linear" else "log_rho"
    risk = config.losses(model, rows(b, b.domain == 1), generator())["risk"]
    grad = torch.autograd.grad(risk, model.extra[name])[0]
    assert [bool(g.any()) for g in grad] == [False, True, False]


def test_irm_penalty_is_the_mean_over_all_splits_of_the_product_of_the_slopes() -> None:
    label = torch.tensor([0] * 4 + [1] * 4)
    b = Batch(
        torch.zeros(8), torch.ones(8, 3, dtype=torch.bool), label, torch.zeros(8, dtype=torch.long), 0.0
    )
    logit = torch.randn(8, generator=generator())

    def slope(taken: tuple[int, ...]) -> float:
        w = torch.ones((), requires_grad=True)
        index = torch.tensor(taken)
        mean = torch.nn.functional.softplus(w * torch.where(label == 1, -logit, logit)[index]).mean()
        return float(torch.autograd.grad(mean, w)[0])

    halves = [[(h, tuple(set(c) - set(h))) for h in combinations(c, 2)] for c in (range(4), range(4, 8))]
    products = [
        0.25 * (slope(a) + slope(c)) * (slope(b_) + slope(d)) for a, b_ in halves[0] for c, d in halves[1]
    ]
    assert float(source.irm_penalty(logit, b)) == pytest.approx(sum(products) / len(products), rel=1e-4)


def test_irm_penalty_is_zero_where_the_scale_is_the_best_one() -> None:
    b = batch(2400)
    signed = torch.where(torch.arange(2400) % 5 == 0, -1.0, 1.0)  # a fifth is wrong: sigma(s) = 0.8 is best
    logit = torch.where(b.label == 1, signed, -signed)
    best = torch.log(torch.tensor(4.0))
    at = [float(source.irm_penalty(f * best * logit, b)) for f in (0.5, 1.0, 2.0)]
    assert abs(at[1]) < 0.1 * min(at[0], at[2])  # unbiased, so not exactly zero


def test_sup_con_prefers_directions_by_group() -> None:
    group = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    good, bad = source.sup_con(apart, group, 0.1), source.sup_con(apart[[0, 2, 1, 3]], group, 0.1)
    assert float(good) < float(bad)
    assert float(source.sup_con(5 * apart, group, 0.1)) == pytest.approx(float(good))


@given(seed=st.integers(0, 99), margin=st.floats(0.05, 1.0))
def test_sup_con_asks_for_more_with_a_margin_and_only_of_the_rows_in_use(seed: int, margin: float) -> None:
    hidden, group = torch.randn(12, D, generator=generator(seed)), torch.arange(12) % 3
    used = torch.rand(12, generator=generator(seed)) < 0.7
    part = source.sup_con(hidden, group, 0.1, used=used)
    assert float(part) == pytest.approx(
        float(source.sup_con(hidden[used], group[used], 0.1)), rel=1e-4, abs=1e-6
    )
    assert float(source.sup_con(hidden, group, 0.1, margin=margin)) > float(
        source.sup_con(hidden, group, 0.1)
    )


def test_dropping_modalities_never_leaves_nothing() -> None:
    present = torch.tensor(
        [[True, False, False], [False, True, False], [True, True, True], [False, True, True]] * 25
    )
    dropped = source.drop_modalities(present, 1.0, generator())
    assert bool(dropped.any(dim=1).all())
    assert not bool((dropped & ~present).any())
    assert bool((dropped[2::4] != present[2::4]).any(dim=1).all()), "a complete sample always loses something"
    assert torch.equal(source.drop_modalities(present, 0.0, generator()), present)


@pytest.mark.parametrize("name", ["compact", "angle", "synergy", "complement"])
def test_a_term_of_rise_falls_when_it_alone_is_learned(name: str) -> None:
    config = RiseConfig()
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


def test_a_weight_of_zero_switches_a_term_off() -> None:
    bare = RiseConfig(compact=0, angle=0, synergy=0, complement=0, invariance="none")
    assert set(bare.losses(Fake(bare), batch(), generator())) == {"risk", "heads"}


def test_compactness_asks_nothing_of_attacks() -> None:
    logit = tails.KAPPA * (1 - torch.tensor([0.5, 5.0]))
    assert float(rise.compactness(logit, torch.tensor([1, 0]), 0.1)) == 0
    assert float(rise.compactness(logit, torch.tensor([0, 1]), 0.1)) == pytest.approx(4.1**2)


def test_mixing_takes_some_but_not_all_from_somebody_else() -> None:
    b = batch(20)
    b.present[4, 1] = False
    mixed = rise.mix(b, generator())
    foreign = mixed.owner != torch.arange(20)[:, None]
    assert bool(foreign.any(dim=1).all())
    assert not bool(foreign.all(dim=1).any())
    assert torch.equal(mixed.present, b.present[mixed.owner, torch.arange(3)])


def test_retrieval_is_easy_for_the_owner_and_hard_for_a_stranger() -> None:
    keys, index, all_ = torch.eye(4), torch.arange(4), torch.ones(4, dtype=torch.bool)
    assert float(rise.retrieval_loss(keys, keys, index, all_, all_, 0.1)) < 0.01
    assert float(rise.retrieval_loss(keys, keys, index.roll(1), all_, all_, 0.1)) > 5


def test_correlation_of_a_feature_with_itself_is_one_on_the_diagonal() -> None:
    x = torch.randn(50, 3, generator=generator())
    assert torch.allclose(torch.diag(rise.correlation(x, 2 * x + 1)), torch.ones(3), atol=1e-3)
    assert float(rise.correlation(x, torch.randn(50, 3, generator=generator(1))).abs().max()) < 0.6


def test_the_full_score_is_the_teacher_of_the_dropped_one() -> None:
    model, b = Fake(RiseConfig()), batch()
    tail = {n: t.detach().requires_grad_() for n, t in source.with_domain_boundaries(model, b).items()}
    z = model.trunk_features(b.frames, b.present)
    full = tails.forward(tail, z, b.present)
    _, kl = rise.complement_terms(tail, z, b.present, full, generator())
    assert float(kl.detach()) > 0
    assert torch.autograd.grad(kl, full.radius, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(kl, tail["log_rho"], allow_unused=True)[0] is None


def test_with_attacks_bona_fide_of_all_domains_is_one_group() -> None:
    model, b = Fake(RiseConfig()), batch()
    full = tails.forward(model.tail, model.trunk_features(b.frames, b.present), b.present)
    way = torch.nn.functional.one_hot(torch.where(b.label == 1, 3, b.domain), D).float()
    apart = full._replace(hidden=way)  # bona fide share a direction, each domain's attacks have their own
    split = full._replace(hidden=torch.nn.functional.one_hot(2 * b.domain + b.label, D).float())

    def term(groups: str, of: tails.TailOutput) -> float:
        return float(rise.angle_term(RiseConfig(angle_groups=groups), of, b))

    assert term("attacks", apart) < term("attacks", split)
    assert term("domains", split) < term("domains", apart)


def test_every_set_of_modalities_is_practised_and_the_hardest_most() -> None:
    model, b = Fake(RiseConfig()), batch()
    tail = {n: t.detach() for n, t in source.with_domain_boundaries(model, b).items()}
    z = model.trunk_features(b.frames, b.present).detach()
    full = tails.forward(tail, z, b.present)
    sets = [torch.tensor([bool(left >> m & 1) for m in range(3)]) for left in range(1, 7)]
    each = [float(rise._without(tail, z, b.present, b.present & s, full)[1]) for s in sets]
    _, kl = rise.all_patterns_terms(tail, z, b.present, full, generator())
    assert float(kl) == pytest.approx(sum(x * x for x in each) / sum(each), rel=1e-4)
    assert min(each) < float(kl) <= max(each)


@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_rise_scores_by_the_radius_alone(seed: int) -> None:
    model, b = Fake(RiseConfig()), batch()
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator(seed)))[0]
    turned = {**model.tail, "fuse.out": turn @ model.tail["fuse.out"]}
    with torch.no_grad():
        before, after = (tails.forward(t, b.frames, b.present) for t in (model.tail, turned))
    assert torch.allclose(before.logit, after.logit, atol=1e-4)
    assert float((before.hidden - after.hidden).norm()) > 0.1 * float(before.hidden.norm())


def test_mmsd_alone_teaches_whose_modality_it_is() -> None:
    config = RiseConfig()
    model, b = Fake(config), batch()
    with torch.no_grad():
        model.tail["gate"].fill_(2.0)  # what the other modalities say drowns what is a modality's own

    def found() -> float:
        mixture = rise.mix(b, generator())
        owner = mixture.owner
        m = torch.arange(3)
        z = model.trunk_features(b.frames, b.present).detach()
        mixed = tails.forward(model.tail, z[owner, m], mixture.present).intrinsic
        own = tails.forward(model.tail, z, b.present).intrinsic
        cosine = torch.nn.functional.cosine_similarity(mixed[:, None], own[None], dim=-1)  # [B, B, M]
        return float((cosine.argmax(dim=1) == owner).float().mean())

    optimizer = torch.optim.Adam([p for p in model.learned() if p.requires_grad], lr=1e-2)
    before = found()
    for i in range(25):
        optimizer.zero_grad()
        config.losses(model, b, generator(i))["synergy"].backward()
        optimizer.step()
    assert found() > before + 0.1


def test_attacks_keep_their_radius() -> None:
    config = RiseConfig()
    model, b = Fake(config), batch()
    optimizer = torch.optim.Adam([p for p in model.learned() if p.requires_grad], lr=1e-2)
    for i in range(25):
        optimizer.zero_grad()
        torch.stack(list(config.losses(model, batch(seed=i), generator(i)).values())).sum().backward()
        optimizer.step()
        config.after_step(model.extra)
    radius = tails.forward(model.tail, model.trunk_features(b.frames, b.present), b.present).radius[
        :, tails.FUSED
    ]
    rho = float(model.extra["log_rho"][:, tails.FUSED].mean().exp().detach())
    assert float(radius[b.label == 1].median().detach()) < rho < float(radius[b.label == 0].median().detach())
    assert rho > 0.2
