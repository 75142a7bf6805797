"""Counts the anchor part of a verdict's evidence again from the stored states of candidate and champion.

Counts must be equal; the two measured numbers may differ by another machine's rounding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pipeline.control.judge import anchor_scores
from pipeline.control.loaders import anchor_score_cache, load_anchor, load_model, load_state
from pipeline.control.recheck import verdict_basis
from pipeline.guards.evidence import evidence_of
from pipeline.models.tail import MOVABLE, site_state
from pipeline.site import bank
from pipeline.types import Modality

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.guards import Evidence
    from pipeline.ledger import Ledger, VerdictRow

ROUNDING = 1e-4  # relative; of what float32 sums in another order may differ by


def recount_evidence(config: Config, ledger: Ledger, row: VerdictRow, evidence: Evidence) -> Evidence:
    """Returns ``evidence`` with its anchor part counted again from the stored states.

    Raises BadBlob for a corrupt or missing blob, ValueError where no state was stored.
    """
    state = ledger.verdicts.state(row.state)
    if state is None:
        raise ValueError("no candidate was made of an empty window")
    basis = verdict_basis(ledger, row)
    model, anchor = load_model(basis.source.path), load_anchor(config.place("anchors"), basis.anchor)
    champion_row = ledger.verdicts.state(basis.champion_state)
    fresh, bases = site_state(model.tail), [f"base.{n}" for n in MOVABLE]
    learned, served = (
        load_state(config, model, s, fresh=fresh, keep=(*MOVABLE, *bases)) for s in (state, champion_row)
    )
    cache = anchor_score_cache(basis.anchor, basis.source.path)
    patterns, present = anchor.replayed()
    if evidence.rig:
        present = present & torch.tensor([m.name.lower() in evidence.rig for m in Modality])
    candidate, champion = (
        anchor_scores(model, anchor, s, cache, rig=evidence.rig) for s in (learned, served)
    )
    counted = evidence_of(
        candidate,
        champion,
        anchor.label.numpy(),
        anchor.species,
        patterns,
        model.manifest.threshold,
        trust_ratio=bank.distance(model.tail, bank.stack([learned]), 0),
        stream_n=evidence.stream_n,
        age_seconds=evidence.age_seconds or 0.0,
        stream_finite=evidence.finite,
        valid=present.any(-1).numpy(),
        holds_before=evidence.holds_before,
        rig=evidence.rig,
        unseen=evidence.unseen,
        stream=evidence.stream,
    )
    return counted.model_copy(update={"labelled": evidence.labelled, "moved": evidence.moved})


def count_differences(stored: Evidence, counted: Evidence) -> list[str]:
    """Returns the differences between stored and recounted evidence, a line each."""
    was, now = ({(c.pattern, c.species): c for c in e.cells} for e in (stored, counted))
    lines: list[str] = []
    for key in {**was, **now}:
        if (a := was.get(key)) != (b := now.get(key)):
            texts = [
                f"{c.errors} errors of {c.n}, {c.worse} worse, {c.better} better" if c else "nothing"
                for c in (a, b)
            ]
            lines.append(f"{'/'.join(key)}: {texts[0]} on record, {texts[1]} counted")
    for name in ("trust_ratio", "margin_drop"):
        a, b = getattr(stored, name), getattr(counted, name)
        if (a is None) != (b is None) or (
            a is not None and not math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING)
        ):
            lines.append(f"{name}: {a} on record, {b} counted")
    return lines
