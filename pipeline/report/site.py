"""What the stream benchmark of site adaptation found, as plain numbers; ``render`` turns a SiteBench into one
HTML file.

Rates and shares are in [0, 1], rises are differences of rates; NaN and None mean not measured. Every string
may be hostile: the page escapes all of them. Every sample is scored before it is learned from, at the
source's threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pipeline.report import plots, timelines
from pipeline.report.page import environment, publish
from pipeline.stats.metrics import HARM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import datetime
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.report.content import Figure, Timeline
    from pipeline.stats.intervals import Estimate

    Floats = NDArray[np.float64]

Row = TypeVar("Row")
OURS, BASELINE = "danet", "frozen"
SECTIONS = (
    "figures",
    "methods",
    "streams",
    "timelines",
    "one_class",
    "poison",
    "missing",
    "ablation",
    "additions",
    "context",
)
GROUPS = ("shifted", "one-class", "clean", "unseen", "missing", "poisoning")  # order of the page
LIMIT = 0.005  # that poison may raise the worst species' APCER by
METHODS = {
    "frozen": "the source model as it is; it never learns and is what all others are held against",
    "recalibrate": "no weight moves: the threshold follows the site's share of bona fide, estimated "
    "from the scores",
    "tent": "minimises the entropy of its predictions (Wang et al., 2021)",
    "eata": "entropy on reliable samples, anchored by the Fisher information (Niu et al., 2022)",
    "sar": "sharpness-aware entropy, with recovery of the source (Niu et al., 2023)",
    "cotta": "learns from its own slow mean and forgets back to the source by chance (Wang et al., 2022)",
    "shot": "information maximisation and centroid pseudo labels (Liang et al., 2020)",
    "read": "adapts the fusion with a loss that gives up on doubtful samples (Yang et al., 2024)",
    "drm": "weighs the source domains' boundaries by their certainty, without a gradient (Zhang et "
    "al., 2023)",
    "danet": "complementary features, reliable pseudo labels, a loss weight that follows stability "
    "(MFAS-DANet style)",
}


@dataclass(frozen=True)
class MethodRow:
    """One method over the shifted streams and seeds."""

    method: str
    hter: Estimate  # mean online HTER
    below_frozen: float  # 1 - HTER / frozen's
    worst_site: str
    worst_rise: float  # largest mean rise of a site's HTER over frozen
    harmed: float  # share of sites harmed by more than 1 point
    bpcer: float
    max_apcer: float  # mean over streams of the worst species' APCER
    precision_bona_fide: float  # of pseudo labels
    precision_attack: float
    # samples after a sudden change until the error is back within 1 point; inf: it did not come back
    recovery: float
    forgetting: float  # HTER on source validation after the streams - before
    cost: float  # time of a step / forward only


@dataclass(frozen=True)
class StreamCell:
    """One method on one stream."""

    hter: float
    bpcer: float
    max_apcer: float
    worst_species: str


@dataclass(frozen=True)
class StreamRow:
    """One stream under all methods; the oracle chose its threshold for frozen scores on the stream itself."""

    stream: str
    group: str
    what: str
    samples: int
    oracle_eer: float
    cells: dict[str, StreamCell]  # by method


@dataclass(frozen=True)
class PoisonRow:
    """One method on one poisoned stream; errors on a labelled probe after it."""

    stream: str
    what: str
    share: float  # of poisoned samples
    method: str
    rise: float  # worst species' APCER - frozen's
    online_apcer: float
    stopped_after: float | None  # poisoned samples until the state last changed; None: it did not stop


@dataclass(frozen=True)
class OneClassRow:
    """One method at a door that sees almost one class only, then a burst of attacks."""

    stream: str
    prior: float  # share of bona fide before the burst
    method: str
    bpcer_rise: float
    apcer_rise: float
    burst_apcer: float
    burst_apcer_frozen: float


@dataclass(frozen=True)
class MissingRow:
    """What stands in for a modality that is not there."""

    fill: str
    hter: float
    bpcer: float
    max_apcer: float


@dataclass(frozen=True)
class AblationCell:
    """One combination of the three parts of the method."""

    fill: str
    labels: str
    weight: str
    hter: float
    worst_rise: float


@dataclass(frozen=True)
class AdditionRow:
    """The method with one of our own additions changed."""

    name: str
    what: str
    hter: float
    below_frozen: float
    worst_rise: float
    poison_rise: float
    one_class_rise: float


@dataclass(frozen=True)
class SiteBench:
    """Everything that the page of a stream benchmark shows;
    a section without data is replaced by its reason.
    """

    created: datetime
    context: dict[str, str]
    figures: tuple[Figure, ...]
    methods: tuple[MethodRow, ...]
    streams: tuple[StreamRow, ...]
    timelines: tuple[Timeline, ...]
    one_class: tuple[OneClassRow, ...]
    poison: tuple[PoisonRow, ...]
    missing: tuple[MissingRow, ...]
    ablation: tuple[AblationCell, ...]
    additions: tuple[AdditionRow, ...]
    omitted: dict[str, str]  # section -> why it is not there


def render(bench: SiteBench) -> str:
    """The whole page; methods come best first, in wide tables the baseline and ours before the others."""
    assert set(bench.omitted) <= set(SECTIONS), bench.omitted
    rows = sorted(bench.methods, key=lambda m: (np.isnan(m.hter[0]), m.hter[0]))
    named = dict.fromkeys(m.method for m in rows) | dict.fromkeys(m for t in bench.timelines for m in t.lines)
    ends = [m.hter[2] if np.isfinite(m.hter[2]) else m.hter[0] for m in rows]
    attacked = _columns(rows, [r.method for r in bench.poison])
    low, high = timelines.axis([r.rise for r in bench.poison], 4 * LIMIT)
    return (
        environment()
        .get_template("site.html.j2")
        .render(
            bench=bench,
            answer=_answer(bench, rows),
            rows=rows,
            top=plots.scale(ends, 0.02),
            reference=next((m.hter[0] for m in rows if m.method == BASELINE), float("nan")),
            columns=_columns(rows, [m for s in bench.streams for m in s.cells]),
            groups=_groups(sorted(bench.streams, key=lambda s: _place(s.group)), lambda s: s.group),
            doors=_groups(bench.one_class, lambda r: (r.stream, plots.percent(r.prior))),
            watched=_columns(rows, [r.method for r in bench.one_class]),
            attacks=[
                sorted(group, key=lambda r: attacked.index(r.method))
                for group in _groups(bench.poison, lambda r: (r.stream, plots.percent(r.share)))
            ],
            lowest=low,
            highest=high,
            weights=list(dict.fromkeys(c.weight for c in bench.ablation)),
            parts=_groups(bench.ablation, lambda c: (c.fill, c.labels)),
            default=next((r for r in bench.additions if r.name == "default"), (*bench.additions, None)[0]),
            look=timelines.looks(list(named), OURS, BASELINE),
            described={m: METHODS[m] for m in dict.fromkeys(m.split(" ")[0] for m in named) if m in METHODS},
            ours=OURS,
            baseline=BASELINE,
            limit=LIMIT,
            harm=HARM,
            measure=_measure,
            charts=timelines,
            why={s: bench.omitted.get(s, "") for s in SECTIONS},
        )
    )


def write(bench: SiteBench, path: Path) -> None:
    """Render to ``path``."""
    publish(render(bench), path)


def _answer(bench: SiteBench, rows: Sequence[MethodRow]) -> list[str]:
    """The benchmark in one sentence, by its parts."""
    known = [m for m in rows if np.isfinite(m.hter[0])]
    if not known:
        return ["No method was measured"]
    best, own = known[0], next((m for m in known if m.method == OURS), None)
    parts = [f"{best.method} errs least on shifted streams: mean online HTER {plots.percent(best.hter[0])}"]
    if own and own is not best:
        parts.append(f"{OURS} has {plots.percent(own.hter[0])}")
    frozen = next((m for m in known if m.method == BASELINE), None)
    if own and frozen and np.isfinite(own.below_frozen):
        share = (
            f"{plots.percent(abs(own.below_frozen))} "
            f"{'less' if own.below_frozen >= 0 else 'more'} than {BASELINE}"
        )
        apart = own.hter[2] < frozen.hter[1] or own.hter[1] > frozen.hter[2]
        parts.append(
            share
            + ("" if apart or not np.isfinite([*own.hter, *frozen.hter]).all() else " (intervals overlap)")
        )
    if own and np.isfinite(own.harmed):
        parts.append(f"{plots.percent(own.harmed) if own.harmed else 'none'} of the sites harmed by {OURS}")
    judged = [f.holds for f in bench.figures if f.holds is not None]
    if judged:
        parts.append(f"{sum(judged)} of {len(judged)} targets hold")
    return parts


def _columns(rows: Sequence[MethodRow], seen: Sequence[str]) -> list[str]:
    """Methods that were ``seen``: the baseline, ours, then the others best first,
    then those without a row.
    """
    order = dict.fromkeys([BASELINE, OURS, *(m.method for m in rows), *seen])
    return [m for m in order if m in set(seen)]


def _groups(rows: Iterable[Row], key: Callable[[Row], object]) -> list[list[Row]]:
    """Rows with the same key together, in the order of their first appearance."""
    found: dict[object, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.values())


def _place(group: str) -> int:
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)


def _measure(cells: Iterable[StreamCell]) -> str:
    """What a stream is judged by: HTER, or the rate of the one class that it has."""
    cells = list(cells)
    return next(
        (n for n in ("hter", "bpcer", "max_apcer") if any(np.isfinite(getattr(c, n)) for c in cells)), "hter"
    )
