from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models import TailConfig
from pipeline.models import tail as tails

F = 16


def params(seed: int = 0) -> dict[str, torch.Tensor]:
    """A tail as it is served: the fused score pools the heads."""
    fresh = tails.init_tail(TailConfig(width=8, rank=4), F, generator=torch.Generator().manual_seed(seed))
    return {**fresh, "reference.pool": torch.tensor(tails.POOL)}


def z(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, F, generator=torch.Generator().manual_seed(1))


def patterns() -> torch.Tensor:
    return torch.tensor([[(k >> m) & 1 == 1 for m in range(3)] for k in range(1, 8)])


def test_direction_cannot_change_the_score() -> None:
    p = params()
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    turned = {**p, "fuse.out": rotation @ p["fuse.out"], "head.out": rotation @ p["head.out"]}
    present = torch.ones(5, 3, dtype=torch.bool)
    before, after = tails.forward(p, z(), present), tails.forward(turned, z(), present)
    assert torch.allclose(before.logit, after.logit, atol=1e-5)
    assert not torch.allclose(before.hidden, after.hidden)


def test_the_score_falls_with_the_radius_and_is_half_on_the_sphere() -> None:
    p = params()
    rho = torch.exp(p["log_rho"])
    radius = torch.stack([rho - 0.1, rho, rho + 0.1])
    at = tails.logit(p, radius, torch.ones(3, 3, dtype=torch.bool))
    assert torch.allclose(torch.sigmoid(at[1]), torch.tensor(0.5))
    assert bool((at[0] > at[1]).all())
    assert bool((at[1] > at[2]).all())


def test_every_head_that_is_there_says_the_same_in_the_served_score() -> None:
    served, alone = params(), {k: v for k, v in params().items() if k != "reference.pool"}
    present = patterns()
    pooled, heads = (tails.forward(p, z(7), present).radius for p in (served, alone))
    assert torch.equal(pooled[:, : tails.FUSED], heads[:, : tails.FUSED])
    for row, there, got in zip(heads, present, pooled[:, tails.FUSED], strict=True):
        own = row[: tails.FUSED][there].mean()
        assert torch.allclose(got, 0.75 * own + 0.25 * row[tails.FUSED])
    assert torch.allclose(pooled[-1, tails.FUSED], heads[-1].mean()), "with everything there: their mean"


@given(bits=st.integers(1, 6), filler=st.sampled_from([0.0, 1e6, float("inf"), float("nan")]))
def test_absent_features_cannot_change_anything(bits: int, filler: float) -> None:
    present = torch.tensor([[(bits >> m) & 1 == 1 for m in range(3)]]).expand(5, -1)
    held = torch.where(present[..., None], z(), torch.zeros(()))
    filled = torch.where(present[..., None], z(), torch.full((), filler))
    for a, b in zip(
        tails.forward(params(), held, present), tails.forward(params(), filled, present), strict=True
    ):
        assert torch.equal(a, b)
        assert bool(torch.isfinite(a).all())


def test_gradient_is_finite_for_every_pattern_and_for_garbage_in_absent_rows() -> None:
    p = {n: t.clone().requires_grad_() for n, t in params().items()}
    present = patterns()
    x = torch.where(present[..., None], z(7), torch.full((), float("nan")))
    tails.forward(p, x, present).logit.sum().backward()
    assert all(bool(torch.isfinite(t.grad).all()) for t in p.values() if t.grad is not None)


def test_nothing_present_stays_finite() -> None:
    read = tails.forward(params(), z(), torch.zeros(5, 3, dtype=torch.bool))
    assert all(bool(torch.isfinite(t).all()) for t in read)


def test_gradient_at_radius_zero_is_finite() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    tails.norm(x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


def test_a_row_depends_on_itself_alone() -> None:
    present = patterns()
    whole = tails.score(params(), z(7), present)
    order = torch.randperm(7)
    assert torch.allclose(tails.score(params(), z(7)[order], present[order]), whole[order], atol=1e-6)
    assert torch.allclose(tails.score(params(), z(7)[3:4], present[3:4]), whole[3:4], atol=1e-6)


def test_a_fresh_site_adapter_is_the_identity() -> None:
    present = torch.ones(5, 3, dtype=torch.bool)
    assert torch.equal(tails.apply_adapter(params(), z(), present), z())


def test_complement_of_a_modality_never_reads_that_modality() -> None:
    present = torch.ones(5, 3, dtype=torch.bool)
    other = z()
    other[:, 1] += 7.0
    a, b = (
        tails.complete(params(), z(), present).complement,
        tails.complete(params(), other, present).complement,
    )
    assert torch.equal(a[:, 1], b[:, 1])
    assert not torch.allclose(a[:, 0], b[:, 0])


def test_an_absent_modality_is_what_the_others_predict() -> None:
    present = torch.tensor([[True, False, True]] * 5)
    done = tails.complete(params(), torch.where(present[..., None], z(), 0.0), present)
    assert torch.equal(done.z[:, 1], done.complement[:, 1])
    assert not torch.allclose(done.z[:, 0], done.complement[:, 0])


def test_masked_softmax_sums_to_one_or_is_zero() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    out = tails.masked_softmax(torch.tensor([[1e4, 3.0, 1e4], [1.0, 2.0, 3.0]]), mask)
    assert torch.allclose(out, torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]))


def test_vmap_over_sites_equals_a_loop() -> None:
    sites = [params(s) for s in range(3)]
    stacked = {n: torch.stack([s[n] for s in sites]) for n in sites[0]}
    present = torch.ones(5, 3, dtype=torch.bool)
    x = z()
    mapped = torch.func.vmap(lambda p: tails.score(p, x, present))(stacked)
    assert torch.allclose(mapped, torch.stack([tails.score(p, x, present) for p in sites]), atol=1e-6)


def test_moved_takes_only_what_may_move() -> None:
    tail, other = params(0), params(1)
    served = tails.with_site_state(tail, other)
    assert all(torch.equal(served[n], other[n] if n in tails.MOVABLE else tail[n]) for n in tail)
    assert set(tails.site_state(tail)) == set(tails.MOVABLE)


@pytest.mark.parametrize("name", tails.NO_DECAY)
def test_names_that_are_spared_decay_exist(name: str) -> None:
    assert name in params()
