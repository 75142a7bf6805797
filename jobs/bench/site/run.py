"""Compares all site methods on the same streams, from the same source models, scored before they learn.

``palisade bench site``: streams are recorded sites, domains that the source model has not learned from, and
rendered scenarios, hostile ones among them. Thresholds come from source validation.
"""

from __future__ import annotations

import importlib
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jobs.bench import speed
from jobs.bench.parts import code_of, load
from jobs.bench.report import conclude, context, glossary, notes
from jobs.bench.site import courses, labels, online, page
from jobs.bench.site.courses import FILLS, MethodJob
from jobs.bench.site.results import BASELINE, OURS, Results, figures
from jobs.bench.site.streams import Ground, Prepared, SourceJob
from jobs.bench.source.run import begun, corpora_of
from pipeline.cluster import connected
from pipeline.config import method_config, methods
from pipeline.control.deployment import now
from pipeline.data.corpora import write_corpus
from pipeline.data.corpus import read_manifest
from pipeline.data.protocols import leave_one_domain_out
from pipeline.models import checkpoint
from pipeline.report.bench import Report
from pipeline.simulate import scenarios
from pipeline.simulate.corpora import synth
from pipeline.site.contract import LabelsAlone

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jobs.terminal import Terminal
    from pipeline.config import Config

QUICK = (BASELINE, "recalibrate", "tent", OURS)
QUICK_SCALE = 0.3  # of a scenario's length
RENDERED = ("pipeline/simulate/*.py", "pipeline/data/decode.py")
JUDGED = ("shifted", "clean", "one-class", "poisoning")  # groups on which our additions are told apart,
ASIDE = ("door-0.9", "door-0.5", "drip-1", "kiosk-drip")  # but for these streams of them
MOVED = ("rig-g", "rig-swapped")  # streams of the ablation, with the missing and the recorded shifted ones
LABELS, WEIGHTS = ("all", "confidence", "vote"), ("one", "omega", "restore")
AS_PUBLISHED: dict[str, object] = {  # danet without our additions: what the abstract names
    "calibrate": False,
    "trigger": None,
    "session_cap": None,
    "sessions": 0,
    "groups": None,
    "lr": 1e-3,
}
ADDITIONS: dict[str, tuple[str, dict[str, object]]] = {  # row -> what it shows, settings of danet
    "default": ("everything as configured", {}),
    "reconstruction alone": ("no calibration, no trigger, no cap, mean gradient", AS_PUBLISHED),
    "without calibration": ("gradients only", {"calibrate": False}),
    "calibration alone": ("no gradients", {"learn": False}),
    "without trigger": ("learns without evidence of a shift", {"trigger": None}),
    "loosens at once": ("no attack need be seen before the boundary loosens", {"min_attack_count": 0}),
    "whoever is the majority": (
        "the boundary loosens where attacks outnumber bona fide too",
        {"min_bona_fide_ratio": 0.0},
    ),
    "any shift": ("a shift of less than half a logit counts too", {"shift_min_logits": 0.0}),
    "tightens too": ("the boundary follows upwards as well", {"tighten": 2.0}),
    "without session cap": ("every capture of a session counts", {"session_cap": None, "sessions": 0}),
    "mean gradient": ("no median of means over sessions", {"groups": None}),
    "prototypes": ("a label needs the nearest source direction", {"prototypes": True}),
    "conformal 0.05": ("a label needs to be typical of its class", {"conformal": 0.05}),
    "mode da": ("labelled source features stay in the loss", {"mode": "da"}),
}


class Planned(NamedTuple):
    """One run and its place in a table."""

    table: str  # main, fills, ablation or additions
    row: str
    job: MethodJob


def bench_site(
    config: Config, terminal: Terminal, *, quick: bool, seeds: int | None, write: bool = False
) -> int:
    """Fits sources, prepares streams, runs and compares all methods; exit 0 if every figure holds, else 3."""
    started, count = time.monotonic(), 1 if quick else seeds or config.bench.seeds
    folders = corpora_of(config, terminal)
    config = begun(config, terminal)
    ground = _ground(config, terminal, folders, quick=quick)
    domains = sorted(set(folders) - set(config.bench.added_domains))
    wanted = _sources(config, domains, seeds=count, quick=quick)
    planned, taught = plan(config, wanted, quick=quick), labels.plan(config.site, wanted)
    with connected(config.cluster):
        with terminal.progress("bench site", "source models") as advance:
            sources = courses.run_sources(wanted, ground, on_progress=advance)
        with terminal.progress("bench site", "runs") as advance:
            done = courses.run_methods([p.job for p in planned], ground, sources, on_progress=advance)
        with terminal.progress("bench site", "labels") as advance:
            told = labels.run(taught, ground, sources, on_progress=advance)
    for row, job in [
        *((p.row, p.job) for p in planned if p.job not in done),
        *((j.row, j) for j in taught if j not in told),
    ]:
        terminal.say(f"{row} on {job.source.name}, seed {job.source.method.seed}: no result")
    terminal.say("timing a step beside forward-only")
    model, batch = checkpoint.load(sources[wanted[0]].model), config.bank.batch_size
    compared = {p.row: p.job.method for p in planned if p.table == "main"}
    r = Results(
        groups=config.bench.groups,
        scenarios={s.name: s for s in ground.scenarios},
        prepared={job: load(s.streams, Prepared) for job, s in sources.items()},
        courses={(p.table, p.row, p.job): done[p.job] for p in planned if p.job in done},
        costs=speed.adaptation(model, compared, batch=batch),
        degenerate=online.degenerate(config.site, model.tail, batch=batch),
        state_kib=sum(t.nbytes for t in config.site.init(model.tail).values()) / 1024,
        batch=batch,
        labels=told,
    )
    data, seeds_ = {d: read_manifest(path).digest[:12] for d, path in folders.items()}, list(range(count))
    counts = {"runs": len(planned), "taught": len(taught), "sources": len(wanted)}
    facts = context("site", started, quick=quick, seeds=seeds_, **counts, data=data)
    return conclude(config, terminal, _report(r, facts, count), write=write)


def _report(r: Results, facts: dict[str, object], seeds: int) -> Report:
    rows, quick = page.method_rows(r), bool(facts["quick"])
    decided = figures(r, {m.method: m.hter.value for m in rows}, seeds=seeds)
    return Report(
        name="site",
        title="Site methods",
        created=now(),
        figures=decided,
        sections=page.sections(r, rows, {row: words for row, (words, _) in ADDITIONS.items()}, quick=quick),
        context=facts,
        answer=page.answer(rows, decided),
        notes=notes("site", ours=OURS),
        own=(OURS, "default"),
        glossary=glossary("site", r.main),
    )


def plan(config: Config, sources: Sequence[SourceJob], *, quick: bool) -> list[Planned]:
    """Returns all runs, the comparison first; the parts of danet are told apart on the first seed."""
    own = config.site.model_dump()

    def job(
        row: str,
        source: SourceJob,
        kind: str,
        changes: Mapping[str, object],
        fill: str = FILLS[-1],
        only: Sequence[str] = (),
    ) -> MethodJob:
        settings = {**(own if own["kind"] == kind else {}), "kind": kind, **changes}
        return MethodJob(row, source, method_config("site", kind).model_validate(settings), fill, tuple(only))

    def streams(*groups: str) -> list[str]:
        rendered = [s.name for s in scenarios.scenarios() if s.group in groups]
        return rendered + [site for site, group in config.bench.groups.items() if group in groups]

    planned: list[Planned] = []
    for source in sources:
        for kind in QUICK if quick else online_methods():
            ours = job(kind, source, kind, {})
            planned.append(Planned("main", kind, ours))
            published = getattr(importlib.import_module(f"pipeline.site.methods.{kind}"), "PUBLISHED", {})
            other = job(f"{kind} (published)", source, kind, published)
            if not quick and other.method != ours.method:
                planned.append(Planned("main", other.name, other))
    whole, missing = [s for s in sources if s.target is None], streams("missing")
    planned += [
        Planned("fills", fill, job(fill, s, BASELINE, {}, fill, missing)) for s in whole for fill in FILLS
    ]
    if quick:
        return planned
    judged = [name for name in streams(*JUDGED) if name not in ASIDE]
    planned += [
        Planned("additions", row, job(row, whole[0], OURS, settings, only=judged))
        for row, (_, settings) in ADDITIONS.items()
    ]
    shifted = [*missing, *(site for site, group in config.bench.groups.items() if group == "shifted"), *MOVED]
    for fill, kind, weight in itertools.product((FILLS[0], *FILLS[2:]), LABELS, WEIGHTS):
        row, settings = f"{fill} | {kind} | {weight}", {**AS_PUBLISHED, "labels": kind, "weight": weight}
        planned.append(Planned("ablation", row, job(row, whole[0], OURS, settings, fill, shifted)))
    return planned


def online_methods() -> list[str]:
    """Returns the site methods that a stream may change; those of labels alone have a table of their own."""
    return [k for k in methods("site") if not issubclass(method_config("site", k), LabelsAlone)]


def _sources(config: Config, domains: list[str], *, seeds: int, quick: bool) -> list[SourceJob]:
    """Returns one source model on everything, and one without each domain, per seed."""
    steps = config.bench.quick_steps if quick else config.source.steps
    left_out = [(p.name, p.sources, p.target) for p in leave_one_domain_out(domains)]
    return [
        SourceJob(name, method, config.model, (*learned, *config.bench.added_domains), target)
        for method in (config.source.model_copy(update={"seed": s, "steps": steps}) for s in range(seeds))
        for name, learned, target in [("all", tuple(domains), None), *left_out]
    ]


def _ground(config: Config, terminal: Terminal, folders: dict[str, Path], *, quick: bool) -> Ground:
    """Returns where the streams come from; the pool of the scenarios is rendered when it is not there."""
    captures = config.bench.streams
    if captures and not Path(captures).is_dir():
        raise ValueError(
            f"bench.streams: {captures} is not there; set it to a folder of site streams, or to null"
        )
    pool = config.folder("bench", "site", f"pool-{config.data.frame_px}-{code_of(*RENDERED)[:16]}")
    if not (pool / "manifest.json").exists():
        with terminal.progress("render scenarios", "captures") as advance:
            size, workers = config.data.frame_px, config.cluster.cpus
            rows = synth.render(scenarios.clips(), size=size, workers=workers, progress=advance)
            write_corpus(rows, pool, domain="scenarios", kind=synth.KIND, size=size)
    return Ground(
        corpora={d: p.resolve() for d, p in folders.items()},
        pool=pool.resolve(),
        captures=Path(captures).resolve() if captures else None,
        limits=config.data,
        scenarios=tuple(scenarios.scenarios(QUICK_SCALE if quick else 1.0)),
        attacker=config.site,
        batch=config.bank.batch_size,
        place=config.folder("bench", "site"),
    )
