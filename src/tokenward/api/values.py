"""An oracle in any of its forms, and the values per token that it gives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from tokenward.api.inputs import Model, language_model
from tokenward.artifacts import MANIFEST
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.identity import positions_of
from tokenward.models.loading import LanguageModel, load_model
from tokenward.models.probe import Packing
from tokenward.models.reward import RewardModel, is_reward_folder
from tokenward.plugins import check_call, name_of
from tokenward.sampling.counterfactual import critical_tokens
from tokenward.scoring.basic import LogRatio, Record, Reward, Scorer, read_spans
from tokenward.scoring.model_scorers import internal_values
from tokenward.scoring.reads import Value, reads_of, token_values
from tokenward.scoring.scorers import check_scope
from tokenward.scoring.store import Found, TokenRecord, TokenStore, write_shards, write_store
from tokenward.scoring.texts import TokenScorer
from tokenward.tokens.encode import prompted
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.segments import moved, spelled, with_segments
from tokenward.tokens.spans import span_values
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Style, Template
from tokenward.types import Span


class Maker:
    """Gives some values of one model, or of the data.

    Args:
        name: ``reference``, ``oracle``, ``reward``, the name of an auxiliary model, or ``data``.
        values: Which.
        template: That wrote the rows.
        load: Gives the model, with an attention implementation or, for None, with its own. Never called for ``data``.
        style: In which the rows were written.
        precision: As :func:`tokenward.scoring.reads.over_batches` takes it.
        tokens_per_batch: Most tokens in one pass.
        batch: Continuations at a time, for values that need some.
        cache: Folder for what is too dear to be made again.
        prompt: Text with ``{prompt}`` that the model reads in place of the last user turn; None changes nothing.

    Raises:
        UserError: the model has another tokenizer or chat template than the rows.
    """

    def __init__(
        self,
        name: str,
        values: Sequence[Value],
        template: Template,
        load: Callable[[str | None], TokenModel],
        *,
        style: Style,
        precision: str = "float32",
        tokens_per_batch: int = 8192,
        batch: int = 64,
        cache: Path | None = None,
        prompt: str | None = None,
    ) -> None:
        self._name, self._values, self._template, self._load = name, values, template, load
        self._settings: dict[str, Any] = {"precision": precision, "tokens_per_batch": tokens_per_batch}
        self._style, self._batch, self._cache, self._prompt = style, batch, cache, prompt
        if name != "data":
            assert self._model is not None  # another tokenizer is refused before anything is computed

    @property
    def passes(self) -> int:
        """How often each response counts as work."""
        return len(self._values)

    def __call__(self, group: Sequence[TokenRow], progress: Callable[[int], None]) -> dict[str, Found]:
        """The values of some rows, by name."""
        if self._name != "data" and self._prompt:
            context = positions_of(self._model.model.config)  # type: ignore[arg-type]  # of a loaded model
            group = [prompted(row, self._template, self._prompt, context) for row in group]
        found: dict[str, Found] = {}
        for value in self._values:
            found[str(value)] = self._made(value, group)
            progress(sum(len(row.responses) for row in group))
        return found

    @cached_property
    def _model(self) -> TokenModel:
        model = self._load(None)
        if model.template(self._style).fingerprint != self._template.fingerprint:
            raise UserError(
                f"the {self._name} in {model.name} has another tokenizer or chat template than "
                f"{self._template.tokenizer.name_or_path}, so their values belong to other tokens. Name models of one family."
            )
        return model

    @cached_property
    def _eager(self) -> TokenModel:
        """The model with transformers' own eager attention, which alone gives its weights."""
        return self._load("eager")

    def _made(self, value: Value, group: Sequence[TokenRow]) -> Found:
        if self._name == "data":
            return [self._of_data(value, row) for row in group]
        rows, settings = list(group), self._settings
        if isinstance(self._model, RewardModel):
            rows = [with_segments(self._model.settings.unit, self._model.tokenizer, row) for row in rows]
        if value.kind in ("", "logp"):
            return token_values(self._model, rows, **settings)
        model = self._eager if value.kind == "attention" else self._model
        assert isinstance(model, LanguageModel)
        if model.start_id is not None:
            raise UserError(
                f"{value.kind} is not read of {model.name}, which has an encoder. Use another scorer."
            )
        if value.kind == "critical":
            assert self._cache is not None
            file = self._cache / f"{value}.jsonl"
            return critical_tokens(model, self._template, group, value, file, batch=self._batch)
        return internal_values(model, rows, value, **settings)

    def _of_data(self, value: Value, row: TokenRow) -> list[Tensor]:
        """Values of character spans at the tokens that they cover."""
        if value.kind == "spans" and row.comparison.spans is None:
            raise UserError(
                f"{row.comparison.source}: the scorer spans needs spans, and this row has none. Give the data a column spans (data."
                "columns names it), or use the scorer external with a file."
            )
        found = []
        for place, key in enumerate(keys_of(row.comparison)):
            given = self._file.get(key) if value.kind == "file" else (row.comparison.spans or ())[place]
            response, ids = row.comparison.responses[place], row.responses[place]
            if given is None:
                found.append(torch.full((len(ids),), torch.nan))
                continue
            text, tokens, own = spelled(self._template.tokenizer, row, place)
            known = given if own else moved(given, response, text, row.comparison.source)
            found.append(torch.tensor(span_values(known, text, tokens), dtype=torch.float32))
        return found

    @cached_property
    def _file(self) -> dict[str, list[Span]]:
        """Spans of a file by the key of their response."""
        path = next(value.details["file"] for value in self._values if value.kind == "file")
        return dict(read_spans(path))


Oracle = Model | RewardModel | TokenScorer | Scorer | Dataset
"""What gives scores: a trained model, the folder of one or of a run's stage, a scorer, or scores that were made before."""

SHARD_ROWS = 128
"""Prompts that are computed together, as a recipe has it by default."""

PREFIX = "token_"
KEYS, RANKS, EOS, TEXTS = "response_keys", "response_ranks", "response_eos", "response_texts"
IDS, STARTS, ENDS, SCORES, WEIGHTS = (
    "token_ids",
    "token_starts",
    "token_ends",
    "token_scores",
    "token_weights",
)
"""Columns of a scored data set: in each row a list with an entry per response. See :func:`tokenward.score`."""


class Scoring(NamedTuple):
    """What scores are made of.

    Attributes:
        scorer: From values to scores.
        models: By name: ``reference``, ``oracle``, ``reward``.
        store: Values that were made before, a folder or a data set; None computes them.
    """

    scorer: Scorer
    models: Mapping[str, TokenModel]
    store: TokenStore | Sequence[Dataset] | None = None


def scoring_of(
    oracle: Oracle | None,
    policy: Callable[[], LanguageModel],
    *,
    reference: Model | None = None,
    scorer: Scorer | None = None,
    packing: Packing = "auto",
    device: str = "auto",
) -> Scoring | None:
    """What an ``oracle`` argument means; None if nothing gives scores.

    Args:
        oracle: See :data:`Oracle`.
        policy: Gives what an oracle is compared with if there is no reference.
        reference: What the oracle was trained from.
        scorer: From values to scores; None is the log-ratio of oracle and reference, or the reward itself.
        packing: How models that are loaded here are laid out.
        device: Where they are put.

    Raises:
        UserError: it is none of these.
    """
    shared: dict[str, Any] = {"packing": packing, "device": device}
    if oracle is None and scorer is None:
        return None
    if isinstance(oracle, TokenScorer):
        models = {name.removesuffix("_logp"): model for name, model in oracle.models.items()}
        return Scoring(scorer or oracle.scorer, models)
    if isinstance(oracle, Dataset):
        return _of_data_set(oracle, scorer)
    base = language_model(reference, name="reference", **shared) if reference is not None else None
    if isinstance(oracle, str | Path):
        return _of_folder(str(oracle), policy, base, scorer, shared)
    return _of_object(oracle, base or policy(), scorer, shared)


def _of_data_set(scored: Dataset, scorer: Scorer | None) -> Scoring:
    if KEYS not in scored.column_names:
        raise UserError(
            f"oracle is a Dataset without the columns of tokenward.score (it has {', '.join(scored.column_names)}). Give what "
            "tokenward.score returned."
        )
    return Scoring(scorer or StoredScores(), {}, [scored])


def _of_object(
    oracle: Any, reference: LanguageModel, scorer: Scorer | None, shared: Mapping[str, Any]
) -> Scoring:
    """A loaded model, or a scorer."""
    if oracle is None:
        return Scoring(_checked(scorer), {"reference": reference})
    if isinstance(oracle, RewardModel):
        return Scoring(scorer or Reward(), {"reward": oracle, "reference": reference})
    if isinstance(oracle, PreTrainedModel | PeftModel | LanguageModel):
        trained = language_model(oracle, name="oracle", **shared)
        return Scoring(scorer or LogRatio(), {"oracle": trained, "reference": reference})
    if callable(oracle) and scorer is None:
        return Scoring(_checked(oracle), {"reference": reference})
    raise UserError(
        f"oracle is {type(oracle).__name__}. Give a trained model, the folder of one, a scorer, or what tokenward.score returned."
    )


def _of_folder(
    name: str,
    policy: Callable[[], LanguageModel],
    base: LanguageModel | None,
    scorer: Scorer | None,
    shared: Mapping[str, Any],
) -> Scoring:
    folder = Path(name).expanduser()
    if any(folder.glob("tokens-*.parquet")):
        return Scoring(scorer or LogRatio(), {}, TokenStore(folder))
    if (folder / MANIFEST).is_file() or is_reward_folder(folder):
        made = TokenScorer.load(folder)
        models = {key.removesuffix("_logp"): model for key, model in made.models.items()}
        return Scoring(scorer or made.scorer, models if base is None else {**models, "reference": base})
    trained = load_model(name, **shared)
    return Scoring(scorer or LogRatio(), {"oracle": trained, "reference": base or policy()})


def _checked(scorer: Any) -> Any:
    check_call("scorer", name_of(scorer), scorer, ("record",))
    check_scope(scorer)
    return scorer


@dataclass(frozen=True)
class StoredScores:
    """The scores that a scored data set holds."""

    reads: ClassVar[tuple[str, ...]] = ()

    def __call__(self, record: Record) -> Tensor:
        """Scores of one response.  -> [n]"""
        return record.value(SCORES)


def values_read(scorer: Scorer) -> list[Value]:
    """What a scorer reads of frozen models and of the data."""
    return [value for value in dict.fromkeys(reads_of(scorer)) if not value.online]


def value_store(
    scoring: Scoring,
    rows: TokenTable,
    template: Template,
    folder: Path,
    *,
    style: Style,
    precision: str = "float32",
    tokens_per_batch: int = 8192,
    display: Display,
    more: Sequence[Value] = (),
) -> TokenStore:
    """The values that a scorer reads, of every response of some rows.

    Args:
        scoring: What scores are made of.
        rows: Every prompt with its responses.
        template: That wrote them.
        folder: Where values that are computed go.
        style: In which they were written.
        precision: As :func:`tokenward.scoring.reads.over_batches` takes it.
        tokens_per_batch: Most tokens in one pass.
        display: Where progress is shown.
        more: Further values that are wanted.

    Raises:
        UserError: the scorer reads a model that nobody gave.
    """
    if isinstance(scoring.store, TokenStore):
        return scoring.store
    if scoring.store is not None:
        return store_of(scoring.store, folder)
    values = list(dict.fromkeys([*more, *values_read(scoring.scorer)]))
    makers = []
    for name in dict.fromkeys(value.model for value in values):
        mine = [value for value in values if value.model == name]
        load = (lambda attention: _nobody()) if name == "data" else _loader(scoring, name, mine[0])
        makers.append(
            Maker(
                name,
                mine,
                template,
                load,
                style=style,
                precision=precision,
                tokens_per_batch=tokens_per_batch,
                cache=folder / "cache",
            )
        )
    total = len(rows.responses) * sum(maker.passes for maker in makers)
    with display.progress("scores", total) as bar:
        return write_store(folder, makers, template, rows, shard_rows=SHARD_ROWS, progress=bar.advance)


def _nobody() -> TokenModel:
    raise AssertionError("values of the data need no model")


def _loader(scoring: Scoring, name: str, value: Value) -> Callable[[str | None], TokenModel]:
    model = scoring.models.get(name)
    if model is None:
        raise UserError(
            f"the scorer {name_of(scoring.scorer)} reads {value}, and there is no {name}. Give a model as oracle=, and "
            "the scorer as scorer=."
        )

    def load(attention: str | None) -> TokenModel:
        if attention is None:
            return model
        if not model.fingerprint:
            raise UserError(
                f"{value} is read with another attention implementation, for which {model.name} must be loaded again. Save it, and "
                "give its folder."
            )
        return load_model(model.name, attention=attention, device=str(model.device))

    return load


def store_of(scored: Sequence[Dataset], folder: Path) -> TokenStore:
    """The records of scored data sets as a store.

    Raises:
        UserError: no row of them has any.
    """
    records = {record.key: record for part in scored for record in records_of(part)}
    if not records:
        raise UserError(
            "no row of the scored data set has values of tokens. Score it again with tokenward.score."
        )
    return write_shards(
        folder, list(records), lambda keys: [records[key] for key in keys], rows_per_shard=SHARD_ROWS
    )


def records_of(scored: Dataset) -> Iterator[TokenRecord]:
    """What a scored data set holds of each response. Its scores and weights keep the names of their columns."""
    names = {
        name: name if name in (SCORES, WEIGHTS) else name.removeprefix(PREFIX)
        for name in scored.column_names
        if name.startswith(PREFIX) and name not in (IDS, STARTS, ENDS)
    }
    for row in scored.with_format(None):
        row = cast(Mapping[str, Any], row)
        for place, key in enumerate(row[KEYS] or ()):
            values = {value: row[name][place] for name, value in names.items()}
            fixed = (row[name][place] for name in (IDS, STARTS, ENDS))
            text = row[TEXTS][place] if row.get(TEXTS) else None
            yield TokenRecord(key, *fixed, values=values, text=text)
