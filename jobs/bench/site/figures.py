"""What ``palisade bench site`` found: the page's content, the figures against their targets, the terminal's
tables.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jobs.bench.figures import Figure
from jobs.terminal import percent
from pipeline.report.site import BASELINE, OURS
from pipeline.stats import intervals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jobs.bench.site.courses import MethodJob
    from jobs.bench.site.online import Course, Stream
    from jobs.bench.site.streams import Prepared, SourceJob
    from pipeline.config import Config
    from pipeline.report.site import SiteBench
    from pipeline.simulate.scenarios import Scenario

FEW, CELLS = 0.05, 36  # share of poison up to which no harm is allowed; cells of the ablation
FROZE = 50  # poisoned samples within which adaptation may stop itself instead
STATE = 160  # KiB of one hot site


class Seen(NamedTuple):
    """One run on one stream."""

    seed: int
    stream: Stream
    course: Course
    threshold: float


@dataclass(frozen=True)
class Found:
    """Everything that was measured."""

    config: Config
    scenarios: tuple[Scenario, ...]
    prepared: Mapping[SourceJob, Prepared]
    courses: Mapping[tuple[str, str, MethodJob], Mapping[str, Course]]  # (table, row, job) → stream → course
    costs: Mapping[str, float]  # method → time of a step over forward-only
    borne: Mapping[str, str]  # what a slot was given → "bit-equal and finite", or what went wrong
    state_kib: float

    @cached_property
    def runs(self) -> dict[str, dict[str, dict[str, list[Seen]]]]:
        """table → row → stream → one per seed."""
        made: dict[str, dict[str, dict[str, list[Seen]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )
        for (name, row, job), courses in self.courses.items():
            prepared = self.prepared[job.source]
            for stream, course in courses.items():
                seen = Seen(job.source.seed, prepared.streams[stream], course, prepared.threshold)
                made[name][row][stream].append(seen)
        return made

    def group(self, stream: str) -> str:
        """shifted, clean, one-class, unseen, missing or poisoning."""
        known = {s.name: s.group for s in self.scenarios} | self.config.bench.groups
        return known.get(stream, "shifted")

    def what(self, stream: str) -> str:
        known = {s.name: s.what for s in self.scenarios}
        recorded = (
            "recorded site"
            if stream in self.config.bench.groups
            else "a domain that the source has not learned from"
        )
        return known.get(stream, recorded)

    def streams(self, group: str, table: str = "main") -> list[str]:
        return [
            s for s in self.runs[table].get(BASELINE, self.runs["main"][BASELINE]) if self.group(s) == group
        ]

    def scenario(self, stream: str) -> Scenario | None:
        return next((s for s in self.scenarios if s.name == stream), None)


def calls_of(runs: Mapping[str, list[Seen]], streams: Sequence[str]) -> list[intervals.Calls]:
    """What one method did on ``streams``, its seeds as runs, sessions as clusters."""
    made: list[intervals.Calls] = []
    for name in streams:
        seen = runs[name]
        stream = seen[0].stream
        score = np.stack([s.course.score for s in seen])
        made.append(
            intervals.calls(score, stream.label, stream.features.session.numpy(), [s.threshold for s in seen])
        )
    return made


def mean(runs: Mapping[str, list[Seen]], streams: Sequence[str], what: str, *, after: bool = False) -> float:
    """Mean over streams and seeds of one of the online Rates, or of those on the probe afterwards."""
    each = [
        [getattr((s.course.probe_after if after else s.course.online), what) for s in runs[n]]
        for n in streams
        if n in runs and (not after or runs[n][0].course.probe_after)
    ]
    return float(np.nanmean([np.nanmean(e) for e in each])) if each else math.nan


def rises(
    found: Found, row: str, streams: Sequence[str], what: str, *, table: str = "main", after: bool = False
) -> dict[str, float]:
    """Stream → how much more than frozen, mean over seeds."""
    ours = found.runs[table].get(row, {})
    base = frozen_beside(found, ours)
    return {
        n: mean(ours, [n], what, after=after) - mean(base, [n], what, after=after)
        for n in streams
        if n in ours
    }


def frozen_beside(found: Found, ours: Mapping[str, list[Seen]]) -> dict[str, list[Seen]]:
    """Frozen on the same streams, by the same seeds."""
    base = found.runs["main"][BASELINE]
    return {n: [b for b in base[n] if b.seed in {s.seed for s in seen}] for n, seen in ours.items()}


def worst(of: Mapping[str, float]) -> tuple[str, float]:
    known = {n: v for n, v in of.items() if not math.isnan(v)}
    name = max(known, key=lambda n: known[n], default="")
    return name, known.get(name, math.nan)


def burst(found: Found, row: str, stream: str) -> float:
    """APCER, attacks pooled, in the last stretch of a scenario: attacks only."""
    s = found.scenario(stream)
    if s is None or s.stretches[-1].prior > 0 or row not in found.runs["main"]:
        return math.nan
    last = s.stretches[-1].samples
    return float(
        np.mean([np.mean(x.course.score[-last:] >= x.threshold) for x in found.runs["main"][row][stream]])
    )


def figures(found: Found, made: SiteBench, *, seeds: int) -> list[Figure]:
    """What the benchmark promises, against what it found."""
    runs, rows = found.runs["main"], {m.method: m for m in made.methods}
    shifted, all_streams = found.streams("shifted"), list(runs[BASELINE])
    ours = rows.get(OURS)
    against = f"{percent(ours and ours.hter.value)} against {percent(rows[BASELINE].hter.value)} %"
    decided = [
        Figure(
            "danet_hter_below_frozen",
            ours and ours.below_frozen,
            0.30,
            least=True,
            note=f"share of frozen's HTER avoided, mean of {len(shifted)} shifted streams: {against}",
        )
    ]
    for name in (m for m in rows if m not in (OURS, BASELINE) and "(" not in m):
        paired = intervals.paired_bootstrap(calls_of(runs[name], shifted), calls_of(runs[OURS], shifted))
        low, high = 100 * paired.difference.low, 100 * paired.difference.high
        decided.append(
            Figure(
                f"danet_better_than_{name}",
                paired.difference.value,
                0.0,
                least=True,
                strict=True,
                note=f"{name}'s HTER - danet's, 95 % [{low:+.1f}, {high:+.1f}] points",
            )
        )
    harmed, rise = worst(
        rises(found, OURS, [n for n in all_streams if found.group(n) != "poisoning"], "hter")
    )
    quiet = found.streams("one-class") + found.streams("clean")
    bona_fide, attacks = (worst(rises(found, OURS, quiet, w)) for w in ("bpcer", "max_apcer"))
    bursts = {n: burst(found, OURS, n) - burst(found, BASELINE, n) for n in found.streams("one-class")}
    few, many = _poisoned(found, lambda share: share <= FEW), _poisoned(found, lambda share: share > FEW)
    missing = {m.fill: m.hter for m in made.missing}
    complement = missing.get("substitute + enhance", math.nan)
    return [
        *decided,
        Figure("worst_site_rise", rise, 0.01, least=False, note=f"HTER over frozen, {harmed}"),
        Figure(
            "one_class_and_clean_bpcer_rise", bona_fide[1], 0.005, least=False, note=f"worst: {bona_fide[0]}"
        ),
        Figure(
            "one_class_and_clean_max_apcer_rise", attacks[1], 0.005, least=False, note=f"worst: {attacks[0]}"
        ),
        Figure("burst_apcer_rise", worst(bursts)[1], 0.0, least=False, note=f"worst: {worst(bursts)[0]}"),
        Figure(
            "poisoning_up_to_5_percent",
            worst(few)[1],
            0.005,
            least=False,
            note=f"rise of the worst species' APCER on the probe, {worst(few)[0]}",
        ),
        Figure(
            "poisoning_20_percent_or_burst",
            worst(many)[1],
            0.01,
            least=False,
            note=f"the same, 0 where adaptation stopped within {FROZE} poisoned samples; {worst(many)[0]}",
        ),
        Figure(
            "complement_below_zero_fill",
            1 - complement / missing.get("zero-fill", math.nan),
            0.20,
            least=True,
            note="share of the HTER avoided on streams with a modality missing; zeros and the "
            "threshold of complete captures",
        ),
        Figure(
            "complement_below_zero_fill_recalibrated",
            1 - complement / missing.get("zero-fill, own thresholds", math.nan),
            0.20,
            least=True,
            note="the same; zeros with a source threshold per set of sensors",
        ),
        Figure(
            "ablation_cells",
            sum(not math.isnan(c.hter) for c in made.ablation),
            CELLS,
            least=True,
            note="fill x labels x weight",
        ),
        Figure(
            "degenerate_batches_without_effect",
            sum(v == "bit-equal and finite" for v in found.borne.values()),
            len(found.borne),
            least=True,
            note="; ".join(f"{k}: {v}" for k, v in found.borne.items()),
        ),
        Figure("hot_state_kib", found.state_kib, STATE, least=False, note="tensors of one danet site"),
        Figure("seeds", seeds, 3, least=True, note="source models per stream"),
    ]


def _poisoned(found: Found, chosen: object) -> dict[str, float]:
    """Poisoned scenario → rise of the worst species' APCER on the probe over frozen, of those whose share is
    ``chosen``.
    """
    kept: dict[str, float] = {}
    for name in found.streams("poisoning"):
        s = found.scenario(name)
        if s is None or not chosen(max(t.poison for t in s.stretches)):  # pyright: ignore
            continue
        rise = rises(found, OURS, [name], "max_apcer", after=True).get(name, math.nan)
        stopped = max(x.course.stopped_after for x in found.runs["main"][OURS][name]) <= FROZE
        kept[name] = min(rise, 0.0) if stopped and max(t.poison for t in s.stretches) > FEW else rise
    return kept
