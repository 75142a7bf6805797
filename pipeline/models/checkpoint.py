"""Saves and loads a source model as a folder with ``model.safetensors`` and ``manifest.json``.

The tensors are named ``trunk.*`` and ``tail.*``. A trunk that is read without torch where features are made
has its graph beside them, in ``trunk.onnx``. The manifest is written last: a folder without it is no
checkpoint. Every digest is verified before a tensor is used, and no other file is read. The folder may be a
prefix of an object store.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as dump_tensors

from pipeline.models import tail as tails
from pipeline.models.manifest import (
    FORMAT,
    GRAPH,
    MANIFEST,
    WEIGHTS,
    BadCheckpoint,
    Manifest,
    manifest_digest,
    read_file,
    read_manifest,
)
from pipeline.models.trunk import build_trunk, fold, graph_of
from pipeline.storage import place, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from pipeline.models import ModelConfig
    from pipeline.models.trunk import Trunk
    from pipeline.storage import Place

TRUNK, TAIL = "trunk.", "tail."


@dataclass(frozen=True)
class SourceModel:
    """A folded, frozen trunk for inference and the tail that every site starts from."""

    trunk: Trunk
    tail: dict[str, Tensor]
    manifest: Manifest


def seal(trunk: Trunk, tail: Mapping[str, Tensor], manifest: Manifest) -> SourceModel:
    """Returns a SourceModel whose manifest carries its digests; ``trunk`` is folded already.

    Raises BadCheckpoint if a tensor holds a value that is not finite.
    """
    return _sealed(trunk, tail, manifest)[0]


def exists(path: Place) -> bool:
    """Returns True if ``path`` holds a checkpoint that was written to its end."""
    return (path / MANIFEST).exists()


def save(path: Place, model: SourceModel) -> str:
    """Writes a new checkpoint folder ``path`` and returns its digest; raises BadCheckpoint if it exists."""
    if exists(path):
        raise BadCheckpoint(f"{path}: exists already; a checkpoint is never overwritten")
    sealed, files = _sealed(model.trunk, model.tail, model.manifest)
    for name, payload in files.items():
        write_atomic(path / name, payload)
    write_atomic(path / MANIFEST, sealed.manifest.model_dump_json(indent=1).encode())
    return sealed.manifest.digest


def load(path: Place | str) -> SourceModel:
    """Reads and verifies a checkpoint folder, given as a place, a path or a URL; raises BadCheckpoint.

    The trunk is that of the weights: the graph is not read.
    """
    path = place(path) if isinstance(path, str) else path
    manifest = read_manifest(path)
    payload = read_file(path, manifest, WEIGHTS)
    try:
        tensors = parse_tensors(payload)
    except (SafetensorError, ValueError) as e:
        raise BadCheckpoint(f"{path / WEIGHTS}: not a safetensors file: {' '.join(str(e).split())}") from None
    tail = _checked_tail(path, tensors, manifest)
    trunk = fold(build_trunk(manifest.config.trunk, manifest.size, architecture=dict(manifest.architecture)))
    try:
        trunk.load_state_dict({n.removeprefix(TRUNK): t for n, t in tensors.items() if n.startswith(TRUNK)})
    except RuntimeError as e:
        raise BadCheckpoint(
            f"{path / WEIGHTS}: trunk does not fit its config: {' '.join(str(e).split())[:200]}"
        ) from None
    if trunk_digest(trunk, manifest.config, manifest.size) != manifest.trunk_digest:
        raise BadCheckpoint(f"{path / MANIFEST}: trunk_digest is not that of the trunk in {WEIGHTS}")
    return SourceModel(trunk, tail, manifest)


@contextmanager
def local_folder(path: Place) -> Iterator[Path]:
    """Gives the checkpoint as a local folder, by a temporary copy if ``path`` is in an object store."""
    if isinstance(path, Path):
        yield path
        return
    manifest = read_manifest(path)
    with tempfile.TemporaryDirectory() as copy:
        for name in manifest.files:
            (Path(copy) / name).write_bytes(read_file(path, manifest, name))
        (Path(copy) / MANIFEST).write_bytes((path / MANIFEST).read_bytes())
        yield Path(copy)


def trunk_digest(trunk: Trunk, config: ModelConfig, size: int) -> str:
    """Returns the sha256 of the trunk's tensors, config and frame side: equal digests, equal features."""
    h = hashlib.sha256(json.dumps([config.trunk.model_dump(mode="json"), size], sort_keys=True).encode())
    for name, t in sorted(trunk.state_dict().items()):
        h.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        h.update(t.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


def _sealed(
    trunk: Trunk, tail: Mapping[str, Tensor], manifest: Manifest
) -> tuple[SourceModel, dict[str, bytes]]:
    """Returns the source model with its digests, and its files by name, all but the manifest."""
    tail = {name: t.detach().cpu().clone().contiguous() for name, t in tail.items()}
    files = {WEIGHTS: _serialise(trunk, tail)}
    if trunk.exported:
        files[GRAPH] = graph_of(trunk, manifest.size)
    digests = {name: hashlib.sha256(payload).hexdigest() for name, payload in files.items()}
    stamped = manifest.model_copy(
        update={
            "format": FORMAT,
            "trunk_digest": trunk_digest(trunk, manifest.config, manifest.size),
            "weights_digest": digests[WEIGHTS],
            "graph_digest": digests.get(GRAPH, ""),
        }
    )
    stamped = stamped.model_copy(update={"digest": manifest_digest(stamped)})
    return SourceModel(trunk, tail, stamped), files


def _serialise(trunk: Trunk, tail: Mapping[str, Tensor]) -> bytes:
    named = {
        **{TRUNK + n: t for n, t in trunk.state_dict().items()},
        **{TAIL + n: t for n, t in tail.items()},
    }
    for name, t in named.items():
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise BadCheckpoint(f"{name}: holds a value that is not finite; such a model is not stored")
    return dump_tensors({n: t.detach().cpu().contiguous() for n, t in sorted(named.items())})


def _checked_tail(path: Place, tensors: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    config = manifest.config
    wanted = tails.init_tail(config.tail, config.trunk.features, generator=torch.Generator())
    tail = {n.removeprefix(TAIL): t for n, t in tensors.items() if n.startswith(TAIL)}
    memory = {n: tail.pop(n) for n in tails.REPLAY if n in tail}
    reference = {n: tail.pop(n) for n in tails.REFERENCE if n in tail}
    if odd := sorted(wanted.keys() ^ tail.keys()):
        raise BadCheckpoint(f"{path / WEIGHTS}: tail tensor {odd[0]} is missing or unknown")
    for name, t in tail.items():
        if t.shape != wanted[name].shape or not bool(torch.isfinite(t).all()):
            raise BadCheckpoint(
                f"{path / WEIGHTS}: tail tensor {name}: shape {tuple(t.shape)} or a value is not as "
                "configured"
            )
    shapes = [tuple(t.shape[1:]) for t in memory.values()]
    if memory and shapes != [(tails.MODALITIES, config.trunk.features), (tails.MODALITIES,), ()]:
        raise BadCheckpoint(f"{path / WEIGHTS}: the source features {', '.join(tails.REPLAY)} are not whole")
    logit = reference.get("reference.logit")
    if logit is not None and logit.shape != (2**tails.MODALITIES, 2, tails.QUANTILES):
        raise BadCheckpoint(f"{path / WEIGHTS}: reference.logit has shape {tuple(logit.shape)}; train again")
    pool = reference.get("reference.pool")
    if pool is not None and (pool.shape != () or not 0 <= float(pool) <= 1):
        raise BadCheckpoint(f"{path / WEIGHTS}: reference.pool is no share; train again")
    return {**tail, **memory, **reference}
