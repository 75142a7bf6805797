"""Everything durable that is not a tensor: sites, offsets, state pointers, verdicts, rollouts, the audit chain.

Every public write is one transaction. The clock is always an argument, in UTC. One file = one subject: store (the
connection), its schema, tables and rows; streams, verdicts, sources, releases, garbage and notices on top of it.
"""

from __future__ import annotations

from pipeline.ledger.garbage import Garbage
from pipeline.ledger.notices import Notices
from pipeline.ledger.plans import Promoted
from pipeline.ledger.releases import Memory, Releases
from pipeline.ledger.rows import (
    Cycle,
    CycleBusy,
    LedgerError,
    LedgerUnavailable,
    Pointed,
    QuarantineRow,
    RolloutRow,
    SegmentRow,
    ServingRow,
    ShardRow,
    SiteRow,
    SourceRow,
    StaleGeneration,
    StateRow,
    UnknownSite,
    VerdictRow,
)
from pipeline.ledger.schema import SCHEMA
from pipeline.ledger.sources import Sources
from pipeline.ledger.streams import Streams
from pipeline.ledger.tables import RETIRED
from pipeline.ledger.verdicts import Verdicts, state_id

__all__ = [
    "RETIRED",
    "SCHEMA",
    "Cycle",
    "CycleBusy",
    "Ledger",
    "LedgerError",
    "LedgerUnavailable",
    "Memory",
    "Pointed",
    "Promoted",
    "QuarantineRow",
    "RolloutRow",
    "SegmentRow",
    "ServingRow",
    "ShardRow",
    "SiteRow",
    "SourceRow",
    "StaleGeneration",
    "StateRow",
    "UnknownSite",
    "VerdictRow",
    "state_id",
]


class Ledger(Streams, Verdicts, Sources, Releases, Garbage, Notices):
    """A connection to the record. Get it from ``Ledger.open``."""
