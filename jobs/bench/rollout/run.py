"""``palisade bench rollout``: what a rollout costs, what its guards see, and a month of what can go wrong."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jobs.bench.report import conclude, context, section
from jobs.bench.rollout import control, month, power
from pipeline.control.deployment import now
from pipeline.guards import GuardsConfig
from pipeline.report.bench import Report, at_least, at_most, count, grid, number, tabled
from pipeline.rollout import RolloutConfig
from pipeline.stats.metrics import clopper_pearson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobs.bench.rollout.control import Control
    from jobs.bench.rollout.month import Month
    from jobs.bench.rollout.power import Outcomes
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.report.bench import Cell, Column, Figure, Section


@dataclass(frozen=True)
class Size:
    """How much is run."""

    fleets: tuple[tuple[int, int], ...] = ((1000, 9), (10_000, 7), (100_000, 3))  # (sites, repetitions)
    seeds: int = 200  # of the statistics
    sites: int = 10_000  # of their fleet and of the simulator's
    days: int = 30
    months: int = 1  # seeds of the simulator


QUICK = Size(fleets=((100, 3), (1000, 3), (10_000, 1)), seeds=40, sites=1000, days=10, months=1)
WAVES, BACK = (0.1, 0.5, 5.0), (None, 0.1, 1.0)  # seconds, of a small, a larger and a large fleet


def bench_rollout(config: Config, terminal: Terminal, *, quick: bool, write: bool = False) -> int:
    """Measures the control plane and the statistics, and simulates; 0 if every figure holds, else 3."""
    started, size, folder = time.monotonic(), QUICK if quick else Size(), config.folder("bench", "rollout")
    costs: list[Control] = []
    for sites, repeat in size.fleets:
        terminal.say(f"bench rollout: {sites} sites released and taken back, {repeat} times")
        costs.append(control.measure(RolloutConfig(), folder / "control", sites=sites, repeat=repeat))
    terminal.say(f"bench rollout: {size.seeds} clean releases and as many with harm, over {size.sites} sites")
    on = power.planned(GuardsConfig(), RolloutConfig(), size.sites)
    clean, harmed = (power.measure(on, terminal, seeds=size.seeds, harmed=h) for h in (False, True))
    months: list[Month] = []
    for seed in range(size.months):
        terminal.say(f"bench rollout: {size.days} days of {size.sites} sites, seed {seed}")
        with terminal.progress("simulate", "days") as advance:
            place = folder / "simulated"
            months.append(month.simulate(place, sites=size.sites, days=size.days, seed=seed, advance=advance))
    facts = context(
        "rollout",
        started,
        quick=quick,
        seeds={"statistics": size.seeds, "simulator": list(range(size.months))},
        violations=[line for m in months for line in m.violations][:5],
    )
    figures = [*costs_of(costs), *statistics_of(clean, harmed), *simulated_of(months)]
    tables = sections(costs, (clean, harmed), months)
    report = Report("rollout", "What a release costs and sees", now(), figures, tables, facts)
    return conclude(config, terminal, report, write=write)


def sections(
    costs: Sequence[Control], outcomes: Sequence[Outcomes], months: Sequence[Month]
) -> list[Section]:
    """Returns everything that was timed, stopped and simulated, as tables."""
    timed: list[Column[Control]] = [
        ("sites", "sites", lambda c: str(c.sites)),
        ("plan", "plan", lambda c: number(c.plan.wall)),
        ("waves", "waves", lambda c: number(c.waves.wall)),
        ("waves_cpu", "waves, CPU", lambda c: number(c.waves.cpu)),
        ("rollback", "rollback", lambda c: number(c.back.wall)),
        ("rollback_cpu", "rollback, CPU", lambda c: number(c.back.cpu)),
        ("one_commit_per_site", "one commit, one site", lambda c: number(c.single)),
    ]
    stopped: list[Column[Outcomes]] = [
        ("releases", "releases", lambda o: o.name),
        ("seeds", "seeds", lambda o: count(len(o.seeds))),
        ("site_days_per_seed", "site-days per seed", lambda o: count(min(s.site_days for s in o.seeds))),
        ("held", "held at the end of a bake", lambda o: count(sum(s.held for s in o.seeds))),
        (
            "single_sites_taken_back",
            "single sites taken back",
            lambda o: count(sum(s.singles for s in o.seeds)),
        ),
    ]
    for n, who in power.STOPS.items():
        stopped.append((f"{n}.stopped", f"stopped by {who}", lambda o, n=n: count(o.stopped(n))))
        median = f"median presentations, {who}"
        stopped.append(
            (f"{n}.median_presentations", median, lambda o, n=n: count(o.median(n)) if o.harmed else None)
        )
    names = dict.fromkeys(name for m in months for name in m.numbers)
    happened = {name: {f"seed {m.seed}": _event(m.numbers.get(name, 0)) for m in months} for name in names}
    tables = [
        tabled("control_seconds", "seconds of a release, median", costs, timed),
        tabled("statistics", "releases that were stopped", outcomes, stopped),
        grid("simulated", "the simulated month", "event", happened),
    ]
    return [section("rollout", t.key, [replace(t, medium="page")]) for t in tables]


def _event(n: float) -> Cell:
    return count(n) if n == round(n) else number(n)


def costs_of(costs: Sequence[Control]) -> list[Figure]:
    """Returns the seconds of the control plane; the smallest fleet's rollback was not promised."""
    figures: list[Figure] = []
    for c, waves, back in zip(costs, WAVES, BACK, strict=True):
        note = (
            f"approved to completed; median; CPU {c.waves.cpu:.2f} s; without planning, {c.plan.wall:.2f} s"
        )
        figures.append(at_most(f"waves_seconds_{c.sites}", c.waves.wall, waves, note))
        if back is not None:
            note = f"abort to rolled back; median; CPU {c.back.cpu:.2f} s"
            figures.append(at_most(f"rollback_seconds_{c.sites}", c.back.wall, back, note))
    middle, large = costs[-2:]
    each, ratio = large.single / (large.waves.wall / large.sites), large.waves.wall / middle.waves.wall
    note = f"{control.SINGLE} commits of one site in the same ledger: {large.single * 1e3:.2f} ms each"
    cpu = f"CPU {large.waves.cpu / middle.waves.cpu:.1f}"
    figures.append(at_least("waves_over_commit_per_site", each, 100, note))
    return [*figures, at_most(f"waves_{large.sites}_over_{middle.sites}", ratio, 12, cpu)]


def statistics_of(clean: Outcomes, harmed: Outcomes) -> list[Figure]:
    """Returns what was stopped, beside two usual canaries on the same draws."""
    words = "; Mann-Whitney every day {}, threshold {}"
    others, late = (words.format(_share(x, "ranks"), _share(x, "threshold")) for x in (clean, harmed))
    days, held = min(o.site_days for o in clean.seeds), sum(o.held for o in harmed.seeds)
    stops = f"{_share(clean, 'ours')}, {days} site-days each{others}"
    caught = f"{_share(harmed, 'ours')}, {held} of them held at the end of its bake{late}"
    ranks, threshold = (count(harmed.median(name)).text for name in ("ranks", "threshold"))
    median = f"attacks per site until half are stopped; Mann-Whitney {ranks}, threshold {threshold}"
    shares = [x.stopped("ours") / len(x.seeds) for x in (clean, harmed)]
    return [
        at_most("clean_releases_stopped", shares[0], 0.01, stops),
        at_most("clean_fleet_freezes", sum(o.freezes for o in clean.seeds), 0, "by the error budget"),
        at_least("harmed_stopped_in_wave_1", shares[1], 0.95, caught),
        at_most("harmed_presentations_median", harmed.median("ours"), 75, median),
    ]


def simulated_of(months: Sequence[Month]) -> list[Figure]:
    """Returns whether the months were survived."""
    first = next((m.violations[0] for m in months if m.violations), "none")
    moved, days = sum(m.events["sites_moved"] for m in months), sum(m.days for m in months)
    note = f"{days} days, {moved} moves of sites; first: {first}"
    each = (
        f"of {sum(m.rollouts for m in months)} releases; {sum(m.seconds for m in months) / days:.2f} s a day"
    )
    return [
        at_most("simulated_violations", sum(len(m.violations) for m in months), 0, note),
        at_most("unfinished_rollouts", sum(m.unfinished for m in months), 0, each),
    ]


def _share(outcomes: Outcomes, name: str) -> str:
    """Returns a share of the seeds with its 95 % Clopper-Pearson interval, in words."""
    k, n = outcomes.stopped(name), len(outcomes.seeds)
    low, high = clopper_pearson(k, n, confidence=0.975)  # each side
    return f"{k} of {n} stopped ({float(low):.1%} to {float(high):.1%})"
