"""Source models: their roles, and what a rebase writes beside the sites' streams."""

from __future__ import annotations

import pytest

from pipeline.ledger import LedgerError, StaleGeneration
from tests.support.ledgers import BAD, T0, begin, segment, shard


@pytest.fixture
def two(ledger):
    for digest in ("a", "b"):
        ledger.add_source(digest * 64, trunk=f"t{digest}", path="p", manifest={}, lineage="", now=T0)
    return ledger


def test_a_challenger_is_named_and_taken_back(two):
    assert (two.source().version, two.challenger()) == (1, None)
    for _ in range(2):  # a second time says nothing new
        two.set_challenger(2, now=T0)
    assert (two.source().version, two.challenger()) == (1, 2)
    with pytest.raises(LedgerError, match="source version 3: not there; versions: 1, 2"):
        two.set_challenger(3, now=T0)
    two.set_champion(2, now=T0)
    two.set_challenger(None, now=T0)
    assert (two.source().version, two.challenger()) == (2, None)
    told = [
        (kind, p["version"], p["before"])
        for _, _, kind, p in two.audit()
        if kind in ("champion", "challenger")
    ]
    assert told == [
        ("champion", 1, None),
        ("challenger", 2, None),
        ("champion", 2, "1"),
        ("challenger", None, "2"),
    ]
    assert two.broken_audit() is None


def test_what_is_rebased_lies_beside_the_stream(two):
    cycle = begin(two)
    two.commit_ingest(cycle, [segment(), segment(name="segment-2.parquet", base=10)], [], now=T0)
    two.commit_shard(cycle, [shard()], now=T0)
    two.finish_cycle(cycle, summary={}, now=T0)
    before = two.sites(), two.verdicts(), two.verdicts(site="s0"), two.latest_verdicts(), two.outcomes()
    row = vars(shard(start=3)) | {"source_version": 2}
    made = begin(two, kind="rebase")
    for _ in range(2):
        two.commit_shard(made, [type(shard())(**row)], now=T0, rebased=True)
    late = shard("s1", end=4)
    assert two.commit_shard(made, [late], now=T0, rebased=True) == ["s1"], "it has learned to another offset"
    assert (
        two.sites(),
        two.verdicts(),
        two.verdicts(site="s0"),
        two.latest_verdicts(),
        two.outcomes(),
    ) == before
    (verdict,) = two.rebased(2).values()
    assert (verdict.site, verdict.offset_from, verdict.offset_to, verdict.cycle) == ("s0", 3, 10, made.id)
    assert two.verdicts(cycle=made.id) == two.verdicts(ids=[verdict.id]) == [verdict]
    assert two.outcomes(made.id) == {"s0": "pass"}
    assert two.rebased(1) == two.rebased(2, fingerprint="g") == {}
    two.serve({"s0": (verdict.state, 2)}, rollout="r", wave=1, kind="promote", reason="", now=T0)
    two.finish_cycle(made, summary={}, now=T0)
    with pytest.raises(StaleGeneration):
        two.commit_shard(made, [type(shard())(**row)], now=T0, rebased=True)


def test_the_newest_rebase_counts(two):
    for fingerprint, evidence in (("f", None), ("g", BAD)):
        made = begin(two, kind="rebase", fingerprint=fingerprint)
        given = {"evidence": evidence} if evidence else {}
        row = vars(shard(end=0, **given)) | {"source_version": 2}
        two.commit_shard(made, [type(shard())(**row)], now=T0, rebased=True)
        two.finish_cycle(made, summary={}, now=T0)
    assert two.rebased(2, fingerprint="f")["s0"].outcome == "pass"
    assert two.rebased(2)["s0"].outcome == "fail"
    assert two.site("s0").learner is None, "a failed candidate of a rebase takes nothing back"
