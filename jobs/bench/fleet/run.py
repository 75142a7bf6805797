"""``palisade bench fleet``: measures adaptation, ingest, Ray, kills and lineage as ratios inside one run."""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from jobs.bench import speed
from jobs.bench.fleet import ingest, runs
from jobs.bench.parts import code_of, part
from jobs.bench.report import conclude, context
from jobs.train import train
from pipeline.cluster import connected
from pipeline.control.deployment import now, open_ledger
from pipeline.models import TailConfig, TinyConfig, checkpoint, tail, trunk
from pipeline.report.bench import Report, at_least, at_most
from pipeline.simulate import cloned_sites
from pipeline.simulate.corpora import synth
from pipeline.site.methods.danet import Config as Danet
from pipeline.storage import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable

    from jobs.bench.fleet.runs import Ground
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.models.checkpoint import SourceModel
    from pipeline.report.bench import Figure

    Numbers = dict[str, float | None]  # by name; None: could not be measured

PRODUCTION = TinyConfig(width=32, features=96), 112  # the trunk and frame side of conf/fleet.yaml
STEPS = 60  # of the source model: what it has learned does not change what it costs
SURE = {
    "confidence_bona_fide": 0.5,
    "confidence_attack": 0.5,
    "unanimous_bona_fide": False,
    "disagreement": 1,
}
LEARNS = Danet(trigger=None, sessions=0, session_cap=None, **SURE)  # every sample teaches: the highest cost


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


def bench_fleet(config: Config, terminal: Terminal, *, quick: bool, write: bool = False) -> int:
    """Makes the ground, runs everything, compares; exit 0 if every figure holds, else 3."""
    started, size = time.monotonic(), QUICK if quick else Size()
    ground, numbers = _ground(config, terminal), dict[str, float | None]()
    parts = {"cycles": _cycles, "kills": _kills, "ingest": _ingest, "steps": _steps, "registered": registered}
    with connected(ground.config.cluster):
        for name, measure in parts.items():
            numbers |= once(ground, size, name, lambda measure=measure: measure(ground, size, terminal))
    rounded = {name: None if v is None else round(v, 4) for name, v in sorted(numbers.items())}
    sites = [size.small, size.large]
    facts = context("fleet", started, quick=quick, seeds=[0], sites=sites, measured=rounded)
    report = Report("fleet", "What a fleet costs", now(), figures(numbers, size), [], facts)
    return conclude(config, terminal, report, write=write)


def once(ground: Ground, size: Size, name: str, measure: Callable[[], Numbers]) -> Numbers:
    """Returns a part's numbers as this very code stored them, else measures them now."""
    path = part(ground.root, name, asdict(size), ground.config, code_of("pipeline", "jobs"), suffix=".json")
    if not path.exists():
        write_atomic(path, json.dumps(measure()).encode())
    return json.loads(path.read_text())


def registered(ground: Ground, size: Size, terminal: Terminal) -> Numbers:
    """Measures the memory of a process that drives every registered site."""
    terminal.say(f"bench fleet: {size.registered} registered sites")
    config = ground.deployment("registered")
    sites = {site: {} for site in cloned_sites.names(size.registered)}
    open_ledger(config).streams.register(sites, now=now())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return {"resident": pool.apply(runs.resident, (config.ledger.url,))}


def figures(numbers: Numbers, size: Size) -> list[Figure]:
    """Returns the promises against what was measured."""

    def also(text: str, *names: str) -> str:
        values = [numbers.get(name) for name in names]
        return "" if None in values else text.format(*values)

    def most(name: str, key: str, limit: float, *notes: str) -> Figure:
        return at_most(name, numbers.get(key), limit, "; ".join(filter(None, notes)))

    def least(name: str, key: str, limit: float, *notes: str) -> Figure:
        return at_least(name, numbers.get(key), limit, "; ".join(filter(None, notes)))

    step = "16 sites x 8 samples, every sample teaches, model of conf/fleet.yaml"
    quiet = also("no site learns: {:.2f}", "step.quiet")
    at_48 = also("at 48 px {:.2f} and {:.2f}", "step.small", "step.small.quiet")
    cycles, larger = f"site_cost_{size.large}_over_{size.small}", "larger fleet: {:.0f} s"
    left = also("driver killed, {:.0f} sites left: until the next commit", "resume.left")
    through = also("paying for the trunk as well: {:.1f}", "bank.tent.trunk")
    own = also("with the model's own {:.2f}", "ingest.trunk")
    rate = also("ingest {:.0f} captures/s", "ingest.rate")
    ray = also("ingest {:.2f}, adapt {:.2f}", "ray.ingest", "ray.adapt")
    killed = also("{:.0f} shards killed in {:.0f} s", "kills.count", "kills.seconds")
    return [
        most("adapt_step_over_forward", "step", 1.15, step, quiet, at_48),
        most("site_cost_256_over_16", "bank.wide", 1.1, "one step of a bank of 256 sites beside one of 16"),
        most(cycles, "scale", 1.1, also(larger, "scale.seconds")),
        most("hot_site_kib", "state", 160, "tensors of one site in memory"),
        most(f"resident_gib_{size.registered}", "resident", 2, "a driver that has planned every site"),
        most("resume_seconds", "resume", 5, left),
        most("lineage_share", "lineage", 0.05, f"of a cycle of {size.large} sites"),
        least("bank_over_one_site_at_a_time", "bank.alone", 5, "64 sites, every sample teaches"),
        least("bank_over_tent_through_trunk", "bank.tent", 5, "features are there", through),
        least("ingest_over_decode_loop", "ingest", 0.85, "loop times cores", "with the smallest trunk", own),
        least(
            "ingest_over_bare_loop",
            "ingest.bare",
            0.85,
            "new processes, one a core: decode, then trunk",
            rate,
        ),
        least("ingest_over_dataloader", "ingest.loader", 1.0, "two workers decode, trunk beside them", rate),
        least("ray_over_plain_loop", "ray", 0.9, f"cycle of {size.small} sites", ray),
        least("throughput_under_kills", "kills", 0.7, killed, also("undisturbed {:.0f} s", "calm.seconds")),
    ]


def _ground(config: Config, terminal: Terminal) -> Ground:
    """Makes a source model on two rendered domains and a pool of images, once."""
    root = config.folder("bench", "fleet")
    unread = {"domains": (), "anchor": None, "sealed": None, "labels": None, "retention": "keep"}
    ground = runs.with_sections(
        config,
        data={"corpora": str(root / "corpora"), "captures": str(root / "captures"), **unread},
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
    return runs.Ground(ground, cloned_sites.pool(root / "pool"), root / "runs")


def _cycles(ground: Ground, size: Size, terminal: Terminal) -> Numbers:
    terminal.say(f"bench fleet: {size.small} sites under Ray and in a plain loop")
    ray, plain = (ground.with_captures(n, sites=size.small, captures=size.longer) for n in ("ray", "plain"))
    ours, bare = runs.cycle(ray, terminal), runs.plain(plain)
    terminal.say(f"bench fleet: a cycle of {size.small} sites, then of {size.large}")
    fleets = {"small": size.small, "large": size.large}
    small, large = (
        runs.cycle(ground.with_captures(name, sites=n, captures=size.captures), terminal)
        for name, n in fleets.items()
    )
    return {
        "ray": bare.cycle / ours.cycle,
        "ray.ingest": bare.ingest / ours.ingest,
        "ray.adapt": bare.adapt / ours.adapt,
        "scale": (large.cycle / large.sites) / (small.cycle / small.sites),
        "scale.seconds": large.cycle,
        "lineage": large.lineage / large.cycle,
    }


def _kills(ground: Ground, size: Size, terminal: Terminal) -> Numbers:
    ground = replace(ground, config=ground.config.model_copy(update={"site": LEARNS}))
    block = runs.features_of(ground.named("small"))
    calm, killed, resumed = (
        ground.with_features(name, block, sites=size.small, samples=size.learning)
        for name in ("calm", "killed", "resumed")
    )
    terminal.say(f"bench fleet: {size.small} sites that learn, undisturbed")
    undisturbed, _ = runs.adapted(calm, terminal)
    terminal.say(f"bench fleet: the same with a SIGKILL every {runs.KILL_SECONDS:g} s")
    seconds, count = runs.adapted(killed, terminal, kill_every=runs.KILL_SECONDS)
    terminal.say("bench fleet: a killed driver is resumed")
    resume, left = runs.resumed(resumed, terminal)
    numbers = {"kills.count": count, "kills.seconds": seconds, "calm.seconds": undisturbed}
    kills = undisturbed / seconds if count else None
    return {**numbers, "kills": kills, "resume": resume, "resume.left": left}


def _ingest(ground: Ground, size: Size, terminal: Terminal) -> Numbers:
    terminal.say("bench fleet: ingest beside a decoding loop and a DataLoader")
    return ingest.measure(ground, terminal, sites=size.ingested, captures=size.each)


def _steps(ground: Ground, _: Size, terminal: Terminal) -> Numbers:
    terminal.say("bench fleet: steps of a bank")
    model = checkpoint.load(open_ledger(ground.config).sources.champion().path)
    methods, batch = {"learns": LEARNS, "quiet": Danet()}, ground.config.bank.batch_size
    small, step = (speed.adaptation(m, methods, batch=batch) for m in (model, _production(model)))
    banked = speed.banked(model, LEARNS, batch=batch)
    return {
        "step": step["learns"],
        "step.quiet": step["quiet"],
        "step.small": small["learns"],
        "step.small.quiet": small["quiet"],
        "bank.alone": banked.alone,
        "bank.tent": banked.tent,
        "bank.tent.trunk": banked.tent_trunk,
        "bank.wide": banked.wide,
        "state": sum(t.nbytes for t in Danet().init(model.tail).values()) / 1024,
    }


def _production(model: SourceModel) -> SourceModel:
    """Returns the untrained model of conf/fleet.yaml, with the reference logits of ``model``."""
    config, side = PRODUCTION
    params = tail.init_tail(TailConfig(), config.features, generator=torch.Generator().manual_seed(0))
    params |= {name: model.tail[name] for name in tail.REFERENCE}
    manifest = model.manifest.model_copy(update={"size": side})
    return replace(model, trunk=trunk.fold(trunk.build_trunk(config, side)), tail=params, manifest=manifest)
