"""An objective whose weights are made in the step, from what the policy says of the tokens just then."""

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

_POLICY, _COLUMN = "policy_", "weights of the step/"
_NUMBERS = count()
UNSCORED = "selection/unscored"
"""Metric: the share of a comparison's tokens that have no score."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What is known of one response in the step, as a scorer takes it.

    Attributes:
        key: Of the response's tokens.
        ids: The tokens.
        values: Named values ``[n]`` of the tokens, without gradient.
    """

    key: str
    ids: list[int]
    values: Mapping[str, Tensor]

    def value(self, name: str) -> Tensor:
        """A named value of each token.  -> [n]

        Raises:
            UserError: there is no such value in the step.
        """
        if name not in self.values:
            raise MissingValue(
                name,
                f"there is no {name} in the step, which this scorer reads (there is {', '.join(sorted(self.values))}). Name a value "
                "that the policy's own pass gives or that is stored.",
            )
        return self.values[name]


def _needs_of_scorer(scorer: Scorer | None) -> Needs:
    """What a scorer reads of the step; without one, the stored scores."""
    if scorer is None:
        return Needs(scores=True)
    reads = tuple(getattr(scorer, "reads", ()))
    given = [f"{_POLICY}{kind}" for kind in IN_THE_STEP]
    unknown = {name for name in reads if name.startswith(_POLICY)}.difference(given)
    if unknown:
        raise UserError(
            f"the scorer reads {min(unknown)}, which the policy's own pass does not give. Read {' or '.join(given)}."
        )
    return Needs(
        reference="reference_logp" in reads,
        entropy=f"{_POLICY}entropy" in reads,
        token_rank=f"{_POLICY}rank" in reads,
    )


class Selected(Composite):
    """An objective whose weights a selector makes in the step; no gradient goes through them.

    A token without weight in the batch keeps none. A pair of which one side has no weight left costs 0 and gives no
    gradient, and still counts in the mean over comparisons (so does ConfPO, arXiv 2506.08712: ``simpo`` on the
    tokens below the response's mean probability). Where the objective has a denominator for the whole step, it is made of
    the weights of the step: those that the selector gave.

    Args:
        objective: What is computed with the weights.
        selector: From scores to weights; its scope must not be the data set. A scope of ``batch`` is all comparisons
            of the optimizer step: the trainer makes such weights before the passes of the step and puts them into
            ``batch.values`` under :attr:`column`. Called without them, the batch is the whole.
        scorer: Called with each response's :class:`StepRecord`, ``combine`` with its steps at the scope that they have;
            None takes ``batch.scores``.

    Attributes:
        column: Name of weights that were made over the whole step.
        asked: What the scorer needs of the step.

    Raises:
        UserError: the selector's scope is the data set, it looks at words, sentences or spans, or the scorer reads what a
            step does not give.
    """

    def __init__(self, objective: Objective, selector: Selector, scorer: Scorer | None = None) -> None:
        super().__init__([objective])
        self.asked = _needs_of_scorer(scorer)
        self.needs = replace(self.needs | self.asked, unpaired=self.needs.unpaired)
        if scorer is not None:
            check_in_the_step(scorer)
        if scope_of(selector) == "dataset":
            raise UserError(
                "a selection in the step sees the step's tokens only, and this one has scope: dataset. Write scope: response, or "
                "a scorer that reads stored values, whose selection is made before the training."
            )
        if unit_of(selector):
            raise UserError(
                f"a selection in the step does not know which {unit_of(selector).removesuffix('s')} a token is in, and this one pools over them. Make it "
                "in policy.selection from a scorer that reads stored values, or leave such a step (segment_pool) out."
            )
        self.objective, self.selector, self.scorer = objective, selector, scorer
        self.title, self.column = title_of(objective), f"{_COLUMN}{next(_NUMBERS)}"

    @property
    def over_step(self) -> bool:
        """Whether the weights of one comparison depend on the others of the step."""
        return scope_of(self.selector) == "batch"

    def __repr__(self) -> str:
        scorer = None if self.scorer is None else name_of(self.scorer)
        return f"Selected({name_of(self.objective)}, {name_of(self.selector)}, {scorer})"

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch; see :class:`tokenward.objectives.base.Objective`."""
        made, unscored = self._weights(logp, batch)
        empty = _empty(made, batch, pairwise=self.needs.pairwise)
        # An empty pair is computed with the batch's weights, so that every number in it is finite, and then left out.
        left_out = empty[batch.comparison[batch.response]]
        weights = torch.where(left_out, batch.weights, made)
        found = self.objective(logp, batch.weighted(weights))
        loss = torch.where(empty, 0.0, found.loss)
        metrics = {name: torch.where(empty, 0.0, value) for name, value in found.metrics.items()}
        metrics |= {"selection/empty": empty.to(loss.dtype), UNSCORED: unscored.to(loss.dtype)}
        denominator = None if found.denominator is None else self._denominator(logp, batch, made)
        return Losses(loss, metrics, denominator, found.having)

    @torch.no_grad()
    def _denominator(self, logp: Tensor, batch: TokenBatch, weights: Tensor) -> Tensor | None:
        """What comparisons add to the step's denominator, empty ones too: by the weights that were made.  -> [b]"""
        return self.objective(logp, batch.weighted(weights)).denominator

    def _weights(self, logp: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Weights, and the share of each comparison's tokens with weight that have no score.  -> [n], [b]"""
        weights, unscored = batch.values.get(self.column), torch.zeros_like(batch.weights)
        if weights is None:
            tokens = self.scored(logp, batch)
            weights, unscored = self.weights_of(tokens), tokens.scores.isnan().to(batch.weights)
        owner, present = batch.comparison[batch.response], (batch.weights != 0).to(unscored.dtype)
        share = weighted_mean(unscored, present, owner, batch.comparisons).nan_to_num(0.0)
        return torch.where(batch.weights != 0, weights.to(batch.weights), 0.0), share

    def without_scores(self) -> UserError:
        """The error where no token of a whole step has a score."""
        return UserError(
            f"{self!r}: no token of the step has a score (all are NaN), so nothing is selected by it. Give numbers; NaN is for "
            "single tokens that are to be left out."
        )

    def scored(self, logp: Tensor, batch: TokenBatch) -> ScoredTokens:
        """The scores of a batch, as the selector takes them."""
        return ScoredTokens(
            scores=self._scores(logp, batch),
            response=batch.response,
            comparison=batch.comparison,
            rank=batch.rank,
            eos=batch.eos,
            seeds=step_seeds(batch.ids, batch.response, batch.responses),
        )

    def weights_of(self, tokens: ScoredTokens) -> Tensor:
        """What the selector gives the tokens.  -> [n]

        Raises:
            UserError: it is not one finite number per token, or less than 0 where that is not meant.
        """
        return weights_of(self.selector, tokens)

    def _scores(self, logp: Tensor, batch: TokenBatch) -> Tensor:
        if self.scorer is None:
            if batch.scores is None:
                raise UserError(
                    "a selection in the step has neither a scorer nor stored scores. Name a scorer, or use it in the policy table."
                )
            return batch.scores
        owner = batch.comparison[batch.response]
        preferred = (batch.rank == 0)[batch.response]
        return scores_together(
            self.scorer, self._records(logp, batch), Owners(batch.response, owner), preferred
        )

    def _records(self, logp: Tensor, batch: TokenBatch) -> list[StepRecord]:
        sizes = torch.bincount(batch.response, minlength=batch.responses).tolist()
        known = _known(logp, batch)
        parts = {name: value.split(sizes) for name, value in known.items()}
        seeds = step_seeds(batch.ids, batch.response, batch.responses).tolist()
        ids = batch.ids.split(sizes)
        return [
            StepRecord(
                f"{seeds[place]:016x}",
                ids[place].tolist(),
                {name: part[place] for name, part in parts.items()},
            )
            for place in range(batch.responses)
        ]


def _known(logp: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    """Every named value of the step, without gradient.  -> [n] each"""
    own = {
        f"{_POLICY}logp": logp,
        f"{_POLICY}entropy": batch.statistics.get("entropy"),
        f"{_POLICY}rank": batch.statistics.get("token_rank"),
        "reference_logp": batch.reference_logp,
    }
    stored = {name: value for name, value in own.items() if value is not None}
    given = {name: value for name, value in batch.values.items() if not name.startswith(_COLUMN)}
    return {name: value.detach() for name, value in {**given, **stored}.items()}


def step_seeds(ids: Tensor, response: Tensor, responses: int) -> Tensor:
    """A stable number of each response, which a selection in the step draws by.  [n], [n] -> [r] int64, not negative

    Args:
        ids: The tokens of some responses, end to end.
        response: Which response owns each token.
        responses: How many there are.
    """
    place = position_in_group(response)
    mixed = (ids + 1) * 0x9E3779B97F4A7C1 + (place + 1) * 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * 0x5851F42D4C957F2D
    return segment_sum(mixed, response, responses) & (2**62 - 1)


def _empty(weights: Tensor, batch: TokenBatch, *, pairwise: bool) -> Tensor:
    """Which comparisons have nothing to train on: no weight at all, or, of pairs, none on one side.  -> [b] bool"""
    has = segment_sum((weights != 0).float(), batch.response, batch.responses) != 0
    sides = segment_sum(has.float(), batch.comparison, batch.comparisons)
    needed = segment_sum(torch.ones_like(has, dtype=torch.float32), batch.comparison, batch.comparisons)
    return sides < needed if pairwise else sides == 0


class LogEntropy(Composite):
    """An objective with one metric more: ``entropy``, the policy's at the tokens that have weight, in nats.

    It is the mean over a comparison's tokens of the entropy of the whole distribution from which the token was
    predicted. It has no part in the loss, and no gradient.

    Args:
        objective: What is trained with.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__([objective])
        self._objective, self.title = objective, title_of(objective)
        self.needs = replace(self.needs, entropy=True)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch; see :class:`tokenward.objectives.base.Objective`."""
        found = self._objective(logp, batch)
        present = (batch.weights != 0).to(logp.dtype)
        owner = batch.comparison[batch.response]
        entropy = segment_sum(batch.statistics["entropy"].detach() * present, owner, batch.comparisons)
        count = segment_sum(present, owner, batch.comparisons)
        return found._replace(metrics={**found.metrics, "entropy": entropy / count.clamp(min=1)})


def with_entropy(objective: Objective) -> Objective:
    """The objective with the metric ``entropy``, over the tokens that it trains on, also where they are chosen online."""
    if isinstance(objective, Selected):
        return Selected(with_entropy(objective.objective), objective.selector, objective.scorer)
    return LogEntropy(objective)
