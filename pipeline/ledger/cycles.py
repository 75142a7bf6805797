"""Cycles: which driver may work on the fleet, under a lease that it renews."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.rows import Cycle, CycleBusy, CycleRow
from pipeline.ledger.tables import cycles, dump, iso, make_row

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipeline.ledger.store import Store

LEASE = timedelta(seconds=120)


@dataclass(frozen=True)
class Cycles:
    """The one cycle that runs, and those before it."""

    store: Store

    def begin(
        self,
        kind: str,
        fingerprint: str,
        config: str,
        *,
        holder: str,
        dead: Callable[[str], bool],
        now: datetime,
    ) -> Cycle:
        """Takes the fleet's lease and goes on with an unfinished cycle, or begins one.

        A running cycle goes on if it has the same kind and fingerprint; another one is abandoned.
        ``dead(holder)`` says that a holder cannot come back, so its lease need not run out. Raises
        CycleBusy.
        """
        with self.store.write(exclusive=True) as c:
            for row in c.execute(sa.select(cycles).where(cycles.c.status == "running").with_for_update()):
                if datetime.fromisoformat(row.lease_until) > now and not dead(row.holder):
                    raise CycleBusy(
                        f"cycle {row.id} is running ({row.holder}); "
                        f"wait for it, or until {row.lease_until[:19]}"
                    )
                same = (row.kind, row.fingerprint) == (kind, fingerprint)
                lease = {"generation": row.generation + 1, "holder": holder, "lease_until": iso(now + LEASE)}
                c.execute(
                    cycles.update()
                    .where(cycles.c.id == row.id)
                    .values(lease if same else {**lease, "status": "abandoned"})
                )
                if same:
                    return Cycle(row.id, row.generation + 1, True)
            number = c.scalar(sa.select(sa.func.count()).select_from(cycles)) or 0
            cycle = Cycle(f"{kind}-{number + 1:05d}", 1, False)
            values = {
                "id": cycle.id,
                "kind": kind,
                "generation": 1,
                "status": "running",
                "fingerprint": fingerprint,
                "config": config,
                "holder": holder,
                "lease_until": iso(now + LEASE),
                "started": iso(now),
                "finished": None,
                "summary": "{}",
            }
            c.execute(cycles.insert(), values)
            return cycle

    def renew(self, cycle: Cycle, *, now: datetime) -> None:
        """Extends the lease."""
        with self.store.write() as c:
            self.store.fence(c, cycle)
            c.execute(cycles.update().where(cycles.c.id == cycle.id).values(lease_until=iso(now + LEASE)))

    def finish(self, cycle: Cycle, *, summary: Mapping[str, object], now: datetime) -> None:
        """Gives the lease back and marks the cycle as finished."""
        with self.store.write(exclusive=True) as c:
            self.store.fence(c, cycle)
            values = {"status": "finished", "finished": iso(now), "summary": dump(dict(summary))}
            c.execute(cycles.update().where(cycles.c.id == cycle.id).values(values))
            self.store.append(c, "cycle", {"cycle": cycle.id, **summary}, now)

    def history(self, *, kinds: Sequence[str] = ()) -> list[CycleRow]:
        """Returns every cycle, or those of ``kinds``, newest first."""
        query = sa.select(cycles).order_by(cycles.c.started.desc(), cycles.c.id.desc())
        with self.store.read() as c:
            return [make_row(CycleRow, r) for r in c.execute(query) if not kinds or r.kind in kinds]
