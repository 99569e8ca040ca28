"""Scorers that are short formulas over stored values, and the scorer that reads spans from a file."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from tokenward.data import rows as read_rows
from tokenward.data.fields import FieldError, required
from tokenward.data.parsers import answered
from tokenward.errors import UserError
from tokenward.scoring.reads import Value
from tokenward.scoring.store import TokenRecord
from tokenward.tokens.rows import response_key
from tokenward.types import Span


def read_spans(path: str) -> Iterator[tuple[str, list[Span]]]:
    """The spans of each response in a file, with the response's key.

    Raises:
        UserError: there is no such file, or a row is not what it should be.
    """
    for where, row in read_rows(path):
        yield _spans_of(where, row)


def check_spans(path: str) -> None:
    """Read a file of spans to its end and keep nothing of it.

    Raises:
        UserError: as :func:`read_spans`, or it holds no row.
    """
    if not sum(1 for _ in read_spans(path)):
        raise UserError(
            f"{path} holds no row, so no token would have a score. Write a line for each response: "
            '{"prompt": "...", "response": "...", "spans": [[start, end, value]]}.'
        )


def _spans_of(where: str, row: Mapping[str, Any]) -> tuple[str, list[Span]]:
    try:
        found, given = answered(row), required(row, "spans")
        spans = [Span(int(start), int(end), float(value)) for start, end, value in given]
    except (TypeError, ValueError, FieldError) as error:
        raise UserError(
            f"{where}: {_wrong(error)}. Each row needs prompt (a text or messages), response (so too) and spans, a list of [start, end, "
            f"value] in characters; got {json.dumps(row, default=str)[:80]}."
        ) from error
    response = found.response.text
    for span in spans:
        if not 0 <= span.start <= span.end <= len(response) or not math.isfinite(span.value):
            raise UserError(
                f"{where}: the span {list(span)} does not lie in its response, which has {len(response)} characters, or its value is "
                "not finite. Write [start, end, value] in characters of the response, 0 the first."
            )
    return response_key(found.prompt, found.response.turns or response, found.tools), spans


def _wrong(error: Exception) -> str:
    return str(error) if isinstance(error, FieldError) else "its spans are not lists of three numbers"


class Record(Protocol):
    """What a scorer is given: a stored response, or, of a scorer that reads the policy, one in a training step."""

    @property
    def ids(self) -> Sequence[int]: ...

    def value(self, name: str) -> Tensor:
        """One named value of each token.  -> [n]"""
        ...


class Scorer(Protocol):
    """Anything that gives one number per response token.

    A scorer may name the values it ``reads``; stages that make other values are skipped. One that reads a value of the
    policy, such as ``policy_logp``, is called in the training step.
    """

    def __call__(self, record: TokenRecord) -> Tensor:
        """Scores of one response's tokens, high where the token speaks for the response.  -> [n] float32"""
        ...


@dataclass(frozen=True, slots=True)
class LogRatio:
    """``scale * (log pi_numerator(y_t) - log pi_denominator(y_t))``, of any two models.

    Of the oracle and the reference it is the DPO oracle's implicit advantage of each token (arXiv 2408.13518,
    Theorem 1, after 2404.12358). It has no absolute scale: the oracle's beta multiplies every score and changes no
    ranking.

    Attributes:
        numerator: ``policy``, ``reference``, ``oracle`` or an auxiliary model.
        denominator: Another one.
        scale: Such as the oracle's beta, where the scores are rewards.
    """

    _: KW_ONLY
    numerator: str = "oracle"
    denominator: str = "reference"
    scale: float = 1.0

    @property
    def reads(self) -> tuple[str, ...]:
        """Both log-probabilities."""
        return f"{self.numerator}_logp", f"{self.denominator}_logp"

    def __call__(self, record: Record) -> Tensor:
        """Scores in nats.  -> [n]"""
        above, below = (record.value(name) for name in self.reads)
        return self.scale * (above - below)


@dataclass(frozen=True, slots=True)
class LogProbability:
    """``sign * log pi(y_t)``.

    Attributes:
        of: Under which model.
        sign: -1 scores a token by how unexpected it is.
    """

    _: KW_ONLY
    of: str = "reference"
    sign: Literal[1, -1] = 1

    @property
    def reads(self) -> tuple[str, ...]:
        """The log-probability."""
        return (f"{self.of}_logp",)

    def __call__(self, record: Record) -> Tensor:
        """Scores in nats.  -> [n]"""
        return self.sign * record.value(self.reads[0])


@dataclass(frozen=True, slots=True)
class Surprisal:
    """``-log pi_ref(y_t)``: how unexpected the token was. A control: it knows nothing of the preference."""

    reads: ClassVar[tuple[str, ...]] = ("reference_logp",)

    def __call__(self, record: Record) -> Tensor:
        """Scores in nats.  -> [n]"""
        return LogProbability(sign=-1)(record)


@dataclass(frozen=True, slots=True)
class Probability:
    """``pi(y_t)``, in [0, 1]: ConfPO's confidence (arXiv 2506.08712) of the policy, XTF's novelty of the reference.

    Attributes:
        of: Under which model.
    """

    _: KW_ONLY
    of: str = "reference"

    @property
    def reads(self) -> tuple[str, ...]:
        """The log-probability."""
        return (f"{self.of}_logp",)

    def __call__(self, record: Record) -> Tensor:
        """Scores in [0, 1].  -> [n]"""
        return record.value(self.reads[0]).exp()


@dataclass(frozen=True, slots=True)
class ValueOf:
    """One kind of value of one model, as it is.

    Attributes:
        of: Which model's.
    """

    kind: ClassVar[str]

    _: KW_ONLY
    of: str = "reference"

    @property
    def reads(self) -> tuple[str, ...]:
        """That value."""
        return (f"{self.of}_{self.kind}",)

    def __call__(self, record: Record) -> Tensor:
        """Scores in the value's own unit.  -> [n]"""
        return record.value(self.reads[0])


@dataclass(frozen=True, slots=True)
class Entropy(ValueOf):
    """Entropy in nats of a model's distribution where each token was predicted.

    Attributes:
        of: Which model's.
    """

    kind: ClassVar[str] = "entropy"


@dataclass(frozen=True, slots=True)
class Rank(ValueOf):
    """How many tokens a model finds more probable than each one; 0 is the most probable.

    Attributes:
        of: Which model's.
    """

    kind: ClassVar[str] = "rank"


@dataclass(frozen=True, slots=True)
class Position:
    """A number that depends on the place in the response alone.

    Attributes:
        kind: ``decay``: ``rate ** (t + first)`` (D2PO, arXiv 2502.14340); ``step``: 1 for the first ``length`` tokens
            and ``rate`` after them (LD-DPO's length is the shorter response's: the step ``beyond_shorter``); ``linear``: from 1 at the
            first token down to ``rate`` at the last.
        rate: See ``kind``.
        first: Exponent of the first token; D2PO's code begins with 1.
        length: Tokens of ``step``.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    _: KW_ONLY
    kind: Literal["decay", "step", "linear"] = "decay"
    rate: float = 0.98
    first: int = 0
    length: int = 64

    def __call__(self, record: Record) -> Tensor:
        """Scores.  -> [n]"""
        count = len(record.ids)
        place = torch.arange(count, dtype=torch.float32)
        if self.kind == "decay":
            return self.rate ** (place + self.first)
        if self.kind == "step":
            return torch.where(place < self.length, 1.0, self.rate)
        return 1 - (1 - self.rate) * place / max(count - 1, 1)


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

    def __call__(self, record: Record) -> Tensor:
        """Scores in the reward model's own unit.  -> [n]"""
        return record.value("reward")


@dataclass(frozen=True, slots=True)
class Spans:
    """Values of the data's own spans: a token has that of the span it overlaps most, else 0."""

    reads: ClassVar[tuple[Value, ...]] = (Value("data", "spans"),)

    def __call__(self, record: Record) -> Tensor:
        """Scores in the data's unit.  -> [n]"""
        return record.value("data_spans")


@dataclass(frozen=True, slots=True)
class External:
    """Values of spans from a file of one's own, by any tokenizer or person: they are matched by characters.

    Attributes:
        file: JSON lines with ``prompt`` (a text or messages), ``response`` and ``spans``, a list of
            ``[start, end, value]`` in characters. A token has the value of the span it overlaps most, else 0;
            a response that the file lacks has no scores.
    """

    file: str

    def __post_init__(self) -> None:
        if not self.file:
            raise UserError(
                'scorer external needs a file. Write for example {name: external, file: "scores.jsonl"}.'
            )

    @property
    def reads(self) -> tuple[Value, ...]:
        """The file's values."""
        return (Value("data", "file", file=self.file),)

    def __call__(self, record: Record) -> Tensor:
        """Scores in the file's unit.  -> [n]"""
        return record.value(self.reads[0])
