"""Checks at every moment of a simulated month what must hold, by other means than the product's."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from pipeline.rollout import Pointer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from pipeline.ledger import Ledger, RolloutRow, ServingRow
    from pipeline.rollout import Rollout, Target

BEGIN, END = 22, 5  # hours of a site's night


class Checks:
    """Remembers what every site served, and everything that went wrong."""

    def __init__(self, tags: Mapping[str, Mapping[str, str]]) -> None:
        self.violations: list[str] = []
        self.passing: dict[str, tuple[str, int]] = {}  # state -> its site, and the number of its cycle
        self.targets: dict[str, Target] = {}  # of the rollout under way
        self.moves = 0
        self._begun = ("", -1)
        self._zones, self._before = tags, dict[str, "ServingRow"]()

    def moved(
        self, serving: Mapping[str, ServingRow], row: RolloutRow, decided: Rollout, at: datetime
    ) -> None:
        """Checks what sites serve after the state machine's ``decided`` moved them at ``at``."""
        for site, new in serving.items():
            if (old := self._before.get(site)) != new:
                self.moves += 1
                self._site(site, old, new, at)
        self._before = dict(serving)
        self._wave(row, decided, serving, at)

    def daily(self, ledger: Ledger) -> None:
        """I6: the chain has no gap."""
        if (at := ledger.audit.first_broken()) is not None:
            self.violations.append(f"I6: the audit chain is broken at {at}")

    def ended(self, ledger: Ledger) -> None:
        """Runs the ledger's own audit of the month."""
        self.daily(ledger)
        self.violations += [f"I4/I5: {line}" for line in ledger.releases.served_without_verdict()]
        self.violations += [f"I6: {line}" for line in ledger.releases.verify()]

    def _site(self, site: str, old: ServingRow | None, new: ServingRow, at: datetime) -> None:
        """I4: promoted with its own pass. I5: the counter grows, only a rollback goes back. By night."""
        if new.counter <= (old.counter if old else 0):
            self.violations.append(f"I5: {site}: counter {new.counter} after {old.counter if old else 0}")
        if new.kind != "promote":
            return
        owner, number = self.passing.get(new.state or "", ("", 0))
        if owner != site:
            self.violations.append(f"I4: {site}: promoted to {new.state}, which never passed")
        if old and old.state and number < self.passing[old.state][1]:
            self.violations.append(f"I5: {site}: went back by a promotion")
        hour = at.astimezone(ZoneInfo(self._zones[site]["tz"])).hour
        if END <= hour < BEGIN:
            self.violations.append(f"night: {site}: promoted at {hour} h its time")

    def _wave(self, row: RolloutRow, r: Rollout, serving: Mapping[str, ServingRow], at: datetime) -> None:
        """I3: what serves its target is in a wave that was begun, with approvals, outside of a freeze."""
        counts, frozen = [0] * len(r.plan.waves), any(f.start <= at < f.end for f in r.plan.config.freeze)
        for site, t in self.targets.items():
            s = serving.get(site)
            if s is None or s.rollout != row.id or s.kind != "promote":
                continue
            if Pointer(s.state, s.source_version) == t.to:
                counts[t.wave] += 1
                if s.since == at and frozen:
                    self.violations.append(f"freeze: {site}: promoted at {at}")
        newest = min(r.wave, len(counts) - 1)
        self._begun = max(self._begun, (row.id, newest))  # ids rise; a crash may forget a wave
        begun = self._begun[1]
        for i, n in enumerate(counts):
            cap = r.plan.waves[i].sites + (r.joined if i == len(counts) - 1 else 0) if i <= begun else 0
            if n > cap:
                self.violations.append(f"I3: {row.id}: {n} sites in flight in wave {i + 1}, {cap} allowed")
        share, people = r.plan.waves[begun].share, len({a.who for a in r.approvals})
        if counts[begun] and people < (2 if share >= 0.5 else 1):
            self.violations.append(f"approvals: {row.id}: wave {begun + 1} with {people}")
