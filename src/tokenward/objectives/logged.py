"""An objective that also logs what it does not need."""

from torch import Tensor

from tokenward.objectives.base import Composite, Losses, Objective, title_of
from tokenward.objectives.selected import Selected
from tokenward.ops.ragged import segment_sum
from tokenward.tokens.batches import TokenBatch


class LogEntropy(Composite):
    """An objective with one metric more: ``entropy``, the policy's at the tokens that have weight, in nats.

    It is the mean over a comparison's tokens of the entropy of the whole distribution from which the token was
    predicted. It has no part in the loss, and no gradient.

    Args:
        objective: What is trained with.
    """

    needs_entropy = True  # type: ignore[assignment]

    def __init__(self, objective: Objective) -> None:
        super().__init__([objective])
        self._objective, self.title = objective, title_of(objective)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch; see :class:`tokenward.objectives.base.Objective`."""
        assert batch.entropy is not None
        found = self._objective(logp, batch)
        present = (batch.weights != 0).to(logp.dtype)
        owner = batch.comparison[batch.response]
        entropy = segment_sum(batch.entropy.detach() * present, owner, batch.comparisons)
        count = segment_sum(present, owner, batch.comparisons)
        return found._replace(metrics={**found.metrics, "entropy": entropy / count.clamp(min=1)})


def with_entropy(objective: Objective) -> Objective:
    """The objective with the metric ``entropy``, over the tokens that it trains on, also where they are chosen in the step."""
    if isinstance(objective, Selected):
        return Selected(with_entropy(objective.objective), objective.selector, objective.scorer)
    return LogEntropy(objective)
