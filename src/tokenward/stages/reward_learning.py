"""One time that the reward is learned in the alternating loop: fresh samples, a short training, the best kept."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback
from transformers.trainer_utils import IntervalStrategy, align_special_tokens

from tokenward.api.constant import CHECKED_REWARDS, warn_of_rewards
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
from tokenward.training.trainer import TokenTrainer

DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 5.0,
}
"""Of the published code, for the reward and for the policy (TLM, arXiv 2306.00398)."""
SAME_AS_POLICY = ("bf16", "fp16")
"""accelerate keeps one number type for the whole process, so the two trainings share it."""


class RewardLearner:
    """Learns the reward on samples of the policy of now.

    Args:
        run: The run.
        folder: Where transformers may write.
        reward: The reward model; trained in place.
        task: Prompts, sampler and source.
    """

    def __init__(self, run: Run, folder: Path, reward: RewardModel, task: Task) -> None:
        online = run.recipe.online
        assert online is not None
        self._run, self._folder, self._reward, self._task, self._table = run, folder, reward, task, online
        self._objective = reward_objective(run)
        _configured(reward, self._arguments(0))
        # Only a fresh start needs them; they take as much memory as the model.
        self._initial = (
            {name: value.detach().cpu().clone() for name, value in reward.model.named_parameters()}
            if online.restart == "fresh"
            else None
        )

    def __call__(self, phase: int, step: int) -> dict[str, Any]:
        """Learn; returns what happened, for the log.

        Raises:
            UserError: every group of samples was tied, so there is nothing to learn.
        """
        begun = time.monotonic()
        if phase and self._initial is not None:
            with torch.no_grad():
                for name, value in self._reward.model.named_parameters():
                    value.copy_(self._initial[name])
        arguments = self._arguments(phase)
        per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        number = self._table.reward_groups or self._table.reward_steps * per_step
        groups = self._samples(phase, "train", self._task.train, number)
        eval_rows: list[TokenRow] = []
        if self._table.reward_evals:
            found = self._samples(phase, "development", self._task.development, self._table.development)
            eval_rows = found.rows
        if not eval_rows:  # nothing to look at: every development group was tied, or none was asked for
            arguments.eval_strategy = IntervalStrategy.NO
        facts = self._fit(arguments, groups.rows, eval_rows)
        scores, say = self._run.recipe.scores, self._run.display.line
        warn_of_rewards(
            self._reward,
            groups.rows[:CHECKED_REWARDS],
            say,
            precision=scores.precision,
            tokens_per_batch=scores.tokens_per_batch,
        )
        return {
            "groups": len(groups.rows),
            "development_groups": len(eval_rows),
            **({"dropped": groups.counts} if groups.counts else {}),
            "sample_score": groups.mean,
            **facts,
            "seconds": round(time.monotonic() - begun, 1),
        }

    def _arguments(self, phase: int) -> TokenTrainingArguments:
        policy = self._table.training
        table = {
            **DEFAULTS,
            **{name: policy[name] for name in SAME_AS_POLICY if name in policy},
            **self._run.recipe.reward.training,
            "max_steps": self._table.reward_steps,
            "seed": seed_of(self._run.recipe.seed, "reward", phase) % 2**31,
        }
        if self._table.reward_evals:
            every = max(1, self._table.reward_steps // self._table.reward_evals)
            table |= {"eval_strategy": "steps", "eval_steps": every}
        device = self._run.recipe.model.device
        seed = self._run.recipe.seed
        return training_arguments(
            table, folder=self._folder, seed=seed, where="reward.training", device=device
        )

    def _samples(self, phase: int, part: str, contexts: list[Context], count: int) -> Ranked:
        seed = seed_of(self._run.recipe.seed, "samples", phase, part)
        picked = contexts if part == "development" and len(contexts) <= count else None
        picked = picked or [contexts[index] for index in chosen(count, len(contexts), seed)]
        total = len(picked) * self._table.samples
        progress = self._run.display.progress
        with progress(f"samples, {part}", total) as drawn, progress(f"ranking, {part}", total) as scored:
            found = self._task.samples.ranked(
                picked, count=self._table.samples, seed=seed, drawn=drawn.advance, scored=scored.advance
            )
        if not found.rows and part == "train":
            raise UserError(
                f"the reward cannot be learned: all {len(picked)} groups of {self._table.samples} samples are tied. "
                "The source does not tell them apart: look at it, raise online.samples, or sample with a higher temperature."
            )
        unit, tokenizer = self._reward.settings.unit, self._reward.tokenizer
        return found._replace(rows=[with_segments(unit, tokenizer, row) for row in found.rows])

    def _fit(
        self, arguments: TokenTrainingArguments, rows: list[TokenRow], eval_rows: list[TokenRow]
    ) -> dict[str, Any]:
        best = KeepBest(self._reward.model, larger_is_better=False, patience=self._table.reward_patience)
        trainer = TokenTrainer(
            self._reward,
            self._objective,
            arguments,
            rows,
            eval_rows=eval_rows or None,
            callbacks=[EarlyStop(best)],
        )
        trainer.remove_callback(PrinterCallback)
        with self._run.display.progress("reward", arguments.max_steps) as bar:
            trainer.add_callback(ShowProgress(bar))
            result = trainer.train()
        _leave_number_type(self._reward.model)
        best.restore()
        self._reward.model.eval()
        looks = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        kept = next((entry for entry in looks if entry["step"] == best.step), {})
        figures = {
            "development_loss": kept.get("eval_loss"),
            "development_accuracy": kept.get("eval_rank/accuracy"),
        }
        return {
            "steps": trainer.state.global_step,
            "loss": result.training_loss,
            **{name: value for name, value in figures.items() if value is not None},
            **({"best_step": best.step} if looks else {}),
        }


def reward_objective(run: Run) -> Objective:
    """The objective that the reward is learned with.

    Raises:
        UserError: it is one of those that train a policy.
    """
    table = run.recipe.reward.objective
    objective = objective_of("objective", table, run.recipe.seed)
    if table.name in OBJECTIVES and not isinstance(objective, PlackettLuce):
        raise UserError(
            f"reward.objective is {table.name}, which is over log-probabilities of a policy; a reward is learned from "
            'ranked lists. Write objective: {name: plackett_luce}, or "module:Name" of one of your own.'
        )
    return objective


def _configured(reward: RewardModel, arguments: TokenTrainingArguments) -> None:
    """Write into the reward's configuration what transformers' Trainer writes there.

    A run that is taken up again may learn no reward any more, and yet saves the same folder.
    """
    align_special_tokens(reward.model, reward.tokenizer)
    reward.model.config.use_cache = arguments.use_cache


def _leave_number_type(module: nn.Module) -> None:
    """Undo what accelerate does to a model for mixed precision: its forward stays in the number type of the training.

    Rewards are read in the precision that the recipe names for scores; a run that is taken up again, whose reward
    was learned by an earlier process, would otherwise read them in another one.
    """
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(module).pop(name, None)
