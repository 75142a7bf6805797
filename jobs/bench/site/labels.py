"""Teaches a few labels of a left-out domain to its source model, and counts errors on other people.

Half of a domain's people teach, the other half is judged, at the boundary that the site serves. The memory is
filled and learned by the product's own functions. Rates are in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch

from jobs.bench.parts import code_of, load, part, save
from jobs.bench.site.courses import METHODS
from jobs.bench.site.streams import Prepared
from pipeline.cluster.tasks import run_tasks
from pipeline.config import method_config
from pipeline.control import teaching
from pipeline.data.corpus import BONA_FIDE
from pipeline.data.features import FeatureBlock
from pipeline.ledger import LabelRow
from pipeline.models import checkpoint
from pipeline.models import tail as tails
from pipeline.simulate.scenarios import at_a_door
from pipeline.site import bank, taught
from pipeline.site.contract import Taught
from pipeline.site.methods import danet
from pipeline.stats import metrics
from pipeline.types import Features

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from jobs.bench.site.courses import Source
    from jobs.bench.site.streams import Door, Ground, SourceJob
    from pipeline.models.checkpoint import SourceModel
    from pipeline.site.contract import SiteMethod, State

    Rule = Literal["nothing", "boundary", "labels", "everything"]

DRAWS = 3  # of the people who teach, and of their labels
SEEN = 64  # captures that the door has shown without a label before
LOWEST = 1  # index of the bona fide logit, in ascending order, that the boundary goes down to
SAID = datetime(2026, 1, 1, tzinfo=UTC)  # when the labels were given: all at once


class Case(NamedTuple):
    """How many labels there are, and the share of them that is wrong."""

    bona_fide: int
    attacks: int
    wrong: float = 0.0


CASES = {
    "16 bona fide": Case(16, 0),
    "16 bona fide and 16 attacks": Case(16, 16),
    "the same, a tenth of the labels wrong": Case(16, 16, 0.1),
}
ONE_CLASS, BOTH, WRONG = CASES
FROZEN, BOUNDARY, CEILING = "frozen", "boundary alone", "every true label"
ROWS: dict[str, tuple[str, Rule, dict[str, object]]] = {  # row -> method, what is learned how, settings
    FROZEN: ("frozen", "nothing", {}),
    BOUNDARY: ("frozen", "boundary", {}),
    "danet": ("danet", "labels", {}),
    "danet, source not held": ("danet", "labels", {"taught_hold": 0.0}),
    "lirr": ("lirr", "labels", {}),
    "mclrd": ("mclrd", "labels", {}),
    "ota": ("ota", "labels", {}),
    CEILING: ("danet", "everything", {}),
}


@dataclass(frozen=True)
class LabelJob:
    """One way to learn from labels at the left-out domain of one source model."""

    row: str
    source: SourceJob
    method: SiteMethod
    rule: Rule


class Errors(NamedTuple):
    """Errors on the people who did not teach, by draw."""

    hter: np.ndarray  # [DRAWS]
    apcer: np.ndarray  # [DRAWS], attacks pooled
    bpcer: np.ndarray  # [DRAWS]


class Draw(NamedTuple):
    """Rows of a door: who is judged, what was shown without a label, and what is labelled."""

    judged: np.ndarray  # [N] bool
    shown: np.ndarray  # [SEEN]
    bona_fide: np.ndarray  # in random order
    attack: np.ndarray


def plan(own: SiteMethod, sources: Sequence[SourceJob]) -> list[LabelJob]:
    """Returns the jobs of all rows for every source model with a left-out domain; ``own`` is ours."""
    jobs: list[LabelJob] = []
    for source in (s for s in sources if s.target):
        for row, (kind, rule, changes) in ROWS.items():
            settings = own.model_dump() if own.kind == kind else {"kind": kind}
            method = method_config("site", kind).model_validate({**settings, **changes})
            jobs.append(LabelJob(row, source, method, rule))
    return jobs


def run(
    jobs: Sequence[LabelJob],
    ground: Ground,
    sources: Mapping[SourceJob, Source],
    *,
    on_progress: Callable[[int, int], None],
) -> dict[LabelJob, dict[str, Errors]]:
    """Runs what is not stored yet; returns case -> errors of every job, of a failed one nothing."""
    paths = {job: _path(job, sources[job.source], ground) for job in jobs}
    missing = [(job, ground, sources[job.source], path) for job, path in paths.items() if not path.exists()]
    done = len(paths) - len(missing)
    run_tasks(_learn, missing, on_progress=lambda n: on_progress(done + n, len(paths)))
    return {job: load(path, dict[str, Errors]) for job, path in paths.items() if path.exists()}


def measure(
    method: SiteMethod, rule: Rule, model: SourceModel, door: Door, *, batch: int
) -> dict[str, Errors]:
    """Returns case -> errors of one way to learn from the labels of ``door``."""
    draws = [draw(door, seed) for seed in range(DRAWS)]
    lessons = [lesson(door, d, case, seed) for case in CASES.values() for seed, d in enumerate(draws)]
    if rule == "nothing":
        states = [method.init(model.tail)] * len(lessons)
    elif rule == "boundary":
        states = [_lowered(model, block) for block in lessons]
    elif rule == "everything":
        states = [_everything(method, model, door, d) for d in draws] * len(CASES)
    else:
        states = _taught(method, model, door, draws * len(CASES), lessons, batch)
    z, present = door.captures.features[:2]
    movable = bank.stack([{n: s[n] for n in tails.MOVABLE} for s in states])
    score = bank.scores(model.tail, movable, z, present).numpy()
    errors: dict[str, Errors] = {}
    for i, case in enumerate(CASES):
        mine = zip(score[i * DRAWS : (i + 1) * DRAWS], draws, strict=True)
        both = [
            metrics.far_frr(s[d.judged], door.captures.label[d.judged], model.manifest.threshold)
            for s, d in mine
        ]
        apcer, bpcer = np.array(both).T
        errors[case] = Errors((apcer + bpcer) / 2, apcer, bpcer)
    return errors


def draw(door: Door, seed: int) -> Draw:
    """Returns half of the people to teach, their captures in turn over people and over instruments."""
    rng, captures = np.random.default_rng(seed), door.captures
    people = rng.permutation(np.unique(door.subject))
    teaches = np.isin(door.subject, people[: len(people) // 2])
    video = captures.session.astype(np.str_)
    bona_fide, attack = (np.flatnonzero(teaches & (captures.label == y)) for y in (1, 0))
    return Draw(
        judged=~teaches,
        shown=at_a_door(captures.label, video, teaches, samples=SEEN),
        bona_fide=_in_turn(bona_fide, door.subject, rng),
        attack=_in_turn(attack, captures.pai, rng),
    )


def lesson(door: Door, d: Draw, case: Case, seed: int) -> teaching.LabelledBlock:
    """Returns the labelled presentations of a case; a wrong label names another instrument of the kit."""
    rng = np.random.default_rng([seed, 1])
    rows = np.concatenate([d.bona_fide[: case.bona_fide], d.attack[: case.attacks]])
    label, instrument = _truth(door, rows)
    kit = np.unique(instrument[label == 0])
    for i in rng.choice(len(rows), round(case.wrong * len(rows)), replace=False):
        label[i] = 1 - label[i]
        instrument[i] = rng.choice(kit) if label[i] == 0 else BONA_FIDE
    return _block(door, rows, label, instrument)


def _learn(job: LabelJob, ground: Ground, source: Source, path: Path) -> None:
    torch.set_num_threads(1)
    door = load(source.streams, Prepared).door
    assert door is not None, f"{job.source.name}: no left-out domain"
    if not path.exists():
        model = checkpoint.load(source.model)
        save(path, measure(job.method, job.rule, model, door, batch=ground.batch))


def _taught(
    method: SiteMethod,
    model: SourceModel,
    door: Door,
    draws: Sequence[Draw],
    lessons: Sequence[teaching.LabelledBlock],
    batch: int,
) -> list[State]:
    """Returns a state per lesson: the door shows itself without labels, then the site learns from them."""
    assert isinstance(method, Taught), f"{method.kind} learns nothing from labels"
    seen = [Features(*(t[d.shown] for t in door.captures.features)) for d in draws]
    states = bank.stack([method.init(model.tail)] * len(seen))
    states, _ = bank.run(method, model.tail, states, seen, batch=batch, slots=len(seen))
    new = [
        {**s, **teaching.memory(model, own, s)} for s, own in zip(bank.unstack(states), lessons, strict=True)
    ]
    return bank.unstack(bank.teach(method, model.tail, bank.stack(new), slots=len(new)))


def _lowered(model: SourceModel, own: teaching.LabelledBlock) -> State:
    """Returns the source model, its boundary at the second lowest bona fide logit where that is lower."""
    tail = model.tail
    memory = teaching.memory(model, own, taught.init(len(own.rows), tail))
    here = (memory["taught.label"] == 1) & (memory["taught.weight"] > 0)
    logit = tails.forward(tail, memory["taught.z"][here].float(), memory["taught.present"][here]).logit
    served = torch.logit(torch.tensor(model.manifest.threshold))
    lowest = logit[:, tails.FUSED].sort().values[LOWEST : LOWEST + 1]
    by = torch.minimum(torch.cat([lowest, served[None]]).min() - served, torch.zeros(()))
    pattern = tails.shifted_pattern(tail, by.expand(2**tails.MODALITIES))
    return {**tails.site_state(tail), "pattern": torch.where(by < 0, pattern, tail["pattern"])}


def _everything(method: SiteMethod, model: SourceModel, door: Door, d: Draw) -> State:
    """Returns what the true labels of everybody who teaches give, in a memory as large as they need."""
    assert isinstance(method, danet.Config)
    rows = np.flatnonzero(~d.judged)
    empty = taught.init(len(rows), model.tail)
    state = {**empty, **teaching.memory(model, _block(door, rows, *_truth(door, rows)), empty)}
    strength = taught.Teaching(method.taught_steps, method.taught_lr, method.taught_hold)
    return taught.learn(model.tail, state, strength)


def _truth(door: Door, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels and instruments of rows, to write to."""
    label = door.captures.label[rows].copy()
    return label, np.where(label == 1, BONA_FIDE, door.captures.pai[rows]).astype(object)


def _block(door: Door, rows: np.ndarray, label: np.ndarray, instrument: np.ndarray) -> teaching.LabelledBlock:
    """Returns rows of a door as the labelled presentations of a site, all of them to teach."""
    c, at = door.captures, np.arange(len(rows))
    names = np.array([f"capture-{i}" for i in rows], np.str_)
    when = np.full(len(rows), np.datetime64(SAID.replace(tzinfo=None), "us"))
    block = FeatureBlock(at, names, when, c.session[rows], c.present[rows], c.z[rows])
    said = zip(names.tolist(), label.tolist(), instrument.tolist(), at.tolist(), strict=True)
    return teaching.LabelledBlock(
        block,
        tuple(
            LabelRow("door", name, "bench", y, kind, "commissioning", "bench", SAID, i, teaching.TEACH)
            for name, y, kind, i in said
        ),
    )


def _in_turn(rows: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns rows in random order: the first of every group, then the second of every group, and so on."""
    rows = rng.permutation(rows)
    group = groups[rows]
    turn = [int(np.sum(group[:i] == group[i])) for i in range(len(rows))]
    return rows[np.argsort(turn, kind="stable")]


def _path(job: LabelJob, source: Source, ground: Ground) -> Path:
    code = code_of(
        *METHODS,
        "jobs/bench/site/labels.py",
        "pipeline/control/teaching.py",
        f"pipeline/site/methods/{job.method.kind}*",
    )
    inputs = job.method, job.rule, ground.batch, source.model.name, source.streams.name, code
    return part(ground.place / "labels", job.row, *inputs)
