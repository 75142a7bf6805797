"""The commands of ``palisade guard`` and ``palisade anchor``."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.options import EVERYWHERE, Against, Changes, Cycle, ResultFile, Sites, Version

guard_app = typer.Typer(no_args_is_help=True, help="Verdicts: explain, recheck, try another policy.")
anchor_app = typer.Typer(no_args_is_help=True, help="The labelled set that judges candidates.")


@guard_app.command("explain", epilog=EVERYWHERE)
def guard_explain(
    ctx: typer.Context,
    what: Annotated[str, typer.Argument(metavar="SITE|VERDICT", help="Id of a site or of a verdict.")],
) -> int:
    """Explain the newest verdict on a site: every finding, the evidence, and what would have to change for a
    pass.
    """
    config = ctx.obj.config
    from jobs.guard.explain import explain

    return explain(config, ctx.obj.terminal, what=what)


@guard_app.command("recheck", epilog=EVERYWHERE)
def guard_recheck(
    ctx: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(metavar="[VERDICT|SITE]", help="Id of a verdict, or of a site: its newest one."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every verdict on record.")] = False,
    cycle: Cycle = None,
    recount: Annotated[
        bool,
        typer.Option("--recount", help="Also score the anchor set again with the stored states and count."),
    ] = False,
) -> int:
    """Judge stored evidence again under the limits of its cycle and compare the verdicts byte for byte.

    --cycle: all verdicts of that cycle. Exit codes: 0 the same, 3 nothing to recheck or to recount, 4
    different.
    """
    if (what is None) != (every or cycle is not None):
        raise ValueError(
            "guard recheck: name one verdict or site, or give --all, with --cycle ID for one cycle"
        )
    config = ctx.obj.config
    from jobs.guard.recheck import recheck

    return recheck(config, ctx.obj.terminal, what=what, cycle=cycle, recount=recount)


@guard_app.command("simulate", epilog=EVERYWHERE)
def guard_simulate(
    ctx: typer.Context,
    changes: Changes = None,
    against: Against = None,
    site: Sites = None,
    out: ResultFile = None,
) -> int:
    """Judge the recorded evidence under another policy (section guards), beside the recorded verdicts, and
    show the delay.

    The candidates are those on record: what a site would have learned next under the policy is not known.
    --site may be repeated; --out FILE.parquet or FILE.json holds every decision. Exit codes: 0 compared, 3
    nothing is recorded, 4 the policy would have passed what the recorded one stopped or held.
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
    """Make a draft from data.anchor, or from the test splits of data.domains, and show its counts.

    Nothing is judged on a draft: seal it.
    """
    config = ctx.obj.config
    from jobs.guard.anchor import build

    return build(config, ctx.obj.terminal, version=version)


@anchor_app.command("seal", epilog=EVERYWHERE)
def anchor_seal(
    ctx: typer.Context,
    digest: Annotated[
        str | None,
        typer.Argument(help="Digest of a draft or an earlier set, 8 digits or more; default: build one now."),
    ] = None,
    version: Version = None,
) -> int:
    """Pin an anchor set by its digest: from now on it alone judges the candidates of its source model."""
    if digest and version is not None:
        raise ValueError("anchor seal: a digest says which source model it is for; leave --version out")
    config = ctx.obj.config
    from jobs.guard.anchor import seal_set

    return seal_set(config, ctx.obj.terminal, digest=digest, version=version)


@anchor_app.command("verify", epilog=EVERYWHERE)
def anchor_verify(ctx: typer.Context, version: Version = None) -> int:
    """Check the sealed set: its bytes, its counts under every missing-modality pattern, that nothing was
    trained on it.

    Exit codes: 0 sound (warnings may be shown), 4 not.
    """
    config = ctx.obj.config
    from jobs.guard.anchor import verify

    return verify(config, ctx.obj.terminal, version=version)
