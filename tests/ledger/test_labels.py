"""What people say about presentations: recorded once, the newest counts, and nothing is forgotten."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest

from pipeline.ledger import LabelFileRow, LabelRow, Ledger, LedgerError, QuarantineRow
from tests.support.ledgers import T0

HOUR = timedelta(hours=1)
RED = LabelRow("s0", "a", "labels-1.parquet", 0, "print", "red-team", "ann", T0)


def record(ledger, rows, *names, bad=(), at=T0):
    files = [LabelFileRow("s0", name, "f" * 64, len(rows), len(rows)) for name in names]
    ledger.labels.commit(files, rows, bad, cycle="cycle-00001", now=at)


def test_a_file_counts_once_with_what_was_refused_of_it(ledger):
    bad = [QuarantineRow("s0", "labels-1.parquet", 1, "b", "label 'x'")]
    for _ in range(2):
        record(ledger, [RED], "labels-1.parquet", bad=bad)
    assert ledger.labels.of(["s0", "s1"]) == {"s0": {"a": RED}, "s1": {}}
    assert ledger.labels.sites() == ["s0"]
    assert ledger.labels.file_names() == {"s0": {"labels-1.parquet"}}
    assert ledger.streams.quarantined("s0") == bad
    assert [r[2] for r in ledger.audit.rows()].count("labels") == 1


def test_of_several_files_the_last_recorded_counts(ledger):
    record(ledger, [replace(RED, file="labels-2.parquet")], "labels-2.parquet")
    mended = replace(
        RED, file="labels-1.parquet", label=1, instrument="bona_fide", kind="correction", who="bo"
    )
    record(ledger, [mended], "labels-1.parquet", at=T0 + HOUR)
    assert ledger.labels.of(["s0"])["s0"]["a"] == mended


def test_what_is_retracted_counts_no_longer_and_stays_in_the_record(ledger):
    other = replace(RED, sample_id="b")
    record(ledger, [RED, other], "labels-1.parquet")
    with pytest.raises(LedgerError, match=r"'c' has no label .* nothing was retracted; .*site show s0"):
        ledger.labels.retract("s0", ["a", "c"], by="bo", reason="mistake", now=T0 + HOUR)
    assert ledger.labels.retract("s0", ["a"], by="bo", reason="mistake", now=T0 + HOUR) == 1
    assert ledger.labels.of(["s0"]) == {"s0": {"b": other}}
    with pytest.raises(LedgerError, match="has no label"):
        ledger.labels.retract("s0", ["a"], by="bo", reason="again", now=T0 + HOUR)
    kind, payload = ledger.audit.rows()[-1][2:4]
    assert kind == "unlabel"
    assert payload == {"site": "s0", "samples": ["a"], "by": "bo", "reason": "mistake"}
    record(ledger, [replace(RED, file="labels-3.parquet")], "labels-3.parquet")
    assert set(ledger.labels.of(["s0"])["s0"]) == {"a", "b"}, "it may be labelled anew"


def test_many_writers_record_a_file_once(url, ledger):
    others = [Ledger.open(url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda other: record(other, [RED], "labels-1.parquet"), others))
    assert ledger.labels.of(["s0"]) == {"s0": {"a": RED}}
    assert [r[2] for r in ledger.audit.rows()].count("labels") == 1
    assert ledger.audit.first_broken() is None
    for other in others:
        other.close()
