"""The commands of ``palisade site``."""

from __future__ import annotations

import typer

from jobs.commands_rollout import EVERYWHERE

site_app = typer.Typer(no_args_is_help=True, help="Sites: list, show, explain.")


@site_app.command("list", epilog=EVERYWHERE)
def site_list(ctx: typer.Context) -> int:
    """All sites with their last verdict and what they serve."""
    config = ctx.obj.config
    from jobs.site import list_sites

    return list_sites(config, ctx.obj.terminal)


@site_app.command("show", epilog=EVERYWHERE)
def site_show(ctx: typer.Context, site: str) -> int:
    """One site: registration, stream position, quarantine, verdicts."""
    config = ctx.obj.config
    from jobs.site import show

    return show(config, ctx.obj.terminal, site=site)


@site_app.command("explain", epilog=EVERYWHERE)
def site_explain(ctx: typer.Context, site: str) -> int:
    """Why the site serves what it serves: source version, stream window, candidate, verdict, wave."""
    config = ctx.obj.config
    from jobs.site import explain

    return explain(config, ctx.obj.terminal, site=site)
