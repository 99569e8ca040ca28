"""Checks around training: rows that can train, a matching reference, and finite losses."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.forward import FrozenReference
from tokenward.models.sharding import reading
from tokenward.objectives.base import Objective, needs_of, parts_within, title_of
from tokenward.objectives.selected import UNSCORED, Selected
from tokenward.ops.ragged import segment_sum
from tokenward.tokens.batches import TokenBatch
from tokenward.tokens.rows import TokenRow


@contextmanager
def diverging(when: str) -> Iterator[None]:
    """A context of what is computed with a model that trains: errors of numbers that are not finite say when that was."""
    try:
        yield
    except UserError as error:
        if not error.code.startswith("non-finite"):
            raise
        raise UserError(f"{when}: {error}", code=error.code, key=error.key) from error


def after(step: int, learning_rate: float) -> str:
    """When something happened, for messages."""
    return f"after step {step}, with learning_rate {learning_rate:g}"


def check_weights(module: nn.Module, step: int, learning_rate: float) -> None:
    """Refuse weights that an update has made NaN or infinite; the host waits for the device once.

    Of weights of which each process holds a part, each looks at its own.

    Raises:
        UserError: there are some.
    """
    own = ((name, weight.detach()) for name, weight in module.named_parameters() if weight.requires_grad)
    parts = [(name, part.to_local() if isinstance(part, DTensor) else part) for name, part in own]
    trained = [(name, part) for name, part in parts if part.numel() and not part.is_meta]
    if not trained:
        return
    finite = [torch.stack(torch.aminmax(weight)).isfinite().all() for _, weight in trained]
    good = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()
    if not all(good):
        names = [name for (name, _), well in zip(trained, good, strict=True) if not well]
        raise UserError(
            f"{after(step, learning_rate)}, the weights are NaN or infinite in {len(names)} of {len(trained)} tensors, such as {names[0]}. "
            "Earlier checkpoints are intact. Lower learning_rate, or set max_grad_norm.",
            code="non-finite-weights",
        )


class FiniteLosses:
    """Collects losses and checks later that they are finite.

    Reading a value makes the host wait for the device. On a CPU there is nothing to wait for, so losses are checked at
    once; on an accelerator they are checked when a step logs and before a checkpoint.
    """

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        self._unchecked: list[tuple[Tensor, Sequence[str], int]] = []

    def note(self, losses: Tensor, sources: Sequence[str], step: int) -> None:
        """Add the losses of a pass, one per comparison.  [b]"""
        self._unchecked.append((losses.detach(), sources, step))
        if losses.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise a UserError that names the step and the comparisons if a collected loss is not finite."""
        unchecked, self._unchecked = self._unchecked, []
        if not unchecked:
            return
        # One transfer for all of them.
        finite_of_all = iter(torch.cat([losses for losses, _, _ in unchecked]).isfinite().tolist())
        for losses, sources, step in unchecked:
            finite = [next(finite_of_all) for _ in range(len(losses))]
            if not all(finite):
                rows = ", ".join(source for source, good in zip(sources, finite, strict=True) if not good)
                raise UserError(
                    f"the loss is not finite at step {step}, with learning_rate {self._learning_rate:g}, for: {rows}. Earlier checkpoints are intact. Lower learning_rate, set "
                    "max_grad_norm, or look for something unusual in these rows.",
                    code="non-finite-loss",
                )


# Log-probabilities depend slightly on the batch shape, more so in low precision: allowed nats per token.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.05}


def check_first_batch(
    model: TokenModel,
    objective: Objective,
    rows: list[TokenRow],
    *,
    precision: torch.dtype,
    reference: FrozenReference | None = None,
) -> dict[str, float]:
    """Compare the untrained policy with its reference on a few rows.

    Before training both must be the same model: the implicit reward margin must be 0, and the loss must equal that of
    the reference itself (DPO: ln 2). If not, the reference values come from another model, adapter, template or
    precision. ``precision`` is the coarser of the two; ``reference`` is the frozen model, if the objective needs one.

    Returns:
        ``loss``, ``begins`` (the loss if both are the same), ``margin`` (largest, nats) and ``per_token`` (mean absolute
        difference, nats).

    Raises:
        UserError: they differ by more than rounding.
    """
    needs, batch = needs_of(objective), model.collate(rows).to(model.device)
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=precision == torch.bfloat16)
    with reading(model.model), autocast:
        logp, tokens = model.read(model.model, batch, needs, reference)
    assert tokens.reference_logp is not None
    difference = torch.where(tokens.weights != 0, logp - tokens.reference_logp, 0.0)
    ratio = segment_sum(difference, tokens.response, tokens.responses)
    margin = ratio[0::2] - ratio[1::2] if needs.pairwise else ratio
    begins = float(objective(tokens.reference_logp, tokens).whole.detach())
    found = {
        "loss": float(objective(logp, tokens).whole.detach()),
        "begins": begins,
        "margin": float(margin.abs().max()),
        "per_token": float(difference.abs().sum() / (tokens.weights != 0).sum()),
    }
    allowed = TOLERANCE.get(precision, 0.05)
    if not found["per_token"] <= allowed:  # also true for NaN
        raise UserError(
            f"before training, policy and reference differ by {found['per_token']:.4f} nats per token (allowed {allowed}), "
            f"and the loss is {found['loss']:.4f} instead of {found['begins']:.4f}. They are not the same model: compare their "
            "adapter, dtype, dropout and template, or compute the reference values again.",
            code="reference-mismatch",
        )
    kl = _mean_kl(tokens)
    if not kl <= allowed:
        raise UserError(
            f"before training, the KL divergence between policy and reference model is {kl:.4f} nats per token (allowed "
            f"{allowed}), though they agree with the stored log-probabilities. The frozen model is not the one that the stored values come "
            "from: pass the model before training as reference.",
            code="reference-mismatch",
        )
    return found


def _mean_kl(tokens: TokenBatch) -> float:
    """Mean KL divergence of a weighted token to the frozen reference; 0 if the objective reads none."""
    kl = tokens.statistics.get("kl")
    return 0.0 if kl is None else float(kl.sum() / (tokens.weights != 0).sum())


def check_rows(objective: Objective, rows: Sequence[TokenRow]) -> None:
    """Reject rows without the reference values, or that are not the pairs, that the objective needs."""
    needs = needs_of(objective)
    for row in rows:
        comparison = row.comparison
        if needs.reference and row.reference_logp is None:
            raise UserError(
                f"{title_of(objective)} compares with a reference, but {comparison.source} has no reference "
                "log-probabilities. Compute them first (in a run, the reference stage does).",
                code="missing-reference",
            )
        if needs.pairwise and (len(comparison.ranks) != 2 or comparison.ranks[0] >= comparison.ranks[1]):
            advice = "Turn it into pairs with pairs=best_worst, all or adjacent."
            if len(comparison.ranks) == 1:
                advice = "Use KTO or weighted_likelihood for single responses, or give pairs."
            raise UserError(
                f"{title_of(objective)} needs pairs with the better response first, but {comparison.source} has "
                f"ranks {list(comparison.ranks)}. {advice}",
                code="not-a-pair",
                key="data.pairs",
            )


def check_scored(objective: Objective, means: Mapping[str, float]) -> None:
    """Reject a selection if no token had a score since the last log; a single response may have none."""
    if means.get(UNSCORED) == 1.0:
        for part in parts_within(objective):
            if isinstance(part, Selected):
                raise part.no_scores_error()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, including those that attention layers store as a plain number."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (
                isinstance(module, nn.modules.dropout._DropoutNd) or "drop" in name
            ):
                setattr(module, name, 0.0)


def check_gradient(loss: Tensor, objective: Objective) -> None:
    """Reject a loss that does not depend on the policy."""
    if not loss.requires_grad:
        raise UserError(
            f"the loss of {title_of(objective)} has no gradient: it does not depend on logp, or was detached. Compute it from "
            "logp, without detach() or item().",
            code="no-gradient",
        )
