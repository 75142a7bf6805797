"""Protocols are sets of names and bit masks: every split is a partition, every mask keeps what it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.protocols import (
    PATTERNS,
    any_present,
    as_bits,
    as_bools,
    keep_only,
    leave_one_domain_out,
    limited_source,
    pattern,
    zero_absent,
)

NAMES = st.lists(st.text("abcW", min_size=1, max_size=4), min_size=2, max_size=5, unique=True)
MASKS = st.lists(st.integers(0, 7), max_size=20).map(lambda m: np.array(m, np.uint8))


def test_the_published_names() -> None:
    assert [p.name for p in leave_one_domain_out(["W", "C", "P", "S"])] == [
        "PSW->C",
        "CSW->P",
        "CPW->S",
        "CPS->W",
    ]
    assert {"CW->PS", "PS->CW"} <= {p.name for p in limited_source(["W", "C", "P", "S"])}
    assert leave_one_domain_out(["surf", "cefa"])[0].name == "surf->cefa"
    assert leave_one_domain_out(["surf", "cefa", "wmca"])[2].name == "cefa+surf->wmca"


@given(NAMES)
def test_every_domain_is_the_target_once_and_never_its_own_source(names: list[str]) -> None:
    protocols = leave_one_domain_out(names)
    assert sorted(p.target for p in protocols) == sorted(names)
    assert all(sorted((*p.sources, p.target)) == sorted(names) for p in protocols)


@given(NAMES, st.integers(1, 4))
def test_limited_sources_partition_the_domains(names: list[str], keep: int) -> None:
    if keep >= len(names):
        with pytest.raises(ValueError, match="keep"):
            limited_source(names, keep)
        return
    for p in limited_source(names, keep):
        assert len(p.sources) == keep
        assert sorted((*p.sources, *p.targets)) == sorted(names)


@pytest.mark.parametrize("names", [[], ["W"], ["W", "W"]])
def test_too_few_domains_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="at least 2 different"):
        leave_one_domain_out(names)


def test_patterns_keep_what_they_say() -> None:
    kept = {name: as_bools(np.array([mask], np.uint8))[0].tolist() for name, mask in PATTERNS.items()}
    assert kept == {
        "full": [True, True, True],
        "no-depth": [True, False, True],
        "no-ir": [True, True, False],
        "no-depth-ir": [True, False, False],
        "no-rgb": [False, True, True],
    }
    with pytest.raises(ValueError, match="no-depth-ir"):
        pattern("no-sound")


@given(MASKS)
def test_bits_and_bools_are_the_same_thing(present: np.ndarray) -> None:
    assert np.array_equal(as_bits(as_bools(present)), present)
    assert np.array_equal(as_bools(present).any(axis=1), any_present(present))


@given(MASKS, st.sampled_from(sorted(PATTERNS)))
def test_dropping_never_adds_and_is_final(present: np.ndarray, name: str) -> None:
    left = keep_only(present, pattern(name))
    assert np.array_equal(left | present, present)
    assert np.array_equal(keep_only(left, pattern(name)), left)
    assert left.dtype == np.uint8


@given(MASKS)
def test_blanked_frames_hold_only_what_is_present(present: np.ndarray) -> None:
    frame = np.full((len(present), 5, 2, 2), 9, np.uint8)
    out = zero_absent(frame, present)
    lit = np.stack(
        [out[:, :3].any(axis=(1, 2, 3)), out[:, 3].any(axis=(1, 2)), out[:, 4].any(axis=(1, 2))], axis=1
    )
    assert np.array_equal(lit, as_bools(present))
    assert (frame == 9).all()
