"""The command line: where options may stand, one declaration for each option, earlier names."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest
import typer

from jobs.__main__ import COMMANDS, gather, main
from jobs.app import app

JOBS = Path(__file__).parents[2] / "jobs"


def leaves(command, path=()):
    """Every command by its words."""
    for name, child in getattr(command, "commands", {}).items():
        yield from leaves(child, (*path, name))
    if not getattr(command, "commands", None):
        yield path, command


LEAVES = dict(leaves(typer.main.get_command(app)))


READMES = sorted(p for p in JOBS.parent.glob("**/README.md") if not {".venv", "run", "demo"} & {*p.parts})
NAMED = re.compile(r"(?:^|[`/])palisade(?: --config \S+)? ([a-z-]+)(?: ([a-z-]+))?", re.MULTILINE)


def test_every_command_in_a_readme_is_there():
    known = {path[:n] for path in LEAVES for n in (1, 2)}
    groups = {path[0] for path in LEAVES if len(path) > 1}
    named = [(p, words) for p in READMES for words in NAMED.findall(p.read_text())]
    assert len(named) > 50
    assert [(p, w) for p, w in named if (w[:1] if w[0] not in groups or not w[1] else w) not in known] == []


def test_global_options_may_stand_anywhere():
    words = ["train", "site.lr=1e-4", "--champion", "--json", "--config", "x.yaml"]
    front = ["--set", "site.lr=1e-4", "--json", "--config", "x.yaml"]
    assert gather(words) == (front, ["train", "--champion"])


def test_a_setting_after_with_belongs_to_the_command():
    words = ["what-if", "--with", "site.lr=1e-4", "bank.slots=2", "--with=site.clip=2"]
    assert gather(words) == (
        ["--set", "bank.slots=2"],
        ["what-if", "--with", "site.lr=1e-4", "--with=site.clip=2"],
    )
    assert gather(["what-if", "--with"]) == ([], ["what-if", "--with"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["replay", "--with", "site.lr=1"], "palisade replay is now palisade what-if"),
        (["guard", "replay", "x", "--json"], "palisade guard replay is now palisade guard recheck"),
        (["--json", "rollout", "approve", "0123", "--as=ann"], "--as is now --actor"),
        (["submit", "--render", "x"], "--render is now palisade manifests render DIR"),
    ],
)
def test_an_earlier_name_is_refused_with_the_present_one(words, expected, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {expected}\n"


def test_present_names_exist():
    assert {tuple(name.split()) for name in COMMANDS.values()} <= set(LEAVES)
    assert {tuple(name.split()) for name in COMMANDS}.isdisjoint(LEAVES)


def test_an_option_has_one_meaning_on_the_whole_command_line():
    texts = defaultdict(set)
    for command in LEAVES.values():
        for option in command.params:
            for flag in option.opts:
                if flag.startswith("--"):
                    texts[flag].add(option.help)
    assert {flag: found for flag, found in texts.items() if len(found) > 1} == {}
    assert {flag for flag, found in texts.items() if not all(found)} == set(), "every option is explained"


def test_an_option_is_declared_once():
    places = defaultdict(list)
    for path in sorted(JOBS.rglob("*.py")):
        for flag, line in declared(ast.parse(path.read_text())):
            places[flag].append(f"{path.relative_to(JOBS)}:{line}")
    assert {flag: found for flag, found in places.items() if len(found) > 1} == {}
    assert places["--site"] and places["--address"], "by its name and by its parameter"


def declared(tree):
    """Options as (flag, line); one without a name is named by its parameter."""
    named = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation:
            named |= {id(inner): node.arg for inner in ast.walk(node.annotation)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.Option":
            flags = [a.value for a in node.args if isinstance(a, ast.Constant) and str(a.value)[:2] == "--"]
            for flag in flags or [f"--{named[id(node)].replace('_', '-')}"]:
                yield flag, node.lineno


def test_an_option_that_is_declared_twice_is_seen():
    source = "def f(out: Annotated[str, typer.Option(help='x')]): ...\n"
    source += "OUT = typer.Option('--out', '-o', help='y')\n"
    assert [flag for flag, _ in declared(ast.parse(source))] == ["--out", "--out"]


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_help_is_plain(words, capsys):
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: palisade {' '.join(words)} ")
    assert str(LEAVES[words].help).split("\n\n")[0].endswith("."), "the first paragraph is a whole sentence"
