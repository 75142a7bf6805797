"""``palisade submit``: run any job on a Ray cluster through the Jobs API, once per id; or render the manifests."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from jobs.terminal import Exit

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jobs.terminal import Terminal
    from pipeline.config import Config


def submit(
    config: Config,
    terminal: Terminal,
    *,
    job: Sequence[str],
    address: str,
    submission_id: str | None,
    wait: bool,
    render: Path | None,
) -> int:
    """Submit ``job``; what is already there is named with its status and not submitted again.

    With ``wait`` the job's log is followed and its exit code returned, also when an earlier call submitted it.
    """
    if render is not None:
        return _render(config, terminal, render)
    if not job:
        raise ValueError("submit: name a command to run on the cluster, e.g. palisade submit cycle")
    from pipeline.cluster import submit as cluster
    from pipeline.kubernetes.rules import check_paths

    check_paths(config)

    chosen = submission_id or cluster.submission_id(config, job, datetime.now(UTC).date())
    found = cluster.submit(config, job, address=address, id=chosen)
    if found.existed:
        terminal.say(f"{chosen} is already there: {found.status}; --id NAME submits another")
    if wait:
        found = cluster.follow(address, chosen, lambda text: terminal.err.print(text, end="", markup=False))
    result = {"id": chosen, "status": found.status, "existed": found.existed, "exit_code": found.exit_code}
    terminal.result(result, f"{chosen}: {found.status}" + (f", exit code {found.exit_code}" if wait else ""))
    if not wait:
        return Exit.DONE
    return Exit.INFRASTRUCTURE if found.exit_code is None else found.exit_code


def _render(config: Config, terminal: Terminal, folder: Path) -> int:
    from pipeline.kubernetes.manifests import write

    files = [str(path) for path in write(config, folder)]
    terminal.result({"files": files}, "\n".join(files))
    return Exit.DONE
