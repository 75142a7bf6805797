"""A short fit, bank steps, verdicts and a plan equal, bit for bit, the results stored in ``golden.json``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
# the same float arithmetic on every x86 processor: vector width, threads and kernels are pinned
PORTABLE = {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def computed() -> dict[str, dict[str, object]]:
    command = [sys.executable, str(HERE / "compute.py")]
    environment = os.environ | PORTABLE | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


GOLDEN = json.loads((HERE / "golden.json").read_text())


@pytest.mark.parametrize("part", sorted(GOLDEN))
def test_results_are_bit_equal(computed: dict[str, dict[str, object]], part: str) -> None:
    assert computed[part] == GOLDEN[part]
