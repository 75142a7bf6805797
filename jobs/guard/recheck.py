"""``palisade guard recheck``: judges stored evidence again under the limits of its cycle, for an auditor.

A verdict is the same if ``assess`` gives its stored JSON byte for byte. If the audit chain has the digest
of a cycle's verdicts and evidence, those on record must still have it.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.control.deployment import open_ledger
from pipeline.control.recheck import (
    cycle_of,
    cycle_verdicts,
    find_verdict,
    limits_of,
    recheck_verdict,
    verdict_basis,
)
from pipeline.guards.verdict import assess
from pipeline.ledger import LedgerError, VerdictRow

if TYPE_CHECKING:
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger, SourceVerdictRow

SHOWN = 20


def recheck(config: Config, terminal: Terminal, *, what: str | None, cycle: str | None, recount: bool) -> int:
    """Rechecks one verdict (``what``), those of a ``cycle``, or all."""
    ledger = open_ledger(config, create=False)
    if what is not None:
        return _one(config, ledger, terminal, find_verdict(ledger, what), recount=recount)
    cycles = [c.id for c in reversed(ledger.cycles.history(kinds=("cycle", "adapt", "rebase")))]
    if cycle is not None and cycle not in cycles:
        raise LedgerError(f"cycle {cycle}: not on record; there are {', '.join(cycles[-5:]) or 'none'}")
    wanted = cycles if cycle is None else [cycle]
    started = time.monotonic()
    different: list[dict[str, object]] = []
    left_out: dict[str, str] = {}
    counts = {"verdicts": 0, "same": 0, "older": 0, "recounted": 0}
    total = sum(len(ledger.verdicts.outcomes(c)) for c in wanted)
    sealed = {
        str(p["cycle"]): str(p["evidence"])
        for _, _, kind, p in ledger.audit.rows()
        if kind == "cycle" and "evidence" in p
    }
    with terminal.progress("replay", "verdicts") as advance:
        for name in wanted:
            if name in sealed and ledger.verdicts.evidence_digest(name) != sealed[name]:
                text = (
                    "verdicts or evidence changed after the cycle: the audit chain has another digest of them"
                )
                different.append({"verdict": None, "site": None, "cycle": name, "differs": [text]})
            for row in cycle_verdicts(ledger, name):
                result = recheck_verdict(config, ledger, row, recount=recount)
                counts["verdicts"] += 1
                counts["same"] += not result.differs
                counts["older"] += result.older
                counts["recounted"] += result.recounted
                if result.differs:
                    different.append(
                        {"verdict": row.id, "site": row.site, "cycle": name, "differs": list(result.differs)}
                    )
                if result.left_out:
                    left_out[row.id] = result.left_out
                advance(counts["verdicts"], total)
    seconds = time.monotonic() - started
    summary = {**counts, "different": different, "not_recounted": left_out, "seconds": round(seconds, 3)}
    _show(terminal, summary, different, left_out, recount=recount)
    if different:
        return Exit.GUARD_FAILED
    return Exit.HOLD if not counts["verdicts"] or (recount and not counts["recounted"]) else Exit.DONE


def _one(
    config: Config, ledger: Ledger, terminal: Terminal, row: VerdictRow | SourceVerdictRow, *, recount: bool
) -> int:
    result, limits = recheck_verdict(config, ledger, row, recount=recount), limits_of(ledger, row)
    again = assess(limits.guards, row.evidence).model_dump_json()
    digests = [
        ("evidence", _sha(row.evidence_json)),
        ("verdict on record", _sha(row.verdict_json)),
        ("verdict again", _sha(again)),
        ("configuration", limits.fingerprint),
        *(_basis_digests(ledger, row) if isinstance(row, VerdictRow) else ()),
    ]
    answer = "the same, byte for byte" if not result.differs else "DIFFERENT"
    answer += (
        " but for fields that an earlier version did not have" if result.older and not result.differs else ""
    )
    counted = (
        "; the anchor set counted anew gives the same evidence"
        if result.recounted and not result.differs
        else ""
    )
    terminal.result(
        {
            "verdict": row.id,
            "site": row.site if isinstance(row, VerdictRow) else None,
            "cycle": cycle_of(row),
            "outcome": row.outcome,
            "same": not result.differs,
            "differs": list(result.differs),
            "recounted": result.recounted,
            "not_recounted": result.left_out,
            "digests": dict(digests),
        },
        table(
            f"verdict {row.id} on {row.subject}, {cycle_of(row) or 'in no cycle'}", ["sha256 of", ""], digests
        ),
        *(f"differs: {d}" for d in result.differs),
        *([f"not recounted: {result.left_out}"] if result.left_out else []),
        f"{row.outcome} again: {answer}{counted}" if not result.differs else answer,
    )
    if result.differs:
        return Exit.GUARD_FAILED
    return Exit.HOLD if result.left_out else Exit.DONE


def _basis_digests(ledger: Ledger, row: VerdictRow) -> list[tuple[str, str]]:
    basis, state = verdict_basis(ledger, row), ledger.verdicts.state(row.state)
    return [
        ("anchor set", basis.anchor),
        ("source model", basis.source.digest),
        ("candidate", f"{state.blob} slot {state.slot}" if state else "none"),
        ("champion", basis.champion_state or f"source v{basis.source.version}"),
    ]


def _show(
    terminal: Terminal,
    summary: dict[str, object],
    different: list[dict[str, object]],
    left_out: dict[str, str],
    *,
    recount: bool,
) -> None:
    lines = [
        f"{d['cycle']} {d['site'] or ''} {d['verdict'] or ''}: {d['differs']}" for d in different[:SHOWN]
    ]
    lines += [f"and {len(different) - SHOWN} more; --json lists all"] if len(different) > SHOWN else []
    reasons = sorted(set(left_out.values()))[:SHOWN]
    lines += [f"not recounted: {sum(r == why for r in left_out.values())}: {why}" for why in reasons]
    older = f" ({summary['older']} written by an earlier version)" if summary["older"] else ""
    counted = f", {summary['recounted']} recounted from their blobs" if recount else ""
    same = f"{summary['verdicts']} verdicts replayed, {summary['same']} the same{older}"
    end = f"{same}, {len(different)} different{counted}"
    terminal.result(summary, *lines, f"{end}; {summary['seconds']:.1f} s")


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
