"""``palisade bench rollout``: what moving a fleet costs, what its guards see, and a month of what can go wrong."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs import bench_rollout_control as control
from jobs import bench_rollout_power as power
from jobs import bench_rollout_sim as sim
from jobs.bench import conclude, context
from pipeline.guards import GuardsConfig
from pipeline.rollout import RolloutConfig

if TYPE_CHECKING:
    from jobs import Terminal
    from jobs.bench_rollout_control import Control
    from pipeline.config import Config


@dataclass(frozen=True)
class Size:
    """How much is run."""

    fleets: tuple[tuple[int, int], ...] = ((1000, 9), (10_000, 7), (100_000, 3))  # (sites, repetitions)
    seeds: int = 400  # of the statistics
    sites: int = 10_000  # of their fleet and of the simulator's
    days: int = 30
    months: int = 2  # seeds of the simulator


QUICK = Size(fleets=((100, 3), (1000, 3), (10_000, 1)), seeds=40, sites=1000, days=10, months=1)
WAVES = (0.1, 0.5, 5.0)  # seconds, of a small, a larger and a large fleet
BACK = (None, 0.1, 1.0)


def bench_rollout(config: Config, terminal: Terminal, *, quick: bool) -> int:
    """Measure the control plane, then the statistics, then simulate."""
    started, size = time.monotonic(), QUICK if quick else Size()
    folder = config.folder("bench", "rollout")
    costs: list[Control] = []
    for sites, repeat in size.fleets:
        terminal.say(f"bench rollout: {sites} sites released and taken back, {repeat} times")
        costs.append(control.measure(RolloutConfig(), folder / "control", sites=sites, repeat=repeat))
    terminal.say(f"bench rollout: {size.seeds} clean releases and {size.seeds} with harm, over {size.sites} sites")
    limits, released = GuardsConfig(), RolloutConfig()
    clean, harmed = (
        power.measure(limits, released, terminal, sites=size.sites, seeds=size.seeds, harmed=h) for h in (False, True)
    )
    months = []
    for seed in range(size.months):
        terminal.say(f"bench rollout: {size.days} days of {size.sites} sites, seed {seed}")
        with terminal.progress("simulate", "days") as advance:
            months.append(
                sim.simulate(folder / "simulated", sites=size.sites, days=size.days, seed=seed, advance=advance)
            )
    facts = context(
        started, quick=quick, seeds={"statistics": size.seeds, "simulator": list(range(size.months))},
        control_seconds=control.as_context(costs), statistics=power.as_context(clean, harmed),
        simulated=[m.as_context() for m in months],
    )  # fmt: skip
    figures = [*_costs(costs), *_statistics(clean, harmed), *_simulated(months)]
    return conclude(terminal, figures, facts)
