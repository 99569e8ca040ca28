"""The built-in scorers of one response, and the reader of files with spans."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from tokenward.data import rows as read_rows
from tokenward.data.fields import FieldError, required
from tokenward.data.parsers import answered
from tokenward.errors import UserError
from tokenward.plugins import check_positive, validated
from tokenward.scoring.reads import Value
from tokenward.tokens.rows import response_key
from tokenward.types import Span


class Record(Protocol):
    """One response as a scorer receives it.

    It comes from the score store, or from the training step if the scorer reads the policy. Records of the store also
    have ``start`` and ``end``, the bytes of each token in the response's text.

    Attributes:
        key: Stable name of the response.
        ids: Its token ids, including the end-of-turn token.
    """

    @property
    def key(self) -> str: ...

    @property
    def ids(self) -> Sequence[int]: ...

    def value(self, name: str) -> Tensor:
        """A value of each token by its name, such as ``oracle_logp``.  -> [n] float32, detached"""
        ...


class Scorer(Protocol):
    """Gives one number per response token.

    A scorer declares the values it uses in ``reads``, a tuple of names: ``reward``, or ``MODEL_KIND`` such as
    ``oracle_logp`` (see :data:`tokenward.scoring.reads.KINDS`). Only declared values are computed. The default is
    ``("oracle_logp", "reference_logp")``. A scorer that reads ``policy_logp``, ``policy_entropy`` or ``policy_rank`` is
    called in each training step. A scorer with ``additive = True`` says that its score of a longer token is the sum of the
    scores of its parts, so that the oracle may have another tokenizer than the policy.
    """

    def __call__(self, record: Record) -> Tensor:
        """Scores of one response: high for tokens that make the response better, NaN for no score.  -> [n] float32

        Args:
            record: The response and the values that ``reads`` names, ``n`` numbers each.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class LogRatio:
    """``scale * (log pi_numerator(y_t) - log pi_denominator(y_t))`` of any two models, in nats.

    For the oracle and the reference this is the DPO oracle's implicit advantage of each token (arXiv 2408.13518,
    Theorem 1, after 2404.12358). It has no absolute scale: the oracle's beta multiplies every score and changes no
    ranking.

    Attributes:
        numerator: ``policy``, ``reference``, ``oracle`` or an auxiliary model.
        denominator: The other model.
        scale: A factor, such as the oracle's beta to get rewards.
    """

    additive: ClassVar[bool] = True

    numerator: str = "oracle"
    denominator: str = "reference"
    scale: float = 1.0

    @property
    def reads(self) -> tuple[str, ...]:
        return f"{self.numerator}_logp", f"{self.denominator}_logp"

    def __call__(self, record: Record) -> Tensor:
        above, below = (record.value(name) for name in self.reads)
        return self.scale * (above - below)


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class ModelValue:
    """Base of the scorers that read one value of one model; by itself the score is that value.

    Attributes:
        of: The model: ``policy``, ``reference``, ``oracle`` or an auxiliary model.
    """

    kind: ClassVar[str]

    of: str = "reference"

    @property
    def reads(self) -> tuple[Value, ...]:
        return (Value(self.of, self.kind, **self.details()),)

    def details(self) -> dict[str, Any]:
        """Settings that the value depends on."""
        return {}

    def __call__(self, record: Record) -> Tensor:
        return record.value(self.reads[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbability(ModelValue):
    """``sign * log pi(y_t)``, in nats; a ``sign`` of -1 gives unexpected tokens a high score."""

    additive: ClassVar[bool] = True
    kind: ClassVar[str] = "logp"

    sign: Literal[1, -1] = 1

    def __call__(self, record: Record) -> Tensor:
        return self.sign * record.value(self.reads[0])


@dataclass(frozen=True, slots=True)
class Surprisal:
    """``-log pi_ref(y_t)``, in nats. A control: it knows nothing about the preference."""

    additive: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("reference_logp",)

    def __call__(self, record: Record) -> Tensor:
        return -record.value("reference_logp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probability(ModelValue):
    """``pi(y_t)``, in [0, 1]: ConfPO's confidence (arXiv 2506.08712) of the policy, XTF's novelty of the reference."""

    kind: ClassVar[str] = "logp"

    def __call__(self, record: Record) -> Tensor:
        return record.value(self.reads[0]).exp()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entropy(ModelValue):
    """Entropy of the distribution that predicts each token, in nats."""

    kind: ClassVar[str] = "entropy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank(ModelValue):
    """Number of tokens that the model finds more probable; 0 for the most probable token."""

    kind: ClassVar[str] = "rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(ModelValue):
    """Attention that each token receives in one layer, in [0, 1] (XTF, arXiv 2602.14536).

    It is the mean over the heads and over the positions that can see the token; ``layer: -1`` is the last. XTF's released
    code averages over the other axis, which gives ``1 / t`` everywhere. The values need eager attention, which holds
    ``heads x t x t`` numbers of a row, and one row per response: several times the cost of log-probabilities.
    """

    kind: ClassVar[str] = "attention"

    layer: int = -1

    def details(self) -> dict[str, Any]:
        return {"layer": self.layer}


@dataclass(frozen=True, slots=True)
@validated
class Similarity(ModelValue):
    """Cosine of each token's vector with the mean vector of a domain's words, in [-1, 1] (XTF's task relevance).

    Attributes:
        domain: The words.
        space: ``embedding``: the input embedding. ``alone``: the last hidden state of the token as the only input, as
            in XTF's released code.
    """

    kind: ClassVar[str] = "similarity"

    domain: tuple[str, ...]
    space: Literal["embedding", "alone"] = "embedding"

    def __post_init__(self) -> None:
        if not self.domain or not all(word.strip() for word in self.domain):
            raise UserError(
                f'similarity needs the words of a domain, got {list(self.domain)}. Write for example domain: ["+", "=", maths].',
                code="missing-setting",
            )

    def details(self) -> dict[str, Any]:
        return {"domain": list(self.domain), "space": self.space}


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation(ModelValue):
    """MaPO's mask (arXiv 2410.05102), in [0, 1]: mean activation of a frozen model where each token is predicted.

    The activations of MLPs, attention, layers and logits are averaged over their features, standardised over the
    response and scaled to [0, 1]; then averaged over the layers of each type, and over the types.
    """

    kind: ClassVar[str] = "activation"


@dataclass(frozen=True, slots=True)
@validated
class Counterfactual(ModelValue):
    """1 at critical tokens, whose replacement by another likely token leads to a wrong answer (CFT, arXiv 2510.10974).

    At each token of a response that the verifier accepts, the most probable other tokens are put in its place and
    continued greedily. If every continuation fails, the token is critical. In a greedy response these are the second and
    third most probable tokens. A response that is not accepted has no scores. The cost is ``candidates`` sampled
    responses per token of the data.

    Attributes:
        verifier: ``"module:name"`` of a function ``f(prompts, completions, **columns)`` that returns one number per
            completion, greater than 0 if it is correct. The column ``references`` holds the original response.
        candidates: Number of other tokens to try.
        max_new_tokens: Longest continuation.
    """

    kind: ClassVar[str] = "critical"

    verifier: str
    candidates: int = 2
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        check_positive(candidates=self.candidates, max_new_tokens=self.max_new_tokens)

    def details(self) -> dict[str, Any]:
        names = ("verifier", "candidates", "max_new_tokens")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Position:
    """A number that depends only on the position in the response.

    Attributes:
        kind: ``decay``: ``rate ** (t + first)`` (D2PO, arXiv 2502.14340). ``step``: 1 for the first ``length`` tokens,
            then ``rate``. ``linear``: from 1 at the first token to ``rate`` at the last. For LD-DPO, whose length is
            that of the shorter response, use the step ``beyond_shorter``.
        rate: See ``kind``.
        first: Exponent of the first token; D2PO's code starts with 1.
        length: Number of tokens of ``step``.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    kind: Literal["decay", "step", "linear"] = "decay"
    rate: float = 0.98
    first: int = 0
    length: int = 64

    def __call__(self, record: Record) -> Tensor:
        count = len(record.ids)
        place = torch.arange(count, dtype=torch.float32)
        if self.kind == "decay":
            return self.rate ** (place + self.first)
        if self.kind == "step":
            return torch.where(place < self.length, 1.0, self.rate)
        return 1 - (1 - self.rate) * place / max(count - 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Random:
    """Uniform noise in [0, 1) that depends only on ``seed`` and the response. A control."""

    reads: ClassVar[tuple[str, ...]] = ()

    seed: int = 0

    def __call__(self, record: Record) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}:{record.key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.rand(len(record.ids), generator=generator)


@dataclass(frozen=True, slots=True)
class Reward:
    """The reward of a token reward model, in the model's own unit."""

    additive: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ("reward",)

    def __call__(self, record: Record) -> Tensor:
        return record.value("reward")


@dataclass(frozen=True, slots=True)
class Spans:
    """Values of the spans in the data: each token gets the value of the span it overlaps most, else 0."""

    reads: ClassVar[tuple[Value, ...]] = (Value("data", "spans"),)

    def __call__(self, record: Record) -> Tensor:
        return record.value("data_spans")


@dataclass(frozen=True, slots=True)
@validated
class External:
    """Values of spans in a file, such as annotations; they are matched to tokens by characters, whatever the tokenizer is.

    Attributes:
        file: JSON lines with ``prompt`` (text or messages), ``response`` and ``spans``, a list of
            ``[start, end, value]`` in characters. Each token gets the value of the span it overlaps most, else 0. A
            response that is not in the file has no scores.
    """

    file: str

    @property
    def reads(self) -> tuple[Value, ...]:
        return (Value("data", "file", file=self.file),)

    def __call__(self, record: Record) -> Tensor:
        return record.value(self.reads[0])


def read_spans(path: str) -> Iterator[tuple[str, list[Span]]]:
    """Key and spans of each response in a file for the scorer ``external``.

    Raises:
        UserError: The file does not exist, or a row is malformed.
    """
    for where, row in read_rows(path):
        yield _read_row(where, row)


def check_spans(path: str) -> None:
    """Read a file of spans to its end to find mistakes; errors as in :func:`read_spans`, also if it has no rows."""
    if not sum(1 for _ in read_spans(path)):
        raise UserError(
            f"{path} has no rows, so no token would have a score. Write one line per response: "
            '{"prompt": "...", "response": "...", "spans": [[start, end, value]]}.',
            code="no-rows",
        )


def _read_row(where: str, row: Mapping[str, Any]) -> tuple[str, list[Span]]:
    try:
        found, given = answered(row), required(row, "spans")
        spans = [Span(int(start), int(end), float(value)) for start, end, value in given]
    except (TypeError, ValueError, FieldError) as error:
        problem = str(error) if isinstance(error, FieldError) else "its spans are not lists of three numbers"
        raise UserError(
            f"{where}: {problem}. Each row needs prompt and response (text or messages) and spans, a list of [start, end, "
            f"value] in characters; got {json.dumps(row, default=str)[:80]}.",
            code="bad-row",
        ) from error
    response = found.response.text
    for span in spans:
        if not 0 <= span.start <= span.end <= len(response) or not math.isfinite(span.value):
            raise UserError(
                f"{where}: the span {list(span)} lies outside its response of {len(response)} characters, or its value is "
                "not finite. Write [start, end, value] in characters of the response, counted from 0.",
                code="invalid-span",
            )
    return response_key(found.prompt, found.response.turns or response, found.tools), spans
