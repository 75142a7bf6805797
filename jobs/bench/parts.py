"""Stores the parts of a benchmark as soon as they are done, named by everything they depend on.

An interrupted benchmark goes on where it was: what the same code stored under the same settings is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import zipfile
import zlib
from pathlib import Path
from types import NoneType
from typing import TypeVar, get_args, get_origin, get_type_hints

import numpy as np

import pipeline
from pipeline.storage import write_atomic

T = TypeVar("T")
ROOT = Path(pipeline.__file__).parents[1]
ARRAY = "array"  # stands for an array in the JSON of a record, with its number
DAMAGED = (OSError, KeyError, ValueError, TypeError, EOFError, IndexError, RuntimeError, SyntaxError)
DAMAGED = (*DAMAGED, zipfile.BadZipFile, zlib.error, struct.error)  # what an archive with flipped bits raises


def digest(*inputs: object) -> str:
    """Returns 20 hexadecimal digits over the JSON of ``inputs``."""
    text = json.dumps(inputs, sort_keys=True, default=lambda x: x.model_dump(mode="json"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def code_of(*patterns: str) -> str:
    """Returns the sha256 of this repository's files that ``patterns`` name; every pattern has to name one.

    A folder stands for the Python files in it.
    """
    matches = {pattern: [*ROOT.glob(pattern)] for pattern in patterns}
    assert all(matches.values()), f"no file: {[p for p, paths in matches.items() if not paths]}"
    paths = {path for paths in matches.values() for path in paths}
    files = sorted({f for path in paths for f in (path.rglob("*.py") if path.is_dir() else [path])})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def part(folder: Path, name: str, *inputs: object, suffix: str = ".npz") -> Path:
    """Returns the file of the part ``name`` that depends on ``inputs``."""
    plain = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
    return folder / f"{plain}-{digest(*inputs)}{suffix}"


def save(path: Path, record: object) -> None:
    """Writes a record of arrays, numbers and words (dataclasses, tuples, dictionaries) without pickle."""
    arrays: list[np.ndarray] = []
    facts = np.array(json.dumps(_facts(record, arrays)))

    def write(tmp: Path) -> None:
        with tmp.open("wb") as f:
            np.savez_compressed(
                f, allow_pickle=False, facts=facts, **{f"{ARRAY}{i}": a for i, a in enumerate(arrays)}
            )

    write_atomic(path, write)


def load(path: Path, kind: type[T]) -> T:
    """Reads what ``save`` wrote as a ``kind``; ValueError if it is damaged or of another version."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            record = _record(kind, json.loads(str(stored["facts"])), {n: stored[n] for n in stored.files})
        assert isinstance(record, get_origin(kind) or kind)
        return record  # pyright: ignore[reportReturnType]  # a dict of them has no class of its own
    except DAMAGED as e:
        why = " ".join(str(e).split())[:120]
        raise ValueError(
            f"{path}: not a stored result of this version ({why}); delete it and run again"
        ) from None


def _facts(value: object, arrays: list[np.ndarray]) -> object:
    """Returns ``value`` for JSON; its arrays are moved to ``arrays``."""
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {ARRAY: len(arrays) - 1}
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        value = value._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, dict):
        return {k: _facts(v, arrays) for k, v in value.items()}
    return [_facts(v, arrays) for v in value] if isinstance(value, tuple | list) else value


def _record(kind: type, fact: object, arrays: dict[str, np.ndarray]) -> object:
    """Returns the ``kind`` that was written as ``fact``."""
    inner = [k for k in get_args(kind) if k is not NoneType]
    if isinstance(fact, dict) and [*fact] == [ARRAY]:
        return arrays[f"{ARRAY}{fact[ARRAY]}"]
    if isinstance(fact, dict) and get_origin(kind) is dict:
        return {k: _record(inner[1], v, arrays) for k, v in fact.items()}
    if isinstance(fact, dict):
        kind = inner[0] if inner else kind
        hints = get_type_hints(kind)
        return kind(**{k: _record(hints[k], v, arrays) for k, v in fact.items()})
    return tuple(_record(inner[0], v, arrays) for v in fact) if isinstance(fact, list) else fact
