"""A model that its caller has loaded, ready for token-level work."""

from copy import deepcopy
from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, check_vocabulary
from tokenward.models.probe import Packing, choose_head, choose_layout

_KEPT = "_tokenward"
"""Attribute of a module: what was found out about it, so that a probe runs once."""


def wrapped(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *, packing: Packing = "auto"
) -> LanguageModel:
    """A loaded causal language model, or one with an encoder, after the probe that says how rows can be laid out for it.

    The model is used as it is, on its device and in its number type, and is put into evaluation mode. Its head answers
    requests of this library from then on; every other call works as before.

    Args:
        model: The model, inside PEFT's wrapper if it has an adapter.
        tokenizer: Its fast tokenizer.
        packing: ``auto`` decides by the probe; the others insist.

    Raises:
        UserError: it is not a language model, the tokenizer is a slow one or knows more tokens than the model, or
            ``packing`` is ``shared_prompts`` and the model cannot take such rows.
    """
    known = vars(model).get(_KEPT)
    if known is not None and known[1:] == (tokenizer, packing) and _answers(known[0]):
        return known[0]
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    if not isinstance(model.get_output_embeddings(), nn.Module):
        raise UserError(
            f"{name} is {type(model).__name__}, which has no language model head. Load it with AutoModelForCausalLM."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer of {name} is {type(tokenizer).__name__}, which gives no offsets. Give a fast tokenizer "
            "(AutoTokenizer loads one if there is a tokenizer.json)."
        )
    inner = cast(PreTrainedModel, model)
    check_vocabulary(inner, tokenizer, name)
    start = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
    model.eval()
    layout = choose_layout(inner, packing=packing, name=name, start_id=start)
    head = choose_head(inner, name=name, start_id=start)
    made = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        head=head,
        layout=layout,
        fingerprint="",  # its weights may be those of no folder
        name=name,
        start_id=start,
    )
    vars(model)[_KEPT] = (made, tokenizer, packing)
    return made


def _answers(model: LanguageModel) -> bool:
    """Whether the head that was installed is still in its place: a new adapter, say, takes it off."""
    if model.head is None:
        return True
    module = cast(PreTrainedModel, model.model).get_output_embeddings()
    return getattr(vars(module).get("forward"), "__self__", None) is model.head


def known_tokenizer(model: PreTrainedModel | PeftModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer with which :func:`wrapped` took this model before, or None."""
    known = vars(model).get(_KEPT)
    return None if known is None else known[1]


def copied(model: LanguageModel, *, packing: Packing = "auto") -> LanguageModel:
    """A model of its own with the same weights, without gradient; training the first does not reach it."""
    kept = vars(model.model).pop(_KEPT, None)
    try:
        twin = deepcopy(model.model)
    finally:
        if kept is not None:
            vars(model.model)[_KEPT] = kept
    inner = twin.get_base_model() if isinstance(twin, PeftModel) else twin
    # The copied heads and the model's forward may answer for the first model; classes have the plain ones.
    for part in (inner, twin.get_output_embeddings(), twin.get_input_embeddings()):
        if isinstance(part, nn.Module):
            vars(part).pop("forward", None)
    return wrapped(twin, model.tokenizer, packing=packing)
