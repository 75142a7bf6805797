"""Everything durable that is not a tensor: sites, offsets, verdicts, rollouts, the audit chain.

Every public write is one transaction. The clock is always an argument, in UTC. One file is one subject.
"""

from __future__ import annotations

from typing import Self

from pipeline.ledger.audit import Audit
from pipeline.ledger.cycles import Cycles
from pipeline.ledger.garbage import Garbage
from pipeline.ledger.labels import Labels
from pipeline.ledger.notices import Notices
from pipeline.ledger.plans import Plans, Promoted
from pipeline.ledger.releases import Memory, Releases
from pipeline.ledger.rows import (
    Cycle,
    CycleBusy,
    CycleRow,
    LabelFileRow,
    LabelRow,
    LedgerError,
    LedgerUnavailable,
    Needed,
    QuarantineRow,
    RolloutRow,
    SegmentRow,
    ServingRow,
    ShardRow,
    SiteRow,
    SourceRow,
    SourceVerdictRow,
    StaleGeneration,
    StateRow,
    UnknownSite,
    VerdictRow,
    WindowRecord,
)
from pipeline.ledger.schema import SCHEMA
from pipeline.ledger.sources import Sources
from pipeline.ledger.store import Store
from pipeline.ledger.streams import Streams
from pipeline.ledger.tables import RETIRED
from pipeline.ledger.verdicts import Verdicts, state_id

__all__ = [
    "RETIRED",
    "SCHEMA",
    "Cycle",
    "CycleBusy",
    "CycleRow",
    "LabelFileRow",
    "LabelRow",
    "Ledger",
    "LedgerError",
    "LedgerUnavailable",
    "Memory",
    "Needed",
    "Promoted",
    "QuarantineRow",
    "RolloutRow",
    "SegmentRow",
    "ServingRow",
    "ShardRow",
    "SiteRow",
    "SourceRow",
    "SourceVerdictRow",
    "StaleGeneration",
    "StateRow",
    "Store",
    "UnknownSite",
    "VerdictRow",
    "WindowRecord",
    "state_id",
]


class Ledger:
    """The record: its parts over one store. Get it from ``Ledger.open``."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.streams = Streams(store)
        self.labels = Labels(store)
        self.cycles = Cycles(store)
        self.verdicts = Verdicts(store)
        self.sources = Sources(store)
        self.plans = Plans(store)
        self.releases = Releases(store)
        self.notices = Notices(store)
        self.garbage = Garbage(store)
        self.audit = Audit(store)

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Self:
        """Connects to the ledger at ``url``, see ``Store.open``. Raises LedgerUnavailable."""
        return cls(Store.open(url, create=create))

    def close(self) -> None:
        """Gives the connections back; the next use of the ledger connects again."""
        self.store.close()
