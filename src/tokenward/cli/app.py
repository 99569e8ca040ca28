"""The application that the commands join, and what they share."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tokenward import __version__

app = typer.Typer(
    name="tokenward",
    help="Find the tokens that carry a preference, and train a language model with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)

GOES_ON = "finished work is kept; run the same command again to continue"

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value of the recipe, such as oracle.fraction=0.5. Can be repeated.",
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tokenward {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Options before a command."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Print what Ctrl-C leaves behind; typer itself would exit without a message."""
    try:
        yield
    except KeyboardInterrupt as stop:
        print(f"\n{stop}" if str(stop) else f"\nstopped; {GOES_ON}", file=sys.stderr)
        raise typer.Exit(130) from stop
