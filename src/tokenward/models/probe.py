"""Find out, on the model itself, which fast paths are exact for it."""

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tokenward.errors import UserError
from tokenward.models.forward import token_logprobs
from tokenward.models.head import SelectiveHead
from tokenward.tokens.encode import Encoded
from tokenward.tokens.rows import Layout, TokenRow, collate
from tokenward.types import Comparison

# Rounding differs between the paths; a wrong mask or position moves log-probabilities far more.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
WINDOW_SETTINGS = ("sliding_window", "attention_chunk_size")


def choose_layout(
    model: PreTrainedModel,
    head: SelectiveHead | None,
    *,
    rows: Literal["auto", "shared", "separate"],
    name: str,
) -> tuple[Layout, SelectiveHead | None]:
    """Layout and head that give the same log-probabilities as plain rows and full logits.

    A model with a sliding window gets separate rows whatever the probe says: the probe is shorter
    than the window, and a mask of our own would switch the window off.

    Raises:
        UserError: ``rows`` insists on shared rows and they are not exact.
    """
    plain = _probe(model, None, "separate")
    if head is not None and not _agrees(_probe(model, head, "separate"), plain):
        head = None  # the model changes its head's output (scaling, soft cap): make all logits
    if rows == "separate":
        return "separate", head
    shared_is_exact = not _windows(model) and _agrees(_probe(model, head, "shared"), plain)
    if shared_is_exact:
        return "shared", head
    if rows == "shared":
        raise UserError(
            f"model.rows is shared, but {name} gives other log-probabilities in shared rows than in separate ones (it has "
            "a sliding window, recurrence or its own mask). Write model.rows: auto."
        )
    return "separate", head


def _windows(model: PreTrainedModel) -> list[str]:
    config = model.config.get_text_config()
    # Qwen keeps a window in its config that it does not use unless told to.
    if getattr(config, "use_sliding_window", True) is False:
        return []
    return [name for name in WINDOW_SETTINGS if getattr(config, name, None)]


def _agrees(values: Tensor | None, plain: Tensor | None) -> bool:
    if values is None or plain is None or values.shape != plain.shape:
        return False
    return bool((values - plain).abs().max() <= TOLERANCE.get(plain.dtype, 0.25))


@torch.inference_mode()
def _probe(model: PreTrainedModel, head: SelectiveHead | None, layout: Layout) -> Tensor | None:
    """Log-probabilities of a made-up comparison; None where the model cannot take such rows at all."""
    batch = collate([TokenRow(encoded=_made_up(model))], layout=layout, pad_id=0).to(model.device)
    try:
        return token_logprobs(model, head, batch).to(model.dtype)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None  # whatever a model's own mask code raises on a mask it does not know


def _made_up(model: PreTrainedModel) -> Encoded:
    vocabulary = model.config.get_text_config().vocab_size
    ids = [(7919 * step + 13) % vocabulary for step in range(24)]
    comparison = Comparison(key="", prompt=(), responses=("", "", ""), ranks=(0, 1, 2), source="probe")
    return Encoded(comparison, ids[:8], [ids[8:12], ids[12:18], ids[18:24]], [True] * 3, 0)
