"""The verbs that measure: a recipe's policy before and after training, and any two models on custom prompts."""

from pathlib import Path
from typing import Annotated

import typer

from tokenward.cli.app import RecipeArgument, SetOption, app, stoppable
from tokenward.cli.recipes import through

Repeatable = list[str] | None


@app.command()
def evaluate(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Measure the policy of a recipe before and after its training.

    tokenward evaluate recipes/quickstart.yaml
    """
    through(recipe, overrides, "evaluation")


@app.command(name="compare-models")
def compare_models(
    before: Annotated[str, typer.Argument(help="First model: a folder, a hub name or a run's folder.")],
    after: Annotated[str, typer.Argument(help="Second model, which wins or loses.")],
    prompts: Annotated[
        str,
        typer.Option(help="Rows with a prompt, any preference data, or the question file of --export."),
    ],
    metric: Annotated[
        Repeatable, typer.Option(help='vader, distinct_2, or a custom "module:name". Repeatable.')
    ] = None,
    reward: Annotated[
        Repeatable,
        typer.Option(
            help="Reward model of transformers, or a run's oracle, eval_reward or reward folder. Repeatable."
        ),
    ] = None,
    judge: Annotated[
        Path | None,
        typer.Option(help="File of a judge behind an OpenAI-compatible endpoint; see docs/evaluation.md."),
    ] = None,
    export: Annotated[
        str | None, typer.Option(help="Write answer files for alpaca_eval, mt_bench or arena_hard.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; runs/BEFORE-vs-AFTER if left out.")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Compare the replies of any two models to the same prompts.

    tokenward compare-models default runs/quickstart --prompts prompts.jsonl --metric vader
    """
    with stoppable():
        from tokenward.tools.compare_models import compare_models as carry_out

        carry_out(
            before,
            after,
            prompts,
            metrics=metric or (),
            rewards=reward or (),
            judge=judge,
            export=export,
            output=output,
            overrides=overrides or (),
        )
