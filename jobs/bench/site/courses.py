"""Fits source models, prepares their streams and runs site methods on them, as Ray tasks that store."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from jobs.bench.parts import code_of, load, part, save
from jobs.bench.site import online
from jobs.bench.site.streams import Ground, Prepared, SourceJob, prepare
from jobs.bench.source.fits import key_of
from pipeline.cluster.tasks import Failed, run_tasks
from pipeline.data.corpus import read_corpus, read_manifest
from pipeline.models import checkpoint
from pipeline.source import fit as fits
from pipeline.source.calibrate import transfer_boundaries

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from jobs.bench.site.online import Course, Stream
    from pipeline.site.contract import Params, SiteMethod

STREAMS = (  # what the prepared streams depend on, beside the model
    "pipeline/simulate/*.py",
    "pipeline/data/decode.py",
    "pipeline/data/captures.py",
    "pipeline/data/assemble.py",
    "pipeline/data/featurise.py",
    "pipeline/data/segments.py",
    "pipeline/site",
    "jobs/bench/site/streams.py",
)
METHODS = (
    "pipeline/site/*.py",
    "pipeline/stats/metrics.py",
    "jobs/bench/site/online.py",
    "jobs/bench/site/courses.py",
)
FILLS = ("zero-fill", "zero-fill, own thresholds", "mean-fill", "substitute", "substitute + enhance")
SHUT = -30.0  # of a gate through which nothing comes


class Source(NamedTuple):
    """A fitted source model and the file with its streams."""

    model: Path
    streams: Path


@dataclass(frozen=True)
class MethodJob:
    """One site method on the streams of one source model."""

    name: str
    source: SourceJob
    method: SiteMethod
    fill: str = FILLS[-1]  # what stands in for a missing modality
    only: tuple[str, ...] = ()  # streams; empty: all


def run_sources(
    jobs: Sequence[SourceJob], ground: Ground, *, on_progress: Callable[[int, int], None]
) -> dict[SourceJob, Source]:
    """Fits and prepares what is not stored yet; the adaptive attacker holds the next seed's model."""
    place = ground.place / "sources"
    models = {job: part(place, job.name, *_source_key(job, ground), suffix="") for job in jobs}
    sources = {job: Source(m, part(m, "streams", *_streams_key(job, ground))) for job, m in models.items()}
    whole = [job for job in jobs if job.target is None]
    rival = {job: models[whole[(i + 1) % len(whole)]] for i, job in enumerate(whole)}
    unfitted = {job: s for job, s in sources.items() if not (s.model / "manifest.json").exists()}
    _run(_fit, [(job, ground, s.model) for job, s in unfitted.items()], 0, len(jobs), on_progress)
    unprepared = {job: s for job, s in sources.items() if not s.streams.exists()}
    calls = [(job, ground, s.model, rival.get(job, s.model), s.streams) for job, s in unprepared.items()]
    _run(prepare, calls, len(jobs), len(jobs), on_progress)
    return sources


def run_methods(
    jobs: Sequence[MethodJob],
    ground: Ground,
    sources: Mapping[SourceJob, Source],
    *,
    on_progress: Callable[[int, int], None],
) -> dict[MethodJob, dict[str, Course]]:
    """Runs what is not stored yet; returns stream -> course of every job, of a failed one nothing."""
    paths = {job: _course_path(job, sources[job.source], ground) for job in jobs}
    missing = [(job, ground, sources[job.source], path) for job, path in paths.items() if not path.exists()]
    done = len(paths) - len(missing)
    run_tasks(_adapt, missing, on_progress=lambda n: on_progress(done + n, len(paths)))
    return {job: load(path, dict[str, online.Course]) for job, path in paths.items() if path.exists()}


def filled(tail: Params, fill: str, v: Stream, domain: np.ndarray) -> Params:
    """Returns ``tail`` with another stand-in for a missing modality, boundaries set anew on ``v``."""
    z, present = v.features.z, v.features.present
    if fill == FILLS[-1]:
        return tail
    changed = {**tail, "gate": torch.full_like(tail["gate"], SHUT)}
    if fill.startswith("zero-fill"):
        changed["fill"] = torch.zeros_like(z[0])
    elif fill == "mean-fill":
        changed["fill"] = (z * present[..., None]).sum(0) / present.sum(0)[:, None].clamp(min=1)
    changed |= transfer_boundaries(changed, z, present, v.label, domain)
    return {**changed, "pattern": torch.zeros_like(changed["pattern"])} if fill == "zero-fill" else changed


def _run(
    task: Callable[..., None],
    calls: Sequence[tuple[object, ...]],
    before: int,
    jobs: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Runs the calls of one of two rounds over all ``jobs``; ValueError with the first error."""
    done = before + jobs - len(calls)
    for ended in run_tasks(task, calls, on_progress=lambda n: on_progress(done + n, 2 * jobs)):
        if isinstance(ended, Failed):
            raise ValueError(f"bench site: a source model or its streams: {ended.why}")


def _fit(job: SourceJob, ground: Ground, path: Path) -> None:
    torch.set_num_threads(1)
    if not (path / "manifest.json").exists():
        corpora = [read_corpus(ground.corpora[d], ("train", "val")) for d in job.domains]
        task = fits.Task(job.method, job.model, corpora[0].frame.shape[-1])
        checkpoint.save(path, fits.fit(task, corpora))


def _adapt(job: MethodJob, ground: Ground, source: Source, path: Path) -> None:
    torch.set_num_threads(1)
    if path.exists():
        return
    p = load(source.streams, Prepared)
    tail = filled(checkpoint.load(source.model).tail, job.fill, p.validation, p.domain)
    chosen = {name: s for name, s in p.streams.items() if not job.only or name in job.only}
    facts = {"batch": ground.batch, "threshold": p.threshold}
    save(path, online.run(job.method, tail, chosen, p.probes, source=p.validation, **facts))


def _source_key(job: SourceJob, ground: Ground) -> tuple[object, ...]:
    return key_of(job.method, job.model, [read_manifest(ground.corpora[d]).digest for d in job.domains])


def _streams_key(job: SourceJob, ground: Ground) -> tuple[object, ...]:
    if job.target:
        return read_manifest(ground.corpora[job.target]).digest, code_of(*STREAMS)
    drawn = [asdict(s) for s in ground.scenarios], str(ground.captures), ground.attacker, ground.batch
    return read_manifest(ground.pool).digest, *drawn, job.method.seed, code_of(*STREAMS)


def _course_path(job: MethodJob, source: Source, ground: Ground) -> Path:
    code = code_of(*METHODS, f"pipeline/site/methods/{job.method.kind}*")
    inputs = job.method, job.fill, job.only, source.model.name, source.streams.name, code
    return part(ground.place / "courses", job.name, *inputs)
