"""Small labelled domains in memory, and fits on them, for comparisons of source methods."""

from __future__ import annotations

import numpy as np

from pipeline.config import method_config
from pipeline.data.corpus import Corpus
from pipeline.models import ModelConfig, TailConfig, TinyConfig
from pipeline.source import fit as fits

SIZE = 16


def corpus(name: str, *, seed: int = 0, count: int = 72, present: int = 7) -> Corpus:
    """Bona fide frames have a bright disc in depth and infrared; twelve subjects, three splits by subject."""
    rng = np.random.default_rng(seed)
    label = (np.arange(count) % 2).astype(np.int8)
    subject = np.arange(count) % 12
    frame = rng.integers(60, 120, (count, 5, SIZE, SIZE)).astype(np.uint8)
    frame[label == 1, 3:, 4:12, 4:12] += 90
    pai = np.where(label == 1, "bona_fide", np.where(subject % 4 < 2, f"print_{name}", "replay"))
    split = np.array(["train", "train", "train", "train", "val", "test"])[np.arange(count) // 2 % 6]
    names = np.array([f"s{i}" for i in range(count)])
    return Corpus(
        name,
        names,
        split,
        label,
        pai,
        np.array([f"p{s}" for s in subject]),
        names,
        np.full(count, present, np.uint8),
        frame,
    )


def task(kind: str = "rise", *, head: str = "radial", seed: int = 0, steps: int = 12) -> fits.Task:
    method = method_config("source", kind).model_validate(
        {"kind": kind, "steps": steps, "batch": 18, "lr": 1e-2, "seed": seed}
    )
    model = ModelConfig(trunk=TinyConfig(width=4, features=8), tail=TailConfig(width=8, rank=2, head=head))
    return fits.Task(method, model, SIZE)


SOURCES = [corpus("a"), corpus("b", seed=1)]
TARGET = corpus("t", seed=2)
