"""Says what a plan may promote each site to: its newest passing candidate, or a new source model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import rollout as machine
from pipeline.control.deployment import check_size, now, source_model
from pipeline.guards.limits import of_source
from pipeline.guards.unlabelled import expired
from pipeline.guards.verdict import assess
from pipeline.ledger import RETIRED
from pipeline.rollout import Candidate, Pointer, SiteFacts, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pipeline.config import Config
    from pipeline.control.deployment import Reporter
    from pipeline.control.rebase import Rebased
    from pipeline.ledger import Ledger, ServingRow, SiteRow, StateRow, VerdictRow


def candidates(
    config: Config, ledger: Ledger, reporter: Reporter, *, of: Sequence[SiteRow] | None = None
) -> dict[str, SiteFacts]:
    """Returns every site (or the sites ``of``) with its newest candidate.

    A verdict counts only if its evidence passes under today's limits as well, and for no longer than
    ``guards.expiry`` allows.
    """
    latest = ledger.verdicts.latest()
    states, champion = (
        ledger.verdicts.states([v.state for v in latest.values()]),
        ledger.sources.champion().version,
    )
    rows = _active_sites(ledger) if of is None else of
    by_site: dict[str, Candidate | None] = {}
    with reporter.progress("judge again", "sites") as advance:
        for i, row in enumerate(rows):
            verdict = latest.get(row.site)
            state = states.get(verdict.state) if verdict and verdict.state else None
            by_site[row.site] = _candidate(config, verdict, state, champion) if verdict else None
            advance(i + 1, len(rows))
    return _facts(config, ledger, rows, by_site)


def candidates_of_source(
    config: Config,
    ledger: Ledger,
    reporter: Reporter,
    *,
    version: int,
    rebase: Callable[[], Rebased] | None,
    dry_run: bool = False,
) -> dict[str, SiteFacts]:
    """Returns every site under source model ``version``: its passing rebased state, else the bare model.

    ``rebase`` fits every site's state anew; None resets the fleet to the bare model. Raises ValueError unless
    the bare model passes against the champion. From then on the version is the challenger: new captures get
    features under both trunks.
    """
    from pipeline.control.anchor import compare_sources  # loads torch

    old, new = ledger.sources.champion(), source_model(ledger, version)
    if version == old.version:
        raise ValueError(f"source v{version} is the champion already; `palisade train` makes another")
    if dry_run and rebase:
        raise ValueError("--dry-run with --states rebase would fit every site's state; leave one of them out")
    check_size(config, new)
    evidence = compare_sources(config, ledger, old, new)
    limits = of_source(config.guards)
    verdict = assess(limits, evidence)
    if verdict.outcome != "pass":
        raise ValueError(
            f"source v{version} may not be released: verdict {verdict.outcome}: {verdict.decisive}"
        )
    judged = ledger.sources.add_verdict(version, verdict, evidence, limits=limits, now=now())
    bare = Candidate(Pointer(None, version), judged, "pass")
    rows = _active_sites(ledger)
    by_site: dict[str, Candidate | None] = dict.fromkeys([r.site for r in rows], bare)
    if not dry_run:
        ledger.sources.set_challenger(version, now=now())
    if rebase:
        done = rebase()
        for site, why in [*done.reset.items(), *done.failed.items()]:
            reporter.say(f"{site}: reset to the bare source model: {why}")
        for site, v in done.candidates.items():
            if v.outcome == "pass" and site in by_site:
                by_site[site] = Candidate(Pointer(v.state, version), v.id, "pass")
    return _facts(config, ledger, rows, by_site)


def joiners(
    config: Config, ledger: Ledger, reporter: Reporter, release: str, r: machine.Rollout
) -> dict[str, machine.Target]:
    """Returns sites that were registered after the plan and pass: they join its last wave."""
    if r.plan.kind != "candidates" or not machine.open_to_joiners(r):
        return {}
    planned = ledger.plans.sites(release)
    new = [s for s in _active_sites(ledger) if s.site not in planned]
    if not new:
        return {}
    facts = candidates(config, ledger, reporter, of=new)
    draft = machine.plan(
        release, {s: f for s, f in facts.items() if not f.control}, r.plan.source_version, r.plan.config
    )
    last = len(r.plan.waves) - 1
    return {
        s: t._replace(wave=last)
        for s, t in draft.targets.items()
        if not r.plan.config.night or t.zone in r.plan.zones
    }


def pointer(ledger: Ledger, served: ServingRow | None) -> Pointer:
    """Returns what a site serves; without a row the champion source model."""
    if served is None:
        return Pointer(None, ledger.sources.champion().version)
    return Pointer(served.state, served.source_version)


def _active_sites(ledger: Ledger) -> list[SiteRow]:
    return [row for row in ledger.streams.sites() if row.status != RETIRED]


def _candidate(
    config: Config, verdict: VerdictRow, state: StateRow | None, champion: int
) -> Candidate | None:
    if state is None or state.source_version != champion:
        if verdict.outcome == "pass":
            return None  # of another source model
        return Candidate(Pointer(None, champion), verdict.id, "hold", verdict.verdict.decisive)
    to = Pointer(verdict.state, champion)
    if verdict.outcome != "pass":
        return Candidate(
            to, verdict.id, "fail" if verdict.outcome == "fail" else "hold", verdict.verdict.decisive
        )
    late = expired(config.guards, verdict.at, now())
    if late is not None and not late.advisory:
        return Candidate(to, verdict.id, late.call, f"{late.guard}: {late.text}")
    again = assess(config.guards, verdict.evidence)
    return Candidate(to, verdict.id, again.outcome, again.decisive)


def _facts(
    config: Config, ledger: Ledger, rows: Sequence[SiteRow], by_site: Mapping[str, Candidate | None]
) -> dict[str, SiteFacts]:
    serving = ledger.releases.serving()
    good = ledger.releases.promoted_by(
        [r.id for r in ledger.plans.rollouts() if r.status == Status.COMPLETED]
    )
    controls = set(machine.choose_controls({r.site: r.tags for r in _active_sites(ledger)}, config.rollout))
    source = Pointer(None, ledger.sources.champion().version)
    return {
        row.site: SiteFacts(
            serving=_pointer_of(serving.get(row.site)) or source,
            last_good=_pointer_of(good.get(row.site)),
            candidate=by_site[row.site],
            control=row.site in controls,
            tags=row.tags,
        )
        for row in rows
    }


def _pointer_of(served: ServingRow | None) -> Pointer | None:
    return Pointer(served.state, served.source_version) if served else None
