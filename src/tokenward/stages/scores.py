"""The stages that compute values per token: reference log-probabilities, and scores."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from tokenward.artifacts import StageFolder, file_fingerprint
from tokenward.scoring.reads import Value
from tokenward.scoring.scorers import Scorer
from tokenward.scoring.store import TokenRecord, TokenStore, write_shards
from tokenward.stages.auxiliary import folder_of, frozen_values
from tokenward.stages.base import Checks, Stage
from tokenward.stages.constant import warn_of_stored
from tokenward.stages.makers import Maker
from tokenward.stages.part_checks import check_scorer
from tokenward.stages.run import AUXILIARY, Run
from tokenward.stages.scorers import scorer_of
from tokenward.stages.tables import pairs_fingerprint, say_notes, tables
from tokenward.tokens.encode import check_some_left
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.spelled import spelled
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template


class ReferenceStage(Stage):
    """Log-probability of every response token under the reference, once, for oracle, scores and evaluation."""

    name = "reference"

    def settings(self, run: Run) -> Mapping[str, Any]:
        """Number types, and the prompts of a shard."""
        scores = run.recipe.scores
        return {
            "seed": run.recipe.seed,
            "scores": {"precision": scores.precision, "shard_rows": scores.shard_rows},
            "model": {"dtype": run.recipe.model.dtype},
        }

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The pairs and the reference model."""
        template = run.tokenizer_template(run.reference_model)
        return {
            "data": run.done("data").fingerprint,
            "pairs": pairs_fingerprint(run, template),
            "model": run.fingerprint_of(run.reference_model),
            "template": template.fingerprint,
        }

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Write the store."""
        template = run.tokenizer_template(run.reference_model)
        pairs = tables(run, template)
        counts = pairs.summed
        check_some_left(counts)
        run.display.table("pairs", ("", "rows"), [(name, str(count)) for name, count in counts.items()])
        say_notes(run, template, counts, pairs.train.store)
        model = run.load(run.reference_model)
        maker = Maker(run, "reference", [Value("reference", "logp")], template, loaded=model)
        store = _write(run, folder.path, [maker], template, pairs.everything)
        return {"responses": len(store), "layout": model.layout, "pairs": counts}


class ScoresStage(Stage):
    """Raw values of every response token in the score store: what the scorer reads of frozen models and of the data.

    Nothing is selected here: every selection is made from these values when they are read.
    """

    name = "scores"

    def settings(self, run: Run) -> Mapping[str, Any]:
        """What the scorer reads, and how it is computed."""
        return value_settings(run, scorer_of(run))

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The reference, and the models and files that the scorer reads."""
        return {"reference": run.done("reference").fingerprint, **value_inputs(run, scorer_of(run))}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Write the store."""
        scorer, template = scorer_of(run), run.tokenizer_template(run.reference_model)
        rows = tables(run, template).everything
        store = write_values(run, folder, folder.path, scorer, template, rows)
        warn_of_stored(run, scorer, store)
        return {"responses": len(store), "reference": run.reference_model}

    def checks(self, run: Run) -> Checks:
        """A scorer that reads what the run has."""
        return {"scores.scorer": lambda: check_scorer(run, scorer_of(run))}


def value_settings(run: Run, scorer: Scorer) -> dict[str, Any]:
    """Everything of the recipe that the values which a scorer reads depend on, beside what made their models."""
    table, asked = run.recipe.scores, _asked(scorer)
    settings: dict[str, Any] = {"scores": {"precision": table.precision, "shard_rows": table.shard_rows}}
    further = {str(value): dict(value.details) for value in asked if value not in ("oracle_logp", "reward")}
    if further:
        settings["scores"]["values"] = further
    prompts = {name: run.recipe.auxiliary_models[name].prompt for name in _auxiliary(run, asked)}
    if any(prompts.values()):
        settings["auxiliary_models"] = prompts
    return settings


def write_values(
    run: Run, stage: StageFolder, folder: Path, scorer: Scorer, template: Template, rows: TokenTable
) -> TokenStore:
    """Write what a scorer reads of every response of some rows; a stopped stage goes on at the next shard.

    Args:
        run: The run.
        stage: Whose folder it is in.
        folder: Where the shards go.
        scorer: Whose values are wanted.
        template: That wrote the rows.
        rows: Every prompt with its responses; the reference stage has them all.
    """
    cache = folder / CACHE
    makers = [
        Maker(run, model, values, template, cache) for model, values in _by_model(_asked(scorer)).items()
    ]
    stage.temporary.append(cache)
    return _write(run, folder, makers, template, rows, TokenStore(run.path("reference")))


CACHE = "cache"
"""Folder beside the shards for what is too dear to be made again after a stop."""


def _asked(scorer: Scorer) -> list[Value]:
    """What a scorer reads beside the reference's log-probability, which has a stage of its own."""
    return [value for value in frozen_values(scorer) if value != "reference_logp"]


def _by_model(values: Sequence[Value]) -> dict[str, list[Value]]:
    """The values that each model gives."""
    models = dict.fromkeys(value.model for value in values)
    return {model: [value for value in values if value.model == model] for model in models}


def scoring_models(scorer: Scorer) -> list[str]:
    """Models that pass over the data for a scorer."""
    return [model for model in _by_model(_asked(scorer)) if model != "data"]


def _auxiliary(run: Run, values: Sequence[Value]) -> list[str]:
    return [model for model in _by_model(values) if model in run.recipe.auxiliary_models]


def value_inputs(run: Run, scorer: Scorer) -> dict[str, str]:
    """Fingerprints of the models and files that a scorer's values come from, the reference's left out."""
    found: dict[str, str] = {}
    for model, mine in _by_model(_asked(scorer)).items():
        if model in ("oracle", "reward"):
            found[model] = run.done(model).fingerprint
        elif model in run.recipe.auxiliary_models:
            if run.recipe.auxiliary_models[model].training is not None:
                found[f"{AUXILIARY}{model}"] = run.done(f"{AUXILIARY}{model}").fingerprint
            else:
                found[f"model of {model}"] = run.fingerprint_of(folder_of(run, model))
        for value in mine if model == "data" else ():
            if value.kind == "file":
                found[f"file {value.details['file']}"] = file_fingerprint(Path(value.details["file"]))
    return found


def _write(
    run: Run,
    folder: Path,
    makers: Sequence[Maker],
    template: Template,
    rows: TokenTable,
    reference: TokenStore | None = None,
) -> TokenStore:
    """Write shards of whole prompts; a prompt's responses stay together, so its prompt is computed once.

    Args:
        run: The run.
        folder: Where the shards go.
        makers: What gives the values.
        template: That wrote the rows.
        rows: Every prompt with its responses.
        reference: Values that are there already.
    """
    keys = Keys(rows.keys[rows.starts[:-1]])
    total = len(rows.responses) * sum(maker.passes for maker in makers)
    with run.display.progress(folder.name, total) as bar:

        def make(wanted: Sequence[str]) -> Iterator[TokenRecord]:
            group = [rows[keys.place(key)] for key in wanted]
            values = {name: found for maker in makers for name, found in maker(group, bar.advance).items()}
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


def _records(template: Template, row: TokenRow) -> Iterator[TokenRecord]:
    for place, (key, ids) in enumerate(zip(keys_of(row.comparison), row.responses, strict=True)):
        text, spans, own = spelled(template.tokenizer, row, place)
        starts, ends = [span.start for span in spans], [span.end for span in spans]
        yield TokenRecord(key, ids, starts, ends, {}, None if own else text)
