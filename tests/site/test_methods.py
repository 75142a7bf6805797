"""Every site method in the folder keeps the contract; what danet promises beyond it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import trust
from pipeline.config import method_config, methods
from pipeline.models import TailConfig, tail
from pipeline.site import LEARNED, danet, sane
from pipeline.types import Features

F, B = 16, 8
EAGER = {"confidence_bona_fide": 0.5, "confidence_attack": 0.5, "disagreement": 1.0, "unanimous_bona_fide": False}


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    return tail.init_tail(TailConfig(width=8, rank=4), F, generator=torch.Generator().manual_seed(0))


def batch(seed: int, *, valid: int = B, scale: float = 1.0) -> Features:
    g = torch.Generator().manual_seed(seed)
    present = torch.rand(B, 3, generator=g) > 0.2
    present[:, 0] |= ~present.any(-1)
    session = torch.arange(B) + B * seed
    return Features(scale * torch.randn(B, 3, F, generator=g), present, torch.arange(B) < valid, session)


def every_method() -> list[str]:
    return methods("site")


@pytest.mark.parametrize("kind", every_method())
def test_kind_is_the_module_name(kind):
    assert method_config("site", kind)().kind == kind


@pytest.mark.parametrize("kind", every_method())
def test_scores_are_taken_before_learning(kind, source):
    method = method_config("site", kind)()
    state, b = method.init(source), batch(1)
    _, outcome = method.step(source, state, b)
    torch.testing.assert_close(outcome.score, tail.score(tail.moved(source, state), b.z, b.present))


@pytest.mark.parametrize("kind", every_method())
def test_state_keeps_names_shapes_and_stays_small(kind, source):
    method = method_config("site", kind)()
    state = method.init(source)
    new, _ = method.step(source, state, batch(2))
    assert {k: (v.shape, v.dtype) for k, v in new.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
    assert set(tail.MOVABLE) <= set(new)
    assert sum(t.numel() * t.element_size() for t in new.values()) <= 160 * 1024


@pytest.mark.parametrize("kind", every_method())
def test_only_the_movable_part_moves(kind, source):
    method = method_config("site", kind)(**({} if kind == "frozen" else {"lr": 0.05}))
    before = {k: v.clone() for k, v in source.items()}
    state = method.init(source)
    for seed in range(5):
        state, _ = method.step(source, state, batch(seed))
    assert all(torch.equal(source[k], before[k]) for k in source)


@pytest.mark.parametrize("kind", [k for k in every_method() if k != "frozen"])
def test_a_learning_method_learns(kind, source):
    method = method_config("site", kind)(**(EAGER if kind == "danet" else {}))
    state = method.init(source)
    new, _ = method.step(source, state, batch(3))
    assert any(not torch.equal(new[k], state[k]) for k in tail.MOVABLE)


@pytest.mark.parametrize("kind", every_method())
@given(poison=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]), row=st.integers(0, B - 1))
def test_a_broken_row_is_padding(kind, poison, row):
    source = tail.init_tail(TailConfig(width=8, rank=4), F, generator=torch.Generator().manual_seed(0))
    method = method_config("site", kind)(**(EAGER if kind == "danet" else {}))
    b = batch(4)
    z = b.z.clone()
    z[row, 0] = poison
    state = method.init(source)
    for _ in range(3):
        state, outcome = method.step(source, state, b._replace(z=z))
    assert all(torch.isfinite(t).all() for t in state.values() if t.is_floating_point())
    assert torch.isfinite(outcome.score).all()


def test_values_of_absent_modalities_do_not_matter():
    b = batch(5)
    noisy = b._replace(z=torch.where(b.present[..., None], b.z, float("nan")))
    assert torch.equal(sane(noisy).z, sane(b).z)
    assert torch.equal(sane(noisy).valid, b.valid)


def test_padding_changes_nothing(source):
    method = danet.Config(**EAGER)
    state = method.init(source)
    part, full = batch(6, valid=5), batch(6, valid=5)
    garbage = full._replace(z=torch.where(full.valid[:, None, None], full.z, 99.0))
    one, _ = method.step(source, state, part)
    two, _ = method.step(source, state, garbage)
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_bona_fide_needs_more_than_attack():
    method = danet.Config()
    present = torch.ones(2, 3, dtype=torch.bool)
    p = torch.tensor([[0.85] * 4, [0.15] * 4])  # equally sure, on both sides
    vote, disagreement = trust.vote(p, present)
    _, used = method._reliable(
        p, vote, disagreement, Features(torch.zeros(2, 3, F), present, torch.ones(2, dtype=torch.bool), torch.arange(2))
    )
    assert used.tolist() == [0.0, 1.0]


def test_one_doubting_head_vetoes_bona_fide_only_when_present():
    method = danet.Config(disagreement=1.0, confidence_bona_fide=0.5)
    p = torch.tensor([[0.99, 0.4, 0.99, 0.99]])
    valid = torch.ones(1, dtype=torch.bool)
    for depth_present, expected in ((True, 0.0), (False, 1.0)):
        present = torch.tensor([[True, depth_present, True]])
        vote, disagreement = trust.vote(p, present)
        _, used = method._reliable(p, vote, disagreement, Features(torch.zeros(1, 3, F), present, valid, torch.arange(1)))
        assert used.item() == expected


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.booleans())
def test_vote_is_bounded(p, substituted):
    present = torch.tensor([[True, not substituted, True]])
    vote, disagreement = trust.vote(torch.tensor([p]), present)
    assert min(p) - 1e-5 <= vote.item() <= max(p) + 1e-5
    assert 0 <= disagreement.item() <= math.log(2) + 1e-6


def test_a_substituted_head_counts_less():
    p = torch.tensor([[0.9, 0.1, 0.9, 0.9]])
    full, _ = trust.vote(p, torch.tensor([[True, True, True]]))
    without, _ = trust.vote(p, torch.tensor([[True, False, True]]))
    assert without > full


def test_unstable_learning_falls_to_the_floor_and_comes_back(source):
    method = danet.Config(**EAGER, patience=3)
    state = method.init(source)
    for seed in range(25):
        state, _ = method.step(source, state, batch(seed))
    good = {k: state[f"good.{k}"].clone() for k in tail.MOVABLE}
    restored = torch.tensor(False)
    for _ in range(60):
        shaken = {**state, **{f"good.{k}": good[k] for k in good}}
        state, restored = method._weigh(shaken, torch.tensor(5.0), measured=torch.tensor(True))
        if restored:
            break
    assert restored
    assert all(torch.equal(state[k], good[k]) for k in good)
    assert all(not state[f"adam1.{k}"].any() for k in LEARNED)
    assert state["omega"] == method.omega


def test_steady_learning_raises_omega(source):
    method = danet.Config()
    state = {**method.init(source), "step": torch.tensor(20), "warm_up": torch.full((20,), 1.0)}
    new, restored = method._weigh(state, torch.tensor(0.1), measured=torch.tensor(True))
    assert new["omega"] > state["omega"]
    assert not restored


def test_reservoir_remembers_evenly(source):
    method = danet.Config()
    state = method.init(source)
    for i in range(200):
        there = torch.ones(B, 3, dtype=torch.bool)
        b = Features(torch.full((B, 3, F), float(i)), there, there[:, 0], torch.arange(B) + B * i)
        state = danet._remember(state, b, torch.zeros(B))
    ages = state["reservoir.z"][:, 0, 0]
    assert int(state["seen"]) == 1600
    assert ages.min() < 60 and ages.max() > 140
    assert 60 < ages.mean() < 140


def test_source_mode_without_source_features_says_so(source):
    with pytest.raises(ValueError, match=r"site\.mode"):
        danet.Config(mode="da").init(source)


def test_source_mode_holds_on_to_the_source(source):
    g = torch.Generator().manual_seed(1)
    replay = {
        "replay.z": torch.randn(32, 3, F, generator=g),
        "replay.present": torch.ones(32, 3, dtype=torch.bool),
        "replay.label": (torch.arange(32) % 2).float(),
    }
    full = {**source, **replay}

    def loss(state: dict[str, torch.Tensor]) -> float:
        logit = tail.read(tail.moved(full, state), replay["replay.z"], replay["replay.present"]).logit[:, tail.FUSED]
        return float(danet._cross_entropy(logit, replay["replay.label"]).mean())

    method = danet.Config(**EAGER, mode="da", source=5.0, lr=0.01)
    state = method.init(full)
    start = loss(state)
    for seed in range(30):
        state, _ = method.step(full, state, batch(seed))
    assert loss(state) < start
