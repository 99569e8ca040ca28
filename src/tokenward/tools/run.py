"""From a recipe file to a run: what the command line and ``tokenward.run`` share."""

import logging
from collections.abc import Sequence
from pathlib import Path

import datasets
import transformers

from tokenward.artifacts import MANIFEST
from tokenward.config import load_recipe
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.report.page import write_report
from tokenward.scoring.join import scored
from tokenward.scoring.reads import is_online
from tokenward.scoring.store import TokenStore
from tokenward.selection import scope_of, selector_of
from tokenward.selection.weights import weigh, weigh_step
from tokenward.stages.lists import carry_out, check_recipe, run_through
from tokenward.stages.preview import preview
from tokenward.stages.prompt_task import labelled_parts
from tokenward.stages.run import Run
from tokenward.stages.scorers import scorer_of
from tokenward.stages.tables import say_notes, tables
from tokenward.stages.tasks import encoded_examples
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable


def run_recipe(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    last: str = "evaluation",
    quiet: bool = False,
) -> Run:
    """Carry out a recipe up to a stage; what is done already is skipped. A whole run ends with its report.

    Args:
        recipe: Path of a YAML file.
        overrides: ``"a.b=value"`` changes.
        last: Stage to end with.
        quiet: Show nothing.

    Raises:
        UserError: something in the recipe, the data or the models cannot work.
    """
    run = open_run(recipe, overrides, quiet=quiet)
    run_through(run, last)
    if last == "evaluation":
        run.display.line(f"report:  {write_report(run.folder)}")
    return run


def open_run(recipe: str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> Run:
    """A checked recipe as a run, for calling its stages one by one; nothing is carried out yet.

    Raises:
        UserError: a key, a value or a name in the recipe is wrong.
    """
    loaded = load_recipe(recipe, overrides)
    check_recipe(loaded)
    quiet_libraries()
    return Run(recipe=loaded.recipe, display=Display(quiet=quiet))


def show_data(recipe: str | Path, overrides: Sequence[str], rows: int) -> None:
    """The data stage, and some rows as the model will see them."""
    run = open_run(recipe, overrides)
    if run.recipe.online is not None:
        _show_examples(run, rows)
        return
    carry_out(run, "data")
    template = run.tokenizer_template(run.recipe.model.name)
    found = tables(run, template)
    train, counts = found.part("train"), found.counts["train"]
    run.display.table("pairs", ("", "rows"), [(name, str(count)) for name, count in counts.items() if count])
    say_notes(run, template, counts, train.store)
    shown = _weighted(run, train, rows)
    if shown is None:
        preview(run.display, template, train[:rows], weighted=False)
    else:
        preview(run.display, template, shown)


def _weighted(run: Run, rows: TokenTable, count: int) -> Sequence[TokenRow] | None:
    """The first rows with the weights that the run's scores give them, or None, with the reason on screen."""
    if not (run.path("scores") / MANIFEST).is_file():
        run.display.line("  weights come after scoring: tokenward score RECIPE, then this command again")
        return None
    if is_online(scorer_of(run)):
        run.display.line("  weights are made in the step, of the policy as it is then")
        return None
    try:
        manifest = run.done("scores")
        known = scored(rows, scorer_of(run), TokenStore(run.path("scores")))
    except UserError as error:
        run.display.line(f"  no weights: {error}")
        return None
    selector = selector_of(run.recipe.policy.selection, run.recipe.seed)
    run.display.line(
        f"  weights by the scores of {manifest.created}, as they lie in {run.path('scores')}; a recipe that has changed "
        "since scores again before it trains"
    )
    if scope_of(selector) == "batch":
        run.display.line("  tokens are selected step by step; here among these rows")
        return weigh_step(selector, known[:count])
    tokenizer = run.tokenizer_template(run.recipe.model.name).tokenizer
    return weigh(known, selector, tokenizer)[:count]


def _show_examples(run: Run, rows: int) -> None:
    if run.recipe.examples is None:
        texts = labelled_parts(run)
        counts = [(part, str(len(found))) for part, found in texts._asdict().items()]
        run.display.table("labelled texts", ("", "rows"), counts)
        return
    carry_out(run, "examples")
    template = run.tokenizer_template(run.recipe.model.name)
    preview(run.display, template, encoded_examples(run, template, "train").rows[:rows])


def quiet_libraries() -> None:
    """Our own display speaks; transformers' and datasets' bars and notices would tear it."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
