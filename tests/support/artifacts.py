"""One small artifact of every kind: tensors, features, an anchor set, a source model; and flipped bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipeline.data.anchor import AnchorSet
from pipeline.data.features import FeatureBlock
from pipeline.models import ModelConfig, TinyConfig, checkpoint, tail
from pipeline.models.trunk import build_trunk, fold

TRUNK, F = "t" * 64, 8  # digest of a trunk; its features
TENSORS = {"a": torch.arange(400.0), "n": torch.tensor(4)}
MODEL = ModelConfig(trunk=TinyConfig(width=4, features=F))


def block(n: int = 6, *, start: int = 0, features: int = F) -> FeatureBlock:
    """Features of ``n`` samples from offset ``start`` on; depth is missing everywhere."""
    offset = np.arange(start, start + n)
    return FeatureBlock(
        offset=offset,
        sample_id=np.array([f"s{i}" for i in offset], dtype=object),
        captured_at=np.datetime64("2026-01-01T00:00:00", "us") + offset,
        session=offset,
        present=np.full(n, 5, np.uint8),
        z=np.arange(n * 3 * features).reshape(n, 3, features).astype(np.float16),
    )


def anchor() -> AnchorSet:
    """Two attacks of one species, and two bona fide samples, without item keys."""
    return AnchorSet(
        torch.zeros(4, 3, F),
        torch.ones(4, 3, dtype=torch.bool),
        torch.tensor([0, 0, 1, 1]),
        ("a", "a", "b", "c"),
    )


def source(
    config: ModelConfig = MODEL, *, size: int = 16, seed: int = 0, threshold: float = 0.5, **manifest: object
) -> checkpoint.SourceModel:
    """A source model that nobody trained; every ``seed`` gives another trunk."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunk = fold(build_trunk(config.trunk, size))
    params = tail.init_tail(config.tail, config.trunk.features, generator=torch.Generator().manual_seed(seed))
    written = checkpoint.Manifest(config=config, size=size, threshold=threshold, method="erm", **manifest)
    return checkpoint.seal(trunk, params, written)


def flip(path: Path, at: float = 0.5) -> None:
    """Flips one bit of the byte that lies at this share of the file."""
    data = bytearray(path.read_bytes())
    data[min(int(at * len(data)), len(data) - 1)] ^= 1
    path.write_bytes(data)
