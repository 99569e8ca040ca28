"""What an objective asks of the model, and of the frozen reference beside it."""

from torch import nn

from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.forward import FrozenReference, OutputSpec
from tokenward.models.loading import LanguageModel
from tokenward.objectives.base import (
    Objective,
    needs_entropy,
    needs_frozen_reference,
    needs_kl,
    needs_reference_layers,
    needs_states,
    needs_token_rank,
    title_of,
)


def outputs_of_objective(
    objective: Objective, model: TokenModel, reference: LanguageModel | None = None
) -> OutputSpec:
    """What each pass of the policy shall give.

    Args:
        objective: Who asks.
        model: The policy. Where it has an adapter, it is its own reference without it.
        reference: The frozen model otherwise; its weights are set to need no gradient.

    Raises:
        UserError: the objective needs the reference model, and there is none.
    """
    frozen = _frozen(objective, model, reference) if needs_frozen_reference(objective) else None
    return OutputSpec(
        entropy=needs_entropy(objective),
        token_rank=needs_token_rank(objective),
        states=needs_states(objective),
        kl=needs_kl(objective) or None,
        reference_layers=needs_reference_layers(objective),
        reference=frozen,
    )


def _frozen(objective: Objective, model: TokenModel, reference: LanguageModel | None) -> FrozenReference:
    if reference is not None:
        nn.Module.to(reference.model, model.device)
        reference.model.requires_grad_(False).eval()
        return FrozenReference(reference.model, reference.head)
    if isinstance(model, LanguageModel) and model.has_adapter:
        return FrozenReference(model.model, model.head, without_adapter=True)
    raise UserError(
        f"{title_of(objective)} compares with the reference model itself, over the whole vocabulary or its layers, and "
        "there is none beside this model. Use it in the oracle or policy table, or pass TokenTrainer(reference=...)."
    )
