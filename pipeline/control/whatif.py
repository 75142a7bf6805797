"""Compares two configurations on the same recorded stream, for each site and for the fleet.

Every pair is (now, what-if). Shares and rates are in [0, 1]; NaN or None where nothing is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.stats import metrics
from pipeline.stats.metrics import HARM

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pipeline.guards import Verdict
    from pipeline.site.bank import Trace

ORDER = {"pass": 0, "hold": 1, "fail": 2}
MEANS = ("accepted", "trust_ratio", "hter", "bpcer", "max_apcer")


class Truth(NamedTuple):
    """Sealed labels of a stream."""

    label: NDArray[np.int64]  # [N] -1 where no label is known
    pai: NDArray[np.str_]  # [N]


class ReplayedSite(NamedTuple):
    """One site under one configuration."""

    trace: Trace
    trust_ratio: float  # of the state at the end
    verdict: Verdict | None  # on that state; None without an anchor set


@dataclass(frozen=True)
class Side:
    """What one configuration did on one site's stream, online: every sample scored before it was used."""

    accepted: float  # share of the samples called bona fide
    pseudo_bona_fide: int  # samples learned from with this label
    pseudo_attack: int
    trust_ratio: float
    hter: float
    bpcer: float
    max_apcer: float
    verdict: str | None
    reason: str  # the finding that decided

    def row(self) -> dict[str, object]:
        """Returns everything by name; None for a number that is not known."""
        return {name: _known(getattr(self, name)) for name in Side.__dataclass_fields__}


@dataclass(frozen=True)
class Difference:
    """One site under both configurations."""

    site: str
    samples: int
    labelled: int
    newly_accepted: float  # share of the samples called attack now and bona fide by the what-if
    newly_refused: float  # the other way round
    now: Side
    what_if: Side

    @property
    def hter_rise(self) -> float:
        """NaN without labels of both classes."""
        return self.what_if.hter - self.now.hter

    @property
    def worse_verdict(self) -> bool:
        """Whether the what-if holds or fails where now passes, or fails where now holds."""
        both = self.now.verdict, self.what_if.verdict
        return None not in both and ORDER[str(both[1])] > ORDER[str(both[0])]

    def row(self) -> dict[str, object]:
        """Everything by name; what both sides have as [now, what-if], None for a number that is not known."""
        single = {
            "site": self.site,
            "samples": self.samples,
            "labelled": self.labelled,
            "flipped": self.newly_accepted + self.newly_refused,
            "newly_accepted": self.newly_accepted,
            "newly_refused": self.newly_refused,
            "hter_rise": _known(self.hter_rise),
        }
        now, what_if = self.now.row(), self.what_if.row()
        pairs = {name: [value, what_if[name]] for name, value in now.items()}
        return {**single, **pairs, "worse_verdict": self.worse_verdict}


@dataclass(frozen=True)
class FleetDifference:
    """The fleet under both configurations; a mean or share is None if no site has the number."""

    sites: int
    samples: int
    labelled_sites: int  # with sealed labels of both classes
    flips: Mapping[str, float | None]  # mean shares of the samples that change their call
    means: Mapping[str, tuple[float | None, float | None]]  # (now, what-if)
    harmed: float | None  # share of labelled sites
    improved: float | None
    worse_verdicts: tuple[str, ...]  # sites

    def to_json(self) -> dict[str, object]:
        """Returns the numbers by name."""
        return {
            "sites": self.sites,
            "samples": self.samples,
            "labelled_sites": self.labelled_sites,
            "mean": {**self.flips, **self.means},
            "harmed": self.harmed,
            "improved": self.improved,
            "worse_verdicts": self.worse_verdicts,
        }


def compare_site(
    site: str, now: ReplayedSite, what_if: ReplayedSite, truth: Truth, threshold: float
) -> Difference:
    """Compare two replays of one stream of N > 0 samples; calls are made at ``threshold``."""
    before, after = (np.asarray(r.trace.score.numpy(), np.float64) >= threshold for r in (now, what_if))
    return Difference(
        site,
        len(before),
        int((truth.label >= 0).sum()),
        float((after & ~before).mean()),
        float((before & ~after).mean()),
        _side(now, truth, threshold),
        _side(what_if, truth, threshold),
    )


def worst_first(differences: Sequence[Difference]) -> list[Difference]:
    """By the rise of HTER, where that is not known by the share newly accepted."""

    def harm(d: Difference) -> tuple[float, float, str]:
        return -(d.newly_accepted if math.isnan(d.hter_rise) else d.hter_rise), -d.newly_accepted, d.site

    return sorted(differences, key=harm)


def fleet_summary(differences: Sequence[Difference]) -> FleetDifference:
    """Returns the means over the sites, and the shares that change by more than HARM of HTER."""
    rise = np.array([d.hter_rise for d in differences if not math.isnan(d.hter_rise)])
    now, what_if = [d.now for d in differences], [d.what_if for d in differences]
    return FleetDifference(
        sites=len(differences),
        samples=sum(d.samples for d in differences),
        labelled_sites=len(rise),
        flips={n: _mean([getattr(d, n) for d in differences]) for n in ("newly_accepted", "newly_refused")},
        means={
            n: (_mean([getattr(s, n) for s in now]), _mean([getattr(s, n) for s in what_if])) for n in MEANS
        },
        harmed=float((rise > HARM).mean()) if len(rise) else None,
        improved=float((rise < -HARM).mean()) if len(rise) else None,
        worse_verdicts=tuple(d.site for d in differences if d.worse_verdict),
    )


def changed_settings(
    now: Mapping[str, Mapping[str, object]], what_if: Mapping[str, Mapping[str, object]]
) -> dict[str, tuple[object, object]]:
    """Returns (now, what-if) of differing settings by section.key; None where a method lacks the key."""
    changed: dict[str, tuple[object, object]] = {}
    for section, before in now.items():
        after = what_if[section]
        for key in {**before, **after}:
            if before.get(key) != after.get(key):
                changed[f"{section}.{key}"] = (before.get(key), after.get(key))
    return changed


def _side(r: ReplayedSite, truth: Truth, threshold: float) -> Side:
    score, used = np.asarray(r.trace.score.numpy(), np.float64), r.trace.pseudo_label.numpy()
    labelled = truth.label >= 0
    s, y = score[labelled], truth.label[labelled]
    species, _ = metrics.merge_small(truth.pai[labelled], y)
    return Side(
        accepted=float((score >= threshold).mean()),
        pseudo_bona_fide=int((used == 1).sum()),
        pseudo_attack=int((used == 0).sum()),
        trust_ratio=r.trust_ratio,
        hter=metrics.hter(s, y, threshold),
        bpcer=metrics.bpcer(s, y, threshold).rate,
        max_apcer=metrics.max_apcer(metrics.apcer_by_species(s, y, species, threshold))[1],
        verdict=r.verdict.outcome if r.verdict else None,
        reason=r.verdict.decisive if r.verdict else "",
    )


def _mean(values: Sequence[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return float(np.mean(finite)) if finite else None


def _known(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
