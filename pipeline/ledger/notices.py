"""Messages for people: each notice is recorded, sent once, and repeated after a while."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from pipeline.ledger.store import Store
from pipeline.ledger.tables import iso, make_row, notices, storable

if TYPE_CHECKING:
    pass

CLAIM = timedelta(seconds=30)  # a sender that is silent for longer is taken for dead; a sink may take 5 s
HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class NoticeRow:
    """Something that a person should know, however often it was said."""

    key: str
    severity: str
    text: str
    first_at: datetime
    last_at: datetime
    count: int
    sent_at: datetime | None  # None: not yet, or no sink took it


@dataclass(frozen=True)
class Notices:
    """Notices and their delivery."""

    store: Store

    def record(self, key: str, severity: str, text: str, *, now: datetime, repeat_seconds: float) -> bool:
        """Records that ``key`` holds; returns True if this caller must deliver it and then call mark_sent().

        That is so if the key or its text is new, if it was sent longer than ``repeat_seconds`` ago, or if
        the earlier sender is silent. At most one concurrent caller gets True.
        """
        text = storable(text)
        with self.store.write(exclusive=True) as c:
            row = c.execute(sa.select(notices).where(notices.c.key == key)).first()
            if row is None:
                values = {
                    "key": key,
                    "severity": severity,
                    "text": text,
                    "first_at": iso(now),
                    "last_at": iso(now),
                    "count": 1,
                    "sent_at": None,
                }
                c.execute(notices.insert(), values)
                return True
            other = (row.severity, row.text) != (severity, text)
            window = timedelta(seconds=repeat_seconds) if row.sent_at else CLAIM
            due = other or not _within(row.sent_at or row.last_at, now, window)
            changes: dict[str, object] = {"count": notices.c.count + 1}
            if due:
                changes |= {"severity": severity, "text": text, "sent_at": None}
            if due or row.sent_at:  # else it is the time at which somebody began to send it
                changes["last_at"] = iso(now)
            c.execute(notices.update().where(notices.c.key == key).values(changes))
            return due

    def unsent(self, *, now: datetime) -> list[NoticeRow]:
        """Notices that nobody sent and nobody is sending; the caller has to, and then say ``sent``."""
        with self.store.write(exclusive=True) as c:
            waiting = c.execute(
                sa.select(notices).where(notices.c.sent_at.is_(None)).order_by(notices.c.first_at)
            )
            due = [r for r in waiting if not _within(r.last_at, now, CLAIM)]
            for r in due:
                c.execute(notices.update().where(notices.c.key == r.key).values(last_at=iso(now)))
        return [make_row(NoticeRow, r) for r in due]

    def mark_sent(self, key: str, *, text: str, now: datetime) -> None:
        """Every sink took ``text``."""
        same = sa.and_(notices.c.key == key, notices.c.text == storable(text))
        with self.store.write() as c:
            c.execute(notices.update().where(same).values(sent_at=iso(now)))

    def latest(self, *, limit: int = 1000) -> list[NoticeRow]:
        """The latest, newest first."""
        with self.store.read() as c:
            return [
                make_row(NoticeRow, r)
                for r in c.execute(sa.select(notices).order_by(notices.c.last_at.desc()).limit(limit))
            ]


def _within(at: str, now: datetime, window: timedelta) -> bool:
    """Returns True if less than ``window`` has passed; after a clock was set back far, False."""
    return -HOUR <= now - datetime.fromisoformat(at) < window
