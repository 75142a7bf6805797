"""A crowd of which two sites were released to, and the key that signs what their boxes pull."""

from __future__ import annotations

from pathlib import Path

import torch

from jobs.__main__ import main
from pipeline.control.deployment import now
from pipeline.data import blobs
from pipeline.guards import Verdict
from pipeline.ledger import ShardRow
from pipeline.models import checkpoint, tail
from pipeline.site import bank
from tests.support.crowds import SITES, YAML, Life, ground
from tests.support.ledgers import GOOD

SITE, OTHER = SITES[0], SITES[1]

NOWHERE = 'lineage: {{uri: "http://127.0.0.1:9"}}\n'


def learned(life) -> list[ShardRow]:
    """A state for every site, three in each blob; the verdicts pass, whatever the guards would say."""
    model, rows = checkpoint.load(life.ledger.source().path), []
    random = torch.Generator().manual_seed(1)
    for first in range(0, len(SITES), 3):
        states = [life.d.config.site.init(model.tail) for _ in range(3)]
        moved = [
            {**s, **{n: s[n] + torch.randn(s[n].shape, generator=random) for n in tail.MOVABLE}}
            for s in states
        ]
        blob = blobs.put(life.d.config.place("states"), bank.stack(moved))
        for slot, site in enumerate(SITES[first : first + 3]):
            rows.append(
                ShardRow(
                    site=site,
                    offset_from=0,
                    offset_to=life.ledger.site(site).ingested,
                    source_version=1,
                    method="danet",
                    blob=blob,
                    slot=slot,
                    parent=None,
                    counters={"samples": 9, "outcomes": "c" * 64},
                    verdict=Verdict(outcome="pass", reasons=()),
                    evidence=GOOD,
                )
            )
    return rows


def serve(life, kind, changes):
    changes = {s: (state, 1) for s, state in changes.items()}
    life.ledger.serve(changes, rollout="release-00001", wave=1, kind=kind, reason="test", now=now())


def released(root: Path) -> Life:
    """A day on which every site learned something that passed, two sites promoted, and a signing key."""
    signing = YAML.replace(
        "artifacts: {root}/artifacts}}", "artifacts: {root}/artifacts, signing_key: {root}/release.pem}}"
    )
    life = ground(root, text=signing + NOWHERE, days=1)
    life.arrive(0)
    cycle = life.begin()
    life.ledger.commit_shard(cycle, learned(life), now=now())
    life.ledger.finish_cycle(cycle, summary={}, now=now())
    serve(life, "promote", {s: life.ledger.site(s).learner for s in (SITE, OTHER)})
    assert main(["audit", "keygen", "--out", str(root / "release.pem")]) == 0
    life.ledger.close()
    return life
