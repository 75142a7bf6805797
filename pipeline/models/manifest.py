"""The manifest of a source model: all of a checkpoint that is not a tensor. Reading one needs no torch."""

from __future__ import annotations

from pydantic import Field, JsonValue

from pipeline.models import ModelConfig
from pipeline.types import Section

FORMAT = 1


class Manifest(Section):
    """What a source model is, how it was made, and its digests, which ``checkpoint.seal`` fills in."""

    format: int = FORMAT
    config: ModelConfig
    size: int
    threshold: float  # of the fused score, at the equal error rate of the pooled source validation; call is score >= threshold
    method: str
    domains: tuple[str, ...] = ()
    data: dict[str, str] = Field(default={})  # domain → digest of its corpus
    parents: tuple[str, ...] = ()  # digests of the checkpoints it was made from
    fingerprint: str = ""  # of the resolved configuration
    revision: str = ""  # of the code
    metrics: dict[str, float] = Field(default={})
    architecture: dict[str, JsonValue] = Field(default={})  # what build_trunk needs besides the config
    trunk_digest: str = ""  # address of every feature that this trunk makes
    weights_digest: str = ""  # of the bytes of model.safetensors
    digest: str = ""  # of all of the above: names the model
