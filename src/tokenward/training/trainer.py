"""A thin subclass of transformers' Trainer for objectives over weighted tokens.

It knows nothing about how weights were made. Checkpoints, resume, schedules, distribution, PEFT and trackers are left to
transformers and accelerate. It is a subclass rather than a ``compute_loss_func`` because a batch is cut into several
passes, and the denominator counts all comparisons of the step; neither fits into a loss of one forward pass.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import SkipBatchSampler
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from tokenward.distributed import agree, first_alone
from tokenward.errors import UserError, no_exit
from tokenward.models.base import TokenModel, layout_of_both
from tokenward.models.loading import LanguageModel
from tokenward.models.sharding import reshard
from tokenward.objectives.base import Losses, Objective, needs_of, title_of
from tokenward.objectives.custom import check_declared
from tokenward.tokens.batches import Batch
from tokenward.tokens.rows import TokenRow
from tokenward.training.arguments import TokenTrainingArguments
from tokenward.training.callbacks import save_trained
from tokenward.training.checkpoints import (
    FILES,
    checkpoint_damage,
    damaged_checkpoints,
    last_whole_checkpoint,
)
from tokenward.training.checks import (
    FiniteLosses,
    after,
    check_gradient,
    check_rows,
    check_scored,
    check_weights,
    disable_dropout,
    diverging,
)
from tokenward.training.engines import (
    WeightsSpread,
    backward,
    between_passes,
    check_cut,
    check_engine,
    complete_deepspeed,
    finish,
    keep_gradients_in_parts,
    prepare_reference,
    reads_universal,
    spread_weights,
    whole_weights,
    written_kind,
)
from tokenward.training.metrics import LOSS, MetricSums
from tokenward.training.objective_modules import ObjectiveModules
from tokenward.training.origin import check_origin, record_origin
from tokenward.training.passes import (
    Collator,
    Pass,
    Prepare,
    StepBatch,
    StepDenominator,
    StepDraw,
    StepSelections,
    check_divisible,
    frozen_reference,
)
from tokenward.training.resume import check_resumable, translated
from tokenward.training.trackers import place_event_files


@contextmanager
def _keeping_use_cache(module: nn.Module) -> Iterator[None]:
    """Keep ``use_cache`` of a model's configuration, which transformers' Trainer sets to False.

    It would be saved with the model, whose replies would then be generated without a cache. Training needs no setting: its
    passes ask for no cache.
    """
    config = getattr(module, "config", None)  # only transformers' models have one
    before = (
        {} if config is None else {name: value for name, value in vars(config).items() if name == "use_cache"}
    )
    yield
    if config is not None:
        vars(config).pop("use_cache", None)
        vars(config).update(before)


def _check_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files are not those that were written into it."""
    problem = first_alone(lambda: checkpoint_damage(checkpoint))
    if problem:
        raise UserError(
            f"{checkpoint} is damaged: {problem}. Use an older checkpoint: resume_from_checkpoint=True finds the newest whole one, or begins "
            f"again. If you changed the file on purpose, remove {checkpoint / FILES}.",
            code="damaged-checkpoint",
        )


class TokenTrainer(Trainer):
    """Trains a policy, or a token reward model, with an objective over weighted tokens.

    The loss of an optimizer step is the mean over its comparisons, or their sum over the objective's own denominator
    (:class:`tokenward.objectives.base.Losses`), however the step is cut into micro-batches, passes and processes.

    Args:
        model: The model to train; it gives one number per token.
        objective: Computes one loss per comparison from those numbers and the weights.
        arguments: Training arguments.
        rows: Training comparisons with weights, and with reference values if the objective needs them.
        eval_rows: Comparisons for evaluation during training.
        prepare: Called with this process's rows of an optimizer step just before they train, for weights or samples
            that depend on the current policy. Eval rows are used as they are.
        reference: The frozen reference model, for objectives that compare over the whole vocabulary or the layers. A
            policy with a new adapter is its own reference, with the adapter switched off; for an adapter that was trained
            before, pass the reference.
        callbacks: transformers' callbacks.
    """

    def __init__(
        self,
        model: TokenModel,
        objective: Objective,
        arguments: TokenTrainingArguments,
        rows: Sequence[TokenRow],
        *,
        eval_rows: Sequence[TokenRow] | None = None,
        prepare: Prepare | None = None,
        reference: LanguageModel | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_declared(objective)
        check_cut(model.model, arguments)
        if prepare is None:
            check_rows(objective, rows)
        if arguments.disable_dropout:
            disable_dropout(model.model)
        if reference is not None:  # both read the same batches
            model = replace(model, layout=layout_of_both(model, reference))
        self.objective = objective
        self.token_model = model
        self.needs = needs_of(objective)
        self.objective_modules = ObjectiveModules(model, objective, arguments.seed)
        self.seen: Counter[str] = Counter()
        self._prepare = prepare
        self._collator = Collator(
            layout=model.layout,
            pad_id=model.pad_id,
            start_id=model.start_id,
            whole=model.reads_whole,
            tokens_per_forward=arguments.tokens_per_forward,
        )
        self._metrics = {True: MetricSums(), False: MetricSums()}
        self._denominator = StepDenominator(self._over_processes)
        self._finite, self._draw = FiniteLosses(arguments.learning_rate), StepDraw(objective)
        self._last_batch: StepBatch | None = None
        self._step: list[StepBatch] = []
        self._step_passes: list[list[Pass]] = []
        # An earlier training may have cut the model, and an optimizer must not get gathered copies of its weights.
        reshard(model.model)
        with _keeping_use_cache(model.model):
            super().__init__(
                model=model.model,
                args=arguments,
                data_collator=replace(self._collator, defer=prepare is not None),  # type: ignore[arg-type]
                train_dataset=rows,  # type: ignore[arg-type]  # a DataLoader takes any sequence
                eval_dataset=eval_rows or None,  # type: ignore[arg-type]
                processing_class=model.tokenizer,
                callbacks=[WeightsSpread(model.model), *(callbacks or ())],
            )
        # Only now is the model on the device that it trains on.
        self.reference = frozen_reference(objective, model, reference)
        place_event_files(self, arguments.logging_dir)
        self._selections = StepSelections(
            objective,
            model,
            self.compute_loss_context_manager,
            processes=self.args.world_size,
            process=self.args.process_index,
        )
        check_divisible(objective, optimizer=str(arguments.optim))
        check_engine(self.accelerator, arguments)
        if arguments.world_size > 1:
            head = model.head if isinstance(model, LanguageModel) else None
            agree((model.layout, head and head.change), "what the probe of the model found")
        keep_gradients_in_parts(self.accelerator, arguments)
        complete_deepspeed(self.accelerator, arguments)
        frozen = () if self.reference is None else (self.reference.model,)
        spread_weights(self.accelerator, model.model, *frozen)
        self._reference_engine = prepare_reference(self.accelerator, self.reference)
        # training_step divides by all comparisons of the step. Without this, transformers logs the loss divided again by
        # the number of micro-batches.
        self.loss_is_scaled_for_ga = True

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Unreduced losses of one pass."""
        values, tokens = self.token_model.read(model, batch, self.needs, self.reference)
        with no_exit("objective", title_of(self.objective)):
            return self.objective(values, tokens)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Transformers' optimizer, plus the objective's modules with their own learning rates."""
        if self.optimizer is None and self.objective_modules:
            with self.objective_modules.left_out():
                made = super().create_optimizer(model)
            self.objective_modules.join(made)
        return super().create_optimizer(model)

    def _get_num_items_in_batch(self, batch_samples: list[StepBatch], device: torch.device) -> Tensor:
        """Number of comparisons in the optimizer step, over all micro-batches and processes, without repeated rows.

        transformers calls this once per step with all its micro-batches, so it is also where a step begins.
        """
        self._step, self._step_passes = batch_samples, []
        self._draw.begin()
        self._last_batch = batch_samples[-1] if batch_samples and self._data_ends else None
        own = sum(self._own_rows(batch, last=batch is self._last_batch) for batch in batch_samples)
        count = torch.full((), own, device=device)  # torch.tensor would make the host wait for a GPU
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()  # type: ignore[union-attr]
        return count

    @property
    def _data_ends(self) -> bool:
        """Whether the latest batch is the last one of the data."""
        return self.accelerator.gradient_state.end_of_dataloader

    def _own_rows(self, batch: StepBatch, *, last: bool) -> int:
        """How many of a batch's first rows count.

        In the last batch accelerate (``even_batches``) repeats rows from the beginning of the data, so that every process
        has the same number. Repeated rows must not count.
        """
        rest = self._rest
        if not last or rest <= 0:
            return batch.comparisons
        before = self.args.process_index * batch.comparisons
        return min(max(rest - before, 0), batch.comparisons)

    @property
    def _rest(self) -> int:
        """Rows in the last batch of the data, over all processes; 0 or less if it is full."""
        state = self.accelerator.gradient_state
        loader = state.active_dataloader
        if loader is None or not isinstance(loader.batch_sampler, SkipBatchSampler):
            return state.remainder
        # A loader that skips what a resumed training has seen does not know the number of processes.
        whole: Any = self.callback_handler.train_dataloader
        return -1 if self.args.dataloader_drop_last else whole.total_dataset_length % whole.total_batch_size

    def training_step(  # pyright: ignore[reportIncompatibleMethodOverride]  our collator makes other batches
        self, model: nn.Module, inputs: StepBatch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of each pass; returns this micro-batch's share of the step's loss.

        If the objective has its own denominator, the last micro-batch returns the loss of the whole step.
        """
        model.train()
        if hasattr(self.optimizer, "train"):  # a schedule-free optimizer refuses to step in evaluation mode
            self.optimizer.train()  # type: ignore[union-attr]
        passes = self._passes_of_step(model, inputs)
        comparisons = inputs.comparisons if num_items_in_batch is None else num_items_in_batch
        # DDP and FSDP average gradients over processes, but the denominator already counts all of them.
        scale = self.accelerator.num_processes / comparisons
        total = torch.zeros((), device=self.args.device)
        closes_step = self.accelerator.sync_gradients
        for number, item in enumerate(passes, start=1):
            last = number == len(passes)
            # Gradients of a micro-batch are exchanged once, with its last pass.
            with nullcontext() if last else between_passes(self.accelerator, model):
                total += self._backward(model, item, scale, last=closes_step and last)
        if closes_step:
            self.objective_modules.exchange(model)
            factor = None
            if self.needs.own_denominator:
                factor, share = self._denominator.close(comparisons)
                total += share
            finish(model, factor)
        return total

    def _backward(self, model: nn.Module, item: Pass, scale: Tensor | float, *, last: bool) -> Tensor:
        """Forward and backward of one pass; returns its loss, or 0 if that is known only at the end of the step."""
        with self.compute_loss_context_manager():
            losses = self.losses(model, self._draw.add_to(item.batch))
        self._finite.note(losses.loss, item.sources, self.state.global_step + 1)
        loss = (losses.loss * item.counts).sum() * scale
        check_gradient(loss, self.objective)
        backward(self.accelerator, model, loss, last=last)
        self._metrics[True].add(losses, item.counts)
        if losses.denominator is None:
            return loss.detach()
        self._denominator.add(loss, losses, item.counts)
        return torch.zeros_like(loss)

    def _passes_of_step(self, model: nn.Module, inputs: StepBatch) -> list[Pass]:
        """The passes of a micro-batch; what depends on the whole step is computed with its first micro-batch."""
        if self._prepare is None and not self._selections:
            return self._passes(inputs, last=inputs is self._last_batch)
        if not self._step_passes:
            step = zip(self._prepared(self._step), self._step, strict=True)
            passes = [self._passes(batch, last=given is self._last_batch) for batch, given in step]
            self._step_passes = self._selections(model, passes)
        return self._step_passes.pop(0)

    def _passes(self, inputs: StepBatch, *, last: bool) -> list[Pass]:
        """The passes of a batch, the same number in every process.

        A pass under DDP or FSDP is collective: a process with fewer passes would leave the others waiting. It repeats its
        last, shortest pass and counts it as nothing.
        """
        own = self._own_rows(inputs, last=last)
        if self.token_model.model.training:
            self.seen.update(comparisons=own, tokens=inputs.tokens)
        passes = inputs.counting(own, self.args.device)
        if self.args.world_size == 1:
            return passes
        most = self.accelerator.gather(torch.tensor(len(passes), device=self.args.device)).max()  # type: ignore[union-attr]
        idle = passes[-1]._replace(counts=torch.zeros_like(passes[-1].counts))
        return passes + [idle] * (int(most) - len(passes))

    def _prepared(self, step: Sequence[StepBatch]) -> Sequence[StepBatch]:
        """The micro-batches of a step, with rows prepared together and cut into passes if that was deferred."""
        if self._prepare is None:
            return step
        rows = [row for batch in step for row in batch.rows]
        done, rate = self.state.global_step, self.args.learning_rate
        self._check_weights()
        with torch.no_grad(), diverging(after(done, rate)):
            prepared = self._prepare(rows, done)
        self.token_model.model.train()  # sampling from the policy leaves it in evaluation mode
        if len(prepared) != len(rows):
            raise ValueError(f"prepare returned {len(prepared)} rows for {len(rows)}")
        check_rows(self.objective, prepared)
        left = iter(prepared)
        return [self._collator.cut(list(islice(left, batch.comparisons))) for batch in step]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save a checkpoint's weights: only the trained ones of a mostly frozen or non-transformers module."""
        folder = Path(output_dir or str(self.args.output_dir))
        if isinstance(self.model, PreTrainedModel | PeftModel) and self.token_model.whole:
            super()._save(output_dir, state_dict)
        else:
            save_trained(self.token_model.model, folder / "model.safetensors")
        self.objective_modules.save(folder)

    def whole_weights(self) -> dict[str, Tensor] | None:
        """The trained weights from all processes that hold parts of them, see :func:`tokenward.training.engines.whole_weights`."""
        return whole_weights(self.accelerator, cast(nn.Module, self.model_wrapped))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from a checkpoint if one is given.

        A checkpoint of FSDP, of one process and of DDP can be continued with another number of processes, and by the others; one of
        DeepSpeed only as it was begun.

        Raises:
            UserError: the checkpoint is damaged, is of a training on other rows or with another objective, or was written by an engine or
                a number of processes that this training cannot continue from; or losses or weights are not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest()
        if resume_from_checkpoint is None or isinstance(resume_from_checkpoint, bool):
            found = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        else:
            _check_whole(Path(resume_from_checkpoint))
            self._check_origin(Path(resume_from_checkpoint))
            with self._resumable(Path(resume_from_checkpoint)) as folder:
                found = super().train(str(folder), trial, ignore_keys_for_eval)
        self._check_weights()
        return found

    def _check_origin(self, checkpoint: Path) -> None:
        rows = cast(Sequence[TokenRow], self.train_dataset)
        first_alone(lambda: check_origin(checkpoint, rows, self.objective, self.about_samples()))

    def about_samples(self) -> dict[str, str]:
        """What decides on the samples that ``prepare`` makes of the policy and on their rewards, by name; a checkpoint records it."""
        return {}

    def _check_weights(self) -> None:
        check_weights(self.token_model.model, self.state.global_step, self.args.learning_rate)

    def _newest(self) -> str | bool | None:
        """The newest whole checkpoint; None if all were damaged, and True, which transformers refuses, if there was none."""
        folder, with_best = Path(str(self.args.output_dir)), self.args.load_best_model_at_end
        say = logging.getLogger("tokenward").warning

        def look() -> str | bool | None:
            found = last_whole_checkpoint(folder, TRAINER_STATE_NAME, say, with_best=with_best, tidy=False)
            return (None if damaged_checkpoints(folder) else True) if found is None else str(found)

        return first_alone(look)

    @contextmanager
    def _resumable(self, checkpoint: Path) -> Iterator[Path]:
        wanted, processes = written_kind(self.accelerator), self.args.world_size
        check_resumable(checkpoint, wanted, processes, universal=reads_universal(self.accelerator))
        if wanted == "deepspeed":
            yield checkpoint
            return
        self.create_optimizer()  # transformers would make it a little later
        model, optimizer = cast(nn.Module, self.model), cast(torch.optim.Optimizer, self.optimizer)
        with translated(checkpoint, wanted, processes, model, optimizer) as folder:
            yield folder

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model to ``output_dir``, by default that of the arguments. All processes must call this.

        The folder holds the whole weights, also if the processes hold parts of them. Only checkpoints of FSDP with
        ``state_dict_type: SHARDED_STATE_DICT`` hold the parts alone.
        """
        plugin: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        parts_only = _internal_call and plugin is not None and "SHARDED" in str(plugin.state_dict_type)
        weights = None if parts_only else self.whole_weights()
        if weights is None:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.objective_modules.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        _check_whole(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()
        self.objective_modules.load(Path(str(self.state.best_model_checkpoint)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._finite.check()  # weights after a non-finite loss must not be saved
        self._check_weights()
        super()._save_checkpoint(model, trial)
        if self.is_world_process_zero():
            folder = (
                Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )
            rows = cast(Sequence[TokenRow], self.train_dataset)
            record_origin(folder, rows, self.objective, self.about_samples())

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
            given = self._collator.cut(inputs.rows) if inputs.rows else inputs
            (passes,) = self._selections(model, [self._passes(given, last=self._data_ends)])
            for item in passes:
                with self.compute_loss_context_manager():
                    losses = self.losses(model, item.batch)
                self._metrics[False].add(losses, item.counts)
                parts.append(losses.loss)
        return torch.cat(parts).mean(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the collected metrics to what transformers logs."""
        self._finite.check()
        training = "loss" in logs
        if training or any(key.startswith("eval_") for key in logs):
            means = self._metrics[training].take(self._over_processes)
            check_scored(self.objective, means)
            loss, prefix = means.pop(LOSS, None), "" if training else "eval_"
            if loss is not None and not training:
                # transformers averages batch means, so rows of a short last batch would count more.
                logs["eval_loss"] = loss
            logs |= {f"{prefix}{name}": value for name, value in means.items()}
        super().log(logs, start_time)

    def _over_processes(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        return self.accelerator.reduce(values) if self.args.world_size > 1 else values  # type: ignore[return-value]

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: transformers' formula ignores shared prompts and skipped logits."""
        return 0
