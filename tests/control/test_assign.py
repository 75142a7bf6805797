"""Where sites live and what goes out together."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.control.assign import SAMPLES, SITES, group_calls, home_shards

SITES_100 = [f"site-{i:05d}" for i in range(100)]


@given(st.integers(1, 40))
def test_a_shard_that_joins_takes_only_what_becomes_its_own(shards):
    before, after = home_shards(SITES_100, shards), home_shards(SITES_100, shards + 1)
    assert set(after[before != after].tolist()) <= {shards}


def test_sites_spread_evenly_and_stay_where_they_are():
    names = [f"gate-{i}" for i in range(20_000)]
    share = np.bincount(home_shards(names, 28), minlength=28) / len(names) * 28
    assert share.min() > 0.85 and share.max() < 1.15
    order = np.random.default_rng(0).permutation(len(names))
    assert (home_shards([names[i] for i in order], 28) == home_shards(names, 28)[order]).all()


@given(st.dictionaries(st.sampled_from(SITES_100), st.integers(0, 3000)), st.integers(1, 32))
def test_every_site_is_in_one_call_and_calls_are_worth_their_cost(pending, slots):
    made = group_calls(pending, slots=slots)
    assert sorted(s for c in made for s in c) == sorted(pending)
    for call in made[:-1]:
        assert len(call) % slots == 0
        assert sum(pending[s] for s in call) >= SAMPLES or len(call) >= SITES
        less = call[: len(call) - slots]
        assert (
            sum(pending[s] for s in less) < SAMPLES and len(less) < SITES
        )  # no call is longer than it need be
