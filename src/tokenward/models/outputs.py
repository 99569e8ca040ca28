"""What a model says of some prompts, over the whole vocabulary: written when it was trained, looked at when it is given away."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenward.models.loading import LanguageModel
from tokenward.tokens.template import Template
from tokenward.types import Message

PROMPTS = (
    "What did you think of the film?",
    "Write one sentence about the sea.",
    "2 + 2 = ?",
)
RECORD = "trained.safetensors"
"""Beside ``model/``: what the model said when its training ended."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest difference of a log-probability, nats, by the number type of the weights: merging rounds each sum once more."""


@torch.inference_mode()
def next_log_probabilities(model: LanguageModel, template: Template) -> Tensor:
    """Of every token of the vocabulary as the first of a reply to each prompt.  -> [p v] float32"""
    model.model.eval()
    found = []
    for text in PROMPTS:
        ids = torch.tensor([template.prompt_ids([Message(role="user", content=text)])], device=model.device)
        start = {} if model.start_id is None else {"decoder_input_ids": ids.new_full((1, 1), model.start_id)}
        logits = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **start).logits
        found.append(logits[0, -1].float().log_softmax(-1).cpu())
    return torch.stack(found)


def record(model: LanguageModel, template: Template, folder: Path) -> None:
    """Write what a model says that is in memory as it was trained."""
    save_file({"log_probabilities": next_log_probabilities(model, template)}, folder / RECORD)


def recorded(folder: Path) -> Tensor | None:
    """What :func:`record` wrote into a stage's folder, or None.  -> [p v]"""
    path = folder / RECORD
    return load_file(path)["log_probabilities"] if path.is_file() else None


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of a log-probability, nats; not a number where a model says none."""
    return float((one - other).abs().max())
