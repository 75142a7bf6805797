"""Crowds whose verdicts the guard commands explain and judge again."""

from __future__ import annotations

from pipeline.control.adapt import adapt_sites, shard_job
from pipeline.control.deployment import lease, now
from pipeline.guards import Cell
from tests.support.crowds import CROWD, SITES, Crowd

LOOSE = {
    **CROWD,
    "guards.ratchet": {"advisory": True},
    "guards.no_data": {"stream_min": 10, "anchor_min": 1},  # some sites send 9 a day
}

STRICT = {
    **LOOSE,
    "guards.trust": {"rho": 50.0, "margin": 0.0001},
    "guards.no_data": {"stream_min": 4, "anchor_min": 1},
}

CELLS = tuple(  # with these counts one guard alone decides
    Cell(pattern="full", species=s, n=300, errors=0, worse=0, better=0) for s in ("print", "bona_fide")
)


def day(crowd: Crowd, number: int) -> None:
    crowd.arrive(number)
    config = crowd.d.config
    with lease(config, crowd.ledger, "adapt") as cycle:
        assert adapt_sites(shard_job(config, crowd.ledger, cycle), SITES) == {}
        crowd.ledger.cycles.finish(
            cycle, summary={"evidence": crowd.ledger.verdicts.evidence_digest(cycle.id)}, now=now()
        )
