"""The trainer of the library: transformers' Trainer with an oracle, a selection and an objective over tokens."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

from datasets import Dataset
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from tokenward.api.inputs import (
    DEFAULT_TOKENS,
    Data,
    Model,
    PairRule,
    Rows,
    TokenSettings,
    encoded,
    language_model,
)
from tokenward.api.prepare import (
    Prepared,
    kept_line,
    kept_shares,
    needs_frozen_copy,
    prepared,
    trained_on,
    with_new_adapter,
    with_some_selected,
)
from tokenward.api.values import (
    KEYS,
    SCORES,
    WEIGHTS,
    Oracle,
    Scoring,
    scoring_of,
    value_store,
)
from tokenward.api.words import in_library_words, library_words
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, copied, load_model
from tokenward.models.probe import Packing
from tokenward.objectives import (
    Objective,
    SePO,
    needs_of,
    title_of,
)
from tokenward.objectives.selected import with_entropy
from tokenward.scoring.basic import Scorer
from tokenward.scoring.join import computed, with_reference, with_stored
from tokenward.scoring.reads import Value
from tokenward.scoring.texts import TokenScorer
from tokenward.selection import KeepAll, Selector, TopFraction
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template
from tokenward.training.arguments import TokenTrainingArguments, token_arguments
from tokenward.training.callbacks import CheckpointEvery
from tokenward.training.fit import check_start
from tokenward.training.metrics import DisplacementAlarm
from tokenward.training.trainer import TokenTrainer

DEFAULT_OBJECTIVE = SePO(gamma=2.0)
REFERENCE_LOGP = Value("reference", "logp")


class SelectiveTrainer(TokenTrainer):
    """Trains a policy on the tokens that carry a preference (SePO, arXiv 2408.13518).

    An oracle scores every response token, a selector turns scores into weights, and an objective trains on the weighted
    tokens. It is a ``transformers.Trainer``: ``train``, ``evaluate``, ``save_model``, checkpoints and callbacks are its.

        trainer = SelectiveTrainer(model, args, pairs, oracle=oracle, selector=TopFraction(0.3), objective=SePO(gamma=2.0))
        trainer.train()

    Scores are computed once, when the trainer is made. Dropout is off unless ``TokenTrainingArguments`` says otherwise.

    Args:
        model: The policy: a model that is loaded, which is trained in place, or the folder or hub name of one.
        args: ``transformers.TrainingArguments``, or :class:`tokenward.TokenTrainingArguments`, which has a few more.
        train_dataset: Rows of any shape that tokenward reads: TRL's ``prompt``, ``chosen``, ``rejected`` (texts or
            messages, the prompt may be implicit), ranked lists, or ``prompt``, ``completion``, ``label``; or a
            :class:`TokenTable`. Columns that :func:`tokenward.score` and :func:`tokenward.select` added are used if
            there is no ``oracle``.
        eval_dataset: Rows to evaluate on, every token with weight 1: scores must not choose what judges.
        processing_class: The tokenizer; None loads the one that was saved with the model.
        oracle: What gives scores: a trained model, the folder of one or of a run's stage, what
            :func:`tokenward.train_oracle` or :func:`tokenward.train_reward` returned, a scorer, a folder of scores, or a
            data set from :func:`tokenward.score`. None trains every token.
        selector: From scores to weights; None is ``TopFraction(0.3)`` if there are scores.
        objective: What is minimised.
        peft_config: A ``LoraConfig``, or its fields, of a new adapter to train; None trains every weight.
        reference: The frozen model that an objective compares with, and that an oracle which does not know its own
            reference was trained from. None is the policy before training.
        scorer: From values to scores; None is the log-ratio of oracle and reference, or the reward itself.
        tokens: How text becomes tokens.
        pairs: Which pairs to take of a prompt with more than two ranked responses.
        min_gap: Pairs whose scores in the data lie closer than this are left out.
        packing: ``auto`` finds out by a probe whether a prompt can be computed once for all its responses.
        precision: Number type of the scoring pass: ``float32`` is that of the weights, ``bfloat16`` runs under autocast.
        tokens_per_batch: Most tokens in one scoring pass.
        callbacks: transformers' callbacks.

    Attributes:
        kept: Share of the tokens that have weight, by side; empty if they are selected while the policy trains.

    Raises:
        UserError: an argument cannot work; it says which, why, and what to give instead.
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
        precision: str = "float32",
        tokens_per_batch: int = 8192,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        with library_words():
            own = token_arguments(args)
            display = display_of(own)
            device = device_of_args(own)
            start = language_model(model, processing_class, packing=packing, device=device)
            settings = adapter_settings(peft_config)
            _check_adapters(start, settings, objective, reference)
            scoring = scoring_of(
                _scored_before(oracle, scorer, train_dataset),
                lambda: start,
                reference=reference,
                scorer=scorer,
                packing=packing,
                device=device,
            )
            _check_style(oracle, start.template(tokens.style))
            scoring = _with_eval(scoring, oracle, eval_dataset)
            selector = _selector(
                selector, scoring, objective, oracle is None and _has(train_dataset, WEIGHTS)
            )
            template = start.template(tokens.style)
            self._as_tokens = {"tokens": tokens, "pairs": pairs, "min_gap": min_gap}
            self._template = template
            models = [start, *(scoring.models.values() if scoring else ())]
            data = encoded(
                train_dataset,
                eval_dataset,
                template,
                tokens.limits(models),
                pairs=pairs,
                min_gap=min_gap,
                say=display.line,
            )
            compared = (
                start
                if reference is None
                else language_model(reference, name="reference", packing=packing, device=device)
            )
            made = _Values(scoring, compared, tokens, precision, tokens_per_batch, display)
            ready = made.prepared(data, objective, selector, template)
            policy = with_new_adapter(start, settings, own.seed)
            super().__init__(
                policy,
                with_entropy(ready.objective) if own.log_entropy else ready.objective,
                own,
                ready.rows,
                eval_rows=ready.eval or None,
                prepare=ready.prepare,
                reference=_frozen(ready.objective, policy, model, reference, compared, packing),
                callbacks=[*_callbacks(args, own, display), *(callbacks or [])],
            )
            if needs_of(ready.objective).reference:
                display.line(check_start(self, ready.rows, precision))
            display.line(kept_line(ready.rows, ready.dropped))
            self.kept = kept_shares(ready.rows) if "weights" in ready.rows.columns else {}

    def evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]  rows of any shape
        self,
        eval_dataset: Rows | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """The objective's loss and metrics on eval rows, as transformers' ``evaluate`` gives them.

        Args:
            eval_dataset: Other rows than those that the trainer was made with, of any shape that it takes.
            ignore_keys: Not used; transformers passes it.
            metric_key_prefix: Before each name.

        Raises:
            UserError: the rows cannot be read; or the objective needs reference values or scores, which are made when
                the trainer is made.
        """
        with library_words():
            if eval_dataset is not None and not _is_encoded(eval_dataset):
                eval_dataset = self._encoded(eval_dataset)
            return super().evaluate(cast(Any, eval_dataset), ignore_keys, metric_key_prefix)

    def _encoded(self, rows: Rows) -> TokenTable:
        if needs_of(self.objective).reference or needs_of(self.objective).scores:
            raise UserError(
                f"{title_of(self.objective)} needs values of the model before training, which are made with the trainer. Give "
                "these rows as eval_dataset= when you make it."
            )
        given = self._as_tokens
        limits = given["tokens"].limits([self.token_model])
        found = encoded(
            rows,
            None,
            self._template,
            limits,
            pairs=given["pairs"],
            min_gap=given["min_gap"],
            names=("eval_dataset", ""),
        )
        return trained_on(self.objective, found.train, lambda text: None)


def _is_encoded(rows: Any) -> bool:
    if isinstance(rows, TokenTable | str | dict):
        return True
    return isinstance(rows, Sequence) and len(rows) > 0 and isinstance(rows[0], TokenRow)


def display_of(args: TokenTrainingArguments) -> Display:
    """The screen, where progress bars are wanted; one of all processes shows lines."""
    return Display(quiet=bool(args.disable_tqdm) or not args.should_log)


def device_of_args(args: TokenTrainingArguments) -> str:
    """Where models go before the training: its own device, unless the model is to be cut over several."""
    return "auto" if args.fsdp or args.deepspeed else str(args.device)


class _Values(NamedTuple):
    """How scores and reference values of a trainer's rows are made."""

    scoring: Scoring | None
    reference: LanguageModel
    tokens: TokenSettings
    precision: str
    tokens_per_batch: int
    display: Display

    def prepared(
        self, data: Data, objective: Objective, selector: Selector | None, template: Template
    ) -> Prepared:
        """Rows with everything that the objective reads."""
        wants = [REFERENCE_LOGP] if needs_of(objective).reference and self._scored_by_reference else []
        with TemporaryDirectory(prefix="tokenward-") as folder:
            store = None
            if self.scoring is not None:
                store = value_store(
                    self.scoring,
                    data.everything,
                    template,
                    Path(folder),
                    style=self.tokens.style,
                    precision=self.precision,
                    tokens_per_batch=self.tokens_per_batch,
                    display=self.display,
                    more=wants,
                )

            def referenced(table: TokenTable) -> TokenTable:
                return with_reference(table, store) if wants and store is not None else self._computed(table)

            # Weights of the data set itself are no scores: nothing selects among them again.
            own = store is not None and selector is None
            if own and store is not None:
                weights = with_stored(data.train, store, "weights", lambda record: record.value(WEIGHTS))
                data = Data(weights, data.eval)
            found = prepared(
                data.train,
                data.eval,
                objective=objective,
                selector=selector,
                scorer=None if own or self.scoring is None else self.scoring.scorer,
                store=store,
                tokenizer=template.tokenizer,
                with_reference=referenced,
                say=self.display.line,
            )
            if own:
                rows, dropped = with_some_selected(found.rows, objective)
                found = found._replace(rows=rows, dropped=dropped)
        return found

    @property
    def _scored_by_reference(self) -> bool:
        """Whether scoring reads the model that the objective compares with, so that one pass serves both."""
        if self.scoring is None or self.scoring.store is not None:
            return False
        other = self.scoring.models.get("reference")
        return other is not None and same_weights(other, self.reference)

    def _computed(self, table: TokenTable) -> TokenTable:
        with self.display.progress("reference", len(table.responses)) as bar:
            column = computed(
                table,
                self.reference,
                precision=self.precision,
                tokens_per_batch=self.tokens_per_batch,
                progress=bar.advance,
            )
        return table.with_column("reference_logp", column)


def same_weights(one: Any, other: Any) -> bool:
    """Whether two models are one, or come from the same files."""
    return one.model is other.model or (one.fingerprint != "" and one.fingerprint == other.fingerprint)


def _has(rows: Any, column: str) -> bool:
    return isinstance(rows, Dataset) and column in rows.column_names


def _scored_before(oracle: Oracle | None, scorer: Scorer | None, train: Rows) -> Oracle | None:
    """The oracle, or the training data if they hold scores, or weights, themselves."""
    if oracle is not None or scorer is not None or not _has(train, KEYS):
        return oracle
    return cast(Dataset, train) if _has(train, SCORES) or _has(train, WEIGHTS) else None


def _with_eval(scoring: Scoring | None, oracle: Oracle | None, evaluation: Rows | None) -> Scoring | None:
    """The scores of the eval rows beside those of the training rows, if both data sets hold their own."""
    if (
        scoring is None
        or oracle is not None
        or not isinstance(scoring.store, list)
        or not _has(evaluation, KEYS)
    ):
        return scoring
    return scoring._replace(store=[*scoring.store, cast(Dataset, evaluation)])


def _check_style(oracle: Any, template: Template) -> None:
    """Refuse an oracle that learned from conversations that were written in another way."""
    if isinstance(oracle, TokenScorer) and oracle.template.fingerprint != template.fingerprint:
        raise UserError(
            "the oracle writes conversations in another way than tokens= says, so its scores belong to other tokens. Give both the same "
            "tokenizer and tokens=TokenSettings(template=..., chat_template_kwargs=..., day=...)."
        )


def _selector(
    selector: Selector | None, scoring: Scoring | None, objective: Objective, weights: bool
) -> Selector | None:
    """What selects. None: every token has weight 1, or the weights are those of the data set.

    Raises:
        UserError: scores are needed, and nothing gives any.
    """
    if scoring is not None:
        if weights and selector is None and needs_of(objective).scores:
            raise UserError(
                f"{title_of(objective)} reads scores, and the weights of train_dataset would be taken in their place. Give selector=."
            )
        return selector if selector is not None or weights else TopFraction(0.3)
    if needs_of(objective).scores:
        raise UserError(f"{title_of(objective)} reads scores of tokens, and nothing gives any. Give oracle=.")
    if isinstance(selector, KeepAll):
        return None
    if selector is not None:
        raise UserError(
            "selector= chooses tokens by their scores, and nothing gives any. Give oracle= as well."
        )
    if isinstance(objective, SePO):
        raise UserError(
            "SePO trains on tokens that were selected by their scores, and nothing gives any. Give oracle=; or "
            "selector=KeepAll() to train on every token, which is SimPO."
        )
    return None


def adapter_settings(peft_config: PeftConfig | dict[str, Any] | None) -> dict[str, Any] | None:
    """The fields of a new adapter that differ from their defaults; None without an adapter.

    Raises:
        UserError: it is no ``LoraConfig``.
    """
    if peft_config is None or isinstance(peft_config, dict):
        return peft_config
    if not isinstance(peft_config, LoraConfig):
        raise UserError(
            f"peft_config is {type(peft_config).__name__}, and adapters here are LoraConfig's. Put another one on the model "
            "yourself (get_peft_model), and give that model."
        )
    plain, given = LoraConfig(), [item.name for item in fields(peft_config) if item.init]
    found = {name: getattr(peft_config, name) for name in given}
    own = ("base_model_name_or_path", "runtime_config", "peft_version")
    return {name: value for name, value in found.items() if name not in own and value != getattr(plain, name)}


def _check_adapters(
    start: LanguageModel, settings: dict[str, Any] | None, objective: Objective, reference: Model | None
) -> None:
    if start.has_adapter and settings is not None:
        raise UserError(
            "model has an adapter already, and peft_config= is a second one. Leave peft_config out, or merge the first "
            "(model.merge_and_unload())."
        )
    if start.has_adapter and reference is None and needs_of(objective).frozen_reference:
        raise UserError(
            f"{title_of(objective)} compares with the model before training, and without its adapter this model may be another "
            "one. Give reference=, or the base model with peft_config=."
        )


def _frozen(
    objective: Objective,
    policy: LanguageModel,
    model: Model,
    reference: Model | None,
    compared: LanguageModel,
    packing: Packing,
) -> LanguageModel | None:
    """A second model before its training, if the objective compares with it in the step."""
    if not needs_frozen_copy(objective, policy):
        return None
    if reference is not None:
        return compared
    named = isinstance(model, str | Path)
    return load_model(str(model), packing=packing) if named else copied(policy, packing=packing)


def _callbacks(
    args: TrainingArguments, own: TokenTrainingArguments, display: Display
) -> list[TrainerCallback]:
    """The alarm; and checkpoints by the clock for arguments that say how often."""
    alarm = DisplacementAlarm(
        own.displacement_margin, "args", lambda text: display.line(in_library_words(text))
    )
    timed = [CheckpointEvery(own.checkpoint_minutes)] if isinstance(args, TokenTrainingArguments) else []
    return [*timed, alarm]
