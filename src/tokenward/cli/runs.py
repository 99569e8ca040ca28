"""Commands for finished runs and for models: report, show, check, compare, chat, export."""

import json
from pathlib import Path
from typing import Annotated

import typer

from tokenward.artifacts import user_path
from tokenward.cli.app import SetOption, app, argument, option, reading, stoppable
from tokenward.config import load_recipe
from tokenward.display import Display
from tokenward.errors import UserError

RunArgument = Annotated[Path, argument("The folder of a run, or its recipe.", "RUN")]


def _folder(run: Path) -> Path:
    return user_path(load_recipe(run).recipe.run) if run.is_file() else run


@app.command()
def report(
    run: RunArgument,
    rows: Annotated[int, typer.Option(help="Largest number of comparisons on the page.", min=1)] = 200,
    also: Annotated[
        list[Path] | None,
        option(
            "Another run whose scores of the same responses can be shown. Can be repeated.", metavar="RUN"
        ),
    ] = None,
    spans: Annotated[
        Path | None,
        option(
            "Spans that people marked, JSON lines with one response each. They replace the data's own spans.",
            metavar="FILE",
        ),
    ] = None,
    watch: Annotated[
        bool, option("Serve the page on this computer, and update it while the run goes on.", "--watch")
    ] = False,
    port: Annotated[
        int | None, typer.Option(help="Port of --watch; 8000 by default.", min=1, max=65535)
    ] = None,
    plugins: Annotated[
        bool, option("Import the scorers and selectors of its own that the run's recipe names.", "--plugins")
    ] = False,
) -> None:
    """Write the report of a run: one HTML file that opens from disk. No model is loaded.

    tokenward report runs/quickstart
    tokenward report runs/quickstart --watch
    """
    from tokenward.report.page import Reports

    others = [_folder(other) for other in also or ()]
    reports = Reports(_folder(run), rows=rows, also=others, spans=spans, plugins=plugins)
    if watch:
        from tokenward.report.watch import PORT
        from tokenward.report.watch import watch as serve

        serve(reports, port or PORT, Display().line)
        return
    if port is not None:
        raise UserError(
            "--port has no effect without --watch. Add --watch, or leave it out.", code="unused-key"
        )
    Display().line(f"report: {reports.make().save()}")


@app.command()
@reading()
def show(
    run: RunArgument,
    row: Annotated[int, option("Number of the pair, from 1.")] = 1,
    png: Annotated[Path | None, option("Draw the pair to a picture instead: .png, .svg or .pdf.")] = None,
    curves: Annotated[
        Path | None,
        option("Draw the training curves of all stages instead: .png, .svg or .pdf.", metavar="FILE"),
    ] = None,
    light: Annotated[bool, option("Use colours for a light background.", "--light")] = False,
    term: Annotated[
        str | None, option("Mark the tokens that this term of a sum selects, such as treg.")
    ] = None,
    figures: Annotated[bool, option("Show every figure of the evaluation instead.", "--figures")] = False,
) -> None:
    """Show a pair of a finished run in the terminal, with tokens coloured by score, all its figures, or draw pictures.

    tokenward show runs/quickstart --row 3
    """
    if figures:
        from tokenward.report.collect import RunFolder
        from tokenward.stages.evaluation import show_tables

        show_tables(Display(), RunFolder.read(_folder(run)).evaluated(), "figures on the eval rows")
        return
    if curves is not None:
        from tokenward.report.pictures import save_curves

        charts = save_curves(_folder(run), curves)
        Display().line(f"curves: {curves}, {charts} charts")
        if png is None:
            return
    from tokenward.report.show import pair_text, shown_pair

    shown = shown_pair(_folder(run), row, term)
    if png is None:
        Display().text(pair_text(shown, light=light))
        return
    from tokenward.report.pictures import save_picture

    save_picture(shown, png)
    Display().line(f"picture: {png}")


@app.command()
@reading()
def check(run: RunArgument) -> None:
    """Read every file of a run and compare it with the size and the digest that its stage recorded. Exit status 1 if one differs.

    tokenward check runs/quickstart
    """
    from tokenward.tools.check import show_check

    if not show_check(Display(), _folder(run)):
        raise typer.Exit(1)


@app.command()
@reading()
def compare(
    first: Annotated[Path, argument("The folder of a finished run.")],
    second: Annotated[Path, argument("The folder of another run.")],
    rows: Annotated[int, option("Number of rows to show, per figure, whose sign differs.", "--show")] = 3,
    as_json: Annotated[bool, option("Print one JSON object instead.", "--json")] = False,
) -> None:
    """Compare two runs on the same eval rows: differences with intervals, and the rows that changed sides."""
    from tokenward.tools.compare import compare_runs, show_comparison

    found = compare_runs(first, second)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        show_comparison(Display(), found, rows)


@app.command(name="compare-models")
def compare_models(
    before: Annotated[str, argument("First model: a folder, a hub name or the folder of a run.")],
    after: Annotated[str, argument("Second model; win rates are those of this model.")],
    prompts: Annotated[
        str, option("Rows with a prompt, any preference data, or the question file of --export.")
    ],
    metric: Annotated[
        list[str] | None, option('A metric: vader, distinct_2, or a custom "module:name". Can be repeated.')
    ] = None,
    reward: Annotated[
        list[str] | None,
        option(
            "A reward model of transformers, or the oracle, eval_reward or reward folder of a run. Can be repeated."
        ),
    ] = None,
    judge: Annotated[
        Path | None,
        option("File with the settings of a judge, an OpenAI-compatible endpoint; see docs/evaluation.md."),
    ] = None,
    export: Annotated[
        str | None, option("Write the answer files of a benchmark: alpaca_eval, mt_bench or arena_hard.")
    ] = None,
    output: Annotated[Path | None, option("Folder of the results; runs/BEFORE-vs-AFTER by default.")] = None,
    overrides: SetOption = None,
) -> None:
    """Compare the replies of two models to the same prompts.

    tokenward compare-models default runs/quickstart --prompts prompts.jsonl --metric vader
    """
    with stoppable():
        from tokenward.tools.compare_models import compare_models

        compare_models(
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


@app.command()
@reading()
def chat(
    model: Annotated[str, argument("The folder of a run or a stage, a model folder, or a hub name.")],
    start: Annotated[
        str | None, option("The model behind /before, if the run does not name its start model.")
    ] = None,
) -> None:
    """Chat with a trained model. /help lists the commands of the chat; lines can also come through a pipe."""
    from tokenward.tools.chat import chat

    chat(model, start=start)


@app.command()
@reading()
def export(
    run: Annotated[str, argument("The folder of a run, or of a stage that trained a model.")],
    folder: Annotated[Path, argument("The new model folder.")],
) -> None:
    """Write the model of a run as a Hugging Face folder with a model card. An adapter is merged and checked."""
    with stoppable():
        from tokenward.tools.export import export

        export(run, folder)
