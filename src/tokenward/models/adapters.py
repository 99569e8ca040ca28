"""LoRA adapters: creating one, checking that it leaves the base unchanged, and merging it."""

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
from tokenward.models.plausible import check_adapter
from tokenward.models.sharding import is_empty

STARTS = (True, "gaussian", "mica")
"""Values of ``init_lora_weights`` with which a new adapter is exactly zero and peft leaves the base weights alone."""

REFUSED: dict[str, str] = {
    field: reason
    for reason, fields in {
        "trained biases stay when the adapter is disabled, so the model without it would not be the base model": "bias",
        "peft cannot merge it into a layer without a bias": "lora_bias",
        "it changes the base, so the model without the adapter would not be the base model": "layer_replication kasa_config loftq_config",
        "the adapter would act only after these tokens, and peft cannot merge it": "alora_invocation_tokens",
        "it samples the adapter anew in every pass, so results would not be reproducible": "monteclora_config",
        "it approximates the gradients": "velora_config",
        "it initializes the adapter from data, which cannot be given here": "eva_config corda_config lora_ga_config",
        "it is for quantized models, which are not supported": "use_qalora qalora_group_size",
        "it is for Megatron models": "megatron_config megatron_core",
        "it is for serving one model from several processes": "use_bdlora",
        "it routes between existing adapters": "arrow_config",
        "it is not part of the model, and peft does not save it": "runtime_config",
        "a new adapter must be trainable": "inference_mode",
        "only LoRA adapters are supported": "peft_type",
        "it is set automatically": "base_model_name_or_path revision auto_mapping peft_version",
    }.items()
    for field in fields.split()
}
"""Fields of ``peft.LoraConfig`` that must keep their default, with the reason."""

_PEFT_ERRORS = (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError)


def lora_config(settings: Mapping[str, Any], *, encoder_decoder: bool) -> LoraConfig:
    """The peft config of an adapter.

    Raises:
        UserError: peft rejects a field or a value, or the model without the adapter would not be the base model.
    """
    plain = LoraConfig()
    for name, value in settings.items():
        if name in REFUSED and value != getattr(plain, name):
            raise UserError(
                f"the adapter setting {name} cannot be {value!r}: {REFUSED[name]}. Leave it out.",
                code="unsupported-adapter", key=f"adapter.{name}",
            )  # fmt: skip
    check_adapter(settings, "the adapter")
    _check_start(settings.get("init_lora_weights", True))
    task = "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"
    try:
        config = LoraConfig(**{"task_type": task, **settings})
    except (TypeError, ValueError) as error:
        raise _refused_by_peft(settings, error) from error
    if config.task_type != task:
        raise UserError(
            f"task_type is {config.task_type}, but this model needs {task}. Leave it out.",
            code="unsupported-adapter",
            key="adapter.task_type",
        )
    return config


def _check_start(start: object) -> None:
    # `start in STARTS` alone would accept 1, which equals True but is not a value that peft knows.
    if start is True or start in STARTS[1:]:
        return
    raise UserError(
        f"with init_lora_weights {start!r}, a new adapter is not zero, or peft changes the base weights: the policy would not "
        "start at its reference, and the saved adapter would not be the trained model. Use true, gaussian or mica, or leave "
        "it out.",
        code="unsupported-adapter",
        key="adapter.init_lora_weights",
    )


def _refused_by_peft(settings: Mapping[str, Any], error: Exception) -> UserError:
    return UserError(
        f"peft refuses the adapter {dict(settings)}: {error}. Use the fields of peft.LoraConfig, for example "
        "{r: 16, lora_alpha: 32, target_modules: all-linear}.",
        code="invalid-adapter",
        key="adapter",
    )


def new_adapter(
    model: PreTrainedModel, settings: Mapping[str, Any], *, base: str, start_id: int | None = None
) -> PeftModel:
    """Wrap a model with a new adapter and verify that the model is exactly the base at the start and without it.

    Args:
        model: The base. It is modified in place and its weights are frozen.
        settings: Fields of ``peft.LoraConfig``.
        base: Where to find the base again; saved with the adapter.
        start_id: Token that starts the decoder, if there is an encoder.

    Raises:
        UserError: peft rejects the settings, or the verification fails.
    """
    config = lora_config(settings, encoder_decoder=start_id is not None)
    # peft copies some modules. A copied instance forward would still answer for the original module.
    for module in (model.get_output_embeddings(), model.get_input_embeddings()):
        if isinstance(module, nn.Module):
            vars(module).pop("forward", None)
    before = (
        None if is_empty(model) else _logits(model, start_id)
    )  # a process that has the weights checks them
    wrapped = wrap_with_adapter(model, config, settings)
    if Path(base).is_dir():  # peft looks up anything else on the hub
        config.base_model_name_or_path = base
    if before is not None:
        _check_law(wrapped, before, settings, start_id)
    return wrapped


def wrap_with_adapter(model: nn.Module, config: LoraConfig, settings: Mapping[str, Any]) -> PeftModel:
    """Wrap a model with peft; raises a :class:`UserError` if the targets do not exist or cannot be adapted."""
    try:
        with adapter_warnings():
            found = get_peft_model(model, config)  # type: ignore[arg-type]
    except (*_PEFT_ERRORS, UserWarning) as error:
        raise _refused_by_peft(settings, error) from error
    assert isinstance(found, PeftModel)
    return found


@contextmanager
def adapter_warnings() -> Iterator[None]:
    """Silence peft's warnings that need nothing from the user; raise if a setting has no effect.

    Those about tied embeddings are handled by :func:`merge_adapter`.
    """
    with warnings.catch_warnings():
        for text in (
            "Model has `tie_word_embeddings=True` and a tied",
            "Input and output embeddings are no longer tied",
        ):
            warnings.filterwarnings("ignore", text, UserWarning)
        # peft calls transformers' old name of a property; delete with the first peft that does not.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("error", "You have requested `ensure_weight_tying`, but no tied", UserWarning)
        yield


def _check_law(model: PeftModel, before: Tensor, settings: Mapping[str, Any], start_id: int | None) -> None:
    """Check that the fresh adapter changes nothing, and that a trained one changes nothing while disabled.

    Both are tested on the model, because the lists above cannot cover every combination of settings.
    """
    enabled = _logits(model, start_id)
    with _trained_weights_shifted(model), model.disable_adapter():
        disabled = _logits(model, start_id)
    for found, which in ((enabled, "with the new adapter"), (disabled, "without the trained adapter")):
        if not torch.equal(found, before):
            difference = float((found.float() - before.float()).abs().max())
            raise UserError(
                f"the model {which} {dict(settings)} is not the base model: its logits differ by up to {difference:.2g}, so it "
                "would be compared with a different model. Leave out all settings but r, lora_alpha and target_modules.",
                code="unsupported-adapter",
                key="adapter",
            )


@contextmanager
def _trained_weights_shifted(model: nn.Module) -> Iterator[None]:
    """While open, all trainable weights are changed, as after a training."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    saved = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.1)
    try:
        yield
    finally:
        for weight, value in zip(weights, saved, strict=True):
            weight.data.copy_(value)


@torch.no_grad()
def _logits(model: nn.Module, start_id: int | None) -> Tensor:
    """Logits of twelve arbitrary tokens; leaves the model in evaluation mode.  -> [t v]"""
    config: Any = model.config
    ids = [(7919 * step + 13) % config.get_text_config().vocab_size for step in range(12)]
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    decoder = {} if start_id is None else {"decoder_input_ids": tokens.new_full((1, 1), start_id)}
    return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens), **decoder).logits[0]


def merge_adapter(model: PeftModel, name: str) -> PreTrainedModel:
    """Merge an adapter into its base, which is modified.

    If input and output embedding share a weight and the adapter changes one of them, they become two weights.

    Raises:
        UserError: peft cannot merge this kind of adapter.
    """
    _untie(model)
    try:
        with adapter_warnings():
            return cast(PreTrainedModel, model.merge_and_unload())
    except _PEFT_ERRORS as error:
        raise UserError(
            f"the adapter {name} cannot be merged into its base: {str(error).strip().splitlines()[0]} Use a whole model or a "
            "LoRA adapter.",
            code="unmergeable-adapter",
        ) from error


def _untie(model: PeftModel) -> None:
    """Give the output embedding its own weight if an adapter layer would be merged into a shared one."""
    places: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    embedding, head = (item.get_base_layer() if isinstance(item, BaseTunerLayer) else item for item in places)
    tied = isinstance(head, nn.Module) and head.weight.data_ptr() == embedding.weight.data_ptr()  # type: ignore[operator]
    if [embedding, head] != places and tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # type: ignore[operator]
        # Without this, from_pretrained would tie them again.
        config: PretrainedConfig = cast(PreTrainedModel, model.get_base_model()).config
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
