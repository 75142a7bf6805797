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
        lambda: ledger.verdicts.commit(cycle, [shard()], now=T0),
        lambda: ledger.verdicts.commit(cycle, [], now=T0),
        lambda: ledger.streams.commit(cycle, [segment()], [], now=T0),
        lambda: ledger.streams.commit(cycle, [], [], now=T0),
        lambda: ledger.streams.quarantine_lost(
            cycle, [("s0", "segment-1.parquet")], reason="features lost", now=T0
        ),
        lambda: ledger.streams.quarantine_lost(cycle, [], reason="features lost", now=T0),
        lambda: ledger.cycles.renew(cycle, now=T0),
        lambda: ledger.cycles.finish(cycle, summary={}, now=T0),
    )


def test_every_write_with_a_cycle_is_fenced(ledger):
    takers = {
        f"{part}.{name}"
        for part in vars(ledger)
        for name in dir(getattr(ledger, part))
        if not name.startswith("_") and "Cycle" in signature(getattr(getattr(ledger, part), name))
    }
    listed = {"verdicts.commit", "streams.commit", "streams.quarantine_lost", "cycles.renew", "cycles.finish"}
    assert takers == listed | {"store.fence"}


def signature(member):
    if not callable(member):
        return set()
    return {str(p.annotation) for p in inspect.signature(member).parameters.values()}


def test_sites_are_registered_once(ledger):
    assert ledger.streams.register({"s0": {}, "new": {}}, now=T0) == ["new"]
    assert ledger.streams.site("s0").tags == {"rig": "a"}
    assert [s.site for s in ledger.streams.named(["s3", "s1"])] == ["s3", "s1"]
    with pytest.raises(UnknownSite, match="did you mean s"):
        ledger.streams.site("s00")
    with pytest.raises(UnknownSite, match="'nowhere': not registered"):
        ledger.streams.named(["s1", "nowhere"])


def test_lost_samples_are_quarantined_once_and_keep_their_offsets(ledger):
    cycle = begin(ledger)
    ledger.streams.commit(
        cycle, [segment()], [QuarantineRow("s0", "segment-1.parquet", 3, "x", "rgb: torn")], now=T0
    )
    for _ in range(2):
        ledger.streams.quarantine_lost(
            cycle, [("s0", "segment-1.parquet"), ("s0", "unknown")], reason="features lost", now=T0
        )
    ((row, _),) = ledger.streams.segments("s0")
    assert (row.rows, row.good, row.quarantined, ledger.streams.site("s0").ingested_offset) == (10, 0, 10, 10)
    lost = [q.row for q in ledger.streams.quarantined("s0") if q.reason == "features lost"]
    assert lost == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    told = [payload for _, _, kind, payload in ledger.audit.rows() if kind == "features lost"]
    assert [(t["segment"], t["samples"], t["offsets"]) for t in told] == [("segment-1.parquet", 9, [0, 10])]
    assert ledger.audit.first_broken() is None


def test_ingest_counts_rows_and_keeps_what_was_refused(ledger):
    cycle = begin(ledger)
    later = segment(name="segment-2.parquet", base=10)
    ledger.streams.commit(
        cycle, [segment(), later], [QuarantineRow("s0", "segment-1.parquet", 3, "x", "rgb: torn")], now=T0
    )
    assert ledger.streams.segment_names() == {"s0": {"segment-1.parquet", "segment-2.parquet"}}
    assert ledger.streams.site("s0").ingested_offset == 20
    assert [s for s, _ in ledger.streams.segments("s0")] == [segment(), later]
    assert [q.row for q in ledger.streams.quarantined("s0", cycle=cycle.id)] == [3]
    assert ledger.streams.quarantined("s1") == []
    assert ledger.streams.segment_names(["s1", "s0"]) == ledger.streams.segment_names()
    assert ledger.streams.segment_names(["s1"]) == {}
    assert {site: at for site, (_, at) in ledger.streams.pending(["s0", "s1"]).items() if at is not None} == {
        "s0": T0
    }


def test_pending_counts_what_was_not_learned_from(ledger):
    cycle, later = begin(ledger), T0 + timedelta(hours=1)
    ledger.streams.commit(cycle, [segment(), segment("s1")], [], now=T0)
    ledger.verdicts.commit(cycle, [shard(), shard("s2", end=0)], now=T0)
    torn = segment(name="torn.parquet", base=20, rows=0)
    ledger.streams.commit(cycle, [segment(name="segment-2.parquet", base=10, rows=10), torn], [], now=later)
    assert ledger.streams.pending(["s0", "s1", "s2", "nowhere"]) == {
        "s0": (9, later),
        "s1": (9, T0),
        "s2": (0, None),
    }
    assert ledger.streams.pending([]) == {}


def test_a_segment_counts_once(ledger):
    cycle, bad = begin(ledger), [QuarantineRow("s0", "segment-1.parquet", 3, "x", "rgb: torn")]
    assert ledger.streams.commit(cycle, [segment()], bad, now=T0) == []
    second = segment(name="segment-2.parquet", base=10)
    again = [segment(), second, segment(name="segment-1.parquet", base=30)]
    known = [("s0", "segment-1.parquet")]
    assert ledger.streams.commit(cycle, again, bad, now=T0 + timedelta(1)) == known * 2
    assert [(s, at) for s, at in ledger.streams.segments("s0")] == [
        (segment(), T0),
        (second, T0 + timedelta(1)),
    ]
    assert (ledger.streams.site("s0").ingested_offset, len(ledger.streams.quarantined())) == (20, 1)


def test_two_samples_never_share_an_offset(ledger):
    cycle = begin(ledger)
    ledger.streams.commit(cycle, [segment()], [], now=T0)
    for rows in (
        [segment(name="segment-2.parquet", base=9)],
        [segment(name="segment-2.parquet", base=10), segment(name="segment-3.parquet", base=19)],
    ):
        with pytest.raises(LedgerError, match="offsets up to [12]0 are taken; ingest again"):
            ledger.streams.commit(cycle, [segment("s1"), *rows], [], now=T0)
    with pytest.raises(UnknownSite, match="not registered; its segments were not counted"):
        ledger.streams.commit(cycle, [segment("s1"), segment("s9")], [], now=T0)
    assert ledger.streams.segment_names() == {"s0": {"segment-1.parquet"}}
    assert (ledger.streams.site("s0").ingested_offset, ledger.streams.site("s1").ingested_offset) == (10, 0)


def test_text_that_no_database_takes_costs_nobody_else(ledger):
    cycle, evil = begin(ledger), "a\0b\udcff"
    ledger.streams.commit(
        cycle, [segment()], [QuarantineRow("s0", "segment-1.parquet", 1, evil, evil)], now=T0
    )
    ledger.streams.set_status({"s1": evil})
    kept = ledger.streams.quarantined("s0")[0]
    assert (kept.sample_id, kept.reason) == ("a\ufffdb?", "a\ufffdb?")
    assert ledger.streams.site("s1").reason == "a\ufffdb?"


def test_sites_are_listed_by_code_point(ledger):
    ledger.streams.register({"Zeta": {}, "_a": {}, "a-b": {}, "ab": {}, "ä": {}}, now=T0)
    names = [s.site for s in ledger.streams.sites()]
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
    assert ledger.streams.site("s0").learned_offset == 0
    ledger.cycles.finish(taken, summary={"sites": 1}, now=T0)
    for write in writes(ledger, taken):
        with pytest.raises(StaleGeneration, match="was replaced; nothing was written"):
            write()
    assert ledger.verdicts.find() == [] and ledger.streams.segment_names() == {}
    assert begin(ledger, holder="c").id != first.id


def test_a_lease_runs_out_and_other_work_abandons_the_cycle(ledger):
    first = begin(ledger)
    ledger.cycles.renew(first, now=T0 + timedelta(seconds=100))
    with pytest.raises(CycleBusy):
        begin(ledger, holder="b", now=T0 + timedelta(seconds=200))
    other = begin(ledger, holder="b", now=T0 + timedelta(seconds=221), fingerprint="other")
    assert other.id != first.id
    with pytest.raises(StaleGeneration):
        ledger.verdicts.commit(first, [shard()], now=T0)
