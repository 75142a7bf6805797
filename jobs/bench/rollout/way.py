"""The way of reports from the sites to the ledger: it loses, doubles, delays and reorders them."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jobs.bench.rollout import fleet
from pipeline.guards import LabelledCounts

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime

    from pipeline.ledger import Ledger, Promoted, ServingRow

LOST, DOUBLED, DELAYED = 0.03, 0.02, 0.05
DAY = 6  # ticks
ATTACKS, NULL, WORSE = 40, 0.02, 0.3  # labelled attacks of a site and day; APCER of good and of bad states


class Message(NamedTuple):
    """One site's day. ``calls``: attacks called worse and better than by the way back, and wrong by both."""

    site: str
    name: str
    counter: int  # of the release that it served
    calls: tuple[int, int, int] | None


class Way:
    """What is under way, and what arrived of labelled presentations since each site's newest release."""

    def __init__(self, random: np.random.Generator, sites: Sequence[str], labelled: Collection[str]) -> None:
        self.events: Counter[str] = Counter()
        self.labelled = sorted(labelled)
        self._random, self._labelled = random, set(labelled)
        self._due: defaultdict[int, list[Message]] = defaultdict(list)
        self._ends = dict.fromkeys(sites, 0)
        self._arrived: set[tuple[str, str]] = set()
        self._counts: dict[
            str, tuple[int, np.ndarray]
        ] = {}  # site → release counter, [attacks, worse, better, both]

    def send(
        self, tick: int, sites: Sequence[str], serving: Mapping[str, ServingRow], worse: Collection[str]
    ) -> None:
        """A day's report of each site, at some hour of that day."""
        rows = len(sites)
        due = tick + self._random.integers(DAY, size=rows)
        due += (self._random.random(rows) < DELAYED) * self._random.integers(DAY, 3 * DAY, size=rows)
        lost, doubled = self._random.random(rows) < LOST, self._random.random(rows) < DOUBLED
        again = due + self._random.integers(2 * DAY, size=rows)
        name = f"segment-{tick:05d}.parquet"
        for i, site in enumerate(sites):
            served = serving.get(site)
            calls = (
                self._calls(served is not None and served.state in worse) if site in self._labelled else None
            )
            message = Message(site, name, served.counter if served else 0, calls)
            for at in [int(due[i])] * (not lost[i]) + [int(again[i])] * bool(doubled[i]):
                self._due[at].append(message)
        self.events.update(
            messages=rows,
            messages_lost=int(lost.sum()),
            messages_doubled=int(doubled.sum()),
            messages_delayed=int((due >= tick + DAY).sum()),
        )

    def arrive(self, ledger: Ledger, tick: int, at: datetime, serving: Mapping[str, ServingRow]) -> list[str]:
        """Store what is due, in any order → what was counted wrongly."""
        due = self._due.pop(tick, [])
        self._random.shuffle(due)  # pyright: ignore[reportArgumentType]  # a list is shuffled in place
        fresh: list[tuple[str, str, int]] = []
        again: list[tuple[str, str, int]] = []
        for m in due:
            if (m.site, m.name) in self._arrived:
                again.append((m.site, m.name, 0))
                continue
            self._arrived.add((m.site, m.name))
            fresh.append((m.site, m.name, self._ends[m.site]))
            self._ends[m.site] += fleet.SAMPLES
            self._count(m, serving.get(m.site))
        known = [fleet.report(ledger, rows, at) if rows else 0 for rows in (fresh, again)]
        self.events["duplicates_refused"] += known[1]
        wrong = known[0] + len(again) - known[1]
        return [f"I1: {wrong} reports were not counted once"] if wrong else []

    def standing(self, promoted: Sequence[Promoted], serving: Mapping[str, ServingRow]) -> LabelledCounts:
        """Counts of the promoted sites since their promotion, as far as they have arrived."""
        none = np.zeros(4, np.int64)
        counts = [self._counts.get(p.site, (-1, none)) for p in promoted]
        rows = [
            c if (s := serving.get(p.site)) and s.counter == n else none
            for p, (n, c) in zip(promoted, counts, strict=True)
        ]
        attacks, worse, better, both = np.array(rows, np.int64).reshape(-1, 4).T
        zero = np.zeros_like(attacks)
        return LabelledCounts([p.site for p in promoted], attacks, worse + both, worse, better, zero, zero)

    def _calls(self, bad: bool) -> tuple[int, int, int]:
        rate = WORSE if bad else NULL
        n = self._random.multinomial(
            ATTACKS, [rate * (1 - NULL), (1 - rate) * NULL, rate * NULL, (1 - rate) * (1 - NULL)]
        )
        return int(n[0]), int(n[1]), int(n[2])

    def _count(self, m: Message, served: ServingRow | None) -> None:
        """A report about an earlier release says nothing of this one."""
        if m.calls is None or served is None or m.counter != served.counter:
            return
        counter, counts = self._counts.get(m.site, (-1, np.zeros(4, np.int64)))
        before = counts if counter == m.counter else np.zeros(4, np.int64)
        self._counts[m.site] = (m.counter, before + np.array([ATTACKS, *m.calls]))
