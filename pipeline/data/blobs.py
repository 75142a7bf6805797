"""Stores tensors as safetensors files that are named by the sha256 of their bytes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pipeline.storage import write_atomic
from pipeline.types import PalisadeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pipeline.storage import Place


class BadBlob(PalisadeError, ValueError):
    """A stored artifact that is missing, or whose bytes are not those that its name promises."""


class MissingBlob(BadBlob):
    """An artifact that does not exist: lost, or deleted by `palisade gc`."""


def put(root: Place, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> str:
    """Store ``tensors`` under ``root`` → their digest (64 hex digits). The same content is stored once; a
    damaged copy of it is replaced.
    """
    from safetensors.torch import save

    data = save({k: t.contiguous() for k, t in tensors.items()}, dict(metadata or {}))
    digest = hashlib.sha256(data).hexdigest()
    path = _path(root, digest)
    if not _is_intact(path, digest):
        write_atomic(path, data)
    return digest


def get(root: Place, digest: str) -> dict[str, Tensor]:
    """Loads the tensors stored under ``digest``; raises BadBlob unless every byte is as it was written."""
    from safetensors.torch import load

    return load(verified(_path(root, digest), digest))


def verified(path: Place, digest: str) -> bytes:
    """Returns the bytes of ``path``; raises MissingBlob, or BadBlob if their sha256 is not ``digest``."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise MissingBlob(
            f"{path}: missing, though a record points to it; restore it from a backup"
        ) from None
    actual = hashlib.sha256(data).hexdigest()
    if actual != digest:
        raise BadBlob(
            f"{path}: changed or torn: sha256 is {actual[:12]}, the record says {digest[:12]}; "
            "restore it from a backup"
        )
    return data


def _is_intact(path: Place, digest: str) -> bool:
    try:
        return bool(verified(path, digest))
    except BadBlob:
        return False


def _path(root: Place, digest: str) -> Place:
    return root / digest[:2] / f"{digest}.safetensors"
