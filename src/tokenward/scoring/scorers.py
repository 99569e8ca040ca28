"""Scorers: from what is stored of a response to one number per token."""

import hashlib
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.scoring.store import TokenRecord


class Scorer(Protocol):
    """Anything that gives one number per response token.

    A scorer's class may name the stored values it ``reads``; stages that make other values are skipped.
    """

    def __call__(self, record: TokenRecord) -> Tensor:
        """Scores of one response's tokens, high where the token speaks for the response.  -> [n] float32"""
        ...


def _value(record: TokenRecord, name: str) -> Tensor:
    if name not in record.values:
        raise UserError(
            f"the store holds no {name} (it holds {', '.join(record.values)}), which this scorer needs. "
            "Score again with the model that gives it."
        )
    return record.value(name)


@dataclass(frozen=True, slots=True)
class LogRatio:
    """``log pi_oracle(y_t) - log pi_ref(y_t)``: the DPO oracle's implicit advantage of each token.

    arXiv 2408.13518, Theorem 1, after 2404.12358. It has no absolute scale: the oracle's beta
    multiplies every score and changes no ranking.
    """

    reads: ClassVar[tuple[str, ...]] = ("oracle_logp", "reference_logp")

    def __call__(self, record: TokenRecord) -> Tensor:
        """Scores in nats.  -> [n]"""
        return _value(record, "oracle_logp") - _value(record, "reference_logp")


@dataclass(frozen=True, slots=True)
class Surprisal:
    """``-log pi_ref(y_t)``: how unexpected the token was. A control: it knows nothing of the preference."""

    reads: ClassVar[tuple[str, ...]] = ("reference_logp",)

    def __call__(self, record: TokenRecord) -> Tensor:
        """Scores in nats.  -> [n]"""
        return -_value(record, "reference_logp")


@dataclass(frozen=True, slots=True)
class Random:
    """Uniform noise that depends on the seed and the response only. A control.

    Attributes:
        seed: Draws other noise.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    _: KW_ONLY
    seed: int = 0

    def __call__(self, record: TokenRecord) -> Tensor:
        """Scores in [0, 1).  -> [n]"""
        digest = hashlib.sha256(f"{self.seed}:{record.key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.rand(len(record.ids), generator=generator)


@dataclass(frozen=True, slots=True)
class Reward:
    """The reward that a token reward model gave, as it is stored."""

    reads: ClassVar[tuple[str, ...]] = ("reward",)

    def __call__(self, record: TokenRecord) -> Tensor:
        """Scores in the reward model's own unit.  -> [n]"""
        return _value(record, "reward")


SCORERS: dict[str, type] = {"log_ratio": LogRatio, "surprisal": Surprisal, "random": Random, "reward": Reward}
