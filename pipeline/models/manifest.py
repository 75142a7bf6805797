"""The manifest of a source model: everything in a checkpoint that is not a tensor, readable without torch."""

from __future__ import annotations

from pydantic import Field, JsonValue

from pipeline.models import ModelConfig
from pipeline.types import Section

FORMAT = 2  # 1 had no reference.pool


class Manifest(Section):
    """The facts about a source model that are not tensors; ``checkpoint.seal`` fills in the three digests."""

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
    digest: str = ""  # of all fields above; the name of the model
