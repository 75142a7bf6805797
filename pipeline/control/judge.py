"""Judges what a site learned from its window: no ledger, no blobs, no Ray."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.control import teaching
from pipeline.data.features import mask_to_bool
from pipeline.data.protocols import PATTERNS
from pipeline.guards import Evidence, Stream, Verdict
from pipeline.guards.evidence import evidence_of
from pipeline.guards.records import Moved
from pipeline.guards.stream import SiteHistory, WindowScores, measure_stream, usual_modalities
from pipeline.guards.verdict import assess
from pipeline.models import tail
from pipeline.site import bank
from pipeline.types import Features, Modality

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping, Sequence

    from torch import Tensor

    from pipeline.config import Config
    from pipeline.control.teaching import LabelledBlock
    from pipeline.data.anchor import AnchorSet
    from pipeline.data.features import FeatureBlock
    from pipeline.ledger import SiteRow
    from pipeline.models.checkpoint import SourceModel
    from pipeline.site.contract import State

    ScoreCache = MutableMapping[bytes, np.ndarray]  # anchor scores of a state, by the digest of what it moved

NO_HISTORY = SiteHistory()
ALL_MODALITIES = 2 ** len(Modality) - 1  # as a mask


@dataclass(frozen=True)
class Window:
    """Holds one site with the samples that it has not learned from yet."""

    row: SiteRow
    block: FeatureBlock
    learner: State  # state that learning continues from
    champion: State  # state that the site serves
    parent: str | None  # id of the learner; None: the source model's own state
    corrupt_parent: str | None  # id of the intended parent state if its blob is corrupt, else None
    age_seconds: float
    champion_state: str | None = None  # id of ``champion``; None: the source model as it is
    history: SiteHistory = NO_HISTORY
    teaches: LabelledBlock | None = None  # the site's labelled presentations that teach
    judges: LabelledBlock | None = None  # and those that judge; None: it has none at all
    learns_anew: bool = False  # the memory in ``learner`` is not what it learned from


def features_of(block: FeatureBlock) -> Features:
    """Returns a block of the feature store as one site's stream."""
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
    scored: Sequence[tuple[Tensor, Tensor]],
    cache: ScoreCache | None = None,
) -> list[tuple[Evidence, Verdict]]:
    """Scores the anchor set by every candidate and champion under every pattern, then assesses.

    Where a site's rig is known, a pattern leaves what the rig has of it, and one that leaves nothing is
    passed over. ``scored`` holds the ``stream_scores`` of each window. Each state is scored once: sites whose
    state has not changed share the scores of the source model in ``cache``.
    """
    patterns, _ = anchor.replayed()
    cache = {} if cache is None else cache
    sound = torch.stack(
        [torch.isfinite(t).reshape(len(t), -1).all(1) for t in states.values() if t.is_floating_point()]
    ).all(0)
    rigs = [rig_of(w.row.tags) for w in windows]
    shown = {rig: _shown(anchor, rig).any(-1) for rig in set(rigs)}
    judged: list[Evidence] = []
    for k, (w, rig) in enumerate(zip(windows, rigs, strict=True)):
        own, valid = slot_of(states, k), shown[rig]
        finite = bool(sound[k] & torch.isfinite(traces[k].score).all())
        stream = Stream(baseline=w.history.baseline, born=w.history.born, sessions_before=w.history.sessions)
        if finite:
            stream = _measured(config, model, anchor, w, own, traces[k], scored[k], cache)
        evidence = evidence_of(
            anchor_scores(model, anchor, own, cache, rig=rig),
            anchor_scores(model, anchor, w.champion, cache, rig=rig),
            anchor.label.numpy(),
            anchor.species,
            patterns,
            model.manifest.threshold,
            trust_ratio=bank.distance(model.tail, states, k),
            stream_n=len(w.block),
            age_seconds=w.age_seconds,
            stream_finite=finite,
            valid=valid.numpy(),
            holds_before=w.row.holds,
            rig=rig,
            unseen=_unseen(rig),
            stream=stream,
        )
        judged.append(_of_site(model, w, states, k, evidence))
    return [(evidence, assess(config.guards, evidence)) for evidence in judged]


def _of_site(model: SourceModel, w: Window, states: State, k: int, evidence: Evidence) -> Evidence:
    """Returns ``evidence`` with what moved, and what the site's labelled presentations say of it."""
    usual = usual_modalities(w.block.present) if len(w.block) else ALL_MODALITIES
    boundary, adapter = bank.moved(model.tail, states, k, usual)
    added: dict[str, object] = {
        "moved": Moved(boundary=boundary, adapter=tuple(adapter) if sum(adapter) > 0 else ())
    }
    if w.teaches is not None and w.judges is not None:
        own = slot_of(states, k)
        added["labelled"] = teaching.evidence(model, w.teaches, w.judges, own, w.champion)
    return evidence.model_copy(update=added)


def rig_of(tags: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the modalities of the tag ``rig``, such as ``rgb+ir``; none if it is missing or malformed."""
    named = tags.get("rig", "").lower().split("+")
    allowed = [m.name.lower() for m in Modality]
    return tuple(m for m in allowed if m in named) if set(named) <= set(allowed) else ()


def anchor_scores(
    model: SourceModel, anchor: AnchorSet, state: State, cache: ScoreCache, *, rig: Sequence[str] = ()
) -> np.ndarray:
    """Returns scores [P, N] of one state under every pattern as ``rig`` shows it, from ``cache`` if there."""
    key = state_digest(state) + "+".join(rig).encode()
    if key not in cache:
        params = tail.with_site_state(model.tail, state)
        with torch.no_grad():
            cache[key] = torch.stack([tail.score(params, anchor.z, p) for p in _shown(anchor, rig)]).numpy()
    return cache[key]


def stream_scores(
    model: SourceModel, window: Window, candidate: State, stream: Features
) -> tuple[Tensor, Tensor]:
    """Returns the stream's scores [N] by the champion and by the candidate."""
    with torch.no_grad():
        before = tail.score(tail.with_site_state(model.tail, window.champion), stream.z, stream.present)
        if state_digest(candidate) == state_digest(window.champion):
            return before, before
        return before, tail.score(tail.with_site_state(model.tail, candidate), stream.z, stream.present)


def slot_of(stacked: State, k: int) -> State:
    return {name: t[k] for name, t in stacked.items()}


def steps_of(state: State) -> int | None:
    """Returns the steps of a state since it left the source model; None if its method does not count them."""
    return next((int(state[n]) for n in ("step", "adam.t") if n in state), None)


def _unseen(rig: Sequence[str]) -> list[str]:
    """Returns the patterns that leave nothing of a known rig."""
    has = sum(1 << m for m in Modality if m.name.lower() in rig)
    return [name for name, mask in PATTERNS.items() if rig and not mask & has]


def _shown(anchor: AnchorSet, rig: Sequence[str]) -> Tensor:
    """Returns which modalities each pattern leaves present [P, N, M], within a known rig."""
    present = anchor.replayed()[1]
    return present & torch.tensor([m.name.lower() in rig for m in Modality]) if rig else present


def _measured(
    config: Config,
    model: SourceModel,
    anchor: AnchorSet,
    w: Window,
    own: State,
    trace: bank.Trace,
    scored: tuple[Tensor, Tensor],
    cache: ScoreCache,
) -> Stream:
    """Returns the evidence of the window without labels, against the anchor set under its usual modalities.

    Captures whose features are not finite are left out.
    """
    scores = [t.numpy().astype(np.float64) for t in (trace.score, *scored)]
    sane = np.isfinite(scores).all(0)
    present = w.block.present[sane]
    hour = w.block.captured_at.astype("datetime64[h]").astype(np.int64) % 24
    online, champion, candidate = (x[sane] for x in scores)
    seen = WindowScores(
        online,
        champion,
        candidate,
        trace.pseudo_label.numpy()[sane],
        trace.disagreement.numpy().astype(np.float64)[sane],
        w.block.session[sane],
        present,
        hour[sane],
    )
    source = _source_scores(model, anchor, usual_modalities(present), cache)
    return measure_stream(
        config.guards, seen, source, model.manifest.threshold, history=w.history, steps=steps_of(own)
    )


def _source_scores(model: SourceModel, anchor: AnchorSet, mask: int, cache: ScoreCache) -> np.ndarray:
    """Returns the source model's scores of the anchor items shown with just the modalities of ``mask``."""
    key = b"source" + bytes([mask])
    if key not in cache:
        scores = anchor_scores(model, anchor, tail.site_state(model.tail), cache)
        alike = (
            (anchor.replayed()[1] == torch.from_numpy(mask_to_bool(np.array([mask], np.uint8))))
            .all(-1)
            .numpy()
        )
        shown_items = np.flatnonzero(alike.any(0))  # several patterns may leave the same of a sample
        cache[key] = scores[alike.argmax(0)[shown_items], shown_items].astype(np.float64)
    return cache[key]


def state_digest(state: State) -> bytes:
    """Returns the digest of the tensors that decide a state's scores."""
    digest = hashlib.blake2b(digest_size=16)
    for name in tail.MOVABLE:
        digest.update(state[name].contiguous().numpy().tobytes())
    return digest.digest()
