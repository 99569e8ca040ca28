"""What a device computes, against the CPU in float32, with which attention kernels, and whether a step waits for it."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from tokenward.models.attention import sequences_are_right
from tokenward.models.base import TokenModel
from tokenward.models.loading import load_model
from tokenward.objectives import DPO, Objective, SePO
from tokenward.objectives.base import needs_of
from tokenward.scoring.reads import token_values
from tokenward.tokens.rows import TokenRow
from tokenward.training.arguments import training_arguments
from tokenward.training.trainer import TokenTrainer


class Allowed(NamedTuple):
    """Largest differences from the CPU in float32.

    Attributes:
        loss: Of the loss.
        gradient: Of all gradients together, relative to their norm.
        score: Of a token's log-probability, in nats.
    """

    loss: float
    gradient: float
    score: float


ALLOWED = {"float32": Allowed(1e-4, 1e-3, 1e-3), "bfloat16": Allowed(3e-2, 1e-1, 0.3)}
"""By precision. Torch's products on a GPU sum in another order; bfloat16 has 8 bits."""

OBJECTIVES: dict[str, Objective] = {"sepo": SePO(gamma=2.0, margin=0.5), "dpo": DPO(beta=0.1)}
ATTENTION = re.compile(r"attention|flash|fmha|efficient", re.IGNORECASE)
PLAIN = "aten::_scaled_dot_product_attention_math"
"""What torch runs where no fused kernel takes the arguments."""


class Computed(NamedTuple):
    """Loss, gradients and log-probabilities of a batch, on the CPU in float64."""

    loss: float
    gradients: dict[str, Tensor]
    scores: Tensor


def computed(model: TokenModel, rows: Sequence[TokenRow], objective: Objective, precision: str) -> Computed:
    """One pass forward and backward, and a scoring pass, on the model's device."""
    model.model.train()
    model.model.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        values, tokens = model.read(model.model, model.collate(rows).to(model.device), needs_of(objective))
        loss = objective(values, tokens).loss.mean()
    loss.backward()
    gradients = {
        name: weight.grad.detach().double().cpu()
        for name, weight in model.model.named_parameters()
        if weight.grad is not None
    }
    scored = token_values(model, rows, precision=precision, tokens_per_batch=4096)
    return Computed(
        float(loss.detach()), gradients, torch.cat([part for row in scored for part in row]).double()
    )


def differences(found: Computed, expected: Computed) -> Allowed:
    """How far two results are apart."""
    assert found.gradients.keys() == expected.gradients.keys()
    pairs = [(found.gradients[name], value) for name, value in expected.gradients.items()]
    apart = sum(float((one - other).square().sum()) for one, other in pairs)
    whole = sum(float(other.square().sum()) for _, other in pairs)
    score = float((found.scores - expected.scores).abs().max())
    return Allowed(abs(found.loss - expected.loss), (apart / whole) ** 0.5, score)


def equal_to_cpu(folder: str, rows: Sequence[TokenRow], device: str) -> list[dict[str, Any]]:
    """Differences of each precision, layout and objective on a device from the CPU in float32, and whether allowed."""
    plain, mine = load_model(folder, device="cpu"), load_model(folder, device=device)
    found = []
    for name, objective in OBJECTIVES.items():
        expected = computed(plain, rows, objective, "float32")
        for layout in ("shared", "separate"):
            for precision, allowed in ALLOWED.items():
                made = computed(replace(mine, layout=layout), rows, objective, precision)
                apart = differences(made, expected)
                # Written so that NaN is not within.
                within = all(value <= most for value, most in zip(apart, allowed, strict=True))
                case = {"objective": name, "layout": layout, "precision": precision}
                found.append(case | apart._asdict() | {"within": within})
    return found


def attention_kernels(folder: str, rows: Sequence[TokenRow], device: str) -> dict[str, dict[str, Any]]:
    """Names of the attention operators and kernels of a pass, by precision and layout, and whether plain products ran."""
    model = load_model(folder, device=device)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if model.device.type == "cuda" else [])]
    found = {}
    for precision in ALLOWED:
        for layout in ("shared", "separate"):
            with profile(activities=kinds) as seen:
                computed(replace(model, layout=layout), rows, OBJECTIVES["sepo"], precision)
            names = {item.key for item in seen.key_averages() if ATTENTION.search(item.key)}
            found[f"{precision} {layout}"] = {"names": sorted(names), "plain": PLAIN in names}
    if model.device.type == "cuda":
        found["sequences in one call"] = {"right": sequences_are_right(model.device)}
    return found


class NoWaiting(TrainerCallback):
    """Makes torch refuse every wait inside an optimizer step, after a first step that may still set things up."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def waits(folder: str, rows: Sequence[TokenRow], device: str, scratch: Path) -> str:
    """What torch says of the first wait in a step that does not log; empty if there is none, or on a CPU."""
    if not device.startswith("cuda"):
        return ""
    table = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "bf16": True,
        "logging_steps": 1000,
        "logging_first_step": False,
    }
    model, where = load_model(folder, device=device), "gpu_checks"
    arguments = training_arguments(table, folder=scratch, seed=0, where=where, device=device)
    trainer = TokenTrainer(model, OBJECTIVES["sepo"], arguments, list(rows), callbacks=[NoWaiting()])
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""
