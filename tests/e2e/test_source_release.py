"""The fleet goes over to another source model: features under both trunks, sites rebased meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from jobs.rollout.rebase import rebase_fleet
from jobs.terminal import Terminal
from pipeline.cluster import fleet
from pipeline.control.deployment import now
from pipeline.data.features import read_features
from pipeline.ledger import LedgerError
from pipeline.ledger.streams import Streams
from pipeline.simulate.sites import demo_fleet, simulate
from tests.support.deployments import SITES, Deployment, copy_deployment

pytestmark = [pytest.mark.e2e, pytest.mark.cluster, pytest.mark.timeout(400)]
GONE, SILENT = SITES[:2]


class Killed(BaseException):
    """What no code of ours catches."""


def quiet() -> Terminal:
    return Terminal(False, Console(file=StringIO()), Console(file=StringIO(), width=1000))


def stored(d: Deployment, version: int) -> dict[str, dict[str, int]]:
    """By site, offset by sample id of its features under a version's trunk."""
    ledger, store, found = d.ledger, d.config.place("features"), {}
    for row in ledger.streams.sites():
        block = read_features(
            store, ledger.sources.get(version).trunk, row.site, start=0, end=row.ingested_offset, features=32
        )
        found[row.site] = dict(zip(block.sample_id.tolist(), block.offset.tolist()))
    return found


def files(d: Deployment) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in (d.root / "artifacts" / "features").rglob("*.parquet")}


@pytest.fixture(scope="module")
def twice(trained, tmp_path_factory) -> Deployment:
    """A second source model, not released."""
    d = copy_deployment(trained, tmp_path_factory.mktemp("twice") / "d")
    assert d.run("train", "source.seed=1", "source.steps=10") == 0
    one, two = d.ledger.sources.all()
    assert one.trunk != two.trunk
    assert d.ledger.sources.champion().version == 1
    return d


@pytest.fixture
def challenged(twice, tmp_path) -> Deployment:
    """A copy of its own for each test."""
    return copy_deployment(twice, tmp_path / "d")


def test_while_there_is_a_challenger_every_sample_gets_features_under_both_trunks(challenged, monkeypatch):
    d, ledger = challenged, challenged.ledger
    (d.root / "captures").rename(d.root / "later")
    (d.root / "captures").mkdir()
    (d.root / "later" / GONE).rename(d.root / "captures" / GONE)
    assert d.run("ingest") == 0
    assert len(stored(d, 1)[GONE]) > 20 and stored(d, 2)[GONE] == {}
    ledger.sources.set_challenger(2, now=now())
    (d.root / "later" / SILENT).rename(d.root / "captures" / SILENT)
    with monkeypatch.context() as m:
        m.setattr(Streams, "commit", killed)
        with pytest.raises(Killed):
            d.run("ingest")
    crashed = files(d)
    assert stored(d, 2)[SILENT] == {}, "nothing counts yet"
    assert d.run("ingest") == 0
    assert files(d) == crashed, "the same again, at the same offsets"
    assert stored(d, 2)[SILENT] == stored(d, 1)[SILENT] and len(stored(d, 1)[SILENT]) > 20
    assert stored(d, 2)[GONE] == {}
    ledger.sources.set_challenger(None, now=now())
    (d.root / "later" / SITES[2]).rename(d.root / "captures" / SITES[2])
    assert d.run("ingest") == 0
    assert len(stored(d, 1)[SITES[2]]) > 20 and stored(d, 2)[SITES[2]] == {}
    told = [(p["version"], p["before"]) for _, _, kind, p in ledger.audit.rows() if kind == "challenger"]
    assert told == [(2, None), (None, "2")]
    assert ledger.audit.first_broken() is None


def test_sites_are_rebased_from_what_is_still_there_and_the_release_goes_on_from_it(
    challenged, monkeypatch, capsys
):
    d, ledger = challenged, challenged.ledger
    assert d.run("ingest") == 0
    assert d.run("adapt") in (0, 4)
    ledger.sources.set_challenger(2, now=now())
    for path in (d.root / "captures" / GONE).glob("*.parquet"):
        path.unlink()
    before = ledger.streams.sites(), ledger.releases.serving(), ledger.verdicts.latest()
    with monkeypatch.context() as m:
        m.setattr(fleet, "run_fleet", killed)
        with pytest.raises(Killed):
            rebase_fleet(d.config, ledger, quiet(), version=2)
    assert ledger.verdicts.rebased(2) == {}
    terminal = quiet()
    done = rebase_fleet(d.config, ledger, terminal, version=2)
    assert done.cycle.resumed
    assert done.reset == {GONE: "its captures are gone"} and not done.failed
    assert done.candidates.keys() == {s.site for s in before[0]} - {GONE}
    assert (ledger.streams.sites(), ledger.releases.serving(), ledger.verdicts.latest()) == before
    states = ledger.verdicts.states([v.state for v in done.candidates.values()])
    assert {(s.source_version, s.parent) for s in states.values()} == {(2, None)}
    for site, ids in stored(d, 2).items():
        assert ids == ({} if site == GONE else stored(d, 1)[site]), site
    again = rebase_fleet(d.config, ledger, terminal, version=2)
    assert again.candidates == done.candidates and again.reset == done.reset
    passed = {s: v.state for s, v in done.candidates.items() if v.outcome == "pass"}
    assert passed
    learners = {r.site: r.learner for r in before[0]}
    released(d, {s: (state, 2) for s, state in passed.items()}, champion=2, kind="promote")
    simulate(d.root, [replace(s, rate=3.0) for s in demo_fleet() if s.site in SITES], phase=2)
    late = max((d.root / "captures" / (site := min(passed))).glob("*.parquet"))
    late.rename(d.root / late.name)
    assert d.run("ingest") == 0
    assert d.run("adapt") in (0, 4)
    rows = {r.site: r for r in ledger.streams.sites()}
    newest = ledger.verdicts.states([rows[s].learner for s in passed])
    assert {(s.source_version, s.parent == passed[s.site]) for s in newest.values()} == {(2, True)}
    (d.root / late.name).rename(late)
    assert d.run("ingest") == 0
    assert len(stored(d, 2)[site]) > len(stored(d, 1)[site])
    released(d, {s: (learners[s], 1) for s in passed}, champion=1, kind="rollback")
    assert failed(d, capsys) == 1, "what came after the release has no features of the old source model"
    assert d.run("ingest") == 0
    assert failed(d, capsys) == 0, "and gets them from its captures"
    assert ledger.verdicts.state(ledger.streams.site(site).learner).source_version == 1


def test_a_whole_release_by_the_commands_and_back(challenged):
    d, ledger = challenged, challenged.ledger
    assert d.run("cycle") in (0, 4)
    words = ("guards.noninferiority.advisory=true", "guards.ceiling.advisory=true")
    assert d.run("rollout", "plan", "--source", "2", "--states", "rebase", "--dry-run", *words) == 2
    assert d.run("rollout", "plan", "--source", "2", "--states", "rebase", *words) == 0
    row = ledger.plans.rollouts()[0]
    targets = ledger.plans.targets(row.id)
    assert targets.keys() == {s.site for s in ledger.streams.sites()}, "controls as well"
    assert {t.to.source_version for t in targets.values()} == {2}
    assert {t.to.state_id is None for t in targets.values()} == {True, False}, (
        "some are rebased, the others reset"
    )
    assert (ledger.sources.challenger(), ledger.sources.champion().version) == (2, 1)
    assert d.run("rollout", "apply", row.plan_hash[:8], "--watch") == 0
    assert ledger.plans.rollouts()[0].status == "completed"
    assert (ledger.sources.challenger(), ledger.sources.champion().version) == (1, 2), (
        "the old trunk's features go on for the way back"
    )
    assert {s: (r.state, r.source_version) for s, r in ledger.releases.serving().items()} == {
        s: tuple(t.to) for s, t in targets.items()
    }
    assert d.run("adapt") in (0, 3, 4)
    assert d.run("rollout", "rollback", "--reason", "drill") == 0
    assert (ledger.sources.challenger(), ledger.sources.champion().version) == (None, 1)
    assert {s: (r.state, r.source_version) for s, r in ledger.releases.serving().items()} == {
        s: tuple(t.back) for s, t in targets.items()
    }
    assert d.run("audit", "verify") == 0
    bare = next(t.verdict_id for t in targets.values() if t.to.state_id is None)
    assert d.run("guard", "recheck", bare) == 0


def test_a_version_that_cannot_be_gone_over_to_is_named_in_one_line(challenged):
    d, ledger = challenged, challenged.ledger
    with pytest.raises(ValueError, match=r"^source v1 is the champion already; "):
        rebase_fleet(d.config, ledger, quiet(), version=1)
    with pytest.raises(LedgerError, match="^source version 7: not there; versions: 1, 2$"):
        ledger.sources.set_challenger(7, now=now())
    path = Path(ledger.sources.get(2).path)
    path.rename(path.with_name("away"))
    ledger.sources.set_challenger(2, now=now())
    assert d.run("ingest") == 2


def failed(d: Deployment, capsys) -> int:
    capsys.readouterr()
    assert d.run("adapt", "--json") in (0, 3, 4, 5)
    return json.loads(capsys.readouterr().out)["failed_sites"]


def killed(*_: object, **__: object) -> None:
    raise Killed


def released(d: Deployment, to: dict[str, tuple[str | None, int]], *, champion: int, kind: str) -> None:
    """What the end of a release (or of its rollback) comes to."""
    d.ledger.releases.serve(to, rollout="r", wave=1, kind=kind, reason="", now=now())
    d.ledger.sources.set_champion(champion, now=now())
    d.ledger.sources.set_challenger(None, now=now())
