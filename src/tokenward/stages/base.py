"""The base classes of stages. :mod:`tokenward.stages.lists` has the stages of each kind of run."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tokenward.artifacts import MANIFEST, Manifest, StageFolder, read_manifest
from tokenward.config import Named, Recipe
from tokenward.distributed import first_alone
from tokenward.objectives import Objective, needs_of, objective_of
from tokenward.plugins import code_fingerprints
from tokenward.selection import Selector
from tokenward.stages.run import Run
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

Checks = dict[str, Callable[[], Any]]
"""Checks by the dotted recipe key that they are about; each raises a UserError."""

Rows = TokenTable | Sequence[TokenRow]


class Stage(ABC):
    """One stage of a run.

    Attributes:
        name: Name of its folder and its manifest.
        layout: Version of the layout of its files.
        parallel: Whether all processes of a launch do its work; otherwise the first one does.
    """

    name: str
    layout: int = 1
    parallel: bool = False

    def present(self, recipe: Recipe) -> bool:
        """Whether the recipe has this stage."""
        return True

    def needed(self, run: Run) -> bool:
        """Whether another stage, or the user, reads its output."""
        return True

    @abstractmethod
    def settings(self, run: Run) -> Mapping[str, Any]:
        """Every part of the recipe that its output depends on."""

    @abstractmethod
    def inputs(self, run: Run) -> Mapping[str, str]:
        """Fingerprints of its inputs, by name; other stages by their names."""

    @abstractmethod
    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Do the work in a folder that may hold a part of it already; returns facts for the manifest.

        If the stage is parallel, every process calls this, and the first one's facts count.
        """

    def show(self, run: Run) -> None:  # noqa: B027  most stages show nothing
        """Show the results of the finished stage."""

    def checks(self, run: Run) -> Checks:
        """Checks that need no data and no model."""
        return {}

    def check_data(self, run: Run) -> None:  # noqa: B027  most stages check nothing
        """Check the run's data before a model is loaded."""

    def unpaired_problem(self, run: Run) -> str:
        """Why it cannot train on comparisons of one response, and what to write instead; empty if it can."""
        return ""

    def carry_out(self, run: Run) -> Manifest | None:
        """Do the work unless it is done; None if the recipe does not have this stage.

        Raises:
            UserError: the stage cannot work. Finished stages stay finished.
        """
        if not self.present(run.recipe):
            return None
        settings, inputs = first_alone(lambda: (dict(self.settings(run)), dict(self.inputs(run))))
        with run.stage(self.name, settings, inputs, layout=self.layout) as folder:
            if not folder.done:
                first_alone(lambda: run.verify(folder.manifest.inputs))
                facts = (
                    first_alone(lambda: dict(self.make(run, folder)))
                    if not self.parallel
                    else self.make(run, folder)
                )
                first_alone(lambda: folder.complete(**facts))
        first_alone(lambda: self.show(run))
        return run.done(self.name)

    def unfinished(self, run: Run) -> str:
        """Why its folder is not this stage, finished with the recipe's settings; empty if it is. Nothing runs."""
        path, settings = run.path(self.name), self.settings(run)
        if not (path / MANIFEST).is_file():
            return "has not run yet"
        wanted = Manifest.begin(
            self.name, settings, {**self.inputs(run), **code_fingerprints(settings)}, self.layout
        )
        found = read_manifest(path)
        if found.fingerprint != wanted.fingerprint:
            return f"was made with other settings or inputs ({'; '.join(found.changes_to(wanted))})"
        return "" if found.complete else "has not finished"


class Training(NamedTuple):
    """What a training stage will do, as far as this is known before anything trains.

    Attributes:
        stage: Name of the stage.
        key: Dotted key of its table in the recipe.
        table: The ``training`` table.
        rows: Training rows.
        objective: Training objective.
        adapter: Fields of ``peft.LoraConfig``, or None to train every weight.
        model: The model to start from; if an earlier stage makes that one, what the earlier stage starts from.
        selector: Turns scores into weights; None weights every token 1.
        eval: Rows for evaluation during training.
        watched: Whether fixed prompts are answered during training.
    """

    stage: str
    key: str
    table: dict[str, Any]
    rows: Rows
    objective: Objective
    adapter: dict[str, Any] | None
    model: str
    selector: Selector | None = None
    eval: Rows = ()
    watched: bool = False


class TrainingStage(Stage):
    """A stage that trains a model as a table of the recipe says.

    Attributes:
        key: Dotted key of the table.
        title: Name of the model in messages.
    """

    parallel = True
    key: str
    title: str

    @abstractmethod
    def table(self, recipe: Recipe) -> Any:
        """Its table, or None."""

    def present(self, recipe: Recipe) -> bool:
        """Whether the recipe has its table, with a ``training`` table."""
        table = self.table(recipe)
        return table is not None and table.training is not None

    def objective(self, run: Run) -> Objective:
        """Its training objective."""
        return objective_of("objective", self.named_objective(run.recipe), run.recipe.seed)

    def named_objective(self, recipe: Recipe) -> Named:
        """The objective that its table names."""
        return self.table(recipe).objective

    def start(self, recipe: Recipe) -> str:
        """The model that it starts from as the recipe names it, or one of the same shape."""
        return recipe.model.name

    def adapter(self, recipe: Recipe) -> tuple[str, dict[str, Any] | None]:
        """The recipe key of its adapter, and the fields of ``peft.LoraConfig``; None trains every weight."""
        return "model.adapter", recipe.model.adapter

    def unpaired_problem(self, run: Run) -> str:
        """Refuses an objective that compares responses."""
        if needs_of(self.objective(run)).unpaired:
            return ""
        name = self.named_objective(run.recipe).name
        if ":" in name:
            return (
                f"the objective of {self.key}, {name}, does not declare that it trains on such rows. If it does, add needs = "
                f'Needs(unpaired="all") to its class. {self.unpaired_advice()}'
            )
        return (
            f"the objective of {self.key}, {name}, compares responses to one prompt. {self.unpaired_advice()}"
        )

    def unpaired_advice(self) -> str:
        """What to write if some comparisons have one response."""
        return f"Write {self.key}.objective: {{name: kto}} or {{name: weighted_likelihood}}, or use pairs."

    def planned(self, run: Run, template: Template) -> Training | None:
        """What it will do, for a plan; None if that is unknown. The data stage is finished."""
        return None

    def plan(self, run: Run, rows: Rows, **more: Any) -> Training:
        """What it will do with these rows; ``more`` are further fields of :class:`Training`."""
        table, recipe = self.table(run.recipe).training, run.recipe
        adapter, start = self.adapter(recipe)[1], self.start(recipe)
        return Training(self.name, self.key, table, rows, self.objective(run), adapter, start, **more)
