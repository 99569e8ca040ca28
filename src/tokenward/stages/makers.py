"""From rows to the values that one model, or the data, gives of their tokens."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel
from tokenward.models.places import context_length
from tokenward.models.reward import RewardModel
from tokenward.scoring.looks import looked_at
from tokenward.scoring.reads import Value
from tokenward.scoring.values import token_values
from tokenward.stages.auxiliary import auxiliary_of, folder_of, prompted
from tokenward.stages.counterfactual import critical_tokens
from tokenward.stages.run import Run
from tokenward.stages.span_files import read_spans
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.segments import with_segments
from tokenward.tokens.spans import span_values
from tokenward.tokens.spelled import moved, spelled
from tokenward.tokens.template import Template
from tokenward.types import Span

Found = list[list[Tensor]]
"""Per row, per response, ``[len]``."""


class Maker:
    """Gives some values of one model, or of the data.

    Args:
        run: The run.
        model: ``reference``, ``oracle``, ``reward``, an auxiliary model, or ``data``.
        values: Which.
        template: That wrote the rows.
        cache: Folder for what is too dear to be made again.
        loaded: The model, where it is in memory already.
    """

    def __init__(
        self,
        run: Run,
        model: str,
        values: Sequence[Value],
        template: Template,
        cache: Path | None = None,
        *,
        loaded: TokenModel | None = None,
    ) -> None:
        self._run, self._name, self._values = run, model, values
        self._template, self._cache, self._loaded = template, cache, loaded
        if model != "data":
            assert self._model is not None  # another tokenizer is refused before anything is computed

    @property
    def passes(self) -> int:
        """How often each response counts as work."""
        return len(self._values)

    def __call__(self, group: Sequence[TokenRow], progress: Callable[[int], None]) -> dict[str, Found]:
        """The values of some rows, by name."""
        if self._name != "data":
            group = self._prompted(group)
        found: dict[str, Found] = {}
        for value in self._values:
            found[str(value)] = self._made(value, group)
            progress(sum(len(row.responses) for row in group))
        return found

    def _prompted(self, group: Sequence[TokenRow]) -> Sequence[TokenRow]:
        prompt = auxiliary_of(self._run, self._name).prompt
        return [prompted(row, self._template, prompt, self._context) for row in group] if prompt else group

    @cached_property
    def _context(self) -> int | None:
        trust = self._run.recipe.model.trust_remote_code
        return context_length(folder_of(self._run, self._name), trust_remote_code=trust)

    @cached_property
    def _model(self) -> TokenModel:
        model = self._loaded or self._read(None)
        if model.template(self._run.style).fingerprint != self._template.fingerprint:
            raise UserError(
                f"the {self._name} in {model.name} has another tokenizer or chat template than {self._run.reference_model}, so their "
                "values belong to other tokens. Name models of one family."
            )
        return model

    @cached_property
    def _eager(self) -> TokenModel:
        """The model with transformers' own eager attention, which alone gives its weights."""
        return self._read("eager")

    def _read(self, attention: str | None) -> TokenModel:
        folder = folder_of(self._run, self._name)
        return (
            self._run.load_reward(folder)
            if self._name == "reward"
            else self._run.load(folder, attention=attention)
        )

    def _made(self, value: Value, group: Sequence[TokenRow]) -> Found:
        if self._name == "data":
            return [self._of_data(value, row) for row in group]
        table, rows = self._run.recipe.scores, list(group)
        settings = {"precision": table.precision, "tokens_per_batch": table.tokens_per_batch}
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
            return critical_tokens(
                model, self._template, group, value, file, batch=self._run.recipe.evaluation.batch
            )
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
