"""The stages that train on whole responses, SFT and the eval reward model, and what every training stage shares."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers.trainer_utils import IntervalStrategy

from tokenward.api.prepare import needs_frozen_copy, trained_on, with_new_adapter
from tokenward.artifacts import StageFolder
from tokenward.config import EvalRewardTable, Recipe, SftTable
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel, lasting
from tokenward.objectives import SFT, Objective
from tokenward.sampling import Reply, SamplingSettings, sample_replies
from tokenward.sampling.rollouts import Context
from tokenward.scoring.join import computed, with_reference
from tokenward.scoring.store import TokenStore
from tokenward.stages.base import Checks, Training, TrainingStage
from tokenward.stages.part_checks import check_objective_without_scores
from tokenward.stages.run import Run
from tokenward.stages.tables import eval_comparisons, pairs_fingerprint, tables
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import Column, TokenTable
from tokenward.tokens.template import Template
from tokenward.training.arguments import check_batches, training_arguments
from tokenward.training.callbacks import SAMPLES, AnswerPrompts
from tokenward.training.fit import fit


class FixedPrompt(NamedTuple):
    """A prompt that is answered while a model trains."""

    key: str
    text: str
    ids: Sequence[int]


def eval_prompts(run: Run, template: Template) -> list[FixedPrompt]:
    """The first of the prompts that the evaluation replies to; none where nothing is held out."""
    if not run.recipe.fixed_prompts:
        return []
    rows, _ = eval_comparisons(run, template).fitting(run.limits)
    found = rows.first_by_key(run.recipe.fixed_prompts)
    return [FixedPrompt(row.comparison.key, row.comparison.prompt[-1]["content"], row.asked) for row in found]


def example_prompts(run: Run, contexts: Sequence[Context]) -> list[FixedPrompt]:
    """The first development examples of an online run."""
    return [
        FixedPrompt(context.example.key, context.example.prompt[-1]["content"], context.prompt)
        for context in contexts[: run.recipe.fixed_prompts]
        if context.example.prompt
    ]


def watching(
    run: Run,
    model: LanguageModel,
    prompts: Sequence[FixedPrompt],
    folder: Path,
    *,
    also: Callable[[int, int], bool] = lambda step, total: False,
) -> AnswerPrompts | None:
    """What looks at a model while it trains; None where there is nothing to reply to.

    Replies are drawn as the evaluation draws them, but from the weights as they are, with the recipe's seed.
    """
    table, context = run.recipe.evaluation, run.limits.context
    prompts = [item for item in prompts if context is None or len(item.ids) + table.max_new_tokens <= context]
    if not prompts:
        return None
    settings = SamplingSettings(
        table.max_new_tokens, table.temperature, table.top_p, table.top_k, table.batch
    )
    template = model.template(run.style)

    def answer() -> list[Reply]:
        return sample_replies(model, template, [item.ids for item in prompts], settings, seed=run.recipe.seed)

    return AnswerPrompts(
        [item.key for item in prompts],
        [item.text for item in prompts],
        answer,
        folder / SAMPLES,
        show=run.display.line,
        also=also,
        main=PartialState().is_main_process,
    )


def scored_by(run: Run) -> dict[str, Any]:
    """What a scorer of texts must know to do as the run does, from any folder."""
    return {
        "reference": lasting(run.reference_model),
        **run.style.facts(),
        "dtype": run.recipe.model.dtype,
        "attention": run.recipe.model.attention,
        "precision": run.recipe.scores.precision,
    }


def model_settings(run: Run) -> dict[str, Any]:
    """What of the recipe decides a trained model beside its own table."""
    table = run.recipe.model
    model = {"dtype": table.dtype, "adapter": table.adapter, "packing": table.packing}
    if table.head_mlp is not None:
        model["head_mlp"] = table.head_mlp
    return {"model": model, "seed": run.recipe.seed}


def adapted(run: Run, model: LanguageModel, adapter: Any) -> LanguageModel:
    """The model with a new adapter to train, if the recipe has one."""
    settings = run.recipe.model.adapter if adapter == "inherit" else adapter
    return with_new_adapter(model, settings, run.recipe.seed)


def frozen_reference(run: Run, objective: Objective, model: LanguageModel) -> LanguageModel | None:
    """A second copy of a model before its training, if the objective compares with it in the step."""
    return run.load(model.name) if needs_frozen_copy(objective, model) else None


def fit_stage(
    run: Run,
    stage: StageFolder,
    model: TokenModel,
    objective: Objective,
    rows: Sequence[TokenRow],
    table: dict[str, Any],
    *,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    eval_rows: Sequence[TokenRow] = (),
    **more: Any,
) -> dict[str, Any]:
    """Train a model by a ``training`` table of the recipe, in the folder of a stage; returns facts for its manifest.

    Args:
        run: The run.
        stage: Folder of the stage; the training goes on from a checkpoint in it.
        model: The model before training.
        objective: What to minimise.
        rows: Training comparisons.
        table: The recipe's ``training`` table.
        defaults: Values for keys that the table leaves out, if they differ from those of other stages.
        eval_rows: Comparisons for ``eval_strategy``.
        more: As :func:`tokenward.training.fit.fit` takes it.

    Raises:
        UserError: as there; or the table evaluates, and there is nothing to evaluate on.
    """
    where = f"{stage.path.name}.training"
    arguments = training_arguments(
        {**defaults, **table},
        folder=stage.path / "checkpoints",
        seed=run.recipe.seed,
        where=where,
        device=run.recipe.model.device,
    )
    if not eval_rows and arguments.eval_strategy != IntervalStrategy.NO:
        advice = "Raise data.eval" if run.recipe.data.eval is None else "Give data.eval more rows"
        raise UserError(
            f"{where}.eval_strategy is {IntervalStrategy(arguments.eval_strategy).value}, but there is no held-out "
            f"comparison to evaluate on. {advice}, or write eval_strategy: no."
        )
    check_batches(table, len(rows), where)
    shared = {
        "style": run.style,
        "display": run.display,
        "where": where,
        "reference_precision": run.recipe.scores.precision,
    }
    facts = fit(model, objective, rows, arguments, stage.path, eval_rows=eval_rows, **shared, **more)
    if "save_strategy" not in table:
        stage.temporary.append(stage.path / "checkpoints")  # only there to go on after a stop
    return facts


def with_own_reference(run: Run, start: LanguageModel, rows: TokenTable) -> TokenTable:
    """Rows with the log-probabilities of a model before its training."""
    return rows.with_column("reference_logp", logprobs(run, start, rows, "reference"))


def logprobs(run: Run, model: LanguageModel, rows: TokenTable, label: str) -> Column:
    """Log-probabilities of a model, with a bar."""
    scores = run.recipe.scores
    with run.display.progress(label, len(rows.responses)) as bar:
        return computed(
            rows,
            model,
            precision=scores.precision,
            tokens_per_batch=scores.tokens_per_batch,
            progress=bar.advance,
        )


def referenced(run: Run, rows: TokenTable) -> TokenTable:
    """Rows with the log-probabilities of the reference stage."""
    return with_reference(rows, TokenStore(run.path("reference")))


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


class EvalRewardStage(TrainingStage):
    """Train a second oracle, which judges the policy."""

    name, key, title = "eval_reward", "eval_reward", "the eval reward model"

    def table(self, recipe: Recipe) -> EvalRewardTable | None:
        """The table ``eval_reward``."""
        return recipe.eval_reward

    def start(self, recipe: Recipe) -> str:
        """The reference."""
        return recipe.oracle.model or recipe.model.name

    def settings(self, run: Run) -> Mapping[str, Any]:
        """Its table and how models are held."""
        assert run.recipe.eval_reward is not None
        return {"eval_reward": run.recipe.eval_reward.model_dump(), **model_settings(run)}

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The reference."""
        return {"reference": run.done("reference").fingerprint}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Train."""
        assert run.recipe.eval_reward is not None
        objective = self.objective(run)
        model = adapted(run, run.load(run.reference_model), run.recipe.model.adapter)
        sets = tables(run, model.template(run.style))
        rows = referenced(run, trained_on(objective, sets.part("eval_reward"), run.display.line))
        facts = fit_stage(
            run,
            folder,
            model,
            objective,
            rows,
            run.recipe.eval_reward.training,
            eval_rows=referenced(run, sets.eval),
            reference=frozen_reference(run, objective, model),
        )
        return {**scored_by(run), **facts}

    def checks(self, run: Run) -> Checks:
        """An objective that needs no scores."""
        table = run.recipe.eval_reward
        if table is None:
            return {}
        return {"eval_reward.objective": lambda: check_objective_without_scores(self.title, table.objective)}

    def planned(self, run: Run, template: Template) -> Training:
        """The pairs that nothing else has seen."""
        sets, table = tables(run, template), run.recipe.eval_reward
        assert table is not None
        return Training(
            self.name,
            self.key,
            table.training,
            sets.eval_reward,
            self.objective(run),
            run.recipe.model.adapter,
            self.start(run.recipe),
            eval=sets.eval,
        )
