"""Configuration of the source model: a frozen trunk per modality, and the small tail that sites may move."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.types import Section


class TinyConfig(Section):
    """A CNN of about 60 thousand parameters per modality, trained from scratch in seconds: for tests."""

    kind: Literal["tiny"] = Field(default="tiny", description="a small CNN per modality")
    width: int = Field(default=16, ge=4, le=256, description="channels of the first block")
    features: int = Field(default=64, ge=8, le=1024, description="F, length of a modality's feature vector")


class MobileConfig(Section):
    """MobileNetV2 of ImageNet to stride 16: a frozen stem, and a middle that every modality trains."""

    kind: Literal["mobile"] = Field(
        default="mobile", description="an ImageNet CNN, its middle trained per modality"
    )
    features: int = Field(default=64, ge=8, le=1024, description="F, length of a modality's feature vector")


class VitConfig(Section):
    """A pre-trained ViT, DINOv2 with registers or CLIP of ``transformers`` (extra ``vit``).

    All modalities share it. The default of ``tuning`` is left out when this is written, so that the digests
    of checkpoints from before it stay.
    """

    kind: Literal["vit"] = Field(description="one ViT shared by the modalities")
    pretrained: str | None = Field(
        default=None,
        description="hub name or local folder: ViT, DINOv2 with registers, CLIP; null = small random ViT",
    )
    tuning: Literal["adapters", "last_block"] = Field(
        default="adapters",
        exclude_if=lambda tuning: tuning == "adapters",
        description="adapters: small ones per modality and the last block; last_block: that alone",
    )
    features: int = Field(default=64, ge=8, le=1024, description="F, length of a modality's feature vector")


TrunkConfig = TinyConfig | MobileConfig | VitConfig


class TailConfig(Section):
    """Widths of the tail; its formulas are in ``pipeline/source/README.md``."""

    head: Literal["radial", "linear"] = Field(
        default="radial", description="boundary of every head: a sphere, or a plane to compare it with"
    )
    width: int = Field(default=32, ge=4, le=512, description="D, head width")
    rank: int = Field(default=8, ge=1, le=64, description="r, site adapter rank")


class ModelConfig(Section):
    """Section ``model``."""

    trunk: TrunkConfig = Field(
        default=MobileConfig(), discriminator="kind", description="frozen shared feature extractor"
    )
    tail: TailConfig = Field(default=TailConfig(), description="the small rest that sites may move")
