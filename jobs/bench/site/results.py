"""Reads the courses of all methods as rates and rises over the frozen model, and decides the figures."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jobs.bench.site.labels import BOTH, CASES, FROZEN, ONE_CLASS, WRONG
from jobs.bench.site.online import SOUND
from pipeline.report import plots
from pipeline.report.bench import at_least, at_most
from pipeline.stats import intervals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jobs.bench.site.courses import MethodJob
    from jobs.bench.site.labels import Errors, LabelJob
    from jobs.bench.site.online import Course, Stream
    from jobs.bench.site.streams import Prepared, SourceJob
    from pipeline.report.bench import Figure
    from pipeline.simulate.scenarios import Scenario

    Runs = dict[str, list["Run"]]  # stream -> one run per seed, of one method

OURS, BASELINE = "danet", "frozen"
FEW, CELLS = 0.05, 36  # share of poison up to which no harm is allowed; cells of the ablation
FROZE = 50  # poisoned samples within which adaptation may stop itself instead
STATE = 160  # KiB of one hot site
QUIET = ("one-class", "clean")  # groups in which nothing should change
PEACEFUL = ("shifted", *QUIET, "unseen", "missing")  # groups over which the largest rise is a target


class Run(NamedTuple):
    """One method on one stream of one source model."""

    seed: int
    stream: Stream
    course: Course
    threshold: float


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    groups: Mapping[str, str]  # recorded site -> what happens there
    scenarios: Mapping[str, Scenario]
    prepared: Mapping[SourceJob, Prepared]
    courses: Mapping[
        tuple[str, str, MethodJob], Mapping[str, Course]
    ]  # (table, row, job) -> stream -> course
    costs: Mapping[str, float]  # method -> time of a step over forward-only
    degenerate: Mapping[str, str]  # what a slot was given -> SOUND, or what went wrong
    state_kib: float
    batch: int  # samples of a step
    labels: Mapping[LabelJob, Mapping[str, Errors]] = field(default_factory=dict)  # job -> case -> errors

    @cached_property
    def tables(self) -> dict[str, dict[str, Runs]]:
        """Table -> row -> stream -> one run per seed."""
        tables: dict[str, dict[str, Runs]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        for (table, row, job), courses in self.courses.items():
            p = self.prepared[job.source]
            for name, course in courses.items():
                run = Run(job.source.method.seed, p.streams[name], course, p.threshold)
                tables[table][row][name].append(run)
        return tables

    @property
    def main(self) -> dict[str, Runs]:
        """The comparison of all methods."""
        return self.tables["main"]

    def group(self, stream: str) -> str:
        """Returns shifted, clean, one-class, unseen, missing, sensor or poisoning."""
        s = self.scenarios.get(stream)
        return s.group if s else self.groups.get(stream, "shifted")

    def what(self, stream: str) -> str:
        """Returns what happens on a stream."""
        s = self.scenarios.get(stream)
        other = "recorded site" if stream in self.groups else "a domain that the source has not learned from"
        return s.what if s else other

    def streams(self, *groups: str) -> list[str]:
        """Returns the streams of these groups."""
        return [n for n in self.main[BASELINE] if self.group(n) in groups]

    def poison(self, stream: str) -> float:
        """Returns the largest share of poisoned samples in a stretch of a scenario; NaN for other streams."""
        s = self.scenarios.get(stream)
        return max(t.poison for t in s.stretches) if s else math.nan

    def rises(
        self, runs: Runs, streams: Sequence[str], rate: str, *, after: bool = False
    ) -> dict[str, float]:
        """Returns stream -> how much more than frozen, mean over seeds."""
        base, there = self.frozen_beside(runs), [n for n in streams if n in runs]
        return {n: mean(runs, [n], rate, after=after) - mean(base, [n], rate, after=after) for n in there}

    def frozen_beside(self, runs: Runs) -> Runs:
        """Returns frozen on the same streams, by the same seeds."""
        base = self.main[BASELINE]
        return {n: [b for b in base[n] if b.seed in {r.seed for r in of}] for n, of in runs.items()}

    def taught(self, row: str, case: str, rate: str = "hter") -> dict[str, float]:
        """Returns left-out door -> mean over seeds and draws of a rate after ``row`` learned from labels."""
        rates: dict[str, list[float]] = defaultdict(list)
        for job, errors in self.labels.items():
            if job.row == row and case in errors:
                rates[job.source.name] += getattr(errors[case], rate).tolist()
        return {door: float(np.mean(of)) for door, of in rates.items()}

    def burst(self, row: str, stream: str) -> float:
        """Returns the APCER, attacks pooled, of the stretch of attacks that ends a scenario."""
        s = self.scenarios.get(stream)
        if s is None or s.stretches[-1].prior > 0 or row not in self.main:
            return math.nan
        last = s.stretches[-1].samples
        return float(
            np.mean([np.mean(r.course.score[-last:] >= r.threshold) for r in self.main[row][stream]])
        )

    def probe_rises(self, chosen: Callable[[float], bool]) -> dict[str, float]:
        """Returns scenario -> rise of the worst species' APCER on the probe, of ``chosen`` shares of poison.

        Above FEW the rise is 0 where adaptation stopped within FROZE poisoned samples.
        """
        names = [n for n in self.streams("poisoning") if n in self.scenarios and chosen(self.poison(n))]
        rises = self.rises(self.main[OURS], names, "max_apcer", after=True)
        stopped = {n: max(r.course.stopped_after for r in self.main[OURS][n]) <= FROZE for n in names}
        return {n: min(r, 0.0) if stopped[n] and self.poison(n) > FEW else r for n, r in rises.items()}


def calls_of(runs: Runs, streams: Sequence[str]) -> list[intervals.Calls]:
    """Returns the calls of one method on ``streams``, its seeds as runs, sessions as clusters."""
    calls: list[intervals.Calls] = []
    for name in streams:
        score = np.stack([r.course.score for r in runs[name]])
        s, thresholds = runs[name][0].stream, [r.threshold for r in runs[name]]
        calls.append(intervals.calls(score, s.label, s.session, thresholds))
    return calls


def mean(runs: Runs, streams: Sequence[str], rate: str, *, after: bool = False) -> float:
    """Returns the mean over streams and seeds of one online rate, or of that on the probe ``after``."""
    each = [
        [r.course.probe_after if after else r.course.online for r in runs[n]] for n in streams if n in runs
    ]
    rates = [[getattr(r, rate) for r in of if r] for of in each]
    return float(np.nanmean([np.nanmean(of) for of in rates if of])) if any(rates) else math.nan


def worst(of: Mapping[str, float]) -> tuple[str, float]:
    """Returns the name with the largest value, and the value; NaN if none is known."""
    known = {n: v for n, v in of.items() if not math.isnan(v)}
    name = max(known, key=lambda n: known[n], default="")
    return name, known.get(name, math.nan)


def figures(r: Results, hters: Mapping[str, float], *, seeds: int) -> list[Figure]:
    """Returns what the benchmark promises against what it measured, ``hters`` by method."""
    ours, shifted = r.main[OURS], r.streams("shifted")
    against = f"{plots.percent(hters[OURS])} against {plots.percent(hters[BASELINE])}"
    note = f"share of frozen's HTER avoided, mean of {len(shifted)} shifted streams: {against}"
    decided = [at_least("danet_hter_below_frozen", 1 - hters[OURS] / hters[BASELINE], 0.30, note)]
    for name in (m for m in hters if m not in (OURS, BASELINE) and "(" not in m):
        paired = intervals.paired_bootstrap(
            calls_of(r.main[name], shifted), calls_of(ours, shifted)
        ).difference
        note = f"{name}'s HTER - danet's, 95 % [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}] points"
        decided.append(at_least(f"danet_better_than_{name}", paired.value, 0.0, note, strict=True))
    harmed = worst(r.rises(ours, r.streams(*PEACEFUL), "hter"))
    quiet = [n for group in QUIET for n in r.streams(group)]
    bona_fide, attacks = (worst(r.rises(ours, quiet, rate)) for rate in ("bpcer", "max_apcer"))
    bursts = worst({n: r.burst(OURS, n) - r.burst(BASELINE, n) for n in r.streams("one-class")})
    few, many = worst(r.probe_rises(lambda s: s <= FEW)), worst(r.probe_rises(lambda s: s > FEW))
    fills = {f: mean(runs, list(runs), "hter") for f, runs in r.tables["fills"].items()}
    cells = sum(not math.isnan(mean(runs, list(runs), "hter")) for runs in r.tables["ablation"].values())
    saved = {f: 1 - fills.get("substitute + enhance", math.nan) / fills.get(f, math.nan) for f in fills}
    zeros, own = (saved.get(f, math.nan) for f in ("zero-fill", "zero-fill, own thresholds"))
    avoided = "share of the HTER avoided on streams with a modality missing; zeros and "
    probe = f"rise of the worst species' APCER on the probe, {few[0]}"
    stopped = f"the same, 0 where adaptation stopped within {FROZE} poisoned samples; {many[0]}"
    sound, ends = (
        [v for v in r.degenerate.values() if v == SOUND],
        "; ".join(f"{k}: {v}" for k, v in r.degenerate.items()),
    )
    return [
        *decided,
        at_most("worst_site_rise", harmed[1], 0.01, f"HTER over frozen, {harmed[0]}"),
        at_most("one_class_and_clean_bpcer_rise", bona_fide[1], 0.005, f"worst: {bona_fide[0]}"),
        at_most("one_class_and_clean_max_apcer_rise", attacks[1], 0.005, f"worst: {attacks[0]}"),
        at_most("burst_apcer_rise", bursts[1], 0.0, f"worst: {bursts[0]}"),
        at_most("poisoning_up_to_5_percent", few[1], 0.005, probe),
        at_most("poisoning_20_percent_or_burst", many[1], 0.01, stopped),
        at_least("complement_below_zero_fill", zeros, 0.20, avoided + "the threshold of complete captures"),
        at_least(
            "complement_below_zero_fill_recalibrated", own, 0.20, avoided + "a threshold per set of sensors"
        ),
        at_least("ablation_cells", cells, CELLS, "fill x labels x weight"),
        at_least("degenerate_batches_without_effect", len(sound), len(r.degenerate), ends),
        at_most("hot_state_kib", r.state_kib, STATE, "tensors of one danet site"),
        at_least("seeds", seeds, 3, "source models per stream"),
        *label_figures(r),
    ]


def label_figures(r: Results) -> list[Figure]:
    """Returns what danet's labels promise at left-out doors against what they gave."""
    ours, frozen = ({c: r.taught(row, c) for c in CASES} for row in (OURS, FROZEN))
    one, both, wrong = (over_doors(ours[c]) for c in (ONE_CLASS, BOTH, WRONG))
    base = over_doors(frozen[BOTH])
    rises = {f"{d}: {c}": v - frozen[c][d] for c, of in ours.items() for d, v in of.items() if d in frozen[c]}
    harm = worst(rises)
    note = "HTER over frozen's, means over the left-out doors"
    return [
        at_most("bona_fide_labels_relative_to_frozen", one / base, 0.70, note),
        at_most("both_labels_relative_to_frozen", both / base, 0.50, note),
        at_most("labels_worst_harm", harm[1], 0.01, f"rise of a door's mean HTER over frozen, {harm[0]}"),
        at_most(
            "wrong_labels_gain_lost", wrong - both, 0.01, "HTER with a tenth of the labels wrong - without"
        ),
    ]


def over_doors(of: Mapping[str, float]) -> float:
    """Returns the mean over doors; NaN without any."""
    return float(np.mean([*of.values()])) if of else math.nan
