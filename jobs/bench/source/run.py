"""``palisade bench source``: every source method on the same trunk, tail, sampler, schedule and threshold
rule.

Leave one domain out over several seeds, modalities missing at test, two source domains only, species that no
source has, an ablation of RiSe's parts, and the speed of a training step. Thresholds come from source
validation; what is named oracle chose its threshold on the target. Every fit is stored when it is done, so a
second call goes on.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.bench import speed
from jobs.bench.figures import conclude, context
from jobs.bench.source import fits as fits_
from jobs.bench.source.figures import figures, numbers, reported, shown
from jobs.bench.source.fits import Job
from jobs.import_corpus import import_into
from jobs.pretrain import pretrained
from pipeline.cluster import connected
from pipeline.config import method_config, methods
from pipeline.data.corpus import read_corpus, read_manifest
from pipeline.data.protocols import leave_one_domain_out, limited_source
from pipeline.report import source as report
from pipeline.report.content import Figure
from pipeline.report.source import BASELINE, OURS
from pipeline.source import fit as fits
from pipeline.source.contract import SourceMethod
from pipeline.source.holdout import degenerate, from_file

if TYPE_CHECKING:
    from jobs.bench.source.compare import Runs
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.source.contract import SourceMethod

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
    started = time.monotonic()
    folders = corpora_of(config, terminal)
    count = 1 if quick else seeds or config.bench.seeds
    if config.bench.pretrain:
        start = config.source.model_copy(update={"start": str(pretrained(config, terminal))})
        config = config.model_copy(update={"source": start})
    domains = sorted(set(folders) - set(config.bench.added_domains))
    planned = plan(config, domains, seeds=count, quick=quick)
    began = time.time()
    with connected(config.cluster), terminal.progress("bench source", "fits") as advance:
        found = fits_.run(
            [p.job for p in planned],
            folders,
            place=config.folder("bench", "source"),
            workers=config.cluster.cpus,
            on_progress=advance,
        )
    failed = {p: found[p.job] for p in planned if isinstance(found[p.job], str)}
    for p, why in failed.items():
        terminal.say(f"{p.row} {p.column} seed {p.job.seed}: no result: {why}")
    runs, before = _collected(
        planned, {j: path for j, path in found.items() if isinstance(path, Path)}, since=began
    )
    terminal.say("timing a training step beside a bare DataLoader loop")
    corpora = [read_corpus(folders[d], ("train", "val")) for d in domains]
    task = fits.Task(config.source, config.model, config.data.frame_px)
    with fits.threads(config.cluster.cpus):
        timed = speed.measure(task, corpora)
    borne = degenerate(task, corpora)
    made = reported(config, runs, timed, quick=quick)
    seconds = time.monotonic() - started + before / config.cluster.cpus
    ours = dict(runs["main"].get(OURS, {}))
    decided = figures(made, ours, timed, borne, targets=len(domains), seconds=seconds, quick=quick)
    facts = context(
        started,
        seeds=list(range(count)),
        quick=quick,
        steps=config.bench.quick_steps if quick else config.source.steps,
        fits=len({p.job for p in planned}),
        data={d: read_manifest(path).digest[:12] for d, path in folders.items()},
    )
    out = config.folder("reports", "bench-source-quick.html" if quick else "bench-source.html")
    rows = tuple(Figure(f.name, f.measured, "", f.target, f.holds, f.note) for f in decided)
    report.write(replace(made, figures=rows, context={k: str(v) for k, v in facts.items()}), out)
    return conclude(
        terminal, decided, {**facts, **numbers(made), "page": str(out)}, *shown(made), f"page: {out}"
    )


def _collected(
    planned: list[Planned], found: dict[Job, Path], *, since: float
) -> tuple[dict[str, Runs], float]:
    """Results by table, row and column, and the seconds of the fits that were stored before ``since``.

    A column that lacks a seed is left out: a mean over what happened to survive would be another figure.
    """
    runs: dict[str, Runs] = {"main": {}, "limited": {}, "ablation": {}}
    read = {job: from_file(path) for job, path in found.items()}
    whole = Counter((p.table, p.row, p.column) for p in planned if p.job in read)
    wanted = Counter((p.table, p.row, p.column) for p in planned)
    for p in planned:
        at = (p.table, p.row, p.column)
        if (p.table == "ablation" and p.job in read) or whole[at] == wanted[at]:
            runs[p.table].setdefault(p.row, defaultdict(list))[p.column].append(read[p.job])
    return runs, sum(r.seconds for job, r in read.items() if found[job].stat().st_mtime < since)


def plan(config: Config, domains: list[str], *, seeds: int, quick: bool) -> list[Planned]:
    """All fits, the comparison first."""
    planned: list[Planned] = []
    for protocol in leave_one_domain_out(domains):
        for seed in range(seeds):
            for kind in (BASELINE, OURS) if quick else methods("source"):
                job = _job(
                    config, kind, {}, "radial", protocol.sources, (protocol.target,), seed, quick=quick
                )
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
    config: Config,
    kind: str,
    settings: dict[str, object],
    head: str,
    sources: tuple[str, ...],
    targets: tuple[str, ...],
    seed: int,
    *,
    quick: bool,
) -> Job:
    """A method with the schedule of the configuration, and its other settings too if it is the configured
    one.
    """
    own = config.source.model_dump()
    shared = {k: v for k, v in own.items() if k in SourceMethod.model_fields} if kind != own["kind"] else own
    steps = config.bench.quick_steps if quick else config.source.steps
    given = {**shared, **settings, "kind": kind, "seed": seed, "steps": steps}
    method = method_config("source", kind).model_validate(given)
    model = config.model.model_copy(update={"tail": config.model.tail.model_copy(update={"head": head})})
    return Job(
        kind,
        method.model_dump_json(),
        model.model_dump_json(),
        (*sources, *config.bench.added_domains),
        targets,
    )


def corpora_of(config: Config, terminal: Terminal) -> dict[str, Path]:
    """Domain → folder; what the section bench names and is not there yet is imported from its root, or
    rendered.
    """
    root, wanted = Path(config.data.corpora), config.bench
    missing = [d for d in wanted.sets if not (root / d / "manifest.json").exists()]
    if missing and not (wanted.root and Path(wanted.root).is_dir()):
        raise ValueError(
            f"bench.root: {wanted.root} is not there; set it to the folder that holds {', '.join(missing)}, "
            f"or run `palisade import KIND FOLDER --domain {missing[0]}`"
        )
    for domain in missing:
        import_into(
            config, terminal, kind=wanted.sets[domain], root=Path(str(wanted.root)) / domain, name=domain
        )
    for domain in (d for d in wanted.added_domains if not (root / d / "manifest.json").exists()):
        import_into(config, terminal, kind="rendered", root=None, name=domain)
    found = {p.parent.name: p.parent for p in sorted(root.glob("*/manifest.json"))}
    real = {
        d
        for d, p in found.items()
        if (d in wanted.sets if wanted.sets else read_manifest(p).kind != "rendered")
    }
    used = {d: p for d, p in found.items() if d in real or d in wanted.added_domains}
    if len(real) < 3:
        raise ValueError(
            f"data.corpora: {root} holds {', '.join(used) or 'nothing'}; leaving one out needs at "
            "least 3 domains"
        )
    for domain, path in used.items():
        m = read_manifest(path)
        if m.size != config.data.frame_px:
            raise ValueError(
                f"data.frame_px: {config.data.frame_px}, but {domain} in {path} was imported at {m.size}"
            )
        if domain in real and not 0 < m.bona_fide.get("test", 0) < m.rows.get("test", 0):
            raise ValueError(
                f"{path}: the test split must hold bona fide and attack rows; it is a target in its turn"
            )
    return used
