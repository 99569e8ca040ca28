"""The one exception that speaks to the user."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenward.hidden import masked_keys, without_secrets


class UserError(Exception):
    """A mistake in what the user gave: data, recipe, path or value.

    The message says what was found, why it cannot work and what to write instead. It names arguments and settings
    by their own names (``max_length``), never commands, so that it reads the same in a script. The command line prints
    it without a traceback, with ``key``, and exits with status 2. Secrets in it are masked.

    Attributes:
        code: The kind of mistake in a few words with hyphens, such as ``missing-column``. It stays the same when the
            wording changes, so a program can test for it.
        key: The recipe key that the message is about, such as ``tokens.max_length``; empty if there is none.
    """

    def __init__(self, message: str, *, code: str = "", key: str = "") -> None:
        super().__init__(without_secrets(message))
        self.code = code
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is, also of a subclass with other arguments: one process tells the others."""
        return _made_again, (type(self), self.args, vars(self))

    def within(self, place: str) -> "UserError":
        """The same error with the place where it happened in front of its message."""
        return UserError(f"{place}: {self}", code=self.code, key=self.key)


def refuse_masked(what: str, settings: Any) -> None:
    """Refuse to build something from settings in which a secret is masked.

    Raises:
        UserError: one is.
    """
    if key := next(masked_keys(settings), ""):
        raise UserError(
            f"{what}: {key} is a secret, which was masked when this was written, as in every file of a run. Build it from the recipe itself, "
            "or let the class read the secret from an environment variable.",
            code="hidden-secret",
        )


def _made_again(kind: type[UserError], args: tuple[Any, ...], state: dict[str, Any]) -> UserError:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(state)
    return error


@contextmanager
def no_exit(kind: str, name: str) -> Iterator[None]:
    """A context that calls code of the user's, in which ``sys.exit()`` is a mistake of that code and not the end of the run.

    Raises:
        UserError: the code called it.
    """
    try:
        yield
    except SystemExit as error:
        raise UserError(
            f"the {kind} {name} called sys.exit({'' if error.code is None else repr(error.code)}), which would end the run as if nothing was "
            "wrong. Raise an exception that says what is.",
            code="plugin-exits",
        ) from error


class StoppedBySignal(KeyboardInterrupt):
    """A signal asked the process to stop: SIGINT (Ctrl-C), or SIGTERM, which schedulers and spot machines send.

    Attributes:
        signal: Number of the signal.
    """

    def __init__(self, message: str = "", signal: int = 2) -> None:
        super().__init__(message)
        self.signal = signal
