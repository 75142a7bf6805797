"""Source models, their streams and site methods on these streams, as Ray tasks.

Everything is stored as soon as it is done and named by all that it depends on: an interrupted benchmark goes
on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from jobs.bench.parts import code_of, digest, store
from jobs.bench.site import online
from jobs.bench.site.online import Course, Rates
from jobs.bench.site.streams import Given, SourceJob, prepare, read_prepared
from jobs.bench.source.fits import CODE
from pipeline.cluster.tasks import Failed, run_tasks
from pipeline.cluster.train import started
from pipeline.config import method_config
from pipeline.data.corpus import read_corpus, read_manifest
from pipeline.models import ModelConfig, checkpoint
from pipeline.source import fit as fits
from pipeline.source.calibrate import equal_error_boundaries
from pipeline.source.holdout import read_stored
from pipeline.storage import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipeline.site.contract import Params

STREAMS = (
    "pipeline/simulate/*.py",
    "pipeline/data/decode.py",
    "pipeline/data/captures.py",
    "pipeline/data/featurise.py",
    "pipeline/site/*.py",
    "pipeline/site/methods/**/*.py",
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
    site: str  # JSON of the method's Config
    fill: str = FILLS[-1]
    only: tuple[str, ...] = ()  # streams; empty: all


def run_sources(
    jobs: Sequence[SourceJob], given: Given, *, on_progress: Callable[[int, int], None]
) -> dict[SourceJob, Source]:
    """Fit and prepare what is not stored yet. The adaptive attacker holds the next seed's model; of one seed,
    the same.
    """
    models = {job: Path(given.place) / "sources" / _name(job.name, _source_key(job, given)) for job in jobs}
    made = {
        job: Source(model, model / f"streams-{_streams_key(job, given)}.npz") for job, model in models.items()
    }
    whole = [job for job in jobs if job.target is None]
    rival = {job: models[whole[(i + 1) % len(whole)]] for i, job in enumerate(whole)}
    fit = [(job, given, str(s.model)) for job, s in made.items() if not (s.model / "manifest.json").exists()]
    whole_way = 2 * len(jobs)
    ended = run_tasks(_fit, fit, on_progress=lambda done: on_progress(len(jobs) - len(fit) + done, whole_way))
    _raise_first(ended)
    left = [
        (job, given, str(s.model), str(rival.get(job, s.model)), str(s.streams))
        for job, s in made.items()
        if not s.streams.exists()
    ]
    ended = run_tasks(
        prepare, left, on_progress=lambda done: on_progress(whole_way - len(left) + done, whole_way)
    )
    _raise_first(ended)
    on_progress(2 * len(jobs), 2 * len(jobs))
    return made


def run_methods(
    jobs: Sequence[MethodJob],
    given: Given,
    sources: Mapping[SourceJob, Source],
    *,
    on_progress: Callable[[int, int], None],
) -> dict[MethodJob, Path]:
    """Run what is not stored yet → each job's result file; one whose task failed has none."""
    paths = {
        job: Path(given.place) / "courses" / f"{_name(job.name, _method_key(job, sources[job.source]))}.npz"
        for job in jobs
    }
    missing = [job for job in dict.fromkeys(jobs) if not paths[job].exists()]
    calls = [(job, given, *map(str, sources[job.source]), str(paths[job])) for job in missing]
    run_tasks(_adapt, calls, on_progress=lambda done: on_progress(len(jobs) - len(missing) + done, len(jobs)))
    return {job: path for job, path in paths.items() if path.exists()}


def read_courses(path: Path) -> dict[str, Course]:
    """What ``run_methods`` stored, by stream; ValueError for anything else."""
    return read_stored(path, _courses)


def _courses(arrays: dict[str, np.ndarray]) -> dict[str, Course]:
    found: dict[str, Course] = {}
    for name in {n.rsplit(".", 1)[0] for n in arrays}:
        facts = json.loads(str(arrays[f"{name}.facts"]))
        online_, after, probe = (Rates(*r) if r else None for r in facts["rates"])
        assert online_ and after
        found[name] = Course(
            arrays[f"{name}.score"],
            arrays[f"{name}.pseudo_label"],
            online_,
            after,
            probe,
            arrays[f"{name}.shift"],
            facts["stopped_after"],
        )
    return found


def filled(tail: Params, fill: str, z: torch.Tensor, present: torch.Tensor, label: np.ndarray) -> Params:
    """``tail`` with another stand-in for an absent modality, its boundaries set anew on source validation z,
    present, label.
    """
    if fill == FILLS[-1]:
        return tail
    made = {**tail, "gate": torch.full_like(tail["gate"], SHUT)}
    if fill.startswith("zero-fill"):
        made["fill"] = torch.zeros_like(z[0])
    elif fill == "mean-fill":
        made["fill"] = (z * present[..., None]).sum(0) / present.sum(0)[:, None].clamp(min=1)
    made |= equal_error_boundaries(made, z, present, label)
    return {**made, "pattern": torch.zeros_like(made["pattern"])} if fill == "zero-fill" else made


def _raise_first(ended: Sequence[Failed | None]) -> None:
    for result in ended:
        if isinstance(result, Failed):
            raise ValueError(f"bench site: a source model or its streams: {result.why}")


def _fit(job: SourceJob, given: Given, path: str) -> None:
    torch.set_num_threads(1)
    if Path(path, "manifest.json").exists():
        return
    stated = json.loads(job.source)
    method = method_config("source", stated["kind"]).model_validate(stated)
    corpora = [read_corpus(Path(given.corpora[d]), ("train", "val")) for d in job.domains]
    task = fits.Task(method, ModelConfig.model_validate_json(job.model), corpora[0].frame.shape[-1])
    checkpoint.save(Path(path), fits.fit(task, corpora))


def _adapt(job: MethodJob, given: Given, model: str, streams: str, path: str) -> None:
    torch.set_num_threads(1)
    if Path(path).exists():
        return
    prepared, tail = read_prepared(Path(streams)), checkpoint.load(Path(model)).tail
    v = prepared.validation
    tail = filled(tail, job.fill, v.features.z, v.features.present, v.label)
    stated = json.loads(job.site)
    method = method_config("site", stated["kind"]).model_validate(stated)
    chosen = [s for name, s in prepared.streams.items() if not job.only or name in job.only]
    courses = online.run(
        method, tail, chosen, prepared.probes, batch=given.batch, threshold=prepared.threshold, source=v
    )
    arrays: dict[str, np.ndarray] = {}
    for name, c in courses.items():
        facts = {"rates": [c.online, c.source_after, c.probe_after], "stopped_after": c.stopped_after}
        arrays |= {
            f"{name}.score": c.score,
            f"{name}.pseudo_label": c.pseudo_label,
            f"{name}.shift": c.shift,
            f"{name}.facts": np.array(json.dumps(facts)),
        }
    write_atomic(Path(path), lambda tmp: store(tmp, arrays))


def _source_key(job: SourceJob, given: Given) -> str:
    source = json.loads(job.source)
    source["start"] = next(iter(started(source["start"])), None)
    digests = [read_manifest(Path(given.corpora[d])).digest for d in job.domains]
    return digest(
        [source, json.loads(job.model), digests, code_of(*CODE, f"pipeline/source/methods/{source['kind']}*")]
    )


def _streams_key(job: SourceJob, given: Given) -> str:
    """Of what ``prepare`` depends on beside the model."""
    if job.target:
        drawn: list[object] = [read_manifest(Path(given.corpora[job.target])).digest]
    else:
        scenarios = [asdict(s) for s in given.scenarios]
        drawn = [
            read_manifest(Path(given.pool)).digest,
            scenarios,
            given.captures,
            given.attacker,
            given.batch,
            job.seed,
        ]
    return digest([drawn, code_of(*STREAMS)])


def _method_key(job: MethodJob, source: Source) -> str:
    kind = json.loads(job.site)["kind"]
    stated = [job.site, job.fill, job.only, source.model.name, source.streams.name]
    return digest([stated, code_of(*METHODS, f"pipeline/site/methods/{kind}*")])


def _name(name: str, key: str) -> str:
    kept = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
    return f"{kept}-{key}"
