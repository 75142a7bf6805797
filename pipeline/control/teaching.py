"""Brings a site's labelled presentations to where they count: to its state, or to the guards.

A presentation teaches or judges, never both: a keyed hash of its session decides, once, when its capture was
found, and the ledger keeps it. The key is the ledger's own, so whoever names sessions cannot choose.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.data.features import mask_to_bool, read_features
from pipeline.guards.records import Judged, Labelled
from pipeline.models import tail
from pipeline.site import bank, taught
from pipeline.site.contract import Taught
from pipeline.site.trust import LARGEST
from pipeline.types import Label

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from pipeline.config import Config
    from pipeline.control.judge import Window
    from pipeline.data.features import FeatureBlock
    from pipeline.ledger import LabelRow, Ledger, SiteRow
    from pipeline.models.checkpoint import SourceModel
    from pipeline.site.contract import State

TEACH, JUDGE = "teach", "judge"
PER_SESSION = 2  # presentations of one session in a memory
TYPICAL_FROM, OUTLIER, LEAST_SPREAD = 4, 3.0, 1.0  # labels of an instrument; deviations; logits
HALF_LIFE_DAYS = 180  # after which a label weighs half of the newest one


@dataclass(frozen=True)
class LabelledBlock:
    """Holds the labelled presentations of one site whose captures have features, N rows in stream order."""

    block: FeatureBlock
    rows: tuple[LabelRow, ...]  # [N], each with its role

    def of_role(self, role: str) -> LabelledBlock:
        """Returns those that teach, or those that judge."""
        keep = np.array([r.role == role for r in self.rows], bool)
        return LabelledBlock(self.block.rows(keep), tuple(r for r in self.rows if r.role == role))

    @property
    def label(self) -> np.ndarray:
        """Labels [N]: 1 bona fide, 0 attack."""
        return np.array([r.label for r in self.rows], np.int64)


def labelled(
    config: Config, ledger: Ledger, model: SourceModel, row: SiteRow, labels: Mapping[str, LabelRow]
) -> LabelledBlock:
    """Returns the site's labelled presentations with features of ``model``; new ones get their role for good.

    Those whose features no trunk makes are left out: one of them would spoil what the others teach. Raises
    BadBlob and OSError where stored features cannot be read.
    """
    known = [r.offset for r in labels.values() if r.offset is not None]
    everywhere = len(known) < len(labels)  # some captures must be looked for
    block = read_features(
        config.place("features"),
        model.manifest.trunk_digest,
        row.site,
        start=0 if everywhere else min(known, default=0),
        end=row.ingested_offset if everywhere else max(known, default=-1) + 1,
        features=model.manifest.config.trunk.features,
    )
    block = block.rows(np.array([s in labels for s in block.sample_id], bool))
    found: dict[str, tuple[int, str]] = {}
    rows: list[LabelRow] = []
    key = ledger.labels.split_key() if len(block) and everywhere else b""
    for sample, offset, session in zip(block.sample_id, block.offset, block.session, strict=True):
        r = labels[sample]
        if r.role is None:
            found[sample] = int(offset), role_of(key, row.site, int(session))
            r = replace(r, offset=found[sample][0], role=found[sample][1])
        rows.append(r)
    if found:
        ledger.labels.assign(row.site, found)
    sound = np.asarray((np.abs(block.z) <= LARGEST).all((1, 2)))  # a NaN compares False
    return LabelledBlock(block.rows(sound), tuple(r for r, ok in zip(rows, sound, strict=True) if ok))


def role_of(key: bytes, site: str, session: int) -> str:
    """Returns what the presentations of a session do: teach or judge, half of the sessions each."""
    digest = hashlib.blake2b(f"{site}/{session}".encode(), key=key, digest_size=1).digest()
    return TEACH if digest[0] % 2 else JUDGE


def with_labels(config: Config, model: SourceModel, w: Window, own: LabelledBlock) -> Window:
    """Returns the window with its labels; where the memory changed, its site learns anew from it."""
    teaches, judges = own.of_role(TEACH), own.of_role(JUDGE)
    w = replace(w, teaches=teaches, judges=judges) if own.rows else w
    if not isinstance(config.site, Taught):
        return w
    new = memory(model, teaches, w.learner)
    if new["taught.digest"] == w.learner["taught.digest"]:
        return w
    age = (
        (datetime.now(UTC) - max(r.labelled_at for r in own.rows)).total_seconds()
        if own.rows
        else w.age_seconds
    )
    return replace(
        w,
        learner={**w.learner, **new},
        learns_anew=True,
        age_seconds=age if math.isnan(w.age_seconds) else min(age, w.age_seconds),
    )


def start(config: Config, model: SourceModel, windows: Sequence[Window]) -> State:
    """Returns the stacked states to learn from; sites whose memory changed have learned from it first."""
    states = bank.stack([w.learner for w in windows])
    at = [k for k, w in enumerate(windows) if w.learns_anew]
    if not at or not isinstance(config.site, Taught):
        return states
    some, slots = {n: t[at] for n, t in states.items()}, config.bank.slots
    new = bank.teach(config.site, model.tail, some, slots=slots)
    return {n: t.index_copy(0, torch.tensor(at), new[n]) for n, t in states.items()}


def memory(model: SourceModel, lesson: LabelledBlock, state: State) -> State:
    """Returns the tensors of the memory that holds the best of ``lesson``; sizes are those in ``state``.

    Both classes get the same number of slots as far as they go, and so do an attack's instruments; a session
    gets at most PER_SESSION, and among equals the newest come first. An outlier weighs nothing.
    """
    size = len(state["taught.label"])
    at = _chosen(lesson, size)
    chosen = lesson.block.rows(np.array(at, int))
    rows = [lesson.rows[i] for i in at]
    newest = max((r.labelled_at for r in rows), default=None)
    age = [(newest - r.labelled_at).days for r in rows] if newest else []
    weight = _typical(_logit(model, tail.site_state(model.tail), chosen), rows) * 0.5 ** (
        np.array(age, np.float64) / HALF_LIFE_DAYS
    )

    def filled(like: Tensor, values: Tensor) -> Tensor:
        return torch.cat([values.to(like.dtype), like[len(values) :]])

    empty = taught.empty(state)
    label = np.array([r.label for r in rows], np.int8)
    return {
        "taught.z": filled(empty["taught.z"], torch.from_numpy(chosen.z.astype(np.float16))),
        "taught.present": filled(empty["taught.present"], torch.from_numpy(mask_to_bool(chosen.present))),
        "taught.label": filled(empty["taught.label"], torch.from_numpy(label)),
        "taught.weight": filled(empty["taught.weight"], torch.from_numpy(weight)),
        "taught.digest": torch.tensor(_digest(rows), dtype=torch.int64),
    }


def evidence(
    model: SourceModel, lesson: LabelledBlock, verdict: LabelledBlock, candidate: State, champion: State
) -> Labelled:
    """Counts what teaches against the source model, and candidate and champion on what judges."""
    logit = _logit(model, tail.site_state(model.tail), lesson.block)
    source = logit >= _boundary(model)
    before, after = (_accepts(model, s, verdict.block) for s in (champion, candidate))
    attack, label = lesson.label == Label.ATTACK, verdict.label
    pairs = logit[~attack][:, None] - logit[attack]

    def judged(of: Label) -> Judged:
        mine, right = label == of, of == Label.BONA_FIDE
        was, now = before[mine] != right, after[mine] != right
        return Judged(
            n=int(mine.sum()),
            errors=int(now.sum()),
            worse=int((now & ~was).sum()),
            better=int((was & ~now).sum()),
        )

    return Labelled(
        taught_bona_fide=int((~attack).sum()),
        taught_attack=int(attack.sum()),
        contradicted_bona_fide=int((~attack & ~source).sum()),
        contradicted_attack=int((attack & source).sum()),
        ranked=float((pairs > 0).mean()) if pairs.size else None,
        bona_fide=judged(Label.BONA_FIDE),
        attack=judged(Label.ATTACK),
    )


def _typical(logit: np.ndarray, rows: Sequence[LabelRow]) -> np.ndarray:
    """Returns [N] 1, or 0 for a label that stands apart from its instrument, towards the other class.

    Of an instrument with at least TYPICAL_FROM labels, a source logit beyond OUTLIER robust deviations of the
    median (Hampel's identifier, 1974) is more likely a wrong label than a presentation unlike all others.
    """
    typical = np.ones(len(rows))
    instrument = np.array([r.instrument for r in rows])
    for name in set(instrument.tolist()):
        at = np.flatnonzero(instrument == name)
        if len(at) >= TYPICAL_FROM:
            towards = logit[at] - np.median(logit[at])
            spread = max(1.4826 * float(np.median(np.abs(towards))), LEAST_SPREAD)
            side = -1 if rows[at[0]].label == Label.BONA_FIDE else 1
            typical[at] = side * towards <= OUTLIER * spread
    return typical


def _accepts(model: SourceModel, state: State, block: FeatureBlock) -> np.ndarray:
    """Returns which presentations [N] a state calls bona fide."""
    return _logit(model, state, block) >= _boundary(model)


def _boundary(model: SourceModel) -> float:
    """Returns the logit from which a presentation is called bona fide."""
    threshold = model.manifest.threshold
    return math.log(threshold / (1 - threshold))


def _logit(model: SourceModel, state: State, block: FeatureBlock) -> np.ndarray:
    """Returns the fused logits [N] of a block under a state."""
    z, present = torch.from_numpy(block.z.astype(np.float32)), torch.from_numpy(mask_to_bool(block.present))
    with torch.no_grad():
        out = tail.forward(tail.with_site_state(model.tail, state), z, present)
    return out.logit[:, tail.FUSED].numpy().astype(np.float64)


def _chosen(lesson: LabelledBlock, size: int) -> list[int]:
    """Returns the rows of a memory of ``size`` slots."""
    groups: dict[int, dict[str, list[int]]] = {c: defaultdict(list) for c in (Label.BONA_FIDE, Label.ATTACK)}
    order = sorted(
        range(len(lesson.rows)),
        key=lambda i: (-lesson.rows[i].labelled_at.timestamp(), -lesson.block.offset[i]),
    )
    sessions: dict[int, int] = defaultdict(int)
    for i in order:
        session = int(lesson.block.session[i])
        sessions[session] += 1
        if sessions[session] <= PER_SESSION:
            groups[lesson.rows[i].label][lesson.rows[i].instrument].append(i)
    by_class = [_turns(instruments.values()) for instruments in groups.values()]
    return _turns(by_class)[:size]


def _turns(groups: Iterable[Sequence[int]]) -> list[int]:
    """Returns the members of all groups, the first of each, then the second of each, and so on."""
    return [i for i in chain.from_iterable(zip_longest(*groups)) if i is not None]


def _digest(rows: Sequence[LabelRow]) -> int:
    """Returns 63 bits that name a memory; 0 for an empty one."""
    if not rows:
        return 0
    text = "\n".join(f"{r.sample_id} {r.label} {r.labelled_at.isoformat()}" for r in rows)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
