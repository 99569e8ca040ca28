"""The loss of a token reward model: aggregated token rewards must order a comparison's responses."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import DRAW, Losses
from tokenward.objectives.selected import step_seeds
from tokenward.ops.aggregates import AGGREGATES, SCALED, SOFT, group_mean_length, pooled
from tokenward.ops.listwise import agreement, plackett_luce, random_subsets, ranks_differ
from tokenward.ops.ragged import position_in_group, segment_sum
from tokenward.plugins import check_call, check_positive, find, validated
from tokenward.selection import uniform
from tokenward.tokens.batches import Needs, TokenBatch


class _RankedLists(NamedTuple):
    """Lists of responses, or random subsets of them: response and list ``[m]`` of each member, number of lists."""

    response: Tensor
    group: Tensor
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class PlackettLuce:
    """Likelihood of the ranking under aggregated token rewards (TLM, arXiv 2306.00398, preference loss).

    ``-sum_k log(exp(e_k) / sum_{i >= k} exp(e_i))`` with ``e = C f(r_1 .. r_T)``, where ``f`` is the aggregate and ``C`` the
    mean length of the list's responses. The first argument of the call is the token rewards ``[n]``. If the batch has
    segments, ``f`` is over the mean rewards of segments and lengths count segments.

    Attributes:
        aggregate: ``average``, ``sum``, ``softmax``, ``softmin``, or ``"module:name"`` of a function ``f(rewards [n],
            weights [n], owner [n], count) -> [count]``.
        temperature: Temperature of ``softmax`` and ``softmin``; the paper's beta.
        scale_by_length: Multiply by C; never done for ``sum`` and custom functions.
        length_neutral: Use the log of the mean of exponentials instead of their sum. Otherwise ``softmax`` favours long
            responses and ``softmin`` short ones.
        ties: ``averaged`` over all orders of equal ranks, or one ``random`` order per call, as published.
        list_temperature: Divides ``e``.
        group_size: Use the mean over random lists of this many of the comparison's responses (or all of them if it has
            fewer) instead of the whole list. Lists of a single rank carry no information and are not counted.
        groups: Number of random lists per comparison and call.
    """

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
        check_positive(temperature=self.temperature, list_temperature=self.list_temperature)
        if self.length_neutral and self.aggregate not in SOFT:
            raise UserError(
                f"length_neutral has no effect with aggregate: {self.aggregate}. Leave it out, or write softmax or softmin.",
                code="conflicting-settings",
            )
        if self.group_size is not None and self.group_size < 2:
            raise UserError(f"group_size must be at least 2, got {self.group_size}.", code="out-of-range")
        check_positive(groups=self.groups)

    @property
    def needs(self) -> Needs:
        return Needs(draws=self.ties == "random" or self.group_size is not None)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        values, lengths = self._aggregated(logp, batch)
        whole = _RankedLists(
            torch.arange(batch.responses, device=logp.device), batch.comparison, batch.comparisons
        )
        if self.group_size is None:
            loss = self._losses(values, lengths, batch, whole)
        else:
            loss = self._mean_over_subsets(values, lengths, batch, self.group_size)
        longest = None if batch.sizes is None else batch.sizes.longest_list
        found = agreement(
            self._scaled(values.detach(), lengths, whole), batch.rank, *whole[1:], longest=longest
        )
        # A comparison of a single rank has no pair to order: it counts as chance.
        accuracy = torch.where(found.accuracy.isnan(), 0.5, found.accuracy)
        return Losses(loss, {"rank/accuracy": accuracy, "rank/top1": found.top, "rank/spread": found.spread})

    def _aggregated(self, rewards: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Each response's aggregate, before the factor C, and how many tokens it is over.  -> [r], [r]"""
        weights, owner = batch.weights, batch.response
        if batch.segment is not None:
            segments = int(batch.segment[-1]) + 1 if batch.sizes is None else batch.sizes.segments
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
                "with one number per response: f(rewards [n], weights [n], owner [n], count) -> [count].",
                code="wrong-result",
            )
        return values, segment_sum(weights, owner, batch.responses)

    def _scaled(self, values: Tensor, lengths: Tensor, lists: _RankedLists) -> Tensor:
        """``e`` of each list's members.  -> [m]"""
        values = values[lists.response]
        if not self.scale_by_length or self.aggregate not in SCALED:
            return values
        return values * group_mean_length(lengths[lists.response], lists.group, lists.groups)

    def _losses(self, values: Tensor, lengths: Tensor, batch: TokenBatch, lists: _RankedLists) -> Tensor:
        tie_break, sizes = None, batch.sizes
        if self.ties == "random":
            draw = torch.div(lists.group, batch.comparisons, rounding_mode="floor")
            noise = _noise(batch, lists.groups // max(batch.comparisons, 1), "ties")
            tie_break = noise[draw, lists.response]
        try:
            return plackett_luce(
                self._scaled(values, lengths, lists),
                batch.rank[lists.response],
                lists.group,
                lists.groups,
                temperature=self.list_temperature,
                tie_break=tie_break,
                longest=sizes.longest_list if sizes is not None and self.group_size is None else None,
                ties=sizes is None or sizes.ties,
            )
        except ValueError as error:
            raise UserError(
                f"ties: averaged is not possible for this comparison: {error}. Use ties: random, or a group_size of 12 or less.",
                code="too-many-ties",
            ) from error

    def _mean_over_subsets(self, values: Tensor, lengths: Tensor, batch: TokenBatch, size: int) -> Tensor:
        noise = _noise(batch, self.groups, "subsets")
        drawn = random_subsets(noise, batch.comparison, batch.comparisons, size)
        lists = _RankedLists(drawn.response, drawn.subset, self.groups * batch.comparisons)
        losses = self._losses(values, lengths, batch, lists)
        counts = ranks_differ(batch.rank[lists.response], lists.group, lists.groups)
        owner = torch.arange(batch.comparisons, device=counts.device).repeat(self.groups)
        number = segment_sum(counts.to(losses.dtype), owner, batch.comparisons)
        return segment_sum(torch.where(counts, losses, 0.0), owner, batch.comparisons) / number.clamp(min=1)


def _noise(batch: TokenBatch, draws: int, what: Literal["ties", "subsets"]) -> Tensor:
    """Random numbers in [0, 1) for several draws.  -> [draws r]

    In training they are hashed from the number of the step, the response and its place, so that they do not depend on how
    the step is cut into passes.
    """
    device = batch.rank.device
    step = batch.values.get(DRAW)
    if step is None:
        # The CPU generator is part of a checkpoint, and draws the same numbers for every device.
        return torch.rand(draws, batch.responses).to(device)
    seeds = step_seeds(batch.ids, batch.response, batch.responses) + position_in_group(batch.comparison)
    number = 2 * torch.arange(draws, device=device)[:, None] + (what == "ties")
    return uniform(
        seeds ^ (number * 0x2545F4914F6CDD1 + step[:1].to(torch.int64) * 0x9E3779B97F4A7C1)
    ).float()
