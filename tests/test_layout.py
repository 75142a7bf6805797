"""The repository's own rules: files are short, no test imports another, nothing unpickles, config stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import load

REPO = Path(__file__).resolve().parents[1]
SOURCES = ("pipeline", "jobs", "conf", "infra")
LINES = 400
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def tracked() -> list[Path]:
    """Files of the repository, relative; those that are new and not ignored count already."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listed, cwd=REPO, capture_output=True, text=True, check=True)
        names = [Path(line) for line in done.stdout.splitlines()]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        names = [
            p.relative_to(REPO) for top in (*SOURCES, "tests") for p in (REPO / top).rglob("*") if p.is_file()
        ]
    hidden = ("__pycache__", ".egg-info")
    return sorted(
        p for p in names if (REPO / p).is_file() and not any(h in part for part in p.parts for h in hidden)
    )


def python_sources() -> list[Path]:
    return [p for p in tracked() if p.suffix == ".py" and p.parts[0] in ("pipeline", "jobs")]


@pytest.mark.parametrize("path", python_sources(), ids=str)
def test_source_file(path: Path) -> None:
    text = (REPO / path).read_text()
    lines = len(text.splitlines())
    assert lines <= LINES, f"{path}: {lines} lines; the limit is {LINES}, split it by subject"
    assert path.stem not in VAGUE, f"{path}: the name says nothing about the content"
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{path}: starts with a docstring"


@pytest.mark.parametrize("path", python_sources(), ids=str)
def test_nothing_is_unpickled(path: Path) -> None:
    assert unsafe(ast.parse((REPO / path).read_text())) == []


def unsafe(tree: ast.AST) -> list[str]:
    """Imports of pickling modules and calls of torch.load / np.load(allow_pickle=…), as 'line: what'."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [
                f"{node.lineno}: import {a.name}" for a in node.names if a.name.split(".")[0] in PICKLES
            ]
        elif isinstance(node, ast.ImportFrom):
            bad = (node.module or "").split(".")[0] in PICKLES
            bad = bad or (node.module == "torch" and any(a.name == "load" for a in node.names))
            found += [f"{node.lineno}: from {node.module}"] if bad else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            risky = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
            if called == "torch.load" or risky:
                found.append(f"{node.lineno}: {called}")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import joblib.numpy_pickle as x",
        "from cloudpickle import loads",
        "from torch import load",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_unpickling_is_seen(code: str) -> None:
    assert unsafe(ast.parse(code))


def foreign(tree: ast.AST) -> list[str]:
    """Modules of tests/ outside support/ that are imported, also within code that a test hands to a process."""
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    found = re.findall(r"\b(?:from|import) (tests\.[\w.]+)", "\n".join([ast.unparse(tree), *texts]))
    return sorted({name for name in found if not name.startswith("tests.support.")})


@pytest.mark.parametrize(
    "path", [p for p in tracked() if p.parts[0] == "tests" and p.suffix == ".py"], ids=str
)
def test_no_test_imports_another(path: Path) -> None:
    assert foreign(ast.parse((REPO / path).read_text())) == [], (
        "what two tests share belongs into tests/support/"
    )


@pytest.mark.parametrize(
    "code", ["from {}.a.test_b import c", "import {}.conftest", "run('from {}.x import y')"]
)
def test_an_import_of_a_test_is_seen(code: str) -> None:
    assert foreign(ast.parse(code.format("tests")))


@pytest.mark.parametrize("path", sorted((REPO / "conf").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_loads(path: Path) -> None:
    assert len(load(path).fingerprint()) == 64


def test_a_submodule_may_be_the_first_that_asks_for_torch() -> None:
    code = (
        "from jobs.__main__ import lazy; lazy('torch'); import torch; import torch.utils.data, sys\n"
        "print(torch.utils is sys.modules['torch.utils'], hasattr(torch.utils, '_pytree'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n", "torch.utils was loaded a second time"


def test_config_is_light() -> None:
    """A mistake in a YAML is told in a second: nothing heavy runs before a job asks for it."""
    code = (
        "import sys; from jobs.__main__ import lazy; lazy('torch'); from pipeline.config import load; load(None)\n"
        "print([m for m in ('torch._C', 'ray', 'mlflow', 'sqlalchemy', 'cv2', 'pyarrow', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n", f"loading a configuration imports {done.stdout}"
