"""Learns the reward in the alternating loop: new samples, a short training, the best evaluation kept."""

import time
from functools import partial
from typing import Any

import torch
from transformers import PrinterCallback
from transformers.trainer_utils import IntervalStrategy, align_special_tokens

from tokenward.api.constant import CHECKED_REWARDS, warn_of_rewards
from tokenward.artifacts import StageFolder
from tokenward.distributed import mean_over, place
from tokenward.errors import UserError
from tokenward.models.reward import RewardModel
from tokenward.objectives import OBJECTIVES, Objective, PlackettLuce, objective_of
from tokenward.sampling.rollouts import Context, Ranked, chosen, seed_of
from tokenward.stages.run import Run
from tokenward.stages.tasks import Task
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.segments import with_segments
from tokenward.training.arguments import TokenTrainingArguments, training_arguments
from tokenward.training.callbacks import EarlyStop, KeepBest, ShowProgress
from tokenward.training.trackers import own_record, tracker_defaults
from tokenward.training.trainer import TokenTrainer

DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 5.0,
}
"""Training defaults of the reward and the online policy, from the published code (TLM, arXiv 2306.00398)."""
SAME_AS_POLICY = ("bf16", "fp16")
"""Fields that the reward takes from the policy: accelerate has one mixed precision per process."""


class RewardLearner:
    """Learns the reward from samples of the current policy.

    Args:
        run: The run.
        stage: Folder of the online stage.
        reward: The reward model; trained in place.
        task: Prompts, sampler and source.
    """

    def __init__(self, run: Run, stage: StageFolder, reward: RewardModel, task: Task) -> None:
        self._run, self._stage, self._reward, self._task, self._table = run, stage, reward, task, run.online
        self._objective = reward_objective(run)
        # transformers' Trainer writes these into the configuration. A resumed run that learns no reward any more saves
        # the same folder only if they are written here as well.
        align_special_tokens(reward.model, reward.tokenizer)
        # A copy takes as much memory as the model, so it is only made for a fresh start.
        self._initial = (
            {name: value.detach().cpu().clone() for name, value in reward.model.named_parameters()}
            if run.online.restart == "fresh"
            else None
        )

    def __call__(self, phase: int, step: int) -> dict[str, Any]:
        """Learn the reward; returns facts for the log.

        Raises:
            UserError: all samples of every prompt are tied.
        """
        begun, table = time.monotonic(), self._table
        if phase and self._initial is not None:
            with torch.no_grad():
                for name, value in self._reward.model.named_parameters():
                    value.copy_(self._initial[name])
        arguments = self._arguments(phase)
        per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        number = table.reward_groups or table.reward_steps * per_step * place().count
        groups = self._samples(phase, "train", self._task.train, number)
        eval_rows: list[TokenRow] = []
        if table.reward_evals:
            eval_rows = self._samples(phase, "development", self._task.development, table.development).rows
        if not eval_rows:  # no evaluation was requested, or all development groups are tied
            arguments.eval_strategy = IntervalStrategy.NO
        facts = self._fit(arguments, groups.rows, eval_rows)
        rows, run = groups.rows[:CHECKED_REWARDS], self._run
        warn_of_rewards(self._reward, rows, run.display.line, **run.passes)
        return {
            "groups": len(groups.rows),
            "development_groups": len(eval_rows),
            **({"dropped": groups.counts} if groups.counts else {}),
            "sample_score": groups.mean,
            **facts,
            "seconds": round(time.monotonic() - begun, 1),
        }

    def _arguments(self, phase: int) -> TokenTrainingArguments:
        recipe, policy = self._run.recipe, self._table.training
        table = {
            **DEFAULTS,
            **tracker_defaults(self._stage, f"reward-{phase}"),
            **{name: policy[name] for name in SAME_AS_POLICY if name in policy},
            **recipe.reward.training,
            "max_steps": self._table.reward_steps,
            "seed": seed_of(recipe.seed, "reward", phase) % 2**31,
        }
        if self._table.reward_evals:
            every = max(1, self._table.reward_steps // self._table.reward_evals)
            table |= {"eval_strategy": "steps", "eval_steps": every}
        return training_arguments(
            table,
            folder=self._stage.path / "reward_learning",
            seed=recipe.seed,
            where="reward.training",
            device=recipe.model.device,
        )

    def _samples(self, phase: int, part: str, contexts: list[Context], count: int) -> Ranked:
        seed, samples = seed_of(self._run.recipe.seed, "samples", phase, part), self._table.samples
        picked = contexts if part == "development" and len(contexts) <= count else None
        picked = picked or [contexts[index] for index in chosen(count, len(contexts), seed)]
        total, progress = len(picked) * samples, partial(self._run.display.progress, brief=True)
        with progress(f"samples, {part}", total) as drawn, progress(f"ranking, {part}", total) as scored:
            found = self._task.samples.ranked(
                picked, count=samples, seed=seed, drawn=drawn.advance, scored=scored.advance
            )
        if not found.rows and part == "train":
            raise UserError(
                f"the reward cannot be learned: all {len(picked)} groups of {samples} samples are tied. Check that the source "
                "distinguishes them, raise online.samples, or sample with a higher temperature.",
                code="all-tied",
                key="online.source",
            )
        unit, tokenizer = self._reward.settings.unit, self._reward.tokenizer
        return found._replace(rows=[with_segments(unit, tokenizer, row) for row in found.rows])

    def _fit(
        self, arguments: TokenTrainingArguments, rows: list[TokenRow], eval_rows: list[TokenRow]
    ) -> dict[str, Any]:
        model = self._reward.model
        best = KeepBest(model, larger_is_better=False, patience=self._table.reward_patience)
        trainer = TokenTrainer(
            self._reward,
            self._objective,
            arguments,
            rows,
            eval_rows=eval_rows or None,
            callbacks=[EarlyStop(best)],
        )
        trainer.remove_callback(PrinterCallback)
        with self._run.display.progress("reward", arguments.max_steps, brief=True) as bar, own_record():
            trainer.add_callback(ShowProgress(bar))
            result = trainer.train()
        # accelerate wraps forward in the mixed precision of training. Rewards are computed in the precision of scores,
        # also by a resumed run whose reward was learned in an earlier process.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(model).pop(name, None)
        best.restore()
        model.eval()
        evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        kept = next((entry for entry in evaluations if entry["step"] == best.step), {})
        figures = {
            "development_loss": kept.get("eval_loss"),
            "development_accuracy": kept.get("eval_rank/accuracy"),
        }
        return {
            "steps": trainer.state.global_step,
            "loss": mean_over(result.training_loss),
            **{name: value for name, value in figures.items() if value is not None},
            **({"best_step": best.step} if evaluations else {}),
        }


def reward_objective(run: Run) -> Objective:
    """The objective of the reward.

    Raises:
        UserError: it is an objective of a policy.
    """
    table = run.recipe.reward.objective
    objective = objective_of("objective", table, run.recipe.seed)
    if table.name in OBJECTIVES and not isinstance(objective, PlackettLuce):
        raise UserError(
            f"the objective {table.name} trains a policy, and a reward is learned from ranked lists. Use "
            '{name: plackett_luce}, or "module:Name" for a custom objective.',
            code="wrong-objective",
            key="reward.objective",
        )
    return objective
