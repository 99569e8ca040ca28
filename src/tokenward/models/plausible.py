"""Settings of model folders that no model has: they would take all time or memory before anything else could be said about them."""

import re
from collections.abc import Iterator, Mapping
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from transformers import PretrainedConfig

from tokenward.errors import UserError

MOST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1_000_000,
    "num_attention_heads": 100_000,
    "vocab_size": 100_000_000,
    "intermediate_size": 100_000_000,
}
"""The largest value of each size of a config; the smallest is 1."""

MOST_RANK = 16_384
_MOST_REPEATS, _LONGEST = 6, 2000
_PATTERNS = (
    "target_modules",
    "exclude_modules",
    "layers_pattern",
)  # a list of names is none, except in the last
_PATTERN_KEYS = ("rank_pattern", "alpha_pattern")


def check_config(config: PretrainedConfig, name: str) -> None:
    """Refuse sizes that no model has, before a model of them is built.

    Raises:
        UserError: a size is too small or too large.
    """
    text = config.get_text_config()
    for key, most in MOST.items():
        value = getattr(text, key, None)
        for size in value if isinstance(value, list | tuple) else [value]:
            if size is not None and not (isinstance(size, int) and 1 <= size <= most):
                raise UserError(
                    f"the config.json of {name} says {key} {size!r:.40}, and a model has from 1 to {most:,}. Get the folder anew.",
                    code="not-a-model",
                )


def check_adapter(settings: Mapping[str, Any], what: str) -> None:
    """Refuse ranks, and patterns of layers' names, that could take all memory or time.

    Args:
        settings: Fields of ``peft.LoraConfig``, or of a saved adapter.
        what: What they belong to, for the message.

    Raises:
        UserError: one does.
    """
    ranks = settings.get("rank_pattern")
    for rank in (settings.get("r"), *(ranks.values() if isinstance(ranks, Mapping) else ())):
        if isinstance(rank, int) and rank > MOST_RANK:
            raise UserError(
                f"{what} has the rank {rank!s:.40}, and at most {MOST_RANK:,} are allowed. Use a smaller one.",
                code="invalid-adapter",
            )
    for key, pattern in _patterns(settings):
        if problem := pattern_problem(pattern):
            raise UserError(
                f"{what} names layers in {key} by {pattern!r:.80}, {problem}. Write a list of their names, or a simpler pattern.",
                code="invalid-adapter",
            )


def _patterns(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in _PATTERNS:
        value = settings.get(key)
        given = list(value) if key == "layers_pattern" and isinstance(value, list | tuple) else [value]
        yield from ((key, item) for item in given if isinstance(item, str))
    for key in _PATTERN_KEYS:
        value = settings.get(key)
        yield from (
            (key, item) for item in (value if isinstance(value, Mapping) else ()) if isinstance(item, str)
        )


def pattern_problem(pattern: str) -> str:
    """Why a regular expression may take time without end on a short text; empty if it does not.

    Python's own matches by trial, and a repetition inside of another, or a choice inside of one, can be tried in exponentially many ways.
    """
    if len(pattern) > _LONGEST:
        return f"a pattern of {len(pattern):,} characters"
    try:
        parsed = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        return f"which is no pattern ({str(error)[:100]})"
    try:
        repeats = _repeats(parsed, inside=False)
    except _NestedError:
        return (
            "a pattern with a repetition or a choice inside of a repetition, which may take time without end"
        )
    return (
        f"a pattern with {repeats} repetitions, which may take time without end"
        if repeats > _MOST_REPEATS
        else ""
    )


class _NestedError(Exception):
    """A repetition inside of another."""


def _repeats(parsed: Any, *, inside: bool) -> int:
    """Number of repetitions of a parsed pattern that are not bounded to a few."""
    found = 0
    for code, value in parsed:
        many = code in _REPEATS and value[1] > 1
        if inside and (many or code is codes.BRANCH):
            raise _NestedError
        counts = [_repeats(part, inside=inside or many) for part in _inner(code, value)]
        found += many + (max(counts, default=0) if code is codes.BRANCH else sum(counts))
    return found


_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)
_PLACES = {
    **dict.fromkeys(_REPEATS, 2),
    codes.SUBPATTERN: 3,
    codes.ASSERT: 1,
    codes.ASSERT_NOT: 1,
}


def _inner(code: Any, value: Any) -> list[Any]:
    """The patterns inside of a part of a pattern."""
    if code in _PLACES:
        return [value[_PLACES[code]]]
    if code is codes.BRANCH:
        return list(value[1])
    if code is codes.ATOMIC_GROUP:
        return [value]
    return [part for part in value[1:] if part] if code is codes.GROUPREF_EXISTS else []
