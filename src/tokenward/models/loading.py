"""Any causal language model of transformers, by name or folder, ready for token-level work."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import model_info
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokenward.artifacts import fingerprint, folder_fingerprint
from tokenward.errors import UserError
from tokenward.models.default import HUB_NAME, default_model_folder
from tokenward.models.head import SelectiveHead
from tokenward.models.probe import choose_layout
from tokenward.tokens.rows import Layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A model with its tokenizer and what was found out about it at load.

    Attributes:
        model: The transformers model, inside its PEFT wrapper if it has an adapter.
        tokenizer: Its fast tokenizer.
        head: Answers for chosen tokens; None where the model changes its head's output, so that
            all logits must be made.
        layout: ``"shared"`` where a probe showed shared rows to be exact, else ``"separate"``.
        fingerprint: Of weights, config and tokenizer files.
        name: As the user wrote it.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    head: SelectiveHead | None
    layout: Layout
    fingerprint: str
    name: str

    @property
    def pad_id(self) -> int:
        """Id that fills rows; it is masked by position, never by its value, so any id serves."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def has_adapter(self) -> bool:
        """Whether the model is a frozen base with a PEFT adapter."""
        return isinstance(self.model, PeftModel)

    def with_adapter(self, settings: dict[str, Any]) -> "LanguageModel":
        """The same weights frozen, with a new LoRA adapter to train.

        Args:
            settings: Fields of ``peft.LoraConfig``.
        """
        try:
            lora = LoraConfig(**{"task_type": "CAUSAL_LM", **settings})
            model = get_peft_model(self.model, lora)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"peft refuses the adapter {settings}: {error}. Write the fields of peft.LoraConfig, for example "
                "adapter: {r: 16, lora_alpha: 32, target_modules: all-linear}."
            ) from error
        return replace(self, model=model, head=_install_head(model) if self.head else None)


def resolve(name: str) -> str:
    """Folder or hub name of a model: ``default`` and its hub name give the default model's folder."""
    if name in ("default", HUB_NAME):
        return str(default_model_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / ADAPTER_FILE).is_file():
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


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model folder or hub name.

    Raises:
        UserError: there is none, or only a slow one.
    """
    source = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, HFValidationError) as error:
        raise UserError(_cannot_load("tokenizer", name, error)) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {name} is a slow one, without offsets. Convert it to a tokenizer.json first."
        )
    return tokenizer


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    attention: str = "sdpa",
    rows: Literal["auto", "shared", "separate"] = "auto",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal language model and find out by a probe how batches can be laid out for it.

    A folder that holds a PEFT adapter is loaded on its base model.

    Args:
        name: ``default``, a folder, or a hub name.
        dtype: Of the weights: ``float32``, ``bfloat16`` or ``float64``.
        device: ``auto`` (the GPU where there is one), or a torch device.
        attention: transformers' attention implementation.
        rows: ``auto`` decides by probe; the others insist.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: no such model, not a causal language model, or ``rows: shared`` for a model that
            cannot take them.
    """
    source = resolve(name)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    base, adapter = _base_and_adapter(source)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        model, found = loaded
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
    except (OSError, ValueError, HFValidationError, SafetensorError) as error:
        raise UserError(_cannot_load("model", name, error)) from error
    _check_complete(found["missing_keys"], name)
    model = cast(PreTrainedModel, nn.Module.to(model, _device(device)).eval())
    _check_vocabulary(model, tokenizer, name)
    layout, head = choose_layout(model, _install_head(model), rows=rows, name=name)
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        head=head,
        layout=layout,
        fingerprint=model_fingerprint(name),
        name=name,
    )


def context_length(name: str, *, trust_remote_code: bool = False) -> int | None:
    """Positions that a model has, or None where its config does not say."""
    base, _ = _base_and_adapter(resolve(name))
    config = _config(base, trust_remote_code=trust_remote_code).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def _config(name: str, *, trust_remote_code: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, HFValidationError) as error:
        raise UserError(_cannot_load("model", name, error)) from error


def model_fingerprint(name: str) -> str:
    """Fingerprint of a model's files; of its commit, where the hub holds it."""
    source = resolve(name)
    if not Path(source).is_dir():
        return fingerprint([source, _hub_commit(source)])
    base, adapter = _base_and_adapter(source)
    parts = [_files_fingerprint(base)]
    if adapter is not None:
        parts.append(_files_fingerprint(adapter))
    return fingerprint(parts)


def _files_fingerprint(source: str) -> str:
    if not Path(source).is_dir():
        return fingerprint([source, _hub_commit(source)])
    return folder_fingerprint(Path(source))


def _hub_commit(name: str) -> str:
    # Only the commit is read, so code that comes with the model need not run.
    try:
        return str(model_info(name).sha)
    except (HfHubHTTPError, HFValidationError, OSError):
        return str(_config(name, trust_remote_code=False)._commit_hash)


def _base_and_adapter(source: str) -> tuple[str, str | None]:
    adapter = Path(source) / ADAPTER_FILE
    if not adapter.is_file():
        return source, None
    base = LoraConfig.from_pretrained(source).base_model_name_or_path
    if not base:
        raise UserError(
            f"the adapter {source} does not name its base model. Set base_model_name_or_path in {adapter}."
        )
    return resolve(base), source


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"model.device is {name!r}, which torch does not know. Write auto, cpu, cuda or cuda:1."
        ) from error


def _install_head(model: nn.Module) -> SelectiveHead | None:
    module = model.get_output_embeddings()  # type: ignore[operator]
    return SelectiveHead(module) if isinstance(module, nn.Module) else None


def _check_complete(missing: Collection[str], name: str) -> None:
    if missing:
        raise UserError(
            f"{name} has no weights for {len(missing)} parts of its model, such as {min(missing)}; they would be random "
            "numbers. Name a folder of a whole causal language model; a classifier or an interrupted copy is none."
        )


def _check_vocabulary(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {name} knows {len(tokenizer)} tokens but the model has {rows} embedding rows: they do not "
            "belong together. Name a folder where both were saved by the same run."
        )


def _cannot_load(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0]
    if "attention implementation" in reason:
        return f"{name} was not written for the attention that was asked for: {reason} Write model.attention: eager."
    return (
        f"no {what} could be loaded from {name!r}: {reason} Write the folder of a causal language model of transformers, "
        "a hub name that this machine can reach (owner/model), or: default."
    )
