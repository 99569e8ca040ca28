"""Where a model is: its folder or hub name, what it stands on, and what names its content."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import model_info
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftType
from transformers import AutoConfig, PretrainedConfig

from tokenward.artifacts import fingerprint, folder_fingerprint
from tokenward.errors import UserError
from tokenward.models.default import HUB_NAME, LAYERS, default_model_folder
from tokenward.models.head_mlp import SETTINGS_FILE as HEAD_MLP_FILE
from tokenward.models.head_mlp import read_head_mlp
from tokenward.models.positions import positions_of

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
