"""One finding of a guard."""

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
    """One finding, decisive or not."""

    guard: str
    call: Call
    where: str  # pattern/species
    number: Measured
    limit: Measured
    text: str
    advisory: bool = False
