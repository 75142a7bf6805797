"""Computes a short fit, a bank step, a verdict and a plan from fixed seeds and prints them as JSON.

``test_golden`` runs it in a process of its own, with every source of differing float arithmetic switched off,
and compares the result bit for bit with ``golden.json``. Moving or renaming code changes no result.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np
import torch

from pipeline import rollout
from pipeline.data.corpus import Corpus
from pipeline.guards import Cell, Evidence, GuardsConfig
from pipeline.guards.verdict import assess
from pipeline.models import ModelConfig, TailConfig, TinyConfig
from pipeline.models.trunk import features
from pipeline.rollout import Candidate, Pointer, RolloutConfig, SiteFacts
from pipeline.site import bank
from pipeline.site.methods import danet, tent
from pipeline.source import fit as fits
from pipeline.source.methods import erm, rise
from pipeline.types import Features

SIZE = 16
MODEL = ModelConfig(trunk=TinyConfig(width=4, features=8), tail=TailConfig(width=8, rank=2))


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Returns the sha256 of each tensor's bytes, and its sum as a hint of how far a difference goes."""
    return {
        name: f"{hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest()[:16]} "
        f"{t.double().sum():.9g}"
        for name, t in sorted(tensors.items())
    }


def corpus(name: str, count: int, seed: int, bona_fide: float) -> Corpus:
    """Returns frames whose depth and infrared hold a bright square for bona fide samples."""
    random = np.random.default_rng(seed)
    label = (np.arange(count) % 10 < 10 * bona_fide).astype(np.int8)
    frame = random.integers(60, 120, (count, 5, SIZE, SIZE)).astype(np.uint8)
    frame[label == 1, 3:, 4:12, 4:12] += 90
    split = np.array(["train", "train", "train", "val"])[np.arange(count) // 10 % 4]
    names = np.array([f"{name}{i}" for i in range(count)])
    pai, present = np.where(label == 1, "bona_fide", "print"), np.full(count, 7, np.uint8)
    return Corpus(name, names, split, label, pai, names, names, present, frame)


def fitted(config: object) -> fits.SourceModel:
    task = fits.Task(config, MODEL, SIZE, data={"a": "ff"}, fingerprint="f", revision="r")
    return fits.fit(task, [corpus("a", 80, 0, 0.4), corpus("b", 80, 1, 0.2), corpus("c", 40, 2, 0.6)])


def streams(model: fits.SourceModel, sites: int, samples: int) -> list[Features]:
    """Returns one shifted stream per site, seen by the model's own trunk."""
    made = []
    for k in range(sites):
        c = corpus(f"site{k}", samples, 10 + k, 0.7)
        g = torch.Generator().manual_seed(k)
        present = torch.rand(samples, 3, generator=g) > 0.2
        present[:, 0] |= ~present.any(-1)
        z = features(model.trunk, torch.from_numpy(c.frame), present) + 0.1 * k
        made.append(Features(z, present, torch.ones(samples, dtype=torch.bool), torch.arange(samples) // 2))
    return made


def bank_steps(model: fits.SourceModel, method: object) -> dict[str, str]:
    given = streams(model, sites=3, samples=24)
    start = bank.stack([method.init(model.tail) for _ in given])
    states, traces = bank.run(method, model.tail, start, given, batch=8, slots=4)
    seen = {f"trace.{n}.{k}": getattr(t, n) for k, t in enumerate(traces) for n in t._fields}
    return digest(states) | digest(seen)


def verdicts() -> dict[str, str]:
    """Returns the canonical JSON of a pass, a hold and a fail."""

    def cell(species: str, **counts: int) -> Cell:
        return Cell(
            pattern="all", species=species, **{"n": 600, "errors": 0, "worse": 0, "better": 0} | counts
        )

    good = Evidence(
        cells=(cell("print"), cell("bona_fide", n=500)),
        trust_ratio=0.01,
        margin_drop=0.1,
        stream_n=500,
        age_seconds=10.0,
        finite=True,
    )
    cases = {
        "pass": good,
        "hold": good.model_copy(update={"stream_n": 1}),
        "fail": good.model_copy(
            update={"cells": (cell("print", errors=90, worse=80), cell("bona_fide", worse=9))}
        ),
    }
    return {name: assess(GuardsConfig(), evidence).model_dump_json() for name, evidence in cases.items()}


def hash_under_first_names(plan: rollout.Plan) -> str:
    """The plan's hash with its settings called what they were called when ``golden.json`` was made."""
    content = plan.model_dump(mode="json")
    config = content["config"]
    config["two_people_from"] = config.pop("second_approval_from_share")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def planned() -> dict[str, object]:
    def candidate(i: int) -> Candidate:
        return Candidate(Pointer(f"x{i}", 1), f"v{i}", "fail" if i % 7 == 0 else "pass", "")

    sites = {
        f"s{i:03d}": SiteFacts(
            serving=Pointer(None, 1), candidate=candidate(i), tags={"zone": "EU" if i % 2 else "US"}
        )
        for i in range(60)
    }
    draft = rollout.plan("r1", sites, 1, RolloutConfig())
    return {
        "hash": hash_under_first_names(draft.plan),
        "waves": {s: t.wave for s, t in sorted(draft.targets.items())},
        "excluded": sorted(draft.excluded),
    }


def results() -> dict[str, object]:
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    torch.use_deterministic_algorithms(True)
    settings = {"steps": 12, "batch": 18, "lr": 1e-2}
    model = fitted(rise.Config(margin=0.1, compact=0.1, angle=0.1, synergy=0.1, **settings))
    plain = fitted(erm.Config(**settings))
    eager = danet.Config(
        confidence_bona_fide=0.5,
        confidence_attack=0.5,
        disagreement=1.0,
        unanimous_bona_fide=False,
        trigger=None,
        sessions=0,
    )
    return {
        "fit.rise": digest(model.tail) | digest(dict(model.trunk.state_dict())),
        "fit.erm": digest(plain.tail) | digest(dict(plain.trunk.state_dict())),
        "bank.danet": bank_steps(model, danet.Config()),
        "bank.danet.eager": bank_steps(model, eager),
        "bank.tent": bank_steps(model, tent.Config()),
        "verdict": verdicts(),
        "plan": planned(),
    }


if __name__ == "__main__":
    json.dump(results(), sys.stdout, indent=1, sort_keys=True)
