"""What README.md and the heads of the recipes tell people to type exists; nothing is run."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer

from rpgcli.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
RECIPES = {path.stem: path.read_text() for path in sorted((ROOT / "recipes").glob("*.yaml"))}
DEFINED = re.compile(r"^def (test_\w+)", re.MULTILINE)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
"""Language and text of each code block."""


def typed(text: str) -> list[list[str]]:
    """The commands of a few lines: words of each, without comments. Among output, only lines after a prompt count."""
    prompt = r"(?:\$ |next: )" + ("" if re.search(r"^\$ ", text, re.MULTILINE) else "?")
    lines = re.findall(rf"^{prompt}((?:rpg|make)(?: .*)?)$", text, re.MULTILINE)
    parts = [part for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts]


HEADS = [text.splitlines()[0].removeprefix("# ") for text in RECIPES.values()]
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL))
COMMANDS = [words for text in (*(text for _, text in BLOCKS), *SPANS, *HEADS) for words in typed(text)]


def ids(words: list[str]) -> str:
    return " ".join(words)


def expanded(text: str) -> str:
    """A line of the Makefile with its lists of targets in place."""
    lists = dict(re.findall(r"^(\w+) *:= *((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE))
    return re.sub(r"\$\((\w+)\)", lambda name: lists.get(name[1], "").replace("\\\n", " "), text)


@pytest.mark.parametrize("words", [c for c in COMMANDS if c[0] == "make"], ids=ids)
def test_make_target_exists(words):
    lines = re.findall(r"^([a-z$][\w $()-]*):(?!=)", MAKEFILE, re.MULTILINE)
    targets = {name for line in lines for name in expanded(line).split()}
    variables = set(re.findall(r"^(\w+) *[?:]=", MAKEFILE, re.MULTILINE))
    for word in (word for word in words[1:] if not word.startswith("-")):
        assert word.partition("=")[0] in (variables if "=" in word else targets)


@pytest.mark.parametrize("words", [c for c in COMMANDS if c[0] == "rpg"], ids=ids)
def test_rpg_command_parses(words):
    """Names and values of all options, without running the command."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    if len(words) > 1:
        commands[words[1]].make_context(words[1], words[2:])


def test_commands_are_found_and_a_wrong_one_would_be_noticed():
    assert {c[0] for c in COMMANDS} == {"make", "rpg"} and len(COMMANDS) > 10
    assert typed("x rpg a\nrpg b --c 'd e'  # f\nmake g && rpg h\n") == [
        ["rpg", "b", "--c", "d e"], ["make", "g"], ["rpg", "h"],
    ]  # fmt: skip
    assert typed("$ rpg a\nrpg is output\nnext: rpg b") == [["rpg", "a"], ["rpg", "b"]]
    for wrong in (["rpg", "collect", "--resum"], ["rpg", "generate", "--count", "none"]):
        with pytest.raises(typer.BadParameter.__base__):  # type: ignore[arg-type]
            test_rpg_command_parses(wrong)
    with pytest.raises(AssertionError):
        test_make_target_exists(["make", "dmeo"])


def test_table_of_recipes_names_every_recipe():
    table = README.partition("| recipe |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == sorted(RECIPES)


def test_python_of_the_readme_is_python():
    snippets = [text for language, text in BLOCKS if language == "python"]
    assert snippets
    for snippet in snippets:
        ast.parse(snippet)


def test_every_phony_target_has_a_rule():
    phony = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert phony
    for target in expanded(" ".join(phony)).split():
        test_make_target_exists(["make", target])


def test_every_test_that_is_named_exists():
    named = {span for span in SPANS if span.startswith("test_")}
    found = {name for path in Path(__file__).parent.rglob("test_*.py") for name in DEFINED.findall(path.read_text())}
    assert named and named <= found, named - found
