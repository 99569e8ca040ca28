"""Training of the models that give scores: an oracle from pairs, a token reward from ranked lists.

:func:`fit_model` is the training itself, for the functions here and for the stages of a run.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from tokenward.api.arguments import check_tokens, checked_objective
from tokenward.api.constant import CHECKED_REWARDS, warn_of_rewards
from tokenward.api.inputs import (
    DEFAULT_TOKENS,
    Data,
    Model,
    PairRule,
    Rows,
    TokenSettings,
    check_data,
    check_options,
    encode_rows,
    language_model,
)
from tokenward.api.notices import LoggedDisplay
from tokenward.api.prepare import prepare_rows, reward_rows
from tokenward.api.values import ValuePass
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel, copy_model, load_model
from tokenward.models.probe import Packing, reward_layout
from tokenward.models.reward import (
    RewardModel,
    RewardSettings,
    TokenRewardModule,
    load_reward_model,
    new_reward_model,
)
from tokenward.models.sharding import is_sharded
from tokenward.objectives import DPO, Objective, PlackettLuce, needs_of, title_of
from tokenward.plugins import described
from tokenward.scoring.basic import LogRatio, Reward
from tokenward.scoring.join import with_reference
from tokenward.scoring.texts import TokenScorer
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.template import Style
from tokenward.training.arguments import TokenTrainingArguments, token_arguments
from tokenward.training.callbacks import AnswerPrompts
from tokenward.training.checkpoints import checkpoints_of
from tokenward.training.fit import fit
from tokenward.trl_names import answers_trl
from tokenward.types import Precision

DEFAULT_DPO = DPO()
DEFAULT_LISTS = PlackettLuce()
DEFAULT_HEAD = RewardSettings()

Freeze = Callable[[LanguageModel], LanguageModel]
"""Gives a frozen copy of a model before its training."""


LookAt = Callable[[LanguageModel], TrainerCallback | None]
"""Gives a callback that looks at the model while it trains, and does not change it."""


def fit_model(
    model: TokenModel,
    objective: Objective,
    rows: Sequence[TokenRow],
    args: TokenTrainingArguments,
    folder: Path,
    *,
    freeze: Freeze,
    adapter: dict[str, Any] | None = None,
    seed: int = 0,
    watch: Callable[[LanguageModel], AnswerPrompts | None] | None = None,
    preview: LookAt | None = None,
    **settings: Any,
) -> tuple[Any, dict[str, Any]]:
    """Train a model, with a new adapter and beside a frozen reference if it needs them.

    Args:
        model: The model before training.
        objective: The training objective.
        rows: Prepared training rows; see :func:`tokenward.api.prepare.prepare_rows`.
        args: Training arguments.
        folder: Where ``model/`` and ``history.jsonl`` are written.
        freeze: Called if the objective reads a second, frozen model in each step.
        adapter: Fields of ``peft.LoraConfig`` for a new adapter; None trains the model's own weights.
        seed: Seed of the adapter's initial weights.
        watch: Gives the callback that answers fixed prompts during training.
        preview: Gives a further callback; the model that it is given has its new adapter.
        settings: Further arguments of :func:`tokenward.training.fit.fit`.

    Returns:
        The trained model, and the facts that ``fit`` returns.
    """
    reference = None
    if isinstance(model, LanguageModel):
        model = with_new_adapter(model, adapter, seed)
        reference = frozen_beside(model, objective, freeze, own=adapter is not None)
        settings["watch"] = None if watch is None else watch(model)
        settings["preview"] = None if preview is None else preview(model)
    facts = fit(model, objective, rows, args, folder, reference=reference, **settings)
    return model, facts


def with_new_adapter(model: LanguageModel, adapter: dict[str, Any] | None, seed: int) -> LanguageModel:
    """The model with a new adapter to train; without settings the model itself."""
    torch.manual_seed(seed)  # an adapter starts with random weights
    return model if adapter is None else model.with_adapter(adapter)


def check_adapter(model: LanguageModel, adapter: dict[str, Any] | None) -> None:
    """Refuse a new adapter for a model that has one."""
    if model.has_adapter and adapter is not None:
        raise UserError(
            "model has an adapter already, and peft_config would add a second one. Leave peft_config out, or merge the first adapter "
            "(model.merge_and_unload()).",
            code="second-adapter",
        )


def frozen_beside(
    model: LanguageModel, objective: Objective, freeze: Freeze, *, own: bool
) -> LanguageModel | None:
    """The second model that an objective reads in each step, or None.

    ``own`` says that the model is its own reference with its adapter switched off. This is so only if the adapter is new: the
    base of an adapter that was trained before is another model.
    """
    return freeze(model) if needs_of(objective).frozen_reference and not own else None


@answers_trl
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
    precision: Precision = "float32",
    tokens_per_batch: int = 8192,
) -> TokenScorer:
    """Train an oracle. Its log-ratio to the reference is the score of a token (SePO, arXiv 2408.13518, section 3.1).

    The given model is the reference and does not change; a copy of it is trained. Two models are in memory if ``model``
    is a name, three if it is a loaded model, so that training that model later does not change the reference.

    Example::

        oracle = tokenward.train_oracle("default", pairs, args=TrainingArguments("oracle"))
        oracle("How was it?", "A good cup of tea.").tokens

    Args:
        model: The reference: a loaded model, or a folder or hub name.
        train_dataset: Rows, as for :class:`SelectiveTrainer`.
        args: Training arguments. The oracle is saved to ``args.output_dir/model``, the log to ``history.jsonl``. Training
            resumes from the newest checkpoint if ``resume_from_checkpoint`` is set. The folder names the reference, so that
            ``TokenScorer.load(args.output_dir)`` gives the oracle again in another session.
        eval_dataset: Eval rows for ``eval_strategy``. Rows whose prompt is in ``train_dataset`` are dropped.
        processing_class: The tokenizer; None loads the one saved with the model.
        objective: An objective that reads no scores.
        peft_config: A ``LoraConfig``, or its fields, for a new adapter; None trains all weights.
        tokens: How text becomes tokens.
        pairs: Which pairs to form of more than two ranked responses: ``best_worst``, ``all`` or ``adjacent``.
        min_gap: Smallest difference of the data's scores in a pair; closer pairs are dropped.
        packing: As for :class:`SelectiveTrainer`.
        precision: Number type of the reference's forward pass, and of later scoring: ``float32`` or ``bfloat16``.
        tokens_per_batch: Maximum number of tokens in a forward pass of the reference.

    Returns:
        The oracle with its reference. Call it to score texts, or pass it as ``oracle``.

    Raises:
        UserError: an argument is invalid.
    """
    check_options(precision=precision, packing=packing, pairs=pairs)
    check_tokens(tokens)
    check_data(train_dataset, eval_dataset)
    objective = checked_objective(objective)
    own, adapter = _own_arguments(args), adapter_settings(peft_config)
    resume = _resumes(own)
    if needs_of(objective).scores:
        raise UserError(
            f"{title_of(objective)} reads token scores, and an oracle is trained before there are any. Use DPO().",
            code="objective-reads-scores",
        )
    display, folder = display_of(token_arguments(args)), Path(str(args.output_dir))
    base = language_model(model, processing_class, packing=packing, device=device_of_args(own))
    check_adapter(base, adapter)
    template = base.template(tokens.style)
    data = encode_rows(
        train_dataset,
        eval_dataset,
        template,
        tokens.limits([base]),
        pairs=pairs,
        min_gap=min_gap,
        evaluates=evaluates(own),
        say=display.notice,
    )
    values = ValuePass(
        template=template,
        style=tokens.style,
        precision=precision,
        tokens_per_batch=tokens_per_batch,
        display=display,
    )
    with TemporaryDirectory(prefix="tokenward-") as scratch:
        reference_store = cache(lambda: values.reference(base, data.everything, Path(scratch)))
        ready = prepare_rows(
            *data,
            objective=objective,
            with_reference=lambda table: with_reference(table, reference_store()),
            say=display.notice,
        )
    reference = base if isinstance(model, str | Path) else copy_model(base, packing=packing)
    trained, _ = fit_model(
        copy_model(base, packing=packing),
        objective,
        ready.rows,
        own,
        folder,
        freeze=lambda _: reference,
        adapter=adapter,
        seed=own.seed,
        style=tokens.style,
        eval_rows=ready.eval,
        reference_precision=precision,
        display=display,
        resume=resume,
    )
    trained = _whole(
        trained, folder / "model", lambda name, device: load_model(name, packing=packing, device=device)
    )
    models = {"oracle_logp": trained, "reference_logp": reference}
    return _saved(TokenScorer(models, LogRatio(), tokens.style, precision), own, tokens.style, packing)


@answers_trl
def train_reward(
    model: Model,
    train_dataset: Rows,
    *,
    args: TrainingArguments,
    eval_dataset: Rows | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    objective: Objective = DEFAULT_LISTS,
    head: RewardSettings = DEFAULT_HEAD,
    tokens: TokenSettings = DEFAULT_TOKENS,
    packing: Packing = "auto",
    precision: Precision = "float32",
) -> TokenScorer:
    """Learn a reward for each token from ranked lists (TLM, arXiv 2306.00398, section 3.1).

    The reward model is the body of a language model with a new scalar head, in float32. A loaded model is copied and does
    not change.

    Args:
        model: The language model that the reward model starts from: a loaded model, or a folder or hub name.
        train_dataset: Ranked lists of any length, such as ``prompt``, ``responses``, ``scores``; pairs are lists of two.
        args: As for :func:`train_oracle`. The published code has a constant learning rate of 5e-5.
        eval_dataset: Lists for ``eval_strategy``. Rows whose prompt is in ``train_dataset`` are dropped.
        processing_class: The tokenizer of a loaded model; None loads the one saved with it.
        objective: An objective over the rewards of ranked lists.
        head: The head, the bounds of the reward, and the unit with one reward: a token, a word, a sentence or a span.
        tokens: How text becomes tokens.
        packing: As for :class:`SelectiveTrainer`.
        precision: Number type of later scoring: ``float32`` or ``bfloat16``.

    Returns:
        The reward model. Call it to score texts, or pass it as ``oracle``.

    Raises:
        UserError: an argument is invalid.
    """
    check_options(precision=precision, packing=packing)
    check_tokens(tokens)
    check_data(train_dataset, eval_dataset)
    objective = checked_objective(objective)
    own, display = _own_arguments(args), display_of(token_arguments(args))
    resume = _resumes(own)
    if isinstance(model, str | Path):
        reward = new_reward_model(
            str(model), head, seed=own.seed, device=device_of_args(own), packing=packing
        )
    else:
        start = language_model(model, processing_class, packing=packing, device=device_of_args(own))
        reward = _reward_on(start, head, own.seed, packing)
    template = reward.template(tokens.style)
    data = encode_rows(
        train_dataset,
        eval_dataset,
        template,
        tokens.limits([reward]),
        pairs=None,
        evaluates=evaluates(own),
        say=display.notice,
    )
    rows = Data(*(reward_rows(reward, part) for part in data))
    folder = Path(str(args.output_dir))
    reward, _ = fit_model(
        reward,
        objective,
        rows.train,
        own,
        folder,
        freeze=lambda trained: trained,
        style=tokens.style,
        eval_rows=rows.eval,
        display=display,
        resume=resume,
    )
    reward = _whole(
        reward, folder / "model", lambda name, device: load_reward_model(name, packing=packing, device=device)
    )
    warn_of_rewards(
        reward, rows.train[:CHECKED_REWARDS], display.line, precision=precision, tokens_per_batch=8192
    )
    scorer = TokenScorer({"reward": reward}, Reward(), tokens.style, precision)
    return _saved(scorer, own, tokens.style, packing)


def _whole(trained: Any, folder: Path, load: Callable[[str, str], Any]) -> Any:
    """A trained model as one that scores by itself: from its folder, if the processes of its training hold parts of it."""
    if is_sharded(trained.model):
        return load(str(folder), str(trained.device))
    return replace(trained, fingerprint="", name=str(folder))


def _saved(scorer: TokenScorer, args: TokenTrainingArguments, style: Style, packing: Packing) -> TokenScorer:
    """The scorer, after what loads it later was written into its model's folder."""
    if args.should_save:
        scorer.save_settings(Path(str(args.output_dir)) / "model", packing=packing, style=style)
    return scorer


def _reward_on(start: LanguageModel, head: RewardSettings, seed: int, packing: Packing) -> RewardModel:
    """A new reward model on a copy of a loaded model's body."""
    model = start.model
    whole = not (start.has_adapter or start.head_mlp is not None or start.start_id is not None)
    if not whole or model.base_model is model:
        raise UserError(
            f"{start.name} is not a plain decoder: it has an encoder, an adapter, a network before its head, or no body apart from its "
            "head. Merge an adapter first (merge_and_unload), or save the model and pass its folder.",
            code="not-whole-weights",
        )
    body = cast(PreTrainedModel, deepcopy(model.base_model)).float()
    # The selective head of a language model may have replaced this method.
    vars(body.get_input_embeddings()).pop("forward", None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = TokenRewardModule(body, head)
    module.head.to(start.device, torch.float32)
    return RewardModel(
        model=module.eval(),
        tokenizer=start.tokenizer,
        layout=reward_layout(body, packing=packing, name=start.name),
        fingerprint="",
        name=start.name,
    )


def _own_arguments(args: TrainingArguments) -> TokenTrainingArguments:
    """The arguments without transformers' progress bar: the library shows its own."""
    own = token_arguments(args)
    own.disable_tqdm = True
    return own


def _resumes(args: TokenTrainingArguments) -> bool:
    """Whether training continues from a checkpoint.

    Raises:
        UserError: a checkpoint is named that does not exist, or is not the newest in ``output_dir``.
    """
    wanted: Any = args.resume_from_checkpoint
    if not wanted or isinstance(wanted, bool):
        return bool(wanted)
    found = checkpoints_of(Path(str(args.output_dir)))
    if not Path(wanted).is_dir():
        problem, code = "does not exist", "missing-file"
    elif not found or found[-1].resolve() != Path(wanted).resolve():
        problem, code = "is not the newest checkpoint in output_dir", "unusable-checkpoint"
    else:
        return True
    newest = (
        f"The newest in {args.output_dir} is {found[-1].name}." if found else f"{args.output_dir} has none."
    )
    raise UserError(
        f"resume_from_checkpoint is {str(wanted)!r}, which {problem}. {newest} Pass True to resume from the newest checkpoint, or "
        "leave it out to start again.",
        code=code,
    )


def display_of(args: TokenTrainingArguments) -> LoggedDisplay:
    """The screen; quiet if progress bars are disabled, and on all processes but one, which logs warnings too."""
    return LoggedDisplay(quiet=bool(args.disable_tqdm) or not args.should_log, log=args.should_log)


def evaluates(args: TrainingArguments) -> bool:
    """Whether eval rows are needed during training."""
    return str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no"


def device_of_args(args: TokenTrainingArguments) -> str:
    """The device that models are moved to before training; ``auto`` if the trainer shards the model itself."""
    return "auto" if args.fsdp or args.deepspeed else str(args.device)


def adapter_settings(peft_config: PeftConfig | dict[str, Any] | None) -> dict[str, Any] | None:
    """The fields of a new adapter that differ from their defaults; None without an adapter.

    Raises:
        UserError: it is not a ``LoraConfig``.
    """
    if peft_config is None or isinstance(peft_config, dict):
        return peft_config
    if not isinstance(peft_config, LoraConfig):
        raise UserError(
            f"peft_config is {described(peft_config)}; only LoraConfig is supported here. For another adapter, call get_peft_model "
            "yourself and pass that model.",
            code="wrong-type",
        )
    plain, own = LoraConfig(), ("base_model_name_or_path", "runtime_config", "peft_version")
    found = {item.name: getattr(peft_config, item.name) for item in fields(peft_config) if item.init}
    return {name: value for name, value in found.items() if name not in own and value != getattr(plain, name)}
