"""Where a recipe may write: below the current folder. Only its user may name another place, with ``--set``."""

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from tokenward.config.lines import Lines
from tokenward.config.problems import Problem, show

_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
LONGEST = 100
"""Characters of the longest name of a folder: stages add names of their own to it, and most systems take 255 bytes."""


def wrong_places(values: dict[str, Any], lines: Lines) -> Iterator[Problem]:
    """What is wrong with the folders that a recipe writes to: ``run``, and ``logging_dir`` of each training."""
    for key, place in _places(values, ""):
        if isinstance(place, str) and (problem := _problem(place, given=lines.origin(key) == "--set")):
            yield Problem(key, f"{key} is {show(place)}: {problem}", "unusable-place")


def _places(values: dict[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            yield from _places(value, f"{name}.")
        elif name == "run" or name.endswith("training.logging_dir"):
            yield name, value


def _problem(place: str, *, given: bool) -> str:
    """What is wrong with a place; ``given`` by the user's own words."""
    parts = PureWindowsPath(place).parts
    found = next(filter(None, map(_wrong_name, parts)), "")
    return found if found or given else _elsewhere(place, parts)


def _wrong_name(part: str) -> str:
    if _CONTROL.search(part):
        return "a name has no control characters. Write letters, digits, hyphens and dots."
    if max(len(part), len(part.encode("utf-8", "replace")) / 2) > LONGEST:
        return f"the name {part[:20]!r}... has {len(part)} characters, and {LONGEST} are allowed. Write a shorter one."
    if _RESERVED.fullmatch(part):
        return f"{part!r} is a name of a device on Windows, so the folder could not be copied there. Write another one."
    if part not in (".", "..") and part != part.rstrip(". "):
        return f"the name {part!r} ends with a dot or a space, which Windows cannot have. Write another one."
    return ""


def _elsewhere(place: str, parts: Sequence[str]) -> str:
    absolute = (
        PurePosixPath(place).is_absolute() or PureWindowsPath(place).drive or place.startswith(("~", "\\"))
    )
    if absolute or ".." in parts:
        return (
            "a recipe writes only below the current folder, and this is elsewhere. Write a place such as runs/NAME, or give this one "
            "with --set, as your own words."
        )
    if not parts or any(part.startswith(".") for part in parts if part != ".") or set(parts) == {"."}:
        return "this is the current folder itself, or a hidden one. Write a place such as runs/NAME."
    return ""
