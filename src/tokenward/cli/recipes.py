"""Commands that run a recipe, read it, or write a new one."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.text import Text

from tokenward.artifacts import atomic_write
from tokenward.cli.app import (
    RecipeArgument,
    SetOption,
    app,
    argument,
    left_to_first,
    option,
    reading,
    stoppable,
)
from tokenward.display import Display, printable
from tokenward.distributed import place
from tokenward.errors import UserError
from tokenward.hidden import hidden
from tokenward.methods import RECOMMENDED, all_methods, method_of


def check_text(recipe: Path, overrides: list[str] | None) -> None:
    """Say a mistake in a recipe's text before torch is imported, which takes seconds. Several processes read it together later."""
    from tokenward.config import load_recipe

    if place().count == 1:
        load_recipe(recipe, overrides or ())


def run_until(recipe: Path, overrides: list[str] | None, last: str) -> None:
    """Run the stages of a recipe up to ``last``."""
    with stoppable():
        check_text(recipe, overrides)
        from tokenward.tools.run import run_recipe

        run_recipe(recipe, overrides or (), last=last)


@app.command()
def run(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Run all stages of a recipe: data, training, evaluation and report. Finished stages are skipped.

    tokenward run recipes/quickstart.yaml
    """
    run_until(recipe, overrides, "evaluation")


@app.command()
def data(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    show: Annotated[int, option("Number of rows to show as the model sees them.")] = 1,
) -> None:
    """Read, clean and split the data. Show how many rows were dropped and why, and some rows as the model sees them."""
    with stoppable():
        check_text(recipe, overrides)
        from tokenward.tools.run import show_data

        show_data(recipe, overrides or (), show)


@app.command()
def oracle(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Run a recipe up to the oracle, the model that estimates token rewards."""
    run_until(recipe, overrides, "oracle")


@app.command()
def reward(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Run a recipe up to the token reward model, which learns from the ranks in the data."""
    run_until(recipe, overrides, "reward")


@app.command()
def score(
    target: Annotated[Path, argument("A recipe, or the folder of a trained oracle or reward.")],
    texts: Annotated[
        Path | None, argument("With a folder: your texts, JSON lines with the fields prompt and response.")
    ] = None,
    overrides: SetOption = None,
    output: Annotated[
        Path | None, option("File for the scores of your texts; they are shown by default.")
    ] = None,
    reference: Annotated[str | None, option("The reference model, if the folder does not name it.")] = None,
    part: Annotated[
        str | None,
        option(
            "With a recipe: the part that this job writes, such as 1/4. Other jobs write the others.",
            metavar="i/N",
        ),
    ] = None,
) -> None:
    """Score the response tokens of a recipe's data, or of your own texts.

    tokenward score recipes/quickstart.yaml
    tokenward score recipes/quickstart.yaml --part 1/4
    tokenward score runs/quickstart/oracle texts.jsonl --output scores.jsonl

    A model folder that is not part of a run may need --set tokens.template=plain.
    """
    if texts is None:
        if output is not None or reference is not None:
            raise UserError(
                "--output and --reference have no effect without texts. Leave them out, or name a file of texts.",
                code="unused-key",
            )
        if part is None:
            run_until(target, overrides, "scores")
            return
        with stoppable():
            from tokenward.tools.run import score_part

            score_part(target, part, overrides or ())
        return
    if part is not None:
        raise UserError(
            "--part has no effect with texts: it divides the scores of a recipe. Leave it out.",
            code="unused-key",
        )
    if left_to_first():
        return
    with stoppable():
        from tokenward.tools.score_texts import score_file

        score_file(target, texts, output=output, reference=reference, overrides=overrides or ())


@app.command()
def train(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Run a recipe up to the policy, the model that is trained on the selected tokens."""
    run_until(recipe, overrides, "policy")


@app.command()
def evaluate(recipe: RecipeArgument, overrides: SetOption = None) -> None:
    """Run a recipe up to the evaluation, which measures the policy before and after training.

    tokenward evaluate recipes/quickstart.yaml
    """
    run_until(recipe, overrides, "evaluation")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    step: Annotated[
        bool, option("Measure one real step of each training, or only estimate with --no-step.")
    ] = True,
    devices: Annotated[
        int | None, option("Also plan for so many processes with a device each.", "--devices", "--processes")
    ] = None,
    device_memory: Annotated[str | None, option("Memory of a device, such as 80GB.")] = None,
    engine: Annotated[
        str | None, option("ddp, fsdp2, zero2 or zero3; otherwise that of the training table.")
    ] = None,
    device_rate: Annotated[float | None, option("TFLOP/s that a device sustains; otherwise assumed.")] = None,
    link: Annotated[float | None, option("GB/s that a device sends; otherwise assumed.")] = None,
) -> None:
    """Predict the memory, time and disk space of each stage before a run.

    This runs the data stage, because the estimates need the lengths of the texts.

    tokenward plan recipe.yaml --devices 8 --device-memory 80GB --engine fsdp2
    """
    with stoppable():
        check_text(recipe, overrides)
        from tokenward.tools.plan import plan_recipe
        from tokenward.tools.plan_devices import wanted

        asked = wanted(devices, device_memory, engine, device_rate, link)
        plan_recipe(recipe, overrides or (), measure=step, devices=asked)


@app.command()
@reading()
def config(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    complete: Annotated[
        bool, option("Include the defaults of named objects and of the training tables.", "--resolved")
    ] = False,
) -> None:
    """Show every value of a recipe and where it comes from."""
    from tokenward.config import load_recipe, resolved

    console = Console(highlight=False)
    loaded = load_recipe(recipe, overrides or ())
    if complete:
        from tokenward.tools.run import completely_resolved as resolved
    for item in resolved(loaded):
        value = hidden({item.key: item.value})[item.key]
        line = Text.assemble(printable(f"{item.key}: {value}"), (printable(f"  ({item.origin})"), "dim"))
        console.print(line, soft_wrap=True)


@app.command()
def methods() -> None:
    """List the methods that have a recipe, each with a description, its paper and what it gets at the same distance as dpo."""
    rows = [(one.name, one.line, one.verdict, one.paper) for one in all_methods().values()]
    Display().listing(("method", "what it does", "reward at the same distance", "paper"), rows)
    Display().line(
        f"Which one when: docs/choosing.md. tokenward init without a name writes {RECOMMENDED}, which got the highest reward at the same "
        "distance from the start."
    )


@app.command()
def init(
    method: Annotated[
        str,
        argument("A name from `tokenward methods`. By default the one that docs/choosing.md names first."),
    ] = RECOMMENDED,
    file: Annotated[Path | None, argument("The recipe to write; METHOD.yaml by default.")] = None,
) -> None:
    """Write a commented recipe of a method, ready for your model and data.

    tokenward init
    tokenward init tgdpo
    """
    found = method_of(method)
    target = file or Path(f"{method}.yaml")
    if target.exists():
        raise UserError(
            f"{target} already exists. Name another file: tokenward init {method} FILE.", code="file-exists"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, found.recipe)
    Display().line(
        f"{target}: {found.line}\nNext: read its first lines, enter your model and data, then run `tokenward run {target}`."
    )
