"""A frozen language model, causal or masked, that classifies texts with a prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.models.forward import run_model
from tokenward.models.loading import LanguageModel, load_tokenizer
from tokenward.sampling.classification.template import (
    FilledTemplate,
    PromptTemplate,
    TemplateEncoder,
    verbalizer_ids,
)
from tokenward.sampling.loading import load_frozen
from tokenward.tokens.batches import budgeted, collate
from tokenward.tokens.layouts import ModelInputs
from tokenward.tokens.rows import Layout, TokenRow
from tokenward.types import Comparison

# Prompt tokens that share one row: the cost of its attention grows with the square of its length.
_ROW_PROMPT_TOKENS = 512
_HEAD_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class MaskedModel:
    """A masked language model with its fast tokenizer; ``name`` is as the user wrote it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    def __post_init__(self) -> None:
        if self.tokenizer.mask_token_id is None:
            raise UserError(
                f"the tokenizer of {self.name} has no mask token, so it does not belong to a masked language model. Name a model "
                "such as roberta-large, or use a causal model and a template without {mask}.",
                code="not-a-masked-model",
                key="prompt_task.masked",
            )

    @property
    def pad_id(self) -> int:
        """Padding token, which some models also use to count positions."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.device


def load_masked(
    name: str, *, dtype: str = "float32", device: str = "auto", trust_remote_code: bool = False
) -> MaskedModel:
    """Load a masked language model from a folder or the hub; see :func:`tokenward.models.loading.load_model`.

    Raises:
        UserError: there is no such model, or it is not a complete masked language model.
    """
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    advice = "Name one such as roberta-large, or use a causal model and a template without {mask}."
    where = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    model = load_frozen(AutoModelForMaskedLM, name, "masked language model", advice, **where)
    return MaskedModel(model=model, tokenizer=tokenizer, name=name)


class _Row(NamedTuple):
    """One text (by index) with prompts (by index), one per response of ``row``, whose prompt is the part that they share.

    ``answers`` are the indices of the token of each response at which the answer is read.
    """

    text: int
    prompts: list[int]
    row: TokenRow
    answers: list[int]


@dataclass(frozen=True, kw_only=True)
class TaskModel:
    """Class probabilities of texts under prompts, from a model that is never trained.

    Attributes:
        model: A causal model, whose next token is the answer, or a masked one.
        template: Where sentence and prompt stand. If the sentence comes first, a causal model reads it once for all prompts.
        verbalizers: One word per class, each exactly one token.
        precision: ``float32`` runs in the weights' dtype, ``bfloat16`` under autocast.
        tokens_per_batch: Padded tokens in a forward pass.
        max_sentence_tokens: A longer sentence is truncated; prompt and mask never are.

    Raises:
        UserError: template and model do not match, or a verbalizer is not one token.
    """

    model: LanguageModel | MaskedModel
    template: PromptTemplate
    verbalizers: Sequence[str]
    precision: Literal["float32", "bfloat16"] = "float32"
    tokens_per_batch: int = 4096
    max_sentence_tokens: int = 256

    def __post_init__(self) -> None:
        name, masked = self.model.name, isinstance(self.model, MaskedModel)
        if not isinstance(self.model, MaskedModel) and self.model.layout == "encoder_decoder":
            raise UserError(
                f"{name} has an encoder and a decoder, but a task model must be a causal or a masked language model.",
                code="unsupported-model",
                key="prompt_task.model",
            )
        if self.template.has_mask != masked:
            problem = (
                f"has no {{mask}}, but {name} is a masked language model. Write {{mask}} where the answer stands."
                if masked
                else f"has a {{mask}}, but {name} is a causal language model. Leave it out: the next token is the answer."
            )
            raise UserError(
                f"the template {self.template.text!r} {problem}",
                code="invalid-template",
                key="prompt_task.template",
            )
        verbalizer_ids(self.model.tokenizer, self.verbalizers)

    @torch.inference_mode()
    def class_logprobs(self, prompts: Sequence[Sequence[int]], texts: Sequence[str]) -> Tensor:
        """Log-probability of each class, among the verbalizers only.  p prompts, x texts -> [p x c] float32 on the CPU

        A value depends only on its prompt and its text, not on the rest of the call. A prompt is given as token ids; an
        empty one is the template without a prompt.

        Raises:
            UserError: a row is empty or longer than the model's context.
        """
        # Sampled prompts repeat more and more as their policy is trained.
        places = {ids: place for place, ids in enumerate(dict.fromkeys(map(tuple, prompts)))}
        distinct = [list(ids) for ids in places]
        found = torch.zeros(len(distinct), len(texts), len(self.verbalizers))
        rows = list(self._rows(distinct, texts))
        self._check_lengths(rows)
        layout = self._layout
        self.model.model.eval()
        for group in budgeted([row.row for row in rows], layout=layout, tokens=self.tokens_per_batch):
            members = [rows[index] for index in group]
            owners = [(prompt, row.text) for row in members for prompt in row.prompts]
            found[[prompt for prompt, _ in owners], [text for _, text in owners]] = self._answers(
                members, layout
            )
        return found[[places[tuple(ids)] for ids in prompts]]

    def sentences_cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than ``max_sentence_tokens`` and are truncated."""
        return sum(self._encoder.fill(text).cut for text in texts)

    @property
    def _layout(self) -> Layout:
        if isinstance(self.model, MaskedModel) or not self.template.sentence_first:
            return "separate"
        return self.model.layout

    @cached_property
    def _encoder(self) -> TemplateEncoder:
        return TemplateEncoder(
            self.template, self.model.tokenizer, max_sentence_tokens=self.max_sentence_tokens
        )

    @cached_property
    def _classes(self) -> Tensor:
        return torch.tensor(verbalizer_ids(self.model.tokenizer, self.verbalizers), device=self.model.device)

    def _rows(self, prompts: list[list[int]], texts: Sequence[str]) -> Iterator[_Row]:
        # An empty prompt changes the spaces around it, so those rows are built separately.
        for empty in (False, True):
            indices = [index for index, ids in enumerate(prompts) if empty != bool(ids)]
            for number, text in enumerate(texts if indices else ()):
                filled = self._encoder.fill(text, empty_prompt=empty)
                yield from self._text_rows(number, filled, prompts, indices)

    def _text_rows(
        self, text: int, filled: FilledTemplate, prompts: list[list[int]], indices: list[int]
    ) -> Iterator[_Row]:
        if isinstance(self.model, MaskedModel) or not self.template.sentence_first:
            for index in indices:
                ids = filled.row(prompts[index])
                yield _Row(text, [index], _token_row([], [ids]), [filled.answer % max(len(ids), 1)])
            return
        for group in _grouped(indices, [len(prompts[index]) + len(filled.after) for index in indices]):
            responses = [prompts[index] + filled.after for index in group]
            before = filled.before
            if not all(responses):
                # The answer is then read at the sentence's last token, which becomes the response.
                before, responses = before[:-1], [before[-1:] + ids for ids in responses]
            yield _Row(text, group, _token_row(before, responses), [len(ids) - 1 for ids in responses])

    def _answers(self, members: Sequence[_Row], layout: Layout) -> Tensor:
        """Class log-probabilities of each response of a batch.  -> [r c]"""
        batch = collate([row.row for row in members], layout=layout, pad_id=self.model.pad_id)
        lengths = torch.bincount(batch.tokens.response, minlength=batch.tokens.responses)
        starts = lengths.cumsum(0) - lengths
        answers = torch.tensor([place for row in members for place in row.answers])
        positions = batch.inputs.placed_at[starts + answers]
        enabled = self.precision == "bfloat16"
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=enabled):
            logits = self._class_logits(batch.inputs.to(self.model.device), positions.to(self.model.device))
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide.log_softmax(-1).float().cpu()

    def _class_logits(self, inputs: ModelInputs, positions: Tensor) -> Tensor:
        model: Any = self.model.model
        if isinstance(self.model, MaskedModel):
            # No position ids: RoBERTa, for one, starts counting at its padding id + 1.
            logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
        elif self.model.head is None:
            logits = run_model(model, inputs).logits
        else:
            with self.model.head.answering(positions, None):
                hidden = run_model(model, inputs).logits
            parts = hidden.split(
                _HEAD_ROWS
            )  # the full vocabulary of all rows at once would take too much memory
            return torch.cat([self.model.head.logits(part)[:, self._classes] for part in parts])
        return logits.reshape(-1, logits.shape[-1])[positions][:, self._classes]

    def _check_lengths(self, rows: Sequence[_Row]) -> None:
        config = self.model.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None:
            # The smaller one counts for some masked models. A tokenizer without a limit reports a number of 31 digits.
            limit = min(limit, self.model.tokenizer.model_max_length)
        for row in rows:
            if not all(row.row.responses):
                raise UserError(
                    f"text {row.text} and the prompt are both empty, so there is nothing to read. Leave out empty texts.",
                    code="empty-text",
                )
            longest = len(row.row.prompt) + max(map(len, row.row.responses))
            if limit is not None and longest > limit:
                raise UserError(
                    f"text {row.text} with its prompt and the template has {longest} tokens, but {self.model.name} reads {limit}. "
                    f"Lower max_sentence_tokens (now {self.max_sentence_tokens}) or shorten the prompt.",
                    code="too-long",
                    key="prompt_task.max_sentence_tokens",
                )


def _grouped(indices: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Consecutive prompts whose tokens fit into one row."""
    group: list[int] = []
    total = 0
    for index, length in zip(indices, lengths, strict=True):
        if group and total + length > _ROW_PROMPT_TOKENS:
            yield group
            group, total = [], 0
        group.append(index)
        total += length
    if group:
        yield group


def _token_row(prompt: list[int], responses: list[list[int]]) -> TokenRow:
    count = len(responses)
    comparison = Comparison(
        key="", prompt=(), responses=("",) * count, ranks=tuple(range(count)), source="task model"
    )
    return TokenRow(comparison, prompt, responses, [0] * count)
