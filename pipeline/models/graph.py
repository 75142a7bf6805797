"""Makes features by the graph of a trunk with ONNX Runtime: on CPUs, without torch.

The graph, ``trunk.onnx`` of a checkpoint, gives what ``pipeline.models.trunk.features`` does, to 1e-5, in
about 0.6 of the time; and a process that only makes features need not import torch, which takes seconds.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from pipeline.models.manifest import GRAPH, BadCheckpoint, read_file

if TYPE_CHECKING:
    from pipeline.models.manifest import Manifest
    from pipeline.storage import Place

SLICE = 4  # captures at once, as many as a core's cache serves best


class TrunkGraph:
    """The trunk of a checkpoint that has its graph, on one thread."""

    def __init__(self, path: Place, manifest: Manifest) -> None:
        """Opens the graph of the checkpoint ``path``; raises BadCheckpoint."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # each process has a core's share
        options.log_severity_level = 3  # errors; a warning is no concern of the person who ingests
        payload = read_file(path, manifest, GRAPH)
        try:
            self.session = onnxruntime.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # its errors have no class of their own in common
            reason = " ".join(str(e).split())[:200]
            raise BadCheckpoint(f"{path / GRAPH}: not a graph of a trunk: {reason}") from None
        inputs = self.session.get_inputs()
        self.names = [i.name for i in inputs]
        self.channels = list(pairwise(accumulate((i.shape[1] for i in inputs), initial=0)))
        self.features = manifest.config.trunk.features

    def __call__(self, frames: np.ndarray, present: np.ndarray) -> np.ndarray:
        """Returns the features z float32 [N, M, F] of frames uint8 [N, 5, H, W]; ``present`` is bool [N, M].

        The feature of an absent modality is zero, and nothing is computed for it.
        """
        z = np.zeros((len(frames), len(self.names), self.features), np.float32)
        for start in range(0, len(frames), SLICE):
            rows = [start + np.flatnonzero(shown) for shown in present[start : start + SLICE].T]
            parts = (frames[r, begin:end] for r, (begin, end) in zip(rows, self.channels, strict=True))
            outputs = self.session.run(None, dict(zip(self.names, parts, strict=True)))
            for m, (r, output) in enumerate(zip(rows, outputs, strict=True)):
                z[r, m] = output
        return z
