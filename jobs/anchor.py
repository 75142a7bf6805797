"""``palisade anchor``: the labelled samples that every candidate is judged on: built, sealed by digest, verified.

Sealing the same samples under the same source model gives the same digest, so a damaged set is mended by sealing it again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from jobs import Exit, table
from jobs.deployment import corpora, now, open_ledger, source_model
from pipeline.cluster.judge import anchor_scores
from pipeline.data.anchor import AnchorSet, flaws, frame_keys, open_sealed, seal
from pipeline.data.blobs import BadBlob
from pipeline.data.corpus import CorpusError, read_corpus, read_manifest
from pipeline.data.features import mask_to_bool
from pipeline.guards import evidence_of
from pipeline.ledger import LedgerError
from pipeline.models import checkpoint
from pipeline.models.trunk import features

if TYPE_CHECKING:
    from jobs import Terminal
    from pipeline.config import Config
    from pipeline.data.anchor import Flaws
    from pipeline.guards import Evidence
    from pipeline.ledger import Ledger, SourceRow
    from pipeline.models.checkpoint import SourceModel

PREFIX = 8  # digits of a digest that are enough


def build(config: Config, terminal: Terminal, *, version: int | None) -> int:
    """Make the features of the labelled corpus and store them without pinning their digest."""
    ledger = open_ledger(config)
    source = source_model(ledger, version)
    anchor = built(config, checkpoint.load(source.path), terminal)
    digest = seal(config.place("anchors"), anchor)
    found = flaws(anchor, _trained(config))
    title = (
        f"draft {digest[:12]} for source v{source.version}: {len(anchor.label)} samples of {', '.join(anchor.corpora)}"
    )
    _show(terminal, {"digest": digest, "version": source.version}, anchor, found, title,
          f"not sealed yet: palisade anchor seal {digest[:PREFIX]}" if not found.errors else "not fit to be sealed")  # fmt: skip
    return Exit.GUARD_FAILED if found.errors else Exit.DONE


def seal_set(config: Config, terminal: Terminal, *, digest: str | None, version: int | None) -> int:
    """Pin a draft, or an earlier set again; without ``digest`` build one first."""
    ledger = open_ledger(config)
    if digest is None:
        source = source_model(ledger, version)
        anchor = built(config, checkpoint.load(source.path), terminal)
        whole = seal(config.place("anchors"), anchor)
    else:
        whole = _found(config, digest)
        anchor = open_sealed(config.place("anchors"), whole)
        source = _source_of(ledger, anchor.trunk or ledger.anchors().get(whole, ""), whole)
    found, told = flaws(anchor, _trained(config)), {"digest": whole, "version": source.version}
    if found.errors:
        _show(
            terminal, told, anchor, found, f"anchor set {whole[:12]}", "not sealed; change data.anchor and build again"
        )
        return Exit.GUARD_FAILED
    ledger.pin_anchor(whole, trunk=source.trunk, summary=summary(anchor), now=now())
    title = f"anchor set {whole[:12]} sealed for source v{source.version}: {len(anchor.label)} labelled samples"
    _show(terminal, told, anchor, found, title, "the next cycle is judged on it")
    return Exit.DONE


def verify(config: Config, terminal: Terminal, *, version: int | None) -> int:
    """The sealed set of a source version: its bytes, what it can show, and that nothing was trained on it."""
    ledger = open_ledger(config, create=False)
    source = ledger.source(version)
    digest = ledger.anchor(source.trunk)
    told: dict[str, object] = {"digest": digest, "version": source.version, "place": str(config.place("anchors"))}
    try:
        anchor = open_sealed(config.place("anchors"), digest)
    except BadBlob as e:
        again = f"palisade anchor seal --version {source.version}"
        terminal.result({**told, "errors": [str(e)], "warnings": []}, f"error: {e}", f"next: {again}")
        return Exit.GUARD_FAILED
    found = flaws(anchor, _trained(config))
    title = f"anchor set {digest[:12]} of source v{source.version}: {len(anchor.label)} labelled samples"
    end = "its bytes are those that were sealed" + (
        "; build another with `palisade anchor seal`" if found.errors else ""
    )
    _show(terminal, told, anchor, found, title, end)
    return Exit.GUARD_FAILED if found.errors else Exit.DONE


def seal_built(config: Config, ledger: Ledger, model: SourceModel, terminal: Terminal | None = None) -> str:
    """Build, store and pin the anchor set of ``model`` → its digest; what `train` and a release of a new source do."""
    anchor = built(config, model, terminal)
    digest = seal(config.place("anchors"), anchor)
    ledger.pin_anchor(digest, trunk=model.manifest.trunk_digest, summary=summary(anchor), now=now())
    if terminal:
        species = len({s for s, y in zip(anchor.species, anchor.label.tolist(), strict=True) if not y})
        terminal.say(
            f"anchor set {digest[:12]} sealed: {len(anchor.label)} labelled samples of {species} attack species"
        )
    return digest


def built(config: Config, model: SourceModel, terminal: Terminal | None = None) -> AnchorSet:
    """The samples of data.anchor, or of the test splits of data.domains, as ``model`` sees them. Nothing is stored."""
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
    if terminal:
        terminal.say(f"features of {len(label)} labelled samples of {', '.join(c.domain for c in sets)}")
    z = features(model.trunk, torch.from_numpy(frames), present)
    species = tuple(str(s) for c in sets for s in c.pai)
    origin = {read_manifest(f).domain: read_manifest(f).digest for f in folders}
    return AnchorSet(z, present, label, species, key, model.manifest.trunk_digest, origin)


def summary(anchor: AnchorSet) -> dict[str, object]:
    """What the ledger keeps of a sealed set."""
    names, counts = np.unique(anchor.species, return_counts=True)
    return {
        "items": len(anchor.label),
        "species": {str(n): int(k) for n, k in zip(names, counts, strict=True)},
        "corpora": dict(anchor.corpora),
    }


def compare_sources(config: Config, ledger: Ledger, old: SourceRow, new: SourceRow) -> Evidence:
    """The bare source model ``new`` as candidate against ``old``, each at its own threshold, on the anchor samples of both.

    Seals the set of a trunk that has none. Raises LedgerError when the two sealed sets share no sample.
    """
    models = [checkpoint.load(source_model(ledger, row.version).path) for row in (old, new)]
    sets = [_sealed_or_built(config, ledger, model) for model in models]
    places = [{key: i for i, key in enumerate(s.keys())} for s in sets]
    shared = [key for key in places[0] if key in places[1]]
    if not shared:
        raise LedgerError(
            f"the anchor sets of source v{old.version} and v{new.version} share no sample; seal both anew from one corpus "
            f"with `palisade anchor seal --version {old.version}` and `--version {new.version}`"
        )
    rows = [[place[key] for key in shared] for place in places]
    stable, candidate = (
        anchor_scores(model, s, model.tail, {})[:, r] for model, s, r in zip(models, sets, rows, strict=True)
    )
    patterns, present = sets[1].replayed()
    return evidence_of(
        candidate, stable, sets[1].label.numpy()[rows[1]], [sets[1].species[i] for i in rows[1]], patterns,
        models[1].manifest.threshold, stable_threshold=models[0].manifest.threshold, trust_ratio=0.0,
        stream_n=0, age_seconds=0.0, valid=present.any(-1).numpy()[:, rows[1]],
    )  # fmt: skip


def _sealed_or_built(config: Config, ledger: Ledger, model: SourceModel) -> AnchorSet:
    try:
        digest = ledger.anchor(model.manifest.trunk_digest)
    except LedgerError:
        digest = seal_built(config, ledger, model)
    return open_sealed(config.place("anchors"), digest)


def _trained(config: Config) -> set[bytes] | None:
    """Keys of every frame that a source model may have been fitted on; None where no corpus is left."""
    try:
        folders = corpora(config)
    except (ValueError, OSError):
        return None
    try:
        return {key for f in folders for key in frame_keys(read_corpus(f, ("train",)).frame)}
    except CorpusError as e:
        raise CorpusError(f"{e}; it is needed to see that nothing was trained on the anchor set") from None


def _found(config: Config, prefix: str) -> str:
    """The whole digest of a stored set."""
    if len(prefix) < PREFIX or not set(prefix) <= set("0123456789abcdef"):
        raise ValueError(f"{prefix!r}: give at least the first {PREFIX} digits that `palisade anchor build` printed")
    folder = config.place("anchors") / prefix[:2]
    found = sorted(p.stem for p in folder.glob(f"{prefix}*.safetensors"))
    if len(found) != 1:
        what = (
            "no anchor set of that digest is stored" if not found else f"{len(found)} begin like this; give more digits"
        )
        raise ValueError(f"{prefix}: {what}; `palisade anchor build` makes one")
    return found[0]


def _source_of(ledger: Ledger, trunk: str, digest: str) -> SourceRow:
    own = [s for s in ledger.sources() if s.trunk == trunk]
    if not own:
        raise LedgerError(
            f"anchor set {digest[:12]}: made by a trunk of no source version; build another for this ledger"
        )
    return own[-1]


def _show(
    terminal: Terminal, told: dict[str, object], anchor: AnchorSet, found: Flaws, title: str, end: str
) -> None:  # fmt: skip
    patterns, _ = anchor.replayed()
    counts = anchor.counts()
    rows = [[species, *(seen[p] for p in patterns)] for species, seen in counts.items()]
    said = [*(f"error: {e}" for e in found.errors), *(f"warning: {w}" for w in found.warnings)]
    terminal.result(
        {**told, "items": len(anchor.label), "corpora": dict(anchor.corpora), "counts": counts,
         "errors": list(found.errors), "warnings": list(found.warnings)},
        table(title, ["samples shown by pattern", *patterns], rows), *said, end,
    )  # fmt: skip
