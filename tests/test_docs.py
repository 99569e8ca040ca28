"""The documentation agrees with the code: its commands, recipes, links, names and paths exist."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

import tokenward
from tokenward import cli
from tokenward.config import load_recipe, parse_recipe, resolved
from tokenward.config.schema import Recipe, table_of
from tokenward.tokens.split import Note
from tokenward.training.arguments import TokenTrainingArguments

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
VARIABLES = {"tokens.segment", "report.save", "auxiliary_models.NAME.subset"}
"""Names that look like modules or keys, and are not."""


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL):
            found.append((page.name, text))
    return found


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_recipes_in_the_documentation_are_valid(page: str, text: str) -> None:
    loaded = parse_recipe(text, page)
    tables = {line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()}
    written = {key.partition(".")[0] for key, _, origin in resolved(loaded) if origin.startswith(page)}
    assert tables
    assert tables <= written, "every table of the page is read, not ignored"


@pytest.mark.parametrize(("page", "text"), blocks("bash"))
def test_commands_in_the_documentation_exist(page: str, text: str) -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
        if words[:1] == ["tokenward"]:
            commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid_down_to_their_objects(path: Path) -> None:
    from tokenward.stages.lists import check_recipe

    check_recipe(load_recipe(path))


def is_code(name: str) -> bool:
    """Whether ``scoring.basic.LogRatio`` and the like is a module, a class, a function or an attribute."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        try:
            found: Any = importlib.import_module(".".join(["tokenward", *parts[:end]]))
        except ImportError:
            continue
        for part in parts[end:]:
            if part in getattr(found, "__annotations__", {}):
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def is_key(name: str) -> bool:
    """Whether ``tokens.processes`` and the like is a key of a recipe."""
    table: Any = Recipe
    *parts, last = name.split(".")
    for part in parts:
        if part == "training":
            return last in TokenTrainingArguments.__dataclass_fields__
        if table is None or part not in table.model_fields:
            return False
        table = table_of(table.model_fields[part])
    return table is None or last in table.model_fields


STARTS = "|".join([*Recipe.model_fields, *(path.stem for path in (ROOT / "src" / "tokenward").iterdir())])


def unknown_names(text: str) -> list[str]:
    names = {*re.findall(rf"`((?:{STARTS})(?:\.\w+)+)(?:\(.*?\))?`", text)} - VARIABLES
    modules = re.findall(r"\btokenward\.([a-zA-Z_.]*\w)", text)
    paths = re.findall(r"`((?:tests|src|scripts|recipes|studies|benchmarks|docs)/[\w./-]+)`", text)
    commands = re.findall(r"python -m ((?:benchmarks|studies|scripts|tests)[\w.]*)", text)
    files = [ROOT / command.replace(".", "/") for command in commands]
    return [
        *(name for name in names if not is_code(name) and not is_key(name)),
        *(name for name in modules if not is_code(name)),
        *(path for path in paths if not (ROOT / path).exists()),
        *(str(path) for path in files if not path.is_dir() and not path.with_suffix(".py").exists()),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_paths_and_links_exist(page: Path) -> None:
    text = page.read_text()
    assert unknown_names(text) == []
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_a_wrong_name_is_found() -> None:
    text = "`scoring.nothing.X`, `tokens.nothing`, `tokenward.nothing`, `tests/nothing.py`, python -m studies.nothing"
    assert len(unknown_names(text)) == 5


def test_the_package_has_all_its_names() -> None:
    assert all(hasattr(tokenward, name) for name in tokenward.__all__)


def test_the_notes_on_rows_are_those_of_the_code() -> None:
    written = re.findall(
        r"^\| `((?:note|dropped): .*?)(?:, \.\.\.)?` \|", (ROOT / "docs" / "tokens.md").read_text(), re.M
    )
    code = "".join(path.read_text() for path in (ROOT / "src" / "tokenward" / "tokens").glob("*.py"))
    assert len(written) > len(Note) // 2
    for note in written:
        assert note.partition(",")[0] in code, note
