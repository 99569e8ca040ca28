"""docs/api.md has every public name exactly once, and every public object documents its arguments."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import tokenward
from scripts.api_page import with_tables

PAGE = Path(__file__).parent.parent.parent / "docs" / "api.md"
DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|module):: tokenward\.(\w+)$", flags=re.MULTILINE)
PUBLIC = {name: getattr(tokenward, name) for name in tokenward.__all__}
OBJECTS = {name: found for name, found in PUBLIC.items() if not inspect.ismodule(found)}
ELSEWHERE = {
    "tokenward.evaluation.credit.credit_figures",
    "tokenward.evaluation.credit.known_response",
    "tokenward.evaluation.credit.stability_figures",
    "tokenward.sampling.sources.call_source",
    "tokenward.tokens.spans.ByteSpan",
    "tokenward.tools.compare_models.compare_models",
}
"""Names of tools that the pages on credit, sources and evaluation describe."""
LOSSES = {name: getattr(tokenward.losses, name) for name in tokenward.losses.__all__ if name != "Pair"}


def test_every_public_name_is_on_the_page_once_and_no_other() -> None:
    assert sorted(DIRECTIVE.findall(PAGE.read_text())) == sorted(tokenward.__all__)


def test_the_tables_say_what_the_docstrings_say() -> None:
    """After a docstring was changed: ``python -m scripts.api_page``."""
    assert with_tables(PAGE.read_text()) == PAGE.read_text()


def test_names_that_other_pages_import_are_on_the_page() -> None:
    """A name that an example imports from a submodule is public, too."""
    pages = [page.read_text() for page in PAGE.parent.glob("*.md")]
    imported = {
        f"{module}.{name}"
        for page in pages
        for module, names in re.findall(r"^from (tokenward\.[\w.]+) import (.+)$", page, flags=re.MULTILINE)
        for name in names.split(", ")
    }
    missing = {name for name in imported if f":: {name}\n" not in PAGE.read_text()}
    assert missing <= ELSEWHERE


def arguments(found: Any) -> list[str]:
    if inspect.isclass(found) and issubclass(found, tuple | dict):
        return list(found.__annotations__)
    if getattr(found, "_is_protocol", False):
        return []
    if found is tokenward.TokenTrainingArguments:  # the others are documented by transformers
        return list(found.__annotations__)
    given = inspect.signature(found).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [item.name for item in given if item.kind not in several and not item.name.startswith("_")]


@pytest.mark.parametrize(
    ("name", "found", "shared"),
    [(name, found, "") for name, found in OBJECTS.items()]
    + [(name, found, tokenward.losses.__doc__) for name, found in LOSSES.items()],
)
def test_every_argument_is_documented(name: str, found: Any, shared: str) -> None:
    text = inspect.getdoc(found)
    assert text, name
    text += shared
    assert not [item for item in arguments(found) if not re.search(rf"(?<!\w){item}(?!\w)", text)]
