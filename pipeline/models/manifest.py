"""The manifest of a source model: everything in a checkpoint that is not a tensor, readable without torch.

Of the files of a checkpoint the manifest is written last, and names the others with their sha256.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, cast

from pydantic import Field, JsonValue, ValidationError

from pipeline.models import ModelConfig
from pipeline.storage import StoreUnavailable, size
from pipeline.types import PalisadeError, Section

if TYPE_CHECKING:
    from pipeline.storage import Place

FORMAT = 3  # 1 had no reference.pool, 2 no graph
WEIGHTS, GRAPH, MANIFEST = "model.safetensors", "trunk.onnx", "manifest.json"
MAX_MANIFEST = 2**20  # bytes


class BadCheckpoint(PalisadeError, ValueError):
    """A folder that is no complete, unchanged checkpoint of a readable version; the message is one line."""


class Manifest(Section):
    """The facts about a source model that are not tensors; ``checkpoint.seal`` fills in the digests.

    ``graph_digest`` is left out when it is empty, so that the digests of checkpoints from before it stay.
    """

    format: int = FORMAT
    config: ModelConfig
    size: int  # frame side, pixels
    threshold: float  # of the fused score, from source validation
    method: str  # source.kind
    domains: tuple[str, ...] = ()
    data: dict[str, str] = Field(default={})  # domain → digest of its corpus
    parents: tuple[str, ...] = ()  # digests of the checkpoints that the fit started from
    fingerprint: str = ""  # of the resolved configuration
    revision: str = ""  # of the code
    metrics: dict[str, float] = Field(default={})  # on the source validation
    architecture: dict[str, JsonValue] = Field(default={})  # facts that build_trunk needs besides the config
    trunk_digest: str = ""  # address of every feature that this trunk computes
    weights_digest: str = ""  # of the bytes of model.safetensors
    graph_digest: str = Field(default="", exclude_if=lambda digest: not digest)  # of the bytes of trunk.onnx
    digest: str = ""  # of all fields above; the name of the model

    @property
    def files(self) -> dict[str, str]:
        """The other files of the checkpoint with their sha256; a trunk without a graph has no trunk.onnx."""
        graph = {GRAPH: self.graph_digest} if self.graph_digest else {}
        return {WEIGHTS: self.weights_digest, **graph}


def manifest_digest(manifest: Manifest) -> str:
    """Returns the sha256 of the manifest without its own digest; those of the files cover the files."""
    content = manifest.model_dump(mode="json", exclude={"digest"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Place) -> Manifest:
    """Reads and verifies the manifest of a checkpoint alone, which is cheap; raises BadCheckpoint."""
    if not path.exists():
        raise BadCheckpoint(f"{path}: no such checkpoint folder; restore it or run `palisade train`")
    try:
        raw = cast("JsonValue", json.loads(_read(path / MANIFEST, MAX_MANIFEST)))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise BadCheckpoint(f"{path / MANIFEST}: not JSON: {' '.join(str(e).split())[:200]}") from None
    written = raw.get("format") if isinstance(raw, dict) else None
    if not isinstance(written, int) or isinstance(written, bool) or written < 1:
        raise BadCheckpoint(f"{path / MANIFEST}: no format number; not a checkpoint manifest")
    if written > FORMAT:
        raise BadCheckpoint(
            f"{path / MANIFEST}: format {written} is newer than {FORMAT}, the newest this version reads; "
            "upgrade"
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise BadCheckpoint(f"{path / MANIFEST}: {where}: {first['msg']}") from None
    if manifest.digest != manifest_digest(manifest):
        raise BadCheckpoint(
            f"{path / MANIFEST}: digest does not match the content; the manifest was changed: restore it"
        )
    return manifest


def read_file(path: Place, manifest: Manifest, name: str) -> bytes:
    """Returns the file ``name`` of the checkpoint ``path``, verified by its digest; raises BadCheckpoint."""
    payload = _read(path / name, None)
    digest, expected = hashlib.sha256(payload).hexdigest(), manifest.files[name]
    if digest != expected:
        raise BadCheckpoint(
            f"{path / name}: digest is {digest[:12]}…, the manifest says {expected[:12]}…; "
            "it was changed or torn: restore it or run `palisade train`"
        )
    return payload


def _read(path: Place, limit: int | None) -> bytes:
    try:
        if limit is not None and (count := size(path)) > limit:
            raise BadCheckpoint(f"{path}: {count} bytes, allowed {limit}")
        return path.read_bytes()
    except StoreUnavailable:
        raise
    except OSError as e:
        raise BadCheckpoint(
            f"{path}: cannot be read: {e.strerror}; restore it or run `palisade train`"
        ) from None
