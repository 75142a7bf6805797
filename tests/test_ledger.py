"""Transactions, fences, the audit chain, and two processes on one SQLite file."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.guards import Cell, Evidence, GuardsConfig, assess
from pipeline.ledger import (
    CycleBusy,
    Ledger,
    LedgerError,
    LedgerUnavailable,
    QuarantineRow,
    SegmentRow,
    ShardRow,
    StaleGeneration,
    UnknownSite,
    state_id,
    verdicts,
)

T0 = datetime(2026, 1, 1, tzinfo=UTC)
CELLS = tuple(Cell(pattern="all", species=s, n=600, errors=0, worse=0, better=0) for s in ("print", "bona_fide"))
GOOD = Evidence(cells=CELLS, trust_ratio=0.01, margin_drop=0.0, stream_n=500, age_seconds=1.0, finite=True)
HELD = GOOD.model_copy(update={"stream_n": 1})
BAD = GOOD.model_copy(update={"trust_ratio": 0.5})


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/deep/ledger.db"


@pytest.fixture
def ledger(url):
    made = Ledger.open(url)
    made.register_sites({f"s{i}": {"rig": "a"} for i in range(5)}, now=T0)
    return made


def begin(ledger, *, holder="a", now=T0, dead=lambda holder: False, fingerprint="f", kind="cycle"):
    return ledger.begin_cycle(kind, fingerprint, "{}", holder=holder, dead=dead, now=now)


def shard(site="s0", start=0, end=10, *, evidence=GOOD, blob="b" * 64, slot=0):
    return ShardRow(site=site, offset_from=start, offset_to=end, source_version=1, method="danet", blob=blob, slot=slot,
                    parent=None, counters={"samples": end - start}, verdict=assess(GuardsConfig(), evidence),
                    evidence=evidence)  # fmt: skip


def segment(site="s0", name="segment-1.parquet", base=0, rows=10):
    return SegmentRow(site, name, "d" * 64, rows, base, rows - 1, 1)


def test_sites_are_registered_once(ledger):
    assert ledger.register_sites({"s0": {}, "new": {}}, now=T0) == ["new"]
    assert ledger.site("s0").tags == {"rig": "a"}
    assert [s.site for s in ledger.sites_named(["s3", "s1"])] == ["s3", "s1"]
    with pytest.raises(UnknownSite, match="did you mean s"):
        ledger.site("s00")
    with pytest.raises(UnknownSite, match="'nowhere': not registered"):
        ledger.sites_named(["s1", "nowhere"])


def test_a_failed_site_is_marked_until_it_commits(ledger):
    ledger.set_status({"s0": "its segment is torn"})
    assert (ledger.site("s0").status, ledger.site("s0").reason) == ("failed", "its segment is torn")
    ledger.commit_shard(begin(ledger), [shard()], now=T0)
    assert ledger.site("s0").status == "active"


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
    assert ledger.ingested_at(["s0", "s1"]) == {"s0": T0}


def test_a_shard_commits_state_cursor_verdict_and_counters_together(ledger):
    cycle = begin(ledger)
    assert ledger.commit_shard(cycle, [shard(), shard("s1", evidence=HELD, slot=1)], now=T0) == []
    row, held = ledger.sites_named(["s0", "s1"])
    assert (row.learned, row.holds, held.holds) == (10, 0, 1)
    state = ledger.states([row.learner, None])[row.learner]
    assert (state.blob, state.slot, state.offset_from, state.offset_to) == ("b" * 64, 0, 0, 10)
    verdict = ledger.verdicts(cycle=cycle.id, site="s0")[0]
    assert (verdict.state, verdict.evidence, verdict.counters) == (state.id, GOOD, {"samples": 10})
    assert assess(GuardsConfig(), verdict.evidence) == verdict.verdict
    assert ledger.latest_verdicts()["s1"].verdict.outcome == "hold"


def test_a_repeated_commit_has_no_second_effect(ledger):
    cycle = begin(ledger)
    rows = [shard(), shard("s1", slot=1)]
    ledger.commit_shard(cycle, rows, now=T0)
    before = ledger.sites()
    assert ledger.commit_shard(cycle, rows, now=T0) == ["s0", "s1"]
    assert ledger.commit_shard(cycle, [shard("s2", start=5)], now=T0) == ["s2"]  # a hole in the stream
    assert ledger.sites() == before
    assert len(ledger.verdicts()) == 2


def test_a_failed_candidate_is_kept_but_not_learned_from(ledger):
    ledger.commit_shard(begin(ledger), [shard()], now=T0)
    good = ledger.site("s0").learner
    ledger.serve({"s0": (good, 1)}, rollout="r1", wave=1, kind="promote", reason="", now=T0)
    second = begin(ledger, now=T0 + timedelta(days=1), fingerprint="g")
    ledger.commit_shard(second, [shard(start=10, end=20, evidence=BAD)], now=T0)
    assert ledger.site("s0").learner == good
    assert ledger.site("s0").learned == 20
    assert ledger.latest_verdicts()["s0"].verdict.outcome == "fail"


@pytest.mark.parametrize("broken", ["_moved", "_verdict_values"])
def test_a_crash_before_the_commit_leaves_nothing(ledger, monkeypatch, broken):
    cycle = begin(ledger)
    real = getattr(verdicts, broken)

    def crash(row, *rest):
        if row.site == "s1":
            raise KeyboardInterrupt
        return real(row, *rest)

    monkeypatch.setattr(verdicts, broken, crash)
    with pytest.raises(KeyboardInterrupt):
        ledger.commit_shard(cycle, [shard(), shard("s1", slot=1)], now=T0)
    monkeypatch.undo()
    assert ledger.site("s0").learned == 0
    assert ledger.verdicts() == []
    assert ledger.states([state_id(cycle.id, "s0")]) == {}
    assert ledger.commit_shard(cycle, [shard(), shard("s1", slot=1)], now=T0) == []


def test_the_lease_is_one_for_the_fleet_and_its_generation_fences(ledger):
    first = begin(ledger)
    with pytest.raises(CycleBusy, match="running"):
        begin(ledger, holder="b")
    taken = begin(ledger, holder="b", dead=lambda holder: holder == "a")
    assert (taken.id, taken.generation, taken.resumed) == (first.id, first.generation + 1, True)
    for write in (
        lambda: ledger.commit_shard(first, [shard()], now=T0),
        lambda: ledger.commit_ingest(first, [segment()], [], now=T0),
        lambda: ledger.renew(first, now=T0),
        lambda: ledger.finish_cycle(first, summary={}, now=T0),
    ):
        with pytest.raises(StaleGeneration, match="was replaced; nothing was written"):
            write()
    assert ledger.site("s0").learned == 0
    ledger.finish_cycle(taken, summary={"sites": 1}, now=T0)
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


def test_sources_and_anchors(ledger):
    with pytest.raises(LedgerError, match="run `palisade train` first"):
        ledger.source()
    add = {"trunk": "t", "path": "p", "manifest": {"a": 1}, "lineage": "run", "now": T0}
    assert [ledger.add_source(d, **add) for d in ("d1", "d2", "d1")] == [1, 2, 1]
    assert ledger.source().version == 1
    ledger.set_champion(2, now=T0)
    assert (ledger.source().digest, ledger.source().manifest) == ("d2", {"a": 1})
    with pytest.raises(LedgerError, match="versions: 1, 2"):
        ledger.source(7)
    with pytest.raises(LedgerError, match="no anchor set"):
        ledger.anchor("t")
    ledger.pin_anchor("x", trunk="t", summary={}, now=T0)
    ledger.pin_anchor("y", trunk="t", summary={}, now=T0 + timedelta(seconds=1))
    assert ledger.anchor("t") == "y"


@pytest.mark.parametrize("damage, broken", [
    ("update audit set payload = '{}' where seq = 2", 2),
    ("update audit set at = '2020' where seq = 1", 1),
    ("delete from audit where seq = 2", 2),
    ("delete from audit where seq = 3", 3),
    ("update audit set seq = 9 where seq = 3", 3),
])  # fmt: skip
def test_the_audit_chain_shows_tampering(ledger, url, damage, broken):
    for i in range(3):
        ledger.note("test", {"i": i}, now=T0)
    assert ledger.broken_audit() is None
    assert [payload for _, _, kind, payload in ledger.audit() if kind == "test"] == [{"i": 0}, {"i": 1}, {"i": 2}]
    with sqlite3.connect(url.removeprefix("sqlite:///")) as raw:
        raw.execute(damage)
    raw.close()
    assert ledger.broken_audit() == broken


def test_newer_schema_missing_ledger_and_bad_urls_are_refused(ledger, url, tmp_path):
    with sqlite3.connect(url.removeprefix("sqlite:///")) as raw:
        raw.execute("update meta set value = '99' where key = 'schema'")
    raw.close()
    with pytest.raises(LedgerUnavailable, match="schema 99 is newer"):
        Ledger.open(url)
    with pytest.raises(LedgerUnavailable, match="no ledger there yet"):
        Ledger.open(f"sqlite:///{tmp_path}/none.db", create=False)
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(LedgerUnavailable, match="not a database URL"):
        Ledger.open("ledger.db")
    (tmp_path / "junk.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerUnavailable, match="cannot be opened"):
        Ledger.open(f"sqlite:///{tmp_path}/junk.db")


def test_a_thousand_sites_in_one_transaction(url):
    ledger = Ledger.open(url)
    names = [f"n{i}" for i in range(2500)]
    ledger.register_sites({s: {} for s in names}, now=T0)
    rows = [shard(s, slot=i) for i, s in enumerate(names)]
    assert ledger.commit_shard(begin(ledger), rows, now=T0) == []
    learners = [s.learner for s in ledger.sites_named(names)]
    assert len(ledger.states(learners)) == 2500
    changes = {s: (x, 1) for s, x in zip(names, learners, strict=True)}
    ledger.serve(changes, rollout="r", wave=1, kind="promote", reason="", now=T0)
    assert len(ledger.serving(names)) == 2500


WRITER = """
import sys
from datetime import UTC, datetime
from pipeline.ledger import Ledger
me, now = sys.argv[2], datetime(2026, 1, 1, tzinfo=UTC)
ledger = Ledger.open(sys.argv[1])
for i in range(60):
    ledger.register_sites({f"{me}{i}": {}}, now=now)
    ledger.note("writer", {"me": me, "i": i}, now=now)
    ledger.sites()
"""


def test_two_processes_write_the_same_file(url, tmp_path):
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    command = [sys.executable, str(script), url]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    running = [subprocess.Popen([*command, me], env=environment, stderr=subprocess.PIPE, text=True) for me in "ab"]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    ledger = Ledger.open(url, create=False)
    assert len(ledger.sites()) == 120
    assert len(ledger.audit()) == 120
    assert ledger.broken_audit() is None
