"""Training what gives scores: an oracle from pairs, or a token reward from ranked lists."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase, TrainingArguments

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
from tokenward.api.prepare import needs_frozen_copy, trained_on, with_new_adapter
from tokenward.api.trainer import REFERENCE_LOGP, adapter_settings, device_of_args, display_of
from tokenward.api.values import Scoring, value_store
from tokenward.api.words import library_words
from tokenward.errors import UserError
from tokenward.models.loading import copied
from tokenward.models.probe import Packing
from tokenward.models.reward import RewardSettings, new_reward_model
from tokenward.objectives import DPO, Objective, PlackettLuce, needs_of, title_of
from tokenward.scoring.basic import LogRatio, Reward, Surprisal
from tokenward.scoring.join import with_reference
from tokenward.scoring.texts import TokenScorer
from tokenward.tokens.segments import with_segments
from tokenward.training.arguments import TokenTrainingArguments, token_arguments
from tokenward.training.fit import fit

DEFAULT_DPO = DPO()
DEFAULT_LISTS = PlackettLuce()
DEFAULT_HEAD = RewardSettings()


def train_oracle(
    model: Model,
    train_dataset: Rows,
    *,
    args: TrainingArguments,
    eval_dataset: Rows | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    objective: Objective = DEFAULT_DPO,
    peft_config: PeftConfig | dict[str, Any] | None = None,
    tokens: TokenSettings = DEFAULT_TOKENS,
    pairs: PairRule = "best_worst",
    min_gap: float | None = None,
    packing: Packing = "auto",
    precision: str = "float32",
    tokens_per_batch: int = 8192,
) -> TokenScorer:
    """Train an oracle, whose log-ratio to its reference scores each token (SePO, arXiv 2408.13518, section 3.1).

    The given model is the reference and stays as it is; a copy of it is trained. Given a name, two models are in memory;
    given a loaded model, three, so that training that model later does not change the reference.

        oracle = tokenward.train_oracle("default", pairs, args=TrainingArguments("oracle"))
        oracle("How was it?", "A good cup of tea.").tokens

    Args:
        model: The reference: a loaded model, or the folder or hub name of one.
        train_dataset: Rows as :class:`SelectiveTrainer` takes them.
        args: How to train. The oracle is saved in ``args.output_dir/model``, what was logged in ``history.jsonl``. It
            goes on from the newest checkpoint if ``resume_from_checkpoint`` is set.
        eval_dataset: Rows for ``eval_strategy``.
        processing_class: The tokenizer; None loads the one that was saved with the model.
        objective: One that reads no scores.
        peft_config: A ``LoraConfig``, or its fields, of a new adapter; None trains every weight.
        tokens: How text becomes tokens.
        pairs: Which pairs to take of a prompt with more than two ranked responses.
        min_gap: Pairs whose scores in the data lie closer than this are left out.
        packing: As :class:`SelectiveTrainer` takes it.
        precision: Number type of the reference's pass, and of later scoring.
        tokens_per_batch: Most tokens in one such pass.

    Returns:
        The oracle and its reference, to score texts with, or to pass as ``oracle=``.

    Raises:
        UserError: an argument cannot work; it says which, why, and what to give instead.
    """
    with library_words():
        own, settings = _arguments(args), adapter_settings(peft_config)
        if needs_of(objective).scores:
            raise UserError(
                f"{title_of(objective)} reads scores of tokens, and an oracle is trained without any. Use DPO()."
            )
        display, folder = display_of(token_arguments(args)), Path(str(args.output_dir))
        base = language_model(model, processing_class, packing=packing, device=device_of_args(own))
        template = base.template(tokens.style)
        limits = tokens.limits([base])
        data = encoded(
            train_dataset, eval_dataset, template, limits, pairs=pairs, min_gap=min_gap, say=display.line
        )
        parts = [trained_on(objective, part, display.line) if len(part) else part for part in data]
        with TemporaryDirectory(prefix="tokenward-") as scratch:
            if needs_of(objective).reference:
                store = value_store(
                    Scoring(Surprisal(), {"reference": base}),
                    data.everything,
                    template,
                    Path(scratch),
                    style=tokens.style,
                    precision=precision,
                    tokens_per_batch=tokens_per_batch,
                    display=display,
                    more=[REFERENCE_LOGP],
                )
                parts = [with_reference(part, store) if len(part) else part for part in parts]
        rows = Data(*parts)
        reference = base if isinstance(model, str | Path) else copied(base, packing=packing)
        trained = with_new_adapter(copied(base, packing=packing), settings, own.seed)
        fit(
            trained,
            objective,
            rows.train,
            own,
            folder,
            style=tokens.style,
            eval_rows=rows.eval,
            reference=reference if needs_frozen_copy(objective, trained) else None,
            reference_precision=precision,
            display=display,
            resume=bool(args.resume_from_checkpoint),
        )
        trained = replace(trained, fingerprint="", name=str(folder / "model"))
        models = {"oracle_logp": trained, "reference_logp": reference}
        return TokenScorer(models, LogRatio(), tokens.style, precision)


def train_reward(
    model: str | Path,
    train_dataset: Rows,
    *,
    args: TrainingArguments,
    eval_dataset: Rows | None = None,
    objective: Objective = DEFAULT_LISTS,
    head: RewardSettings = DEFAULT_HEAD,
    tokens: TokenSettings = DEFAULT_TOKENS,
    packing: Packing = "auto",
    precision: str = "float32",
) -> TokenScorer:
    """Learn a reward for each token from ranked lists (TLM, arXiv 2306.00398, section 3.1).

    Args:
        model: Folder or hub name of the language model whose body the reward starts from.
        train_dataset: Ranked lists of any length, such as ``prompt``, ``responses``, ``scores``; pairs are lists of two.
        args: As :func:`train_oracle` takes it. The published code has a constant learning rate of 5e-5.
        eval_dataset: Lists for ``eval_strategy``.
        objective: Over the rewards of ranked lists.
        head: The head, its bound, and what has one reward: a token, a word, a sentence.
        tokens: How text becomes tokens.
        packing: As :class:`SelectiveTrainer` takes it.
        precision: Number type of later scoring.

    Returns:
        The reward, to score texts with, or to pass as ``oracle=``.

    Raises:
        UserError: an argument cannot work; it says which, why, and what to give instead.
    """
    with library_words():
        own, display = _arguments(args), display_of(token_arguments(args))
        if not isinstance(model, str | Path):
            raise UserError(
                f"model is {type(model).__name__}. A reward starts from the body of a model without its head: give the folder or "
                "hub name."
            )
        reward = new_reward_model(
            str(model), head, seed=own.seed, device=device_of_args(own), packing=packing
        )
        template = reward.template(tokens.style)
        data = encoded(
            train_dataset, eval_dataset, template, tokens.limits([reward]), pairs=None, say=display.line
        )
        change = None if head.unit == "token" else partial(with_segments, head.unit, reward.tokenizer)
        rows = Data(*(replace(part, change=change) for part in data))
        folder = Path(str(args.output_dir))
        fit(
            reward,
            objective,
            rows.train,
            own,
            folder,
            style=tokens.style,
            eval_rows=rows.eval,
            display=display,
            resume=bool(args.resume_from_checkpoint),
        )
        reward = replace(reward, fingerprint="", name=str(folder / "model"))
        return TokenScorer({"reward": reward}, Reward(), tokens.style, precision)


def _arguments(args: TrainingArguments) -> TokenTrainingArguments:
    """The same arguments, whose progress the library's own bar shows."""
    own = token_arguments(args)
    own.disable_tqdm = True
    return own
