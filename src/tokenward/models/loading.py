"""Any transformers language model, by name, by folder or as an object, made ready for token-level work."""

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokenward.errors import UserError
from tokenward.models.adapters import adapter_warnings, new_adapter
from tokenward.models.base import TokenModel
from tokenward.models.forward import FrozenReference, token_statistics
from tokenward.models.head import SelectiveHead, install_head
from tokenward.models.head_mlp import (
    AdaptedHead,
    HeadMLPSettings,
    install_head_mlp,
    load_head_mlp,
    read_head_mlp,
    save_head_mlp,
)
from tokenward.models.identity import cannot_load, config_of, model_fingerprint, parts_of, resolve
from tokenward.models.probe import Packing, choose_head, choose_layout, probe
from tokenward.tokens.batches import NOTHING, Batch, Needs, TokenBatch
from tokenward.tokens.template import Template
from tokenward.types import Message

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")
"""What torch calls a processor's instructions for products in bfloat16."""


def imitates_bfloat16(device: torch.device, processor: Mapping[str, Any] | None = None) -> bool:
    """Whether products in bfloat16 are slower than in float32 here: a processor without instructions for them.

    On one with AVX2 alone a linear layer took seven times as long forward, forty times backward (``python -m benchmarks.bfloat16``).

    Args:
        device: Where the model is.
        processor: Instructions by name; None asks torch.
    """
    if device.type != "cpu":
        return False
    known = torch.cpu.get_capabilities() if processor is None else processor
    return not any(known.get(name, False) for name in INSTRUCTIONS)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class LanguageModel(TokenModel):
    """A model with its tokenizer and what was found out about it at load.

    Attributes:
        model: The transformers model, inside its PEFT wrapper if it has an adapter.
        head: Answers for chosen tokens; None where the model changes its head's output, so that
            all logits must be made.
        head_mlp: The trained network before a frozen model's head, or None.
        head_mlp_settings: Of that network.
    """

    model: PreTrainedModel | PeftModel
    head: SelectiveHead | None
    head_mlp: AdaptedHead | None = None
    head_mlp_settings: HeadMLPSettings | None = None

    @property
    def whole(self) -> bool:
        """See :class:`TokenModel`."""
        return self.head_mlp is None

    @property
    def has_adapter(self) -> bool:
        """Whether the model is a frozen base with a PEFT adapter."""
        return isinstance(self.model, PeftModel)

    def read(
        self,
        module: nn.Module,
        batch: Batch,
        needs: Needs = NOTHING,
        reference: FrozenReference | None = None,
    ) -> tuple[Tensor, TokenBatch]:
        """Log-probability of each response token, 0 where it has no weight.  -> [n] float32"""
        found = token_statistics(module, self.head, batch, needs, reference)
        return found.pop("logp"), replace(batch.tokens, statistics=found)

    def with_adapter(self, settings: dict[str, Any]) -> "LanguageModel":
        """The same weights frozen, with a new LoRA adapter to train.

        Args:
            settings: Fields of ``peft.LoraConfig``; see :mod:`tokenward.models.adapters`.

        Raises:
            UserError: peft refuses them, or the model without its adapter would not be the base.
        """
        base, start = lasting(resolve(self.name)), self.start_id
        model = new_adapter(cast(PreTrainedModel, self.model), settings, base=base, start_id=start)
        return replace(self, model=model, head=install_head(model, self.head.change) if self.head else None)

    def with_head_mlp(self, settings: HeadMLPSettings, *, seed: int) -> "LanguageModel":
        """The same weights frozen, with a new network before the head to train.

        Args:
            settings: Of the network.
            seed: Of its initial weights.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = cast(PreTrainedModel, self.model)
            adapted = install_head_mlp(model, settings)
        return replace(
            self,
            head=install_head(model, self.head.change) if self.head else None,
            head_mlp=adapted,
            head_mlp_settings=settings,
        )

    def save(self, folder: Path) -> None:
        """An ordinary folder: weights (of an adapter or a head network alone, where there is one) and tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.head_mlp is not None and self.head_mlp_settings is not None:
            base = parts_of(resolve(self.name)).base  # a network that was loaded stands on its own base again
            save_head_mlp(self.head_mlp, self.head_mlp_settings, lasting(base), folder)
        elif isinstance(self.model, PeftModel):
            # peft would put the base's embedding beside an adapter on it; the base has it.
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
        else:
            cast(PreTrainedModel, self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def lasting(name: str) -> str:
    """A model's name as it can be found from any folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model folder or hub name.

    Raises:
        UserError: there is none, or only a slow one.
    """
    source = _tokenizer_folder(resolve(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, HFValidationError) as error:
        raise UserError(cannot_load("tokenizer", name, error)) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {name} is a slow one, without offsets. Convert it to a tokenizer.json first."
        )
    return tokenizer


def _tokenizer_folder(source: str) -> str:
    """Where a model's tokenizer is: with its base, where an adapter was saved without one."""
    parts = parts_of(source)
    alone = parts.adapter is not None and not (Path(parts.adapter) / "tokenizer_config.json").is_file()
    return parts.base if alone else source


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    attention: str = "sdpa",
    packing: Packing = "auto",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal language model and find out by a probe how batches can be laid out for it.

    A folder that holds a PEFT adapter is loaded on its base model.

    Args:
        name: ``default``, a folder, or a hub name.
        dtype: Of the weights: ``float32``, ``bfloat16`` or ``float64``.
        device: ``auto`` (the GPU where there is one), or a torch device.
        attention: transformers' attention implementation.
        packing: ``auto`` decides by probe; the others insist.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: no such model, not a causal language model, or ``packing: shared_prompts`` for a model that
            cannot take them.
    """
    parts = parts_of(resolve(name))
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    encoder_decoder = config_of(parts.base, trust_remote_code=trust_remote_code).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model: Any = _loaded(
        kind, name, parts.base, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code
    )
    check_vocabulary(model, tokenizer, name)
    if parts.adapter is not None:
        model = _with_saved_adapter(model, parts.adapter, name)
    adapted = None if parts.head_mlp is None else load_head_mlp(model, Path(parts.head_mlp))
    settings = None if parts.head_mlp is None else read_head_mlp(Path(parts.head_mlp))[1]
    model = cast(PreTrainedModel, nn.Module.to(model, device_of(device)).eval())
    start = model.config.decoder_start_token_id if encoder_decoder else None
    files = model_fingerprint(name)
    key = (files, dtype, str(device_of(device)), attention)
    layout, head = probe(model, key=key, packing=packing, name=name, start_id=start)
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        head=head,
        layout=layout,
        fingerprint=files,
        name=name,
        start_id=start,
        head_mlp=adapted,
        head_mlp_settings=settings,
    )


def _with_saved_adapter(model: PreTrainedModel, folder: str, name: str) -> PeftModel:
    try:
        with adapter_warnings():
            return PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(cannot_load("adapter", name, error)) from error


def load_backbone(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model without its language model head, for a head of another kind.

    Raises:
        UserError: no such model, or an adapter, whose base alone is not that model.
    """
    parts = parts_of(resolve(name))
    if parts.adapter is not None or parts.head_mlp is not None:
        raise UserError(
            f"{name} is an adapter on {parts.base}, and a reward needs whole weights to start from. Name {parts.base}, "
            "or merge the adapter first."
        )
    model = _loaded(
        AutoModel, name, parts.base, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code
    )
    return cast(PreTrainedModel, nn.Module.to(model, device_of(device)).eval())


def _loaded(kind: Any, name: str, base: str, *, dtype: str, attention: str, trust_remote_code: bool) -> Any:
    try:
        model, found = kind.from_pretrained(
            base,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, HFValidationError, SafetensorError) as error:
        raise UserError(cannot_load("model", name, error)) from error
    check_complete(found["missing_keys"], name)
    return model


def device_of(name: str) -> torch.device:
    """The torch device of a recipe's ``model.device``."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"model.device is {name!r}, which torch does not know. Write auto, cpu, cuda or cuda:1."
        ) from error


def check_complete(missing: Collection[str], name: str) -> None:
    """Refuse a model some of whose weights would be random numbers."""
    if missing:
        raise UserError(
            f"{name} has no weights for {len(missing)} parts of its model, such as {min(missing)}; they would be random "
            "numbers. Name a folder of a whole causal language model; a classifier or an interrupted copy is none."
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that knows more tokens than its model has embeddings."""
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {name} knows {len(tokenizer)} tokens but the model has {rows} embedding rows: they do not "
            "belong together. Name a folder where both were saved by the same run."
        )


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


PROMPTS = (
    "What did you think of the film?",
    "Write one sentence about the sea.",
    "2 + 2 = ?",
)
RECORD = "trained.safetensors"
"""Beside ``model/``: what the model said when its training ended."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest difference of a log-probability, nats, by the number type of the weights: merging rounds each sum once more."""


@torch.inference_mode()
def next_log_probabilities(model: LanguageModel, template: Template) -> Tensor:
    """Of every token of the vocabulary as the first of a reply to each prompt.  -> [p v] float32"""
    model.model.eval()
    found = []
    for text in PROMPTS:
        ids = torch.tensor([template.prompt_ids([Message(role="user", content=text)])], device=model.device)
        start = {} if model.start_id is None else {"decoder_input_ids": ids.new_full((1, 1), model.start_id)}
        logits = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), **start).logits
        found.append(logits[0, -1].float().log_softmax(-1).cpu())
    return torch.stack(found)


def record(model: LanguageModel, template: Template, folder: Path) -> None:
    """Write what a model says that is in memory as it was trained."""
    save_file({"log_probabilities": next_log_probabilities(model, template)}, folder / RECORD)


def recorded(folder: Path) -> Tensor | None:
    """What :func:`record` wrote into a stage's folder, or None.  -> [p v]"""
    path = folder / RECORD
    return load_file(path)["log_probabilities"] if path.is_file() else None


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of a log-probability, nats; not a number where a model says none."""
    return float((one - other).abs().max())
