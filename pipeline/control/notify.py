"""Tells people once, by webhook and in a file; a sink that fails is tried again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from pipeline.sections import Severity

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from pipeline.config import Config
    from pipeline.ledger import Ledger
    from pipeline.sections import NotifyConfig

LEVELS: tuple[Severity, ...] = get_args(Severity)  # the worst last


def notify(
    config: Config,
    ledger: Ledger,
    *,
    key: str,
    severity: Severity,
    text: str,
    now: datetime,
    context: Mapping[str, object],
) -> list[str]:
    """Sends ``text`` under ``key`` to every sink unless it was sent, and what an earlier call could not send.

    Returns remarks on sinks that failed; never raises for them. ``context`` goes along as it is (JSON).
    """
    n = config.notify
    if LEVELS.index(severity) < LEVELS.index(n.min_severity):
        return []
    messages: list[dict[str, object]] = []
    if ledger.notices.record(key, severity, text, now=now, repeat_seconds=n.repeat_seconds):
        messages.append(
            {"key": key, "severity": severity, "text": text, "at": now.isoformat(), "context": dict(context)}
        )
    for row in ledger.notices.unsent(now=now):
        messages.append(
            {
                "key": row.key,
                "severity": row.severity,
                "text": row.text,
                "at": row.first_at.isoformat(),
                "context": {},
            }
        )
    remarks: list[str] = []
    for message in messages:
        failed = _send(n, message)
        if not failed:
            ledger.notices.mark_sent(str(message["key"]), text=str(message["text"]), now=now)
        remarks += [r for r in failed if r not in remarks]
    return remarks


def _send(n: NotifyConfig, message: Mapping[str, object]) -> list[str]:
    """Hands ``message`` to every sink; returns the failures. The URL may be a secret, so it is not named."""
    failed: list[str] = []
    body = json.dumps(message, default=str) + "\n"
    if n.file:
        try:
            _append(Path(n.file), body.encode())
        except OSError as e:
            failed.append(f"notify.file {n.file}: {e.strerror or e}; it is tried again with the next notice")
    if n.webhook and (why := _post(n.webhook, body, n.timeout_seconds)):
        failed.append(f"notify.webhook{why}; it is tried again with the next notice")
    return failed


def _append(path: Path, line: bytes) -> None:
    """Appends ``line`` in one write, so that lines of several drivers do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if (written := os.write(handle, line)) != len(line):
            raise OSError(f"only {written} of {len(line)} bytes were written")
    finally:
        os.close(handle)


def _post(webhook: str, body: str, seconds: float) -> str:
    """Returns why the webhook did not take ``body``; empty if it did."""
    import requests

    url = os.environ.get(webhook[1:], "") if webhook.startswith("$") else webhook
    if not url:
        return f": the environment has no {webhook[1:]}"
    try:
        with requests.post(
            url,
            data=body.encode(),
            headers={"Content-Type": "application/json"},
            timeout=seconds,
            allow_redirects=False,
            stream=True,
        ) as answer:
            return "" if answer.status_code < 300 else f": it answered {answer.status_code}"
    except (requests.RequestException, ValueError, OSError) as e:
        return f": {type(e).__name__}"
