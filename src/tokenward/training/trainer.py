"""A thin subclass of transformers' Trainer: log-probabilities, weights, an objective, one denominator.

It knows nothing about how weights were made. Checkpoints, resume, schedules, distribution, PEFT and
trackers are transformers' and accelerate's.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from tokenward.errors import UserError
from tokenward.models.forward import token_logprobs
from tokenward.models.loading import LanguageModel
from tokenward.objectives.base import Losses, Objective
from tokenward.tokens.rows import TokenBatch, TokenRow
from tokenward.training.arguments import TrainingArguments
from tokenward.training.collator import Collator, StepBatch, Weigh


class Rows(Dataset[TokenRow]):
    """A list of rows as torch wants it."""

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TokenRow:
        return self.rows[index]


class TokenTrainer(Trainer):
    """Trains a policy with an objective over weighted tokens.

    The loss of an optimizer step is the mean over all its comparisons, however they are cut into
    micro-batches, passes and processes.

    Args:
        model: The policy, with its tokenizer and layout.
        objective: Log-probabilities and weights to one loss per comparison.
        arguments: See :class:`tokenward.training.arguments.TrainingArguments`.
        rows: Training comparisons with weights, and reference values where the objective needs them.
        held_out: Comparisons for evaluation during training.
        weigh: Weights that depend on the batch; see :class:`tokenward.training.collator.Collator`.
        callbacks: transformers' callbacks.
    """

    def __init__(
        self,
        model: LanguageModel,
        objective: Objective,
        arguments: TrainingArguments,
        rows: Sequence[TokenRow],
        *,
        held_out: Sequence[TokenRow] | None = None,
        weigh: Weigh | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_rows(objective, rows)
        if arguments.disable_dropout:
            disable_dropout(model.model)
        self.objective = objective
        self.head = model.head
        self._metrics: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        self._counts: dict[bool, int] = defaultdict(int)
        super().__init__(
            model=model.model,
            args=arguments,
            data_collator=Collator(
                layout=model.layout,
                pad_id=model.pad_id,
                tokens_per_forward=arguments.tokens_per_forward,
                weigh=weigh,
            ),  # type: ignore[arg-type]
            train_dataset=Rows(rows),
            eval_dataset=Rows(held_out) if held_out else None,
            processing_class=model.tokenizer,
            callbacks=callbacks,
        )
        # The loss below is divided by the whole step's comparisons; transformers must not divide it again.
        self.loss_is_scaled_for_ga = True

    def losses(self, model: nn.Module, batch: TokenBatch) -> Losses:
        """Unreduced losses of one pass."""
        return self.objective(token_logprobs(model, self.head, batch), batch)

    def _get_num_items_in_batch(self, batch_samples: list[StepBatch], device: torch.device) -> Tensor:
        """Comparisons in the whole optimizer step, over all micro-batches and processes."""
        count = torch.tensor(sum(batch.comparisons for batch in batch_samples), device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()  # type: ignore[union-attr]
        return count

    def training_step(  # pyright: ignore[reportIncompatibleMethodOverride]  our collator, our batches
        self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of each pass; returns this micro-batch's share of the step's mean loss."""
        model.train()
        inputs = inputs.to(self.args.device)
        # DDP and FSDP average gradients over processes; the denominator already counts them all.
        scale = self.accelerator.num_processes / (num_items_in_batch or inputs.comparisons)
        total = torch.zeros((), device=self.args.device)
        passes = self._as_many_everywhere(inputs)
        closes_step = self.accelerator.sync_gradients
        for number, (batch, sources, counts) in enumerate(passes, start=1):
            last = number == len(passes)
            self.accelerator.gradient_state._set_sync_gradients(closes_step and last)
            # Gradients of a micro-batch are exchanged once, with its last pass.
            with nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    losses = self.losses(model, batch)
                if counts:
                    self._stop_if_not_finite(losses.loss, sources)
                    self._record(losses, training=True)
                loss = losses.loss.sum() * (scale if counts else 0.0)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _as_many_everywhere(self, inputs: StepBatch) -> list[tuple[TokenBatch, Sequence[str], bool]]:
        """The passes, with their sources and whether they count: as many in every process.

        Under DDP and FSDP a pass is an act of all processes together, so one with fewer passes repeats
        its last, shortest one and counts it as nothing.
        """
        passes = [(*item, True) for item in zip(inputs.passes, inputs.sources, strict=True)]
        if self.args.world_size == 1:
            return passes
        own = torch.tensor(len(passes), device=self.args.device)
        most = int(self.accelerator.gather(own).max())  # type: ignore[union-attr]
        idle = (inputs.passes[-1], inputs.sources[-1], False)
        return passes + [idle] * (most - len(passes))

    def _stop_if_not_finite(self, loss: Tensor, sources: Sequence[str]) -> None:
        if bool(loss.isfinite().all()):
            return
        rows = ", ".join(
            source for source, value in zip(sources, loss.tolist(), strict=True) if value - value != 0
        )
        raise UserError(
            f"the loss is not finite at step {self.state.global_step + 1}, for: {rows}. The weights of the last "
            "checkpoint are untouched. Lower training.learning_rate, set training.max_grad_norm, or look at these "
            "rows with tokenward data RECIPE."
        )

    def prediction_step(  # pyright: ignore[reportIncompatibleMethodOverride]  as above
        self,
        model: nn.Module,
        inputs: StepBatch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, None, None]:
        """Mean loss of one evaluation batch; metrics are collected for :meth:`log`."""
        inputs = inputs.to(self.args.device)
        parts = []
        with torch.no_grad():
            for batch, _, counts in self._as_many_everywhere(inputs):
                with self.compute_loss_context_manager():
                    losses = self.losses(model, batch)
                if counts:
                    self._record(losses, training=False)
                    parts.append(losses.loss)
        return torch.cat(parts).mean(), None, None

    def _record(self, losses: Losses, *, training: bool) -> None:
        """Add up metrics on the device; nothing waits for the numbers until a step logs."""
        sums = self._metrics[training]
        for name, values in {"loss/comparison": losses.loss.detach(), **losses.metrics}.items():
            sums[name] = sums.get(name, torch.zeros((), device=values.device)) + values.sum()
        self._counts[training] += len(losses.loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the collected metrics to what transformers logs."""
        training = "loss" in logs
        if training or any(key.startswith("eval_") for key in logs):
            prefix = "" if training else "eval_"
            for name, value in self._collected(training).items():
                if name == "loss/comparison":
                    # transformers averages batch means; rows of a short last batch would count more.
                    logs |= {} if training else {"eval_loss": value}
                else:
                    logs[f"{prefix}{name}"] = value
        super().log(logs, start_time)

    def _collected(self, training: bool) -> dict[str, float]:
        sums, count = self._metrics[training], self._counts[training]
        self._metrics[training], self._counts[training] = {}, 0
        if not count:
            return {}
        values = torch.stack(
            [*sums.values(), torch.tensor(float(count), device=next(iter(sums.values())).device)]
        )
        if self.args.world_size > 1:
            values = self.accelerator.reduce(values)  # type: ignore[assignment]
        *totals, everyone = torch.as_tensor(values).tolist()
        return {name: total / everyone for name, total in zip(sums, totals, strict=True)}

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: transformers' formula counts neither shared prompts nor skipped heads."""
        return 0


def check_rows(objective: Objective, rows: Sequence[TokenRow]) -> None:
    """Refuse rows that the objective cannot train on.

    Raises:
        UserError: reference values are missing, or a row is not a pair with the better response first.
    """
    for row in rows:
        comparison = row.encoded.comparison
        if objective.needs_reference and row.reference_logp is None:
            raise UserError(
                f"{type(objective).__name__} compares with a reference, but {comparison.source} has no reference "
                "log-probabilities. Run the reference stage first (tokenward oracle RECIPE does)."
            )
        if objective.pairwise and (len(comparison.ranks) != 2 or comparison.ranks[0] >= comparison.ranks[1]):
            raise UserError(
                f"{type(objective).__name__} is over pairs with the better response first, but {comparison.source} has "
                f"ranks {list(comparison.ranks)}. Make pairs of it by data.pairs: best_worst, all or adjacent."
            )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, also those that attention layers keep as a plain number."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (isinstance(module, nn.modules.dropout._DropoutNd) or "drop" in name):
                setattr(module, name, 0.0)
