"""One small artifact of every kind: tensors, features, an anchor set, a source model."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.data.anchor import AnchorSet
from pipeline.data.features import FeatureBlock
from pipeline.models import ModelConfig, TinyConfig, checkpoint, tail
from pipeline.models.trunk import build_trunk, fold

TRUNK, F = "t" * 64, 8

TENSORS = {"a": torch.arange(400.0), "n": torch.tensor(4)}


def block(n: int = 6, *, features: int = F) -> FeatureBlock:
    return FeatureBlock(
        offset=np.arange(n),
        sample_id=np.array([f"s{i}" for i in range(n)], dtype=object),
        captured_at=np.datetime64("2026-01-01T00:00:00", "us") + np.arange(n),
        session=np.arange(n),
        present=np.full(n, 5, np.uint8),
        z=np.arange(n * 3 * features).reshape(n, 3, features).astype(np.float16),
    )


def anchor() -> AnchorSet:
    return AnchorSet(
        torch.zeros(4, 3, F),
        torch.ones(4, 3, dtype=torch.bool),
        torch.tensor([0, 0, 1, 1]),
        ("a", "a", "b", "c"),
    )


def source() -> checkpoint.SourceModel:
    torch.manual_seed(0)
    config = ModelConfig(trunk=TinyConfig(width=4, features=F))
    made = tail.init_tail(config.tail, F, generator=torch.Generator().manual_seed(0))
    manifest = checkpoint.Manifest(config=config, size=16, threshold=0.4, method="erm")
    return checkpoint.seal(fold(build_trunk(config.trunk, 16)), made, manifest)
