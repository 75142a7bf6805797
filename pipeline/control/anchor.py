"""Builds and seals the anchor set of a source model, and compares two source models on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.control.deployment import corpora, now, source_model
from pipeline.control.judge import anchor_scores
from pipeline.data.anchor import AnchorSet, frame_keys, open_sealed, seal
from pipeline.data.corpus import read_corpus, read_manifest
from pipeline.data.features import mask_to_bool
from pipeline.guards.evidence import evidence_of
from pipeline.ledger import LedgerError
from pipeline.models import checkpoint
from pipeline.models.trunk import features

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.control.deployment import Reporter
    from pipeline.guards import Evidence
    from pipeline.ledger import Ledger, SourceRow
    from pipeline.models.checkpoint import SourceModel


def build_and_seal(
    config: Config, ledger: Ledger, model: SourceModel, reporter: Reporter | None = None
) -> str:
    """Builds, stores and pins the anchor set of ``model``; returns its digest."""
    anchor = build_anchor(config, model, reporter)
    digest = seal(config.place("anchors"), anchor)
    ledger.verdicts.pin_anchor(
        digest, trunk=model.manifest.trunk_digest, summary=anchor_summary(anchor), now=now()
    )
    if reporter:
        species = len({s for s, y in zip(anchor.species, anchor.label.tolist(), strict=True) if not y})
        reporter.say(
            f"anchor set {digest[:12]} sealed: {len(anchor.label)} labelled samples of {species} attack "
            "species"
        )
    return digest


def build_anchor(config: Config, model: SourceModel, reporter: Reporter | None = None) -> AnchorSet:
    """Returns data.anchor, or the test splits of data.domains, as ``model`` sees them; stores nothing."""
    folders = [Path(config.data.anchor)] if config.data.anchor else corpora(config)
    size = model.manifest.size
    for folder in folders:
        if (found := read_manifest(folder).size) != size:
            raise ValueError(
                f"{folder}: imported at {found}, but the source model was trained at {size}; import it again"
            )
    sets = [read_corpus(f) if config.data.anchor else read_corpus(f, ("test",)) for f in folders]
    label = torch.from_numpy(np.concatenate([c.label for c in sets]).astype(np.int8))
    if not len(label):
        raise ValueError("data.anchor: no labelled sample to seal; import a corpus with a test split")
    frames = np.concatenate([c.frame for c in sets])
    present = torch.from_numpy(mask_to_bool(np.concatenate([c.present for c in sets])))
    key = torch.from_numpy(np.frombuffer(b"".join(frame_keys(frames)), np.uint8).reshape(-1, 32).copy())
    if reporter:
        reporter.say(f"features of {len(label)} labelled samples of {', '.join(c.domain for c in sets)}")
    z = features(model.trunk, torch.from_numpy(frames), present)
    species = tuple(str(s) for c in sets for s in c.pai)
    origin = {read_manifest(f).domain: read_manifest(f).digest for f in folders}
    return AnchorSet(z, present, label, species, key, model.manifest.trunk_digest, origin)


def anchor_summary(anchor: AnchorSet) -> dict[str, object]:
    """Returns what the ledger keeps of a sealed set."""
    names, counts = np.unique(anchor.species, return_counts=True)
    return {
        "items": len(anchor.label),
        "species": {str(n): int(k) for n, k in zip(names, counts, strict=True)},
        "corpora": dict(anchor.corpora),
    }


def compare_sources(config: Config, ledger: Ledger, old: SourceRow, new: SourceRow) -> Evidence:
    """Returns the evidence on source model ``new`` against ``old`` on the anchor samples that both have.

    Each is judged at its own threshold. Seals the set of a trunk that has none. Raises LedgerError when the
    two sealed sets share no sample.
    """
    models = [checkpoint.load(source_model(ledger, row.version).path) for row in (old, new)]
    sets = [_sealed_or_built(config, ledger, model) for model in models]
    places = [{key: i for i, key in enumerate(s.keys())} for s in sets]
    shared = [key for key in places[0] if key in places[1]]
    if not shared:
        raise LedgerError(
            f"the anchor sets of source v{old.version} and v{new.version} share no sample; seal both "
            "anew from one corpus "
            f"with `palisade anchor seal --version {old.version}` and `--version {new.version}`"
        )
    rows = [[place[key] for key in shared] for place in places]
    champion, candidate = (
        anchor_scores(model, s, model.tail, {})[:, r] for model, s, r in zip(models, sets, rows, strict=True)
    )
    patterns, present = sets[1].replayed()
    return evidence_of(
        candidate,
        champion,
        sets[1].label.numpy()[rows[1]],
        [sets[1].species[i] for i in rows[1]],
        patterns,
        models[1].manifest.threshold,
        champion_threshold=models[0].manifest.threshold,
        trust_ratio=0.0,
        stream_n=0,
        age_seconds=0.0,
        valid=present.any(-1).numpy()[:, rows[1]],
    )


def _sealed_or_built(config: Config, ledger: Ledger, model: SourceModel) -> AnchorSet:
    try:
        digest = ledger.verdicts.anchor(model.manifest.trunk_digest)
    except LedgerError:
        digest = build_and_seal(config, ledger, model)
    return open_sealed(config.place("anchors"), digest)
