"""Weights in proportion to scores: TLM's weighted likelihood as a selection."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops.ragged import segment_sum, weighted_sum
from tokenward.ops.transforms import Transform, likelihood_weights
from tokenward.scoring.steps import Scope
from tokenward.selection.base import EosSides, ScoredTokens, eligible


@dataclass(frozen=True, slots=True)
class SoftWeights:
    """Weigh every token by its score (TLM, arXiv 2306.00398, weights of the weighted likelihood).

    The weights of a response average 1 over its eligible tokens. A token without score gets weight 0.

    Attributes:
        transform: ``identity`` (the paper), for rewards greater than 0; ``exp`` of score / temperature, for any
            score; ``power``: the score to a power, for rewards greater than 0.
        temperature: Of ``exp``.
        power: Of ``power``.
        uniform: Share of equal weights mixed in, in [0, 1].
        spread: ``token``: each token its own weight. ``sequence``: every token of a response has the weight of the
            response's mean score, relative to the mean over all responses that are weighed together; the control
            that has no token-level credit, meant for ``weighted_likelihood`` with ``normaliser: length``.
        eos: Whose end-of-turn tokens are eligible.
    """

    _: KW_ONLY
    transform: Transform = "identity"
    temperature: float = 1.0
    power: float = 1.0
    uniform: float = 0.0
    spread: Literal["token", "sequence"] = "token"
    eos: EosSides = "both"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(
                f"temperature must be greater than 0, got {self.temperature}. Write for example 1.0."
            )
        if not 0 <= self.uniform <= 1:
            raise UserError(f"uniform must be in [0, 1], got {self.uniform}. Write 0 to mix nothing in.")

    @property
    def scope(self) -> Scope:
        """Proportions are those within one response, or, of whole responses, those within all that are weighed."""
        return "response" if self.spread == "token" else "dataset"

    def __call__(self, tokens: ScoredTokens) -> Tensor:
        """Weights of 0 or more.  -> [n]"""
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
                "write transform: exp with a temperature, or score with a reward model whose rewards are bounded above 0."
            )
        return likelihood_weights(
            values.float(),
            present,
            owner,
            count,
            transform=self.transform,
            temperature=self.temperature,
            power=self.power,
            uniform=self.uniform,
        )
