"""The command line: verbs over the pipeline. torch is imported only by the verbs that need it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from tokenward import __version__
from tokenward.errors import UserError

app = typer.Typer(
    name="tokenward",
    help="Find the tokens that carry a preference, and train a language model with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)

GOES_ON = "what was finished stays; the same command goes on from there"

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe: a YAML file.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a value of the recipe, such as oracle.fraction=0.5. Repeatable.",
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"tokenward {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before a verb."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Say what Ctrl-C leaves behind; typer itself would exit without a word."""
    try:
        yield
    except KeyboardInterrupt as stop:
        print(f"\n{stop}" if str(stop) else f"\nstopped; {GOES_ON}", file=sys.stderr)
        raise typer.Exit(130) from stop


def _through(recipe: Path, overrides: list[str] | None, last: str) -> None:
    with _stoppable():
        from tokenward.pipeline.command import run_recipe

        run_recipe(recipe, overrides or (), last=last)


@app.command()
def run(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Carry out a whole recipe, on comparisons or guided, to its evaluation. Finished stages are skipped."""
    _through(recipe, overrides, "evaluation")


@app.command()
def data(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    show: Annotated[int, typer.Option(help="Rows to show as the model will see them.")] = 1,
) -> None:
    """Read, clean and split the comparisons; show what was dropped, and rows as the model sees them."""
    with _stoppable():
        from tokenward.pipeline.command import show_data

        show_data(recipe, overrides or (), show)


@app.command()
def oracle(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Train the DPO oracle, after the stages it needs."""
    _through(recipe, overrides, "oracle")


@app.command()
def reward(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Learn a token reward from the ranks in the data, after the stages it needs."""
    _through(recipe, overrides, "reward")


@app.command()
def score(
    target: Annotated[
        Path,
        typer.Argument(help="Recipe, or the folder of a trained oracle or reward.", show_default=False),
    ],
    texts: Annotated[
        Path | None,
        typer.Argument(
            help="With such a folder: your own texts, JSON lines with prompt and response.",
            show_default=False,
        ),
    ] = None,
    overrides: SetOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write the scores; the screen if left out.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Reference model, where the folder does not say which it was.")
    ] = None,
) -> None:
    """Score every response token of a recipe's data, or of your own texts with a trained oracle or reward.

    tokenward score recipes/quickstart.yaml
    tokenward score runs/quickstart/oracle texts.jsonl --output scores.jsonl

    A folder without a run's manifest may need --set tokens.template=plain.
    """
    if texts is None:
        _through(target, overrides, "scores")
        return
    with _stoppable():
        from tokenward.pipeline.score_texts import score_file

        score_file(target, texts, output=output, reference=reference, overrides=overrides or ())


@app.command()
def train(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Train the policy, on selected tokens or guided by a learned reward, after the stages it needs."""
    _through(recipe, overrides, "policy")


@app.command()
def evaluate(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Measure the policy before and after, on the held-out prompts, after the stages it needs."""
    _through(recipe, overrides, "evaluation")


@app.command()
def config(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Print every value of a recipe and where it comes from."""
    from tokenward.config import load_recipe, resolved

    console = Console(highlight=False)
    for item in resolved(load_recipe(recipe, overrides or ())):
        line = Text.assemble(f"{item.key}: {item.value}", (f"  ({item.origin})", "dim"))
        console.print(line, soft_wrap=True)


def main() -> None:
    """Run the command line: a user's mistake costs one message and exit status 2."""
    try:
        app()
    except UserError as error:
        Console(stderr=True, highlight=False).print(
            Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
