"""Runs one job on a running Ray cluster through its Jobs API, at most once per submission id.

Ray keeps no schedule: what repeats is the caller (CronJob, Airflow, a person), with an id that says which
piece of work it means. The resolved configuration travels along, so the job runs what was submitted.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import yaml

from pipeline.cluster import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import date

    from ray.job_submission import JobSubmissionClient

    from pipeline.config import Config

CONFIG_NAME = "deployment.yaml"
SUBMISSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
TOKEN_FILE = Path("~/.ray/auth_token")


@dataclass(frozen=True)
class Submission:
    """A job as Ray knows it."""

    id: str
    status: str  # PENDING RUNNING STOPPED SUCCEEDED FAILED
    existed: bool  # it had been submitted before and was not submitted again
    exit_code: int | None  # None while it runs, and when it never started


def submission_id(config: Config, job: Sequence[str], day: date) -> str:
    """The default id: what is done (command line), with what (config fingerprint), for which day."""
    command = hashlib.sha256("\0".join(job).encode()).hexdigest()[:8]
    return f"palisade-{re.sub(r'[^a-z0-9]+', '-', job[0])}-{command}-{config.fingerprint()[:12]}-{day:%Y%m%d}"


def submit(config: Config, job: Sequence[str], *, address: str, id: str) -> Submission:
    """Hand ``palisade JOB …`` to the cluster at ``address`` (http://head:8265), or find that ``id`` is
    already there.

    Raises ClusterError when the cluster does not answer or wants a token, ValueError for a bad id or path.
    """
    if not SUBMISSION_ID.fullmatch(id):
        raise ValueError(
            f"--id {id!r}: allowed are 1-128 of A-Z a-z 0-9 _ . -, starting with a letter or digit"
        )
    return submit_command(config, _command(job, address), address=address, id=id)


def submit_command(config: Config, command: str, *, address: str, id: str) -> Submission:
    """Like ``submit`` for any shell command; the resolved configuration lies in its working directory."""
    client = _client(address)
    if submission := _find(client, id):
        return submission
    on_cluster = config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": "auto"})})
    with tempfile.TemporaryDirectory() as folder:
        text = yaml.safe_dump(on_cluster.model_dump(mode="json"), sort_keys=False)
        (Path(folder) / CONFIG_NAME).write_text(text)
        try:
            client.submit_job(
                entrypoint=command,
                submission_id=id,
                runtime_env={"working_dir": folder},
                metadata={"palisade_fingerprint": config.fingerprint()},
            )
        except OSError as e:
            raise ClusterError(
                f"Ray at {address}: went away: {_line(e)}; the same call is safe to repeat"
            ) from e
        except RuntimeError as e:
            if submission := _find(client, id):  # somebody submitted it between our look and our call
                return submission
            raise ClusterError(f"Ray at {address}: refused {id}: {_line(e)}") from e
    return Submission(id, "PENDING", existed=False, exit_code=None)


def follow(address: str, id: str, say: Callable[[str], None]) -> Submission:
    """Stream the job's log to ``say`` until it ends, and return how it ended."""
    client = _client(address)

    async def tail() -> None:
        async for text in client.tail_job_logs(id):
            say(text)

    try:
        asyncio.run(tail())
        submission = _find(client, id)
    except (OSError, RuntimeError) as e:
        raise ClusterError(
            f"Ray at {address}: lost sight of {id}: {_line(e)}; the job goes on, look again with --id"
        ) from e
    assert submission is not None, id
    return submission


def _client(address: str) -> JobSubmissionClient:
    if (
        os.environ.get("RAY_AUTH_TOKEN")
        or os.environ.get("RAY_AUTH_TOKEN_PATH")
        or TOKEN_FILE.expanduser().exists()
    ):
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as e:
        raise ClusterError(
            f"Ray at {address}: wants a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH"
        ) from e
    except (OSError, RuntimeError, ValueError) as e:
        line = (
            f"Ray at {address}: no Jobs API there ({_line(e)}); start a head or pass --address "
            "http://HEAD:8265"
        )
        raise ClusterError(line) from e


def _find(client: JobSubmissionClient, id: str) -> Submission | None:
    try:
        info = client.get_job_info(id)
    except RuntimeError as e:
        if "404" in str(e) or "does not exist" in str(e):
            return None
        raise ClusterError(f"Ray: cannot look up {id}: {_line(e)}") from e
    except OSError as e:
        raise ClusterError(
            f"Ray went away while looking up {id}: {_line(e)}; the same call is safe to repeat"
        ) from e
    return Submission(id, str(info.status), existed=True, exit_code=info.driver_exit_code)


def _command(job: Sequence[str], address: str) -> str:
    """A head on this machine may not have our environment on its PATH; an image has it."""
    on_this_machine = urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")
    start = [sys.executable, "-m", "jobs"] if on_this_machine else ["palisade"]
    return shlex.join([*start, "--config", CONFIG_NAME, *job])


def _line(e: Exception) -> str:
    return " ".join(str(e).split())[:200]
