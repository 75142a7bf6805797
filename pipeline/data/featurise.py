"""Puts decoded frames through the trunks, in batches that do not mind where a segment ends.

The second of three stages of ingest; ``segments`` decodes, ``assemble`` stores. A trunk that has its graph is
run by ONNX Runtime and brings no torch along; the others, and every trunk on a GPU, are run by torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.features import mask_to_bool
from pipeline.models.manifest import read_manifest
from pipeline.storage import place

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipeline.data.segments import Columns
    from pipeline.models.trunk import Trunk

    # frames uint8 [N, 5, H, W] and presence bool [N, M] → features float32 [N, M, F], zero where absent
    Featurise = Callable[[np.ndarray, np.ndarray], np.ndarray]


@lru_cache(maxsize=2)  # the champion's and the challenger's
def load_trunk(path: str, *, gpu: bool = False) -> Featurise:
    """Returns the trunk of the checkpoint ``path``, for one thread or for the GPU; raises BadCheckpoint."""
    folder = place(path)
    manifest = read_manifest(folder)
    if manifest.graph_digest and not gpu:
        from pipeline.models.graph import open_graph

        return open_graph(folder, manifest)
    import torch  # only where no graph spares it

    from pipeline.models import checkpoint

    torch.set_num_threads(1)
    return torch_trunk(checkpoint.load(folder).trunk.to("cuda" if gpu else "cpu"))


def torch_trunk(trunk: Trunk) -> Featurise:
    """Returns ``trunk`` as a function of arrays."""
    import torch

    from pipeline.models.trunk import features

    def featurise(frames: np.ndarray, present: np.ndarray) -> np.ndarray:
        if not len(frames):
            return np.zeros((0, present.shape[1], trunk.features), np.float32)
        x = torch.from_numpy(np.require(frames, requirements="W"))
        return features(trunk, x, torch.from_numpy(present)).numpy()

    return featurise


def add_features(columns: Mapping[str, np.ndarray], trunks: Sequence[Featurise]) -> Columns:
    """Replaces ``frame`` by the features z0, z1… float16 [N, M, F] under each of ``trunks``."""
    kept = {name: column for name, column in columns.items() if name != "frame"}
    for k, trunk in enumerate(trunks):
        kept[f"z{k}"] = compute_features(trunk, columns["frame"], columns["present"])
    return kept


def compute_features(trunk: Featurise, frames: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Returns the features z float16 [N, M, F] of frames [N, 5, H, W]; ``present`` [N] is a bit mask."""
    return trunk(frames, mask_to_bool(present)).astype(np.float16)
