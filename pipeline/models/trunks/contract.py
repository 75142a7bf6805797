"""Holds what all trunks share: the modalities' channels, and how rows without one are left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import nn, stack

from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import JsonValue
    from torch import Tensor

    Architecture = dict[str, JsonValue]

CHANNELS = ((0, 3), (3, 4), (4, 5))  # first and one past the last channel of each modality, enum order
MODALITIES = len(CHANNELS)


class BadTrunk(PalisadeError, ValueError):
    """A trunk that cannot be built as configured; the message is one line."""


class Trunk(nn.Module):
    """Reads every modality by itself; a row of an absent modality reaches nothing and gets a zero feature."""

    slice: ClassVar[int] = 256  # samples at once at inference, as many as a core's cache serves best
    exported: ClassVar[bool] = False  # whether a checkpoint has the trunk's graph too, for ONNX Runtime
    features: int  # F

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """Returns z [B, M, F] of prepared frames [B, 5, H, W], or of the stem's maps of them."""
        return stack([self._rows(m, x, present[:, m]) for m in range(MODALITIES)], dim=1)

    def read(self, m: int, x: Tensor) -> Tensor:
        """Returns the features [N, F] of the rows ``x`` of modality ``m``."""
        raise NotImplementedError

    def part(self, m: int, x: Tensor) -> Tensor:
        """Returns what ``x`` holds of modality ``m``."""
        begin, end = CHANNELS[m]
        return x[:, begin:end]

    def learned(self, m: int) -> Iterator[nn.Parameter]:
        """Yields the parameters that only modality ``m`` trains."""
        raise NotImplementedError

    def fewest(self) -> int:
        """Returns the rows of a modality that are needed to learn from them."""
        return 1

    def architecture(self) -> Architecture:
        """Returns the facts that a checkpoint needs to build this trunk again, besides its configuration."""
        return {}

    def _rows(self, m: int, x: Tensor, present: Tensor) -> Tensor:
        rows = present.nonzero()[:, 0]
        z = x.new_zeros(len(x), self.features)
        if len(rows) < self.fewest():  # DDP needs every parameter in the graph
            return z + 0.0 * stack([p.sum() for p in self.learned(m)]).sum()
        part = self.part(m, x)
        if len(rows) == len(x):
            return self.read(m, part)
        return z.index_copy(0, rows, self.read(m, part[rows]).to(z.dtype))
