"""From a recipe file to a run, for the command line and ``tokenward.run``."""

import dataclasses
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import transformers
from pydantic import BaseModel

from tokenward.artifacts import MANIFEST, StagePart, fingerprint, naming_the_disk
from tokenward.config import LoadedRecipe, Named, Resolved, load_recipe, resolved
from tokenward.display import Display
from tokenward.distributed import agree, end, first_alone, is_first, not_started, start, work_alone
from tokenward.errors import UserError
from tokenward.objectives import OBJECTIVES, objective_of
from tokenward.plugins import find, plugin_files
from tokenward.report.growing import growing
from tokenward.report.page import make_report
from tokenward.sampling.registry import SAMPLERS
from tokenward.sampling.sources import SOURCES
from tokenward.scoring.join import with_scores
from tokenward.scoring.reads import is_online
from tokenward.scoring.scorers import SCORERS
from tokenward.scoring.store import TokenStore
from tokenward.selection import SELECTORS, scope_of, selector_of
from tokenward.selection.weights import weigh, weigh_step
from tokenward.stages.auxiliary import made_scorer, scorer_of
from tokenward.stages.base import TrainingStage
from tokenward.stages.checks import CONSTANT, check_models
from tokenward.stages.data import preview
from tokenward.stages.lists import (
    carry_out,
    check_recipe,
    possible_stages,
    run_through,
    wanted_stages,
    write_part,
)
from tokenward.stages.reward_learning import DEFAULTS as LEARNING_DEFAULTS
from tokenward.stages.run import Run
from tokenward.stages.tables import say_notes, tables
from tokenward.stages.tasks import encoded_examples, labelled_parts
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.training.arguments import DEFAULTS, TokenTrainingArguments

REGISTRIES: dict[str, Mapping[str, Any]] = {
    "objective": OBJECTIVES,
    "scorer": SCORERS,
    "selection": SELECTORS,
    "source": SOURCES,
    "sampler": SAMPLERS,
}
"""The built-in objects that a recipe key can name."""


def completely_resolved(loaded: LoadedRecipe) -> list[Resolved]:
    """Every value of a recipe in the order of the schema, with its origin, including defaults of named objects.

    A ``training`` table lists the values that tokenward sets. All other fields have the defaults of transformers.

    Raises:
        UserError: a name or a setting of an object is wrong.
    """
    recipe = loaded.recipe
    values: dict[str, Any] = recipe.model_dump()
    parts = [(values[name], table) for name, table in recipe if isinstance(table, BaseModel)]
    parts += [(values["auxiliary_models"][name], table) for name, table in recipe.auxiliary_models.items()]
    for filled, table in parts:
        for key, named in table:
            if isinstance(named, Named):
                _fill(filled[key], _object_values(key, named, recipe.seed))
    for stage in possible_stages(recipe):
        if isinstance(stage, TrainingStage) and stage.present(recipe):
            outer, _, inner = stage.key.partition(".")
            filled = values[outer][inner] if inner else values[outer]
            _fill(filled["training"], _training_defaults(stage.key))
    origins = {item.key: item.origin for item in resolved(loaded)}
    return [Resolved(key, value, origins.get(key, "default")) for key, value in _leaves(values)]


def _fill(table: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Add the defaults of keys that the table leaves out, also in the tables inside it."""
    for key, value in defaults.items():
        if isinstance(table.get(key), dict) and isinstance(value, Mapping):
            _fill(table[key], value)
        else:
            table.setdefault(key, value)


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _object_values(kind: str, named: Named, seed: int) -> dict[str, Any]:
    """The settings of a named object. An object that draws random numbers has the recipe's seed by default."""
    try:
        target = find(kind, named.name, REGISTRIES[kind])
    except UserError as error:
        if error.code != "plugins-refused":
            raise
        return {}
    if dataclasses.is_dataclass(target) and kind in ("objective", "scorer", "selection"):
        makers = {"scorer": made_scorer, "selection": selector_of}
        try:
            made: Any = makers[kind](named, seed) if kind in makers else objective_of(kind, named, seed)
        except UserError as error:
            if error.code != "placeholder":
                raise
            return {}  # a number that its user has not filled in yet: the object is shown as it is written
        return dataclasses.asdict(made)
    if not inspect.isclass(target):
        return {}  # a function is called as it is and has no settings
    # Sources and samplers are not built: they load models and packages, or need the policy.
    parameters = inspect.signature(target).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty}


def _training_defaults(key: str) -> dict[str, Any]:
    known = {item.name for item in dataclasses.fields(transformers.TrainingArguments)}
    fields = dataclasses.fields(TokenTrainingArguments)
    own = {item.name: item.default for item in fields if item.name not in known}
    return {**DEFAULTS, **own, **(LEARNING_DEFAULTS if key in CONSTANT else {})}


def run_recipe(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    last: str = "evaluation",
    quiet: bool = False,
) -> Run:
    """Run the stages of a recipe up to ``last``. Finished stages are skipped. The run's report grows with it.

    Args:
        recipe: Path of a YAML file.
        overrides: Changes of the form ``"a.b=value"``.
        last: The last stage to run.
        quiet: Show nothing.

    Raises:
        UserError: the recipe, the data or a model cannot work.
    """
    start()
    run = open_run(recipe, overrides, quiet=quiet)
    stages = [stage.name for stage in wanted_stages(run, last) if stage.present(run.recipe)]
    page = growing(run.folder, stages, run.display) if is_first() else nullcontext()
    with naming_the_disk(run.folder), page:
        run_through(run, last)
    run.display.line(f"report:  {first_alone(lambda: make_report(run.folder, plugins=True).save())}")
    end()
    return run


def score_part(recipe: str | Path, part: str, overrides: Sequence[str] = (), *, quiet: bool = False) -> Run:
    """Write one part of a recipe's scores. Several jobs can write different parts at once; the last one writes the report.

    Args:
        recipe: Path of a YAML file.
        part: ``i/N``, such as ``1/4`` for the first of four parts.
        overrides: Changes of the form ``"a.b=value"``.
        quiet: Show nothing.

    Raises:
        UserError: there is no such part, or a stage before the scores has to run in one job first.
    """
    mine = StagePart.read(part)
    work_alone()
    run = open_run(recipe, overrides, quiet=quiet)
    if write_part(run, mine):
        run.display.line(f"report:  {make_report(run.folder, plugins=True).save()}")
    return run


def open_run(recipe: str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> Run:
    """Load and check a recipe. Nothing runs yet; the stages can be called one by one.

    Args:
        recipe: Path of a YAML file.
        overrides: ``"a.b=value"`` changes.
        quiet: Show nothing.

    Raises:
        UserError: a key, a value or a name in the recipe is wrong.
    """
    display = Display(quiet=quiet or not is_first())

    def check() -> None:
        loaded = load_recipe(recipe, overrides)
        for name, file in plugin_files(loaded.recipe.model_dump()).items():
            display.line(
                f"  {name} is code that runs with this recipe: {file or 'no file of this name is found'}"
            )
        check_recipe(loaded)

    first_alone(check)  # a mistake is one, not one of each process
    loaded = load_recipe(recipe, overrides)
    agree(fingerprint(loaded.recipe.model_dump(mode="json")), f"the recipe {recipe}")
    quiet_libraries()
    run = Run(recipe=loaded.recipe, display=display)
    if asked := not_started():
        run.display.line(
            f"note: accelerate launch was asked for {asked} processes and has started one: with --cpu, or without a GPU, it starts no "
            f"more. torchrun --nproc-per-node {asked} -m tokenward ... does"
        )
    return run


def show_data(recipe: str | Path, overrides: Sequence[str], rows: int) -> None:
    """Run the data stage and show ``rows`` rows as the model sees them."""
    run = open_run(recipe, overrides)
    check_models(run)
    if run.recipe.online is not None:
        _show_examples(run, rows)
        return
    carry_out(run, "data")
    template = run.tokenizer_template(run.recipe.model.name)
    found = tables(run, template)
    train, counts = found.part("train"), found.counts["train"]
    run.display.table("pairs", ("", "rows"), [(name, str(count)) for name, count in counts.items() if count])
    say_notes(run, template, counts, train.store)
    weighted = _weigh_first(run, train, rows)
    shown = train[:rows] if weighted is None else weighted
    preview(run.display, template, shown, weighted=weighted is not None)


def _weigh_first(run: Run, rows: TokenTable, count: int) -> Sequence[TokenRow] | None:
    """The first rows with the weights from the run's scores. None if there are none; a line says why."""
    if not (run.path("scores") / MANIFEST).is_file():
        run.display.line("  no weights yet: run `tokenward score RECIPE`, then this command again")
        return None
    if is_online(scorer_of(run)):
        run.display.line(
            "  no weights to show: they are computed from the current policy at every training step"
        )
        return None
    try:
        manifest = run.done("scores")
        known = with_scores(rows, scorer_of(run), TokenStore(run.path("scores")))
    except UserError as error:
        run.display.line(f"  no weights: {error}")
        return None
    selector = selector_of(run.recipe.policy.selection, run.recipe.seed)
    run.display.line(
        f"  weights from the scores of {manifest.created} in {run.path('scores')}; if the recipe has changed since, "
        "the next run computes new scores before it trains"
    )
    if scope_of(selector) == "batch":
        run.display.line("  tokens are selected per training batch; here, among the rows shown")
        return weigh_step(selector, known[:count])
    tokenizer = run.tokenizer_template(run.recipe.model.name).tokenizer
    return weigh(known, selector, tokenizer)[:count]


def _show_examples(run: Run, rows: int) -> None:
    if run.recipe.examples is None:
        counts = [(part, str(len(found))) for part, found in labelled_parts(run)._asdict().items()]
        run.display.table("labelled texts", ("", "rows"), counts)
        return
    carry_out(run, "examples")
    template = run.tokenizer_template(run.recipe.model.name)
    preview(run.display, template, encoded_examples(run, template, "train").rows[:rows])


def quiet_libraries() -> None:
    """Turn off the progress bars and notices of transformers and datasets, which would break up our display."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
