"""Adaptation of sites, and the section ``bank``: the fixed shapes of one step."""

from __future__ import annotations

from pydantic import Field

from pipeline.types import Section


class BankConfig(Section):
    """Section ``bank``: the fixed shapes of one step."""

    slots: int = Field(default=16, ge=1, description="K, sites stepped together")
    batch_size: int = Field(default=8, ge=1, description="B, samples per site and step")
    cache_mb: int = Field(
        default=256, ge=16, description="MiB of site states that a shard keeps in memory between calls"
    )
