"""A masked language model as the task model."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.models.loading import DTYPES, device_of, load_tokenizer
from tokenward.models.places import resolve


@dataclass(frozen=True, kw_only=True)
class MaskedModel:
    """A masked language model with its tokenizer.

    Attributes:
        model: The transformers model.
        tokenizer: Its fast tokenizer, which has a mask token.
        name: As the user wrote it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    def __post_init__(self) -> None:
        if self.tokenizer.mask_token_id is None:
            raise UserError(
                f"the tokenizer of {self.name} has no mask token, so it is no masked language model's. Name a model "
                "such as roberta-large, or load this one as a causal language model and leave {mask} out."
            )

    @property
    def pad_id(self) -> int:
        """Id that fills rows, which some models also count their positions by."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device


def load_masked(
    name: str, *, dtype: str = "float32", device: str = "auto", trust_remote_code: bool = False
) -> MaskedModel:
    """Load a masked language model.

    Args:
        name: A folder or a hub name.
        dtype: Of the weights: ``float32``, ``bfloat16`` or ``float64``.
        device: ``auto`` (the GPU where there is one), or a torch device.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: there is no such model, or it is no whole masked language model.
    """
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    try:
        loaded: Any = AutoModelForMaskedLM.from_pretrained(
            resolve(name), dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, HFValidationError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no masked language model could be loaded from {name!r}: {reason} Name one such as roberta-large, or load a "
            "causal language model and leave {mask} out of the template."
        ) from error
    model, found = loaded
    if found["missing_keys"]:
        raise UserError(
            f"{name} has no weights for {len(found['missing_keys'])} parts of its model, such as "
            f"{min(found['missing_keys'])}; they would be random numbers. Name a folder of a whole masked language model."
        )
    moved = cast(PreTrainedModel, nn.Module.to(model, device_of(device)).eval())
    return MaskedModel(model=moved, tokenizer=tokenizer, name=name)
