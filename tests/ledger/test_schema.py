"""From a stored ledger of version 1 to the newest schema, on both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from pipeline.ledger import SCHEMA, Ledger, LedgerUnavailable, schema
from tests.ledger.conftest import T0, begin, execute, segment, shard

VERSION_1 = (Path(__file__).parent / "version-1.sql").read_text()


@pytest.fixture
def old(url, tmp_path) -> str:
    """URL of a ledger of version 1."""
    serial = "INTEGER NOT NULL" if url.startswith("sqlite") else "SERIAL NOT NULL"
    (tmp_path / "deep").mkdir(exist_ok=True)
    execute(url, *(s for s in VERSION_1.replace("{serial}", serial).split(";\n") if s.strip()))
    return url


def shape(url):
    """Columns, keys and indexes of every table."""
    engine = sa.create_engine(url)
    try:
        found = sa.inspect(engine)
        return {
            t: (
                [(c["name"], repr(c["type"]), c["nullable"]) for c in found.get_columns(t)],
                found.get_pk_constraint(t)["constrained_columns"],
                sorted((i["name"], tuple(i["column_names"])) for i in found.get_indexes(t)),
            )
            for t in found.get_table_names()
        }
    finally:
        engine.dispose()


def content(url):
    tables = [t for t in shape(url) if t not in ("meta", "audit")]
    return {t: sorted(execute(url, f"select * from {t}"), key=repr) for t in tables}


def test_an_old_ledger_becomes_like_a_new_one_and_keeps_everything(old, url):
    before, chain = content(old), execute(old, "select * from audit order by seq")
    ledger = Ledger.open(old, create=False)
    assert content(old) == before
    assert execute(old, "select value from meta where key = 'schema'") == [(str(SCHEMA),)]
    assert execute(old, f"select * from audit where seq <= {len(chain)} order by seq") == chain
    added = ledger.audit()[len(chain) :]
    assert [(kind, payload) for _, _, kind, payload in added] == [
        ("schema", {"from": v - 1, "to": v}) for v in range(2, SCHEMA + 1)
    ]
    assert abs(added[0][1] - datetime.now(UTC)) < timedelta(minutes=5)
    assert ledger.broken_audit() is None
    upgraded = shape(old)
    tables = ", ".join(f'"{t}"' for t in upgraded)
    ledger.close()
    execute(url, *(f"drop table {t}" for t in tables.split(", ")))
    Ledger.open(url).close()
    assert shape(url) == upgraded


def test_an_upgraded_ledger_goes_on(old):
    ledger = Ledger.open(old)
    assert [s.site for s in ledger.sites()] == ["Zeta", "alpha"]
    assert ledger.pending(["Zeta", "alpha"]) == {
        "Zeta": (0, T0 + timedelta(days=1)),
        "alpha": (9, T0 + timedelta(days=1)),
    }
    assert ledger.outcomes() == {"Zeta": "pass", "alpha": "hold"}
    assert ledger.latest_verdicts()["Zeta"].verdict.outcome == "pass"
    cycle = begin(ledger, now=T0 + timedelta(days=2))
    assert (cycle.id, cycle.resumed) == ("cycle-00002", True)
    assert ledger.commit_shard(cycle, [shard("alpha", 10, 20), shard("Zeta", 20, 20)], now=T0) == ["Zeta"]
    ledger.commit_ingest(cycle, [segment("alpha", "segment-3.parquet", 20)], [], now=T0)
    ledger.finish_cycle(cycle, summary={}, now=T0)
    assert ledger.broken_audit() is None
    ledger.close()


def test_an_upgrade_that_dies_leaves_the_old_version_whole(old, monkeypatch):
    before, looked, chain = content(old), shape(old), execute(old, "select * from audit")
    real = schema.STEPS[2]
    for done in (0, len(real) // 2, len(real)):
        monkeypatch.setitem(schema.STEPS, 2, (*real[:done], "create index broken on no_such_table (x)", *real[done:]))
        with pytest.raises(LedgerUnavailable, match="cannot be opened: .*no_such_table"):
            Ledger.open(old)
        assert shape(old) == looked
    assert (content(old), execute(old, "select * from audit")) == (before, chain)
    assert execute(old, "select value from meta where key = 'schema'") == [("1",)]
    monkeypatch.undo()
    ledger = Ledger.open(old)
    assert ledger.broken_audit() is None
    ledger.close()


def test_a_newer_schema_is_refused_and_left_alone(ledger, url):
    execute(url, f"update meta set value = '{SCHEMA + 1}' where key = 'schema'")
    with pytest.raises(LedgerUnavailable, match=f"schema {SCHEMA + 1} is newer than this version's {SCHEMA}; upgrade"):
        Ledger.open(url)
    assert execute(url, "select value from meta where key = 'schema'") == [(str(SCHEMA + 1),)]


def test_there_is_a_step_to_every_version():
    assert sorted(schema.STEPS) == list(range(2, SCHEMA + 1))
