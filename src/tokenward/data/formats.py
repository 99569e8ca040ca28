"""The row formats, the columns that each needs, and detection of the format of a source."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from tokenward.data import parsers
from tokenward.data.conversations import from_shared_beginning, is_transcript
from tokenward.data.fields import FieldError, Row, Unusable, unknown_name
from tokenward.data.messages import ASSISTANTS
from tokenward.data.parsers import PAIR_SCORES, Parsed
from tokenward.errors import UserError

# Names of these columns in other data sets. They are only suggested in errors, never read.
_ALIASES: dict[str, tuple[str, ...]] = {
    "prompt": ("instruction", "question", "query", "input", "problem", "context", "text"),
    "chosen": (
        "preferred",
        "accepted",
        "winner",
        "better",
        "positive",
        "good",
        "chosen_response",
        "response_chosen",
    ),
    "rejected": (
        "dispreferred",
        "loser",
        "worse",
        "negative",
        "bad",
        "rejected_response",
        "response_rejected",
    ),
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
"""Columns that are read in addition to those of any format."""


def _fits_any(row: Row) -> bool:
    return True


class Format(NamedTuple):
    """A row format."""

    name: str  # its name in the recipe
    needs: tuple[str, ...]  # the columns it needs. a or b is satisfied by either
    # Reads one row. It raises FieldError for a malformed row and Unusable for one without information.
    parse: Callable[[Row], Parsed]
    fits: Callable[[Row], bool] = _fits_any  # whether a first row that has the columns really has this format
    options: tuple[str, ...] = ()  # optional columns

    def missing(self, columns: Iterable[str]) -> list[str]:
        """The needed columns that are not among these."""
        present = set(columns)
        return [need for need in self.needs if present.isdisjoint(need.split(" or "))]

    @property
    def reads(self) -> frozenset[str]:
        """Every column that is read if it is present."""
        needed = [name for need in self.needs for name in need.split(" or ")]
        return frozenset((*needed, *self.options, *ROW_WIDE))


def _has_conversations(row: Row) -> bool:
    sides = (row.get("chosen"), row.get("rejected"))
    return all(
        isinstance(side, Sequence)
        and not isinstance(side, str)
        and isinstance(next(iter(side), None), Mapping)
        for side in sides
    )


def _has_transcripts(row: Row) -> bool:
    return is_transcript(row.get("chosen")) and is_transcript(row.get("rejected"))


def _has_implicit_prompt(row: Row) -> bool:
    """Two conversations, or two texts with a common beginning and no other column that could be the prompt."""
    if _has_conversations(row):
        return min(len(row["chosen"]), len(row["rejected"])) > 1
    others = [column for column in row if column not in ("chosen", "rejected")]
    return _share_beginning(row) and _similar("prompt", others) is None


def _share_beginning(row: Row) -> bool:
    try:
        from_shared_beginning(row)
    except (FieldError, Unusable):  # not this format; detection goes on
        return False
    return True


def _has_continuations(row: Row) -> bool:
    """Both sides are replies to a conversation rather than whole conversations."""
    return all(_first_speaker(row.get(side)) in ASSISTANTS for side in ("chosen", "rejected"))


def _first_speaker(side: object) -> str:
    if isinstance(side, str):
        return "assistant"
    first = next(iter(side), None) if isinstance(side, Sequence) else side
    return str(first.get("role", first.get("from"))) if isinstance(first, Mapping) else ""


def _has_text_instruction(row: Row) -> bool:
    return isinstance(row.get("instruction"), str)


def _has_object_input(row: Row) -> bool:
    return isinstance(row.get("input"), Mapping)


_PAIR = ("prompt", "chosen", "rejected")

# The first format that fits is used, so formats with more specific columns or rows come first.
# fmt: off
FORMATS: dict[str, Format] = {shape.name: shape for shape in (
    Format("hh", ("chosen", "rejected"), parsers.parse_hh, _has_transcripts, PAIR_SCORES),
    Format("ultrafeedback_binarized", _PAIR + PAIR_SCORES, parsers.parse_scored_pairs, _has_conversations),
    Format("pairs", _PAIR, parsers.parse_pairs, options=PAIR_SCORES),
    Format("sharegpt", ("conversations", "chosen", "rejected"), parsers.parse_sharegpt, _has_continuations, PAIR_SCORES),
    Format("implicit", ("chosen", "rejected"), parsers.parse_implicit, _has_implicit_prompt, PAIR_SCORES),
    Format("ranked", ("prompt", "responses", "ranks or scores"), parsers.parse_ranked, options=("spans",)),
    Format("ultrafeedback", ("instruction", "completions"), parsers.parse_ultrafeedback),
    Format("nectar", ("prompt", "answers"), parsers.parse_nectar),
    Format("alpaca", ("instruction", "chosen", "rejected"), parsers.parse_alpaca, _has_text_instruction, ("input", *PAIR_SCORES)),
    Format("swift", ("messages", "rejected_response or rejected_messages"), parsers.parse_swift),
    Format("openai", ("input", "preferred_output", "non_preferred_output"), parsers.parse_openai, _has_object_input),
    Format("safe_rlhf", ("prompt", "response_0", "response_1", "better_response_id"), parsers.parse_safe_rlhf),
    Format("shp", ("history", "human_ref_A", "human_ref_B", "labels"), parsers.parse_shp, options=("score_A", "score_B")),
    Format("unpaired", ("prompt", "completion", "label"), parsers.parse_unpaired),
)}
# fmt: on

_NAMES = sorted(frozenset().union(*(shape.reads for shape in FORMATS.values())))

# Formats that are worth naming as the nearest, the most common first. The others have the columns of pairs, or fewer.
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
    "these are stepwise rows, with a label for each step of an answer, and steps cannot be read. Write one row per "
    "answer, with its steps joined as completion, and label true if every step is correct: "
    '{"prompt": ..., "completion": ..., "label": true}'
)


def has_format(row: Row) -> bool:
    """Whether a row has the columns of some format."""
    return any(not known.missing(row) and known.fits(row) for known in FORMATS.values())


IN_RECIPE, IN_MEMORY = "set columns.{name}: {column}", "rename it to {name}"
"""What to do about a column with another name, in a recipe and for rows in memory."""


def detect(columns: Sequence[str], first_row: Row, rename: str = IN_RECIPE) -> Format:
    """The format of a source, given its columns and its first row.

    Args:
        columns: Names of the columns.
        first_row: The first row.
        rename: What to do about a column with another name.

    Raises:
        UserError: No format fits. The message names the nearest one and the columns that are missing.
    """
    for candidate in FORMATS.values():
        if not candidate.missing(columns) and candidate.fits(first_row):
            return candidate
    if {"prompt", "completions", "labels"} <= set(columns):
        raise UserError(
            f"columns found: {', '.join(columns)} · {_STEPWISE}.", code="unknown-format", key="data.format"
        )
    about = ""
    if not FORMATS["implicit"].missing(columns):
        about = (
            " · chosen and rejected have a common beginning: format implicit takes it as the prompt"
            if _share_beginning(first_row)
            else " · chosen and rejected alone can be read if both begin with the prompt, but here they do not"
        )
    lacking = [FORMATS[name] for name in _NEAREST if FORMATS[name].missing(columns)]
    nearest = min(lacking, key=lambda candidate: _distance(candidate, columns))
    if nearest.reads & set(columns) <= {"prompt", *ROW_WIDE} and _distance(nearest, columns) == 0.5:
        nearest = FORMATS[
            "pairs"
        ]  # prompt alone is half of the columns of some formats, which says nothing about them
        about = " · only ReinforceTrainer, evaluate (with prompts=N) and online runs take prompts alone"
    raise _missing_columns("nearest format", nearest, columns, about, rename)


def find(name: str, columns: Sequence[str], first_row: Row, rename: str = IN_RECIPE) -> Format:
    """The format with this name, or the detected format for ``auto``; arguments as of :func:`detect`.

    Raises:
        UserError: There is no such format, or the source does not have one of its columns.
    """
    if name == "auto":
        return detect(columns, first_row, rename)
    if name not in FORMATS:
        raise unknown_name(name, "a format", ("auto", *FORMATS), key="data.format")
    if FORMATS[name].missing(columns):
        raise _missing_columns("format", FORMATS[name], columns, "", rename)
    return FORMATS[name]


def check_columns(columns: Mapping[str, str], present: Sequence[str]) -> None:
    """Checks a mapping from tokenward's column names to those of the source.

    Raises:
        UserError: No format reads a name, or the source does not have a column.
    """
    for name, column in columns.items():
        key = f"data.columns.{name}"
        if name not in _NAMES:
            raise unknown_name(name, "a column of any format", _NAMES, key=key)
        if column not in present:
            raise unknown_name(column, "a column of the data", present, key=key, code="missing-column")


def usual_columns(columns: Mapping[str, str], present: Sequence[str]) -> dict[str, str]:
    """The mapping without ``prompt: instruction`` if there is an ``input``: Alpaca's prompt consists of both."""
    alpaca = columns.get("prompt") == "instruction" and "input" in present and "prompt" not in present
    return {name: column for name, column in columns.items() if not (alpaca and name == "prompt")}


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under tokenward's names. Two columns may swap names."""
    if not columns:
        return row
    used = {*columns, *columns.values()}
    rest = {name: value for name, value in row.items() if name not in used}
    return rest | {name: row[column] for name, column in columns.items() if column in row}


def _missing_columns(
    introduction: str, wanted: Format, columns: Sequence[str], about: str, rename: str
) -> UserError:
    missing = ", ".join(need + _suggestion(need, wanted, columns, rename) for need in wanted.missing(columns))
    found, needs = ", ".join(columns) or "none", ", ".join(wanted.needs)
    return UserError(
        f"columns found: {found} · {introduction}: {wanted.name} ({needs}), missing: {missing}{about}",
        code="missing-column",
        key="data.columns",
    )


def _distance(wanted: Format, columns: Sequence[str]) -> float:
    """The share of the format's columns that is missing. A column that may have another name counts half."""
    missing = wanted.missing(columns)
    return sum(0.5 if _suggestion(need, wanted, columns, "") else 1.0 for need in missing) / len(wanted.needs)


def _suggestion(need: str, wanted: Format, columns: Sequence[str], rename: str) -> str:
    """The column that may be the missing one under another name, as advice; empty if there is none."""
    free = [column for column in columns if column not in wanted.needs]
    for name in need.split(" or "):
        near = _similar(name, free)
        if near is not None:
            return f" (did you mean {near}? {rename.format(name=name, column=near)})"
    return ""


def _similar(name: str, columns: Sequence[str]) -> str | None:
    """The column that probably contains what tokenward calls ``name``."""
    aliases = [column for column in columns if column.lower() in (name, *_ALIASES.get(name, ()))]
    return next(iter(aliases or get_close_matches(name, columns, n=1)), None)
