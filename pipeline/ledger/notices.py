"""What people outside are told: notices, of which each is sent once in a while; the audit log; figures of the fleet."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa

from pipeline.ledger.plans import OUT, beside, living
from pipeline.ledger.store import Store
from pipeline.ledger.tables import (
    FLEET,
    audit,
    facts,
    iso,
    notices,
    rollouts,
    segments,
    served,
    sites,
    states,
    storable,
    targets,
    verdicts,
)
from pipeline.ledger.verdicts import newest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Row

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


class AuditRow(NamedTuple):
    """A row of the chain."""

    seq: int
    at: datetime
    kind: str
    payload: dict[str, object]
    hash: str


class WaveCount(NamedTuple):
    """Sites of one wave of a rollout."""

    wave: int  # index
    sites: int
    promoted: int  # serve their target
    silent: int  # of those, without any capture since


class Notices(Store):
    """What is said, and what can be looked up by those it is said to."""

    def notice(self, key: str, severity: str, text: str, *, now: datetime, repeat_seconds: float) -> bool:
        """Record that ``key`` is so → whether the caller has to send it, and then say ``sent``.

        It has to when the key or what is said of it is new, when it was sent longer than ``repeat_seconds`` ago, or when
        it was not sent and whoever had to does no longer. Of many that ask at once one has to.
        """
        text = storable(text)
        with self._write(exclusive=True) as c:
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
        with self._write(exclusive=True) as c:
            waiting = c.execute(
                sa.select(notices).where(notices.c.sent_at.is_(None)).order_by(notices.c.first_at)
            )
            due = [r for r in waiting if not _within(r.last_at, now, CLAIM)]
            for r in due:
                c.execute(notices.update().where(notices.c.key == r.key).values(last_at=iso(now)))
        return [_notice(r) for r in due]

    def mark_sent(self, key: str, *, text: str, now: datetime) -> None:
        """Every sink took ``text``."""
        same = sa.and_(notices.c.key == key, notices.c.text == storable(text))
        with self._write() as c:
            c.execute(notices.update().where(same).values(sent_at=iso(now)))

    def notices(self, *, limit: int = 1000) -> list[NoticeRow]:
        """The latest, newest first."""
        with self._read() as c:
            return [
                _notice(r)
                for r in c.execute(sa.select(notices).order_by(notices.c.last_at.desc()).limit(limit))
            ]

    def audit_log(self, *, limit: int, site: str | None = None) -> list[AuditRow]:
        """The latest rows of the chain, newest first; of a site those that name it and those that changed what it serves."""
        query = sa.select(audit).order_by(audit.c.seq.desc()).limit(limit)
        if site is not None:
            own = sa.select(served.c.audit).where(served.c.site == site)
            query = query.where(
                sa.or_(audit.c.seq.in_(own), audit.c.payload.contains(f'"{site}"', autoescape=True))
            )
        with self._read() as c:
            return [
                AuditRow(r.seq, datetime.fromisoformat(r.at), r.kind, json.loads(r.payload), r.hash)
                for r in c.execute(query)
            ]

    def audit_head(self) -> tuple[int, str]:
        """Number and hash of the last row of the chain."""
        with self._read() as c:
            seq = c.scalar(sa.select(sa.func.max(audit.c.seq)))
            return int(seq or 0), str(c.scalar(sa.select(facts.c.value).where(facts.c.key == "audit_head")))

    def audit_knows(self, head: str) -> bool:
        """Whether a row of the chain has the hash ``head``."""
        with self._read() as c:
            return c.scalar(sa.select(audit.c.seq).where(audit.c.hash == head)) is not None

    def plan_of(self, rollout: str) -> str | None:
        """The plan hash of a rollout."""
        with self._read() as c:
            return c.scalar(sa.select(rollouts.c.plan_hash).where(rollouts.c.id == rollout))

    def served_without_verdict(self) -> list[str]:
        """One line per release that went back without being a rollback, per promotion without a stored verdict that passes
        what was promoted, and per pointer to a state that is not stored.
        """
        with self._read() as c:
            found = [*_went_back(c.execute(_history())), *map(_unproven, c.execute(_without_verdict()))]
            for what, table, pointer in (
                ("learns from", sites, sites.c.learner),
                ("served", served, served.c.state),
            ):
                lost = sa.select(table.c.site, pointer.label("state")).join_from(
                    table, states, states.c.id == pointer, isouter=True
                )
                lost = lost.where(pointer.is_not(None), states.c.id.is_(None)).order_by(table.c.site)
                found += [
                    f"site {r.site}: {what} state {r.state}, which is not stored" for r in c.execute(lost)
                ]
            return found

    def sites_by_status(self) -> tuple[dict[str, int], int]:
        """Sites by status, and those whose last verdict was a hold."""
        count = sa.func.count()
        with self._read() as c:
            by = {
                r.status: r.n
                for r in c.execute(sa.select(sites.c.status, count.label("n")).group_by(sites.c.status))
            }
            return by, int(c.scalar(sa.select(count).select_from(sites).where(sites.c.holds > 0)) or 0)

    def waves_of(self, rollout: str) -> list[WaveCount]:
        """How far each wave of a rollout is, by what its sites serve and have sent since."""
        newest = sa.select(segments.c.ingested_at).where(segments.c.site == targets.c.site)
        newest = newest.order_by(segments.c.base_offset.desc()).limit(1).correlate(targets).scalar_subquery()
        with self._read() as c:
            now_on, joined = beside(c)
            quiet = sa.and_(now_on, sa.func.coalesce(newest, "") <= sa.func.coalesce(served.c.since, ""))
            sums = (sa.func.sum(sa.case((w, 1), else_=0)) for w in (now_on, quiet))
            query = (
                sa.select(targets.c.wave, sa.func.count(), *sums).select_from(joined).group_by(targets.c.wave)
            )
            query = query.where(targets.c.rollout == rollout, targets.c.wave != OUT, living())
            return [WaveCount(*map(int, r)) for r in c.execute(query.order_by(targets.c.wave))]

    def findings(self) -> tuple[Counter[str], Counter[tuple[str, str]], datetime | None]:
        """Of the newest verdict of every site: outcomes, findings by guard and call, and when the last one was given."""
        outcomes: Counter[str] = Counter()
        calls: Counter[tuple[str, str]] = Counter()
        last = ""
        query = newest(sa.select(verdicts.c.outcome, verdicts.c.verdict, verdicts.c.at))
        with self._read() as c:
            for r in c.execute(query):
                outcomes[r.outcome] += 1
                calls.update((x["guard"], x["call"]) for x in json.loads(r.verdict)["reasons"])
                last = max(last, r.at)
        return outcomes, calls, datetime.fromisoformat(last) if last else None


def _within(at: str, now: datetime, window: timedelta) -> bool:
    """Whether less than ``window`` has passed; a clock that was set back far has no memory of what will be."""
    return -HOUR <= now - datetime.fromisoformat(at) < window


def _notice(r: Row[*tuple[object, ...]]) -> NoticeRow:
    first, last, sent = (datetime.fromisoformat(t) if t else None for t in (r.first_at, r.last_at, r.sent_at))
    assert first is not None and last is not None
    return NoticeRow(
        r.key, r.severity, r.text, first, last, r._mapping["count"], sent
    )  # a row has a method count


def _history() -> sa.Select[*tuple[object, ...]]:
    """Everything that was ever served, with how far in its stream each state was."""
    query = sa.select(served, states.c.offset_to).join_from(
        served, states, states.c.id == served.c.state, isouter=True
    )
    return query.order_by(served.c.site, served.c.counter)


def _went_back(rows: sa.CursorResult[*tuple[object, ...]]) -> Iterator[str]:
    site, before = "", (0, 0)
    for r in rows:
        reached = (r.source_version, r.offset_to or 0)
        if r.site == site and r.kind != "rollback" and reached < before:
            yield f"site {site}: release {r.counter} by {r.rollout} went back without a rollback record"
        site, before = r.site, reached


def _without_verdict() -> sa.Select[*tuple[object, ...]]:
    """Promotions whose verdict, of the plan or of the state itself, is not stored, of another site or state, or no pass."""
    planned = sa.and_(targets.c.rollout == served.c.rollout, targets.c.site == served.c.site)
    own = sa.func.coalesce(sa.func.nullif(targets.c.verdict, ""), served.c.state)
    state = sa.and_(verdicts.c.site == served.c.site, verdicts.c.state == served.c.state)
    source = sa.and_(
        served.c.state.is_(None), verdicts.c.site == FLEET, verdicts.c.offset_to == served.c.source_version
    )
    passed = sa.and_(verdicts.c.id == own, verdicts.c.outcome == "pass", sa.or_(state, source))
    query = (
        sa.select(served)
        .join_from(served, targets, planned, isouter=True)
        .join(verdicts, passed, isouter=True)
    )
    query = query.where(served.c.kind == "promote", verdicts.c.id.is_(None))
    return query.order_by(served.c.site, served.c.counter)


def _unproven(r: Row[*tuple[object, ...]]) -> str:
    what = f"state {r.state}" if r.state else f"source v{r.source_version}"
    return f"site {r.site}: release {r.counter} by {r.rollout} promoted {what} without a stored verdict that passes it"
