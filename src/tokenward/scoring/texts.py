"""Score one's own text with a trained oracle or reward, by the same path as in training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from torch import Tensor

from tokenward.artifacts import MANIFEST, read_manifest
from tokenward.data.conversations import DataReply, user
from tokenward.data.parsers import Answered
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.identity import positions_of
from tokenward.models.loading import load_model
from tokenward.models.reward import RewardModel, is_reward_folder, load_reward_model
from tokenward.scoring.reads import token_values
from tokenward.scoring.scorers import LogRatio, Reward, Scorer
from tokenward.scoring.store import TokenRecord
from tokenward.tokens.encode import Limits, encode_one
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.segments import place_in, spelled, with_segments
from tokenward.tokens.spans import ByteSpan
from tokenward.tokens.template import Style
from tokenward.types import Comparison, Message

NO_LIMIT = 10**9


class ScoredToken(NamedTuple):
    """One token of a response.

    Attributes:
        text: Its piece of the text; empty for the end-of-turn token.
        id: Its id.
        start: First byte in the response's UTF-8 text.
        end: Byte after the last one.
        score: Of an oracle ``oracle_logp - reference_logp``, nats: no absolute meaning, only the comparison counts.
            Of a reward model its reward.
        values: What the score was made from, by name: ``oracle_logp`` and ``reference_logp``, or ``reward``.
    """

    text: str
    id: int
    start: int
    end: int
    score: float
    values: dict[str, float]

    def flat(self) -> dict[str, Any]:
        """As one JSON object, the values beside the rest."""
        fields = self._asdict()
        return {**fields, **fields.pop("values")}


class ScoredResponse(NamedTuple):
    """A scored response.

    Attributes:
        tokens: Its tokens with their scores, including the end-of-turn token.
    """

    tokens: list[ScoredToken]

    @property
    def total(self) -> float:
        """Sum of the scores; of an oracle, nats: the response's implicit reward over beta."""
        return sum(token.score for token in self.tokens)


class TokenScorer:
    """A trained oracle with its reference, or a token reward model, ready to score text.

    Args:
        models: By the name of the value that each gives.
        scorer: From those values to a score.
        template: ``"chat"`` or ``"plain"``, or a style with variables for the chat template, as in training.
        precision: ``"float32"`` or ``"bfloat16"``, as the run scored with.
    """

    def __init__(
        self,
        models: Mapping[str, TokenModel],
        scorer: Scorer,
        template: Style | Literal["chat", "plain"] = "chat",
        precision: str = "float32",
    ) -> None:
        self.models, self.scorer, self.precision = dict(models), scorer, precision
        first, *others = self.models.values()
        self.template = first.template(template)
        for other in others:
            if other.template(template).fingerprint != self.template.fingerprint:
                raise UserError(
                    f"oracle {first.name} and reference {other.name} write the same text as other tokens, so their "
                    "log-probabilities cannot be compared. Name the reference that the oracle was trained from."
                )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        reference: str | None = None,
        template: Literal["chat", "plain"] | None = None,
    ) -> Self:
        """Load a scorer from a run's stage folder, or from any model folder.

        Args:
            folder: ``runs/NAME/oracle`` or ``runs/NAME/reward``, ``runs/NAME/online/reward``, or a model folder.
            reference: The model an oracle was trained from; a stage folder knows it, a reward needs none.
            template: How a prompt is written; None takes what the stage folder says, or ``chat``.

        Raises:
            UserError: no such folder, or an oracle's reference is not known.
        """
        folder = Path(folder)
        facts = _facts(folder)
        if (folder / MANIFEST).is_file():
            folder = folder / "model"
        settings = {"dtype": facts.get("dtype", "float32"), "attention": facts.get("attention", "sdpa")}
        style = Style.of_facts(facts)
        style = style if template is None else style._replace(kind=template)
        shared = (style, facts.get("precision", "float32"))
        if is_reward_folder(folder):
            return cls({"reward": load_reward_model(folder, **settings)}, Reward(), *shared)
        reference = reference or facts.get("reference")
        if reference is None:
            raise UserError(
                f"{folder} is no token reward model and does not say which reference it was trained from. Name the oracle or "
                "reward folder of a run (runs/NAME/oracle), or give --reference MODEL."
            )
        oracle, base = (load_model(name, **settings) for name in (str(folder), reference))
        return cls({"oracle_logp": oracle, "reference_logp": base}, LogRatio(), *shared)

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
        return self.score_rows([_as_row(*text) for text in texts], tokens_per_batch=tokens_per_batch)

    def score_rows(self, rows: Sequence[Answered], *, tokens_per_batch: int = 8192) -> list[ScoredResponse]:
        """So of rows that may have whole messages as a response, and tools.

        Raises:
            UserError: as :meth:`score_all`.
        """
        return self._score([self._row(number, row) for number, row in enumerate(rows, 1)], tokens_per_batch)

    def _score(self, rows: Sequence[TokenRow], tokens_per_batch: int) -> list[ScoredResponse]:
        values = {name: self._values(model, rows, tokens_per_batch) for name, model in self.models.items()}
        return [
            self._scored(row, {name: found[index] for name, found in values.items()})
            for index, row in enumerate(rows)
        ]

    def score_ids(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        tokens_per_batch: int = 8192,
    ) -> list[Tensor]:
        """Scores of tokens as they were sampled; encoding their text again might give others.  -> [len] each

        Args:
            prompts: Ids of each prompt.
            responses: Ids of each response.
            tokens_per_batch: Most tokens in one pass.

        Raises:
            UserError: an empty prompt or response.
        """
        rows = [self._row_of_ids(*both) for both in zip(prompts, responses, strict=True)]
        values = {name: self._values(model, rows, tokens_per_batch) for name, model in self.models.items()}
        places = [[0] * len(row.responses[0]) for row in rows]
        return [
            self.scorer(
                TokenRecord(
                    "", row.responses[0], places[index], places[index],
                    {name: found[index] for name, found in values.items()},
                )
            )
            for index, row in enumerate(rows)
        ]  # fmt: skip

    def _row_of_ids(self, prompt: Sequence[int], response: Sequence[int]) -> TokenRow:
        if not prompt or not response:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and a response of {len(response)} cannot be scored."
            )
        text = self.template.tokenizer.decode(list(response))
        comparison = Comparison(key="", prompt=(), responses=(str(text),), ranks=(0,), source="ids")
        return TokenRow(comparison, list(prompt), [list(response)], [1])

    def _values(
        self, model: TokenModel, rows: Sequence[TokenRow], tokens_per_batch: int
    ) -> list[list[float]]:
        if isinstance(model, RewardModel):
            rows = [with_segments(model.settings.unit, model.tokenizer, row) for row in rows]
        found = token_values(model, rows, precision=self.precision, tokens_per_batch=tokens_per_batch)
        return [responses[0].tolist() for responses in found]

    def _row(self, number: int, row: Answered) -> TokenRow:
        text, turns = row.response
        if not text.strip() or not any(message["content"].strip() for message in row.prompt):
            raise UserError(f"text {number}: prompt and response must not be empty.")
        comparison = Comparison(
            key="", prompt=row.prompt, responses=(text,), ranks=(0,), source=f"text {number}",
            turns=None if turns is None else (turns,), tools=row.tools,
        )  # fmt: skip
        limits = Limits(NO_LIMIT, NO_LIMIT, "error", self._context)
        encoded, reasons = encode_one(comparison, self.template, limits)
        if encoded is None:
            raise UserError(f"text {number} cannot be scored: {', '.join(reasons)}.")
        return encoded

    @property
    def _context(self) -> int | None:
        return positions_of(next(iter(self.models.values())).model.config)  # type: ignore[arg-type]  # loaded

    def _scored(self, row: TokenRow, values: dict[str, list[float]]) -> ScoredResponse:
        comparison, ids = row.comparison, row.responses[0]
        text, spans, own = spelled(self.template.tokenizer, row, 0)
        if not own:  # what the template writes before a reply is no part of the caller's text
            shift = len(text[: place_in(comparison.responses[0], text) or 0].encode())
            text = text.encode()[shift:].decode(errors="replace")
            spans = [ByteSpan(max(span.start - shift, 0), max(span.end - shift, 0)) for span in spans]
        (key,) = keys_of(comparison)
        starts, ends = [span.start for span in spans], [span.end for span in spans]
        scores = self.scorer(TokenRecord(key, ids, starts, ends, values)).tolist()
        raw = text.encode()
        return ScoredResponse(
            [
                ScoredToken(
                    text=raw[start:end].decode(errors="replace"),
                    id=token,
                    start=start,
                    end=end,
                    score=score,
                    values={name: value[index] for name, value in values.items()},
                )
                for index, (token, start, end, score) in enumerate(
                    zip(ids, starts, ends, scores, strict=True)
                )
            ]
        )


def _as_row(prompt: str | Sequence[Message], response: str) -> Answered:
    turns = user(prompt) if isinstance(prompt, str) else tuple(prompt)
    return Answered(turns, DataReply(response), ())


def _facts(folder: Path) -> dict[str, Any]:
    """What the stage says of how it scored; an online run's reward lies inside its stage's folder."""
    stage = next((place for place in (folder, folder.parent) if (place / MANIFEST).is_file()), None)
    if stage is None:
        return {}
    manifest = read_manifest(stage)
    tokens = manifest.settings.get("tokens", {})  # of a stage that says how it wrote, but not how it scored
    written = {name: tokens[name] for name in ("template", "chat_template_kwargs") if name in tokens}
    return {**written, **manifest.facts}
