"""``palisade ingest``: the sites' new capture segments → features, one Ray Data execution for the fleet."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import Exit, table
from jobs.deployment import check_size, lease, now, open_ledger, source_model
from pipeline.cluster import connected
from pipeline.cluster import ingest as cluster_ingest

if TYPE_CHECKING:
    from jobs import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Cycle, Ledger


def ingest(config: Config, terminal: Terminal) -> int:
    """Ingest once and show what came in."""
    ledger = open_ledger(config)
    source_model(ledger)
    with lease(config, ledger, "ingest") as cycle:
        summary = ingest_step(config, ledger, cycle, terminal)
        ledger.finish_cycle(cycle, summary=summary, now=now())
    show(terminal, ledger, cycle, summary)
    return Exit.DONE


def ingest_step(config: Config, ledger: Ledger, cycle: Cycle, terminal: Terminal) -> dict[str, object]:
    """Find, featurise, commit → counts. The same step serves ``cycle``."""
    source = source_model(ledger)
    check_size(config, source)
    next_offset = {row.site: row.ingested for row in ledger.sites()}
    found = cluster_ingest.find(config.data, ledger.known_segments(), lambda site: next_offset.get(site, 0))
    if not found.sites:
        raise ValueError(
            f"data.captures: {config.data.captures} holds no site folder with segments; expected <site>/segment-*.parquet"
        )
    new_sites = ledger.register_sites({site: {} for site in found.sites}, now=now())
    for stray in found.strays:
        terminal.say(f"warning: {stray}")
    if found.new:
        with connected(config.cluster), terminal.progress("ingest", "segments") as advance:
            done = cluster_ingest.run(config, found.new, checkpoint=Path(source.path), on_progress=advance)
    else:
        done = cluster_ingest.Ingested((), (), ())
    refused = [q for _, q in found.refused]
    ledger.commit_ingest(
        cycle, [s for s, _ in found.refused] + list(done.segments), refused + list(done.quarantined), now=now()
    )
    ledger.set_status(dict(done.failed))
    for site, reason in done.failed:
        terminal.say(f"warning: {site}: not ingested, the next cycle tries again: {reason}")
    if config.data.retention == "until_ingested":
        _forget(found.new, done)
    return {
        "segments": len(done.segments), "samples": sum(s.good for s in done.segments), "new_sites": len(new_sites),
        "sites": len({s.site for s in done.segments}), "quarantined": len(refused) + len(done.quarantined),
        "failed_sites": len(done.failed),
    }  # fmt: skip


def show(terminal: Terminal, ledger: Ledger, cycle: Cycle, summary: dict[str, object]) -> None:
    """Counts, and why rows were refused."""
    reasons = Counter(
        (q.site, q.segment if q.row < 0 else "rows", q.reason) for q in ledger.quarantined(cycle=cycle.id)
    )
    rows = [[site, where, n, reason] for (site, where, reason), n in reasons.most_common(20)]
    said = "{samples} samples of {sites} sites in {segments} segments, {quarantined} refused".format(**summary)
    parts = [table("refused", ["site", "where", "count", "reason"], rows)] if rows else []
    listed = [{"site": s, "where": w, "reason": r, "count": n} for (s, w, r), n in reasons.items()]
    terminal.result({"cycle": cycle.id, **summary, "refused": listed}, *parts, said)


def _forget(new: tuple[cluster_ingest.NewSegment, ...], done: cluster_ingest.Ingested) -> None:
    """Frames do not outlive ingest; a segment with a refused row stays for whoever looks into it."""
    clean = {(s.site, s.name) for s in done.segments if not s.quarantined}
    for segment in new:
        if (segment.site, segment.name) in clean:
            Path(segment.path).unlink(missing_ok=True)
