"""``palisade evaluate``: ISO/IEC 30107-3 numbers at the source-validation threshold, of a source model or of the sites."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from jobs.terminal import Exit, percent, table
from pipeline.control.deployment import check_size, open_ledger, source_model
from pipeline.control.scoring import join_labels
from pipeline.data.corpus import read_corpus
from pipeline.data.features import mask_to_bool
from pipeline.models import checkpoint
from pipeline.models.trunk import features
from pipeline.source.fit import scores
from pipeline.stats import metrics

if TYPE_CHECKING:
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger, SourceRow
    from pipeline.stats.metrics import PadReport

COLUMNS = ["HTER %", "max APCER %", "species", "BPCER %", "AUC %", "oracle EER %"]


def evaluate(config: Config, terminal: Terminal, *, version: int | None, streams: bool) -> int:
    """Score test splits, or with ``streams`` the sites before and after adaptation."""
    ledger = open_ledger(config, create=False)
    source = source_model(ledger, version)
    check_size(config, source)
    return _streams(config, terminal, ledger, source) if streams else _corpora(config, terminal, source)


def _corpora(config: Config, terminal: Terminal, source: SourceRow) -> int:
    model = checkpoint.load(source.path)
    found = sorted(p.parent for p in Path(config.data.corpora).glob("*/manifest.json"))
    if not found:
        raise ValueError(
            f"data.corpora: {config.data.corpora} holds no imported corpus; run `palisade import` first"
        )
    rows: list[list[object]] = []
    results: dict[str, object] = {}
    with terminal.progress("evaluate", "domains") as advance:
        for i, folder in enumerate(found):
            corpus = read_corpus(folder, ("test",))
            if not len(corpus):  # rendered for training alone
                continue
            present = torch.from_numpy(mask_to_bool(corpus.present))
            score = scores(
                model, features(model.trunk, torch.from_numpy(corpus.frame), present), present
            ).numpy()
            pad = metrics.report(
                score, corpus.label, corpus.pai, model.manifest.threshold, groups=corpus.video
            )
            role = "source" if folder.name in model.manifest.domains else "target"
            interval = (
                f" [{percent(pad.hter_interval.low)}, {percent(pad.hter_interval.high)}]"
                if pad.hter_interval
                else ""
            )
            rows.append([folder.name, role, f"{percent(pad.hter)}{interval}", *_cells(pad)[1:]])
            results[folder.name] = {"role": role, **_numbers(pad)}
            advance(i + 1, len(found))
    m = model.manifest
    title = f"source v{source.version} ({m.method} on {', '.join(m.domains)}), test splits, threshold from source validation"
    terminal.result(
        {"version": source.version, "method": m.method, "threshold": m.threshold, "domains": results},
        table(title, ["domain", "role", "HTER % [95 %]", *COLUMNS[1:]], rows),
    )
    return Exit.DONE


def _streams(config: Config, terminal: Terminal, ledger: Ledger, source: SourceRow) -> int:
    if not config.data.sealed:
        raise ValueError("data.sealed: not set; it names the folder of <site>-labels.parquet")
    threshold = float(str(source.manifest["threshold"]))
    rows: list[list[object]] = []
    results: dict[str, object] = {}
    for row in ledger.streams.sites():
        judged = ledger.verdicts.find(site=row.site)
        made = ledger.verdicts.states([v.state for v in judged])
        mine = [v for v in judged if v.state and made[v.state].source_version == source.version]
        joined = join_labels(config, source, mine)
        if joined is None or (before := joined.pad("before", threshold)) is None:
            rows.append([row.site, *["-"] * 8])
            continue
        online, after = joined.pad("online", threshold), joined.pad("after", threshold)
        assert online and after
        rows.append(
            [
                row.site,
                before.n_bona_fide + before.n_attack,
                *(percent(p.hter) for p in (before, online, after)),
                f"{percent(before.max_apcer)} → {percent(online.max_apcer)}",
                online.worst_species,
                f"{percent(before.bpcer)} → {percent(online.bpcer)}",
                percent(online.auc),
            ]
        )
        results[row.site] = {"before": _numbers(before), "online": _numbers(online), "after": _numbers(after)}
    if not results:
        raise ValueError(
            f"data.sealed: no label in {config.data.sealed} belongs to a sample that was adapted on; run `palisade adapt` first"
        )
    columns = [
        "site",
        "labelled",
        "HTER % before",
        "online",
        "after",
        "max APCER % before → online",
        "species",
        "BPCER % before → online",
        "AUC %",
    ]
    which = ("before", "online", "after")
    mean = {k: float(np.mean([r[k]["hter"] for r in results.values()])) for k in which}  # pyright: ignore
    said = "mean HTER {before:.1%} before, {online:.1%} online (scored before it was used), {after:.1%} by the candidates".format(
        **mean
    )
    terminal.result(
        {"version": source.version, "sites": results, "mean_hter": mean},
        table("sites with sealed labels", columns, rows),
        said,
    )
    return Exit.DONE


def _cells(pad: PadReport) -> list[object]:
    return [
        percent(pad.hter),
        percent(pad.max_apcer),
        pad.worst_species,
        percent(pad.bpcer),
        percent(pad.auc),
        percent(pad.eer),
    ]


def _numbers(pad: PadReport) -> dict[str, object]:
    found = {
        k: getattr(pad, k)
        for k in ("hter", "max_apcer", "worst_species", "bpcer", "auc", "eer", "n_attack", "n_bona_fide")
    }
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}
