"""Log-probabilities of a trained model on fixed prompts, to check what is converted or loaded from it later."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenward.models.loading import LanguageModel
from tokenward.models.sharding import is_first_process, is_sharded, reading
from tokenward.tokens.template import Template
from tokenward.types import Message

PROMPTS = ("What did you think of the film?", "Write one sentence about the sea.", "2 + 2 = ?")
RECORD = "trained.safetensors"
"""File next to ``model/`` with the log-probabilities of the trained model."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest difference of a log-probability in nats, by dtype of the weights. Merging an adapter rounds each weight once more."""


def next_log_probabilities(model: LanguageModel, template: Template) -> Tensor:
    """Log-probabilities of the first token of the reply to each of a few prompts.  -> [p v] float32"""
    model.model.eval()
    with reading(model.model):
        return _next_log_probabilities(model, template)


def _next_log_probabilities(model: LanguageModel, template: Template) -> Tensor:
    found = []
    for text in PROMPTS:
        ids = torch.tensor([template.prompt_ids([Message(role="user", content=text)])], device=model.device)
        start = {} if model.start_id is None else {"decoder_input_ids": ids.new_full((1, 1), model.start_id)}
        logits = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **start).logits
        found.append(logits[0, -1].float().log_softmax(-1).cpu())
    return torch.stack(found)


def record(model: LanguageModel, template: Template, folder: Path) -> None:
    """Write the log-probabilities of a trained model, to check what is loaded from its folder later.

    If processes hold parts of the model, all must call this; the first one writes.
    """
    first = is_first_process()
    if not (first or is_sharded(model.model)):
        return
    found = next_log_probabilities(model, template)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"log_probabilities": found}, folder / RECORD)


def recorded(folder: Path) -> Tensor | None:
    """The log-probabilities that :func:`record` wrote into the folder of a stage, or None.  -> [p v]"""
    path = folder / RECORD
    return load_file(path)["log_probabilities"] if path.is_file() else None


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of a log-probability in nats; NaN if one is NaN."""
    return float((one - other).abs().max())
