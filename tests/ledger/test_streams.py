"""Sites, what they sent, and the lease that lets one driver work on it; on both databases."""

from __future__ import annotations

import inspect
from datetime import timedelta

import pytest

from pipeline.ledger import CycleBusy, LedgerError, QuarantineRow, StaleGeneration, UnknownSite
from tests.support.ledgers import T0, begin, segment, shard


def writes(ledger, cycle):
    """Every public write that takes a cycle, also where there is nothing to write."""
    return (
        lambda: ledger.commit_shard(cycle, [shard()], now=T0),
        lambda: ledger.commit_shard(cycle, [], now=T0),
        lambda: ledger.commit_ingest(cycle, [segment()], [], now=T0),
        lambda: ledger.commit_ingest(cycle, [], [], now=T0),
        lambda: ledger.quarantine_lost(cycle, [("s0", "segment-1.parquet")], reason="features lost", now=T0),
        lambda: ledger.quarantine_lost(cycle, [], reason="features lost", now=T0),
        lambda: ledger.renew(cycle, now=T0),
        lambda: ledger.finish_cycle(cycle, summary={}, now=T0),
    )


def test_every_write_with_a_cycle_is_fenced(ledger):
    takers = {n for n in dir(ledger) if not n.startswith("_") and "Cycle" in signature(ledger, n)}
    assert takers == {
        "commit_shard",
        "commit_ingest",
        "quarantine_lost",
        "renew",
        "finish_cycle",
    }  # what ``writes`` lists


def signature(ledger, name):
    made = getattr(ledger, name)
    return (
        {str(p.annotation) for p in inspect.signature(made).parameters.values()} if callable(made) else set()
    )


def test_sites_are_registered_once(ledger):
    assert ledger.register_sites({"s0": {}, "new": {}}, now=T0) == ["new"]
    assert ledger.site("s0").tags == {"rig": "a"}
    assert [s.site for s in ledger.sites_named(["s3", "s1"])] == ["s3", "s1"]
    with pytest.raises(UnknownSite, match="did you mean s"):
        ledger.site("s00")
    with pytest.raises(UnknownSite, match="'nowhere': not registered"):
        ledger.sites_named(["s1", "nowhere"])


def test_lost_samples_are_quarantined_once_and_keep_their_offsets(ledger):
    cycle = begin(ledger)
    ledger.commit_ingest(
        cycle, [segment()], [QuarantineRow("s0", "segment-1.parquet", 3, "x", "rgb: torn")], now=T0
    )
    for _ in range(2):
        ledger.quarantine_lost(
            cycle, [("s0", "segment-1.parquet"), ("s0", "unknown")], reason="features lost", now=T0
        )
    ((row, _),) = ledger.segments("s0")
    assert (row.rows, row.good, row.quarantined, ledger.site("s0").ingested) == (10, 0, 10, 10)
    lost = [q.row for q in ledger.quarantined("s0") if q.reason == "features lost"]
    assert lost == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    told = [payload for _, _, kind, payload in ledger.audit() if kind == "features lost"]
    assert [(t["segment"], t["samples"], t["offsets"]) for t in told] == [("segment-1.parquet", 9, [0, 10])]
    assert ledger.broken_audit() is None


def test_ingest_counts_rows_and_keeps_what_was_refused(ledger):
    cycle = begin(ledger)
    later = segment(name="segment-2.parquet", base=10)
    ledger.commit_ingest(
        cycle, [segment(), later], [QuarantineRow("s0", "segment-1.parquet", 3, "x", "rgb: torn")], now=T0
    )
    assert ledger.known_segments() == {"s0": {"segment-1.parquet", "segment-2.parquet"}}
    assert ledger.site("s0").ingested == 20
    assert [s for s, _ in ledger.segments("s0")] == [segment(), later]
    assert [q.row for q in ledger.quarantined("s0", cycle=cycle.id)] == [3]
    assert ledger.quarantined("s1") == []
    assert ledger.known_segments(["s1", "s0"]) == ledger.known_segments()
    assert ledger.known_segments(["s1"]) == {}
    assert {site: at for site, (_, at) in ledger.pending(["s0", "s1"]).items() if at is not None} == {
        "s0": T0
    }


def test_pending_counts_what_was_not_learned_from(ledger):
    cycle, later = begin(ledger), T0 + timedelta(hours=1)
    ledger.commit_ingest(cycle, [segment(), segment("s1")], [], now=T0)
    ledger.commit_shard(cycle, [shard(), shard("s2", end=0)], now=T0)
    torn = segment(name="torn.parquet", base=20, rows=0)
    ledger.commit_ingest(cycle, [segment(name="segment-2.parquet", base=10, rows=10), torn], [], now=later)
    assert ledger.pending(["s0", "s1", "s2", "nowhere"]) == {"s0": (9, later), "s1": (9, T0), "s2": (0, None)}
    assert ledger.pending([]) == {}


def test_a_segment_counts_once(ledger):
    cycle, bad = begin(ledger), [QuarantineRow("s0", "segment-1.parquet", 3, "x", "rgb: torn")]
    assert ledger.commit_ingest(cycle, [segment()], bad, now=T0) == []
    second = segment(name="segment-2.parquet", base=10)
    again = [segment(), second, segment(name="segment-1.parquet", base=30)]
    known = [("s0", "segment-1.parquet")]
    assert ledger.commit_ingest(cycle, again, bad, now=T0 + timedelta(1)) == known * 2
    assert [(s, at) for s, at in ledger.segments("s0")] == [(segment(), T0), (second, T0 + timedelta(1))]
    assert (ledger.site("s0").ingested, len(ledger.quarantined())) == (20, 1)


def test_two_samples_never_share_an_offset(ledger):
    cycle = begin(ledger)
    ledger.commit_ingest(cycle, [segment()], [], now=T0)
    for rows in (
        [segment(name="segment-2.parquet", base=9)],
        [segment(name="segment-2.parquet", base=10), segment(name="segment-3.parquet", base=19)],
    ):
        with pytest.raises(LedgerError, match="offsets up to [12]0 are taken; ingest again"):
            ledger.commit_ingest(cycle, [segment("s1"), *rows], [], now=T0)
    with pytest.raises(UnknownSite, match="not registered; its segments were not counted"):
        ledger.commit_ingest(cycle, [segment("s1"), segment("s9")], [], now=T0)
    assert ledger.known_segments() == {"s0": {"segment-1.parquet"}}
    assert (ledger.site("s0").ingested, ledger.site("s1").ingested) == (10, 0)


def test_text_that_no_database_takes_costs_nobody_else(ledger):
    cycle, evil = begin(ledger), "a\0b\udcff"
    ledger.commit_ingest(
        cycle, [segment()], [QuarantineRow("s0", "segment-1.parquet", 1, evil, evil)], now=T0
    )
    ledger.set_status({"s1": evil})
    kept = ledger.quarantined("s0")[0]
    assert (kept.sample_id, kept.reason) == ("a\ufffdb?", "a\ufffdb?")
    assert ledger.site("s1").reason == "a\ufffdb?"


def test_sites_are_listed_by_code_point(ledger):
    ledger.register_sites({"Zeta": {}, "_a": {}, "a-b": {}, "ab": {}, "ä": {}}, now=T0)
    names = [s.site for s in ledger.sites()]
    assert names == sorted(names)


def test_the_lease_is_one_for_the_fleet_and_its_generation_fences(ledger):
    first = begin(ledger)
    with pytest.raises(CycleBusy, match="running"):
        begin(ledger, holder="b")
    taken = begin(ledger, holder="b", dead=lambda holder: holder == "a")
    assert (taken.id, taken.generation, taken.resumed) == (first.id, first.generation + 1, True)
    for write in writes(ledger, first):
        with pytest.raises(StaleGeneration, match="was replaced; nothing was written"):
            write()
    assert ledger.site("s0").learned == 0
    ledger.finish_cycle(taken, summary={"sites": 1}, now=T0)
    for write in writes(ledger, taken):
        with pytest.raises(StaleGeneration, match="was replaced; nothing was written"):
            write()
    assert ledger.verdicts() == [] and ledger.known_segments() == {}
    assert begin(ledger, holder="c").id != first.id


def test_a_lease_runs_out_and_other_work_abandons_the_cycle(ledger):
    first = begin(ledger)
    ledger.renew(first, now=T0 + timedelta(seconds=100))
    with pytest.raises(CycleBusy):
        begin(ledger, holder="b", now=T0 + timedelta(seconds=200))
    other = begin(ledger, holder="b", now=T0 + timedelta(seconds=221), fingerprint="other")
    assert other.id != first.id
    with pytest.raises(StaleGeneration):
        ledger.commit_shard(first, [shard()], now=T0)
