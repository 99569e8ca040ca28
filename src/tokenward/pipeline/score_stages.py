"""The stages that compute values per token: reference log-probabilities, and scores."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenward.artifacts import Manifest
from tokenward.models.loading import LanguageModel
from tokenward.pipeline.context import Run
from tokenward.pipeline.data import (
    by_prompt,
    encode_set,
    pair_sets,
    pair_settings,
    response_keys,
    without_pairs,
)
from tokenward.pipeline.values import scorer_of
from tokenward.scoring.logprobs import response_logprobs
from tokenward.scoring.store import TokenRecord, TokenStore, write_shards
from tokenward.tokens.encode import Encoded
from tokenward.tokens.rows import TokenRow
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
            rows, counts = _all_rows(run, template)
            counts["comparisons without a pair: closer than data.min_gap"] = without_pairs(run)
            run.display.table("pairs", ("", "rows"), [(name, str(count)) for name, count in counts.items()])
            model = run.load(run.reference_model)
            store = _write(run, stage.path, model, template, rows, "reference_logp")
            stage.complete(responses=len(store), layout=model.layout, pairs=counts)
    return run.done("reference")


def compute_scores(run: Run) -> Manifest:
    """Raw oracle and reference log-probabilities of every response token, in the score store.

    Nothing is selected here: every selection is made from these values when they are read.
    """
    table = run.recipe.scores
    settings = {"scores": {"precision": table.precision, "shard_rows": table.shard_rows}}
    needs_oracle = needs(run, "oracle_logp")
    inputs = {"reference": run.done("reference").fingerprint}
    if needs_oracle:
        inputs["oracle"] = run.done("oracle").fingerprint
    with run.stage("scores", settings, inputs) as stage:
        if not stage.done:
            template = run.tokenizer_template(run.reference_model)
            rows, _ = _all_rows(run, template)
            reference = TokenStore(run.path("reference"))
            model = run.load(str(run.path("oracle") / "model")) if needs_oracle else None
            store = _write(run, stage.path, model, template, rows, "oracle_logp", reference)
            stage.complete(responses=len(store), reference=run.reference_model)
    return run.done("scores")


def needs(run: Run, value: str) -> bool:
    """Whether the recipe's scorer reads a stored value; one that does not say reads all."""
    return value in getattr(type(scorer_of(run)), "reads", ("oracle_logp", "reference_logp"))


def _all_rows(run: Run, template: Template) -> tuple[list[Encoded], dict[str, int]]:
    """Every prompt with all responses of its pairs, and what encoding the pairs counted."""
    sets = pair_sets(run)
    pairs = encode_set(run, [*sets.train, *sets.referee, *sets.held_out], template)
    return encode_set(run, by_prompt(item.comparison for item in pairs.rows), template).rows, pairs.counts


def _write(
    run: Run,
    folder: Path,
    model: LanguageModel | None,
    template: Template,
    rows: Sequence[Encoded],
    name: str,
    reference: TokenStore | None = None,
) -> TokenStore:
    """Write shards of whole prompts; a prompt's responses stay together, so its prompt is computed once."""
    scores = run.recipe.scores
    by_key = {response_keys(row)[0]: row for row in rows}
    total = sum(len(row.responses) for row in rows)
    with run.display.progress(folder.name, total) as bar:

        def make(keys: Sequence[str]) -> Iterator[TokenRecord]:
            group = [by_key[key] for key in keys]
            values = (
                response_logprobs(
                    model,
                    [TokenRow(encoded=row) for row in group],
                    precision=scores.precision,
                    tokens_per_batch=scores.tokens_per_batch,
                    progress=bar.advance,
                )
                if model is not None
                else [[None] * len(row.responses) for row in group]
            )
            for row, results in zip(group, values, strict=True):
                for record, logp in zip(_records(template, row), results, strict=True):
                    known = {} if reference is None else reference[record.key].values
                    mine = {} if logp is None else {name: logp.tolist()}
                    yield record._replace(values={**known, **mine})

        return write_shards(folder, list(by_key), make, rows_per_shard=scores.shard_rows)


def _records(template: Template, row: Encoded) -> Iterator[TokenRecord]:
    for key, text, ids in zip(response_keys(row), row.comparison.responses, row.responses, strict=True):
        spans = token_spans(template.tokenizer, text, len(ids))
        yield TokenRecord(key, ids, [span.start for span in spans], [span.end for span in spans], {})
