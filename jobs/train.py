"""``palisade train``: fits a source model on labelled corpora, seals its anchor set, records its lineage."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from jobs.terminal import Exit, percent, table
from pipeline.cluster import connected
from pipeline.control.anchor import build_and_seal
from pipeline.control.deployment import corpora, now, open_ledger
from pipeline.data.corpus import read_manifest
from pipeline.lineage import Lineage, flat
from pipeline.models import checkpoint
from pipeline.revision import code_revision

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger, SourceRow
    from pipeline.lineage import Run
    from pipeline.models.checkpoint import SourceModel
    from pipeline.storage import Place


def train(config: Config, terminal: Terminal, *, champion: bool) -> int:
    """Fits and registers a source model; with equal data and configuration it finds the first one again."""
    from pipeline.cluster.train import started

    folders = corpora(config)
    ledger = open_ledger(config)
    digests = {p.name: read_manifest(p).digest for p in folders}
    start = started(config.source.start)
    name = _name(config, digests, start)
    lineage = Lineage.open(config.lineage, code_revision=code_revision())
    tags = {
        "fingerprint": config.fingerprint(),
        "start": "".join(start),
        **{f"data.{d}": digest for d, digest in digests.items()},
    }
    with lineage.run("train", name, params=flat(config.model_dump(mode="json")), tags=tags, key=name) as run:
        path = config.place("models", name)
        if not checkpoint.exists(path):
            _fit(config, terminal, run, folders, name, path)
        model = checkpoint.load(path)
        run.metrics(model.manifest.metrics)
        with checkpoint.local_folder(path) as local:
            run.artifact(local, folder="model")
        version = _add_version(ledger, model, path, run)
        build_and_seal(config, ledger, model, terminal)
        with checkpoint.local_folder(path) as local:
            registered = lineage.register_source(
                run,
                local,
                fingerprint=config.fingerprint(),
                data=digests,
                parent=None,
                tags={"palisade.version": version},
            )
        if champion:
            ledger.sources.set_champion(version, now=now())
        is_champion = ledger.sources.champion().version == version
        lineage.set_alias("champion" if is_champion else "challenger", registered.version)
    _show(terminal, model, ledger.sources.get(version), champion=is_champion)
    return Exit.DONE


def _name(config: Config, digests: Mapping[str, str], start: Sequence[str]) -> str:
    """Returns the name of the model, which is the same for equal configuration, data and start."""
    identity = json.dumps([config.fingerprint(), digests, *start], sort_keys=True)
    return f"{config.source.kind}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _fit(config: Config, terminal: Terminal, run: Run, folders: list[Path], name: str, path: Place) -> None:
    """Fits the model into ``path`` on Ray Train and records its losses."""
    from pipeline.cluster import train as cluster_train

    with connected(config.cluster):
        with terminal.progress("stem maps", "files") as advance:
            cluster_train.fill_stems(config, folders, ("train", "val"), on_progress=advance)
        with terminal.progress(f"train {config.source.kind}", "steps") as advance:
            result = cluster_train.train(
                config, folders, storage=config.folder("train"), run_name=name, out=path, on_progress=advance
            )
    run.history({f"loss.{term}": curve for term, curve in result.history.items()})


def _add_version(ledger: Ledger, model: SourceModel, path: Place, run: Run) -> int:
    """Registers the model in the ledger and returns its version."""
    return ledger.sources.add(model.manifest, path=str(path), lineage=run.id, now=now())


def _show(terminal: Terminal, model: SourceModel, row: SourceRow, *, champion: bool) -> None:
    m = model.manifest
    rows = [[name, percent(value)] for name, value in sorted(m.metrics.items())]
    role = "champion" if champion else "challenger"
    title = f"source v{row.version} ({role}): {m.method} on {', '.join(m.domains)}"
    terminal.result(
        {
            "version": row.version,
            "role": role,
            "path": row.path,
            "digest": m.digest,
            "threshold": m.threshold,
            "metrics": m.metrics,
        },
        table(title, ["source validation", "%"], rows),
        f"threshold {m.threshold:.4f} from source validation; model in {row.path}",
    )
