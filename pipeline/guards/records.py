"""Defines what is stored with a decision: the evidence, the verdict and its findings.

Field names are on record. The module needs no numpy, so a command that only lists verdicts answers at once.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator

from pipeline.types import Section

ATTACKS = "all attacks"  # the sum of a pattern's species
REAL = "bona_fide"  # species of the cell whose errors are bona fide presentations called attack
Hours = tuple[tuple[int, int], ...]  # [24] per hour of the day: (sessions, sessions called bona fide)
# None = not measured; NaN and infinity become None, so that JSON holds everything
Measured = Annotated[
    float | None, BeforeValidator(lambda v: None if isinstance(v, float) and not math.isfinite(v) else v)
]
Call = Literal["pass", "fail", "hold"]


class Reason(Section):
    """One finding of a guard; an advisory one is reported and never decides."""

    guard: str
    call: Call
    where: str  # pattern/species, "stream", "state", a site, "wave" or "fleet"
    number: Measured
    limit: Measured
    text: str
    advisory: bool = False


class Stream(Section):
    """Evidence without labels; None = not measured, as in the records of earlier versions."""

    sessions: int | None = None  # sessions in the window
    sessions_before: int = 0  # sessions that the state had learned from before the window
    taught_bona_fide: int = 0  # samples learned from with this pseudo label
    taught_attack: int = 0
    taught_session: int = 0  # samples learned from of the session that taught most
    taught_modalities: tuple[int, ...] = ()  # samples learned from that show 1, 2, ... modalities
    taught_disagreement: Measured = None  # largest disagreement of a sample learned from, nats
    flips_bona_fide: int = 0  # samples that the champion calls attack and the candidate bona fide
    flips_attack: int = 0  # the other way round
    last: int = 0  # newest calls counted below, at most collapse.calls
    last_bona_fide: int = 0  # of these, called bona fide by the candidate
    last_champion: int = 0  # of these, called bona fide by the champion
    drift_entropy: Measured = None  # largest log e-value within the window
    drift_attack: Measured = None  # largest log e-value within the window
    risk_lower: Measured = None  # lower bound of the stream's mean proxy risk
    risk_source: Measured = (
        None  # upper bound of the source's mean proxy risk, at the stream's share of calls
    )
    ratchet: Measured = None  # largest log e-value within the window; None without a baseline
    baseline: Hours = ()  # of earlier windows that did not fail
    hours: Hours = ()  # of this window
    born: str | None = None  # ISO time at which the state left the source model
    age_days: Measured = None  # since ``born``
    steps: int | None = None  # since ``born``


class Cell(Section):
    """Counts one missing-modality pattern and species on the anchor set."""

    pattern: str
    species: str  # PAI species; REAL for bona fide
    n: int  # presentations
    errors: int  # of the candidate
    worse: int  # candidate wrong, champion right
    better: int  # candidate right, champion wrong


class Judged(Section):
    """Counts one class among the labelled presentations of the site that judge."""

    n: int = 0
    errors: int = 0  # of the candidate
    worse: int = 0  # candidate wrong, champion right
    better: int = 0  # candidate right, champion wrong

    @property
    def errors_before(self) -> int:
        """Errors of the champion."""
        return self.errors - self.worse + self.better


class Labelled(Section):
    """Evidence of the site's own labelled presentations; a presentation teaches or judges, never both."""

    taught_bona_fide: int = 0  # in the memory that the candidate learned from
    taught_attack: int = 0
    contradicted_bona_fide: int = 0  # of these, called attack by the source model
    contradicted_attack: int = 0  # of these, called bona fide by the source model
    ranked: Measured = None  # share of pairs (bona fide, attack) that teach which the source ranks that way
    bona_fide: Judged = Judged()
    attack: Judged = Judged()


class Moved(Section):
    """Says what of the state moved, for people; no guard judges it."""

    boundary: Measured = None  # logits by which the usual sensors' boundary loosened since labels or source
    adapter: tuple[float, ...] = ()  # per modality, squared change against the source; empty: none


class Evidence(Section):
    """Holds all that ``assess`` decides on; stored with the verdict, so its field names are on record."""

    cells: tuple[Cell, ...]
    trust_ratio: Measured  # distance of the candidate from the source state over the source state's norm
    margin_drop: Measured  # rise of the mean attack logit over the champion's, worst species and pattern
    stream_n: int  # samples in the window
    age_seconds: Measured  # of the newest sample in the window
    finite: bool  # every score and every state tensor is finite
    holds_before: int = 0  # verdicts "hold" in a row before this one
    merged: tuple[str, ...] = ()  # species with few presentations, counted together as "other"
    labels: str = "anchor"  # source of the attack labels
    rig: tuple[str, ...] = ()  # modalities of the site's sensors; empty = unknown, then all are assumed
    unseen: tuple[str, ...] = ()  # patterns that leave no modality of the rig: no guard applies to them
    stream: Stream = Stream()  # of the window, without labels
    moved: Moved | None = None  # None: not measured, as in the records of earlier versions
    labelled: Labelled | None = None  # None: the site has no labelled presentations


class Verdict(Section):
    """Says what was decided and why."""

    outcome: Call
    reasons: tuple[Reason, ...]
    abort: bool = False  # too many holds in a row: a person should look
    labels: str = "anchor"

    @property
    def decisive(self) -> str:
        """Returns the first finding that decided, in one line; empty for none."""
        found = (r for r in self.reasons if r.call == self.outcome and not r.advisory)
        return next((f"{r.guard}: {r.text}" for r in found), "")
