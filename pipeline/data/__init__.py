"""Configuration of the data: where captures, corpora and labels lie, and the bounds of reading."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.storage import check_place
from pipeline.types import Section


class CommissioningConfig(Section):
    """Section ``data.commissioning``: what is presented where a site is installed."""

    bona_fide: int = Field(
        default=32, ge=0, description="bona fide presentations, of as many people as come; half of them judge"
    )
    attacks: dict[str, int] = Field(
        default={"print": 12, "replay": 12, "mask": 8},
        description="presentations per instrument of the kit, which is how an instrument's name begins",
    )


class DataConfig(Section):
    """Section ``data``: what is read and within which bounds. Paths are relative to the working directory."""

    corpora: str = Field(
        default="run/corpora", description="imported labelled corpora, one folder per domain"
    )
    domains: tuple[str, ...] = Field(
        default=(), description="domains to train on; empty = every imported corpus"
    )
    anchor: str | None = Field(
        default=None, description="corpus sealed as anchor set; null = test splits of the domains"
    )
    captures: Annotated[str, AfterValidator(check_place)] = Field(
        "run/captures",
        description="site captures: <site>/segment-*.parquet in a folder or below s3://bucket/x",
    )
    sealed: str | None = Field(
        default=None, description="folder of <site>-labels.parquet, only ever used for scoring"
    )
    labels: Annotated[str | None, AfterValidator(lambda url: url and check_place(url))] = Field(
        default=None,
        description="labelled presentations: <site>/labels-*.parquet in a folder or below s3://bucket/x",
    )
    commissioning: CommissioningConfig = Field(
        default=CommissioningConfig(), description="what `palisade site commission` asks for"
    )
    stem_cache_gb: float = Field(
        default=4.0,
        ge=0,
        description="disk for maps of a frozen stem, beside the corpora; 0 = computed at every step",
    )
    frame_px: int = Field(default=112, ge=16, le=512, description="frame side in pixels after decoding")
    max_rows: int = Field(default=20_000, ge=1, description="rows a capture segment may hold")
    max_bytes: int = Field(
        default=96 * 2**20,
        ge=1,
        description="bytes of a capture segment, packed and unpacked; 5 times as much to read it",
    )
    retention: Literal["keep", "until_ingested"] = Field(
        default="keep", description="how long capture frames are kept"
    )
    keep_days: int = Field(
        default=30, ge=0, description="days that `palisade gc` leaves features that were learned from"
    )
