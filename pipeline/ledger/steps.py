"""The upgrade steps from schema 1 to the newest: statements and conversions, in order, one tuple per version.

A step is frozen: it never follows later changes of ``tables``. Version 1 is the first release's schema. A
statement names the type of a text or float column ``{text}`` or ``{double}``, which differ between the
databases.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection

WINDOW_4 = (
    *("samples", "outcomes_blob", "row_start", "row_end", "anchor_digest", "champion_state", "lost_state"),
    *("accepted_bona_fide", "accepted_attack", "called_bona_fide_share", "restores", "omega", "sessions"),
)
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


PAGE = 5000  # verdicts converted by one statement


def _plans_to_rows(c: Connection) -> None:
    """Moves the sites of every plan from the rollout's JSON to rows of ``targets``, and shortens the JSON to
    version 3's.

    Each site keeps the states it may serve and go back to, so an unfinished rollout goes on or is taken back
    as any other.
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
    """Returns the state of a version 2 rollout as version 3 writes it; the plan keeps the hash that people
    approved.
    """
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
    """Gives every text column of Postgres the collation that SQLite has anyway."""
    if c.dialect.name != "postgresql":
        return
    for table in TABLES_1:
        columns = [
            col["name"] for col in sa.inspect(c).get_columns(table) if isinstance(col["type"], sa.Text)
        ]
        changes = ", ".join(f'alter column "{name}" type text collate "C"' for name in columns)
        c.exec_driver_sql(f'alter table "{table}" {changes}')


def _counters_to_columns(c: Connection) -> None:
    """Moves the counters of every verdict from their JSON to columns; a counter that an early version did not
    keep is null.
    """
    update = sa.text(f"update verdicts set {', '.join(f'{n} = :{n}' for n in WINDOW_4)} where id = :id")
    page = sa.text("select id, counters from verdicts where id > :after order by id limit :page")
    after = ""
    while rows := c.execute(page, {"after": after, "page": PAGE}).all():
        c.execute(update, [{"id": r.id, **_window_4(json.loads(r.counters))} for r in rows])
        after = rows[-1].id


def _window_4(counters: dict[str, Any]) -> dict[str, object]:
    start, end = counters.get("rows") or (None, None)
    return {
        **{name: counters.get(name) for name in WINDOW_4},
        "samples": counters.get("samples", 0),
        "outcomes_blob": counters.get("outcomes"),
        "row_start": start,
        "row_end": end,
        "anchor_digest": counters.get("anchor"),
        "champion_state": counters.get("stable"),
        "lost_state": counters.get("lost"),
    }


def _source_verdicts_to_table(c: Connection) -> None:
    """Moves verdicts on bare source models out of ``verdicts``, where they were rows of a site ``*`` at
    offset = version.
    """
    columns = "id, offset_to as version, outcome, verdict, evidence, counters, at"
    old = f"select {columns} from verdicts where site = '*'"
    new = sa.text(
        "insert into source_verdicts (id, version, outcome, verdict, evidence, guards, at) "
        "values (:id, :version, :outcome, :verdict, :evidence, :guards, :at)"
    )
    for r in c.exec_driver_sql(old).all():
        guards = json.loads(r.counters).get("guards")
        text = json.dumps(guards, sort_keys=True, separators=(",", ":")) if guards else None
        c.execute(new, {**{k: v for k, v in r._mapping.items() if k != "counters"}, "guards": text})
    c.exec_driver_sql("delete from verdicts where site = '*'")


STEPS: dict[int, tuple[str | Callable[[Connection], None], ...]] = {
    2: (  # a chunk of sites costs the same however large the fleet and its history are
        _order_by_code_point,
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
        "create table served (site {text} not null, counter bigint not null, state {text}, "
        "source_version bigint not null, "
        "rollout {text} not null, wave bigint not null, kind {text} not null, since {text} not null, "
        "audit bigint default '0' not null, primary key (site, counter)){clustered}",
        "insert into served select site, counter, state, source_version, rollout, wave, kind, since, 0 "
        "from served_2",
        "drop table served_2",
        "create table targets (rollout {text} not null, site {text} not null, wave bigint not null, "
        "zone {text} not null, "
        "state {text}, source_version bigint not null, back_state {text}, back_version bigint not null, "
        "verdict {text} not null, reason {text} not null, primary key (rollout, site)){clustered}",
        "create index targets_wave on targets (rollout, wave, site)",
        "create table notices (key {text} not null, severity {text} not null, text {text} not null, "
        "first_at {text} not null, last_at {text} not null, count bigint not null, sent_at {text}, "
        "primary key (key))",
        _plans_to_rows,
    ),
    4: (  # a verdict's window is columns, a verdict on a source model is no row of a site
        "alter table sites rename column ingested to ingested_offset",
        "alter table sites rename column learned to learned_offset",
        "create table source_verdicts (id {text} not null, version bigint not null, outcome {text} not null, "
        "verdict {text} not null, evidence {text} not null, guards {text}, at {text} not null, "
        "primary key (id))",
        _source_verdicts_to_table,
        "alter table verdicts add column samples bigint default '0' not null",
        "alter table verdicts add column outcomes_blob {text}",
        "alter table verdicts add column row_start bigint",
        "alter table verdicts add column row_end bigint",
        "alter table verdicts add column anchor_digest {text}",
        "alter table verdicts add column champion_state {text}",
        "alter table verdicts add column lost_state {text}",
        "alter table verdicts add column accepted_bona_fide bigint",
        "alter table verdicts add column accepted_attack bigint",
        "alter table verdicts add column called_bona_fide_share {double}",
        "alter table verdicts add column restores bigint",
        "alter table verdicts add column omega {double}",
        "alter table verdicts add column sessions bigint",
        _counters_to_columns,
        "alter table verdicts drop column counters",
    ),
    5: (  # what people know of presentations, with who says so; nothing of it is ever deleted
        "create table label_files (site {text} not null, name {text} not null, sha256 {text} not null, "
        "rows bigint not null, good bigint not null, cycle {text} not null, recorded_at {text} not null, "
        "primary key (site, name))",
        "create table labels (site {text} not null, sample_id {text} not null, file {text} not null, "
        "label bigint not null, instrument {text} not null, kind {text} not null, who {text} not null, "
        'labelled_at {text} not null, recorded_at {text} not null, "offset" bigint, role {text}, '
        "retracted_at {text}, "
        "retracted_by {text}, retracted_why {text}, primary key (site, sample_id, file))",
    ),
}
