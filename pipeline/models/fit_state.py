"""Saves and loads an unfinished fit: tensors as safetensors and facts as JSON, under one digest."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load, save_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

TENSORS, FACTS = "fit.safetensors", "fit.json"


def write(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """Writes both files into ``folder``, which must exist."""
    save_file({n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}, folder / TENSORS)
    digest = _digest((folder / TENSORS).read_bytes(), facts)
    (folder / FACTS).write_text(json.dumps({**facts, "digest": digest}))


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Returns the (tensors, facts) that ``write`` stored; raises ValueError in one line for anything else."""
    try:
        data, facts = (folder / TENSORS).read_bytes(), json.loads((folder / FACTS).read_bytes())
        if not isinstance(facts, dict) or facts.pop("digest", None) != _digest(data, facts):
            raise ValueError("its digest does not match: changed, torn, or of a version that wrote none")
        return load(data), facts
    except (OSError, ValueError, SafetensorError) as e:
        raise ValueError(
            f"{folder}: not a readable fit ({' '.join(str(e).split())[:120]}); delete it"
        ) from None


def _digest(tensors: bytes, facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + b"\n" + tensors).hexdigest()
