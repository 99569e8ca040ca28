"""Scores and weights as columns of a data set, and the evaluation of a trained model."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast, overload

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tokenward.api.arguments import (
    check_comparable,
    check_metrics,
    check_sampler,
    check_scored,
    check_scoring,
    check_selector,
    check_tokens,
)
from tokenward.api.inputs import (
    DEFAULT_TOKENS,
    Model,
    PairRule,
    Rows,
    TokenSettings,
    check_options,
    check_rows_type,
    encode_rows,
    language_model,
)
from tokenward.api.notices import LoggedDisplay
from tokenward.api.oracles import Oracle, Scoring, StoredScores, scoring_of
from tokenward.api.prompts import are_prompts, different_prompts, encode_prompts, reusable
from tokenward.api.stored import (
    EOS,
    IDS,
    KEYS,
    RANKS,
    SCORES,
    SEGMENTS,
    WEIGHTS,
    check_list,
    check_stored,
    score_columns,
    with_score_columns,
)
from tokenward.api.values import REFERENCE_LOGP, ValuePass
from tokenward.artifacts import StagePart, user_path
from tokenward.distributed import independent, is_first
from tokenward.errors import UserError
from tokenward.evaluation.measures import Measures, Models
from tokenward.evaluation.replies import METRICS
from tokenward.evaluation.statistics import Figure
from tokenward.models.identity import check_places, resolve
from tokenward.models.loading import LanguageModel, absolute_name
from tokenward.models.probe import Packing
from tokenward.plugins import find, name_of
from tokenward.sampling import SamplingSettings
from tokenward.sampling.server import ServerSampler
from tokenward.sampling.vllm import VllmSampler
from tokenward.scoring.basic import Scorer
from tokenward.scoring.join import with_scores
from tokenward.scoring.reads import is_online
from tokenward.scoring.scorers import SCORERS
from tokenward.selection import Selector, TopFraction, scope_of, unit_of
from tokenward.selection.weights import tokens_of, weights_of
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template
from tokenward.trl_names import answers_trl
from tokenward.types import Precision


@overload
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
    precision: Precision = "float32",
    tokens_per_batch: int = 8192,
    store: str | Path | None = None,
    part: None = None,
    quiet: bool = False,
) -> Dataset: ...


@overload
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
    precision: Precision = "float32",
    tokens_per_batch: int = 8192,
    store: str | Path,
    part: str,
    quiet: bool = False,
) -> Dataset | None: ...


@answers_trl
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
    precision: Precision = "float32",
    tokens_per_batch: int = 8192,
    store: str | Path | None = None,
    part: str | None = None,
    quiet: bool = False,
) -> Dataset | None:
    """Add a score for each token of each response to a data set (SePO, arXiv 2408.13518, section 3.1).

    Example::

        scored = tokenward.score(pairs, oracle=oracle)
        scored[0]["token_scores"]      # a list for each response, here of the chosen and the rejected one

    The new columns are lists with an entry for each response, in the row's order. A row that cannot be used (too long,
    empty, a duplicate) has None in all of them, and is counted on screen.

    * ``prompt_digest``: a hash of the prompt's tokens, one for the row;
    * ``response_keys``: a stable id of prompt and response;
    * ``response_ranks``: the rank, 0 is the best;
    * ``response_eos``: number of end-of-turn tokens at the end;
    * ``token_ids``: token ids;
    * ``token_starts`` and ``token_ends``: byte offsets of the tokens in the response's UTF-8 text, or in ``response_texts``
      if the chat template changes the text;
    * ``token_scores``: the scores;
    * ``token_oracle_logp`` and ``token_reference_logp`` (nats), or ``token_reward``: the values that the scores were
      computed from;
    * ``token_segments``, if ``processing_class`` has other tokens than the oracle: the segment of each token in its response. Tokens
      of one segment are selected as one.

    Args:
        dataset: Rows, as for :class:`SelectiveTrainer`.
        oracle: The source of scores, as for :class:`SelectiveTrainer`.
        reference: The model that the oracle was trained from, for an oracle that does not know it.
        scorer: From values to scores; None is the log-ratio of oracle and reference, or the reward itself.
        processing_class: The tokenizer whose tokens get the scores: that of the policy, if it is not the oracle's. None is that of the
            oracle.
        tokens: How text becomes tokens.
        pairs: Score only the responses in the pairs that this rule forms; None scores all responses.
        packing: As for :class:`SelectiveTrainer`.
        precision: Number type of the forward passes: ``float32`` is that of the weights, ``bfloat16`` uses autocast.
        tokens_per_batch: Maximum number of tokens in a forward pass.
        store: Folder in which the values are kept, to continue after a stop. Once complete, it can be passed as an oracle.
        part: ``i/N``, such as ``1/4``, computes one of N parts of ``store``. Other jobs with the same arguments compute the others at
            the same time. The processes of one launch share all of them without it, and all get the result.
        quiet: Show nothing.

    Returns:
        The same rows with the new columns; None if other parts are still missing.

    Raises:
        UserError: nothing gives scores, the scorer reads a model that was not given, a row cannot be read, or the store holds values
            of other rows, models or settings.
    """
    check_options(precision=precision, packing=packing, pairs=pairs)
    check_tokens(tokens)
    check_rows_type(dataset, "dataset")
    check_scoring(oracle, scorer)
    check_places(oracle=oracle, reference=reference)
    if part is not None and store is None:
        raise UserError(
            f"part {part} is a part of a store, and none was given. Pass store, a folder that all jobs see.",
            code="missing-store",
        )
    mine = StagePart.read("1/1" if part is None else part)
    display = LoggedDisplay(quiet=quiet or not is_first(), log=not quiet and is_first())

    def base() -> LanguageModel:
        if reference is None:
            raise UserError(
                "the model that the oracle was trained from is not known. Pass reference.",
                code="missing-reference",
            )
        return language_model(reference, packing=packing, name="reference", fallback=processing_class)

    wanted = None if processing_class is None else tokens.style.template(processing_class)
    scoring = scoring_of(oracle, base, scorer=scorer, style=tokens.style, template=wanted, packing=packing)
    if scoring is None:
        raise UserError("nothing gives scores. Pass oracle or scorer.", code="missing-oracle")
    if is_online(scoring.scorer):
        raise UserError(
            f"the scorer {name_of(scoring.scorer)} reads the policy during training, so its scores cannot be computed before. Pass it "
            "to SelectiveTrainer as oracle.",
            code="online-scorer",
        )
    template = _template(scoring, wanted, tokens)
    rows = dataset if isinstance(dataset, Dataset | TokenTable) else list(cast(Iterable[Any], dataset))
    limits = tokens.limits(scoring.readers(template, tokens.style))
    data = encode_rows(rows, None, template, limits, pairs=pairs, names=("dataset", ""), say=display.notice)
    check_stored(scoring.store, [data.train], template, tokens)
    values = ValuePass(
        template=template,
        style=tokens.style,
        precision=precision,
        tokens_per_batch=tokens_per_batch,
        display=display,
    )
    if store is not None:
        with nullcontext() if part is None else independent():
            known = values.kept_store(scoring, data.everything, user_path(store), mine, tokens)
        if known is None:
            return None
        return with_score_columns(
            rows, score_columns(with_scores(data.train, scoring.scorer, known), scoring.scorer, known)
        )
    with TemporaryDirectory(prefix="tokenward-") as folder:
        known = values.store(scoring, data.everything, Path(folder))
        found = score_columns(with_scores(data.train, scoring.scorer, known), scoring.scorer, known)
    return with_score_columns(rows, found)


def _template(scoring: Scoring, wanted: Template | None, tokens: TokenSettings) -> Template:
    """The template of the tokens that get scores: that of the given tokenizer, or else that of the models."""
    known = next(iter(scoring.templates(tokens.style).values()), None)
    if known is not None and wanted is not None:
        # A model with an encoder writes prompts in its own way.
        same = replace(wanted, encoder=known.encoder).fingerprint == known.fingerprint
        return known if same else wanted
    if known is None and wanted is None:
        raise UserError(
            "no model was given, so the tokenizer is not known. Pass processing_class=tokenizer.",
            code="missing-tokenizer",
        )
    return cast(Template, known or wanted)


@answers_trl
def select(scored: Dataset, *, selector: Selector | None = None) -> Dataset:
    """Add a weight for each token to a scored data set, as a column ``token_weights`` with an entry for each response.

    :class:`SelectiveTrainer` trains with these weights if it is called without ``oracle`` and ``selector``.

    Args:
        scored: The result of :func:`score`.
        selector: From scores to weights; None is ``TopFraction(0.3)``.

    Returns:
        The same rows with the new column; None in rows without scores.

    Raises:
        UserError: the data set has no scores, or the selector pools over words or compares the rows of a training step.
    """
    check_scored(scored)
    check_selector(selector)
    selector = TopFraction(0.3) if selector is None else selector
    joint = [SEGMENTS] if SEGMENTS in scored.column_names else []
    read = [KEYS, RANKS, EOS, IDS, SCORES, *joint]
    missing = [name for name in read if name not in scored.column_names]
    if missing:
        raise UserError(
            f"the data set has no column {missing[0]}. Pass the result of tokenward.score.",
            code="missing-scores",
        )
    if unit_of(selector) or scope_of(selector) == "batch":
        what = f"pools over {unit_of(selector)}s" if unit_of(selector) else "compares the rows of a step"
        raise UserError(
            f"the selector {name_of(selector)} {what}, which a data set does not have. Pass it to SelectiveTrainer.",
            code="selector-needs-training",
        )
    rows = [cast(dict[str, Any], row) for row in scored.select_columns(read).with_format(None)]
    for number, row in enumerate(rows, 1):
        for place in range(len(row[KEYS] or ())):
            for name in (SCORES, *joint):
                check_list(row, name, place, number)
    used = [row for row in rows if row[KEYS]]
    if not used:
        raise UserError(
            "no row of the data set has scores. Score it again with tokenward.score.", code="missing-scores"
        )
    weights = iter(_weights(selector, used))
    column = [next(weights) if row[KEYS] else None for row in rows]
    kept = [name for name in scored.column_names if name != WEIGHTS]
    return scored.select_columns(kept).add_column(WEIGHTS, cast(Any, column))


def _weights(selector: Selector, rows: Sequence[Mapping[str, Any]]) -> list[list[list[float]]]:
    """The weights of each token of each response of each row."""
    scores = [values for row in rows for values in row[SCORES]]
    joint = [number for row in rows for numbers in row.get(SEGMENTS, ()) for number in numbers]
    tokens = tokens_of(
        torch.tensor([value for values in scores for value in values], dtype=torch.float32),
        lengths=torch.tensor([len(values) for values in scores]),
        sizes=torch.tensor([len(row[KEYS]) for row in rows]),
        ranks=torch.tensor([rank for row in rows for rank in row[RANKS]]),
        eos=torch.tensor([count for row in rows for count in row[EOS]]),
        keys=np.array([int(key, 16) for row in rows for key in row[KEYS]], np.uint64),
        joint=torch.tensor(joint) if joint else None,
    )
    parts = iter(weights_of(selector, tokens).split([len(values) for values in scores]))
    return [[next(parts).tolist() for _ in row[KEYS]] for row in rows]


@answers_trl
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
    sampler: ServerSampler | VllmSampler | None = None,
    seed: int = 0,
    bootstrap: int = 2000,
    tokens: TokenSettings = DEFAULT_TOKENS,
    pairs: PairRule = "best_worst",
    packing: Packing = "auto",
    precision: Precision = "float32",
    tokens_per_batch: int = 8192,
    quiet: bool = False,
) -> dict[str, Figure]:
    """Measure what training changed, on rows that were not trained on.

    Example::

        figures = tokenward.evaluate("policy", eval_rows, reference="default")
        figures["preference/accuracy"].value

    On the data's responses: ``preference/accuracy`` and ``preference/margin`` (of the log-ratio of the model to the
    reference, nats), ``likelihood/*`` (of the mean log-probability of a token) and ``logps/*_change`` (nats; negative for
    chosen responses that training made less likely). On sampled replies, if ``prompts`` is not 0: each metric, ``length``,
    ``ended``, and ``kl/per_token`` (nats). With an ``oracle`` and spans in the data: ``credit/*``, how well the scores find
    the spans.

    Args:
        model: The model after training.
        dataset: Rows, as for :class:`SelectiveTrainer`; or rows with a ``prompt`` alone, which have figures of sampled replies
            only.
        reference: The model before training.
        processing_class: The tokenizer of both.
        oracle: The source of scores, as for :class:`SelectiveTrainer`.
        scorer: From values to scores.
        metrics: Names of metrics of sampled replies.
        prompts: Number of prompts that both models reply to.
        sampling: Sampling settings.
        sampler: Samples the replies in place of transformers, after a check that it holds the model's weights.
        seed: Seed of the replies and the intervals.
        bootstrap: Number of bootstrap resamples of an interval.
        tokens: How text becomes tokens.
        pairs: Which pairs to form of more than two ranked responses.
        packing: As for :class:`SelectiveTrainer`.
        precision: Number type of the forward passes.
        tokens_per_batch: Maximum number of tokens in a forward pass.
        quiet: Show nothing.

    Returns:
        Figures by name, each with its value, a 95 % bootstrap interval and n.

    Raises:
        UserError: a row cannot be read, a metric is not known, there are metrics and no prompts, the rows are prompts alone and
            nothing is measured on replies, or the sampler cannot be reached or holds other weights.
    """
    check_options(precision=precision, packing=packing, pairs=pairs)
    if bootstrap < 1:
        raise UserError(
            f"bootstrap is {bootstrap}, and an interval needs resamples. Use for example 2000.",
            code="out-of-range",
        )
    check_tokens(tokens)
    dataset = reusable(dataset, "dataset")
    check_metrics(metrics, prompts)
    for metric in metrics:
        find("metric", metric, METRICS)
    check_sampler(sampler, prompts)
    check_scoring(oracle, scorer)
    if alone := are_prompts(dataset):
        _check_prompts_alone(prompts, oracle)
    check_places(model=model, reference=reference, oracle=oracle)
    display = LoggedDisplay(quiet=quiet or not is_first(), log=not quiet and is_first())
    start = language_model(reference, processing_class, packing=packing, name="reference")
    policy = language_model(model, processing_class, packing=packing)
    named = isinstance(model, str | Path) and isinstance(reference, str | Path)
    same_name = named and absolute_name(resolve(str(model))) == absolute_name(resolve(str(reference)))
    check_comparable(start, policy, tokens, same_name=same_name)
    template = start.template(tokens.style)
    scoring = scoring_of(
        oracle, lambda: start, scorer=scorer, style=tokens.style, template=template, packing=packing
    )
    readers = scoring.readers(template, tokens.style) if scoring else []
    limits, replying = tokens.limits([start, policy, *readers]), sampling or SamplingSettings()
    table, asked = None, list[TokenRow]()
    if alone:
        rows = encode_prompts(dataset, "dataset", template, limits, display.notice)
        found = different_prompts(rows, limits.context, replying.max_new_tokens, display.notice).rows
        asked = sorted(found, key=lambda row: row.comparison.key)[:prompts]
    else:
        lists = encode_rows(
            dataset, None, template, limits, pairs=None, names=("dataset", ""), say=display.notice
        ).train
        check_stored(scoring and scoring.store, [lists], template, tokens)
        table, _ = TokenTable.pairs(lists.store, pairs).fitting(limits)
        asked = lists.first_by_key(prompts) if prompts else []
    computing: dict[str, Any] = {
        "precision": precision,
        "tokens_per_batch": tokens_per_batch,
        "display": display,
    }
    measures = Measures(
        metrics=metrics,
        sampling=replying,
        engine=sampler,
        seed=seed,
        resamples=bootstrap,
        **computing,
    )
    figures, _ = measures(Models(lambda: start, lambda: policy), table, template, asked)
    if scoring is not None and table is not None:
        values = ValuePass(template=template, style=tokens.style, **computing)
        figures |= _credit(measures, scoring, table, values, start)
    return figures


def _check_prompts_alone(prompts: int, oracle: Oracle | None) -> None:
    if not prompts:
        raise UserError(
            "the rows of dataset are prompts alone, so only sampled replies can be measured, and prompts is 0. Pass the number of prompts to "
            "reply to, such as prompts=64.",
            code="metrics-without-prompts",
        )
    if oracle is not None:
        raise UserError(
            "the rows of dataset are prompts alone, and the scores of an oracle are measured on responses of the data. Leave oracle out, or "
            "pass rows with responses.",
            code="conflicting-settings",
        )


def _credit(
    measures: Measures, scoring: Scoring, table: TokenTable, values: ValuePass, start: LanguageModel
) -> dict[str, Figure]:
    """Token credit: how well the scores of pairs find the spans of the data."""
    pairs = table.where(table.sizes == 2)
    if not len(pairs):
        return {}
    scoring = scoring._replace(models={"reference": start, **scoring.models})
    with TemporaryDirectory(prefix="tokenward-") as folder:
        # Surprisal, the control, reads the reference's log-probability.
        store = values.store(scoring, pairs.by_prompt(), Path(folder), more=[REFERENCE_LOGP])
        return measures.credit(pairs, store, scoring.scorer, _name(scoring.scorer))


def _name(scorer: Any) -> str:
    """The name of a scorer in figures; existing scores are called scores."""
    if isinstance(scorer, StoredScores):
        return "scores"
    known = {kind: name for name, kind in SCORERS.items()}
    return known.get(type(scorer), name_of(scorer))
