"""``palisade rebase``: every site anew under another source model's trunk, beside what it serves and learns from.

The first half of a release of a new source model with ``--states rebase``: candidates with verdicts for a plan. No site's
cursor, learner or state changes by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.adapt import SHOWN, exit_code, record, show
from jobs.ingest import captured, stretch
from pipeline.cluster import connected, repair
from pipeline.control.deployment import check_size, lease, now, open_ledger, source_model
from pipeline.control.rebase import Rebased, retained_segments, unbroken_suffix

if TYPE_CHECKING:
    from jobs.terminal import Terminal
    from pipeline.cluster.repair import Repaired
    from pipeline.config import Config
    from pipeline.ledger import Cycle, Ledger, SegmentRow, SiteRow, SourceRow, VerdictRow


def rebase(config: Config, terminal: Terminal, *, version: int) -> int:
    """Adapt every site anew from source model ``version`` and show the verdicts. A repeated call does what is left."""
    ledger = open_ledger(config, create=False)
    done = rebase_fleet(config, ledger, terminal, version=version)
    for site, reason in list(done.reset.items())[:SHOWN]:
        terminal.say(f"{site}: cannot be rebased: {reason}; reset it")
    for site, reason in list(done.failed.items())[:SHOWN]:
        terminal.say(f"warning: {site}: not rebased: {reason}")
    summary = {"source_version": version, "reset": dict(done.reset), "failed_sites": len(done.failed)}
    verdicts = list(done.candidates.values())
    show(terminal, done.cycle, summary, verdicts)
    return exit_code(verdicts, failed=len(done.failed))


def rebase_fleet(config: Config, ledger: Ledger, terminal: Terminal, *, version: int) -> Rebased:
    """Features under the trunk of ``version`` for what is retained of each site, then states and verdicts from them.

    A site that was rebased to where it has learned to is left as it is. Raises ValueError for a version that cannot be
    gone over to.
    """
    source = source_model(ledger, version)
    check_size(config, source)
    if ledger.sources.champion().version == version:
        raise ValueError(f"source v{version} is the champion already; `palisade train` makes another")
    ledger.verdicts.anchor(source.trunk)  # or says that there is nothing to judge on
    if ledger.sources.challenger() != version:
        terminal.say(f"remark: source v{version} is not the challenger: new samples get no features of it")
    with (
        lease(config, ledger, "rebase", purpose=_purpose(config, version)) as cycle,
        connected(config.cluster),
    ):
        done = _rebase(config, ledger, cycle, terminal, source)
        outcomes = [v.outcome for v in done.candidates.values()]
        counts = {
            "reset": len(done.reset),
            "failed_sites": len(done.failed),
            **{o: outcomes.count(o) for o in set(outcomes)},
        }
        summary: dict[str, object] = {"source_version": version, **counts}
        ledger.cycles.finish(cycle, summary=summary, now=now())
    record(config, ledger, cycle, summary, version=version)
    return done


def _purpose(config: Config, version: int) -> str:
    """What sets a rebase apart from others under the same configuration."""
    return f" v{version} {config.rollout.rebase_samples}"


def _rebase(config: Config, ledger: Ledger, cycle: Cycle, terminal: Terminal, source: SourceRow) -> Rebased:
    from pipeline.cluster import fleet
    from pipeline.control.adapt import shard_job

    same = config.fingerprint() + _purpose(config, source.version)
    before = ledger.verdicts.rebased(source.version, fingerprint=same)
    rows = {r.site: r for r in ledger.streams.sites()}
    kept, made = _featured(config, ledger, terminal, source, list(rows.values()))
    failed = {site: d.error for site, d in made.items() if d.error}
    reset: dict[str, str] = {}
    left: dict[str, int] = {}
    for site, row in rows.items():
        whole = unbroken_suffix(kept[site], lambda s, lost=made[site].lost: s.name not in lost)
        samples = sum(s.good for s in whole)
        if site in failed or (site in before and _stands(before[site], row, made[site])):
            continue
        if samples:
            left[site] = samples
        else:
            reset[site] = "its captures are gone" if row.learned else "it has learned from nothing yet"
    if left:
        job = shard_job(config, ledger, cycle, version=source.version, retained=config.rollout.rebase_samples)
        with terminal.progress("rebase", "sites") as advance:
            failed |= fleet.run_fleet(job, left, placement=fleet.placement(config), on_progress=advance)
    return Rebased(cycle, ledger.verdicts.rebased(source.version, fingerprint=same), reset, failed)


def _featured(
    config: Config, ledger: Ledger, terminal: Terminal, source: SourceRow, rows: list[SiteRow]
) -> tuple[dict[str, tuple[SegmentRow, ...]], dict[str, Repaired]]:
    """By site what is retained of it, and what became of its features; those of what it has not learned from yet too."""
    found = captured(config, ledger)
    kept: dict[str, tuple[SegmentRow, ...]] = {}
    needed: list[repair.Stretch] = []
    for row in rows:
        told = [s for s, _ in ledger.streams.segments(row.site) if s.rows]
        kept[row.site] = retained_segments(told, learned=row.learned, samples=config.rollout.rebase_samples)
        ahead = (s for s in told if row.learned <= s.base_offset < row.ingested)
        needed.append(stretch(ledger, row.site, (*kept[row.site], *ahead), found))
    with terminal.progress("features", "sites") as advance:
        done = repair.run(config, needed, checkpoint=source.path, on_progress=advance)
    return kept, {d.site: d for d in done}


def _stands(before: VerdictRow, row: SiteRow, made: Repaired) -> bool:
    """Whether a rebase again would come to the same."""
    return before.offset_to == row.learned and not made.restored
