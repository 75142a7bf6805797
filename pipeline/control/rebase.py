"""Prepares sites for another trunk: what is retained of a stream, and the windows to learn from.

No tensor of a state means anything under another trunk, so only the samples that a site learned from go over.
The window ends where the site has learned to, under whatever trunk: later samples are learned from once, by
the state that the site goes on from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import takewhile
from typing import TYPE_CHECKING

from pipeline.control.judge import Window
from pipeline.data.blobs import BadBlob
from pipeline.data.features import FeatureBlock, read_features

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipeline.config import Config
    from pipeline.ledger import Cycle, Ledger, SegmentRow, SiteRow, VerdictRow
    from pipeline.models.checkpoint import SourceModel


@dataclass(frozen=True)
class Rebased:
    """Reports a rebase of the fleet."""

    cycle: Cycle
    candidates: Mapping[str, VerdictRow]  # by site, the newest under the present configuration
    reset: Mapping[str, str]  # sites that cannot be rebased, with the reason
    failed: Mapping[str, str]  # sites that a repeated call tries again, with the reason


def retained_segments(
    segments: Sequence[SegmentRow], *, learned: int, samples: int
) -> tuple[SegmentRow, ...]:
    """Returns the newest whole segments before offset ``learned`` that hold ``samples`` good samples.

    All of them where there are fewer. ``segments`` are those of one site, in stream order.
    """
    newest: list[SegmentRow] = []
    held = 0
    for s in reversed(segments):
        if held >= samples:
            break
        if s.rows and s.base_offset < learned:
            newest.append(s)
            held += s.good
    return tuple(reversed(newest))


def unbroken_suffix(
    segments: Sequence[SegmentRow], whole: Callable[[SegmentRow], bool]
) -> tuple[SegmentRow, ...]:
    """Returns the newest segments after the last gap: a stream with a hole is not learned across it."""
    return tuple(reversed(list(takewhile(whole, reversed(segments)))))


def rebase_windows(
    config: Config, model: SourceModel, ledger: Ledger, sites: Sequence[str], *, samples: int
) -> tuple[list[Window], dict[str, str]]:
    """Returns the retained window of each site under the trunk of ``model``, to learn from its own state.

    Also returns {site: reason} of the sites that have nothing.
    """
    fresh, now = config.site.init(model.tail), datetime.now(UTC)
    prepared: list[Window] = []
    failed: dict[str, str] = {}
    for row in ledger.streams.named(sites):
        ingested = ledger.streams.segments(row.site)
        at = {s.name: ingested_at for s, ingested_at in ingested}
        segments = retained_segments([s for s, _ in ingested], learned=row.learned_offset, samples=samples)
        try:
            block = _block(config, model, row, segments)
        except (BadBlob, OSError) as e:
            failed[row.site] = str(e)
            continue
        segments = unbroken_suffix(segments, lambda s, block=block: _held(block, s) == s.good)
        if not sum(s.good for s in segments):
            failed[row.site] = "nothing that it learned from has features of this source model"
            continue
        window = replace(
            row,
            learned_offset=segments[0].base_offset,
            ingested_offset=row.learned_offset,
            learner=None,
            holds=0,
        )
        age = (now - max(at[s.name] for s in segments)).total_seconds()
        samples_block = block.rows(block.offset >= window.learned_offset)
        prepared.append(Window(window, samples_block, fresh, fresh, None, None, age))
    return prepared, failed


def _block(config: Config, model: SourceModel, row: SiteRow, segments: Sequence[SegmentRow]) -> FeatureBlock:
    return read_features(
        config.place("features"),
        model.manifest.trunk_digest,
        row.site,
        start=segments[0].base_offset if segments else row.learned_offset,
        end=row.learned_offset,
        features=model.manifest.config.trunk.features,
    )


def _held(block: FeatureBlock, s: SegmentRow) -> int:
    return int(((block.offset >= s.base_offset) & (block.offset < s.base_offset + s.rows)).sum())
