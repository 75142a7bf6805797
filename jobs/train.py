"""``palisade train``: labelled corpora → a source model, its sealed anchor set, its lineage."""

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
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import SourceRow
    from pipeline.models.checkpoint import SourceModel


def train(config: Config, terminal: Terminal, *, champion: bool) -> int:
    """Fit, seal the anchor set, register. A repeated call with equal data and config finds the finished model."""
    from pipeline.cluster import train as cluster_train

    folders = corpora(config)
    ledger = open_ledger(config)
    digests = {p.name: read_manifest(p).digest for p in folders}
    start = cluster_train.started(config.source.start)
    key = hashlib.sha256(
        json.dumps([config.fingerprint(), digests, *start], sort_keys=True).encode()
    ).hexdigest()[:12]
    name = f"{config.source.kind}-{key}"
    lineage = Lineage.open(config.lineage, code_revision=code_revision())
    tags = {
        "fingerprint": config.fingerprint(),
        "start": "".join(start),
        **{f"data.{d}": digest for d, digest in digests.items()},
    }
    with lineage.run("train", name, params=flat(config.model_dump(mode="json")), tags=tags, key=name) as run:
        path = config.place("models", name)
        if not checkpoint.exists(path):
            with (
                connected(config.cluster),
                terminal.progress(f"train {config.source.kind}", "steps") as advance,
            ):
                result = cluster_train.train(
                    config,
                    folders,
                    storage=config.folder("train"),
                    run_name=name,
                    out=path,
                    on_progress=advance,
                )
            run.history({f"loss.{term}": curve for term, curve in result.history.items()})
        model = checkpoint.load(path)
        run.metrics(model.manifest.metrics)
        with checkpoint.local_folder(path) as local:
            run.artifact(local, folder="model")
        facts = model.manifest.model_dump(mode="json")
        version = ledger.sources.add(
            model.manifest.digest,
            trunk=model.manifest.trunk_digest,
            path=str(path),
            manifest=facts,
            lineage=run.id,
            now=now(),
        )
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
        crowned = ledger.sources.champion().version
        lineage.set_alias("champion" if crowned == version else "challenger", registered.version)
    _show(terminal, model, ledger.sources.get(version), champion=crowned == version)
    return Exit.DONE


def _show(terminal: Terminal, model: SourceModel, row: SourceRow, *, champion: bool) -> None:
    m = model.manifest
    rows = [[name, percent(value)] for name, value in sorted(m.metrics.items())]
    role = "champion" if champion else "challenger"
    terminal.result(
        {
            "version": row.version,
            "role": role,
            "path": row.path,
            "digest": m.digest,
            "threshold": m.threshold,
            "metrics": m.metrics,
        },
        table(
            f"source v{row.version} ({role}): {m.method} on {', '.join(m.domains)}",
            ["source validation", "%"],
            rows,
        ),
        f"threshold {m.threshold:.4f} at the source-validation EER; model in {row.path}",
    )
