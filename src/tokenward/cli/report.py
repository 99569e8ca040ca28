"""Verbs that show a finished run: a page in the browser, a pair in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from tokenward.cli.app import app
from tokenward.config import load_recipe
from tokenward.display import Display

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run, or its recipe.", show_default=False)
]


def _folder(run: Path) -> Path:
    return Path(load_recipe(run).recipe.run).expanduser() if run.is_file() else run


@app.command()
def report(
    run: RunArgument,
    rows: Annotated[int, typer.Option(help="Comparisons on the page at most.", min=1)] = 200,
    also: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN",
            help="A further run whose scores of the same responses can be switched to. Repeatable.",
        ),
    ] = None,
    spans: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Spans that people marked, a JSONL line for each response; outlined in place of the data's own.",
        ),
    ] = None,
) -> None:
    """Write a run's report: one HTML file that opens from disk. It needs no model.

    tokenward report runs/quickstart
    """
    from tokenward.report.page import write_report

    page = write_report(_folder(run), rows=rows, also=[_folder(other) for other in also or ()], spans=spans)
    Display().line(f"report: {page}")


@app.command()
def show(
    run: RunArgument,
    row: Annotated[int, typer.Option(help="Number of the pair in the run, from 1.")] = 1,
    png: Annotated[Path | None, typer.Option(help="Write a picture instead; .svg and .pdf work too.")] = None,
    curves: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the training curves of all stages instead: .png, .svg or .pdf."
        ),
    ] = None,
    light: Annotated[bool, typer.Option("--light", help="The terminal has a light ground.")] = False,
    term: Annotated[
        str | None,
        typer.Option(help="Mark what the own selection of this term of a sum gives weight, such as treg."),
    ] = None,
) -> None:
    """Show a pair of a finished run in the terminal, each token coloured by its score; or draw it, or the curves.

    tokenward show runs/quickstart --row 3
    """
    if curves is not None:
        from tokenward.report.pictures import save_curves

        charts = save_curves(_folder(run), curves)
        Display().line(f"curves: {curves}, {charts} charts")
        if png is None:
            return
    from tokenward.report.show import shown_pair

    shown = shown_pair(_folder(run), row, term)
    if png is None:
        from tokenward.report.show import pair_text

        Display().text(pair_text(shown, light=light))
        return
    from tokenward.report.pictures import save_picture

    save_picture(shown, png)
    Display().line(f"picture: {png}")
