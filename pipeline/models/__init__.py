"""Source model: a frozen trunk per modality and the small tail that sites may move. This file holds its config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.types import Section


class TinyConfig(Section):
    """CNN of about 60 thousand parameters per modality; trains on a CPU."""

    kind: Literal["tiny"] = "tiny"
    width: int = Field(default=16, ge=4, le=256)
    features: int = Field(default=64, ge=8, le=1024, description="F, length of a modality's feature vector")


class VitConfig(Section):
    """Pre-trained ViT from ``transformers`` (extra ``vit``), shared by the modalities, with a projection to F each."""

    kind: Literal["vit"]
    pretrained: str | None = Field(
        default=None, description="hub name or local directory; null = small random ViT"
    )
    features: int = Field(default=64, ge=8, le=1024)


class TailConfig(Section):
    """Widths of the tail (``methods.md`` §1)."""

    head: Literal["radial", "linear"] = Field(
        default="radial", description="linear: what the sphere is compared to"
    )
    width: int = Field(default=32, ge=4, le=512, description="D, head width")
    rank: int = Field(default=8, ge=1, le=64, description="r, site adapter rank")


class ModelConfig(Section):
    """Section ``model``."""

    trunk: TinyConfig | VitConfig = Field(default=TinyConfig(), discriminator="kind")
    tail: TailConfig = TailConfig()
