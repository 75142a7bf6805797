"""Many small fits on Ray, each stored as soon as it is done: an interrupted benchmark goes on where it was.

Fits on the same domains with the same seed share a task, so that what they see is drawn and augmented once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jobs.bench.parts import code_of, digest, store
from pipeline.cluster.tasks import Failed, run_tasks
from pipeline.cluster.train import started
from pipeline.config import method_config
from pipeline.data.corpus import read_corpus, read_manifest
from pipeline.models import ModelConfig
from pipeline.source import fit as fits
from pipeline.source.holdout import fit_and_score, to_arrays
from pipeline.source.sampler import draw, stratify
from pipeline.storage import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipeline.source.contract import SourceMethod
    from pipeline.source.sampler import Draw

KEPT_BYTES = 2**30  # of drawn samples in a task
CODE = (
    "pipeline/source/*.py",
    "pipeline/data/augment.py",
    "pipeline/data/protocols.py",
    "pipeline/models/*.py",
    "jobs/bench/source/fits.py",
)  # what a stored result depends on, besides the method's own file


@dataclass(frozen=True)
class Job:
    """One fit of a benchmark: a method, the domains it learns from and those it is tested on."""

    name: str  # the method, or the cell of an ablation
    source: str  # JSON of the method's Config, seed included
    model: str  # JSON of the ModelConfig
    sources: tuple[str, ...]
    targets: tuple[str, ...]

    @property
    def seed(self) -> int:
        return int(json.loads(self.source)["seed"])


def run(
    jobs: Sequence[Job],
    corpora: Mapping[str, Path],
    *,
    place: Path,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> dict[Job, Path | str]:
    """Do what is not stored in ``place`` yet; every job's result file, or why it has none. Ray must be
    initialised.
    """
    place.mkdir(parents=True, exist_ok=True)
    digests = {domain: read_manifest(path).digest for domain, path in corpora.items()}
    paths = {job: place / f"{key(job, digests)}.npz" for job in jobs}
    groups: dict[tuple[object, ...], list[Job]] = defaultdict(list)
    for job in dict.fromkeys(jobs):
        if not paths[job].exists():
            drawn_alike = {
                k: v for k, v in json.loads(job.source).items() if k in ("batch", "seed", "steps", "augment")
            }
            groups[(job.sources, json.dumps(drawn_alike))].append(job)
    folders = {domain: str(path.resolve()) for domain, path in corpora.items()}
    parts, stored = _shared_out(groups, workers), set(paths.values())
    calls = [([(job, str(paths[job])) for job in part], folders) for part in parts]
    ended = run_tasks(
        _group, calls, on_progress=lambda _: on_progress(sum(p.exists() for p in stored), len(stored))
    )
    failed: dict[Job, str] = {}
    for part, errors in zip(parts, ended, strict=True):
        if isinstance(errors, Failed):  # a worker was lost three times, or broke: only its own fits are
            errors = {job: errors.why for job in part if not paths[job].exists()}
        failed |= errors
    return {job: failed.get(job, path) for job, path in paths.items()}


def key(job: Job, digests: Mapping[str, str]) -> str:
    """Names a result by all that it depends on: method, model, data, start and code."""
    source = json.loads(job.source)
    source["start"] = next(iter(started(source["start"])), None)
    data = [[digests[d] for d in job.sources], [digests[d] for d in job.targets]]
    given = [
        source,
        json.loads(job.model),
        data,
        code_of(*CODE, f"pipeline/source/methods/{source['kind']}*"),
    ]
    return f"{source['kind']}-{digest(*given)}"


def _shared_out(groups: Mapping[tuple[object, ...], list[Job]], workers: int) -> list[list[Job]]:
    """Long groups first; where there are fewer groups than workers, they are halved."""
    parts = sorted(groups.values(), key=len, reverse=True)
    while parts and len(parts) < workers and len(parts[0]) > 1:
        whole = parts.pop(0)
        parts += [whole[0::2], whole[1::2]]
        parts.sort(key=len, reverse=True)
    return parts


def _group(jobs: Sequence[tuple[Job, str]], folders: Mapping[str, str]) -> dict[Job, str]:
    """Fit one after another on one thread; a fit that breaks says why and stops no other."""
    torch.set_num_threads(1)
    first = jobs[0][0]
    sources = [read_corpus(Path(folders[d]), ("train", "val")) for d in first.sources]
    cells = stratify(sources)
    kept: dict[int, Draw] = {}
    failed: dict[Job, str] = {}
    for job, path in jobs:
        if Path(path).exists():  # a task that Ray started again
            continue
        given = json.loads(job.source)
        method = method_config("source", given["kind"]).model_validate(given)

        def draws(step: int, method: SourceMethod = method) -> Draw:
            if step in kept:
                return kept[step]
            drawn = draw(method, sources, cells, step=step, rank=0, world=1)
            if len(jobs) > 1 and len(kept) * drawn.frames.nbytes < KEPT_BYTES:
                kept[step] = drawn
            return drawn

        task = fits.Task(method, ModelConfig.model_validate_json(job.model), sources[0].frame.shape[-1])
        targets = [read_corpus(Path(folders[d]), ("test",)) for d in job.targets]
        try:
            result = fit_and_score(task, sources, targets, draws=draws)
        except ValueError as e:
            failed[job] = str(e)
            continue
        arrays = to_arrays(result)
        write_atomic(Path(path), lambda tmp, arrays=arrays: store(tmp, arrays))
    return failed
