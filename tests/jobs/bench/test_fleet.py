"""The runs of ``palisade bench fleet`` on a few sites: they do their work, and Ray changes no bit of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jobs.bench.fleet import runs
from jobs.bench.fleet.run import LEARNS, Size, figures, once, registered
from jobs.terminal import Terminal
from pipeline.control.deployment import open_ledger
from pipeline.data import blobs
from pipeline.simulate import cloned_sites

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("ray_local"), pytest.mark.timeout(300)]

SITES = 6


@pytest.fixture(scope="module")
def ground(trained, tmp_path_factory: pytest.TempPathFactory) -> runs.Ground:
    root = tmp_path_factory.mktemp("bench-fleet")
    config = runs.with_sections(trained.config, bank={"slots": 2})
    return runs.Ground(config, cloned_sites.pool(root / "pool"), root)


def states(config) -> dict[str, dict[str, torch.Tensor]]:
    ledger = open_ledger(config)
    found = ledger.verdicts.states([v.state for v in ledger.verdicts.find()]).values()
    return {
        s.site: {k: t[s.slot] for k, t in blobs.get(config.place("states"), s.blob).items()} for s in found
    }


def test_a_cycle_under_ray_is_the_plain_loop_bit_for_bit(ground) -> None:
    ours, bare = (ground.with_captures(name, sites=SITES, captures=12) for name in ("ray", "plain"))
    timed = runs.cycle(ours, Terminal(as_json=True))
    loop = runs.plain(bare)
    assert timed.sites == loop.sites == SITES
    assert min(timed.ingest, timed.adapt, timed.lineage, loop.ingest, loop.adapt) > 0
    mine, theirs = states(ours), states(bare)
    assert set(mine) == set(theirs) == set(cloned_sites.names(SITES))
    assert all(torch.equal(t, theirs[site][n]) for site, state in mine.items() for n, t in state.items())


def test_killed_shards_and_a_killed_driver(ground) -> None:
    fed = replace(ground, config=ground.config.model_copy(update={"site": LEARNS}))
    one = ground.with_captures("seen", sites=1, captures=12)
    runs.plain(one)
    seen = runs.features_of(one)
    calm, killed = (fed.with_features(name, seen, sites=SITES, samples=64) for name in ("calm", "killed"))
    runs.adapted(calm, Terminal(as_json=True))
    _, count = runs.adapted(killed, Terminal(as_json=True), kill_every=2.0, most=2)
    assert 0 < count <= 2
    resumed = fed.with_features("resumed", seen, sites=SITES, samples=64)
    seconds, left = runs.resumed(resumed, Terminal(as_json=True))
    assert 0 < left < SITES and seconds > 0
    undisturbed = states(calm)
    assert any(
        not torch.equal(s["site.beta"], torch.zeros_like(s["site.beta"])) for s in undisturbed.values()
    )
    for config in (killed, resumed):
        assert all(
            torch.equal(t, undisturbed[site][n]) for site, s in states(config).items() for n, t in s.items()
        )


def test_a_figure_that_was_not_measured_does_not_hold() -> None:
    made = {f.name: f for f in figures({"ray": 1.2, "step": 1.3, "resident": 0.5}, Size())}
    assert made["ray_over_plain_loop"].holds and made["resident_gib_100000"].holds
    assert not made["adapt_step_over_forward"].holds
    assert made["resume_seconds"].measured is None and not made["resume_seconds"].holds
    assert len(made) == 14


def test_registered_sites_are_counted_with_what_drives_them(ground) -> None:
    found = registered(ground, replace(Size(), registered=50), Terminal(as_json=True))
    assert 0.02 < found["resident"] < 2


def test_a_part_is_measured_once(ground) -> None:
    given = [{"x": 1.0}, {"x": 2.0}]
    found = [once(ground, size, "part", lambda: given.pop(0)) for size in (Size(), Size(), Size(small=3))]
    assert found == [{"x": 1.0}, {"x": 1.0}, {"x": 2.0}]
