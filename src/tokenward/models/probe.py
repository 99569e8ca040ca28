"""Find out, on the model itself, which fast paths are exact for it."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenward.errors import UserError
from tokenward.models.attention import install_tree_attention
from tokenward.models.forward import run_model, token_logprobs
from tokenward.models.head import SelectiveHead
from tokenward.tokens.encode import Encoded
from tokenward.tokens.layouts import Layout
from tokenward.tokens.rows import TokenBatch, TokenRow, collate
from tokenward.types import Comparison

# Rounding differs between the paths; a wrong mask or position moves log-probabilities far more.
# bfloat16 has steps of 0.125 nats from 16 on, and paths of a right model lie up to three of them apart.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.75, torch.float16: 0.1}
# Whatever a model's own mask code raises on a mask it does not know.
UNTAKEN = (RuntimeError, ValueError, TypeError, IndexError)
WINDOW_SETTINGS = ("sliding_window", "attention_chunk_size")


def choose_layout(
    model: PreTrainedModel,
    head: SelectiveHead | None,
    *,
    rows: Literal["auto", "shared", "separate"],
    name: str,
    start_id: int | None = None,
) -> tuple[Layout, SelectiveHead | None]:
    """Layout and head that give the same log-probabilities as plain rows and full logits.

    A model with a sliding window gets separate rows whatever the probe says: the probe is shorter
    than the window, and attention of our own would switch the window off.

    Raises:
        UserError: ``rows`` insists on shared rows and they are not exact.
    """
    if start_id is not None:
        return _encoder_decoder(model, head, rows=rows, name=name, start_id=start_id)
    plain = _probe(model, None, "separate")
    if head is not None and not _agrees(_probe(model, head, "separate"), plain):
        head = None  # the model changes its head's output (scaling, soft cap): make all logits
    if rows == "separate":
        return "separate", head
    exact = _shared_is_exact(model, plain, lambda: _probe(model, head, "shared"))
    return _shared_if(exact, rows=rows, name=name), head


def reward_layout(
    backbone: PreTrainedModel, *, rows: Literal["auto", "shared", "separate"], name: str
) -> Layout:
    """As :func:`choose_layout`, for a model without a language model head, by its hidden states."""
    if backbone.config.is_encoder_decoder:
        return "encoder_decoder"
    if rows == "separate":
        return "separate"
    plain = _states(backbone, "separate")
    exact = _shared_is_exact(backbone, plain, lambda: _states(backbone, "shared"))
    return _shared_if(exact, rows=rows, name=name)


def _shared_is_exact(
    model: PreTrainedModel, plain: Tensor | None, shared: Callable[[], Tensor | None]
) -> bool:
    """Whether packed rows give the same; the model keeps the attention that they need only if they do."""
    if _windows(model):
        return False
    before = model.config._attn_implementation
    install_tree_attention(model)
    exact = _agrees(shared(), plain)
    if not exact and before is not None and model.config._attn_implementation != before:
        model.set_attn_implementation(before)
    return exact


def _shared_if(exact: bool, *, rows: str, name: str) -> Layout:
    if exact:
        return "shared"
    if rows == "shared":
        raise UserError(
            f"model.rows is shared, but {name} gives other numbers in shared rows than in separate ones (it has "
            "a sliding window, recurrence or its own mask). Write model.rows: auto."
        )
    return "separate"


def _encoder_decoder(
    model: PreTrainedModel, head: SelectiveHead | None, *, rows: str, name: str, start_id: int
) -> tuple[Layout, SelectiveHead | None]:
    if rows == "shared":
        raise UserError(
            f"model.rows is shared, but {name} has an encoder, which reads each prompt apart. Write model.rows: auto."
        )
    plain = _probe(model, None, "encoder_decoder", start_id)
    exact = head is not None and _agrees(_probe(model, head, "encoder_decoder", start_id), plain)
    return "encoder_decoder", head if exact else None


def _windows(model: PreTrainedModel) -> list[str]:
    config = model.config.get_text_config()
    # Qwen keeps a window in its config that it does not use unless told to.
    if getattr(config, "use_sliding_window", True) is False:
        return []
    return [name for name in WINDOW_SETTINGS if getattr(config, name, None)]


def _agrees(values: Tensor | None, plain: Tensor | None) -> bool:
    if values is None or plain is None or values.shape != plain.shape:
        return False
    return bool((values - plain).abs().max() <= TOLERANCE.get(plain.dtype, 0.75))


@torch.inference_mode()
def _probe(
    model: PreTrainedModel, head: SelectiveHead | None, layout: Layout, start_id: int | None = None
) -> Tensor | None:
    """Log-probabilities of a made-up comparison; None where the model cannot take such rows at all."""
    batch = _batch(model, layout, start_id)
    try:
        return token_logprobs(model, head, batch).to(model.dtype)
    except UNTAKEN:
        return None


@torch.inference_mode()
def _states(backbone: PreTrainedModel, layout: Layout) -> Tensor | None:
    """Hidden states after each token of a made-up comparison; None as above."""
    batch = _batch(backbone, layout)
    try:
        states = run_model(backbone, batch).last_hidden_state
    except UNTAKEN:
        return None
    return states.reshape(-1, states.shape[-1])[batch.placed_at].to(backbone.dtype)


def _batch(model: PreTrainedModel, layout: Layout, start_id: int | None = None) -> TokenBatch:
    row = TokenRow(encoded=_made_up(model))
    return collate([row], layout=layout, pad_id=0, start_id=start_id).to(model.device)


def _made_up(model: PreTrainedModel) -> Encoded:
    vocabulary = model.config.get_text_config().vocab_size
    ids = [(7919 * step + 13) % vocabulary for step in range(24)]
    comparison = Comparison(key="", prompt=(), responses=("", "", ""), ranks=(0, 1, 2), source="probe")
    return Encoded(comparison, ids[:8], [ids[8:12], ids[12:18], ids[18:24]], [True] * 3, [0] * 3)
