"""``palisade bench fleet``: what adaptation, ingest, Ray, kills and lineage cost, each as a ratio inside one
run.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from jobs.bench import speed
from jobs.bench.figures import Figure, conclude, context
from jobs.bench.fleet import ingest as bench_fleet_ingest
from jobs.bench.fleet import runs
from jobs.bench.parts import code_of
from jobs.train import train
from pipeline.cluster import connected
from pipeline.control.deployment import now, open_ledger
from pipeline.models import TailConfig, TinyConfig, checkpoint, tail, trunk
from pipeline.simulate import cloned_sites as crowd
from pipeline.simulate.corpora import synth
from pipeline.site.methods.danet import Config as Danet
from pipeline.storage import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.models.checkpoint import SourceModel
    from pipeline.site.contract import SiteMethod

PRODUCTION = TinyConfig(width=32, features=96), 112  # the trunk and frame side of conf/fleet.yaml
STEPS = 60  # of the source model: what it has learned does not change what it costs
# every sample of every site teaches in every step: what adaptation can cost at most
LEARNS = Danet(
    trigger=None,
    sessions=0,
    session_cap=None,
    disagreement=1,
    confidence_bona_fide=0.5,
    confidence_attack=0.5,
    unanimous_bona_fide=False,
)


@dataclass(frozen=True)
class Size:
    """How much is run."""

    small: int = 1000  # sites
    large: int = 10_000
    captures: int = 8
    longer: int = 16  # captures of a site in the comparison of Ray with a plain loop
    learning: int = 128  # samples of a site in the runs with kills
    ingested: int = 100  # sites in the comparison of ingest
    each: int = 160  # captures of such a site
    registered: int = 100_000


QUICK = Size(small=100, large=400, learning=32, ingested=20, registered=10_000)


def bench_fleet(config: Config, terminal: Terminal, *, quick: bool) -> int:
    """Make the ground, run everything, compare."""
    started, size = time.monotonic(), QUICK if quick else Size()
    ground = _ground(config, terminal)
    parts = {
        "cycles": _cycles,
        "kills": _kills,
        "ingest": _ingest,
        "steps": _steps,
        "registered": _registered,
    }
    found: dict[str, float | None] = {}
    with connected(ground.config.cluster):
        for name, measure in parts.items():
            found |= _once(ground, size, name, lambda measure=measure: measure(ground, size, terminal))
    facts = context(started, seeds=[0], quick=quick, sites=[size.small, size.large], **_told(found))
    return conclude(terminal, figures(found, size), facts)


def _ground(config: Config, terminal: Terminal) -> runs.Ground:
    """A source model on two rendered domains and a pool of images, made once."""
    root = config.folder("bench", "fleet")
    ground = runs.moved(
        config,
        data={
            "corpora": str(root / "corpora"),
            "domains": (),
            "captures": str(root / "captures"),
            "anchor": None,
            "sealed": None,
            "redteam": None,
            "retention": "keep",
        },
        source={"steps": STEPS, "start": None},
        ledger={"url": f"sqlite:///{root}/ground.db", "artifacts": str(root / "ground")},
        lineage={
            "uri": f"sqlite:///{root}/mlflow.db",
            "artifacts": str(root / "mlflow"),
            "experiment": "bench-fleet",
        },
        cluster={"address": "local"},
    )
    if not (root / "corpora").exists():
        terminal.say("bench fleet: rendering two domains")
        synth.write(root / "corpora", size=config.data.frame_px, domains=("A", "B"), samples=300)
    train(ground, replace(terminal, as_json=False, out=terminal.err), champion=True)
    return runs.Ground(ground, crowd.pool(root / "pool"), root / "runs")


def _once(
    ground: runs.Ground, size: Size, name: str, measure: Callable[[], dict[str, float | None]]
) -> dict[str, float | None]:
    """A part's figures as they were stored by this very code, else measured now: an interrupted benchmark
    goes on.
    """
    told = json.dumps([asdict(size), ground.config.model_dump(mode="json")], sort_keys=True)
    key = hashlib.sha256((code_of("pipeline/**/*.py", "jobs/**/*.py") + told).encode()).hexdigest()[:12]
    path = ground.root / f"{name}-{key}.json"
    if path.exists():
        return json.loads(path.read_text())
    figures = measure()
    write_atomic(path, json.dumps(figures).encode())
    return figures


def _cycles(ground: runs.Ground, size: Size, terminal: Terminal) -> dict[str, float | None]:
    terminal.say(f"bench fleet: {size.small} sites under Ray and in a plain loop")
    ours = runs.cycle(ground.crowd("ray", sites=size.small, captures=size.longer), terminal)
    bare = runs.plain(ground.crowd("plain", sites=size.small, captures=size.longer))
    terminal.say(f"bench fleet: a cycle of {size.small} sites, then of {size.large}")
    small = runs.cycle(ground.crowd("small", sites=size.small, captures=size.captures), terminal)
    large = runs.cycle(ground.crowd("large", sites=size.large, captures=size.captures), terminal)
    return {
        "ray": bare.cycle / ours.cycle,
        "ray.ingest": bare.ingest / ours.ingest,
        "ray.adapt": bare.adapt / ours.adapt,
        "scale": (large.cycle / large.sites) / (small.cycle / small.sites),
        "scale.seconds": large.cycle,
        "lineage": large.lineage / large.cycle,
    }


def _kills(ground: runs.Ground, size: Size, terminal: Terminal) -> dict[str, float | None]:
    ground = replace(ground, config=ground.config.model_copy(update={"site": LEARNS}))
    seen = runs.seen(ground.named("small"))
    of = {"sites": size.small, "samples": size.learning}
    terminal.say(f"bench fleet: {size.small} sites that learn, undisturbed")
    calm, _ = runs.adapted(ground.fed("calm", seen, **of), terminal)
    terminal.say(f"bench fleet: the same with a SIGKILL every {runs.KILL_SECONDS:g} s")
    killed, count = runs.adapted(ground.fed("killed", seen, **of), terminal, kill_every=runs.KILL_SECONDS)
    terminal.say("bench fleet: a killed driver is resumed")
    resume, left = runs.resumed(ground.fed("resumed", seen, **of), terminal)
    return {
        "kills": calm / killed if count else None,
        "kills.count": count,
        "kills.seconds": killed,
        "calm.seconds": calm,
        "resume": resume,
        "resume.left": left,
    }


def _ingest(ground: runs.Ground, size: Size, terminal: Terminal) -> dict[str, float | None]:
    terminal.say("bench fleet: ingest beside a decoding loop and a DataLoader")
    return bench_fleet_ingest.measure(ground, terminal, sites=size.ingested, captures=size.each)


def _steps(ground: runs.Ground, _: Size, terminal: Terminal) -> dict[str, float | None]:
    terminal.say("bench fleet: steps of a bank")
    model, batch = (
        checkpoint.load(open_ledger(ground.config).sources.champion().path),
        ground.config.bank.batch_size,
    )
    quiet = Danet()
    methods: dict[str, SiteMethod] = {"learns": LEARNS, "quiet": quiet}
    here = speed.adaptation(model, methods, batch=batch)
    there = speed.adaptation(_production(model), methods, batch=batch)
    banked = speed.banked(model, LEARNS, batch=batch)
    state = sum(t.nbytes for t in quiet.init(model.tail).values()) / 1024
    return {
        "step": there["learns"],
        "step.quiet": there["quiet"],
        "step.small": here["learns"],
        "step.small.quiet": here["quiet"],
        "bank.alone": banked.alone,
        "bank.tent": banked.tent,
        "bank.tent.trunk": banked.tent_trunk,
        "bank.wide": banked.wide,
        "state": state,
    }


def _production(model: SourceModel) -> SourceModel:
    """The model that conf/fleet.yaml trains, before any training, with the reference logits of ``model``."""
    config, side = PRODUCTION
    random = torch.Generator().manual_seed(0)
    params = tail.init_tail(TailConfig(), config.features, generator=random)
    params |= {name: model.tail[name] for name in tail.REFERENCE}
    manifest = model.manifest.model_copy(update={"size": side})
    return replace(model, trunk=trunk.fold(trunk.build_trunk(config, side)), tail=params, manifest=manifest)


def _registered(ground: runs.Ground, size: Size, terminal: Terminal) -> dict[str, float | None]:
    terminal.say(f"bench fleet: {size.registered} registered sites")
    config = ground.deployment("registered")
    open_ledger(config).streams.register({site: {} for site in crowd.names(size.registered)}, now=now())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return {"resident": pool.apply(runs.resident, (config.ledger.url,))}


def figures(found: dict[str, float | None], size: Size) -> list[Figure]:
    """The promises, against what was found."""

    def also(name: str, text: str) -> str:
        value = found.get(name)
        return "" if value is None else text.format(value)

    most = [
        (
            "adapt_step_over_forward",
            "step",
            1.15,
            "16 sites x 8 samples, every sample teaches, model of conf/fleet.yaml; "
            + also("step.quiet", "no site learns: {:.2f}; ")
            + also("step.small", "at 48 px {:.2f}")
            + also("step.small.quiet", " and {:.2f}"),
        ),
        ("site_cost_256_over_16", "bank.wide", 1.1, "one step of a bank of 256 sites beside one of 16"),
        (
            f"site_cost_{size.large}_over_{size.small}",
            "scale",
            1.1,
            also("scale.seconds", "cycle of the larger fleet: {:.0f} s"),
        ),
        ("hot_site_kib", "state", 160, "tensors of one site in memory"),
        (
            f"resident_gib_{size.registered}",
            "resident",
            2,
            "a driver that has read and planned every registered site",
        ),
        (
            "resume_seconds",
            "resume",
            5,
            also("resume.left", "driver killed, {:.0f} sites left: until the next commit"),
        ),
        ("lineage_share", "lineage", 0.05, f"of a cycle of {size.large} sites"),
    ]
    least = [
        ("bank_over_one_site_at_a_time", "bank.alone", 5, "64 sites, every sample teaches"),
        (
            "bank_over_tent_through_trunk",
            "bank.tent",
            5,
            "features are there; " + also("bank.tent.trunk", "paying for the trunk as well: {:.1f}"),
        ),
        (
            "ingest_over_decode_loop",
            "ingest",
            0.85,
            "loop times cores; ingest with the smallest trunk; "
            + also("ingest.trunk", "with the model's own {:.2f}"),
        ),
        (
            "ingest_over_dataloader",
            "ingest.loader",
            1.0,
            "two workers that decode, the trunk in the main process; "
            + also("ingest.rate", "ingest {:.0f} captures/s"),
        ),
        (
            "ray_over_plain_loop",
            "ray",
            0.9,
            f"cycle of {size.small} sites; "
            + also("ray.ingest", "ingest {:.2f}, ")
            + also("ray.adapt", "adapt {:.2f}"),
        ),
        (
            "throughput_under_kills",
            "kills",
            0.7,
            also("kills.count", "{:.0f} shards killed in ")
            + also("kills.seconds", "{:.0f} s; ")
            + also("calm.seconds", "undisturbed {:.0f} s"),
        ),
    ]
    made = [Figure(name, found.get(key), limit, least=False, note=note) for name, key, limit, note in most]
    return made + [
        Figure(name, found.get(key), limit, least=True, note=note) for name, key, limit, note in least
    ]


def _told(found: dict[str, float | None]) -> dict[str, object]:
    return {"measured": {name: None if v is None else round(v, 4) for name, v in sorted(found.items())}}
