"""Sequence classifiers and reward models of transformers as preference sources."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tokenward.errors import UserError
from tokenward.models.loading import resolve
from tokenward.sampling.sources.base import RowError

Encoded = dict[str, list[int]]


class _Loaded(NamedTuple):
    model: Any
    tokenizer: Any
    label: int
    inputs: list[str]
    pad_id: int | None
    max_tokens: int


@dataclass
class SequenceClassifier:
    """The score of a label by a classifier, or the number of a reward model (a classifier with one label).

    The model is loaded at the first call and kept.

    Attributes:
        model: Folder or hub name of a sequence classifier of transformers.
        label: The label that is preferred, by name or index; a reward model has only one.
        score: Of a classifier with several labels: ``probability`` of the label, or its ``logit``. A reward model gives
            its number as it is.
        batch: Texts at once. A model without a padding id takes one at a time.
        max_tokens: Longest text, special tokens included; shorter where the model's own limit is.
        device: ``auto`` (the GPU where there is one), or a torch device.
        dtype: Of the weights. In ``bfloat16`` more replies come out as ties.
        pair: Whether it reads the ``completion`` alone, or prompt and completion as the tokenizer's pair of texts.
        template_chat: Write prompt and completion as a conversation by the tokenizer's chat template instead, as chat
            reward models want them; needs ``pair: prompt_completion``.
        truncated: How many texts lost their end to ``max_tokens`` so far.
    """

    _: KW_ONLY
    model: str
    label: int | str | None = None
    score: Literal["probability", "logit"] = "probability"
    batch: int = 16
    max_tokens: int = 512
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    pair: Literal["completion", "prompt_completion"] = "completion"
    template_chat: bool = False
    truncated: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.max_tokens < 1:
            raise UserError(
                f"batch and max_tokens must be 1 or more, got {self.batch} and {self.max_tokens}. 16 and 512 are usual."
            )
        if self.template_chat and self.pair == "completion":
            raise UserError(
                "template_chat: true writes prompt and completion as a conversation, but pair: completion leaves the prompt "
                "out. Write pair: prompt_completion."
            )
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError as error:
            raise UserError(
                f"the classifier's device is {self.device!r}, which torch does not know. Write auto, cpu, cuda or cuda:1."
            ) from error

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Sequence[Any],
    ) -> list[float]:
        """One number per completion, the same whatever the batch.

        Raises:
            UserError: the model cannot be loaded, has no such label, or lacks weights.
            RowError: a text without a single token.
        """
        rows = [
            self._encode(row, prompt, completion)
            for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
        size = self.batch if self._loaded.pad_id is not None else 1
        scores = [0.0] * len(rows)
        for start in range(0, len(order), size):
            places = order[start : start + size]
            for place, value in zip(places, self._score([rows[i] for i in places]), strict=True):
                scores[place] = value
        return scores

    @cached_property
    def _loaded(self) -> _Loaded:
        model, tokenizer = _load(self.model, getattr(torch, self.dtype), self.device)
        if self.template_chat and not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {self.model} has no chat template. Leave template_chat out to give prompt and completion as "
                "a pair of texts."
            )
        config = model.config.get_text_config()
        limits = [self.max_tokens, tokenizer.model_max_length, *_positions(config)]
        accepted = inspect.signature(model.forward).parameters
        return _Loaded(
            model=model,
            tokenizer=tokenizer,
            label=_label_index(self.model, model.config.id2label, model.config.num_labels, self.label),
            inputs=[name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted],
            pad_id=config.pad_token_id,
            max_tokens=min(limits),
        )

    def _encode(self, row: int, prompt: str, completion: str) -> Encoded:
        texts, settings = self._texts(prompt, completion)
        loaded = self._loaded
        encoded = loaded.tokenizer(*texts, verbose=False, **settings)
        if len(encoded["input_ids"]) > loaded.max_tokens:
            self.truncated += 1
            encoded = loaded.tokenizer(*texts, truncation=True, max_length=loaded.max_tokens, **settings)
        if not encoded["input_ids"]:
            raise RowError(
                row,
                f"the reply {completion!r} has not a single token for {self.model} to read. Write pair: prompt_completion, or "
                "let the policy write at least one word.",
            )
        return dict(encoded)

    def _texts(self, prompt: str, completion: str) -> tuple[list[str], Mapping[str, bool]]:
        """What the tokenizer is given, and how."""
        if not self.template_chat:
            # A reply that spells a special token ("[SEP]") is text, not the end of anything.
            texts = [completion] if self.pair == "completion" else [prompt, completion]
            return texts, {"split_special_tokens": True}
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        try:
            # The template writes its own special tokens.
            text = self._loaded.tokenizer.apply_chat_template(turns, tokenize=False)
        except TemplateError as error:
            raise UserError(
                f"the chat template of {self.model} refuses one user and one assistant turn: {error}. Leave template_chat out."
            ) from error
        return [text], {"add_special_tokens": False}

    def _score(self, rows: Sequence[Encoded]) -> list[float]:
        loaded = self._loaded
        batch = {name: _padded(rows, name, loaded.pad_id or 0) for name in loaded.inputs if name in rows[0]}
        with torch.inference_mode():
            outputs = loaded.model(**{name: ids.to(loaded.model.device) for name, ids in batch.items()})
        # In float64 two confident replies differ where float32 would give both probability 1.
        logits: Tensor = outputs.logits.cpu().double()
        if self.score == "probability" and logits.shape[-1] > 1:
            several = loaded.model.config.problem_type == "multi_label_classification"
            logits = logits.sigmoid() if several else logits.softmax(-1)
        return logits[:, loaded.label].tolist()


def _load(name: str, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    source = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, HFValidationError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no sequence classifier could be loaded from {name!r}: {reason} Write the folder of a sequence classifier or "
            "reward model of transformers with its tokenizer, or a hub name that this machine can reach (owner/model)."
        ) from error
    model, found = loaded
    missing = found["missing_keys"]
    if missing:
        raise UserError(
            f"{name} has no weights for {len(missing)} parts of a sequence classifier, such as {min(missing)}; they would be "
            "random numbers. Name a trained classifier or reward model; a language model or a bare encoder is none, and an "
            "adapter must be merged first."
        )
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return model.to(chosen).eval(), tokenizer


def _positions(config: Any) -> list[int]:
    """The model's own longest text; nothing where its config does not say."""
    found = config.to_dict().get("max_position_embeddings")
    return [found] if isinstance(found, int) and found > 0 else []


def _label_index(name: str, id2label: Mapping[int, str], count: int, label: int | str | None) -> int:
    names = [id2label[index] for index in range(count)]
    if label is None and count == 1:
        return 0
    listed = ", ".join(f"{index}: {text}" for index, text in enumerate(names))
    if label is None:
        raise UserError(
            f"the classifier {name} has {count} labels ({listed}). Write label: {names[-1]} for the one that is preferred."
        )
    if label in names:
        return names.index(str(label))
    if isinstance(label, int) and 0 <= label < count:
        return label
    near = difflib.get_close_matches(str(label), names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise UserError(f"the classifier {name} has no label {label!r}. {hint}Its labels are {listed}.")


def _padded(rows: Sequence[Encoded], name: str, pad_id: int) -> Tensor:
    """Rows filled at their end, which keeps positions as they are; the mask and types with 0.  -> [b t]"""
    width = max(len(row[name]) for row in rows)
    filler = pad_id if name == "input_ids" else 0
    return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])
