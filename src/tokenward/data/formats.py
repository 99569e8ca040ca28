"""The shapes a row may have, the columns each needs, and which of them a source has."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from tokenward.data.conversations import from_shared_beginning, is_transcript
from tokenward.data.fields import FieldError, Row, Unusable
from tokenward.data.parsers import (
    PAIR_SCORES,
    Parsed,
    parse_hh,
    parse_implicit,
    parse_nectar,
    parse_pairs,
    parse_ranked,
    parse_scored_pairs,
    parse_ultrafeedback,
)
from tokenward.errors import UserError

# What other data sets call these columns; only used to suggest data.columns, never to read.
_ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("instruction", "question", "query", "input", "problem", "context", "text"),
    "chosen": ("preferred", "accepted", "winner", "better", "positive", "chosen_response", "response_chosen"),
    "rejected": ("dispreferred", "loser", "worse", "negative", "rejected_response", "response_rejected"),
    "responses": ("completions", "answers", "candidates", "outputs", "generations", "replies"),
    "ranks": ("rank", "ranking", "order"),
    "scores": ("score", "rewards", "ratings", "rating"),
    "instruction": ("prompt", "question", "query", "input"),
    "completions": ("responses", "answers", "candidates", "outputs", "generations"),
    "answers": ("responses", "completions", "candidates", "outputs", "generations"),
}


class Format(NamedTuple):
    """A shape of rows.

    Attributes:
        name: What ``data.format`` calls it.
        needs: The columns it needs; ``a or b`` is satisfied by either.
        parse: Reads one row; raises FieldError for a malformed one and Unusable for one that teaches nothing.
        fits: Whether a first row that has the columns really is of this shape.
        options: Columns that are read where they are present.
    """

    name: str
    needs: tuple[str, ...]
    parse: Callable[[Row], Parsed]
    fits: Callable[[Row], bool]
    options: tuple[str, ...] = ()

    def missing(self, columns: Iterable[str]) -> list[str]:
        """The needed columns that are not among these."""
        present = set(columns)
        return [need for need in self.needs if present.isdisjoint(need.split(" or "))]


def _any_row(row: Row) -> bool:
    return True


def _conversations(row: Row) -> bool:
    return all(
        isinstance(row.get(side), Sequence) and not isinstance(row.get(side), str)
        for side in ("chosen", "rejected")
    )


def _transcripts(row: Row) -> bool:
    return is_transcript(row.get("chosen")) and is_transcript(row.get("rejected"))


def _begin_alike(row: Row) -> bool:
    """Two conversations, or two texts with a shared beginning and no other column that may be the prompt."""
    if _conversations(row):
        return min(len(row["chosen"]), len(row["rejected"])) > 1
    try:
        from_shared_beginning(row)
    except (FieldError, Unusable):  # not of this shape; detection goes on
        return False
    return _similar("prompt", [column for column in row if column not in ("chosen", "rejected")]) is None


_PAIR = ("prompt", "chosen", "rejected")

FORMATS: dict[str, Format] = {
    "hh": Format("hh", ("chosen", "rejected"), parse_hh, _transcripts, PAIR_SCORES),
    "ultrafeedback_binarized": Format(
        "ultrafeedback_binarized", _PAIR + PAIR_SCORES, parse_scored_pairs, _conversations
    ),
    "pairs": Format("pairs", _PAIR, parse_pairs, _any_row, PAIR_SCORES),
    "implicit": Format("implicit", ("chosen", "rejected"), parse_implicit, _begin_alike, PAIR_SCORES),
    "ranked": Format(
        "ranked", ("prompt", "responses", "ranks or scores"), parse_ranked, _any_row, ("spans",)
    ),
    "ultrafeedback": Format("ultrafeedback", ("instruction", "completions"), parse_ultrafeedback, _any_row),
    "nectar": Format("nectar", ("prompt", "answers"), parse_nectar, _any_row),
}

_NAMES = sorted(
    {name for f in FORMATS.values() for need in (*f.needs, *f.options) for name in need.split(" or ")}
)

# The formats worth naming as nearest, the commonest first; the others have the columns of pairs, or fewer.
_NEAREST = ("pairs", "ranked", "ultrafeedback", "nectar")

_REFUSED = (
    " · chosen and rejected alone are read when both begin with the same prompt and no column looks like it: "
    "set data.format: implicit to read them so"
)


def detect(columns: Sequence[str], first_row: Row) -> Format:
    """The format that a source has.

    Args:
        columns: Its column names.
        first_row: Its first row, which tells formats with the same columns apart.

    Raises:
        UserError: None fits; the message names the nearest and what it lacks.
    """
    for candidate in FORMATS.values():
        if not candidate.missing(columns) and candidate.fits(first_row):
            return candidate
    refused = any(not candidate.missing(columns) for candidate in FORMATS.values())
    lacking = [FORMATS[name] for name in _NEAREST if FORMATS[name].missing(columns)]
    nearest = min(lacking, key=lambda candidate: _distance(candidate, columns))
    raise UserError(_lacking("nearest format", nearest, columns) + (_REFUSED if refused else ""))


def find(name: str, columns: Sequence[str], first_row: Row) -> Format:
    """The format of this name, or for ``auto`` the one detected.

    Raises:
        UserError: There is no such format, or the source lacks one of its columns.
    """
    if name == "auto":
        return detect(columns, first_row)
    if name not in FORMATS:
        near = get_close_matches(name, FORMATS, n=1)
        advice = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"data.format: {name} is no format.{advice} There are: auto, {', '.join(FORMATS)}.")
    if FORMATS[name].missing(columns):
        raise UserError(_lacking("format", FORMATS[name], columns))
    return FORMATS[name]


def check_columns(columns: Mapping[str, str], present: Sequence[str]) -> None:
    """Check a renaming, tokenward's name to the source's, against the columns of the source.

    Raises:
        UserError: A name is none that any format reads, or a column is not there.
    """
    for name, column in columns.items():
        if name not in _NAMES:
            near = get_close_matches(name, _NAMES, n=1)
            advice = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                f"data.columns.{name}: no format reads {name}.{advice} Names are: {', '.join(_NAMES)}."
            )
        if column not in present:
            near = get_close_matches(column, present, n=1)
            advice = f" Did you mean {near[0]}?" if near else ""
            found = f"columns found: {', '.join(present)}"
            raise UserError(f"data.columns.{name}: there is no column {column}.{advice} {found}")


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under tokenward's names; two columns may change places."""
    if not columns:
        return row
    taken = {*columns, *columns.values()}
    rest = {name: value for name, value in row.items() if name not in taken}
    return rest | {name: row[column] for name, column in columns.items() if column in row}


def _lacking(introduction: str, wanted: Format, columns: Sequence[str]) -> str:
    found = ", ".join(columns) or "none"
    missing = ", ".join(need + _suggestion(need, wanted, columns) for need in wanted.missing(columns))
    needs = ", ".join(wanted.needs)
    return f"columns found: {found} · {introduction}: {wanted.name} ({needs}), missing: {missing}"


def _distance(wanted: Format, columns: Sequence[str]) -> float:
    """The share of its columns that is missing; one that may be there under another name counts half."""
    missing = wanted.missing(columns)
    return sum(0.5 if _suggestion(need, wanted, columns) else 1.0 for need in missing) / len(wanted.needs)


def _suggestion(need: str, wanted: Format, columns: Sequence[str]) -> str:
    """What may be the missing column under another name, and how to say so; empty if nothing may."""
    free = [column for column in columns if column not in wanted.needs]
    for name in need.split(" or "):
        near = _similar(name, free)
        if near is not None:
            return f" (did you mean {near}? set data.columns.{name}: {near})"
    return ""


def _similar(name: str, columns: Sequence[str]) -> str | None:
    """The column that is likely to hold what tokenward calls ``name``."""
    aliases = [column for column in columns if column.lower() in (name, *_ALIASES.get(name, ()))]
    return next(iter(aliases or get_close_matches(name, columns, n=1)), None)
