"""What people say about presentations: recorded once, the newest counts, and nothing is forgotten."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from pipeline.ledger import LabelFileRow, LabelRow, LedgerError, QuarantineRow, StaleGeneration
from tests.support.ledgers import T0, begin

HOUR = timedelta(hours=1)
RED = LabelRow("s0", "a", "labels-1.parquet", 0, "print", "red-team", "ann", T0)


def file(name, site="s0", good=1):
    return LabelFileRow(site, name, "f" * 64, good, good)


def test_a_file_counts_once_with_what_was_refused_of_it(ledger):
    cycle = begin(ledger)
    bad = [QuarantineRow("s0", "labels-1.parquet", 1, "b", "label 'x'")]
    for _ in range(2):
        ledger.labels.commit(cycle, [file("labels-1.parquet")], [RED], bad, now=T0)
    assert ledger.labels.of(["s0", "s1"]) == {"s0": {"a": RED}, "s1": {}}
    assert ledger.labels.sites() == ["s0"]
    assert ledger.labels.file_names() == {"s0": {"labels-1.parquet"}}
    assert ledger.streams.quarantined("s0") == bad
    assert [r[2] for r in ledger.audit.rows()].count("labels") == 1


def test_of_several_files_the_last_recorded_counts(ledger):
    cycle = begin(ledger)
    ledger.labels.commit(
        cycle, [file("labels-2.parquet")], [replace(RED, file="labels-2.parquet")], [], now=T0
    )
    mended = replace(
        RED, file="labels-1.parquet", label=1, instrument="bona_fide", kind="correction", who="bo"
    )
    ledger.labels.commit(cycle, [file("labels-1.parquet")], [mended], [], now=T0 + HOUR)
    assert ledger.labels.of(["s0"])["s0"]["a"] == mended


def test_what_is_retracted_counts_no_longer_and_stays_in_the_record(ledger):
    cycle = begin(ledger)
    other = replace(RED, sample_id="b")
    ledger.labels.commit(cycle, [file("labels-1.parquet", good=2)], [RED, other], [], now=T0)
    with pytest.raises(LedgerError, match=r"'c' has no label .* nothing was retracted; .*site show s0"):
        ledger.labels.retract("s0", ["a", "c"], by="bo", reason="mistake", now=T0 + HOUR)
    assert ledger.labels.retract("s0", ["a"], by="bo", reason="mistake", now=T0 + HOUR) == 1
    assert ledger.labels.of(["s0"]) == {"s0": {"b": other}}
    with pytest.raises(LedgerError, match="has no label"):
        ledger.labels.retract("s0", ["a"], by="bo", reason="again", now=T0 + HOUR)
    kind, payload = ledger.audit.rows()[-1][2:4]
    assert kind == "unlabel"
    assert payload == {"site": "s0", "samples": ["a"], "by": "bo", "reason": "mistake"}
    ledger.labels.commit(
        cycle, [file("labels-3.parquet")], [replace(RED, file="labels-3.parquet")], [], now=T0
    )
    assert set(ledger.labels.of(["s0"])["s0"]) == {"a", "b"}, "it may be labelled anew"


def test_a_replaced_writer_records_nothing(ledger):
    stale = begin(ledger)
    begin(ledger, holder="b", dead=lambda holder: True)
    with pytest.raises(StaleGeneration):
        ledger.labels.commit(stale, [file("labels-1.parquet")], [RED], [], now=T0)
    assert ledger.labels.sites() == []
