"""``palisade bench source``: compares all source methods on the same trunk, tail, sampler and threshold rule.

Leaves one domain out over several seeds, takes modalities away at test, learns from two domains only, and
takes RiSe apart; unseen instruments and the speed of a step are measured beside. Thresholds come from source
validation; only what is named oracle chose its threshold on the target.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jobs.bench import speed
from jobs.bench.parts import load
from jobs.bench.report import conclude, context, glossary, notes
from jobs.bench.source import compare, page
from jobs.bench.source.fits import Job, Result, degenerate, run
from jobs.bench.source.page import BASELINE, OURS
from jobs.import_corpus import import_into
from jobs.pretrain import pretrained
from pipeline.cluster import connected
from pipeline.cluster.tasks import Failed
from pipeline.cluster.train import fill_stems
from pipeline.config import method_config, methods
from pipeline.control.deployment import now
from pipeline.data.corpus import SPLITS, read_corpus, read_manifest
from pipeline.data.protocols import leave_one_domain_out, limited_source
from pipeline.report.bench import Report
from pipeline.source import fit as fits
from pipeline.source.contract import SourceMethod

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jobs.bench.source.compare import Runs
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.source.contract import SourceMethod

LIMITED = ("CW->PS", "PS->CW")  # the published two; other domains: the first two choices
BOUNDARIES: dict[str, tuple[str, dict[str, object]]] = {  # row of the ablation -> head, settings of rise
    "linear CE": ("linear", {"invariance": "none"}),
    "linear + PG-IRM": ("linear", {}),
    "sphere ERM": ("radial", {"invariance": "none"}),
    "sphere + PG-IRM": ("radial", {}),
    "without angle": ("radial", {"angle": 0.0}),
}
SYNERGY: dict[str, dict[str, object]] = {  # column of the ablation -> settings of rise
    "no MMSD": {"synergy": 0.0},
    "mixing only": {"decorrelate": 0.0},
    "full": {},
}


class Planned(NamedTuple):
    """One fit and its place in a table."""

    table: str  # main, limited or ablation
    row: str  # method or boundary
    column: str  # target, protocol or synergy
    job: Job


def bench_source(
    config: Config, terminal: Terminal, *, quick: bool, seeds: int | None, write: bool = False
) -> int:
    """Fits, scores and compares all methods; exit 0 if every figure holds, else 3."""
    started, began = time.monotonic(), time.time()
    folders = corpora_of(config, terminal)
    count = 1 if quick else seeds or config.bench.seeds
    config = begun(config, terminal)
    domains = sorted(set(folders) - set(config.bench.added_domains))
    planned = plan(config, domains, seeds=count, quick=quick)
    with connected(config.cluster):
        with terminal.progress("stem maps", "files") as advance:
            fill_stems(config, list(folders.values()), SPLITS, on_progress=advance)
        with terminal.progress("bench source", "fits") as advance:
            place, workers = config.folder("bench", "source"), config.cluster.cpus
            ended = run([p.job for p in planned], folders, folder=place, workers=workers, on_progress=advance)
    for p in planned:
        if isinstance(why := ended[p.job], Failed):
            terminal.say(f"{p.row} {p.column} seed {p.job.method.seed}: no result: {why.why}")
    paths = {job: path for job, path in ended.items() if isinstance(path, Path)}
    results = {job: load(path, Result) for job, path in paths.items()}
    runs = _by_table(planned, results)
    stored = sum(r.seconds for job, r in results.items() if paths[job].stat().st_mtime < began)
    terminal.say("timing a training step beside a bare DataLoader loop")
    corpora = [read_corpus(folders[d], ("train", "val")) for d in domains]
    task = fits.Task(config.source, config.model, config.data.frame_px)
    with fits.threads(config.cluster.cpus):
        timed = speed.measure(task, corpora)
    m = page.Measured(**runs, speed=timed, degenerate=degenerate(task, corpora), targets=len(domains))
    seconds = time.monotonic() - started + stored / config.cluster.cpus
    facts = context(
        "source",
        started,
        quick=quick,
        seeds=list(range(count)),
        steps=config.bench.quick_steps if quick else config.source.steps,
        fits=len(ended),
        data={d: read_manifest(path).digest[:12] for d, path in folders.items()},
    )
    return conclude(config, terminal, _report(config, m, facts, seconds), write=write)


def _report(config: Config, m: page.Measured, facts: dict[str, object], seconds: float) -> Report:
    rows, quick = compare.method_rows(m.main, OURS), bool(facts["quick"])
    begin, added = "yes" if config.bench.pretrain else "no", ", ".join(config.bench.added_domains) or "none"
    return Report(
        name="source",
        title="Source methods",
        created=now(),
        figures=page.figures(m, rows, seconds=seconds, quick=quick),
        sections=page.sections(m, rows, quick=quick),
        context=facts,
        answer=page.answer(rows),
        notes=notes("source", pretrain=begin, added=added),
        own=(OURS,),
        glossary=glossary("source", m.main),
    )


def begun(config: Config, terminal: Terminal) -> Config:
    """Returns the configuration in which fits begin from that of ``palisade pretrain``, if they are to."""
    if not config.bench.pretrain:
        return config
    start = config.source.model_copy(update={"start": str(pretrained(config, terminal))})
    return config.model_copy(update={"source": start})


def plan(config: Config, domains: list[str], *, seeds: int, quick: bool) -> list[Planned]:
    """Returns all fits, the comparison first."""
    own, steps = config.source.model_dump(), config.bench.quick_steps if quick else config.source.steps
    shared = {k: v for k, v in own.items() if k in SourceMethod.model_fields}

    def job(
        kind: str, sources: tuple[str, ...], targets: tuple[str, ...], seed: int, head: str, **more: object
    ) -> Job:
        """A method with the configured schedule, and its other settings too if it is the configured one."""
        settings = {**(own if kind == own["kind"] else shared), **more}
        settings |= {"kind": kind, "seed": seed, "steps": steps}
        method = method_config("source", kind).model_validate(settings)
        model = config.model.model_copy(update={"tail": config.model.tail.model_copy(update={"head": head})})
        return Job(method, model, (*sources, *config.bench.added_domains), targets)

    left_out = [(p.sources, (p.target,), p.target) for p in leave_one_domain_out(domains)]
    kinds = (BASELINE, OURS) if quick else methods("source")
    planned = [
        Planned("main", kind, target, job(kind, sources, targets, seed, "radial"))
        for sources, targets, target in left_out
        for seed in range(seeds)
        for kind in kinds
    ]
    choices = [] if quick else limited_source(domains)
    planned += [
        Planned("limited", kind, p.name, job(kind, p.sources, p.targets, seed, "radial"))
        for p in [p for p in choices if p.name in LIMITED] or choices[:2]
        for seed in range(seeds)
        for kind in (BASELINE, OURS)
    ]
    planned += [
        Planned("ablation", row, column, job(OURS, sources, targets, 0, head, **settings, **more))
        for sources, targets, _ in ([] if quick else left_out)
        for row, (head, settings) in BOUNDARIES.items()
        for column, more in SYNERGY.items()
    ]
    return planned


def corpora_of(config: Config, terminal: Terminal) -> dict[str, Path]:
    """Returns domain -> folder; what section bench names and is not there yet is imported or rendered."""
    root, wanted = Path(config.data.corpora), config.bench
    missing = [d for d in (*wanted.sets, *wanted.added_domains) if not (root / d / "manifest.json").exists()]
    if (real := [d for d in missing if d in wanted.sets]) and not (
        wanted.root and Path(wanted.root).is_dir()
    ):
        raise ValueError(
            f"bench.root: {wanted.root} is not there; set it to the folder that holds {', '.join(real)}, "
            f"or run `palisade import KIND FOLDER --domain {real[0]}`"
        )
    for domain in missing:
        kind, place = wanted.sets.get(domain, "rendered"), Path(str(wanted.root)) / domain
        import_into(config, terminal, kind=kind, root=place if domain in wanted.sets else None, name=domain)
    manifests = {p.parent.name: read_manifest(p.parent) for p in sorted(root.glob("*/manifest.json"))}
    real = [d for d, m in manifests.items() if (d in wanted.sets if wanted.sets else m.kind != "rendered")]
    used = [d for d in manifests if d in real or d in wanted.added_domains]
    if len(real) < 3:
        held = ", ".join(used) or "nothing"
        raise ValueError(f"data.corpora: {root} holds {held}; leaving one out needs at least 3 domains")
    for domain in used:
        m = manifests[domain]
        if m.size != config.data.frame_px:
            where = f"{domain} in {root / domain} was imported at {m.size}"
            raise ValueError(f"data.frame_px: {config.data.frame_px}, but {where}")
        if domain in real and not 0 < m.bona_fide.get("test", 0) < m.rows.get("test", 0):
            why = "the test split must hold bona fide and attack rows; it is a target in its turn"
            raise ValueError(f"{root / domain}: {why}")
    return {d: root / d for d in used}


def _by_table(planned: list[Planned], results: Mapping[Job, Result]) -> dict[str, Runs]:
    """Returns the results by table, row and column.

    A column that lacks a seed is left out: a mean over what happened to survive would be another figure.
    """
    runs: dict[str, Runs] = {"main": {}, "limited": {}, "ablation": {}}
    wanted = Counter(p[:3] for p in planned)
    there = Counter(p[:3] for p in planned if p.job in results)
    for p in planned:
        if p.job in results and (p.table == "ablation" or there[p[:3]] == wanted[p[:3]]):
            runs[p.table].setdefault(p.row, defaultdict(list))[p.column].append(results[p.job])
    return runs
