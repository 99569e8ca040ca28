"""The verb that measures: a recipe's policy before and after, or any two models on prompts of one's own."""

from pathlib import Path
from typing import Annotated

import typer

from tokenward.cli.app import SetOption, app, stoppable
from tokenward.cli.recipes import through
from tokenward.errors import UserError

_MODELS = "Two models"


@app.command()
def evaluate(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe: a YAML file. Left out with --before and --after.")
    ] = None,
    overrides: SetOption = None,
    before: Annotated[
        str | None,
        typer.Option(help="First model: a folder, a hub name or a run's folder.", rich_help_panel=_MODELS),
    ] = None,
    after: Annotated[
        str | None, typer.Option(help="Second model, which wins or loses.", rich_help_panel=_MODELS)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Rows with a prompt, any preference data, or the question file of --export.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help='vader, distinct_2, or "module:name" of your own. Repeatable.', rich_help_panel=_MODELS
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="Reward model of transformers, or a run's oracle, eval_reward or reward folder. Repeatable.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    judge: Annotated[
        Path | None,
        typer.Option(
            help="File of a judge behind an OpenAI-compatible endpoint; docs/evaluation.md says what is in it.",
            rich_help_panel=_MODELS,
        ),
    ] = None,
    export: Annotated[
        str | None,
        typer.Option(
            help="Write answer files for alpaca_eval, mt_bench or arena_hard.", rich_help_panel=_MODELS
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results; runs/BEFORE-vs-AFTER if left out.", rich_help_panel=_MODELS
        ),
    ] = None,
) -> None:
    """Measure the policy of a recipe before and after, or compare any two models on prompts of your own.

    tokenward evaluate recipes/quickstart.yaml
    tokenward evaluate --before default --after runs/quickstart --prompts prompts.jsonl --metric vader
    """
    of_models = {
        "--before": before,
        "--after": after,
        "--prompts": prompts,
        "--metric": metric,
        "--reward": reward,
        "--judge": judge,
        "--export": export,
        "--output": output,
    }
    given = [name for name, value in of_models.items() if value]
    if recipe is not None:
        if given:
            raise UserError(
                f"{given[0]} compares two models and takes no recipe. Leave out {recipe}, or {given[0]}."
            )
        through(recipe, overrides, "evaluation")
        return
    if not before or not after or not prompts:
        needed = [name for name in ("--before", "--after", "--prompts") if not of_models[name]]
        raise UserError(f"name a recipe, or two models and prompts; missing: {', '.join(needed)}.")
    with stoppable():
        from tokenward.tools.compare_models import Request, compare_models

        compare_models(
            Request(
                before=before,
                after=after,
                prompts=prompts,
                metrics=metric or (),
                rewards=reward or (),
                judge=judge,
                export=export,
                output=output,
                overrides=overrides or (),
            )
        )
