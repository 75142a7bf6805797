"""The streams that site methods are compared on, as one source model sees them: recorded sites, a domain that
it has not
learned from, and rendered scenarios, some of them with an attacker. No method runs here but the attacker's
own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from jobs.bench.parts import store
from jobs.bench.site.online import Stream
from pipeline.config import method_config
from pipeline.data import DataConfig
from pipeline.data.captures import check_segment, list_segments, read_labels
from pipeline.data.corpus import read_corpus
from pipeline.data.features import mask_to_bool, read_features
from pipeline.data.featurise import NewSegment, ingest_segment
from pipeline.data.protocols import any_present
from pipeline.models import checkpoint
from pipeline.models import tail as tails
from pipeline.models.trunk import features as features_of
from pipeline.simulate.scenarios import POISON, Drawn, Scenario, at_a_door, draw
from pipeline.site import bank
from pipeline.source.calibrate import validation_features
from pipeline.source.holdout import read_stored
from pipeline.storage import write_atomic
from pipeline.types import Features

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.data.corpus import Corpus
    from pipeline.data.features import FeatureBlock
    from pipeline.models.checkpoint import SourceModel
    from pipeline.site.contract import Params

WATCHED = 40  # samples after which the adaptive attacker chooses anew


@dataclass(frozen=True)
class SourceJob:
    """One source model and the streams that are scored with it."""

    name: str  # "all", or CPS->W
    seed: int
    source: str  # JSON of the method's Config, seed included
    model: str  # JSON of the ModelConfig
    domains: tuple[str, ...]
    target: str | None  # domain whose samples are the stream; None: sites and scenarios


@dataclass(frozen=True)
class Given:
    """Where things are, and what the streams are drawn from."""

    corpora: dict[str, str]  # domain → folder
    pool: str  # folder of the rendered pool
    captures: str | None  # folder of recorded site streams, labels in its _sealed
    limits: str  # JSON of the DataConfig
    scenarios: tuple[Scenario, ...]
    attacker: str  # JSON of the site Config that the adaptive attacker imitates
    batch: int
    place: str


class Prepared(NamedTuple):
    """What one source model makes of its streams."""

    streams: dict[str, Stream]
    probes: dict[str, Stream]
    validation: Stream
    threshold: float


def prepare(job: SourceJob, given: Given, path: str, rival: str, out: str) -> None:
    """Featurise every stream of ``job`` with the model at ``path`` into the file ``out``; ``rival`` is the
    attacker's model.
    """
    torch.set_num_threads(1)
    model = checkpoint.load(Path(path))
    arrays: dict[str, np.ndarray] = {"threshold": np.array(model.manifest.threshold)}

    def keep(
        name: str,
        z: np.ndarray,
        present: np.ndarray,
        session: np.ndarray,
        label: np.ndarray,
        pai: np.ndarray,
        *,
        poison: np.ndarray | None = None,
        changes: Sequence[int] = (),
        probe: str | None = None,
    ) -> None:
        facts = json.dumps({"changes": [int(c) for c in changes], "probe": probe})
        own = {
            "z": z.astype(np.float16),
            "present": present,
            "session": session,
            "label": label.astype(np.int64),
            "pai": pai.astype(np.str_),
            "poison": np.zeros(len(z), bool) if poison is None else poison,
            "facts": np.array(facts),
        }
        arrays.update({f"{name}.{field}": a for field, a in own.items()})

    validated = [read_corpus(Path(given.corpora[d]), ("val",)) for d in job.domains]
    _, label, z, there = validation_features(model.trunk, validated)
    bits = tails.pattern_index(there).numpy().astype(np.uint8)
    keep(
        "validation",
        z.numpy(),
        bits,
        np.arange(len(label)),
        label,
        np.where(label == 1, "bona_fide", "attack"),
    )
    if job.target:
        corpus = read_corpus(Path(given.corpora[job.target]), ("train", "val", "test"))
        rows = at_a_door(corpus.label, corpus.video, any_present(corpus.present))
        _, session = np.unique(corpus.video[rows], return_inverse=True)
        keep(
            f"stream/{job.name}",
            _trunk(model, corpus, rows),
            corpus.present[rows],
            session,
            corpus.label[rows],
            corpus.pai[rows],
        )
    else:
        for site, (block, label, pai) in _recorded(model, given).items():
            keep(f"stream/{site}", block.z, block.present, block.session, label, pai)
        _scenarios(job, given, model, checkpoint.load(Path(rival)), keep)
    write_atomic(Path(out), lambda tmp: store(tmp, arrays))


def read_prepared(path: Path) -> Prepared:
    """What ``prepare`` stored; ValueError for anything else."""
    return read_stored(path, _prepared)


def _prepared(arrays: dict[str, np.ndarray]) -> Prepared:
    every: dict[str, Stream] = {}
    for name in sorted({n.rsplit(".", 1)[0] for n in arrays if "." in n}):
        a = {
            field: arrays[f"{name}.{field}"]
            for field in ("z", "present", "session", "label", "pai", "poison", "facts")
        }
        z = torch.from_numpy(a["z"].astype(np.float32))
        present = torch.from_numpy(mask_to_bool(a["present"]))
        features = Features(z, present, torch.ones(len(z), dtype=torch.bool), torch.from_numpy(a["session"]))
        facts = json.loads(str(a["facts"]))
        known = (a["label"], a["pai"], a["poison"], tuple(facts["changes"]), facts["probe"])
        every[name] = Stream(name.split("/")[-1], features, *known)
    streams = {n.removeprefix("stream/"): s for n, s in every.items() if n.startswith("stream/")}
    probes = {n.removeprefix("probe/"): s for n, s in every.items() if n.startswith("probe/")}
    return Prepared(streams, probes, every["validation"], float(arrays["threshold"]))


def _scenarios(
    job: SourceJob, given: Given, model: SourceModel, rival: SourceModel, keep: Callable[..., None]
) -> None:
    """The rendered streams, drawn for this model, and the probes."""
    pool = read_corpus(Path(given.pool), ("train", "test"))
    z = _trunk(model, pool, np.arange(len(pool)))
    rig = np.array([v.rsplit("-", 1)[0] for v in pool.video])
    drawn_from = np.flatnonzero(pool.split == "train")
    logit = _logits(model.tail, z[drawn_from], pool.present[drawn_from])
    seen = {"rig": rig[drawn_from], "pai": pool.pai[drawn_from], "video": pool.video[drawn_from]}
    for s in given.scenarios:
        drawn = draw(s, **seen, logit=logit)
        if s.adaptive:
            drawn = _attacked(
                drawn,
                given,
                rival,
                _trunk(rival, pool, drawn_from),
                pool.present[drawn_from],
                seen["pai"],
                seen["rig"],
                s,
            )
        rows = drawn_from[drawn.row]
        starts = np.cumsum([0, *(t.samples for t in s.stretches)])[:-1]
        changes = [
            int(at)
            for at, (a, b) in zip(starts[1:], zip(s.stretches, s.stretches[1:], strict=False), strict=True)
            if a.rig != b.rig and not b.rig.startswith("C")
        ]
        keep(
            f"stream/{s.name}",
            z[rows],
            drawn.present & pool.present[rows],
            drawn.session,
            pool.label[rows],
            pool.pai[rows],
            poison=drawn.poison,
            changes=changes,
            probe=s.probe,
        )
    for name in np.unique(rig[pool.split == "test"]):
        rows = np.flatnonzero((pool.split == "test") & (rig == name))
        keep(
            f"probe/{name}",
            z[rows],
            pool.present[rows],
            np.arange(len(rows)),
            pool.label[rows],
            pool.pai[rows],
        )


def _attacked(
    drawn: Drawn,
    given: Given,
    rival: SourceModel,
    z: np.ndarray,
    present: np.ndarray,
    pai: np.ndarray,
    rig: np.ndarray,
    scenario: Scenario,
) -> Drawn:
    """``drawn`` with the poison chosen, every WATCHED samples, by a model that has adapted to what was sent
    so far.
    """
    stated = json.loads(given.attacker)
    method = method_config("site", stated["kind"]).model_validate(stated)
    own = np.flatnonzero(np.isin(pai, POISON) & (rig == scenario.stretches[0].rig))
    state, row = bank.stack([method.init(rival.tail)]), drawn.row.copy()
    for start in range(0, len(row), WATCHED):
        part = slice(start, start + WATCHED)
        there = torch.from_numpy(mask_to_bool(present[own]))
        liked = bank.scores(rival.tail, state, torch.from_numpy(z[own].astype(np.float32)), there)[0].numpy()
        best = own[np.argsort(-liked)]
        wanted = np.flatnonzero(drawn.poison[part]) + start
        row[wanted] = best[np.arange(len(wanted)) % len(best)]
        sent = Features(
            torch.from_numpy(z[row[part]].astype(np.float32)),
            torch.from_numpy(mask_to_bool(present[row[part]])),
            torch.ones(len(row[part]), dtype=torch.bool),
            torch.from_numpy(drawn.session[part]),
        )
        state, _ = bank.run(method, rival.tail, state, [sent], batch=given.batch, slots=1)
    return drawn._replace(row=row)


def _recorded(model: SourceModel, given: Given) -> dict[str, tuple[FeatureBlock, np.ndarray, np.ndarray]]:
    """Recorded site streams through the same ingest as a deployment's → features and sealed labels."""
    if given.captures is None:
        return {}
    limits, store = DataConfig.model_validate_json(given.limits), Path(given.place) / "features"
    found: dict[str, tuple[FeatureBlock, np.ndarray, np.ndarray]] = {}
    for site, paths in list_segments(Path(given.captures)).segments.items():
        at = 0
        for path in paths:
            rows = check_segment(path, site=site, limits=limits)
            ingest_segment(NewSegment(site, path.name, str(path), rows, at), limits, model, store)
            at += rows
        block = read_features(
            store,
            model.manifest.trunk_digest,
            site,
            start=0,
            end=at,
            features=model.manifest.config.trunk.features,
        )
        labels = read_labels(Path(given.captures) / "_sealed" / f"{site}-labels.parquet")
        kept = np.flatnonzero([s in labels for s in block.sample_id])
        known = [labels[s] for s in block.sample_id[kept]]
        found[site] = block.rows(kept), np.array([k[0] for k in known]), np.array([k[1] for k in known])
    return found


def _trunk(model: SourceModel, corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    present = torch.from_numpy(mask_to_bool(corpus.present[rows]))
    return features_of(model.trunk, torch.from_numpy(corpus.frame[rows]), present).numpy().astype(np.float16)


def _logits(tail: Params, z: np.ndarray, present: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        read = tails.forward(
            tail, torch.from_numpy(z.astype(np.float32)), torch.from_numpy(mask_to_bool(present))
        )
    return read.logit[:, tails.FUSED].numpy()
