"""A judge compares pairs of replies, each in both orders, so that a liking for one place cancels out."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

from tokenward.config.judge import PLACES, JudgeTable
from tokenward.evaluation.answers import Answer, AnswerCache, ask_all
from tokenward.types import Message

_MARK = re.compile(r"\[\[([ABC])\]\]")
_PLACE = re.compile("|".join(rf"\{{{place}\}}" for place in PLACES))
_FIRST = {"A": 1.0, "B": 0.0, "C": 0.5}
"""How much each verdict favours the reply in the first place."""


class Pair(NamedTuple):
    """Two replies to one prompt."""

    prompt: Sequence[Message]
    before: str
    after: str


class Judgment(NamedTuple):
    """What the judge said about a pair.

    Attributes:
        preferred: Mean of both orders: 1 for the second model's reply, 0 for the first model's, 0.5 for a tie; None if an
            order has no verdict.
        verdicts: Of both orders, the first model's reply first and then second: ``A``, ``B``, ``C`` for a tie, or the reason
            for no verdict (``refused``, ``empty``, ``unparsable``, ``failed``). Both are ``same`` if the replies are equal;
            the judge is then not asked.
    """

    preferred: float | None
    verdicts: tuple[str, str]


class Judged(NamedTuple):
    """All pairs, with what it took.

    Attributes:
        judgments: One per pair, in their order.
        counts: Verdicts of each kind; requests asked, repeated and failed; tokens and cost.
    """

    judgments: list[Judgment]
    counts: dict[str, float]


def judge_pairs(
    judge: JudgeTable,
    pairs: Sequence[Pair],
    cache: AnswerCache,
    *,
    progress: Callable[[int], None] | None = None,
) -> Judged:
    """Ask about every pair in both orders.

    Args:
        judge: The model and what it is asked.
        pairs: The replies.
        cache: Keeps the answers.
        progress: Called with the number of answers.

    Raises:
        UserError: the endpoint refuses a request, or too many in a row fail.
    """
    differing = [pair for pair in pairs if pair.before != pair.after]
    requests = [
        messages
        for pair in differing
        for messages in (
            request(judge, pair.prompt, pair.before, pair.after),
            request(judge, pair.prompt, pair.after, pair.before),
        )
    ]
    answers, counts = ask_all(judge, requests, cache, progress=progress)
    verdicts = [verdict(answer) for answer in answers]
    orders = iter(zip(verdicts[::2], verdicts[1::2], strict=True))
    judgments = [_same() if pair.before == pair.after else judgment(*next(orders)) for pair in pairs]
    said = [name for item in judgments for name in item.verdicts]
    tally = {f"verdicts_{name}": said.count(name) for name in sorted(set(said))}
    return Judged(judgments, {"pairs": len(pairs), **tally, **asdict(counts)})


def request(judge: JudgeTable, prompt: Sequence[Message], first: str, second: str) -> list[Message]:
    """The messages that ask about two replies in this order."""
    texts = {"prompt": conversation(prompt), "reply_a": first, "reply_b": second}
    # In one pass: a reply that spells {reply_b} is text.
    content = _PLACE.sub(lambda found: texts[found.group()[1:-1]], judge.prompt)
    system = [Message(role="system", content=judge.system)] if judge.system else []
    return [*system, Message(role="user", content=content)]


def conversation(prompt: Sequence[Message]) -> str:
    """A prompt as the judge reads it: the bare text of one user message, else each message under its role."""
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def verdict(answer: Answer | None) -> str:
    """The last mark in an answer, or why it has none."""
    if answer is None:
        return "failed"
    marks = _MARK.findall(answer.text)
    if marks:
        return marks[-1]
    if answer.refused:
        return "refused"
    return "unparsable" if answer.text.strip() else "empty"


def judgment(first: str, second: str) -> Judgment:
    """Both orders of one pair together."""
    if first not in _FIRST or second not in _FIRST:
        return Judgment(None, (first, second))
    return Judgment((1 - _FIRST[first] + _FIRST[second]) / 2, (first, second))


def _same() -> Judgment:
    return Judgment(0.5, ("same", "same"))


def first_place(judgments: Sequence[Judgment]) -> list[float]:
    """How much the judge favours the first place, for each pair with two verdicts; 0.5 is no preference."""
    asked = [item.verdicts for item in judgments if item.preferred is not None and item.verdicts[0] in _FIRST]
    return [(_FIRST[first] + _FIRST[second]) / 2 for first, second in asked]
