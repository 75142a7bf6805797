"""Decides whether a candidate may serve: limits, evidence, and the verdict on it.

Pure: no clock, file, network or chance. Evidence without labels may fail or hold a candidate, never pass it:
a pass needs anchor counts under every missing-modality pattern that a guard applies to. ``assess`` on stored
evidence gives the stored verdict again. Bounds are one-sided 95 %. README.md lists every guard with its
statistic, limit and guarantee. Limits and records are named here; what measures and judges is imported from
its module, because that needs numpy and readers of configuration and ledger do not.
"""

from __future__ import annotations

from pipeline.guards.limits import Ceiling, GuardsConfig, NoData, NonInferiority, PatternLimit, TrustRegion
from pipeline.guards.records import ATTACKS, REAL, Call, Cell, Evidence, Measured, Reason, Stream, Verdict

__all__ = [
    "ATTACKS",
    "REAL",
    "Call",
    "Ceiling",
    "Cell",
    "Evidence",
    "GuardsConfig",
    "Measured",
    "NoData",
    "NonInferiority",
    "PatternLimit",
    "Reason",
    "Stream",
    "TrustRegion",
    "Verdict",
]
