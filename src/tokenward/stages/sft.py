"""The stage that fine-tunes the recipe's model on the preferred responses."""

from collections.abc import Mapping
from typing import Any

from tokenward.artifacts import StageFolder
from tokenward.config import Recipe, SftTable
from tokenward.objectives import SFT, Objective
from tokenward.stages.base import Training, TrainingStage
from tokenward.stages.run import Run
from tokenward.stages.tables import pairs_fingerprint, tables
from tokenward.stages.training import fit_stage
from tokenward.stages.watch import eval_prompts, watching
from tokenward.tokens.template import Template


class SftStage(TrainingStage):
    """Fine-tune on the best response of each prompt; every weight trains, whatever ``model.adapter`` says."""

    name, key, title = "sft", "sft", "the SFT model"

    def table(self, recipe: Recipe) -> SftTable | None:
        """The table ``sft``."""
        return recipe.sft

    def objective(self, run: Run) -> Objective:
        """Mean negative log-likelihood of the tokens."""
        return SFT()

    def adapter(self, recipe: Recipe) -> tuple[str, dict[str, Any] | None]:
        """None: what follows starts from one ordinary model."""
        return "", None

    def unpaired_problem(self, run: Run) -> str:
        """It trains on good responses, alone or not."""
        return ""

    def settings(self, run: Run) -> Mapping[str, Any]:
        """Its table and the number type."""
        table = run.recipe.sft
        assert table is not None
        return {
            "sft": table.model_dump(),
            "seed": run.recipe.seed,
            "model": {"dtype": run.recipe.model.dtype},
        }

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The pairs and the model."""
        name = run.whole(run.recipe.model.name)
        return {
            "data": run.done("data").fingerprint,
            "pairs": pairs_fingerprint(run, run.tokenizer_template(name)),
            "model": run.fingerprint_of(name),
        }

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Train."""
        assert run.recipe.sft is not None
        model = run.load(run.whole(run.recipe.model.name))
        template = model.template(run.style)
        sets = tables(run, template)
        watch = watching(run, model, eval_prompts(run, template), folder.path)
        rows, eval_rows = sets.part("train").best_once(), sets.eval.best_once()
        return fit_stage(
            run, folder, model, SFT(), rows, run.recipe.sft.training, eval_rows=eval_rows, watch=watch
        )

    def planned(self, run: Run, template: Template) -> Training:
        """The best responses, each once."""
        sets, table = tables(run, template), run.recipe.sft
        assert table is not None
        return Training(
            self.name,
            self.key,
            table.training,
            sets.train.best_once(),
            SFT(),
            None,
            self.start(run.recipe),
            eval=sets.eval.best_once(),
            watched=True,
        )
