"""A site's memory: even over the stream, and what one sample at a time would leave."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.site import reservoir
from pipeline.types import Features

R, M, F, B = 8, 3, 2, 4


def batch(values: list[float], valid: list[bool]) -> Features:
    n = len(values)
    z = torch.tensor(values).view(n, 1, 1).expand(n, M, F)
    return Features(z, torch.ones(n, M, dtype=torch.bool), torch.tensor(valid), torch.arange(n))


def shown(state: dict[str, torch.Tensor], b: Features) -> dict[str, torch.Tensor]:
    own = b.z[:, 0, 0]
    return reservoir.remember(state, b, vote=own, source=-own)


def test_it_remembers_evenly():
    state = reservoir.init(32, M, F)
    for i in range(200):
        state = shown(state, batch([float(i)] * 8, [True] * 8))
    ages = state["reservoir.z"][:, 0, 0]
    assert int(state["seen"]) == 1600
    assert ages.min() < 60 and ages.max() > 140
    assert 60 < ages.mean() < 140


@given(st.lists(st.booleans(), min_size=B, max_size=60).map(lambda v: v[: len(v) // B * B]))
def test_a_batch_leaves_what_its_samples_leave_one_by_one(valid):
    together = alone = reservoir.init(R, M, F)
    for start in range(0, len(valid), B):
        values = [float(i + 1) for i in range(start, start + B)]
        together = shown(together, batch(values, valid[start : start + B]))
        for value, ok in zip(values, valid[start : start + B], strict=True):
            alone = shown(alone, batch([value], [ok]))
    assert all(torch.equal(t, alone[n]) for n, t in together.items())
    assert reservoir.filled(together).sum() == min(R, sum(valid))
    assert torch.equal(together["reservoir.vote"], together["reservoir.z"][:, 0, 0])
    assert torch.equal(together["reservoir.source"], -together["reservoir.vote"])
