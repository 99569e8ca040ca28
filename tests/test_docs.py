"""What the documentation says can be run and read: its commands and its recipes."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from tokenward import cli
from tokenward.config import load_recipe, parse_recipe, resolved

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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
    # Every table that the page writes arrives as written there, none as a default.
    assert tables
    assert tables <= written


@pytest.mark.parametrize(("page", "text"), blocks("bash"))
def test_commands_in_the_documentation_exist(page: str, text: str) -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), line
        if words[:1] != ["tokenward"]:
            continue
        command = commands[words[1]]
        command.make_context(words[1], words[2:])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid_down_to_their_objects(path: Path) -> None:
    from tokenward.stages.lists import check_recipe

    check_recipe(load_recipe(path))


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_papers_page_names_tests_that_exist() -> None:
    for path in re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs" / "papers.md").read_text()):
        assert (ROOT / path).is_file(), path
