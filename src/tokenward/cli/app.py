"""The application that the commands join, and what they share."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer, current_thread, main_thread
from types import FrameType
from typing import Annotated, Any

import typer

from tokenward import __version__
from tokenward.distributed import is_first, tells, told, work_alone
from tokenward.errors import StoppedBySignal

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
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
    no_plugins: Annotated[
        bool, typer.Option("--no-plugins", help="Refuse recipes that name code of their own.")
    ] = False,
) -> None:
    """Options before a command."""
    if no_plugins:
        from tokenward.plugins import without_plugins

        context.with_resource(without_plugins("--no-plugins was given"))


@contextmanager
def reading() -> Iterator[None]:
    """Import no code that a run or a recipe names: a command that only reads may look at those of a stranger."""
    from tokenward.plugins import without_plugins

    with without_plugins("this command only reads"):
        yield


@contextmanager
def stoppable() -> Iterator[None]:
    """Stop at Ctrl-C and at SIGTERM, and print what they leave behind; typer itself would exit without a message."""
    with _signals():
        try:
            yield
        except KeyboardInterrupt as stop:
            number = stop.signal if isinstance(stop, StoppedBySignal) else signal.SIGINT
            if tells(stop, 128 + number):
                print(f"\n{stop}" if str(stop) else f"\nstopped; {GOES_ON}", file=sys.stderr)
                told()
            raise typer.Exit(128 + number) from stop


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM stops like Ctrl-C, and neither is lost in a destructor, whose exceptions Python only prints."""
    if current_thread() is not main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal(signal=number)

    def again(lost: Any) -> None:
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            shown(lost)
            return
        number = lost.exc_value.signal if isinstance(lost.exc_value, StoppedBySignal) else signal.SIGINT
        # An exception here would be lost too. The timer's thread sends the signal when this function has returned. It is a real one,
        # which also ends a wait.
        timer = Timer(0.05, signal.pthread_kill, [main_thread().ident, number])
        timer.daemon = True
        timer.start()

    shown, sys.unraisablehook = sys.unraisablehook, again
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = shown


def left_to_first() -> bool:
    """Whether this process leaves work that is not parallel to the first one, which then works alone."""
    if is_first():
        work_alone()
    return not is_first()
