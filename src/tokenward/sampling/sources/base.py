"""Preference sources: their call, the check of what they return, and ranks from their scores."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from tokenward.data.parsers import dense
from tokenward.errors import UserError
from tokenward.plugins import optional_package
from tokenward.sampling.sampler import Reply

FIXED = ("prompts", "completions", "completion_ids")


class PreferenceSource(Protocol):
    """One number per completion; higher is better, and only the order within a prompt's replies counts.

    A function of one's own need not take all of this: it is given what its signature names.
    """

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Sequence[Any],
    ) -> Sequence[float]:
        """Score each completion.

        Args:
            prompts: Text of the prompt's last message, one per completion.
            completions: The replies' texts.
            completion_ids: The replies' token ids.
            columns: Every other column of the examples, each aligned with ``completions``; ``references`` holds a
                list of texts for each.
        """
        ...


class RowError(UserError):
    """One completion that a source cannot score.

    Attributes:
        row: Its index among the completions of the call.
        problem: What was found, why it cannot work, what to do.
    """

    def __init__(self, row: int, problem: str) -> None:
        """Name the row and the problem."""
        super().__init__(f"row {row}: {problem}")
        self.row = row
        self.problem = problem


def source_package(module: str, source: str) -> ModuleType:
    """A module of the extra ``eval`` that a preference source needs; a UserError if it is not installed."""
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
    """Call a source with what its signature takes, and check what it returns.

    An exception inside a function of the user's own is let through, with its traceback.

    Args:
        name: As the recipe has it, for messages.
        source: The function, or the object with ``__call__``.
        prompts: Text of the prompt's last message, one per completion.
        completions: The replies' texts.
        completion_ids: The replies' token ids.
        columns: Every other column of the examples, each aligned with ``completions``.
        where: ``file:line`` of the example behind each completion, for messages.
        kind: What the source is, for messages; a metric of the evaluation has the same call.

    Returns:
        One finite number per completion.

    Raises:
        UserError: the source asks for a column that is not there, cannot score a row, or returned anything but one
            finite number per completion.
    """
    if not completions:
        return []
    name = f"the {kind} {name}"
    lists: dict[str, Any] = {
        "prompts": list(prompts),
        "completions": list(completions),
        "completion_ids": list(completion_ids),
    }
    given = _accepted(name, source, lists, columns)
    try:
        returned = source(**given)
    except RowError as error:
        raise UserError(f"{where[error.row]}: {name}: {error.problem}") from error
    return _numbers(name, returned, where)


def check_source(name: str, source: Callable[..., Any], columns: Sequence[str], *, kind: str) -> None:
    """Refuse a source that cannot be called with what it will be given, without calling it.

    Args:
        name: As the recipe has it, for messages.
        source: The function, or the object with ``__call__``.
        columns: Names of what it is given beside prompts and completions; none can be added to them.
        kind: What the source is.

    Raises:
        UserError: it is a class, or its signature asks for something else.
    """
    if inspect.isclass(source):
        raise UserError(
            f"the {kind} {name} is a class, and is called as f(prompts, completions, **columns). Name a function, or an object "
            "of that class that the module makes."
        )
    parameters = _parameters(f"the {kind} {name}", source)
    known = (*FIXED, *columns)
    missing = [p.name for p in parameters if _required(p) and p.name not in known]
    if missing:
        raise UserError(
            f"the {kind} {name} takes {missing[0]!r}, and is given {', '.join(known)}. Name it as one of them, or give it a "
            "default."
        )


def _accepted(
    name: str, source: Callable[..., Any], lists: Mapping[str, Any], columns: Mapping[str, Any]
) -> dict[str, Any]:
    """What of the lists and columns the source's signature takes; all of it where it has ``**columns``."""
    taken = [column for column in columns if column in FIXED]
    if taken:
        raise UserError(
            f"the examples have a column {taken[0]!r}, a name under which {name} is given the "
            f"samples. Rename it; {', '.join(FIXED)} are taken."
        )
    available = {**lists, **columns}
    parameters = _parameters(name, source)
    missing = [p.name for p in parameters if _required(p) and p.name not in available]
    if missing:
        raise UserError(
            f"{name} takes {missing[0]!r}, which is no column of the examples. Its parameters may be "
            f"{', '.join(available)}; name it as one of them, give it a default, or add the column to the examples."
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return available
    names = {p.name for p in parameters}
    return {key: value for key, value in available.items() if key in names}


def _parameters(name: str, source: Callable[..., Any]) -> list[inspect.Parameter]:
    remedy = "Write def f(prompts, completions, **columns), or a class whose __call__ takes them."
    if not callable(source):
        raise UserError(f"{name} is a {type(source).__name__}, which cannot be called. {remedy}")
    try:
        parameters = list(inspect.signature(source).parameters.values())
    except ValueError as error:
        raise UserError(f"{name} does not say what it takes: {error}. {remedy}") from error
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if by_place:
        raise UserError(f"{name} takes {by_place[0]!r} by place only, but is called by name. {remedy}")
    return parameters


def _required(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variadic


def _numbers(name: str, returned: Any, where: Sequence[str]) -> list[float]:
    prefix = f"{name} returned"
    try:
        values = [] if isinstance(returned, str | bytes | Mapping) else list(returned)
    except TypeError as error:
        raise UserError(
            f"{prefix} {_shown(returned)}, which is no list. It must return one finite number per completion."
        ) from error
    if len(values) != len(where):
        place = where[min(len(values), len(where) - 1)]
        raise UserError(
            f"{place}: {prefix} {_shown(returned)}, {len(values)} scores for {len(where)} completions; this row is where "
            "they part. It must return one finite number per completion, in their order."
        )
    return [_number(prefix, value, place) for value, place in zip(values, where, strict=True)]


def _number(prefix: str, value: Any, place: str) -> float:
    if value is None:
        raise UserError(
            f"{place}: {prefix} None for this row. A reply without a score has no rank among the others: return a number, "
            "such as the lowest that the source gives, or leave the example out."
        )
    try:
        number = float("text") if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{place}: {prefix} {_shown(value)} for this row, which is no number. Return one finite number."
        ) from error
    if number - number != 0:
        raise UserError(
            f"{place}: {prefix} {number} for this row, which cannot be ranked. Return a finite number; a division by the "
            "length of an empty reply is the usual cause."
        )
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return f"a {type(value).__name__} ({text if len(text) <= 60 else text[:57] + '...'})"


ONE = "dropped: one response"
TIED = "dropped: all responses tied"


class Group(NamedTuple):
    """The K replies to one prompt, in the order in which they were drawn.

    Attributes:
        ids: Their token ids.
        texts: Their texts.
        ended: Whether the model ended each, or the token limit did.
        scores: What the preference source gave each; higher is better.
    """

    ids: list[list[int]]
    texts: list[str]
    ended: list[bool]
    scores: list[float]


class RankedGroup(NamedTuple):
    """A group that can teach an order.

    Attributes:
        row: Of its prompt.
        group: Its replies.
        ranks: One per reply, dense; 0 is the best, equal scores are a tie.
    """

    row: int
    group: Group
    ranks: tuple[int, ...]


class RankedGroups(NamedTuple):
    """What was kept, and how many groups were dropped.

    Attributes:
        rows: The groups with at least two ranks, in their prompts' order.
        counts: Groups dropped by reason, which are named ``dropped: one response`` and
            ``dropped: all responses tied``; reasons that did not occur are left out.
    """

    rows: list[RankedGroup]
    counts: dict[str, int]


def ranked(prompt_rows: Sequence[int], replies: Sequence[Reply], scores: Sequence[float]) -> RankedGroups:
    """Replies and their scores, as a source was given them, to ranked groups.

    Replies that say the same are kept: they have the same score, so they are a tie.

    Args:
        prompt_rows: Row of each reply's prompt; equal rows are one group, which need not stand together.
        replies: The replies.
        scores: One finite number per reply; higher is better.
    """
    groups: dict[int, Group] = {}
    for row, reply, score in zip(prompt_rows, replies, scores, strict=True):
        group = groups.setdefault(row, Group([], [], [], []))
        group.ids.append(reply.ids)
        group.texts.append(reply.text)
        group.ended.append(reply.ended)
        group.scores.append(score)
    return rank_groups(groups)


def rank_groups(groups: Mapping[int, Group]) -> RankedGroups:
    """Ranks of groups by their scores; a group that shows no order is dropped and counted.

    Args:
        groups: By the row of their prompt.
    """
    rows: list[RankedGroup] = []
    counts: Counter[str] = Counter()
    for row, group in groups.items():
        ranks = dense([-score for score in group.scores])
        if len(ranks) < 2:
            counts[ONE] += 1
        elif max(ranks) == 0:
            counts[TIED] += 1
        else:
            rows.append(RankedGroup(row, group, ranks))
    return RankedGroups(rows, dict(counts))


@dataclass(frozen=True, slots=True)
class Length:
    """The nearer to a number of words, the better: ``-|words of the reply - words|``.

    Attributes:
        words: Number of words wanted, split at white space.
    """

    _: KW_ONLY
    words: int

    def __post_init__(self) -> None:
        if self.words < 0:
            raise UserError(
                f"words is {self.words}, a length that no reply has. Write how many are wanted: 50."
            )

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Sequence[Any],
    ) -> list[float]:
        """One number <= 0 per completion."""
        return [-float(abs(len(text.split()) - self.words)) for text in completions]
