"""Scores and weights as columns of a data set, and the figures of a trained model."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokenward.api.inputs import (
    DEFAULT_TOKENS,
    Model,
    PairRule,
    Rows,
    TokenSettings,
    encoded,
    language_model,
)
from tokenward.api.trainer import REFERENCE_LOGP
from tokenward.api.values import (
    ENDS,
    EOS,
    IDS,
    KEYS,
    PREFIX,
    RANKS,
    SCORES,
    STARTS,
    TEXTS,
    WEIGHTS,
    Oracle,
    Scoring,
    StoredScores,
    scoring_of,
    value_store,
)
from tokenward.api.words import library_words
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.evaluation.measures import Measures, Models
from tokenward.evaluation.statistics import Figure
from tokenward.models.loading import LanguageModel
from tokenward.models.probe import Packing
from tokenward.plugins import name_of
from tokenward.sampling import SamplingSettings
from tokenward.scoring.basic import Scorer
from tokenward.scoring.join import scored as with_scores
from tokenward.scoring.reads import is_online
from tokenward.scoring.scorers import SCORERS
from tokenward.scoring.store import TokenStore
from tokenward.selection import Selector, TopFraction, scope_of, unit_of
from tokenward.selection.weights import tokens_of, weights_of
from tokenward.tokens.rows import keys_of
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

Scored = dict[str, list[Any]]
"""Columns of one row of a scored data set."""


def score(
    dataset: Rows,
    *,
    oracle: Oracle | None = None,
    reference: Model | None = None,
    scorer: Scorer | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    tokens: TokenSettings = DEFAULT_TOKENS,
    pairs: PairRule | None = None,
    packing: Packing = "auto",
    precision: str = "float32",
    tokens_per_batch: int = 8192,
    quiet: bool = False,
) -> Dataset:
    """The same rows with a score for each token of each response (SePO, arXiv 2408.13518, section 3.1).

        scored = tokenward.score(pairs, oracle=oracle)
        scored[0]["token_scores"]      # one list per response, here of the chosen and the rejected one

    New columns, each a list with an entry per response, in the row's order of responses: ``response_keys`` (a stable name
    of prompt and response), ``response_ranks`` (0 is the best), ``response_eos`` (how many tokens at the end are
    end-of-turn tokens), ``token_ids``, ``token_starts`` and ``token_ends`` (bytes of the response's text, or of
    ``response_texts`` if the template changes it), ``token_scores``, and what the scores were made of, in nats:
    ``token_reference_logp`` and ``token_oracle_logp``, or ``token_reward``. A row that cannot be used (too long, empty, a
    duplicate) has None in each, and is counted on screen.

    Args:
        dataset: Rows as :class:`SelectiveTrainer` takes them.
        oracle: As :class:`SelectiveTrainer` takes it.
        reference: What an oracle that does not know it was trained from.
        scorer: From values to scores; None is the log-ratio of oracle and reference, or the reward itself.
        processing_class: The tokenizer, if no model is given that has one.
        tokens: How text becomes tokens.
        pairs: Score only the responses that this rule makes pairs of; None scores all.
        packing: As :class:`SelectiveTrainer` takes it.
        precision: Number type of the pass: ``float32`` is that of the weights, ``bfloat16`` runs under autocast.
        tokens_per_batch: Most tokens in one pass.
        quiet: Show nothing.

    Raises:
        UserError: nothing gives scores, a scorer reads a model that was not given, or a row cannot be read.
    """
    with library_words():
        display = Display(quiet=quiet)
        scoring = scoring_of(oracle, _no_reference, reference=reference, scorer=scorer, packing=packing)
        if scoring is None:
            raise UserError("nothing gives scores. Give oracle=, or a scorer as scorer=.")
        if is_online(scoring.scorer):
            raise UserError(
                f"the scorer {name_of(scoring.scorer)} reads the policy while it trains, so there are no scores before. Give it to "
                "SelectiveTrainer as oracle=."
            )
        template = _template(scoring, processing_class, tokens)
        rows = (
            list(cast(Iterable[Any], dataset)) if not isinstance(dataset, Dataset | TokenTable) else dataset
        )
        limits = tokens.limits(scoring.models.values())
        data = encoded(rows, None, template, limits, pairs=pairs, names=("dataset", ""), say=display.line)
        with TemporaryDirectory(prefix="tokenward-") as folder:
            store = value_store(
                scoring,
                data.everything,
                template,
                Path(folder),
                style=tokens.style,
                precision=precision,
                tokens_per_batch=tokens_per_batch,
                display=display,
            )
            found = _columns(with_scores(data.train, scoring.scorer, store), store)
        return _with_columns(rows, found)


def _no_reference() -> LanguageModel:
    raise UserError("oracle= does not know what it was trained from. Give reference= as well.")


def _template(scoring: Scoring, tokenizer: PreTrainedTokenizerBase | None, tokens: TokenSettings) -> Template:
    for model in scoring.models.values():
        return model.template(tokens.style)
    if tokenizer is None:
        raise UserError("no model was given, so the tokenizer is not known. Give processing_class=tokenizer.")
    return tokens.style.template(tokenizer)


def _columns(table: TokenTable, store: TokenStore) -> dict[str, Scored]:
    """What is known of the responses of each row, by where the row stands."""
    found: dict[str, Scored] = {}
    for number in range(len(table)):
        row = table[number]
        mine = found.setdefault(row.comparison.source, {})
        for place, key in enumerate(keys_of(row.comparison)):
            if key in mine.get(KEYS, ()):
                continue
            record = store[key]
            assert row.scores is not None
            entry = {
                KEYS: key,
                RANKS: int(table.ranks[int(table.starts[number]) + place]),
                EOS: row.eos[place],
                TEXTS: record.text,
                IDS: record.ids,
                STARTS: record.start,
                ENDS: record.end,
                **{f"{PREFIX}{name}": values for name, values in record.values.items() if name != SCORES},
                SCORES: row.scores[place].tolist(),
            }
            for name, value in entry.items():
                mine.setdefault(name, []).append(value)
    return found


def _with_columns(rows: Any, found: Mapping[str, Scored]) -> Dataset:
    if isinstance(rows, TokenTable):
        known = [rows.comparison(number) for number in range(len(rows))]
        places = [row.source for row in known]
        made = Dataset.from_list(
            [
                {"prompt": list(row.prompt), "responses": list(row.responses), "ranks": list(row.ranks)}
                for row in known
            ]
        )
    else:
        made = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
        places = [f"dataset:row {number}" for number in range(1, len(made) + 1)]
    names = list(dict.fromkeys(name for columns in found.values() for name in columns))
    made = made.remove_columns([name for name in made.column_names if name in names])
    for name in names:
        column = [found.get(place, {}).get(name) for place in places]
        if any(text for texts in column for text in texts or ()) or name != TEXTS:
            made = made.add_column(name, cast(Any, column))
    return made


def select(scored: Dataset, *, selector: Selector | None = None) -> Dataset:
    """The same rows with a weight for each token, in a column ``token_weights``, an entry per response.

    A data set with weights trains with them: pass it to :class:`SelectiveTrainer` without ``oracle`` and ``selector``.

    Args:
        scored: From :func:`score`.
        selector: From scores to weights; None is ``TopFraction(0.3)``.

    Raises:
        UserError: the data set has no scores, or the selector looks at words or at the comparisons of a training step.
    """
    with library_words():
        selector = TopFraction(0.3) if selector is None else selector
        missing = [name for name in (KEYS, RANKS, EOS, SCORES) if name not in scored.column_names]
        if missing:
            raise UserError(f"the data set has no {missing[0]}. Give what tokenward.score returned.")
        if unit_of(selector) or scope_of(selector) == "batch":
            what = (
                unit_of(selector) and f"looks at {unit_of(selector)}"
            ) or "chooses among the comparisons of a step"
            raise UserError(
                f"the selector {name_of(selector)} {what}, which a data set does not have. Give it to SelectiveTrainer."
            )
        rows = [
            cast(dict[str, Any], row)
            for row in scored.select_columns([KEYS, RANKS, EOS, SCORES]).with_format(None)
        ]
        used = [row for row in rows if row[KEYS]]
        if not used:
            raise UserError("no row of the data set has scores. Score it again with tokenward.score.")
        weights = iter(_weights(selector, used))
        column = [next(weights) if row[KEYS] else None for row in rows]
        kept = [name for name in scored.column_names if name != WEIGHTS]
        return scored.select_columns(kept).add_column(WEIGHTS, cast(Any, column))


def _weights(selector: Selector, rows: Sequence[Mapping[str, Any]]) -> list[list[list[float]]]:
    """Weights of each token of each response of each row."""
    scores = [values for row in rows for values in row[SCORES]]
    tokens = tokens_of(
        torch.tensor([value for values in scores for value in values], dtype=torch.float32),
        lengths=torch.tensor([len(values) for values in scores]),
        sizes=torch.tensor([len(row[KEYS]) for row in rows]),
        ranks=torch.tensor([rank for row in rows for rank in row[RANKS]]),
        eos=torch.tensor([count for row in rows for count in row[EOS]]),
        keys=np.array([int(key, 16) for row in rows for key in row[KEYS]], np.uint64),
    )
    parts = iter(weights_of(selector, tokens).split([len(values) for values in scores]))
    return [[next(parts).tolist() for _ in row[KEYS]] for row in rows]


def evaluate(
    model: Model,
    dataset: Rows,
    *,
    reference: Model,
    processing_class: PreTrainedTokenizerBase | None = None,
    oracle: Oracle | None = None,
    scorer: Scorer | None = None,
    metrics: Sequence[str] = (),
    prompts: int = 0,
    sampling: SamplingSettings | None = None,
    seed: int = 0,
    bootstrap: int = 2000,
    tokens: TokenSettings = DEFAULT_TOKENS,
    pairs: PairRule = "best_worst",
    packing: Packing = "auto",
    precision: str = "float32",
    tokens_per_batch: int = 8192,
    quiet: bool = False,
) -> dict[str, Figure]:
    """What training changed, on rows that it has not seen.

        figures = tokenward.evaluate("policy", eval_rows, reference="default")
        figures["preference/accuracy"].value

    Of written responses: ``preference/accuracy`` and ``preference/margin`` (of the log-ratio of the model to the reference,
    nats), ``likelihood/*`` (mean log-probability of a token) and ``logps/*_change`` (nats: chosen responses that became
    less likely are displaced). Of sampled replies, if ``prompts`` asks for some: each metric, ``length``, ``ended``, and
    ``kl/per_token`` (nats). With an ``oracle`` and spans in the data: how well scores find the spans, ``credit/*``.

    Args:
        model: After training.
        dataset: Rows as :class:`SelectiveTrainer` takes them.
        reference: Before training.
        processing_class: The tokenizer of both.
        oracle: As :class:`SelectiveTrainer` takes it.
        scorer: From values to scores.
        metrics: Of sampled replies, by name.
        prompts: How many of the prompts both models reply to.
        sampling: How replies are drawn.
        seed: Of replies and intervals.
        bootstrap: Resamples behind an interval.
        tokens: How text becomes tokens.
        pairs: Which pairs to take of a prompt with more than two ranked responses.
        packing: As :class:`SelectiveTrainer` takes it.
        precision: Number type of the passes.
        tokens_per_batch: Most tokens in one pass.
        quiet: Show nothing.

    Returns:
        Figures by name, each with its value, a 95 % bootstrap interval and n.

    Raises:
        UserError: a row cannot be read, a metric is not known, or metrics are asked for without prompts.
    """
    with library_words():
        if metrics and not prompts:
            raise UserError(
                "metrics are of sampled replies, and prompts is 0. Give prompts=64, say, or leave metrics out."
            )
        display = Display(quiet=quiet)
        start = language_model(reference, processing_class, packing=packing, name="reference")
        policy = language_model(model, processing_class, packing=packing)
        if start.model is policy.model:
            raise UserError(
                "model and reference are one model, so nothing changed. Give the model before training as reference=."
            )
        scoring = scoring_of(oracle, lambda: start, scorer=scorer, packing=packing)
        template = start.template(tokens.style)
        limits = tokens.limits([start, policy, *(scoring.models.values() if scoring else ())])
        lists = encoded(
            dataset, None, template, limits, pairs=None, names=("dataset", ""), say=display.line
        ).train
        table, _ = TokenTable.pairs(lists.store, pairs).fitting(limits)
        measures = Measures(
            metrics=metrics,
            sampling=sampling or SamplingSettings(),
            seed=seed,
            resamples=bootstrap,
            precision=precision,
            tokens_per_batch=tokens_per_batch,
            display=display,
        )
        asked = lists.first_by_key(prompts) if prompts else []
        figures, _ = measures(Models(lambda: start, lambda: policy), table, template, asked)
        if scoring is not None:
            figures |= _credit(measures, scoring, table, template, tokens, start)
        return figures


def _credit(
    measures: Measures,
    scoring: Scoring,
    table: TokenTable,
    template: Template,
    tokens: TokenSettings,
    start: LanguageModel,
) -> dict[str, Figure]:
    """Scores of pairs against the spans of the data."""
    found = table.where(table.sizes == 2)
    if not len(found):
        return {}
    if "reference" not in scoring.models:
        scoring = scoring._replace(models={**scoring.models, "reference": start})
    with TemporaryDirectory(prefix="tokenward-") as folder:
        store = value_store(
            scoring,
            found.by_prompt(),
            template,
            Path(folder),
            style=tokens.style,
            precision=measures.precision,
            tokens_per_batch=measures.tokens_per_batch,
            display=measures.display,
            more=[REFERENCE_LOGP],  # surprisal, the control, reads it
        )
        return measures.credit(found, store, scoring.scorer, _name(scoring.scorer))


def _name(scorer: Any) -> str:
    """What a recipe calls a scorer; the scores of a data set are called scores."""
    if isinstance(scorer, StoredScores):
        return "scores"
    known = {kind: name for name, kind in SCORERS.items()}
    return known.get(type(scorer), name_of(scorer))
