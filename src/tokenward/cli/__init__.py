"""The command line. Only commands that need torch import it, so that help and messages appear at once."""

import sys

from rich.console import Console
from rich.text import Text

# A command joins the application when its module is imported.
from tokenward.artifacts import of_system
from tokenward.cli import recipes as recipes
from tokenward.cli import runs as runs
from tokenward.cli.app import app
from tokenward.display import printable
from tokenward.errors import UserError


def main() -> None:
    """Run the command line. A user's mistake prints one message and exits with status 2."""
    try:
        app()
    except Exception as raised:
        error = raised if isinstance(raised, UserError) else of_system(raised)
        if error is None:
            raise
        about = f"\nrecipe key: {error.key}" if error.key else ""
        Console(stderr=True, highlight=False).print(
            Text.assemble(("error: ", "bold red"), printable(str(error)), (printable(about), "dim")),
            soft_wrap=True,
        )
        sys.exit(2)
