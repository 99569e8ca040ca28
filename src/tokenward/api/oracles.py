"""The ``oracle`` argument in all its forms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from tokenward.api.inputs import Model, check_ratio, language_model
from tokenward.api.stored import KEYS, SCORES
from tokenward.artifacts import MANIFEST, read_manifest, user_path
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel, load_model
from tokenward.models.reward import RewardModel
from tokenward.plugins import check_call, described, name_of
from tokenward.scoring.basic import LogRatio, Record, Reward, Scorer
from tokenward.scoring.reads import reads_of
from tokenward.scoring.scorers import check_scope
from tokenward.scoring.store import TokenStore
from tokenward.scoring.texts import TokenScorer, is_scorer_folder
from tokenward.tokens.template import Style, Template

Oracle = Model | RewardModel | TokenScorer | Scorer | Dataset
"""A source of scores: a trained model, the folder of a model or of a run's stage, a scorer, or existing scores."""


class Scoring(NamedTuple):
    """A scorer with the models or the stored values that it reads.

    Attributes:
        scorer: From values to scores.
        models: By name: ``reference``, ``oracle``, ``reward``.
        store: Existing values, as a folder or as data sets; None computes them.
        template: The template that the models were trained with, if they know it.
    """

    scorer: Scorer
    models: Mapping[str, TokenModel]
    store: TokenStore | Sequence[Dataset] | None = None
    template: Template | None = None

    def templates(self, style: Style) -> dict[str, Template]:
        """The template of each model, in a style unless it knows its own."""
        return {name: self.template or model.template(style) for name, model in self.models.items()}

    def readers(self, template: Template, style: Style) -> list[TokenModel]:
        """The models that read rows of a template."""
        known = self.templates(style)
        return [
            model for name, model in self.models.items() if known[name].fingerprint == template.fingerprint
        ]


def scoring_of(
    oracle: Any,
    reference: Callable[[], LanguageModel],
    *,
    scorer: Scorer | None,
    style: Style,
    template: Template | None = None,
    **loading: Any,
) -> Scoring | None:
    """Interpret an ``oracle`` argument; None if nothing gives scores.

    Args:
        oracle: See :data:`Oracle`.
        reference: Gives the model that an oracle was trained from which does not know it.
        scorer: From values to scores; None is the log-ratio of oracle and reference, or the reward itself.
        style: The style that the rows are encoded in.
        template: The template of the rows; None is that of the oracle.
        loading: ``packing`` and ``device`` of :func:`language_model`.

    Raises:
        UserError: it is none of these, or was trained on conversations in another style.
    """
    if oracle is None and scorer is None:
        return None
    if isinstance(oracle, str | Path):
        oracle = _loaded(str(oracle), loading)
    if isinstance(oracle, TokenStore):
        return Scoring(scorer or LogRatio(), {}, oracle)
    if isinstance(oracle, Dataset):
        if KEYS not in oracle.column_names:
            raise UserError(
                f"oracle is a Dataset without scores (its columns are {', '.join(oracle.column_names)}). Pass the data set that "
                "tokenward.score returned.",
                code="missing-scores",
            )
        return Scoring(scorer or StoredScores(), {}, [oracle])
    made = oracle.template if isinstance(oracle, TokenScorer) else None
    if isinstance(oracle, TokenScorer) and (template is None or _same_tokenizer(oracle.template, template)):
        _check_style(oracle, style)
        made = None
    fallback = None if template is None else template.tokenizer
    models, own = _models_of(oracle, scorer is None, {"fallback": fallback, **loading})
    scorer = cast(Scorer, scorer or own)
    check_call("scorer", name_of(scorer), scorer, ("record",))
    check_scope(scorer)
    if "reference" not in models and any(value.model == "reference" for value in reads_of(scorer)):
        models["reference"] = reference()
    check_ratio(scorer, models)
    return Scoring(scorer, models, template=made)


def _same_tokenizer(one: Template, other: Template) -> bool:
    """Whether two templates have one tokenizer, whatever they write."""
    first, second = (found.tokenizer.backend_tokenizer.to_str() for found in (one, other))  # type: ignore[attr-defined]
    return first == second


def _loaded(name: str, loading: Mapping[str, Any]) -> TokenStore | TokenScorer | LanguageModel:
    """The oracle in a folder: scores, a stage of a run or a reward, or a model."""
    folder = user_path(name)
    if any(folder.glob("tokens-*.parquet")):
        if (folder / MANIFEST).is_file() and not read_manifest(folder).complete:
            raise UserError(
                f"{folder} holds unfinished scores: shards are missing. Finish them first.",
                code="stage-unfinished",
            )
        return TokenStore(folder)
    if is_scorer_folder(folder):
        return TokenScorer.load(folder)
    return load_model(name, **loading)


def _models_of(
    oracle: Any, scores: bool, loading: Mapping[str, Any]
) -> tuple[dict[str, TokenModel], Scorer | None]:
    """The models behind an oracle, and its default scorer. The oracle itself may be the scorer, if it has to score."""
    if isinstance(oracle, TokenScorer):
        models = {name.removesuffix("_logp"): model for name, model in oracle.models.items()}
        return models, oracle.scorer
    if isinstance(oracle, RewardModel):
        return {"reward": oracle}, Reward()
    if isinstance(oracle, PreTrainedModel | PeftModel | LanguageModel):
        return {"oracle": language_model(oracle, name="oracle", **loading)}, LogRatio()
    if oracle is None or (callable(oracle) and scores):
        return {}, cast(Scorer | None, oracle)
    raise UserError(
        f"oracle is {described(oracle)}. Pass a trained model or its folder, a scorer, or a data set that tokenward.score "
        "returned.",
        code="wrong-type",
    )


def _check_style(oracle: TokenScorer, style: Style) -> None:
    first = next(iter(oracle.models.values()))
    if oracle.template.fingerprint != first.template(style).fingerprint:
        raise UserError(
            "the oracle was trained on conversations in another style, so its scores belong to other tokens. Pass tokens with the "
            "template, chat_template_kwargs and day that it was trained with.",
            code="template-mismatch",
        )


@dataclass(frozen=True)
class StoredScores:
    """Takes the scores of a scored data set as they are."""

    reads: ClassVar[tuple[str, ...]] = ()

    def __call__(self, record: Record) -> Tensor:
        """Scores of one response.  -> [n]"""
        return record.value(SCORES)
