"""ReinforceTrainer: transformers' Trainer for a policy that trains on its own replies, with a reward for each of their tokens."""

from copy import copy
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from tokenward.api.inputs import (
    DEFAULT_TOKENS,
    Model,
    Rows,
    TokenSettings,
    check_options,
    check_separate,
)
from tokenward.api.own_replies import (
    OwnReplies,
    check_baseline,
    check_same_tokens,
    of_all_processes,
)
from tokenward.api.prompts import different_prompts, encode_replied
from tokenward.api.start import start_of
from tokenward.api.training import with_new_adapter
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel, copy_model, weights_digest
from tokenward.models.probe import Packing
from tokenward.objectives import Reinforce, needs_of
from tokenward.plugins import described
from tokenward.sampling import SamplingSettings, TransformersSampler
from tokenward.sampling.rollouts import ScoredSampler
from tokenward.scoring.texts import TokenScorer
from tokenward.training.checkpoints import RecordFiles
from tokenward.training.trainer import TokenTrainer
from tokenward.types import Precision

DEFAULT_REINFORCE = Reinforce(entropy=0.0, return_to_go=True, baseline="leave_one_out", kl=1.0)
DEFAULT_SAMPLING = SamplingSettings(max_new_tokens=256)


class ReinforceTrainer(TokenTrainer):
    """Trains a policy on its own replies, with a reward for each token (TLM, arXiv 2306.00398; RTO, arXiv 2404.18922).

    At each step the policy replies to the prompts of the step, ``rewards`` gives each token of the replies its reward, and the
    objective trains on them. It is a ``transformers.Trainer``, with the same ``train``, ``save_model``, checkpoints and callbacks.

    Example::

        reward = tokenward.train_reward(model, pairs, args=reward_args)
        trainer = ReinforceTrainer(model, args, pairs, rewards=reward)
        trainer.train()

    Args:
        model: The policy: a loaded model, which is trained in place, or a folder or hub name, which is loaded in float32.
        args: ``transformers.TrainingArguments``, or :class:`tokenward.TokenTrainingArguments`. ``per_device_train_batch_size``
            counts prompts.
        train_dataset: Rows in any format that tokenward reads, of which the different prompts are used; or rows with a ``prompt``
            alone (text or messages).
        rewards: What :func:`tokenward.train_reward` or :func:`tokenward.train_oracle` returned, or its folder or that of a run's
            stage. An oracle's reward is its log-ratio to its reference, in nats.
        processing_class: The tokenizer; None loads the one saved with the model.
        objective: REINFORCE with its settings; ``kl`` keeps the policy near its start.
        peft_config: A ``LoraConfig``, or its fields, for a new adapter; None trains all weights.
        rollouts: Replies to each prompt of a step.
        sampling: How replies are sampled.
        reference: The frozen model of the KL penalty. None is the policy before training.
        tokens: How text becomes tokens.
        packing: ``auto`` tests whether the model can read a prompt once for several responses; ``shared_prompts`` and
            ``none`` decide it.
        precision: Number type of the reference's passes.
        tokens_per_batch: Maximum number of tokens in a pass of the rewards or the reference.
        callbacks: Callbacks of transformers.

    Raises:
        UserError: An argument is invalid, no prompt leaves room for a reply, or the rewards read other tokens than the policy.
    """

    def __init__(
        self,
        model: Model,
        args: TrainingArguments,
        train_dataset: Rows,
        rewards: TokenScorer | str | Path,
        processing_class: PreTrainedTokenizerBase | None = None,
        objective: Reinforce = DEFAULT_REINFORCE,
        peft_config: PeftConfig | dict[str, Any] | None = None,
        *,
        rollouts: int = 4,
        sampling: SamplingSettings = DEFAULT_SAMPLING,
        reference: Model | None = None,
        tokens: TokenSettings = DEFAULT_TOKENS,
        packing: Packing = "auto",
        precision: Precision = "float32",
        tokens_per_batch: int = 8192,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        check_options(precision=precision)
        _check_types(objective, rewards, rollouts)
        start = start_of(
            model,
            args,
            processing_class,
            peft_config,
            reference=reference,
            tokens=tokens,
            packing=packing,
            rewards=rewards,
        )
        own, before, say = start.args, start.policy, start.display.notice
        if not isinstance(rewards, TokenScorer):
            rewards = TokenScorer.load(rewards, device=start.loading["device"])
        scorer = _frozen(rewards, before, packing)
        judges = scorer.models
        check_separate({"model": before, "reference": start.reference, **judges})
        for other in (*judges.values(), start.reference):
            check_same_tokens(before, other, "model", "")
        limits, template = tokens.limits([before, *judges.values()]), before.template(tokens.style)
        encoded = encode_replied(train_dataset, template, limits, say)
        prompts = different_prompts(encoded, limits.context, sampling.max_new_tokens, say)
        compared = start.reference if needs_of(objective).reference else None
        if compared is not None and compared.model is before.model:
            compared = copy_model(before, packing=packing)
        policy: LanguageModel = with_new_adapter(before, start.adapter, own.seed)
        replies = OwnReplies(
            samples=ScoredSampler(
                sampler=TransformersSampler(model=policy, template=template, settings=sampling),
                source=None,
                name="",
            ),
            count=rollouts,
            rewards=scorer,
            examples=prompts.examples,
            seed=own.seed,
            precision=precision,
            tokens_per_batch=tokens_per_batch,
            say=say,
            reference=compared,
        )
        super().__init__(
            policy,
            objective,
            own,
            prompts.rows,
            prepare=of_all_processes(replies, prompts.rows, own.per_device_train_batch_size),
            callbacks=[*start.callbacks, _SayEmpty(replies), *(callbacks or []), RecordFiles()],
        )
        self._about = {"rollouts": str(rollouts), **_settings_of(sampling)}
        self._frozen: dict[str, TokenModel] = {
            f"rewards.{name}": judge for name, judge in scorer.models.items()
        }
        self._frozen |= {} if compared is None else {"reference": compared}

    def about_samples(self) -> dict[str, str]:
        """Number and settings of the replies, and digests of the models that reward them and of the reference."""
        return self._about | self._digests

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {name: weights_digest(model) for name, model in self._frozen.items()}


class _SayEmpty(TrainerCallback):
    """Says at the end how many replies were empty."""

    def __init__(self, replies: OwnReplies) -> None:
        self._replies = replies

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._replies.show()


def _settings_of(sampling: SamplingSettings) -> dict[str, str]:
    """The settings that decide on the replies; how many are made at once may change."""
    settings = {name: value for name, value in asdict(sampling).items() if name != "batch"}
    return {f"sampling.{name}": str(value) for name, value in settings.items()}


def _frozen(scorer: TokenScorer, start: LanguageModel, packing: Packing) -> TokenScorer:
    """The scorer, with a copy of each of its models that is the policy itself, whose training would change the rewards."""
    made = copy(scorer)
    made.models = {
        name: copy_model(start, packing=packing) if model.model is start.model else model
        for name, model in scorer.models.items()
    }
    return made


def _check_types(objective: Any, rewards: Any, rollouts: Any) -> None:
    if not isinstance(objective, Reinforce):
        raise UserError(
            f"objective is {described(objective)}. Pass Reinforce(); SelectiveTrainer has the objectives that train on replies of the "
            "data.",
            code="wrong-objective",
        )
    if not isinstance(rewards, TokenScorer | str | Path):
        raise UserError(
            f"rewards is {described(rewards)}. Pass what train_reward or train_oracle returned, or its folder.",
            code="wrong-type",
        )
    if not isinstance(rollouts, int) or isinstance(rollouts, bool) or rollouts < 1:
        raise UserError(
            f"rollouts is {described(rollouts)}. Pass a number of replies, such as 4.", code="out-of-range"
        )
    check_baseline(objective, rollouts)


__all__ = ["ReinforceTrainer"]
