"""What ``palisade bench source`` found: the page's content, the figures against their targets, the terminal's
tables.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jobs.bench.figures import Figure
from jobs.bench.source import compare
from jobs.terminal import percent, table
from pipeline.config import methods
from pipeline.control.deployment import now
from pipeline.report import source as report
from pipeline.report.source import BASELINE, OURS

if TYPE_CHECKING:
    from rich.table import Table

    from jobs.bench import speed
    from jobs.bench.source.compare import Runs
    from pipeline.config import Config
    from pipeline.report.source import SourceBench
    from pipeline.source.holdout import Result

CELLS = 15  # boundaries x synergy of the ablation


def reported(config: Config, runs: dict[str, Runs], timed: speed.Speed, *, quick: bool) -> SourceBench:
    ours = runs["main"].get(OURS, {})
    aside = "Left out with --quick." if quick else "Not measured."
    left_out = {name: aside for name in ("ablation", "limited") if not runs[name]}
    bare = report.SpeedRow("bare loop with a DataLoader", *[float("nan")] * 4, samples_per_second=timed.bare)
    return report.SourceBench(
        title="Source methods",
        created=now(),
        notes=_notes(config),
        figures=(),
        methods=compare.method_rows(runs["main"], OURS),
        det=dict(compare.det_panels(runs["main"])),
        radii=dict(compare.radius_panels(ours)),
        ablation=compare.ablation(runs["ablation"]),
        missing=compare.missing_grid(ours),
        limited=compare.limited_grid(runs["limited"]),
        unseen=compare.unseen_rows(runs["main"], (OURS, BASELINE)),
        speed=(report.SpeedRow("palisade", *timed[:4], samples_per_second=timed.samples), bare),
        context={},
        left_out=left_out,
    )


def _notes(config: Config) -> tuple[str, ...]:
    bench = config.bench
    return (
        "RiSe, DADM and CTNet are rebuilt from their abstracts, MMDG from its formulas without the "
        "ViT's adapters; SA-FAS runs "
        "on a spherical head. None of these numbers is their authors'.",
        "Trunk, tail, augmentation, sampler, schedule, start and threshold rule are the same for all "
        "methods. Trunk and "
        "augmentation were chosen on pairs of domains by the error on a third; every domain took its "
        "turn as that third.",
        f"Begun from a fit on rendered presentations: {'yes' if bench.pretrain else 'no'}; rendered "
        "domains beside the sources "
        f"in every batch: {', '.join(bench.added_domains) or 'none'}. Rendered samples are in no "
        "threshold and no error rate.",
        "DET curves, radii and the ablation are of the first seed. Species of fewer than 30 "
        "presentations count together.",
    )


def figures(
    made: SourceBench,
    ours_runs: dict[str, list[Result]],
    timed: speed.Speed,
    borne: dict[str, str],
    *,
    targets: int,
    seconds: float,
    quick: bool,
) -> list[Figure]:
    """What the benchmark promises, against what it found. What lacks a target is not measured."""
    rows = {m.method: m for m in made.methods if len(m.hter_by_target) == targets}
    ours, erm = rows.get(OURS), rows.get(BASELINE)
    gain = erm.paired.relative if erm and erm.paired else None
    decided = [
        Figure(
            "rise_mean_hter", ours and ours.hter.value, 0.15, least=False, note="mean over targets and seeds"
        ),
        Figure("rise_score_shift", ours and ours.score_shift, 0.02, least=False, note="HTER - oracle EER"),
        Figure(
            "rise_relative_to_erm",
            gain and gain.value,
            0.25,
            least=True,
            note=f"share of erm's HTER avoided, 95 % {_interval(gain)}",
        ),
    ]
    for name in methods("source"):
        if name != OURS:
            paired = rows[name].paired if name in rows else None
            better = paired and -paired.difference.value
            said = _interval(paired and paired.difference)
            decided.append(
                Figure(
                    f"rise_better_than_{name}",
                    better,
                    0.0,
                    least=True,
                    strict=True,
                    note=f"{name}'s HTER - rise's; rise - {name} 95 % {said}",
                )
            )
    saved = compare.complement_saves(ours_runs) if len(ours_runs) == targets else None
    cells = sum(
        c.n == targets and math.isfinite(c.hter.value) for per in made.ablation.values() for c in per.values()
    )
    sound = sum(how != "silent NaN" for how in borne.values())
    return [
        *decided,
        Figure(
            "complement_relative_to_zero_fill",
            saved and saved.value,
            0.20,
            least=True,
            note=f"mean over the missing patterns, each with its own threshold; 95 % {_interval(saved)}",
        ),
        Figure("ablation_cells", cells, CELLS, least=True, note="boundaries x synergy"),
        Figure(
            "degenerate_corpora_sound",
            sound,
            len(borne),
            least=True,
            note="; ".join(f"{k}: {v}" for k, v in borne.items()),
        ),
        Figure(
            "throughput_relative_to_dataloader",
            timed.samples / timed.bare,
            0.9,
            least=True,
            note="samples/s, taking turns",
        ),
        Figure(
            "seconds",
            seconds,
            360 if quick else 3600,
            least=False,
            note="this call; stored fits at the time they took",
        ),
    ]


def _interval(of: tuple[float, float, float] | None) -> str:
    return "unknown" if of is None else f"[{of[1]:+.3f}, {of[2]:+.3f}]"


def numbers(made: SourceBench) -> dict[str, object]:
    """The tables for ``--json``."""
    rows = {
        m.method: {
            "hter": m.hter,
            "targets": m.hter_by_target,
            "oracle_eer": m.oracle_eer,
            "score_shift": m.score_shift,
            "max_apcer": m.max_apcer,
            "worst_species": m.worst_species,
            "bpcer": m.bpcer,
            "bpcer20": m.bpcer20,
            "auc": m.auc,
            "paired": m.paired,
        }
        for m in made.methods
    }
    grids = {
        "missing": made.missing,
        "limited": made.limited,
        "ablation": {
            r: {c: {"hter": x.hter, "oracle_eer": x.oracle_eer, "fits": x.n} for c, x in per.items()}
            for r, per in made.ablation.items()
        },
        "unseen": {
            f"{u.target}: {u.species}": {m: r._asdict() for m, r in u.apcer.items()} for u in made.unseen
        },
    }
    return {"methods": rows, **grids, "speed": {r.loop: [*r.parts, r.samples_per_second] for r in made.speed}}


def shown(made: SourceBench) -> list[Table | str]:
    """The terminal's tables."""

    def with_interval(e: tuple[float, float, float]) -> str:
        return f"{percent(e[0])} [{percent(e[1])}, {percent(e[2])}]"

    targets = list(made.methods[0].hter_by_target) if made.methods else []
    rows = [
        [
            m.method,
            with_interval(m.hter),
            *(percent(m.hter_by_target[t].value) for t in targets),
            percent(m.oracle_eer),
            f"{100 * m.score_shift:+.1f}",
            percent(m.max_apcer),
            percent(m.bpcer),
            percent(m.bpcer20),
            percent(m.auc),
            "" if m.paired is None else " ".join(f"{100 * v:+.1f}" for v in m.paired.difference),
        ]
        for m in sorted(made.methods, key=lambda m: m.hter.value)
    ]
    columns = [
        "method",
        "HTER % [95 %]",
        *(f"→{t}" for t in targets),
        "oracle EER %",
        "shift",
        "max APCER %",
        "BPCER %",
        "BPCER20 %",
        "AUC %",
        "rise - method, low, high",
    ]
    parts: list[Table | str] = [table("one domain left out, threshold from source validation", columns, rows)]
    for title, grid in (
        ("HTER % with modalities missing", made.missing),
        ("HTER %, two source domains", made.limited),
    ):
        if grid:
            cells = [[name, *(with_interval(e) for e in per.values())] for name, per in grid.items()]
            parts.append(table(title, ["", *next(iter(grid.values()))], cells))
    if made.ablation:
        cells = [
            [name, *(f"{percent(c.hter.value)} / {percent(c.oracle_eer)}" for c in per.values())]
            for name, per in made.ablation.items()
        ]
        parts.append(table("rise, HTER % / oracle EER %", ["", *next(iter(made.ablation.values()))], cells))
    return parts
