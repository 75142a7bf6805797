"""``palisade bench rollout``: what moving a fleet costs, what its guards see, and a month of what can go
wrong.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.bench.figures import Figure, conclude, context
from jobs.bench.rollout import control, power, sim
from pipeline.guards import GuardsConfig
from pipeline.rollout import RolloutConfig
from pipeline.stats.metrics import clopper_pearson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobs.bench.rollout.checks import Month
    from jobs.bench.rollout.control import Control
    from jobs.bench.rollout.power import Found
    from jobs.terminal import Terminal
    from pipeline.config import Config


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


def bench_rollout(config: Config, terminal: Terminal, *, quick: bool) -> int:
    """Measure the control plane, then the statistics, then simulate."""
    started, size = time.monotonic(), QUICK if quick else Size()
    folder = config.folder("bench", "rollout")
    costs: list[Control] = []
    for sites, repeat in size.fleets:
        terminal.say(f"bench rollout: {sites} sites released and taken back, {repeat} times")
        costs.append(control.measure(RolloutConfig(), folder / "control", sites=sites, repeat=repeat))
    terminal.say(
        f"bench rollout: {size.seeds} clean releases and {size.seeds} with harm, over {size.sites} sites"
    )
    on = power.planned(GuardsConfig(), RolloutConfig(), size.sites)
    clean, harmed = (power.measure(on, terminal, seeds=size.seeds, harmed=h) for h in (False, True))
    months: list[Month] = []
    for seed in range(size.months):
        terminal.say(f"bench rollout: {size.days} days of {size.sites} sites, seed {seed}")
        with terminal.progress("simulate", "days") as advance:
            months.append(
                sim.simulate(
                    folder / "simulated", sites=size.sites, days=size.days, seed=seed, advance=advance
                )
            )
    facts = context(
        started,
        quick=quick,
        seeds={"statistics": size.seeds, "simulator": list(range(size.months))},
        control_seconds=control.as_context(costs),
        statistics=power.as_context([clean, harmed]),
        simulated=[m.as_context() for m in months],
    )
    figures = [*costs_of(costs), *statistics_of(clean, harmed), *simulated_of(months)]
    return conclude(terminal, figures, facts)


def costs_of(found: Sequence[Control]) -> list[Figure]:
    """Seconds of the control plane; the smallest fleet's rollback was not promised."""
    made: list[Figure] = []
    for c, waves, back in zip(found, WAVES, BACK, strict=True):
        note = (
            f"approved to completed; median; CPU {c.waves.cpu:.2f} s; planning {c.plan.wall:.2f} s "
            "is not in it"
        )
        made.append(Figure(f"waves_seconds_{c.sites}", c.waves.wall, waves, least=False, note=note))
        if back is not None:
            note = f"abort to rolled back; median; CPU {c.back.cpu:.2f} s"
            made.append(Figure(f"rollback_seconds_{c.sites}", c.back.wall, back, least=False, note=note))
    middle, large = found[-2:]
    each = large.single / (large.waves.wall / large.sites)
    made.append(
        Figure(
            "waves_over_commit_per_site",
            each,
            100,
            least=True,
            note=f"{control.SINGLE} commits of one site in the same ledger: {large.single * 1e3:.2f} ms each",
        )
    )
    made.append(
        Figure(
            f"waves_{large.sites}_over_{middle.sites}",
            large.waves.wall / middle.waves.wall,
            12,
            least=False,
            note=f"CPU {large.waves.cpu / middle.waves.cpu:.1f}",
        )
    )
    return made


def statistics_of(clean: Found, harmed: Found) -> list[Figure]:
    """What was stopped, beside two usual canaries on the same draws."""
    others = f"Mann-Whitney every day {_share(clean, 'ranks')}, threshold {_share(clean, 'threshold')}"
    days = min(o.site_days for o in clean.outcomes)
    late = f"Mann-Whitney every day {_share(harmed, 'ranks')}, threshold {_share(harmed, 'threshold')}"
    held = sum(o.held for o in harmed.outcomes)
    stopped, seeds = clean.share("ours")
    caught, tries = harmed.share("ours")
    return [
        Figure(
            "clean_releases_stopped",
            stopped / seeds,
            0.01,
            least=False,
            note=f"{_share(clean, 'ours')}, {days} site-days each; {others}",
        ),
        Figure(
            "clean_fleet_freezes",
            sum(o.freezes for o in clean.outcomes),
            0,
            least=False,
            note="by the error budget",
        ),
        Figure(
            "harmed_stopped_in_wave_1",
            caught / tries,
            0.95,
            least=True,
            note=f"{_share(harmed, 'ours')}, {held} of them held at the end of its bake; {late}",
        ),
        Figure(
            "harmed_presentations_median",
            harmed.median("ours"),
            75,
            least=False,
            note=f"attacks per site until the stop; Mann-Whitney {harmed.median('ranks'):g}, "
            f"threshold {harmed.median('threshold'):g}",
        ),
    ]


def simulated_of(months: Sequence[Month]) -> list[Figure]:
    """Whether the month was survived."""
    first = next((m.violations[0] for m in months if m.violations), "none")
    moved, days = sum(m.events["sites_moved"] for m in months), sum(m.days for m in months)
    return [
        Figure(
            "simulated_violations",
            sum(len(m.violations) for m in months),
            0,
            least=False,
            note=f"{days} days, {moved} moves of sites; first: {first}",
        ),
        Figure(
            "unfinished_rollouts",
            sum(m.unfinished for m in months),
            0,
            least=False,
            note=f"of {sum(m.rollouts for m in months)}; {sum(m.seconds for m in months) / days:.2f} s a day",
        ),
    ]


def _share(found: Found, name: str) -> str:
    """A share of the seeds with its 95 % Clopper-Pearson interval, in words."""
    k, n = found.share(name)
    low, high = (float(x) for x in clopper_pearson(k, n, confidence=0.975))  # each side
    return f"{k} of {n} stopped ({low:.1%} to {high:.1%})"
