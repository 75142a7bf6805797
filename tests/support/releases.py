"""A crowd of which two sites were released to, and the key that signs what their boxes pull."""

from __future__ import annotations

from pathlib import Path

import torch

from jobs.__main__ import main
from pipeline.control.deployment import now
from pipeline.data import blobs
from pipeline.ledger import ShardRow
from pipeline.models import checkpoint, tail
from pipeline.site import bank
from tests.support.crowds import CROWD, SITES, Crowd, new_crowd
from tests.support.ledgers import shard

SITE, OTHER = SITES[0], SITES[1]

SIGNING = {
    **CROWD,
    "ledger.signing_key": "{root}/release.pem",
    "lineage.uri": "http://127.0.0.1:9",  # nobody answers there
}


def learned(crowd) -> list[ShardRow]:
    """A state for every site, three in each blob; the verdicts pass."""
    model, rows = checkpoint.load(crowd.ledger.sources.champion().path), []
    random = torch.Generator().manual_seed(1)
    for first in range(0, len(SITES), 3):
        states = [crowd.d.config.site.init(model.tail) for _ in range(3)]
        moved = [
            {**s, **{n: s[n] + torch.randn(s[n].shape, generator=random) for n in tail.MOVABLE}}
            for s in states
        ]
        blob = blobs.put(crowd.d.config.place("states"), bank.stack(moved))
        for slot, site in enumerate(SITES[first : first + 3]):
            rows.append(shard(site, 0, crowd.ledger.streams.site(site).ingested_offset, blob=blob, slot=slot))
    return rows


def serve(crowd, kind, changes):
    changes = {s: (state, 1) for s, state in changes.items()}
    crowd.ledger.releases.serve(changes, rollout="release-00001", wave=1, kind=kind, reason="test", now=now())


def released(root: Path) -> Crowd:
    """A day on which every site learned something that passed, two sites promoted, and a signing key."""
    crowd = new_crowd(root, SIGNING, days=1)
    crowd.arrive(0)
    cycle = crowd.begin()
    crowd.ledger.verdicts.commit(cycle, learned(crowd), now=now())
    crowd.ledger.cycles.finish(cycle, summary={}, now=now())
    serve(crowd, "promote", {s: crowd.ledger.streams.site(s).learner for s in (SITE, OTHER)})
    assert main(["audit", "keygen", "--out", str(root / "release.pem")]) == 0
    crowd.ledger.close()
    return crowd
