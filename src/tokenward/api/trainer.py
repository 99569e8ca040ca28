"""SelectiveTrainer: transformers' Trainer with an oracle, a selector and an objective over tokens."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from datasets import Dataset, DatasetDict
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from tokenward.api.arguments import (
    check_of_data,
    check_scoring,
    check_selector,
    checked_objective,
)
from tokenward.api.inputs import (
    DEFAULT_TOKENS,
    Data,
    Model,
    PairRule,
    Rows,
    TokenSettings,
    check_data,
    check_options,
    check_separate,
    encode_rows,
)
from tokenward.api.oracles import Oracle, Scoring, scoring_of
from tokenward.api.prepare import Prepared, kept_line, kept_shares, prepare_rows, trained_on
from tokenward.api.start import start_of
from tokenward.api.stored import KEYS, SCORES, WEIGHTS, as_data_set, check_stored
from tokenward.api.training import evaluates, frozen_beside, with_new_adapter
from tokenward.api.values import REFERENCE_LOGP, ValuePass
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, copy_model, load_model
from tokenward.models.probe import Packing
from tokenward.objectives import CheckedObjective, Objective, SePO, needs_of, title_of
from tokenward.objectives.selected import with_entropy
from tokenward.scoring.basic import Scorer
from tokenward.scoring.join import with_reference, with_stored
from tokenward.selection import KeepAll, Selector, TopFraction
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template
from tokenward.training.checkpoints import RecordFiles
from tokenward.training.fit import check_when_ready
from tokenward.training.metrics import DisplacementAlarm
from tokenward.training.trainer import TokenTrainer
from tokenward.trl_names import answers_trl
from tokenward.types import Precision

DEFAULT_OBJECTIVE = SePO(gamma=2.0)


@answers_trl
class SelectiveTrainer(TokenTrainer):
    """Trains a policy on the tokens that carry a preference (SePO, arXiv 2408.13518).

    An oracle scores every response token, a selector turns scores into weights, and an objective trains on the weighted
    tokens. It is a ``transformers.Trainer``, with the same ``train``, ``save_model``, checkpoints and callbacks.

    Example::

        trainer = SelectiveTrainer(model, args, pairs, oracle=oracle, selector=TopFraction(0.3), objective=SePO(gamma=2.0))
        trainer.train()

    Scores are computed once, in the constructor. Dropout is off unless ``TokenTrainingArguments`` enables it.

    Args:
        model: The policy: a loaded model, which is trained in place, or a folder or hub name, which is loaded in float32.
        args: ``transformers.TrainingArguments``, or :class:`tokenward.TokenTrainingArguments`, which has more fields.
        train_dataset: Rows in any format that tokenward reads: TRL's ``prompt``, ``chosen``, ``rejected`` (texts or
            messages, the prompt may be implicit), ranked lists, or ``prompt``, ``completion``, ``label``; or a
            :class:`TokenTable`. Columns from :func:`tokenward.score` and :func:`tokenward.select` are used if there is no
            ``oracle``.
        eval_dataset: Eval rows; all their tokens have weight 1, so that scores do not influence the evaluation. Rows whose
            prompt is in ``train_dataset`` are dropped.
        processing_class: The tokenizer; None loads the one saved with the model.
        oracle: The source of scores: a trained model, the folder of a model or of a run's stage, the result of
            :func:`tokenward.train_oracle` or :func:`tokenward.train_reward`, a scorer, a folder of scores, or a data set
            from :func:`tokenward.score`. None trains on every token. It may have another tokenizer than the policy: its scores are
            then divided among the policy's tokens.
        selector: From scores to weights; None is ``TopFraction(0.3)`` if there are scores.
        objective: The training objective.
        peft_config: A ``LoraConfig``, or its fields, for a new adapter; None trains all weights.
        reference: The frozen model that the objective compares with, and that an oracle was trained from which does not
            know its own reference. None is the policy before training.
        scorer: From values to scores; None is the log-ratio of oracle and reference, or the reward itself.
        tokens: How text becomes tokens.
        pairs: Which pairs to form of more than two ranked responses: ``best_worst``, ``all`` or ``adjacent``.
        min_gap: Smallest difference of the data's scores in a pair; closer pairs are dropped.
        packing: ``auto`` tests whether the model can read a prompt once for several responses; ``shared_prompts`` and
            ``none`` decide it.
        precision: Number type of scoring passes: ``float32`` is that of the weights, ``bfloat16`` uses autocast.
        tokens_per_batch: Maximum number of tokens in a scoring pass.
        callbacks: Callbacks of transformers.

    Attributes:
        kept: Share of tokens that have weight, for ``chosen`` and ``rejected``; empty if they are selected during training,
            or if every token trains.

    Raises:
        UserError: an argument is invalid.
    """

    def __init__(
        self,
        model: Model,
        args: TrainingArguments,
        train_dataset: Rows,
        eval_dataset: Rows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        oracle: Oracle | None = None,
        selector: Selector | None = None,
        objective: Objective = DEFAULT_OBJECTIVE,
        peft_config: PeftConfig | dict[str, Any] | None = None,
        *,
        reference: Model | None = None,
        scorer: Scorer | None = None,
        tokens: TokenSettings = DEFAULT_TOKENS,
        pairs: PairRule = "best_worst",
        min_gap: float | None = None,
        packing: Packing = "auto",
        precision: Precision = "float32",
        tokens_per_batch: int = 8192,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_options(precision=precision, pairs=pairs)
        check_data(train_dataset, eval_dataset)
        check_selector(selector)
        check_scoring(oracle, scorer)
        objective = checked_objective(objective)
        check_of_data(objective)
        start = start_of(
            model,
            args,
            processing_class,
            peft_config,
            reference=reference,
            tokens=tokens,
            packing=packing,
            oracle=oracle,
        )
        own, display, before, compared = start.args, start.display, start.policy, start.reference
        train_dataset, eval_dataset = as_data_set(train_dataset), as_data_set(eval_dataset)
        if selector is not None:
            train_dataset, eval_dataset = _unselected(train_dataset), _unselected(eval_dataset)
        oracle = _unselected(oracle)
        weighted = oracle is None and _has_column(train_dataset, WEIGHTS)
        self._template = template = before.template(tokens.style)
        _check_reference(compared, template, tokens, objective)
        scoring = scoring_of(
            _stored_oracle(oracle, scorer, train_dataset),
            lambda: compared,
            scorer=scorer,
            style=tokens.style,
            template=template,
            **start.loading,
        )
        check_separate({"model": before, **(scoring.models if scoring else {})})
        scoring = _with_eval(scoring, oracle, eval_dataset)
        selector = _selector(selector, scoring, objective, weighted)
        readers = scoring.readers(template, tokens.style) if scoring else []
        self._encoding: dict[str, Any] = {
            "template": template,
            "limits": tokens.limits([before, *readers]),
            "pairs": pairs,
            "min_gap": min_gap,
            "say": display.notice,
        }
        data = encode_rows(train_dataset, eval_dataset, **self._encoding, evaluates=evaluates(own))
        check_stored(scoring and scoring.store, data, template, tokens)
        if weighted and selector is None:
            _check_pair_rule(cast(Dataset, train_dataset), pairs)
        values = ValuePass(
            template=template,
            style=tokens.style,
            precision=precision,
            tokens_per_batch=tokens_per_batch,
            display=display,
        )
        ready = _prepared(data, values, scoring, compared, objective, selector)
        named = isinstance(model, str | Path)

        def freeze(policy: LanguageModel) -> LanguageModel:
            if compared.model is not policy.model:
                return compared
            return load_model(str(model), packing=packing) if named else copy_model(policy, packing=packing)

        is_start = same_weights(before, compared)
        policy = with_new_adapter(before, start.adapter, own.seed)
        alarm = DisplacementAlarm(own.displacement_margin, "args", display.line)
        super().__init__(
            policy,
            with_entropy(ready.objective) if own.log_entropy else ready.objective,
            own,
            ready.rows,
            eval_rows=ready.eval or None,
            prepare=ready.prepare,
            reference=frozen_beside(
                policy, ready.objective, freeze, own=start.adapter is not None and is_start
            ),
            callbacks=[*start.callbacks, alarm, *(callbacks or []), RecordFiles()],
        )
        if needs_of(ready.objective).reference:
            check_when_ready(self, ready.rows, precision, display.line)
        (display.notice if ready.dropped else display.line)(kept_line(ready))
        self.kept = kept_shares(ready.rows)

    def evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]  rows of any format
        self,
        eval_dataset: Rows | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The objective's loss and metrics on eval rows, with transformers' names.

        Args:
            eval_dataset: Rows in any format that the trainer takes; None takes those of the constructor.
            ignore_keys: Unused; part of transformers' signature.
            metric_key_prefix: Prefix of each name.

        Raises:
            UserError: the rows cannot be read; or the objective needs reference values or scores, which are computed in
                the constructor only.
        """
        if eval_dataset is not None and not _is_encoded(eval_dataset):
            eval_dataset = self._encoded(eval_dataset)
        return super().evaluate(cast(Any, eval_dataset), ignore_keys, metric_key_prefix)

    def _encoded(self, rows: Rows) -> TokenTable:
        if needs_of(self.objective).reference or needs_of(self.objective).scores:
            raise UserError(
                f"{title_of(self.objective)} needs values of the model before training, which are computed in the constructor. Pass "
                "these rows as eval_dataset there.",
                code="missing-values",
            )
        found = encode_rows(rows, None, **self._encoding, names=("eval_dataset", ""))
        return trained_on(self.objective, found.train, self._encoding["say"])


def _is_encoded(rows: Any) -> bool:
    if isinstance(rows, TokenTable | str):
        return True
    if isinstance(rows, dict) and rows and not isinstance(rows, DatasetDict):
        return all(map(_is_encoded, rows.values()))
    return isinstance(rows, Sequence) and len(rows) > 0 and isinstance(rows[0], TokenRow)


def _prepared(
    data: Data,
    values: ValuePass,
    scoring: Scoring | None,
    reference: LanguageModel,
    objective: Objective,
    selector: Selector | None,
) -> Prepared:
    """Rows with everything that the objective reads."""
    scored_by = None if scoring is None else scoring.models.get("reference")
    shared = scored_by is not None and same_weights(scored_by, reference)
    with TemporaryDirectory(prefix="tokenward-") as folder:
        store = None
        if scoring is not None:
            # If the scorer reads the objective's reference, one pass serves both.
            more = [REFERENCE_LOGP] if shared and needs_of(objective).reference else []
            store = values.store(scoring, data.everything, Path(folder) / "scores", more=more)
        reference_store = cache(
            lambda: (
                store
                if shared and store is not None
                else values.reference(reference, data.everything, Path(folder) / "reference")
            )
        )
        train, scorer = data.train, None if scoring is None else scoring.scorer
        if store is not None and selector is None:  # the data set has weights of its own
            train = with_stored(train, store, "weights", lambda record: record.value(WEIGHTS))
            scorer = None
        return prepare_rows(
            train,
            data.eval,
            objective=objective,
            selector=selector,
            scorer=scorer,
            store=store,
            tokenizer=values.template.tokenizer,
            with_reference=lambda table: with_reference(table, reference_store()),
            say=values.display.notice,
        )


def _check_reference(
    reference: LanguageModel, template: Template, tokens: TokenSettings, objective: Objective
) -> None:
    """Refuse an objective that compares the policy with a model that reads other tokens."""
    needs = needs_of(objective)
    compares = needs.reference or needs.frozen_reference
    if compares and reference.template(tokens.style).fingerprint != template.fingerprint:
        raise UserError(
            f"{title_of(objective)} compares the policy with reference {reference.name}, which has another tokenizer or chat template, so "
            "their log-probabilities belong to different tokens. Leave reference out. An oracle with another tokenizer brings its own: "
            "oracle=TokenScorer.load(FOLDER, reference=MODEL).",
            code="tokenizer-mismatch",
        )


def same_weights(one: Any, other: Any) -> bool:
    """Whether two models are the same object, or were loaded from the same files."""
    return one.model is other.model or (one.fingerprint != "" and one.fingerprint == other.fingerprint)


def _has_column(rows: Any, column: str) -> bool:
    return isinstance(rows, Dataset) and column in rows.column_names


def _check_pair_rule(selected: Dataset, pairs: PairRule) -> None:
    """Refuse weights of whole lists for pairs in which a response is not on the side that it was selected for."""
    if pairs != "best_worst" and any(len(keys or ()) > 2 for keys in selected[KEYS]):
        raise UserError(
            f"pairs is {pairs!r}, which makes a response the chosen one of a pair and the rejected one of another, but {WEIGHTS} "
            'has one weight per token of a ranked list. Pass selector, which selects for each pair, or pairs="best_worst".',
            code="ambiguous-response",
        )


def _unselected(rows: Any) -> Any:
    """A data set without the weights of an earlier selection."""
    return rows.remove_columns(WEIGHTS) if _has_column(rows, WEIGHTS) else rows


def _stored_oracle(oracle: Oracle | None, scorer: Scorer | None, train: Rows) -> Oracle | None:
    """The oracle; without one, the training data if they have scores or weights."""
    stored = _has_column(train, KEYS) and (_has_column(train, SCORES) or _has_column(train, WEIGHTS))
    return cast(Dataset, train) if oracle is None and scorer is None and stored else oracle


def _with_eval(scoring: Scoring | None, oracle: Oracle | None, evaluation: Rows | None) -> Scoring | None:
    """Scores of the training data set, and of the eval data set if it has some."""
    own = scoring is not None and oracle is None and isinstance(scoring.store, list)
    if scoring is None or not own or not _has_column(evaluation, KEYS):
        return scoring
    return scoring._replace(store=[*cast(Any, scoring.store), evaluation])


def _selector(
    selector: Selector | None, scoring: Scoring | None, objective: Objective, weighted: bool
) -> Selector | None:
    """The selector; None gives every token weight 1, or the weights of the data set.

    Raises:
        UserError: scores are needed, and nothing gives any.
    """
    reads_scores = needs_of(objective).scores
    if scoring is not None:
        if weighted and selector is None and reads_scores:
            raise UserError(
                f"{title_of(objective)} reads scores, and train_dataset has weights, which would be used instead. Pass selector.",
                code="missing-selector",
            )
        return selector if selector is not None or weighted else TopFraction(0.3)
    if reads_scores or not (selector is None or isinstance(selector, KeepAll)):
        what = title_of(objective) if reads_scores else "selector"
        raise UserError(
            f"{what} reads token scores, and nothing gives any. Pass oracle.", code="missing-oracle"
        )
    own = objective.parts[0] if isinstance(objective, CheckedObjective) else objective
    if selector is None and isinstance(own, SePO):
        raise UserError(
            "SePO trains on tokens selected by their scores, and nothing gives any. Pass oracle; or selector=KeepAll() to train on "
            "every token, which is SimPO.",
            code="missing-oracle",
        )
    return None
