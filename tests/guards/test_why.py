"""One line says why a candidate is what it is."""

from __future__ import annotations

import pytest

from pipeline.guards import Evidence
from pipeline.guards.records import Judged, Labelled, Moved
from pipeline.guards.why import why

LABELS = Labelled(
    taught_bona_fide=17,
    taught_attack=16,
    bona_fide=Judged(n=15, errors=1, worse=0, better=8),
    attack=Judged(n=16, errors=1, worse=1, better=0),
)


def line(moved: Moved | None, labelled: Labelled | None = None) -> str:
    evidence = Evidence(
        cells=(),
        trust_ratio=0,
        margin_drop=0,
        stream_n=203,
        age_seconds=1,
        finite=True,
        moved=moved,
        labelled=labelled,
    )
    return why(evidence)


@pytest.mark.parametrize(
    "moved, labelled, text",
    [
        (None, LABELS, ""),  # an earlier version's record
        (Moved(boundary=0.0), None, "left as it is: no shift found in 203 samples"),
        (Moved(boundary=-0.6), None, "boundary tightened by 0.6 logits, as the site's scores shifted"),
        (
            Moved(boundary=0.0, adapter=(1.0, 1.0, 2.0)),
            LABELS,
            "17 bona fide and 16 attacks with labels teach; errors on the 31 that judge: 9 → 2; "
            "moved by modality: RGB 25%, depth 25%, infrared 50%",
        ),
        (
            Moved(boundary=1.26),
            Labelled(),
            "0 bona fide and 0 attacks with labels teach; "
            "boundary loosened by 1.3 logits, as the site's scores shifted",
        ),
        (
            Moved(boundary=0.01),
            Labelled(taught_bona_fide=9),
            "9 bona fide and 0 attacks with labels teach; left as it is: no shift found in 203 samples",
        ),
    ],
)
def test_the_line_names_labels_gain_shift_and_modalities(moved, labelled, text):
    assert line(moved, labelled) == text
