"""The rules of the layout: each takes a text, a syntax tree or names and returns its violations."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

REPO = Path(__file__).resolve().parents[2]
CODE = ("pipeline", "jobs")
DOCUMENTED = (*CODE, "conf", "infra", "tests")  # every folder below has a README
FILE_LINES, FUNCTION_LINES, WIDTH, README_LINES, ROOT_MODULES, SKIPS = 400, 50, 110, 200, 6, 40
VAGUE = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
TEXTS_FOR_TYPES = ("int(str(", "float(str(", ".__name__ in", "__module__.startswith")
CITED = re.compile(r"[\w./-]*\w\.(?:md|py|yaml)\b")
GENERATED = ("__pycache__", ".egg-info")


def tracked() -> list[Path]:
    """Files of the repository, relative to its root, and new ones that git does not ignore."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(listing, cwd=REPO, capture_output=True, text=True, check=True)
        names = [Path(line) for line in listed.stdout.splitlines()]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        paths = [p for top in DOCUMENTED for p in (REPO / top).rglob("*")]
        names = [p.relative_to(REPO) for p in (*paths, *REPO.iterdir())]
    found = {p for p in names if (REPO / p).is_file() and not any(g in str(p) for g in GENERATED)}
    return sorted(found)


def modules(*tops: str) -> list[Path]:
    """Python files below these folders."""
    return [p for p in tracked() if p.suffix == ".py" and p.parts[0] in tops]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, also of those within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{a.name}") for a in node.names)


def imports_ray(tree: ast.AST) -> bool:
    return any(name.split(".")[0] == "ray" for _, name in imported(tree))


def ray_out_of_place(path: PurePosixPath, tree: ast.AST) -> list[str]:
    """pipeline/cluster is where Ray is imported, in every file, and nowhere else."""
    within, imports = path.parts[:2] == ("pipeline", "cluster"), imports_ray(tree)
    if within == imports or not ast.unparse(tree).strip():
        return []
    return [f"{path}: imports Ray outside pipeline/cluster" if imports else f"{path}: imports no Ray"]


def unsafe(tree: ast.AST) -> list[str]:
    """Imports of pickling modules, calls with allow_pickle, and of torch.load without weights_only."""
    lines = [f"{n}: import {name}" for n, name in imported(tree) if name.split(".")[0] in PICKLES]
    lines += [f"{n}: import {name}" for n, name in imported(tree) if name == "torch.load"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            risky = called == "torch.load" and not safe
            risky |= any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
            lines += [f"{node.lineno}: {called}"] if risky else []
    return lines


def test_imports(tree: ast.AST) -> list[str]:
    """Modules of tests/ outside support/ that are imported, also in code that a test hands to a process."""
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    names = re.findall(r"\b(?:from|import) (tests\.[\w.]+)", "\n".join([ast.unparse(tree), *texts]))
    return sorted({name for name in names if not name.startswith("tests.support")})


def too_long(text: str) -> list[str]:
    """Files beyond 400 lines, functions beyond 50 (docstring included), lines beyond 110 columns."""
    lines = text.splitlines()
    found = [f"{n}: {len(line)} columns" for n, line in enumerate(lines, 1) if len(line) > WIDTH]
    found += [f"{len(lines)} lines; split the file by subject"] if len(lines) > FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            found += [f"{node.lineno}: {node.name} has {length} lines"] if length > FUNCTION_LINES else []
    return found


def nameless(path: PurePosixPath, text: str) -> list[str]:
    """A file whose name says nothing about its content, or that does not start with a docstring."""
    found = [f"{path.name}: the name says nothing about the content"] if path.stem in VAGUE else []
    if text.strip() and not ast.get_docstring(ast.parse(text)):
        found.append("starts without a docstring")
    return found


def types_by_text(text: str) -> list[str]:
    """Numbers got out of texts, and types compared by their names."""
    return [
        f"{n}: {piece}"
        for n, line in enumerate(text.splitlines(), 1)
        for piece in TEXTS_FOR_TYPES
        if piece in line
    ]


def prose(text: str) -> Iterator[tuple[int, str]]:
    """First line and text of every docstring and comment of a Python file."""
    import io
    import tokenize

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and ast.get_docstring(node, clean=False) is not None:
                yield first.lineno, str(ast.get_docstring(node, clean=False))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def cites_missing(text: str, files: Collection[str]) -> list[str]:
    """Files that a docstring or comment names, by a path or its end, and that are not in the repository."""
    paths = [PurePosixPath(f) for f in files]
    ends = {"/".join(p.parts[k:]) for p in paths for k in range(len(p.parts))}
    cited = ((n, name) for n, passage in prose(text) for name in CITED.findall(passage))
    return [f"{n}: {name}" for n, name in cited if name.lstrip("./") not in ends]


def undocumented(readme: str, names: Collection[str]) -> list[str]:
    """Names of a folder's files, and of its folders with a slash, that its README does not name."""
    words = set(re.findall(r"[\w.-]+/?", readme))
    return sorted(set(names) - words)


def content(files: Collection[Path]) -> dict[Path, set[str]]:
    """What the README of each folder has to name: its files, and its folders with a slash."""
    folders: dict[Path, set[str]] = defaultdict(set)
    for path in files:
        if path.parts[0] in DOCUMENTED:
            if path.name not in ("__init__.py", "README.md"):
                folders[path.parent].add(path.name)
            for folder in list(path.parents)[:-2]:
                folders[folder.parent].add(f"{folder.name}/")
    return folders


def tree_folders(readme: str) -> list[str]:
    """Folders that the first fenced block with ``pipeline/`` in it draws, each at the start of its line."""
    for block in re.findall(r"^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL):
        if re.search(r"^\W*pipeline/", block, re.MULTILINE):
            return _paths(block)
    return []


def _paths(block: str) -> list[str]:
    paths: list[str] = []
    above: list[tuple[int, str]] = []
    for line in block.splitlines():
        name = re.match(r"[\s│├└─]*(\S+/)(?=\s|$)", line)
        if name:
            depth = name.start(1)
            above = [a for a in above if a[0] < depth]
            paths.append("".join(a[1] for a in above) + name[1])
            above.append((depth, name[1]))
    return paths


def options(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and long flag of every typer.Option; one without a flag takes the name of its parameter."""
    named: dict[ast.AST, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation:
            named.update((n, node.arg) for n in ast.walk(node.annotation))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            named.update((n, node.targets[0].id) for n in ast.walk(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.Option":
            words = [str(a.value) for a in node.args if isinstance(a, ast.Constant)]
            name = named.get(node, "").lower().replace("_", "-")
            yield node.lineno, next((w for w in words if w.startswith("--")), f"--{name}")


def declared_twice(trees: Mapping[str, ast.AST]) -> list[str]:
    """Flags of the command line that are declared in more than one place."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees.items():
        for line, flag in options(tree):
            places[flag].append(f"{path}:{line}")
    return [f"{flag}: {', '.join(where)}" for flag, where in sorted(places.items()) if len(where) > 1]
