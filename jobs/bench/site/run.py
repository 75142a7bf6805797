"""``palisade bench site``: every site method on the same streams, from the same source models, scored before
it learns.

Streams are recorded sites, domains that the source model has not learned from, and rendered scenarios,
hostile ones among them. Thresholds come from source validation. Every fit and every run is stored when it is
done, so a second call goes on.
"""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.bench import speed
from jobs.bench.figures import conclude, context
from jobs.bench.parts import code_of
from jobs.bench.site import courses, online, streams
from jobs.bench.site.courses import FILLS, MethodJob
from jobs.bench.site.figures import Found, figures
from jobs.bench.site.page import numbers, reported, shown
from jobs.bench.site.streams import Given, SourceJob
from jobs.bench.source.run import corpora_of
from jobs.pretrain import pretrained
from pipeline.cluster import connected
from pipeline.config import method_config, methods
from pipeline.data.corpora import write_corpus
from pipeline.data.corpus import read_manifest
from pipeline.data.protocols import leave_one_domain_out
from pipeline.models import checkpoint
from pipeline.report import site as report
from pipeline.report.content import Figure
from pipeline.report.site import BASELINE, OURS
from pipeline.simulate import scenarios
from pipeline.simulate.corpora import synth

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.site.contract import SiteMethod

QUICK = (BASELINE, "recalibrate", "tent", OURS)
QUICK_SCALE = 0.3  # of a scenario's length
RENDERED = ("pipeline/simulate/*.py", "pipeline/data/decode.py")
TOLD = ("shifted", "clean", "one-class", "poisoning")  # groups on which our additions are told apart
ASIDE = ("door-0.9", "door-0.5", "drip-1", "kiosk-drip")  # of them
LABELS, WEIGHTS = ("all", "confidence", "vote"), ("one", "omega", "restore")
AS_PUBLISHED: dict[str, object] = {  # danet without our additions: what the abstract names
    "calibrate": False,
    "trigger": None,
    "session_cap": None,
    "sessions": 0,
    "groups": None,
    "lr": 1e-3,
}
ADDITIONS: dict[str, tuple[str, dict[str, object]]] = {  # row → what it shows, settings of danet
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


@dataclass(frozen=True)
class Planned:
    """One run and the table it is for."""

    table: str  # main, fills, ablation or additions
    row: str
    job: MethodJob


def bench_site(config: Config, terminal: Terminal, *, quick: bool, seeds: int | None) -> int:
    """Fit sources, prepare streams, run methods, compare, write the page."""
    started = time.monotonic()
    count = 1 if quick else seeds or config.bench.seeds
    folders = corpora_of(config, terminal)
    if config.bench.pretrain:
        start = config.source.model_copy(update={"start": str(pretrained(config, terminal))})
        config = config.model_copy(update={"source": start})
    given = _given(config, terminal, folders, quick=quick)
    domains = sorted(set(folders) - set(config.bench.added_domains))
    wanted = _sources(config, domains, seeds=count, quick=quick)
    with connected(config.cluster):
        with terminal.progress("bench site", "source models") as advance:
            sources = courses.run_sources(wanted, given, on_progress=advance)
        planned = plan(config, wanted, quick=quick)
        with terminal.progress("bench site", "runs") as advance:
            done = courses.run_methods([p.job for p in planned], given, sources, on_progress=advance)
    for p in planned:
        if p.job not in done:
            terminal.say(f"{p.row} on {p.job.source.name}, seed {p.job.source.seed}: no result")
    terminal.say("timing a step beside forward-only")
    model = checkpoint.load(sources[wanted[0]].model)
    found = Found(
        config=config,
        scenarios=given.scenarios,
        prepared={job: streams.read_prepared(s.streams) for job, s in sources.items()},
        courses={
            (p.table, p.row, p.job): courses.read_courses(done[p.job]) for p in planned if p.job in done
        },
        costs=speed.adaptation(
            model, {p.row: _method(p.job) for p in planned if p.table == "main"}, batch=config.bank.batch_size
        ),
        borne=online.degenerate(config.site, model.tail, batch=config.bank.batch_size),
        state_kib=sum(t.numel() * t.element_size() for t in config.site.init(model.tail).values()) / 1024,
    )
    made = reported(found, quick=quick)
    decided = figures(found, made, seeds=count)
    facts = context(
        started,
        seeds=list(range(count)),
        quick=quick,
        runs=len(planned),
        sources=len(wanted),
        data={d: read_manifest(path).digest[:12] for d, path in folders.items()},
    )
    out = config.folder("reports", "bench-site-quick.html" if quick else "bench-site.html")
    rows = tuple(Figure(f.name, f.measured, "", f.target, f.holds, f.note) for f in decided)
    report.write(replace(made, figures=rows, context={k: str(v) for k, v in facts.items()}), out)
    return conclude(
        terminal, decided, {**facts, **numbers(made), "page": str(out)}, *shown(made), f"page: {out}"
    )


def plan(config: Config, sources: Sequence[SourceJob], *, quick: bool) -> list[Planned]:
    """All runs, the comparison first; the parts of danet are told apart on the first seed."""

    def of(
        table: str, row: str, source: SourceJob, kind: str, settings: dict[str, object], **more: object
    ) -> Planned:
        own = config.site.model_dump() if config.site.model_dump()["kind"] == kind else {}
        stated = method_config("site", kind).model_validate({**own, "kind": kind, **settings})
        job = MethodJob(row, source, stated.model_dump_json(), **more)  # pyright: ignore[reportArgumentType]
        return Planned(table, row, job)

    planned: list[Planned] = []
    for source in sources:
        for kind in QUICK if quick else methods("site"):
            planned.append(of("main", kind, source, kind, {}))
            published = getattr(importlib.import_module(f"pipeline.site.methods.{kind}"), "PUBLISHED", {})
            other = of("main", f"{kind} (published)", source, kind, published)
            if not quick and other.job.site != planned[-1].job.site:
                planned.append(other)
    whole = [s for s in sources if s.target is None]
    missing = tuple(s.name for s in scenarios.scenarios() if s.group == "missing")
    missing += tuple(site for site, group in config.bench.groups.items() if group == "missing")
    for source in whole:
        planned += [of("fills", fill, source, BASELINE, {}, fill=fill, only=missing) for fill in FILLS]
    if quick:
        return planned
    told = tuple(s.name for s in scenarios.scenarios() if s.group in TOLD) + tuple(
        site for site, group in config.bench.groups.items() if group in TOLD
    )
    told = tuple(name for name in told if name not in ASIDE)
    planned += [
        of("additions", row, whole[0], OURS, settings, only=told) for row, (_, settings) in ADDITIONS.items()
    ]
    moved = (
        *(site for site, group in config.bench.groups.items() if group == "shifted"),
        "rig-g",
        "rig-swapped",
    )
    for fill in (FILLS[0], *FILLS[2:]):
        for labels in LABELS:
            for weight in WEIGHTS:
                settings = {**AS_PUBLISHED, "labels": labels, "weight": weight}
                row = f"{fill} | {labels} | {weight}"
                planned.append(of("ablation", row, whole[0], OURS, settings, fill=fill, only=missing + moved))
    return planned


def _sources(config: Config, domains: Sequence[str], *, seeds: int, quick: bool) -> list[SourceJob]:
    """One source model on everything, and one without each domain, per seed."""
    steps = config.bench.quick_steps if quick else config.source.steps
    made: list[SourceJob] = []
    for seed in range(seeds):
        method = config.source.model_copy(update={"seed": seed, "steps": steps})
        stated, model = method.model_dump_json(), config.model.model_dump_json()
        parts = [
            ("all", tuple(domains), None),
            *((p.name, p.sources, p.target) for p in leave_one_domain_out(list(domains))),
        ]
        made += [
            SourceJob(name, seed, stated, model, (*d, *config.bench.added_domains), target)
            for name, d, target in parts
        ]
    return made


def _method(job: MethodJob) -> SiteMethod:
    stated = json.loads(job.site)
    return method_config("site", stated["kind"]).model_validate(stated)


def _given(config: Config, terminal: Terminal, folders: dict[str, Path], *, quick: bool) -> Given:
    """Where the streams come from; the pool of the scenarios is rendered when it is not there."""
    captures = config.bench.streams
    if captures and not Path(captures).is_dir():
        raise ValueError(
            f"bench.streams: {captures} is not there; set it to a folder of site streams, or to null"
        )
    return Given(
        corpora={d: str(p.resolve()) for d, p in folders.items()},
        pool=str(_pool(config, terminal).resolve()),
        captures=str(Path(captures).resolve()) if captures else None,
        limits=config.data.model_dump_json(),
        scenarios=tuple(scenarios.scenarios(QUICK_SCALE if quick else 1.0)),
        attacker=config.site.model_dump_json(),
        batch=config.bank.batch_size,
        place=str(config.folder("bench", "site")),
    )


def _pool(config: Config, terminal: Terminal) -> Path:
    """Folder of the rendered captures that scenarios draw from, named by what they follow from."""
    folder = config.folder("bench", "site", f"pool-{config.data.frame_px}-{code_of(*RENDERED)[:16]}")
    if not (folder / "manifest.json").exists():
        plan_ = scenarios.clips()
        with terminal.progress("render scenarios", "captures") as advance:
            rows = synth.render(
                plan_, size=config.data.frame_px, workers=config.cluster.cpus, progress=advance
            )
            write_corpus(rows, folder, domain="scenarios", kind=synth.KIND, size=config.data.frame_px)
    return folder
