"""Says how far the commissioning of a site is: what was asked for, what has arrived, what it would gain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.control import teaching
from pipeline.control.deployment import source_model
from pipeline.control.loaders import load_model, load_state
from pipeline.site import bank
from pipeline.site.contract import Taught
from pipeline.types import Label

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pipeline.config import Config
    from pipeline.control.teaching import LabelledBlock
    from pipeline.guards.records import Labelled
    from pipeline.ledger import LabelRow, Ledger
    from pipeline.models.checkpoint import SourceModel

BONA_FIDE, OTHER = "bona fide", "not in the kit"


@dataclass(frozen=True)
class Commissioning:
    """How far one site is. Counts are of labelled presentations whose captures were ingested."""

    site: str
    asked: Mapping[str, int]  # bona fide, and each instrument of the kit
    arrived: Mapping[str, int]  # the same, and OTHER
    waiting: int  # labels whose captures were not ingested yet
    gain: Labelled | None  # what a state that learned from them does on those that judge; None: none judges

    @property
    def missing(self) -> dict[str, int]:
        """What is still to be presented."""
        return {what: n - self.arrived[what] for what, n in self.asked.items() if self.arrived[what] < n}


def commissioning(config: Config, ledger: Ledger, site: str) -> Commissioning:
    """Returns how far ``site`` is under the champion; raises UnknownSite, BadBlob and OSError."""
    row, model = ledger.streams.site(site), load_model(source_model(ledger).path)
    labels = ledger.labels.of([site])[site]
    own = teaching.labelled(config, ledger, model, row, labels)
    kit = config.data.commissioning
    asked = {BONA_FIDE: kit.bona_fide, **kit.attacks}
    arrived = dict.fromkeys((*asked, OTHER), 0)
    for r in own.rows:
        arrived[_asked_as(r, kit.attacks)] += 1
    return Commissioning(
        site, asked, arrived, len(labels) - len(own.rows), _gain(config, ledger, model, site, own)
    )


def _asked_as(row: LabelRow, kit: Iterable[str]) -> str:
    """Returns the line of the kit that a presentation counts for: the one its instrument begins with."""
    if row.label == Label.BONA_FIDE:
        return BONA_FIDE
    return next((name for name in kit if row.instrument.startswith(name)), OTHER)


def _gain(
    config: Config, ledger: Ledger, model: SourceModel, site: str, own: LabelledBlock
) -> Labelled | None:
    """Returns what the site's labels would do to what it serves now, without storing anything."""
    teaches, judges = own.of_role(teaching.TEACH), own.of_role(teaching.JUDGE)
    if not judges.rows or not isinstance(config.site, Taught):
        return None
    served = ledger.releases.serving([site]).get(site)
    champion = load_state(config, model, ledger.verdicts.state(served.state if served else None))
    fresh = config.site.init(model.tail)
    state = {**fresh, **teaching.memory(model, teaches, fresh)}
    stacked = bank.teach(config.site, model.tail, bank.stack([state]), slots=config.bank.slots)
    return teaching.evidence(model, teaches, judges, bank.unstack(stacked)[0], champion)
