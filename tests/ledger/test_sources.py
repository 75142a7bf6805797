"""Source models: their roles, and what a rebase writes beside the sites' streams."""

from __future__ import annotations

import pytest

from pipeline.ledger import LedgerError, StaleGeneration
from tests.support.ledgers import BAD, T0, begin, segment, shard, source_manifest


@pytest.fixture
def two(ledger):
    for digest in ("a", "b"):
        ledger.sources.add(source_manifest(digest * 64, trunk=f"t{digest}"), path="p", lineage="", now=T0)
    return ledger


def test_a_challenger_is_named_and_taken_back(two):
    assert (two.sources.champion().version, two.sources.challenger()) == (1, None)
    for _ in range(2):  # a second time says nothing new
        two.sources.set_challenger(2, now=T0)
    assert (two.sources.champion().version, two.sources.challenger()) == (1, 2)
    with pytest.raises(LedgerError, match="source version 3: not there; versions: 1, 2"):
        two.sources.set_challenger(3, now=T0)
    two.sources.set_champion(2, now=T0)
    two.sources.set_challenger(None, now=T0)
    assert (two.sources.champion().version, two.sources.challenger()) == (2, None)
    told = [
        (kind, p["version"], p["before"])
        for _, _, kind, p in two.audit.rows()
        if kind in ("champion", "challenger")
    ]
    assert told == [
        ("champion", 1, None),
        ("challenger", 2, None),
        ("champion", 2, "1"),
        ("challenger", None, "2"),
    ]
    assert two.audit.first_broken() is None


def test_what_is_rebased_lies_beside_the_stream(two):
    cycle = begin(two)
    two.streams.commit(cycle, [segment(), segment(name="segment-2.parquet", base=10)], [], now=T0)
    two.verdicts.commit(cycle, [shard()], now=T0)
    two.cycles.finish(cycle, summary={}, now=T0)
    before = (
        two.streams.sites(),
        two.verdicts.find(),
        two.verdicts.find(site="s0"),
        two.verdicts.latest(),
        two.verdicts.outcomes(),
    )
    row = vars(shard(start=3)) | {"source_version": 2}
    made = begin(two, kind="rebase")
    for _ in range(2):
        two.verdicts.commit(made, [type(shard())(**row)], now=T0, rebased=True)
    late = shard("s1", end=4)
    assert two.verdicts.commit(made, [late], now=T0, rebased=True) == ["s1"], (
        "it has learned to another offset"
    )
    assert (
        two.streams.sites(),
        two.verdicts.find(),
        two.verdicts.find(site="s0"),
        two.verdicts.latest(),
        two.verdicts.outcomes(),
    ) == before
    (verdict,) = two.verdicts.rebased(2).values()
    assert (verdict.site, verdict.offset_from, verdict.offset_to, verdict.cycle) == ("s0", 3, 10, made.id)
    assert two.verdicts.find(cycle=made.id) == two.verdicts.find(ids=[verdict.id]) == [verdict]
    assert two.verdicts.outcomes(made.id) == {"s0": "pass"}
    assert two.verdicts.rebased(1) == two.verdicts.rebased(2, fingerprint="g") == {}
    two.releases.serve({"s0": (verdict.state, 2)}, rollout="r", wave=1, kind="promote", reason="", now=T0)
    two.cycles.finish(made, summary={}, now=T0)
    with pytest.raises(StaleGeneration):
        two.verdicts.commit(made, [type(shard())(**row)], now=T0, rebased=True)


def test_the_newest_rebase_counts(two):
    for fingerprint, evidence in (("f", None), ("g", BAD)):
        made = begin(two, kind="rebase", fingerprint=fingerprint)
        given = {"evidence": evidence} if evidence else {}
        row = vars(shard(end=0, **given)) | {"source_version": 2}
        two.verdicts.commit(made, [type(shard())(**row)], now=T0, rebased=True)
        two.cycles.finish(made, summary={}, now=T0)
    assert two.verdicts.rebased(2, fingerprint="f")["s0"].outcome == "pass"
    assert two.verdicts.rebased(2)["s0"].outcome == "fail"
    assert two.streams.site("s0").learner is None, "a failed candidate of a rebase takes nothing back"
