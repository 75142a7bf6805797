"""Which code runs: recorded with every checkpoint, verdict and MLflow run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pipeline


def code_revision() -> str:
    """``git describe`` of the code that runs, or the package version where there is no git."""
    root, version = Path(pipeline.__file__).resolve().parent.parent, f"palisade-{pipeline.__version__}"
    if not (root / ".git").exists():  # installed inside somebody else's repository, git would describe theirs
        return version
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return version
    return done.stdout.strip() if done.returncode == 0 else version
