"""``palisade anchor``: builds, seals and verifies the labelled samples that every candidate is judged on.

Sealing the same samples under the same source model gives the same digest, so sealing a damaged set again
mends it.
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

PREFIX = 8  # digits that name a digest


def build(config: Config, terminal: Terminal, *, version: int | None) -> int:
    """Makes the features of the labelled corpus and stores them as a draft that nothing is judged on yet."""
    ledger = open_ledger(config)
    source = source_model(ledger, version)
    anchor = build_anchor(config, checkpoint.load(source.path), terminal)
    digest = seal(config.place("anchors"), anchor)
    problems = flaws(anchor, _trained(config))
    samples = f"{len(anchor.label)} samples of {', '.join(anchor.corpora)}"
    title = f"draft {digest[:12]} for source v{source.version}: {samples}"
    _show(
        terminal,
        {"digest": digest, "version": source.version},
        anchor,
        problems,
        title,
        f"not sealed yet: palisade anchor seal {digest[:PREFIX]}"
        if not problems.errors
        else "not fit to be sealed",
    )
    return Exit.GUARD_FAILED if problems.errors else Exit.DONE


def seal_set(config: Config, terminal: Terminal, *, digest: str | None, version: int | None) -> int:
    """Pins a draft, or an earlier set again; without ``digest`` it builds one first."""
    ledger = open_ledger(config)
    if digest is None:
        source = source_model(ledger, version)
        anchor = build_anchor(config, checkpoint.load(source.path), terminal)
        whole = seal(config.place("anchors"), anchor)
    else:
        whole = _whole_digest(config, digest)
        anchor = open_sealed(config.place("anchors"), whole)
        source = _source_of(ledger, anchor.trunk or ledger.verdicts.anchors().get(whole, ""), whole)
    problems, identity = flaws(anchor, _trained(config)), {"digest": whole, "version": source.version}
    if problems.errors:
        _show(
            terminal,
            identity,
            anchor,
            problems,
            f"anchor set {whole[:12]}",
            "not sealed; change data.anchor and build again",
        )
        return Exit.GUARD_FAILED
    ledger.verdicts.pin_anchor(whole, trunk=source.trunk, summary=anchor_summary(anchor), now=now())
    title = (
        f"anchor set {whole[:12]} sealed for source v{source.version}: {len(anchor.label)} labelled samples"
    )
    _show(terminal, identity, anchor, problems, title, "the next cycle is judged on it")
    return Exit.DONE


def verify(config: Config, terminal: Terminal, *, version: int | None) -> int:
    """Checks the sealed set of a source version: its bytes, its counts, and that no training used it."""
    ledger = open_ledger(config, create=False)
    source = ledger.sources.get(version)
    digest = ledger.verdicts.anchor(source.trunk)
    identity: dict[str, object] = {
        "digest": digest,
        "version": source.version,
        "place": str(config.place("anchors")),
    }
    try:
        anchor = open_sealed(config.place("anchors"), digest)
    except BadBlob as e:
        again = f"palisade anchor seal --version {source.version}"
        terminal.result({**identity, "errors": [str(e)], "warnings": []}, f"error: {e}", f"next: {again}")
        return Exit.GUARD_FAILED
    problems = flaws(anchor, _trained(config))
    title = f"anchor set {digest[:12]} of source v{source.version}: {len(anchor.label)} labelled samples"
    end = "its bytes are those that were sealed" + (
        "; build another with `palisade anchor seal`" if problems.errors else ""
    )
    _show(terminal, identity, anchor, problems, title, end)
    return Exit.GUARD_FAILED if problems.errors else Exit.DONE


def _trained(config: Config) -> set[bytes] | None:
    """Returns the keys of all frames that a source model may have been fitted on; None without any corpus."""
    try:
        folders = corpora(config)
    except (ValueError, OSError):
        return None
    try:
        return {key for f in folders for key in frame_keys(read_corpus(f, ("train",)).frame)}
    except CorpusError as e:
        raise CorpusError(f"{e}; it is needed to see that nothing was trained on the anchor set") from None


def _whole_digest(config: Config, prefix: str) -> str:
    """Returns the whole digest of the stored set whose digest starts with ``prefix``."""
    if len(prefix) < PREFIX or not set(prefix) <= set("0123456789abcdef"):
        raise ValueError(
            f"{prefix!r}: give at least the first {PREFIX} digits that `palisade anchor build` printed"
        )
    folder = config.place("anchors") / prefix[:2]
    digests = sorted(p.stem for p in folder.glob(f"{prefix}*.safetensors"))
    if len(digests) != 1:
        what = (
            "no anchor set of that digest is stored"
            if not digests
            else f"{len(digests)} begin like this; give more digits"
        )
        raise ValueError(f"{prefix}: {what}; `palisade anchor build` makes one")
    return digests[0]


def _source_of(ledger: Ledger, trunk: str, digest: str) -> SourceRow:
    sources = [s for s in ledger.sources.all() if s.trunk == trunk]
    if not sources:
        raise LedgerError(
            f"anchor set {digest[:12]}: made by a trunk of no source version; build another for this ledger"
        )
    return sources[-1]


def _show(
    terminal: Terminal, identity: dict[str, object], anchor: AnchorSet, problems: Flaws, title: str, end: str
) -> None:
    patterns, _ = anchor.replayed()
    counts = anchor.counts()
    rows = [[species, *(count[p] for p in patterns)] for species, count in counts.items()]
    messages = [*(f"error: {e}" for e in problems.errors), *(f"warning: {w}" for w in problems.warnings)]
    terminal.result(
        {
            **identity,
            "items": len(anchor.label),
            "corpora": dict(anchor.corpora),
            "counts": counts,
            "errors": list(problems.errors),
            "warnings": list(problems.warnings),
        },
        table(title, ["samples shown by pattern", *patterns], rows),
        *messages,
        end,
    )
