"""``palisade import``: reads a labelled corpus from its own layout into ``data.corpora``."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.terminal import Exit, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.data.corpus import CorpusManifest


LABELLED, RENDERED = "pipeline.data.corpora", "pipeline.simulate.corpora"


def import_corpus(
    config: Config, terminal: Terminal, *, kind: str, root: Path | None, domain: str | None
) -> int:
    """Imports one corpus; an existing domain is an error, never replaced."""
    modules = kinds()
    if kind not in modules:
        raise ValueError(f"kind: {kind!r}; allowed: {', '.join(sorted(modules))}")
    if root is None and not modules[kind].startswith(RENDERED):
        raise ValueError(
            f"import {kind}: the folder of the data set is missing; write `palisade import {kind} FOLDER`"
        )
    name = domain or kind
    out = Path(config.data.corpora) / name
    if out.exists():
        raise ValueError(f"{out}: exists; choose another --domain or remove the folder")
    corpus = import_into(config, terminal, kind=kind, root=root, name=name)
    rows = [
        [split, n, corpus.bona_fide[split], n - corpus.bona_fide[split], len(corpus.species[split])]
        for split, n in corpus.rows.items()
    ]
    shown = table(
        f"{name} ({kind}, {corpus.size} px) in {out}",
        ["split", "samples", "bona fide", "attacks", "species"],
        rows,
    )
    refused = (
        f"{corpus.rejected} items refused; reasons in {out / 'quarantine.parquet'}"
        if corpus.rejected
        else "nothing refused"
    )
    terminal.result({"domain": name, "path": str(out), **vars(corpus)}, shown, refused)
    return Exit.DONE


def import_into(
    config: Config, terminal: Terminal, *, kind: str, root: Path | None, name: str
) -> CorpusManifest:
    """Imports the data set below ``root`` as the domain ``name`` and shows the progress."""
    out = Path(config.data.corpora) / name
    with terminal.progress(f"import {name}", "items") as advance:
        return read_into(kind, root, out, domain=name, size=config.data.frame_px, progress=advance)


def kinds() -> dict[str, str]:
    """Returns the module of every importable corpus by kind: the files of two folders are the list."""
    packages = [importlib.import_module(name) for name in (LABELLED, RENDERED)]
    return {m.name: f"{p.__name__}.{m.name}" for p in packages for m in pkgutil.iter_modules(p.__path__)}


def read_into(
    kind: str,
    root: Path | None,
    out: Path,
    *,
    domain: str,
    size: int,
    progress: Callable[[int, int], None] | None = None,
) -> CorpusManifest:
    """Reads the data set of ``kind`` below ``root`` into the folder ``out``; progress gets (done, total).

    ``out`` is the folder of the domain and must not exist. A rendered kind needs no ``root``.
    """
    from pipeline.data.corpora import CorpusError, write_corpus

    if kind not in kinds():
        raise CorpusError(f"kind {kind!r}: allowed are {', '.join(sorted(kinds()))}")
    module = importlib.import_module(kinds()[kind])
    total = module.total(root)
    tick = (lambda done: progress(min(done, total), total)) if progress else None
    rows = module.rows(root, size=size)
    manifest = write_corpus(rows, out, domain=domain, kind=kind, size=size, progress=tick)
    if progress:
        progress(total, total)
    return manifest
