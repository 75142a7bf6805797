"""``palisade tune``: searches settings, of sites on development sites, of the source on held-out domains.

The winner becomes a YAML fragment, every trial an MLflow run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import yaml

from jobs.terminal import Exit, percent, table
from pipeline.cluster import connected
from pipeline.config import method_config
from pipeline.control.deployment import corpora, now, open_ledger, source_model
from pipeline.control.scoring import site_labels
from pipeline.data.corpus import read_manifest
from pipeline.data.features import read_features
from pipeline.lineage import Lineage, flat
from pipeline.revision import code_revision
from pipeline.storage import write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jobs.terminal import Terminal
    from pipeline.cluster.search import Trial
    from pipeline.config import Config
    from pipeline.lineage import Value

SEARCHED = {  # section → metric that trials are judged by, heading of their table
    "site": ("online_hter", "online HTER on"),
    "source": ("worst_held_out_hter", "HTER of the worst held-out domain of"),
}


def tune(config: Config, terminal: Terminal, *, what: str) -> int:
    """Searches the settings of section ``what`` ("site" or "source"); ASHA stops poor trials early."""
    if what not in SEARCHED:
        raise ValueError(f"tune {what!r}: allowed are {', '.join(SEARCHED)}")
    _check(config, what)
    trials, tags = _source_trials(config, terminal) if what == "source" else _site_trials(config, terminal)
    metric, heading = SEARCHED[what]
    best = trials[0]
    kind = getattr(config, what).model_dump()["kind"]
    fragment = yaml.safe_dump({what: {"kind": kind, **best.settings}}, sort_keys=False)
    path = config.folder("tune", f"{what}-{now():%Y%m%dT%H%M%S}.yaml")
    write_atomic(path, lambda tmp: tmp.write_text(fragment))
    _record(config, what, trials, tags, path)
    rows = [
        [i + 1, percent(t.hter), t.rungs, ", ".join(f"{k}={_short(v)}" for k, v in t.settings.items())]
        for i, t in enumerate(trials)
    ]
    data = [p.name for p in corpora(config)] if what == "source" else config.search.sites
    terminal.result(
        {
            "best": best.settings,
            metric: best.hter,
            "fragment": str(path),
            "trials": [vars(t) for t in trials],
        },
        table(f"{heading} {', '.join(data)}", ["", "HTER %", "rungs", "settings"], rows),
        f"winner: {path}; merge it into the deployment YAML",
    )
    return Exit.DONE


def _check(config: Config, what: str) -> None:
    """Raises ValueError unless the search space, and for sites the sealed labels, are declared."""
    search = config.search
    key, space = f"{what}_space", search.source_space if what == "source" else search.site_space
    if not space:
        example = f"search: {{{key}: {{lr: {{loguniform: [1e-4, 1e-2]}}}}}}"
        raise ValueError(f"search.{key}: empty; declare dimensions, e.g. {example}")
    if what == "site" and not (search.sites and config.data.sealed):
        raise ValueError(
            "search.sites and data.sealed: name development sites with sealed labels; "
            "targets are never tuned on"
        )
    kind = str(getattr(config, what).model_dump()["kind"])
    allowed = [name for name in method_config(what, kind).model_fields if name != "kind"]
    for name in space:
        if name not in allowed:
            raise ValueError(f"search.{key}.{name}: no such setting of {kind}; allowed: {', '.join(allowed)}")


def _site_trials(config: Config, terminal: Terminal) -> tuple[list[Trial], dict[str, Value]]:
    """Replays the development sites under sampled settings; returns trials, the best first, and tags."""
    from pipeline.cluster.search import Stream, search
    from pipeline.control.judge import features_of

    ledger = open_ledger(config, create=False)
    source = source_model(ledger)
    streams: list[Stream] = []
    for site in config.search.sites:
        row = ledger.streams.site(site)
        block = read_features(
            config.place("features"),
            source.trunk,
            site,
            start=0,
            end=row.ingested_offset,
            features=config.model.trunk.features,
        )
        labels = site_labels(config.data.sealed, site)
        if not labels or not len(block):
            raise ValueError(
                f"search.sites: {site} has {len(block)} ingested samples and {len(labels)} sealed labels; "
                "both are needed"
            )
        label = np.array([labels.get(s, (-1, ""))[0] for s in block.sample_id])
        streams.append(Stream(site, features_of(block), label))
    with connected(config.cluster), terminal.progress("tune site", "trials") as advance:
        trials = search(config, streams, model_path=source.path, on_progress=advance)
    return trials, {"source.version": source.version, "sites": ",".join(config.search.sites)}


def _source_trials(config: Config, terminal: Terminal) -> tuple[list[Trial], dict[str, Value]]:
    """Fits under sampled settings, each domain held out in turn; returns trials, the best first, and tags."""
    folders = corpora(config)
    with connected(config.cluster):
        from pipeline.cluster.search import search_source
        from pipeline.cluster.train import fill_stems

        with terminal.progress("stem maps", "files") as advance:
            fill_stems(config, folders, ("train", "val"), least=len(folders) - 1, on_progress=advance)
        with terminal.progress("tune source", "trials") as advance:
            runs = config.folder("tune", "runs")
            trials = search_source(config, folders, storage=runs, on_progress=advance)
    return trials, {f"data.{p.name}": read_manifest(p).digest for p in folders}


def _record(
    config: Config, what: str, trials: Sequence[Trial], tags: Mapping[str, Value], path: Path
) -> None:
    """Writes an MLflow run of the search with the fragment ``path``, and one run below it for every trial."""
    metric, _ = SEARCHED[what]
    lineage = Lineage.open(config.lineage, code_revision=code_revision())
    tags = {"fingerprint": config.fingerprint(), **tags}
    with lineage.run("tune", path.stem, params=flat(config.model_dump(mode="json")), tags=tags) as parent:
        parent.metrics({f"best_{metric}": trials[0].hter})
        parent.artifact(path)
        for i, trial in enumerate(trials):
            params = {f"{what}.{k}": v for k, v in trial.settings.items()}
            with lineage.run("tune", f"trial-{i:03d}", params=flat(params), tags={}, parent=parent.id) as run:
                run.metrics({metric: trial.hter, "rungs": trial.rungs})


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
