"""Results of a benchmark that are stored as soon as they are there,
each named by everything it depends on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import pipeline

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(pipeline.__file__).parents[1]


def digest(*given: object) -> str:
    """Returns 20 hexadecimal digits over the JSON of ``given``."""
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:20]


def code_of(*patterns: str) -> str:
    """Returns the sha256 of the files of this repository that ``patterns`` name: a stored result is one of
    this code.

    A folder stands for the Python files in it.
    """
    found = {pattern: sorted(ROOT.glob(pattern)) for pattern in patterns}
    assert all(found.values()), f"no file: {[p for p, files in found.items() if not files]}"
    paths = {path for paths in found.values() for path in paths}
    files = sorted({f for path in paths for f in (path.rglob("*.py") if path.is_dir() else [path])})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def store(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes plain arrays as one .npz file without pickle."""
    with path.open("wb") as f:
        np.savez_compressed(f, allow_pickle=False, **arrays)
