"""An adapter put into the weights below it: one ordinary model, which says what the two said."""

from typing import Any, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from tokenward.errors import UserError
from tokenward.models.adapters import adapter_warnings


def merged(model: PeftModel, name: str) -> PreTrainedModel:
    """One ordinary model from a base and its adapter.

    Where input and output embedding share a weight and the adapter changes one of them, they are two weights afterwards.

    Args:
        model: It is taken apart.
        name: What it is called in messages.

    Raises:
        UserError: peft cannot merge an adapter of this kind.
    """
    _untie(model)
    try:
        with adapter_warnings():
            whole = cast(PreTrainedModel, model.merge_and_unload())
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the adapter {name} cannot be merged into its base: {str(error).strip().splitlines()[0]} Name a whole model, or a "
            "LoRA adapter."
        ) from error
    return whole


def _untie(model: PeftModel) -> None:
    """Give the output embedding a weight of its own where a layer of the adapter would be merged into a shared one."""
    places: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    below: list[Any] = [
        place.get_base_layer() if isinstance(place, BaseTunerLayer) else place for place in places
    ]
    if below != places and _tied(*below):
        below[1].weight = nn.Parameter(below[1].weight.detach().clone(), requires_grad=False)
        # Otherwise whoever reads the folder would make one weight of the two again.
        config: PretrainedConfig = cast(PreTrainedModel, model.get_base_model()).config
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def _tied(embedding: Any, head: Any) -> bool:
    return isinstance(head, nn.Module) and cast(Any, head).weight.data_ptr() == embedding.weight.data_ptr()
