"""``palisade bench source``: every source method on the same trunk, tail, sampler, schedule and threshold rule.

Leave one domain out over several seeds, modalities missing at test, two source domains only, species that no source
has, an ablation of RiSe's parts, and the speed of a training step. Thresholds come from source validation; what is
named oracle chose its threshold on the target. Every fit is stored when it is done, so a second call goes on.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from jobs import percent, table
from jobs.bench import Figure, conclude, context
from jobs.imports import import_into
from jobs.pretrain import pretrained
from pipeline import fit as fits
from pipeline import speed
from pipeline.cluster import connected
from pipeline.config import method_config, methods
from pipeline.data.corpus import read_corpus, read_manifest
from pipeline.data.protocols import leave_one_domain_out, limited_source
from pipeline.holdout import degenerate, from_file
from pipeline.report import compare
from pipeline.report import source as report
from pipeline.source import Schedule

if TYPE_CHECKING:
    from rich.table import Table

    from jobs import Terminal
    from pipeline.cluster.bench import Job
    from pipeline.config import Config
    from pipeline.data.corpus import Corpus
    from pipeline.report.compare import Runs
    from pipeline.report.source import SourceBench
    from pipeline.source import SourceMethod

OURS, BASELINE = "rise", "erm"
LIMITED = ("CW->PS", "PS->CW")  # the published two; other domains: the first two choices
BOUNDARIES: dict[str, tuple[str, dict[str, object]]] = {  # row of the ablation → head, settings of rise
    "linear CE": ("linear", {"invariance": "none"}),
    "linear + PG-IRM": ("linear", {}),
    "sphere ERM": ("radial", {"invariance": "none"}),
    "sphere + PG-IRM": ("radial", {}),
    "without angle": ("radial", {"angle": 0.0}),
}
SYNERGY: dict[str, dict[str, object]] = {  # column → settings of rise
    "no MMSD": {"synergy": 0.0},
    "mixing only": {"decorrelate": 0.0},
    "full": {},
}


@dataclass(frozen=True)
class Planned:
    """One fit and the table it is for."""

    table: str  # main, limited or ablation
    row: str  # method or boundary
    column: str  # target, protocol or synergy
    job: Job


def bench_source(config: Config, terminal: Terminal, *, quick: bool, seeds: int | None) -> int:
    """Fit, score, compare, write the page."""
    from pipeline.cluster import bench

    started = time.monotonic()
    folders = _corpora(config, terminal)
    count = 1 if quick else seeds or config.bench.seeds
    if config.bench.pretrain:
        start = config.source.model_copy(update={"start": str(pretrained(config, terminal))})
        config = config.model_copy(update={"source": start})
    domains = sorted(set(folders) - set(config.bench.beside))
    planned = plan(config, domains, seeds=count, quick=quick)
    with connected(config.cluster), terminal.progress("bench source", "fits") as advance:
        found = bench.run(
            [p.job for p in planned], folders, place=config.place("bench", "source"), workers=config.cluster.cpus,
            on_progress=advance,
        )  # fmt: skip
    failed = {p: found[p.job] for p in planned if isinstance(found[p.job], str)}
    for p, why in failed.items():
        terminal.say(f"{p.row} {p.column} seed {p.job.seed}: no result: {why}")
    runs: dict[str, Runs] = {"main": {}, "limited": {}, "ablation": {}}
    for p in planned:
        if p not in failed:
            per = runs[p.table].setdefault(p.row, defaultdict(list))
            per[p.column].append(from_file(cast("Path", found[p.job])))
    terminal.say("timing a training step beside a bare DataLoader loop")
    corpora = [read_corpus(folders[d], ("train", "val")) for d in domains]
    task = fits.Task(cast("SourceMethod", config.source), config.model, config.data.size)
    timed, borne = _speed(task, config.cluster.cpus, corpora), degenerate(task, corpora)
    made = _report(config, runs, timed, quick=quick)
    decided = figures(made, timed, borne, seconds=time.monotonic() - started, quick=quick)
    facts = context(
        started, seeds=list(range(count)), quick=quick, steps=config.bench.quick_steps if quick else config.source.steps,
        fits=len(planned), data={d: read_manifest(path).digest[:12] for d, path in folders.items()},
    )  # fmt: skip
    out = config.place("reports", "bench-source-quick.html" if quick else "bench-source.html")
    shown = tuple(report.Figure(f.name, f.measured, "", f.target, f.holds, f.note) for f in decided)
    report.write(replace(made, figures=shown, context={k: str(v) for k, v in facts.items()}), out)
    return conclude(terminal, decided, {**facts, **_numbers(made), "page": str(out)}, *_shown(made), f"page: {out}")


def plan(config: Config, domains: list[str], *, seeds: int, quick: bool) -> list[Planned]:
    """All fits, the comparison first."""
    planned: list[Planned] = []
    for protocol in leave_one_domain_out(domains):
        for seed in range(seeds):
            for kind in (BASELINE, OURS) if quick else methods("source"):
                job = _job(config, kind, {}, "radial", protocol.sources, (protocol.target,), seed, quick=quick)
                planned.append(Planned("main", kind, protocol.target, job))
    if quick:
        return planned
    choices = limited_source(domains)
    for protocol in [p for p in choices if p.name in LIMITED] or choices[:2]:
        for seed in range(seeds):
            for kind in (BASELINE, OURS):
                job = _job(config, kind, {}, "radial", protocol.sources, protocol.targets, seed, quick=quick)
                planned.append(Planned("limited", kind, protocol.name, job))
    for protocol in leave_one_domain_out(domains):
        for row, (head, settings) in BOUNDARIES.items():
            for column, more in SYNERGY.items():
                given = {**settings, **more}
                job = _job(config, OURS, given, head, protocol.sources, (protocol.target,), 0, quick=quick)
                planned.append(Planned("ablation", row, column, job))
    return planned


def _job(
    config: Config, kind: str, settings: dict[str, object], head: str, sources: tuple[str, ...],
    targets: tuple[str, ...], seed: int, *, quick: bool,
) -> Job:  # fmt: skip
    """A method with the schedule of the configuration, and its other settings too if it is the configured one."""
    from pipeline.cluster.bench import Job

    own = config.source.model_dump()
    shared = {k: v for k, v in own.items() if k in Schedule.model_fields} if kind != own["kind"] else own
    steps = config.bench.quick_steps if quick else config.source.steps
    given = {**shared, **settings, "kind": kind, "seed": seed, "steps": steps}
    method = method_config("source", kind).model_validate(given)
    model = config.model.model_copy(update={"tail": config.model.tail.model_copy(update={"head": head})})
    return Job(kind, method.model_dump_json(), model.model_dump_json(), (*sources, *config.bench.beside), targets)


def _corpora(config: Config, terminal: Terminal) -> dict[str, Path]:
    """Domain → folder; what the section bench names and is not there yet is imported from its root, or rendered."""
    root, wanted = Path(config.data.corpora), config.bench
    missing = [d for d in wanted.sets if not (root / d / "manifest.json").exists()]
    if missing and not (wanted.root and Path(wanted.root).is_dir()):
        raise ValueError(
            f"bench.root: {wanted.root} is not there; set it to the folder that holds {', '.join(missing)}, "
            f"or run `palisade import KIND FOLDER --domain {missing[0]}`"
        )
    for domain in missing:
        import_into(config, terminal, kind=wanted.sets[domain], root=Path(str(wanted.root)) / domain, name=domain)
    for domain in (d for d in wanted.beside if not (root / d / "manifest.json").exists()):
        import_into(config, terminal, kind="rendered", root=None, name=domain)
    found = {p.parent.name: p.parent for p in sorted(root.glob("*/manifest.json"))}
    used = {d: p for d, p in found.items() if not wanted.sets or d in wanted.sets or d in wanted.beside}
    if len(used) - len(wanted.beside) < 3:
        raise ValueError(
            f"data.corpora: {root} holds {', '.join(used) or 'nothing'}; leaving one out needs at least 3 domains"
        )
    for domain, path in used.items():
        if (size := read_manifest(path).size) != config.data.size:
            raise ValueError(f"data.size: {config.data.size}, but {domain} in {path} was imported at {size}")
    return used


def _speed(task: fits.Task, threads: int, corpora: list[Corpus]) -> speed.Speed:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return speed.measure(task, corpora)
    finally:
        torch.set_num_threads(before)


def _report(config: Config, runs: dict[str, Runs], timed: speed.Speed, *, quick: bool) -> SourceBench:
    ours = runs["main"].get(OURS, {})
    aside = "Left out with --quick." if quick else "Not measured."
    left_out = {name: aside for name in ("ablation", "limited") if not runs[name]}
    bare = report.SpeedRow("bare loop with a DataLoader", *[float("nan")] * 4, samples_per_second=timed.bare)
    beside = (
        f"All methods begin from a fit on rendered presentations: {config.bench.pretrain}; rendered domains beside the sources "
        f"in every batch: {', '.join(config.bench.beside) or 'none'}. They are in no threshold and no error rate."
    )
    return report.SourceBench(
        title="Source methods", created=datetime.now(UTC),
        notes=("RiSe is a reconstruction from its abstract, and so are DADM and CTNet: none of these numbers is their authors'.",
               beside,
               "Trunk, tail, augmentation, sampler, schedule and threshold rule are the same for all."),
        figures=(), methods=compare.method_rows(runs["main"], OURS), det=dict(compare.det_panels(runs["main"])),
        radii=dict(compare.radius_panels(ours)), ablation=compare.ablation(runs["ablation"]), missing=compare.missing_grid(ours),
        limited=compare.limited_grid(runs["limited"]), unseen=compare.unseen_rows(runs["main"], (OURS, BASELINE)),
        speed=(report.SpeedRow("palisade", *timed[:4], samples_per_second=timed.samples), bare), context={}, left_out=left_out,
    )  # fmt: skip


def figures(
    made: SourceBench, timed: speed.Speed, borne: dict[str, str], *, seconds: float, quick: bool
) -> list[Figure]:
    """What the benchmark promises, against what it found."""
    rows = {m.method: m for m in made.methods}
    ours, erm = rows.get(OURS), rows.get(BASELINE)
    gain = erm.paired.relative if erm and erm.paired else None
    decided = [
        Figure("rise_mean_hter", ours and ours.hter.value, 0.15, least=False, note="mean over targets and seeds"),
        Figure("rise_score_shift", ours and ours.score_shift, 0.02, least=False, note="HTER - oracle EER"),
        Figure("rise_relative_to_erm", gain and gain.value, 0.25, least=True,
               note=f"share of erm's HTER avoided, 95 % {_interval(gain)}"),
    ]  # fmt: skip
    for name in methods("source"):
        if name != OURS:
            paired = rows[name].paired if name in rows else None
            better = paired and -paired.difference.value
            said = _interval(paired and paired.difference)
            decided.append(Figure(f"rise_better_than_{name}", better, 0.0, least=True, strict=True,
                                  note=f"{name}'s HTER - rise's; rise - {name} 95 % {said}"))  # fmt: skip
    absent = made.missing.get("mean", {})
    complement, zeros = absent.get("complement"), absent.get("zero-fill")
    saved = 1 - complement.value / zeros.value if complement and zeros else None
    cells = sum(len(per) for per in made.ablation.values())
    sound = sum(how != "silent NaN" for how in borne.values())
    return [
        *decided,
        Figure("complement_relative_to_zero_fill", saved, 0.20, least=True, note="mean over the missing patterns"),
        Figure("ablation_cells", cells, len(BOUNDARIES) * len(SYNERGY), least=True, note="boundaries x synergy"),
        Figure("degenerate_corpora_sound", sound, len(borne), least=True, note="; ".join(f"{k}: {v}" for k, v in borne.items())),
        Figure("throughput_relative_to_dataloader", timed.samples / timed.bare, 0.9, least=True, note="samples/s, taking turns"),
        Figure("seconds", seconds, 360 if quick else 3600, least=False, note="of this call"),
    ]  # fmt: skip


def _interval(of: tuple[float, float, float] | None) -> str:
    return "unknown" if of is None else f"[{of[1]:+.3f}, {of[2]:+.3f}]"


def _numbers(made: SourceBench) -> dict[str, object]:
    """The tables for ``--json``."""
    rows = {m.method: {"hter": m.hter, "targets": m.hter_by_target, "oracle_eer": m.oracle_eer, "score_shift": m.score_shift,
                       "max_apcer": m.max_apcer, "worst_species": m.worst_species, "bpcer": m.bpcer, "bpcer20": m.bpcer20,
                       "auc": m.auc, "paired": m.paired} for m in made.methods}  # fmt: skip
    grids = {"missing": made.missing, "limited": made.limited,
             "ablation": {r: {c: cell.hter for c, cell in per.items()} for r, per in made.ablation.items()}}  # fmt: skip
    return {"methods": rows, **grids, "speed": {r.loop: [*r.parts, r.samples_per_second] for r in made.speed}}


def _shown(made: SourceBench) -> list[Table | str]:
    """The terminal's tables."""

    def with_interval(e: tuple[float, float, float]) -> str:
        return f"{percent(e[0])} [{percent(e[1])}, {percent(e[2])}]"

    targets = list(made.methods[0].hter_by_target) if made.methods else []
    rows = [
        [m.method, with_interval(m.hter), *(percent(m.hter_by_target[t].value) for t in targets), percent(m.oracle_eer),
         f"{100 * m.score_shift:+.1f}", percent(m.max_apcer), percent(m.bpcer), percent(m.bpcer20), percent(m.auc),
         "" if m.paired is None else " ".join(f"{100 * v:+.1f}" for v in m.paired.difference)]
        for m in sorted(made.methods, key=lambda m: m.hter.value)
    ]  # fmt: skip
    columns = ["method", "HTER % [95 %]", *(f"→{t}" for t in targets), "oracle EER %", "shift", "max APCER %", "BPCER %",
               "BPCER20 %", "AUC %", "rise - method, low, high"]  # fmt: skip
    shown: list[Table | str] = [table("one domain left out, threshold from source validation", columns, rows)]
    for title, grid in (("HTER % with modalities missing", made.missing), ("HTER %, two source domains", made.limited)):
        if grid:
            cells = [[name, *(with_interval(e) for e in per.values())] for name, per in grid.items()]
            shown.append(table(title, ["", *next(iter(grid.values()))], cells))
    if made.ablation:
        cells = [[name, *(f"{percent(c.hter.value)} / {percent(c.oracle_eer)}" for c in per.values())]
                 for name, per in made.ablation.items()]  # fmt: skip
        shown.append(table("rise, HTER % / oracle EER %", ["", *next(iter(made.ablation.values()))], cells))
    return shown
