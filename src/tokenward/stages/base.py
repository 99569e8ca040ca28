"""What a stage is. The lists in :mod:`tokenward.stages.lists` hold every stage of a run; nothing else knows them by heart."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tokenward.artifacts import Manifest, StageFolder
from tokenward.config import Named, Recipe
from tokenward.objectives import Objective, needs_of, objective_of
from tokenward.selection import Selector
from tokenward.stages.run import Run
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

Checks = dict[str, Callable[[], Any]]
"""By the dotted key of a recipe that a check is about; it raises a UserError."""

Rows = TokenTable | Sequence[TokenRow]


class Stage(ABC):
    """One stage of a run.

    Attributes:
        name: Of its folder and its manifest.
        layout: Version of what it writes.
    """

    name: str
    layout: int = 1

    def present(self, recipe: Recipe) -> bool:
        """Whether the recipe has this stage."""
        return True

    def needed(self, run: Run) -> bool:
        """Whether another stage, or the reader of the run, looks at what it makes."""
        return True

    @abstractmethod
    def settings(self, run: Run) -> Mapping[str, Any]:
        """Everything of the recipe that its output depends on."""

    @abstractmethod
    def inputs(self, run: Run) -> Mapping[str, str]:
        """Fingerprints of what it reads, by name; those of other stages by their names."""

    @abstractmethod
    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Do the work, in a folder that may hold a part of it already; returns facts for the manifest."""

    def show(self, run: Run) -> None:  # noqa: B027  most stages show nothing
        """Show what the finished stage holds."""

    def checks(self, run: Run) -> Checks:
        """What can be refused before anything is read or trained."""
        return {}

    def check_data(self, run: Run) -> None:  # noqa: B027  nothing, in most
        """What can be refused as soon as the data of the run is there."""

    def unpaired_problem(self, run: Run) -> str:
        """Why it cannot train on comparisons of one response, and what to write instead; empty if it can."""
        return ""

    def carry_out(self, run: Run) -> Manifest | None:
        """Do the work unless it is done; None if the recipe does not have this stage.

        Raises:
            UserError: it cannot work. What is finished stays finished.
        """
        if not self.present(run.recipe):
            return None
        with run.stage(self.name, self.settings(run), self.inputs(run), layout=self.layout) as folder:
            if not folder.done:
                folder.complete(**self.make(run, folder))
        self.show(run)
        return run.done(self.name)


class Training(NamedTuple):
    """What a training stage has to do, as far as it is known before anything is trained.

    Attributes:
        stage: Its name.
        key: Dotted key of its table in the recipe.
        table: The table's ``training``.
        rows: What it trains on.
        objective: What it is trained with.
        adapter: Fields of ``peft.LoraConfig``, or None for every weight.
        model: What it starts from; if a stage before it makes that, what that stage starts from.
        selector: From scores to weights, or None if every token counts.
        eval: Comparisons that an evaluation during training reads.
        watched: Whether fixed prompts are answered meanwhile.
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
    """A stage that trains a model, by a table of the recipe.

    Attributes:
        key: Dotted key of the table.
        title: What messages call the model.
    """

    key: str
    title: str

    @abstractmethod
    def table(self, recipe: Recipe) -> Any:
        """Its table; None if the recipe has none."""

    def present(self, recipe: Recipe) -> bool:
        """Whether its table is there and says how to train."""
        table = self.table(recipe)
        return table is not None and table.training is not None

    def objective(self, run: Run) -> Objective:
        """What it is trained with."""
        return objective_of("objective", self.named_objective(run.recipe), run.recipe.seed)

    def named_objective(self, recipe: Recipe) -> Named:
        """The objective that its table names."""
        return self.table(recipe).objective

    def start(self, recipe: Recipe) -> str:
        """The model that it starts from as the recipe names it, or one of the same shape."""
        return recipe.model.name

    def adapter(self, recipe: Recipe) -> tuple[str, dict[str, Any] | None]:
        """Where its adapter is written, and the fields of ``peft.LoraConfig``; None trains every weight."""
        return "model.adapter", recipe.model.adapter

    def unpaired_problem(self, run: Run) -> str:
        """An objective that compares responses."""
        if needs_of(self.objective(run)).unpaired:
            return ""
        name = self.named_objective(run.recipe).name
        if ":" in name:
            return (
                f'the objective of {self.key}, {name}, does not say that it trains on such rows. Write needs = Needs(unpaired="all") in '
                f"its class if it does. {self.unpaired_advice()}"
            )
        return (
            f"the objective of {self.key}, {name}, compares responses to one prompt. {self.unpaired_advice()}"
        )

    def unpaired_advice(self) -> str:
        """What to write where some comparisons have one response."""
        return f"Write {self.key}.objective: {{name: kto}} or {{name: weighted_likelihood}}, or give pairs."

    def planned(self, run: Run, template: Template) -> Training | None:
        """What it has to do, for a plan; None if that cannot be said. The data stage is finished."""
        return None
