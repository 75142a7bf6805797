"""Judges stored verdicts again under the limits of their cycle, and finds what they were counted on.

A verdict is rechecked when ``assess`` gives its stored JSON byte for byte. Nothing here loads a model;
``recount`` does.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from pydantic import ValidationError

from pipeline.config import PLACES, RESULT_SECTIONS, translate_stored
from pipeline.data.blobs import BadBlob, MissingBlob
from pipeline.guards import GuardsConfig
from pipeline.guards.verdict import assess
from pipeline.ledger import LedgerError, SourceVerdictRow, UnknownSite, VerdictRow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import Config
    from pipeline.guards import Verdict
    from pipeline.ledger import Ledger, SourceRow


class StoredLimits(NamedTuple):
    """Holds the limits that a verdict was given under."""

    guards: GuardsConfig
    fingerprint: str  # of the cycle's configuration; of a source model's verdict its id
    sound: bool  # the stored configuration has the fingerprint that the cycle began with


class VerdictBasis(NamedTuple):
    """Names the records that a verdict was counted on."""

    source: SourceRow
    anchor: str  # digest
    champion_state: str | None  # state that the site served; None: the source model as it is
    recorded: bool  # kept with the verdict; else found by time, as an earlier version kept neither


class Rechecked(NamedTuple):
    """Reports one verdict judged again."""

    differs: tuple[str, ...]  # empty: the same
    older: bool  # its JSON lacks fields that this version writes; its content is the same
    recounted: bool
    left_out: str  # why it could not be recounted


def find_verdict(ledger: Ledger, name: str) -> VerdictRow | SourceVerdictRow:
    """Returns the verdict with the id ``name``, or the newest of the site ``name``. Raises LedgerError."""
    if verdicts := ledger.verdicts.find(ids=[name]):
        return verdicts[0]
    if (of_source := ledger.sources.verdict(name)) is not None:
        return of_source
    try:
        ledger.streams.site(name)
    except UnknownSite as e:
        raise UnknownSite(f"{e}; nor is it the id of a verdict") from None
    verdicts = ledger.verdicts.find(site=name)
    if not verdicts:
        raise LedgerError(f"site {name}: no cycle has judged it yet; run `palisade cycle`")
    return verdicts[-1]


def cycle_verdicts(ledger: Ledger, cycle: str) -> Iterator[VerdictRow]:
    """Yields the verdicts of a cycle by site, read a page at a time."""
    after = ""
    while page := ledger.verdicts.page(cycle, after=after):
        yield from page
        after = page[-1].site


def limits_of(ledger: Ledger, row: VerdictRow | SourceVerdictRow) -> StoredLimits:
    """Returns the limits that a verdict was given under. Raises LedgerError where they are not on record."""
    if isinstance(row, VerdictRow):
        return _cached_cycle_limits(ledger, row.cycle)
    if row.guards_json is None:
        raise LedgerError(f"verdict {row.id}: its limits are not on record, so it cannot be replayed")
    guards = _parse_limits(json.loads(row.guards_json), f"verdict {row.id}")
    return StoredLimits(guards, row.id, sound=True)


def cycle_limits(ledger: Ledger, cycle: str) -> StoredLimits:
    """Returns the guards that ``cycle`` ran under.

    Raises LedgerError where they are not on record or are of another version.
    """
    row = next((r for r in ledger.cycles.history() if r.id == cycle), None)
    stored: dict[str, dict[str, object]] = json.loads(row.config_json) if row else {}
    if row is None or "guards" not in stored:
        raise LedgerError(
            f"cycle {cycle}: its configuration is not on record, so its verdicts cannot be replayed"
        )
    guards = _parse_limits(stored["guards"], f"cycle {cycle}")
    return StoredLimits(guards, row.fingerprint, sound=stored_fingerprint(stored) == row.fingerprint)


def _parse_limits(section: dict[str, object], owner: str) -> GuardsConfig:
    try:
        return GuardsConfig.model_validate(translate_stored({"guards": section})["guards"])
    except ValidationError as e:
        key = ".".join(str(part) for part in e.errors()[0]["loc"])
        raise LedgerError(
            f"{owner}: its limits are of another version (guards.{key}); replay it with that"
        ) from None


def stored_fingerprint(stored: dict[str, dict[str, object]]) -> str:
    """Returns ``Config.fingerprint`` of a stored configuration without this version's defaults in it."""
    sections = {
        name: {key: value for key, value in stored[name].items() if key not in PLACES.get(name, ())}
        for name in RESULT_SECTIONS
        if name in stored
    }
    return hashlib.sha256(json.dumps(sections, sort_keys=True).encode()).hexdigest()


def verdict_basis(ledger: Ledger, row: VerdictRow) -> VerdictBasis:
    """Returns what ``row`` was counted on: as kept with it, else what was sealed and served at its time."""
    state = ledger.verdicts.state(row.state)
    source = ledger.sources.get(state.source_version if state else None)
    window = row.window
    if window.anchor_digest is not None:
        return VerdictBasis(source, window.anchor_digest, window.champion_state, recorded=True)
    served = [s for s in ledger.releases.history(row.site) if s.since <= row.at]
    champion = served[-1].state if served and served[-1].source_version == source.version else None
    return VerdictBasis(source, ledger.verdicts.anchor(source.trunk, at=row.at), champion, recorded=False)


def recheck_verdict(
    config: Config, ledger: Ledger, row: VerdictRow | SourceVerdictRow, *, recount: bool
) -> Rechecked:
    """Judges one stored verdict again; ``recount`` also counts its anchor evidence again from the blobs."""
    try:
        limits, evidence = limits_of(ledger, row), row.evidence
    except ValueError as e:
        return Rechecked((_line(e),), older=False, recounted=False, left_out="")
    verdict = assess(limits.guards, evidence)
    differs: list[str] = []
    text = verdict.model_dump_json()
    older = text != row.verdict_json and _rewritten(row) == text
    if text != row.verdict_json and not older:
        differs.append(_difference(row, verdict))
    if verdict.outcome != row.outcome:
        differs.append(f"the ledger lists it as {row.outcome}, its evidence gives {verdict.outcome}")
    if not limits.sound:
        differs.append(f"the configuration of {cycle_of(row)} is not the one that it began with")
    if not recount:
        return Rechecked(tuple(differs), older, recounted=False, left_out="")
    if isinstance(row, SourceVerdictRow):
        reason = "a verdict on a source model is not counted again"
        return Rechecked(tuple(differs), older, recounted=False, left_out=reason)
    from pipeline.control.recount import count_differences, recount_evidence  # loads torch

    try:
        counted = recount_evidence(config, ledger, row, evidence)
    except MissingBlob as e:
        return Rechecked(tuple(differs), older, recounted=False, left_out=str(e))
    except BadBlob as e:
        return Rechecked((*differs, str(e)), older, recounted=False, left_out="")
    except ValueError as e:
        return Rechecked(tuple(differs), older, recounted=False, left_out=str(e))
    return Rechecked((*differs, *count_differences(evidence, counted)), older, recounted=True, left_out="")


def cycle_of(row: VerdictRow | SourceVerdictRow) -> str | None:
    """Returns the cycle that a verdict was given in; a verdict on a source model was given in none."""
    return row.cycle if isinstance(row, VerdictRow) else None


@lru_cache(maxsize=8)  # a recheck asks for the same cycle once per verdict
def _cached_cycle_limits(ledger: Ledger, cycle: str) -> StoredLimits:
    return cycle_limits(ledger, cycle)


def _rewritten(row: VerdictRow | SourceVerdictRow) -> str:
    """Returns the verdict on record as this version writes it; empty if it cannot be read."""
    try:
        return row.verdict.model_dump_json()
    except ValueError:
        return ""


def _difference(row: VerdictRow | SourceVerdictRow, verdict: Verdict) -> str:
    try:
        stored = row.verdict
    except ValueError as e:
        return f"the verdict on record cannot be read: {_line(e)[:200]}"
    if stored.outcome != verdict.outcome:
        return f"{stored.outcome} on record, {verdict.outcome} again: {verdict.decisive or stored.decisive}"
    for pair in zip(stored.reasons, verdict.reasons):
        if pair[0] != pair[1]:
            texts = [f"{r.guard} {r.where} {r.call}: {r.number}, limit {r.limit}" for r in pair]
            return f"{texts[0]} on record; {texts[1]} again"
    return f"{len(stored.reasons)} findings on record, {len(verdict.reasons)} again"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
