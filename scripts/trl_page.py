"""Writes the table of TRL's settings in ``docs/trl.md`` from the one that the errors read."""

import re
from pathlib import Path

from tokenward.trl_names import TABLE, Ours

PAGE = Path(__file__).parent.parent / "docs" / "trl.md"
TABLE_ON_PAGE = re.compile(
    r"^\| in TRL \| in a recipe \| in a script \|\n(?:\|[^\n]*\n)+", flags=re.MULTILINE
)


def cell(ours: Ours, wanted: str) -> str:
    """What to write, or why there is nothing."""
    if not wanted:
        return ours.without
    code = f"`{wanted}`" if "{" in wanted or "=" in wanted else wanted
    return f"{code}: {ours.note}" if ours.note and wanted == (ours.recipe or ours.script) else code


def table() -> str:
    """The table in Markdown."""
    rows = ""
    for ours in TABLE:
        names = ", ".join(f"`{name}`" for name in ours.names)
        script = cell(ours, ours.script) if ours.recipe or ours.script else "the same"
        rows += f"| {names} | {cell(ours, ours.recipe)} | {script} |\n"
    return "| in TRL | in a recipe | in a script |\n|---|---|---|\n" + rows


def with_table(page: str) -> str:
    """The page with the table made anew."""
    return TABLE_ON_PAGE.sub(lambda _: table(), page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
