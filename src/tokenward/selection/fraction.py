"""Keep a share of each side's tokens by score: SePO's selection, with its knobs and controls."""

from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops.ragged import position_in_group
from tokenward.ops.selection import CountRule, top_fraction
from tokenward.ops.transforms import At
from tokenward.scoring.steps import Chain, Owners, Scope, by_side
from tokenward.selection.base import EosSides, ScoredTokens, eligible

Direction = Literal["top", "bottom", "magnitude", "random"]


@dataclass(frozen=True, slots=True)
class SideRule:
    """What to keep of one side.

    Attributes:
        fraction: Share of the eligible tokens, in (0, 1].
        direction: ``top`` or ``bottom`` by score, ``magnitude`` by its absolute value, ``random`` as a control;
            None is the side's usual one, top for the preferred side and bottom for the other.
    """

    _: KW_ONLY
    fraction: float = 0.3
    direction: Direction | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(
                f"fraction must be in (0, 1], got {self.fraction}. Write 0.3 to keep 30 % of the tokens; to train on "
                "every token write selection: {name: all}."
            )


@dataclass(frozen=True, slots=True)
class TopFraction:
    """SePO's selection (arXiv 2408.13518, section 3): the best of the chosen, the worst of the rejected.

    ``TopFraction(0.3)`` keeps the 30 % of the chosen tokens that score highest and the 30 % of the rejected that score
    lowest.

    Attributes:
        fraction: Share of both sides, in (0, 1]; None leaves it to the rules of the sides.
        chosen: Rule of the preferred response.
        rejected: Rule of the other responses.
        scope: Among which tokens the share is taken: those of one ``response`` (the paper), one
            ``comparison``'s side, the side of a ``batch`` or of the whole ``dataset``.
        count: Rounding of fraction x tokens, exact; ``float`` is the published code's ``int(k * n)``.
        minimum: At least so many tokens of each group.
        first_token: Whether a response's first token is eligible.
        eos: Whose end-of-turn tokens are eligible.
        ties: ``earliest`` token first, or ``random`` by seed.
        seed: For random directions and ties.
        profile: ``official`` does as the published code: the first token is neither counted nor kept, the
            count is ``int(k * n)`` in floating point, and it may be 0.
    """

    fraction: float | None = None
    _: KW_ONLY
    chosen: SideRule = SideRule()
    rejected: SideRule = SideRule()
    scope: Scope = "response"
    count: CountRule = "floor"
    minimum: int = 1
    first_token: bool = True
    eos: EosSides = "both"
    ties: Literal["earliest", "random"] = "earliest"
    seed: int = 0
    profile: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None:
            self._share_out(SideRule(fraction=self.fraction))
        fixed = (self.count, self.minimum, self.first_token, self.eos, self.ties)
        if self.profile == "official" and fixed != ("floor", 1, True, "both", "earliest"):
            raise UserError(
                "profile: official fixes count, minimum, first_token, ends and ties as the published code has them. Leave them "
                "out, or leave the profile out."
            )

    def _share_out(self, rule: SideRule) -> None:
        """Give both sides one rule."""
        if {self.chosen, self.rejected} - {SideRule(), rule}:
            raise UserError(
                f"top_fraction has the fraction {self.fraction} for both sides and a rule for one of them. Give either the fraction, "
                "or chosen and rejected."
            )
        for side in ("chosen", "rejected"):
            object.__setattr__(self, side, rule)  # frozen

    def __call__(self, tokens: ScoredTokens) -> Tensor:
        """Weights 1 at kept tokens, 0 elsewhere.  -> [n]"""
        if self.profile == "official":
            rules = replace(
                self, profile=None, count="float", minimum=0, first_token=False, eos="both", ties="earliest"
            )
            return rules(tokens)
        preferred = (tokens.rank == 0)[tokens.response]
        counted = eligible(tokens, self.eos)
        if not self.first_token:
            counted &= position_in_group(tokens.response) > 0
        kept = torch.zeros_like(preferred)
        kept |= self._side(self.chosen, preferred & counted, "top", tokens)
        kept |= self._side(self.rejected, ~preferred & counted, "bottom", tokens)
        return kept.to(torch.float32)

    def _side(self, rule: SideRule, counted: Tensor, usual: Direction, tokens: ScoredTokens) -> Tensor:
        directed = self._directed(tokens, rule.direction or usual)
        return self._top(torch.where(counted, directed, torch.nan), tokens, rule.fraction)

    def _top(self, scores: Tensor, tokens: ScoredTokens, fraction: float) -> Tensor:
        group, groups = _owners(tokens).groups(self.scope)
        if self.ties == "earliest":
            return top_fraction(scores, group, groups, fraction, rule=self.count, minimum=self.minimum)
        order = torch.argsort(stable_noise(tokens, self.seed + 1))
        kept = torch.empty_like(order, dtype=torch.bool)
        kept[order] = top_fraction(
            scores[order], group[order], groups, fraction, rule=self.count, minimum=self.minimum
        )
        return kept

    def _directed(self, tokens: ScoredTokens, direction: Direction) -> Tensor:
        if direction == "random":
            return stable_noise(tokens, self.seed)
        return {"top": tokens.scores, "bottom": -tokens.scores, "magnitude": tokens.scores.abs()}[direction]


def _owners(tokens: ScoredTokens) -> Owners:
    return Owners(tokens.response, tokens.comparison[tokens.response])


def stable_noise(tokens: ScoredTokens, seed: int) -> Tensor:
    """A number per token in [0, 1) that depends on the seed, the response and the place in it, and on nothing else.

    So a random selection is the same whatever the order or the number of the other responses.
    """
    place = position_in_group(tokens.response)
    offset = (seed * 0x2545F4914F6CDD1D + 2**63) % 2**64 - 2**63  # wrapped to 64 bits, as a tensor would
    return uniform(tokens.seeds[tokens.response] ^ (place * 0x9E3779B97F4A7C1 + offset))


def uniform(state: Tensor) -> Tensor:
    """A number in [0, 1) of each whole number, as if it were drawn.  [...] int64 -> [...] float64"""
    for shift, factor in ((33, 0x2127599BF4325C37), (29, 0x100000001B3), (32, 0x5851F42D4C957F2D)):
        state = (state ^ (state >> shift)) * factor  # wraps around, as hashing wants
    return (state >> 11 & (2**52 - 1)).double() / 2**52


@dataclass(frozen=True, slots=True)
class Threshold:
    """Keep the preferred tokens that score high and the others that score low, by a number or by what the scores say.

    Attributes:
        above: With ``at: value``, preferred side: keep where ``score > above``.
        below: With ``at: value``, rejected side: keep where ``score < below``; ``-above`` where it is not given.
        at: ``value``; or ``mean``, ``median``, ``quantile`` or ``otsu`` of a side's scores: its preferred tokens are
            kept at or above it, its rejected ones below.
        quantile: Of the preferred side, for ``at: quantile``; of the rejected side it is 1 less this.
        scope: Among which tokens of a side ``at`` is taken.
        eos: Whose end-of-turn tokens are eligible.
    """

    _: KW_ONLY
    above: float = 0.0
    below: float | None = None
    at: At = "value"
    quantile: float = 0.5
    scope: Scope = "response"
    eos: EosSides = "both"

    def __post_init__(self) -> None:
        if self.at == "iqr":
            raise UserError(
                "at: iqr finds outliers of one kind, and this selector keeps opposite ends of the two sides. Write selection: "
                "{name: transform, steps: [{threshold: {at: iqr, keep: above}}]}."
            )
        if self.at != "value" and (self.above, self.below) != (0.0, None):
            raise UserError(
                f"above and below belong to at: value, got at: {self.at}. Leave one of the two out."
            )

    def __call__(self, tokens: ScoredTokens) -> Tensor:
        """Weights 1 at kept tokens, 0 elsewhere; a response may keep nothing.  -> [n]"""
        counted, preferred = eligible(tokens, self.eos), (tokens.rank == 0)[tokens.response]
        if self.at == "value":
            below = -self.above if self.below is None else self.below
            passes = torch.where(preferred, tokens.scores > self.above, tokens.scores < below)
            return (passes & counted).to(torch.float32)
        scores = torch.where(counted, tokens.scores.float(), torch.nan)
        sides = (self._cut("above", self.quantile), self._cut("below", 1 - self.quantile))
        return by_side(sides, scores, _owners(tokens), preferred).nan_to_num(0.0)

    def _cut(self, keep: str, quantile: float) -> Chain:
        value = {"value": quantile} if self.at == "quantile" else {}
        return Chain.of([{"threshold": {"at": self.at, "keep": keep, "scope": self.scope, **value}}])


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Every token with weight 1: the control that turns SePO into SimPO."""

    @property
    def scope(self) -> Scope:
        """A token's weight depends on nothing."""
        return "response"

    def __call__(self, tokens: ScoredTokens) -> Tensor:
        """Weights 1.  -> [n]"""
        return torch.ones_like(tokens.scores, dtype=torch.float32)
