"""The commands of ``palisade audit``, and the two that tell others how the fleet is: ``notify`` and
``metrics``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import EVERYWHERE, OUT, SITE, ResultFile

audit_app = typer.Typer(no_args_is_help=True, help="The audit log: show it, verify it, make the key.")
tell_app = typer.Typer()


@audit_app.command("keygen")
def audit_keygen(ctx: typer.Context, out: Annotated[Path, OUT]) -> int:
    """Make the ed25519 key that signs release manifests.

    --out is the file of the private key; the public key lies beside it as FILE.pub. Needs no configuration.
    """
    from jobs.audit.keygen import keygen

    return keygen(ctx.obj.terminal, out=out)


@audit_app.command("log", epilog=EVERYWHERE)
def audit_log(
    ctx: typer.Context,
    site: Annotated[str | None, SITE] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of rows.")] = 20,
) -> int:
    """Show decisions and overrides, newest first.

    With --site: the rows that name this site or changed what it serves.
    """
    config = ctx.obj.config
    from jobs.audit.log import log

    return log(config, ctx.obj.terminal, site=site, limit=limit)


@audit_app.command("verify", epilog=EVERYWHERE)
def audit_verify(
    ctx: typer.Context,
    head: Annotated[
        str | None, typer.Option(help="Head that an earlier verify printed, 64 hex digits, kept elsewhere.")
    ] = None,
) -> int:
    """Check the hash chain, served releases, verdicts behind promotions, and every stored artifact that is
    needed.

    Exit codes: 0 all holds, 4 something does not, with a line for each finding.
    """
    config = ctx.obj.config
    from jobs.audit.verify import verify

    return verify(config, ctx.obj.terminal, head=head)


@tell_app.command("notify", epilog=EVERYWHERE)
def notify(
    ctx: typer.Context,
    test: Annotated[bool, typer.Option("--test", help="Send a notice to every sink first.")] = False,
) -> int:
    """Show the notices that people were sent, newest first.

    The sinks are notify.webhook and notify.file.
    """
    config = ctx.obj.config
    from jobs.audit.notices import show

    return show(config, ctx.obj.terminal, test=test)


@tell_app.command("metrics", epilog=EVERYWHERE)
def metrics(ctx: typer.Context, out: ResultFile = None) -> int:
    """Print figures of rollout, guards and audit for Prometheus.

    The text is for the node exporter's textfile collector. With --out FILE.prom the file is written, whole or
    not at all, and nothing is printed.
    """
    config = ctx.obj.config
    from jobs.audit.metrics import metrics

    return metrics(config, ctx.obj.terminal, out=out)
