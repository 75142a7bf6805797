"""Observes a rollout: which sites serve their target and bring data, and what the guards find on them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from pipeline.control.candidates import pointer
from pipeline.control.deployment import now
from pipeline.guards.fleet import compare_with_controls, error_budget, judge_promoted
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
    from pipeline.control.presentations import LabelledOutcomes
    from pipeline.guards import Reason
    from pipeline.ledger import Ledger
    from pipeline.rollout import Rollout

HOURS = 6  # that the error budget looks back


def observe(config: Config, ledger: Ledger, rollout: str, r: Rollout) -> Observation:
    """Returns what the state machine decides on now; in a rollback only the sites that still have to move."""
    if r.status in IN_ROLLBACK:
        return observe_rollback(ledger, rollout, r)
    if r.status not in IN_PROGRESS | {Status.PAUSED} or r.wave < 0:
        return Observation()
    # a wave in progress alone loads torch
    from pipeline.control.presentations import ReplayTarget, replay_presentations

    last, failed = min(r.wave, len(r.plan.waves) - 1), list(r.failed)
    labelled = ledger.labels.sites()
    promoted = {
        p.site: (p.wave, p.to, p.back) for p in ledger.plans.promoted(rollout, upto=last, names=labelled)
    }
    # failed sites go on to count against the release, by replay
    targets = ledger.plans.targets(rollout, sorted(set(failed) & set(labelled)))
    promoted |= {site: (t.wave, t.to, t.back) for site, t in targets.items()}
    wave_of = {site: wave for site, (wave, _, _) in promoted.items()}
    outcomes = replay_presentations(
        config, ledger, [ReplayTarget(site, to, back) for site, (_, to, back) in promoted.items()]
    )
    findings = judge_promoted(config.guards, outcomes.counts)
    attacks = Counter[int]()
    for site, n in zip(outcomes.counts.sites, outcomes.counts.attacks.tolist(), strict=True):
        attacks[wave_of[site]] += n
    return Observation(
        waves=_observe_waves(ledger, rollout, r, last, attacks),
        failed_returnable=ledger.plans.returnable(rollout, failed) if failed else 0,
        failing={
            site: FailingSite(wave_of[site], _sentence(reasons[0]))
            for site, reasons in findings.failing.items()
            if site not in r.failed
        },
        breach=tuple(_sentence(reason) for reason in findings.breach),
        freeze=_freeze(config, ledger, rollout, outcomes, labelled),
    )


def observe_rollback(ledger: Ledger, rollout: str, r: Rollout) -> Observation:
    """Returns what a rollback decides on: how many sites still have to move. Needs the ledger alone."""
    returnable = ledger.plans.returnable(rollout) if r.status == Status.ROLLING_BACK else None
    return Observation(returnable=returnable)


def _observe_waves(
    ledger: Ledger, rollout: str, r: Rollout, last: int, attacks: Counter[int]
) -> tuple[WaveObservation, ...]:
    """Returns the started waves; of the earlier ones all sites are known to serve their target."""
    failed, failed_in = list(r.failed), Counter(r.failed.values())
    silent = ledger.plans.silent(rollout, upto=last, samples=r.plan.config.health_samples, without=failed)
    waves = [WaveObservation(sites=w.sites - failed_in[i]) for i, w in enumerate(r.plan.waves[:last])]
    waves.append(ledger.plans.observe_wave(rollout, last, without=failed))
    return tuple(
        WaveObservation(
            w.sites,
            w.not_serving,
            w.first_not_serving,
            *silent.get(i, (0, "")),
            attack_presentations=attacks[i],
        )
        for i, w in enumerate(waves)
    )


def _freeze(
    config: Config, ledger: Ledger, rollout: str, outcomes: LabelledOutcomes, labelled: Sequence[str]
) -> str:
    """Returns why nothing may be promoted now: the fleet's error budget, or the comparison with controls.

    The comparison keeps false findings at ``controls.fdr`` of the findings: enough to ask a person, not to
    roll back.
    """
    from pipeline.control.presentations import ReplayTarget, replay_presentations

    names = [s for s, e in ledger.plans.excluded(rollout, labelled).items() if e.reason == CONTROL]
    serving = ledger.releases.serving(names)
    served = {site: pointer(ledger, serving.get(site)) for site in names}
    controls = replay_presentations(config, ledger, [ReplayTarget(s, p, p) for s, p in served.items()])
    strata = {
        s.site: "/".join(s.tags.get(tag, "") for tag in config.rollout.strata) or "fleet"
        for s in ledger.streams.named(list(labelled))
    }
    reasons = [
        *error_budget(config.guards, *_hourly(outcomes)),
        *compare_with_controls(config.guards, outcomes.counts, controls.counts, strata=strata),
    ]
    return next((f"promotions freeze: {_sentence(x)}" for x in reasons if not x.advisory), "")


def _hourly(outcomes: LabelledOutcomes) -> tuple[np.ndarray, np.ndarray]:
    """Returns (errors, presentations) of each of the last hours [H], newest last."""
    age = np.datetime64(now().replace(tzinfo=None), "us") - outcomes.captured_at
    ago = age.astype(np.float64) / 3.6e9  # hours
    recent = (ago >= 0) & (ago < HOURS)
    hour = HOURS - 1 - ago[recent].astype(int)
    return (
        np.bincount(hour, weights=outcomes.wrong[recent], minlength=HOURS),
        np.bincount(hour, minlength=HOURS),
    )


def _sentence(reason: Reason) -> str:
    """Returns a finding as people and notifications read it: where, guard, number and limit."""
    return f"{reason.where}: {reason.guard}: {reason.text}"
