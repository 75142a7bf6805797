"""Captures, corpora and features at rest. This file holds the section ``data``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.types import Section


class DataConfig(Section):
    """Section ``data``: what is read and within which bounds. Paths are relative to the working directory."""

    corpora: str = Field(default="run/corpora", description="imported labelled corpora, one folder per domain")
    domains: tuple[str, ...] = Field(default=(), description="domains to train on; empty = every imported corpus")
    anchor: str | None = Field(
        default=None, description="corpus sealed as anchor set; null = test splits of the domains"
    )
    captures: str = Field(default="run/captures", description="site captures: <site>/segment-*.parquet")
    sealed: str | None = Field(default=None, description="folder of <site>-labels.parquet, only ever used for scoring")
    redteam: str | None = Field(default=None, description="folder of <site>-labels.parquet of red-team presentations")
    size: int = Field(default=48, ge=16, le=512, description="frame side in pixels after decoding")
    max_rows: int = Field(default=20_000, ge=1, description="rows a capture segment may hold")
    max_bytes: int = Field(default=512 * 2**20, ge=1, description="bytes a capture segment may have")
    retention: Literal["keep", "until_ingested"] = "keep"
    keep_days: int = Field(default=30, ge=0, description="days that `palisade gc` leaves features that were learned from")
