"""The commands of ``palisade rollout`` and their options."""

from __future__ import annotations

from typing import Annotated

import typer

EVERYWHERE = "Every command also takes --config FILE, --json and overrides such as site.lr=1e-4."

rollout_app = typer.Typer(
    no_args_is_help=True, help="Waves over the fleet: plan, diff, apply, status, pause, abort, rollback."
)


@rollout_app.command("plan", epilog=EVERYWHERE)
def rollout_plan(ctx: typer.Context) -> int:
    """Plan a release of all passing candidates in waves."""
    config = ctx.obj.config
    from jobs.rollout import plan

    return plan(config, ctx.obj.terminal)


@rollout_app.command("diff", epilog=EVERYWHERE)
def rollout_diff(ctx: typer.Context) -> int:
    """What the planned release would change, site by site."""
    config = ctx.obj.config
    from jobs.rollout import diff

    return diff(config, ctx.obj.terminal)


@rollout_app.command("apply", epilog=EVERYWHERE)
def rollout_apply(
    ctx: typer.Context,
    plan_hash: Annotated[str, typer.Argument(help="The hash that plan printed (the first 8 digits are enough).")],
    watch: Annotated[bool, typer.Option(help="Stay until the rollout ends or waits for a person.")] = False,
) -> int:
    """Approve the plan with this hash and move it on as far as it can go now."""
    config = ctx.obj.config
    from jobs.rollout import apply

    return apply(config, ctx.obj.terminal, plan_hash=plan_hash, watch=watch)


@rollout_app.command("status", epilog=EVERYWHERE)
def rollout_status(ctx: typer.Context) -> int:
    """Where the rollout stands."""
    config = ctx.obj.config
    from jobs.rollout import status

    return status(config, ctx.obj.terminal)


@rollout_app.command("pause", epilog=EVERYWHERE)
def rollout_pause(ctx: typer.Context, reason: Annotated[str, typer.Option(help="Why; kept in the audit log.")]) -> int:
    """Stop before the next wave; apply goes on."""
    config = ctx.obj.config
    from jobs.rollout import pause

    return pause(config, ctx.obj.terminal, reason=reason)


@rollout_app.command("abort", epilog=EVERYWHERE)
def rollout_abort(ctx: typer.Context, reason: Annotated[str, typer.Option(help="Why; kept in the audit log.")]) -> int:
    """End the running rollout and roll every promoted site back."""
    config = ctx.obj.config
    from jobs.rollout import abort

    return abort(config, ctx.obj.terminal, reason=reason)


@rollout_app.command("rollback", epilog=EVERYWHERE)
def rollout_rollback(
    ctx: typer.Context, reason: Annotated[str, typer.Option(help="Why; kept in the audit log.")]
) -> int:
    """Undo the last rollout, running or completed. Needs neither MLflow nor Ray; may be repeated."""
    config = ctx.obj.config
    from jobs.rollout import rollback

    return rollback(config, ctx.obj.terminal, reason=reason)
