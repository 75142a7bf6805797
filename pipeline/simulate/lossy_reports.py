"""Simulates reports on their way to the ledger: some are lost, doubled, delayed and reordered."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.guards.fleet import LabelledCounts

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from pipeline.ledger import Promoted, ServingRow
    from pipeline.simulate.release_fleet import LedgerFleet

LOST, DOUBLED, DELAYED = 0.03, 0.02, 0.05
DAY = 6  # ticks
SAMPLES = 60  # captures in a report's segment: more than rollout.health_samples
ATTACKS, NULL, WORSE = 40, 0.02, 0.3  # labelled attacks of a site and day; APCER of good and of bad states
NOTHING = (-1, np.zeros(4, np.int64))  # counts of a site that has reported nothing


class Report(NamedTuple):
    """One site's report of a day."""

    site: str
    name: str
    counter: int  # of the release that it served
    calls: (
        tuple[int, int, int] | None
    )  # attacks: called worse and better than by the state before, wrong by both


class LossyReports:
    """Holds the reports in transit, and each site's labelled presentations since its newest release."""

    def __init__(self, random: np.random.Generator, sites: Sequence[str], labelled: Collection[str]) -> None:
        self.events: Counter[str] = Counter()
        self.labelled = sorted(labelled)
        self._random, self._labelled, self._ends = random, set(labelled), dict.fromkeys(sites, 0)
        self._due: defaultdict[int, list[Report]] = defaultdict(list)
        self._arrived: set[tuple[str, str]] = set()
        self._counts: dict[
            str, tuple[int, np.ndarray]
        ] = {}  # release counter, [attacks, worse, better, both]

    def send(
        self, tick: int, sites: Sequence[str], serving: Mapping[str, ServingRow], worse: Collection[str]
    ) -> None:
        """Sends each site's report of a day at a random hour; states in ``worse`` err more."""
        n, random = len(sites), self._random
        due = tick + random.integers(DAY, size=n)
        due += (random.random(n) < DELAYED) * random.integers(DAY, 3 * DAY, size=n)
        lost, doubled = random.random(n) < LOST, random.random(n) < DOUBLED
        again = due + random.integers(2 * DAY, size=n)
        for i, site in enumerate(sites):
            served = serving.get(site)
            bad = served is not None and served.state in worse
            calls = self._calls(WORSE if bad else NULL) if site in self._labelled else None
            report = Report(site, f"segment-{tick:05d}.parquet", served.counter if served else 0, calls)
            for at in [int(due[i])] * (not lost[i]) + [int(again[i])] * bool(doubled[i]):
                self._due[at].append(report)
        late = int((due >= tick + DAY).sum())
        counts = {"messages_lost": int(lost.sum()), "messages_doubled": int(doubled.sum())}
        self.events.update(messages=n, messages_delayed=late, **counts)

    def arrive(self, fleet: LedgerFleet, tick: int, serving: Mapping[str, ServingRow]) -> list[str]:
        """Ingests the reports that are due, in random order; returns a violation if one was miscounted."""
        due = self._due.pop(tick, [])
        self._random.shuffle(due)  # pyright: ignore[reportArgumentType]  # a list is shuffled in place
        fresh, again = list[tuple[str, str, int]](), list[tuple[str, str, int]]()
        for m in due:
            if (m.site, m.name) in self._arrived:
                again.append((m.site, m.name, 0))
                continue
            self._arrived.add((m.site, m.name))
            fresh.append((m.site, m.name, self._ends[m.site]))
            self._ends[m.site] += SAMPLES
            self._count(m, serving.get(m.site))
        refused = [fleet.report(rows, samples=SAMPLES) if rows else 0 for rows in (fresh, again)]
        self.events["duplicates_refused"] += refused[1]
        wrong = refused[0] + len(again) - refused[1]
        return [f"I1: {wrong} reports were not counted once"] if wrong else []

    def counts(self, promoted: Sequence[Promoted], serving: Mapping[str, ServingRow]) -> LabelledCounts:
        """Returns the counts of the promoted sites since their promotion, as far as they have arrived."""
        counted = [(serving.get(p.site), self._counts.get(p.site, NOTHING)) for p in promoted]
        rows = [counts if s and s.counter == n else NOTHING[1] for s, (n, counts) in counted]
        attacks, worse, better, both = np.array(rows, np.int64).reshape(-1, 4).T
        zero = np.zeros_like(attacks)
        return LabelledCounts([p.site for p in promoted], attacks, worse + both, worse, better, zero, zero)

    def _calls(self, rate: float) -> tuple[int, int, int]:
        odds = [rate * (1 - NULL), (1 - rate) * NULL, rate * NULL, (1 - rate) * (1 - NULL)]
        worse, better, both, _ = self._random.multinomial(ATTACKS, odds).tolist()
        return worse, better, both

    def _count(self, m: Report, served: ServingRow | None) -> None:
        """Counts a report; one about an earlier release says nothing of this one."""
        if m.calls is None or served is None or m.counter != served.counter:
            return
        counter, counts = self._counts.get(m.site, NOTHING)
        before = counts if counter == m.counter else NOTHING[1]
        self._counts[m.site] = (m.counter, before + np.array([ATTACKS, *m.calls]))
