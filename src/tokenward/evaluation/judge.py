"""A judge model compares pairs of replies, each in both orders. Its answers are stored, so that each is paid for once."""

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenward.config.judge import PLACES, JudgeTable
from tokenward.errors import UserError
from tokenward.hidden import hidden
from tokenward.sampling.endpoint import THIS_REQUEST, Access, Endpoint, Failed, Refused, key_of
from tokenward.types import Message

FAILED_IN_A_ROW = 5
"""Number of consecutive failed requests after which the endpoint is given up."""

_KEY_HINT = "Set key_variable to the name of a variable with a valid key."
_HINTS = {
    401: _KEY_HINT,
    403: _KEY_HINT,
    404: "Check url, to which /chat/completions is appended, and model.",
}


def open_judge(judge: JudgeTable, environment: Mapping[str, str]) -> Endpoint:
    """The judge's endpoint.

    Raises:
        UserError: the variable of the key is not set or holds no valid key, or the ``openai`` package is not installed.
    """
    key = key_of(judge.key_variable, environment)
    return Endpoint(Access(judge.url, key, judge.timeout, judge.attempts, "a judge", "judge"), _is_completion)


def send(judge: JudgeTable, endpoint: Endpoint, messages: Sequence[Message]) -> dict[str, Any]:
    """The body of the judge's answer, a chat completion with a message.

    Raises:
        Failed: no such body after all attempts, or a status that concerns this request only.
        UserError: a status that no further attempt would change.
    """
    body = {"model": judge.model, "messages": list(messages), **judge.request}
    try:
        return endpoint.post("/chat/completions", body)
    except Refused as refused:
        if refused.status in THIS_REQUEST:
            raise Failed(refused.problem) from None
        hint = _HINTS.get(refused.status, "Check model and request in the judge's file.")
        raise UserError(
            f"{judge.url} refuses the request with {refused.problem} {hint}", code="judge-refuses"
        ) from None


def _is_completion(body: Any) -> bool:
    choice = body["choices"][0]
    return isinstance(choice, dict) and isinstance(choice["message"], dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of the judge.

    Attributes:
        text: Its message, possibly empty.
        refused: Whether the model refused, or a content filter stopped it.
        prompt_tokens: Number of prompt tokens as counted by the endpoint; None if it does not say.
        answer_tokens: Number of answer tokens, likewise.
    """

    text: str
    refused: bool
    prompt_tokens: int | None
    answer_tokens: int | None


class AnswerCache:
    """Answers by the key of their request, in an SQLite file. An answer is on disk when :meth:`put` returns.

    Args:
        path: The file, which is created if it does not exist.

    Raises:
        UserError: the file is not such a cache.
    """

    def __init__(self, path: Path) -> None:
        self._base = sqlite3.connect(path)
        try:
            with self._base:
                self._base.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"
                )
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path} is not a cache of answers: {error}. Move it away.", code="unreadable-file"
            ) from error

    def get(self, key: str) -> Answer | None:
        """The answer to a request, or None."""
        row = self._base.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Answer(**json.loads(row[0]))

    def put(self, key: str, answer: Answer) -> None:
        """Store an answer."""
        with self._base:
            text = json.dumps(asdict(answer), ensure_ascii=False)
            self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Close the file."""
        self._base.close()


@dataclass(slots=True)
class AnswerCounts:
    """Counts and cost of the answers. Tokens and cost include answers of earlier runs.

    Attributes:
        asked: Number of different requests.
        cached: Requests that an earlier run had answered.
        failed: Requests without an answer after all attempts.
        retries: Attempts beyond the first of each request, in this run.
        prompt_tokens: Tokens of the prompts.
        answer_tokens: Tokens of the answers.
        without_usage: Answered requests whose tokens the endpoint did not count.
        cost: Cost by the prices in the judge's file.
        cost_now: The part of the cost that this run paid.
    """

    asked: int = 0
    cached: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    without_usage: int = 0
    cost: float = 0.0
    cost_now: float = 0.0

    def add(self, answer: Answer, judge: JudgeTable, *, new: bool) -> None:
        """Count an answered request."""
        if answer.prompt_tokens is None or answer.answer_tokens is None:
            self.without_usage += 1
            return
        cost = (answer.prompt_tokens * judge.price_in + answer.answer_tokens * judge.price_out) / 1e6
        self.prompt_tokens += answer.prompt_tokens
        self.answer_tokens += answer.answer_tokens
        self.cost += cost
        self.cost_now += cost if new else 0.0


def request_key(judge: JudgeTable, messages: Sequence[Message]) -> str:
    """The sha256 of everything that determines the answer: address, model, messages and further fields of the request.

    Secrets in these fields do not: an answer is stored once for all keys.
    """
    content = [
        judge.url.rstrip("/"),
        judge.model,
        hidden(judge.request),
        [dict(message) for message in messages],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def ask_all(
    judge: JudgeTable,
    requests: Sequence[Sequence[Message]],
    cache: AnswerCache,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[list[Answer | None], AnswerCounts]:
    """Send all requests that the cache has no answer to, equal ones once.

    Failures are not stored, so the next run repeats them.

    Args:
        judge: The model, its address and the settings of requests.
        requests: The messages of each request.
        cache: Stores each answer as it comes.
        progress: Called with the number of answered or failed requests.

    Returns:
        An answer for each request, None for one that failed; and the counts.

    Raises:
        UserError: the endpoint refuses a request (a wrong key, an unknown model), or too many fail in a row.
    """
    keys = [request_key(judge, messages) for messages in requests]
    wanted = dict(zip(keys, requests, strict=True))
    found = {key: answer for key in wanted if (answer := cache.get(key)) is not None}
    counts = AnswerCounts(asked=len(wanted), cached=len(found))
    for answer in found.values():
        counts.add(answer, judge, new=False)
    progress(len(found))
    left = {key: messages for key, messages in wanted.items() if key not in found}
    if left:
        with open_judge(judge, os.environ) as opened:
            _ask(judge, left, cache, opened, found, counts, progress)
            counts.retries = opened.retries
    return [found.get(key) for key in keys], counts


def _ask(
    judge: JudgeTable,
    left: Mapping[str, Sequence[Message]],
    cache: AnswerCache,
    endpoint: Endpoint,
    found: dict[str, Answer],
    counts: AnswerCounts,
    progress: Callable[[int], None],
) -> None:
    pool, keys, in_a_row = ThreadPoolExecutor(judge.parallel), dict[Future[dict[str, Any]], str](), 0
    try:
        keys |= {pool.submit(send, judge, endpoint, messages): key for key, messages in left.items()}
        for future in as_completed(list(keys)):
            key = keys.pop(future)
            try:
                answer = read_answer(future.result())
            except Failed as failure:
                counts.failed, in_a_row = counts.failed + 1, in_a_row + 1
                if in_a_row >= FAILED_IN_A_ROW:
                    raise UserError(
                        f"{in_a_row} requests in a row to {judge.url} failed, after {judge.attempts} attempts at most for each. The last: "
                        f"{failure}. The answers so far are stored; the next run continues from there.",
                        code="judge-fails",
                    ) from failure
            else:
                in_a_row = 0
                cache.put(key, answer)
                found[key] = answer
                counts.add(answer, judge, new=True)
            progress(1)
    finally:
        # After Ctrl-C or an error, waiting requests are not sent and none is retried.
        endpoint.stop()
        pool.shutdown(cancel_futures=True)
        for future, key in keys.items():  # these were under way and may have been paid for
            if not future.cancelled() and future.exception() is None:
                cache.put(key, read_answer(future.result()))


def read_answer(body: Mapping[str, Any]) -> Answer:
    """The answer in the body of a chat completion."""
    choice = body["choices"][0]
    message, usage = choice["message"], body.get("usage")
    text, refusal = message.get("content"), message.get("refusal")
    return Answer(
        # JSON can hold halves of characters, which no file can.
        text.encode("utf-8", "replace").decode() if isinstance(text, str) else "",
        bool(refusal) or choice.get("finish_reason") == "content_filter",
        _count(usage, "prompt_tokens"),
        _count(usage, "completion_tokens"),
    )


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and 0 <= value <= _MOST_TOKENS else None


_MOST_TOKENS = 10**9
"""No answer has more; a count beyond it is none."""

_MARK = re.compile(r"\[\[([ABC])\]\]")
_PLACE = re.compile("|".join(rf"\{{{place}\}}" for place in PLACES))
_FIRST = {"A": 1.0, "B": 0.0, "C": 0.5}
"""Score of the reply in the first position, by verdict."""


class Pair(NamedTuple):
    """Two replies to a prompt."""

    prompt: Sequence[Message]
    before: str
    after: str


class Judgment(NamedTuple):
    """The judge's verdicts about a pair.

    Attributes:
        preferred: Mean over both orders: 1 for the second model's reply, 0 for the first model's, 0.5 for a tie; None if an
            order has no verdict.
        verdicts: The verdicts with the first model's reply in first position and in second: ``A``, ``B``, ``C`` for a tie,
            or the reason for no verdict (``refused``, ``empty``, ``unparsable``, ``failed``). Both are ``same`` for equal
            replies, which are not sent to the judge.
    """

    preferred: float | None
    verdicts: tuple[str, str]


class Judged(NamedTuple):
    """Judgments, one per pair, and the number of verdicts of each kind, of requests and tokens, and the cost."""

    judgments: list[Judgment]
    counts: dict[str, float]


def judge_pairs(
    judge: JudgeTable,
    pairs: Sequence[Pair],
    cache: AnswerCache,
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> Judged:
    """Ask the judge about every pair in both orders.

    Args:
        judge: The model and its prompt.
        pairs: The replies.
        cache: Stores the answers.
        progress: Called with the number of answers.

    Raises:
        UserError: the endpoint refuses a request, or too many fail in a row.
    """
    requests = [
        request(judge, pair.prompt, *order)
        for pair in pairs
        if pair.before != pair.after
        for order in ((pair.before, pair.after), (pair.after, pair.before))
    ]
    answers, counts = ask_all(judge, requests, cache, progress=progress)
    verdicts = map(verdict, answers)
    judgments = [
        Judgment(0.5, ("same", "same"))
        if pair.before == pair.after
        else judgment(next(verdicts), next(verdicts))
        for pair in pairs
    ]
    names = [name for item in judgments for name in item.verdicts]
    tally = {f"verdicts_{name}": names.count(name) for name in sorted(set(names))}
    return Judged(judgments, {"pairs": len(pairs), **tally, **asdict(counts)})


def request(judge: JudgeTable, prompt: Sequence[Message], first: str, second: str) -> list[Message]:
    """The messages that ask about two replies in this order."""
    texts = {"prompt": conversation(prompt), "reply_a": first, "reply_b": second}
    # One pass, so that a reply that contains {reply_b} stays text.
    content = _PLACE.sub(lambda found: texts[found.group()[1:-1]], judge.prompt)
    system = [Message(role="system", content=judge.system)] if judge.system else []
    return [*system, Message(role="user", content=content)]


def conversation(prompt: Sequence[Message]) -> str:
    """A prompt as the judge reads it: the text of a single user message, otherwise each message after its role."""
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def verdict(answer: Answer | None) -> str:
    """The last mark in an answer, or the reason that there is none."""
    if answer is None:
        return "failed"
    marks = _MARK.findall(answer.text)
    if marks:
        return marks[-1]
    if answer.refused:
        return "refused"
    return "unparsable" if answer.text.strip() else "empty"


def judgment(first: str, second: str) -> Judgment:
    """Combine the verdicts of both orders."""
    if first not in _FIRST or second not in _FIRST:
        return Judgment(None, (first, second))
    return Judgment((1 - _FIRST[first] + _FIRST[second]) / 2, (first, second))


def first_place(judgments: Sequence[Judgment]) -> list[float]:
    """How much the judge favours the first position, for each pair with two verdicts; 0.5 is no bias."""
    known = [item.verdicts for item in judgments if item.preferred is not None and item.verdicts[0] in _FIRST]
    return [(_FIRST[first] + _FIRST[second]) / 2 for first, second in known]
