"""A thin subclass of transformers' Trainer: log-probabilities, weights, an objective, one denominator.

It knows nothing about how weights were made. Checkpoints, resume, schedules, distribution, PEFT and
trackers are transformers' and accelerate's.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

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

COUNT, LOSS = "comparisons", "loss/comparison"
"""Sums that are kept beside those of the objective's metrics."""


class Pass(NamedTuple):
    """Comparisons that go through the model together, where they came from, and which of them count."""

    batch: TokenBatch
    sources: Sequence[str]
    counts: Tensor


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
        self._closing: StepBatch | None = None
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
        """Comparisons in the whole optimizer step, over all micro-batches and processes, none twice."""
        self._closing = batch_samples[-1] if batch_samples and self._data_ends else None
        own = sum(self._own_rows(batch, closing=batch is self._closing) for batch in batch_samples)
        count = torch.tensor(own, device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()  # type: ignore[union-attr]
        return count

    @property
    def _data_ends(self) -> bool:
        """Whether the batch that was read last is the last one of the data."""
        return self.accelerator.gradient_state.end_of_dataloader

    def _own_rows(self, batch: StepBatch, *, closing: bool) -> int:
        """How many of a batch's first rows are its own.

        In the last batch of the data accelerate repeats rows from the beginning, so that every process
        has as many; these must count nowhere.
        """
        rest = self.accelerator.gradient_state.remainder
        if not closing or rest <= 0:
            return batch.comparisons
        before = self.args.process_index * batch.comparisons
        return min(max(rest - before, 0), batch.comparisons)

    def training_step(  # pyright: ignore[reportIncompatibleMethodOverride]  our collator, our batches
        self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of each pass; returns this micro-batch's share of the step's mean loss."""
        model.train()
        passes = self._passes(inputs, closing=inputs is self._closing)
        # DDP and FSDP average gradients over processes; the denominator already counts them all.
        scale = self.accelerator.num_processes / (num_items_in_batch or inputs.comparisons)
        total = torch.zeros((), device=self.args.device)
        closes_step = self.accelerator.sync_gradients
        for number, item in enumerate(passes, start=1):
            last = number == len(passes)
            self.accelerator.gradient_state._set_sync_gradients(closes_step and last)
            # Gradients of a micro-batch are exchanged once, with its last pass.
            with nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    losses = self.losses(model, item.batch)
                self._stop_if_not_finite(losses.loss, item.sources)
                loss = (losses.loss * item.counts).sum() * scale
                self.accelerator.backward(loss)
            self._record(losses, item.counts, training=True)
            total += loss.detach()
        return total

    def _passes(self, inputs: StepBatch, *, closing: bool) -> list[Pass]:
        """The passes of a batch, as many in every process.

        Under DDP and FSDP a pass is an act of all processes together, so one with fewer passes repeats
        its last, shortest one and counts it as nothing.
        """
        own = self._own_rows(inputs, closing=closing)
        inputs = inputs.to(self.args.device)
        passes = [
            Pass(batch, sources, torch.tensor([place < own for place in places], device=self.args.device))
            for batch, sources, places in zip(inputs.passes, inputs.sources, inputs.places, strict=True)
        ]
        if self.args.world_size == 1:
            return passes
        most = self.accelerator.gather(torch.tensor(len(passes), device=self.args.device)).max()  # type: ignore[union-attr]
        idle = passes[-1]._replace(counts=torch.zeros_like(passes[-1].counts))
        return passes + [idle] * (int(most) - len(passes))

    def _stop_if_not_finite(self, loss: Tensor, sources: Sequence[str]) -> None:
        if bool(loss.isfinite().all()):
            return
        rows = ", ".join(
            source for source, value in zip(sources, loss.tolist(), strict=True) if value - value != 0
        )
        raise UserError(
            f"the loss is not finite at step {self.state.global_step + 1}, for: {rows}. What was saved before "
            "is untouched. Lower training.learning_rate, set training.max_grad_norm, or look at these "
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
        parts = []
        with torch.no_grad():
            for item in self._passes(inputs, closing=self._data_ends):
                with self.compute_loss_context_manager():
                    losses = self.losses(model, item.batch)
                self._record(losses, item.counts, training=False)
                parts.append(losses.loss)
        # transformers averages these over batches; log() puts the mean over comparisons in their place.
        return torch.cat(parts).mean(), None, None

    def _record(self, losses: Losses, counts: Tensor, *, training: bool) -> None:
        """Add up metrics on the device; nothing waits for the numbers until a step logs."""
        sums = self._metrics[training]
        found = {COUNT: counts, LOSS: losses.loss.detach(), **losses.metrics}
        for name, values in found.items():
            total = torch.where(counts, values, torch.zeros_like(values)).sum().float()
            sums[name] = sums.get(name, torch.zeros((), device=values.device)) + total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the collected metrics to what transformers logs."""
        training = "loss" in logs
        if training or any(key.startswith("eval_") for key in logs):
            prefix = "" if training else "eval_"
            for name, value in self._collected(training).items():
                if name == LOSS:
                    # transformers averages batch means; rows of a short last batch would count more.
                    logs |= {} if training else {"eval_loss": value}
                else:
                    logs[f"{prefix}{name}"] = value
        super().log(logs, start_time)

    def _collected(self, training: bool) -> dict[str, float]:
        sums, self._metrics[training] = self._metrics[training], {}
        if not sums:
            return {}
        values = torch.stack([*sums.values()])
        if self.args.world_size > 1:
            values = self.accelerator.reduce(values)  # type: ignore[assignment]
        totals = dict(zip(sums, torch.as_tensor(values).tolist(), strict=True))
        count = totals.pop(COUNT)
        return {name: total / count for name, total in totals.items()}

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
            if isinstance(value, float) and (
                isinstance(module, nn.modules.dropout._DropoutNd) or "drop" in name
            ):
                setattr(module, name, 0.0)
