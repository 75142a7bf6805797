"""``palisade manifests render``: writes the KubeRay manifests of a deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.terminal import Exit

if TYPE_CHECKING:
    from pathlib import Path

    from jobs.terminal import Terminal
    from pipeline.config import Config


def render(config: Config, terminal: Terminal, *, folder: Path) -> int:
    """Writes the manifests into ``folder``, removes those no longer needed, and shows the files."""
    from pipeline.kubernetes.manifests import write

    files = [str(path) for path in write(config, folder)]
    terminal.result({"files": files}, "\n".join(files))
    return Exit.DONE
