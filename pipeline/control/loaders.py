"""Loads what many calls of one process read again, and keeps a bounded number of each kind.

Everything kept is a copy of something durable, found by path, URL or digest, so any entry may be dropped and
read again. Nothing returned from here may be written to. A digest that does not verify raises BadBlob and is
not kept.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from cachetools import LRUCache

from pipeline.config import Config, parse
from pipeline.data import blobs
from pipeline.data.anchor import AnchorSet, open_sealed
from pipeline.data.featurise import load_trunk
from pipeline.ledger import Ledger
from pipeline.models import checkpoint, tail

if TYPE_CHECKING:
    from collections.abc import Collection

    import numpy as np

    from pipeline.ledger import StateRow
    from pipeline.models.checkpoint import SourceModel
    from pipeline.site.contract import State
    from pipeline.storage import Place

SCORED_STATES = 1024  # states whose anchor scores are kept, per anchor set and source model


@lru_cache(maxsize=2)
def load_config(text: str) -> Config:
    """Returns the configuration in ``text``, the JSON that a shard job carries."""
    return parse(text, "shard job")


@lru_cache(maxsize=2)
def open_ledger_at(url: str) -> Ledger:
    """Returns this process's connection to the ledger at ``url``."""
    return Ledger.open(url)


@lru_cache(maxsize=2)  # the champion and the challenger
def load_model(path: str) -> SourceModel:
    """Returns the source model in the checkpoint folder ``path``."""
    return checkpoint.load(path)


@lru_cache(maxsize=2)
def load_anchor(root: Place, digest: str) -> AnchorSet:
    """Returns the sealed anchor set ``digest`` below ``root``."""
    return open_sealed(root, digest)


@lru_cache(maxsize=2)
def anchor_score_cache(anchor: str, model_path: str) -> LRUCache[bytes, np.ndarray]:
    """Returns the cache of anchor scores, by state digest, of one anchor set under one source model."""
    return LRUCache(SCORED_STATES)


@lru_cache(maxsize=2)
def state_cache(megabytes: int) -> LRUCache[tuple[str, int], State]:
    """Returns the cache of site states, by (blob digest, slot); the least recently used goes first."""
    return LRUCache(megabytes * 2**20, getsizeof=lambda state: sum(t.nbytes for t in state.values()))


def load_state(
    config: Config,
    model: SourceModel,
    row: StateRow | None,
    *,
    fresh: State | None = None,
    keep: Collection[str] = tail.MOVABLE,
) -> State:
    """Returns the site state that ``row`` points to, or the source model's own where ``row`` is None.

    ``fresh`` is the source model's own state if the caller has it already; ``keep`` is what counts of a state
    that has other tensors. Raises BadBlob for a corrupt blob.
    """
    method = config.site
    fresh = fresh or method.init(model.tail)
    if row is None:
        return fresh
    cache = state_cache(config.bank.cache_mb)
    key = row.blob, row.slot
    if key not in cache:
        blob = _load_blob(config.place("states"), row.blob)
        cache[key] = {name: t[row.slot].clone() for name, t in blob.items()}
    state = cache[key]
    if row.method == method.kind and {n: t.shape for n, t in state.items()} == {
        n: t.shape for n, t in fresh.items()
    }:
        return state
    # method changed: keep the movable weights, drop the optimizer state; an earlier version had fewer of them
    return {**fresh, **{name: state[name] for name in keep if name in state}}


def clear() -> None:
    """Empties every cache, as a fresh process has them."""
    for loader in (
        load_config,
        open_ledger_at,
        load_model,
        load_trunk,
        load_anchor,
        anchor_score_cache,
        state_cache,
        _load_blob,
    ):
        loader.cache_clear()


@lru_cache(maxsize=4)  # one shared blob per batch; per-site tensors are copied to the state cache
def _load_blob(root: Place, digest: str) -> State:
    return blobs.get(root, digest)
