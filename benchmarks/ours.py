"""tokenward's side: its trainer with its defaults, as in ``tokenward run``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from benchmarks.data import check_ids, encoded_pairs, random_ids, random_weights, with_reference
from benchmarks.gate import Gate, common_arguments, nudge
from benchmarks.model import Pair
from benchmarks.workers import Channel
from tokenward.models.loading import LanguageModel, load_model
from tokenward.objectives import DPO, Objective, PlackettLuce, SePO, SimPO, WeightedLikelihood
from tokenward.scoring.reads import token_values
from tokenward.tokens.rows import TokenRow
from tokenward.training.arguments import training_arguments
from tokenward.training.trainer import TokenTrainer

BETA, GAMMA, MARGIN = 0.1, 2.0, 0.5
OBJECTIVES: dict[str, Objective] = {
    "sepo": SePO(gamma=GAMMA, margin=MARGIN),
    "simpo": SimPO(beta=GAMMA, gamma=MARGIN),
    "dpo": DPO(beta=BETA),
    "plackett_luce": PlackettLuce(),
    "likelihood": WeightedLikelihood(),
}


def encoded_of(settings: Mapping[str, Any]) -> list[TokenRow]:
    """The comparisons of the settings: from a file, or generated with given lengths."""
    if settings["lengths"] is not None:
        lengths = [Pair(prompt, tuple(responses)) for prompt, responses in settings["lengths"]]
        return random_ids(
            lengths, vocabulary=settings["ids"], seed=settings["seed"], responses=settings["responses"]
        )
    return encoded_pairs(
        settings["pairs"],
        settings["tokenizer"],
        count=settings["count"],
        longest=settings["longest"],
        seed=settings["seed"],
        first=settings["first"],
    )


def load(settings: Mapping[str, Any]) -> LanguageModel:
    """Load the model with the defaults of a recipe."""
    return load_model(settings["model"], dtype=settings["weights"], device=settings["device"])


def training_rows(
    settings: Mapping[str, Any], model: LanguageModel, encoded: Sequence[TokenRow]
) -> list[TokenRow]:
    """Rows on which the policy or the oracle stage would train."""
    if settings["objective"] == "sepo":
        return random_weights(encoded, settings["fraction"], seed=settings["seed"])
    rows = list(encoded)
    if settings["objective"] != "dpo":
        return rows
    values = token_values(model, rows, precision=settings["precision"], tokens_per_batch=2048)
    return with_reference(rows, values)


def make_trainer(settings: Mapping[str, Any], **extra: Any) -> TokenTrainer:
    """The trainer with the shared settings, and otherwise its defaults."""
    model = load(settings)
    encoded = encoded_of(settings)
    check_ids(model, encoded)
    rows = training_rows(settings, model, encoded)
    table = common_arguments(settings) | settings["own"] | extra
    arguments = training_arguments(
        table,
        folder=Path(mkdtemp(prefix="bench")),
        seed=settings["seed"],
        where="bench",
        device=settings["device"],
    )
    trainer = TokenTrainer(model, OBJECTIVES[settings["objective"]], arguments, rows)
    nudge(model.model)
    return trainer


def training(channel: Channel, settings: dict[str, Any]) -> None:
    """A worker that runs one optimizer step per request. ``check`` returns the loss of the first batch."""
    trainer = make_trainer(settings)

    def check(request: dict[str, Any]) -> dict[str, Any]:
        return {"loss": whole_loss(trainer, settings["batch"])}

    lengths = lengths_in(trainer)
    facts = {
        "settings": shown_settings(trainer),
        "lengths": lengths,
        "layouts": layouts_in(trainer, settings["batch"]),
    }
    trainer.add_callback(Gate(channel, {"check": check}, facts))
    trainer.train()


def whole_loss(trainer: TokenTrainer, batch: int) -> float:
    """Mean loss of the first pairs with weight 1 for every token: SePO is then SimPO, which TRL has."""
    model = trainer.token_model
    rows: Sequence[TokenRow] = trainer.train_dataset  # type: ignore[union-attr]
    whole = [replace(row, weights=None, scores=None) for row in rows[:batch]]
    with torch.no_grad(), trainer.compute_loss_context_manager():
        losses = trainer.losses(model.model, model.collate(whole).to(model.device))
    return float(losses.loss.mean())


def shown_settings(trainer: Any) -> dict[str, Any]:
    """The trainer's arguments that affect speed or memory."""
    wanted = (
        "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "optim", "max_grad_norm",
        "bf16", "fp16", "activation_checkpointing", "logging_steps", "train_sampling_strategy", "torch_compile",
        "dataloader_num_workers", "disable_dropout", "tokens_per_forward", "precompute_ref_log_probs",
        "max_length", "padding_free", "pad_to_multiple_of", "loss_type", "beta", "cpo_alpha", "simpo_gamma",
    )  # fmt: skip
    found = trainer.args.to_dict()
    attention = trainer.model.config._attn_implementation
    own = {name: found[name] for name in wanted if name in found}
    weights = str(next(trainer.model.parameters()).dtype)
    return own | {"attention": attention, "weights": weights, "threads": torch.get_num_threads()}


def lengths_in(trainer: TokenTrainer) -> list[Any]:
    rows: Sequence[TokenRow] = trainer.train_dataset  # type: ignore[union-attr]
    return [[len(row.prompt), [len(ids) for ids in row.responses], _kept(row)] for row in rows]


def layouts_in(trainer: TokenTrainer, batch: int) -> list[list[list[int]]]:
    """Number of rows and width of each pass of each batch, from the trainer's collator."""
    rows: Sequence[TokenRow] = trainer.train_dataset  # type: ignore[union-attr]
    starts = range(0, len(rows), batch)
    made = [trainer.data_collator(list(rows[start : start + batch])) for start in starts]  # type: ignore[arg-type]
    return [[list(item.batch.inputs.input_ids.shape) for item in step.passes] for step in made]  # type: ignore[union-attr]


def _kept(row: TokenRow) -> int:
    if row.weights is None:
        return sum(map(len, row.responses))
    return sum(int((side != 0).sum()) for side in row.weights)
