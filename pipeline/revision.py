"""Names the code revision that is recorded with every checkpoint, verdict and MLflow run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pipeline


def code_revision() -> str:
    """Returns ``git describe`` of the running code, or the package version where there is no git checkout."""
    root, version = Path(pipeline.__file__).resolve().parent.parent, f"palisade-{pipeline.__version__}"
    if not (root / ".git").exists():  # installed inside another repository: git would describe that one
        return version
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return version
    return result.stdout.strip() if result.returncode == 0 else version
