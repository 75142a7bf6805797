"""Who may teach: session caps, medians of means, conformal p-values."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.site import trust
from pipeline.types import Features


def batch(sessions: list[int], valid: list[bool] | None = None) -> Features:
    n = len(sessions)
    there = torch.ones(n, 3, dtype=torch.bool)
    return Features(torch.zeros(n, 3, 4), there, torch.tensor(valid or [True] * n), torch.tensor(sessions))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=24), st.integers(1, 4))
def test_a_session_counts_at_most_cap_times(sessions, cap):
    state, kept = trust.remember_sessions(), []
    for start in range(0, len(sessions), 4):
        part = sessions[start : start + 4]
        state, within = trust.capped(
            state,
            batch(part + [0] * (4 - len(part)), [True] * len(part) + [False] * (4 - len(part))),
            cap=cap,
        )
        kept += [s for s, w in zip(part, within.tolist(), strict=False) if w]
    assert all(kept.count(s) == min(cap, sessions.count(s)) for s in set(sessions))
    assert int(state["session.seen"]) == len(set(sessions))


def test_invalid_rows_are_no_session():
    state, within = trust.capped(trust.remember_sessions(), batch([1, 2], [True, False]), cap=2)
    assert within.tolist() == [True, False]
    assert int(state["session.seen"]) == 1


def test_one_wild_group_does_not_move_the_median():
    weight, session = torch.ones(10), torch.arange(10)
    pull = torch.ones(10, 1)
    pull[session % 5 == 3] = 1e6
    assert trust.median_of_means({"x": pull}, weight, session, groups=5)["x"].tolist() == [1.0]
    assert float(trust.median_of_means({"x": pull}, weight, session, groups=1)["x"]) > 1e5


def test_groups_without_a_sample_do_not_count():
    each = {"x": torch.tensor([2.0, 4.0, 9.0, 9.0]), "y": torch.arange(12.0).view(4, 3)}
    found = trust.median_of_means(each, torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.arange(4), groups=5)
    assert float(found["x"]) == 2.0  # the lower of two
    assert found["y"].tolist() == [0.0, 1.0, 2.0]
    none = trust.median_of_means(each, torch.zeros(4), torch.arange(4), groups=5)
    assert float(none["x"]) == 0.0


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=12),
    st.integers(1, 6),
)
def test_medians_of_means_are_those_of_the_definition(rows, groups):
    session, weight = torch.tensor([s for s, _ in rows]), torch.tensor([w for _, w in rows])
    each = torch.linspace(-1, 1, len(rows)) ** 3
    means = []
    for g in range(groups):
        member = [i for i, (s, w) in enumerate(rows) if s % groups == g and w > 0]
        if member:
            means.append(float(sum(weight[i] * each[i] for i in member) / len(member)))
    wanted = sorted(means)[(len(means) - 1) // 2] if means else 0.0
    found = trust.median_of_means({"x": each}, weight, session, groups=groups)
    assert abs(float(found["x"]) - wanted) < 1e-6


def test_p_values_are_shares_of_validation():
    reference = torch.stack([torch.linspace(-8, 0, 33), torch.linspace(0, 4, 33)]).expand(8, -1, -1)
    attack, bona_fide = trust.conformal(reference, torch.tensor([-8.0, 2.0, 9.0]), torch.tensor([7, 7, 7]))
    assert attack.tolist() == [1.0, 0.0, 0.0]
    assert bona_fide[0] == 0.0 and bona_fide[2] == 1.0 and 0.4 < bona_fide[1] < 0.6


def test_the_nearest_direction_decides_whatever_the_length():
    from pipeline.models import TailConfig, tail

    params = tail.init_tail(TailConfig(width=8, rank=4), 16, generator=torch.Generator().manual_seed(0))
    z = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(1))
    params |= {
        "replay.z": z,
        "replay.present": torch.ones(4, 3, dtype=torch.bool),
        "replay.label": torch.tensor([0.0, 1, 0, 1]),
    }
    hidden = tail.forward(params, z, params["replay.present"]).hidden
    assert trust.prototype(params, 7.0 * hidden).tolist() == [0, 1, 0, 1]
