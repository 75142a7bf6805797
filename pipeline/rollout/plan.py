"""Plans a release: which site gets which target in which wave, the controls, and the sites left out.

A Draft is a plan with every site in it. Stored, its sites are rows of the ledger; the state machine needs the
Plan alone, which stays small however large the fleet is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from pipeline.guards.limits import Shadow
from pipeline.rollout.calendar import is_time_zone
from pipeline.rollout.settings import RolloutConfig
from pipeline.types import Section

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DAY = 86_400.0  # seconds
CONTROL = "control: stays on the source model"  # the reason of an Excluded; stored in the ledger


class Pointer(NamedTuple):
    """Names what a site serves: a state of the ledger, or the bare source model (``state_id`` None)."""

    state_id: str | None
    source_version: int


class Candidate(NamedTuple):
    """Names what a site may be promoted to, with its stored verdict."""

    to: Pointer
    verdict_id: str | None
    outcome: Literal["pass", "fail", "hold"]
    reason: str = ""


@dataclass(frozen=True)
class SiteFacts:
    """Holds all that a plan needs to know of one site."""

    serving: Pointer | None
    last_good: Pointer | None = None  # served last under a release that completed
    candidate: Candidate | None = None
    control: bool = False  # stays on the source model, for comparison
    tags: Mapping[str, str] | None = None  # free, but for ``tz`` and ``rig``


class Target(NamedTuple):
    """Plans one site: its wave, its target and its way back."""

    wave: int  # index
    to: Pointer
    back: Pointer  # what a rollback points the site at
    verdict_id: str
    zone: str = "UTC"  # time zone of its nights


class Excluded(NamedTuple):
    """Says why a site is in no wave."""

    reason: str
    verdict_id: str | None = None


class Wave(Section):
    """Counts the sites promoted together; ``abort_at`` failing ones abort the rollout."""

    share: float  # of the fleet, cumulative
    sites: int
    abort_at: int  # failing sites
    detects_days: float | None = None  # see ``power.days_to_detect``


class Plan(Section):
    """Says what will happen, without the single sites; stored, and hashed for approval.

    ``roster`` is the sha256 over the line of each site, so the hash of the plan covers every site.
    """

    release: str
    kind: Literal["candidates", "source"] = "candidates"
    source_version: int  # source model of the targets
    source_before: int  # champion source model at planning time
    waves: tuple[Wave, ...]
    zones: tuple[str, ...] = ()  # time zones of its sites
    controls: int = 0  # sites
    excluded: int = 0  # sites
    duration_seconds: float  # predicted: staging, baking and one night per wave
    rollback_seconds: float  # bound for sites to take a rollback
    roster: str
    config: RolloutConfig


@dataclass(frozen=True)
class Draft:
    """Holds a plan with its sites."""

    plan: Plan
    targets: dict[str, Target]
    excluded: dict[str, Excluded]
    controls: tuple[str, ...]

    def wave(self, index: int) -> tuple[str, ...]:
        """Returns the sites of the wave with this index, sorted."""
        return tuple(sorted(s for s, t in self.targets.items() if t.wave == index))


class PlanDiff(Section):
    """Lists the differences of plan b from plan a."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    retargeted: tuple[str, ...]
    moved: dict[str, tuple[int, int]]  # site → wave index in a, in b


def plan(
    release: str,
    sites: Mapping[str, SiteFacts],
    source_version: int,
    config: RolloutConfig,
    *,
    source_before: int | None = None,
    shadow: Shadow | None = None,
) -> Draft:
    """Returns waves over the sites whose candidate has a passing verdict; the same inputs give the same plan.

    ``source_version`` is the source model that the candidates adapt. A site without an earlier good version
    goes back to it, or to ``source_before`` where the release brings a new source model; then the controls
    follow in the last wave. ``shadow`` is the guard that watches the bakes, for the days in which each wave
    detects harm.
    """
    before = source_version if source_before is None else source_before
    excluded: dict[str, Excluded] = {}
    chosen: dict[str, SiteFacts] = {}
    for site, facts in sorted(sites.items()):
        if facts.control and source_before is None:
            excluded[site] = Excluded(CONTROL)
            continue
        reason = _exclusion(facts)
        if reason:
            excluded[site] = Excluded(reason, facts.candidate.verdict_id if facts.candidate else None)
        else:
            chosen[site] = facts
    last = sorted(s for s, f in chosen.items() if f.control)
    parts = _parts(release, {s: f.tags or {} for s, f in chosen.items() if not f.control}, config, late=last)
    targets = {s: _target(i, chosen[s], before) for i, (_, members) in enumerate(parts) for s in members}
    controls = tuple(s for s, f in sorted(sites.items()) if f.control)
    waves = tuple(_wave(share, len(members), config, shadow or Shadow()) for share, members in parts)
    header = Plan(
        release=release,
        kind="candidates" if source_before is None else "source",
        source_version=source_version,
        source_before=before,
        waves=waves,
        zones=tuple(sorted({t.zone for t in targets.values()})),
        controls=len(controls),
        excluded=len(excluded),
        config=config,
        roster=roster(targets, excluded),
        duration_seconds=_duration(config, len(waves)),
        rollback_seconds=config.rollback_seconds,
    )
    return Draft(header, targets, excluded, controls)


def choose_controls(tags: Mapping[str, Mapping[str, str]], config: RolloutConfig) -> tuple[str, ...]:
    """Returns the control sites: ``control_share`` of every stratum, at least one of a large enough stratum.

    A stratum is large enough from ``control_min_sites`` sites on. The order of choice depends on the site id
    alone, so a growing fleet keeps the controls it has.
    """
    chosen: list[str] = []
    for members in _strata(tags, config).values():
        least = 1 if len(members) >= config.control_min_sites and config.control_share > 0 else 0
        members.sort(key=lambda site: (_draw(config.seed, "control", site), site))
        chosen += members[: max(least, int(config.control_share * len(members)))]
    return tuple(sorted(chosen))


def roster(targets: Mapping[str, Target], excluded: Mapping[str, Excluded]) -> str:
    """Returns the sha256 over one line per site, in order."""
    lines = [
        f"{s} {t.wave} {t.to[0]} {t.to[1]} {t.back[0]} {t.back[1]} {t.verdict_id} {t.zone}"
        for s, t in sorted(targets.items())
    ]
    lines += [f"{s} - {e.verdict_id} {e.reason}" for s, e in sorted(excluded.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def plan_hash(plan: Plan) -> str:
    """Returns the sha256 of the plan as canonical JSON, which ``rollout apply`` must name."""
    text = json.dumps(plan.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def diff(a: Mapping[str, Target], b: Mapping[str, Target]) -> PlanDiff:
    """Returns the differences of the targets ``b`` from the targets ``a``."""
    both = sorted(a.keys() & b.keys())
    return PlanDiff(
        added=tuple(sorted(b.keys() - a.keys())),
        removed=tuple(sorted(a.keys() - b.keys())),
        retargeted=tuple(s for s in both if a[s].to != b[s].to),
        moved={s: (a[s].wave, b[s].wave) for s in both if a[s].wave != b[s].wave},
    )


def _wave(share: float, sites: int, config: RolloutConfig, shadow: Shadow) -> Wave:
    from pipeline.rollout.power import (
        days_to_detect,
    )  # here: numpy is too slow for readers of the configuration

    days = None
    if not shadow.advisory:
        days = days_to_detect(sites, config.presentations_per_day, apcer=shadow.apcer, alpha=shadow.alpha)
    return Wave(share=share, sites=sites, abort_at=_abort_at(config, sites), detects_days=days)


def _duration(config: RolloutConfig, waves: int) -> float:
    night = DAY if config.night else 0.0
    return waves * (config.stage_seconds + config.bake_seconds + night)


def _exclusion(facts: SiteFacts) -> str:
    """Returns why a site is left out; empty where it is not. The text is part of the roster."""
    c = facts.candidate
    if c is None:
        return "no candidate"
    if c.outcome != "pass" or c.verdict_id is None:
        return f"verdict {c.outcome}: {c.reason}" if c.verdict_id is not None else "no stored verdict"
    if not is_time_zone(_zone(facts)):
        return f"time zone {_zone(facts)!r} is not known; mend it with `palisade site tag`"
    return "already serves it" if facts.serving == c.to else ""


def _zone(facts: SiteFacts) -> str:
    return (facts.tags or {}).get("tz", "UTC")


def _target(wave: int, facts: SiteFacts, source_version: int) -> Target:
    c = facts.candidate
    assert c is not None and c.verdict_id is not None
    good = facts.last_good if facts.last_good != c.to else None
    return Target(wave, c.to, good or Pointer(None, source_version), c.verdict_id, _zone(facts))


def _parts(
    release: str, tags: Mapping[str, Mapping[str, str]], config: RolloutConfig, *, late: Sequence[str]
) -> list[tuple[float, list[str]]]:
    """Returns (cumulative share, sites) of the waves; what the caps keep out of the last one adds waves."""
    queue = deque(_order(release, tags, config))
    total, parts = len(queue), list[tuple[float, list[str]]]()
    limits = {
        tag: _limits(Counter(t.get(tag, "") for t in tags.values()), cap) for tag, cap in config.caps.items()
    }
    for share in config.waves:
        end = total if share == 1 else max(1, int(share * total))
        if members := _take(queue, end - (total - len(queue)), tags, limits):
            parts.append((share, sorted(members)))
    while queue:
        parts.append((1.0, sorted(_take(queue, len(queue), tags, limits))))
    if late:
        share, members = parts.pop() if parts else (1.0, [])
        parts.append((share, sorted([*members, *late])))
    return parts


def _order(release: str, tags: Mapping[str, Mapping[str, str]], config: RolloutConfig) -> list[str]:
    """Returns all sites in an order in which every prefix holds about the same share of each stratum."""
    placed: list[tuple[float, bytes, str]] = []
    for key, members in _strata(tags, config).items():
        drawn = sorted((_draw(config.seed, release, site), site) for site in members)
        shift = int.from_bytes(_draw(config.seed, release, "/".join(key))[:4], "big") / 2**32
        placed += [((i + shift) / len(drawn), draw, site) for i, (draw, site) in enumerate(drawn)]
    return [site for _, _, site in sorted(placed)]


def _strata(tags: Mapping[str, Mapping[str, str]], config: RolloutConfig) -> dict[tuple[str, ...], list[str]]:
    strata: dict[tuple[str, ...], list[str]] = {}
    for site, tag in tags.items():
        strata.setdefault(tuple(tag.get(name, "") for name in config.strata), []).append(site)
    return strata


def _limits(sizes: Mapping[str, int], cap: float) -> dict[str, int]:
    return {value: int(cap) if cap >= 1 else max(1, int(cap * n)) for value, n in sizes.items()}


def _take(
    queue: deque[str],
    count: int,
    tags: Mapping[str, Mapping[str, str]],
    limits: Mapping[str, Mapping[str, int]],
) -> list[str]:
    """Takes the first ``count`` sites of ``queue`` that no cap keeps out; the others stay, in order."""
    members: list[str] = []
    used: Counter[tuple[str, str]] = Counter()
    capped: deque[str] = deque()
    while queue and len(members) < count:
        site = queue.popleft()
        capped_tags = [(tag, tags[site].get(tag, "")) for tag in limits]
        if any(used[tag, value] >= limits[tag][value] for tag, value in capped_tags):
            capped.append(site)
            continue
        used.update(capped_tags)
        members.append(site)
    queue.extendleft(reversed(capped))
    return members


def _abort_at(config: RolloutConfig, sites: int) -> int:
    return max(int(config.abort_share * sites) + 1, min(config.abort_min_sites, sites))


def _draw(seed: int, purpose: str, site: str) -> bytes:
    return hashlib.sha256(f"{seed}/{purpose}/{site}".encode()).digest()
