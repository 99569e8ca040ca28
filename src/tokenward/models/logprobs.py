"""Log-probabilities of chosen tokens from any causal language model of transformers, loaded by the caller."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn

from tokenward.errors import UserError
from tokenward.models.head import SelectiveHead, install_head
from tokenward.models.probe import answers, logit_change
from tokenward.ops.logprob import LogitChange, logprobs_of
from tokenward.plugins import described

_known: WeakKeyDictionary[nn.Module, LogitChange | None] = WeakKeyDictionary()
"""Logit changes of models, each found once: finding one takes a few forward passes."""


def token_logprobs(model: nn.Module, batch: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Log-probability of the selected tokens, 0 elsewhere.  [b t] -> [b t]

    The log-probability of token ``t`` is at index ``t``; there is no shift to apply. The head of the model runs for the selected
    tokens only, and their logits are not kept. The result equals ``log_softmax`` of the model's logits up to the rounding of a
    sum over the vocabulary, about 1e-6 in float32.

    Example::

        logp = tokenward.token_logprobs(model, batch, completion_mask.bool())

    The first call for a model runs it a few times on a handful of tokens to find out how it transforms the output of its
    head. If the transformation is unknown, all logits are computed. After the call the model is unchanged.

    Args:
        model: A causal language model, or DDP or PEFT around one. The wrapper is called in its current mode, and
            gradients flow as usual.
        batch: Arguments of the model: ``input_ids [b t]``, ``attention_mask [b t]``, ``position_ids`` and so on. ``labels`` are
            ignored.
        positions: ``[b t]`` bool, the selected tokens.

    Returns:
        ``[b t]`` in nats, float32 (float64 if the model is).

    Raises:
        UserError: ``positions`` is not a bool tensor of the shape of ``input_ids``, or it selects a token that has no
            log-probability: the first of a row, one that the attention mask hides, or one that follows padding.
    """
    _check_types(model, batch, positions)
    ids = batch["input_ids"]
    _check(positions, ids, batch.get("attention_mask"))
    wanted = positions.flatten().nonzero().squeeze(-1)
    given = {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    if inner.config.is_encoder_decoder:
        raise UserError(
            f"{type(inner).__name__} has an encoder, but token_logprobs needs a causal language model, with prompt and response "
            "in one row. Use log_softmax of its logits.",
            code="unsupported-model",
        )
    if inner not in _known:
        _known[inner] = _find_logit_change(inner)
    change = _known[inner]
    with _forwards_restored(inner):
        head = None if change is None else install_head(inner, change)
        if head is None:
            logits = model(**given).logits.flatten(0, 1)
            found = logprobs_of(logits[wanted - 1], ids.flatten()[wanted])
        else:
            with head.answering(wanted - 1, ids.flatten()[wanted]):
                found = model(**given).logits
    return found.new_zeros(ids.numel()).index_put((wanted,), found).view_as(ids)


def _find_logit_change(model: Any) -> LogitChange | None:
    """How the model transforms the output of its head, measured without dropout; None if unknown."""
    training = [
        module for module in model.modules() if module.training
    ]  # others were in evaluation mode already
    model.eval()
    try:
        change = logit_change(model)
        with _forwards_restored(model):
            head: SelectiveHead | None = None if change is None else install_head(model, change)
            return change if head is not None and answers(model, head, None) else None
    finally:
        for module in training:
            module.training = True


@contextmanager
def _forwards_restored(model: Any) -> Iterator[None]:
    """Afterwards the model, its head and its embedding have their previous forward again."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = (inner, inner.get_output_embeddings(), inner.get_input_embeddings())
    before = [(part, vars(part).get("forward")) for part in parts if isinstance(part, nn.Module)]
    try:
        yield
    finally:
        for part, forward in before:
            vars(part).pop("forward", None)
            if forward is not None:
                part.forward = forward


def _check_types(model: Any, batch: Any, positions: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model is {described(model)}. Pass a loaded model, such as AutoModelForCausalLM.from_pretrained(...) returns.",
            code="wrong-type",
        )
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        raise UserError(
            f"batch is {described(batch)} without a tensor input_ids. Pass the arguments of the model, such as "
            'tokenizer(texts, return_tensors="pt", padding=True) returns.',
            code="wrong-type",
        )
    if not isinstance(positions, Tensor):
        raise UserError(f"positions is {described(positions)}. Pass a tensor of bools.", code="wrong-type")
    if ids.ndim != 2:
        raise UserError(
            f"input_ids has the shape {[*ids.shape]}, but must be [rows, tokens]. For a single row, use input_ids[None].",
            code="wrong-shape",
        )


def _check(positions: Tensor, ids: Tensor, attention_mask: Tensor | None) -> None:
    if positions.dtype != torch.bool or positions.shape != ids.shape:
        raise UserError(
            f"positions is {positions.dtype} {[*positions.shape]}, but input_ids is {[*ids.shape]}. Pass one bool per token, such as "
            "completion_mask.bool().",
            code="wrong-shape",
        )
    readable = torch.ones_like(positions) if attention_mask is None else attention_mask.bool()
    predicted = readable & readable.roll(1, 1)
    predicted[:, 0] = False
    unpredicted = int((positions & ~predicted).sum())
    if unpredicted:
        raise UserError(
            f"positions selects {unpredicted} tokens that have no log-probability: the first of a row, padding, or the first after "
            "padding. Leave them out.",
            code="unpredicted-token",
        )
