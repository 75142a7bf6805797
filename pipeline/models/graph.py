"""Makes features by the graph of a trunk with ONNX Runtime: on CPUs, without torch.

The graph, ``trunk.onnx`` of a checkpoint, gives what ``pipeline.models.trunk.features`` does, to 1e-5, in
about 0.6 of the time; and a process that only makes features need not import torch, which takes seconds.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, cast

import numpy as np
import onnxruntime

from pipeline.models.manifest import GRAPH, BadCheckpoint, read_file

if TYPE_CHECKING:
    from pipeline.models.manifest import Manifest
    from pipeline.storage import Place

SLICE = 4  # captures at once, as many as a core's cache serves best


def open_graph(path: Place, manifest: Manifest) -> TrunkGraph:
    """Returns the trunk of the checkpoint ``path`` that has its graph; raises BadCheckpoint."""
    payload = read_file(path, manifest, GRAPH)
    try:
        return TrunkGraph(payload)
    except Exception as e:  # the errors of ONNX Runtime have no class in common
        reason = " ".join(str(e).split())[:200]
        raise BadCheckpoint(f"{path / GRAPH}: not a graph of a trunk: {reason}") from None


class TrunkGraph:
    """A trunk as a function of arrays, on one thread; ``payload`` is its graph."""

    def __init__(self, payload: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # processes fill the cores
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        self.names = [i.name for i in inputs]
        self.channels = list(pairwise(accumulate((i.shape[1] for i in inputs), initial=0)))
        self.features = int(self.session.get_outputs()[0].shape[1])

    def __call__(self, frames: np.ndarray, present: np.ndarray) -> np.ndarray:
        """Returns the features z float32 [N, M, F] of frames uint8 [N, 5, H, W]; ``present`` is bool [N, M].

        The feature of an absent modality is zero, and nothing is computed for it.
        """
        z = np.zeros((len(frames), len(self.names), self.features), np.float32)
        for start in range(0, len(frames), SLICE):
            rows = [start + np.flatnonzero(shown) for shown in present[start : start + SLICE].T]
            parts = (frames[r, begin:end] for r, (begin, end) in zip(rows, self.channels, strict=True))
            given = dict(zip(self.names, parts, strict=True))
            outputs = cast("list[np.ndarray]", self.session.run(None, given))
            for m, (r, output) in enumerate(zip(rows, outputs, strict=True)):
                z[r, m] = output
        return z
