"""The score shift is found under any prior, and what is not there is not found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.models import tail
from pipeline.site import shift

Q = torch.linspace(0, 1, tail.QUANTILES)
REFERENCE = torch.stack([-14 + 13 * Q, 0.5 + 3 * Q]).expand(2**tail.MODALITIES, -1, -1).clone()
KNOWN = shift.tables(REFERENCE)
FULL = 7


def seen(logit: torch.Tensor, *, pattern: int = FULL, rounds: int = 4) -> shift.Shift:
    state = shift.count(
        shift.init(), logit, torch.full((len(logit),), pattern), torch.ones(len(logit)), half_life=1e9
    )
    for _ in range(rounds):
        state, found = shift.estimate(state, KNOWN)
    return found


def draw(n: int, prior: float, by: float, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    genuine = torch.rand(n, generator=g) < prior
    u = torch.rand(n, generator=g)
    return torch.where(genuine, 0.5 + 3 * u, -14 + 13 * u) + by


def test_densities_sum_to_one():
    for d in KNOWN[:2]:
        torch.testing.assert_close(d.sum(-1), torch.ones(d.shape[:-1]))
        assert (d > 0).all()


@pytest.mark.parametrize("by", [-1.5, -0.5, 0.0, 1.0])
@pytest.mark.parametrize("prior", [0.2, 0.8, 1.0])
def test_the_boundary_is_found_under_any_prior(by, prior):
    found = seen(draw(600, prior, by, seed=1))
    assert found.logit[FULL] == pytest.approx(by, abs=0.5)
    assert (found.evidence > 3) == (by != 0.0)


@settings(max_examples=20)
@given(prior=st.floats(0, 1), seed=st.integers(0, 1000))
def test_unmoved_scores_are_no_evidence(prior, seed):
    assert seen(draw(300, prior, 0.0, seed)).evidence < 3


def test_the_share_of_bona_fide_is_estimated():
    found = seen(draw(1000, 0.3, -1.0, seed=3))
    assert float(found.bona_fide) == pytest.approx(300, abs=40)
    assert float(found.attack) == pytest.approx(700, abs=40)


def test_nothing_seen_is_no_shift():
    _, found = shift.estimate(shift.init(), KNOWN)
    assert found.logit.abs().max() < 0.5  # not 0: a wider bona fide is as likely as any
    assert float(found.evidence) == pytest.approx(0, abs=1e-4)


def test_weights_and_fading():
    x, p = torch.full((4,), 2.0), torch.full((4,), FULL)
    one = shift.count(shift.init(), x, p, torch.tensor([1.0, 0, 0, 1.0]), half_life=1e9)
    assert float(one["shift.count"].sum()) == 2
    later = shift.count(one, x, p, torch.ones(4), half_life=4.0)
    assert float(later["shift.count"].sum()) == pytest.approx(2 / 2 + 4)


def test_an_extreme_score_lands_in_the_outer_bins():
    state = shift.count(
        shift.init(), torch.tensor([-1e3, 1e3]), torch.tensor([FULL, FULL]), torch.ones(2), half_life=10
    )
    assert state["shift.count"][FULL, 0] == 1
    assert state["shift.count"][FULL, -1] == 1


@given(
    attack=st.lists(st.integers(-3000, 800), min_size=tail.QUANTILES, max_size=tail.QUANTILES, unique=True),
    share=st.floats(0, 0.2),
)
def test_loosening_lets_no_more_attacks_in_than_it_may(attack, share):
    """Of attacks that are spread evenly between their quantiles."""
    q = torch.tensor(sorted(attack)) / 100
    by = float(shift.affordable(torch.stack([q, q]).expand(2**tail.MODALITIES, -1, -1).clone(), share)[0])
    below = np.interp([-by, 0.0], q.numpy(), np.linspace(0, 1, len(q)))
    assert by >= 0
    assert below[1] - below[0] <= share + 1e-4


def test_loosening_spends_what_it_may():
    q = torch.linspace(-30, 2, tail.QUANTILES)  # a logit more is a 32nd of the attacks
    reference = torch.stack([q, q]).expand(2**tail.MODALITIES, -1, -1).clone()
    torch.testing.assert_close(shift.affordable(reference, 0.125), torch.full((8,), 4.0))
    torch.testing.assert_close(shift.affordable(reference, 0.0), torch.zeros(8))
