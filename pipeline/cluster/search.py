"""Searches hyper-parameters with Ray Tune (ASHA).

A site method is scored by the online HTER of development sites, replayed; a source method by the HTER of the
worst held-out source domain. Nothing here decides what may serve. A target domain is one that
``data.domains`` does not name: it is never read.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from pipeline.config import Config, method_config, parse
from pipeline.models import checkpoint
from pipeline.sections import Choice, LogUniform, SearchConfig
from pipeline.site import bank
from pipeline.source import fit as fits
from pipeline.source import stems
from pipeline.source.holdout import score
from pipeline.source.sampler import FitError
from pipeline.stats import metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pipeline.types import Features

METRIC, WORST = "online_hter", "worst_held_out_hter"
SHARE = 0.5  # CPUs of a trial that only waits for its Train run, and of that run's worker


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
    """Try ``search.trials`` settings of ``search.site_space`` → trials, best first. Needs a connected Ray."""
    data = ray.put(list(streams))
    text = config.model_dump_json()
    space = {name: _dimension(d) for name, d in config.search.site_space.items()}

    def trial(settings: dict[str, object]) -> None:
        torch.set_num_threads(1)
        for rung, hter in enumerate(
            replay(parse(text, "search"), settings, ray.get(data), model_path=model_path)
        ):
            tune.report({METRIC: hter, "rung": rung + 1})

    share = config.cluster.cpus / config.search.concurrent_trials / 2
    with tempfile.TemporaryDirectory() as storage:
        return _tuned(
            config.search, trial, space, metric=METRIC, share=share, storage=storage, on_progress=on_progress
        )


def search_source(
    config: Config, corpora: Sequence[Path], *, storage: Path, on_progress: Callable[[int, int], None]
) -> list[Trial]:
    """Try ``search.trials`` settings of ``search.source_space`` → trials, best first. Needs a connected Ray.

    A trial is a Ray Train run: each domain of ``corpora`` that has a val split is held out of a fit on the
    others, and the one that comes out worst judges, at the threshold of the others' validation. At least
    three domains.
    """
    if len(corpora) < 3:
        raise ValueError(f"data.domains: {len(corpora)} for tune source; holding one out needs at least 3")
    given = {"config": config.model_dump_json(), "corpora": [str(p.resolve()) for p in corpora]}

    def trial(settings: dict[str, object]) -> None:
        TorchTrainer(
            held_out,
            train_loop_config={**given, "settings": settings},
            scaling_config=ray.train.ScalingConfig(
                num_workers=1, use_gpu=config.cluster.train_gpu, resources_per_worker={"CPU": SHARE}
            ),
            run_config=ray.train.RunConfig(
                name=f"trial-{tune.get_context().get_trial_id()}",
                storage_path=str(storage),
                callbacks=[TuneReportCallback()],
            ),
        ).fit()

    storage.mkdir(parents=True, exist_ok=True)
    space = {name: _dimension(d) for name, d in config.search.source_space.items()}
    # a trial and its worker must fit together, or both wait for ever
    search = config.search.model_copy(
        update={
            "concurrent_trials": min(config.search.concurrent_trials, int(config.cluster.cpus / 2 / SHARE))
        }
    )
    return _tuned(
        search, trial, space, metric=WORST, share=SHARE, storage=str(storage), on_progress=on_progress
    )


def held_out(given: dict[str, object]) -> None:
    """One Train worker: after each rung, the HTER of every domain by the model that has not seen it."""
    config = parse(str(given["config"]), "search")
    torch.set_num_threads(max(1, config.cluster.cpus // config.search.concurrent_trials))
    defaults = config.source.model_dump()
    settings = cast("dict[str, object]", given["settings"])
    method = method_config("source", str(defaults["kind"])).model_validate({**defaults, **settings})
    places = [Path(p) for p in cast("list[str]", given["corpora"])]
    each = stems.draws(method, len(places) - 1)
    corpora = stems.read(places, ("train", "val"), config.model.trunk, draws=each)
    task = fits.Task(method, config.model, config.data.frame_px)
    tested = [
        c for c in corpora if len(set(c.label[c.split == "val"].tolist())) == 2
    ]  # a rendered domain is only learned from
    if len(tested) < 2:
        raise FitError(
            f"data.domains: {len(tested)} with both classes in their val split; at least 2 are held out "
            "in turn"
        )
    others = [[c for c in corpora if c is not held] for held in tested]
    states = [fits.begin(task, domains=len(part), wrap=ray.train.torch.prepare_model) for part in others]
    for rung in range(config.search.rungs):
        hters: dict[str, float] = {}
        for held, part, state in zip(tested, others, states, strict=True):
            fits.advance(state, part, until=method.steps * (rung + 1) // config.search.rungs)
            seen = score(fits.finish(state, part), held, "val")
            hters[held.domain] = metrics.hter(seen.logit[:, 0, 0], seen.label, 0.0)
        ray.train.report(
            {WORST: max(hters.values()), "rung": rung + 1, **{f"hter_{d}": h for d, h in hters.items()}}
        )


def _tuned(
    search: SearchConfig,
    trial: Callable[[dict[str, object]], None],
    space: dict[str, object],
    *,
    metric: str,
    share: float,
    storage: str,
    on_progress: Callable[[int, int], None],
) -> list[Trial]:
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": share}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=metric,
            mode="min",
            num_samples=search.trials,
            max_concurrent_trials=search.concurrent_trials,
            scheduler=_asha(search),
            search_alg=BasicVariantGenerator(random_state=search.seed),
            reuse_actors=metric == METRIC,
        ),
        run_config=tune.RunConfig(
            storage_path=storage, verbose=0, callbacks=[_Counted(on_progress, search.trials)]
        ),
    )
    with contextlib.redirect_stdout(io.StringIO()):  # Tune prints tables whatever its verbosity
        results = tuner.fit()
    if results.errors:
        raise ValueError(
            f"search: every trial must end; one did not: {' '.join(str(results.errors[0]).split())[-300:]}"
        )
    trials = [
        Trial(dict(r.config or {}), float(r.metrics[metric]), int(r.metrics["rung"]))
        for r in results
        if r.metrics
    ]
    return sorted(trials, key=lambda t: (-t.rungs, t.hter))


def replay(
    config: Config, settings: Mapping[str, object], streams: Sequence[Stream], *, model_path: str
) -> Iterator[float]:
    """Mean online HTER of the development sites after each rung, every sample scored before it is used."""
    model = checkpoint.load(model_path)
    defaults = config.site.model_dump()
    method = method_config("site", str(defaults["kind"])).model_validate({**defaults, **settings})
    states = bank.stack([method.init(model.tail) for _ in streams])
    scores: list[list[np.ndarray]] = [[] for _ in streams]
    rungs = config.search.rungs
    for rung in range(rungs):
        parts = [_part(s.features, rung, rungs) for s in streams]
        states, traces = bank.run(
            method, model.tail, states, parts, batch=config.bank.batch_size, slots=len(streams)
        )
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
    return ASHAScheduler(
        time_attr="rung", max_t=search.rungs, grace_period=1, reduction_factor=search.reduction
    )


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
