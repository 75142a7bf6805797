"""How the promoted sites do: who has brought data, and what the labelled presentations say of what each serves now."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.control.candidates import pointer
from pipeline.control.deployment import now, source_model
from pipeline.control.judge import features_of
from pipeline.control.loaders import load_model, load_state
from pipeline.control.scoring import site_labels
from pipeline.data.blobs import BadBlob
from pipeline.data.captures import BadSegment
from pipeline.data.features import read_features
from pipeline.guards import LabelledCounts, compare_with_controls, error_budget, judge_promoted
from pipeline.models import tail
from pipeline.rollout import (
    CONTROL,
    IN_PROGRESS,
    IN_ROLLBACK,
    FailingSite,
    Observation,
    Status,
    WaveObservation,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config import Config
    from pipeline.guards import Reason
    from pipeline.ledger import Ledger
    from pipeline.rollout import Pointer, Rollout

HOURS = 6  # that the error budget looks back


def observe(config: Config, ledger: Ledger, rollout: str, r: Rollout) -> Observation:
    """What the state machine needs to know now; on the way back only who still has to go."""
    if r.status in IN_ROLLBACK:
        return observe_rollback(ledger, rollout, r)
    if r.status not in IN_PROGRESS | {Status.PAUSED} or r.wave < 0:
        return Observation()
    last = min(r.wave, len(r.plan.waves) - 1)
    silent = ledger.plans.silent(
        rollout, upto=last, samples=r.plan.config.health_samples, without=list(r.failed)
    )
    out = Counter(r.failed.values())
    waves = [WaveObservation(sites=w.sites - out[i]) for i, w in enumerate(r.plan.waves[:last])]
    waves.append(ledger.plans.observe_wave(rollout, last, without=list(r.failed)))
    labelled = _labelled(config)
    promoted = {
        p.site: (p.wave, p.to, p.back) for p in ledger.plans.promoted(rollout, upto=last, names=labelled)
    }
    failed = ledger.plans.targets(
        rollout, sorted(set(r.failed) & set(labelled))
    )  # what they did counts against the release
    promoted |= {s: (t.wave, t.to, t.back) for s, t in failed.items()}
    treated = _standing(config, ledger, [(s, to, back) for s, (_, to, back) in promoted.items()])
    found = judge_promoted(config.guards, treated.counts)
    wave_of = {s: wave for s, (wave, _, _) in promoted.items()}
    presented = Counter[int]()
    for site, n in zip(treated.counts.sites, treated.counts.attacks.tolist(), strict=True):
        presented[wave_of[site]] += n
    return Observation(
        waves=tuple(
            WaveObservation(
                w.sites,
                w.not_serving,
                w.first_not_serving,
                *silent.get(i, (0, "")),
                attack_presentations=presented[i],
            )
            for i, w in enumerate(waves)
        ),
        failed_returnable=ledger.plans.returnable(rollout, list(r.failed)) if r.failed else 0,
        failing={
            s: FailingSite(wave_of[s], _told(reasons[0]))
            for s, reasons in found.failing.items()
            if s not in r.failed
        },
        breach=tuple(_told(reason) for reason in found.breach),
        freeze=_freeze(config, ledger, rollout, treated, labelled),
    )


def _freeze(config: Config, ledger: Ledger, rollout: str, treated: Treated, labelled: Sequence[str]) -> str:
    """Why the fleet gets no promotions now: its error budget, or that promoted sites err more than control sites do.

    The latter keeps false findings at 5 % of the findings, which is enough to ask a person, not to take a release back.
    """
    strata = config.rollout.strata
    tags = {s.site: s.tags for s in ledger.streams.named(list(labelled))}
    names = [s for s, e in ledger.plans.excluded(rollout, labelled).items() if e.reason == CONTROL]
    serving = ledger.releases.serving(names)
    at = {s: (s, here := pointer(ledger, serving.get(s)), here) for s in names}
    controls = _standing(config, ledger, list(at.values()))
    stratum = {s: "/".join(t.get(tag, "") for tag in strata) or "fleet" for s, t in tags.items()}
    reasons = [
        *error_budget(config.guards, *_hourly(treated)),
        *compare_with_controls(config.guards, treated.counts, controls.counts, strata=stratum),
    ]
    return next((f"promotions freeze: {_told(x)}" for x in reasons if not x.advisory), "")


def observe_rollback(ledger: Ledger, rollout: str, r: Rollout) -> Observation:
    """What a rollback needs to know: how many sites still have to go."""
    return Observation(
        returnable=ledger.plans.returnable(rollout) if r.status == Status.ROLLING_BACK else None
    )


def _told(reason: Reason) -> str:
    """A finding as people and notifications read it: where, guard, number and limit."""
    return f"{reason.where}: {reason.guard}: {reason.text}"


def _labelled(config: Config) -> list[str]:
    """Sites with recorded red-team presentations."""
    folder = config.data.redteam
    return (
        sorted(p.name.removesuffix("-labels.parquet") for p in Path(folder).glob("*-labels.parquet"))
        if folder
        else []
    )


@dataclass(frozen=True)
class Calls:
    """What one pointer calls the labelled presentations of a site."""

    truth: np.ndarray  # [N] 1 bona fide, 0 attack
    bona_fide: np.ndarray  # [N] bool
    captured_at: np.ndarray  # [N] datetime64[us]


@dataclass(frozen=True)
class Treated:
    """Sites with what they were presented and how often they erred, in all and one by one."""

    counts: LabelledCounts
    wrong: np.ndarray  # [N] bool, all presentations of all sites
    captured_at: np.ndarray  # [N] datetime64[us]


def _standing(config: Config, ledger: Ledger, sites: Sequence[tuple[str, Pointer, Pointer]]) -> Treated:
    """Replay each site's presentations through what it serves and through what it would go back to.

    What cannot be read is no data: such a site counts nothing here.
    """
    rows: dict[str, list[int]] = {}
    wrongs, times = [np.zeros(0, bool)], [np.zeros(0, "datetime64[us]")]
    ends = {s.site: s.ingested for s in ledger.streams.named([site for site, _, _ in sites])}
    for site, to, back in sites:
        try:
            served, before = (_calls(config, ledger, site, ends[site], p) for p in (to, back))
        except (BadBlob, BadSegment, OSError):
            continue
        attack, real = served.truth == 0, served.truth == 1
        same = np.array_equal(served.truth, before.truth)  # under another trunk some features may be missing
        let_in, was_let_in = served.bona_fide, before.bona_fide if same else np.ones_like(served.bona_fide)
        rows[site] = [
            int(attack.sum()),
            int((attack & let_in).sum()),
            int((attack & let_in & ~was_let_in).sum()),
            int((attack & ~let_in & was_let_in).sum()),
            int(real.sum()),
            int((real & ~let_in).sum()),
            int((real & ~before.bona_fide).sum()) if same else 0,
        ]
        wrongs.append(let_in == attack)
        times.append(served.captured_at)
    counts = np.array(list(rows.values()), np.int64).reshape(-1, 7).T
    return Treated(LabelledCounts(list(rows), *counts), np.concatenate(wrongs), np.concatenate(times))


def _hourly(treated: Treated) -> tuple[np.ndarray, np.ndarray]:
    """(errors, presentations) of each of the last hours [H], newest last."""
    ago = (np.datetime64(now().replace(tzinfo=None), "us") - treated.captured_at).astype(np.float64) / 3.6e9
    recent = (ago >= 0) & (ago < HOURS)
    hour = HOURS - 1 - ago[recent].astype(int)
    return (
        np.bincount(hour, weights=treated.wrong[recent], minlength=HOURS),
        np.bincount(hour, minlength=HOURS),
    )


def _calls(config: Config, ledger: Ledger, site: str, end: int, pointer: Pointer) -> Calls:
    """The site's labelled presentations under the trunk of ``pointer``, and what it calls them."""
    model = load_model(source_model(ledger, pointer.source_version).path)
    block = read_features(
        config.place("features"),
        model.manifest.trunk_digest,
        site,
        start=0,
        end=end,
        features=model.manifest.config.trunk.features,
    )
    labels = site_labels(config.data.redteam, site)
    block = block.rows(np.array([s in labels for s in block.sample_id], bool))
    truth = np.array([labels[s][0] for s in block.sample_id], np.int64)
    state = load_state(config, model, ledger.verdicts.state(pointer.state_id))
    stream = features_of(block)
    with torch.no_grad():
        score = tail.score(tail.with_site_state(model.tail, state), stream.z, stream.present)
    return Calls(truth, (score >= model.manifest.threshold).numpy(), block.captured_at)
