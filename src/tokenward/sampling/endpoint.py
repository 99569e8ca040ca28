"""An OpenAI-compatible endpoint: requests that are retried, errors that never show the key."""

import json
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

from tokenward.errors import UserError
from tokenward.hidden import remember
from tokenward.plugins import optional_package

THIS_REQUEST = {400, 413, 422}
"""Statuses that may concern a single request, such as a prompt that is too long for the model."""

AGAIN = {408, 409, 425, 429}
"""Statuses below 500 after which the same request may succeed later."""

_SHOWN = 300
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
        timeout: Seconds to wait for an answer.
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

    Args:
        access: How the endpoint is reached.
        check: A request is repeated until this accepts the JSON of the answer.

    Attributes:
        retries: Number of attempts beyond the first of each request.

    Raises:
        UserError: the ``openai`` package is not installed.
    """

    def __init__(self, access: Access, check: Check) -> None:
        self._key, self._usable = access.key, check
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
        try:
            return send().json()
        except self._openai.APIConnectionError as error:  # also timeouts and answers that are not usable
            cause = error.__cause__ or error
            raise Failed(self._shown(f"{type(cause).__name__}: {cause}")) from None
        except self._openai.APIStatusError as error:
            status = error.status_code
            problem = f"status {status}: {self._shown(error.response.text)}"
            if status in AGAIN or status >= 500:
                raise Failed(problem) from None
            # Not "from error": its body may repeat the key.
            raise Refused(status, problem) from None

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
        """Raise an error that the client retries if an answer is not usable."""
        text = response.read().decode(errors="replace")
        if response.is_success and not _accepts(self._usable, text):
            problem = f"not an answer to the request: {self._shown(text)}"
            raise self._httpx.DecodingError(problem, request=response.request)

    def _shown(self, text: str) -> str:
        """The beginning of a text. The key is masked, because some endpoints repeat it in errors."""
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:_SHOWN] or "(empty)"


def _accepts(check: Check, text: str) -> bool:
    try:
        return check(json.loads(text))
    except (ValueError, LookupError, TypeError):
        return False


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
