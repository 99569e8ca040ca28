"""The command line: verbs over stages and tools. torch is imported only by the verbs that need it."""

import sys

from rich.console import Console
from rich.text import Text

# A verb joins the application when its module is imported.
from tokenward.cli import evaluate as evaluate
from tokenward.cli import methods as methods
from tokenward.cli import recipes as recipes
from tokenward.cli import report as report
from tokenward.cli import tools as tools
from tokenward.cli.app import app
from tokenward.errors import UserError


def main() -> None:
    """Run the command line: a user's mistake costs one message and exit status 2."""
    try:
        app()
    except UserError as error:
        about = f"\nrecipe key: {error.key}" if error.key else ""
        Console(stderr=True, highlight=False).print(
            Text.assemble(("error: ", "bold red"), str(error), (about, "dim")), soft_wrap=True
        )
        sys.exit(2)
