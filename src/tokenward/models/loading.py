"""Loading any transformers language model, by name, by folder or as an object, for token-level work."""

import hashlib
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokenward.artifacts import user_path
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
    save_head_mlp,
)
from tokenward.models.identity import (
    base_config,
    config_of,
    is_place,
    model_fingerprint,
    parts_of,
    readable,
    refuses_attention,
    resolve,
)
from tokenward.models.probe import Packing, choose_head, choose_layout, probe, warn_once
from tokenward.models.sharding import (
    in_parts,
    is_empty,
    loading_whole,
    weights_within,
)
from tokenward.tokens.batches import NOTHING, Batch, Needs, TokenBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
AUTO = "auto"
"""In place of an attention implementation: sdpa, or eager for a model whose class does not support it."""
OWN = "auto"
"""In place of a dtype: the one in which a model was saved."""

BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")
"""Torch's names of processor instructions for products in bfloat16."""


def imitates_bfloat16(device: torch.device, processor: Mapping[str, Any] | None = None) -> bool:
    """Whether products in bfloat16 are slower than in float32: on a processor without instructions for them.

    With AVX2 only, a linear layer takes 7 times as long forward and 40 times backward (``python -m benchmarks.bfloat16``).
    """
    if device.type != "cpu":
        return False
    known = torch.cpu.get_capabilities() if processor is None else processor
    return not any(known.get(name, False) for name in BFLOAT16_INSTRUCTIONS)


def slow_float32(
    device: torch.device, dtype: torch.dtype, *, half: bool, bfloat16: bool | None = None
) -> bool:
    """Whether products are in float32 on a GPU that multiplies bfloat16 many times faster.

    ``half`` is whether they are in half precision, ``bfloat16`` whether the GPU has it, by default asked of torch.
    """
    if device.type != "cuda" or dtype != torch.float32 or half:
        return False
    return torch.cuda.is_bf16_supported(including_emulation=False) if bfloat16 is None else bfloat16


@dataclass(frozen=True, kw_only=True)
class LanguageModel(TokenModel):
    """A language model with its tokenizer and the results of the probe.

    Attributes:
        model: The transformers model, inside its PEFT wrapper if it has an adapter.
        head: Answers for selected tokens; None if all logits must be computed.
        head_mlp: The trained network before the head of a frozen model.
        head_mlp_settings: Settings of that network.
    """

    model: PreTrainedModel | PeftModel
    head: SelectiveHead | None
    head_mlp: AdaptedHead | None = None
    head_mlp_settings: HeadMLPSettings | None = None

    @property
    def whole(self) -> bool:
        """Whether a checkpoint must contain every weight."""
        return self.head_mlp is None

    @property
    def has_adapter(self) -> bool:
        """Whether the model has a PEFT adapter."""
        return isinstance(self.model, PeftModel)

    def read(
        self,
        module: nn.Module,
        batch: Batch,
        needs: Needs = NOTHING,
        reference: FrozenReference | None = None,
    ) -> tuple[Tensor, TokenBatch]:
        """Log-probability of each response token, 0 at tokens without weight.  -> [n] float32"""
        found = token_statistics(module, self.head, batch, needs, reference)
        return found.pop("logp"), replace(batch.tokens, statistics=found)

    def with_adapter(self, settings: dict[str, Any]) -> "LanguageModel":
        """The frozen weights with a new LoRA adapter to train.

        Raises:
            UserError: peft rejects them, or the model without the adapter would not be the base model.
        """
        # The name of a loaded model may be that of its class, which no hub has.
        base = absolute_name(resolve(self.name)) if is_place(self.name) else self.name
        start = self.start_id
        model = new_adapter(cast(PreTrainedModel, self.model), settings, base=base, start_id=start)
        return replace(self, model=model, head=install_head(model, self.head.change) if self.head else None)

    def with_head_mlp(self, settings: HeadMLPSettings, *, seed: int) -> "LanguageModel":
        """The frozen weights with a new network before the head to train."""
        model = cast(PreTrainedModel, self.model)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = install_head_mlp(model, settings)
        head = install_head(model, self.head.change) if self.head else None
        return replace(self, head=head, head_mlp=adapted, head_mlp_settings=settings)

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write an ordinary folder: the weights (only those of an adapter or head network, if any) and the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        state = None if weights is None else dict(weights)
        if self.head_mlp is not None and self.head_mlp_settings is not None:
            base = parts_of(resolve(self.name)).base  # the name may be a folder with a head network itself
            network = None if weights is None else weights_within(self.model, self.head_mlp.mlp, weights)
            save_head_mlp(self.head_mlp, self.head_mlp_settings, absolute_name(base), folder, network)
        elif isinstance(self.model, PeftModel):
            # By default peft would also save the base's embedding if the adapter targets it.
            self.model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
        else:
            cast(PreTrainedModel, self.model).save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)


def absolute_name(name: str) -> str:
    """The name of a model, with an absolute path if it is a folder."""
    path = user_path(name)
    return str(path.resolve()) if path.is_dir() else name


def weights_digest(model: TokenModel) -> str:
    """Digest of the names, dtypes and values of a model's weights, wherever it was loaded from."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Fast tokenizer of a model folder or hub name.

    Raises:
        UserError: There is none, or only a slow one.
    """
    source = _tokenizer_folder(resolve(name))
    with readable("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {name} is a slow one, which has no offsets. Convert it to a tokenizer.json first.",
            code="slow-tokenizer",
        )
    with readable("tokenizer", name):
        tokenizer("a", return_offsets_mapping=True)  # some settings are found wrong only when they are used
    return tokenizer


def tokenizer_state(name: str) -> tuple[tuple[str, int, int], ...]:
    """Names, times and sizes of the files that a model's tokenizer may be read from; empty if it is not in a folder."""
    found = sorted(Path(_tokenizer_folder(resolve(name))).glob("*.[jmt]*"))
    return tuple((path.name, (known := path.stat()).st_mtime_ns, known.st_size) for path in found)


def _tokenizer_folder(source: str) -> str:
    """Folder of the tokenizer: that of the base if an adapter was saved without one."""
    parts = parts_of(source)
    alone = parts.adapter is not None and not (Path(parts.adapter) / "tokenizer_config.json").is_file()
    return parts.base if alone else source


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    attention: str = AUTO,
    packing: Packing = "auto",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal language model, and measure which layout and head it supports.

    A folder with a PEFT adapter is loaded on its base model.

    Args:
        name: ``default``, a folder, or a hub name.
        dtype: Dtype of the weights: ``float32``, ``bfloat16``, ``float64``, or ``auto``, the one in which they were saved.
        device: ``auto`` (the GPU if there is one), or a torch device.
        attention: transformers' attention implementation; ``auto`` is sdpa, or eager where the model does not support it.
        packing: ``auto`` decides by measuring; the others insist.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: There is no such model, it is not a causal language model, or it does not support ``shared_prompts``.
    """
    parts = parts_of(resolve(name))
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    encoder_decoder = base_config(name, trust_remote_code=trust_remote_code).is_encoder_decoder
    kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model: Any = _loaded(
        kind,
        name,
        parts.base,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    check_vocabulary(model, tokenizer, name)
    if parts.adapter is not None:
        model = _with_saved_adapter(model, parts.adapter, name)
    adapted, settings = (None, None) if parts.head_mlp is None else load_head_mlp(model, Path(parts.head_mlp))
    model = cast(PreTrainedModel, nn.Module.to(model, device_of(device)).eval())
    check_finite(model, name)
    start = model.config.decoder_start_token_id if encoder_decoder else None
    files = model_fingerprint(name, trust_remote_code=trust_remote_code)
    key = (files, str(model.dtype), str(device_of(device)), attention)
    with readable("model", name):  # an adapter can have settings that only its first use finds wrong
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
    with readable("adapter", name), adapter_warnings():
        return PeftModel.from_pretrained(model, folder)


def load_backbone(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    attention: str = AUTO,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A model without its language model head, for another head.

    Raises:
        UserError: There is no such model, or it is an adapter or a head network.
    """
    parts = parts_of(resolve(name))
    config_of(parts.base, trust_remote_code=trust_remote_code)
    if parts.adapter is not None or parts.head_mlp is not None:
        raise UserError(
            f"{name} is an adapter on {parts.base}, but a reward model starts from whole weights. Use {parts.base}, or merge the "
            "adapter first.",
            code="not-whole-weights",
            key="reward.model",
        )
    model = _loaded(
        AutoModel, name, parts.base, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code
    )
    model = cast(PreTrainedModel, nn.Module.to(model, device_of(device)).eval())
    check_finite(model, name)
    return model


def _loaded(
    kind: Any,
    name: str,
    base: str,
    *,
    dtype: str,
    attention: str,
    trust_remote_code: bool,
) -> Any:
    def read(implementation: str) -> tuple[Any, dict[str, Any]]:
        settings = {"attn_implementation": implementation, "trust_remote_code": trust_remote_code}
        with loading_whole():
            own = OWN if dtype == OWN else DTYPES[dtype]
            return kind.from_pretrained(base, dtype=own, output_loading_info=True, **settings)

    with readable("model", name):
        model, found = _with_any_attention(read, name) if attention == AUTO else read(attention)
    check_complete(found["missing_keys"], name)
    if model.dtype not in DTYPES.values():
        raise UserError(
            f"the weights of {name} are in {str(model.dtype).removeprefix('torch.')}, in which training loses small changes. Use the "
            "dtype float32, or bfloat16.",
            code="unsupported-dtype",
            key="model.dtype",
        )
    return model


def _with_any_attention(read: Callable[[str], Any], name: str) -> Any:
    """A model with sdpa, or with eager attention if transformers refuses sdpa for its class."""
    try:
        return read("sdpa")
    except ValueError as error:
        if not refuses_attention(error):
            raise
        found = read("eager")
        what = "runs eager attention, which is slower and takes more memory: its class does not support sdpa"
        warn_once(found[0], name, what)
        return found


def device_of(name: str) -> torch.device:
    """The torch device of a setting; ``auto`` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"device is {name!r}, which torch does not know. Use auto, cpu, cuda or cuda:1.",
            code="unknown-device",
            key="model.device",
        ) from error


def check_complete(missing: Collection[str], name: str) -> None:
    """Refuse a model with missing weights, which transformers initializes randomly."""
    if missing:
        raise UserError(
            f"{name} has no weights for {len(missing)} parts of its model, such as {min(missing)}; they would be random. Use a "
            "folder with a whole causal language model, not a classifier or an incomplete copy.",
            code="missing-weights",
        )


def check_finite(module: nn.Module, name: str) -> None:
    """Refuse a model with weights that are NaN or infinite, with which everything computed would be one of the two.

    Raises:
        UserError: there are some; it names the first.
    """
    broken = [place for place, weight in module.named_parameters() if not _is_finite(weight.detach())]
    if broken:
        raise UserError(
            f"{name} has weights that are NaN or infinite in {len(broken)} of its {len(list(module.parameters()))} tensors, such as "
            f"{broken[0]}. Copy the folder again, or use an earlier checkpoint: a training that diverged leaves such weights.",
            code="not-finite-weights",
        )


def _is_finite(weight: Tensor) -> bool:
    if not weight.is_floating_point() or not weight.numel() or weight.is_meta:
        return True
    return bool(torch.stack(torch.aminmax(weight)).isfinite().all())  # without a mask of the weight's size


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings."""
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens but the model has {rows} embedding rows, so they do not belong "
            "together. Use a folder in which both were saved together.",
            code="tokenizer-mismatch",
        )


_KEPT = "_tokenward"
"""Attribute of a module with its :class:`LanguageModel`, so that the probe runs once."""


def prepare_model(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *, packing: Packing = "auto"
) -> LanguageModel:
    """Make a loaded language model ready for token-level work.

    The model is used as it is, on its device and in its dtype, and set to evaluation mode. Its head answers requests of this
    library from then on; all other calls work as before. It may be inside PEFT's wrapper. The tokenizer must be a fast one.

    Raises:
        UserError: It is not a language model, the tokenizer is slow or has more tokens than the model, or the model does not
            support ``shared_prompts``.
    """
    known = vars(model).get(_KEPT)
    if known is not None and known[1:] == (tokenizer, packing) and _answers(known[0]):
        return known[0]
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    if not isinstance(model.get_output_embeddings(), nn.Module):
        raise UserError(
            f"{name} is {type(model).__name__}, which has no language model head. Load it with AutoModelForCausalLM.",
            code="not-a-language-model",
        )
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer of {name} is {type(tokenizer).__name__}, which has no offsets. Pass a fast tokenizer "
            "(AutoTokenizer loads one if there is a tokenizer.json).",
            code="slow-tokenizer",
        )
    inner = cast(PreTrainedModel, model)
    if is_empty(model) or any(map(in_parts, model.parameters())):
        raise UserError(
            f"this process has no whole weights of {name}: transformers loaded them for FSDP or DeepSpeed ZeRO-3 ahead of time. Pass the "
            "model's name or folder instead, or load it before the training arguments are made.",
            code="incomplete-weights",
        )
    check_vocabulary(inner, tokenizer, name)
    check_finite(model, name)
    start = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
    model.eval()
    layout = choose_layout(inner, packing=packing, name=name, start_id=start)
    head = choose_head(inner, name=name, start_id=start)
    made = LanguageModel(
        model=model,
        tokenizer=tokenizer,
        head=head,
        layout=layout,
        fingerprint="",  # the weights need not be those of a folder
        name=name,
        start_id=start,
    )
    vars(model)[_KEPT] = (made, tokenizer, packing)
    return made


def _answers(model: LanguageModel) -> bool:
    """Whether the installed head is still in place; adding an adapter, for example, removes it."""
    if model.head is None:
        return True
    module = cast(PreTrainedModel, model.model).get_output_embeddings()
    return getattr(vars(module).get("forward"), "__self__", None) is model.head


def known_tokenizer(model: PreTrainedModel | PeftModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer that this model was passed to :func:`prepare_model` with, or None."""
    known = vars(model).get(_KEPT)
    return None if known is None else known[1]


def copy_model(model: LanguageModel, *, packing: Packing = "auto") -> LanguageModel:
    """A copy of a model that training the original does not change."""
    kept = vars(model.model).pop(_KEPT, None)
    try:
        twin = deepcopy(model.model)
    finally:
        if kept is not None:
            vars(model.model)[_KEPT] = kept
    inner = twin.get_base_model() if isinstance(twin, PeftModel) else twin
    # Copied instance forwards would still answer for the original model; those of the class are plain.
    for part in (inner, twin.get_output_embeddings(), twin.get_input_embeddings()):
        if isinstance(part, nn.Module):
            vars(part).pop("forward", None)
    return prepare_model(twin, model.tokenizer, packing=packing)
