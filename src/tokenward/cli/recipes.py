"""Verbs that carry out a recipe, and those that only read it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from tokenward.cli.app import RecipeArgument, SetOption, app, stoppable


def through(recipe: Path, overrides: list[str] | None, last: str) -> None:
    """Carry out a recipe up to a stage."""
    with stoppable():
        from tokenward.tools.run import run_recipe

        run_recipe(recipe, overrides or (), last=last)


@app.command()
def run(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Carry out a whole recipe, on comparisons or guided, to its evaluation. Finished stages are skipped."""
    through(recipe, overrides, "evaluation")


@app.command()
def data(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    show: Annotated[int, typer.Option(help="Rows to show as the model will see them.")] = 1,
) -> None:
    """Read, clean and split the comparisons; show what was dropped, and rows as the model sees them."""
    with stoppable():
        from tokenward.tools.run import show_data

        show_data(recipe, overrides or (), show)


@app.command()
def oracle(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Train the DPO oracle, after the stages it needs."""
    through(recipe, overrides, "oracle")


@app.command()
def reward(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Learn a token reward from the ranks in the data, after the stages it needs."""
    through(recipe, overrides, "reward")


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
        through(target, overrides, "scores")
        return
    with stoppable():
        from tokenward.tools.score_texts import score_file

        score_file(target, texts, output=output, reference=reference, overrides=overrides or ())


@app.command()
def train(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Train the policy, on selected tokens or guided by a learned reward, after the stages it needs."""
    through(recipe, overrides, "policy")


@app.command()
def config(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    complete: Annotated[
        bool,
        typer.Option(
            "--resolved", help="Also what named objects and training tables have where the recipe is silent."
        ),
    ] = False,
) -> None:
    """Print every value of a recipe and where it comes from."""
    from tokenward.config import load_recipe, resolved

    console = Console(highlight=False)
    loaded = load_recipe(recipe, overrides or ())
    if complete:
        from tokenward.tools.run import completely_resolved as resolved
    for item in resolved(loaded):
        line = Text.assemble(f"{item.key}: {item.value}", (f"  ({item.origin})", "dim"))
        console.print(line, soft_wrap=True)
