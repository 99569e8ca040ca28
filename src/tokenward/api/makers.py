"""From rows to the values that one model, or the data, gives of their tokens."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel
from tokenward.models.positions import positions_of
from tokenward.models.reward import RewardModel
from tokenward.sampling.counterfactual import critical_tokens
from tokenward.scoring.looks import looked_at
from tokenward.scoring.reads import Value
from tokenward.scoring.span_files import read_spans
from tokenward.scoring.values import token_values
from tokenward.scoring.writing import Found
from tokenward.tokens.prompted import prompted
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.segments import with_segments
from tokenward.tokens.spans import span_values
from tokenward.tokens.spelled import moved, spelled
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
        precision: As :func:`tokenward.scoring.values.over_batches` takes it.
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
        return looked_at(model, rows, value, **settings)

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
