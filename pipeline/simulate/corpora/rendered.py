"""Renders an auxiliary source domain of many people and rigs, with a train split only.

It has every species, and no two videos under one rig.

It is only ever trained on: it has no val and no test split, so thresholds and error rates stay those of real
captures. Nothing is read from disk.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from pipeline.simulate.corpora import synth
from pipeline.simulate.render import BONA_FIDE, PAINTED
from pipeline.simulate.rig import TRAINING, variant

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipeline.data.corpora import Row

SAMPLES = 10_800
ROUNDS = 3  # times that every synthetic domain's mix of species is rendered, with other people
PEOPLE = 200_000  # first subject: nobody of a synthetic corpus, a simulated site or an anchor set
RIGS = 1000  # variants of each rig to draw from
PAINTED_SHARE = 0.25  # of the attack videos: what no synthetic domain shows, half make-up and half tattoos


def rows(root: Path | None, *, size: int, samples: int = SAMPLES) -> Iterator[Row]:
    """Training rows; ``root`` is not read."""
    del root
    return synth.render(plan(samples), size=size)


def total(root: Path | None) -> int:
    """How many rows ``rows`` yields."""
    del root
    return SAMPLES


def plan(samples: int) -> list[synth.Clip]:
    """Plans ``samples`` rows in equal parts of each domain's species, with a new rig for each video."""
    each = -(-samples // (ROUNDS * len(TRAINING)))
    clips: list[synth.Clip] = []
    for number in range(ROUNDS):
        for d, domain in enumerate(TRAINING):
            rng = np.random.default_rng([number, d, 7])
            rigs: dict[int, int] = {}
            painted: dict[int, str] = {}
            for clip in synth.clips(domain, {"train": each}, number + 10):
                seed = rigs.setdefault(clip.video, int(rng.integers(RIGS)))
                name = f"{domain}{number}"  # a video's and a subject's name must not come twice
                what = clip.what._replace(subject=PEOPLE + 1000 * number + clip.what.subject)
                if what.species != BONA_FIDE:
                    other = str(rng.choice(PAINTED)) if rng.random() < PAINTED_SHARE else what.species
                    what = what._replace(species=painted.setdefault(clip.video, other))
                clips.append(dataclasses.replace(clip, domain=name, what=what, rig=variant(clip.rig, seed)))
    return clips[:samples]
