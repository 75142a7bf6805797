"""Fits the source model on Ray Train: one fit, 1..n workers, resumable under a stable run name.

Workers return numbers through a progress file beside the run (the driver cannot be called from Train's
controller), and the model through the run's last checkpoint. A worker may die at any time; a job submitted
again goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import ray
import ray.train
import ray.train.torch
import torch

from pipeline.cluster.tasks import Failed, run_tasks
from pipeline.config import parse
from pipeline.data.corpus import read_manifest
from pipeline.models import MobileConfig, checkpoint, fit_state
from pipeline.revision import code_revision
from pipeline.source import fit as fits
from pipeline.source import stems
from pipeline.source.sampler import FitError, check_validation
from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.config import Config
    from pipeline.storage import Place

EVERY = 100  # steps between checkpoints: a report costs a poll of the controller
MAX_FAILURES = 3
CPU_SHARE = 0.5  # of a CPU that a worker reserves: whole ones starve what else runs on a small cluster
POLL = 0.3  # seconds between looks at the progress file
MODEL, PROGRESS, FAILURE = "model", "progress.jsonl", "failure.txt"


class TrainError(PalisadeError, RuntimeError):
    """The cluster could not finish the fit; the cause is in the message."""

    exit_code = 5


class StemsFailed(PalisadeError, RuntimeError):
    """Maps that could not be computed or stored; the message is one line."""

    exit_code = 5


@dataclass(frozen=True)
class Progress:
    """One report of rank 0: a line of the progress file."""

    step: int
    steps: int
    losses: dict[str, float]  # means since the report before
    pid: int


@dataclass(frozen=True)
class TrainResult:
    """Where the source model is, and how the fit went."""

    path: Place  # a checkpoint folder
    manifest: checkpoint.Manifest
    history: dict[str, list[tuple[int, float]]]  # loss term → (step, mean since the step before)


def train(
    config: Config,
    corpora: Sequence[Path],
    *,
    storage: Path,
    run_name: str,
    out: Place,
    on_progress: Callable[[int, int], None] | None = None,
    every: int = EVERY,
) -> TrainResult:
    """Fits ``config.source`` on the imported ``corpora`` and leaves the checkpoint in ``out``.

    Needs a connected Ray. ``on_progress`` gets (step, steps). The same ``run_name`` continues an unfinished
    fit of the same configuration. Raises FitError for a person's mistake, TrainError after MAX_FAILURES
    failures of workers.
    """
    folder = (storage / run_name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE).unlink(missing_ok=True)
    trainer = _trainer(config, corpora, folder, storage=storage, run_name=run_name, every=every)
    done = threading.Event()
    follower = threading.Thread(target=_follow, args=(folder / PROGRESS, on_progress, done), daemon=True)
    follower.start()
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as e:
        _raise_failure(folder)
        raise TrainError(f"{run_name}: workers failed more than {MAX_FAILURES} times: {_last_line(e)}") from e
    finally:
        done.set()
        follower.join()
    _raise_failure(folder)
    assert result.checkpoint is not None, "every fit ends with a checkpoint"
    model = checkpoint.load(Path(result.checkpoint.path) / MODEL)
    checkpoint.save(out, model)
    return TrainResult(out, model.manifest, _history(_progress(folder / PROGRESS, 0)[0]))


def _trainer(
    config: Config, corpora: Sequence[Path], folder: Path, *, storage: Path, run_name: str, every: int
) -> ray.train.torch.TorchTrainer:
    return ray.train.torch.TorchTrainer(
        _loop,
        train_loop_config={
            "config": config.model_dump_json(),
            "corpora": [str(p.resolve()) for p in corpora],
            "folder": str(folder),
            "revision": code_revision(),
            "every": every,
        },
        scaling_config=_scaling(config),
        run_config=ray.train.RunConfig(
            name=run_name,
            storage_path=str(storage.resolve()),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )


def fill_stems(
    config: Config,
    corpora: Sequence[Path],
    splits: Sequence[str],
    *,
    least: int = 0,
    on_progress: Callable[[int, int], None],
) -> bool:
    """Makes the missing maps of ``splits``; returns False where fits compute their own at every step.

    That is so for a trunk without a stem, where training has a GPU, and where the maps would be larger than
    ``data.stem_cache_gb``. ``least`` is the fewest corpora of a fit, where not all are in every one.
    ``on_progress`` gets (files, all). Needs a connected Ray.
    """
    trunk, most = config.model.trunk, config.data.stem_cache_gb * 2**30
    if not isinstance(trunk, MobileConfig) or config.cluster.train_gpu:
        return False
    if not (
        wanted := stems.parts(
            corpora, trunk, splits, draws=stems.draws(config.source, least or len(corpora)), most=most
        )
    ):
        return False
    todo = stems.missing(wanted)
    done = len(wanted) - len(todo)
    ended = run_tasks(
        stems.make, [(part, trunk) for part in todo], on_progress=lambda n: on_progress(done + n, len(wanted))
    )
    if failed := [f.why for f in ended if isinstance(f, Failed)]:
        raise StemsFailed(
            f"stem maps of {Path(todo[0].corpus)}: {failed[0]}; free disk space, or set data.stem_cache_gb=0"
        )
    stems.prune(Path(corpora[0]).resolve().parent, wanted, most=most)
    return True


def started(start: str | None) -> tuple[str, ...]:
    """Digest of the fit that ``source.start`` names, if it names one."""
    if start is None:
        return ()
    try:
        return (hashlib.sha256((Path(start) / fit_state.TENSORS).read_bytes()).hexdigest(),)
    except OSError:
        raise FitError(
            f"source.start: {start} holds no {fit_state.TENSORS}; run `palisade pretrain`"
        ) from None


def _scaling(config: Config) -> ray.train.ScalingConfig:
    cluster = config.cluster
    if cluster.train_gpu:
        return ray.train.ScalingConfig(num_workers=cluster.train_workers, use_gpu=True)
    if cluster.address == "local" and cluster.train_workers * CPU_SHARE > cluster.cpus:
        allowed = int(cluster.cpus / CPU_SHARE)
        raise FitError(
            f"cluster.train_workers: {cluster.train_workers}; allowed with {cluster.cpus} cpus: {allowed}"
        )
    return ray.train.ScalingConfig(num_workers=cluster.train_workers, resources_per_worker={"CPU": CPU_SHARE})


def _loop(given: dict[str, object]) -> None:
    """One worker. A person's mistake ends every worker at once and is not retried."""
    folder = Path(cast("str", given["folder"]))
    if (folder / FAILURE).exists():
        return
    try:
        _fit(given, folder)
    except ValueError as e:
        (folder / FAILURE).write_text(str(e))
        raise


def _fit(given: dict[str, object], folder: Path) -> None:
    config = parse(cast("str", given["config"]), "stored config")
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, config.cluster.cpus // world))
    places = [Path(p) for p in cast("list[str]", given["corpora"])]
    corpora = stems.read(
        places, ("train", "val"), config.model.trunk, draws=stems.draws(config.source, len(places))
    )
    check_validation(corpora)
    task = fits.Task(
        method=config.source,
        model=config.model,
        size=config.data.frame_px,
        data={c.domain: read_manifest(p).digest for c, p in zip(corpora, places, strict=True)},
        fingerprint=config.fingerprint(),
        revision=cast("str", given["revision"]),
        parents=started(config.source.start),
    )

    def report(state: fits.Fit, losses: dict[str, float]) -> None:
        if rank == 0:
            line = Progress(state.step, config.source.steps, losses, os.getpid())
            with (folder / PROGRESS).open("a") as f:
                f.write(json.dumps(asdict(line)) + "\n")
        _report(rank, state, None)

    resumed = ray.train.get_checkpoint()
    with resumed.as_directory() if resumed else nullcontext() as saved:
        state = fits.begin(task, domains=len(corpora), wrap=ray.train.torch.prepare_model)
        if saved:
            fits.restore(state, Path(saved))
    every, until = cast("int", given["every"]), task.method.steps
    fits.advance(state, corpora, until=until, rank=rank, world=world, report=report, every=every)
    _report(rank, state, fits.finish(state, corpora))


def _report(rank: int, state: fits.Fit, model: checkpoint.SourceModel | None) -> None:
    """Every rank has to call; only rank 0 brings a checkpoint."""
    with tempfile.TemporaryDirectory() as temp:
        saved = None
        if rank == 0:
            fits.save(state, Path(temp))
            if model is not None:
                checkpoint.save(Path(temp) / MODEL, model)
            saved = ray.train.Checkpoint.from_directory(temp)
        ray.train.report({"step": state.step}, checkpoint=saved)


def _follow(path: Path, on_progress: Callable[[int, int], None] | None, done: threading.Event) -> None:
    """Pass the lines of rank 0 on as they come, until ``done``."""
    position = path.stat().st_size if path.exists() else 0
    while True:
        last = done.wait(POLL)
        lines, position = _progress(path, position)
        for line in lines:
            if on_progress is not None:
                on_progress(line.step, line.steps)
        if last:
            return


def _progress(path: Path, position: int) -> tuple[list[Progress], int]:
    """Whole lines from ``position`` on, and where the next one begins."""
    if not path.exists():
        return [], position
    with path.open("rb") as f:
        f.seek(position)
        whole = f.read().rpartition(b"\n")[0]
    if not whole:
        return [], position
    return [Progress(**json.loads(line)) for line in whole.split(b"\n")], position + len(whole) + 1


def _history(lines: Sequence[Progress]) -> dict[str, list[tuple[int, float]]]:
    """Curves by loss term; of a step that was repeated after a failure, the last report counts."""
    last = {line.step: line.losses for line in lines}
    names = sorted({name for losses in last.values() for name in losses})
    return {
        f"loss.{n}": [(step, losses[n]) for step, losses in sorted(last.items()) if n in losses]
        for n in names
    }


def _raise_failure(folder: Path) -> None:
    if (folder / FAILURE).exists():
        raise FitError((folder / FAILURE).read_text())


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
