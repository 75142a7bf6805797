"""The commands of ``palisade guard`` and ``palisade anchor``, and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import EVERYWHERE

guard_app = typer.Typer(
    no_args_is_help=True, help="Verdicts: explain one, replay them, try another policy on them."
)
anchor_app = typer.Typer(
    no_args_is_help=True, help="The labelled samples that candidates are judged on: build, seal, verify."
)

Version = Annotated[int | None, typer.Option(help="Source model version; default: the champion.")]


@guard_app.command("explain", epilog=EVERYWHERE)
def guard_explain(
    ctx: typer.Context,
    what: Annotated[str, typer.Argument(metavar="SITE", help="A site, or the id of a verdict.")],
) -> int:
    """Why the site's newest candidate passed, failed or was held: every finding, its evidence, what would have to change."""
    config = ctx.obj.config
    from jobs.guard.explain import explain

    return explain(config, ctx.obj.terminal, what=what)


@guard_app.command("replay", epilog=EVERYWHERE)
def guard_replay(
    ctx: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(metavar="[VERDICT|SITE]", help="The id of a verdict, or a site: its newest one."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All verdicts on record, or all of --cycle.")] = False,
    cycle: Annotated[str | None, typer.Option(help="With --all: only this cycle.")] = None,
    recount: Annotated[
        bool,
        typer.Option(
            "--recount", help="Also score the anchor set again by the stored states and count anew."
        ),
    ] = False,
) -> int:
    """Judge stored evidence again under the limits of its cycle and compare the verdicts byte for byte.

    Exit codes: 0 the same, 3 nothing to replay or to recount, 4 different.
    """
    if (what is None) != (every or cycle is not None):
        raise ValueError(
            "guard replay: name one verdict or site, or give --all, with --cycle ID for one cycle"
        )
    config = ctx.obj.config
    from jobs.guard.recheck import replay

    return replay(config, ctx.obj.terminal, what=what, cycle=cycle, recount=recount)


@guard_app.command("simulate", epilog=EVERYWHERE)
def guard_simulate(
    ctx: typer.Context,
    changes: Annotated[
        list[str] | None, typer.Option("--with", help="guards.key=value of the policy; may be repeated.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="YAML whose section guards is the policy.")] = None,
    site: Annotated[list[str] | None, typer.Option(help="Only this site; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write every decision to this .parquet or .json.")] = None,
) -> int:
    """What another policy would have decided on the recorded cycles' evidence, beside what was decided, and how late.

    The candidates are those on record: what a site would have learned next under the policy is not known. Exit codes:
    0 compared, 3 nothing is recorded, 4 the policy would have passed what the recorded one stopped or held.
    """
    if not (changes or against):
        raise ValueError("guard simulate: name a policy: --with guards.key=value, --against FILE, or both")
    config = ctx.obj.config
    from pipeline.config import altered

    policy = altered(config, changes or (), sections=("guards",), path=against)
    from jobs.guard.simulate import simulate

    return simulate(config, policy.guards, ctx.obj.terminal, sites=site or [], out=out)


@anchor_app.command("build", epilog=EVERYWHERE)
def anchor_build(ctx: typer.Context, version: Version = None) -> int:
    """Make a draft from data.anchor (or the test splits of data.domains) and show its counts; nothing is judged on it yet."""
    config = ctx.obj.config
    from jobs.guard.anchor import build

    return build(config, ctx.obj.terminal, version=version)


@anchor_app.command("seal", epilog=EVERYWHERE)
def anchor_seal(
    ctx: typer.Context,
    digest: Annotated[
        str | None,
        typer.Argument(help="A draft or an earlier set (its first 8 digits); default: build one now."),
    ] = None,
    version: Version = None,
) -> int:
    """Pin an anchor set by its digest: from now on candidates of that source model are judged on these bytes alone."""
    if digest and version is not None:
        raise ValueError("anchor seal: a digest says which source model it is for; leave --version out")
    config = ctx.obj.config
    from jobs.guard.anchor import seal_set

    return seal_set(config, ctx.obj.terminal, digest=digest, version=version)


@anchor_app.command("verify", epilog=EVERYWHERE)
def anchor_verify(ctx: typer.Context, version: Version = None) -> int:
    """Check the sealed set: its bytes, its counts under every missing-modality pattern, that nothing was trained on it.

    Exit codes: 0 sound (warnings may be shown), 4 not.
    """
    config = ctx.obj.config
    from jobs.guard.anchor import verify

    return verify(config, ctx.obj.terminal, version=version)
