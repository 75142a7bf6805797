"""May a candidate serve? Limits, evidence and the verdict on it.

Evidence without labels may stop or hold a candidate, never approve it: a pass needs anchor counts for every pattern
that a guard applies to. ``assess`` on stored evidence gives the stored verdict again. Bounds are one-sided 95 %.
"""

from __future__ import annotations

from pipeline.guards.evidence import REAL, Cell, Evidence, Measured, evidence_of
from pipeline.guards.limits import Ceiling, GuardsConfig, NoData, NonInferiority, PatternLimit, TrustRegion
from pipeline.guards.verdict import ATTACKS, Call, Reason, Verdict, assess, paired_upper95

__all__ = [
    "ATTACKS", "REAL", "Call", "Ceiling", "Cell", "Evidence", "GuardsConfig", "Measured", "NoData", "NonInferiority",
    "PatternLimit", "Reason", "TrustRegion", "Verdict", "assess", "evidence_of", "paired_upper95",
]  # fmt: skip
