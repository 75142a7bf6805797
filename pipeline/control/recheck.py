"""Judges stored verdicts again under the limits of their cycle, and finds what they were counted on.

A verdict is rechecked when ``assess`` gives its stored JSON byte for byte. Nothing here loads a model;
``recount`` does.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast

from pydantic import ValidationError

from pipeline.config import PLACES, RESULT_SECTIONS, translate_stored
from pipeline.data.blobs import BadBlob, MissingBlob
from pipeline.guards import GuardsConfig, assess
from pipeline.ledger import LedgerError, UnknownSite

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import Config
    from pipeline.guards import Verdict
    from pipeline.ledger import Ledger, SourceRow, VerdictRow


class CycleLimits(NamedTuple):
    """Holds the limits that the candidates of one cycle were judged by."""

    guards: GuardsConfig
    fingerprint: str
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


def find_verdict(ledger: Ledger, name: str) -> VerdictRow:
    """Returns the verdict with the id ``name``, or the newest of the site ``name``. Raises LedgerError."""
    if verdicts := ledger.verdicts.find(ids=[name]):
        return verdicts[0]
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


def cycle_limits(ledger: Ledger, cycle: str) -> CycleLimits:
    """Returns the guards that ``cycle`` ran under; ``cycle`` may be the id of a source model's verdict.

    Raises LedgerError where they are not on record or are of another version.
    """
    row = next((r for r in ledger.cycles.history() if r.id == cycle), None)
    stored: dict[str, dict[str, object]] = json.loads(row.config) if row else {}
    if row is None:  # a verdict on a bare source model holds its own limits
        stored = next(
            (cast("dict[str, dict[str, object]]", v.counters) for v in ledger.verdicts.find(ids=[cycle])), {}
        )
    if "guards" not in stored:
        raise LedgerError(
            f"cycle {cycle}: its configuration is not on record, so its verdicts cannot be replayed"
        )
    try:
        guards = GuardsConfig.model_validate(translate_stored({"guards": stored["guards"]})["guards"])
    except ValidationError as e:
        where = ".".join(str(part) for part in e.errors()[0]["loc"])
        raise LedgerError(
            f"cycle {cycle}: its limits are of another version (guards.{where}); replay it with that"
        ) from None
    if row is None:
        return CycleLimits(guards, cycle, True)
    return CycleLimits(guards, row.fingerprint, stored_fingerprint(stored) == row.fingerprint)


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
    if "anchor" in row.counters:
        champion = row.counters["stable"]
        return VerdictBasis(
            source, str(row.counters["anchor"]), str(champion) if champion else None, recorded=True
        )
    served = [s for s in ledger.releases.history(row.site) if s.since <= row.at]
    own = served[-1].state if served and served[-1].source_version == source.version else None
    return VerdictBasis(source, ledger.verdicts.anchor(source.trunk, at=row.at), own, recorded=False)


def recheck_verdict(config: Config, ledger: Ledger, row: VerdictRow, *, recount: bool) -> Rechecked:
    """Judges one stored verdict again; ``recount`` also counts its anchor evidence again from the blobs."""
    try:
        limits, evidence = _limits(ledger, row.cycle), row.evidence
    except ValueError as e:
        return Rechecked((_line(e),), older=False, recounted=False, left_out="")
    verdict, differs = assess(limits.guards, evidence), []
    text = verdict.model_dump_json()
    older = text != row.verdict_json and _rewritten(row) == text
    if text != row.verdict_json and not older:
        differs.append(_difference(row, verdict))
    if verdict.outcome != row.outcome:
        differs.append(f"the ledger lists it as {row.outcome}, its evidence gives {verdict.outcome}")
    if not limits.sound:
        differs.append(f"the configuration of {row.cycle} is not the one that it began with")
    if not recount:
        return Rechecked(tuple(differs), older, recounted=False, left_out="")
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


@lru_cache(maxsize=8)  # a recheck asks for the same cycle once per verdict
def _limits(ledger: Ledger, cycle: str) -> CycleLimits:
    return cycle_limits(ledger, cycle)


def _rewritten(row: VerdictRow) -> str:
    """Returns the verdict on record as this version writes it; empty if it cannot be read."""
    try:
        return row.verdict.model_dump_json()
    except ValueError:
        return ""


def _difference(row: VerdictRow, verdict: Verdict) -> str:
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
