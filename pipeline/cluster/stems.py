"""Fills the cache of stem maps by Ray tasks before a fit, a search or a benchmark begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cluster.tasks import Failed, run_tasks
from pipeline.models import MobileConfig
from pipeline.source import stems
from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.config import Config


class StemsFailed(PalisadeError, RuntimeError):
    """Maps that could not be computed or stored; the message is one line."""

    exit_code = 5


def fill(
    config: Config, corpora: Sequence[Path], splits: Sequence[str], *, on_progress: Callable[[int, int], None]
) -> bool:
    """Makes the missing maps of ``splits``; returns False where fits compute their own at every step.

    That is so for a trunk without a stem, where training has a GPU, and where the maps would be larger than
    ``data.stem_cache_gb``. ``on_progress`` gets (files, all). Needs a connected Ray.
    """
    trunk, most = config.model.trunk, config.data.stem_cache_gb * 2**30
    if not isinstance(trunk, MobileConfig) or config.cluster.train_gpu:
        return False
    if not (wanted := stems.parts(corpora, trunk, splits, most=most)):
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
