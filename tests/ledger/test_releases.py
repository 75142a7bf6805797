"""Champion pointers and rollouts; on both databases."""

from __future__ import annotations

import pytest

from pipeline.ledger import LedgerError, StaleGeneration
from tests.ledger.conftest import HELD, T0, begin, shard


def test_only_a_passing_state_of_that_site_is_promoted(ledger):
    ledger.commit_shard(begin(ledger), [shard(), shard("s1", evidence=HELD, slot=1), shard("s2", slot=2)], now=T0)
    ids = {s.site: s.learner for s in ledger.sites()}
    for site, state in (("s1", ids["s1"]), ("s0", ids["s2"]), ("s0", "made-up"), ("s0", None)):
        with pytest.raises(LedgerError, match=f"site {site}: no stored verdict passes"):
            ledger.serve(
                {"s2": (ids["s2"], 1), site: (state, 1)}, rollout="r1", wave=1, kind="promote", reason="", now=T0
            )
    assert ledger.serving() == {}


def test_the_release_counter_only_grows(ledger):
    ledger.commit_shard(begin(ledger), [shard()], now=T0)
    state = ledger.site("s0").learner
    for kind, to in (("promote", state), ("rollback", None), ("promote", state)):
        ledger.serve({"s0": (to, 1)}, rollout="r1", wave=1, kind=kind, reason="x", now=T0)
    assert [(s.counter, s.kind, s.state) for s in ledger.served("s0")] == [
        (1, "promote", state), (2, "rollback", None), (3, "promote", state)]  # fmt: skip
    assert ledger.serving(["s0", "s1"]) == {"s0": ledger.served("s0")[-1]}
    assert ledger.serving(["s1"] * 3000) == {}


def test_the_newest_promotion_under_some_rollouts(ledger):
    ledger.commit_shard(begin(ledger), [shard(), shard("s1", slot=1), shard("s2", slot=2)], now=T0)
    learner = {s.site: s.learner for s in ledger.sites()}
    for rollout, kind, names in (
        ("r1", "promote", ["s0", "s1"]),
        ("r2", "promote", ["s0"]),
        ("r2", "rollback", ["s0"]),
        ("r3", "promote", ["s0", "s2"]),
    ):
        changes = {s: (learner[s] if kind == "promote" else None, 1) for s in names}
        ledger.serve(changes, rollout=rollout, wave=1, kind=kind, reason="", now=T0)
    assert {s: (r.rollout, r.counter) for s, r in ledger.served_by({"r1", "r2"}).items()} == {
        "s0": ("r2", 2), "s1": ("r1", 1)}  # fmt: skip
    assert ledger.served_by(["r1"])["s0"] == ledger.served("s0")[0]
    assert ledger.served_by([]) == {}


def test_a_rollout_is_saved_by_one_writer(ledger):
    def save(revision):
        return ledger.save_rollout(
            "r1", plan_hash="h", status="planned", body="{}", revision=revision, event={}, now=T0
        )

    assert save(save(0)) == 2
    with pytest.raises(StaleGeneration, match="somebody else moved it on"):
        save(1)
    assert [(r.id, r.revision, r.created_at) for r in ledger.rollouts()] == [("r1", 2, T0)]
