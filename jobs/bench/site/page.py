"""Fills the report of the site benchmark: its tables and charts, and the words around them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jobs.bench import report
from jobs.bench.report import WORDS
from jobs.bench.site import labels, online
from jobs.bench.site.results import BASELINE, OURS, PEACEFUL, QUIET, calls_of, mean, over_doors, worst
from pipeline.report import bench, plots, timelines
from pipeline.report.bench import Cell, Group, Table, estimate, points, rate, rise
from pipeline.report.content import Line, Timeline
from pipeline.simulate.scenarios import events
from pipeline.stats import intervals, metrics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jobs.bench.site.results import Results, Runs
    from pipeline.report.bench import Column, Figure, Section
    from pipeline.stats.intervals import Estimate

SHOWN = (BASELINE, "recalibrate", "tent", OURS)  # methods in the timelines and in narrow tables
TIMELINES = ("gate-ageing", "branch-swap", "rig-swapped", "CPS->W", "dock-missing", "ir-dead", "kiosk-burst")
TIMELINES += ("unseen-species", "door-1", "gate-oneclass", "kiosk-drip", "drip-20", "burst-100")
LIMIT = 0.005  # that poison may raise the worst species' APCER by
GROUPS: dict[str, str] = WORDS["groups"]  # in the order of the page
section = partial(report.section, "site")
RATES = {"hter": "HTER", "bpcer": "BPCER", "max_apcer": "max APCER"}


class MethodRow(NamedTuple):
    """One method over the shifted streams and seeds."""

    method: str
    hter: Estimate  # mean online HTER
    below_frozen: float  # 1 - HTER / frozen's
    worst_site: str
    worst_rise: float  # largest mean rise of a site's HTER over frozen
    harmed: float  # share of sites harmed by more than 1 point
    bpcer: float
    max_apcer: float  # mean over streams of the worst species' APCER
    precision_bona_fide: float  # of pseudo labels
    precision_attack: float
    recovery: float  # samples after a sudden change until the error is back within 1 point; inf: never
    forgetting: float  # HTER on source validation after the streams - before
    cost: float  # time of a step / forward only


def method_rows(r: Results) -> list[MethodRow]:
    """Returns all methods of the comparison, best first."""
    rows = [_method(r, name, runs) for name, runs in r.main.items()]
    return sorted(rows, key=lambda m: (math.isnan(m.hter.value), m.hter.value))


def answer(rows: Sequence[MethodRow], figures: Sequence[Figure]) -> list[str]:
    """Returns the result in one sentence, by its parts."""
    known = {m.method: m for m in rows if np.isfinite(m.hter.value)}
    if not known:
        return ["No method was measured"]
    best, own, frozen = next(iter(known.values())), known.get(OURS), known.get(BASELINE)
    parts = [
        f"{best.method} errs least on shifted streams: mean online HTER {plots.percent(best.hter.value)}"
    ]
    if own and own is not best:
        parts.append(f"{OURS} has {plots.percent(own.hter.value)}")
    if own and frozen and np.isfinite(own.below_frozen):
        than = f"{'less' if own.below_frozen >= 0 else 'more'} than {BASELINE}"
        less = f"{plots.percent(abs(own.below_frozen))} {than}"
        apart = own.hter.high < frozen.hter.low or own.hter.low > frozen.hter.high
        sure = apart or not np.isfinite([*own.hter, *frozen.hter]).all()
        parts.append(less + ("" if sure else " (intervals overlap)"))
    if own and np.isfinite(own.harmed):
        parts.append(f"{plots.percent(own.harmed) if own.harmed else 'none'} of the sites harmed by {OURS}")
    if judged := [f.holds for f in figures if f.measured is not None]:
        parts.append(f"{sum(judged)} of {len(judged)} targets hold")
    return parts


def methods_section(rows: Sequence[MethodRow]) -> Section:
    """Returns the comparison of all methods on the shifted streams."""
    top = plots.scale([x for m in rows for x in m.hter], 0.02)
    frozen = next((m.hter.value for m in rows if m.method == BASELINE), math.nan)
    chart = [
        (m.method, m.hter, plots.whisker(*m.hter, name=plots.clean(m.method), top=top, reference=frozen))
        for m in rows
    ]
    columns: list[Column[MethodRow]] = [
        ("method", "method", lambda m: m.method),
        ("hter", "HTER", lambda m: estimate(m.hter)),
        ("below_frozen", f"below {BASELINE}", lambda m: rate(m.below_frozen)),
        ("worst_rise", "worst site, points", lambda m: rise(m.worst_rise)),
        ("worst_site", "worst site", lambda m: m.worst_site or None),
        ("harmed", "sites harmed", lambda m: rate(m.harmed)),
        ("bpcer", "BPCER", lambda m: rate(m.bpcer)),
        ("max_apcer", "max APCER", lambda m: rate(m.max_apcer)),
        ("precision_bona_fide", "right bona fide labels", lambda m: rate(m.precision_bona_fide)),
        ("precision_attack", "right attack labels", lambda m: rate(m.precision_attack)),
        ("recovery", "recovery, samples", lambda m: bench.count(m.recovery)),
        ("forgetting", "forgetting, points", lambda m: rise(m.forgetting, toned=False)),
        ("cost", "cost", lambda m: bench.number(m.cost, "×")),
    ]
    title = "shifted streams, scored before learning, threshold from source validation"
    words = {"interval": "mean online HTER, 95 % interval over streams and seeds", "reference": BASELINE}
    table = bench.tabled("methods", title, rows, columns, "column")
    parts = [bench.legend(words), bench.bells(chart, top), table]
    return section("methods", parts if rows else [], baseline=BASELINE)


def sections(
    r: Results, rows: Sequence[MethodRow], changes: Mapping[str, str], *, quick: bool
) -> list[Section]:
    """Returns all tables and charts; ``changes`` says what differs in each row of the additions."""
    why, order = "Left out with --quick." if quick else "", [m.method for m in rows]
    order.sort(key=lambda m: (m != BASELINE, m != OURS))
    return [
        methods_section(rows),
        _streams(r, order),
        timelines_section([_timeline(r, name) for name in TIMELINES if name in r.main[BASELINE]]),
        _one_class(r, order),
        _poison(r, order[1:]),
        labels_section(r),
        _missing(r.tables["fills"]),
        _ablation(r, why),
        _additions(r, changes, why),
    ]


def timelines_section(drawn: Sequence[Timeline]) -> Section:
    """Returns the errors along single streams."""
    look = timelines.looks(list(dict.fromkeys(m for t in drawn for m in t.lines)), OURS, BASELINE)
    figures = bench.joined("{}", ((timelines.figure(t, look, OURS),) for t in drawn))
    return section("timelines", [bench.html('<div class="pair">{}</div>', figures)] if drawn else [])


def labels_section(r: Results) -> Section:
    """Returns what a few labels give at left-out doors, way by way and by how many labels there are."""
    doors = list(dict.fromkeys(job.source.name for job in r.labels))
    rows: list[Sequence[Cell | str | None] | Group] = []
    for case, (bona_fide, attacks, wrong) in labels.CASES.items() if doors else ():
        base = r.taught(labels.FROZEN, case)
        rows.append(
            Group(case, f"{bona_fide + attacks} labels, {round(wrong * (bona_fide + attacks))} of them wrong")
        )
        for row in labels.ROWS:
            of = {n: r.taught(row, case, n) for n in ("hter", "apcer", "bpcer")}
            hter = over_doors(of["hter"])
            cells = [
                rate(of["hter"].get(d, math.nan), rise=of["hter"].get(d, math.nan) - base.get(d, math.nan))
                for d in doors
            ]
            below = 1 - hter / over_doors(base)
            both = (rate(over_doors(of[n])) for n in ("apcer", "bpcer"))
            rows.append([row, rate(hter, ranked=True), rate(below), *cells, *both])
    columns = {"way": "learned", "hter": "HTER", "below_frozen": f"below {BASELINE}"}
    columns |= {f"doors.{d}": d for d in doors} | {"apcer": "APCER", "bpcer": "BPCER"}
    table = Table(
        "labels", "few labels at a left-out door, scored on other people", columns, rows, grouped="labels"
    )
    return section("labels", [table], baseline=BASELINE, draws=labels.DRAWS)


def _method(r: Results, name: str, runs: Runs) -> MethodRow:
    shifted, base = [n for n in r.streams("shifted") if n in runs], r.main[BASELINE]
    hter = intervals.mean_hter(calls_of(runs, shifted))
    rises = r.rises(runs, [n for n in runs if r.group(n) in PEACEFUL], "hter")
    known = [v for v in rises.values() if not math.isnan(v)]
    each = [(run, other) for n in shifted for run, other in zip(runs[n], base[n], strict=True)]
    back = [
        online.recovery(s.course.score, s.stream.label, s.threshold, c)
        for s, _ in each
        for c in s.stream.changes
    ]
    after = [[x.course.source_after.hter for x in pair if x.course.source_after] for pair in each]
    right = [online.precision(s.course.pseudo_label, s.stream.label, y) for y in (1, 0) for s, _ in each]
    labels = [np.sum(part, axis=0) for part in (right[: len(each)], right[len(each) :])]
    precision = [float(n / used) if used else math.nan for n, used in labels]
    site, most = worst(rises)
    return MethodRow(
        method=name,
        hter=hter,
        below_frozen=1 - hter.value / intervals.mean_hter(calls_of(base, shifted)).value,
        worst_site=site,
        worst_rise=most,
        harmed=float(np.mean([v > metrics.HARM for v in known])) if known else math.nan,
        bpcer=mean(runs, shifted, "bpcer"),
        max_apcer=mean(runs, shifted, "max_apcer"),
        precision_bona_fide=precision[0],
        precision_attack=precision[1],
        recovery=float(np.median(back)) if back else math.nan,
        forgetting=float(np.mean([mine - frozen for mine, frozen in after])),
        cost=r.costs.get(name, math.nan),
    )


def _streams(r: Results, order: Sequence[str]) -> Section:
    """Every method on every stream; a stream with one class only shows that class's error by its name."""
    rows: list[Sequence[Cell | str | None] | Group] = []
    groups = sorted({r.group(n) for n in r.main[BASELINE]}, key=lambda g: [*GROUPS, g].index(g))
    for group in groups:
        rows.append(Group(group, GROUPS.get(group, "")))
        for name in sorted(r.streams(group)):
            base = r.main[BASELINE][name]
            eer = float(np.nanmean([metrics.eer(x.course.score, x.stream.label) for x in base]))
            head = Cell(name, name, (f"{len(base[0].stream.label):,} samples", r.what(name)))
            rows.append([head, rate(eer), *_stream_cells(r, name, order)])
    columns = {"stream": "stream", "oracle_eer": "oracle EER", **{f"methods.{m}": m for m in order}}
    shown = ("stream", "oracle_eer", *(f"methods.{m}" for m in SHOWN))
    table = Table("streams", "HTER per stream", columns, rows, shown=shown, keyed=True)
    return section("streams", [table], baseline=BASELINE, full=f"{100 * bench.FULL:g}")


def _stream_cells(r: Results, name: str, order: Sequence[str]) -> list[Cell | None]:
    rates: dict[str, online.Rates] = {}
    for method in (m for m in order if name in r.main[m]):
        each = [x.course.online for x in r.main[method][name]]
        means = {n: float(np.mean([getattr(e, n) for e in each])) for n in RATES}
        rates[method] = online.Rates(**means, worst_species=each[0].worst_species)
    measure = next((n for n in RATES if any(np.isfinite(getattr(x, n)) for x in rates.values())), "hter")
    base = {m: getattr(rates[BASELINE], measure) for m in order if m != BASELINE and BASELINE in rates}
    return [_stream_cell(rates[m], measure, base.get(m)) if m in rates else None for m in order]


def _stream_cell(x: online.Rates, measure: str, base: float | None) -> Cell:
    value, name = getattr(x, measure), RATES[measure] * (measure != "hter")
    over = None if base is None else value - base
    both = f"BPCER {plots.percent(x.bpcer)}", f"max APCER {plots.percent(x.max_apcer)}"
    small = ("" if over is None else bench.marked(over), name, *both, x.worst_species)
    return rate(value, rise=over)._replace(value=x._asdict(), small=small)


def _timeline(r: Results, name: str) -> Timeline:
    scenario, lines = r.scenarios.get(name), dict[str, Line]()
    for row in (m for m in SHOWN if name in r.main.get(m, {})):
        s = r.main[row][name][0]
        lines[row] = Line(*online.timeline(s.course.score, s.stream.label, s.stream.pai, s.threshold))
    marks, spans = events(scenario) if scenario else ((), ())
    shift = r.main[OURS][name][0].course.shift.astype(np.float64)
    return Timeline(
        name, r.what(name), marks, spans, lines, (np.arange(len(shift), dtype=np.float64) * r.batch, shift)
    )


def _one_class(r: Results, order: Sequence[str]) -> Section:
    rows: list[Sequence[Cell | str | None] | Group] = []
    for name in r.streams("one-class"):
        s, labels = r.scenarios.get(name), r.main[BASELINE][name][0].stream.label
        prior, frozen = s.stretches[0].prior if s else float(np.mean(labels)), r.burst(BASELINE, name)
        rows.append(Group(name, f"{plots.percent(prior)} bona fide before the burst"))
        for m in order:
            rises = (r.rises(r.main[m], [name], x).get(name, math.nan) for x in ("bpcer", "max_apcer"))
            burst = r.burst(m, name)
            at_burst = rate(burst, f"{BASELINE} {plots.percent(frozen)}", rise=burst - frozen)
            rows.append([m, *(rise(x) for x in rises), at_burst])
    columns = {"method": "method", "bpcer_rise": "BPCER rise", "apcer_rise": "APCER rise"}
    columns["burst_apcer"] = "APCER at the burst"
    title = "doors that see one class, and a burst of attacks"
    table = Table("one_class", title, columns, rows, medium="page", grouped="stream")
    return section("one_class", [table], baseline=BASELINE)


def _poison(r: Results, order: Sequence[str]) -> Section:
    names = r.streams("poisoning")
    rises = {m: r.rises(r.main[m], names, "max_apcer", after=True) for m in order}
    low, high = timelines.axis([v for of in rises.values() for v in of.values()], 4 * LIMIT)
    rows: list[Sequence[Cell | str | None] | Group] = []
    for name in names:
        rows.append(Group(name, f"{plots.percent(r.poison(name))} poisoned: {r.what(name)}"))
        for m in order:
            value = rises[m][name]
            stopped = max(x.course.stopped_after for x in r.main[m][name])
            bar = timelines.change(value, LIMIT, name=plots.clean(m), low=low, high=high)
            over = rise(value) if value > LIMIT else points(value)
            ended = bench.count(stopped) if np.isfinite(stopped) else Cell(None, "did not")
            rows.append(
                [m, Cell(None, "", drawn=bar), over, rate(mean(r.main[m], [name], "max_apcer")), ended]
            )
    columns = {"method": "method", "bar": "rise drawn", "rise": "rise", "online_apcer": "online APCER"}
    columns["stopped_after"] = "stopped after"
    title = f"poisoning: worst species' APCER on the probe over {BASELINE}'s, points"
    table = Table("poison", title, columns, rows, medium="page", grouped="stream")
    matrix = {n: {m: points(rises[m][n]) for m in order if "(" not in m} for n in names}
    text = replace(bench.grid("", title, "stream", matrix), medium="text")
    facts = {"limit": f"{100 * LIMIT:g}", "low": bench.signed(low), "high": bench.signed(high)}
    return section("poison", [table, text], baseline=BASELINE, **facts)


def _missing(fills: Mapping[str, Runs]) -> Section:
    rates = {f: {n: mean(runs, list(runs), n) for n in RATES} for f, runs in fills.items()}
    cells = {f: {RATES[n]: rate(v, ranked=True) for n, v in of.items()} for f, of in rates.items()}
    table = bench.grid("missing", f"a modality missing, {BASELINE}", "stands in", cells, "column")
    return section("missing", [table])


def _ablation(r: Results, why: str) -> Section:
    cells: dict[str, dict[str, Cell]] = {}
    for row, runs in r.tables["ablation"].items():
        fill, labels, weight = row.split(" | ")
        site = f"worst site {bench.signed(worst(r.rises(runs, list(runs), 'hter'))[1])}"
        cell = rate(mean(runs, list(runs), "hter"), site, ranked=True)
        cells.setdefault(f"{fill}, {labels}", {})[weight] = cell
    title = "reconstruction alone by stand-in, labels and weight, first seed: HTER"
    table = bench.grid("ablation", title, "stands in, labels", cells, "table")
    return section("ablation", [table], why)


def _additions(r: Results, changes: Mapping[str, str], why: str) -> Section:
    """Every part of our method left out or changed, below the method as it serves."""
    rows: list[list[Cell | str | None]] = []
    default: list[float] = []
    for row, runs in r.tables["additions"].items():
        shifted, quiet = ([n for n in r.streams(*groups) if n in runs] for groups in (["shifted"], QUIET))
        peaceful = [n for n in runs if r.group(n) in PEACEFUL]
        hter = mean(runs, shifted, "hter")
        probe = r.rises(runs, r.streams("poisoning"), "max_apcer", after=True)
        rises = [r.rises(runs, peaceful, "hter"), probe, r.rises(runs, quiet, "bpcer")]
        numbers = [hter, *(worst(of)[1] for of in rises)]
        over = [
            bench.marked(n - d) if default else "" for n, d in zip(numbers, default or numbers, strict=True)
        ]
        below = rate(1 - hter / mean(r.frozen_beside(runs), shifted, "hter"))
        name = Cell(row, row, (changes.get(row, ""),))
        rows.append(
            [name, rate(hter, over[0]), below, *(points(n, o) for n, o in zip(numbers[1:], over[1:]))]
        )
        default = default or numbers
    columns = {"name": "setting", "hter": "HTER", "below_frozen": f"below {BASELINE}"}
    columns |= {"worst_rise": "worst site", "poison_rise": "poison", "one_class_rise": "one class"}
    table = Table("additions", f"{OURS}, part by part, first seed", columns, rows)
    return section("additions", [table], why, baseline=BASELINE)
