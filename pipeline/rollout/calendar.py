"""Says when sites may be promoted: in their own nights, outside freeze windows; a rollback asks neither."""

from __future__ import annotations

import re
from datetime import datetime, time, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from pydantic import AwareDatetime, Field, model_validator

from pipeline.types import Section

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NIGHT = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
DAY = timedelta(days=1)


class Freeze(Section):
    """A window without promotions: from ``start`` until before ``end``."""

    start: AwareDatetime = Field(description="when it begins, with a time zone")
    end: AwareDatetime = Field(description="when it ends, with a time zone")
    reason: str = Field(default="freeze window", description="why, in the plan and the log")

    @model_validator(mode="after")
    def _forwards(self) -> Freeze:
        if self.end <= self.start:
            raise ValueError(f"freeze from {self.start} until {self.end}: the end must come after the start")
        return self


def check_night(night: str | None) -> str | None:
    """Returns ``night`` if it is HH:MM-HH:MM; raises ValueError otherwise."""
    if night is not None and not NIGHT.fullmatch(night):
        raise ValueError(f"{night!r}: write HH:MM-HH:MM in the site's own time, e.g. 22:00-05:00")
    return night


def is_time_zone(name: str) -> bool:
    """Returns whether ``name`` is an IANA time zone."""
    return _zone(name) is not None


def zones_at_night(night: str | None, zones: Iterable[str], now: datetime) -> tuple[str, ...] | None:
    """Returns the time zones in which it is night now, or None (everywhere) where ``night`` is None."""
    if night is None:
        return None
    begin, end = (time.fromisoformat(part) for part in night.split("-"))
    return tuple(z for z in sorted(set(zones)) if _within(now.astimezone(_zone(z)).time(), begin, end))


def active_freeze(windows: Sequence[Freeze], now: datetime) -> Freeze | None:
    """Returns the window that ``now`` is in, of several the one that ends last, or None."""
    return max((f for f in windows if f.start <= now < f.end), key=lambda f: f.end, default=None)


def waiting_since(windows: Sequence[Freeze], since: datetime, now: datetime) -> datetime:
    """Returns the start of a hold's deadline: ``since``, or the end of a freeze that ended after it."""
    return max([since, *(f.end for f in windows if since < f.end <= now)])


def _within(at: time, begin: time, end: time) -> bool:
    return begin <= at < end if begin <= end else at >= begin or at < end


@lru_cache(maxsize=1024)
def _zone(name: str) -> ZoneInfo | None:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return None
