"""Draws stratified batches of labelled frames as a pure function of (seed, step, rank).

Every domain x class has equal counts.

So a fit that is resumed sees what it would have seen. Frames stay uint8 in memory until they are drawn.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pipeline.data.augment import augment_bytes
from pipeline.data.features import mask_to_bool
from pipeline.models.trunk import prepare
from pipeline.source.contract import Batch
from pipeline.source.stems import within
from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from torch import Generator, Tensor

    from pipeline.data.corpus import Corpus
    from pipeline.source.contract import SourceMethod


class FitError(PalisadeError, ValueError):
    """Data that nothing can be learned from, or a fit that broke; the message is one line."""


class Cell(NamedTuple):
    """The training rows of one class in one domain."""

    domain: int
    label: int
    rows: np.ndarray


def stratify(corpora: Sequence[Corpus]) -> list[Cell]:
    """Returns the non-empty cells domain x class of the train split; raises FitError."""
    cells = []
    for e, corpus in enumerate(corpora):
        train = np.asarray(corpus.split) == "train"
        for y in (0, 1):
            rows = np.flatnonzero(train & (np.asarray(corpus.label) == y) & (np.asarray(corpus.present) > 0))
            if len(rows):
                cells.append(Cell(e, y, rows))
    names = ", ".join(c.domain for c in corpora) or "none"
    if not cells:
        raise FitError(f"domains {names}: no training rows; import corpora with a train split")
    if len({c.label for c in cells}) < 2:
        only = "bona fide" if cells[0].label else "attack"
        raise FitError(f"domains {names}: every training row is {only}; both classes are needed")
    return cells


def check_validation(corpora: Sequence[Corpus]) -> None:
    """Raises FitError before the fit unless the pooled val split has both classes for the threshold."""
    stratify(corpora)  # what is missing from the train split is the more useful thing to hear
    seen = {int(y) for c in corpora for y in np.unique(np.asarray(c.label)[np.asarray(c.split) == "val"])}
    if not {0, 1} <= seen:
        names = ", ".join(c.domain for c in corpora)
        raise FitError(
            f"domains {names}: the val split must hold bona fide and attack rows; the threshold comes from it"
        )


class Draw(NamedTuple):
    """The samples of one step, small enough to keep for the next method."""

    frames: Tensor  # uint8 [B, 5, H, W], augmented, or the stem's maps of them float16 [B, M, C, h, w]
    present: Tensor  # [B, M] bool
    label: Tensor  # [B]
    domain: Tensor  # [B]


def draw(
    method: SourceMethod,
    corpora: Sequence[Corpus],
    cells: Sequence[Cell],
    *,
    step: int,
    rank: int,
    world: int,
) -> Draw:
    """Returns the samples of one step on one rank, equal counts per cell.

    Of the method only the shared settings matter.
    """
    random = np.random.default_rng([method.seed, step, rank])
    generator = torch.Generator().manual_seed(int(random.integers(2**62)))
    share = max(2, method.batch // world)
    order = [cells[(step + i) % len(cells)] for i in range(len(cells))]  # who gets the odd ones rotates
    counts = [share // len(cells) + (i < share % len(cells)) for i in range(len(cells))]
    picked = [
        (c, random.choice(c.rows, n, replace=n > len(c.rows)))
        for c, n in zip(order, counts, strict=True)
        if n
    ]
    mapped = all("train" in corpora[c.domain].maps for c, _ in picked)
    pick = _pick_maps if mapped else _pick_frames
    frames = torch.from_numpy(np.concatenate([pick(corpora[c.domain], rows, random) for c, rows in picked]))
    bits = np.concatenate([np.asarray(corpora[c.domain].present)[rows] for c, rows in picked])
    if method.augment and not mapped:
        frames = augment_bytes(frames, generator)
    label = torch.tensor([c.label for c, rows in picked for _ in rows])
    domain = torch.tensor([c.domain for c, rows in picked for _ in rows])
    return Draw(frames, torch.from_numpy(mask_to_bool(bits)), label, domain)


def _pick_frames(corpus: Corpus, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return corpus.frame[rows]


def _pick_maps(corpus: Corpus, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns a random view of each row."""
    views, at = corpus.maps["train"], within(corpus, "train", rows)
    return np.stack([views[v][i] for v, i in zip(random.integers(len(views), size=len(rows)), at)])


def make_batch(method: SourceMethod, drawn: Draw, *, step: int, rank: int) -> tuple[Batch, Generator]:
    """Returns ``drawn`` prepared for the trunk, and the generator for the method's own draws."""
    random = np.random.default_rng([method.seed, step, rank, 1])
    generator = torch.Generator().manual_seed(int(random.integers(2**62)))
    progress = step / method.steps
    return Batch(
        prepare(drawn.frames), drawn.present, drawn.label, drawn.domain, progress, method.smoothing
    ), generator


def prefetch(draws: Callable[[int], Draw], steps: Iterable[int]) -> Iterator[tuple[int, Draw]]:
    """Yields (step, its samples) while the samples of the next step are being drawn."""
    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[int, Future[Draw]]] = []
        for at in steps:
            waiting.append((at, pool.submit(draws, at)))
            if len(waiting) > 1:
                step, drawn = waiting.pop(0)
                yield step, drawn.result()
        for step, drawn in waiting:
            yield step, drawn.result()
