"""Keeps an even sample of everything a site has shown, to measure drift and instability on.

Reservoir sampling (Vitter's algorithm R, 1985) with a hash of the running count in the place of a random
generator, so that the same stream always leaves the same memory. Shapes: R slots, B samples, M modalities, F
features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.types import Features

    State = dict[str, Tensor]


def init(size: int, modalities: int, features: int) -> State:
    """Returns R = ``size`` empty slots."""
    return {
        "seen": torch.zeros((), dtype=torch.int64),
        "reservoir.z": torch.zeros(size, modalities, features),
        "reservoir.present": torch.zeros(size, modalities, dtype=torch.bool),
        "reservoir.vote": torch.zeros(size),
        "reservoir.source": torch.zeros(size),
    }


def filled(state: State) -> Tensor:
    """Returns [R], 1 for the slots that hold a sample."""
    size = state["reservoir.vote"].shape[0]
    return (torch.arange(size) < state["seen"]).float()


def remember(state: State, batch: Features, *, vote: Tensor, source: Tensor) -> State:
    """Lets the valid samples compete for the slots, with their vote [B] and the source's score [B]."""
    size = state["reservoir.vote"].shape[0]
    count = batch.valid.long()
    before = state["seen"] + count.cumsum(0) - count  # [B] samples that came earlier
    draw = ((before * 2654435761 + 1013904223) % 4294967296) % (before + 1)
    slot = torch.where(before < size, before, draw)
    hit = (slot == torch.arange(size)[:, None]) & batch.valid  # [R, B]
    last = torch.where(hit, torch.arange(1, len(count) + 1), 0).amax(-1)  # of several, the newest stays
    new, at = last > 0, (last - 1).clamp(min=0)
    return {
        **state,
        "seen": state["seen"] + count.sum(),
        "reservoir.z": torch.where(new[:, None, None], batch.z[at], state["reservoir.z"]),
        "reservoir.present": torch.where(new[:, None], batch.present[at], state["reservoir.present"]),
        "reservoir.vote": torch.where(new, vote[at], state["reservoir.vote"]),
        "reservoir.source": torch.where(new, source[at], state["reservoir.source"]),
    }
