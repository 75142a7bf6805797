"""The parts of ``palisade bench rollout`` on a few sites: they work, and their checks find mistakes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest

from jobs.bench.rollout import control, month, power
from jobs.bench.rollout.checks import Checks
from jobs.bench.rollout.month import START
from jobs.bench.rollout.run import costs_of, simulated_of
from jobs.terminal import Terminal
from pipeline.guards import GuardsConfig
from pipeline.rollout import RolloutConfig
from pipeline.simulate.release_fleet import LedgerFleet

SITES = 120


@pytest.fixture(scope="module")
def on():
    return power.planned(GuardsConfig(), RolloutConfig(waves=(0.5, 1.0)), 200)


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    return month.simulate(
        tmp_path_factory.mktemp("month"), sites=SITES, days=6, seed=2, advance=lambda *_: None
    )


def test_the_control_plane_completes_and_goes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "SINGLE", 5)
    costs = control.measure(RolloutConfig(), tmp_path, sites=SITES, repeat=2)
    assert min(costs.plan.wall, costs.waves.wall, costs.back.wall, costs.single) > 0


def test_a_release_that_waits_for_a_person_is_no_measurement(tmp_path):
    config = RolloutConfig(night="22:00-23:00")  # and it begins at midnight
    with pytest.raises(AssertionError, match="release-00001 is staging"):
        control.measure(config, tmp_path, sites=SITES, repeat=1)


def test_a_clean_release_ends_and_a_harmed_one_is_stopped_in_wave_1(on):
    clean, harmed = (power.measure(on, Terminal(), seeds=3, harmed=h) for h in (False, True))
    assert [(o.ours, o.wave, o.freezes) for o in clean.seeds] == [(None, 2, 0)] * 3
    assert clean.seeds[0].site_days == 4 * (100 + 200)
    assert all(o.ours is not None and o.wave == 0 for o in harmed.seeds)
    assert harmed.median("ours") <= 160 and clean.median("ours") == float("inf")


def test_the_same_seed_gives_the_same_release(on):
    first, again, other = (power.release(on, seed, harmed=True) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_a_month_breaks_nothing_and_every_rollout_ends(survived):
    assert survived.violations == []
    assert survived.unfinished == 0 < survived.rollouts
    happened = {name for name, n in survived.events.items() if n}
    assert {"sites_moved", "sites_joined", "sites_retired", "people"} <= happened


def test_a_month_is_its_seed(tmp_path):
    run = [month.simulate(tmp_path, sites=40, days=3, seed=s, advance=lambda *_: None) for s in (3, 3, 4)]
    assert run[0].events == run[1].events != run[2].events


def test_the_checks_see_a_wave_that_was_not_begun_and_a_site_that_never_passed(tmp_path):
    """Writes to the ledger directly what the product refuses to do."""
    tags = {f"s{i}": {"tz": "UTC"} for i in range(10)}
    fleet = LedgerFleet.create(f"sqlite:///{tmp_path}/l.db", tags, START)
    candidates = fleet.learn(dict.fromkeys(tags, 0))
    draft = fleet.plan(fleet.facts(list(tags), candidates, ()), RolloutConfig(waves=(0.5, 1.0)))
    name, night = fleet.row.id, START + timedelta(hours=12)
    for wave in (1, 2):
        changes = {s: tuple(candidates[s].to) for s in draft.wave(wave - 1)}
        fleet.ledger.releases.serve(changes, rollout=name, wave=wave, kind="promote", reason="", now=night)
    checks = Checks(tags)
    checks.targets = dict(draft.targets)
    r = fleet.r.model_copy(update={"wave": 0})
    checks.moved(fleet.ledger.releases.serving(), fleet.row, r, night)
    kinds = Counter(line.split(":")[0] for line in checks.violations)
    assert kinds == {"I4": 10, "night": 10, "I3": 1, "approvals": 1}
    fleet.close()


def test_figures_hold_or_do_not(survived):
    cost = control.Cost(0.01, 0.01)
    costs = [control.Control(n, cost, cost, cost, 1.0) for n in (1000, 10_000, 100_000)]
    assert all(f.holds for f in costs_of(costs))
    slow = [*costs[:2], costs[2]._replace(waves=control.Cost(6.0, 6.0))]
    missed = [f.name for f in costs_of(slow) if not f.holds]
    assert missed == ["waves_seconds_100000", "waves_100000_over_10000"]
    assert all(f.holds for f in simulated_of([survived]))
    broken = replace(survived, violations=["I3: x"], unfinished=1)
    assert not any(f.holds for f in simulated_of([broken]))
