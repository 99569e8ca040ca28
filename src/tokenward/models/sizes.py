"""Sizes of a model that is not loaded: its config builds it without weights."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tokenward.models.adapters import lora_config, wrapped_in
from tokenward.models.places import config_of, parts_of, resolve
from tokenward.ops.costs import ModelSizes


def model_sizes(
    name: str, *, adapter: dict[str, Any] | None = None, trust_remote_code: bool = False
) -> ModelSizes:
    """Sizes of a model, without reading its weights.

    Args:
        name: As :func:`tokenward.models.loading.load_model` takes it; of an adapter, the model it stands on.
        adapter: Fields of ``peft.LoraConfig`` for an adapter that alone is trained.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: no such model, or peft refuses the adapter.
    """
    config = config_of(parts_of(resolve(name)).base, trust_remote_code=trust_remote_code)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=trust_remote_code)
        weights = _count(model)
        head = model.get_output_embeddings().weight.numel()
        embedding = model.get_input_embeddings().weight.numel()
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        trained = weights if adapter is None else _adapter_weights(model, adapter, config.is_encoder_decoder)
    text = config.get_text_config()
    attention = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) * (
        text.num_attention_heads
    )
    return ModelSizes(
        weights=weights if adapter is None else weights + trained,
        trained=trained,
        products=weights - (head if tied else head + embedding),
        head=head,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        attention=attention,
        # Families name it differently, and where none of the names is there it is mostly four widths.
        inner=getattr(text, "intermediate_size", None) or getattr(text, "d_ff", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
    )


def _adapter_weights(model: nn.Module, adapter: dict[str, Any], encoder_decoder: bool) -> int:
    wrapped = wrapped_in(model, lora_config(adapter, encoder_decoder=encoder_decoder), adapter)
    return sum(weight.numel() for weight in wrapped.parameters() if weight.requires_grad)


def _count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())
