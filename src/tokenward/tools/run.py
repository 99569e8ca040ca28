"""From a recipe file to a run, for the command line and ``tokenward.run``."""

import dataclasses
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers

from tokenward.artifacts import MANIFEST
from tokenward.config import LoadedRecipe, Named, Resolved, load_recipe, resolved
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.objectives import OBJECTIVES, objective_of
from tokenward.plugins import build, find
from tokenward.report.page import write_report
from tokenward.sampling.sources import SOURCES
from tokenward.scoring.join import scored
from tokenward.scoring.reads import is_online
from tokenward.scoring.scorers import SCORERS
from tokenward.scoring.store import TokenStore
from tokenward.selection import SELECTORS, scope_of, selector_of
from tokenward.selection.weights import weigh, weigh_step
from tokenward.stages.auxiliary import made_scorer, scorer_of
from tokenward.stages.data import preview
from tokenward.stages.lists import carry_out, check_recipe, run_through
from tokenward.stages.run import Run
from tokenward.stages.tables import say_notes, tables
from tokenward.stages.tasks import SAMPLERS, encoded_examples, labelled_parts
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.training.arguments import DEFAULTS, TokenTrainingArguments

NAMED: dict[str, Mapping[str, Any]] = {
    "oracle.objective": OBJECTIVES,
    "scores.scorer": SCORERS,
    "policy.selection": SELECTORS,
    "policy.objective": OBJECTIVES,
    "eval_reward.objective": OBJECTIVES,
    "reward.objective": OBJECTIVES,
    "online.selection": SELECTORS,
    "online.objective": OBJECTIVES,
    "online.source": SOURCES,
    "online.sampler": SAMPLERS,
}
"""Tables of a recipe that name an object, and the built-in ones."""

TRAINED = ("sft", "oracle", "policy", "eval_reward")
"""Tables whose ``training`` has the defaults of this module; the reward and an online policy have the published code's."""


def completely_resolved(loaded: LoadedRecipe) -> list[Resolved]:
    """Every value of a recipe in the order of the schema, with its origin, defaults of named objects included.

    Of a ``training`` table what tokenward sets itself is listed; everything else there is as in transformers.

    Raises:
        UserError: a name or a setting of an object is wrong.
    """
    items = resolved(loaded)
    known = {item.key for item in items}
    added: dict[str, list[Resolved]] = {}
    for table, objects in NAMED.items():
        if f"{table}.name" in known:
            found = _of_object(loaded, table, objects)
            added[table] = [item for item in found if not _covered(item.key, known)]
    for table in TRAINED:
        if getattr(loaded.recipe, table) is not None:
            where = f"{table}.training"
            found = [Resolved(f"{where}.{key}", value, "default") for key, value in _training().items()]
            added[where] = [item for item in found if item.key not in known]
    return list(_joined([item for item in items if item.key not in added], added))


def _covered(key: str, known: set[str]) -> bool:
    """Whether a key or a table around it was written."""
    parts = key.split(".")
    return any(".".join(parts[:end]) in known for end in range(1, len(parts) + 1))


def _joined(items: list[Resolved], added: Mapping[str, list[Resolved]]) -> Iterator[Resolved]:
    """Each table's further values after its own; those of an empty table at the end of what stands around it."""
    left = dict(added)
    for number, item in enumerate(items):
        yield item
        following = items[number + 1].key if number + 1 < len(items) else ""
        outer = item.key.split(".")[0]
        for table in list(left):
            inside = item.key.startswith(f"{table}.") and not following.startswith(f"{table}.")
            ends = table.split(".")[0] == outer and following.split(".")[0] != outer
            if inside or ends:
                yield from left.pop(table)


def _of_object(loaded: LoadedRecipe, table: str, objects: Mapping[str, Any]) -> list[Resolved]:
    outer, _, inner = table.partition(".")
    named = getattr(getattr(loaded.recipe, outer), inner)
    kind = inner.replace("_", " ")
    target = find(kind, named.name, objects)
    if dataclasses.is_dataclass(target):
        values = dataclasses.asdict(_made(kind, named, objects, loaded.recipe.seed))
    elif inspect.isclass(target):
        parameters = inspect.signature(target).parameters.values()
        values = {
            item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty
        }
    else:
        values = {}  # a function is called as it is
    return [Resolved(key, value, loaded.lines.origin(key)) for key, value in _leaves(values, table)]


def _made(kind: str, named: Named, objects: Mapping[str, Any], seed: int) -> Any:
    """The object; the seed of one that draws is the recipe's unless it has one."""
    if objects is SELECTORS:
        return selector_of(named, seed)
    if objects is OBJECTIVES:
        return objective_of(kind, named, seed)
    return (
        made_scorer(named, seed) if objects is SCORERS else build(kind, named.name, named.arguments, objects)
    )


def _leaves(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", value


def _training() -> dict[str, Any]:
    ours = (
        "tokens_per_forward",
        "disable_dropout",
        "checkpoint_minutes",
        "displacement_margin",
        "log_entropy",
    )
    fields = {item.name: item.default for item in dataclasses.fields(TokenTrainingArguments)}
    return {**DEFAULTS, **{name: fields[name] for name in ours}}


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
    """Read and check a recipe without running anything, to call its stages one by one.

    Args:
        recipe: Path of a YAML file.
        overrides: ``"a.b=value"`` changes.
        quiet: Show nothing.

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
