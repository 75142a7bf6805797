"""``palisade import``: a labelled corpus from its own layout into ``data.corpora``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jobs import Exit, table

if TYPE_CHECKING:
    from jobs import Terminal
    from pipeline.config import Config
    from pipeline.data.corpus import CorpusManifest


def import_corpus(config: Config, terminal: Terminal, *, kind: str, root: Path | None, domain: str | None) -> int:
    """Import one corpus, replacing nothing: an existing domain is an error."""
    from pipeline.data import corpora

    if kind not in corpora.kinds():
        raise ValueError(f"kind: {kind!r}; allowed: {', '.join(corpora.kinds())}")
    if root is None and kind not in corpora.RENDERED:
        raise ValueError(f"import {kind}: the folder of the data set is missing; write `palisade import {kind} FOLDER`")
    name = domain or kind
    out = Path(config.data.corpora) / name
    if out.exists():
        raise ValueError(f"{out}: exists; choose another --domain or remove the folder")
    made = import_into(config, terminal, kind=kind, root=root, name=name)
    rows = [[split, made.rows[split], made.bona_fide[split], made.rows[split] - made.bona_fide[split], len(made.species[split])]
            for split in made.rows]  # fmt: skip
    shown = table(
        f"{name} ({kind}, {made.size} px) in {out}", ["split", "samples", "bona fide", "attacks", "species"], rows
    )
    refused = (
        f"{made.rejected} items refused; reasons in {out / 'quarantine.parquet'}"
        if made.rejected
        else "nothing refused"
    )
    terminal.result({"domain": name, "path": str(out), **vars(made)}, shown, refused)
    return Exit.DONE


def import_into(config: Config, terminal: Terminal, *, kind: str, root: Path | None, name: str) -> CorpusManifest:
    """Import ``root`` as the domain ``name`` with a progress bar."""
    from pipeline.data import corpora

    out = Path(config.data.corpora) / name
    with terminal.progress(f"import {name}", "items") as advance:
        return corpora.import_corpus(kind, root, out, domain=name, size=config.data.size, progress=advance)
