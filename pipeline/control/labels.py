"""Records the label files that arrived: each row counts, or is in quarantine with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.control.deployment import now
from pipeline.data.captures import BadSegment, list_segments
from pipeline.data.presentations import LIMITS, PREFIX, read_label_file
from pipeline.data.segments import digest, marked, not_refused
from pipeline.ledger import LabelFileRow, LabelRow, QuarantineRow
from pipeline.storage import StoreUnavailable, place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.config import Config
    from pipeline.control.deployment import Reporter
    from pipeline.ledger import Ledger
    from pipeline.storage import Place


@dataclass(frozen=True)
class RecordedLabels:
    """Counts of what was recorded at once."""

    files: int = 0
    labels: int = 0
    quarantined: int = 0


def record_labels(config: Config, ledger: Ledger, reporter: Reporter, *, cycle: str) -> RecordedLabels:
    """Records all label files of ``data.labels`` that the ledger does not know, each as a whole and once.

    A file of a site that is not registered waits until the site's first captures are there. ``cycle`` names
    what records them.
    """
    if config.data.labels is None:
        return RecordedLabels()
    root = place(config.data.labels)
    if isinstance(root, Path) and not root.exists():
        return RecordedLabels()  # nobody has labelled anything yet
    listing = list_segments(root, prefix=PREFIX)
    for stray in listing.rejected:
        reporter.say(f"warning: data.labels: {stray}")
    known = ledger.labels.file_names()
    fresh: dict[str, list[Place]] = {}
    for site, paths in listing.segments.items():
        names = known.get(site, ())
        if new := not_refused([p for p in paths if p.name not in names], names, LIMITS.max_bytes):
            fresh[site] = new
    registered = {row.site for row in ledger.streams.sites()} if fresh else set[str]()
    for site in sorted(fresh.keys() - registered):
        reporter.say(f"warning: labels of {site} wait: no site of this name has sent captures")
        del fresh[site]
    return record_files(ledger, reporter, fresh, cycle=cycle)


def record_files(
    ledger: Ledger, reporter: Reporter, fresh: Mapping[str, Sequence[Place]], *, cycle: str
) -> RecordedLabels:
    """Records the label files ``fresh`` of registered sites; one that cannot be read now waits."""
    files: list[LabelFileRow] = []
    rows: list[LabelRow] = []
    bad: list[QuarantineRow] = []
    for site, path in ((site, path) for site, paths in fresh.items() for path in paths):
        try:
            file, of_file, refused = _read(site, path)
        except (FileNotFoundError, StoreUnavailable) as e:
            reporter.say(f"warning: labels of {site} wait: {path.name}: {' '.join(str(e).split())}")
            continue
        files.append(file)
        rows += of_file
        bad += refused
    if files:
        ledger.labels.commit(files, rows, bad, cycle=cycle, now=now())
    return RecordedLabels(len(files), len(rows), len(bad))


def _read(site: str, path: Place) -> tuple[LabelFileRow, list[LabelRow], list[QuarantineRow]]:
    """Returns a file as the ledger keeps it; one that is refused as a whole is a row of quarantine."""
    try:
        read = read_label_file(path, site=site)
    except BadSegment as e:
        sha256 = digest(path, LIMITS.max_bytes)
        refused = QuarantineRow(site, path.name, -1, None, str(e))
        return LabelFileRow(site, marked(path.name, sha256), sha256, 0, 0), [], [refused]
    rows = [
        LabelRow(
            site,
            p.sample_id,
            path.name,
            int(p.label),
            p.instrument,
            p.kind,
            p.who,
            datetime.fromtimestamp(p.labelled_at / 1e6, UTC),
        )
        for p in read.good
    ]
    bad = [QuarantineRow(site, path.name, b.row, b.sample_id, b.reason) for b in read.bad]
    return LabelFileRow(site, path.name, read.sha256, read.rows, len(rows)), rows, bad
