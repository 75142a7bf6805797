"""Replays labelled presentations that judge through what a site serves, and through its way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from pipeline.control import teaching
from pipeline.control.deployment import source_model
from pipeline.control.judge import features_of
from pipeline.control.loaders import load_model, load_state
from pipeline.data.blobs import BadBlob
from pipeline.data.captures import BadSegment
from pipeline.guards.fleet import LabelledCounts
from pipeline.models import tail

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.config import Config
    from pipeline.ledger import LabelRow, Ledger, SiteRow
    from pipeline.rollout import Pointer


class ReplayTarget(NamedTuple):
    """Names the two states that a site's presentations are replayed through."""

    site: str
    serves: Pointer
    rollback: Pointer


@dataclass(frozen=True)
class LabelledOutcomes:
    """Holds the outcomes of N labelled presentations, counted per site and one by one."""

    counts: LabelledCounts
    wrong: np.ndarray  # [N] bool, by what the site serves
    captured_at: np.ndarray  # [N] datetime64[us]


@dataclass(frozen=True)
class _Calls:
    """Holds the calls of one state on the N presentations of a site that judge."""

    label: np.ndarray  # [N] 1 bona fide, 0 attack
    accepted: np.ndarray  # [N] bool, called bona fide
    captured_at: np.ndarray  # [N] datetime64[us]


def replay_presentations(config: Config, ledger: Ledger, targets: Sequence[ReplayTarget]) -> LabelledOutcomes:
    """Returns the outcomes of the presentations that judge, of the sites in ``targets``.

    What cannot be read is no data: such a site is left out of the counts.
    """
    rows: dict[str, list[int]] = {}
    wrong, captured_at = [np.zeros(0, bool)], [np.zeros(0, "datetime64[us]")]
    names = [t.site for t in targets]
    sites = {s.site: s for s in ledger.streams.named(names)}
    labels = ledger.labels.of(names)
    for site, serves, rollback in targets:
        try:
            served, before = (
                _calls(config, ledger, sites[site], p, labels[site]) for p in (serves, rollback)
            )
        except (BadBlob, BadSegment, OSError):
            continue
        attack, bona_fide = served.label == 0, served.label == 1
        comparable = np.array_equal(served.label, before.label)  # another trunk may lack some features
        was_accepted = before.accepted if comparable else np.ones_like(served.accepted)
        rows[site] = [
            int(attack.sum()),
            int((attack & served.accepted).sum()),
            int((attack & served.accepted & ~was_accepted).sum()),
            int((attack & ~served.accepted & was_accepted).sum()),
            int(bona_fide.sum()),
            int((bona_fide & ~served.accepted).sum()),
            int((bona_fide & ~before.accepted).sum()) if comparable else 0,
        ]
        wrong.append(served.accepted == attack)
        captured_at.append(served.captured_at)
    counts = LabelledCounts(list(rows), *np.array(list(rows.values()), np.int64).reshape(-1, 7).T)
    return LabelledOutcomes(counts, np.concatenate(wrong), np.concatenate(captured_at))


def _calls(
    config: Config, ledger: Ledger, row: SiteRow, pointer: Pointer, labels: Mapping[str, LabelRow]
) -> _Calls:
    """Returns the calls of ``pointer`` on the site's labelled presentations that judge."""
    model = load_model(source_model(ledger, pointer.source_version).path)
    own = teaching.labelled(config, ledger, model, row, labels).of_role(teaching.JUDGE)
    state = load_state(config, model, ledger.verdicts.state(pointer.state_id))
    stream = features_of(own.block)
    with torch.no_grad():
        score = tail.score(tail.with_site_state(model.tail, state), stream.z, stream.present)
    return _Calls(own.label, (score >= model.manifest.threshold).numpy(), own.block.captured_at)
