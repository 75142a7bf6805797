"""Entry point of ``palisade``: global options may stand anywhere, and a mistake is one line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from typer.exceptions import TyperException

from jobs.app import app
from jobs.terminal import Exit
from pipeline.types import PalisadeError

COMMANDS = {  # earlier name → present one
    "replay": "what-if",
    "guard replay": "guard recheck",
}
OPTIONS = {"--as": "--actor", "--render": "palisade manifests render DIR"}
OVERRIDE = re.compile(r"[a-z]+(\.[a-z_0-9]+)+=.*", re.DOTALL)


def gather(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the global options (--config, --json, overrides), wherever they stand, and the command with its
    own words.
    """
    front: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("--config", "-c", "--set"):
            front += [word, next(words, "")]
        elif word == "--json" or word.startswith("--config="):
            front.append(word)
        elif OVERRIDE.fullmatch(word) and rest[-1:] != ["--with"]:  # after --with it belongs to the command
            front += ["--set", word]
        else:
            rest.append(word)
    return front, rest


def renamed(call: Sequence[str]) -> str | None:
    """Returns one line that names the present command or option if ``call`` uses an earlier one."""
    words = [word.partition("=")[0] for word in call]
    for earlier, name in COMMANDS.items():
        if words[: earlier.count(" ") + 1] == earlier.split():
            return f"palisade {earlier} is now palisade {name}"
    return next((f"{earlier} is now {name}" for earlier, name in OPTIONS.items() if earlier in words), None)


def exit_code(e: Exception) -> Exit | None:
    """Returns the exit code of an error that a person can act on.

    None stands for a bug of ours, which keeps its traceback.
    """
    if isinstance(e, PalisadeError):
        return Exit(e.exit_code)
    if isinstance(e, (TyperException, ValueError)):
        return Exit.USAGE
    return Exit.INFRASTRUCTURE if isinstance(e, OSError) else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a person's mistake is one line."""
    front, command = gather(sys.argv[1:] if argv is None else argv)
    try:
        if moved := renamed(command):
            raise ValueError(moved)
        return int(app([*front, *command], standalone_mode=False, prog_name="palisade") or 0)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    except Exception as e:
        code = exit_code(e)
        if code is None or os.environ.get("PALISADE_TRACEBACK"):
            raise
        print(f"error: {getattr(e, 'format_message', e.__str__)()}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
