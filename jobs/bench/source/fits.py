"""Fits source methods on some domains and scores the held-out others; each fit is stored when it is done.

Fits on the same domains with the same seed share a Ray task, so that their samples are drawn and augmented
once. Thresholds are not chosen here: a result holds the scores of the sources' pooled validation beside those
of the held-out tests, under every pattern of missing modalities, with the complement and with zeros.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from jobs.bench.parts import code_of, part, save
from pipeline.cluster.tasks import Failed, run_tasks
from pipeline.cluster.train import started
from pipeline.data.corpus import read_manifest
from pipeline.data.protocols import PATTERNS
from pipeline.models import tail as tails
from pipeline.source import fit as fits
from pipeline.source import stems
from pipeline.source.contract import Batch
from pipeline.source.holdout import FILLS, Split, merged, score
from pipeline.source.sampler import draw, stratify
from pipeline.stats import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipeline.data.corpus import Corpus
    from pipeline.models import ModelConfig
    from pipeline.source.contract import SourceMethod
    from pipeline.source.fit import Task
    from pipeline.source.sampler import Draw

SHARED_BYTES = 2**30  # of drawn samples that the fits of a task share
CODE = (  # what a stored fit depends on, besides the method's own file
    "pipeline/source/*.py",
    "pipeline/data/augment.py",
    "pipeline/data/protocols.py",
    "pipeline/models",
    "jobs/bench/source/fits.py",
)


@dataclass(frozen=True)
class Job:
    """One fit: a method with its seed, the domains that it learns from and those that it is tested on."""

    method: SourceMethod
    model: ModelConfig
    sources: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """Validation of the sources (for thresholds), held-out tests, and the training species of one fit."""

    dev: Split
    test: Split
    known: tuple[str, ...]  # PAI species in the sources' train splits
    radius: float  # of the fused head
    seconds: float  # wall time of the fit

    def threshold(self, pattern: str = "full", fill: str = "complement") -> float:
        """Returns the threshold on the logit that source validation gives, same pattern and fill."""
        logit, label, domain = self._scored(self.dev, pattern, fill)
        return metrics.transfer_threshold(logit, label, domain)

    def scores(
        self, split: str, pattern: str = "full", fill: str = "complement"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (logit, label) of ``dev`` or ``test`` where any modality is left."""
        return self._scored(self.dev if split == "dev" else self.test, pattern, fill)[:2]

    @staticmethod
    def _scored(split: Split, pattern: str, fill: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        logit = split.logit[:, list(PATTERNS).index(pattern), FILLS.index(fill)]
        kept = np.isfinite(logit)
        return logit[kept], split.label[kept], split.domain[kept]


def run(
    jobs: Sequence[Job],
    corpora: Mapping[str, Path],
    *,
    folder: Path,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> dict[Job, Path | Failed]:
    """Does what is not stored in ``folder``; returns each job's result file or why it has none. Needs Ray."""
    folder.mkdir(parents=True, exist_ok=True)
    digests = {domain: read_manifest(path).digest for domain, path in corpora.items()}
    paths = {job: _path(folder, job, digests) for job in jobs}
    groups: dict[object, list[Job]] = defaultdict(list)
    for job in paths:
        if not paths[job].exists():
            m = job.method
            groups[job.sources, m.batch, m.seed, m.steps, m.augment].append(job)
    places = {domain: path.resolve() for domain, path in corpora.items()}
    shares, stored = _shared_out(groups, workers), set(paths.values())
    calls = [([(job, paths[job]) for job in share], places) for share in shares]
    ended = run_tasks(
        _fit_group, calls, on_progress=lambda _: on_progress(sum(p.exists() for p in stored), len(stored))
    )
    failed: dict[Job, Failed] = {}
    for share, errors in zip(shares, ended, strict=True):
        if isinstance(errors, Failed):  # its worker was lost three times, or broke
            errors = {job: errors for job in share if not paths[job].exists()}
        failed |= errors
    return {job: failed.get(job, path) for job, path in paths.items()}


def key_of(method: SourceMethod, *given: object) -> tuple[object, ...]:
    """Returns what a fit of ``method`` depends on: settings, start, code, and ``given``."""
    start = next(iter(started(method.start)), None)
    settings = method.model_copy(update={"start": start})
    return settings, *given, code_of(*CODE, f"pipeline/source/methods/{method.kind}*")


def fit_and_score(
    task: Task,
    sources: Sequence[Corpus],
    targets: Sequence[Corpus],
    *,
    draws: Callable[[int], Draw] | None = None,
) -> Result:
    """Learns ``task`` on ``sources`` and scores their val splits and the targets' test splits."""
    began = time.perf_counter()
    model = fits.fit(task, sources, draws=draws)
    seconds = time.perf_counter() - began
    known = {str(s) for c in sources for s, split in zip(c.pai, c.split, strict=True) if split == "train"}
    dev, test = (
        merged([score(model, c, "val") for c in sources]),
        merged([score(model, c, "test") for c in targets]),
    )
    radius = float(torch.exp(model.tail["log_rho"][tails.FUSED]))
    return Result(dev, test, tuple(sorted(known)), radius, seconds)


def degenerate(task: Task, corpora: Sequence[Corpus]) -> dict[str, str]:
    """Fits corpora that no fit should be given; each ends as "finite", one error line, or "silent NaN"."""
    task = replace(task, method=task.method.model_copy(update={"steps": 4}))

    def only(c: Corpus, rows: np.ndarray) -> Corpus:
        columns = {k: np.asarray(v)[rows] for k, v in vars(c).items() if k not in ("domain", "maps")}
        return replace(c, **columns, maps={})

    first = corpora[0]
    train = np.asarray(first.split) == "train"
    three = np.flatnonzero(train)[np.linspace(0, train.sum() - 1, 3).astype(int)]
    cases = {
        "one class missing": [only(c, np.asarray(c.label) == 1) for c in corpora],
        "one class missing in one domain": [only(first, np.asarray(first.label) == 1), *corpora[1:]],
        "three samples in a domain": [only(first, np.union1d(three, np.flatnonzero(~train))), *corpora[1:]],
        "a single domain": corpora[:1],
    }

    def outcome(run: Callable[[], np.ndarray]) -> str:
        try:
            return "finite" if np.isfinite(run()).all() else "silent NaN"
        except ValueError as e:
            return str(e)

    def fitted(part: Sequence[Corpus]) -> np.ndarray:
        return fit_and_score(task, part, [replace(c, split=np.full(len(c), "test")) for c in part]).test.logit

    def one_step() -> np.ndarray:
        frames, label = torch.full((4, 5, task.size, task.size), torch.nan), torch.tensor([0, 1, 0, 1])
        sick = Batch(frames, torch.ones(4, 3, dtype=torch.bool), label, torch.zeros(4, dtype=torch.long), 0.0)
        fits.step(fits.begin(task, domains=1), sick, torch.Generator())
        return np.array([np.nan])

    outcomes = {name: outcome(lambda part=part: fitted(part)) for name, part in cases.items()}
    return {**outcomes, "NaN features": outcome(one_step)}


def _path(folder: Path, job: Job, digests: Mapping[str, str]) -> Path:
    data = [[digests[d] for d in job.sources], [digests[d] for d in job.targets]]
    return part(folder, job.method.kind, *key_of(job.method, job.model, data))


def _shared_out(groups: Mapping[object, list[Job]], workers: int) -> list[list[Job]]:
    """Returns long groups first; where there are fewer groups than workers, they are halved."""
    shares = sorted(groups.values(), key=len, reverse=True)
    while shares and len(shares) < workers and len(shares[0]) > 1:
        whole = shares.pop(0)
        shares = sorted([*shares, whole[0::2], whole[1::2]], key=len, reverse=True)
    return shares


def _fit_group(jobs: Sequence[tuple[Job, Path]], folders: Mapping[str, Path]) -> dict[Job, Failed]:
    """Fits one after another on one thread; a fit that breaks says why and stops no other."""
    torch.set_num_threads(1)
    first, trunk = jobs[0][0], jobs[0][0].model.trunk
    each = stems.draws(first.method, len(first.sources))
    sources = stems.read([folders[d] for d in first.sources], ("train", "val"), trunk, draws=each)
    cells, shared, failed = stratify(sources), dict[int, "Draw"](), dict[Job, Failed]()
    for job, path in jobs:
        if path.exists():  # the task was started again
            continue

        def draws(step: int, method: SourceMethod = job.method) -> Draw:
            if step in shared:
                return shared[step]
            drawn = draw(method, sources, cells, step=step, rank=0, world=1)
            if len(jobs) > 1 and len(shared) * drawn.frames.nbytes < SHARED_BYTES:
                shared[step] = drawn
            return drawn

        task = fits.Task(job.method, job.model, sources[0].frame.shape[-1])
        targets = stems.read([folders[d] for d in job.targets], ("test",), trunk)
        try:
            save(path, fit_and_score(task, sources, targets, draws=draws))
        except ValueError as e:
            failed[job] = Failed(str(e))
    return failed
