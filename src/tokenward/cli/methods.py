"""Verbs over the methods of papers: a list of them, and a recipe to begin with."""

from pathlib import Path
from typing import Annotated

import typer

from tokenward.artifacts import atomic_write
from tokenward.cli.app import app
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.methods import all_methods, method_of


@app.command()
def methods() -> None:
    """List the methods that have a recipe, with one line and the paper of each."""
    rows = [(method.name, method.line, method.paper) for method in all_methods().values()]
    Display().listing(("method", "what it does", "paper"), rows)


@app.command()
def init(
    method: Annotated[str, typer.Argument(help="Name in tokenward methods.", show_default=False)],
    file: Annotated[
        Path | None,
        typer.Argument(help="Recipe to write; METHOD.yaml by default.", show_default=False),
    ] = None,
) -> None:
    """Write a commented recipe of a method, to put your model and data into.

    tokenward init tgdpo
    """
    found = method_of(method)
    target = file or Path(f"{method}.yaml")
    if target.exists():
        raise UserError(f"{target} exists already. Name another file: tokenward init {method} FILE.")
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, found.recipe)
    Display().line(
        f"{target}: {found.line}\nNext: put your model and data into it, then tokenward run {target}"
    )
