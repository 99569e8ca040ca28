"""Checks around training: rows that can train, a matching reference, and finite losses."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.forward import FrozenReference
from tokenward.objectives.base import Objective, needs_of, parts_within, title_of
from tokenward.objectives.selected import UNSCORED, Selected
from tokenward.ops.ragged import segment_sum
from tokenward.tokens.rows import TokenRow


class _Unseen(NamedTuple):
    """Losses of a pass that have not been looked at yet."""

    losses: Tensor
    sources: Sequence[str]
    step: int


class FiniteLosses:
    """Remembers losses until somebody has a reason to look at them.

    To look at a number makes the host wait for the device. On the CPU nothing is waited for, so there a loss
    is looked at once; an accelerator is asked when a step logs, and before anything is saved.
    """

    def __init__(self) -> None:
        self._unseen: list[_Unseen] = []

    def note(self, losses: Tensor, sources: Sequence[str], step: int) -> None:
        """The losses of a pass.  [b]

        Args:
            losses: One per comparison.
            sources: Where the comparisons came from.
            step: Of the optimizer.

        Raises:
            UserError: see :meth:`check`.
        """
        self._unseen.append(_Unseen(losses.detach(), sources, step))
        if losses.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Look at what was noted.

        Raises:
            UserError: a loss is not finite; names the step and the comparisons.
        """
        unseen, self._unseen = self._unseen, []
        for losses, sources, step in unseen:
            if not bool(losses.isfinite().all()):
                raise UserError(_not_finite(losses.tolist(), sources, step))


def _not_finite(losses: Sequence[float], sources: Sequence[str], step: int) -> str:
    rows = ", ".join(source for source, loss in zip(sources, losses, strict=True) if loss - loss != 0)
    return (
        f"the loss is not finite at step {step}, for: {rows}. What was saved before is untouched. Lower "
        "training.learning_rate, set training.max_grad_norm, or look at these rows with tokenward data RECIPE."
    )


# Log-probabilities depend a little on the batch's shape; low precision moves each by about this much.
PER_TOKEN_NATS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05}


@torch.inference_mode()
def check_first_batch(
    model: TokenModel,
    objective: Objective,
    rows: list[TokenRow],
    *,
    precision: torch.dtype,
    reference: FrozenReference | None = None,
) -> dict[str, float]:
    """Compare the untrained policy with its reference on a few rows.

    Training has not begun, so both must be the same model: the implicit reward margin must be 0, and the loss that of
    the reference itself (DPO's is ln 2). If not, the reference values come from another model, adapter, template or precision.

    Args:
        model: The policy before training.
        objective: One that compares with a reference.
        rows: The first rows, with their reference log-probabilities.
        precision: The coarser of those in which the policy will compute and the reference was computed.
        reference: The frozen model, where the objective needs one.

    Returns:
        ``loss``, ``begins`` (what it is where the two are the same), ``margin`` (nats, largest) and ``per_token`` (nats,
        mean absolute difference).

    Raises:
        UserError: they differ by more than rounding.
    """
    needs, batch = needs_of(objective), model.collate(rows).to(model.device)
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=precision == torch.bfloat16)
    with autocast:
        logp, tokens = model.read(model.model, batch, needs, reference)
    assert tokens.reference_logp is not None
    difference = torch.where(tokens.weights != 0, logp - tokens.reference_logp, 0.0)
    begins = float(objective(tokens.reference_logp, tokens).whole)
    losses = objective(logp, tokens)
    ratio = segment_sum(difference, tokens.response, tokens.responses)
    margin = ratio[0::2] - ratio[1::2] if needs.pairwise else ratio
    found = {
        "loss": float(losses.whole),
        "begins": begins,
        "margin": float(margin.abs().max()),
        "per_token": float(difference.abs().sum() / (tokens.weights != 0).sum()),
    }
    allowed = PER_TOKEN_NATS.get(precision, 0.05)
    if not found["per_token"] <= allowed:
        raise UserError(
            f"before training, policy and reference differ by {found['per_token']:.4f} nats per token (allowed {allowed}), "
            f"the loss is {found['loss']:.4f} where it should be {begins:.4f}. They are not the same model: look "
            "at the adapter, the dtype, the dropout and the template of the two, or run the reference stage again."
        )
    return found


def check_rows(objective: Objective, rows: Sequence[TokenRow]) -> None:
    """Refuse rows that the objective cannot train on.

    Raises:
        UserError: reference values are missing, or a row is not a pair with the better response first.
    """
    needs = needs_of(objective)
    for row in rows:
        comparison = row.comparison
        if needs.reference and row.reference_logp is None:
            raise UserError(
                f"{title_of(objective)} compares with a reference, but {comparison.source} has no reference "
                "log-probabilities. Run the reference stage first (tokenward oracle RECIPE does)."
            )
        if needs.pairwise and (len(comparison.ranks) != 2 or comparison.ranks[0] >= comparison.ranks[1]):
            advice = "Make pairs of it by data.pairs: best_worst, all or adjacent."
            if len(comparison.ranks) == 1:
                advice = "A row of one response trains kto or weighted_likelihood; or give pairs."
            raise UserError(
                f"{title_of(objective)} is over pairs with the better response first, but {comparison.source} has "
                f"ranks {list(comparison.ranks)}. {advice}"
            )


def check_scored(objective: Objective, means: Mapping[str, float]) -> None:
    """Refuse a selection in the step none of whose tokens had a score since the last log.

    Not of a single pass: a response without scores may be one.

    Raises:
        UserError: as above.
    """
    if means.get(UNSCORED) == 1.0:
        for part in parts_within(objective):
            if isinstance(part, Selected):
                raise part.no_scores_error()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, also those that attention layers keep as a plain number."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (
                isinstance(module, nn.modules.dropout._DropoutNd) or "drop" in name
            ):
                setattr(module, name, 0.0)


def check_gradient(loss: Tensor, objective: Objective) -> None:
    """Refuse a loss that does not depend on the policy.

    Raises:
        UserError: no gradient goes back from it.
    """
    if not loss.requires_grad:
        raise UserError(
            f"the loss of {title_of(objective)} has no gradient: it does not depend on logp, or was detached on the way. Compute "
            "it from logp, without detach() or item()."
        )
