"""Opening, transactions, the audit chain; on both databases."""

from __future__ import annotations

import pytest

from pipeline.ledger import Ledger, LedgerUnavailable
from tests.support.ledgers import T0, execute


@pytest.mark.parametrize(
    "damage, broken",
    [
        ("update audit set payload = '{}' where seq = 2", 2),
        ("update audit set at = '2020' where seq = 1", 1),
        ("delete from audit where seq = 2", 2),
        ("delete from audit where seq = 3", 3),
        ("update audit set seq = 9 where seq = 3", 3),
    ],
)
def test_the_audit_chain_shows_tampering(ledger, url, damage, broken):
    for i in range(3):
        ledger.audit.append("test", {"i": i}, now=T0)
    assert ledger.audit.first_broken() is None
    assert [payload for _, _, kind, payload in ledger.audit.rows() if kind == "test"] == [
        {"i": 0},
        {"i": 1},
        {"i": 2},
    ]
    execute(url, damage)
    assert ledger.audit.first_broken() == broken


def test_bad_urls_and_files_are_refused(tmp_path):
    with pytest.raises(LedgerUnavailable, match="no ledger there yet"):
        Ledger.open(f"sqlite:///{tmp_path}/none.db", create=False)
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(LedgerUnavailable, match="not a database URL"):
        Ledger.open("ledger.db")
    (tmp_path / "junk.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerUnavailable, match="cannot be opened"):
        Ledger.open(f"sqlite:///{tmp_path}/junk.db")
    with pytest.raises(LedgerUnavailable, match="cannot be opened") as e:
        Ledger.open(f"postgresql+psycopg://u:hunter2@/p?host={tmp_path}")
    assert "hunter2" not in str(e.value)


def test_an_empty_database_is_no_ledger_until_somebody_may_create_it(url):
    with pytest.raises(LedgerUnavailable, match="no ledger there yet; run `palisade train`"):
        Ledger.open(url, create=False)
    Ledger.open(url).close()
    Ledger.open(url, create=False).close()


def test_a_transaction_that_fails_leaves_no_gap_in_the_chain(ledger, monkeypatch):
    ledger.audit.append("test", {"i": 0}, now=T0)
    real = ledger.store.append

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ledger.store, "append", lambda *a: crash(real(*a)))
    with pytest.raises(KeyboardInterrupt):
        ledger.audit.append("test", {"i": 1}, now=T0)
    monkeypatch.undo()
    ledger.audit.append("test", {"i": 2}, now=T0)
    assert [seq for seq, *_ in ledger.audit.rows()] == [1, 2]
    assert ledger.audit.first_broken() is None
