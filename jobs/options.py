"""Options and arguments that more than one command takes, each declared once."""

from __future__ import annotations

from typing import Annotated

import typer

EVERYWHERE = "Every command also takes --config FILE, --json and overrides such as site.lr=1e-4."
Reason = Annotated[str, typer.Option(help="Why; kept in the audit log.")]
Hash = Annotated[str, typer.Argument(help="The hash that plan printed (the first 8 digits are enough).")]
Who = Annotated[str | None, typer.Option("--as", help="Who says it; default: the user of this machine.")]
