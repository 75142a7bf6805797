"""A shard's commit is whole or nothing, and what adaptation starts from; on both databases."""

from __future__ import annotations

from datetime import timedelta

import pytest

from pipeline.guards import GuardsConfig
from pipeline.guards.verdict import assess
from pipeline.ledger import Ledger, LedgerError, state_id, verdicts
from tests.support.ledgers import BAD, GOOD, HELD, T0, begin, shard, source_manifest


def test_a_failed_site_is_marked_until_it_commits(ledger):
    ledger.streams.set_status({"s0": "its segment is torn"})
    assert (ledger.streams.site("s0").status, ledger.streams.site("s0").reason) == (
        "failed",
        "its segment is torn",
    )
    ledger.verdicts.commit(begin(ledger), [shard()], now=T0)
    assert ledger.streams.site("s0").status == "active"


def test_a_shard_commits_state_cursor_verdict_and_window_together(ledger):
    cycle = begin(ledger)
    assert ledger.verdicts.commit(cycle, [shard(), shard("s1", evidence=HELD, slot=1)], now=T0) == []
    row, held = ledger.streams.named(["s0", "s1"])
    assert (row.learned_offset, row.holds, held.holds) == (10, 0, 1)
    state = ledger.verdicts.states([row.learner, None])[row.learner]
    assert (state.blob, state.slot, state.offset_from, state.offset_to) == ("b" * 64, 0, 0, 10)
    verdict = ledger.verdicts.find(cycle=cycle.id, site="s0")[0]
    assert (verdict.state, verdict.evidence, verdict.window) == (state.id, GOOD, shard().window)
    assert assess(GuardsConfig(), verdict.evidence) == verdict.verdict
    assert ledger.verdicts.latest()["s1"].verdict.outcome == "hold"


def test_a_repeated_commit_has_no_second_effect(ledger):
    cycle = begin(ledger)
    rows = [shard(), shard("s1", slot=1)]
    ledger.verdicts.commit(cycle, rows, now=T0)
    before = ledger.streams.sites()
    assert ledger.verdicts.commit(cycle, rows, now=T0) == ["s0", "s1"]
    assert ledger.verdicts.commit(cycle, [shard("s2", start=5)], now=T0) == ["s2"]  # a hole in the stream
    assert ledger.streams.sites() == before
    assert len(ledger.verdicts.find()) == 2


def test_a_failed_candidate_is_kept_but_not_learned_from(ledger):
    ledger.verdicts.commit(begin(ledger), [shard()], now=T0)
    good = ledger.streams.site("s0").learner
    ledger.releases.serve({"s0": (good, 1)}, rollout="r1", wave=1, kind="promote", reason="", now=T0)
    second = begin(ledger, now=T0 + timedelta(days=1), fingerprint="g")
    ledger.verdicts.commit(second, [shard(start=10, end=20, evidence=BAD)], now=T0)
    assert ledger.streams.site("s0").learner == good
    assert ledger.streams.site("s0").learned_offset == 20
    assert ledger.verdicts.latest()["s0"].verdict.outcome == "fail"


@pytest.mark.parametrize("broken", ["_cursor_update", "_verdict_values"])
def test_a_crash_before_the_commit_leaves_nothing(ledger, monkeypatch, broken):
    cycle = begin(ledger)
    real = getattr(verdicts, broken)

    def crash(row, *rest):
        if row.site == "s1":
            raise KeyboardInterrupt
        return real(row, *rest)

    monkeypatch.setattr(verdicts, broken, crash)
    with pytest.raises(KeyboardInterrupt):
        ledger.verdicts.commit(cycle, [shard(), shard("s1", slot=1)], now=T0)
    monkeypatch.undo()
    assert ledger.streams.site("s0").learned_offset == 0
    assert ledger.verdicts.find() == []
    assert ledger.verdicts.states([state_id(cycle.id, "s0")]) == {}
    assert ledger.verdicts.commit(cycle, [shard(), shard("s1", slot=1)], now=T0) == []


def test_outcomes_of_a_cycle_and_the_newest_of_every_site(ledger):
    first = begin(ledger)
    ledger.verdicts.commit(first, [shard(), shard("s1", evidence=HELD, slot=1)], now=T0)
    second = begin(ledger, now=T0 + timedelta(days=1), fingerprint="g")
    ledger.verdicts.commit(
        second, [shard(start=10, end=20, evidence=BAD)], now=T0 - timedelta(days=1)
    )  # the clock went back
    assert ledger.verdicts.outcomes(first.id) == {"s0": "pass", "s1": "hold"}
    assert ledger.verdicts.outcomes(second.id) == {"s0": "fail"}
    assert ledger.verdicts.outcomes() == {"s0": "fail", "s1": "hold"}
    assert {s: v.outcome for s, v in ledger.verdicts.latest().items()} == ledger.verdicts.outcomes()
    assert ledger.verdicts.outcomes("no such cycle") == {}


def test_an_empty_window_leaves_the_learner_and_is_the_newest_verdict(ledger):
    ledger.verdicts.commit(begin(ledger), [shard()], now=T0)
    learner, later = ledger.streams.site("s0").learner, T0 + timedelta(days=1)
    second = begin(ledger, now=later, fingerprint="g")
    assert ledger.verdicts.commit(second, [shard(start=10, blob=None, evidence=HELD)], now=later) == []
    assert ledger.verdicts.commit(second, [shard(start=10, blob=None, evidence=HELD)], now=later) == ["s0"]
    assert (ledger.streams.site("s0").learner, ledger.streams.site("s0").holds) == (learner, 1)
    assert (ledger.verdicts.latest()["s0"].cycle, ledger.verdicts.latest()["s0"].state) == (second.id, None)


def test_verdicts_by_id_are_oldest_first_however_many(ledger):
    first = begin(ledger)
    ledger.verdicts.commit(first, [shard()], now=T0 + timedelta(seconds=1))
    second = begin(ledger, now=T0 + timedelta(days=1), fingerprint="g")
    ledger.verdicts.commit(second, [shard(start=10, end=20)], now=T0 + timedelta(seconds=2))
    ids = [state_id(second.id, "s0"), *(f"x{i}" for i in range(2000)), state_id(first.id, "s0")]
    assert [v.cycle for v in ledger.verdicts.find(ids=ids)] == [first.id, second.id]


def test_sources_and_anchors(ledger):
    with pytest.raises(LedgerError, match="run `palisade train` first"):
        ledger.sources.champion()
    models = {d: source_manifest(d, trunk="t") for d in ("d1", "d2")}
    add = {"path": "p", "lineage": "run", "now": T0}
    assert [ledger.sources.add(models[d], **add) for d in ("d1", "d2", "d1")] == [1, 2, 1]
    assert ledger.sources.champion().version == 1
    ledger.sources.set_champion(2, now=T0)
    assert (ledger.sources.champion().digest, ledger.sources.champion().manifest) == ("d2", models["d2"])
    with pytest.raises(LedgerError, match="versions: 1, 2"):
        ledger.sources.get(7)
    with pytest.raises(LedgerError, match="no anchor set"):
        ledger.verdicts.anchor("t")
    ledger.verdicts.pin_anchor("x", trunk="t", summary={}, now=T0)
    ledger.verdicts.pin_anchor("y", trunk="t", summary={}, now=T0 + timedelta(seconds=1))
    assert ledger.verdicts.anchor("t") == "y"


def test_a_thousand_sites_in_one_transaction(url):
    ledger = Ledger.open(url)
    names = [f"n{i}" for i in range(2500)]
    ledger.streams.register({s: {} for s in names}, now=T0)
    rows = [shard(s, slot=i) for i, s in enumerate(names)]
    assert ledger.verdicts.commit(begin(ledger), rows, now=T0) == []
    learners = [s.learner for s in ledger.streams.named(names)]
    assert len(ledger.verdicts.states(learners)) == 2500
    changes = {s: (x, 1) for s, x in zip(names, learners, strict=True)}
    ledger.releases.serve(changes, rollout="r", wave=1, kind="promote", reason="", now=T0)
    assert len(ledger.releases.serving(names)) == 2500
    ledger.close()
