"""Sequence classifiers and reward models of transformers as preference sources."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tokenward.errors import UserError
from tokenward.sampling.loading import from_pretrained, load_frozen
from tokenward.sampling.sources.base import RowError
from tokenward.tokens.bounds import apply_chat_template

Encoded = dict[str, list[int]]

KIND = "sequence classifier"
ADVICE = (
    "Name the folder or hub name (owner/model) of a trained classifier or reward model with its tokenizer. A language model or "
    "a bare encoder is not one, and an adapter must be merged first."
)


class _Loaded(NamedTuple):
    model: Any
    tokenizer: Any
    label: int
    inputs: list[str]
    pad_id: int | None
    max_tokens: int


@dataclass
class SequenceClassifier:
    """The score of one label of a classifier, or the output of a reward model (a classifier with one label).

    The model is loaded at the first call and kept.

    Attributes:
        model: Folder or hub name of a transformers sequence classifier.
        label: Name or index of the preferred label. Not needed for a reward model.
        score: For a classifier with several labels: ``probability`` or ``logit`` of the label. A reward model's output is
            used as it is.
        batch: Texts per forward pass; 1 is used for a model without a padding id.
        max_tokens: Maximum text length with special tokens, capped by the model's own limit.
        device: ``auto`` (the GPU if there is one), or a torch device.
        dtype: Dtype of the weights. In ``bfloat16`` more replies tie.
        pair: Whether the model reads the ``completion`` alone, or prompt and completion as the tokenizer's text pair.
        template_chat: Format prompt and completion with the tokenizer's chat template instead, for chat reward models.
            Needs ``pair="prompt_completion"``.
        truncated: Number of texts truncated to ``max_tokens`` so far.
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
                f"batch and max_tokens must be at least 1, got {self.batch} and {self.max_tokens}.",
                code="invalid-setting",
            )
        if self.template_chat and self.pair == "completion":
            raise UserError(
                "template_chat formats prompt and completion, but pair is completion, which leaves out the prompt. Set pair to "
                "prompt_completion.",
                code="conflicting-settings",
            )
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError as error:
            raise UserError(
                f"torch does not know the device {self.device!r}. Use auto, cpu, cuda or cuda:1.",
                code="unsupported-device",
            ) from error

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Sequence[Any],
    ) -> list[float]:
        """One number per completion, independent of the batch.

        Raises:
            UserError: the model cannot be loaded, has no such label, or lacks weights.
            RowError: a text has no tokens.
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
        tokenizer = from_pretrained(AutoTokenizer, self.model, KIND, ADVICE)
        model = load_frozen(
            AutoModelForSequenceClassification,
            self.model,
            KIND,
            ADVICE,
            dtype=self.dtype,
            device=self.device,
        )
        if self.template_chat and not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {self.model} has no chat template. Leave out template_chat to pass prompt and completion as "
                "a text pair.",
                code="no-chat-template",
            )
        config = model.config.get_text_config()
        positions = config.to_dict().get("max_position_embeddings")
        own_limit = [positions] if isinstance(positions, int) and positions > 0 else []
        accepted = inspect.signature(model.forward).parameters
        return _Loaded(
            model=model,
            tokenizer=tokenizer,
            label=_label_index(self.model, model.config.id2label, model.config.num_labels, self.label),
            inputs=[name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted],
            pad_id=config.pad_token_id,
            max_tokens=min(self.max_tokens, tokenizer.model_max_length, *own_limit),
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
                f"the reply {completion!r} has no tokens for {self.model} to read. Set pair to prompt_completion, or leave out "
                "empty replies.",
                code="empty-text",
            )
        return dict(encoded)

    def _texts(self, prompt: str, completion: str) -> tuple[list[str], Mapping[str, bool]]:
        """The texts and settings for the tokenizer."""
        if not self.template_chat:
            # A special token that a reply spells out, such as "[SEP]", is text and must not be encoded as the token.
            texts = [completion] if self.pair == "completion" else [prompt, completion]
            return texts, {"split_special_tokens": True}
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        try:
            text = apply_chat_template(self._loaded.tokenizer, turns, tokenize=False)
        except (TemplateError, RecursionError, MemoryError) as error:
            raise UserError(
                f"the chat template of {self.model} rejects one user and one assistant turn: {error}. Leave out template_chat.",
                code="chat-template-error",
            ) from error
        return [text], {"add_special_tokens": False}  # the template writes them

    def _score(self, rows: Sequence[Encoded]) -> list[float]:
        loaded = self._loaded
        batch = {name: _padded(rows, name, loaded.pad_id or 0) for name in loaded.inputs if name in rows[0]}
        with torch.inference_mode():
            outputs = loaded.model(**{name: ids.to(loaded.model.device) for name, ids in batch.items()})
        # float64: in float32 two confident replies may both get probability 1.
        logits: Tensor = outputs.logits.cpu().double()
        if self.score == "probability" and logits.shape[-1] > 1:
            several = loaded.model.config.problem_type == "multi_label_classification"
            logits = logits.sigmoid() if several else logits.softmax(-1)
        return logits[:, loaded.label].tolist()


def _label_index(name: str, id2label: Mapping[int, str], count: int, label: int | str | None) -> int:
    names = [id2label[index] for index in range(count)]
    if label is None and count == 1:
        return 0
    if label in names:
        return names.index(str(label))
    if isinstance(label, int) and 0 <= label < count:
        return label
    listed = ", ".join(f"{index}: {text}" for index, text in enumerate(names))
    if label is None:
        raise UserError(
            f"the classifier {name} has {count} labels ({listed}). Set label to the preferred one, such as {names[-1]}.",
            code="unknown-label",
        )
    near = difflib.get_close_matches(str(label), names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"the classifier {name} has no label {label!r}. {hint}Its labels are {listed}.", code="unknown-label"
    )


def _padded(rows: Sequence[Encoded], name: str, pad_id: int) -> Tensor:
    """Rows padded on the right, which keeps positions as they are; masks and types with 0.  -> [b t]"""
    width = max(len(row[name]) for row in rows)
    filler = pad_id if name == "input_ids" else 0
    return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])
