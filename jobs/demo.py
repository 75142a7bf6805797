"""``palisade demo``: runs the whole loop on a simulated fleet with the jobs that a deployment runs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.adapt import adapt
from jobs.cycle import cycle
from jobs.ingest import ingest
from jobs.report import gather, write_report
from jobs.rollout.operate import apply, plan
from jobs.terminal import Exit, percent, table
from jobs.train import train
from pipeline.cluster import connected
from pipeline.config import load
from pipeline.control.deployment import open_ledger
from pipeline.data.corpus import write_corpus
from pipeline.simulate.corpora import synth
from pipeline.simulate.sites import demo_fleet, simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jobs.terminal import Terminal
    from pipeline.config import Config
    from pipeline.ledger import Ledger, VerdictRow
    from pipeline.report.content import CycleReport, PadSummary

MARK = ".palisade-demo"  # file that marks the folder of a demo
CONF = Path("conf/demo.yaml")
SAMPLES = 900  # per domain
PLACES = {
    "data.corpora": "corpora",
    "data.anchor": "anchor",
    "data.captures": "captures",
    "data.sealed": "sealed",
    "data.labels": "labels",
    "ledger.artifacts": "artifacts",
    "lineage.artifacts": "mlflow-artifacts",
}
TAMPERED = "terminal-gate"  # the site whose candidate is spoilt on purpose
RECKLESS = ("site.kind=tent", "site.lr=0.5")
HASTY = ("branch-swap", "gate-ageing", "gate-oneclass", "lobby-south", "office-gate", "yard-broken")
GUARDS = (
    "ceiling",
    "noninferiority",
    "trust",
    "influence",
    "labels",
    "modality",
    "collapse",
    "ratchet",
    "presentations",
)
LOOSE = tuple(f"guards.{g}.advisory=true" for g in GUARDS)


def demo(path: Path | None, overrides: Sequence[str], terminal: Terminal, *, out: Path) -> int:
    """Renders a fleet, trains, adapts, judges, releases, spoils, rolls back and reports."""
    base = path or CONF
    settings = [f"{key}={out / name}" for key, name in PLACES.items()]
    settings += [
        f"ledger.url=sqlite:///{out}/ledger.db",
        f"lineage.uri=sqlite:///{out}/mlflow.db",
        *overrides,
    ]
    config = load(base, settings)
    _make_folder(out)
    started = time.monotonic()
    quiet = replace(terminal, as_json=False, out=terminal.err)
    with connected(config.cluster):
        tampered = _first_day(config, load(base, [*settings, *RECKLESS]), terminal, quiet, out)
        ledger = open_ledger(config)
        first = ledger.cycles.history(kinds=("cycle",))[0].id
        with _chapter(terminal, 6, "palisade rollout plan, apply: what passed goes over the fleet in waves"):
            plan(config, quiet)
            release = _apply_newest(config, ledger, quiet)
            write_report(config, ledger, first)
        loose = load(base, [*settings, *RECKLESS, *LOOSE])
        reckless = _second_day(config, loose, ledger, terminal, quiet, out)
    report = gather(config, ledger, first)
    page = write_report(config, ledger, first)
    spoilt = ledger.verdicts.find(site=TAMPERED)[0]
    _show(terminal, report, page, spoilt=spoilt, seconds=time.monotonic() - started, base=base)
    expected = (Exit.GUARD_FAILED, Exit.DONE, Exit.GUARD_FAILED)
    return Exit.DONE if (tampered, release, reckless) == expected else Exit.GUARD_FAILED


def _make_folder(out: Path) -> None:
    """Empties the folder of an earlier demo and no other."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise ValueError(f"{out}: is not empty and no earlier demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


def _first_day(config: Config, reckless: Config, terminal: Terminal, quiet: Terminal, out: Path) -> int:
    """Trains and runs the first cycle; returns the exit code of the candidate that is spoilt on purpose."""
    with _chapter(terminal, 1, "render four labelled corpora, an anchor set and day 1 of 18 sites"):
        _render(config, out, quiet)
    title = "palisade train: fit the source model with RiSe on Ray Train, seal the anchor set"
    with _chapter(terminal, 2, title):
        train(config, quiet, champion=False)
    with _chapter(terminal, 3, "palisade ingest: one Ray Data execution for the fleet"):
        ingest(config, quiet)
    command = f"palisade adapt --site {TAMPERED} {' '.join(RECKLESS)}"
    with _chapter(terminal, 4, f"{command}: a bad candidate, on purpose"):
        code = adapt(reckless, quiet, sites=[TAMPERED])
    with _chapter(terminal, 5, "palisade cycle: adapt the fleet with MFAS-DANet, judge every candidate"):
        cycle(config, quiet)
    return code


def _second_day(
    config: Config, loose: Config, ledger: Ledger, terminal: Terminal, quiet: Terminal, out: Path
) -> int:
    """Releases candidates that no guard stopped, then runs a cycle; returns the exit code of that release."""
    title = "day 2: somebody adapts some sites with a reckless method and makes every guard advisory"
    with _chapter(terminal, 7, title):
        with quiet.progress("render day 2", "captures") as advance:
            simulate(out, demo_fleet(), phase=2, progress=advance)
        ingest(config, quiet)
        adapt(loose, quiet, sites=HASTY)
        plan(loose, quiet)
    title = "palisade rollout apply: the red team's presentations stop it, every site goes back"
    with _chapter(terminal, 8, title):
        code = _apply_newest(config, ledger, quiet)
    title = "palisade cycle: adapt the other sites as usual; candidates that pass wait for a release"
    with _chapter(terminal, 9, title):
        cycle(config, quiet)
    return code


def _apply_newest(config: Config, ledger: Ledger, terminal: Terminal) -> int:
    """Applies the newest plan and watches it to its end."""
    return apply(config, terminal, plan_hash=ledger.plans.rollouts()[0].plan_hash, watch=True)


def _render(config: Config, out: Path, terminal: Terminal) -> None:
    with terminal.progress("render corpora", "samples") as advance:
        synth.write(Path(config.data.corpora), size=config.data.frame_px, samples=SAMPLES, progress=advance)
    with terminal.progress("render anchor set", "samples") as advance:
        rows = synth.anchor(size=config.data.frame_px, progress=advance)
        write_corpus(rows, out / "anchor", domain="anchor", kind="synth", size=config.data.frame_px)
    with terminal.progress("render day 1", "captures") as advance:
        simulate(out, demo_fleet(), phase=1, progress=advance)


@contextmanager
def _chapter(terminal: Terminal, number: int, title: str) -> Iterator[None]:
    started = time.monotonic()
    terminal.say(f"\n[{number}/9] {title}")
    yield
    terminal.say(f"      {time.monotonic() - started:.1f} s")


def _show(
    terminal: Terminal, report: CycleReport, page: Path, *, spoilt: VerdictRow, seconds: float, base: Path
) -> None:
    """Shows the fleet's table; the tampered site shows the verdict on the spoilt candidate."""
    rows: list[list[object]] = []
    for s in report.sites:
        why = s.reasons[0] if s.verdict != "pass" and s.reasons else ""
        if s.site == TAMPERED:
            s = replace(s, samples=spoilt.window.samples, verdict=spoilt.outcome)
            why = f"spoilt on purpose: {spoilt.verdict.decisive}"
        rows.append(
            [
                s.site,
                s.samples,
                _change(s.before, s.after, "hter"),
                _change(s.before, s.after, "max_apcer"),
                _change(s.before, s.after, "bpcer"),
                s.verdict,
                s.wave,
                why[:60],
            ]
        )
    columns = ["site", "samples", "HTER %", "max APCER %", "BPCER %", "verdict", "wave", "why"]
    listed = [
        {
            "site": s.site,
            "verdict": s.verdict,
            "wave": s.wave,
            "samples": s.samples,
            "before": vars(s.before) if s.before else None,
            "after": vars(s.after) if s.after else None,
        }
        for s in report.sites
    ]
    terminal.result(
        {"seconds": seconds, "report": str(page), "sites": listed},
        table(f"day 1 of the fleet, source model → candidate ({report.exit_summary})", columns, rows),
        f"finished in {seconds:.0f} s; report: {page}",
        f"look around: palisade --config {base} site explain {report.sites[0].site}",
        f"release what waits: palisade --config {base} rollout plan",
    )


def _change(before: PadSummary | None, after: PadSummary | None, name: str) -> str | None:
    if before is None or after is None:
        return None
    values = [percent(getattr(p, name)) for p in (before, after)]
    return " → ".join(v for v in values if v) or None
