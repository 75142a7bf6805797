"""``palisade anchor``: the labelled samples that every candidate is judged on: built, sealed by digest, verified.

Sealing the same samples under the same source model gives the same digest, so a damaged set is mended by sealing it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.control.anchor import anchor_summary, build_anchor
from pipeline.control.deployment import corpora, now, open_ledger, source_model
from pipeline.data.anchor import AnchorSet, flaws, frame_keys, open_sealed, seal
from pipeline.data.blobs import BadBlob
from pipeline.data.corpus import CorpusError, read_corpus
from pipeline.ledger import LedgerError
from pipeline.models import checkpoint

if TYPE_CHECKING:
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.data.anchor import Flaws
    from pipeline.ledger import Ledger, SourceRow

PREFIX = 8  # digits of a digest that are enough


def build(config: Config, terminal: Terminal, *, version: int | None) -> int:
    """Make the features of the labelled corpus and store them without pinning their digest."""
    ledger = open_ledger(config)
    source = source_model(ledger, version)
    anchor = build_anchor(config, checkpoint.load(source.path), terminal)
    digest = seal(config.place("anchors"), anchor)
    found = flaws(anchor, _trained(config))
    title = f"draft {digest[:12]} for source v{source.version}: {len(anchor.label)} samples of {', '.join(anchor.corpora)}"
    _show(
        terminal,
        {"digest": digest, "version": source.version},
        anchor,
        found,
        title,
        f"not sealed yet: palisade anchor seal {digest[:PREFIX]}"
        if not found.errors
        else "not fit to be sealed",
    )
    return Exit.GUARD_FAILED if found.errors else Exit.DONE


def seal_set(config: Config, terminal: Terminal, *, digest: str | None, version: int | None) -> int:
    """Pin a draft, or an earlier set again; without ``digest`` build one first."""
    ledger = open_ledger(config)
    if digest is None:
        source = source_model(ledger, version)
        anchor = build_anchor(config, checkpoint.load(source.path), terminal)
        whole = seal(config.place("anchors"), anchor)
    else:
        whole = _found(config, digest)
        anchor = open_sealed(config.place("anchors"), whole)
        source = _source_of(ledger, anchor.trunk or ledger.verdicts.anchors().get(whole, ""), whole)
    found, told = flaws(anchor, _trained(config)), {"digest": whole, "version": source.version}
    if found.errors:
        _show(
            terminal,
            told,
            anchor,
            found,
            f"anchor set {whole[:12]}",
            "not sealed; change data.anchor and build again",
        )
        return Exit.GUARD_FAILED
    ledger.verdicts.pin_anchor(whole, trunk=source.trunk, summary=anchor_summary(anchor), now=now())
    title = (
        f"anchor set {whole[:12]} sealed for source v{source.version}: {len(anchor.label)} labelled samples"
    )
    _show(terminal, told, anchor, found, title, "the next cycle is judged on it")
    return Exit.DONE


def verify(config: Config, terminal: Terminal, *, version: int | None) -> int:
    """The sealed set of a source version: its bytes, what it can show, and that nothing was trained on it."""
    ledger = open_ledger(config, create=False)
    source = ledger.sources.get(version)
    digest = ledger.verdicts.anchor(source.trunk)
    told: dict[str, object] = {
        "digest": digest,
        "version": source.version,
        "place": str(config.place("anchors")),
    }
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
        raise ValueError(
            f"{prefix!r}: give at least the first {PREFIX} digits that `palisade anchor build` printed"
        )
    folder = config.place("anchors") / prefix[:2]
    found = sorted(p.stem for p in folder.glob(f"{prefix}*.safetensors"))
    if len(found) != 1:
        what = (
            "no anchor set of that digest is stored"
            if not found
            else f"{len(found)} begin like this; give more digits"
        )
        raise ValueError(f"{prefix}: {what}; `palisade anchor build` makes one")
    return found[0]


def _source_of(ledger: Ledger, trunk: str, digest: str) -> SourceRow:
    own = [s for s in ledger.sources.all() if s.trunk == trunk]
    if not own:
        raise LedgerError(
            f"anchor set {digest[:12]}: made by a trunk of no source version; build another for this ledger"
        )
    return own[-1]


def _show(
    terminal: Terminal, told: dict[str, object], anchor: AnchorSet, found: Flaws, title: str, end: str
) -> None:
    patterns, _ = anchor.replayed()
    counts = anchor.counts()
    rows = [[species, *(seen[p] for p in patterns)] for species, seen in counts.items()]
    said = [*(f"error: {e}" for e in found.errors), *(f"warning: {w}" for w in found.warnings)]
    terminal.result(
        {
            **told,
            "items": len(anchor.label),
            "corpora": dict(anchor.corpora),
            "counts": counts,
            "errors": list(found.errors),
            "warnings": list(found.warnings),
        },
        table(title, ["samples shown by pattern", *patterns], rows),
        *said,
        end,
    )
