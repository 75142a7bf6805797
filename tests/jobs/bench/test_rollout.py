"""The parts of ``palisade bench rollout`` on a few sites: they work, and their checks find mistakes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from jobs.bench.rollout import control as bench_rollout_control
from jobs.bench.rollout import fleet as bench_rollout_fleet
from jobs.bench.rollout import power as bench_rollout_power
from jobs.bench.rollout import run as bench_rollout
from jobs.bench.rollout import sim as bench_rollout_sim
from jobs.bench.rollout import way as bench_rollout_way
from jobs.bench.rollout import world as bench_rollout_world
from jobs.bench.rollout.checks import Checks
from jobs.terminal import Terminal
from pipeline.control.rollout import load
from pipeline.guards import GuardsConfig
from pipeline.ledger import Ledger
from pipeline.rollout import RolloutConfig

SITES, T0 = 120, bench_rollout_world.START


@pytest.fixture(scope="module")
def on():
    return bench_rollout_power.planned(GuardsConfig(), RolloutConfig(waves=(0.5, 1.0)), 200)


@pytest.fixture(scope="module")
def month(tmp_path_factory):
    folder = tmp_path_factory.mktemp("month")
    return bench_rollout_sim.simulate(folder, sites=SITES, days=6, seed=2, advance=lambda *_: None)


def test_the_control_plane_completes_and_goes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_rollout_control, "SINGLE", 5)
    found = bench_rollout_control.measure(RolloutConfig(), tmp_path, sites=SITES, repeat=2)
    assert min(found.plan.wall, found.waves.wall, found.back.wall, found.single) > 0


def test_a_release_that_waits_for_a_person_is_no_measurement(tmp_path):
    config = RolloutConfig(night="22:00-23:00")  # and it begins at midnight
    with pytest.raises(AssertionError, match="release-00001 is staging"):
        bench_rollout_control.measure(config, tmp_path, sites=SITES, repeat=1)


def test_a_clean_release_ends_and_a_harmed_one_is_stopped_in_wave_1(on):
    clean, harmed = (bench_rollout_power.measure(on, Terminal(), seeds=3, harmed=h) for h in (False, True))
    assert [(o.ours, o.wave, o.freezes) for o in clean.outcomes] == [(None, 2, 0)] * 3
    assert clean.outcomes[0].site_days == 4 * (100 + 200)
    assert all(o.ours is not None and o.wave == 0 for o in harmed.outcomes)
    assert harmed.median("ours") <= 160 and clean.median("ours") == float("inf")


def test_the_same_seed_gives_the_same_release(on):
    first, again, other = (bench_rollout_power.release(on, seed, harmed=True) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_a_month_breaks_nothing_and_every_rollout_ends(month):
    assert month.violations == []
    assert month.unfinished == 0 < month.rollouts
    assert {"sites_moved", "sites_joined", "sites_retired", "people"} <= {
        name for name, n in month.events.items() if n
    }


def test_the_way_counts_each_report_once(tmp_path):
    names = [f"s{i:03d}" for i in range(300)]
    ledger = bench_rollout_fleet.found(tmp_path / "l.db", {s: {} for s in names}, T0)
    way = bench_rollout_way.Way(np.random.Generator(np.random.PCG64(0)), names, names)
    way.send(0, names, {}, ())
    wrong = [way.arrive(ledger, tick, T0 + timedelta(hours=4 * tick), {}) for tick in range(40)]
    assert not any(wrong)
    e = way.events
    assert min(e["messages_lost"], e["messages_doubled"], e["messages_delayed"], e["duplicates_refused"]) > 0
    arrived = sum(s.ingested_offset for s in ledger.streams.sites()) / bench_rollout_fleet.SAMPLES
    assert e["messages"] - e["messages_lost"] <= arrived <= e["messages"]
    ledger.close()


def test_a_month_is_its_seed(tmp_path):
    run = [
        bench_rollout_sim.simulate(tmp_path, sites=40, days=3, seed=s, advance=lambda *_: None)
        for s in (3, 3, 4)
    ]
    assert run[0].events == run[1].events != run[2].events


def test_who_dies_within_a_transaction_leaves_nothing_of_it(tmp_path):
    bench_rollout_fleet.found(tmp_path / "l.db", {"s0": {}}, T0).close()
    store = bench_rollout_fleet.MortalStore.open(f"sqlite:///{tmp_path}/l.db")
    ledger = Ledger(store)
    before, store.left = ledger.audit.rows(), 1
    ledger.audit.append("one", {}, now=T0)
    with pytest.raises(bench_rollout_fleet.Crash):
        ledger.audit.append("two", {}, now=T0)
    ledger.audit.append("three", {}, now=T0)
    assert [kind for _, _, kind, _ in ledger.audit.rows()[len(before) :]] == ["one", "three"]
    ledger.close()


def test_the_checks_see_a_wave_that_was_not_begun_and_a_site_that_never_passed(tmp_path):
    """What the product cannot be brought to do is written past it."""
    tags = {f"s{i}": {"tz": "UTC"} for i in range(10)}
    ledger = bench_rollout_fleet.found(tmp_path / "l.db", tags, T0)
    made = bench_rollout_fleet.learn(ledger, dict.fromkeys(tags, 0), T0)
    facts = {
        s: bench_rollout_fleet.SiteFacts(bench_rollout_fleet.SOURCE, candidate=c) for s, c in made.items()
    }
    config = RolloutConfig(waves=(0.5, 1.0))
    draft = bench_rollout_fleet.planned(ledger, "r1", facts, config, T0)
    row = ledger.plans.rollout("r1")
    night = T0 + timedelta(hours=12)
    for wave in (1, 2):
        names = draft.wave(wave - 1)
        changes = {s: tuple(made[s].to) for s in names}
        ledger.releases.serve(changes, rollout="r1", wave=wave, kind="promote", reason="", now=night)
    checks = Checks(tags)
    checks.targets = dict(draft.targets)
    r = load(row).model_copy(update={"wave": 0})
    checks.moved(ledger.releases.serving(), row, r, night)
    kinds = Counter(line.split(":")[0] for line in checks.found)
    assert kinds == {"I4": 10, "night": 10, "I3": 1, "approvals": 1}
    ledger.close()


def test_figures_hold_or_do_not(on, month, tmp_path):
    cost = bench_rollout_control.Cost(0.01, 0.01)
    costs = [bench_rollout_control.Control(n, cost, cost, cost, 1.0) for n in (1000, 10_000, 100_000)]
    assert all(f.holds for f in bench_rollout.costs_of(costs))
    slow = [*costs[:2], replace(costs[2], waves=bench_rollout_control.Cost(6.0, 6.0))]
    assert [f.name for f in bench_rollout.costs_of(slow) if not f.holds] == [
        "waves_seconds_100000",
        "waves_100000_over_10000",
    ]
    assert all(f.holds for f in bench_rollout.simulated_of([month]))
    broken = replace(month, violations=["I3: x"], unfinished=1)
    assert not any(f.holds for f in bench_rollout.simulated_of([broken]))
