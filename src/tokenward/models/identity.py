"""Which model a name or folder means: its parts, config, size, context length and fingerprint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import model_info
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftType
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig

from tokenward.artifacts import fingerprint, folder_fingerprint
from tokenward.errors import UserError
from tokenward.models.adapters import lora_config, wrapped_in
from tokenward.models.default import HUB_NAME, LAYERS, default_model_folder
from tokenward.models.head_mlp import SETTINGS_FILE as HEAD_MLP_FILE
from tokenward.models.head_mlp import read_head_mlp
from tokenward.ops.costs import ModelSizes


def positions_of(config: PretrainedConfig) -> int | None:
    """Positions of a model that mean the same in every call; None where its config does not say.

    The frequencies of ``longrope`` and ``dynamic`` rotary embeddings follow the longest row of a call: beyond the
    length that the model was first trained with, every response of the batch gets other numbers.
    """
    text = config.get_text_config()
    known = [*_steady(text), getattr(text, "max_position_embeddings", None)]
    return min((length for length in known if length), default=None)


def _steady(text: PretrainedConfig) -> Iterator[int]:
    rope = getattr(text, "rope_parameters", None) or {}
    for item in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = item.get("rope_type")
        if kind == "longrope" and item["short_factor"] != item["long_factor"]:
            yield int(item["original_max_position_embeddings"])
        if kind == "dynamic" and not item.get("alpha"):
            # One less: after a longer call, frequencies are set back by a call that is shorter, not by one as long.
            yield int(text.max_position_embeddings) - 1


def steady_note(config: PretrainedConfig) -> str | None:
    """What a user shall know of a model that has more positions than rows may have; None where there is nothing."""
    text = config.get_text_config()
    steady, known = _least(text), getattr(text, "max_position_embeddings", None)
    if steady is None or known is None or steady + 1 >= known:
        return None
    return f"is used up to {steady} of its {known} positions: {WHY.format(steady)}. {_way_out(text, steady)}"


def longer_than_steady(config: PretrainedConfig, name: str, longest: int) -> str | None:
    """Why rows of so many positions are refused, and what to write; None where they are not.

    Args:
        config: Of the model.
        name: As the user wrote it.
        longest: Positions of the longest row.
    """
    text = config.get_text_config()
    steady = _least(text)
    if steady is None or longest <= steady:
        return None
    return f"a row for {name} has {longest} positions, and {WHY.format(steady)}. {_way_out(text, steady)}"


WHY = (
    "its rotary embedding gives a whole batch other frequencies as soon as one row has more than {}, so that a response's "
    "numbers would depend on its neighbours"
)


def _least(text: PretrainedConfig) -> int | None:
    return min(_steady(text), default=None)


def _way_out(text: PretrainedConfig, steady: int) -> str:
    shorter = f"Write tokens.max_prompt_tokens and tokens.max_response_tokens that are {steady} together"
    rope: dict[str, Any] = text.rope_parameters  # type: ignore[assignment]
    if rope.get("rope_type") == "longrope":
        return (
            f"{shorter}; or copy long_factor over short_factor in its config.json, so that every row has the frequencies of "
            "long ones."
        )
    return f"{shorter}; or write rope_type: yarn, which is the same for every length, in its config.json."


ADAPTER_FILE = "adapter_config.json"


class ModelParts(NamedTuple):
    """What a model folder consists of.

    Attributes:
        base: Folder or hub name of the whole weights.
        adapter: Folder of a PEFT adapter on it, or None.
        head_mlp: Folder of a network before its head, or None.
    """

    base: str
    adapter: str | None = None
    head_mlp: str | None = None


def resolve(name: str) -> str:
    """Folder or hub name of a model: ``default`` and its hub name give the default model's folder."""
    if name in ("default", HUB_NAME):
        return str(default_model_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        known = ("config.json", ADAPTER_FILE, HEAD_MLP_FILE)
        if not any((path / file).is_file() for file in known):
            found = ", ".join(sorted(child.name for child in path.iterdir())[:5]) or "nothing"
            raise UserError(
                f"{name} is not a model folder: it has neither config.json nor {ADAPTER_FILE} (found: {found}). "
                "Name a folder that save_pretrained wrote, such as runs/NAME/policy/model."
            )
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(
            f"there is no model folder {name}. Write a folder, a hub name (owner/model) or: default."
        )
    return name


def context_length(name: str, *, trust_remote_code: bool = False) -> int | None:
    """Positions that a model has and that mean the same in every batch, or None where its config does not say."""
    return positions_of(config_of(parts_of(resolve(name)).base, trust_remote_code=trust_remote_code))


def layer_count(name: str, *, trust_remote_code: bool = False) -> int:
    """Layers of a model; to say so of the default model fetches nothing."""
    if name in ("default", HUB_NAME):
        return LAYERS
    base = parts_of(resolve(name)).base
    return config_of(base, trust_remote_code=trust_remote_code).get_text_config().num_hidden_layers


def has_encoder(name: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a model reads its prompt with an encoder."""
    return bool(
        config_of(parts_of(resolve(name)).base, trust_remote_code=trust_remote_code).is_encoder_decoder
    )


def config_of(name: str, *, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a folder or hub name.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, HFValidationError) as error:
        raise UserError(cannot_load("model", name, error)) from error


def model_fingerprint(name: str) -> str:
    """Fingerprint of a model's files; of its commit, where the hub holds it."""
    source = resolve(name)
    if not Path(source).is_dir():
        return _files_fingerprint(source)
    parts = parts_of(source)
    return fingerprint([_files_fingerprint(part) for part in parts if part is not None])


def _files_fingerprint(source: str) -> str:
    if not Path(source).is_dir():
        return fingerprint([source, _hub_commit(source)])
    return folder_fingerprint(Path(source))


def _hub_commit(name: str) -> str:
    # Only the commit is read, so code that comes with the model need not run.
    try:
        return str(model_info(name).sha)
    except (HfHubHTTPError, HFValidationError, OSError):
        return str(config_of(name, trust_remote_code=False)._commit_hash)


def parts_of(source: str) -> ModelParts:
    """What a resolved model folder consists of.

    Raises:
        UserError: an adapter does not name its base, or names one that is not there, or is of a kind that changes rows.
    """
    if (Path(source) / HEAD_MLP_FILE).is_file():
        return ModelParts(resolve(read_head_mlp(Path(source))[0]), head_mlp=source)
    adapter = Path(source) / ADAPTER_FILE
    if not adapter.is_file():
        return ModelParts(source)
    settings = PeftConfig.from_pretrained(source)
    if settings.is_prompt_learning:
        raise UserError(
            f"the adapter {source} is of the type {PeftType(settings.peft_type).value}, which puts tokens of its own before every prompt; rows here "
            "have none. Name a whole model, or a LoRA adapter."
        )
    base = settings.base_model_name_or_path
    if not base:
        raise UserError(
            f"the adapter {source} does not name its base model. Set base_model_name_or_path in {adapter}."
        )
    try:
        return ModelParts(resolve(base), adapter=source)
    except UserError as error:
        raise UserError(no_base(source, base, error)) from error


def no_base(adapter: str, base: str, error: UserError) -> str:
    """Why an adapter cannot be used alone, and where its base is written."""
    return (
        f"{adapter} is an adapter on {base}, which is not there: {error} Write where the base is into "
        f"base_model_name_or_path in {Path(adapter) / ADAPTER_FILE}."
    )


def cannot_load(what: str, name: str, error: Exception) -> str:
    """Why a model could not be loaded, and what to write instead."""
    reason = str(error).strip().splitlines()[0]
    if "attention implementation" in reason:
        return f"{name} was not written for the attention that was asked for: {reason} Write model.attention: eager."
    return (
        f"no {what} could be loaded from {name!r}: {reason} Write the folder of a causal language model of transformers, "
        "a hub name that this machine can reach (owner/model), or: default."
    )


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
