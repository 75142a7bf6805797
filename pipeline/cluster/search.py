"""Ray Tune over replayed features: ASHA on the online HTER of development sites. Nothing here decides what may serve."""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from pipeline import bank, metrics
from pipeline.config import Choice, Config, LogUniform, SearchConfig, method_config, parse
from pipeline.models import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pipeline.site import SiteMethod
    from pipeline.types import Features

METRIC = "online_hter"


@dataclass(frozen=True)
class Stream:
    """One development site: its features in order and their sealed labels [N] (-1 unknown)."""

    site: str
    features: Features
    label: np.ndarray


@dataclass(frozen=True)
class Trial:
    """One tried setting and how far ASHA let it go."""

    settings: dict[str, object]
    hter: float
    rungs: int


def search(
    config: Config, streams: Sequence[Stream], *, model_path: str, on_progress: Callable[[int, int], None]
) -> list[Trial]:
    """Try ``search.samples`` settings of ``search.space`` → trials, best first. Needs a connected Ray."""
    data = ray.put(list(streams))
    text = config.model_dump_json()
    space = {name: _dimension(d) for name, d in config.search.space.items()}

    def trial(settings: dict[str, object]) -> None:
        torch.set_num_threads(1)
        for rung, hter in enumerate(replay(parse(text, "search"), settings, ray.get(data), model_path=model_path)):
            tune.report({METRIC: hter, "rung": rung + 1})

    with tempfile.TemporaryDirectory() as storage:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": config.cluster.cpus / config.search.concurrent / 2}),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=METRIC, mode="min", num_samples=config.search.samples, max_concurrent_trials=config.search.concurrent,
                scheduler=_asha(config.search), search_alg=BasicVariantGenerator(random_state=config.search.seed),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(storage_path=storage, verbose=0, callbacks=[_Counted(on_progress, config.search.samples)]),
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):  # Tune prints tables whatever its verbosity
            results = tuner.fit()
    if results.errors:
        raise ValueError(
            f"search: every trial must replay; one did not: {' '.join(str(results.errors[0]).split())[-300:]}"
        )
    trials = [
        Trial(dict(r.config or {}), float(r.metrics[METRIC]), int(r.metrics["rung"])) for r in results if r.metrics
    ]
    return sorted(trials, key=lambda t: (-t.rungs, t.hter))


def replay(
    config: Config, settings: Mapping[str, object], streams: Sequence[Stream], *, model_path: str
) -> Iterator[float]:
    """Mean online HTER of the development sites after each rung, every sample scored before it is used."""
    model = checkpoint.load(Path(model_path))
    own = config.site.model_dump()
    method = cast("SiteMethod", method_config("site", str(own["kind"])).model_validate({**own, **settings}))
    states = bank.stack([method.init(model.tail) for _ in streams])
    scores: list[list[np.ndarray]] = [[] for _ in streams]
    rungs = config.search.rungs
    for rung in range(rungs):
        parts = [_part(s.features, rung, rungs) for s in streams]
        states, traces = bank.run(method, model.tail, states, parts, batch=config.bank.batch, slots=len(streams))
        for k, trace in enumerate(traces):
            scores[k].append(trace.score.numpy())
        yield _mean_hter(streams, scores, model.manifest.threshold)


def _part(features: Features, rung: int, rungs: int) -> Features:
    n = len(features.z)
    return type(features)(*(t[n * rung // rungs : n * (rung + 1) // rungs] for t in features))


def _mean_hter(streams: Sequence[Stream], scores: Sequence[Sequence[np.ndarray]], threshold: float) -> float:
    each: list[float] = []
    for stream, parts in zip(streams, scores, strict=True):
        score = np.concatenate(parts)
        label = stream.label[: len(score)]
        if {0, 1} <= set(label.tolist()):
            each.append(metrics.hter(score[label >= 0], label[label >= 0], threshold))
    return float(np.mean(each)) if each else 0.5


def _dimension(d: Choice | LogUniform | object) -> object:
    if isinstance(d, Choice):
        return tune.choice(list(d.choice))
    if isinstance(d, LogUniform):
        return tune.loguniform(*d.loguniform)
    return tune.uniform(*d.uniform)  # pyright: ignore


def _asha(search: SearchConfig) -> ASHAScheduler:
    return ASHAScheduler(time_attr="rung", max_t=search.rungs, grace_period=1, reduction_factor=search.reduction)


def _nobody(done: int, total: int) -> None:
    """Progress that nobody looks at."""


class _Counted(tune.Callback):
    """Counts finished trials for the progress bar."""

    def __init__(self, advance: Callable[[int, int], None], total: int) -> None:
        self.advance, self.total, self.done = advance, total, 0

    def __getstate__(self) -> dict[str, object]:
        """Tune stores its callbacks; a terminal cannot be stored."""
        return {"advance": _nobody, "total": self.total, "done": self.done}

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        self.done += 1
        self.advance(self.done, self.total)
