"""The application that the commands join, and what they share."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tokenward import __version__
from tokenward.distributed import is_first, tells, told, work_alone

app = typer.Typer(
    name="tokenward",
    help="Find the tokens that carry a preference, and train a language model with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)

GOES_ON = "finished work is kept; run the same command again to continue"


def argument(text: str, metavar: str | None = None) -> Any:
    """An argument with a help text."""
    return typer.Argument(help=text, metavar=metavar, show_default=False)


def option(text: str, *names: str, metavar: str | None = None) -> Any:
    """An option with a help text."""
    return typer.Option(*names, help=text, metavar=metavar)


_SET = "Override a value of the recipe, such as oracle.fraction=0.5. Can be repeated."
RecipeArgument = Annotated[Path, argument("The recipe, a YAML file.")]
SetOption = Annotated[list[str] | None, option(_SET, "--set", metavar="KEY=VALUE")]


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
        if tells(stop, 130):
            print(f"\n{stop}" if str(stop) else f"\nstopped; {GOES_ON}", file=sys.stderr)
            told()
        raise typer.Exit(130) from stop


def left_to_first() -> bool:
    """Whether this process leaves work that is not parallel to the first one, which then works alone."""
    if is_first():
        work_alone()
    return not is_first()
