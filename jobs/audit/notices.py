"""``palisade notify``: the notices of this deployment, and a test of its sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.terminal import Exit, table
from pipeline.control.deployment import now, open_ledger
from pipeline.control.notify import notify

if TYPE_CHECKING:
    from jobs.terminal import Terminal
    from pipeline.config import Config

SHOWN = 20


def show(config: Config, terminal: Terminal, *, test: bool) -> int:
    """Shows the notices, newest first; ``test`` sends one notice first."""
    ledger = open_ledger(config, create=False)
    remarks: list[str] = []
    if test:
        if not (config.notify.webhook or config.notify.file):
            raise ValueError("notify: there is no sink yet; set notify.webhook or notify.file")
        at = now()
        remarks = notify(
            config,
            ledger,
            key="test",
            severity="critical",
            text=f"palisade notify --test at {at:%H:%M:%S.%f} UTC",
            now=at,
            context={},
        )
        for remark in remarks:
            terminal.say(f"warning: {remark}")
    rows = ledger.notices.latest(limit=SHOWN)
    terminal.result(
        {"notices": [vars(r) for r in rows], "failed": remarks},
        table(
            "notices",
            ["key", "severity", "times", "last (UTC)", "sent", "text"],
            [
                [
                    r.key,
                    r.severity,
                    r.count,
                    f"{r.last_at:%Y-%m-%d %H:%M}",
                    "yes" if r.sent_at else "no",
                    r.text,
                ]
                for r in rows
            ],
        ),
    )
    return Exit.INFRASTRUCTURE if remarks else Exit.DONE
