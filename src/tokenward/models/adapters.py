"""LoRA adapters: a new one, the checks that it leaves the base unchanged, and merging it into the weights."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tokenward.errors import UserError

ADVICE = "Write the fields of peft.LoraConfig, for example adapter: {r: 16, lora_alpha: 32, target_modules: all-linear}."

STARTS = (True, "gaussian", "mica")
"""Values of ``init_lora_weights`` with which the adapter begins at exactly nothing and leaves the base alone."""

TAKEN = frozenset(
    {
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "use_rslora",
        "use_dora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "trainable_token_indices",
        "target_parameters",
        "ensure_weight_tying",
        "task_type",
    }
)
"""Fields of peft.LoraConfig that do here what peft says."""

_FROM_DATA = "it prepares the adapter on data of its own, which a recipe cannot give"
_ITSELF = "tokenward sets it itself"

REFUSED: dict[str, str] = {
    "bias": "trained biases stay when the adapter is left out, so that the model without it would not be the base",
    "lora_bias": "peft cannot merge it into a layer without a bias, so that the model could not be given away",
    "layer_replication": "it adds layers to the base, so that the model without the adapter would not be the base",
    "alora_invocation_tokens": "the adapter would act after these tokens alone, and peft cannot merge it",
    "kasa_config": "it cuts the base's weights, so that the model without the adapter would not be the base",
    "monteclora_config": "it draws the adapter anew in every pass, so that a reading would not repeat",
    "velora_config": "it makes the gradients coarser than those that the objectives are checked with",
    "loftq_config": "it changes the base's weights, so that the model without the adapter would not be the base",
    "eva_config": _FROM_DATA,
    "corda_config": _FROM_DATA,
    "lora_ga_config": _FROM_DATA,
    "use_qalora": "it is for quantized models, which tokenward does not load",
    "qalora_group_size": "it is for quantized models, which tokenward does not load",
    "megatron_config": "it is for models that Megatron holds",
    "megatron_core": "it is for models that Megatron holds",
    "use_bdlora": "it is for serving one model from several processes",
    "arrow_config": "it chooses between adapters that are there already",
    "runtime_config": "it is no setting of a model, and peft does not store it",
    "inference_mode": "a new adapter is there to be trained",
    "peft_type": "the adapters of a recipe are LoRA",
    "base_model_name_or_path": _ITSELF,
    "revision": _ITSELF,
    "auto_mapping": _ITSELF,
    "peft_version": _ITSELF,
}
"""Fields that cannot act in a recipe, each with why; their defaults may be written."""

_ROOM = 12
"""Tokens on which the law is looked at."""


def lora_config(settings: Mapping[str, Any], *, encoder_decoder: bool) -> LoraConfig:
    """The adapter that a recipe describes.

    Args:
        settings: Fields of ``peft.LoraConfig``.
        encoder_decoder: Whether the model has an encoder.

    Raises:
        UserError: peft does not know a field or a value, or the field would make the base another model.
    """
    _check_fields(settings)
    _check_start(settings.get("init_lora_weights", True))
    task = "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"
    try:
        made = LoraConfig(**{"task_type": task, **settings})
    except (TypeError, ValueError) as error:
        raise UserError(f"peft refuses the adapter {dict(settings)}: {error}. {ADVICE}") from error
    if made.task_type != task:
        raise UserError(f"task_type is {made.task_type}, and this model's is {task}. Leave it out.")
    return made


def _check_fields(settings: Mapping[str, Any]) -> None:
    plain = LoraConfig()
    for name, value in settings.items():
        if name in REFUSED and value != getattr(plain, name):
            raise UserError(
                f"{name} is {value!r}, which cannot be in a recipe: {REFUSED[name]}. Leave it out."
            )


def _check_start(start: object) -> None:
    """Refuse a first adapter that is not exactly nothing on the unchanged base: nothing would be compared with the base."""
    if start is True or start in STARTS[1:]:
        return
    raise UserError(
        f"init_lora_weights is {start!r}, and with it a new adapter does not begin at the base model, or peft changes the base: "
        "what is compared with the reference would not begin at 0, and the saved adapter would not be what trained. Write "
        "init_lora_weights: true, gaussian or mica, or leave it out."
    )


def new_adapter(
    model: PreTrainedModel, settings: Mapping[str, Any], *, base: str, start_id: int | None = None
) -> PeftModel:
    """A model with a new adapter, which changes nothing yet, and nothing ever where it is left out.

    Args:
        model: The base; it is changed in place, and its weights are frozen.
        settings: Fields of ``peft.LoraConfig``.
        base: Where the base is found again; it goes into the saved adapter.
        start_id: What the decoder begins with, where there is an encoder.

    Raises:
        UserError: peft refuses the settings, or the model on or without its adapter is not exactly the base.
    """
    config = lora_config(settings, encoder_decoder=start_id is not None)
    _take_off_heads(model)
    before = _logits(model, start_id)
    wrapped = wrapped_in(model, config, settings)
    if Path(base).is_dir():  # peft asks the hub for a name that is none
        config.base_model_name_or_path = base
    _check_law(wrapped, before, settings, start_id)
    return wrapped


def wrapped_in(model: nn.Module, config: LoraConfig, settings: Mapping[str, Any]) -> PeftModel:
    """The model inside peft's wrapper.

    Raises:
        UserError: the model has no such modules, or they cannot have an adapter.
    """
    try:
        with adapter_warnings():
            found = get_peft_model(model, config)  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, UserWarning) as error:
        raise UserError(f"peft refuses the adapter {dict(settings)}: {error}. {ADVICE}") from error
    assert isinstance(found, PeftModel)
    return found


@contextmanager
def adapter_warnings() -> Iterator[None]:
    """While open, peft's warnings of shared embeddings stay silent where merging looks after them, and raise where a setting is idle."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Model has `tie_word_embeddings=True` and a tied layer", UserWarning
        )
        warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied", UserWarning)
        warnings.filterwarnings("error", "You have requested `ensure_weight_tying`, but no tied", UserWarning)
        yield


def _take_off_heads(model: PreTrainedModel) -> None:
    """Give the embeddings the forwards of their classes back: peft copies some modules, and a copy must not answer for the first."""
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        if isinstance(module, nn.Module):
            vars(module).pop("forward", None)


def _check_law(model: PeftModel, before: Tensor, settings: Mapping[str, Any], start_id: int | None) -> None:
    on = _logits(model, start_id)
    with _moved(model), model.disable_adapter():
        off = _logits(model, start_id)
    for found, which in ((on, "with the new adapter"), (off, "without the trained adapter")):
        if not torch.equal(found, before):
            by = float((found.float() - before.float()).abs().max())
            raise UserError(
                f"the model {which} {dict(settings)} is not the base model: its logits differ by up to {by:.2g}, and must not "
                "differ at all, since what it is compared with would be another model. Leave out all but r, lora_alpha and "
                "target_modules."
            )


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """Every weight that trains is elsewhere, as after a training; then back."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1)
    try:
        yield
    finally:
        for weight, value in zip(weights, kept, strict=True):
            weight.data.copy_(value)


@torch.no_grad()
def _logits(model: nn.Module, start_id: int | None) -> Tensor:
    """Of a few made-up tokens, in evaluation mode, in which the model stays.  -> [t v]"""
    config: Any = model.config
    ids = [(7919 * step + 13) % config.get_text_config().vocab_size for step in range(_ROOM)]
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    asked = {} if start_id is None else {"decoder_input_ids": tokens.new_full((1, 1), start_id)}
    return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens), **asked).logits[0]


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
