"""``palisade rollout rebase``: adapts every site anew under another source model's trunk.

This is the first half of a release of a new source model with ``--states rebase``: it makes candidates with
verdicts for a plan, beside the present states. No site's cursor, learner or serving state changes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.adapt import SHOWN, exit_code, record, show
from jobs.ingest import list_ingested, stretch
from pipeline.cluster import connected, repair
from pipeline.control.deployment import check_size, lease, now, open_ledger, source_model
from pipeline.control.rebase import Rebased, retained_segments, unbroken_suffix

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jobs.terminal import Terminal
    from pipeline.cluster.repair import Repaired
    from pipeline.config import Config
    from pipeline.ledger import Cycle, Ledger, SegmentRow, SiteRow, SourceRow, VerdictRow


@dataclass(frozen=True)
class RebaseSummary:
    """Counts of one rebase of the fleet."""

    source_version: int
    reset: int  # sites that cannot be rebased
    failed_sites: int
    outcomes: Mapping[str, int]  # candidates by outcome of their verdict: pass, hold, fail

    def to_json(self) -> dict[str, int]:
        """Returns the counts as the ledger and MLflow get them."""
        return {
            "source_version": self.source_version,
            "reset": self.reset,
            "failed_sites": self.failed_sites,
            **self.outcomes,
        }


def rebase(config: Config, terminal: Terminal, *, version: int) -> int:
    """Adapts every site anew from source ``version`` and shows the verdicts; repeated, it does the rest."""
    ledger = open_ledger(config, create=False)
    rebased = rebase_fleet(config, ledger, terminal, version=version)
    for site, reason in list(rebased.reset.items())[:SHOWN]:
        terminal.say(f"{site}: cannot be rebased: {reason}; reset it")
    for site, reason in list(rebased.failed.items())[:SHOWN]:
        terminal.say(f"warning: {site}: not rebased: {reason}")
    verdicts = list(rebased.candidates.values())
    counts = {"source_version": version, "reset": dict(rebased.reset), "failed_sites": len(rebased.failed)}
    show(terminal, rebased.cycle, counts, verdicts)
    return exit_code(verdicts, failed=len(rebased.failed))


def rebase_fleet(config: Config, ledger: Ledger, terminal: Terminal, *, version: int) -> Rebased:
    """Makes features under the trunk of ``version`` of the sites' retained samples, then states, verdicts.

    A site whose rebase is up to date is left as it is. Raises ValueError if the fleet cannot change to
    ``version``.
    """
    source = source_model(ledger, version)
    check_size(config, source)
    if ledger.sources.champion().version == version:
        raise ValueError(f"source v{version} is the champion already; `palisade train` makes another")
    ledger.verdicts.anchor(source.trunk)  # raises if there is no anchor set to judge on
    if ledger.sources.challenger() != version:
        terminal.say(f"remark: source v{version} is not the challenger: new samples get no features of it")
    purpose = _purpose(config, version)
    with lease(config, ledger, "rebase", purpose=purpose) as cycle, connected(config.cluster):
        rebased = _rebase(config, ledger, cycle, terminal, source)
        outcomes = Counter(v.outcome for v in rebased.candidates.values())
        summary = RebaseSummary(version, len(rebased.reset), len(rebased.failed), outcomes)
        ledger.cycles.finish(cycle, summary=summary.to_json(), now=now())
    record(config, ledger, cycle, summary.to_json(), version=version)
    return rebased


def _purpose(config: Config, version: int) -> str:
    """Returns the part of a rebase's identity that the configuration's fingerprint does not hold."""
    return f" v{version} {config.rollout.rebase_samples}"


def _rebase(config: Config, ledger: Ledger, cycle: Cycle, terminal: Terminal, source: SourceRow) -> Rebased:
    from pipeline.cluster import fleet
    from pipeline.control.adapt import shard_job

    identity = config.fingerprint() + _purpose(config, source.version)
    before = ledger.verdicts.rebased(source.version, fingerprint=identity)
    rows = {r.site: r for r in ledger.streams.sites()}
    retained, repaired = _make_features(config, ledger, terminal, source, list(rows.values()))
    failed = {site: r.error for site, r in repaired.items() if r.error}
    reset: dict[str, str] = {}
    left: dict[str, int] = {}
    for site, row in rows.items():
        whole = unbroken_suffix(retained[site], lambda s, lost=repaired[site].lost: s.name not in lost)
        samples = sum(s.good for s in whole)
        if site in failed or (site in before and _up_to_date(before[site], row, repaired[site])):
            continue
        if samples:
            left[site] = samples
        else:
            reset[site] = "its captures are gone" if row.learned_offset else "it has learned from nothing yet"
    if left:
        job = shard_job(config, ledger, cycle, version=source.version, retained=config.rollout.rebase_samples)
        with terminal.progress("rebase", "sites") as advance:
            failed |= fleet.run_fleet(job, left, placement=fleet.placement(config), on_progress=advance)
    candidates = ledger.verdicts.rebased(source.version, fingerprint=identity)
    return Rebased(cycle, candidates, reset, failed)


def _make_features(
    config: Config, ledger: Ledger, terminal: Terminal, source: SourceRow, rows: Sequence[SiteRow]
) -> tuple[dict[str, tuple[SegmentRow, ...]], dict[str, Repaired]]:
    """Makes missing features under the trunk of ``source``, of retained and of not yet learned segments.

    Returns by site the retained segments and the result of the repair.
    """
    listing = list_ingested(config, ledger)
    retained: dict[str, tuple[SegmentRow, ...]] = {}
    stretches: list[repair.Stretch] = []
    for row in rows:
        segments = [s for s, _ in ledger.streams.segments(row.site) if s.rows]
        samples = config.rollout.rebase_samples
        retained[row.site] = retained_segments(segments, learned=row.learned_offset, samples=samples)
        ahead = [s for s in segments if row.learned_offset <= s.base_offset < row.ingested_offset]
        stretches.append(stretch(ledger, row.site, (*retained[row.site], *ahead), listing))
    with terminal.progress("features", "sites") as advance:
        repaired = repair.run(config, stretches, checkpoint=source.path, on_progress=advance)
    return retained, {r.site: r for r in repaired}


def _up_to_date(before: VerdictRow, row: SiteRow, repaired: Repaired) -> bool:
    """Returns True if another rebase of the site would give the same candidate."""
    return before.offset_to == row.learned_offset and not repaired.restored
