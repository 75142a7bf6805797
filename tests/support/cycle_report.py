"""Content of a cycle's page: sites of every kind, a DET plot, waves, and a whole fleet."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from statistics import NormalDist

import numpy as np

from pipeline.report.content import (
    CycleReport,
    Det,
    DetCurve,
    FleetTotals,
    PadSummary,
    PseudoLabels,
    QuarantineRow,
    RolloutEvent,
    RolloutReport,
    SiteReport,
    WaveReport,
)

START = datetime(2026, 3, 14, 3, 0, tzinfo=UTC)


def site(i: int, rng: np.random.Generator, **changed: object) -> SiteReport:
    """An adapted, promoted site whose errors about halved."""
    steps, hter = 90, float(rng.uniform(0.05, 0.16))
    ir = (np.arange(48) < rng.integers(20, 60)) * 0.97
    report = SiteReport(
        site=f"gate-{i:02d}",
        tags=("airport", "indoor") if i % 2 else ("branch",),
        rig="D435 + IR940",
        status="ok",
        samples=int(rng.integers(2000, 5000)),
        offset_from=4096 * i,
        offset_to=4096 * i + 3800,
        captured=(START - timedelta(days=1), START),
        quarantined=int(rng.integers(0, 4)),
        availability=np.stack([np.full(48, 0.99), rng.uniform(0.85, 1, 48), ir], 1),
        before=PadSummary(hter, 1.7 * hter, "replay", 0.8 * hter, 320, 540),
        after=PadSummary(0.45 * hter, 0.05 + 0.1 * hter, "printed photo", 0.4 * hter, 320, 540),
        pseudo_labels=PseudoLabels(0.21, 0.48, 0.97, 0.991),
        omega=np.clip(0.5 + rng.normal(0.01, 0.06, steps).cumsum(), 0.05, 2),
        instability=np.abs(rng.normal(0.05, 0.03, steps)),
        restores=int(rng.integers(0, 2)),
        verdict="pass",
        why="no labels; <b>left as it is</b>: no shift found in 100 samples",
        reasons=("pass: 14 limits hold on the anchor set and on 3,800 captures",),
        wave=min(i, 3),
        promoted=i < 9,
        serving=f"st:{rng.integers(2**32):08x}",
    )
    return replace(report, **changed)  # pyright: ignore[reportArgumentType]


def det(rng: np.random.Generator) -> Det:
    """Normal scores, better after than before."""
    normal = NormalDist()

    def curve(gap: float, at: float) -> DetCurve:
        cuts = np.linspace(-5, gap + 5, 1500)
        apcer, bpcer = (np.array([normal.cdf(c) for c in side]) for side in (-cuts, cuts - gap))
        wobble = np.exp(rng.normal(0, 0.004, len(cuts)).cumsum() * 0.3)
        return DetCurve(np.clip(apcer * wobble, 0, 1), bpcer, (normal.cdf(-at), normal.cdf(at - gap)))

    return Det(curve(2.4, 1.1), curve(3.5, 1.8), 11, 3520, 5940)


def cycle(sites: tuple[SiteReport, ...], **changed: object) -> CycleReport:
    """A cycle with everything in it."""
    report = CycleReport(
        cycle_id="2026-03-14T03-00Z",
        started=START,
        finished=START + timedelta(minutes=7, seconds=12),
        source_version="v7",
        source_digest="sha256:" + "9f" * 32,
        fingerprint="c1" * 32,
        code_revision="0f3e9a7",
        config_name="conf/fleet.yaml",
        method="danet",
        threshold=0.4317,
        ceiling=0.07,
        exit_code=3,
        exit_summary="hold: 1 site waits for evidence",
        digests=(("anchor set", "sha256:" + "ab" * 32), ("trunk", "sha256:" + "07" * 32)),
        sites=sites,
        det=det(np.random.default_rng(1)),
        quarantine=(
            QuarantineRow("gate-11", "segment-0007.parquet", None, "segment: not a Parquet file", 512),
            QuarantineRow(
                "gate-12", "segment-0003.parquet", 17, "rgb: header claims 12000x12000, allowed 4096", 3
            ),
        ),
        rollout=RolloutReport(
            "Baking(2)",
            "sha256:5d41402abc4b2a76",
            waves(),
            (
                RolloutEvent(START, "a.jensen", "approved"),
                RolloutEvent(START + timedelta(hours=1), "cycle", "wave 2 staged"),
            ),
        ),
        totals=FleetTotals(16, 2, 1, (("ingest", 212.0), ("adapt", 164.0), ("guards", 41.0))),
        notes=("Anchor set is 23 days old; it expires in 7.",),
    )
    return replace(report, **changed)  # pyright: ignore[reportArgumentType]


def waves() -> tuple[WaveReport, ...]:
    """Four waves: two done, one baking, one planned."""
    rows = [
        (0.01, 1, 1, 0, "Completed"),
        (0.05, 1, 1, 0, "Completed"),
        (0.2, 4, 3, 1, "Baking"),
        (1.0, 8, 0, 0, "Planned"),
    ]
    return tuple(
        WaveReport(
            i, share, n, min(n, done), failing, state, START + timedelta(hours=6 * i) if done else None
        )
        for i, (share, n, done, failing, state) in enumerate(rows, 1)
    )


def fleet() -> CycleReport:
    """14 sites: good, held, refused, broken, hostile, unmeasured, control and harmed ones."""
    rng = np.random.default_rng(7)
    sites = [site(i, rng) for i in range(9)]
    sites[4] = replace(
        sites[4], before=None, after=None, pseudo_labels=PseudoLabels(0.2, 0.4, np.nan, np.nan)
    )
    sites[8] = replace(sites[8], after=PadSummary(0.148, 0.121, "silicone mask", 0.06, 320, 540))
    return cycle((*sites, *refused_sites(rng), *other_sites(rng)))


def refused_sites(rng: np.random.Generator) -> list[SiteReport]:
    """A held, a failed and a broken site."""
    none = np.zeros((0, 3))
    return [
        site(
            9,
            rng,
            status="held",
            verdict="hold",
            wave=3,
            serving="source v7",
            restores=3,
            reasons=(
                "ceiling: APCER upper95 of silicone mask without IR 9.4 % > 7 % (n=158)",
                "no data: 41 captures < 100",
            ),
        ),
        site(
            10,
            rng,
            status="failed",
            verdict="fail",
            wave=None,
            serving="source v7",
            instability=np.abs(rng.normal(0.4, 0.3, 90)),
            after=PadSummary(0.19, 0.31, "replay", 0.07, 320, 540),
            reasons=("non-inferiority: attacks +2.1 pp > 0.5 pp",),
        ),
        site(
            11,
            rng,
            status="broken",
            verdict=None,
            wave=None,
            promoted=False,
            samples=0,
            before=None,
            after=None,
            serving="source v7",
            pseudo_labels=None,
            availability=none,
            omega=none[:, 0],
            instability=none[:, 0],
            captured=None,
            quarantined=512,
            restores=0,
            reasons=("camera: every segment was refused",),
        ),
    ]


def other_sites(rng: np.random.Generator) -> list[SiteReport]:
    """A site with a long name and a control."""
    return [
        site(
            12,
            rng,
            site="kiosk-with-a-very-long-name-in-the-basement-of-the-south-annex-2",
            tags=("hostile",),
            promoted=False,
            wave=4,
        ),
        site(
            13,
            rng,
            tags=("control",),
            wave=None,
            promoted=False,
            verdict=None,
            serving="source v7",
            omega=np.full(90, np.nan),
            reasons=(),
        ),
    ]
