"""What a caller hands over: models, tokenizers and data sets, as the library takes them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenward.data.prepare import from_rows
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.identity import positions_of
from tokenward.models.loading import LanguageModel, known_tokenizer, load_model, load_tokenizer, wrapped
from tokenward.models.probe import Packing
from tokenward.tokens.encode import Limits, TooLong, check_some_left
from tokenward.tokens.store import EncodedStore
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Style, Template
from tokenward.types import Comparison

Model = PreTrainedModel | PeftModel | LanguageModel | str | Path
"""A loaded language model, or the folder or hub name of one."""

Rows = Dataset | IterableDataset | Iterable[Mapping[str, Any]] | TokenTable
"""Comparisons: rows of any shape that tokenward reads, or a table that is encoded already."""

Say = Callable[[str], object]

PairRule = Literal["best_worst", "all", "adjacent"]


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """How text becomes tokens.

    Attributes:
        max_prompt_tokens: Longest prompt, template included.
        max_response_tokens: Longest response, end-of-turn token included.
        too_long: What becomes of a longer comparison: ``drop`` it, ``truncate`` it, or stop with an ``error``.
        template: ``chat`` uses the tokenizer's chat template, ``plain`` joins prompt and response as text.
        chat_template_kwargs: Variables for the chat template.
        day: The date for a template that writes one, ISO 8601; empty is today.
    """

    max_prompt_tokens: int = 1024
    max_response_tokens: int = 512
    too_long: TooLong = "drop"
    template: Literal["chat", "plain"] = "chat"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    day: str = ""

    @property
    def style(self) -> Style:
        """How conversations are written."""
        return Style(self.template, self.chat_template_kwargs, self.day)

    def limits(self, models: Iterable[TokenModel]) -> Limits:
        """Longest prompt and response that every one of some models can read."""
        known = (positions_of(cast(Any, model.model.config)) for model in models)
        context = min((length for length in known if length is not None), default=None)
        return Limits(self.max_prompt_tokens, self.max_response_tokens, self.too_long, context)


DEFAULT_TOKENS = TokenSettings()


class Data(NamedTuple):
    """Encoded comparisons.

    Attributes:
        train: To train on, or to score.
        eval: To evaluate on; empty if there are none.
    """

    train: TokenTable
    eval: TokenTable

    @property
    def everything(self) -> TokenTable:
        """Every prompt with all its responses, once."""
        return (self.train.then(self.eval) if len(self.eval) else self.train).by_prompt()


def language_model(
    model: Model,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    packing: Packing = "auto",
    device: str = "auto",
    name: str = "model",
) -> LanguageModel:
    """A language model as the library takes it.

    Args:
        model: A model that is loaded, by transformers, PEFT or this library; or the folder or hub name of one, which
            is loaded in float32. For another number type, load it yourself.
        processing_class: Its tokenizer; None loads the one that was saved with it.
        packing: ``auto`` decides by a probe whether a prompt can be computed once for all its responses.
        device: Where the model is put; ``auto`` puts one that is loaded here on the GPU, if there is one, and leaves others
            where they are.
        name: What messages call the argument.

    Raises:
        UserError: it is none of these, or cannot be loaded.
    """
    if isinstance(model, LanguageModel):
        return model
    if isinstance(model, str | Path):
        if processing_class is None:
            return load_model(str(model), packing=packing, device=device)
        loaded = load_model(str(model), packing=packing, device=device)
        return wrapped(cast(Any, loaded.model), processing_class, packing=packing)
    if isinstance(model, PreTrainedModel | PeftModel):
        if device != "auto" and not hasattr(model, "hf_device_map"):
            nn.Module.to(model, device)
        tokenizer = processing_class or known_tokenizer(model) or _tokenizer_of(model, name)
        return wrapped(model, tokenizer, packing=packing)
    raise UserError(
        f"{name} is {type(model).__name__}. Give a model of transformers or PEFT that is loaded, or the folder or hub name of one."
    )


def _tokenizer_of(model: PreTrainedModel | PeftModel, name: str) -> PreTrainedTokenizerBase:
    place = str(getattr(model.config, "_name_or_path", "") or "")
    if not place:
        raise UserError(
            f"{name} is a {type(model).__name__} that was loaded from nowhere, so its tokenizer is not known. Give "
            "processing_class=tokenizer."
        )
    try:
        return load_tokenizer(place)
    except UserError as error:
        raise UserError(
            f"the tokenizer of {name} was not found. Give processing_class=tokenizer. ({error})"
        ) from error


def encoded(
    train: Rows,
    evaluation: Rows | None,
    template: Template,
    limits: Limits,
    *,
    pairs: PairRule | None = "best_worst",
    min_gap: float | None = None,
    names: tuple[str, str] = ("train_dataset", "eval_dataset"),
    say: Say = lambda text: None,
) -> Data:
    """Comparisons as tables of one store, in which every row fits the limits.

    Args:
        train: To train on.
        evaluation: To evaluate on, or None.
        template: Writes the conversations.
        limits: Longest prompt and response.
        pairs: Which pairs to take of a prompt with more than two responses; None keeps whole lists.
        min_gap: Pairs whose scores in the data lie closer than this are left out.
        names: What messages call the two.
        say: Is told what was dropped, and why.

    Raises:
        UserError: a row cannot be read, or none is left to train on.
    """
    if isinstance(train, TokenTable):
        if evaluation is not None and not (
            isinstance(evaluation, TokenTable) and evaluation.store is train.store
        ):
            raise UserError(f"{names[0]} is a TokenTable, so {names[1]} must be one too, of the same store.")
        return Data(train, train[:0] if evaluation is None else cast(TokenTable, evaluation))
    both = [
        comparisons(train, names[0], say),
        [] if evaluation is None else comparisons(evaluation, names[1], say),
    ]
    store = EncodedStore.made(chain(*both), template, limits)
    found = []
    for first, last, name in ((0, len(both[0]), names[0]), (len(both[0]), len(store), names[1])):
        if pairs is None:
            table = TokenTable.whole(store, first, last) if last > first else _nothing(store)
        else:
            table = TokenTable.pairs(store, pairs, min_gap=min_gap, first=first, last=last)
        table, counts = table.fitting(limits)
        _say_counts(counts, name, say)
        if not found:
            check_some_left(counts)
        found.append(table)
    return Data(*found)


def _nothing(store: EncodedStore) -> TokenTable:
    return TokenTable.whole(store).choose(np.zeros(0, np.int64))


def comparisons(rows: Rows, name: str, say: Say = lambda text: None) -> Sequence[Comparison]:
    """Rows of any shape as comparisons.

    Raises:
        UserError: as :func:`tokenward.data.prepare.load`; a text is no rows.
    """
    if isinstance(rows, str | Path):
        raise UserError(
            f"{name} is the text {str(rows)!r}. Give rows: datasets.load_dataset(...), or a list with a mapping per row."
        )
    if isinstance(rows, Dataset | IterableDataset):
        rows = rows.with_format(None)
    if not isinstance(rows, Iterable):
        raise UserError(
            f"{name} is {type(rows).__name__}. Give a datasets.Dataset, or a list with a mapping per row."
        )
    loaded = from_rows(cast(Any, rows), name=name)
    _say_counts({**loaded.counts, **loaded.notes}, name, say)
    return loaded.comparisons


def _say_counts(counts: Mapping[str, int], name: str, say: Say) -> None:
    others = {key: count for key, count in counts.items() if key not in ("read", "kept") and count}
    if others:
        listed = ", ".join(f"{key}: {count}" for key, count in others.items())
        say(f"  {name}: {counts['kept']} of {counts['read']} kept; {listed}")
