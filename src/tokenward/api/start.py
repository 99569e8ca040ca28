"""What every trainer of a policy has before it reads its data: arguments, the screen, the policy and its reference."""

from typing import Any, NamedTuple

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from tokenward.api.arguments import check_tokens
from tokenward.api.inputs import Model, TokenSettings, check_options, check_separate, language_model
from tokenward.api.notices import LoggedDisplay
from tokenward.api.training import adapter_settings, check_adapter, device_of_args, display_of
from tokenward.models.identity import check_places
from tokenward.models.loading import LanguageModel
from tokenward.models.probe import Packing
from tokenward.training.arguments import TokenTrainingArguments, token_arguments
from tokenward.training.callbacks import CheckpointEvery


class Start(NamedTuple):
    """A policy before its training.

    Attributes:
        args: The training arguments.
        display: The screen.
        policy: The policy, without the new adapter.
        reference: The model that it is compared with; the policy itself if none was given.
        adapter: Fields of a new adapter; None trains all weights.
        loading: How further models are loaded: ``packing`` and ``device``.
        callbacks: Checkpoints at intervals, for arguments that have an interval.
    """

    args: TokenTrainingArguments
    display: LoggedDisplay
    policy: LanguageModel
    reference: LanguageModel
    adapter: dict[str, Any] | None
    loading: dict[str, Any]
    callbacks: list[TrainerCallback]


def start_of(
    model: Model,
    args: TrainingArguments,
    processing_class: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | dict[str, Any] | None,
    *,
    reference: Model | None,
    tokens: TokenSettings,
    packing: Packing,
    **places: Any,
) -> Start:
    """Check a trainer's arguments and load its models.

    Args:
        model: The policy.
        args: Training arguments.
        processing_class: The tokenizer; None loads the one saved with the model.
        peft_config: The new adapter; None trains all weights.
        reference: The model that the policy is compared with; None is the policy itself.
        tokens: How text becomes tokens.
        packing: As for :class:`tokenward.SelectiveTrainer`.
        places: Further arguments that may be folders, by name.

    Raises:
        UserError: an argument is invalid, or policy and reference share weights.
    """
    check_options(packing=packing)
    check_tokens(tokens)
    own = token_arguments(args)
    check_places(model=model, reference=reference, **places)
    loading: dict[str, Any] = {"packing": packing, "device": device_of_args(own)}
    policy = compared = language_model(model, processing_class, **loading)
    if reference is not None:
        compared = language_model(reference, name="reference", fallback=policy.tokenizer, **loading)
    adapter = adapter_settings(peft_config)
    check_adapter(policy, adapter)
    check_separate({"model": policy, "reference": compared})
    timed: list[TrainerCallback] = []
    if isinstance(args, TokenTrainingArguments):
        timed = [CheckpointEvery(own.checkpoint_minutes)]
    return Start(own, display_of(own), policy, compared, adapter, loading, timed)
