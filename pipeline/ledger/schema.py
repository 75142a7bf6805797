"""Which schema a database has, and the steps that bring an older one up to this version's.

A step is frozen SQL: it never follows later changes of ``tables``. Version 1 is what the first release wrote.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pipeline.ledger.tables import facts, meta

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

SCHEMA = 3
GENESIS = "0" * 64  # what the first audit row names as the one before it
STEPS: dict[int, tuple[str, ...]] = {
    2: (  # a chunk of sites costs the same however large the fleet and its history are
        "create index segments_offset on segments (site, base_offset, ingested_at, good)",
        "create index quarantine_cycle on quarantine (cycle)",
        "drop index states_site",
        "create index states_created on states (created_at)",
        "drop index verdicts_site",
        "create index verdicts_site on verdicts (site, offset_to, at)",
        "drop index verdicts_cycle",
        "create index verdicts_cycle on verdicts (cycle, site, outcome)",
        "create index verdicts_at on verdicts (at)",
    ),
    3: (  # a plan is rows, a promotion one statement, and its audit row covers the rows that it made
        "alter table served rename to served_2",
        "create table served (site {text} not null, counter bigint not null, state {text}, source_version bigint not null, "
        "rollout {text} not null, wave bigint not null, kind {text} not null, since {text} not null, "
        "audit bigint default '0' not null, primary key (site, counter)){clustered}",
        "insert into served select site, counter, state, source_version, rollout, wave, kind, since, 0 from served_2",
        "drop table served_2",
        "create table targets (rollout {text} not null, site {text} not null, wave bigint not null, zone {text} not null, "
        "state {text}, source_version bigint not null, back_state {text}, back_version bigint not null, "
        "verdict {text} not null, reason {text} not null, primary key (rollout, site)){clustered}",
        "create index targets_wave on targets (rollout, wave, site)",
        "create table notices (key {text} not null, severity {text} not null, text {text} not null, "
        "first_at {text} not null, last_at {text} not null, count bigint not null, sent_at {text}, primary key (key))",
    ),
}
TABLES_1 = (
    "meta",
    "sites",
    "segments",
    "quarantine",
    "states",
    "verdicts",
    "cycles",
    "anchors",
    "sources",
    "served",
    "rollouts",
    "audit",
)
LOCK = 0x70616C69  # Postgres takes a number


def version(c: Connection) -> int | None:
    """The schema that the database has, None where there is none."""
    if not sa.inspect(c).has_table("meta"):
        return None
    return int(c.scalar(sa.select(facts.c.value).where(facts.c.key == "schema")) or 0)


def lock(c: Connection) -> None:
    """Be the only one who creates or upgrades, until the transaction ends; SQLite has one writer anyway."""
    if c.dialect.name == "postgresql":
        c.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))


def create(c: Connection) -> None:
    """The newest schema, empty."""
    meta.create_all(c)
    c.execute(
        facts.insert(), [{"key": "schema", "value": str(SCHEMA)}, {"key": "audit_head", "value": GENESIS}]
    )


def step(c: Connection, to: int) -> None:
    """From version ``to`` - 1 to ``to``, within the caller's transaction."""
    if to == 2 and c.dialect.name == "postgresql":
        _order_by_code_point(c)
    postgres = c.dialect.name == "postgresql"
    text, clustered = 'text collate "C"' if postgres else "text", "" if postgres else " without rowid"
    for statement in STEPS[to]:
        c.exec_driver_sql(statement.format(text=text, clustered=clustered))
    if to == 3:
        _plans_to_rows(c)
    c.execute(facts.update().where(facts.c.key == "schema").values(value=str(to)))


def _plans_to_rows(c: Connection) -> None:
    """Version 2 had the whole plan in the rollout's JSON: its sites become rows, and the rest what version 3 keeps of it.

    Nothing of what each site may serve and go back to is lost, so a rollout of then goes on, or is taken back, as any other.
    """
    for row in c.exec_driver_sql("select id, body from rollouts").all():
        body = json.loads(row.body)
        plan = body.get("plan", {})
        waves = {s: i for i, w in enumerate(plan.get("waves", [])) for s in w["sites"]}
        for site, target in plan.get("targets", {}).items():
            to, back = target["to"], target.get("back") or target["to"]
            _insert(
                c,
                {
                    "rollout": row.id,
                    "site": site,
                    "wave": waves.get(site, 0),
                    "zone": "UTC",
                    "state": to["state_id"],
                    "source_version": to.get("source_version", 1),
                    "back_state": back["state_id"],
                    "back_version": back.get("source_version", 1),
                    "verdict": target.get("verdict_id", ""),
                    "reason": "",
                },
            )
        for site, why in plan.get("excluded", {}).items():
            _insert(
                c,
                {
                    "rollout": row.id,
                    "site": site,
                    "wave": -1,
                    "zone": "UTC",
                    "state": None,
                    "source_version": 0,
                    "back_state": None,
                    "back_version": 0,
                    "verdict": why.get("verdict_id") or "",
                    "reason": why["reason"],
                },
            )
        if "config" in plan:
            c.execute(
                sa.text("update rollouts set body = :body where id = :id"),
                {"id": row.id, "body": json.dumps(_body_3(body, waves))},
            )


def _insert(c: Connection, values: dict[str, object]) -> None:
    c.execute(
        sa.text(f"insert into targets ({', '.join(values)}) values ({', '.join(f':{k}' for k in values)})"),
        values,
    )


def _body_3(body: dict[str, Any], waves: dict[str, int]) -> dict[str, object]:
    """The memory of a version 2 rollout as version 3 writes it; the plan's hash stays that which people approved."""
    plan = body["plan"]
    versions = sorted({t["to"]["source_version"] for t in plan["targets"].values()}) or [1]
    stratum = plan["config"].get("stratum")
    config = {k: v for k, v in plan["config"].items() if k != "stratum"}
    config |= {"strata": [stratum] if stratum else [], "health_presentations": 0, "two_people_from": None}
    kept = {k: body[k] for k in ("plan_hash", "status", "wave", "since", "baked_from", "reason") if k in body}
    who = body.get("approved_by")
    return {
        **kept,
        "failed": {s: waves[s] for s in body.get("failed", [])},
        "approvals": [{"who": who, "at": body["since"]}] if who else [],
        "plan": {
            **{k: plan[k] for k in ("release", "duration_seconds", "rollback_seconds")},
            "waves": [
                {"share": w["share"], "sites": len(w["sites"]), "abort_at": w["abort_at"]}
                for w in plan["waves"]
            ],
            "source_version": versions[-1],
            "source_before": versions[-1],
            "zones": ["UTC"],
            "roster": "",
            "controls": len(plan["controls"]),
            "excluded": len(plan["excluded"]),
            "config": config,
        },
    }


def _order_by_code_point(c: Connection) -> None:
    for table in TABLES_1:
        columns = [
            col["name"] for col in sa.inspect(c).get_columns(table) if isinstance(col["type"], sa.Text)
        ]
        changes = ", ".join(f'alter column "{name}" type text collate "C"' for name in columns)
        c.exec_driver_sql(f'alter table "{table}" {changes}')
