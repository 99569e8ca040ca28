"""Which model a name or folder refers to: its parts, config, sizes, context length and fingerprint."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from peft import PeftConfig, PeftType
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig

from tokenward.artifacts import fingerprint, user_path
from tokenward.errors import UserError
from tokenward.models.adapters import lora_config, wrap_with_adapter
from tokenward.models.default import HUB_NAME, LAYERS, default_model_folder
from tokenward.models.files import UNREACHABLE, commit_of, files_fingerprint, foreign_code
from tokenward.models.head_mlp import SETTINGS_FILE as HEAD_MLP_FILE
from tokenward.models.head_mlp import read_head_mlp
from tokenward.models.plausible import check_adapter, check_config
from tokenward.ops.costs import ModelSizes


def positions_of(config: PretrainedConfig) -> int | None:
    """Number of positions that have the same meaning in every call; None if the config does not say.

    The frequencies of ``longrope`` and ``dynamic`` rotary embeddings depend on the longest row of a call. Beyond the
    length that the model was first trained with, all responses of the batch would get different numbers.
    """
    text = config.get_text_config()
    known = [*_steady_lengths(text), getattr(text, "max_position_embeddings", None)]
    return min((length for length in known if length), default=None)


def _steady_lengths(text: PretrainedConfig) -> Iterator[int]:
    """Length of the longest row with unchanged frequencies, for each rotary embedding that changes them."""
    rope = getattr(text, "rope_parameters", None) or {}
    for item in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = item.get("rope_type")
        if kind == "longrope" and item["short_factor"] != item["long_factor"]:
            yield int(item["original_max_position_embeddings"])
        if kind == "dynamic" and not item.get("alpha"):
            # One less: after a longer call, transformers resets the frequencies in a shorter call, not in an equal one.
            yield int(text.max_position_embeddings) - 1


def unused_positions(config: PretrainedConfig) -> str | None:
    """A note for the user if rows must be shorter than the model's positions; None if all of them can be used."""
    text = config.get_text_config()
    steady, known = min(_steady_lengths(text), default=None), getattr(text, "max_position_embeddings", None)
    if steady is None or known is None or steady + 1 >= known:
        return None
    return f"is used up to {steady} of its {known} positions: {_why_steady(text, steady)}"


def check_row_length(config: PretrainedConfig, name: str, longest: int) -> None:
    """Refuse a row that would change the results of the other rows of its batch."""
    text = config.get_text_config()
    steady = min(_steady_lengths(text), default=None)
    if steady is not None and longest > steady:
        raise UserError(
            f"a row for {name} has {longest} positions, but {_why_steady(text, steady)}",
            code="too-long",
            key="tokens.max_prompt_tokens",
        )


def _why_steady(text: PretrainedConfig, steady: int) -> str:
    rope: dict[str, Any] = text.rope_parameters  # type: ignore[assignment]
    remedy = "use rope_type: yarn, which is the same for every length"
    if rope.get("rope_type") == "longrope":
        remedy = "copy long_factor over short_factor, so that every row has the frequencies of long rows"
    return (
        f"its rotary embedding changes the frequencies of the whole batch if one row has more than {steady}, so a response would "
        f"depend on its neighbors. Use max_prompt_tokens and max_response_tokens that are {steady} together, or {remedy} (in the "
        "model's config.json)."
    )


ADAPTER_FILE = "adapter_config.json"

OWNERLESS = ("gpt2", "distilgpt2", "openai-gpt", "t5-", "bert-", "distilbert-", "roberta-", "xlnet-", "ctrl")
"""Beginnings of hub names without an owner, from the hub's first years."""

_on_hub: set[str] = set()  # names that were found, because a name is resolved many times


class ModelParts(NamedTuple):
    """The parts of a model folder."""

    base: str  # folder or hub name of the whole weights
    adapter: str | None = None  # folder of a PEFT adapter on the base
    head_mlp: str | None = None  # folder of a network before its head


def resolve(name: str) -> str:
    """Folder or hub name of a model; ``default`` and its hub name give the folder of the default model.

    A folder that contains a model in ``model/``, as training writes it, stands for that model.

    Raises:
        UserError: The folder does not exist or does not contain a model, or the hub has no model of this name.
    """
    if name in ("default", HUB_NAME):
        return str(default_model_folder())
    path = user_path(name)
    if path.is_dir():
        found = next((place for place in (path, path / "model") if is_model_folder(place)), None)
        if found is None:
            names = ", ".join(sorted(child.name for child in path.iterdir())[:5]) or "nothing"
            raise UserError(
                f"{name} is not a model folder: it has neither config.json nor {ADAPTER_FILE} (found: {names}). Use a folder "
                "written by save_pretrained, such as runs/NAME/policy/model.",
                code="not-a-model",
            )
        return str(found)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"there is no model folder {name}. {_advice(path)}", code="missing-file")
    _check_hub_name(name, path)
    return name


def check_places(**names: Any) -> None:
    """Check that folders of models exist, before something is computed for one of them.

    Args:
        names: Arguments by name. Only texts and paths are checked.

    Raises:
        UserError: there is neither a folder nor a model of the hub with such a name; it may be mistyped.
    """
    for argument, name in names.items():
        if not isinstance(name, str | Path) or str(name) == "default" or user_path(name).is_dir():
            continue
        try:
            resolve(str(name))
        except UserError as error:
            raise error.within(argument) from error


def is_place(name: str) -> bool:
    """Whether a model's name is one that it can be loaded from: ``default``, a folder, or a hub name with its owner.

    A model that was not loaded has the name of its class.
    """
    known = name in ("default", HUB_NAME) or name.startswith(OWNERLESS)
    return known or user_path(name).is_dir() or (name.count("/") == 1 and not Path(name).is_absolute())


def is_hub_name(name: str) -> bool:
    """Whether a name looks like one of the hub and not like a mistyped folder."""
    path = user_path(name)
    if path.is_dir():
        return False
    return name.startswith(OWNERLESS) or (
        name.count("/") == 1 and name[0] not in "./~" and not path.parent.is_dir()
    )


def is_model_folder(folder: Path) -> bool:
    """Whether a folder contains a model, an adapter or a network before a head."""
    return any((folder / file).is_file() for file in ("config.json", ADAPTER_FILE, HEAD_MLP_FILE))


def _check_hub_name(name: str, path: Path) -> None:
    """Refuse a name that is neither a folder nor a model of the hub, after one request instead of many retries."""
    if name in _on_hub or _is_cached(name):
        return
    # Without an owner it is more often a mistyped folder than one of the few such names of the hub.
    old = name.startswith(OWNERLESS) or "/" in name
    problem = "" if _similar(path) and not old else _hub_problem(name)
    if problem is None:
        return
    raise UserError(
        f"there is no folder {name!r} in {Path.cwd()}{problem and f', and {problem}'}. {_advice(path)}",
        code="missing-file",
    )


def _is_cached(name: str) -> bool:
    try:
        cached = [try_to_load_from_cache(name, file) for file in ("config.json", ADAPTER_FILE)]
    except HFValidationError:  # a folder's name, with a space for example
        return False
    return any(isinstance(file, str) for file in cached)


def _advice(path: Path) -> str:
    """What to write instead of a folder that does not exist."""
    similar = _similar(path)
    return f"Did you mean {similar!r}?" if similar else "Use a folder, a hub name (owner/model) or: default."


def _similar(path: Path) -> str:
    """The folder with the most similar name beside a missing one that holds a model; empty if there is none."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    names = [str(place) for place in beside if place.is_dir()]
    near = get_close_matches(str(path), names, n=5, cutoff=0.5)
    return next((name for name in near if _holds_model(Path(name))), "")


def _holds_model(folder: Path) -> bool:
    """Whether a folder, or a stage in it, contains a model."""
    return any(is_model_folder(place) for place in (folder, folder / "model", *folder.glob("*/model")))


def _hub_problem(name: str) -> str | None:
    """Why the hub does not give a model; None if it has it."""
    try:
        model_info(name, timeout=5.0)
    except (RepositoryNotFoundError, HFValidationError):
        return "the hub has no model of this name"
    except UNREACHABLE:
        return "the hub cannot be reached"
    _on_hub.add(name)
    return None


def base_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Config of a model; for an adapter, that of its base."""
    return config_of(parts_of(resolve(name)).base, trust_remote_code=trust_remote_code)


def context_length(name: str, *, trust_remote_code: bool = False) -> int | None:
    """See :func:`positions_of`."""
    return positions_of(base_config(name, trust_remote_code=trust_remote_code))


def layer_count(name: str, *, trust_remote_code: bool = False) -> int:
    """Number of layers of a model, without downloading the default model."""
    if name in ("default", HUB_NAME):
        return LAYERS
    return base_config(name, trust_remote_code=trust_remote_code).get_text_config().num_hidden_layers


def has_encoder(name: str, *, trust_remote_code: bool = False) -> bool:
    """Whether a model reads its prompt with an encoder."""
    return bool(base_config(name, trust_remote_code=trust_remote_code).is_encoder_decoder)


def config_of(name: str, *, trust_remote_code: bool) -> PretrainedConfig:
    """Config of a folder or hub name.

    Raises:
        UserError: There is none, or it is damaged.
    """
    with readable("model", name):
        file = Path(name) / "config.json"
        if trust_remote_code or not file.is_file():
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        else:
            known = file.stat()
            config = deepcopy(_read_config(name, known.st_mtime_ns, known.st_size, known.st_ino))
    check_config(config, name)
    return config


@lru_cache(maxsize=64)
def _read_config(name: str, *state: int) -> PretrainedConfig:
    """Config of a folder, whose file is in this state; a run asks for it many times."""
    return AutoConfig.from_pretrained(name)


def model_fingerprint(name: str, *, trust_remote_code: bool = False) -> str:
    """Hash of everything that loading a model reads: files of its folders, and commits on the hub.

    Args:
        name: ``default``, a folder, or a hub name.
        trust_remote_code: Whether code of other repositories that the model names runs, so that it counts.
    """
    source = resolve(name)
    if not Path(source).is_dir():
        return _files_fingerprint(source, code=trust_remote_code)
    return fingerprint([_files_fingerprint(part, code=trust_remote_code) for part in _every_part(source)])


def _every_part(source: str, above: tuple[str, ...] = ()) -> list[str]:
    """The base, and what is put onto it, from the inside to the outside; a base may be an adapter with a base of its own."""
    base, *rest = (part for part in parts_of(source) if part is not None)
    whole = base in (source, *above) or not Path(base).is_dir()
    return [*([base] if whole else _every_part(base, (source, *above))), *rest]


def _files_fingerprint(source: str, *, code: bool) -> str:
    elsewhere = foreign_code(source) if code else {}
    if Path(source).is_dir():
        own = files_fingerprint(Path(source))
    else:
        found = commit_of(source, "config.json", ADAPTER_FILE)
        # Without the hub and without a cached file, reading the config says what is wrong.
        commit = found or str(config_of(source, trust_remote_code=False)._commit_hash)
        own = fingerprint([source, commit])
    return fingerprint([own, elsewhere]) if elsewhere else own


def parts_of(source: str) -> ModelParts:
    """Parts of a resolved model folder.

    Raises:
        UserError: The base of an adapter is not named or does not exist, or the adapter changes rows.
    """
    if (Path(source) / HEAD_MLP_FILE).is_file():
        return ModelParts(resolve(read_head_mlp(Path(source))[0]), head_mlp=source)
    adapter = Path(source) / ADAPTER_FILE
    if not adapter.is_file():
        return ModelParts(source)
    with readable("adapter", source):
        settings = PeftConfig.from_pretrained(source)
    check_adapter(vars(settings), f"the adapter {source}")
    if settings.is_prompt_learning:
        raise UserError(
            f"the adapter {source} is of the type {PeftType(settings.peft_type).value}, which adds its own tokens before every "
            "prompt. Use a whole model or a LoRA adapter.",
            code="unsupported-adapter",
        )
    base = settings.base_model_name_or_path
    if not base:
        raise UserError(
            f"the adapter {source} does not name its base model. Set base_model_name_or_path in {adapter}.",
            code="missing-base",
        )
    try:
        return ModelParts(resolve(str(base)), adapter=source)
    except UserError as error:
        raise missing_base(source, base, error) from error


def missing_base(adapter: str, base: str, error: UserError) -> UserError:
    """The error for an adapter whose base cannot be found."""
    return UserError(
        f"{adapter} is an adapter on {base}, which cannot be found: {error} Set base_model_name_or_path in "
        f"{Path(adapter) / ADAPTER_FILE} to the place of the base.",
        code="missing-base",
    )


def refuses_attention(error: Exception) -> bool:
    """Whether transformers does not have the requested attention implementation for a model's class."""
    return "attention implementation" in str(error)


@contextmanager
def readable(what: str, name: str) -> Iterator[None]:
    """A context that reads files of a model. What transformers or peft raise becomes one line with the name and the cause.

    Damaged files end in any exception: a KeyError of a template, a TypeError of a config, the tokenizer library's own.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise loading_error(what, name, error) from error


def loading_error(what: str, name: str, error: Exception) -> UserError:
    """The error for a model that transformers cannot load."""
    reason = loading_reason(error)
    if refuses_attention(error):
        return UserError(
            f"{name} does not support this attention implementation: {reason} Use attention: auto, or eager.",
            code="unsupported-attention",
            key="model.attention",
        )
    return UserError(
        f"no {what} could be loaded from {name!r}: {reason} Use the folder of a causal language model of transformers, a hub "
        "name that this machine can reach (owner/model), or: default.",
        code="not-a-model",
    )


def loading_reason(error: Exception) -> str:
    """What a library said of files that it cannot read: the first line, with the kind of an error that is not meant for people."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    if said and isinstance(error, OSError | ValueError | HFValidationError):
        return said
    return f"{type(error).__name__}{said and ': '}{said}"


def model_sizes(
    name: str, *, adapter: dict[str, Any] | None = None, trust_remote_code: bool = False
) -> ModelSizes:
    """Sizes of a model, or of the base of an adapter, without reading its weights.

    ``adapter`` are the fields of ``peft.LoraConfig`` if only a new adapter is trained.

    Raises:
        UserError: There is no such model, or peft rejects the adapter.
    """
    config = base_config(name, trust_remote_code=trust_remote_code)
    encoder_decoder = config.is_encoder_decoder
    kind: Any = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        with readable("model", name):
            model = kind.from_config(config, trust_remote_code=trust_remote_code)
        weights = trained = sum(weight.numel() for weight in model.parameters())
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        outside = head.numel() if head is embedding else head.numel() + embedding.numel()
        if adapter is not None:
            wrapped = wrap_with_adapter(model, lora_config(adapter, encoder_decoder=encoder_decoder), adapter)
            trained = sum(weight.numel() for weight in wrapped.parameters() if weight.requires_grad)
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSizes(
        weights=weights if adapter is None else weights + trained,
        trained=trained,
        products=weights - outside,
        head=head.numel(),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        attention=head_dim * text.num_attention_heads,
        # Families use different names; without any, the inner width is usually four times the hidden width.
        inner=getattr(text, "intermediate_size", None) or getattr(text, "d_ff", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
    )
