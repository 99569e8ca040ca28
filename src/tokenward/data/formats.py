"""The shapes a row may have, the columns each needs, and which of them a source has."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from tokenward.data.conversations import from_shared_beginning, is_transcript
from tokenward.data.fields import FieldError, Row, Unusable
from tokenward.data.messages import ASSISTANTS
from tokenward.data.parsers import (
    PAIR_SCORES,
    Parsed,
    parse_alpaca,
    parse_hh,
    parse_implicit,
    parse_nectar,
    parse_openai,
    parse_pairs,
    parse_ranked,
    parse_safe_rlhf,
    parse_scored_pairs,
    parse_sharegpt,
    parse_shp,
    parse_swift,
    parse_ultrafeedback,
    parse_unpaired,
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
    "completion": ("response", "answer", "output", "reply", "generation"),
    "label": ("desirable", "is_good", "good", "liked", "thumbs_up", "feedback"),
    "conversations": ("conversation", "messages", "history", "dialog", "dialogue"),
    "system": ("system_prompt", "system_message", "sys"),
}

ROW_WIDE = ("system", "tools")
"""Columns that are read beside any shape."""


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

    @property
    def reads(self) -> frozenset[str]:
        """Every column that is read where it is there."""
        needed = [name for need in self.needs for name in need.split(" or ")]
        return frozenset((*needed, *self.options, *ROW_WIDE))


def _any_row(row: Row) -> bool:
    return True


def _conversations(row: Row) -> bool:
    return all(
        isinstance(side, Sequence)
        and not isinstance(side, str)
        and isinstance(next(iter(side), None), Mapping)
        for side in (row.get("chosen"), row.get("rejected"))
    )


def _transcripts(row: Row) -> bool:
    return is_transcript(row.get("chosen")) and is_transcript(row.get("rejected"))


def _begin_alike(row: Row) -> bool:
    """Two conversations, or two texts with a shared beginning and no other column that may be the prompt."""
    if _conversations(row):
        return min(len(row["chosen"]), len(row["rejected"])) > 1
    return (
        _share(row)
        and _similar("prompt", [column for column in row if column not in ("chosen", "rejected")]) is None
    )


def _share(row: Row) -> bool:
    """Whether chosen and rejected begin with the same prompt."""
    try:
        from_shared_beginning(row)
    except (FieldError, Unusable):  # not of this shape; detection goes on
        return False
    return True


def _goes_on(row: Row) -> bool:
    """Two replies to a conversation, and not two whole conversations."""
    return all(_first_said(row.get(side)) in ASSISTANTS for side in ("chosen", "rejected"))


def _first_said(side: object) -> str:
    if isinstance(side, str):
        return "assistant"
    first = next(iter(side), None) if isinstance(side, Sequence) else side
    return str(first.get("role", first.get("from"))) if isinstance(first, Mapping) else ""


def _text_instruction(row: Row) -> bool:
    return isinstance(row.get("instruction"), str)


def _object_input(row: Row) -> bool:
    return isinstance(row.get("input"), Mapping)


_PAIR = ("prompt", "chosen", "rejected")

FORMATS: dict[str, Format] = {
    "hh": Format("hh", ("chosen", "rejected"), parse_hh, _transcripts, PAIR_SCORES),
    "ultrafeedback_binarized": Format(
        "ultrafeedback_binarized", _PAIR + PAIR_SCORES, parse_scored_pairs, _conversations
    ),
    "pairs": Format("pairs", _PAIR, parse_pairs, _any_row, PAIR_SCORES),
    "sharegpt": Format(
        "sharegpt", ("conversations", "chosen", "rejected"), parse_sharegpt, _goes_on, PAIR_SCORES
    ),
    "implicit": Format("implicit", ("chosen", "rejected"), parse_implicit, _begin_alike, PAIR_SCORES),
    "ranked": Format(
        "ranked", ("prompt", "responses", "ranks or scores"), parse_ranked, _any_row, ("spans",)
    ),
    "ultrafeedback": Format("ultrafeedback", ("instruction", "completions"), parse_ultrafeedback, _any_row),
    "nectar": Format("nectar", ("prompt", "answers"), parse_nectar, _any_row),
    "alpaca": Format(
        "alpaca",
        ("instruction", "chosen", "rejected"),
        parse_alpaca,
        _text_instruction,
        ("input", *PAIR_SCORES),
    ),
    "swift": Format("swift", ("messages", "rejected_response or rejected_messages"), parse_swift, _any_row),
    "openai": Format(
        "openai", ("input", "preferred_output", "non_preferred_output"), parse_openai, _object_input
    ),
    "safe_rlhf": Format(
        "safe_rlhf", ("prompt", "response_0", "response_1", "better_response_id"), parse_safe_rlhf, _any_row
    ),
    "shp": Format(
        "shp",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        parse_shp,
        _any_row,
        ("score_A", "score_B"),
    ),
    "unpaired": Format("unpaired", ("prompt", "completion", "label"), parse_unpaired, _any_row),
}

_NAMES = sorted(
    {
        name
        for f in FORMATS.values()
        for need in (*f.needs, *f.options, *ROW_WIDE)
        for name in need.split(" or ")
    }
)

# The formats worth naming as nearest, the commonest first; the others have the columns of pairs, or fewer.
_NEAREST = (
    "pairs",
    "ranked",
    "ultrafeedback",
    "nectar",
    "sharegpt",
    "unpaired",
    "safe_rlhf",
    "openai",
    "shp",
)

_STEPWISE = (
    "these are stepwise rows, a label for each step of one answer, and no format reads steps. Write one row an answer: its steps "
    'joined as completion, and label true where every step is right, {"prompt": ..., "completion": ..., "label": true}'
)

_BEGIN_ALIKE = (
    " · chosen and rejected begin alike: set data.format: implicit to take what they begin with as the prompt"
)
_BEGIN_OTHERWISE = (
    " · chosen and rejected alone are read where both begin with their prompt, and here they do not"
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
    if {"prompt", "completions", "labels"} <= set(columns):
        raise UserError(f"columns found: {', '.join(columns)} · {_STEPWISE}.")
    alone = not FORMATS["implicit"].missing(columns)
    about = (_BEGIN_ALIKE if _share(first_row) else _BEGIN_OTHERWISE) if alone else ""
    lacking = [FORMATS[name] for name in _NEAREST if FORMATS[name].missing(columns)]
    nearest = min(lacking, key=lambda candidate: _distance(candidate, columns))
    raise UserError(_lacking("nearest format", nearest, columns) + about)


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


def usual_columns(columns: Mapping[str, str], present: Sequence[str]) -> dict[str, str]:
    """A renaming without the one that takes Alpaca's instruction for the whole prompt although there is an input."""
    alpaca = columns.get("prompt") == "instruction" and "input" in present and "prompt" not in present
    return {name: column for name, column in columns.items() if not (alpaca and name == "prompt")}


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
