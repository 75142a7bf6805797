"""The fleet that takes releases: its driver dies where it is told to, and each of its reports counts once."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest

from pipeline.simulate.lossy_reports import SAMPLES, LossyReports
from pipeline.simulate.release_fleet import Died, LedgerFleet
from tests.support.ledgers import T0


@pytest.mark.parametrize(
    "instant, left",
    [("before", ["one", "three"]), ("within", ["one", "three"]), ("after", ["one", "two", "three"])],
)
def test_a_death_leaves_nothing_of_its_transaction_or_all_of_it(tmp_path, instant, left):
    fleet = LedgerFleet.create(f"sqlite:///{tmp_path}/l.db", {"s0": {}}, T0)
    before = len(fleet.ledger.audit.rows())
    with pytest.raises(Died), fleet.dying(1, instant):
        [fleet.ledger.audit.append(kind, {}, now=T0) for kind in ("one", "two")]
    fleet.ledger.audit.append("three", {}, now=T0)
    assert [kind for _, _, kind, _ in fleet.ledger.audit.rows()[before:]] == left
    assert fleet.ledger.audit.first_broken() is None
    fleet.close()


def test_reports_that_are_lost_doubled_or_late_count_once(tmp_path):
    names = [f"s{i:03d}" for i in range(300)]
    fleet = LedgerFleet.create(f"sqlite:///{tmp_path}/l.db", {s: {} for s in names}, T0)
    reports = LossyReports(np.random.Generator(np.random.PCG64(0)), names, names)
    reports.send(0, names, {}, ())
    for tick in range(40):
        fleet.now = T0 + timedelta(hours=4 * tick)
        assert reports.arrive(fleet, tick, {}) == []
    e = reports.events
    assert min(e["messages_lost"], e["messages_doubled"], e["messages_delayed"], e["duplicates_refused"]) > 0
    arrived = sum(s.ingested_offset for s in fleet.ledger.streams.sites()) / SAMPLES
    assert e["messages"] - e["messages_lost"] <= arrived <= e["messages"]
    fleet.close()
