"""The arguments of the library's functions: models, tokenizers and data sets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenward.api.constant import Say
from tokenward.data.prepare import comparison_key, from_rows
from tokenward.data.stream import PROMPT_TRAINS
from tokenward.errors import UserError
from tokenward.models.base import TokenModel, shares_weights
from tokenward.models.identity import positions_of
from tokenward.models.loading import LanguageModel, known_tokenizer, load_model, load_tokenizer, prepare_model
from tokenward.models.probe import Packing
from tokenward.plugins import check_argument, described, validated
from tokenward.scoring.basic import LogRatio, Scorer
from tokenward.tokens.encode import Limits, TooLong, check_some_left, explanations
from tokenward.tokens.split import SAID, Note
from tokenward.tokens.store import EncodedStore
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Style, Template
from tokenward.trl_names import answers_trl
from tokenward.types import Comparison, Precision

Model = PreTrainedModel | PeftModel | LanguageModel | str | Path
"""A loaded language model, or the folder or hub name of one."""

Rows = Dataset | IterableDataset | Iterable[Mapping[str, Any]] | TokenTable
"""Comparisons: rows of any format that tokenward reads, or an encoded table."""

PairRule = Literal["best_worst", "all", "adjacent"]


_OPTIONS: dict[str, Any] = {"precision": Precision, "packing": Packing, "pairs": PairRule | None}


def check_options(**options: Any) -> None:
    """Check the arguments ``precision``, ``packing`` and ``pairs`` of a function before it loads anything.

    Raises:
        UserError: a value is none of the argument's choices.
    """
    for name, value in options.items():
        check_argument(name, value, _OPTIONS[name])


@answers_trl
@dataclass(frozen=True, kw_only=True)
@validated
class TokenSettings:
    """How text becomes tokens.

    Attributes:
        max_prompt_tokens: Maximum length of a prompt, including the template's tokens.
        max_response_tokens: Maximum length of a response, including the end-of-turn token.
        too_long: What to do with longer comparisons: ``drop``, ``truncate`` or raise an ``error``.
        template: ``chat`` uses the tokenizer's chat template; ``plain`` concatenates prompt and response.
        chat_template_kwargs: Variables passed to the chat template.
        day: Date for templates that print one, ISO 8601; empty is today.
    """

    max_prompt_tokens: int = 1024
    max_response_tokens: int = 512
    too_long: TooLong = "drop"
    template: Literal["chat", "plain"] = "chat"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    day: str = ""

    @property
    def style(self) -> Style:
        """The style that conversations are written in."""
        return Style(self.template, self.chat_template_kwargs, self.day)

    def limits(self, models: Iterable[TokenModel]) -> Limits:
        """The maximum lengths, within the context of all given models."""
        known = (positions_of(cast(Any, model.model.config)) for model in models)
        context = min((length for length in known if length is not None), default=None)
        return Limits(self.max_prompt_tokens, self.max_response_tokens, self.too_long, context)


DEFAULT_TOKENS = TokenSettings()


class Data(NamedTuple):
    """Encoded comparisons to train on, or to score, and to evaluate on; ``eval`` may be empty."""

    train: TokenTable
    eval: TokenTable

    @property
    def everything(self) -> TokenTable:
        """All distinct responses, with one row for each prompt."""
        return (self.train.then(self.eval) if len(self.eval) else self.train).by_prompt()


def language_model(
    model: Model,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    packing: Packing = "auto",
    device: str = "auto",
    name: str = "model",
    fallback: PreTrainedTokenizerBase | None = None,
) -> LanguageModel:
    """Load a model argument, or wrap a loaded one.

    Args:
        model: A loaded model, or a folder or hub name, which is loaded in float32.
        processing_class: The tokenizer; None loads the one saved with the model.
        packing: ``auto`` tests whether the model can read a prompt once for several responses.
        device: ``auto`` moves models that are loaded here to the GPU if there is one, and leaves others where they are.
        name: Name of the argument, for messages.
        fallback: The tokenizer of a loaded model that does not know its own.

    Raises:
        UserError: it has another type, or cannot be loaded.
    """
    if isinstance(model, LanguageModel):
        _check_no_adapter_inside(model.model, name)
        return model
    if isinstance(model, str | Path):
        loaded = load_model(str(model), packing=packing, device=device)
        if processing_class is None:
            return loaded
        return prepare_model(cast(Any, loaded.model), processing_class, packing=packing)
    if isinstance(model, PreTrainedModel | PeftModel):
        _check_no_adapter_inside(model, name)
        if device != "auto" and not hasattr(model, "hf_device_map"):
            nn.Module.to(model, device)
        tokenizer = processing_class or known_tokenizer(model) or _tokenizer_of(model, name, fallback)
        return prepare_model(model, tokenizer, packing=packing)
    raise UserError(
        f"{name} is {described(model)}. Pass a loaded model of transformers or PEFT, or a folder or hub name.",
        code="wrong-type",
    )


def _check_no_adapter_inside(model: PreTrainedModel | PeftModel, name: str) -> None:
    """Refuse the base of a ``PeftModel`` as a reference: PEFT puts adapters into the base itself, which then gives the numbers of both."""
    known = isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
    if known or name != "reference":  # anywhere else, the model as it is now is what is meant
        return
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError(
            f"{name} has a PEFT adapter inside: get_peft_model, or a training with peft_config, changed this object, so it is no longer "
            "the base model. Pass the folder or hub name of the base model, load it again, or pass the PeftModel if that is meant.",
            code="adapter-inside",
        )


def check_separate(models: Mapping[str, TokenModel]) -> None:
    """Refuse two models that are different objects but share weights, such as two adapters in one base.

    Only one of the adapters is active, so both models would give the same numbers.
    """
    for (name, one), (other_name, other) in combinations(models.items(), 2):
        if one.model is not other.model and shares_weights(one, other):
            raise UserError(
                f"{name} and {other_name} share weights: PEFT puts adapters into the base model itself, so both would give the same "
                f"numbers. Load the base model once for each.",
                code="same-model",
            )


def check_ratio(scorer: Scorer, models: Mapping[str, TokenModel]) -> None:
    """Refuse a log-ratio of a model to itself, which would be 0 for every token."""
    check_separate(models)
    if not isinstance(scorer, LogRatio) or not {scorer.numerator, scorer.denominator} <= models.keys():
        return
    above, below = models[scorer.numerator], models[scorer.denominator]
    if above.model is below.model or (above.fingerprint != "" and above.fingerprint == below.fingerprint):
        raise UserError(
            f"{scorer.numerator} and {scorer.denominator} are the same model, so every score would be 0. Pass the model that the oracle "
            "was trained from as reference.",
            code="same-model",
        )


def _tokenizer_of(
    model: PreTrainedModel | PeftModel, name: str, fallback: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    place = str(getattr(model.config, "_name_or_path", "") or "")
    if not place and fallback is not None:
        return fallback
    if not place:
        raise UserError(
            f"{name} is a {type(model).__name__} that was not loaded from a folder or the hub, so its tokenizer is not known. "
            "Pass processing_class=tokenizer.",
            code="missing-tokenizer",
        )
    try:
        return load_tokenizer(place)
    except UserError as error:
        raise UserError(
            f"the tokenizer of {name} was not found. Pass processing_class=tokenizer. ({error})",
            code="missing-tokenizer",
        ) from error


def encode_rows(
    train: Rows,
    evaluation: Rows | None,
    template: Template,
    limits: Limits,
    *,
    pairs: PairRule | None = "best_worst",
    min_gap: float | None = None,
    names: tuple[str, str] = ("train_dataset", "eval_dataset"),
    evaluates: bool = False,
    say: Say = lambda text: None,
) -> Data:
    """Encode comparisons that fit the limits as tables of one store. Eval rows whose prompt is trained on are dropped.

    Args:
        train: Rows to train on.
        evaluation: Eval rows, or None.
        template: Writes the conversations.
        limits: Maximum lengths.
        pairs: Which pairs to form of more than two responses; None keeps whole lists.
        min_gap: Smallest difference of the data's scores in a pair.
        names: Names of both arguments, for messages.
        evaluates: Whether some eval rows must be left.
        say: Shows a line about dropped rows.

    Raises:
        UserError: a row cannot be read, or no training row is left, or no eval row that is needed.
    """
    if isinstance(train, TokenTable):
        return _tables(train, evaluation, names, evaluates, say)
    rows = read_rows(train, names[0], say)
    held = [] if evaluation is None else read_rows(evaluation, names[1], say, needed=evaluates)
    unseen = [row for row, own in zip(held, _unseen(held, rows), strict=True) if own]
    _say_unseen(len(unseen), len(held), names, evaluates, say)
    store = EncodedStore.made(chain(rows, unseen), template, limits)
    found = []
    for first, last, name in ((0, len(rows), names[0]), (len(rows), len(store), names[1])):
        if pairs is not None:
            table = TokenTable.pairs(store, pairs, min_gap=min_gap, first=first, last=last)
        elif first < last:
            table = TokenTable.whole(store, first, last)
        else:
            table = TokenTable.whole(store).choose(np.zeros(0, np.int64))
        table, counts = table.fitting(limits)
        say_counts(counts, name, say)
        if not found:
            for line in said_notes(template, counts, store):
                say(line)
        if not found or (evaluates and len(unseen)):
            check_some_left(counts)
        found.append(table)
    return Data(*found)


def said_notes(template: Template, counts: Mapping[str, int], store: EncodedStore) -> list[str]:
    """Lines that explain unusual ways in which the template renders rows, each with an example and what to do."""
    found: dict[Note, Comparison] = {}
    for note, words in SAID.items():
        row = store.first_with(note) if counts.get(words) else None
        if row is not None:
            found[note] = store.comparison(row)
    return explanations(template, found, counts)


def _tables(
    train: TokenTable, evaluation: Rows | None, names: tuple[str, str], evaluates: bool, say: Say
) -> Data:
    """Tables that are encoded already."""
    if evaluation is None:
        return Data(train, train[:0])
    if not isinstance(evaluation, TokenTable) or evaluation.store is not train.store:
        raise UserError(
            f"{names[0]} is a TokenTable, so {names[1]} must be a TokenTable of the same store.",
            code="wrong-type",
        )
    trained, held = ([table.comparison(row) for row in range(len(table))] for table in (train, evaluation))
    found = evaluation.where(np.array(_unseen(held, trained), bool))
    _say_unseen(len(found), len(evaluation), names, evaluates, say)
    return Data(train, found)


def _unseen(held: Sequence[Comparison], train: Sequence[Comparison]) -> list[bool]:
    """Which comparisons have a prompt that is not trained on."""
    prompts = {comparison_key(row.prompt, ()) for row in train} if held else set()
    return [comparison_key(row.prompt, ()) not in prompts for row in held]


def _say_unseen(kept: int, read: int, names: tuple[str, str], evaluates: bool, say: Say) -> None:
    if evaluates and read and not kept:
        raise UserError(
            f"all {read} rows of {names[1]} have a prompt that is also in {names[0]}, so none is left to evaluate on. Pass rows "
            "with other prompts, or set eval_strategy to no.",
            code="no-eval-rows",
        )
    say_counts({"read": read, "kept": kept, PROMPT_TRAINS: read - kept}, names[1], say)


def check_rows_type(rows: Any, name: str) -> None:
    """Refuse the containers of data sets that look like rows.

    Raises:
        UserError: the rows are a ``DatasetDict``, a dict of columns, a file name or no container.
    """
    if isinstance(rows, str | Path) or not isinstance(rows, Iterable | TokenTable):
        raise UserError(
            f"{name} is {rows!r:.200}, which is not a data set. Pass a datasets.Dataset, such as datasets.load_dataset(...) returns, "
            "or a list with a mapping for each row.",
            code="wrong-type",
        )
    if isinstance(rows, DatasetDict | IterableDatasetDict):
        first = next(iter(rows), "train")
        raise UserError(
            f"{name} is {described(rows)} with the splits {', '.join(map(str, rows))}. Pass one of them: "
            f'dataset["{first}"].',
            code="wrong-type",
        )
    if isinstance(rows, Mapping):
        lengths = [len(column) for column in rows.values() if isinstance(column, list)]
        advice = f"dataset.select(range({lengths[0]}))" if lengths else "a list with a mapping for each row"
        raise UserError(
            f"{name} is {described(rows)} of columns ({', '.join(map(str, rows))}), such as dataset[:5] returns. Pass {advice}.",
            code="wrong-type",
        )


def check_data(train: Any, evaluation: Any = None) -> None:
    """Refuse containers that are no rows, before a model is loaded for them."""
    for name, rows in (("train_dataset", train), ("eval_dataset", evaluation)):
        if rows is not None or name == "train_dataset":
            check_rows_type(rows, name)


def read_rows(
    rows: Rows, name: str, say: Say = lambda text: None, *, needed: bool = True
) -> Sequence[Comparison]:
    """Read rows of any format as comparisons.

    Raises:
        UserError: as :func:`tokenward.data.prepare.load`; or it is not a data set, such as a file name.
    """
    check_rows_type(rows, name)
    if isinstance(rows, Dataset | IterableDataset):
        rows = rows.with_format(None)
    loaded = from_rows(cast(Any, rows), name=name)
    if needed and not loaded.comparisons:
        raise _no_rows(loaded.counts, name)
    say_counts({**loaded.counts, **loaded.notes}, name, say)
    return loaded.comparisons


def _no_rows(counts: Mapping[str, int], name: str) -> UserError:
    if not counts["read"]:
        return UserError(f"{name} has no rows.", code="no-rows")
    return UserError(f"All {counts['read']} rows of {name} were dropped ({_listed(counts)}).", code="no-rows")


def _listed(counts: Mapping[str, int]) -> str:
    """The counts other than those of the rows that were read and kept."""
    others = {key: count for key, count in counts.items() if key not in ("read", "kept") and count}
    return ", ".join(f"{key}: {count}" for key, count in others.items())


def say_counts(counts: Mapping[str, int], name: str, say: Say) -> None:
    """Say how many of the rows were kept, and why the others were not; nothing if all were, as they are."""
    if listed := _listed(counts):
        say(f"  {name}: {counts['kept']} of {counts['read']} kept; {listed}")
