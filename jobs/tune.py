"""``palisade tune``: search site hyper-parameters on development sites; the winner is a YAML fragment, the trials MLflow runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import yaml

from jobs import Exit, percent, table
from jobs.deployment import now, open_ledger, source_model
from jobs.scoring import labels_of
from pipeline.cluster import connected
from pipeline.config import method_config
from pipeline.data.blobs import write_atomic
from pipeline.data.features import read_features
from pipeline.lineage import Lineage, flat
from pipeline.revision import code_revision

if TYPE_CHECKING:
    from jobs import Terminal
    from pipeline.config import Config


def tune(config: Config, terminal: Terminal) -> int:
    """Replay the development sites under sampled settings, ASHA stops the poor ones early."""
    from pipeline.cluster.search import Stream, search
    from pipeline.cluster.shard import features_of

    _check(config)
    ledger = open_ledger(config, create=False)
    source = source_model(ledger)
    streams: list[Stream] = []
    for site in config.search.sites:
        row = ledger.site(site)
        block = read_features(
            config.place("features"),
            source.trunk,
            site,
            start=0,
            end=row.ingested,
            features=config.model.trunk.features,
        )
        labels = labels_of(config.data.sealed, site)
        if not labels or not len(block):
            raise ValueError(
                f"search.sites: {site} has {len(block)} ingested samples and {len(labels)} sealed labels; both are needed"
            )
        streams.append(
            Stream(site, features_of(block), np.array([labels.get(s, (-1, ""))[0] for s in block.sample_id]))
        )
    with connected(config.cluster), terminal.progress("tune", "trials") as advance:
        trials = search(config, streams, model_path=source.path, on_progress=advance)
    best = trials[0]
    fragment = yaml.safe_dump({"site": {"kind": config.site.model_dump()["kind"], **best.settings}}, sort_keys=False)
    path = config.place("tune", f"{now():%Y%m%dT%H%M%S}.yaml")
    write_atomic(path, lambda tmp: tmp.write_text(fragment))
    lineage = Lineage.open(config.lineage, code_revision=code_revision())
    tags = {
        "fingerprint": config.fingerprint(),
        "source.version": source.version,
        "sites": ",".join(config.search.sites),
    }
    with lineage.run("tune", path.stem, params=flat(config.model_dump(mode="json")), tags=tags) as parent:
        parent.metrics({"best_online_hter": best.hter})
        parent.artifact(path)
        for i, trial in enumerate(trials):
            params = {f"site.{k}": v for k, v in trial.settings.items()}
            with lineage.run("tune", f"trial-{i:03d}", params=flat(params), tags={}, parent=parent.id) as run:
                run.metrics({"online_hter": trial.hter, "rungs": trial.rungs})
    rows = [
        [i + 1, percent(t.hter), t.rungs, ", ".join(f"{k}={_short(v)}" for k, v in t.settings.items())]
        for i, t in enumerate(trials)
    ]
    terminal.result(
        {"best": best.settings, "online_hter": best.hter, "fragment": str(path), "trials": [vars(t) for t in trials]},
        table(f"online HTER on {', '.join(config.search.sites)}", ["", "HTER %", "rungs", "settings"], rows),
        f"winner: {path}; merge it into the deployment YAML",
    )
    return Exit.DONE


def _check(config: Config) -> None:
    if not config.search.space:
        raise ValueError(
            "search.space: empty; declare dimensions, e.g. search: {space: {lr: {loguniform: [1e-4, 1e-2]}}}"
        )
    if not config.search.sites or not config.data.sealed:
        raise ValueError(
            "search.sites and data.sealed: name development sites with sealed labels; targets are never tuned on"
        )
    kind = str(config.site.model_dump()["kind"])
    allowed = method_config("site", kind).model_fields
    for name in config.search.space:
        if name not in allowed or name == "kind":
            raise ValueError(
                f"search.space.{name}: no such setting of {kind}; allowed: {', '.join(k for k in allowed if k != 'kind')}"
            )


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
