"""Commands that read the ledger alone import neither torch nor Ray nor MLflow nor a reader of Parquet or
images.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.config import load
from tests.support.ledgers import execute
from tests.support.releases import SITE, released

HEAVY = ("torch", "ray", "mlflow", "pyarrow", "cv2", "pandas")
CODE = f"""
import sys
from jobs.__main__ import main
code = main(sys.argv[1:])
print(code, [m for m in {HEAVY} if m in sys.modules])
"""
COMMANDS = (  # audit verify is not among them: it opens checkpoints and blobs, which are tensors
    ["site", "list"],
    ["site", "show", SITE],
    ["site", "explain", SITE],
    ["site", "tag", SITE, "region=north"],
    ["site", "retire", SITE, "--reason", "moved"],
    ["rollout", "plan"],
    ["rollout", "status"],
    ["rollout", "pause", "--reason", "look"],
    ["guard", "explain", SITE],
    ["guard", "recheck", SITE],
    ["audit", "log"],
    ["audit", "keygen"],
    ["metrics"],
    ["notify"],
    ["--help"],
)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    crowd = released(tmp_path_factory.mktemp("light"))
    config = load(None)  # whose limits judged the verdicts of the crowd
    execute(
        crowd.d.config.ledger.url,
        f"update cycles set config = '{config.model_dump_json()}', fingerprint = '{config.fingerprint()}'",
    )
    return crowd


def run(crowd, *words: str) -> tuple[str, str]:
    """Runs the command in a process of its own; returns its exit code with its imports, and its output."""
    # erm is one file with its algorithm, so its settings bring torch along; the default method's do not
    command = [sys.executable, "-c", CODE, *words, "--config", crowd.d.yaml, "source.kind=rise"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1], done.stdout + done.stderr


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_reader_of_the_ledger_imports_nothing_heavy(crowd, words, tmp_path):
    more = ["--out", str(tmp_path / "key")] if words[-1] == "keygen" else []
    last, text = run(crowd, *words, *more)
    if words[:2] == ["rollout", "pause"]:  # a plan that nobody approved is not running
        assert last == "2 []", text
    else:
        assert last == "0 []", text


def test_a_command_that_opens_tensors_is_seen(crowd):
    last, text = run(crowd, "audit", "verify")
    assert "torch" in last, text
