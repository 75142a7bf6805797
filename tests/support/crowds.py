"""A crowd of small sites: its deployment, shard processes to kill, and what must hold after every kill.

The model is random and small, and every sample teaches, so that each site's state moves in every step.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from sqlalchemy.engine.default import DefaultDialect

from pipeline.control.adapt import ShardJob, adapt_sites
from pipeline.control.deployment import lease, now
from pipeline.data import blobs
from pipeline.data.anchor import AnchorSet, seal
from pipeline.data.features import FeatureBlock, write_features
from pipeline.ledger import Cycle, Ledger, StaleGeneration
from pipeline.ledger.verdicts import Verdicts
from pipeline.models import checkpoint
from pipeline.simulate.cloned_sites import names
from tests.support.artifacts import source
from tests.support.deployments import STORES, Deployment, Settings, copy_deployment, new_deployment
from tests.support.ledgers import begin, register_source, segment

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkServerProcess

    from pipeline.ledger import SiteRow, VerdictRow

States = dict[
    tuple[str, int], dict[str, torch.Tensor]
]  # by site and the offset that the state has learned to

CROWD: Settings = {
    **STORES,
    "model.trunk": {"kind": "tiny", "width": 4, "features": 16},
    "model.tail": {"width": 8, "rank": 4},
    "source.kind": "erm",
    "site.kind": "danet",
    "site.reservoir": 8,
    "site.lr": 1.0e-3,
    "site.trigger": None,
    "site.sessions": 0,
    "site.session_cap": None,
    "site.disagreement": 1,
    "site.confidence_bona_fide": 0.5,
    "site.confidence_attack": 0.5,
    "site.unanimous_bona_fide": False,
    "bank": {"slots": 6, "batch_size": 8, "cache_mb": 16},
    "guards.ceiling": {"apcer": 1.0, "bpcer": 1.0},
    "guards.noninferiority": {"attacks": 1.0, "worst_species": 1.0, "bona_fide": 1.0},
    "guards.trust": {"rho": 50.0, "margin": 50.0},
    "guards.no_data": {"stream_min": 4, "anchor_min": 1},
    "guards.influence": {"advisory": True},
    "guards.labels": {"advisory": True},
    "guards.modality": {"advisory": True},
    "guards.collapse": {"advisory": True},
    "cluster": {"shards": 2, "ingest_workers": 2},
}
QUIET: Settings = {**CROWD, "site.learn": False}  # counts and boundaries move, no gradient is computed
DAYS = 3  # of ingest and adaptation, one cycle each
FEATURES, ANCHORS = 16, 32
SITES = tuple(names(12))
LENGTH = {site: 9 + k % 3 * 3 for k, site in enumerate(SITES)}  # samples a day: streams of a bank differ
HOSTILE, BLIND = SITES[3], SITES[7]  # sends NaN and infinity; has one camera alone
STALE = 17  # exit status of a process that was fenced off
INSTANTS = {  # what is called there, whether it is before that; each occurs at least three times in a cycle
    "before a blob": (blobs, "put", True),
    "a blob under its temporary name": (Path, "replace", True),
    "after a blob": (blobs, "put", False),
    "before a commit": (Verdicts, "commit", True),
    "within a commit": (DefaultDialect, "do_commit", True),
    "after a commit": (Verdicts, "commit", False),
}
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["pytest", "torch._dynamo", "tests.support.crowds", "pipeline.cluster.fleet", "jobs.cycle"]
)


@dataclass(frozen=True)
class Crowd:
    """A crowd in a folder of its own, from its first day on."""

    d: Deployment
    ledger: Ledger

    def arrive(self, day: int) -> None:
        """The features of ``day`` begin to count."""
        with lease(self.d.config, self.ledger, "ingest") as cycle:
            rows = [
                segment(site, f"segment-{day:04d}.parquet", day * n, n, good=n) for site, n in LENGTH.items()
            ]
            self.ledger.streams.commit(cycle, rows, [], now=now())
            self.ledger.cycles.finish(cycle, summary={}, now=now())

    def begin(self) -> Cycle:
        """Take the lease from whoever has it: an unfinished cycle goes on under a new generation."""
        config = self.d.config
        return begin(
            self.ledger, kind="adapt", fingerprint=config.fingerprint(), dead=lambda _: True, now=now()
        )

    def start(
        self,
        cycle: Cycle,
        parts: Sequence[Sequence[str]],
        *,
        instant: tuple[str, int] | None = None,
        gate: Connection | None = None,
    ) -> ForkServerProcess:
        """A shard process that adapts ``parts`` call by call, see ``_shard``."""
        child = FORK.Process(target=_shard, args=(self.job(cycle), parts, instant, gate), daemon=True)
        child.start()
        return child

    def job(self, cycle: Cycle) -> ShardJob:
        """What a shard of ``cycle`` is given."""
        source, config = self.ledger.sources.champion(), self.d.config
        return ShardJob(
            config.model_dump_json(),
            source.path,
            source.version,
            self.ledger.verdicts.anchor(source.trunk),
            cycle,
        )

    def newest(self) -> Cycle:
        """The cycle of the last day, in the generation that has it."""
        row = self.ledger.cycles.history(kinds=["adapt"])[0]
        return Cycle(row.id, row.generation, resumed=True)

    def finish(self, cycle: Cycle) -> None:
        """Every site is done: the cycle ends, and the audit chain is whole (I6)."""
        assert self.check(cycle) == set(SITES)
        self.ledger.cycles.finish(cycle, summary={}, now=now())
        assert self.ledger.audit.first_broken() is None

    def check(self, cycle: Cycle | None = None) -> set[str]:
        """I1 and I2, also while others write → the sites that are done in ``cycle`` (default: the newest)."""
        last = (
            cycle.id
            if cycle
            else next((c.id for c in self.ledger.cycles.history(kinds=["adapt", "cycle"])), "")
        )
        rows, verdicts = self._snapshot()
        for row in rows:
            own = sorted((v for v in verdicts if v.site == row.site), key=lambda v: v.offset_to)
            ends = [0, *(v.offset_to for v in own)]
            assert [v.offset_from for v in own] == ends[:-1], (
                f"{row.site}: its verdicts do not tile its stream"
            )
            assert row.learned_offset == ends[-1], row.site
            assert sum(v.cycle == last for v in own) == (row.learned_offset == row.ingested_offset), row.site
        self._verify(rows, verdicts)
        return {v.site for v in verdicts if v.cycle == last}

    def states(self) -> States:
        """Every state that was ever committed."""
        kept = self.ledger.verdicts.states([v.state for v in self.ledger.verdicts.find()]).values()
        held = {b: blobs.get(self.d.config.place("states"), b) for b in {s.blob for s in kept}}
        return {(s.site, s.offset_to): {k: t[s.slot] for k, t in held[s.blob].items()} for s in kept}

    def _snapshot(self) -> tuple[list[SiteRow], list[VerdictRow]]:
        """Sites and verdicts of one moment."""
        rows = self.ledger.streams.sites()
        while True:
            verdicts, again = self.ledger.verdicts.find(), self.ledger.streams.sites()
            if rows == again:
                return rows, verdicts
            rows = again

    def _verify(self, rows: Sequence[SiteRow], verdicts: Sequence[VerdictRow]) -> None:
        """Every pointer names a blob whose digest verifies and which holds what it is said to hold."""
        stored = self.ledger.verdicts.states([v.state for v in verdicts] + [r.learner for r in rows])
        assert {v.state for v in verdicts} | {r.learner for r in rows if r.learner} <= stored.keys()
        states, outcomes = self.d.config.place("states"), self.d.config.place("outcomes")
        slots = {b: len(next(iter(blobs.get(states, b).values()))) for b in {s.blob for s in stored.values()}}
        assert all(s.slot < slots[s.blob] for s in stored.values())
        named = [v.window.outcomes_blob for v in verdicts]
        offsets = {digest: blobs.get(outcomes, digest)["offset"].tolist() for digest in set(named)}
        for v, digest in zip(verdicts, named, strict=True):
            assert offsets[digest][v.window.row_start : v.window.row_end] == list(
                range(v.offset_from, v.offset_to)
            ), v.site


def new_crowd(root: Path, settings: Settings = CROWD, *, days: int = DAYS, hostile: bool = True) -> Crowd:
    """Sites with the features of ``days``, none of which counts yet. Without ``hostile`` no value is NaN."""
    d = new_deployment(root, settings)
    config, ledger = d.config, d.ledger
    model = source(config.model, size=config.data.frame_px)
    path = config.place("models", "crowd")
    checkpoint.save(path, model)
    register_source(ledger, path, now=now())
    trunk, random = model.manifest.trunk_digest, torch.Generator().manual_seed(0)
    label = torch.arange(ANCHORS) % 2
    species = tuple("bona_fide" if y else "print" for y in label.tolist())
    z, present = torch.randn(ANCHORS, 3, FEATURES, generator=random), torch.ones(ANCHORS, 3, dtype=torch.bool)
    anchor = seal(config.place("anchors"), AnchorSet(z, present, label.to(torch.int8), species))
    ledger.verdicts.pin_anchor(anchor, trunk=trunk, summary={}, now=now())
    if days:
        ledger.streams.register({site: {} for site in SITES}, now=now())
    for k, (site, n) in enumerate(LENGTH.items()):
        for day in range(days):
            write_features(config.place("features"), trunk, site, _sent(k, day, n, hostile=hostile))
    ledger.close()
    return Crowd(d, ledger)


def copy_crowd(crowd: Crowd, root: Path) -> Crowd:
    """The same crowd in another folder, which is not there yet."""
    d = copy_deployment(crowd.d, root)
    return Crowd(d, d.ledger)


def undisturbed(crowd: Crowd) -> States:
    """The states of all days, adapted by one process that nobody kills."""
    for day in range(DAYS):
        crowd.arrive(day)
        cycle = crowd.begin()
        child = crowd.start(cycle, dealt(np.random.default_rng(0)))
        child.join()
        assert child.exitcode == 0
        crowd.finish(cycle)
    return crowd.states()


def dealt(rng: np.random.Generator) -> list[list[str]]:
    """All sites in calls of random sites: neither neighbours nor slots are the same twice."""
    sites = rng.permutation(SITES).tolist()
    cuts = sorted(rng.choice(np.arange(1, len(sites)), 2, replace=False))
    return [sites[a:b] for a, b in zip([0, *cuts], [*cuts, len(sites)], strict=True)]


def assert_same(found: States, wanted: States, *, without: Collection[str] = ()) -> None:
    """Bit-equal, for every site but ``without`` and every day."""
    assert found.keys() == wanted.keys()
    for key, state in found.items():
        if key[0] not in without:
            assert state.keys() == wanted[key].keys()
            assert all(torch.equal(t, wanted[key][name]) for name, t in state.items()), key


def _sent(k: int, day: int, n: int, *, hostile: bool) -> FeatureBlock:
    rng = np.random.default_rng([k, day])
    z = rng.normal(0.3 * day, 1, (n, 3, FEATURES)).astype(np.float16)
    if hostile and SITES[k] == HOSTILE:
        z[::2], z[1::4] = np.nan, np.inf
    present = np.full(n, 1 if SITES[k] == BLIND else 7, np.uint8)
    ids = np.array([f"{SITES[k]}-{day}-{i}" for i in range(n)], object)
    at = np.datetime64("2026-03-02", "us") + np.arange(n)
    return FeatureBlock(day * n + np.arange(n), ids, at, rng.integers(0, 5, n), present, z)


def _shard(
    job: ShardJob, parts: Sequence[Sequence[str]], instant: tuple[str, int] | None, gate: Connection | None
) -> None:
    """Adapts ``parts``; at the n-th ``instant`` the process kills itself or, with a ``gate``, waits there."""
    if instant:
        _arm(*instant, _die if gate is None else lambda: (gate.send(True), gate.recv()))
    try:
        for part in parts:
            assert adapt_sites(job, part) == {}
    except StaleGeneration:
        os._exit(STALE)


def _arm(name: str, n: int, act: Callable[[], object]) -> None:
    owner, attribute, before = INSTANTS[name]
    real, calls = getattr(owner, attribute), itertools.count(1)

    def armed(*args: object, **kwargs: object) -> object:
        now_ = next(calls) == n
        if now_ and before:
            act()
        result = real(*args, **kwargs)
        if now_ and not before:
            act()
        return result

    setattr(owner, attribute, armed)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
