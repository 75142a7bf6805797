"""``palisade evaluate``: ISO 30107-3 error rates of a source model or of sites, at the deployed threshold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
    from pipeline.models.checkpoint import SourceModel
    from pipeline.stats.metrics import PadReport

CORPUS_COLUMNS = [
    *("domain", "role", "HTER % [95 %]", "max APCER %", "species", "BPCER %", "AUC %", "oracle EER %")
]
STREAM_COLUMNS = [
    *("site", "labelled", "HTER % before", "online", "after"),
    *("max APCER % before → online", "species", "BPCER % before → online", "AUC %"),
]
METRICS = ("hter", "max_apcer", "worst_species", "bpcer", "auc", "eer", "n_attack", "n_bona_fide")


class StreamResult(NamedTuple):
    """Error rates of one site's labelled samples, scored by three states."""

    before: PadReport  # the state that the site started its window with
    online: PadReport  # the adapting state, each sample scored before it was learned from
    after: PadReport  # the candidate

    def to_json(self) -> dict[str, dict[str, object]]:
        """Returns the numbers by state."""
        return {name: _numbers(pad) for name, pad in self._asdict().items()}


def evaluate(config: Config, terminal: Terminal, *, version: int | None, streams: bool) -> int:
    """Scores test splits, or with ``streams`` the sites' streams before and after adaptation."""
    ledger = open_ledger(config, create=False)
    source = source_model(ledger, version)
    check_size(config, source)
    return _streams(config, terminal, ledger, source) if streams else _corpora(config, terminal, source)


def _corpora(config: Config, terminal: Terminal, source: SourceRow) -> int:
    model = checkpoint.load(source.path)
    folders = sorted(p.parent for p in Path(config.data.corpora).glob("*/manifest.json"))
    if not folders:
        raise ValueError(
            f"data.corpora: {config.data.corpora} holds no imported corpus; run `palisade import` first"
        )
    rows: list[list[object]] = []
    results: dict[str, object] = {}
    with terminal.progress("evaluate", "domains") as advance:
        for i, folder in enumerate(folders):
            pad = _corpus_result(model, folder)
            if pad is not None:
                role = "source" if folder.name in model.manifest.domains else "target"
                rows.append([folder.name, role, *_cells(pad)])
                results[folder.name] = {"role": role, **_numbers(pad)}
            advance(i + 1, len(folders))
    m = model.manifest
    title = (
        f"source v{source.version} ({m.method} on {', '.join(m.domains)}), test splits, "
        "threshold from source validation"
    )
    terminal.result(
        {"version": source.version, "method": m.method, "threshold": m.threshold, "domains": results},
        table(title, CORPUS_COLUMNS, rows),
    )
    return Exit.DONE


def _corpus_result(model: SourceModel, folder: Path) -> PadReport | None:
    """Returns the error rates on a corpus's test split; None if it has no such split."""
    corpus = read_corpus(folder, ("test",))
    if not len(corpus):
        return None
    present = torch.from_numpy(mask_to_bool(corpus.present))
    frames = features(model.trunk, torch.from_numpy(corpus.frame), present)
    score = scores(model, frames, present).numpy()
    return metrics.report(score, corpus.label, corpus.pai, model.manifest.threshold, groups=corpus.video)


def _streams(config: Config, terminal: Terminal, ledger: Ledger, source: SourceRow) -> int:
    if not config.data.sealed:
        raise ValueError("data.sealed: not set; it names the folder of <site>-labels.parquet")
    rows: list[list[object]] = []
    results: dict[str, StreamResult] = {}
    for row in ledger.streams.sites():
        result = _stream_result(config, ledger, source, row.site)
        if result is None:
            rows.append([row.site, *["-"] * (len(STREAM_COLUMNS) - 1)])
            continue
        rows.append([row.site, *_stream_cells(result)])
        results[row.site] = result
    if not results:
        raise ValueError(
            f"data.sealed: no label in {config.data.sealed} belongs to a sample that was adapted on; "
            "run `palisade adapt` first"
        )
    mean = {
        state: float(np.mean([getattr(r, state).hter for r in results.values()]))
        for state in StreamResult._fields
    }
    terminal.result(
        {
            "version": source.version,
            "sites": {site: r.to_json() for site, r in results.items()},
            "mean_hter": mean,
        },
        table("sites with sealed labels", STREAM_COLUMNS, rows),
        f"mean HTER {mean['before']:.1%} before, {mean['online']:.1%} online (scored before it was used), "
        f"{mean['after']:.1%} by the candidates",
    )
    return Exit.DONE


def _stream_result(config: Config, ledger: Ledger, source: SourceRow, site: str) -> StreamResult | None:
    """Returns the error rates of a site's windows under ``source``; None without labelled samples."""
    threshold = source.manifest.threshold
    verdicts = ledger.verdicts.find(site=site)
    states = ledger.verdicts.states([v.state for v in verdicts])
    of_source = [v for v in verdicts if v.state and states[v.state].source_version == source.version]
    stream = join_labels(config, source, of_source)
    if stream is None or (before := stream.pad("before", threshold)) is None:
        return None
    online, after = stream.pad("online", threshold), stream.pad("after", threshold)
    assert online and after
    return StreamResult(before, online, after)


def _stream_cells(r: StreamResult) -> list[object]:
    return [
        r.before.n_bona_fide + r.before.n_attack,
        *(percent(pad.hter) for pad in r),
        f"{percent(r.before.max_apcer)} → {percent(r.online.max_apcer)}",
        r.online.worst_species,
        f"{percent(r.before.bpcer)} → {percent(r.online.bpcer)}",
        percent(r.online.auc),
    ]


def _cells(pad: PadReport) -> list[object]:
    interval = pad.hter_interval
    span = f" [{percent(interval.low)}, {percent(interval.high)}]" if interval else ""
    rates = (percent(pad.bpcer), percent(pad.auc), percent(pad.eer))
    return [f"{percent(pad.hter)}{span}", percent(pad.max_apcer), pad.worst_species, *rates]


def _numbers(pad: PadReport) -> dict[str, object]:
    numbers = {name: getattr(pad, name) for name in METRICS}
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in numbers.items()}
