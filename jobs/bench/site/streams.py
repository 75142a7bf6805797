"""Prepares the streams on which site methods are compared, as one source model sees them.

They are recorded sites, a domain that the model has not learned from, and rendered scenarios, some of them
with an attacker. No method runs here but the attacker's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from jobs.bench.parts import save
from jobs.bench.site.online import Stream
from pipeline.data.assemble import Trunk, gather_segment, store_segment
from pipeline.data.captures import check_segment, list_segments, read_labels
from pipeline.data.corpus import read_corpus
from pipeline.data.features import mask_to_bool, read_features
from pipeline.data.featurise import torch_trunk
from pipeline.data.protocols import any_present
from pipeline.models import checkpoint
from pipeline.models import tail as tails
from pipeline.models.trunk import features as features_of
from pipeline.simulate.scenarios import POISON, Drawn, Scenario, at_a_door, draw
from pipeline.site import bank
from pipeline.source.calibrate import validation_features
from pipeline.types import Features

if TYPE_CHECKING:
    from pipeline.data import DataConfig
    from pipeline.data.corpus import Corpus
    from pipeline.models import ModelConfig
    from pipeline.models.checkpoint import SourceModel
    from pipeline.site.contract import SiteMethod
    from pipeline.source.contract import SourceMethod

WATCHED = 40  # samples after which the adaptive attacker chooses anew


@dataclass(frozen=True)
class SourceJob:
    """One source model and the streams that are scored with it."""

    name: str  # "all", or CPS->W
    method: SourceMethod  # with its seed
    model: ModelConfig
    domains: tuple[str, ...]
    target: str | None  # domain whose samples are the stream; None: sites and scenarios


@dataclass(frozen=True)
class Ground:
    """Where things are, and what the streams are drawn from."""

    corpora: dict[str, Path]  # by domain
    pool: Path  # the rendered captures of the scenarios
    captures: Path | None  # recorded site streams, labels in its _sealed
    limits: DataConfig
    scenarios: tuple[Scenario, ...]
    attacker: SiteMethod  # that the adaptive attacker imitates
    batch: int
    place: Path


@dataclass(frozen=True)
class Door:
    """Every usable capture of a left-out domain with its label, N of them, and who is on it."""

    captures: Stream
    subject: np.ndarray  # [N] str


class Prepared(NamedTuple):
    """What one source model makes of its streams."""

    streams: dict[str, Stream]
    probes: dict[str, Stream]
    validation: Stream
    domain: np.ndarray  # of each validation sample
    threshold: float
    door: Door | None = None  # where the streams are of a left-out domain


def prepare(job: SourceJob, ground: Ground, model_path: Path, rival_path: Path, out: Path) -> None:
    """Stores every stream of ``job`` as features of its model; the attacker holds the rival model."""
    torch.set_num_threads(1)
    model = checkpoint.load(model_path)
    validated = [read_corpus(ground.corpora[d], ("val",)) for d in job.domains]
    domain, label, z, present = validation_features(model.trunk, validated)
    bits, pai = (
        tails.pattern_index(present).numpy().astype(np.uint8),
        np.where(label == 1, "bona_fide", "attack"),
    )
    validation = _stream(z.numpy(), bits, np.arange(len(label)), label, pai)
    streams, probes = _recorded(model, ground) if job.target is None else {}, dict[str, Stream]()
    door: Door | None = None
    if job.target:
        corpus = read_corpus(ground.corpora[job.target], ("train", "val", "test"))
        usable = np.flatnonzero(any_present(corpus.present))
        video, z = corpus.video[usable], _features(model, corpus, usable)
        captures = _of_corpus(corpus, usable, z, np.unique(video, return_inverse=True)[1])
        door = Door(captures, corpus.subject[usable].astype(np.str_))
        rows = at_a_door(captures.label, video, np.ones(len(usable), bool))
        _, session = np.unique(video[rows], return_inverse=True)
        streams[job.name] = _of_corpus(corpus, usable[rows], z[rows], session)
    else:
        pool = read_corpus(ground.pool, ("train", "test"))
        every = _features(model, pool, np.arange(len(pool)))
        streams |= _scenarios(ground, pool, every, model, checkpoint.load(rival_path))
        rigs = np.where(pool.split == "test", _rigs(pool), "")
        for name in np.unique(rigs[rigs != ""]):
            rows = np.flatnonzero(rigs == name)
            probes[str(name)] = _of_corpus(pool, rows, every[rows], np.arange(len(rows)))
    save(out, Prepared(streams, probes, validation, domain, model.manifest.threshold, door))


def _stream(
    z: np.ndarray, present: np.ndarray, session: np.ndarray, label: np.ndarray, pai: np.ndarray
) -> Stream:
    """Returns samples as they are stored, none of them poison."""
    label, pai = label.astype(np.int64), pai.astype(np.str_)
    return Stream(z.astype(np.float16), present, session, label, pai, np.zeros(len(z), bool))


def _of_corpus(corpus: Corpus, rows: np.ndarray, z: np.ndarray, session: np.ndarray) -> Stream:
    return _stream(z, corpus.present[rows], session, corpus.label[rows], corpus.pai[rows])


def _scenarios(
    ground: Ground, pool: Corpus, every: np.ndarray, model: SourceModel, rival: SourceModel
) -> dict[str, Stream]:
    """Returns the rendered streams, drawn for this model from the training captures of the pool."""
    source = np.flatnonzero(pool.split == "train")
    rig, present = _rigs(pool)[source], torch.from_numpy(mask_to_bool(pool.present[source]))
    with torch.no_grad():
        output = tails.forward(model.tail, torch.from_numpy(every[source].astype(np.float32)), present)
    logit = output.logit[:, tails.FUSED].numpy()
    streams: dict[str, Stream] = {}
    for s in ground.scenarios:
        drawn = draw(s, rig=rig, pai=pool.pai[source], video=pool.video[source], logit=logit)
        if s.adaptive:
            own = np.flatnonzero(np.isin(pool.pai[source], POISON) & (rig == s.stretches[0].rig))
            sent = _of_corpus(pool, source, _features(rival, pool, source), np.arange(len(source)))
            drawn = drawn._replace(row=_attacked(drawn, sent, own, rival, ground))
        rows = source[drawn.row]
        starts = np.cumsum([t.samples for t in s.stretches])
        swaps = zip(starts, s.stretches, s.stretches[1:], strict=False)
        stream = _of_corpus(pool, rows, every[rows], drawn.session)
        streams[s.name] = Stream(
            stream.z,
            drawn.present & stream.present,
            drawn.session,
            stream.label,
            stream.pai,
            drawn.poison,
            tuple(int(at) for at, a, b in swaps if a.rig != b.rig and not b.rig.startswith("C")),
            s.probe,
        )
    return streams


def _attacked(drawn: Drawn, pool: Stream, own: np.ndarray, rival: SourceModel, ground: Ground) -> np.ndarray:
    """Returns the drawn rows of ``pool``, the poison chosen from ``own`` every WATCHED samples.

    It is chosen by the rival model, which has adapted to what was sent so far.
    """
    state, row, method = bank.stack([ground.attacker.init(rival.tail)]), drawn.row.copy(), ground.attacker
    z, present = pool.features.z, pool.features.present
    for start in range(0, len(row), WATCHED):
        part = slice(start, start + WATCHED)
        score = bank.scores(rival.tail, state, z[own], present[own])[0].numpy()
        best = own[np.argsort(-score)]
        wanted = np.flatnonzero(drawn.poison[part]) + start
        row[wanted] = best[np.arange(len(wanted)) % len(best)]
        session = torch.from_numpy(drawn.session[part])
        sent = Features(z[row[part]], present[row[part]], torch.ones_like(session, dtype=torch.bool), session)
        state, _ = bank.run(method, rival.tail, state, [sent], batch=ground.batch, slots=1)
    return row


def _recorded(model: SourceModel, ground: Ground) -> dict[str, Stream]:
    """Returns the recorded streams, through the ingest of a deployment, with their sealed labels."""
    place, width = ground.place / "features", model.manifest.config.trunk.features
    streams, trunks = dict[str, Stream](), [torch_trunk(model.trunk)]
    if ground.captures is None:
        return streams
    for site, paths in list_segments(ground.captures).segments.items():
        end = 0
        for path in paths:
            rows = check_segment(path, site=site, limits=ground.limits)
            got = gather_segment(site, str(path), ground.limits, trunks)
            store_segment(site, end, got, {}, [Trunk.of(model.manifest)], place)
            end += rows
        block = read_features(place, model.manifest.trunk_digest, site, start=0, end=end, features=width)
        labels = read_labels(ground.captures / "_sealed" / f"{site}-labels.parquet")
        block = block.rows(np.flatnonzero([s in labels for s in block.sample_id]))
        label, pai = (np.array([labels[s][i] for s in block.sample_id]) for i in (0, 1))
        streams[site] = _stream(block.z, block.present, block.session, label, pai)
    return streams


def _features(model: SourceModel, corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    present = torch.from_numpy(mask_to_bool(corpus.present[rows]))
    return features_of(model.trunk, torch.from_numpy(corpus.frame[rows]), present).numpy().astype(np.float16)


def _rigs(pool: Corpus) -> np.ndarray:
    """Returns the rig of every capture of the rendered pool, which its video's name begins with."""
    return np.array([video.rsplit("-", 1)[0] for video in pool.video])
