"""May a candidate serve? Limits, evidence and the verdict on it.

Evidence without labels may stop or hold a candidate, never approve it: a pass needs anchor counts for every pattern
that a guard applies to. ``assess`` on stored evidence gives the stored verdict again. Bounds are one-sided 95 %.
"""

from __future__ import annotations

from pipeline.guards.evidence import REAL, Cell, Evidence, evidence_of
from pipeline.guards.fleet import Standing, Watch, budget, compare, watch
from pipeline.guards.limits import Ceiling, GuardsConfig, NoData, NonInferiority, PatternLimit, TrustRegion
from pipeline.guards.reason import Call, Measured, Reason
from pipeline.guards.stream import Earlier, Seen, Stream, added, stream_of, usual
from pipeline.guards.unlabelled import expired
from pipeline.guards.verdict import ATTACKS, Verdict, assess, paired_upper95

__all__ = [
    "ATTACKS",
    "REAL",
    "Call",
    "Ceiling",
    "Cell",
    "Earlier",
    "Evidence",
    "GuardsConfig",
    "Measured",
    "NoData",
    "NonInferiority",
    "PatternLimit",
    "Reason",
    "Seen",
    "Standing",
    "Stream",
    "TrustRegion",
    "Verdict",
    "Watch",
    "added",
    "assess",
    "budget",
    "compare",
    "evidence_of",
    "expired",
    "paired_upper95",
    "stream_of",
    "usual",
    "watch",
]
