"""Fills the report of the source benchmark: its figures, its tables and charts, and the words around them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jobs.bench import report
from jobs.bench.source import compare
from jobs.bench.source.compare import judged, shared_targets
from pipeline.config import methods
from pipeline.report import bench, plots
from pipeline.report.bench import Cell, at_least, at_most, estimate, html, rate
from pipeline.stats.intervals import Estimate, mean_hter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jobs.bench.source.compare import MethodRow, Runs
    from jobs.bench.source.fits import Result
    from jobs.bench.speed import Cost, Speed
    from pipeline.report.bench import Column, Figure, Section, Table
    from pipeline.report.content import DetCurve, RadiusPanel
    from pipeline.stats.metrics import Rate

OURS, BASELINE = "rise", "erm"
UNKNOWN = Estimate(np.nan, np.nan, np.nan)
ABLATED = 2  # targets of the ablation
ABLATION: dict[str, tuple[str, dict[str, object]]] = {  # row of the ablation -> head, settings of rise
    "whole": ("radial", {}),
    "plane instead of a sphere": ("linear", {}),
    "without invariance": ("radial", {"invariance": "none"}),
    "without angle": ("radial", {"angle": 0.0}),
    "without MMSD": ("radial", {"synergy": 0.0}),
    "without complement": ("radial", {"complement": 0.0}),
    "without margin and compactness": ("radial", {"margin": 0.0, "compact": 0.0}),
}
section = partial(report.section, "source")
PARTS = ("load", "forward", "backward", "optimizer")  # of a step


class Measured(NamedTuple):
    """Everything that the benchmark measured."""

    main: Runs  # method -> target
    limited: Runs  # method -> protocol
    ablation: Runs  # setting -> target
    together: Runs  # ours -> "all": every set is a source, and tested on its own test split
    speed: Speed
    cost: Cost
    degenerate: Mapping[str, str]  # corpus that no fit should be given -> how it ended
    targets: int  # domains that were left out in turn


def figures(m: Measured, rows: Sequence[MethodRow], *, seconds: float, quick: bool) -> list[Figure]:
    """Returns what was promised against what was measured; a method that lacks a target is not measured."""
    by_name = {r.method: r for r in rows if len(r.hter_by_target) == m.targets}
    ours, erm = by_name.get(OURS), by_name.get(BASELINE)
    gain = erm.paired.relative if erm and erm.paired else None
    note = f"share of erm's HTER avoided, 95 % {_interval(gain)}"
    decided = [
        at_most("rise_mean_hter", ours and ours.hter.value, 0.07, "mean over targets and seeds"),
        at_most("rise_oracle_eer", ours and ours.oracle_eer, 0.05, "threshold chosen on the target itself"),
        at_most("rise_score_shift", ours and ours.score_shift, 0.02, "HTER - oracle EER"),
        at_least("rise_relative_to_erm", gain and gain.value, 0.25, note),
    ]
    for name in (BASELINE,) if quick else (n for n in methods("source") if n != OURS):
        paired = by_name[name].paired if name in by_name else None
        note = f"{name}'s HTER - rise's; rise - {name} 95 % {_interval(paired and paired.difference)}"
        better = paired and -paired.difference.value
        decided.append(at_least(f"rise_better_than_{name}", better, 0.0, note, strict=True))
    saved = compare.complement_saves(m.main[OURS]) if len(m.main.get(OURS, {})) == m.targets else None
    note = f"mean over the missing patterns, each with its own threshold; 95 % {_interval(saved)}"
    together = m.together.get(OURS, {}).get("all", [])
    whole, species = mean_hter([judged(together)]) if together else None, compare.species_rows(together)
    bounds = f"of {len(species)} species: 95 % upper bound of APCER at most {compare.CEILING:.0%}"
    rows_there = sum(len(per) == min(ABLATED, m.targets) for per in m.ablation.values())
    sound = sum(how != "silent NaN" for how in m.degenerate.values())
    ends = "; ".join(f"{k}: {v}" for k, v in m.degenerate.items())
    faster, limit = m.speed.samples / m.speed.bare, 480 if quick else 10_800
    return [
        *decided,
        at_least("complement_relative_to_zero_fill", saved and saved.value, 0.20, note),
        at_most("all_sets_hter", whole and whole.value, 0.03, "every set a source, own test splits"),
        at_least("species_below_ceiling", sum(r.holds for r in species) if species else None, 1, bounds),
        at_least("ablation_rows", rows_there, len(ABLATION), f"on {ABLATED} targets"),
        at_least("degenerate_corpora_sound", sound, len(m.degenerate), ends),
        at_least("throughput_relative_to_dataloader", faster, 0.9, "samples/s, taking turns"),
        at_most("seconds", seconds, limit, "this call; stored fits at the time they took"),
    ]


def sections(m: Measured, rows: Sequence[MethodRow], *, quick: bool) -> list[Section]:
    """Returns the tables and charts of the whole comparison."""
    why = "Left out with --quick." if quick else ""
    radii = {t: compare.radius_panels(results[0]) for t, results in m.main.get(OURS, {}).items()}
    missing = compare.missing_grid(m.main.get(OURS, {}))
    pairs = {
        p: {k: mean_hter([judged(per[p])]) for k, per in m.limited.items()} for p in shared_targets(m.limited)
    }
    parts = {row: {k: _part(results) for k, results in per.items()} for row, per in m.ablation.items()}
    title = f"{OURS} part by part, first seed: HTER by target"
    together = m.together.get(OURS, {}).get("all", [])
    return [
        methods_section(rows),
        det_section({t: compare.det_curves(m.main, t) for t in shared_targets(m.main)}),
        radii_section(radii),
        section("ablation", [bench.grid("ablation", title, "setting", parts, "column")], why, ours=OURS),
        section("missing", [_grid("missing", "HTER with modalities missing", "sensors", missing)]),
        section("limited", [_grid("limited", "HTER, two source domains", "sources->targets", pairs)], why),
        unseen_section(compare.unseen_rows(m.main, (OURS, BASELINE))),
        species_section(compare.species_rows(together), why),
        contributions_section(compare.contributions(m.main.get(OURS, {}))),
        speed_section(m.speed, m.cost),
    ]


def answer(rows: Sequence[MethodRow]) -> list[str]:
    """Returns the result in one sentence, by its parts."""
    known = [r for r in rows if np.isfinite(r.hter.value)]
    if not known:
        return ["No method was measured"]
    seeds = max(r.seeds for r in known)
    whole = [r for r in known if r.seeds == seeds]  # a mean over fewer seeds is none to rank by
    best, targets = whole[0], len({t for r in known for t in r.hter_by_target})
    among = f" of the {len(whole)} methods with {seeds} seeds" if len(whole) < len(known) else ""
    mean = plots.percent(best.hter.value)
    parts = [f"{best.method} errs least{among}: mean HTER {mean} over {targets} unseen domains"]
    if ours := next((r for r in whole[1:] if r.method == OURS), None):
        parts.append(f"{OURS} has {plots.percent(ours.hter.value)}")
    paired = next((r.paired for r in known if r.method == BASELINE and r.paired), None)
    if paired and np.isfinite([*paired.difference, *paired.relative]).all():
        value, low, high = paired.difference
        between = f"{bench.signed(low)} to {bench.signed(high)}"
        if low <= 0 <= high:
            parts.append(f"{OURS} and {BASELINE} are not told apart ({between} points)")
        elif value < 0:
            avoided, bounds = plots.percent(paired.relative.value), bench.span(*paired.relative[1:])
            parts.append(f"{avoided} less than {BASELINE} ({bounds}%)")
        else:
            parts.append(f"{bench.signed(value)} points more than {BASELINE} ({between})")
    return parts


def methods_section(rows: Sequence[MethodRow]) -> Section:
    """Returns the comparison of all methods: a chart, and every error rate."""
    top = plots.scale([x for r in rows for x in (*r.hter, r.oracle_eer)], 0.02)
    names = {r.method: plots.clean(r.method) for r in rows}
    chart = [
        (r.method, r.hter, plots.whisker(*r.hter, r.oracle_eer, name=names[r.method], top=top)) for r in rows
    ]
    targets = dict.fromkeys(t for r in rows for t in r.hter_by_target)
    columns: list[Column[MethodRow]] = [
        ("method", "method", lambda r: r.method),
        ("hter", "HTER", lambda r: estimate(r.hter)),
        *(
            (f"targets.{t}", f"→{t}", lambda r, t=t: _of_target(r.hter_by_target.get(t, UNKNOWN)))
            for t in targets
        ),
        ("oracle_eer", "oracle EER", lambda r: rate(r.oracle_eer)),
        ("score_shift", "score shift", lambda r: bench.points(r.score_shift)),
        ("max_apcer", "max APCER", lambda r: rate(r.max_apcer)),
        ("worst_species", "worst species", lambda r: r.worst_species or None),
        ("bpcer", "BPCER", lambda r: rate(r.bpcer)),
        ("bpcer20", "BPCER20", lambda r: rate(r.bpcer20)),
        ("auc", "AUC", lambda r: rate(r.auc)),
        (
            "paired.difference",
            f"{OURS} − method, points",
            lambda r: r.paired and _difference(r.paired.difference),
        ),
        (
            "avoided",
            f"error avoided by {OURS}",
            lambda r: r.paired and estimate(r.paired.relative)._replace(rank=None),
        ),
        ("seeds", "seeds", lambda r: bench.count(r.seeds)),
    ]
    title = "one domain left out, threshold from source validation"
    aside = ("worst_species", "bpcer20", "auc", "avoided", "seeds")
    shown = tuple(key for key, *_ in columns if key not in aside)
    table = replace(bench.tabled("methods", title, rows, columns, "column"), shown=shown)
    words = {"interval": "mean HTER, 95 % interval", "oracle": "oracle EER", "shift": "score shift"}
    return section(
        "methods", [bench.legend(words), bench.bells(chart, top), table] if rows else [], ours=OURS
    )


def unseen_section(rows: Sequence[compare.UnseenRow]) -> Section:
    """Returns the error rates on attack instruments that no source shows."""

    def cell(a: Rate) -> Cell:
        return rate(a.rate, f"≤ {plots.percent(a.upper95)}, n {a.n:,}", ranked=True)._replace(
            value=a._asdict()
        )

    cells = {f"{r.target}: {r.species}": {m: cell(a) for m, a in r.apcer.items()} for r in rows}
    title = "instruments that no source has: APCER"
    return section("unseen", [bench.grid("unseen", title, "target: instrument", cells, "table")])


def species_section(rows: Sequence[compare.SpeciesRow], why: str) -> Section:
    """Returns the APCER of every species where all sets are sources, and whether it meets the ceiling."""
    columns: list[Column[compare.SpeciesRow]] = [
        ("species", "species", lambda r: r.species),
        ("apcer", "APCER", lambda r: rate(r.apcer.rate)),
        ("upper95", "95 % upper bound", lambda r: rate(r.apcer.upper95)),
        ("n", "n", lambda r: bench.count(r.apcer.n)),
        ("meets", f"meets {compare.CEILING:.0%}", lambda r: Cell(r.holds, "yes" if r.holds else "no")),
    ]
    title = "every set a source: APCER on each set's own test split"
    return section("species", [bench.tabled("species", title, rows, columns)] if rows else [], why)


def contributions_section(rows: Sequence[compare.Contribution]) -> Section:
    """Returns what every modality adds to the logit."""
    columns: list[Column[compare.Contribution]] = [
        ("modality", "modality", lambda r: r.modality),
        ("bona_fide", "bona fide", lambda r: Cell(r.bona_fide, f"{r.bona_fide:+.2f}")),
        ("attack", "attack", lambda r: Cell(r.attack, f"{r.attack:+.2f}")),
    ]
    title = f"{OURS}: logit with a modality minus with its complement instead"
    return section("contributions", [bench.tabled("contributions", title, rows, columns)] if rows else [])


def speed_section(speed: Speed, cost: Cost) -> Section:
    """Returns the parts of an optimizer step beside a bare loop, and what one capture costs at inference."""
    parts = {name: bench.number(1000 * s) for name, s in zip(PARTS, speed[:4], strict=True)}
    cells = {
        "palisade": {**parts, "samples/s": bench.count(speed.samples)},
        "bare loop with a DataLoader": {"samples/s": bench.count(speed.bare)},
    }
    table = bench.grid("speed", "milliseconds of one optimizer step by part", "loop", cells)
    bar = plots.bar(speed[:4], PARTS, top=float(np.nansum(speed[:4])))
    numbers = {"MACs, millions": cost.macs / 1e6, "ms": cost.milliseconds, "ms by torch": cost.by_torch}
    one = {"trunk": {name: bench.number(value) for name, value in numbers.items()}}
    capture = bench.grid("capture", "one capture of three modalities, one core", "", one)
    return section("speed", [bar, table, capture])


def _grid(key: str, title: str, head: str, hters: Mapping[str, Mapping[str, Estimate]]) -> Table:
    cells = {row: {k: estimate(e) for k, e in per.items()} for row, per in hters.items()}
    return bench.grid(key, title, head, cells, "row")


def _part(results: Sequence[Result]) -> Cell:
    """Returns the cell of a part of our method: its error, and what an oracle threshold would give."""
    hter, eer = mean_hter([judged([r]) for r in results]), compare.mean_eer(results)
    words = f"oracle EER {plots.percent(eer)}, {len(results)} runs", bench.span(hter.low, hter.high)
    value = {"hter": hter, "oracle_eer": eer, "fits": len(results)}
    return rate(hter.value, *words, ranked=True)._replace(value=value)


def _of_target(e: Estimate) -> Cell:
    """Returns the cell of one target, whose interval only the page shows."""
    return estimate(e)._replace(small=("", bench.span(e.low, e.high)))


def _difference(e: Estimate) -> Cell:
    """Returns the difference of ours to a method, marked where the interval leaves out zero."""
    mark = "▼ " if e.high < 0 else "▲ " if e.low > 0 else ""
    cell = bench.points(e.value, f"{bench.signed(e.low)} to {bench.signed(e.high)}")
    return cell._replace(value=e, text=cell.text and mark + cell.text)


def det_section(curves: Mapping[str, Sequence[tuple[str, DetCurve]]]) -> Section:
    """Returns the detection error trade-off of every method on every target."""
    others = dict.fromkeys(m for of in curves.values() for m, _ in of if m not in (OURS, BASELINE))
    form = '<span><svg class="det" width="34" height="14"><path class="{}" d="M2 7h30"/></svg>{}</span>'
    key = bench.joined(
        form, [("after", OURS), ("before", BASELINE), *([("other", ", ".join(others))] if others else [])]
    )
    drawn = ((t, plots.dets(c, t, {BASELINE: "before", OURS: "after"})) for t, c in curves.items())
    charts = bench.joined("<figure><h3>{}</h3>{}</figure>\n", drawn)
    form = '<div class="key">{}<span>dot: the honest threshold</span></div><div class="pair">{}</div>'
    return section("det", [html(form, key, charts)] if curves else [])


def radii_section(per_target: Mapping[str, Sequence[RadiusPanel]]) -> Section:
    """Returns the radii of every target's samples, on an axis that holds 99 of 100, and their directions."""
    form = '<figure>{}{}<div class="x" aria-hidden="true"><span>0</span><span>radius</span><span>{}</span>'
    form += "</div><figcaption><b>{}</b>, boundary {}<br>outside: {} of {:,} bona fide<br>"
    form += "inside: {} of {:,} attacks</figcaption></figure>\n"
    words = {"bona fide": "bona fide (bars upwards)", "attack": "attack (bars downwards)"}
    words["boundary"] = "boundary"
    parts = [bench.legend(words)] if per_target else []
    for target, panels in per_target.items():
        radii = np.concatenate([np.zeros(0), *(r for p in panels for r in (p.bona_fide, p.attack))])
        radii = radii[np.isfinite(radii)]
        far = float(np.quantile(radii, 0.99)) if len(radii) else 0.0
        top = plots.scale([far, *(1.1 * p.rho for p in panels)], 0.1)
        charts = bench.joined(form, (_panel(p, top) for p in panels))
        parts.append(html('<h3>Target {}</h3><div class="four">{}</div>', target, charts))
    return section("radii", parts, points=plots.POINTS)


def _panel(p: RadiusPanel, top: float) -> tuple[object, ...]:
    """Returns the charts of one domain, the end of its axis, its name, and its errors in words."""
    outside = plots.number(p.rho), plots.percent(p.outside), len(p.bona_fide)
    charts = plots.sphere(p, top=top), plots.radii(p, top=top)
    return *charts, plots.number(top), p.domain, *outside, plots.percent(p.inside), len(p.attack)


def _interval(of: Estimate | None) -> str:
    return "unknown" if of is None else f"[{of.low:+.3f}, {of.high:+.3f}]"
