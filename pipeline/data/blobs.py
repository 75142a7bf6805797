"""Content-addressed tensors on disk: safetensors named by the sha256 of their bytes, written so that a crash leaves no half."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor


class BadBlob(ValueError):
    """A stored artifact is missing or its bytes are not the ones its name promises."""


def put(root: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> str:
    """Store ``tensors`` under ``root`` and return their digest (64 hex digits); the same content is stored once."""
    from safetensors.torch import save

    data = save({k: t.contiguous() for k, t in tensors.items()}, dict(metadata or {}))
    digest = hashlib.sha256(data).hexdigest()
    path = _path(root, digest)
    if not path.exists():
        write_atomic(path, lambda tmp: tmp.write_bytes(data))
    return digest


def get(root: Path, digest: str) -> dict[str, Tensor]:
    """Load the tensors stored under ``digest``; raises BadBlob unless every byte is as it was written."""
    from safetensors.torch import load

    return load(verified(_path(root, digest), digest))


def verified(path: Path, digest: str) -> bytes:
    """The bytes of ``path``; raises BadBlob when it is missing or its sha256 is not ``digest``."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadBlob(
            f"{path}: missing, though a record points to it; restore it from a backup or run the cycle again"
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise BadBlob(f"{path}: sha256 is {found[:12]}, the record says {digest[:12]}; the file was changed or torn")
    return data


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then fsync and rename: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    os.close(handle)
    tmp = Path(name)
    try:
        write(tmp)
        _fsync(tmp)
        tmp.replace(path)
        _fsync(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def _path(root: Path, digest: str) -> Path:
    return root / digest[:2] / f"{digest}.safetensors"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
