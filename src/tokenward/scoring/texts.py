"""Score any text with a trained oracle or token reward model, exactly as in training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from tokenward.artifacts import MANIFEST, read_json, read_manifest, user_path, write_json
from tokenward.data.conversations import DataReply, user
from tokenward.data.parsers import Answered
from tokenward.errors import UserError
from tokenward.models.attention import PLAIN_NAMES
from tokenward.models.base import TokenModel
from tokenward.models.identity import check_places, is_model_folder, is_place, positions_of
from tokenward.models.loading import (
    DTYPES,
    OWN,
    LanguageModel,
    absolute_name,
    load_model,
    prepare_model,
    weights_digest,
)
from tokenward.models.probe import Packing
from tokenward.models.reward import RewardModel, is_reward_folder, load_reward_model
from tokenward.plugins import check_argument, described
from tokenward.scoring.reads import token_values
from tokenward.scoring.scorers import LogRatio, Reward, Scorer
from tokenward.scoring.store import TokenRecord
from tokenward.tokens.encode import Limits, encode_one
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.segments import place_in, spelled, with_segments
from tokenward.tokens.spans import ByteSpan
from tokenward.tokens.template import Style
from tokenward.types import Comparison, Message, Precision

_NO_LIMIT = 10**9

SCORER_FILE = "token_scorer.json"
"""File in the folder of a trained oracle or reward: its reference, and how it encodes and scores."""


class ScoredToken(NamedTuple):
    """One token of a response.

    Attributes:
        text: Its piece of the text; empty for the end-of-turn token.
        id: Its id.
        start: Its first byte in the response's UTF-8 text.
        end: The byte after its last one.
        score: For an oracle ``oracle_logp - reference_logp`` in nats, which is only meaningful in comparison to other
            tokens; for a reward model the reward.
        values: The values behind the score by name: ``oracle_logp`` and ``reference_logp``, or ``reward``.
    """

    text: str
    id: int
    start: int
    end: int
    score: float
    values: dict[str, float]

    def flat(self) -> dict[str, Any]:
        """The fields in one dict, with the values next to the others."""
        fields = self._asdict()
        return {**fields, **fields.pop("values")}


class ScoredResponse(NamedTuple):
    """The scored tokens of a response.

    Attributes:
        tokens: The tokens with their scores, including the end-of-turn token.
    """

    tokens: list[ScoredToken]

    @property
    def total(self) -> float:
        """Sum of the scores; for an oracle the response's implicit reward over beta, in nats."""
        return sum(token.score for token in self.tokens)


class TokenScorer:
    """A trained oracle with its reference, or a token reward model, that scores text.

    Args:
        models: The models by the name of the value that each gives, such as ``oracle_logp``.
        scorer: Computes scores from these values.
        template: ``"chat"``, ``"plain"`` or a style with variables for the chat template, as in training.
        precision: ``"float32"`` or ``"bfloat16"``, as in training.

    Raises:
        UserError: The models encode the same text differently.
    """

    def __init__(
        self,
        models: Mapping[str, TokenModel],
        scorer: Scorer,
        template: Style | Literal["chat", "plain"] = "chat",
        precision: Precision = "float32",
    ) -> None:
        check_argument("precision", precision, Precision)
        self.models, self.scorer, self.precision = dict(models), scorer, precision
        first, *others = self.models.values()
        self.template = first.template(template)
        for other in others:
            if other.template(template).fingerprint != self.template.fingerprint:
                raise UserError(
                    f"oracle {first.name} and reference {other.name} encode the same text as different tokens, so their "
                    "log-probabilities cannot be compared. Use the reference that the oracle was trained from.",
                    code="tokenizer-mismatch",
                )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        reference: str | Path | PreTrainedModel | PeftModel | LanguageModel | None = None,
        template: Literal["chat", "plain"] | None = None,
        device: str = "auto",
    ) -> Self:
        """Load a scorer from the folder of an oracle or reward: of a run's stage, of training, or of a model.

        Args:
            folder: ``runs/NAME/oracle``, ``runs/NAME/reward``, ``runs/NAME/online/reward``, the ``output_dir`` of
                ``train_oracle`` or ``train_reward``, or a model folder.
            reference: The model an oracle was trained from: loaded, or a folder or hub name. A stage folder and
                ``train_oracle`` name it, and a reward model has none.
            template: How prompts are written; by default as the folder says, else ``chat``.
            device: Where the models are; ``auto`` is a GPU if there is one.

        Raises:
            UserError: The folder does not exist, or the reference of an oracle is unknown or has other weights now.
        """
        check_places(folder=folder, reference=reference)
        facts, folder = _stage_facts(user_path(folder)), Path(model_of(folder))
        names = {"dtype": "float32", "attention": "auto", "packing": "auto"}
        settings: dict[str, Any] = {name: facts.get(name, default) for name, default in names.items()}
        settings["device"] = device
        style = Style.of_facts(facts)
        style = style if template is None else style._replace(kind=template)
        shared = (style, facts.get("precision", "float32"))
        if settings["dtype"] not in (*DTYPES, OWN):
            raise UserError(
                f"the oracle in {folder} was trained in {settings['dtype']}, which cannot be loaded. Train it in float32 or bfloat16.",
                code="unsupported-dtype",
            )
        if is_reward_folder(folder):
            return cls({"reward": load_reward_model(folder, **settings)}, Reward(), *shared)
        reference = reference or facts.get("reference")
        if reference is None:
            raise UserError(
                f"{folder} is not a token reward model and does not name the reference it was trained from. Pass reference to "
                "TokenScorer.load, or use the oracle or reward folder of a run.",
                code="missing-reference",
            )
        oracle = load_model(str(folder), **settings)
        base = _reference(reference, oracle, facts.get("reference_weights"), settings)
        return cls({"oracle_logp": oracle, "reference_logp": base}, LogRatio(), *shared)

    def save_settings(self, folder: Path, *, packing: Packing = "auto", style: Style = Style()) -> None:  # noqa: B008
        """Write into a model's folder what :meth:`load` needs to score as this scorer does.

        The reference is named only if its name is a place that it can be loaded from. A digest of its weights lets
        :meth:`load` notice that they are others, for example because the model was trained before it was passed.
        """
        first = next(iter(self.models.values()))
        # The template would otherwise write the date of the day on which the scorer is loaded.
        style = style._replace(day=style.day or self.template.written_day)
        facts = {**style.facts(), "precision": self.precision, "packing": packing}
        reference = self.models.get("reference_logp")
        if isinstance(reference, LanguageModel):
            facts["reference_weights"] = weights_digest(reference)
            if is_place(reference.name):
                facts["reference"] = absolute_name(reference.name)
        facts["dtype"] = str(first.dtype).removeprefix("torch.")
        facts["attention"] = _attention_of(first)
        write_json(folder / SCORER_FILE, facts)

    def __call__(self, prompt: str | Sequence[Message], response: str) -> ScoredResponse:
        """Score one response to a prompt (text or messages)."""
        return self.score_all([(prompt, response)])[0]

    def score_all(
        self, texts: Sequence[tuple[str | Sequence[Message], str]], *, tokens_per_batch: int = 8192
    ) -> list[ScoredResponse]:
        """Score pairs of a prompt (text or messages) and a response, in their order.

        Raises:
            UserError: A prompt or response is empty, or longer than the model's context.
        """
        for number, (prompt, response) in enumerate(texts, 1):
            _check_types(number, prompt, response)
        rows = [
            Answered(user(prompt) if isinstance(prompt, str) else tuple(prompt), DataReply(response), ())
            for prompt, response in texts
        ]
        return self.score_rows(rows, tokens_per_batch=tokens_per_batch)

    def score_rows(self, rows: Sequence[Answered], *, tokens_per_batch: int = 8192) -> list[ScoredResponse]:
        """As :meth:`score_all`, for rows with tools or with responses of several messages."""
        encoded = [self._encoded(number, row) for number, row in enumerate(rows, 1)]
        values = self._values(encoded, tokens_per_batch)
        return [self._scored(row, found) for row, (found,) in zip(encoded, values, strict=True)]

    def score_ids(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        tokens_per_batch: int = 8192,
    ) -> list[Tensor]:
        """Scores of sampled token ids, which encoding their text again might change.

        Args:
            prompts: Ids of each prompt.
            responses: Ids of each response.
            tokens_per_batch: Padded tokens per batch.

        Returns:
            ``[len]`` for each response.

        Raises:
            UserError: A prompt or response is empty.
        """
        rows = [self._row_of_ids(*both) for both in zip(prompts, responses, strict=True)]
        return [score for (score,) in self.of_rows(rows, tokens_per_batch=tokens_per_batch)]

    def of_rows(
        self, rows: Sequence[TokenRow], *, tokens_per_batch: int = 8192, shared: bool = False
    ) -> list[list[Tensor]]:
        """Scores of the responses of encoded rows; ``shared`` as for :func:`tokenward.scoring.reads.token_values`.

        Returns:
            ``[len]`` for each row and response.
        """
        return [
            [
                self.scorer(TokenRecord("", ids, [0] * len(ids), [0] * len(ids), values))
                for ids, values in zip(row.responses, found, strict=True)
            ]
            for row, found in zip(rows, self._values(rows, tokens_per_batch, shared=shared), strict=True)
        ]

    def _row_of_ids(self, prompt: Sequence[int], response: Sequence[int]) -> TokenRow:
        if not prompt or not response:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and a response of {len(response)} cannot be scored: one is empty.",
                code="empty-text",
            )
        text = self.template.tokenizer.decode(list(response))
        comparison = Comparison(key="", prompt=(), responses=(str(text),), ranks=(0,), source="ids")
        return TokenRow(comparison, list(prompt), [list(response)], [1])

    def _values(
        self, rows: Sequence[TokenRow], tokens_per_batch: int, *, shared: bool = False
    ) -> list[list[dict[str, list[float]]]]:
        """The values of each row's responses by name."""
        values: list[list[dict[str, list[float]]]] = [[{} for _ in row.responses] for row in rows]
        settings: dict[str, Any] = {
            "precision": self.precision,
            "tokens_per_batch": tokens_per_batch,
            "shared": shared,
        }
        for name, model in self.models.items():
            own = rows
            if isinstance(model, RewardModel):
                own = [with_segments(model.settings.unit, model.tokenizer, row) for row in rows]
            for known, responses in zip(values, token_values(model, own, **settings), strict=True):
                for one, found in zip(known, responses, strict=True):
                    one[name] = found.tolist()
        return values

    def _encoded(self, number: int, row: Answered) -> TokenRow:
        text, turns = row.response
        if not text.strip() or not any(message["content"].strip() for message in row.prompt):
            raise UserError(f"text {number}: prompt and response must not be empty.", code="empty-text")
        comparison = Comparison(
            key="", prompt=row.prompt, responses=(text,), ranks=(0,), source=f"text {number}",
            turns=None if turns is None else (turns,), tools=row.tools,
        )  # fmt: skip
        context = positions_of(next(iter(self.models.values())).model.config)  # type: ignore[arg-type]
        encoded, reasons = encode_one(
            comparison, self.template, Limits(_NO_LIMIT, _NO_LIMIT, "error", context)
        )
        if encoded is None:
            raise UserError(f"text {number} cannot be scored: {', '.join(reasons)}.", code="unusable-text")
        return encoded

    def _scored(self, row: TokenRow, values: dict[str, list[float]]) -> ScoredResponse:
        comparison, ids = row.comparison, row.responses[0]
        text, spans, own = spelled(self.template.tokenizer, row, 0)
        if not own:  # bytes are counted in the caller's text, without what the template writes before it
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


def _reference(
    given: Any, oracle: LanguageModel, expected: str | None, settings: dict[str, str]
) -> LanguageModel:
    """The reference of an oracle, loaded if it is a name; with ``expected``, its weights must have that digest."""
    if isinstance(given, str | Path):
        base = load_model(str(given), **cast(Any, settings))
    else:
        base = given if isinstance(given, LanguageModel) else prepare_model(given, oracle.tokenizer)
    if expected is None:
        return base
    if weights_digest(base) != expected:
        raise UserError(
            f"the weights of {base.name} are not those of the reference that {oracle.name} was trained from: the model was trained "
            "further or replaced, so the scores would differ. Name the model before its training as the reference: "
            "--reference on the command line, TokenScorer.load(..., reference=...) in a script.",
            code="changed-reference",
        )
    return replace(
        base, tokenizer=oracle.tokenizer
    )  # that of the training, perhaps not saved with the reference


def model_of(folder: str | Path) -> str:
    """The model folder of a stage or of a training, which is inside it; another folder is a model itself."""
    path = user_path(folder)
    inside = (path / MANIFEST).is_file() or (not is_model_folder(path) and is_model_folder(path / "model"))
    return str(path / "model" if inside else path)


def reference_of(folder: str | Path) -> str | None:
    """The reference that the folder of an oracle names; None for a reward, which has none."""
    return (
        None if is_reward_folder(Path(model_of(folder))) else _stage_facts(user_path(folder)).get("reference")
    )


def is_scorer_folder(folder: Path) -> bool:
    """Whether :meth:`TokenScorer.load` needs no more than this folder: a run's stage, a reward, or a trained oracle."""
    places = (folder, folder / "model")
    known = (folder / MANIFEST).is_file()
    return known or any(is_reward_folder(place) or (place / SCORER_FILE).is_file() for place in places)


def _attention_of(model: TokenModel) -> str:
    name = str(getattr(model.model.config, "_attn_implementation", None) or "sdpa")
    return PLAIN_NAMES.get(name, name)


def _check_types(number: int, prompt: Any, response: Any) -> None:
    if not isinstance(response, str):
        raise UserError(
            f"text {number}: response is {described(response)}. Pass one text; score_all scores many.",
            code="wrong-type",
        )
    messages = not isinstance(prompt, str) and isinstance(prompt, Sequence)
    if not isinstance(prompt, str) and not (messages and all(isinstance(item, Mapping) for item in prompt)):
        raise UserError(
            f"text {number}: prompt is {described(prompt)}. Pass a text, or a list of messages with role and content.",
            code="wrong-type",
        )


def _stage_facts(folder: Path) -> dict[str, Any]:
    """How the scores of a folder were made, by its stage or its settings file; empty for another model folder."""
    # The reward model of an online run lies inside its stage's folder.
    stage = next((place for place in (folder, folder.parent) if (place / MANIFEST).is_file()), None)
    if stage is not None:
        manifest = read_manifest(stage)
        tokens = manifest.settings.get("tokens", {})  # for stages that encode but do not score
        written = {name: tokens[name] for name in ("template", "chat_template_kwargs") if name in tokens}
        return {**written, **manifest.facts}
    files = (place / SCORER_FILE for place in (folder, folder / "model"))
    return next((read_json(file) for file in files if file.is_file()), {})
