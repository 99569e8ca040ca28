"""Values per token: the ``oracle`` argument in all its forms, and the computation of what a scorer reads."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenward.api.inputs import TokenSettings
from tokenward.api.notices import LoggedDisplay
from tokenward.api.oracles import Scoring
from tokenward.api.stored import SHARD_ROWS, prompt_digest, store_of
from tokenward.api.transfer import OTHER_TOKENS, OtherTokens, encoded_again, other_templates
from tokenward.artifacts import StagePart, file_fingerprint, open_part, part_of_process
from tokenward.distributed import first_alone, first_enters, share_label, together
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.identity import positions_of
from tokenward.models.loading import LanguageModel, load_model
from tokenward.models.reward import RewardModel
from tokenward.plugins import name_of
from tokenward.sampling.counterfactual import critical_tokens
from tokenward.scoring.basic import Scorer, Surprisal, read_spans
from tokenward.scoring.coverage import coverage
from tokenward.scoring.model_scorers import internal_values
from tokenward.scoring.reads import Value, reads_of, token_values
from tokenward.scoring.store import Found, Shards, TokenStore, copy_shards, write_store
from tokenward.scoring.transfer import Carrier
from tokenward.tokens.encode import prompted
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.segments import moved, spelled, with_segments
from tokenward.tokens.spans import span_values
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Style, Template
from tokenward.types import Span

CACHE = "cache"
"""Folder in a store for results that are too expensive to compute again after a stop."""

Load = Callable[[str | None], TokenModel]
"""Loads a model with an attention implementation; None keeps its own."""


class Maker:
    """Computes some values of one model, or reads them from the data.

    Args:
        name: ``reference``, ``oracle``, ``reward``, the name of an auxiliary model, or ``data``.
        values: The values.
        template: The template that the rows were encoded with.
        load: Gives the model; not called for ``data``.
        style: The style that the rows were encoded in.
        precision: As in :func:`tokenward.scoring.reads.over_batches`.
        tokens_per_batch: Most tokens in one forward pass.
        batch: Number of continuations sampled at a time, for values that need samples.
        cache: Folder for intermediate results that are expensive to recompute.
        prompt: Text with ``{prompt}`` that replaces the last user turn for this model; None changes nothing.

    Raises:
        UserError: the model has another tokenizer or chat template than the rows.
    """

    def __init__(
        self,
        name: str,
        values: Sequence[Value],
        template: Template,
        load: Load,
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
            assert self._model is not None  # refuses another tokenizer before anything is computed

    @property
    def passes(self) -> int:
        """Number of values, each of which counts as a pass for the progress bar."""
        return len(self._values)

    def __call__(self, group: Sequence[TokenRow], progress: Callable[[int], None]) -> dict[str, Found]:
        """The values of some rows, by name."""
        if self._name != "data" and self._prompt:
            context = positions_of(self._model.model.config)  # type: ignore[arg-type]  # of a loaded model
            group = [prompted(row, self._template, self._prompt, context) for row in group]
        found: dict[str, Found] = {}
        for value in self._values:
            found[str(value)] = self._compute(value, group)
            progress(sum(len(row.responses) for row in group))
        return found

    @cached_property
    def _model(self) -> TokenModel:
        model = self._load(None)
        if model.template(self._style).fingerprint != self._template.fingerprint:
            raise UserError(
                f"the {self._name} {model.name} has another tokenizer or chat template than "
                f"{self._template.tokenizer.name_or_path}, so their tokens do not correspond. Use models of one family.",
                code="tokenizer-mismatch",
            )
        return model

    @cached_property
    def _eager(self) -> TokenModel:
        """The model with eager attention, the only implementation that returns attention weights."""
        return self._load("eager")

    def _compute(self, value: Value, group: Sequence[TokenRow]) -> Found:
        if self._name == "data":
            return [self._from_data(value, row) for row in group]
        rows, settings = list(group), self._settings
        if isinstance(self._model, RewardModel):
            rows = [with_segments(self._model.settings.unit, self._model.tokenizer, row) for row in rows]
        if value.kind in ("", "logp"):
            return token_values(self._model, rows, **settings)
        model = self._eager if value.kind == "attention" else self._model
        assert isinstance(model, LanguageModel)
        if model.start_id is not None:
            raise UserError(
                f"{value.kind} cannot be read from {model.name}, because it has an encoder. Use another scorer.",
                code="encoder-model",
            )
        if value.kind == "critical":
            assert self._cache is not None
            file = self._cache / f"{value}.jsonl"
            return critical_tokens(model, self._template, group, value, file, batch=self._batch)
        return internal_values(model, rows, value, **settings)

    def _from_data(self, value: Value, row: TokenRow) -> list[Tensor]:
        """Values of character spans at the tokens that they cover; NaN for a response without spans."""
        if value.kind == "spans" and row.comparison.spans is None:
            raise UserError(
                f"{row.comparison.source}: the scorer spans needs spans, and this row has none. Add a column spans to the data, or "
                "use the scorer external with a file.",
                code="missing-spans",
                key="data.columns",
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
        """Spans from a file, by the key of their response."""
        path = next(value.details["file"] for value in self._values if value.kind == "file")
        return dict(read_spans(path))


REFERENCE_LOGP = Value("reference", "logp")


def frozen_values(scorer: Scorer) -> list[Value]:
    """The values that a scorer reads from frozen models and from the data, without those of the policy."""
    return [value for value in dict.fromkeys(reads_of(scorer)) if not value.online]


@dataclass(frozen=True, kw_only=True)
class ValuePass:
    """Computes the values that scorers read.

    Attributes:
        template: The template that the rows were encoded with.
        style: The style that the rows were encoded in.
        precision: As in :func:`tokenward.scoring.reads.over_batches`.
        tokens_per_batch: Most tokens in one forward pass.
        display: Shows progress.
    """

    template: Template
    style: Style
    precision: str
    tokens_per_batch: int
    display: LoggedDisplay

    def store(
        self,
        scoring: Scoring,
        rows: TokenTable,
        folder: Path,
        *,
        more: Sequence[Value] = (),
        part: StagePart | None = None,
        others: OtherTokens | None = None,
    ) -> TokenStore:
        """The values that a scorer reads, of every response of some rows. The processes of a launch share the work.

        Args:
            scoring: The scorer and its models, or existing values.
            rows: All responses of each prompt as one row.
            folder: For values that are computed.
            more: Further values to compute.
            part: Compute only this part of them.
            others: As :meth:`other_tokens` returns them, if they are known already.

        Raises:
            UserError: the scorer reads a model that was not given, or its scores cannot go from the models' tokens to the rows'.
        """
        if isinstance(scoring.store, TokenStore):
            return scoring.store
        if scoring.store is not None:
            return store_of(scoring.store, folder)
        by_model: dict[str, list[Value]] = {}
        for value in dict.fromkeys([*more, *frozen_values(scoring.scorer)]):
            by_model.setdefault(value.model, []).append(value)
        others = self.other_tokens(scoring, rows, more) if others is None else others
        if others is None:
            makers = self._makers(scoring, by_model, self.template, self.style, folder, part)
            return self._written(folder, makers, self.template, rows, part)
        theirs = {name: by_model.pop(name) for name in list(by_model) if name in others.models}
        makers = self._makers(scoring, theirs, others.template, others.style, folder, part)
        before = self._written(folder / OTHER_TOKENS, makers, others.template, others.rows, part)
        if Shards(folder / OTHER_TOKENS, len(others.rows), SHARD_ROWS).missing():
            return TokenStore(folder)  # other jobs still write them
        names = [str(value) for values in theirs.values() for value in values]
        carrier = Carrier(before, names, others.rows, *others.spellers)
        makers = self._makers(scoring, by_model, self.template, self.style, folder, None)
        after = self._written(folder, [carrier, *makers], self.template, rows, None)
        found = coverage(before, after, names)
        self.display.notice(found.line(*(speller.name for speller in others.spellers)))
        return after

    def other_tokens(
        self, scoring: Scoring, rows: TokenTable, more: Sequence[Value] = ()
    ) -> OtherTokens | None:
        """The rows in the tokens of the models that have other ones; None if all models read the rows as they are.

        Args:
            scoring: The scorer and its models.
            rows: All responses of each prompt as one row.
            more: Further values to compute.

        Raises:
            UserError: the scores cannot go from their tokens to those of the rows, or the texts differ.
        """
        read = {value.model for value in (*more, *frozen_values(scoring.scorer))}
        templates = {name: found for name, found in scoring.templates(self.style).items() if name in read}
        found = other_templates(templates, self.template, scoring.scorer)
        if found is None:
            return None
        template, names = found
        again = encoded_again(rows, template, [scoring.models[name] for name in names])
        others = OtherTokens(
            template=template, models=names, rows=again, own=rows, own_template=self.template
        )
        others.check()
        return others

    def _makers(
        self,
        scoring: Scoring,
        by_model: Mapping[str, Sequence[Value]],
        template: Template,
        style: Style,
        folder: Path,
        part: StagePart | None,
    ) -> list[Maker]:
        mine = part_of_process(part)
        return [
            Maker(
                name,
                values,
                template,
                _loader(scoring, name, values[0]),
                style=style,
                precision=self.precision,
                tokens_per_batch=self.tokens_per_batch,
                cache=folder / CACHE / ("" if mine is None else mine.name),
            )
            for name, values in by_model.items()
        ]

    def _written(
        self,
        folder: Path,
        makers: Sequence[Maker | Carrier],
        template: Template,
        rows: TokenTable,
        part: StagePart | None,
    ) -> TokenStore:
        mine, label = part_of_process(part), share_label("scores")
        shards = Shards(folder, len(rows), SHARD_ROWS)

        def write() -> None:
            total = shards.without_damaged(self.display.notice, mine).waiting(rows, mine)
            with self.display.progress(label, total * sum(maker.passes for maker in makers)) as bar:
                write_store(
                    folder, makers, template, rows, shard_rows=SHARD_ROWS, progress=bar.advance, part=mine
                )

        together(write)
        if part is None:
            copy_shards(shards)
        return TokenStore(folder)

    def kept_store(
        self, scoring: Scoring, rows: TokenTable, folder: Path, part: StagePart, tokens: TokenSettings
    ) -> TokenStore | None:
        """As :meth:`store`, in a folder that several jobs fill; None if other parts are missing.

        Raises:
            UserError: the folder holds values of other rows, models or settings, or a model is not known by its files.
        """
        if scoring.store is not None:
            raise UserError(
                "the oracle is a folder or a data set of existing scores, so there is nothing to compute. Leave store and part out.",
                code="unused-argument",
            )
        settings = {
            "scores": {"precision": self.precision, "shard_rows": SHARD_ROWS},
            "tokens": {
                "max_prompt_tokens": tokens.max_prompt_tokens,
                "max_response_tokens": tokens.max_response_tokens,
                "too_long": tokens.too_long,
            },
        }
        values = frozen_values(scoring.scorer)
        settings["scores"]["values"] = {str(value): dict(value.details) for value in values}
        inputs = {"rows": _rows_fingerprint(rows), "template": self.template.fingerprint}
        inputs |= _inputs_of(scoring, values)
        others = self.other_tokens(scoring, rows)
        if others is not None:
            inputs["template of the oracle"] = others.template.fingerprint
        shards = [Shards(folder, len(rows), SHARD_ROWS)]
        if others is not None:
            shards.insert(0, Shards(folder / OTHER_TOKENS, len(others.rows), SHARD_ROWS))
        given: dict[str, Any] = {"stage": "scores", "settings": settings, "inputs": inputs, "format": 1}
        with first_enters(lambda: open_part(folder, part, **given)) as stage:
            if not stage.done:
                self.store(scoring, rows, folder, part=part if part.of > 1 else None, others=others)
                if missing := first_alone(lambda: self._missing(shards)):
                    self.display.notice(shards[0].said_missing(part, missing))
                    return None
                stage.temporary.append(folder / CACHE)
                made = {"template": self.template.fingerprint, **settings["tokens"]}
                first_alone(lambda: stage.complete(responses=len(TokenStore(folder)), tokens=made))
        return TokenStore(folder)

    def _missing(self, shards: Sequence[Shards]) -> list[int]:
        found = [item.without_damaged(self.display.notice).missing() for item in shards]
        return next(filter(None, found), [])

    def reference(self, model: LanguageModel, rows: TokenTable, folder: Path) -> TokenStore:
        """The log-probabilities of a reference, of every response of some rows."""
        return self.store(Scoring(Surprisal(), {"reference": model}), rows, folder, more=[REFERENCE_LOGP])


def _inputs_of(scoring: Scoring, values: Sequence[Value]) -> dict[str, str]:
    """Fingerprints of the models and files that values come from."""
    found: dict[str, str] = {}
    for value in values:
        if value.kind == "file":
            found[f"file {value.details['file']}"] = file_fingerprint(Path(value.details["file"]))
        elif value.model != "data":
            found[value.model] = _known_files(_loader(scoring, value.model, value)(None), value.model)
    return found


def _rows_fingerprint(rows: TokenTable) -> str:
    """Fingerprint of the prompts' tokens, and of the responses and their spans, in their order."""
    found = hashlib.sha256()
    for number in range(len(rows)):
        row = rows[number]
        spans = None if row.comparison.spans is None else [*map(list, row.comparison.spans)]
        known = [prompt_digest(row), keys_of(row.comparison), spans]
        found.update(json.dumps(known).encode())
    return found.hexdigest()[:16]


def _known_files(model: TokenModel, name: str) -> str:
    if not model.fingerprint:
        raise UserError(
            f"the {name} is in memory, and whether all jobs have the same weights is known only of files. Save it and pass its folder.",
            code="not-saved",
        )
    return model.fingerprint


def _loader(scoring: Scoring, name: str, value: Value) -> Load:
    model = scoring.models.get(name)
    if model is None and name != "data":
        raise UserError(
            f"the scorer {name_of(scoring.scorer)} reads {value}, and there is no {name}. Pass a model as oracle and the scorer "
            "as scorer.",
            code="missing-model",
        )

    def load(attention: str | None) -> TokenModel:
        assert model is not None
        if attention is None:
            return model
        if not model.fingerprint:
            raise UserError(
                f"{value} needs another attention implementation, so {model.name} must be loaded again, and it is not known from where. "
                "Save it and pass its folder.",
                code="not-saved",
            )
        return load_model(model.name, attention=attention, device=str(model.device))

    return load
