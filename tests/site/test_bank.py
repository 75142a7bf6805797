"""The bank: K sites at once are the same as K sites one by one, and nobody can touch a neighbour."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import method_config, methods
from pipeline.models import TailConfig, tail
from pipeline.site import bank
from pipeline.site.methods import danet
from pipeline.types import Features

K, B, F = 4, 8, 16
SOURCE = tail.init_tail(TailConfig(width=8, rank=4), F, generator=torch.Generator().manual_seed(0)) | {
    "reference.boundary": torch.tensor([-0.3, 0.2]),
    "reference.logit": torch.stack(
        [torch.linspace(-12, 0, tail.QUANTILES), torch.linspace(-2, 4, tail.QUANTILES)]
    ).expand(2**tail.MODALITIES, -1, -1),
}
METHOD = danet.Config(
    confidence_bona_fide=0.5,
    confidence_attack=0.5,
    disagreement=1.0,
    unanimous_bona_fide=False,
    trigger=None,
    sessions=0,
)


def mixed(seed: int) -> Features:
    g = torch.Generator().manual_seed(seed)
    present = torch.rand(K, B, 3, generator=g) > 0.2
    present[..., 0] |= ~present.any(-1)
    session = torch.arange(K * B).view(K, B) + 1000 * seed
    return Features(
        torch.randn(K, B, 3, F, generator=g), present, torch.ones(K, B, dtype=torch.bool), session
    )


def stream(z: torch.Tensor) -> Features:
    there = torch.ones(len(z), 3, dtype=torch.bool)
    return Features(z, there, there[:, 0], torch.arange(len(z)))


@pytest.mark.parametrize("kind", methods("site"))
def test_stacked_step_equals_one_by_one(kind):
    method = method_config("site", kind)()
    stacked = bank.stack([method.init(SOURCE) for _ in range(K)])
    b = mixed(1)
    together, outcome = bank.step(method, SOURCE, stacked, b)
    for k, alone in enumerate(bank.unstack(stacked)):
        new, single = method.step(SOURCE, alone, Features(*(t[k] for t in b)))
        torch.testing.assert_close(outcome.score[k], single.score)
        for name in new:
            torch.testing.assert_close(together[name][k], new[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", methods("site"))
@settings(max_examples=8)
@given(
    victim=st.integers(0, K - 1),
    poison=st.sampled_from(["nan", "inf", "black", "constant", "huge", "single"]),
    steps=st.integers(1, 3),
)
def test_a_hostile_site_leaves_the_others_bit_equal(kind, victim, poison, steps):
    method = METHOD if kind == METHOD.kind else method_config("site", kind)()
    start = bank.stack([method.init(SOURCE) for _ in range(K)])
    clean = dirty = start
    for i in range(steps):
        b = mixed(i)
        z, valid = b.z.clone(), b.valid.clone()
        value = {"nan": float("nan"), "inf": float("inf"), "black": 0.0, "constant": 1.0, "huge": 1e20}.get(
            poison
        )
        if value is None:
            valid[victim, 1:] = False
        else:
            z[victim] = value
        clean, _ = bank.step(method, SOURCE, clean, b)
        dirty, _ = bank.step(method, SOURCE, dirty, b._replace(z=z, valid=valid))
    others = [k for k in range(K) if k != victim]
    assert all(torch.equal(clean[n][others], dirty[n][others]) for n in clean)
    assert all(torch.isfinite(t).all() for t in dirty.values() if t.is_floating_point())


def test_an_idle_slot_keeps_its_state_bit_for_bit():
    stacked = bank.stack([METHOD.init(SOURCE) for _ in range(K)])
    b = mixed(3)
    b.valid[2] = False
    new, _ = bank.step(METHOD, SOURCE, stacked, b)
    assert all(torch.equal(new[n][2], stacked[n][2]) for n in new)
    assert not torch.equal(new["reservoir.z"][1], stacked["reservoir.z"][1])


def test_unstack_inverts_stack():
    states = [{"a": torch.randn(3), "b": torch.tensor(i)} for i in range(K)]
    for before, after in zip(states, bank.unstack(bank.stack(states)), strict=True):
        assert all(torch.equal(before[n], after[n]) for n in before)


def test_pad_marks_what_it_added():
    parts = [stream(torch.ones(n, 3, F)) for n in (0, 2, B)]
    padded = bank.pad(parts, B)
    assert padded.z.shape == (3, B, 3, F)
    assert padded.valid.sum(1).tolist() == [0, 2, B]


def test_scores_are_those_of_each_site_alone():
    states = []
    for seed in range(3):
        state = METHOD.init(SOURCE)
        state["site.beta"] = state["site.beta"] + seed
        states.append(state)
    z, present = mixed(5).z[0], mixed(5).present[0]
    together = bank.scores(SOURCE, bank.stack(states), z, present)
    for k, state in enumerate(states):
        torch.testing.assert_close(together[k], tail.score(tail.with_site_state(SOURCE, state), z, present))


def test_run_scores_every_sample_once_whatever_the_slots():
    lengths = (5, 20, 0)
    g = torch.Generator().manual_seed(9)
    streams = [stream(torch.randn(n, 3, F, generator=g)) for n in lengths]
    start = bank.stack([METHOD.init(SOURCE) for _ in lengths])
    new, traces = bank.run(METHOD, SOURCE, start, streams, batch=B, slots=4)
    assert [len(t.score) for t in traces] == list(lengths)
    assert new["seen"].tolist() == list(lengths)
    first = tail.score(SOURCE, streams[1].z[:B], streams[1].present[:B])
    torch.testing.assert_close(traces[1].score[:B], first)


def test_run_in_two_windows_is_run_in_one():
    g = torch.Generator().manual_seed(10)
    whole = stream(torch.randn(32, 3, F, generator=g))
    start = bank.stack([METHOD.init(SOURCE)])
    once, trace = bank.run(METHOD, SOURCE, start, [whole], batch=B, slots=2)
    half, one = bank.run(METHOD, SOURCE, start, [Features(*(t[:16] for t in whole))], batch=B, slots=2)
    both, two = bank.run(METHOD, SOURCE, half, [Features(*(t[16:] for t in whole))], batch=B, slots=2)
    assert all(torch.equal(once[n], both[n]) for n in once)
    assert torch.equal(trace[0].score, torch.cat([one[0].score, two[0].score]))
