"""Trains a model in a folder: resume, progress, checkpoints, the finished model."""

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokenward.artifacts import read_json, write_jsonl
from tokenward.display import Display
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel, imitates_bfloat16, record
from tokenward.objectives.base import Objective
from tokenward.objectives.selected import with_entropy
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.template import Style
from tokenward.training.alternating import STATE_FILE, Alternating, stopped_early
from tokenward.training.arguments import TokenTrainingArguments
from tokenward.training.callbacks import AnswerPrompts, CheckpointEvery, ShowProgress, Speed, StopOnInterrupt
from tokenward.training.checks import check_first_batch
from tokenward.training.metrics import DisplacementAlarm, displacement_facts
from tokenward.training.passes import Prepare
from tokenward.training.trainer import TokenTrainer


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Updates of the training before a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def last_whole_checkpoint(folder: Path, last_file: str) -> Path | None:
    """The newest checkpoint that was written to its end; torn ones, after a kill or a full disk, are removed.

    Args:
        folder: Where the checkpoints are.
        last_file: The file that is written last into each, with JSON in it.
    """
    whole = []
    for checkpoint in checkpoints_of(folder):
        if _reads(checkpoint / last_file):
            whole.append(checkpoint)
        else:
            remove_checkpoint(checkpoint, last_file)
    return whole[-1] if whole else None


def _reads(path: Path) -> bool:
    try:
        read_json(path)
    except (FileNotFoundError, ValueError):  # it was not begun, or the disk was full
        return False
    return True


def remove_checkpoint(checkpoint: Path, last_file: str) -> None:
    """Remove a checkpoint; what a kill leaves of it no longer looks whole."""
    (checkpoint / last_file).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


class KeepNewest(TrainerCallback):
    """Removes old checkpoints when the newest is whole; it must be the last callback.

    transformers' own ``save_total_limit`` removes them before the callbacks have put their part into the new one.

    Args:
        last_file: The file that is written last into each.
        limit: How many to keep; None keeps all.
    """

    def __init__(self, last_file: str, limit: int | None) -> None:
        self._last_file, self._limit = last_file, limit

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove what is beyond the limit, but never the best checkpoint."""
        if not state.is_world_process_zero or self._limit is None or self._limit < 1:
            return
        best = state.best_model_checkpoint
        for checkpoint in checkpoints_of(Path(str(args.output_dir)))[: -self._limit]:
            if best is None or checkpoint.name != Path(best).name:
                remove_checkpoint(checkpoint, self._last_file)


CHECKED_ROWS = 4
SLOW_BFLOAT16 = (
    "  this processor has no instructions for bfloat16 and imitates it, several times slower than float32: "
    "--set {where}.bf16=false is faster here"
)
IDLE = (
    "  warning: one update in all, and it is warm-up with a learning rate of 0: the model stays as it is. Write "
    "{where}.warmup_steps: 0, or train on more pairs or for more epochs"
)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after its checkpoint was written."""


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
    display: Display | None = None,
    where: str = "args",
    resume: bool = True,
) -> dict[str, Any]:
    """Train a model and save it in ``model/``, its history in ``history.jsonl``.

    Args:
        model: The model before training; it is trained in place.
        objective: What to minimise.
        rows: Training comparisons.
        arguments: How to train. Its ``save_total_limit`` is taken out of it.
        folder: Where the model and the history go.
        style: How the model writes conversations.
        eval_rows: Comparisons for ``eval_strategy``.
        prepare: What a step's rows become just before they train.
        reference: The frozen model beside the policy, for objectives that compare with it in the step.
        reference_precision: In which the stored values of the reference were computed: ``float32`` or ``bfloat16``.
        between: What happens between the steps; it has a part in each checkpoint.
        watch: Answers fixed prompts while the model trains.
        display: Where progress is shown; None shows nothing.
        where: What messages call the arguments.
        resume: Whether to go on from the newest checkpoint in ``arguments.output_dir``, if there is one.

    Returns:
        Facts: steps, final loss, seconds, speed, memory, and displacement if the objective logs chosen responses.

    Raises:
        UserError: bad settings, a loss that is not finite, or a policy that differs from its reference.
        Interrupted: Ctrl-C; a checkpoint was saved and the next call goes on from it.
    """
    display = Display(quiet=True) if display is None else display
    last_file = TRAINER_STATE_NAME if between is None else STATE_FILE
    interrupt = StopOnInterrupt()
    limit, arguments.save_total_limit = arguments.save_total_limit, None
    callbacks = [
        *([between] if between is not None else []),
        *([watch] if watch is not None else []),
        CheckpointEvery(arguments.checkpoint_minutes),
        DisplacementAlarm(arguments.displacement_margin, where, display.line),
        interrupt,
        KeepNewest(last_file, limit),
    ]
    trainer = TokenTrainer(
        model,
        with_entropy(objective) if arguments.log_entropy else objective,
        arguments,
        rows,
        eval_rows=eval_rows or None,
        prepare=prepare,
        reference=reference,
        callbacks=callbacks,
    )
    speed = Speed(trainer.read)
    trainer.add_callback(speed)
    trainer.remove_callback(PrinterCallback)  # our own bar shows what is logged
    for hint in _hints(trainer, where):
        display.line(hint)
    # If one row has reference values, all have: a stage adds them to all, or a step to its own.
    if trainer.needs.reference and rows and rows[0].reference_logp is not None:
        display.line(check_start(trainer, rows, reference_precision))
    checkpoint = last_whole_checkpoint(Path(str(arguments.output_dir)), last_file) if resume else None
    measured = _train(display, folder.name, trainer, interrupt, checkpoint)
    if between is not None:
        between.finish()
    if watch is not None:
        watch.look(trainer.state.global_step)
    _save(style, model, trainer, folder)
    history = trainer.state.log_history
    write_history(folder / "history.jsonl", history)
    measured |= {**displacement_facts(history, arguments.displacement_margin), **speed.facts()}
    return {"steps": trainer.state.global_step, "rows": len(rows), **measured}


def _hints(trainer: TokenTrainer, where: str) -> Iterator[str]:
    """What the training will do that its reader may not expect."""
    if trainer.args.bf16 and imitates_bfloat16(trainer.token_model.device):
        yield SLOW_BFLOAT16.format(where=where)
    if planned_steps(trainer) == 1 and trainer.args.get_warmup_steps(1) > 0:
        yield IDLE.format(where=where)


def check_start(trainer: TokenTrainer, rows: Sequence[TokenRow], reference_precision: str = "float32") -> str:
    """Compare the untrained policy with its reference on the first rows; returns a line that says what was found.

    Raises:
        UserError: they differ by more than rounding.
    """
    coarse = trainer.args.bf16 or reference_precision == "bfloat16"
    precision = torch.bfloat16 if coarse else trainer.token_model.dtype
    found = check_first_batch(
        trainer.token_model,
        trainer.objective,
        [rows[number] for number in range(min(CHECKED_ROWS, len(rows)))],
        precision=precision,
        reference=trainer.reference,
    )
    ln2 = math.log(2)
    loss = f"loss {found['loss']:.4f} (begins at ln 2 = {ln2:.4f}), "
    told = loss if abs(found["begins"] - ln2) < 1e-4 else ""
    return f"  first rows: {told}margin {found['margin']:.4f} nats: policy = reference"


def _train(
    display: Display, name: str, trainer: TokenTrainer, interrupt: StopOnInterrupt, checkpoint: Path | None
) -> dict[str, float]:
    """Train to the end, from a checkpoint if there is one, with a bar; Ctrl-C before the end raises."""
    steps = planned_steps(trainer)
    ended = checkpoint is not None and (step_of(checkpoint) >= steps or stopped_early(checkpoint))
    if checkpoint is not None:
        display.line(f"  goes on from step {step_of(checkpoint)} of {steps}")
    if ended:
        # transformers would make one more update before it looks whether there is one to make.
        vars(trainer)["_run_epoch"] = lambda **settings: None
    started = process_time()
    with display.progress(name, steps) as bar, interrupt.listening():
        trainer.add_callback(ShowProgress(bar))
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if ended:
        return _measured_before(trainer)
    if interrupt.interrupted and trainer.state.global_step < steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {steps}; the same command goes on from there"
        )
    return {
        "train_loss": result.training_loss,
        "seconds": round(result.metrics.get("train_runtime", 0.0), 1),
        "cpu_seconds": round(process_time() - started, 1),  # what else the machine does is not in it
    }


def _measured_before(trainer: TokenTrainer) -> dict[str, float]:
    """The last loss that was logged up to a checkpoint of a finished training; the mean over no update is none."""
    history = trainer.state.log_history
    history[:] = [entry for entry in history if "train_runtime" not in entry]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {**({"train_loss": losses[-1]} if losses else {}), "seconds": 0.0}


def planned_steps(trainer: TokenTrainer) -> int:
    """Optimizer steps of the whole training."""
    loader = trainer.get_train_dataloader()
    return int(trainer.set_initial_training_values(trainer.args, loader)[6])


def _save(style: Style, model: TokenModel, trainer: TokenTrainer, folder: Path) -> None:
    """Save the objective's modules, then the model into a fresh folder that is moved in place: it is whole or absent.

    Of a language model it is kept what it says now, so that what is made of the folder can be compared with it.
    """
    trainer.objective_modules.save(folder)
    if isinstance(model, LanguageModel):
        record(model, model.template(style), folder)
    scratch, target = folder / "model.tmp", folder / "model"
    for old in (scratch, target):
        shutil.rmtree(old, ignore_errors=True)
    model.save(scratch)
    scratch.rename(target)


def write_history(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write what was logged, one step a line."""
    write_jsonl(path, history, ascii=True)
