"""Preference sources: how they are called, and the check of what they return."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import ModuleType
from typing import Any, Protocol

from tokenward.errors import UserError, no_exit
from tokenward.plugins import optional_package

FIXED = ("prompts", "completions", "completion_ids")


class PreferenceSource(Protocol):
    """Scores completions; higher is better, and only the order within a prompt's replies matters.

    A custom function need not accept all arguments: it is passed those that its signature names.
    """

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Sequence[Any],
    ) -> Sequence[float]:
        """One number per completion, from lists with one entry per completion.

        Args:
            prompts: Text of the prompt's last message.
            completions: Texts of the replies.
            completion_ids: Token ids of the replies.
            columns: Every other column of the examples; ``references`` holds lists of texts.
        """
        ...


class RowError(UserError):
    """A completion that a source cannot score; ``row`` is its index in the call."""

    def __init__(self, row: int, problem: str, *, code: str = "row-not-scored") -> None:
        super().__init__(f"row {row}: {problem}", code=code)
        self.row = row
        self.problem = problem


def source_package(module: str, source: str) -> ModuleType:
    """A module of the extra ``eval``; a UserError if it is not installed."""
    return optional_package(module, f"the preference source {source}", "eval")


def call_source(
    name: str,
    source: Callable[..., Any],
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    where: Sequence[str],
    *,
    kind: str = "preference source",
) -> list[float]:
    """Call a source with the arguments that its signature names, and check what it returns.

    See :class:`PreferenceSource` for the arguments. ``where`` is the ``file:line`` of each completion's example and
    ``kind`` what the source is, for errors. An exception inside a custom function is not caught.

    Raises:
        UserError: the source needs a column that is missing, cannot score a row, or does not return one finite number
            per completion; or it calls ``sys.exit()``.
    """
    if not completions:
        return []
    called, name = name, f"the {kind} {name}"
    reserved = [column for column in columns if column in FIXED]
    if reserved:
        raise UserError(
            f"the examples have a column {reserved[0]!r}, but {name} receives the samples under that name. Rename the column; "
            f"{', '.join(FIXED)} are reserved.",
            code="reserved-column",
        )
    lists = dict(zip(FIXED, map(list, (prompts, completions, completion_ids)), strict=True))
    available: dict[str, Any] = {**lists, **columns}
    parameters = _parameters(
        name, source, available, "Rename it, give it a default, or add that column to the examples."
    )
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = {p.name for p in parameters}
        available = {key: value for key, value in available.items() if key in names}
    try:
        with no_exit(kind, called):
            returned = source(**available)
    except RowError as error:
        raise UserError(f"{where[error.row]}: {name}: {error.problem}", code=error.code) from error
    return _check_scores(name, returned, where)


def check_source(name: str, source: Callable[..., Any], columns: Sequence[str], *, kind: str) -> None:
    """Check, without calling it, that a source can be called with these columns besides the samples."""
    if inspect.isclass(source):
        raise UserError(
            f"the {kind} {name} is a class, but it is called as f(prompts, completions, **columns). Name a function, or an "
            "instance that the module creates.",
            code="source-not-callable",
        )
    _parameters(f"the {kind} {name}", source, (*FIXED, *columns), "Rename it, or give it a default.")


def _parameters(
    name: str, source: Callable[..., Any], available: Collection[str], advice: str
) -> list[inspect.Parameter]:
    remedy = "Write def f(prompts, completions, **columns), or a class with such a __call__."
    if not callable(source):
        raise UserError(
            f"{name} is a {type(source).__name__}, which cannot be called. {remedy}",
            code="source-not-callable",
        )
    try:
        parameters = list(inspect.signature(source).parameters.values())
    except ValueError as error:  # some functions written in C
        raise UserError(f"{name} has no signature: {error}. {remedy}", code="source-signature") from error
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UserError(
                f"{name} takes {parameter.name!r} by position only, but arguments are passed by name. {remedy}",
                code="source-signature",
            )
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic and parameter.name not in available:
            raise UserError(
                f"{name} takes {parameter.name!r}, but is passed only {', '.join(available)}. {advice}",
                code="missing-column",
            )
    return parameters


def _check_scores(name: str, returned: Any, where: Sequence[str]) -> list[float]:
    try:
        values = [] if isinstance(returned, str | bytes | Mapping) else list(returned)
    except TypeError as error:
        raise UserError(
            f"{name} returned {_shown(returned)}, which is not a list. It must return one finite number per completion.",
            code="wrong-scores",
        ) from error
    if len(values) != len(where):
        place = where[min(len(values), len(where) - 1)]
        raise UserError(
            f"{place}: {name} returned {_shown(returned)}, {len(values)} scores for {len(where)} completions. "
            "It must return one finite number per completion, in their order; this is the first row without its score.",
            code="wrong-scores",
        )
    return [_check_score(name, value, place) for value, place in zip(values, where, strict=True)]


def _check_score(name: str, value: Any, place: str) -> float:
    try:
        number = float("text" if isinstance(value, str) else value)  # "3" is a mistake, not a score
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{place}: {name} returned {_shown(value)}, which is not a number. Return one finite number per completion.",
            code="wrong-scores",
        ) from error
    if number - number != 0:
        raise UserError(
            f"{place}: {name} returned {value}, which cannot be ranked. Return a finite number, such as the lowest "
            "possible score, or leave the example out. A common cause is a division by the length of an empty reply.",
            code="wrong-scores",
        )
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return f"a {type(value).__name__} ({text if len(text) <= 60 else text[:57] + '...'})"


@dataclass(frozen=True, slots=True)
class Length:
    """Prefers replies close to a number of words: ``-|words of the reply - words|``.

    Attributes:
        words: Wanted number of words, split at white space.
    """

    _: KW_ONLY
    words: int

    def __post_init__(self) -> None:
        if self.words < 0:
            raise UserError(f"words must be at least 0, got {self.words}.", code="invalid-setting")

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Sequence[Any],
    ) -> list[float]:
        """One number <= 0 per completion."""
        return [-float(abs(len(text.split()) - self.words)) for text in completions]
