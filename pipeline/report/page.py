"""Renders a CycleReport as one HTML file: it loads nothing, works without JavaScript, and prints."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import plots
from pipeline.stats.metrics import HARM
from pipeline.storage import write_atomic
from pipeline.types import Modality

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.report.content import CycleReport, PadSummary, SiteReport

OMEGA = 2.0  # the largest loss weight
DETAILS, ROWS = 50, 2000  # sites that have charts; sites that have a row in the table
LISTED, SCROLLS = 200, 60  # entries of a list of reasons; rows above which a table scrolls
CAUSE = re.compile(r"([a-z][a-z -]{1,23}):")  # how a reason starts
METRICS = (("hter", "HTER"), ("max_apcer", "max APCER"), ("bpcer", "BPCER"))
MODALITIES = {Modality.RGB: "RGB", Modality.DEPTH: "depth", Modality.IR: "IR"}
TONES = {"pass": "good", "hold": "warn", "fail": "bad", "broken": "bad", "harmed": "bad"}
MARKS = {"pass": "✓", "hold": "Ⅱ", "fail": "✕", "broken": "⊘", "harmed": "▲"}


@dataclass(frozen=True)
class Change:
    """One metric of one site before and after, lower is better; ``tone`` is good, bad, same or none."""

    name: str
    before: float
    after: float
    delta: float
    tone: str


@dataclass(frozen=True)
class Row:
    """One site as the page shows it; ``anchor`` is the id of its details on the page."""

    site: SiteReport
    anchor: str
    badges: tuple[str, ...]
    changes: tuple[Change, ...]
    harmed: bool


def render(report: CycleReport) -> str:
    """Returns the HTML of the page, the worst sites first; where a list is cut, the page says so."""
    rows = _rows(report)
    labelled = [r for r in rows if r.site.before and r.site.after]
    return (
        environment()
        .get_template("cycle.html.j2")
        .render(
            report=report,
            answer=_answer(rows),
            figures=_figures(report, rows),
            rows=rows[:ROWS],
            detailed=rows[:DETAILS],
            bells=_bells(labelled[:DETAILS], report.ceiling),
            measured=len(labelled),
            unserved=[r for r in rows if r.site.status != "ok" or r.harmed],
            causes=Counter(_cause(r.site) for r in rows if r.site.status != "ok").most_common(),
            quarantine=sorted(report.quarantine, key=lambda q: -q.count)[:LISTED],
            put_aside=_by_reason(report),
            limits={"details": DETAILS, "rows": ROWS, "listed": LISTED, "scrolls": SCROLLS, "omega": OMEGA},
            modalities=MODALITIES,
            tones=TONES,
            marks=MARKS,
        )
    )


def write(report: CycleReport, path: Path) -> None:
    """Renders the page into the file ``path``."""
    publish(render(report), path)


def publish(html: str, path: Path) -> None:
    """Replaces ``path`` by ``html`` in one step; a reader sees the old page or the new one, never a part."""
    write_atomic(path, html.encode())


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Returns the templates of all pages; they escape every string and spell out invisible characters."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"percent": plots.percent, "number": plots.number, "when": _when, "digest": _digest}
    env.globals["plots"] = plots  # pyright: ignore[reportArgumentType]  # jinja types only its own globals
    return env


def _rows(report: CycleReport) -> list[Row]:
    rows = [_row(s) for s in report.sites]
    order = {"broken": 0, "failed": 1, "held": 2, "ok": 3}

    def worst_first(row: Row) -> tuple[bool, int, float, str]:
        after = row.changes[1].after
        return not row.harmed, order[row.site.status], -after if np.isfinite(after) else 0.0, row.site.site

    return [
        Row(r.site, f"site-{i}", r.badges, r.changes, r.harmed)
        for i, r in enumerate(sorted(rows, key=worst_first))
    ]


def _row(site: SiteReport) -> Row:
    changes = tuple(_change(name, key, site.before, site.after) for key, name in METRICS)
    harmed = site.promoted and any(c.delta > HARM for c in changes[:2])
    state = "broken" if site.status == "broken" else site.verdict
    badges = ([state] if state else []) + (["harmed"] if harmed else [])
    return Row(site, "", tuple(badges), changes, harmed)


def _change(name: str, key: str, before: PadSummary | None, after: PadSummary | None) -> Change:
    b, a = (float(getattr(s, key)) if s else float("nan") for s in (before, after))
    delta = a - b
    tone = "none" if delta != delta else "same" if abs(delta) < 5e-4 else "bad" if delta > 0 else "good"
    return Change(name, b, a, delta, tone)


def _answer(rows: Sequence[Row]) -> list[str]:
    """Returns the parts of the sentence that sums up the cycle."""
    if not rows:
        return ["No site had anything to adapt in this cycle"]
    status = Counter(r.site.status for r in rows)
    unchanged = sum(_unchanged(r.site) for r in rows)
    parts = [f"{status['ok'] - unchanged:,} of {len(rows):,} site{'s' * (len(rows) != 1)} adapted"]
    parts.append(f"{sum(r.site.promoted for r in rows):,} promoted")
    if unchanged:
        parts.append(f"{unchanged:,} left unchanged")
    for state in ("held", "failed", "broken"):
        if status[state]:
            causes = Counter(_cause(r.site) for r in rows if r.site.status == state).most_common(2)
            parts.append(f"{status[state]:,} {state} ({', '.join(c for c, _ in causes)})")
    promoted, measured = sum(r.site.promoted for r in rows), _measured(rows)
    if measured:
        gap = "" if measured == promoted else f" of {measured:,} measured"
        parts.append(f"{sum(r.harmed for r in rows):,}{gap} harmed")
    elif promoted:
        parts.append("harm unknown without sealed labels")
    return parts


def _measured(rows: Sequence[Row]) -> int:
    """Returns how many promoted sites have sealed labels, so that harm would be seen."""
    return sum(r.site.promoted and any(np.isfinite(c.delta) for c in r.changes[:2]) for r in rows)


def _unchanged(site: SiteReport) -> bool:
    return site.status == "ok" and site.verdict is None


def _cause(site: SiteReport) -> str:
    if not site.reasons:
        return "no reason given"
    cause = CAUSE.match(site.reasons[0])
    return cause[1] if cause else "other reason"


def _figures(report: CycleReport, rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Returns the key figures as (name, value, remark)."""
    sites = [r.site for r in rows]
    pairs = [
        (s.before, s.after if s.promoted else s.before)
        for s in sites
        if s.before and (s.after or not s.promoted)
    ]
    served = [(s.after if s.promoted else s.before, s.site) for s in sites]
    worst, worst_site = max(
        ((pad, site) for pad, site in served if pad and np.isfinite(pad.max_apcer)),
        key=lambda x: x[0].max_apcer,
        default=(None, ""),
    )
    hter = [_median([p.hter for p in side if p]) for side in zip(*pairs, strict=True)] if pairs else []
    waiting = sum(s.verdict == "pass" and not s.promoted for s in sites)
    seconds = (report.finished - report.started).total_seconds()
    adapted = sum(s.status == "ok" and not _unchanged(s) for s in sites)
    measured, harmed = _measured(rows), sum(r.harmed for r in rows)
    idle = f"{report.totals.idle:,} idle of {report.totals.registered:,} registered"
    medians = " → ".join(map(plots.percent, hter)) or "–"
    apcer = plots.percent(worst.max_apcer) if worst else "–"
    apcer_of = f"{worst.worst_species} at {worst_site}" if worst else "no sealed labels"
    captures, quarantined = sum(s.samples for s in sites), sum(s.quarantined for s in sites)
    stages = " · ".join(f"{n} {_duration(s)}" for n, s in report.totals.stage_seconds)
    return [
        ("adapted", f"{adapted:,} / {len(sites):,}", idle),
        ("promoted", f"{sum(s.promoted for s in sites):,}", f"{waiting:,} passed and wait for a wave"),
        ("not served", f"{sum(s.status != 'ok' for s in sites):,}", "held, failed or broken"),
        ("harmed", f"{harmed:,}" if measured else "–", f"of {measured:,} promoted sites with sealed labels"),
        ("median HTER served", medians, f"{len(pairs):,} sites with sealed labels"),
        ("worst APCER served", apcer, apcer_of),
        ("captures", f"{captures:,}", f"{quarantined:,} quarantined"),
        ("duration", _duration(seconds), stages),
    ]


def _median(values: Sequence[float]) -> float:
    finite = [v for v in values if np.isfinite(v)]
    return float(np.median(finite)) if finite else float("nan")


def _bells(
    rows: Sequence[Row], ceiling: float | None
) -> list[tuple[str, list[str], list[tuple[Row, Change, Markup]]]]:
    """Returns per metric its name, the axis labels, and a before → after chart for each site."""
    panels: list[tuple[str, list[str], list[tuple[Row, Change, Markup]]]] = []
    for i, (_, name) in enumerate(METRICS[:2] if rows else ()):
        changes = [(r, r.changes[i]) for r in rows]
        limit = ceiling if name == "max APCER" else None
        top = min(1.0, plots.scale([v for _, c in changes for v in (c.before, c.after)], limit or 0.02))
        bells: list[tuple[Row, Change, Markup]] = []
        for r, c in changes:
            label = f"{plots.clean(r.site.site)}, {name}"
            bell = plots.dumbbell(c.before, c.after, name=label, top=top, limit=limit, tone=c.tone)
            bells.append((r, c, bell))
        panels.append((name, [f"{100 * top * q / 4:g}%" for q in range(5)], bells))
    return panels


def _by_reason(report: CycleReport) -> list[tuple[str, int, int]]:
    """Returns (reason, rows, sites) of all that is quarantined, most rows first."""
    rows: Counter[str] = Counter()
    sites: dict[str, set[str]] = {}
    for q in report.quarantine:
        rows[q.reason] += q.count
        sites.setdefault(q.reason, set()).add(q.site)
    return [(reason, n, len(sites[reason])) for reason, n in rows.most_common(LISTED)]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _when(value: datetime | None) -> str:
    if value is None:
        return "–"
    return f"{value.astimezone(UTC) if value.tzinfo else value:%Y-%m-%d %H:%M} UTC"


def _visible(value: object) -> object:
    return plots.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _digest(text: str) -> str:
    """Returns the name of an inline script in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
