"""The loss of a token reward model: aggregated token rewards must order a comparison's responses."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import DRAW, Losses
from tokenward.objectives.selected import step_seeds
from tokenward.ops.aggregates import AGGREGATES, SCALED, SOFT, group_mean_length, pooled
from tokenward.ops.listwise import agreement, plackett_luce, random_subsets, ranks_differ
from tokenward.ops.ragged import position_in_group, segment_sum
from tokenward.plugins import check_call, find
from tokenward.selection import uniform
from tokenward.tokens.batches import Needs, TokenBatch


class _RankedLists(NamedTuple):
    """Ranked lists: those of the batch, or subsets of them.  [m] each, but for the count"""

    response: Tensor
    group: Tensor
    groups: int


class _Responses(NamedTuple):
    """Each response's aggregate, before the factor C, and how many tokens it was taken over.  [r] each"""

    values: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class PlackettLuce:
    """Likelihood of the ranking under aggregated token rewards (TLM, arXiv 2306.00398, preference loss).

    ``-sum_k log(exp(e_k) / sum_{i >= k} exp(e_i))`` with ``e = C f(r_1 .. r_T)``, where ``f`` is the aggregate and
    ``C`` the mean length of the list's responses. The first argument of the call is the token REWARDS ``[n]``.
    Where the batch has segments, ``f`` is over the mean rewards of segments, and lengths count segments.

    Attributes:
        aggregate: ``average``, ``sum``, ``softmax``, ``softmin``, or ``"module:name"`` of a function ``f(rewards,
            weights, owner, count) -> [count]``.
        temperature: Of ``softmax`` and ``softmin``; the paper's beta.
        scale_by_length: Multiply by C; ``sum`` and functions of one's own never are.
        length_neutral: Log of the mean in the place of the log of the sum of exponentials: without it,
            ``softmax`` favours long responses and ``softmin`` short ones.
        ties: ``averaged`` over all orders of equal ranks, or one ``random`` order per call, as published.
        list_temperature: Divides ``e``.
        group_size: Take the mean over random lists of so many of the comparison's responses (all of them, where it
            has fewer) in the place of the whole list. Lists of one rank only say nothing and are not counted.
        groups: Lists drawn per comparison and call, where ``group_size`` is given.
    """

    _: KW_ONLY
    aggregate: str = "average"
    temperature: float = 2.0
    scale_by_length: bool = True
    length_neutral: bool = False
    ties: Literal["averaged", "random"] = "averaged"
    list_temperature: float = 1.0
    group_size: int | None = None
    groups: int = 64

    def __post_init__(self) -> None:
        function = find("aggregate", self.aggregate, AGGREGATES)
        check_call("aggregate", self.aggregate, function, ("rewards", "weights", "owner", "count"))
        for name in ("temperature", "list_temperature"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"{name} must be greater than 0, got {getattr(self, name)}. Write for example 1.0."
                )
        if self.length_neutral and self.aggregate not in SOFT:
            raise UserError(
                f"length_neutral has no meaning with aggregate: {self.aggregate}. Leave it out, or write softmax or softmin."
            )
        if self.group_size is not None and self.group_size < 2:
            raise UserError(
                f"group_size must be at least 2, got {self.group_size}: one response has no order."
            )
        if self.groups < 1:
            raise UserError(f"groups must be at least 1, got {self.groups}. The paper draws 64.")

    @property
    def needs(self) -> Needs:
        """Lists or orders may be drawn."""
        return Needs(draws=self.ties == "random" or self.group_size is not None)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch, ``logp`` being token rewards; see :class:`tokenward.objectives.base.Objective`."""
        responses = self._aggregated(logp, batch)
        whole = _RankedLists(
            torch.arange(batch.responses, device=logp.device), batch.comparison, batch.comparisons
        )
        if self.group_size is None:
            loss = self._losses(responses, batch, whole)
        else:
            loss = self._mean_over_subsets(responses, batch, self.group_size)
        detached = responses._replace(values=responses.values.detach())
        found = agreement(self._scaled(detached, whole), batch.rank, *whole[1:])
        # A comparison of one rank only has no pair to be right about: it counts as chance.
        accuracy = torch.where(found.accuracy.isnan(), 0.5, found.accuracy)
        return Losses(loss, {"rank/accuracy": accuracy, "rank/top1": found.top, "rank/spread": found.spread})

    def _aggregated(self, rewards: Tensor, batch: TokenBatch) -> _Responses:
        weights, owner = batch.weights, batch.response
        if batch.segment is not None:
            segments = int(batch.segment[-1]) + 1
            rewards, weights, owner = pooled(rewards, weights, batch.segment, owner, segments)
        function = find("aggregate", self.aggregate, AGGREGATES)
        settings = (
            {"temperature": self.temperature, "mean": self.length_neutral} if self.aggregate in SOFT else {}
        )
        values = function(rewards, weights, owner, batch.responses, **settings)
        if not isinstance(values, Tensor) or values.shape != (batch.responses,):
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise UserError(
                f"the aggregate {self.aggregate} returned {shape} for {batch.responses} responses. It must return a tensor "
                "with one number per response: f(rewards [n], weights [n], owner [n], count) -> [count]."
            )
        return _Responses(values, segment_sum(weights, owner, batch.responses))

    def _scaled(self, responses: _Responses, lists: _RankedLists) -> Tensor:
        """``e`` of each list's members.  -> [m]"""
        values = responses.values[lists.response]
        if not self.scale_by_length or self.aggregate not in SCALED:
            return values
        return values * group_mean_length(responses.lengths[lists.response], lists.group, lists.groups)

    def _losses(self, responses: _Responses, batch: TokenBatch, lists: _RankedLists) -> Tensor:
        rank = batch.rank[lists.response]
        tie_break = None
        if self.ties == "random":
            draw = torch.div(lists.group, batch.comparisons, rounding_mode="floor")
            noise = _noise(batch, lists.groups // max(batch.comparisons, 1), "ties")
            tie_break = noise[draw, lists.response]
        try:
            return plackett_luce(
                self._scaled(responses, lists),
                rank,
                lists.group,
                lists.groups,
                temperature=self.list_temperature,
                tie_break=tie_break,
            )
        except ValueError as error:
            raise UserError(
                f"a comparison cannot be averaged over the orders of its equal ranks: {error}. Write ties: random, or a "
                "group_size of 12 or less."
            ) from error

    def _mean_over_subsets(self, responses: _Responses, batch: TokenBatch, size: int) -> Tensor:
        noise = _noise(batch, self.groups, "subsets")
        drawn = random_subsets(noise, batch.comparison, batch.comparisons, size)
        lists = _RankedLists(drawn.response, drawn.subset, self.groups * batch.comparisons)
        losses = self._losses(responses, batch, lists)
        counts = ranks_differ(batch.rank[lists.response], lists.group, lists.groups)
        owner = torch.arange(batch.comparisons, device=counts.device).repeat(self.groups)
        number = segment_sum(counts.to(losses.dtype), owner, batch.comparisons)
        return segment_sum(torch.where(counts, losses, 0.0), owner, batch.comparisons) / number.clamp(min=1)


def _noise(batch: TokenBatch, draws: int, what: Literal["ties", "subsets"]) -> Tensor:
    """Numbers in [0, 1) for several draws: in a training by the step, the response and its place, else new ones.  -> [draws r]"""
    device = batch.rank.device
    drawn = batch.values.get(DRAW)
    if drawn is None:
        # Where the checkpointed CPU generator draws, so that every device sees the same.
        return torch.rand(draws, batch.responses).to(device)
    seeds = step_seeds(batch.ids, batch.response, batch.responses) + position_in_group(batch.comparison)
    number = 2 * torch.arange(draws, device=device)[:, None] + (what == "ties")
    return uniform(
        seeds ^ (number * 0x2545F4914F6CDD1 + drawn[:1].to(torch.int64) * 0x9E3779B97F4A7C1)
    ).float()
