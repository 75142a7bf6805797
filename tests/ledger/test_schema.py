"""From a stored ledger of version 1 to the newest schema, on both databases."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from pipeline.control.rollout import load
from pipeline.ledger import SCHEMA, Ledger, LedgerUnavailable, schema
from pipeline.rollout import Excluded, Observation, Pointer, Target, WaveObservation, advance, approvers
from tests.support.ledgers import T0, begin, execute, segment, shard
from tests.support.old_ledgers import write_old_ledger

LEARNED = "2547247271efa6de"  # Zeta's state


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


def test_an_old_ledger_keeps_everything(old):
    before, chain = content(old), execute(old, "select * from audit order by seq")
    ledger = Ledger.open(old, create=False)
    after = content(old)
    assert [r[:-1] for r in after.pop("served")] == before.pop("served")
    assert after.pop("targets") == [("release-00001", "Zeta", 0, "UTC", LEARNED, 1, LEARNED, 1, "", "")]
    counted = [(*r[:7], *r[8:], *window(json.loads(r[7]))) for r in before.pop("verdicts")]
    assert after.pop("verdicts") == counted
    assert after == {**before, "notices": [], "source_verdicts": [], "label_files": [], "labels": []}
    assert execute(old, "select value from meta where key = 'schema'") == [(str(SCHEMA),)]
    assert execute(old, f"select * from audit where seq <= {len(chain)} order by seq") == chain
    added = ledger.audit.rows()[len(chain) :]
    assert [(kind, payload) for _, _, kind, payload in added] == [
        ("schema", {"from": v - 1, "to": v}) for v in range(2, SCHEMA + 1)
    ]
    assert abs(added[0][1] - datetime.now(UTC)) < timedelta(minutes=5)
    assert ledger.audit.first_broken() is None
    ledger.close()


def window(counters):
    """The columns of a verdict's window that version 1 counted; the others are null."""
    return counters["samples"], counters["outcomes"], *[None] * 11


@pytest.mark.parametrize("version", range(1, SCHEMA))
def test_an_upgraded_ledger_has_the_shape_of_a_new_one(url, version):
    write_old_ledger(url, version)
    assert execute(url, "select value from meta where key = 'schema'") == [(str(version),)]
    Ledger.open(url, create=False).close()
    upgraded = shape(url)
    execute(url, *(f'drop table "{t}"' for t in upgraded))
    Ledger.open(url).close()
    assert shape(url) == upgraded


def body_2(now):
    """A rollout as version 2 wrote it: one site failed in its first wave, the second has not begun."""
    to = {
        s: {
            "to": {"state_id": f"{s}-state", "source_version": 3},
            "back": {"state_id": None, "source_version": 3},
            "verdict_id": f"{s}-state",
        }
        for s in ("a", "b", "c")
    }
    config = {
        "waves": [0.5, 1.0],
        "stage_seconds": 60.0,
        "bake_seconds": 90.0,
        "hold_seconds": 86400.0,
        "expire_seconds": 86400.0,
        "rollback_seconds": 300.0,
        "abort_share": 0.02,
        "abort_min_sites": 5,
        "missing_share": 0.0,
        "control_share": 0.05,
        "control_min_sites": 10,
        "health_samples": 50,
        "stratum": "rig",
        "seed": 0,
    }
    return {
        "plan": {
            "release": "release-00002",
            "targets": to,
            "controls": ["k"],
            "waves": [
                {"share": 0.5, "sites": ["b"], "abort_at": 1},
                {"share": 1.0, "sites": ["a", "c"], "abort_at": 2},
            ],
            "excluded": {
                "d": {"reason": "verdict hold: n", "verdict_id": "v0"},
                "e": {"reason": "no candidate", "verdict_id": None},
            },
            "duration_seconds": 300.0,
            "rollback_seconds": 300.0,
            "config": config,
        },
        "plan_hash": "4" * 64,
        "status": "baking",
        "wave": 0,
        "since": now,
        "baked_from": now,
        "failed": ["b"],
        "approved_by": "ann",
        "reason": "",
    }


def test_a_rollout_of_an_older_version_goes_on(old):
    body = json.dumps(body_2(T0.isoformat()))
    values = f"'release-00002', '{'4' * 64}', 'baking', '{body}', 7, '2026-01-02', '2026-01-02'"
    execute(old, f"insert into rollouts values ({values})")
    ledger = Ledger.open(old)
    row = ledger.plans.rollout("release-00002")
    r = load(row)
    assert (r.status, r.wave, r.failed, approvers(r), r.plan_hash) == (
        "baking",
        0,
        {"b": 0},
        {"ann"},
        row.plan_hash,
    )
    assert [(w.sites, w.share, w.abort_at) for w in r.plan.waves] == [(1, 0.5, 1), (2, 1.0, 2)]
    assert (r.plan.config.bake_seconds, r.plan.config.strata) == (90, ("rig",))
    assert ledger.plans.targets(row.id) == {
        s: Target(w, Pointer(f"{s}-state", 3), Pointer(None, 3), f"{s}-state")
        for s, w in (("a", 1), ("b", 0), ("c", 1))
    }
    assert ledger.plans.excluded(row.id) == {
        "d": Excluded("verdict hold: n", "v0"),
        "e": Excluded("no candidate"),
    }
    seen, later = Observation(waves=(WaveObservation(sites=0),)), T0 + timedelta(seconds=90)
    assert advance(r, seen, later)[0].reason == "1 of 1 sites of wave 1 fail; 1 abort"
    after, actions = advance(r.model_copy(update={"failed": {}}), seen, later)
    assert (after.wave, after.status, [a.kind for a in actions]) == (1, "staging", ["promote"])
    assert ledger.releases.verify() == []
    ledger.close()


@pytest.mark.parametrize(
    "harm",
    [
        "update served set state = null",
        "delete from served",
        "insert into served select site, 2, state, source_version, rollout, wave, kind, since, 0 from served",
    ],
)
def test_what_an_older_version_recorded_stays_covered(old, harm):
    ledger = Ledger.open(old)
    assert ledger.releases.verify() == []
    execute(old, harm)
    assert ledger.releases.verify() != []
    ledger.close()


def test_an_upgraded_ledger_goes_on(old):
    ledger = Ledger.open(old)
    assert [s.site for s in ledger.streams.sites()] == ["Zeta", "alpha"]
    assert ledger.streams.pending(["Zeta", "alpha"]) == {
        "Zeta": (0, T0 + timedelta(days=1)),
        "alpha": (9, T0 + timedelta(days=1)),
    }
    assert ledger.verdicts.outcomes() == {"Zeta": "pass", "alpha": "hold"}
    assert ledger.verdicts.latest()["Zeta"].verdict.outcome == "pass"
    cycle = begin(ledger, now=T0 + timedelta(days=2))
    assert (cycle.id, cycle.resumed) == ("cycle-00002", True)
    assert ledger.verdicts.commit(cycle, [shard("alpha", 10, 20), shard("Zeta", 20, 20)], now=T0) == ["Zeta"]
    ledger.streams.commit(cycle, [segment("alpha", "segment-3.parquet", 20)], [], now=T0)
    ledger.cycles.finish(cycle, summary={}, now=T0)
    assert ledger.audit.first_broken() is None
    ledger.close()


def test_an_upgrade_that_dies_leaves_the_old_version_whole(old, monkeypatch):
    before, looked, chain = content(old), shape(old), execute(old, "select * from audit")
    real = schema.STEPS[2]
    for done in (0, len(real) // 2, len(real)):
        monkeypatch.setitem(
            schema.STEPS, 2, (*real[:done], "create index broken on no_such_table (x)", *real[done:])
        )
        with pytest.raises(LedgerUnavailable, match="cannot be opened: .*no_such_table"):
            Ledger.open(old)
        assert shape(old) == looked
    assert (content(old), execute(old, "select * from audit")) == (before, chain)
    assert execute(old, "select value from meta where key = 'schema'") == [("1",)]
    monkeypatch.undo()
    ledger = Ledger.open(old)
    assert ledger.audit.first_broken() is None
    ledger.close()


def test_a_newer_schema_is_refused_and_left_alone(ledger, url):
    execute(url, f"update meta set value = '{SCHEMA + 1}' where key = 'schema'")
    with pytest.raises(
        LedgerUnavailable, match=f"schema {SCHEMA + 1} is newer than this version's {SCHEMA}; upgrade"
    ):
        Ledger.open(url)
    assert execute(url, "select value from meta where key = 'schema'") == [(str(SCHEMA + 1),)]


def test_there_is_a_step_to_every_version():
    assert sorted(schema.STEPS) == list(range(2, SCHEMA + 1))
