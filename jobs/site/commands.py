"""The commands of ``palisade site``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import EVERYWHERE, FROM, PUBLIC_KEY, SITE, Actor, DryRun, Reason, Site, SiteOrFile

site_app = typer.Typer(no_args_is_help=True, help="Sites: states, tags, and what their boxes pull.")


@site_app.command("list", epilog=EVERYWHERE)
def site_list(ctx: typer.Context) -> int:
    """List all sites with their newest verdict and what they serve."""
    config = ctx.obj.config
    from jobs.site.show import list_sites

    return list_sites(config, ctx.obj.terminal)


@site_app.command("show", epilog=EVERYWHERE)
def site_show(ctx: typer.Context, site: Site) -> int:
    """Show one site: registration, stream position, quarantine, verdicts."""
    config = ctx.obj.config
    from jobs.site.show import show

    return show(config, ctx.obj.terminal, site=site)


@site_app.command("explain", epilog=EVERYWHERE)
def site_explain(ctx: typer.Context, site: Site) -> int:
    """Explain why the site serves what it serves: source version, stream window, candidate, verdict, wave."""
    config = ctx.obj.config
    from jobs.site.show import explain

    return explain(config, ctx.obj.terminal, site=site)


@site_app.command("tag", epilog=EVERYWHERE)
def site_tag(
    ctx: typer.Context,
    site: SiteOrFile = None,
    tags: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="e.g. region=north tz=Europe/Berlin rig=rgb+ir."),
    ] = None,
    file: Annotated[Path | None, FROM] = None,
) -> int:
    """Tag a site: region, tenant, hardware, tz (IANA), rig (rgb, depth, ir), or tags of your own; KEY=
    removes one.

    Waves, caps, control sites and nights of a rollout go by these tags. A file is CSV: a column site, then
    one per tag; an empty cell changes nothing.
    """
    config = ctx.obj.config
    from jobs.site.show import tag

    return tag(config, ctx.obj.terminal, site=site, pairs=tags or [], file=file)


@site_app.command("label", epilog=EVERYWHERE)
def site_label(
    ctx: typer.Context,
    site: Site,
    file: Annotated[Path, FROM],
    kind: Annotated[
        str | None, typer.Option(help="commissioning, red-team, incident or correction, of rows without one.")
    ] = None,
    actor: Actor = None,
) -> int:
    """Record labelled presentations with who vouches for them; a file with a bad row is refused.

    Columns: sample_id, label (bona_fide or attack), instrument; kind, who and labelled_at per row, or else
    from the options, the user of this machine and the clock.
    """
    config = ctx.obj.config
    from jobs.site.label import label

    return label(config, ctx.obj.terminal, site=site, file=file, kind=kind, actor=actor)


@site_app.command("commission", epilog=EVERYWHERE)
def site_commission(
    ctx: typer.Context,
    site: SiteOrFile = None,
    file: Annotated[Path | None, FROM] = None,
    dry_run: DryRun = False,
) -> int:
    """Say what to present at a new site (data.commissioning), what has arrived, and what it would gain.

    Where nothing is missing, the site learns from its labels and its candidate goes through the guards.
    """
    config = ctx.obj.config
    from jobs.site.commission import commission

    return commission(config, ctx.obj.terminal, site=site, file=file, dry_run=dry_run)


@site_app.command("unlabel", epilog=EVERYWHERE)
def site_unlabel(
    ctx: typer.Context,
    site: Site,
    samples: Annotated[list[str], typer.Argument(metavar="SAMPLE_ID...", help="Ids of the samples.")],
    reason: Reason,
    actor: Actor = None,
) -> int:
    """Take labels back: they count no longer, and stay in the record with the reason."""
    config = ctx.obj.config
    from jobs.site.label import unlabel

    return unlabel(config, ctx.obj.terminal, site=site, samples=samples, reason=reason, actor=actor)


@site_app.command("retire", epilog=EVERYWHERE)
def site_retire(ctx: typer.Context, site: Site, reason: Reason) -> int:
    """Take a site out of service: no release plans it, holds because of it or counts it as silent."""
    config = ctx.obj.config
    from jobs.site.show import retire

    return retire(config, ctx.obj.terminal, site=site, reason=reason, retired=True)


@site_app.command("restore", epilog=EVERYWHERE)
def site_restore(ctx: typer.Context, site: Site, reason: Reason) -> int:
    """Take a retired site back into service."""
    config = ctx.obj.config
    from jobs.site.show import retire

    return retire(config, ctx.obj.terminal, site=site, reason=reason, retired=False)


@site_app.command("pull", epilog=EVERYWHERE)
def site_pull(
    ctx: typer.Context,
    site: Site,
    to: Annotated[Path, typer.Option(help="Folder of the site's box.")],
    public_key: Annotated[Path | None, PUBLIC_KEY] = None,
) -> int:
    """Write what the site's box is to serve, under a signed manifest: the model once, the state,
    release.json.

    Everything is verified first, with --public-key or else the signing key's own public half. Needs neither
    MLflow nor Ray.
    """
    config = ctx.obj.config
    from jobs.site.pull import pull

    return pull(config, ctx.obj.terminal, site=site, to=to, public_key=public_key)


@site_app.command("verify")
def site_verify(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder that site pull wrote.")],
    public_key: Annotated[Path, PUBLIC_KEY],
    site: Annotated[str | None, SITE] = None,
) -> int:
    """Accept a release on a box before it is served, or refuse it with exit code 4. Needs no configuration.

    Checked are signature, site, expiry, every file's digest, and that the counter is not below the last
    accepted one. --site is needed until a release was accepted in this folder.
    """
    from jobs.site.pull import verify_folder

    return verify_folder(ctx.obj.terminal, folder, public_key=public_key, site=site)
