"""The built-in selectors: from scores to a weight per token."""

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops import transforms
from tokenward.ops.ragged import position_in_group, segment_sum, weighted_sum
from tokenward.ops.selection import CountRule, top_fraction
from tokenward.plugins import check_fraction, check_positive, validated
from tokenward.scoring.steps import Chain, Scope, Written, by_side, widest
from tokenward.selection.base import EosSides, ScoredTokens, eligible

Direction = Literal["top", "bottom", "magnitude", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class SideRule:
    """Which tokens :class:`TopFraction` keeps on one side.

    Attributes:
        fraction: Fraction of the eligible tokens, in (0, 1].
        direction: ``top`` or ``bottom`` by score, ``magnitude`` by absolute score, or ``random`` as a control. The default
            is ``top`` for the preferred side and ``bottom`` for the other.
    """

    fraction: float = 0.3
    direction: Direction | None = None

    def __post_init__(self) -> None:
        check_fraction("fraction", self.fraction)


@dataclass(frozen=True, slots=True)
@validated
class TopFraction:
    """Keeps the best tokens of the chosen and the worst of the rejected response (SePO, arXiv 2408.13518, section 3).

    ``TopFraction(0.3)`` keeps the 30 % of the chosen tokens with the highest scores and the 30 % of the rejected tokens with
    the lowest.

    Attributes:
        fraction: Fraction of both sides, in (0, 1]; None leaves it to ``chosen`` and ``rejected``.
        chosen: Rule of the preferred response.
        rejected: Rule of the other responses.
        scope: Which tokens the fraction refers to: those of one ``response`` (the paper), of one side of a
            ``comparison``, of a ``batch`` or of the whole ``dataset``.
        count: Rounding of fraction x tokens, computed exactly; ``float`` is the published code's ``int(k * n)``.
        minimum: Lowest number of tokens kept in each group.
        first_token: Whether the first token of a response is eligible.
        eos: Sides whose end-of-turn tokens are eligible. ``always`` selects those of chosen responses beside the fraction, and
            none of rejected ones, so that training does not teach replies to go on.
        ties: ``earliest`` token first, or ``random`` by seed.
        seed: Seed of random directions and ties.
        profile: ``official`` reproduces the published code: the first token is neither counted nor kept, and the count is
            ``int(k * n)`` in floating point, which may be 0.
    """

    fraction: float | None = None
    _: KW_ONLY
    chosen: SideRule = SideRule()
    rejected: SideRule = SideRule()
    scope: Scope = "response"
    count: CountRule = "floor"
    minimum: int = 1
    first_token: bool = True
    eos: Literal["both", "chosen", "rejected", "none", "always"] = "both"
    ties: Literal["earliest", "random"] = "earliest"
    seed: int = 0
    profile: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None:
            rule = SideRule(fraction=self.fraction)
            if {self.chosen, self.rejected} - {SideRule(), rule}:
                raise UserError(
                    f"top_fraction has the fraction {self.fraction} for both sides and a rule for one of them. Give either fraction, "
                    "or chosen and rejected.",
                    code="conflicting-settings",
                )
            for side in ("chosen", "rejected"):
                object.__setattr__(self, side, rule)  # frozen
        fixed = (self.count, self.minimum, self.first_token, self.eos, self.ties)
        if self.profile == "official" and fixed != ("floor", 1, True, "both", "earliest"):
            raise UserError(
                "profile: official fixes count, minimum, first_token, eos and ties as in the published code. Leave them "
                "out, or leave the profile out.",
                code="conflicting-settings",
            )

    def __call__(self, tokens: ScoredTokens) -> Tensor:
        if self.profile == "official":
            rules = replace(
                self, profile=None, count="float", minimum=0, first_token=False, eos="both", ties="earliest"
            )
            return rules(tokens)
        counted = eligible(tokens, "none" if self.eos == "always" else self.eos)
        if not self.first_token:
            counted &= position_in_group(tokens.response) > 0
        kept = self._side(self.chosen, tokens.preferred & counted, "top", tokens)
        kept |= self._side(self.rejected, ~tokens.preferred & counted, "bottom", tokens)
        if self.eos == "always":
            kept |= tokens.preferred & tokens.eos & ~tokens.scores.isnan()
        return kept.to(torch.float32)

    def _side(self, rule: SideRule, counted: Tensor, usual: Direction, tokens: ScoredTokens) -> Tensor:
        """Which tokens of one side are kept.  -> [n] bool"""
        scores = torch.where(counted, self._directed(tokens, rule.direction or usual), torch.nan)
        group, groups = tokens.owners.groups(self.scope)
        if self.ties == "earliest":
            return top_fraction(scores, group, groups, rule.fraction, rule=self.count, minimum=self.minimum)
        # The earliest of a random order wins a tie.
        order = torch.argsort(stable_noise(tokens, self.seed + 1))
        kept = torch.empty_like(order, dtype=torch.bool)
        kept[order] = top_fraction(
            scores[order], group[order], groups, rule.fraction, rule=self.count, minimum=self.minimum
        )
        return kept

    def _directed(self, tokens: ScoredTokens, direction: Direction) -> Tensor:
        if direction == "random":
            return stable_noise(tokens, self.seed)
        return {"top": tokens.scores, "bottom": -tokens.scores, "magnitude": tokens.scores.abs()}[direction]


def stable_noise(tokens: ScoredTokens, seed: int) -> Tensor:
    """A number in [0, 1) per token that depends only on the seed, the response and the position in it.  -> [n]

    A random selection is thus the same whatever the order and number of the other responses.
    """
    place = position_in_group(tokens.response)
    offset = (seed * 0x2545F4914F6CDD1D + 2**63) % 2**64 - 2**63  # wraps to 64 bits, as a tensor would
    return uniform(tokens.seeds[tokens.response] ^ (place * 0x9E3779B97F4A7C1 + offset))


def uniform(state: Tensor) -> Tensor:
    """Hash whole numbers to numbers in [0, 1).  [...] int64 -> [...] float64"""
    for shift, factor in ((33, 0x2127599BF4325C37), (29, 0x100000001B3), (32, 0x5851F42D4C957F2D)):
        state = (state ^ (state >> shift)) * factor  # overflow wraps around, as hashing wants
    return (state >> 11 & (2**52 - 1)).double() / 2**52


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Threshold:
    """Keeps the preferred tokens with high scores and the rejected tokens with low ones; a response may keep none.

    Attributes:
        above: For ``at: value``: preferred tokens with ``score > above`` are kept.
        below: For ``at: value``: rejected tokens with ``score < below`` are kept; the default is ``-above``.
        at: ``value``; or ``mean``, ``median``, ``quantile`` or ``otsu`` of each side's scores: preferred tokens at or above
            it are kept, and rejected ones below it.
        quantile: For ``at: quantile``: the quantile of the preferred side; that of the rejected side is 1 minus this.
        scope: Which tokens of a side ``at`` is computed from.
        eos: Sides whose end-of-turn tokens are eligible.
    """

    above: float = 0.0
    below: float | None = None
    at: transforms.At = "value"
    quantile: float = 0.5
    scope: Scope = "response"
    eos: EosSides = "both"

    def __post_init__(self) -> None:
        if self.at == "iqr":
            raise UserError(
                "at: iqr finds outliers of one kind, but this selector keeps opposite ends of the two sides. Use the selector "
                "transform with steps: [{threshold: {at: iqr, keep: above}}].",
                code="invalid-value",
            )
        if self.at != "value" and (self.above, self.below) != (0.0, None):
            raise UserError(
                f"above and below are for at: value, got at: {self.at}. Leave one of the two out.",
                code="conflicting-settings",
            )

    def __call__(self, tokens: ScoredTokens) -> Tensor:
        counted = eligible(tokens, self.eos)
        if self.at == "value":
            below = -self.above if self.below is None else self.below
            passes = torch.where(tokens.preferred, tokens.scores > self.above, tokens.scores < below)
            return (passes & counted).to(torch.float32)
        scores = torch.where(counted, tokens.scores.float(), torch.nan)
        sides = (self._cut("above", self.quantile), self._cut("below", 1 - self.quantile))
        return by_side(sides, scores, tokens.owners, tokens.preferred).nan_to_num(0.0)

    def _cut(self, keep: str, quantile: float) -> Chain:
        value = {"value": quantile} if self.at == "quantile" else {}
        return Chain.of([{"threshold": {"at": self.at, "keep": keep, "scope": self.scope, **value}}])


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class SoftWeights:
    """Weights in proportion to the scores (TLM, arXiv 2306.00398, weighted likelihood).

    The weights of a response average 1 over its eligible tokens. A token without a score has weight 0.

    Attributes:
        transform: ``identity`` (the paper), for positive scores; ``power``: the score to a power, for positive scores;
            ``exp``: ``exp(score / temperature)``, for any score.
        temperature: Temperature of ``exp``.
        power: Exponent of ``power``.
        uniform: Share of equal weights mixed in, in [0, 1].
        spread: ``token``: each token has its own weight. ``sequence``: all tokens of a response share the weight of its
            mean score, relative to the mean over all responses. This is a control without token-level credit, for
            ``weighted_likelihood`` with ``normaliser: length``.
        eos: Sides whose end-of-turn tokens are eligible.
    """

    transform: transforms.Transform = "identity"
    temperature: float = 1.0
    power: float = 1.0
    uniform: float = 0.0
    spread: Literal["token", "sequence"] = "token"
    eos: EosSides = "both"

    def __post_init__(self) -> None:
        check_positive(temperature=self.temperature)
        if not 0 <= self.uniform <= 1:
            raise UserError(f"uniform must be in [0, 1], got {self.uniform}.", code="out-of-range")

    @property
    def scope(self) -> Scope:
        return "response" if self.spread == "token" else "dataset"

    def __call__(self, tokens: ScoredTokens) -> Tensor:
        counted = eligible(tokens, self.eos).to(torch.float32)
        responses = len(tokens.rank)
        number = segment_sum(counted, tokens.response, responses)
        if self.spread == "token":
            shares = self._shares(tokens.scores, counted, tokens.response, responses)
            return shares * number[tokens.response]
        means = weighted_sum(tokens.scores.float(), counted, tokens.response, responses) / number.clamp(min=1)
        some = (number > 0).to(torch.float32)
        relative = self._shares(means, some, torch.zeros_like(tokens.rank), 1) * some.sum()
        return relative[tokens.response] * counted

    def _shares(self, values: Tensor, present: Tensor, owner: Tensor, count: int) -> Tensor:
        lowest = torch.where(present != 0, values, torch.inf).min() if len(values) else torch.inf
        if self.transform != "exp" and lowest <= 0:
            raise UserError(
                f"transform: {self.transform} needs scores greater than 0, got {float(lowest):.4g}. A log-ratio has both signs: "
                "use transform: exp with a temperature, or a reward model whose rewards are bounded above 0.",
                code="nonpositive-scores",
            )
        settings = {"temperature": self.temperature, "power": self.power, "uniform": self.uniform}
        return transforms.likelihood_weights(
            values.float(), present, owner, count, transform=self.transform, **settings
        )


@dataclass(frozen=True)
@validated
class Transform:
    """Applies a chain of steps to the scores to get weights, separately for each side.

    A token without a score, or that is not eligible, is left out of every statistic and has weight 0.

    Attributes:
        steps: Steps of both sides; see :data:`tokenward.scoring.steps.STEPS`.
        chosen: Steps of the preferred response instead.
        rejected: Steps of the other responses instead.
        eos: Sides whose end-of-turn tokens are eligible.
        signed: Allows negative weights.
    """

    _: KW_ONLY
    steps: tuple[Written, ...] = ()
    chosen: tuple[Written, ...] | None = None
    rejected: tuple[Written, ...] | None = None
    eos: EosSides = "both"
    signed: bool = False

    def __post_init__(self) -> None:
        # The properties build the steps, so that mistakes in them show before the first batch.
        unit, scope = self.unit, self.scope
        if unit and scope == "batch":
            raise UserError(
                f"segment_pool over {unit} cannot be combined with a step of scope batch: batches do not know their segments. "
                "Use another scope.",
                code="conflicting-settings",
            )

    @cached_property
    def _chains(self) -> tuple[Chain, Chain]:
        chosen, rejected = (self.steps if side is None else side for side in (self.chosen, self.rejected))
        return Chain.of(chosen), Chain.of(rejected)

    @property
    def scope(self) -> Scope:
        return widest(chain.scope for chain in self._chains)

    @property
    def unit(self) -> str:
        chosen, rejected = self._chains
        return Chain(chosen.steps + rejected.steps, chosen.names + rejected.names).unit

    def __call__(self, tokens: ScoredTokens) -> Tensor:
        scores = torch.where(eligible(tokens, self.eos), tokens.scores.float(), torch.nan)
        weights = by_side(self._chains, scores, tokens.owners, tokens.preferred)
        return torch.where(weights.isnan(), 0.0, weights)


@dataclass(frozen=True, slots=True)
class KeepAll:
    """Weight 1 for every token: the control that turns SePO into SimPO."""

    def __call__(self, tokens: ScoredTokens) -> Tensor:
        return torch.ones_like(tokens.scores, dtype=torch.float32)
