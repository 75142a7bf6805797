"""What a shard holds of a site's window, and the judging of what it learned from it: no ledger, no blobs, no Ray."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline import bank
from pipeline.data.features import mask_to_bool
from pipeline.guards import Evidence, Verdict, assess, evidence_of
from pipeline.models import tail
from pipeline.types import Features

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

    from torch import Tensor

    from pipeline.config import Config
    from pipeline.data.anchor import AnchorSet
    from pipeline.data.features import FeatureBlock
    from pipeline.ledger import SiteRow
    from pipeline.models.checkpoint import SourceModel
    from pipeline.site import State

    Known = MutableMapping[bytes, np.ndarray]  # anchor scores of a state, by the digest of what it moved


@dataclass(frozen=True)
class Window:
    """One site with what it has not learned from yet."""

    row: SiteRow
    block: FeatureBlock
    learner: State  # what learning goes on from
    stable: State  # what the site serves
    parent: str | None  # state that the learner is
    lost: str | None  # state that it should have been, whose blob is damaged
    age_seconds: float


def features_of(block: FeatureBlock) -> Features:
    """A block of the store as one site's stream."""
    present = torch.from_numpy(mask_to_bool(block.present))
    z, session = torch.from_numpy(block.z.astype(np.float32)), torch.from_numpy(block.session)
    return Features(z, present, torch.ones(len(block), dtype=torch.bool), session)


def judge(
    config: Config,
    model: SourceModel,
    anchor: AnchorSet,
    windows: Sequence[Window],
    states: State,
    traces: Sequence[bank.Trace],
    *,
    known: Known | None = None,
) -> list[tuple[Evidence, Verdict]]:
    """Replay the anchor set against every candidate and champion under every missing-modality pattern, then assess.

    Each state is scored by itself, and once: sites that have not moved share what ``known`` has of the source model.
    """
    patterns, present = anchor.replayed()
    known = {} if known is None else known
    sound = torch.stack(
        [torch.isfinite(t).reshape(len(t), -1).all(1) for t in states.values() if t.is_floating_point()]
    ).all(0)
    judged: list[tuple[Evidence, Verdict]] = []
    for k, w in enumerate(windows):
        own = anchor_scores(model, anchor, slot_of(states, k), known)
        finite = bool(sound[k] & torch.isfinite(traces[k].score).all())
        evidence = evidence_of(
            own, anchor_scores(model, anchor, w.stable, known), anchor.label.numpy(), anchor.species, patterns,
            model.manifest.threshold, trust_ratio=bank.distance(model.tail, states, k), stream_n=len(w.block),
            age_seconds=w.age_seconds, stream_finite=finite,
            valid=present.any(-1).numpy(), holds_before=w.row.holds,
        )  # fmt: skip
        judged.append((evidence, assess(config.guards, evidence)))
    return judged


def anchor_scores(model: SourceModel, anchor: AnchorSet, state: State, known: Known) -> np.ndarray:
    """Scores [P, N] of one state under every pattern; looked up in and added to ``known``."""
    key = _moved(state)
    if key not in known:
        present = anchor.replayed()[1]
        params = tail.moved(model.tail, state)
        with torch.no_grad():
            known[key] = torch.stack([tail.score(params, anchor.z, p) for p in present]).numpy()
    return known[key]


def rescored(model: SourceModel, window: Window, candidate: State, stream: Features) -> tuple[Tensor, Tensor]:
    """The stream's scores [N] by what the site serves and by the candidate."""
    with torch.no_grad():
        before = tail.score(tail.moved(model.tail, window.stable), stream.z, stream.present)
        if _moved(candidate) == _moved(window.stable):
            return before, before
        return before, tail.score(tail.moved(model.tail, candidate), stream.z, stream.present)


def slot_of(stacked: State, k: int) -> State:
    return {name: t[k] for name, t in stacked.items()}


def _moved(state: State) -> bytes:
    """Digest of what decides a state's scores."""
    digest = hashlib.blake2b(digest_size=16)
    for name in tail.MOVABLE:
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.digest()
