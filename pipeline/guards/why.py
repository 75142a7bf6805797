"""Says in one line why a candidate is what it is: labels used, their gain, the shift that was followed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.types import Modality

if TYPE_CHECKING:
    from pipeline.guards.records import Evidence, Labelled, Moved

STILL = 0.05  # logits; a boundary that moved less is where it was
NAMES = {Modality.RGB: "RGB", Modality.DEPTH: "depth", Modality.IR: "infrared"}


def why(evidence: Evidence) -> str:
    """Returns the line; empty for evidence of a version that did not measure it."""
    moved = evidence.moved
    if moved is None:
        return ""
    left = [f"left as it is: no shift found in {evidence.stream_n} samples"]
    return "; ".join([*_labels(evidence.labelled), *(_boundary(moved) + _adapter(moved) or left)])


def _labels(e: Labelled | None) -> list[str]:
    if e is None:
        return []
    parts = [f"{e.taught_bona_fide} bona fide and {e.taught_attack} attacks with labels teach"]
    n = e.bona_fide.n + e.attack.n
    if n:
        now = e.bona_fide.errors + e.attack.errors
        was = e.bona_fide.errors_before + e.attack.errors_before
        parts.append(f"errors on the {n} that judge: {was} → {now}")
    return parts


def _boundary(moved: Moved) -> list[str]:
    by = moved.boundary
    if by is None or abs(by) < STILL:
        return []
    way = "loosened" if by > 0 else "tightened"
    return [f"boundary {way} by {abs(by):.1f} logits, as the site's scores shifted"]


def _adapter(moved: Moved) -> list[str]:
    total = sum(moved.adapter)
    if not total:
        return []
    shares = ", ".join(f"{NAMES[m]} {moved.adapter[m] / total:.0%}" for m in Modality)
    return [f"moved by modality: {shares}"]
