"""One request to an OpenAI-compatible endpoint, sent again where that can help."""

import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Self

import httpx2

from tokenward.config.judge import JudgeTable
from tokenward.errors import UserError
from tokenward.types import Message

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Statuses after which the same request may succeed."""

THIS_ONE = {400, 413, 422}
"""Statuses that may be about one request alone, such as replies that are too long for the judge."""

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds between attempts where the endpoint names none: they double, up to the longest."""

_SHOWN = 300
_KEY_HINT = "Name the variable that holds a valid key in key_variable."
_HINTS = {
    401: _KEY_HINT,
    403: _KEY_HINT,
    404: "Check url, to which /chat/completions is added, and model.",
}


class Failed(Exception):
    """No usable answer after all attempts; its message is what came at last."""


class _Again(NamedTuple):
    """An attempt that gave no answer.

    Attributes:
        problem: What came.
        wait: Seconds that the endpoint asks for, or None.
    """

    problem: str
    wait: float | None = None


class Stopped(Exception):
    """Nothing more is wanted: the run was stopped while this request waited."""


class Endpoint:
    """Sends chat completions; safe to use from several threads.

    Args:
        judge: Address, model, other fields, attempts and time to wait.
        environment: Where the key is read, by the name in ``judge.key_variable``; it goes into the request's header and
            nowhere else.
        pause: Waits so many seconds; for tests. As given, the wait ends early when :meth:`stop` is called.

    Raises:
        UserError: the variable of the key is not set.
    """

    def __init__(
        self,
        judge: JudgeTable,
        environment: Mapping[str, str],
        *,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self._judge, self._key = judge, key_of(judge, environment)
        self._stopping = threading.Event()
        self._pause = pause or self._stopping.wait
        self._random = random.Random(0)
        self._lock = threading.Lock()
        self.retries = 0
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        self._client = httpx2.Client(timeout=judge.timeout, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def stop(self) -> None:
        """No further attempts; a wait between two ends now."""
        self._stopping.set()

    def send(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The body of the answer, which has a choice with a message.

        Raises:
            Failed: no such body after all attempts, or a status that is about this request.
            UserError: a status that no further attempt would change.
        """
        found = _Again("", 0.0)
        for attempt in range(self._judge.attempts):
            if attempt:
                with self._lock:
                    self.retries += 1
                self._pause(self._backoff(attempt - 1) if found.wait is None else found.wait)
            if self._stopping.is_set():
                raise Stopped
            found = self._attempt(messages)
            if not isinstance(found, _Again):
                return found
        raise Failed(found.problem)

    def _attempt(self, messages: Sequence[Message]) -> "dict[str, Any] | _Again":
        try:
            response = self._post(messages)
        except httpx2.TransportError as error:  # time-outs too
            return _Again(self._safe(f"{type(error).__name__}: {error}"))
        if response.status_code == 200:
            body = _checked(response)
            return (
                _Again(f"an answer that is no chat completion: {self._body(response)}")
                if body is None
                else body
            )
        problem = f"status {response.status_code}: {self._body(response)}"
        if response.status_code in AGAIN:
            return _Again(problem, retry_after(response.headers.get("Retry-After")))
        if response.status_code in THIS_ONE:
            raise Failed(problem)
        hint = _HINTS.get(response.status_code, "Check model and request in the judge's file.")
        raise UserError(f"{self._judge.url} refuses the request with {problem} {hint}")

    def _post(self, messages: Sequence[Message]) -> httpx2.Response:
        body = {"model": self._judge.model, "messages": list(messages), **self._judge.request}
        return self._client.post(f"{self._judge.url.rstrip('/')}/chat/completions", json=body)

    def _backoff(self, attempt: int) -> float:
        with self._lock:
            # Spread, or all threads would come back at the same moment.
            return min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * self._random.uniform(0.5, 1.0)

    def _body(self, response: httpx2.Response) -> str:
        return self._safe(" ".join(response.text.split()))[:_SHOWN] or "(empty)"

    def _safe(self, text: str) -> str:
        """Text of an endpoint without the key, which some repeat in their errors."""
        return text.replace(self._key, "***") if self._key else text


def key_of(judge: JudgeTable, environment: Mapping[str, str]) -> str | None:
    """The key from the variable that the judge's file names, or None where it names none.

    Raises:
        UserError: the variable is not set.
    """
    if judge.key_variable is None:
        return None
    key = environment.get(judge.key_variable, "").strip()
    if not key:
        raise UserError(
            f"the judge's key_variable is {judge.key_variable}, and no such environment variable is set. Set it, or leave "
            "key_variable out for an endpoint without a key."
        )
    return key


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, a number or a date; None where it says nothing."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        return _seconds_until(value)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _seconds_until(date: str) -> float | None:
    try:
        return max(0.0, (parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):  # no date, or one without a zone
        return None


def _checked(response: httpx2.Response) -> dict[str, Any] | None:
    """The body, if it is a chat completion with a message."""
    try:
        body = response.json()
        message = body["choices"][0]["message"]
    except (ValueError, LookupError, TypeError):
        return None
    return body if isinstance(body, dict) and isinstance(message, dict) else None
