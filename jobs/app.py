"""The commands of ``palisade``.

A command imports its job's module after the configuration was read: ``--help`` and a mistake in a YAML are
answered at once.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.audit.commands import audit_app, tell_app
from jobs.bench.commands import bench_app
from jobs.guard.commands import anchor_app, guard_app
from jobs.options import EVERYWHERE, OUT, Against, Changes, Cycle, DryRun, ResultFile, Sites, Version
from jobs.rollout.commands import rollout_app
from jobs.site.commands import site_app
from jobs.terminal import Terminal

if TYPE_CHECKING:
    from pipeline.config import Config


app = typer.Typer(
    name="palisade",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
manifests_app = typer.Typer(no_args_is_help=True, help="The KubeRay manifests of a deployment.")
app.add_typer(tell_app)
app.add_typer(bench_app, name="bench")
app.add_typer(rollout_app, name="rollout")
app.add_typer(site_app, name="site")
app.add_typer(guard_app, name="guard")
app.add_typer(anchor_app, name="anchor")
app.add_typer(audit_app, name="audit")
app.add_typer(manifests_app, name="manifests")


@dataclass(frozen=True)
class Call:
    """The global options of one call."""

    path: Path | None
    overrides: tuple[str, ...]
    terminal: Terminal

    @cached_property
    def config(self) -> Config:
        """The configuration of the deployment, read when a command first needs it."""
        from pipeline.config import load

        default = Path("palisade.yaml")
        return load(self.path or (default if default.exists() else None), self.overrides)

    @property
    def benchmark(self) -> Config:
        """The same for ``bench``, whose default is ``conf/bench.yaml``."""
        bench = Path("conf/bench.yaml")
        if self.path is None and bench.exists():
            return replace(self, path=bench).config
        return self.config


@app.callback(epilog="Exit codes: 0 done, 2 usage or config, 3 hold, 4 guard failed, 5 infrastructure.")
def palisade(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Deployment YAML (default ./palisade.yaml).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value; --set may be left out.")
    ] = None,
) -> None:
    """Face anti-spoofing models that stay good while a fleet of sites drifts.

    --config, --json and overrides such as site.lr=1e-4 may stand anywhere on the line.
    """
    ctx.obj = Call(config, tuple(override or ()), Terminal(as_json))
    if as_json:  # Ray prints too when a worker dies: stdout holds nothing but the JSON object
        ctx.with_resource(redirect_stdout(sys.stderr))


@app.command(epilog=EVERYWHERE)
def demo(ctx: typer.Context, out: Annotated[Path, OUT] = Path("demo")) -> int:
    """Run the whole loop on a simulated fleet in minutes.

    Nothing is downloaded. --out is the folder of the demo; an earlier demo there is replaced.
    """
    from jobs.demo import demo

    return demo(ctx.obj.path, ctx.obj.overrides, ctx.obj.terminal, out=out)


@app.command(epilog=EVERYWHERE)
def doctor(ctx: typer.Context) -> int:
    """Check this machine and the deployment."""
    config = ctx.obj.config
    from jobs.doctor import doctor

    return doctor(config, ctx.obj.terminal)


@app.command("import", epilog=EVERYWHERE)
def import_(
    ctx: typer.Context,
    kind: Annotated[str, typer.Argument(help="wmca, cefa, surf, padisi, synth or rendered.")],
    root: Annotated[
        Path | None, typer.Argument(help="Folder of the data set; synth and rendered need none.")
    ] = None,
    domain: Annotated[str | None, typer.Option(help="Name of the domain; default: the kind.")] = None,
) -> int:
    """Import a labelled corpus into data.corpora."""
    config = ctx.obj.config
    from jobs.import_corpus import import_corpus

    return import_corpus(config, ctx.obj.terminal, kind=kind, root=root, domain=domain)


@app.command(epilog=EVERYWHERE)
def pretrain(ctx: typer.Context) -> int:
    """Fit on rendered presentations.

    Set source.start to the folder that it names, and train begins from there.
    """
    config = ctx.obj.config
    from jobs.pretrain import pretrain

    return pretrain(config, ctx.obj.terminal)


@app.command(epilog=EVERYWHERE)
def train(
    ctx: typer.Context,
    champion: Annotated[
        bool, typer.Option(help="Serve the new version as the fleet's source model.")
    ] = False,
) -> int:
    """Fit a source model on data.domains with source.kind.

    Resumes by itself.
    """
    config = ctx.obj.config
    from jobs.train import train

    return train(config, ctx.obj.terminal, champion=champion)


@app.command(epilog=EVERYWHERE)
def evaluate(
    ctx: typer.Context,
    version: Version = None,
    streams: Annotated[
        bool, typer.Option(help="Score the sites' streams against data.sealed, before and after.")
    ] = False,
) -> int:
    """Score a source model on its test splits.

    With --streams: the sites before and after adaptation.
    """
    config = ctx.obj.config
    from jobs.evaluate import evaluate

    return evaluate(config, ctx.obj.terminal, version=version, streams=streams)


@app.command(epilog=EVERYWHERE)
def ingest(
    ctx: typer.Context,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", help="Go on with new segments until SIGINT or SIGTERM; --json: an object per round."
        ),
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two rounds with --follow.")] = 5.0,
) -> int:
    """Read the sites' new capture segments into the feature store."""
    config = ctx.obj.config
    from jobs import ingest as job

    if follow:
        return job.follow(config, ctx.obj.terminal, interval=interval)
    return job.ingest(config, ctx.obj.terminal)


@app.command(epilog=EVERYWHERE)
def adapt(ctx: typer.Context, site: Sites = None) -> int:
    """Adapt every site on its new samples and judge the candidates.

    With --site, which may be repeated: these sites alone.
    """
    config = ctx.obj.config
    from jobs.adapt import adapt

    return adapt(config, ctx.obj.terminal, sites=site or [])


@app.command(epilog=EVERYWHERE)
def cycle(ctx: typer.Context) -> int:
    """Ingest, adapt, judge, report, and move a rollout on.

    Safe to repeat; resumes by itself.
    """
    config = ctx.obj.config
    from jobs.cycle import cycle

    return cycle(config, ctx.obj.terminal)


@app.command(epilog=EVERYWHERE)
def gc(
    ctx: typer.Context,
    dry_run: DryRun = False,
    keep_days: Annotated[
        int | None,
        typer.Option(min=0, help="Days that verdicts keep features and outcomes; default: data.keep_days."),
    ] = None,
    grace_hours: Annotated[
        float, typer.Option(min=0, help="Files written within these hours are kept.")
    ] = 24,
) -> int:
    """Delete blobs and features that nothing points to.

    All that a rollback may need is kept.
    """
    config = ctx.obj.config
    from jobs.gc import gc

    return gc(config, ctx.obj.terminal, dry_run=dry_run, keep_days=keep_days, grace_hours=grace_hours)


@app.command(epilog=EVERYWHERE)
def report(ctx: typer.Context, cycle: Cycle = None) -> int:
    """Write the HTML report of a cycle; default: the last."""
    config = ctx.obj.config
    from jobs.report import report

    return report(config, ctx.obj.terminal, cycle=cycle)


@app.command(epilog=EVERYWHERE)
def tune(
    ctx: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="[site|source]",
            help="site: replay the streams of search.sites. source: hold out each domain in turn.",
        ),
    ] = "site",
) -> int:
    """Search hyper-parameters of section site or source.

    Targets are never searched on.
    """
    config = ctx.obj.config
    from jobs.tune import tune

    return tune(config, ctx.obj.terminal, what=what)


@app.command("what-if", epilog=EVERYWHERE)
def what_if(
    ctx: typer.Context,
    changes: Changes = None,
    against: Against = None,
    site: Sites = None,
    out: ResultFile = None,
) -> int:
    """Replay the recorded streams under other settings.

    The sections site and bank may differ; the present ones are replayed beside them. Every site starts from
    the source model; nothing is recorded. --site may be repeated; --out FILE.parquet or FILE.json holds the
    comparison. Exit codes: 0 compared, 3 nothing could be compared, 4 some site's verdict would be worse
    (pass, then hold, then fail).
    """
    if not (changes or against):
        raise ValueError(
            "what-if: nothing is different yet; give --with section.key=value, --against FILE, or both"
        )
    config = ctx.obj.config
    from pipeline.config import altered

    changed = altered(config, changes or (), sections=("site", "bank"), path=against)
    from jobs.what_if import what_if

    return what_if(config, changed, ctx.obj.terminal, sites=site or [], out=out)


@app.command(epilog=EVERYWHERE)
def submit(
    ctx: typer.Context,
    job: Annotated[
        list[str] | None, typer.Argument(help="A palisade command with its arguments, e.g. cycle.")
    ] = None,
    address: Annotated[str, typer.Option(help="URL of the Ray Jobs server.")] = "http://127.0.0.1:8265",
    submission_id: Annotated[
        str | None, typer.Option("--id", help="Submission id; default: from job, config and day.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the log and end with the job's exit code.")] = False,
) -> int:
    """Run a command on a Ray cluster through the Jobs API.

    Once per submission id: a second call shows the first one's job.
    """
    config = ctx.obj.config
    from jobs.submit import submit

    return submit(
        config, ctx.obj.terminal, job=job or [], address=address, submission_id=submission_id, wait=wait
    )


@manifests_app.command("render", epilog=EVERYWHERE)
def manifests_render(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the manifests.")],
) -> int:
    """Write the KubeRay manifests into DIR, to be applied with kubectl apply -f DIR."""
    config = ctx.obj.config
    from jobs.manifests import render

    return render(config, ctx.obj.terminal, folder=folder)
