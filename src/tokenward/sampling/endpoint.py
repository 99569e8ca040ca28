"""An OpenAI-compatible endpoint: requests that are retried, errors that never show the key."""

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, Self

from tokenward.errors import UserError
from tokenward.hidden import MASK, remember, without_known
from tokenward.plugins import optional_package

THIS_REQUEST = {400, 413, 422}
"""Statuses that may concern a single request, such as a prompt that is too long for the model."""

AGAIN = {408, 409, 425, 429}
"""Statuses below 500 after which the same request may succeed later."""

LARGEST = 16 * 2**20
"""Bytes of the largest answer that is read."""

PAUSE = 120.0
"""Seconds that are allowed between two attempts. The ``openai`` package gives a request up for which a server asks for a longer pause."""

_SHOWN = 300
_BEGUN = "tokenward.begun"
_KEY = re.compile(r"[!-~]+")
# The openai package reads these from the environment. They are OpenAI's, and the endpoint may belong to someone else.
_NOT_SENT = ("Authorization", "OpenAI-Organization", "OpenAI-Project")

Check = Callable[[Any], bool]
"""Whether the JSON of an answer is usable. If not, the request is repeated."""


class Failed(Exception):
    """A request has no usable answer after all attempts. The message is the last problem."""


class Refused(Exception):
    """The endpoint answered with a status that no further attempt would change.

    Attributes:
        status: The status.
        problem: The status and the beginning of what the endpoint says, without the key.
    """

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status, self.problem = status, problem


class Stopped(Exception):
    """The run was stopped before this request was sent again."""


class Access(NamedTuple):
    """How an endpoint is reached.

    Attributes:
        address: Base address.
        key: API key, sent in the header and stored nowhere; None sends none.
        timeout: Seconds to wait for a whole answer.
        attempts: Attempts before a request counts as failed.
        user: What needs the endpoint, for errors.
        extra: The extra that installs what it needs.
    """

    address: str
    key: str | None
    timeout: float
    attempts: int
    user: str
    extra: str


class Endpoint:
    """Sends requests with the ``openai`` package, which retries them with growing pauses. Thread-safe.

    Whatever a server sends, an answer takes no more than ``timeout`` seconds, and no more than :data:`LARGEST` bytes; a request and its
    repetitions end after ``attempts`` times ``timeout`` and :data:`PAUSE` seconds. Redirects are not followed.

    Args:
        access: How the endpoint is reached.
        check: A request is repeated until this accepts the JSON of the answer.

    Attributes:
        retries: Number of attempts beyond the first of each request.

    Raises:
        UserError: the ``openai`` package is not installed.
    """

    def __init__(self, access: Access, check: Check) -> None:
        self._key, self._usable, self._timeout = access.key, check, access.timeout
        self._longest = access.attempts * (access.timeout + PAUSE)
        self._openai, self._httpx = (
            optional_package(name, access.user, access.extra) for name in ("openai", "httpx2")
        )
        self._stopping, self._lock, self.retries = threading.Event(), threading.Lock(), 0
        hooks = {"request": [self._before_sending], "response": [self._check]}
        self._client = self._openai.OpenAI(
            base_url=access.address,
            api_key=self._key or "none",
            timeout=access.timeout,
            max_retries=access.attempts - 1,
            http_client=self._httpx.Client(event_hooks=hooks),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def stop(self) -> None:
        """Send no further request; those under way may finish."""
        self._stopping.set()

    def get(self, path: str) -> Any:
        """The JSON of a page; errors as in :meth:`post`."""
        return self._sent(lambda: self._client.get(path, cast_to=self._httpx.Response))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON of the answer to a request.

        Args:
            path: Path after the base address, or a whole address.
            body: The request.

        Raises:
            Failed: no usable answer after all attempts.
            Refused: a status that no further attempt would change.
        """
        return self._sent(lambda: self._client.post(path, body=dict(body), cast_to=self._httpx.Response))

    def _sent(self, send: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()

        def work() -> None:
            try:
                done.set_result(self._answer(send))
            except BaseException as error:
                done.set_exception(error)

        # No timeout of the HTTP package ends a server that sends one header line after the other. The thread ends with its connection.
        threading.Thread(target=work, daemon=True).start()
        try:
            return done.result(self._longest)
        except TimeoutError:
            if done.done():
                raise
            raise Failed(f"no answer had ended after {self._longest:g} seconds") from None

    def _answer(self, send: Callable[[], Any]) -> Any:
        try:
            return json.loads(_text(send().content))
        except self._openai.APIConnectionError as error:  # also timeouts and answers that are not usable
            cause = error.__cause__ or error
            raise Failed(self._shown(f"{type(cause).__name__}: {cause}")) from None
        except self._openai.APIStatusError as error:
            status = error.status_code
            problem = f"status {status}: {self._shown(error.response.text)}"
            if 300 <= status < 400:
                raise Failed(f"{problem} A redirect to another address is not followed") from None
            if status in AGAIN or status >= 500:
                raise Failed(problem) from None
            # Not "from error": its body may repeat the key.
            raise Refused(status, problem) from None

    def _before_sending(self, request: Any) -> None:
        if self._stopping.is_set():
            raise Stopped
        request.extensions[_BEGUN] = time.monotonic()
        request.headers["Accept-Encoding"] = "identity"  # a small compressed answer can be an endless one
        with self._lock:
            self.retries += request.headers.get("x-stainless-retry-count", "0") != "0"
        for name in _NOT_SENT:
            request.headers.pop(name, None)
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"

    def _check(self, response: Any) -> None:
        """Raise an error that the client retries if an answer is not usable."""
        response._content = self._read(response)  # what its read() would set, without a limit
        text = _text(response.content)
        if response.is_success and not _accepts(self._usable, text):
            problem = f"not an answer to the request: {self._shown(text)}"
            raise self._httpx.DecodingError(problem, request=response.request)

    def _read(self, response: Any) -> bytes:
        found = bytearray()
        coding = response.headers.get("Content-Encoding", "identity").lower()
        if coding != "identity":
            problem = f"its Content-Encoding is {self._shown(coding)}, which was not asked for"
            raise self._httpx.DecodingError(problem, request=response.request)
        for piece in response.iter_raw():
            found += piece
            if len(found) > LARGEST:
                problem = f"the answer has more than {LARGEST:,} bytes"
                raise self._httpx.DecodingError(problem, request=response.request)
            if time.monotonic() - response.request.extensions[_BEGUN] > self._timeout:
                problem = f"the answer had not ended after {self._timeout:g} seconds"
                raise self._httpx.ReadTimeout(problem, request=response.request)
        return bytes(found)

    def _shown(self, text: str) -> str:
        """The beginning of a text. The key is masked, because some endpoints repeat it in errors."""
        text = " ".join(text.split())
        return (text.replace(self._key, MASK) if self._key else text)[:_SHOWN] or "(empty)"


def _accepts(check: Check, text: str) -> bool:
    try:
        return check(json.loads(text))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def _text(content: bytes) -> str:
    """The text of an answer. Keys are masked: a server may repeat them, and answers are stored."""
    return without_known(content.decode(errors="replace"))


def key_of(variable: str | None, environment: Mapping[str, str]) -> str | None:
    """The API key in an environment variable; None without a variable.

    Raises:
        UserError: the variable is not set, or holds no valid key.
    """
    if variable is None:
        return None
    key = environment.get(variable, "").strip()
    if not key:
        raise UserError(
            f"key_variable is {variable}, and this environment variable is not set. Set it, or leave key_variable out for an "
            "endpoint without a key.",
            code="missing-key",
            key="key_variable",
        )
    if not _KEY.fullmatch(key):
        # A header cannot contain it, and the error of the HTTP package would show it.
        raise UserError(
            f"the value of {variable} is not a valid key: it contains a space, a line break or a non-ASCII character. Set the "
            "variable to the key alone.",
            code="invalid-key",
            key="key_variable",
        )
    remember(key)
    return key
