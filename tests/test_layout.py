"""The rules of the repository's layout hold, and each is shown to see a violation."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

from pipeline.config import load
from tests.support import layout
from tests.support.layout import CODE, REPO, modules, tracked

PYTHON = modules(*CODE, "tests")


def read(path: Path) -> str:
    return (REPO / path).read_text()


@pytest.mark.parametrize("path", modules(*CODE), ids=str)
def test_code(path: Path) -> None:
    text = read(path)
    tree = ast.parse(text)
    assert layout.nameless(path, text) == []
    assert layout.unsafe(tree) == []
    assert layout.types_by_text(text) == []
    assert layout.ray_out_of_place(path, tree) == []


def test_one_file_reads_pre_trained_weights() -> None:
    readers = [p.as_posix() for p in modules(*CODE) if "torch.load" in read(p)]
    assert readers == ["pipeline/models/trunks/pretrained.py"]


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_no_line_is_too_long_and_in_code_no_file_or_function(path: Path) -> None:
    assert [x for x in layout.too_long(read(path)) if path.parts[0] in CODE or x.endswith("columns")] == []


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_every_file_that_a_docstring_cites_is_there(path: Path) -> None:
    assert layout.cites_missing(read(path), [p.as_posix() for p in tracked()]) == []


@pytest.mark.parametrize("path", modules("tests"), ids=str)
def test_no_test_imports_another(path: Path) -> None:
    assert layout.test_imports(ast.parse(read(path))) == [], "what two tests share stands in tests/support/"


@pytest.mark.parametrize("folder", sorted(layout.content(tracked())), ids=str)
def test_the_readme_of_a_folder_names_its_files(folder: Path) -> None:
    assert (REPO / folder / "README.md").is_file(), f"{folder}/README.md: missing"
    assert layout.undocumented(read(folder / "README.md"), layout.content(tracked())[folder]) == []


def test_the_root_readme_is_short_and_draws_folders_that_are_there() -> None:
    text = read(Path("README.md"))
    assert len(text.splitlines()) <= layout.README_LINES
    folders = layout.tree_folders(text)
    assert {"pipeline/", "jobs/", "tests/"} <= set(folders)
    assert [f for f in folders if not (REPO / f).is_dir()] == []


def test_the_root_of_the_pipeline_has_few_modules() -> None:
    modules_ = [p.name for p in modules("pipeline") if len(p.parts) == 2 and p.name != "__init__.py"]
    assert len(modules_) <= layout.ROOT_MODULES, modules_


def test_the_formatter_is_rarely_switched_off() -> None:
    skips = sum(read(p).count("# fmt: " + "skip") for p in PYTHON)
    assert skips <= layout.SKIPS


def test_an_option_is_declared_once() -> None:
    assert layout.declared_twice({str(p): ast.parse(read(p)) for p in modules("jobs")}) == []


PLANTED = [
    (layout.unsafe, "import pickle"),
    (layout.unsafe, "import joblib.numpy_pickle as x"),
    (layout.unsafe, "from cloudpickle import loads"),
    (layout.unsafe, "from torch import load"),
    (layout.unsafe, "torch.load(f)"),
    (layout.unsafe, "torch.load(f, weights_only=False)"),
    (layout.unsafe, "np.load(f, allow_pickle=True)"),
    (layout.test_imports, "from tests" + ".a.test_b import c"),
    (layout.test_imports, "import tests" + ".conftest"),
    (layout.test_imports, "run('from tests" + ".x import y')"),
]


@pytest.mark.parametrize("rule, code", PLANTED)
def test_planted_code_is_seen(rule, code: str) -> None:
    assert rule(ast.parse(code))
    assert not rule(ast.parse("import torch\nfrom tests.support.layout import REPO\nnp.load(f)\n"))


@pytest.mark.parametrize(
    "path, code",
    [
        ("pipeline/cluster/x.py", "import torch"),
        ("pipeline/control/x.py", "def f():\n    import ray.data"),
        ("jobs/x.py", "from ray import train"),
    ],
)
def test_ray_out_of_place_is_seen(path: str, code: str) -> None:
    assert layout.ray_out_of_place(PurePosixPath(path), ast.parse(code))
    assert not layout.ray_out_of_place(
        PurePosixPath("pipeline/cluster/x.py"), ast.parse("from ray import data")
    )


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n" * 401,
        "def f():\n" + "    x = 1\n" * 50,
        "class A:\n    async def f(self):\n" + "        x = 1\n" * 50,
        f"x = '{'a' * 106}'\n",
    ],
)
def test_what_is_too_long_is_seen(text: str) -> None:
    assert len(layout.too_long(text)) == 1
    fitting = "x = 1\n" * 349 + "def f():\n" + "    x = 1\n" * 49 + f"# {'a' * 108}"
    assert layout.too_long(fitting) == []


@pytest.mark.parametrize("path, text", [("pipeline/utils.py", '"""Words."""'), ("pipeline/a.py", "x = 1")])
def test_a_file_that_says_nothing_is_seen(path: str, text: str) -> None:
    assert layout.nameless(PurePosixPath(path), text)
    assert not layout.nameless(PurePosixPath("pipeline/a.py"), '"""Words."""')


@pytest.mark.parametrize(
    "text", ["n = int(str(x))", "float(str(x))", "t.__name__ in N", "t.__module__.startswith('a')"]
)
def test_a_type_by_its_text_is_seen(text: str) -> None:
    assert layout.types_by_text(text)


@pytest.mark.parametrize(
    "text", ['"""See methods.md."""', "x = 1  # as in b/a.py", 'def f():\n    """Of docs/other.yaml."""']
)
def test_a_citation_of_a_missing_file_is_seen(text: str) -> None:
    files = ["pipeline/a.py", "conf/other.yaml", "README.md"]
    assert len(layout.cites_missing(text, files)) == 1
    for cited in ("pipeline/a.py", "a.py", "conf/other.yaml", "../README.md"):
        assert not layout.cites_missing(f'"""See ``{cited}``."""', files)
    assert not layout.cites_missing("x = 'methods.md'", files), "a text is no comment"


def test_a_file_that_its_readme_leaves_out_is_seen() -> None:
    files = [
        Path(f)
        for f in ("pipeline/a.py", "pipeline/b/c.py", "pipeline/b/__init__.py", "README.md", "Makefile")
    ]
    folders = layout.content(files)
    assert folders == {Path("pipeline"): {"a.py", "b/"}, Path("pipeline/b"): {"c.py"}}
    assert layout.undocumented("| `a.py` | does |\n| [`b/`](b/) | is |", folders[Path("pipeline")]) == []
    assert layout.undocumented("aa.py and b", folders[Path("pipeline")]) == ["a.py", "b/"]


def test_folders_of_a_drawn_tree() -> None:
    drawn = (
        "```\npipeline/     code\n├── types.py  nouns\n└── data/     bytes\n    └── parquet/\nconf/\n```\n"
    )
    assert layout.tree_folders(drawn) == ["pipeline/", "pipeline/data/", "pipeline/data/parquet/", "conf/"]
    assert layout.tree_folders("```\nother\n```\n") == []


def test_an_option_that_is_declared_twice_is_seen() -> None:
    first = "def f(site: Annotated[str, typer.Option(help='a')]): ..."
    named = "def g(x: Annotated[str, typer.Option('--site', help='b')]): ..."
    alias = "Site = Annotated[str, typer.Option(help='c')]"
    for second in (first, named, alias):
        assert layout.declared_twice({"a.py": ast.parse(first), "b.py": ast.parse(second)}) == [
            "--site: a.py:1, b.py:1"
        ]
    assert layout.declared_twice({"a.py": ast.parse(first.replace("site", "sites") + "\n" + named)}) == []


@pytest.mark.parametrize("path", sorted((REPO / "conf").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_loads(path: Path) -> None:
    assert len(load(path).fingerprint()) == 64


def test_config_is_light() -> None:
    """A mistake in a YAML is told in a second: nothing heavy is imported to read a configuration."""
    heavy = ("torch", "ray", "mlflow", "sqlalchemy", "cv2", "pyarrow", "scipy", "pandas")
    code = (
        "import sys; from pipeline.config import load, method_config\n"
        "load(None); method_config('site', 'danet'); method_config('source', 'rise')\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n", f"loading a configuration imports {done.stdout}"
