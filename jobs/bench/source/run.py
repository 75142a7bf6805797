"""``palisade bench source``: compares all source methods on the same trunk, tail, sampler and threshold rule.

Leaves one domain out: every method with one seed; RiSe, ERM and the two closest others with all. Takes
modalities away at test, learns from two domains only and from all, and takes RiSe apart; unseen instruments
and speed are measured beside. Thresholds come from source
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
from jobs.bench.source.page import ABLATED, ABLATION, BASELINE, OURS
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
    from collections.abc import Iterable, Mapping, Sequence

    from jobs.bench.source.compare import Runs
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.source.contract import SourceMethod

LIMITED = ("CW->PS", "PS->CW")  # the published two; other domains: the first two choices
CLOSEST = 2  # baselines beside erm that get every seed, by their first


class Planned(NamedTuple):
    """One fit and its place in a table."""

    table: str  # main, limited, ablation or together
    row: str  # method or setting
    column: str  # target or protocol
    job: Job


def bench_source(
    config: Config, terminal: Terminal, *, quick: bool, seeds: int | None, write: bool = False
) -> int:
    """Fits, scores and compares all methods; exit 0 if every figure holds, else 3."""
    started, began = time.monotonic(), time.time()
    folders = corpora_of(config, terminal)
    count = 1 if quick else seeds or config.bench.seeds
    config = begun(config, terminal)
    steps = config.bench.quick_steps if quick else config.source.steps
    config = config.model_copy(update={"source": config.source.model_copy(update={"steps": steps})})
    domains = sorted(set(folders) - set(config.bench.added_domains))
    with connected(config.cluster):
        with terminal.progress("stem maps", "files") as advance:
            least = len(folders) - 1 if quick else 2  # the fewest sources of a fit
            fill_stems(config, list(folders.values()), SPLITS, least=least, on_progress=advance)
        planned = compared(config, domains, (BASELINE, OURS) if quick else methods("source"), range(1))
        paths = _fitted(config, terminal, folders, planned)
        if not quick:
            rows = compare.method_rows(_by_table(planned, _results(paths))["main"], OURS)
            closest = [r.method for r in rows if r.method not in (BASELINE, OURS)][:CLOSEST]
            again = compared(config, domains, (OURS, BASELINE, *closest), range(1, count))
            planned += [*again, *others(config, domains, count)]
            paths = _fitted(config, terminal, folders, planned)
    results = _results(paths)
    runs = _by_table(planned, results)
    stored = sum(r.seconds for job, r in results.items() if paths[job].stat().st_mtime < began)
    terminal.say("timing a training step beside a bare DataLoader loop, and a capture")
    corpora = [read_corpus(folders[d], ("train", "val")) for d in domains]
    task = fits.Task(config.source, config.model, config.data.frame_px)
    with fits.threads(config.cluster.cpus):
        timed = speed.measure(task, corpora)
    cost = speed.capture_cost(task)
    ends = degenerate(task, corpora)
    m = page.Measured(**runs, speed=timed, cost=cost, degenerate=ends, targets=len(domains))
    seconds = time.monotonic() - started + stored / config.cluster.cpus
    facts = context(
        "source",
        started,
        quick=quick,
        seeds=list(range(count)),
        steps=steps,
        fits=len(planned),
        data={d: read_manifest(path).digest[:12] for d, path in folders.items()},
    )
    return conclude(config, terminal, _report(config, m, facts, seconds), write=write)


def _fitted(
    config: Config, terminal: Terminal, folders: Mapping[str, Path], planned: Sequence[Planned]
) -> dict[Job, Path]:
    """Returns the result files of the fits that succeeded, and says why the others did not."""
    with terminal.progress("bench source", "fits") as advance:
        place, workers = config.folder("bench", "source"), config.cluster.cpus
        ended = run([p.job for p in planned], folders, folder=place, workers=workers, on_progress=advance)
    for p in planned:
        if isinstance(why := ended[p.job], Failed):
            terminal.say(f"{p.row} {p.column} seed {p.job.method.seed}: no result: {why.why}")
    return {job: path for job, path in ended.items() if isinstance(path, Path)}


def _results(paths: Mapping[Job, Path]) -> dict[Job, Result]:
    return {job: load(path, Result) for job, path in paths.items()}


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


def compared(
    config: Config, domains: Sequence[str], kinds: Sequence[str], seeds: Iterable[int]
) -> list[Planned]:
    """Returns the fits of the comparison: every method, each domain left out in turn."""
    return [
        Planned("main", kind, p.target, _job(config, kind, p.sources, (p.target,), seed))
        for p in leave_one_domain_out(domains)
        for seed in seeds
        for kind in kinds
    ]


def others(config: Config, domains: Sequence[str], seeds: int) -> list[Planned]:
    """Returns the fits of the other tables: two sources, our method part by part, and all sets together."""
    choices = limited_source(domains)
    planned = [
        Planned("limited", kind, p.name, _job(config, kind, p.sources, p.targets, 0))
        for p in [p for p in choices if p.name in LIMITED] or choices[:2]
        for kind in (BASELINE, OURS)
    ]
    planned += [
        Planned("ablation", row, p.target, _job(config, OURS, p.sources, (p.target,), 0, head, settings))
        for p in leave_one_domain_out(domains)[:ABLATED]
        for row, (head, settings) in ABLATION.items()
    ]
    whole = tuple(domains)
    return planned + [
        Planned("together", OURS, "all", _job(config, OURS, whole, whole, seed)) for seed in range(seeds)
    ]


def _job(
    config: Config,
    kind: str,
    sources: tuple[str, ...],
    targets: tuple[str, ...],
    seed: int,
    head: str = "radial",
    more: Mapping[str, object] | None = None,
) -> Job:
    """A method with the configured schedule, and its other settings too if it is the configured one."""
    own = config.source.model_dump()
    shared = {k: v for k, v in own.items() if k in SourceMethod.model_fields}
    settings = {**(own if kind == own["kind"] else shared), **(more or {}), "kind": kind, "seed": seed}
    method = method_config("source", kind).model_validate(settings)
    model = config.model.model_copy(update={"tail": config.model.tail.model_copy(update={"head": head})})
    return Job(method, model, (*sources, *config.bench.added_domains), targets)


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


def _by_table(planned: Sequence[Planned], results: Mapping[Job, Result]) -> dict[str, Runs]:
    """Returns the results by table, row and column.

    A column that lacks a seed is left out: a mean over what happened to survive would be another figure.
    """
    runs: dict[str, Runs] = {"main": {}, "limited": {}, "ablation": {}, "together": {}}
    wanted = Counter(p[:3] for p in planned)
    there = Counter(p[:3] for p in planned if p.job in results)
    for p in planned:
        if p.job in results and there[p[:3]] == wanted[p[:3]]:
            runs[p.table].setdefault(p.row, defaultdict(list))[p.column].append(results[p.job])
    return runs
