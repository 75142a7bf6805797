"""Decides whether a candidate may serve: limits, evidence, and the verdict on it.

Pure: no clock, file, network or chance. Evidence without labels may fail or hold a candidate, never pass it:
a pass needs anchor counts under every missing-modality pattern that a guard applies to. ``assess`` on stored
evidence gives the stored verdict again. Bounds are one-sided 95 %. README.md lists every guard with its
statistic, limit and guarantee.
"""

from __future__ import annotations

from pipeline.guards.evidence import REAL, Cell, Evidence, evidence_of
from pipeline.guards.fleet import (
    LabelledCounts,
    PromotedFindings,
    compare_with_controls,
    error_budget,
    judge_promoted,
)
from pipeline.guards.limits import Ceiling, GuardsConfig, NoData, NonInferiority, PatternLimit, TrustRegion
from pipeline.guards.reason import Call, Measured, Reason
from pipeline.guards.stream import (
    SiteHistory,
    Stream,
    WindowScores,
    add_hours,
    measure_stream,
    usual_modalities,
)
from pipeline.guards.unlabelled import expired
from pipeline.guards.verdict import ATTACKS, Verdict, assess, paired_upper95

__all__ = [
    "ATTACKS",
    "REAL",
    "Call",
    "Ceiling",
    "Cell",
    "Evidence",
    "GuardsConfig",
    "LabelledCounts",
    "Measured",
    "NoData",
    "NonInferiority",
    "PatternLimit",
    "PromotedFindings",
    "Reason",
    "SiteHistory",
    "Stream",
    "TrustRegion",
    "Verdict",
    "WindowScores",
    "add_hours",
    "assess",
    "compare_with_controls",
    "error_budget",
    "evidence_of",
    "expired",
    "judge_promoted",
    "measure_stream",
    "paired_upper95",
    "usual_modalities",
]
