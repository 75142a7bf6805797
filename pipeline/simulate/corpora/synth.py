"""Renders four labelled domains, one training rig each, and an anchor set; nothing is read.

A domain is one training rig, its own people and its own mix of PAI species, as gated sets differ. Subjects
are disjoint between splits, domains and the anchor set. A tool to find bugs and to show the product, not
evidence about people.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipeline.data.corpora import Row, write_corpus
from pipeline.data.decode import frame_from_arrays
from pipeline.simulate.render import BONA_FIDE, Presentation
from pipeline.simulate.rig import TRAINING, SensorRig, capture, variant

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from pipeline.data.corpora import CorpusManifest

    Progress = Callable[[int, int], None]

KIND = "synth"
MIX = {  # attack species of each domain; D is all paper, C has no display and no bent or cut print
    "A": ("print_flat", "replay", "mask_rigid", "mask_silicone", "partial_glasses"),
    "B": ("print_flat", "print_bent", "replay", "mask_rigid", "mask_silicone"),
    "C": ("print_flat", "mask_rigid", "mask_silicone", "partial_glasses", "partial_eyes"),
    "D": ("print_flat", "print_bent", "print_cutout"),
}
SPLITS = ("train", "val", "test")
PER_SPLIT = {"train": 150, "val": 60, "test": 90}
SHARES = {"train": 0.6, "val": 0.15}  # test is the rest
BONA_FIDE_SHARE = {"A": 0.4, "B": 0.35, "C": 0.5, "D": 0.35}
FRAMES = 3  # per video
ANCHOR = "anchor"
ANCHOR_SPECIES = ("print_flat", "print_cutout", "replay", "mask_rigid", "mask_silicone")
CHUNK = 24  # rows per task of the pool


@dataclass(frozen=True)
class Clip:
    """One row to render."""

    split: str
    domain: str
    video: int
    what: Presentation
    rig: SensorRig
    frame: int


def rows(
    root: Path | None,
    *,
    size: int,
    domain: str = "A",
    per_split: Mapping[str, int] = PER_SPLIT,
    seed: int = 0,
) -> Iterator[Row]:
    """Rows of one domain, rendered as they are asked for; ``root`` is not read."""
    del root
    for clip in clips(domain, per_split, seed):
        yield row(clip, size)


def total(root: Path | None, *, per_split: Mapping[str, int] = PER_SPLIT) -> int:
    """How many rows ``rows`` yields."""
    del root
    return sum(per_split.values())


def write(
    out: Path,
    *,
    size: int,
    domains: Sequence[str] = tuple(TRAINING),
    samples: int = 300,
    seed: int = 0,
    workers: int = 2,
    progress: Progress | None = None,
) -> dict[str, CorpusManifest]:
    """Render ``samples`` rows per domain and import each into ``out/<domain>``."""
    train, val = round(samples * SHARES["train"]), round(samples * SHARES["val"])
    per_split = {"train": train, "val": val, "test": samples - train - val}
    plans = {domain: clips(domain, per_split, seed) for domain in domains}
    every = [clip for plan in plans.values() for clip in plan]
    stream = render(every, size=size, workers=workers, progress=progress)
    done: dict[str, CorpusManifest] = {}
    with closing(stream):
        for domain, plan in plans.items():
            done[domain] = write_corpus(
                islice(stream, len(plan)), out / domain, domain=domain, kind=KIND, size=size
            )
    return done


def anchor(
    *,
    size: int,
    seed: int = 0,
    attacks: int = 150,
    bona_fide: int = 500,
    species: Sequence[str] = ANCHOR_SPECIES,
    workers: int = 2,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """Yields labelled rows for a sealed anchor set: ``attacks`` of each species, split ``test``.

    There is one frame per presentation.

    The rigs are the training families and slight variations of them; the people are in no corpus and at no
    site.
    """
    names = [BONA_FIDE] * bona_fide + [name for name in species for _ in range(attacks)]
    rng = np.random.default_rng([seed, 41])
    rigs = [*TRAINING.values(), *(variant(rig, seed * 10 + k) for rig in TRAINING.values() for k in range(2))]
    plan: list[Clip] = []
    for video, name in enumerate(names):
        what = Presentation(90_000 + int(rng.integers(60)), name, int(rng.integers(2**31)))
        plan.append(Clip("test", ANCHOR, video, what, rigs[int(rng.integers(len(rigs)))], 0))
    plan.sort(key=lambda clip: clip.what.subject)  # neighbours share a cached head
    return render(plan, size=size, workers=workers, progress=progress)


def clips(domain: str, per_split: Mapping[str, int], seed: int) -> list[Clip]:
    """The plan of one domain: videos of FRAMES frames, bona fide and attacks in the domain's shares."""
    if domain not in MIX:
        raise ValueError(f"domain {domain!r}: allowed are {', '.join(MIX)}")
    unknown = set(per_split) - set(SPLITS)
    if unknown:
        raise ValueError(f"split {sorted(unknown)[0]!r}: allowed are {', '.join(SPLITS)}")
    plan: list[Clip] = []
    video = 0
    for split, count in per_split.items():
        base = 10_000 * (1 + list(MIX).index(domain)) + 1_000 * SPLITS.index(split)
        rng = np.random.default_rng([seed, base])
        videos = -(-count // FRAMES)
        genuine = round(videos * BONA_FIDE_SHARE[domain])
        names = [BONA_FIDE] * genuine + [MIX[domain][k % len(MIX[domain])] for k in range(videos - genuine)]
        people = max(2, -(-videos // 3))
        first = len(plan)
        for k, name in enumerate(names):
            what = Presentation(base + k % people, name, int(rng.integers(2**31)))
            plan += [Clip(split, domain, video + k, what, TRAINING[domain], frame) for frame in range(FRAMES)]
        video += videos
        del plan[first + count :]
    return plan


def render(
    plan: Sequence[Clip], *, size: int, workers: int = 2, progress: Progress | None = None
) -> Generator[Row]:
    """The rows of ``plan`` in its order, by a pool of spawned processes when ``workers`` > 1."""
    tasks = [(plan[k : k + CHUNK], size) for k in range(0, len(plan), CHUNK)]
    if workers <= 1 or len(tasks) <= 1:
        yield from _counted(map(_chunk, tasks), len(plan), progress)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the threads of torch and Ray
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=cv2.setNumThreads, initargs=(1,)
    ) as pool:
        yield from _counted(pool.map(_chunk, tasks), len(plan), progress)


def row(clip: Clip, size: int) -> Row:
    """One rendered row."""
    shot = capture(clip.what, clip.rig, clip.frame)
    frame, present = frame_from_arrays(shot.rgb, shot.depth, shot.ir, size=size)
    video = f"{clip.domain}-{clip.video:05d}"
    return Row(
        sample_id=f"{video}-{clip.frame}",
        split=clip.split,
        label=int(clip.what.species == BONA_FIDE),
        pai=clip.what.species,
        subject=f"{clip.domain}-s{clip.what.subject}",
        video=video,
        frame=frame,
        present=present,
        source_sha256=hashlib.sha256(
            shot.rgb.tobytes() + shot.depth.tobytes() + shot.ir.tobytes()
        ).hexdigest(),
    )


def _counted(chunks: Iterable[list[Row]], count: int, progress: Progress | None) -> Iterator[Row]:
    done = 0
    for chunk in chunks:
        done += len(chunk)
        if progress:
            progress(done, count)
        yield from chunk


def _chunk(task: tuple[Sequence[Clip], int]) -> list[Row]:
    part, size = task
    return [row(clip, size) for clip in part]
