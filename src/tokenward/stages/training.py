"""The SFT stage, the eval reward stage, and what all training stages share."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers.trainer_utils import IntervalStrategy

from tokenward.api.prepare import WithReference, prepare_rows
from tokenward.api.training import fit_model
from tokenward.artifacts import StageFolder
from tokenward.config import EvalRewardTable, Recipe, SftTable
from tokenward.distributed import any_of, is_first
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel, absolute_name
from tokenward.models.sharding import is_unread
from tokenward.objectives import SFT, Objective
from tokenward.sampling import Reply, sample_replies
from tokenward.sampling.rollouts import Context
from tokenward.scoring.join import compute_column, with_reference
from tokenward.scoring.store import TokenStore
from tokenward.stages.base import Checks, Training, TrainingStage
from tokenward.stages.other_tokens import judge_start
from tokenward.stages.part_checks import check_objective_without_scores
from tokenward.stages.run import Run
from tokenward.stages.tables import eval_comparisons, pairs_fingerprint, tables
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template
from tokenward.training.arguments import TokenTrainingArguments, check_batches, training_arguments
from tokenward.training.callbacks import SAMPLES, AnswerPrompts
from tokenward.training.checkpoints import checkpoints_of, damaged_checkpoints
from tokenward.training.engines import cuts_weights
from tokenward.training.trackers import tracker_defaults


class FixedPrompt(NamedTuple):
    """A prompt that is answered during training."""

    key: str
    text: str
    ids: Sequence[int]


def eval_prompts(run: Run, template: Template) -> list[FixedPrompt]:
    """The first prompts that the evaluation replies to; empty without eval rows."""
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
    """A callback that answers prompts during training, or None if there are no prompts.

    Replies are sampled as in the evaluation, with the weights of the moment and the recipe's seed.
    """
    table, context = run.recipe.evaluation, run.limits.context
    prompts = [item for item in prompts if context is None or len(item.ids) + table.max_new_tokens <= context]
    if not prompts:
        return None
    template, settings = model.template(run.style), run.reply_settings

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
    """Facts with which a scorer of texts can reproduce the run's scores from any folder."""
    return {
        "reference": absolute_name(run.reference_model),
        **run.style.facts(),
        "dtype": run.recipe.model.dtype,
        "attention": run.recipe.model.attention,
        "precision": run.recipe.scores.precision,
    }


def model_settings(run: Run) -> dict[str, Any]:
    """The keys outside a stage's own table that determine the model it trains."""
    table = run.recipe.model
    model = {"dtype": table.dtype, "adapter": table.adapter, "packing": table.packing}
    if table.head_mlp is not None:
        model["head_mlp"] = table.head_mlp
    return {"model": model, "seed": run.recipe.seed}


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
    """Train a model with a ``training`` table of the recipe, in the folder of a stage; returns facts for its manifest.

    Args:
        run: The run.
        stage: Folder of the stage; training resumes from a checkpoint in it.
        model: The model before training.
        objective: The training objective.
        rows: Prepared training rows.
        table: The recipe's ``training`` table.
        defaults: Values for keys that the table leaves out.
        eval_rows: Eval rows for ``eval_strategy``.
        more: Further arguments of :func:`tokenward.api.training.fit_model`.

    Raises:
        UserError: as there; or the table evaluates and there are no eval rows.
    """
    arguments = _arguments(run, stage, {**defaults, **table})
    where, checkpoints = f"{stage.path.name}.training", Path(str(arguments.output_dir))
    if not eval_rows and arguments.eval_strategy != IntervalStrategy.NO:
        raise UserError(
            f"eval_strategy is {IntervalStrategy(arguments.eval_strategy).value}, but there are no eval rows. Add rows to data.eval, or write "
            "eval_strategy: no.",
            code="no-eval-rows",
            key=f"{where}.eval_strategy",
        )
    check_batches(table, len(rows), where)
    _, facts = fit_model(
        model,
        objective,
        rows,
        arguments,
        stage.path,
        freeze=lambda trained: run.load(trained.name, cut=cuts_weights(arguments)),
        seed=run.recipe.seed,
        eval_rows=eval_rows,
        style=run.style,
        display=run.display,
        where=where,
        reference_precision=run.recipe.scores.precision,
        **more,
    )
    if is_first():
        unneeded, kept = damaged_checkpoints(checkpoints), "save_strategy" in table
        if not kept:  # they are only needed to resume
            unneeded += checkpoints_of(checkpoints)
        # A tracker may have written its files beside them.
        alone = not kept and len(unneeded) == len([*checkpoints.iterdir()])
        stage.temporary.extend([checkpoints] if alone else unneeded)
    return facts


def _arguments(run: Run, stage: StageFolder, table: Mapping[str, Any]) -> TokenTrainingArguments:
    return training_arguments(
        {**tracker_defaults(stage), **table},
        folder=stage.path / "checkpoints",
        seed=run.recipe.seed,
        where=f"{stage.path.name}.training",
        device=run.recipe.model.device,
    )


def load_to_train(run: Run, name: str, stage: StageFolder, table: Mapping[str, Any] | None) -> LanguageModel:
    """The model that a stage trains by a ``training`` table; only the first process reads it if the training cuts its weights."""
    return run.load(name, cut=cuts(run, stage, table))


def cuts(run: Run, stage: StageFolder, table: Mapping[str, Any] | None) -> bool:
    """Whether the training of a stage cuts its model's weights among the processes."""
    return cuts_weights(_arguments(run, stage, table or {}))


def reference_of(run: Run, start: LanguageModel, *, prompted: bool = False) -> WithReference:
    """Adds the log-probabilities of a model before its training: those of the reference stage, if it is that model.

    Args:
        run: The run.
        start: The model before training.
        prompted: Whether the rows have another prompt than those of the reference stage.
    """
    if start.fingerprint == run.done("reference").inputs["model"] and not prompted:
        return lambda rows: with_reference(rows, TokenStore(run.path("reference")))

    def compute(rows: TokenTable) -> TokenTable:
        whole = run.load(start.name) if any_of(is_unread(start.model)) else start
        with run.display.progress("reference", len(rows.responses)) as bar:
            column = compute_column(rows, whole, progress=bar.advance, shared=True, **run.passes)
        return rows.with_column("reference_logp", column)

    return compute


class SftStage(TrainingStage):
    """Fine-tune all weights on the best response of each prompt; ``model.adapter`` does not apply."""

    name, key, title = "sft", "sft", "the SFT model"

    def table(self, recipe: Recipe) -> SftTable | None:
        """The table ``sft``."""
        return recipe.sft

    def objective(self, run: Run) -> Objective:
        """Mean negative log-likelihood of the tokens."""
        return SFT()

    def adapter(self, recipe: Recipe) -> tuple[str, dict[str, Any] | None]:
        """None: the stages that follow start from a whole model."""
        return "", None

    def unpaired_problem(self, run: Run) -> str:
        """It trains on good responses, paired or unpaired."""
        return ""

    def settings(self, run: Run) -> Mapping[str, Any]:
        """The table and the number type."""
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
            "data": run.done("data").identity,
            "pairs": pairs_fingerprint(run, run.tokenizer_template(name)),
            "model": run.fingerprint_of(name),
        }

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Train."""
        assert run.recipe.sft is not None
        model = load_to_train(run, run.whole(run.recipe.model.name), folder, run.recipe.sft.training)
        template = model.template(run.style)
        sets = tables(run, template)
        return fit_stage(
            run,
            folder,
            model,
            SFT(),
            sets.part("train").best_once(),
            run.recipe.sft.training,
            eval_rows=sets.eval.best_once(),
            watch=lambda trained: watching(run, trained, eval_prompts(run, template), folder.path),
        )

    def planned(self, run: Run, template: Template) -> Training:
        """The best response of each prompt."""
        sets = tables(run, template)
        return self.plan(run, sets.train.best_once(), eval=sets.eval.best_once(), watched=True)


class EvalRewardStage(TrainingStage):
    """Train a second oracle, which evaluates the policy."""

    name, key, title = "eval_reward", "eval_reward", "the eval reward model"

    def table(self, recipe: Recipe) -> EvalRewardTable | None:
        """The table ``eval_reward``."""
        return recipe.eval_reward

    def start(self, recipe: Recipe) -> str:
        """The reference."""
        return recipe.oracle.model or recipe.model.name

    def settings(self, run: Run) -> Mapping[str, Any]:
        """The table and the model settings."""
        assert run.recipe.eval_reward is not None
        return {"eval_reward": run.recipe.eval_reward.model_dump(), **model_settings(run)}

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The reference, or the model that the policy starts from if that has other tokens."""
        start, found = judge_start(run), {"reference": run.done("reference").identity}
        return found if start == run.reference_model else {**found, "model": run.fingerprint_of(start)}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Train."""
        assert run.recipe.eval_reward is not None
        start = load_to_train(run, judge_start(run), folder, run.recipe.eval_reward.training)
        sets = tables(run, start.template(run.style))
        ready = prepare_rows(
            sets.part("eval_reward"),
            sets.eval,
            objective=self.objective(run),
            with_reference=reference_of(run, start),
            say=run.display.line,
        )
        facts = fit_stage(
            run,
            folder,
            start,
            ready.objective,
            ready.rows,
            run.recipe.eval_reward.training,
            eval_rows=ready.eval,
            adapter=run.recipe.model.adapter,
        )
        return {**scored_by(run), "reference": absolute_name(start.name), **facts}

    def checks(self, run: Run) -> Checks:
        """The objective must not read scores."""
        table = run.recipe.eval_reward
        if table is None:
            return {}
        return {"eval_reward.objective": lambda: check_objective_without_scores(self.title, table.objective)}

    def planned(self, run: Run, template: Template) -> Training:
        """The pairs that no other stage has seen."""
        sets = tables(run, template)
        return self.plan(run, sets.eval_reward, eval=sets.eval)
