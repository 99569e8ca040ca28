"""The command line. Only commands that need torch import it, so that help and messages appear at once."""

import sys

from rich.console import Console
from rich.text import Text

# A command joins the application when its module is imported.
from tokenward.artifacts import of_system
from tokenward.cli import recipes as recipes
from tokenward.cli import runs as runs
from tokenward.cli.app import app, left_to_first
from tokenward.display import printable
from tokenward.distributed import ElsewhereError, end_with_others, is_first, leave_for, place, tells, told
from tokenward.errors import UserError

PARALLEL = ("run", "oracle", "reward", "score", "train", "evaluate")
"""Commands that all processes of a launch work on. Of any other, the first process does everything."""


def main() -> None:
    """Run the command line. A user's mistake prints one message and exits with status 2."""
    if place().count > 1 and _is_parallel(sys.argv[1:]):
        end_with_others()
    elif place().count > 1 and left_to_first():
        return
    try:
        app()
    except ElsewhereError:
        sys.exit(1)
    except Exception as raised:
        error = raised if isinstance(raised, UserError) else of_system(raised)
        if error is None:
            leave_for(raised)
            raise
        if tells(error):
            _print(error)
            told()
        sys.exit(2)


def _is_parallel(arguments: list[str]) -> bool:
    """Whether the command, which options of the whole program may come before, is one of all processes."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    return command in PARALLEL and "--help" not in arguments


def _print(error: UserError) -> None:
    title = "error: " if is_first() else f"error in process {place().rank}: "
    about = f"\nrecipe key: {error.key}" if error.key else ""
    Console(stderr=True, highlight=False).print(
        Text.assemble((title, "bold red"), printable(str(error)), (printable(about), "dim")), soft_wrap=True
    )
