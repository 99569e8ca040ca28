"""Verbs around a run: what it will cost, how two differ, a talk with its model, a folder to give away."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tokenward.cli.app import RecipeArgument, SetOption, app, stoppable


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    step: Annotated[
        bool, typer.Option(help="Carry out one real step of each training; --no-step only counts.")
    ] = True,
) -> None:
    """Say what each stage will need of memory, time and disk, before it starts.

    Carries out the data stage, whose lengths it must know, and nothing else of the run.
    """
    with stoppable():
        from tokenward.tools.plan import plan_recipe

        plan_recipe(recipe, overrides or (), measure=step)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Folder of another one.", show_default=False)],
    show: Annotated[int, typer.Option(help="Rows of each kind to show that changed sides.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Compare two runs on the same held-out rows: differences with intervals, and the rows that changed sides."""
    from tokenward.display import Display
    from tokenward.tools.compare import compare_runs, show_comparison

    found = compare_runs(first, second)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        show_comparison(Display(), found, show)


@app.command()
def chat(
    model: Annotated[
        str,
        typer.Argument(help="Folder of a run or a stage, a model folder, or a hub name.", show_default=False),
    ],
    start: Annotated[
        str | None,
        typer.Option(help="Model that /before asks, where the run does not say what it began with."),
    ] = None,
) -> None:
    """Talk with a trained model, in its own template; /help lists the commands. Lines may come through a pipe."""
    from tokenward.tools.chat import chat as talk

    talk(model, start=start)


@app.command()
def export(
    run: Annotated[
        str, typer.Argument(help="Folder of a run, or of a stage that made a model.", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(help="The new model folder.", show_default=False)],
) -> None:
    """Write a run's model as a plain Hugging Face folder with a model card; an adapter is merged and checked."""
    with stoppable():
        from tokenward.tools.export import export as write

        write(run, folder)
