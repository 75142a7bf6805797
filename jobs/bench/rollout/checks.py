"""What must hold at every moment of a simulated month, found out by other means than the code that is to keep
it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from pipeline.rollout import Pointer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from pipeline.ledger import Ledger, RolloutRow, ServingRow
    from pipeline.rollout import Rollout, Target

BEGIN, END = 22, 5  # hours of a site's night


@dataclass
class Month:
    """What happened in it."""

    sites: int
    days: int
    seed: int
    violations: list[str] = field(default_factory=list[str])
    rollouts: int = 0
    unfinished: int = 0
    seconds: float = 0.0
    events: Counter[str] = field(default_factory=Counter[str])

    def as_context(self) -> dict[str, object]:
        return {
            "sites": self.sites,
            "days": self.days,
            "seed": self.seed,
            "violations": self.violations[:5],
            "seconds_per_day": round(self.seconds / max(1, self.days), 3),
            **dict(sorted(self.events.items())),
        }


class Checks:
    """Remembers what every site served, and everything that went wrong."""

    def __init__(self, tags: Mapping[str, Mapping[str, str]]) -> None:
        self.found: list[str] = []
        self.passing: dict[str, tuple[str, int]] = {}  # state → its site, and the number of its cycle
        self.targets: dict[str, Target] = {}  # of the rollout under way
        self.moves = 0
        self._begun = ("", -1)
        self._zones, self._before = tags, dict[str, "ServingRow"]()

    def moved(self, now: Mapping[str, ServingRow], row: RolloutRow, decided: Rollout, at: datetime) -> None:
        """After champion pointers moved at ``at``, by what the state machine had ``decided``; ``now`` is what
        sites serve.
        """
        for site, new in now.items():
            if (old := self._before.get(site)) != new:
                self.moves += 1
                self._site(site, old, new, at)
        self._before = dict(now)
        self._wave(row, decided, now, at)

    def daily(self, ledger: Ledger) -> None:
        """I6: the chain has no gap."""
        if (at := ledger.audit.first_broken()) is not None:
            self.found.append(f"I6: the audit chain is broken at {at}")

    def ended(self, ledger: Ledger) -> None:
        """The ledger's own audit of the month."""
        self.daily(ledger)
        self.found += [f"I4/I5: {line}" for line in ledger.releases.served_without_verdict()]
        self.found += [f"I6: {line}" for line in ledger.releases.verify()]

    def _site(self, site: str, old: ServingRow | None, new: ServingRow, at: datetime) -> None:
        """I4: promoted only with its own pass. I5: the counter grows, and back goes only a rollback. Nights,
        for promotions.
        """
        if new.counter <= (old.counter if old else 0):
            self.found.append(f"I5: {site}: counter {new.counter} after {old.counter if old else 0}")
        if new.kind != "promote":
            return
        owner, number = self.passing.get(new.state or "", ("", 0))
        if owner != site:
            self.found.append(f"I4: {site}: promoted to {new.state}, which never passed")
        if old and old.state and number < self.passing[old.state][1]:
            self.found.append(f"I5: {site}: went back by a promotion")
        hour = at.astimezone(ZoneInfo(self._zones[site]["tz"])).hour
        if END <= hour < BEGIN:
            self.found.append(f"night: {site}: promoted at {hour} h its time")

    def _wave(self, row: RolloutRow, r: Rollout, now: Mapping[str, ServingRow], at: datetime) -> None:
        """I3: what serves its target belongs to a wave that was begun, with its approvals, outside of a
        freeze.
        """
        counts = [0] * len(r.plan.waves)
        for site, t in self.targets.items():
            s = now.get(site)
            if (
                s
                and s.rollout == row.id
                and s.kind == "promote"
                and Pointer(s.state, s.source_version) == t.to
            ):
                counts[t.wave] += 1
                if s.since == at and any(f.start <= at < f.end for f in r.plan.config.freeze):
                    self.found.append(f"freeze: {site}: promoted at {at}")
        self._begun = max(
            self._begun, (row.id, min(r.wave, len(counts) - 1))
        )  # ids rise; a crash may forget a wave
        begun = self._begun[1]
        for i, n in enumerate(counts):
            cap = r.plan.waves[i].sites + (r.joined if i == len(counts) - 1 else 0)
            if n > (cap if i <= begun else 0):
                self.found.append(
                    f"I3: {row.id}: {n} sites in flight in wave {i + 1}, {cap if i <= begun else 0} allowed"
                )
        share, people = r.plan.waves[begun].share, len({a.who for a in r.approvals})
        if counts[begun] and people < (2 if share >= 0.5 else 1):
            self.found.append(f"approvals: {row.id}: wave {begun + 1} with {people}")
