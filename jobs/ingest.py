"""``palisade ingest``: the sites' new capture segments → features, one Ray Data execution for the fleet."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.cluster import connected, repair
from pipeline.cluster import ingest as cluster_ingest
from pipeline.control.deployment import ingest_sources, lease, now, open_ledger, source_model
from pipeline.ledger import CycleBusy, StaleGeneration
from pipeline.storage import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from jobs.terminal import Terminal
    from pipeline.cluster.ingest import Ingested, IngestListing
    from pipeline.config import Config
    from pipeline.ledger import Cycle, Ledger, SegmentRow, SiteRow
    from pipeline.storage import Place

ROUND = 256  # segments that a round of --follow takes, so that others come to the lease and a signal is soon answered
LOST = "features lost"  # reason in quarantine, kind in the audit chain
RETRY = 60.0  # seconds after which --follow tries a failed site again


def ingest(config: Config, terminal: Terminal) -> int:
    """Ingest once and show what came in."""
    ledger = open_ledger(config)
    source_model(ledger)
    with lease(config, ledger, "ingest") as cycle:
        summary = ingest_step(config, ledger, cycle, terminal)
        ledger.cycles.finish(cycle, summary=summary, now=now())
    show(terminal, ledger, cycle, summary)
    return Exit.DONE


def follow(config: Config, terminal: Terminal, *, interval: float) -> int:
    """Ingest what arrives until SIGINT or SIGTERM, which end it after the round that is running.

    One Ray connection; the lease is held for one round at a time, so that a cycle can run in between.
    """
    ledger = open_ledger(config)
    source_model(ledger)
    retry: dict[str, float] = {}  # failed sites and when they are tried again
    with connected(config.cluster), _stopped() as stop:
        terminal.say(f"following {config.data.captures}; SIGINT or SIGTERM ends it")
        while not stop.is_set():
            retry = {site: at for site, at in retry.items() if at > time.monotonic()}
            more = False
            try:
                if more := bool(_find(config, ledger, without=retry).new):
                    with lease(config, ledger, "ingest") as cycle:
                        summary, done = _step(config, ledger, cycle, terminal, most=ROUND, without=retry)
                        ledger.cycles.finish(cycle, summary=summary, now=now())
                    retry |= {site: time.monotonic() + RETRY for site, _ in done.failed}
                    show(terminal, ledger, cycle, summary, brief=True)
            except (CycleBusy, StaleGeneration, StoreUnavailable) as e:
                terminal.say(f"waiting: {e}")
                more = False
            stop.wait(0 if more else interval)
    return Exit.DONE


def ingest_step(config: Config, ledger: Ledger, cycle: Cycle, terminal: Terminal) -> dict[str, object]:
    """Find, featurise, commit → counts. The same step serves ``cycle``."""
    return _step(config, ledger, cycle, terminal)[0]


def captured(config: Config, ledger: Ledger) -> IngestListing:
    """Which segments that the ledger has are still there."""
    return _find(config, ledger, most=0)


def stretch(
    ledger: Ledger, site: str, segments: Iterable[SegmentRow], found: IngestListing
) -> repair.Stretch:
    """Segments of a site that count, with what is needed to make their features (again)."""
    rows = tuple(segments)
    bad = ledger.streams.quarantined(site)
    refused = tuple(frozenset(q.row for q in bad if q.segment == s.name) for s in rows)
    there = {path.name: path for path in found.counted.get(site, ())}
    return repair.Stretch(site, rows, refused, tuple(there.get(s.name) for s in rows))


def show(
    terminal: Terminal, ledger: Ledger, cycle: Cycle, summary: dict[str, object], *, brief: bool = False
) -> None:
    """Counts, and why rows were refused; ``brief``: one line."""
    reasons = Counter(
        (q.site, q.segment if q.row < 0 else "rows", q.reason)
        for q in ledger.streams.quarantined(cycle=cycle.id)
    )
    rows = [[site, where, n, reason] for (site, where, reason), n in reasons.most_common(20)]
    said = "{samples} samples of {sites} sites in {segments} segments, {quarantined} refused".format(
        **summary
    )
    parts = [table("refused", ["site", "where", "count", "reason"], rows)] if rows and not brief else []
    listed = [{"site": s, "where": w, "reason": r, "count": n} for (s, w, r), n in reasons.items()]
    data = {"cycle": cycle.id, **summary, "refused": listed}
    terminal.result(data, *parts, f"{cycle.id}: {said}" if brief else said)


def _step(
    config: Config,
    ledger: Ledger,
    cycle: Cycle,
    terminal: Terminal,
    *,
    most: int | None = None,
    without: Collection[str] = (),
) -> tuple[dict[str, object], Ingested]:
    sources = ingest_sources(config, ledger)
    found = _find(config, ledger, most=most, without=without)
    if not found.sites:
        raise ValueError(
            f"data.captures: {config.data.captures} holds no site folder with segments; expected <site>/segment-*.parquet"
        )
    new_sites = ledger.streams.register({site: {} for site in found.sites}, now=now())
    for stray in found.strays:
        terminal.say(f"warning: {stray}")
    if config.data.retention == "until_ingested":
        _forget_counted(config, ledger, found)
    done = cluster_ingest.Ingested((), (), (), ())
    if found.new:
        with connected(config.cluster), terminal.progress("ingest", "segments") as advance:
            done = cluster_ingest.run(
                config,
                found.new,
                checkpoints=[s.path for s in sources],
                on_progress=advance,
                history=lambda site: {s.sha256: s.name for s, _ in ledger.streams.segments(site) if s.rows},
            )
    _repair(config, ledger, cycle, terminal, found, without=without)
    cluster_ingest.forget_orphans(config, [s.trunk for s in sources], done)
    ledger.streams.commit(cycle, done.segments, done.quarantined, now=now())
    ledger.streams.set_status(dict(done.failed))
    for site, reason in done.failed:
        terminal.say(f"warning: {site}: not ingested, the next cycle tries again: {reason}")
    if config.data.retention == "until_ingested":
        _forget(config, found, done)
    counted = [s for s in done.segments if s.name.endswith(".parquet")]  # refused ones carry their digest
    return {
        "segments": len(counted),
        "samples": sum(s.good for s in counted),
        "new_sites": len(new_sites),
        "sites": len({s.site for s in counted}),
        "quarantined": len(done.quarantined),
        "failed_sites": len(done.failed),
    }, done


def _find(
    config: Config, ledger: Ledger, *, most: int | None = None, without: Collection[str] = ()
) -> IngestListing:
    offsets = {row.site: row.ingested for row in ledger.streams.sites()}
    return cluster_ingest.find(
        config.data,
        ledger.streams.segment_names(),
        lambda site: offsets.get(site, 0),
        most=most,
        without=without,
    )


def _repair(
    config: Config,
    ledger: Ledger,
    cycle: Cycle,
    terminal: Terminal,
    found: IngestListing,
    *,
    without: Collection[str],
) -> None:
    """Make again what of failed sites' features is damaged or missing; where the captures are gone, the site goes on.

    Only failed sites are looked at, so a healthy fleet pays nothing.
    """
    failed = [
        r
        for r in ledger.streams.sites()
        if r.status == "failed" and r.learned < r.ingested and r.site not in without
    ]
    if not failed:
        return
    stretches = [stretch(ledger, row.site, _ahead(ledger, row), found) for row in failed]
    with connected(config.cluster):
        done = repair.run(config, stretches, checkpoint=source_model(ledger).path)
    ledger.streams.quarantine_lost(
        cycle, [(d.site, name) for d in done for name in d.lost], reason=LOST, now=now()
    )
    for d in done:
        if d.restored:
            terminal.say(f"{d.site}: features of {', '.join(d.restored)} did not verify and were made again")
        if d.lost:
            terminal.say(
                f"warning: {d.site}: {LOST}: {', '.join(d.lost)}: they do not verify and the captures are gone; these samples "
                "are quarantined, the site goes on with what comes next"
            )
        if d.error:
            terminal.say(
                f"warning: {d.site}: its features are not repaired, the next cycle tries again: {d.error}"
            )
    ledger.streams.set_status({d.site: "" for d in done if (d.restored or d.lost) and not d.error})


def _ahead(ledger: Ledger, row: SiteRow) -> Iterator[SegmentRow]:
    """What the site has not learned from yet."""
    return (
        s
        for s, _ in ledger.streams.segments(row.site)
        if s.rows and row.learned <= s.base_offset < row.ingested
    )


def _forget(config: Config, found: IngestListing, done: Ingested) -> None:
    """Frames do not outlive ingest; a segment with a refused row stays for whoever looks into it."""
    clean = {(s.site, s.name): s.sha256 for s in done.segments if not s.quarantined}
    for backlog in found.new:
        for path in map(cluster_ingest.segment_at, backlog.paths):
            _unlink(path, clean.get((backlog.site, path.name)), config.data.max_bytes)


def _forget_counted(config: Config, ledger: Ledger, found: IngestListing) -> None:
    """What ``_forget`` did not come to after an earlier commit."""
    for site, paths in found.counted.items():
        clean = {s.name: s.sha256 for s, _ in ledger.streams.segments(site) if not s.quarantined}
        for path in paths:
            _unlink(path, clean.get(path.name), config.data.max_bytes)


def _unlink(path: Place, sha256: str | None, limit: int) -> None:
    """Delete a segment whose bytes are those that the ledger counts; others are left alone."""
    if sha256 and cluster_ingest.digest(path, limit) == sha256:
        path.unlink(missing_ok=True)


@contextmanager
def _stopped() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one ends the process as usual."""
    stop = threading.Event()
    before = {int(s): signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
