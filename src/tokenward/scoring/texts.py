"""Score one's own text with a trained oracle, by the same path as in training."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

from tokenward.artifacts import read_manifest
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, context_length, load_model
from tokenward.scoring.logprobs import response_logprobs
from tokenward.scoring.scorers import LogRatio
from tokenward.scoring.store import TokenRecord
from tokenward.tokens.encode import Limits, encode_one, response_key
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.spans import token_spans
from tokenward.tokens.template import Template
from tokenward.types import Comparison, Message

NO_LIMIT = 10**9


class ScoredToken(NamedTuple):
    """One token of a response.

    Attributes:
        text: Its piece of the text; empty for the end-of-turn token.
        id: Its id.
        start: First byte in the response's UTF-8 text.
        end: Byte after the last one.
        score: ``oracle_logp - reference_logp``, nats; no absolute meaning, only the comparison counts.
        oracle_logp: Log-probability under the oracle.
        reference_logp: Log-probability under the reference.
    """

    text: str
    id: int
    start: int
    end: int
    score: float
    oracle_logp: float
    reference_logp: float


class ScoredResponse(NamedTuple):
    """A response with a score per token, its end-of-turn token included."""

    tokens: list[ScoredToken]

    @property
    def total(self) -> float:
        """Sum of the scores, nats: the response's implicit reward over beta."""
        return sum(token.score for token in self.tokens)


class TokenScorer:
    """A trained oracle and its reference, ready to score text.

    Args:
        oracle: The oracle.
        reference: The model that it was trained from.
        template: ``"chat"`` or ``"plain"``, as in its training.
        precision: ``"float32"`` or ``"bfloat16"``, as its run scored with.
    """

    def __init__(
        self,
        oracle: LanguageModel,
        reference: LanguageModel,
        template: str = "chat",
        precision: str = "float32",
    ) -> None:
        self.oracle, self.reference, self.precision = oracle, reference, precision
        self.template = Template(tokenizer=oracle.tokenizer, kind=template)  # type: ignore[arg-type]
        theirs = Template(tokenizer=reference.tokenizer, kind=template)  # type: ignore[arg-type]
        if self.template.fingerprint != theirs.fingerprint:
            raise UserError(
                f"oracle {oracle.name} and reference {reference.name} write the same text as other tokens, so their "
                "log-probabilities cannot be compared. Name the reference that the oracle was trained from."
            )

    @classmethod
    def load(cls, folder: str | Path, *, reference: str | None = None) -> Self:
        """Load an oracle from a run's stage folder, or from any model folder with its reference.

        Args:
            folder: ``runs/NAME/oracle``, or a model folder.
            reference: The model it was trained from; a stage folder knows it.

        Raises:
            UserError: no such folder, or the reference is not known.
        """
        folder = Path(folder)
        facts: dict[str, str] = {}
        if (folder / "manifest.json").is_file():
            facts = read_manifest(folder).facts
            reference = reference or facts.get("reference")
            folder = folder / "model"
        if reference is None:
            raise UserError(
                f"{folder} does not say which reference it was trained from. Name the oracle folder of a run "
                "(runs/NAME/oracle), or give --reference MODEL."
            )
        dtype, attention = facts.get("dtype", "float32"), facts.get("attention", "sdpa")
        oracle = load_model(str(folder), dtype=dtype, attention=attention)
        base = load_model(reference, dtype=dtype, attention=attention)
        return cls(oracle, base, facts.get("template", "chat"), facts.get("precision", "float32"))

    def __call__(self, prompt: str | Sequence[Message], response: str) -> ScoredResponse:
        """Score one response to a prompt (a text, or messages)."""
        return self.score_all([(prompt, response)])[0]

    def score_all(
        self, texts: Sequence[tuple[str | Sequence[Message], str]], *, tokens_per_batch: int = 8192
    ) -> list[ScoredResponse]:
        """Score many responses at once, in their order.

        Raises:
            UserError: a prompt or response is empty, or longer than the model's context.
        """
        rows = [self._row(number, *text) for number, text in enumerate(texts, start=1)]
        settings = {"precision": self.precision, "tokens_per_batch": tokens_per_batch}
        oracle = response_logprobs(self.oracle, rows, **settings)
        reference = response_logprobs(self.reference, rows, **settings)
        return [
            self._scored(row, mine[0].tolist(), theirs[0].tolist())
            for row, mine, theirs in zip(rows, oracle, reference, strict=True)
        ]

    def _row(self, number: int, prompt: str | Sequence[Message], response: str) -> TokenRow:
        messages: tuple[Message, ...]
        messages = (Message(role="user", content=prompt),) if isinstance(prompt, str) else tuple(prompt)
        if not response.strip() or not any(message["content"].strip() for message in messages):
            raise UserError(f"text {number}: prompt and response must not be empty.")
        comparison = Comparison(
            key="", prompt=messages, responses=(response,), ranks=(0,), source=f"text {number}"
        )
        limits = Limits(NO_LIMIT, NO_LIMIT, "error", context_length(self.oracle.name))
        encoded, reasons = encode_one(comparison, self.template, limits)
        if encoded is None:
            raise UserError(f"text {number} cannot be scored: {', '.join(reasons)}.")
        return TokenRow(encoded=encoded)

    def _scored(self, row: TokenRow, oracle: list[float], reference: list[float]) -> ScoredResponse:
        comparison, ids = row.encoded.comparison, row.encoded.responses[0]
        text = comparison.responses[0]
        spans = token_spans(self.template.tokenizer, text, len(ids))
        key = response_key(comparison.prompt, text)
        starts, ends = [span.start for span in spans], [span.end for span in spans]
        values = {"oracle_logp": oracle, "reference_logp": reference}
        scores = LogRatio()(TokenRecord(key, ids, starts, ends, values)).tolist()
        raw = text.encode()
        pieces = [raw[span.start : span.end].decode(errors="replace") for span in spans]
        return ScoredResponse(
            [
                ScoredToken(*item)
                for item in zip(pieces, ids, starts, ends, scores, oracle, reference, strict=True)
            ]
        )
