"""Writes the tables of ``docs/api.md``: the first paragraph of each docstring, above the directives for the same names."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
BLOCK = re.compile(
    r"(?:^\| name \| \|\n(?:\|[^\n]*\n)+\n)?(?P<block>^```\{eval-rst\}\n.*?^```$)",
    flags=re.MULTILINE | re.DOTALL,
)
DIRECTIVE = re.compile(
    r"^\.\. auto\w+:: (?P<name>[\w.]+)\n(?:   :members: (?P<members>.+)$)?", flags=re.MULTILINE
)


def found(name: str) -> Any:
    """The object or module of a dotted name."""
    module, _, last = name.rpartition(".")
    owner = importlib.import_module(module)
    return getattr(owner, last) if hasattr(owner, last) else importlib.import_module(name)


def summary(thing: Any) -> str:
    """The first paragraph of a docstring as a cell of a Markdown table."""
    text = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())
    text = re.sub(r":\w+:`~?\.?([\w.]+)`", lambda match: f"`{match[1].split('.')[-1]}`", text)
    return text.replace("``", "`").replace("|", "\\|")


def entries(block: str) -> Iterator[tuple[str, str]]:
    """The names of a block of directives, and of the members that it lists, with their summaries."""
    for match in DIRECTIVE.finditer(block):
        thing, short = found(match["name"]), match["name"].removeprefix("tokenward.")
        yield short, summary(thing)
        listed = match["members"].split(", ") if match["members"] else []
        if inspect.ismodule(thing):
            listed = [name for name in thing.__all__ if callable(getattr(thing, name)) and name != "Pair"]
        for member in listed:
            if not member.startswith("_"):
                yield f"{short}.{member}", summary(getattr(thing, member))


def with_tables(page: str) -> str:
    """The page with the table of each block of directives made anew."""

    def table(match: re.Match[str]) -> str:
        rows = "".join(f"| `{name}` | {text} |\n" for name, text in entries(match["block"]))
        return f"| name | |\n|---|---|\n{rows}\n{match['block']}"

    return BLOCK.sub(table, page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
