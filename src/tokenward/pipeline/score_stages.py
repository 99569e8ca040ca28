"""The stages that compute values per token: reference log-probabilities, and scores."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from torch import Tensor

from tokenward.artifacts import Manifest
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.reward import RewardModel
from tokenward.pipeline.context import Run
from tokenward.pipeline.data import encoded_choice, pair_sets, pair_settings, response_keys, without_pairs
from tokenward.pipeline.values import scorer_of
from tokenward.scoring.store import TokenRecord, TokenStore, write_shards
from tokenward.scoring.values import token_values
from tokenward.tokens.encode import Encoded, check_some_left
from tokenward.tokens.encoded import Joined
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.segments import with_segments
from tokenward.tokens.spans import token_spans
from tokenward.tokens.template import Template


def compute_reference(run: Run) -> Manifest:
    """Log-probability of every response token under the reference, once, for oracle, scores and evaluation."""
    scores = run.recipe.scores
    template = run.tokenizer_template(run.reference_model)
    settings = {
        **pair_settings(run),
        "scores": {"precision": scores.precision, "shard_rows": scores.shard_rows},
        "model": {"dtype": run.recipe.model.dtype},
    }
    inputs = {
        "data": run.done("data").fingerprint,
        "model": run.fingerprint_of(run.reference_model),
        "template": template.fingerprint,
    }
    with run.stage("reference", settings, inputs) as stage:
        if not stage.done:
            rows, counts = all_rows(run, template)
            counts["comparisons without a pair: closer than data.min_gap"] = without_pairs(run)
            run.display.table("pairs", ("", "rows"), [(name, str(count)) for name, count in counts.items()])
            model = run.load(run.reference_model)
            store = _write(run, stage.path, {"reference_logp": model}, template, rows)
            stage.complete(responses=len(store), layout=model.layout, pairs=counts)
    return run.done("reference")


def compute_scores(run: Run) -> Manifest:
    """Raw values of every response token in the score store: what the scorer reads of oracle, reference and reward.

    Nothing is selected here: every selection is made from these values when they are read.
    """
    table = run.recipe.scores
    settings = {"scores": {"precision": table.precision, "shard_rows": table.shard_rows}}
    inputs = {"reference": run.done("reference").fingerprint}
    makers = {name: stage for stage, name in MADE_BY.items() if needs(run, name)}
    inputs |= {stage: run.done(stage).fingerprint for stage in makers.values()}
    with run.stage("scores", settings, inputs) as stage:
        if not stage.done:
            template = run.tokenizer_template(run.reference_model)
            rows, _ = all_rows(run, template)
            reference = TokenStore(run.path("reference"))
            models = {name: _maker(run, made_by, template) for name, made_by in makers.items()}
            store = _write(run, stage.path, models, template, rows, reference)
            stage.complete(responses=len(store), reference=run.reference_model)
    return run.done("scores")


MADE_BY = {"oracle": "oracle_logp", "reward": "reward"}
"""Stages whose model gives a stored value, and which."""


def _maker(run: Run, stage: str, template: Template) -> TokenModel:
    """The model of a stage, which must write the same tokens as the reference."""
    folder = str(run.path(stage) / "model")
    model = run.load_reward(folder) if stage == "reward" else run.load(folder)
    if model.template(run.recipe.tokens.template).fingerprint != template.fingerprint:
        raise UserError(
            f"the {stage} in {folder} has another tokenizer or chat template than {run.reference_model}, so their values belong "
            "to other tokens. Name models of one family."
        )
    return model


def needs(run: Run, value: str) -> bool:
    """Whether the recipe's scorer reads a stored value; one that does not say reads what an oracle gives."""
    return value in getattr(type(scorer_of(run)), "reads", ("oracle_logp", "reference_logp"))


def all_rows(run: Run, template: Template) -> tuple[Joined, dict[str, int]]:
    """Every prompt with all responses of its pairs, and what encoding the pairs counted."""
    sets = pair_sets(run)
    # No prompt is on both sides of the split, so each side has its own groups.
    sides = [encoded_choice(run, part, template) for part in (sets.all_train, sets.held_out)]
    counts = Counter[str]()
    for _, counted in sides:
        counts.update(counted)
    counts["kept"] = counts.pop("kept")  # the last in the table
    check_some_left(counts)
    return Joined([rows.by_prompt() for rows, _ in sides]), dict(counts)


def _write(
    run: Run,
    folder: Path,
    models: Mapping[str, TokenModel],
    template: Template,
    rows: Joined,
    reference: TokenStore | None = None,
) -> TokenStore:
    """Write shards of whole prompts; a prompt's responses stay together, so its prompt is computed once.

    Args:
        run: The run.
        folder: Where the shards go.
        models: By the name of the value that each gives.
        template: That wrote the rows.
        rows: Every prompt with its responses.
        reference: Values that are there already.
    """
    keys = Keys(np.concatenate([part.of_responses("response_keys")[part.starts[:-1]] for part in rows.parts]))
    total = sum(int(part.starts[-1]) for part in rows.parts) * len(models)
    with run.display.progress(folder.name, total) as bar:

        def make(wanted: Sequence[str]) -> Iterator[TokenRecord]:
            group = [rows[keys.place(key)] for key in wanted]
            values = {name: _values(run, model, group, bar.advance) for name, model in models.items()}
            for number, row in enumerate(group):
                for place, record in enumerate(_records(template, row)):
                    known = {} if reference is None else reference[record.key].values
                    mine = {name: found[number][place].tolist() for name, found in values.items()}
                    yield record._replace(values={**known, **mine})

        return write_shards(folder, keys, make, rows_per_shard=run.recipe.scores.shard_rows)


class Keys(Sequence[str]):
    """Stable names, eight bytes each, and where each stands.

    Args:
        numbers: ``[keys]`` uint64; each stands there once.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        self._numbers = numbers
        self._order = np.argsort(numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [f"{number:016x}" for number in self._numbers[index].tolist()]
        return f"{int(self._numbers[index]):016x}"

    def place(self, key: str) -> int:
        """Where a key stands; it must be one of these."""
        wanted = np.uint64(int(key, 16))
        return int(self._order[np.searchsorted(self._numbers, wanted, sorter=self._order)])


def _values(
    run: Run, model: TokenModel, group: Sequence[Encoded], progress: Callable[[int], None]
) -> list[list[Tensor]]:
    rows = [TokenRow(encoded=row) for row in group]
    if isinstance(model, RewardModel):
        rows = [with_segments(model.settings.unit, model.tokenizer, row) for row in rows]
    table = run.recipe.scores
    return token_values(
        model, rows, precision=table.precision, tokens_per_batch=table.tokens_per_batch, progress=progress
    )


def _records(template: Template, row: Encoded) -> Iterator[TokenRecord]:
    for key, text, ids in zip(response_keys(row), row.comparison.responses, row.responses, strict=True):
        spans = token_spans(template.tokenizer, text, len(ids))
        yield TokenRecord(key, ids, [span.start for span in spans], [span.end for span in spans], {})
