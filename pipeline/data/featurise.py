"""Puts decoded frames through the trunks, in batches that do not mind where a segment ends.

The second of three stages of ingest; ``segments`` decodes, ``assemble`` stores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.data.features import mask_to_bool
from pipeline.models.trunk import features as features_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.data.segments import Columns
    from pipeline.models.checkpoint import SourceModel


def add_features(columns: Mapping[str, np.ndarray], models: Sequence[SourceModel]) -> Columns:
    """Replaces ``frame`` by the features z0, z1… float16 [N, M, F] under the trunk of each of ``models``."""
    kept = {name: column for name, column in columns.items() if name != "frame"}
    for k, model in enumerate(models):
        kept[f"z{k}"] = compute_features(model, columns["frame"], columns["present"])
    return kept


def compute_features(model: SourceModel, frames: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Returns the features z float16 [N, M, F] of frames [N, 5, H, W]; ``present`` [N] is a bit mask."""
    shown = torch.from_numpy(mask_to_bool(present))
    if not len(shown):
        return np.zeros((0, shown.shape[1], model.manifest.config.trunk.features), np.float16)
    z = features_of(model.trunk, torch.from_numpy(np.require(frames, requirements="W")), shown)
    return z.numpy().astype(np.float16)
