"""``palisade guard recheck``: stored evidence judged again under the limits of its cycle, for an auditor.

A verdict is replayed when ``assess`` gives its stored JSON byte for byte. Where the audit chain has the
digest of a cycle's verdicts and evidence, those on record must still have it.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.control.deployment import open_ledger
from pipeline.control.recheck import (
    cycle_limits,
    cycle_verdicts,
    find_verdict,
    recheck_verdict,
    verdict_basis,
)
from pipeline.guards import assess
from pipeline.ledger import LedgerError

if TYPE_CHECKING:
    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger, VerdictRow

SHOWN = 20


def recheck(config: Config, terminal: Terminal, *, what: str | None, cycle: str | None, recount: bool) -> int:
    """Replay one verdict (``what``), those of a ``cycle``, or all."""
    ledger = open_ledger(config, create=False)
    if what is not None:
        return _one(config, ledger, terminal, find_verdict(ledger, what), recount=recount)
    known = [c.id for c in reversed(ledger.cycles.history(kinds=("cycle", "adapt", "rebase")))]
    if cycle is not None and cycle not in known:
        raise LedgerError(f"cycle {cycle}: not on record; there are {', '.join(known[-5:]) or 'none'}")
    wanted = known if cycle is None else [cycle]
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
                found = recheck_verdict(config, ledger, row, recount=recount)
                counts["verdicts"] += 1
                counts["same"] += not found.differs
                counts["older"] += found.older
                counts["recounted"] += found.recounted
                if found.differs:
                    different.append(
                        {"verdict": row.id, "site": row.site, "cycle": name, "differs": list(found.differs)}
                    )
                if found.left_out:
                    left_out[row.id] = found.left_out
                advance(counts["verdicts"], total)
    seconds = time.monotonic() - started
    told = {**counts, "different": different, "not_recounted": left_out, "seconds": round(seconds, 3)}
    _show(terminal, told, different, left_out, recount=recount)
    if different:
        return Exit.GUARD_FAILED
    return Exit.HOLD if not counts["verdicts"] or (recount and not counts["recounted"]) else Exit.DONE


def _one(config: Config, ledger: Ledger, terminal: Terminal, row: VerdictRow, *, recount: bool) -> int:
    found, rests = recheck_verdict(config, ledger, row, recount=recount), verdict_basis(ledger, row)
    state, limits = ledger.verdicts.state(row.state), cycle_limits(ledger, row.cycle)
    made = assess(limits.guards, row.evidence).model_dump_json()
    digests = [
        ("evidence", _sha(row.evidence_json)),
        ("verdict on record", _sha(row.verdict_json)),
        ("verdict again", _sha(made)),
        ("configuration", limits.fingerprint),
        ("anchor set", rests.anchor),
        ("source model", rests.source.digest),
        ("candidate", f"{state.blob} slot {state.slot}" if state else "none"),
        ("champion", rests.champion_state or f"source v{rests.source.version}"),
    ]
    said = "the same, byte for byte" if not found.differs else "DIFFERENT"
    said += (
        " but for fields that an earlier version did not have" if found.older and not found.differs else ""
    )
    counted = (
        "; the anchor set counted anew gives the same evidence"
        if found.recounted and not found.differs
        else ""
    )
    terminal.result(
        {
            "verdict": row.id,
            "site": row.site,
            "cycle": row.cycle,
            "outcome": row.outcome,
            "same": not found.differs,
            "differs": list(found.differs),
            "recounted": found.recounted,
            "not_recounted": found.left_out,
            "digests": dict(digests),
        },
        table(f"verdict {row.id} on {row.site}, {row.cycle}", ["sha256 of", ""], digests),
        *(f"differs: {d}" for d in found.differs),
        *([f"not recounted: {found.left_out}"] if found.left_out else []),
        f"{row.outcome} again: {said}{counted}" if not found.differs else said,
    )
    if found.differs:
        return Exit.GUARD_FAILED
    return Exit.HOLD if found.left_out else Exit.DONE


def _show(
    terminal: Terminal,
    told: dict[str, object],
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
    older = f" ({told['older']} written by an earlier version)" if told["older"] else ""
    counted = f", {told['recounted']} recounted from their blobs" if recount else ""
    end = f"{told['verdicts']} verdicts replayed, {told['same']} the same{older}, {len(different)} different{counted}"
    terminal.result(told, *lines, f"{end}; {told['seconds']:.1f} s")


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
