"""``palisade ingest``: turns the fleet's new capture segments into features, in one Ray Data execution."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.cluster import connected, repair
from pipeline.cluster import ingest as cluster_ingest
from pipeline.control.deployment import ingest_sources, lease, now, open_ledger, source_model
from pipeline.control.labels import record_labels
from pipeline.data.segments import digest, segment_at
from pipeline.ledger import CycleBusy, StaleGeneration
from pipeline.storage import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from jobs.terminal import Terminal
    from pipeline.cluster.ingest import Ingested, IngestListing
    from pipeline.config import Config
    from pipeline.ledger import Cycle, Ledger, SegmentRow, SiteRow, SourceRow
    from pipeline.storage import Place

ROUND = 256  # segments of a round of --follow; other jobs get the lease, and a signal an answer, in between
LOST = "features lost"  # reason in the quarantine, kind in the audit chain
RETRY = 60.0  # seconds after which --follow tries a failed site again
REASONS = 20  # rows of the table of refusals


@dataclass(frozen=True)
class IngestSummary:
    """Counts of one ingest."""

    segments: int
    samples: int
    new_sites: int
    sites: int  # with a new segment
    quarantined: int
    failed_sites: int
    labels: int = 0

    def to_json(self) -> dict[str, int]:
        """Returns the counts as the ledger, MLflow and the terminal get them."""
        return asdict(self)


def ingest(config: Config, terminal: Terminal) -> int:
    """Ingests all new segments once and shows the counts."""
    ledger = open_ledger(config)
    source_model(ledger)
    with lease(config, ledger, "ingest") as cycle:
        summary = ingest_step(config, ledger, cycle, terminal)
        ledger.cycles.finish(cycle, summary=summary.to_json(), now=now())
    _show(terminal, ledger, cycle, summary)
    return Exit.DONE


def follow(config: Config, terminal: Terminal, *, interval: float) -> int:
    """Ingests segments as they arrive until SIGINT or SIGTERM; the round that runs then is finished.

    Ray stays connected. The lease is held for one round at a time, so that a cycle can run in between.
    """
    ledger = open_ledger(config)
    source_model(ledger)
    retry: dict[str, float] = {}  # time at which a failed site is tried again
    with connected(config.cluster), _stop_on_signal() as stop:
        terminal.say(f"following {config.data.captures}; SIGINT or SIGTERM ends it")
        while not stop.is_set():
            retry = {site: at for site, at in retry.items() if at > time.monotonic()}
            more = False
            try:
                if more := bool(_list_segments(config, ledger, without=retry).new):
                    with lease(config, ledger, "ingest") as cycle:
                        summary, failed = _ingest(config, ledger, cycle, terminal, limit=ROUND, without=retry)
                        ledger.cycles.finish(cycle, summary=summary.to_json(), now=now())
                    retry |= {site: time.monotonic() + RETRY for site in failed}
                    _show(terminal, ledger, cycle, summary, brief=True)
            except (CycleBusy, StaleGeneration, StoreUnavailable) as e:
                terminal.say(f"waiting: {e}")
                more = False
            stop.wait(0 if more else interval)
    return Exit.DONE


def ingest_step(config: Config, ledger: Ledger, cycle: Cycle, terminal: Terminal) -> IngestSummary:
    """Lists, featurises and commits all new segments; ``cycle`` runs the same step."""
    return _ingest(config, ledger, cycle, terminal)[0]


def list_ingested(config: Config, ledger: Ledger) -> IngestListing:
    """Lists the ingested segments whose captures are still stored, and no new ones."""
    return _list_segments(config, ledger, limit=0)


def stretch(
    ledger: Ledger, site: str, segments: Iterable[SegmentRow], listing: IngestListing
) -> repair.Stretch:
    """Returns segments of a site with what making their features again needs: refused rows and captures."""
    rows = tuple(segments)
    quarantined = ledger.streams.quarantined(site)
    refused = tuple(frozenset(q.row for q in quarantined if q.segment == s.name) for s in rows)
    captures = {path.name: path for path in listing.counted.get(site, ())}
    return repair.Stretch(site, rows, refused, tuple(captures.get(s.name) for s in rows))


def _ingest(
    config: Config,
    ledger: Ledger,
    cycle: Cycle,
    terminal: Terminal,
    *,
    limit: int | None = None,
    without: Collection[str] = (),
) -> tuple[IngestSummary, tuple[str, ...]]:
    """Ingests at most ``limit`` segments of the sites not in ``without``; returns counts and failed sites."""
    sources = ingest_sources(config, ledger)
    listing = _list_segments(config, ledger, limit=limit, without=without)
    if not listing.sites:
        captures = config.data.captures
        raise ValueError(
            f"data.captures: {captures} holds no site folder with segments; expected <site>/segment-*.parquet"
        )
    new_sites = ledger.streams.register({site: {} for site in listing.sites}, now=now())
    for stray in listing.strays:
        terminal.say(f"warning: {stray}")
    if config.data.retention == "until_ingested":
        _delete_counted(config, ledger, listing)
    ingested = _featurise(config, ledger, terminal, sources, listing)
    _repair(config, ledger, cycle, terminal, listing, without=without)
    cluster_ingest.forget_orphans(config, [s.trunk for s in sources], ingested)
    ledger.streams.commit(cycle, ingested.segments, ingested.quarantined, now=now())
    ledger.streams.set_status(dict(ingested.failed))
    for site, reason in ingested.failed:
        terminal.say(f"warning: {site}: not ingested, the next cycle tries again: {reason}")
    labels = record_labels(config, ledger, terminal, cycle=cycle.id)
    if config.data.retention == "until_ingested":
        _delete_ingested(config, listing, ingested)
    counted = [
        s for s in ingested.segments if s.name.endswith(".parquet")
    ]  # a refused one's name has its digest
    summary = IngestSummary(
        segments=len(counted),
        samples=sum(s.good for s in counted),
        new_sites=len(new_sites),
        sites=len({s.site for s in counted}),
        quarantined=len(ingested.quarantined) + labels.quarantined,
        labels=labels.labels,
        failed_sites=len(ingested.failed),
    )
    return summary, tuple(site for site, _ in ingested.failed)


def _list_segments(
    config: Config, ledger: Ledger, *, limit: int | None = None, without: Collection[str] = ()
) -> IngestListing:
    offsets = {row.site: row.ingested_offset for row in ledger.streams.sites()}
    segments = ledger.streams.segment_names()
    return cluster_ingest.find(
        config.data, segments, lambda site: offsets.get(site, 0), most=limit, without=without
    )


def _featurise(
    config: Config, ledger: Ledger, terminal: Terminal, sources: Sequence[SourceRow], listing: IngestListing
) -> Ingested:
    """Makes and stores the features of all new segments; nothing counts before the commit."""
    if not listing.new:
        return cluster_ingest.Ingested((), (), (), ())
    with connected(config.cluster), terminal.progress("ingest", "segments") as advance:
        return cluster_ingest.run(
            config,
            listing.new,
            checkpoints=[s.path for s in sources],
            on_progress=advance,
            history=lambda site: {s.sha256: s.name for s, _ in ledger.streams.segments(site) if s.rows},
        )


def _repair(
    config: Config,
    ledger: Ledger,
    cycle: Cycle,
    terminal: Terminal,
    listing: IngestListing,
    *,
    without: Collection[str],
) -> None:
    """Makes damaged or missing features of failed sites again from their captures.

    Features whose captures are gone are quarantined as lost, and the site goes on behind them. Only failed
    sites are checked, so a healthy fleet pays nothing.
    """
    failed = [
        r
        for r in ledger.streams.sites()
        if r.status == "failed" and r.learned_offset < r.ingested_offset and r.site not in without
    ]
    if not failed:
        return
    stretches = [stretch(ledger, row.site, _not_learned(ledger, row), listing) for row in failed]
    with connected(config.cluster):
        repaired = repair.run(config, stretches, checkpoint=source_model(ledger).path)
    lost = [(r.site, name) for r in repaired for name in r.lost]
    ledger.streams.quarantine_lost(cycle, lost, reason=LOST, now=now())
    for r in repaired:
        if r.restored:
            segments = ", ".join(r.restored)
            terminal.say(f"{r.site}: features of {segments} did not verify and were made again")
        if r.lost:
            terminal.say(
                f"warning: {r.site}: {LOST}: {', '.join(r.lost)}: they do not verify and the captures are "
                "gone; these samples are quarantined, the site goes on with what comes next"
            )
        if r.error:
            terminal.say(
                f"warning: {r.site}: its features are not repaired, the next cycle tries again: {r.error}"
            )
    ledger.streams.set_status({r.site: "" for r in repaired if (r.restored or r.lost) and not r.error})


def _not_learned(ledger: Ledger, row: SiteRow) -> Iterator[SegmentRow]:
    """Yields the segments that the site has not learned from yet."""
    return (
        s
        for s, _ in ledger.streams.segments(row.site)
        if s.rows and row.learned_offset <= s.base_offset < row.ingested_offset
    )


def _delete_ingested(config: Config, listing: IngestListing, ingested: Ingested) -> None:
    """Deletes the captures that were just ingested; a segment with a refused row stays for inspection."""
    clean = {(s.site, s.name): s.sha256 for s in ingested.segments if not s.quarantined}
    for backlog in listing.new:
        for path in map(segment_at, backlog.paths):
            _delete_same(path, clean.get((backlog.site, path.name)), config.data.max_bytes)


def _delete_counted(config: Config, ledger: Ledger, listing: IngestListing) -> None:
    """Deletes the captures of earlier ingests that stopped between their commit and ``_delete_ingested``."""
    for site, paths in listing.counted.items():
        clean = {s.name: s.sha256 for s, _ in ledger.streams.segments(site) if not s.quarantined}
        for path in paths:
            _delete_same(path, clean.get(path.name), config.data.max_bytes)


def _delete_same(path: Place, sha256: str | None, limit: int) -> None:
    """Deletes a segment if its bytes are those that the ledger counts, of digest ``sha256``."""
    if sha256 and digest(path, limit) == sha256:
        path.unlink(missing_ok=True)


def _show(
    terminal: Terminal, ledger: Ledger, cycle: Cycle, summary: IngestSummary, *, brief: bool = False
) -> None:
    """Shows the counts and the reasons of refusals; ``brief`` shows one line."""
    reasons = Counter(
        (q.site, q.segment if q.row < 0 else "rows", q.reason)
        for q in ledger.streams.quarantined(cycle=cycle.id)
    )
    rows = [[site, where, n, reason] for (site, where, reason), n in reasons.most_common(REASONS)]
    parts = [table("refused", ["site", "where", "count", "reason"], rows)] if rows and not brief else []
    refused = [{"site": s, "where": w, "reason": r, "count": n} for (s, w, r), n in reasons.items()]
    s = summary
    counts = f"{s.samples} samples of {s.sites} sites in {s.segments} segments, {s.quarantined} refused"
    counts += f", {s.labels} labels" if s.labels else ""
    terminal.result(
        {"cycle": cycle.id, **summary.to_json(), "refused": refused},
        *parts,
        f"{cycle.id}: {counts}" if brief else counts,
    )


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Yields an event that the first SIGINT or SIGTERM sets; a second one ends the process as usual."""
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
