"""A frozen language model, causal or masked, that classifies texts with a prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.models.forward import run_model
from tokenward.models.identity import resolve
from tokenward.models.loading import DTYPES, LanguageModel, device_of, load_tokenizer
from tokenward.sampling.classification.template import (
    FilledTemplate,
    PromptTemplate,
    TemplateEncoder,
    verbalizer_ids,
)
from tokenward.tokens.batches import budgeted, collate
from tokenward.tokens.layouts import ModelInputs
from tokenward.tokens.rows import Layout, TokenRow
from tokenward.types import Comparison

# Of one shared row: its attention grows with the square of its length.
_ROW_PROMPT_TOKENS = 512
_HEAD_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class MaskedModel:
    """A masked language model with its tokenizer.

    Attributes:
        model: The transformers model.
        tokenizer: Its fast tokenizer, which has a mask token.
        name: As the user wrote it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    def __post_init__(self) -> None:
        if self.tokenizer.mask_token_id is None:
            raise UserError(
                f"the tokenizer of {self.name} has no mask token, so it is no masked language model's. Name a model "
                "such as roberta-large, or load this one as a causal language model and leave {mask} out."
            )

    @property
    def pad_id(self) -> int:
        """Id that fills rows, which some models also count their positions by."""
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device


def load_masked(
    name: str, *, dtype: str = "float32", device: str = "auto", trust_remote_code: bool = False
) -> MaskedModel:
    """Load a masked language model.

    Args:
        name: A folder or a hub name.
        dtype: Of the weights: ``float32``, ``bfloat16`` or ``float64``.
        device: ``auto`` (the GPU where there is one), or a torch device.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: there is no such model, or it is no whole masked language model.
    """
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    try:
        loaded: Any = AutoModelForMaskedLM.from_pretrained(
            resolve(name), dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, HFValidationError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no masked language model could be loaded from {name!r}: {reason} Name one such as roberta-large, or load a "
            "causal language model and leave {mask} out of the template."
        ) from error
    model, found = loaded
    if found["missing_keys"]:
        raise UserError(
            f"{name} has no weights for {len(found['missing_keys'])} parts of its model, such as "
            f"{min(found['missing_keys'])}; they would be random numbers. Name a folder of a whole masked language model."
        )
    moved = cast(PreTrainedModel, nn.Module.to(model, device_of(device)).eval())
    return MaskedModel(model=moved, tokenizer=tokenizer, name=name)


class _Row(NamedTuple):
    """One text with several prompts, or with one.

    Attributes:
        text: Index of the text.
        prompts: Indices of the prompts, one per response of ``row``.
        row: What is shared as the row's prompt, and what each prompt adds as a response.
        answers: Which token of each response the answer is read at.
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
        template: Where sentence and prompt stand. A causal model reads the sentence once for all prompts where
            it comes first.
        verbalizers: One word per class, each exactly one token.
        precision: ``float32`` runs in the weights' own dtype, ``bfloat16`` under autocast.
        tokens_per_batch: Padded tokens read at once.
        max_sentence_tokens: A longer sentence loses its end; prompt and mask are never cut.

    Raises:
        UserError: template and model do not fit, or the verbalizers are not one token each.
    """

    model: LanguageModel | MaskedModel
    template: PromptTemplate
    verbalizers: Sequence[str]
    precision: Literal["float32", "bfloat16"] = "float32"
    tokens_per_batch: int = 4096
    max_sentence_tokens: int = 256

    def __post_init__(self) -> None:
        self._check_model()
        if self.max_sentence_tokens < 1 or self.tokens_per_batch < 1:
            raise UserError(
                f"max_sentence_tokens is {self.max_sentence_tokens} and tokens_per_batch {self.tokens_per_batch}; both must "
                "be at least 1."
            )
        verbalizer_ids(self.model.tokenizer, self.verbalizers)

    def _check_model(self) -> None:
        masked = self._masked
        if not isinstance(self.model, MaskedModel) and self.model.layout == "encoder_decoder":
            raise UserError(
                f"{self.model.name} has an encoder and a decoder; a task model is a causal or a masked language model."
            )
        if self.template.has_mask == masked:
            return
        problem, advice = (
            ("has no {mask}, but", "is a masked language model. Write {mask} where the answer stands.")
            if masked
            else (
                "has a {mask}, but",
                "is a causal language model. Leave it out: the next token is the answer.",
            )
        )
        raise UserError(f"the template {self.template.text!r} {problem} {self.model.name} {advice}")

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.verbalizers)

    @torch.inference_mode()
    def class_logprobs(self, prompts: Sequence[Sequence[int]], texts: Sequence[str]) -> Tensor:
        """Log-probability of each class, among the verbalizers only.  -> [p x c] float32 on the CPU

        A value depends on its prompt and its text alone, not on what else is asked for.

        Args:
            prompts: ``p`` prompts as token ids; an empty one is the template without a prompt.
            texts: ``x`` sentences.

        Raises:
            UserError: a row is empty or longer than the model's context, or an id is none of the model's.
        """
        # Sampled prompts repeat themselves more and more as their policy is trained.
        places = {ids: place for place, ids in enumerate(dict.fromkeys(map(tuple, prompts)))}
        distinct = [list(ids) for ids in places]
        self._check_ids(distinct)
        found = torch.zeros(len(distinct), len(texts), self.classes)
        rows = list(self._rows(distinct, texts))
        self._check_lengths(rows)
        layout = self._layout
        self.model.model.eval()
        for group in budgeted([row.row for row in rows], layout=layout, tokens=self.tokens_per_batch):
            members = [rows[index] for index in group]
            logp = self._answers(members, layout)
            owners = [(prompt, row.text) for row in members for prompt in row.prompts]
            found[[prompt for prompt, _ in owners], [text for _, text in owners]] = logp
        return found[[places[tuple(ids)] for ids in prompts]]

    def sentences_cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than ``max_sentence_tokens`` and lose their end."""
        return sum(self._encoder.fill(text).cut for text in texts)

    @property
    def _masked(self) -> bool:
        return isinstance(self.model, MaskedModel)

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
        filled = [index for index, ids in enumerate(prompts) if ids]
        # Without a prompt the template begins or goes on otherwise, so those rows are made apart.
        for indices in (filled, [index for index, ids in enumerate(prompts) if not ids]):
            if not indices:
                continue
            for number, text in enumerate(texts):
                filled = self._encoder.fill(text, empty_prompt=not prompts[indices[0]])
                yield from self._text_rows(number, filled, prompts, indices)

    def _text_rows(
        self, text: int, filled: FilledTemplate, prompts: list[list[int]], indices: list[int]
    ) -> Iterator[_Row]:
        if self._masked or not self.template.sentence_first:
            for index in indices:
                ids = filled.row(prompts[index])
                answer = filled.answer if filled.answer >= 0 else len(ids) + filled.answer
                yield _Row(text, [index], _token_row([], [ids]), [answer])
            return
        for group in _grouped(indices, [len(prompts[index]) + len(filled.after) for index in indices]):
            responses = [prompts[index] + filled.after for index in group]
            before = filled.before
            if not all(responses):
                # The answer is then read at the sentence's last token, which so becomes the response.
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
        if isinstance(self.model, MaskedModel):
            # No position ids: some of these models count their positions from another number than 0.
            model: Any = self.model.model
            logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
            return logits.reshape(-1, logits.shape[-1])[positions][:, self._classes]
        head = self.model.head
        if head is None:
            logits = run_model(self.model.model, inputs).logits
            return logits.reshape(-1, logits.shape[-1])[positions][:, self._classes]
        with head.answering(positions, None):
            hidden = run_model(self.model.model, inputs).logits
        return torch.cat([head.logits(part)[:, self._classes] for part in hidden.split(_HEAD_ROWS)])

    def _check_ids(self, prompts: list[list[int]]) -> None:
        size = self.model.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        for ids in prompts:
            for token in ids:
                if not 0 <= token < size:
                    raise UserError(
                        f"the prompt {ids} has the id {token}, but {self.model.name} has ids 0 to {size - 1}. Prompts must be "
                        "made with the task model's own tokenizer."
                    )

    def _check_lengths(self, rows: Sequence[_Row]) -> None:
        limit = self._context
        for row in rows:
            encoded = row.row
            longest = len(encoded.prompt) + max(map(len, encoded.responses))
            if longest == 0 or not all(encoded.responses):
                raise UserError(
                    f"text {row.text} is empty and so is the prompt: there is nothing to read. Leave empty texts out."
                )
            if limit is not None and longest > limit:
                raise UserError(
                    f"text {row.text} with its prompt and the template has {longest} tokens, but {self.model.name} reads {limit}. "
                    f"Lower max_sentence_tokens (now {self.max_sentence_tokens}) or shorten the prompt."
                )

    @property
    def _context(self) -> int | None:
        config = self.model.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        # A tokenizer that knows no limit says a number of 31 digits; a masked model's may be the smaller one.
        known = [positions] if positions is not None else []
        return min([*known, self.model.tokenizer.model_max_length]) if known else None


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
