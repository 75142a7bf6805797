"""Submissions to a real head with token auth: once per id, exit codes, logs, messages to a person."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.cluster.submit import submission_id
from pipeline.config import Config, load, parse

REPO = Path(__file__).resolve().parents[2]
TOKEN = "submit-test-token-of-enough-characters"  # noqa: S105 - of a head that lives for seconds
SCRIPT = """
import json, sys
from pathlib import Path
from pipeline.cluster.submit import follow, submit_command
from pipeline.config import load
config, (address, id, command) = load(Path(sys.argv[1])), sys.argv[2:]
said = []
first = submit_command(config, command, address=address, id=id)
again = submit_command(config, command, address=address, id=id)
ended = follow(address, id, said.append)
print(json.dumps([first.existed, again.existed, ended.status, ended.exit_code, "".join(said)]))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(token: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    patient = {
        "RAY_agent_register_timeout_ms": "120000",
        "RAY_health_check_timeout_ms": "60000",
    }  # a busy machine
    return (
        kept
        | auth
        | patient
        | {"PYTHONPATH": str(REPO), "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    )


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Address of a head of our own, with its own ports and folder; only what it started is ended."""
    temp, port = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp")), free_port()
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--object-store-memory=100000000"),
        *(f"--port={free_port()}", f"--dashboard-port={port}", f"--temp-dir={temp}"),
        *(f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"),
    ]
    with (temp / "out").open("w") as out:
        started = subprocess.Popen(command, env=environment(TOKEN), stdout=out, stderr=out)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, started, temp / "out")
        yield address
    finally:
        ours = [*psutil.Process(started.pid).children(recursive=True), psutil.Process(started.pid)]
        started.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(ours, timeout=5)
        for process in left:  # a GCS may sit out a SIGTERM
            process.kill()
        started.wait(timeout=10)
        shutil.rmtree(temp, ignore_errors=True)


def wait_for(address: str, started: subprocess.Popen[bytes], log: Path) -> None:
    asked = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert started.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(asked, timeout=5)
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(log.read_text())


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    """The defaults with absolute paths."""
    raw = load(None).model_dump(mode="json")
    raw["data"] |= {"corpora": str(tmp_path / "corpora"), "captures": str(tmp_path / "captures")}
    raw["ledger"] = {"url": f"sqlite:///{tmp_path}/ledger.db", "artifacts": str(tmp_path / "artifacts")}
    raw["lineage"] |= {"uri": f"sqlite:///{tmp_path}/mlflow.db", "artifacts": str(tmp_path / "mlflow")}
    path = tmp_path / "deployment.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def cli(config: Path, *args: str, token: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", "--json", "--config", str(config), "submit", *args]
    return subprocess.run(
        command, cwd=REPO, env=environment(token), capture_output=True, text=True, timeout=100
    )


@pytest.mark.cluster
def test_a_job_runs_once_per_id_and_its_log_and_exit_code_come_back(head: str, deployment: Path) -> None:
    code = "import yaml; c = yaml.safe_load(open('deployment.yaml')); "
    code += "print('at', c['cluster']['address']); exit(3)"
    command = f'{sys.executable} -c "{code}"'
    called = [sys.executable, "-c", SCRIPT, str(deployment), head, "once-1", command]
    done = subprocess.run(
        called, cwd=REPO, env=environment(TOKEN), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    existed_first, existed_again, status, exit_code, log = json.loads(done.stdout.splitlines()[-1])
    assert (existed_first, existed_again) == (False, True)
    assert (status, exit_code) == ("FAILED", 3)
    assert "at auto" in log
    repeated = cli(deployment, "--id", "once-1", "--wait", "--address", head, "cycle", token=TOKEN)
    assert "once-1 is already there: FAILED" in repeated.stderr
    assert repeated.returncode == 3
    assert json.loads(repeated.stdout) == {
        "id": "once-1",
        "status": "FAILED",
        "existed": True,
        "exit_code": 3,
    }


@pytest.mark.cluster
def test_a_head_that_wants_a_token_says_so(head: str, deployment: Path) -> None:
    refused = cli(deployment, "--address", head, "cycle", token="wrong-" + TOKEN)
    assert refused.returncode == 5
    assert refused.stderr.splitlines()[-1].startswith(
        f"error: Ray at {head}: wants a token; set RAY_AUTH_MODE=token"
    )
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head}/api/jobs/", timeout=5)


@pytest.mark.slow
def test_no_head_is_one_line_with_the_next_step(deployment: Path) -> None:
    nothing = cli(deployment, "--address", f"http://127.0.0.1:{free_port()}", "cycle", token=TOKEN)
    assert nothing.returncode == 5
    assert "Traceback" not in nothing.stderr
    assert re.search(r"no Jobs API there \(.*\); start a head", nothing.stderr.splitlines()[-1])


def test_the_default_id_says_what_with_what_and_for_when() -> None:
    config = load(None)
    day = date(2026, 3, 1)
    one = submission_id(config, ["cycle"], day)
    assert one == submission_id(config, ["cycle"], day)
    assert one.startswith("palisade-cycle-")
    assert one.endswith(f"-{config.fingerprint()[:12]}-20260301")
    others = [
        submission_id(config, ["cycle", "--all"], day),
        submission_id(config, ["cycle"], date(2026, 3, 2)),
        submission_id(changed(config), ["cycle"], day),
        submission_id(config, ["train"], day),
    ]
    assert len({one, *others}) == 5


def changed(config: Config) -> Config:
    raw = config.model_dump(mode="json")
    raw["data"]["frame_px"] = 64
    return parse(yaml.safe_dump(raw), "test")
