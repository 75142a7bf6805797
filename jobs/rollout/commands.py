"""The commands of ``palisade rollout``."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.options import EVERYWHERE, SOURCE, Actor, DryRun, PlanHash, Reason

rollout_app = typer.Typer(no_args_is_help=True, help="Releases in waves over the fleet.")


@rollout_app.command("plan", epilog=EVERYWHERE)
def rollout_plan(
    ctx: typer.Context,
    source: Annotated[int | None, SOURCE] = None,
    states: Annotated[
        str,
        typer.Option(help="With --source: rebase (fit every site's state anew) or reset (the bare model)."),
    ] = "reset",
    dry_run: DryRun = False,
) -> int:
    """Plan a release of all passing candidates in waves; with --source, of that source model to the whole
    fleet.
    """
    config = ctx.obj.config
    from jobs.rollout.operate import plan

    return plan(config, ctx.obj.terminal, source=source, states=states, dry_run=dry_run)


@rollout_app.command("rebase", epilog=EVERYWHERE)
def rollout_rebase(ctx: typer.Context, source: Annotated[int, SOURCE]) -> int:
    """Fit every site's state anew under the source model --source, beside what the site serves.

    plan --source N --states rebase does so too.
    """
    config = ctx.obj.config
    from jobs.rollout.rebase import rebase

    return rebase(config, ctx.obj.terminal, version=source)


@rollout_app.command("diff", epilog=EVERYWHERE)
def rollout_diff(ctx: typer.Context) -> int:
    """Show what the planned release would change, site by site."""
    config = ctx.obj.config
    from jobs.rollout.operate import diff

    return diff(config, ctx.obj.terminal)


@rollout_app.command("apply", epilog=EVERYWHERE)
def rollout_apply(
    ctx: typer.Context,
    plan_hash: PlanHash,
    watch: Annotated[bool, typer.Option(help="Stay until the rollout ends or waits for a person.")] = False,
    actor: Actor = None,
) -> int:
    """Approve the plan with this hash and move it on as far as it can go now; a paused rollout goes on."""
    config = ctx.obj.config
    from jobs.rollout.operate import apply

    return apply(config, ctx.obj.terminal, plan_hash=plan_hash, who=actor, watch=watch)


@rollout_app.command("approve", epilog=EVERYWHERE)
def rollout_approve(ctx: typer.Context, plan_hash: PlanHash, actor: Actor = None) -> int:
    """Add one person's approval; waves from rollout.second_approval_from_share on need two."""
    config = ctx.obj.config
    from jobs.rollout.operate import approve

    return approve(config, ctx.obj.terminal, plan_hash=plan_hash, who=actor)


@rollout_app.command("watch", epilog=EVERYWHERE)
def rollout_watch(ctx: typer.Context) -> int:
    """Move the rollout on until it ends or waits for a person or for data."""
    config = ctx.obj.config
    from jobs.rollout.operate import watch

    return watch(config, ctx.obj.terminal)


@rollout_app.command("status", epilog=EVERYWHERE)
def rollout_status(ctx: typer.Context) -> int:
    """Show the state of the newest rollout and its waves."""
    config = ctx.obj.config
    from jobs.rollout.operate import status

    return status(config, ctx.obj.terminal)


@rollout_app.command("pause", epilog=EVERYWHERE)
def rollout_pause(ctx: typer.Context, reason: Reason) -> int:
    """Stop before the next wave; apply goes on."""
    config = ctx.obj.config
    from jobs.rollout.operate import pause

    return pause(config, ctx.obj.terminal, reason=reason)


@rollout_app.command("retry", epilog=EVERYWHERE)
def rollout_retry(ctx: typer.Context, reason: Reason) -> int:
    """Give the sites that failed and were rolled back another try."""
    config = ctx.obj.config
    from jobs.rollout.operate import retry

    return retry(config, ctx.obj.terminal, reason=reason)


@rollout_app.command("override", epilog=EVERYWHERE)
def rollout_override(ctx: typer.Context, reason: Reason, actor: Actor = None) -> int:
    """Go on in spite of a hold.

    Counts once two people ask for it, for rollout.override_seconds; never for a breach.
    """
    config = ctx.obj.config
    from jobs.rollout.operate import override

    return override(config, ctx.obj.terminal, reason=reason, who=actor)


@rollout_app.command("abort", epilog=EVERYWHERE)
def rollout_abort(ctx: typer.Context, reason: Reason) -> int:
    """End the running rollout and roll every promoted site back."""
    config = ctx.obj.config
    from jobs.rollout.operate import abort

    return abort(config, ctx.obj.terminal, reason=reason)


@rollout_app.command("rollback", epilog=EVERYWHERE)
def rollout_rollback(ctx: typer.Context, reason: Reason) -> int:
    """Undo the last rollout, running or completed. Needs neither MLflow nor Ray; may be repeated."""
    config = ctx.obj.config
    from jobs.rollout.operate import rollback

    return rollback(config, ctx.obj.terminal, reason=reason)
