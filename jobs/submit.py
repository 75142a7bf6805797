"""``palisade submit``: runs any job on a Ray cluster through the Jobs API, once per submission id."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from jobs.terminal import Exit

if TYPE_CHECKING:
    from collections.abc import Sequence

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
) -> int:
    """Submits ``job`` once: a job that the cluster already has under this id is shown, not submitted again.

    With ``wait`` the job's log is followed and its exit code returned, also if an earlier call submitted the
    job.
    """
    if not job:
        raise ValueError("submit: name a command to run on the cluster, e.g. palisade submit cycle")
    from pipeline.cluster import submit as cluster
    from pipeline.kubernetes.rules import check_paths

    check_paths(config)

    chosen = submission_id or cluster.submission_id(config, job, datetime.now(UTC).date())
    submitted = cluster.submit(config, job, address=address, id=chosen)
    if submitted.existed:
        status = submitted.status
        terminal.say(f"{chosen} is already there: {status}; --id NAME submits another")
    if wait:
        submitted = cluster.follow(
            address, chosen, lambda text: terminal.err.print(text, end="", markup=False)
        )
    code = submitted.exit_code
    terminal.result(
        {"id": chosen, "status": submitted.status, "existed": submitted.existed, "exit_code": code},
        f"{chosen}: {submitted.status}" + (f", exit code {code}" if wait else ""),
    )
    if not wait:
        return Exit.DONE
    return Exit.INFRASTRUCTURE if code is None else code
