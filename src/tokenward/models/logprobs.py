"""Log-probabilities of chosen tokens from any causal language model of transformers, loaded by whomever."""

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

_known: WeakKeyDictionary[nn.Module, LogitChange | None] = WeakKeyDictionary()
"""What models do to their heads' logits: finding out takes a few calls."""


def token_logprobs(model: nn.Module, batch: Mapping[str, Any], positions: Tensor) -> Tensor:
    """Log-probability of the wanted tokens, 0 elsewhere.  [b t] -> [b t]

    Token ``t`` is at index ``t``, so no shift is left to the caller. The model's head runs for the wanted tokens only,
    and no row of logits is kept: of a long prompt or of unselected tokens nothing is made. The result equals
    ``log_softmax`` of the model's logits up to the rounding of a sum over the vocabulary, about 1e-6 in float32.

    Example::

        logp = tokenward.token_logprobs(model, batch, completion_mask.bool())

    The first call for a model runs it a few times on a handful of tokens, to learn what it does to its head's logits. A
    model that does something unknown makes all logits. Nothing on the model is changed when the call ends.

    Args:
        model: A causal language model, or DDP or PEFT around one. The wrapper is what is called, in the mode that it is
            in; gradients flow as ever.
        batch: What the model takes: ``input_ids [b t]``, ``attention_mask [b t]``, ``position_ids`` and so on.
            ``labels`` are left out.
        positions: ``[b t]`` bool, which tokens are wanted.

    Returns:
        ``[b t]``, nats, float32 (float64 if the model is).

    Raises:
        UserError: ``positions`` is not a bool of the shape of ``input_ids``, or wants a token that nothing predicts: the
            first of a row, or one that the attention mask hides or lets follow padding.
    """
    ids = batch["input_ids"]
    _check(positions, ids, batch.get("attention_mask"))
    wanted = positions.flatten().nonzero().squeeze(-1)
    given = {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    _check_causal(inner)
    with _lent_head(inner) as head:
        if head is None:
            logits = model(**given).logits.flatten(0, 1)
            found = logprobs_of(logits[wanted - 1], ids.flatten()[wanted])
        else:
            with head.answering(wanted - 1, ids.flatten()[wanted]):
                found = model(**given).logits
    return found.new_zeros(ids.numel()).index_put((wanted,), found).view_as(ids)


@contextmanager
def _lent_head(model: Any) -> Iterator[SelectiveHead | None]:
    """A model's head that answers for chosen tokens, for the time of one call; None if it must make all logits."""
    if model not in _known:
        _known[model] = _found_out(model)
    change = _known[model]
    with _as_it_was(model):
        yield None if change is None else install_head(model, change)


def _found_out(model: Any) -> LogitChange | None:
    """What the model does to its head's logits, found without dropout; None if that is not known."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        change = logit_change(model)
        with _as_it_was(model):
            head = None if change is None else install_head(model, change)
            return change if head is not None and answers(model, head, None) else None
    finally:
        for module in training:  # some of its modules may have been in evaluation mode
            module.training = True


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Afterwards the model, its head and its embedding have the forward that they had."""
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


def _check_causal(model: Any) -> None:
    if model.config.is_encoder_decoder:
        raise UserError(
            f"{type(model).__name__} has an encoder, and token_logprobs is for causal language models, which read prompt and "
            "response in one row. Take log_softmax of its logits."
        )


def _check(positions: Tensor, ids: Tensor, attention_mask: Tensor | None) -> None:
    if positions.dtype != torch.bool or positions.shape != ids.shape:
        raise UserError(
            f"positions is {positions.dtype} {[*positions.shape]}, and input_ids {[*ids.shape]}. Give a bool per token, such as "
            "completion_mask.bool()."
        )
    readable = torch.ones_like(positions) if attention_mask is None else attention_mask.bool()
    predicted = readable & readable.roll(1, 1)
    predicted[:, 0] = False
    alone = int((positions & ~predicted).sum())
    if alone:
        raise UserError(
            f"positions wants {alone} tokens that nothing predicts: the first of a row, padding, or the first after padding. Leave "
            "them out: they have no log-probability."
        )
