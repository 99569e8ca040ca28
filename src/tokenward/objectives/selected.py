"""An objective whose weights are computed in the training step, from the policy's own values of the tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import Composite, Losses, Objective, title_of
from tokenward.ops.ragged import position_in_group, segment_sum, weighted_mean
from tokenward.plugins import name_of
from tokenward.scoring.reads import IN_THE_STEP, MissingValue
from tokenward.scoring.scorers import Scorer, check_in_the_step, scores_together
from tokenward.scoring.steps import Owners
from tokenward.selection import ScoredTokens, Selector, scope_of, unit_of
from tokenward.selection.weights import weights_of
from tokenward.tokens.batches import Needs, TokenBatch
from tokenward.tokens.table import JOINT

_POLICY, _COLUMN = "policy_", "weights of the step/"
_NUMBERS = count()
UNSCORED = "selection/unscored"
"""Metric: the share of a comparison's tokens without a score."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One response of a training step, as a scorer receives it; see :class:`tokenward.scoring.basic.Record`.

    Attributes:
        key: Hash of the token ids.
        ids: Token ids.
        values: ``[n]`` each by name, without gradient.
    """

    key: str
    ids: list[int]
    values: Mapping[str, Tensor]

    def value(self, name: str) -> Tensor:
        """A copy of a value of each token by its name.  -> [n]

        Raises:
            UserError: It is not available in the step.
        """
        if name not in self.values:
            raise MissingValue(
                name,
                f"the scorer reads {name}, which is not available in the training step (available: "
                f"{', '.join(sorted(self.values))}). Read a value that the policy's own pass gives or that is stored.",
            )
        return self.values[
            name
        ].clone()  # these are the step's own numbers: a scorer may change its copy in place


def _needs_of_scorer(scorer: Scorer | None) -> Needs:
    if scorer is None:
        return Needs(scores=True)
    reads = tuple(getattr(scorer, "reads", ()))
    given = [f"{_POLICY}{kind}" for kind in IN_THE_STEP]
    unknown = {name for name in reads if name.startswith(_POLICY)}.difference(given)
    if unknown:
        raise UserError(
            f"the scorer reads {min(unknown)}, which the policy's own pass does not give. Read {' or '.join(given)}.",
            code="unknown-value",
        )
    return Needs(
        reference="reference_logp" in reads,
        entropy=f"{_POLICY}entropy" in reads,
        token_rank=f"{_POLICY}rank" in reads,
    )


class Selected(Composite):
    """An objective whose weights a selector computes in the training step; they carry no gradient.

    Tokens without weight in the batch keep none. A pair with a side that keeps no weight has loss 0 and no gradient but
    still counts in the mean over comparisons, as in ConfPO (arXiv 2506.08712): ``simpo`` on the tokens below the response's
    mean probability. If the objective returns a denominator, it is computed from the selector's weights.

    Args:
        objective: The objective that is computed with the weights.
        selector: Computes weights from scores. Its scope must not be ``dataset``. With scope ``batch`` the trainer computes
            the weights of all comparisons of the optimizer step before its passes, and puts them into ``batch.values`` under
            :attr:`column`. Without them, the batch is taken for the whole step.
        scorer: Called with each response's :class:`StepRecord`; None uses ``batch.scores``.

    Attributes:
        column: Name of the weights that were computed over the whole step.
        scorer_needs: What the scorer needs of the step.

    Raises:
        UserError: The selector has scope ``dataset`` or needs segments, or the scorer reads what a step does not give.
    """

    def __init__(self, objective: Objective, selector: Selector, scorer: Scorer | None = None) -> None:
        super().__init__([objective])
        self.scorer_needs = _needs_of_scorer(scorer)
        # A scorer does not care about comparisons of one response: the objective alone decides.
        self.needs = replace(self.needs | self.scorer_needs, unpaired=self.needs.unpaired)
        if scorer is not None:
            check_in_the_step(scorer)
        if scope_of(selector) == "dataset":
            raise UserError(
                "a selection in the training step sees only that step, but this one has scope: dataset. Use scope: response, or "
                "a scorer of stored values, whose selection is made before training.",
                code="unsupported-scope",
            )
        if unit_of(selector):
            raise UserError(
                f"a selection in the training step does not know which {unit_of(selector).removesuffix('s')} a token is in, but this "
                "one pools over them. Use a scorer of stored values, or remove the step segment_pool.",
                code="missing-segments",
            )
        self.objective, self.selector, self.scorer = objective, selector, scorer
        self.title, self.column = title_of(objective), f"{_COLUMN}{next(_NUMBERS)}"

    @property
    def over_step(self) -> bool:
        """Whether the weights of a comparison depend on the other comparisons of the step."""
        return scope_of(self.selector) == "batch"

    def __repr__(self) -> str:
        scorer = None if self.scorer is None else name_of(self.scorer)
        return f"Selected({name_of(self.objective)}, {name_of(self.selector)}, {scorer})"

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        selected, unscored = self._weights(logp, batch)
        empty = _empty(selected, batch, pairwise=self.needs.pairwise)
        # An empty pair is computed with the batch's weights, which keeps every number finite, and then zeroed.
        weights = torch.where(empty[batch.comparison[batch.response]], batch.weights, selected)
        found = self.objective(logp, batch.weighted(weights))
        loss = torch.where(empty, 0.0, found.loss)
        metrics = {name: torch.where(empty, 0.0, value) for name, value in found.metrics.items()}
        metrics |= {"selection/empty": empty.to(loss.dtype), UNSCORED: unscored.to(loss.dtype)}
        denominator = None
        if found.denominator is not None:
            with torch.no_grad():  # of the selected weights in every comparison, also in empty ones
                denominator = self.objective(logp, batch.weighted(selected)).denominator
        return Losses(loss, metrics, denominator, found.having)

    def _weights(self, logp: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Weights, and the share of each comparison's tokens with weight that have no score.  -> [n], [b]"""
        weights, unscored = batch.values.get(self.column), torch.zeros_like(batch.weights)
        if weights is None:
            tokens = self.scored(logp, batch)
            weights, unscored = self.weights_of(tokens), tokens.scores.isnan().to(batch.weights)
        owner, present = batch.comparison[batch.response], (batch.weights != 0).to(unscored.dtype)
        share = weighted_mean(unscored, present, owner, batch.comparisons).nan_to_num(0.0)
        return torch.where(batch.weights != 0, weights.to(batch.weights), 0.0), share

    def no_scores_error(self) -> UserError:
        """The error for a whole step without any score."""
        return UserError(
            f"{self!r}: no token of the step has a score (all are NaN), so nothing is selected. Use NaN only for single "
            "tokens that are to be left out.",
            code="no-scores",
        )

    def scored(self, logp: Tensor, batch: TokenBatch) -> ScoredTokens:
        """The tokens of a batch with their scores; those without weight have none, so they are neither counted nor kept."""
        joint = batch.values.get(JOINT)
        return ScoredTokens(
            scores=torch.where(batch.weights != 0, self._scores(logp, batch), torch.nan),
            response=batch.response,
            comparison=batch.comparison,
            rank=batch.rank,
            eos=batch.eos,
            seeds=step_seeds(batch.ids, batch.response, batch.responses),
            joint=None if joint is None else joint.long(),
        )

    def weights_of(self, tokens: ScoredTokens) -> Tensor:
        """The selector's weights, checked as in :func:`tokenward.selection.weights.weights_of`.  -> [n]"""
        return weights_of(self.selector, tokens)

    def _scores(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        if self.scorer is None:
            if batch.scores is None:
                raise UserError(
                    "a selection in the training step has neither a scorer nor stored scores. Give it a scorer.",
                    code="missing-scores",
                )
            return batch.scores
        owners = Owners(batch.response, batch.comparison[batch.response])
        preferred = (batch.rank == 0)[batch.response]
        return scores_together(self.scorer, self._records(logp, batch), owners, preferred)

    def _records(self, logp: Tensor, batch: TokenBatch) -> list[StepRecord]:
        sizes = torch.bincount(batch.response, minlength=batch.responses).tolist()
        parts = {name: value.split(sizes) for name, value in _step_values(logp, batch).items()}
        seeds = step_seeds(batch.ids, batch.response, batch.responses).tolist()
        return [
            StepRecord(f"{seed:016x}", ids.tolist(), {name: part[place] for name, part in parts.items()})
            for place, (seed, ids) in enumerate(zip(seeds, batch.ids.split(sizes), strict=True))
        ]


def _step_values(logp: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    """Every named value of the step, without gradient; the policy's own are NaN at tokens without weight.  -> [n] each

    The pass computes nothing there, and its 0 would be a probability of 1.
    """
    values = {name: value for name, value in batch.values.items() if not name.startswith(_COLUMN)}
    own = {
        "logp": logp,
        "entropy": batch.statistics.get("entropy"),
        "rank": batch.statistics.get("token_rank"),
    }
    present = batch.weights != 0
    values |= {
        f"{_POLICY}{name}": torch.where(present, value, torch.nan)
        for name, value in own.items()
        if value is not None
    }
    if batch.reference_logp is not None:
        values["reference_logp"] = batch.reference_logp
    return {name: value.detach() for name, value in values.items()}


def step_seeds(ids: Tensor, response: Tensor, responses: int) -> Tensor:
    """A stable number >= 0 of each response, hashed from its token ids, for draws in the step.  [n], [n] -> [r] int64"""
    place = position_in_group(response)
    mixed = (ids + 1) * 0x9E3779B97F4A7C1 + (place + 1) * 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * 0x5851F42D4C957F2D
    return segment_sum(mixed, response, responses) & (2**62 - 1)


def _empty(weights: Tensor, batch: TokenBatch, *, pairwise: bool) -> Tensor:
    """Which comparisons have no weight to train on; a pair needs some on both sides.  -> [b] bool"""
    has = segment_sum((weights != 0).float(), batch.response, batch.responses) != 0
    sides = segment_sum(has.float(), batch.comparison, batch.comparisons)
    needed = segment_sum(torch.ones_like(has, dtype=torch.float32), batch.comparison, batch.comparisons)
    return sides < needed if pairwise else sides == 0


class LogEntropy(Composite):
    """An objective with the additional metric ``entropy``, in nats, which has no part in the loss.

    It is the mean over a comparison's tokens with weight of the entropy of the policy's predicting distribution.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__([objective])
        self._objective, self.title = objective, title_of(objective)
        self.needs = replace(self.needs, entropy=True)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        found = self._objective(logp, batch)
        present = (batch.weights != 0).to(logp.dtype)
        owner = batch.comparison[batch.response]
        entropy = segment_sum(batch.statistics["entropy"].detach() * present, owner, batch.comparisons)
        count = segment_sum(present, owner, batch.comparisons)
        return found._replace(metrics={**found.metrics, "entropy": entropy / count.clamp(min=1)})


def with_entropy(objective: Objective) -> Objective:
    """Add the metric ``entropy``; for an online selection it covers the tokens that are selected."""
    if isinstance(objective, Selected):
        return Selected(with_entropy(objective.objective), objective.selector, objective.scorer)
    return LogEntropy(objective)
