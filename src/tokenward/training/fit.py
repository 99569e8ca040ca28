"""Trains a model in a folder: resume, progress, checkpoints, the finished model."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args
from transformers.trainer import TRAINER_STATE_NAME

from tokenward.artifacts import write_jsonl
from tokenward.display import Display
from tokenward.distributed import first_alone, mean_over
from tokenward.errors import StoppedBySignal
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel, imitates_bfloat16, slow_float32
from tokenward.models.record import record
from tokenward.objectives.base import Objective
from tokenward.objectives.selected import with_entropy
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.template import Style
from tokenward.training.alternating import STATE_FILE, Alternating, stopped_early
from tokenward.training.arguments import TokenTrainingArguments
from tokenward.training.callbacks import (
    AnswerPrompts,
    CheckpointEvery,
    LogSoFar,
    ShowProgress,
    Speed,
    StopOnInterrupt,
)
from tokenward.training.checkpoints import KeepNewest, RecordFiles, last_whole_checkpoint, step_of
from tokenward.training.checks import check_first_batch
from tokenward.training.metrics import DisplacementAlarm, displacement_facts, flat_loss_warning
from tokenward.training.passes import Prepare
from tokenward.training.trackers import own_record
from tokenward.training.trainer import TokenTrainer

CHECKED_ROWS = 4


class Interrupted(StoppedBySignal):
    """Ctrl-C or SIGTERM during training; a checkpoint has been saved."""


def fit(
    model: TokenModel,
    objective: Objective,
    rows: Sequence[TokenRow],
    arguments: TokenTrainingArguments,
    folder: Path,
    *,
    style: Style = Style(),  # noqa: B008  immutable
    eval_rows: Sequence[TokenRow] = (),
    prepare: Prepare | None = None,
    reference: LanguageModel | None = None,
    reference_precision: str = "float32",
    between: Alternating | None = None,
    watch: AnswerPrompts | None = None,
    preview: TrainerCallback | None = None,
    display: Display | None = None,
    where: str = "args",
    resume: bool = True,
) -> dict[str, Any]:
    """Train a model in place; saves it in ``folder/model/`` and the log in ``folder/history.jsonl``.

    The rows, ``prepare`` and ``reference`` are those of :class:`TokenTrainer`. ``arguments.save_total_limit`` is set to None
    and applied here. ``style`` is how the model writes conversations, ``reference_precision`` the precision of the stored
    reference values. ``between`` runs between the steps and adds its state to each checkpoint; ``watch`` answers fixed
    prompts, and ``preview`` looks at the model. Messages call the arguments ``where``. With ``resume``, training continues from the newest checkpoint in
    ``arguments.output_dir``, if there is one.

    Returns:
        Facts: steps, final loss, seconds, speed, memory, and displacement if the objective logs chosen responses.

    Raises:
        UserError: bad settings, a loss that is not finite, or a policy that differs from its reference.
        Interrupted: Ctrl-C or SIGTERM. A checkpoint was saved; the next call continues from it.
    """
    display = Display(quiet=True) if display is None else display
    last_file = TRAINER_STATE_NAME if between is None else STATE_FILE
    interrupt = StopOnInterrupt()
    limit, arguments.save_total_limit = arguments.save_total_limit, None
    callbacks = [
        *(callback for callback in (between, watch, preview) if callback is not None),
        CheckpointEvery(arguments.checkpoint_minutes),
        LogSoFar(folder / "history.jsonl"),
        DisplacementAlarm(arguments.displacement_margin, where, display.line),
        interrupt,
        RecordFiles(),
        KeepNewest(last_file, limit),
    ]
    objective = with_entropy(objective) if arguments.log_entropy else objective
    given: dict[str, Any] = {"eval_rows": eval_rows or None, "prepare": prepare, "reference": reference}
    trainer = TokenTrainer(model, objective, arguments, rows, callbacks=callbacks, **given)
    speed = Speed(trainer.seen)
    trainer.add_callback(speed)
    trainer.remove_callback(PrinterCallback)  # the progress bar shows what is logged
    for hint in _hints(trainer, where):
        display.line(hint)
    # Reference values are stored for all rows or for none; with prepare, they may be made in the step.
    if trainer.needs.reference and rows and rows[0].reference_logp is not None:
        check_when_ready(trainer, rows, reference_precision, display.line)
    checkpoint = _newest(arguments, last_file, display.line) if resume else None
    measured = _train(display, folder.name, trainer, interrupt, checkpoint)
    if between is not None:
        between.finish()
    if watch is not None:
        watch.look(trainer.state.global_step)
    _save(style, model, trainer, folder)
    history = trainer.state.log_history
    if trainer.is_world_process_zero():
        write_jsonl(folder / "history.jsonl", history, ascii=True)
    if warning := flat_loss_warning(history, arguments.learning_rate, where):
        display.line(warning)
    measured |= {**displacement_facts(history, arguments.displacement_margin), **speed.facts()}
    return {"steps": trainer.state.global_step, "rows": len(rows), **measured}


def _newest(arguments: TokenTrainingArguments, last_file: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to continue from; the first process looks for it, because damaged ones get another name."""
    folder, with_best = Path(str(arguments.output_dir)), arguments.load_best_model_at_end
    return first_alone(lambda: last_whole_checkpoint(folder, last_file, say, with_best=with_best))


def _hints(trainer: TokenTrainer, where: str) -> Iterator[str]:
    """Warnings about settings that work but are probably not meant."""
    if trainer.args.bf16 and imitates_bfloat16(trainer.token_model.device):
        yield (
            "  this CPU has no bfloat16 instructions and emulates them, several times slower than float32: "
            f"{where}.bf16=false is faster here"
        )
    if trainer.token_model.dtype == torch.bfloat16 and imitates_bfloat16(trainer.token_model.device):
        yield (
            "  the weights are in bfloat16, which this CPU emulates, several times slower than float32: load the model in float32 "
            "(model.dtype in a recipe) to train faster here"
        )
    args, model = trainer.args, trainer.token_model
    if slow_float32(model.device, model.dtype, half=bool(args.bf16 or args.fp16)) and not args.tf32:
        yield (
            f"  products are in float32, and this GPU is many times faster in bfloat16: write {where}.bf16=true (TRL's default), or "
            f"{where}.tf32=true for products with 10 bits after the point"
        )
    # A warm-up schedule starts at 0, so a single update in it changes nothing.
    if _planned_steps(trainer) == 1 and trainer.args.get_warmup_steps(1) > 0:
        yield (
            "  warning: there is only one update, and its warm-up learning rate is 0, so the model does not change. Set "
            f"{where}.warmup_steps to 0, or train on more pairs or for more epochs"
        )


class _CheckStart(TrainerCallback):
    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if not state.global_step:
            self._check()


def check_when_ready(
    trainer: TokenTrainer, rows: Sequence[TokenRow], reference_precision: str, show: Callable[[str], None]
) -> None:
    """Call :func:`check_start` now, or when the training begins, if only then the model is where it trains.

    FSDP2 and DeepSpeed place and cut the weights at the beginning of the training, and some processes may have none before.
    """

    def check() -> None:
        show(check_start(trainer, rows, reference_precision))

    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.add_callback(_CheckStart(check))
    else:
        check()


def check_start(trainer: TokenTrainer, rows: Sequence[TokenRow], reference_precision: str = "float32") -> str:
    """Compare the untrained policy with its reference by :func:`check_first_batch`; returns a line for the screen."""
    coarse = trainer.args.bf16 or reference_precision == "bfloat16"
    found = check_first_batch(
        trainer.token_model,
        trainer.objective,
        [rows[number] for number in range(min(CHECKED_ROWS, len(rows)))],
        precision=torch.bfloat16 if coarse else trainer.token_model.dtype,
        reference=trainer.reference,
    )
    ln2 = math.log(2)
    loss = f"loss {found['loss']:.4f} (starts at ln 2 = {ln2:.4f}), "
    shown = loss if abs(found["begins"] - ln2) < 1e-4 else ""
    return f"  first rows: {shown}margin {found['margin']:.4f} nats: policy = reference"


def _train(
    display: Display, name: str, trainer: TokenTrainer, interrupt: StopOnInterrupt, checkpoint: Path | None
) -> dict[str, float]:
    """Train to the end, from a checkpoint if there is one; Ctrl-C before the end raises."""
    steps = _planned_steps(trainer)
    ended = checkpoint is not None and (step_of(checkpoint) >= steps or stopped_early(checkpoint))
    if checkpoint is not None:
        display.line(f"  resuming from step {step_of(checkpoint)} of {steps}")
    if ended:
        # transformers would make one more update before it notices that the training has ended.
        vars(trainer)["_run_epoch"] = lambda **settings: None
    started = process_time()
    with display.progress(name, steps) as bar, interrupt.listening(), own_record():
        trainer.add_callback(ShowProgress(bar))
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if ended:
        return _measured_before(trainer)
    if interrupt.signal is not None and trainer.state.global_step < steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {steps}; the same command continues from there",
            interrupt.signal,
        )
    return {
        "train_loss": mean_over(result.training_loss),
        "seconds": round(result.metrics.get("train_runtime", 0.0), 1),
        "cpu_seconds": round(process_time() - started, 1),  # excludes other load on the machine
    }


def _measured_before(trainer: TokenTrainer) -> dict[str, float]:
    """Figures of a training that had already ended: its last logged loss, since there is no update to average."""
    history = trainer.state.log_history
    history[:] = [entry for entry in history if "train_runtime" not in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {**({"train_loss": losses[-1]} if losses else {}), "seconds": 0.0}


def _planned_steps(trainer: TokenTrainer) -> int:
    """Optimizer steps of the whole training."""
    loader = trainer.get_train_dataloader()
    return int(trainer.set_initial_training_values(trainer.args, loader)[6])


def _save(style: Style, model: TokenModel, trainer: TokenTrainer, folder: Path) -> None:
    """Save the objective's modules, then the model into a scratch folder that is renamed: it is complete or absent.

    For a language model, sample outputs are recorded too, to check later conversions against. All processes must call this;
    the first one writes.
    """
    trainer.objective_modules.save(folder)
    weights = trainer.whole_weights()
    # FSDP2 computes in the dtype of its mixed precision only, in which a saved model is not computed later.
    coarse = trainer.accelerator.is_fsdp2 and trainer.accelerator.mixed_precision != "no"
    if isinstance(model, LanguageModel) and not coarse:
        record(model, model.template(style), folder)
    if trainer.is_world_process_zero():
        scratch, target = folder / "model.tmp", folder / "model"
        for old in (scratch, target):
            shutil.rmtree(old, ignore_errors=True)
        model.save(scratch, weights)
        scratch.rename(target)
    trainer.accelerator.wait_for_everyone()
