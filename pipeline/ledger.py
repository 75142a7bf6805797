"""Everything durable that is not a tensor: cursors, states, verdicts, rollouts and the audit chain; the only SQLAlchemy.

SQLite in WAL mode by default, any SQLAlchemy URL by choice. Every write is one transaction, so a crash leaves the old or the
new truth. Writers are fenced: a cycle by its generation, a cursor by compare-and-swap, a rollout by its revision. The time is
passed in, aware. A promotion is stored only with a stored passing verdict on that site and state.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from itertools import batched, groupby
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy as sa

from pipeline.guards import Evidence, Verdict
from pipeline.rollout import TERMINAL, Candidate, Pointer, Promote, Rollback, Rollout, SiteFacts, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pipeline.rollout import Action

SCHEMA = 1
BUSY_SECONDS = 30
CHUNK = 500  # site ids in one IN (...)
GENESIS = "0" * 64
