"""TRL's side: DPO with stored reference values, and SimPO, with the best settings for a CPU.

In addition to the shared settings, TRL gets ``precompute_ref_log_probs``, so that no reference model runs or is in memory
during training; token ids, so that tokenization is not timed; and sdpa attention. Without Triton, TRL's fused head runs
on every position.
"""

from collections.abc import Mapping, Sequence
from tempfile import mkdtemp
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from benchmarks.folders import folder_of
from benchmarks.gate import Gate, common_arguments, nudge
from benchmarks.ours import BETA, GAMMA, MARGIN, encoded_of, shown_settings
from benchmarks.workers import Channel
from tokenward.models.loading import DTYPES, load_tokenizer
from tokenward.tokens.rows import TokenRow


class ReadyIdsDPOTrainer(DPOTrainer):
    """TRL's trainer for rows that are already token ids, so that both sides train on the same ids."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def load(settings: Mapping[str, Any]) -> PreTrainedModel:
    """Load the same weights as the other side, with transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        folder_of(settings["model"]), dtype=DTYPES[settings["weights"]], attn_implementation="sdpa"
    )
    return model.to(settings["device"])


def dpo_trainer(settings: Mapping[str, Any], *, precompute: bool = True) -> DPOTrainer:
    """TRL's DPO trainer. It computes the reference values when it is constructed."""
    model = load(settings)
    arguments = DPOConfig(
        output_dir=mkdtemp(prefix="bench"),
        beta=BETA,
        precompute_ref_log_probs=precompute,
        max_length=None,  # the rows are already limited
        **(common_arguments(settings) | settings["peer"]),
    )
    rows = [
        {"prompt_ids": row.prompt, "chosen_ids": row.responses[0], "rejected_ids": row.responses[1]}
        for row in encoded_of(settings)
    ]
    trainer = ReadyIdsDPOTrainer(
        model=model,
        ref_model=None if precompute else load(settings),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(settings["tokenizer"]),
    )
    nudge(model)
    return trainer


def simpo_trainer(settings: Mapping[str, Any]) -> CPOTrainer:
    """TRL's SimPO, which is in its experimental CPO trainer."""
    model = load(settings)
    arguments = CPOConfig(
        output_dir=mkdtemp(prefix="bench"),
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=GAMMA,
        simpo_gamma=MARGIN,
        max_length=8192,
        remove_unused_columns=False,
        **(common_arguments(settings) | settings["peer"]),
    )
    trainer = CPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
        processing_class=load_tokenizer(settings["tokenizer"]),
    )
    trainer.train_dataset = Dataset.from_list(cpo_features(encoded_of(settings)))
    nudge(model)
    return trainer


def cpo_features(rows: Sequence[TokenRow]) -> list[dict[str, Any]]:
    """Rows as the CPO trainer's tokenization produces them."""

    def side(name: str, prompt: list[int], response: list[int]) -> dict[str, list[int]]:
        ids = prompt + response
        labels = [-100] * len(prompt) + response
        return {f"{name}_input_ids": ids, f"{name}_attention_mask": [1] * len(ids), f"{name}_labels": labels}

    return [
        {
            **side("chosen", row.prompt, row.responses[0]),
            **side("rejected", row.prompt, row.responses[1]),
            "prompt_input_ids": row.prompt,
            "prompt_attention_mask": [1] * len(row.prompt),
        }
        for row in rows
    ]


def dpo(channel: Channel, settings: dict[str, Any]) -> None:
    """A worker that runs one optimizer step of DPO per request."""
    _train(channel, settings, dpo_trainer(settings))


def simpo(channel: Channel, settings: dict[str, Any]) -> None:
    """A worker that runs one optimizer step of SimPO per request."""
    _train(channel, settings, simpo_trainer(settings))


def _train(channel: Channel, settings: Mapping[str, Any], trainer: Any) -> None:
    def check(request: dict[str, Any]) -> dict[str, Any]:
        rows = [trainer.train_dataset[index] for index in range(settings["batch"])]
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return {"loss": float(trainer.compute_loss(trainer.model, inputs))}

    trainer.add_callback(Gate(channel, {"check": check}, {"settings": shown_settings(trainer)}))
    trainer.train()
