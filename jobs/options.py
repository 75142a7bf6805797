"""Options and arguments of the command line: an option that several commands take is declared here, once.

What the result file, the version or the cycle means to one command stands in that command's own text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EVERYWHERE = "Every command also takes --config FILE, --json and overrides such as site.lr=1e-4."

Site = Annotated[str, typer.Argument(metavar="SITE", help="Id of the site.")]
SiteOrFile = Annotated[str | None, typer.Argument(metavar="SITE", help="Id of the site; none with --from.")]
PlanHash = Annotated[
    str, typer.Argument(metavar="HASH", help="Hash that the plan printed; its first 8 digits are enough.")
]

Reason = Annotated[str, typer.Option("--reason", help="Why; stays in the audit log.")]
Actor = Annotated[
    str | None, typer.Option("--actor", help="Person who decides; default: the user of this machine.")
]
SITE = typer.Option("--site", help="Id of a site.")
Sites = Annotated[list[str] | None, SITE]
SOURCE = typer.Option("--source", help="Version of the source model.")
Version = Annotated[
    int | None, typer.Option("--version", help="Version of the source model; default: the champion.")
]
Cycle = Annotated[str | None, typer.Option("--cycle", help="Id of a cycle.")]
OUT = typer.Option("--out", help="File or folder to write.")
FROM = typer.Option("--from", help="CSV or Parquet file to read.")
ResultFile = Annotated[Path | None, OUT]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Change nothing; show what would be done.")]
PUBLIC_KEY = typer.Option("--public-key", help="Public key of the deployment, KEY.pub.")
Changes = Annotated[
    list[str] | None, typer.Option("--with", help="Setting that differs, section.key=value; may be repeated.")
]
Against = Annotated[
    Path | None, typer.Option("--against", help="YAML file whose sections replace the present ones.")
]
Quick = Annotated[bool, typer.Option("--quick", help="A small run: minutes at most, and no evidence.")]
Seeds = Annotated[
    int | None, typer.Option("--seeds", min=1, help="Seeds of the source models; default: bench.seeds.")
]
Write = Annotated[bool, typer.Option("--write", help="Write the tables into jobs/bench/README.md.")]
