"""A month of a fleet whose network, clocks, people and drivers fail, on the real state machine and a real
ledger.

Every day each site of a wave that was begun sends one report. The way loses, doubles, delays and reorders
them. Releases follow one another, some of them bad; sites join and retire; the driver's clock jumps, and it
dies between its commits.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING

from jobs.bench.rollout.control import gone
from jobs.bench.rollout.world import TICKS, World

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from jobs.bench.rollout.checks import Month

PATIENCE = 15  # days after the last that everything has to end


def simulate(folder: Path, *, sites: int, days: int, seed: int, advance: Callable[[int, int], None]) -> Month:
    """Run a month; then give what is under way PATIENCE days to end."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "month.db"
    gone(path)
    started = time.monotonic()
    with closing(World(path, sites=sites, days=days, seed=seed)) as world:
        for tick in range((days + PATIENCE) * TICKS):
            if tick >= days * TICKS and not world.open():
                break
            world.reconcile(tick)
            if tick % TICKS == TICKS - 1:
                world.checks.daily(world.ledger)
                advance(min(days, tick // TICKS + 1), days)
        world.checks.ended(world.ledger)
        world.month.seconds = time.monotonic() - started
        return world.report()
