"""Write all results into docs/performance.md, between its markers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, holds

PAGE = FOLDER.parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTHING = "Nothing has been measured yet: `make bench` writes this table."
HEADER = ["claim", "target", "measured", "95 % interval", "predicted", "met"]


def main() -> None:
    """Write the tables into the page."""
    PAGE.write_text(between(PAGE.read_text(), rendered(read(FOLDER))))
    print(f"{PAGE.name}: {len(read(FOLDER))} results")


def read(folder: Path) -> list[dict[str, Any]]:
    """Results in the order of their names. Trials belong in another folder and are refused."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    trials = [item["claim"] for item in found if item["quick"]]
    if trials:
        raise ValueError(f"trials cannot be in the table: {', '.join(trials)}")
    return found


def between(page: str, content: str) -> str:
    """The page with new content between its markers."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs the lines {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{content}\n\n{END}{tail}"


def rendered(results: Sequence[dict[str, Any]]) -> str:
    """Table of all results, the machines and versions, and a profile of a step."""
    if not results:
        return NOTHING
    parts = [table(HEADER, [row(item) for item in results]), provenance(results)]
    profiles = {item["claim"]: item["ours"]["profile"]["shares"] for item in results if has_profile(item)}
    if profiles:
        names = list(next(iter(profiles.values())))
        rows = [[name, *(f"{100 * found[name]:.1f} %" for found in profiles.values())] for name in names]
        parts.append(
            "Where the time of a step goes, by kind of operation:\n\n" + table(["", *profiles], rows)
        )
    return "\n\n".join(parts)


def has_profile(item: dict[str, Any]) -> bool:
    """Whether a result holds a profile."""
    return isinstance(item["ours"], dict) and "profile" in item["ours"]


def row(item: dict[str, Any]) -> list[str]:
    """Table row of a result. Counted numbers have no interval."""
    timed = item["low"] != item["high"]
    predicted = item["predicted"]
    met = "" if item["target"] == "reported" else "yes" if holds(item["target"], item["ratio"]) else "**no**"
    return [
        f"`{item['claim']}`",
        item["target"],
        f"{item['ratio']:.3g}",
        f"{item['low']:.3g} to {item['high']:.3g}" if timed else "",
        "" if predicted is None else f"{predicted:.3g}",
        met,
    ]


def provenance(results: Sequence[dict[str, Any]]) -> str:
    """Machines, versions and commands, without repetitions."""
    machines = sorted(
        {
            f"{item['machine']['processor']}, {item['machine']['cores']} cores "
            f"({', '.join(item['machine']['instructions'])}), {item['machine']['memory_gib']} GiB"
            for item in results
        }
    )
    versions = sorted(
        {", ".join(f"{name} {number}" for name, number in item["versions"].items()) for item in results}
    )
    commands = sorted({f"`{item['command']}`" for item in results})
    return "\n".join(
        [
            f"- Machine: {'; '.join(machines)}.",
            f"- Versions: {'; '.join(versions)}.",
            f"- Commands: {', '.join(commands)}.",
        ]
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
