"""Predicts what a wave can detect, so that a plan shows a bake that is too short to detect anything."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from pipeline.guards.fleet import RATE
from pipeline.stats.sequential import bernoulli_e

HARMED = 0.10  # APCER of a harmed site; a healthy one keeps to guard shadow's 2 %
SHARE = 0.05  # of the wave's sites that are harmed, at least one
LONGEST = 2000  # presentations per site that are looked at; what takes longer counts as not detected
LOOKS = np.unique(np.geomspace(4, LONGEST, 80).astype(np.int64))


@lru_cache(maxsize=256)
def days_to_detect(sites: int, per_day: float, *, apcer: float, alpha: float) -> float | None:
    """Returns the days until a wave of ``sites`` stops if 5 % of them go to APCER 10 %, or None if never.

    ``apcer`` and ``alpha`` are those of guard ``shadow``; each site brings ``per_day`` labelled attack
    presentations. The result is the day on which the chance that one harmed site alone lifts the wave's mean
    e-value over its limit reaches one half: an upper estimate, since several harmed sites together stop it
    sooner.
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
    detected = 1 - (1 - alone) ** harmed >= 0.5
    return float(LOOKS[np.argmax(detected)] / per_day) if detected.any() else None
