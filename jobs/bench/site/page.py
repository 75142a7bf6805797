"""The page and the terminal's tables of ``palisade bench site``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from jobs.bench.site import online
from jobs.bench.site.figures import Found, Seen, burst, calls_of, frozen_beside, mean, rises, worst
from jobs.terminal import percent, table
from pipeline.control.deployment import now
from pipeline.report import site as report
from pipeline.report.content import Line, Timeline
from pipeline.report.site import BASELINE, OURS
from pipeline.simulate.scenarios import events
from pipeline.stats import intervals, metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from pipeline.report.site import SiteBench
    from pipeline.stats.intervals import Estimate

SHOWN_LINES = (BASELINE, "recalibrate", "tent", OURS)
TIMELINES = (
    "gate-ageing",
    "branch-swap",
    "rig-swapped",
    "CPS->W",
    "dock-missing",
    "ir-dead",
    "kiosk-burst",
    "unseen-species",
    "door-1",
    "gate-oneclass",
    "kiosk-drip",
    "drip-20",
    "burst-100",
)


def reported(found: Found, *, quick: bool) -> SiteBench:
    """The page's content but the figures and the context."""
    runs = found.runs["main"]
    aside = "Left out with --quick."
    return report.SiteBench(
        created=now(),
        context={},
        figures=(),
        methods=tuple(_method(found, row) for row in runs),
        streams=tuple(
            _stream(found, name) for name in sorted(runs[BASELINE], key=lambda n: (found.group(n), n))
        ),
        timelines=tuple(_timeline(found, name) for name in TIMELINES if name in runs[BASELINE]),
        one_class=tuple(r for name in found.streams("one-class") for r in _one_class(found, name)),
        poison=tuple(r for name in found.streams("poisoning") for r in _poison(found, name)),
        missing=tuple(_missing(found, fill) for fill in found.runs["fills"]),
        ablation=tuple(_cell(found, row) for row in found.runs["ablation"]),
        additions=tuple(_addition(found, row) for row in found.runs["additions"]),
        omitted=dict.fromkeys(("ablation", "additions"), aside) if quick else {},
    )


def _method(found: Found, row: str) -> report.MethodRow:
    runs, base = found.runs["main"][row], found.runs["main"][BASELINE]
    shifted = [n for n in found.streams("shifted") if n in runs]
    hter = intervals.mean_hter(calls_of(runs, shifted))
    frozen = intervals.mean_hter(calls_of(base, shifted)).value
    peaceful = [n for n in runs if found.group(n) != "poisoning"]
    rise = rises(found, row, peaceful, "hter")
    known = [v for v in rise.values() if not math.isnan(v)]
    site, most = worst(rise)
    changes = [
        online.recovery(s.course.score, s.stream.label, s.threshold, c)
        for n in shifted
        for s in runs[n]
        for c in s.stream.changes
    ]
    forgot = [
        s.course.source_after.hter - b.course.source_after.hter
        for n in shifted
        for s, b in zip(runs[n], base[n], strict=True)
    ]
    right = {
        y: np.sum(
            [online.precision(s.course.pseudo_label, s.stream.label, y) for n in shifted for s in runs[n]],
            axis=0,
        )
        for y in (0, 1)
    }
    return report.MethodRow(
        method=row,
        hter=hter,
        below_frozen=1 - hter.value / frozen,
        worst_site=site,
        worst_rise=most,
        harmed=float(np.mean([v > metrics.HARM for v in known])) if known else math.nan,
        bpcer=mean(runs, shifted, "bpcer"),
        max_apcer=mean(runs, shifted, "max_apcer"),
        precision_bona_fide=_share(right[1]),
        precision_attack=_share(right[0]),
        recovery=float(np.median(changes)) if changes else math.nan,
        forgetting=float(np.mean(forgot)),
        cost=found.costs.get(row, math.nan),
    )


def _share(of: np.ndarray) -> float:
    return float(of[0] / of[1]) if of[1] else math.nan


def _stream(found: Found, name: str) -> report.StreamRow:
    seen = found.runs["main"][BASELINE][name]
    oracle = float(np.nanmean([metrics.eer(s.course.score, s.stream.label) for s in seen]))
    cells = {row: _rates(runs[name]) for row, runs in found.runs["main"].items() if name in runs}
    return report.StreamRow(
        name, found.group(name), found.what(name), len(seen[0].stream.label), oracle, cells
    )


def _rates(seen: list[Seen]) -> report.StreamCell:
    def of(what: str) -> float:
        return float(np.mean([getattr(s.course.online, what) for s in seen]))

    return report.StreamCell(of("hter"), of("bpcer"), of("max_apcer"), seen[0].course.online.worst_species)


def _timeline(found: Found, name: str) -> Timeline:
    scenario, lines = found.scenario(name), {}
    for row in SHOWN_LINES:
        if name in found.runs["main"].get(row, {}):
            s = found.runs["main"][row][name][0]
            lines[row] = Line(*online.timeline(s.course.score, s.stream.label, s.stream.pai, s.threshold))
    marks, spans = events(scenario) if scenario else ((), ())
    shift = found.runs["main"][OURS][name][0].course.shift
    at = np.arange(len(shift), dtype=np.float64) * found.config.bank.batch_size
    boundary = (at, shift.astype(np.float64))
    return Timeline(name, found.what(name), marks, spans, lines, boundary)


def _one_class(found: Found, name: str) -> list[report.OneClassRow]:
    s = found.scenario(name)
    prior = s.stretches[0].prior if s else float(np.mean(found.runs["main"][BASELINE][name][0].stream.label))
    base = burst(found, BASELINE, name)
    return [
        report.OneClassRow(
            name,
            prior,
            row,
            rises(found, row, [name], "bpcer").get(name, math.nan),
            rises(found, row, [name], "max_apcer").get(name, math.nan),
            burst(found, row, name),
            base,
        )
        for row in found.runs["main"]
        if row != BASELINE
    ]


def _poison(found: Found, name: str) -> list[report.PoisonRow]:
    s = found.scenario(name)
    share = max(t.poison for t in s.stretches) if s else math.nan
    made: list[report.PoisonRow] = []
    for row, runs in found.runs["main"].items():
        if row != BASELINE:
            stopped = float(np.max([x.course.stopped_after for x in runs[name]]))
            made.append(
                report.PoisonRow(
                    name,
                    found.what(name),
                    share,
                    row,
                    rises(found, row, [name], "max_apcer", after=True).get(name, math.nan),
                    mean(runs, [name], "max_apcer"),
                    stopped if math.isfinite(stopped) else None,
                )
            )
    return made


def _missing(found: Found, fill: str) -> report.MissingRow:
    runs = found.runs["fills"][fill]
    hter, bpcer, apcer = (mean(runs, list(runs), w) for w in ("hter", "bpcer", "max_apcer"))
    return report.MissingRow(fill, hter, bpcer, apcer)


def _cell(found: Found, row: str) -> report.AblationCell:
    fill, labels, weight = row.split(" | ")
    runs = found.runs["ablation"][row]
    rise = rises(found, row, list(runs), "hter", table="ablation")
    return report.AblationCell(fill, labels, weight, mean(runs, list(runs), "hter"), worst(rise)[1])


def _addition(found: Found, row: str) -> report.AdditionRow:
    from jobs.bench.site.run import ADDITIONS

    runs = found.runs["additions"][row]
    shifted = [n for n in found.streams("shifted") if n in runs]
    frozen = mean(frozen_beside(found, runs), shifted, "hter")
    hter = mean(runs, shifted, "hter")
    peaceful = [n for n in runs if found.group(n) != "poisoning"]
    probe = rises(found, row, found.streams("poisoning"), "max_apcer", table="additions", after=True)
    quiet = rises(found, row, found.streams("one-class") + found.streams("clean"), "bpcer", table="additions")
    return report.AdditionRow(
        row,
        ADDITIONS[row][0],
        hter,
        1 - hter / frozen,
        worst(rises(found, row, peaceful, "hter", table="additions"))[1],
        worst(probe)[1],
        worst(quiet)[1],
    )


def numbers(made: SiteBench) -> dict[str, object]:
    """The tables for ``--json``."""

    def plain(rows: Sequence[object]) -> list[dict[str, object]]:
        return [dict(vars(r)) for r in rows]

    streams = {
        r.stream: {
            "group": r.group,
            "samples": r.samples,
            "oracle_eer": r.oracle_eer,
            "methods": {m: vars(c) for m, c in r.cells.items()},
        }
        for r in made.streams
    }
    return {
        "methods": plain(made.methods),
        "streams": streams,
        "one_class": plain(made.one_class),
        "poison": plain(made.poison),
        "missing": plain(made.missing),
        "ablation": plain(made.ablation),
        "additions": plain(made.additions),
    }


def shown(made: SiteBench) -> list[Table | str]:
    """The terminal's tables."""

    def points(v: float) -> str:
        return "" if math.isnan(v) else f"{100 * v:+.1f}"

    def interval(e: Estimate) -> str:
        return f"{percent(e.value)} [{percent(e.low)}, {percent(e.high)}]"

    rows = [
        [
            m.method,
            interval(m.hter),
            points(-m.below_frozen),
            f"{points(m.worst_rise)} {m.worst_site}",
            percent(m.harmed),
            percent(m.bpcer),
            percent(m.max_apcer),
            percent(m.precision_bona_fide),
            percent(m.precision_attack),
            points(m.forgetting),
            f"{m.cost:.2f}",
        ]
        for m in sorted(made.methods, key=lambda m: m.hter.value)
    ]
    head = [
        "method",
        "HTER % [95 %]",
        "to frozen %",
        "worst site, points",
        "harmed %",
        "BPCER %",
        "max APCER %",
        "bona fide labels right %",
        "attack labels right %",
        "forgot, points",
        "cost",
    ]
    parts: list[Table | str] = [
        table("shifted streams, scored before learning, threshold from source validation", head, rows)
    ]
    chosen = [m for m in SHOWN_LINES if any(m in r.cells for r in made.streams)]
    streams = [
        [r.stream, r.group, percent(r.oracle_eer), *(percent(r.cells[m].hter) for m in chosen)]
        for r in made.streams
    ]
    parts.append(table("HTER % per stream", ["stream", "", "frozen's oracle EER %", *chosen], streams))
    probe = {(p.stream, p.method): p for p in made.poison if p.method in SHOWN_LINES}
    names = list(dict.fromkeys(p.stream for p in made.poison))
    poisoned = [[n, *(points(probe[n, m].rise) for m in chosen if m != BASELINE)] for n in names]
    if poisoned:
        parts.append(
            table(
                "poisoning: worst species' APCER on the probe over frozen's, points",
                ["stream", *(m for m in chosen if m != BASELINE)],
                poisoned,
            )
        )
    if made.missing:
        parts.append(
            table(
                "a modality missing, frozen",
                ["fill", "HTER %", "BPCER %", "max APCER %"],
                [[m.fill, *map(percent, (m.hter, m.bpcer, m.max_apcer))] for m in made.missing],
            )
        )
    if made.additions:
        head = ["", "HTER %", "to frozen %", "worst site", "poisoned probe", "one-class BPCER"]
        parts.append(
            table(
                "danet, part by part",
                head,
                [
                    [
                        a.name,
                        percent(a.hter),
                        points(-a.below_frozen),
                        points(a.worst_rise),
                        points(a.poison_rise),
                        points(a.one_class_rise),
                    ]
                    for a in made.additions
                ],
            )
        )
    return parts
