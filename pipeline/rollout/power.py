"""What a wave can see before it ends: said with the plan, so that a bake that is too short to see anything shows."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from pipeline.guards.fleet import RATE
from pipeline.stats.sequential import bernoulli_e

CLEAN, HARMED = 0.02, 0.10  # APCER before and after
SHARE = 0.05  # of the wave's sites that are harmed, at least one
LONGEST = 2000  # presentations of a site; beyond that a wave sees nothing
LOOKS = np.unique(np.geomspace(4, LONGEST, 80).astype(np.int64))


@lru_cache(maxsize=256)
def days_to_detect(sites: int, per_day: float, *, apcer: float, alpha: float) -> float | None:
    """Days until a wave of ``sites`` stops when 5 % of them go from APCER 2 to 10 %; None when it does not.

    ``apcer`` and ``alpha`` are those of guard ``shadow``. Each site brings ``per_day`` labelled attack presentations. It is
    when the chance that one harmed site alone lifts the wave's mean e-value over its limit reaches a half; several
    together, or looking earlier, do so sooner.
    """
    from scipy.special import bdtrc  # pyright: ignore  # an import too slow for readers of the configuration

    if sites == 0:
        return None
    harmed = max(1, math.ceil(SHARE * sites))
    errors = np.arange(LONGEST // 5)
    log_e = bernoulli_e(np.minimum(errors, LOOKS[:, None]), LOOKS[:, None], apcer) - math.log(sites)
    over = log_e >= -math.log(alpha * RATE)
    least = np.where(over.any(1), over.argmax(1), LONGEST)
    alone = np.where(least > LOOKS, 0.0, bdtrc(np.minimum(least, LOOKS) - 1, LOOKS, HARMED))
    found = 1 - (1 - alone) ** harmed >= 0.5
    return float(LOOKS[np.argmax(found)] / per_day) if found.any() else None
