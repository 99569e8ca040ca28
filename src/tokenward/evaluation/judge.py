"""A judge compares pairs of replies, each in both orders. Its answers are kept on disk, so each is paid for once."""

import hashlib
import json
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from tokenward.config.judge import PLACES, JudgeTable
from tokenward.errors import UserError
from tokenward.plugins import optional_package
from tokenward.types import Message

FAILED_IN_A_ROW = 5
"""Requests that may fail one after the other before the endpoint is given up."""

THIS_REQUEST = {400, 413, 422}
"""Statuses that may be about one request alone, such as replies that are too long for the judge."""

AGAIN = {408, 409, 425, 429}
"""Statuses below 500 after which the same request may succeed later."""

_SHOWN = 300
_KEY = re.compile(r"[!-~]+")
_KEY_HINT = "Name the variable that holds a valid key in key_variable."
_HINTS = {
    401: _KEY_HINT,
    403: _KEY_HINT,
    404: "Check url, to which /chat/completions is added, and model.",
}
# The openai package reads these from the environment. They belong to OpenAI alone, and the endpoint may be another one.
_NOT_SENT = ("Authorization", "OpenAI-Organization", "OpenAI-Project")


class Failed(Exception):
    """A request without a usable answer after all attempts; the message is the last problem."""


class Stopped(Exception):
    """The run was stopped before this request was sent again."""


class Endpoint:
    """Sends chat completions with the ``openai`` package, which repeats them; safe to use from several threads.

    Args:
        judge: Address, model, other fields of the request, attempts and timeout.
        environment: Holds the key, under the name in ``judge.key_variable``. The key is sent in the header of the
            request and is written nowhere.

    Attributes:
        retries: Attempts beyond the first of each request.

    Raises:
        UserError: the variable of the key is not set or holds no key, or the ``openai`` package is not installed.
    """

    def __init__(self, judge: JudgeTable, environment: Mapping[str, str]) -> None:
        self._judge, self._key = judge, _key_of(judge, environment)
        self._openai, self._httpx = (
            optional_package(name, "a judge", "judge") for name in ("openai", "httpx2")
        )
        self._stopping, self._lock, self.retries = threading.Event(), threading.Lock(), 0
        hooks = {"request": [self._before_sending], "response": [self._check]}
        self._client = self._openai.OpenAI(
            base_url=judge.url,
            api_key=self._key or "none",
            timeout=judge.timeout,
            max_retries=judge.attempts - 1,
            http_client=self._httpx.Client(event_hooks=hooks),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def stop(self) -> None:
        """Send nothing again; what is under way may end."""
        self._stopping.set()

    def send(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The body of the answer, which has a choice with a message.

        Raises:
            Failed: no such body after all attempts, or a status that is about this request.
            UserError: a status that no further attempt would change.
        """
        body = {"model": self._judge.model, "messages": list(messages), **self._judge.request}
        try:
            return self._client.post("/chat/completions", body=body, cast_to=self._httpx.Response).json()
        except self._openai.APIConnectionError as error:  # timeouts and bodies that are no completion too
            cause = error.__cause__ or error
            raise Failed(self._shown(f"{type(cause).__name__}: {cause}")) from None
        except self._openai.APIStatusError as error:
            status = error.status_code
            problem = f"status {status}: {self._shown(error.response.text)}"
            if status in THIS_REQUEST | AGAIN or status >= 500:
                raise Failed(problem) from None
            hint = _HINTS.get(status, "Check model and request in the judge's file.")
            # Not "from error": the body may repeat the key.
            raise UserError(f"{self._judge.url} refuses the request with {problem} {hint}") from None

    def _before_sending(self, request: Any) -> None:
        if self._stopping.is_set():
            raise Stopped
        with self._lock:
            self.retries += request.headers.get("x-stainless-retry-count", "0") != "0"
        for name in _NOT_SENT:
            request.headers.pop(name, None)
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"

    def _check(self, response: Any) -> None:
        """Have the request repeated if its answer is no chat completion."""
        text = response.read().decode(errors="replace")
        if response.is_success and not _is_completion(text):
            problem = f"not a chat completion: {self._shown(text)}"
            raise self._httpx.DecodingError(problem, request=response.request)

    def _shown(self, text: str) -> str:
        """The beginning of a text, without the key, which some endpoints repeat in their errors."""
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:_SHOWN] or "(empty)"


def _key_of(judge: JudgeTable, environment: Mapping[str, str]) -> str | None:
    if judge.key_variable is None:
        return None
    key = environment.get(judge.key_variable, "").strip()
    if not key:
        raise UserError(
            f"the judge's key_variable is {judge.key_variable}, and no such environment variable is set. Set it, or leave "
            "key_variable out for an endpoint without a key."
        )
    if not _KEY.fullmatch(key):
        # A header cannot hold it. The error of the HTTP package would show the key.
        raise UserError(
            f"the value of {judge.key_variable} cannot be a key: it has a space, a line break, or a character outside of ASCII. "
            "Set the variable to the key alone."
        )
    return key


def _is_completion(text: str) -> bool:
    try:
        return isinstance(json.loads(text)["choices"][0]["message"], dict)
    except (ValueError, LookupError, TypeError):
        return False


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote.

    Attributes:
        text: Its message; empty if it wrote none.
        refused: Whether the model refused, or a filter of the endpoint stopped it.
        prompt_tokens: Tokens of the prompt, counted by the endpoint; None if it does not say.
        answer_tokens: Tokens of the answer, likewise.
    """

    text: str
    refused: bool
    prompt_tokens: int | None
    answer_tokens: int | None


class AnswerCache:
    """Answers by the key of their request, in an SQLite file; each is on disk when :meth:`put` returns.

    Args:
        path: The file. It is made if it does not exist.

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
            raise UserError(f"{path} is not a cache of answers: {error}. Move it away.") from error

    def get(self, key: str) -> Answer | None:
        """The answer to a request, or None."""
        row = self._base.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Answer(**json.loads(row[0]))

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer."""
        with self._base:
            text = json.dumps(asdict(answer), ensure_ascii=False)
            self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))

    def close(self) -> None:
        """Close the file."""
        self._base.close()


@dataclass(slots=True)
class AnswerCounts:
    """What the answers took. Tokens and cost are of all answered requests, whichever run they were asked in.

    Attributes:
        asked: Different requests.
        cached: Requests that an earlier run had answered.
        failed: Requests without an answer after all attempts.
        retries: Attempts beyond the first of each request, in this run.
        prompt_tokens: Tokens of the prompts.
        answer_tokens: Tokens of the answers.
        without_usage: Answered requests whose tokens the endpoint did not count.
        cost: By the prices in the judge's file.
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
    """The sha256 of everything that the answer depends on: address, model, messages and the request's other fields."""
    content = [judge.url.rstrip("/"), judge.model, judge.request, [dict(message) for message in messages]]
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def ask_all(
    judge: JudgeTable,
    requests: Sequence[Sequence[Message]],
    cache: AnswerCache,
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Answer | None], AnswerCounts]:
    """Ask every request, and return the answers in the same order; None for a request that failed.

    Answers in the cache are not asked for again, and equal requests are asked once. Failures are not kept, so that the
    next run repeats them.

    Args:
        judge: The model, its address and how to ask.
        requests: The messages of each request.
        cache: Keeps each answer as it comes.
        progress: Called with the number of answered or failed requests.

    Raises:
        UserError: the endpoint refuses a request (a wrong key, an unknown model), or too many in a row fail.
    """
    keys = [request_key(judge, messages) for messages in requests]
    wanted = dict(zip(keys, requests, strict=True))
    counts = AnswerCounts(asked=len(wanted))
    found: dict[str, Answer] = {}
    for key in wanted:
        answer = cache.get(key)
        if answer is not None:
            found[key] = answer
            counts.add(answer, judge, new=False)
    counts.cached = len(found)
    if progress is not None:
        progress(len(found))
    left = {key: messages for key, messages in wanted.items() if key not in found}
    if left:
        with Endpoint(judge, os.environ) as opened:
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
    progress: Callable[[int], None] | None,
) -> None:
    pool, keys, in_a_row = ThreadPoolExecutor(judge.parallel), dict[Future[dict[str, Any]], str](), 0
    try:
        keys |= {pool.submit(endpoint.send, messages): key for key, messages in left.items()}
        for future in as_completed(list(keys)):
            key = keys.pop(future)
            try:
                answer = read_answer(future.result())
            except Failed as failure:
                counts.failed, in_a_row = counts.failed + 1, in_a_row + 1
                _give_up(judge, in_a_row, failure)
            else:
                in_a_row = 0
                cache.put(key, answer)
                found[key] = answer
                counts.add(answer, judge, new=True)
            if progress is not None:
                progress(1)
    finally:
        # After Ctrl-C or an error, requests that wait are not sent, and no request is repeated.
        endpoint.stop()
        pool.shutdown(cancel_futures=True)
        for future, key in keys.items():  # these were under way, and may have been paid for
            if not future.cancelled() and future.exception() is None:
                cache.put(key, read_answer(future.result()))


def _give_up(judge: JudgeTable, in_a_row: int, failure: Failed) -> None:
    if in_a_row >= FAILED_IN_A_ROW:
        raise UserError(
            f"{in_a_row} requests in a row to {judge.url} failed, {judge.attempts} attempts at most for each. The last: {failure}. "
            "The answers so far are kept; the same command goes on from there."
        ) from failure


def read_answer(body: Mapping[str, Any]) -> Answer:
    """The answer in the body of a chat completion, which :class:`Endpoint` has checked to have a message."""
    choice = body["choices"][0]
    message = choice["message"]
    text, refusal = message.get("content"), message.get("refusal")
    usage = body.get("usage") or {}
    return Answer(
        text=text if isinstance(text, str) else "",
        refused=bool(refusal) or choice.get("finish_reason") == "content_filter",
        prompt_tokens=_count(usage, "prompt_tokens"),
        answer_tokens=_count(usage, "completion_tokens"),
    )


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) else None


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
