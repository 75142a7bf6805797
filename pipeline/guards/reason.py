"""Defines a finding of a guard: which limit, which number, and whether it passes, fails or holds."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator

from pipeline.types import Section

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
