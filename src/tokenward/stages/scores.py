"""The stages that compute values per token: reference log-probabilities, and scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenward.api.constant import warn_of_stored
from tokenward.api.values import Maker, frozen_values
from tokenward.artifacts import StageFolder, file_fingerprint
from tokenward.models.base import TokenModel
from tokenward.scoring.reads import Value
from tokenward.scoring.scorers import Scorer
from tokenward.scoring.store import TokenStore, write_store
from tokenward.stages.auxiliary import auxiliary_of, folder_of, scorer_of
from tokenward.stages.base import Checks, Stage
from tokenward.stages.part_checks import check_scorer
from tokenward.stages.run import AUXILIARY, Run
from tokenward.stages.tables import pairs_fingerprint, say_notes, tables
from tokenward.tokens.encode import check_some_left
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
        maker = _maker(run, "reference", [Value("reference", "logp")], template, loaded=model)
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
        warn_of_stored(scorer, store, run.display.line)
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
        _maker(run, model, values, template, cache) for model, values in _by_model(_asked(scorer)).items()
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
    """A store with a bar; see :func:`tokenward.scoring.store.write_store`."""
    total = len(rows.responses) * sum(maker.passes for maker in makers)
    with run.display.progress(folder.name, total) as bar:
        return write_store(
            folder,
            makers,
            template,
            rows,
            shard_rows=run.recipe.scores.shard_rows,
            progress=bar.advance,
            reference=reference,
        )


def _maker(
    run: Run,
    model: str,
    values: Sequence[Value],
    template: Template,
    cache: Path | None = None,
    *,
    loaded: TokenModel | None = None,
) -> Maker:
    """What gives values of one of the run's models, or of its data."""

    def load(attention: str | None) -> TokenModel:
        if loaded is not None and attention is None:
            return loaded
        folder = folder_of(run, model)
        return run.load_reward(folder) if model == "reward" else run.load(folder, attention=attention)

    table = run.recipe.scores
    return Maker(
        model,
        values,
        template,
        load,
        style=run.style,
        precision=table.precision,
        tokens_per_batch=table.tokens_per_batch,
        batch=run.recipe.evaluation.batch,
        cache=cache,
        prompt=auxiliary_of(run, model).prompt,
    )
