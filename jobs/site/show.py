"""``palisade site``: lists, shows, explains and tags sites, takes them out of service and back."""

from __future__ import annotations

import csv
import getpass
import re
from collections import Counter
from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.control.deployment import now, open_ledger
from pipeline.guards.why import why
from pipeline.rollout.calendar import is_time_zone
from pipeline.types import Label, Modality

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime
    from pathlib import Path

    from rich.table import Table

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger, SegmentRow, ServingRow, VerdictRow

TAG = re.compile(r"[a-z][a-z0-9_]{0,31}")
MODALITIES = tuple(m.name.lower() for m in Modality)
LABELS = ("kind", "label", "instrument", "who", "role", "count")  # columns; role: teach or judge


def list_sites(config: Config, terminal: Terminal) -> int:
    """Shows every site in one line."""
    ledger = open_ledger(config, create=False)
    latest, serving = ledger.verdicts.latest(), ledger.releases.serving()
    rows: list[list[object]] = []
    listed: list[dict[str, object]] = []
    for row in ledger.streams.sites():
        verdict, served = latest.get(row.site), serving.get(row.site)
        outcome = verdict.outcome if verdict else None
        rows.append(
            [
                row.site,
                row.status,
                row.learned_offset,
                outcome,
                serving_name(ledger, served),
                served.wave if served else None,
            ]
        )
        listed.append(
            {
                "site": row.site,
                "status": row.status,
                "reason": row.reason,
                "offset": row.learned_offset,
                "verdict": outcome,
                "serving": serving_name(ledger, served),
                "wave": served.wave if served else None,
            }
        )
    terminal.result(
        {"sites": listed}, table("sites", ["site", "status", "offset", "verdict", "serves", "wave"], rows)
    )
    return Exit.DONE


def show(config: Config, terminal: Terminal, *, site: str) -> int:
    """Shows the stream, the quarantine and the verdicts of one site."""
    ledger = open_ledger(config, create=False)
    row = ledger.streams.site(site)
    segments, verdicts = ledger.streams.segments(site), ledger.verdicts.find(site=site)
    reasons = Counter(q.reason for q in ledger.streams.quarantined(site))
    status = f"{row.status}: {row.reason}" if row.reason else row.status
    labels = Counter(
        (x.kind, Label(x.label).name.lower(), x.instrument, x.who, x.role or "")
        for x in ledger.labels.of([site])[site].values()
    )
    head = f"{site}: {status}; stream at offset {row.ingested_offset}, adapted to {row.learned_offset}"
    terminal.result(
        {
            "site": site,
            "status": row.status,
            "reason": row.reason,
            "ingested": row.ingested_offset,
            "learned": row.learned_offset,
            "segments": [vars(s) for s, _ in segments],
            "quarantine": dict(reasons),
            "labels": [
                dict(zip(LABELS, (*what[:4], what[4] or None, n), strict=True))
                for what, n in sorted(labels.items())
            ],
            "verdicts": [
                {"cycle": v.cycle, "outcome": v.outcome, "reason": v.verdict.decisive} for v in verdicts
            ],
        },
        head,
        *_site_tables(segments, reasons, labels, verdicts),
    )
    return Exit.DONE


def _site_tables(
    segments: Sequence[tuple[SegmentRow, datetime]],
    reasons: Counter[str],
    labels: Counter[tuple[str, str, str, str, str]],
    verdicts: Sequence[VerdictRow],
) -> list[Table]:
    """Returns the tables of segments, of reasons for refusals and labels (if any), and of verdicts."""
    segment_rows = [
        [s.name, f"{s.base_offset}–{s.base_offset + s.rows}", s.good, s.quarantined, f"{at:%Y-%m-%d %H:%M}"]
        for s, at in segments
    ]
    verdict_rows = [
        [v.cycle, f"{v.offset_from}–{v.offset_to}", v.window.samples, v.outcome, v.verdict.decisive]
        for v in verdicts
    ]
    tables = [table("segments", ["segment", "offsets", "good", "refused", "ingested"], segment_rows)]
    if reasons:
        tables.append(table("refused", ["reason", "count"], [[r, n] for r, n in reasons.most_common()]))
    if labels:
        rows = [[*what[:4], what[4] or "no capture yet", n] for what, n in sorted(labels.items())]
        tables.append(table("labels", LABELS, rows))
    return [*tables, table("verdicts", ["cycle", "offsets", "samples", "verdict", "why"], verdict_rows)]


def explain(config: Config, terminal: Terminal, *, site: str) -> int:
    """Shows the chain behind what the site serves: source version → window → candidate → verdict → wave."""
    ledger = open_ledger(config, create=False)
    ledger.streams.site(site)
    served = ledger.releases.serving([site]).get(site)
    source = ledger.sources.get(served.source_version if served else None)
    manifest = source.manifest
    since = f" since {served.since:%Y-%m-%d %H:%M:%S} UTC, release {served.counter}" if served else ""
    steps: list[tuple[str, str]] = [
        ("serves", serving_name(ledger, served) + since),
        (
            "source",
            f"v{source.version} {source.digest[:12]} ({manifest.method} on {', '.join(manifest.domains)})",
        ),
        ("lineage", f"MLflow run {source.lineage}"),
    ]
    state = ledger.verdicts.state(served.state) if served else None
    if state:
        verdict = ledger.verdicts.find(ids=[state.id])[0]
        steps += [
            (
                "window",
                f"offsets {state.offset_from}–{state.offset_to}, {verdict.window.samples} samples, "
                f"cycle {state.cycle}",
            ),
            (
                "candidate",
                f"{state.id} by {state.method}, blob {state.blob[:12]} slot {state.slot}, "
                f"parent {state.parent or 'source'}",
            ),
            ("because", why(verdict.evidence)),
            ("verdict", f"{verdict.outcome} at {verdict.at:%Y-%m-%d %H:%M:%S} UTC: {_findings(verdict)}"),
        ]
    if served:
        steps.append(("wave", _wave(ledger, served)))
    last = ledger.verdicts.find(site=site)[-1:]
    if last and (state is None or last[0].state != state.id):
        reason = last[0].verdict.decisive or "not released yet"
        steps.append(("newest", f"candidate of {last[0].cycle}: {last[0].outcome}: {reason}"))
        steps.append(("newest, because", why(last[0].evidence)))
    elif not last:
        steps.append(("newest", "no cycle has adapted this site yet"))
    history = [_release(s) for s in ledger.releases.history(site)]
    terminal.result(
        {"site": site, **dict(steps), "history": history},
        table(f"why {site} serves what it serves", ["", ""], steps),
        *history,
    )
    return Exit.DONE


def tag(
    config: Config, terminal: Terminal, *, site: str | None, pairs: Sequence[str], file: Path | None
) -> int:
    """Gives tags to a site, or to the sites of a CSV ``file``; changes all of them or, on an error, none."""
    if (site is None) == (file is None) or (site is not None and not pairs):
        raise ValueError(
            "site tag: write either SITE key=value …, or --from FILE.csv with a column site and one per tag"
        )
    changes = {site: _tags([p.partition("=") for p in pairs], site)} if site is not None else {}
    if file is not None:
        changes = dict(_listed(file))
    changed = open_ledger(config, create=False).streams.set_tags(changes, now=now())
    terminal.result(
        {"changed": changed, "given": len(changes)},
        f"{len(changed)} of {len(changes)} sites have other tags now",
    )
    return Exit.DONE


def retire(config: Config, terminal: Terminal, *, site: str, reason: str, retired: bool) -> int:
    """Takes a site out of service, or back into it."""
    if not reason.strip():
        raise ValueError("site: an empty --reason says nothing to an auditor; say why")
    who = getpass.getuser()
    changed = open_ledger(config, create=False).streams.set_retired(
        site, retired=retired, reason=f"{who}: {reason}", now=now()
    )
    state = "retired: no release plans it or waits for it" if retired else "back in service"
    terminal.result({"site": site, "retired": retired, "changed": changed}, f"{site} is {state}")
    return Exit.DONE


def serving_name(ledger: Ledger, served: ServingRow | None) -> str:
    """Returns the name of the state or source model that a site serves."""
    if served is None:
        return "source (never released to)"
    return f"state {served.state}" if served.state else f"source v{served.source_version}"


def _findings(v: VerdictRow) -> str:
    return "; ".join(f"{r.guard}: {r.text}" for r in v.verdict.reasons if not r.advisory)


def _release(s: ServingRow) -> str:
    target = s.state or f"source v{s.source_version}"
    return f"release {s.counter}: {s.kind} to {target} by {s.rollout} wave {s.wave}"


def _wave(ledger: Ledger, served: ServingRow) -> str:
    release = next((r for r in ledger.plans.rollouts() if r.id == served.rollout), None)
    state = f" ({release.status}, plan {release.plan_hash[:8]})" if release else ""
    return f"{served.kind} in wave {served.wave} of {served.rollout}{state}"


def _listed(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (site, tags) of a CSV; an empty cell leaves the tag as it is."""
    seen: set[str] = set()
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.reader(stream, strict=True)
            head = [name.strip() for name in next(rows, [])]
            if head[:1] != ["site"] or len(head) < 2 or len(set(head)) != len(head):
                raise ValueError(
                    f"{file}: the first line must name the columns: site, then one per tag, each once"
                )
            for row in rows:
                where = f"{file} line {rows.line_num}"
                if len(row) != len(head) or not row[0].strip():
                    raise ValueError(f"{where}: {len(row)} cells, {len(head)} with a site first are needed")
                site = row[0].strip()
                if site in seen:
                    raise ValueError(f"{where}: site {site} is there twice")
                seen.add(site)
                cells = zip(head[1:], row[1:], strict=True)
                yield site, _tags([(k, "=", v.strip()) for k, v in cells if v.strip()], where)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (csv.Error, UnicodeDecodeError) as e:
        raise ValueError(f"{file}: not a CSV in UTF-8: {e}") from None


def _tags(pairs: Sequence[tuple[str, str, str]], where: str) -> dict[str, str]:
    tags: dict[str, str] = {}
    for key, eq, value in pairs:
        if not eq or not TAG.fullmatch(key) or key in tags:
            form = "write key=value, each key once, of a-z 0-9 _ and at most 32 long"
            raise ValueError(f"{where}: {key + eq + value!r}: {form}")
        if len(value) > 100 or not value.isprintable():
            raise ValueError(f"{where}: {key}: a value has at most 100 characters, all printable")
        if key == "tz" and value and not is_time_zone(value):
            raise ValueError(f"{where}: tz={value}: not an IANA time zone, e.g. Europe/Berlin")
        if (
            key == "rig"
            and value
            and not (set(parts := value.split("+")) <= set(MODALITIES) and len(set(parts)) == len(parts))
        ):
            raise ValueError(
                f"{where}: rig={value}: write what it has of {', '.join(MODALITIES)}, e.g. rgb+ir"
            )
        tags[key] = value
    return tags
