"""A feature file that is damaged costs its site one cycle and no bit of what it learns."""

from __future__ import annotations

import json

import pytest
import torch

from jobs.ingest import LOST
from pipeline.data import blobs
from tests.support.artifacts import flip
from tests.support.deployments import SITES, Deployment, copy_deployment

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.timeout(180)]
GONE, SITE = SITES[:2]


def test_the_next_cycle_makes_damaged_features_again_or_goes_on_without_them(deployment, tmp_path, capsys):
    """Two sites' features are damaged; the captures of one are gone."""
    assert deployment.run("ingest") == 0
    undisturbed = copy_deployment(deployment, tmp_path / "undisturbed")
    said(undisturbed, capsys, "adapt")
    ledger = deployment.ledger
    before = ledger.streams.segments(SITE), ledger.streams.quarantined(SITE)
    lost = ledger.streams.segments(GONE)[0][0].name
    for site in (GONE, SITE):
        damage(deployment, site)
    (deployment.root / "captures" / GONE / lost).unlink()
    told, _ = said(deployment, capsys, "cycle")
    assert (told["adapted"], told["failed_sites"]) == (len(SITES) - 2, 2)
    assert ledger.streams.site(SITE).status == ledger.streams.site(GONE).status == "failed"
    told, line = said(deployment, capsys, "cycle")
    assert told["failed_sites"] == 0
    assert f"{SITE}: features of segment-" in line
    assert f"warning: {GONE}: {LOST}: {lost}: they do not verify and the captures are gone" in line
    for site in (SITE, GONE):
        row = ledger.streams.site(site)
        assert (row.status, row.learned_offset) == ("active", row.ingested_offset)
    assert (ledger.streams.segments(SITE), ledger.streams.quarantined(SITE)) == before
    mine, theirs = learned(deployment), learned(undisturbed)
    for site in set(SITES) - {GONE}:
        assert mine[site].keys() == theirs[site].keys()
        assert all(torch.equal(t, theirs[site][n]) for n, t in mine[site].items()), site
    assert [(p["site"], p["segment"]) for _, _, kind, p in ledger.audit.rows() if kind == LOST] == [
        (GONE, lost)
    ]
    assert ledger.audit.first_broken() is None


def damage(d: Deployment, site: str) -> None:
    """One bit of its first feature file."""
    path = min((d.root / "artifacts" / "features").glob(f"*/site={site}/*.parquet"))
    flip(path, at=1 / 3)


def learned(d: Deployment) -> dict[str, dict[str, torch.Tensor]]:
    """What each site has learned."""
    ledger = d.ledger
    rows = {
        s.site: ledger.verdicts.states([s.learner])[s.learner] for s in ledger.streams.sites() if s.learner
    }
    places = d.config.place("states")
    return {site: {n: t[r.slot] for n, t in blobs.get(places, r.blob).items()} for site, r in rows.items()}


def said(d: Deployment, capsys, *words: str) -> tuple[dict[str, object], str]:
    capsys.readouterr()
    assert d.run(*words, "--json") in (0, 3)
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err
