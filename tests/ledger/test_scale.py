"""A chunk of sites costs the same in any fleet after any past, counted in steps of SQLite's machine."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import event

from pipeline.ledger import Ledger
from tests.support.ledgers import HELD, T0, begin, segment, shard

CHUNK = 64
EVERY = 10  # steps between two counts
TABLES = {
    "sites",
    "segments",
    "quarantine",
    "states",
    "verdicts",
    "served",
    "cycles",
    "audit",
    "rollouts",
    "row",
    "v",
}  # and what they are called where a statement reads one twice


class Watched:
    """A ledger whose statements and steps are counted."""

    def __init__(self, url):
        self.ledger, self.steps, self.statements = Ledger.open(url), 0, []
        event.listen(self.ledger.store.engine, "before_cursor_execute", self._saw)
        event.listen(
            self.ledger.store.engine, "connect", lambda c, _: c.set_progress_handler(self._tick, EVERY)
        )
        self.ledger.close()

    def _tick(self):
        self.steps += EVERY
        return 0

    def _saw(self, connection, cursor, statement, parameters, context, many):
        self.statements.append((statement, parameters[0] if many else parameters))

    def cost(self, work):
        self.steps, self.statements = 0, []
        work()
        return self.steps


def grown(path, sites, windows):
    """A fleet with ``windows`` behind it in the middle of a cycle; the last CHUNK sites wait for it."""
    w = Watched(f"sqlite:///{path}")
    names = [f"site-{i:05d}" for i in range(sites)]
    w.ledger.streams.register({s: {} for s in names}, now=T0)
    for k in range(windows + 1):
        cycle = begin(w.ledger, now=T0 + timedelta(days=k))
        rows = [segment(s, f"segment-{k:03d}.parquet", 10 * k) for s in names]
        w.ledger.streams.commit(cycle, rows, [], now=T0 + timedelta(days=k))
        who = names if k < windows else names[:-CHUNK]
        made = [shard(s, 10 * k, 10 * k + 10, evidence=HELD, slot=i) for i, s in enumerate(who)]
        w.ledger.verdicts.commit(cycle, made, now=T0 + timedelta(days=k))
        if k < windows:
            w.ledger.cycles.finish(cycle, summary={}, now=T0)
            changes = dict.fromkeys(names, (None, 1))
            w.ledger.releases.serve(changes, rollout=f"r{k}", wave=1, kind="rollback", reason="", now=T0)
    return w, cycle, names[-CHUNK:], 10 * windows


def hot_path(w, cycle, part, at):
    """What a chunk of sites needs in a cycle, by name."""
    ledger, more = w.ledger, at + 10
    learners = [s.learner for s in ledger.streams.named(part)]
    return {
        "sites_named": lambda: ledger.streams.named(part),
        "serving": lambda: ledger.releases.serving(part),
        "pending": lambda: ledger.streams.pending(part),
        "states": lambda: ledger.verdicts.states(learners),
        "commit_shard": lambda: ledger.verdicts.commit(cycle, [shard(s, at, more) for s in part], now=T0),
        "commit_shard again": lambda: ledger.verdicts.commit(
            cycle, [shard(s, at, more) for s in part], now=T0
        ),
        "commit_ingest": lambda: ledger.streams.commit(
            cycle, [segment(s, "new.parquet", more) for s in part], [], now=T0
        ),
        "commit_ingest again": lambda: ledger.streams.commit(
            cycle, [segment(s, "new.parquet", more) for s in part], [], now=T0
        ),
        "set_status": lambda: ledger.streams.set_status(dict.fromkeys(part, "torn")),
        "register_sites": lambda: ledger.streams.register({s: {} for s in part}, now=T0),
        "renew": lambda: ledger.cycles.renew(cycle, now=T0),
        "serve": lambda: ledger.releases.serve(
            dict.fromkeys(part, (None, 1)), rollout="x", wave=1, kind="rollback", reason="", now=T0
        ),
    }


@pytest.fixture(scope="module")
def fleets(tmp_path_factory):
    """The same past on a small fleet, on one ten times as large, and a past four times as long."""
    folder = tmp_path_factory.mktemp("fleets")
    return [grown(folder / f"{n}-{k}.db", n, k) for n, k in ((200, 2), (2000, 2), (200, 8))]


def test_a_chunk_costs_the_same_in_any_fleet_after_any_past(fleets):
    small, large, long = (
        {name: w.cost(do) for name, do in hot_path(w, *rest).items()} for w, *rest in fleets
    )
    assert len(small) == 12 and all(v > EVERY for k, v in small.items())
    assert {k: v for k, v in large.items() if v > 1.1 * small[k]} == {}
    assert {k: v for k, v in long.items() if v > 1.1 * small[k]} == {}


def test_no_statement_on_the_hot_path_reads_a_whole_table(fleets):
    w, *rest = fleets[0]
    for name, do in hot_path(w, *rest).items():
        w.cost(do)
        for statement, parameters in list(w.statements):
            if statement.startswith(("SELECT", "UPDATE", "INSERT")):
                with w.ledger.store.engine.connect() as c:
                    plan = c.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
                read = {str(r[-1]).split()[1] for r in plan if str(r[-1]).startswith("SCAN")}
                assert not read & TABLES, (name, statement, plan)
