"""Assigns sites to shards and groups them into calls; pure, so that every driver decides the same.

Rendezvous hashing (Thaler and Ravishankar, 1998): a site belongs to the shard whose hash with it is the
highest. A shard that joins takes only its own sites, one that leaves gives up only the sites it had: states
that others keep in memory stay there.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

SAMPLES, SITES = (
    1024,
    256,
)  # of one call: its fixed costs must not show, and its loss with a shard must not hurt
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def home_shards(sites: Sequence[str], shards: int) -> NDArray[np.int64]:
    """Returns the shard of each site [N]."""
    hashes = np.array([_hash(s) for s in sites], np.uint64)
    shard = _mixed(np.arange(1, shards + 1, dtype=np.uint64) * GOLDEN)
    return np.stack([_mixed(hashes ^ k) for k in shard]).argmax(axis=0)


def group_calls(pending: Mapping[str, int], *, slots: int) -> list[list[str]]:
    """Groups sites (→ samples that are pending) into calls of about SAMPLES, the longest streams together.

    A bank of ``slots`` takes as many steps as its longest stream has batches, so equal lengths waste the
    fewest slots.
    """
    groups: list[list[str]] = [[]]
    samples = 0
    for site in sorted(pending, key=lambda s: (-pending[s], s)):
        if groups[-1] and len(groups[-1]) % slots == 0 and (samples >= SAMPLES or len(groups[-1]) >= SITES):
            groups.append([])
            samples = 0
        groups[-1].append(site)
        samples += pending[site]
    return [c for c in groups if c]


def _hash(site: str) -> int:
    return int.from_bytes(hashlib.blake2b(site.encode(), digest_size=8).digest(), "little")


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Applies the finaliser of splitmix64 (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
