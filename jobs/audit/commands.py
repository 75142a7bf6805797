"""The commands of ``palisade audit``, and what tells others how the fleet is: ``notify`` and ``metrics``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import EVERYWHERE

audit_app = typer.Typer(
    no_args_is_help=True, help="The record: who decided what, whether it holds, the signing key."
)
tell_app = typer.Typer()


@audit_app.command("keygen")
def audit_keygen(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="File of the private key; the public one gets .pub.")],
) -> int:
    """Make the ed25519 key that release manifests are signed with. Needs no configuration."""
    from jobs.audit.verify import keygen

    return keygen(ctx.obj.terminal, out=out)


@audit_app.command("log", epilog=EVERYWHERE)
def audit_log(
    ctx: typer.Context,
    site: Annotated[
        str | None, typer.Option(help="Only what names this site or changed what it serves.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows.")] = 20,
) -> int:
    """Decisions and overrides, newest first."""
    config = ctx.obj.config
    from jobs.audit.verify import log

    return log(config, ctx.obj.terminal, site=site, limit=limit)


@audit_app.command("verify", epilog=EVERYWHERE)
def audit_verify(
    ctx: typer.Context,
    head: Annotated[
        str | None, typer.Option(help="A head that an earlier verify printed, 64 hex digits, kept elsewhere.")
    ] = None,
) -> int:
    """Check hash chain, served releases, verdicts behind promotions, and every stored artifact that is needed.

    Exit codes: 0 all holds, 4 something does not, a line for each.
    """
    config = ctx.obj.config
    from jobs.audit.verify import verify

    return verify(config, ctx.obj.terminal, head=head)


@tell_app.command("notify", epilog=EVERYWHERE)
def notify(
    ctx: typer.Context,
    test: Annotated[bool, typer.Option("--test", help="Send a notice to every sink first.")] = False,
) -> int:
    """What people were told, newest first; sinks are notify.webhook and notify.file."""
    config = ctx.obj.config
    from jobs.audit.notices import show

    return show(config, ctx.obj.terminal, test=test)


@tell_app.command("metrics", epilog=EVERYWHERE)
def metrics(
    ctx: typer.Context,
    out: Annotated[
        Path | None, typer.Option(help="Write this .prom file, whole or not at all, instead of printing.")
    ] = None,
) -> int:
    """Rollout, guards and audit in Prometheus' text format, for the node exporter's textfile collector."""
    config = ctx.obj.config
    from jobs.audit.metrics import metrics

    return metrics(config, ctx.obj.terminal, out=out)
