"""Metrics of generated text: replies to eval prompts, their rewards, win rates and distance from another model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from vaderSentiment.vaderSentiment import BOOSTER_DICT, SentimentIntensityAnalyzer, SentiText

from tokenward.artifacts import MANIFEST
from tokenward.errors import UserError
from tokenward.evaluation.statistics import Figure, Floats, by_example, mean_figure
from tokenward.models.base import layout_of_both
from tokenward.models.forward import token_kl
from tokenward.models.identity import config_of, resolve
from tokenward.models.loading import LanguageModel, load_tokenizer
from tokenward.models.reward import is_reward_folder
from tokenward.sampling import Reply
from tokenward.sampling.sources import ChrF, Meteor, Rouge, SequenceClassifier, call_source
from tokenward.scoring.reads import Progress
from tokenward.scoring.texts import TokenScorer
from tokenward.tokens.batches import budgeted
from tokenward.tokens.rows import TokenRow
from tokenward.types import Comparison, Example, Span

Metric = Callable[..., Sequence[float]]
"""``f(prompts, completions, **columns) -> list[float]``: one number per completion, higher is more of it."""


def vader(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """VADER's compound sentiment of each completion, from -1 to 1."""
    scorer = Vader()
    return [scorer.compound(text) for text in completions]


def distinct_2(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Share of different word pairs among all word pairs of each completion; 1 for fewer than two words."""

    def share(text: str) -> float:
        words = text.split()
        pairs = list(pairwise(words))
        return len(set(pairs)) / len(pairs) if pairs else 1.0

    return [share(text) for text in completions]


METRICS: dict[str, Metric] = {
    "vader": vader,
    "distinct_2": distinct_2,
    # These compare with references, which an online run's examples have.
    "rouge1": Rouge(type="rouge1"),
    "rouge2": Rouge(type="rouge2"),
    "rougeL": Rouge(type="rougeL"),
    "rougeLsum": Rouge(type="rougeLsum"),
    "meteor": Meteor(),
    "chrf": ChrF(),
}


def apply_metric(
    name: str,
    metric: Metric,
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    columns: Mapping[str, Sequence[Any]],
    where: Sequence[str],
) -> list[float]:
    """Call a metric as a preference source is called, and check what it returns.

    Raises:
        UserError: it returned something else than one finite number per completion, or lacks a column.
    """
    return call_source(name, metric, prompts, completions, completion_ids, columns, where, kind="metric")


class Vader:
    """The rule-based sentiment scorer of Hutto and Gilbert (ICWSM 2014).

    It sums the valence of words it knows, changed by negation, boosters and "but", so the words
    that carry a text's score are known exactly.
    """

    def __init__(self) -> None:
        self._analyzer = SentimentIntensityAnalyzer()

    def compound(self, text: str) -> float:
        """Sentiment of a whole text, from -1 (most negative) to 1 (most positive)."""
        return self._analyzer.polarity_scores(text)["compound"]

    def word_spans(self, text: str) -> list[Span]:
        """Each word that adds to the text's score, with its valence (about -4 to 4) in this text.

        The values are those that :meth:`compound` adds up before punctuation and squashing.
        """
        expanded, origin = self._expand_emoji(text)
        parsed = SentiText(expanded)
        words = parsed.words_and_emoticons
        valences: list[float] = []
        for index, word in enumerate(words):
            # Boosters ("very") and "kind of" act on other words; VADER gives them no valence of their own.
            kind_of = index + 1 < len(words) and word.lower() == "kind" and words[index + 1].lower() == "of"
            if kind_of or word.lower() in BOOSTER_DICT:
                valences.append(0.0)
            else:
                valences = self._analyzer.sentiment_valence(0, parsed, word, index, valences)
        valences = self._analyzer._but_check(words, valences)
        return [
            Span(origin[span.start], origin[span.end - 1] + 1, span.value)
            for span in _locate(expanded, words, valences)
        ]

    def _expand_emoji(self, text: str) -> tuple[str, list[int]]:
        """The text as VADER reads it (emoji in words), and for each of its characters the index it came from."""
        expanded, origin = "", []
        for index, character in enumerate(text):
            piece = self._analyzer.emojis.get(character, character)
            if character in self._analyzer.emojis and expanded and not expanded.endswith(" "):
                piece = " " + piece
            expanded += piece
            origin += [index] * len(piece)
        return expanded, origin


def _locate(text: str, words: list[str], valences: list[float]) -> list[Span]:
    """VADER splits at white space and strips punctuation, in order: so each word is found left to right."""
    spans, start = [], 0
    for word, valence in zip(words, valences, strict=True):
        start = text.index(word, start)
        if valence:
            spans.append(Span(start, start + len(word), float(valence)))
        start += len(word)
    return spans


_PENALTY = 0.01
"""Weight of the squares in the fit: as if each coefficient were known beforehand to be 0 give or take 10."""
_STEPS = 50
_CLOSE = 1e-8


def preferences(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """For each prompt 1 if the second number is higher, 0 if it is lower, 0.5 if they tie."""
    return [(b > a) + 0.5 * (b == a) for a, b in zip(before, after, strict=True)]


def win_figures(
    name: str,
    preferred: Sequence[float],
    before: Sequence[str],
    after: Sequence[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Figure]:
    """``win_rate`` of the second model, raw and at equal length, and the share of ``ties``.

    Args:
        name: What the figures begin with.
        preferred: 1 where the second model's reply is preferred, 0 where the first one's, between them a tie.
        before: The first model's replies.
        after: The second model's replies.
        resamples: Bootstrap draws.
        seed: Of the draws.
    """
    settings = {"resamples": resamples, "seed": seed}
    values = np.asarray(preferred, dtype=float)
    longer = [len(b) - len(a) for a, b in zip(before, after, strict=True)]
    return {
        f"{name}/win_rate": mean_figure(values, **settings),
        f"{name}/win_rate_equal_length": length_controlled(values, longer, **settings),
        f"{name}/ties": mean_figure(values == 0.5, **settings),
    }


def length_controlled(
    preferred: ArrayLike, length_difference: ArrayLike, *, resamples: int = 2000, seed: int = 0
) -> Figure:
    """Win rate that a logistic regression predicts for replies of equal length.

    ``P(win) = sigmoid(a + b tanh(d / std(d)))`` is fitted to the preferences, ``d`` being the difference in length; the
    figure is ``sigmoid(a)``, what is left at ``d = 0``. AlpacaEval 2 (arXiv 2404.04475) without its term for the
    difficulty of the instruction, which is known for its own 805 instructions only, and with a weak ridge penalty
    in the place of its cross-validated lasso.

    If all pairs differ by the same length, the figure is NaN, because length and quality cannot be told apart. If all
    replies of a pair are equally long, it is the raw win rate.

    Args:
        preferred: ``[n]`` from 0 to 1.
        length_difference: ``[n]`` length of the second reply less that of the first, in any unit.
        resamples: Bootstrap draws, over pairs.
        seed: Of the draws.
    """
    target = np.asarray(preferred, dtype=np.float64)
    difference = np.asarray(length_difference, dtype=np.float64)
    spread = float(difference.std()) if len(difference) else 0.0
    if not spread:
        if not difference.any():
            return mean_figure(target, resamples=resamples, seed=seed)
        nan = float("nan")
        return Figure(nan, nan, nan, len(target))
    features = np.stack([np.ones_like(difference), np.tanh(difference / spread)], axis=1)

    def at_equal_length(times: Floats) -> float:
        return float(_sigmoid(_fit(features, target, times))[0])

    return by_example(at_equal_length, len(target), resamples=resamples, seed=seed)


def _fit(features: Floats, target: Floats, times: Floats) -> Floats:
    """Coefficients of a ridge logistic regression by Newton's method.  [n f], [n], [n] -> [f]"""
    used = times > 0
    features, target, times = features[used], target[used], times[used]
    coefficients = np.zeros(features.shape[1])
    for _ in range(_STEPS):
        predicted = _sigmoid(features @ coefficients)
        gradient = features.T @ (times * (predicted - target)) + _PENALTY * coefficients
        curvature = (features * (times * predicted * (1 - predicted))[:, None]).T @ features
        step = np.linalg.solve(curvature + _PENALTY * np.eye(len(coefficients)), gradient)
        # A whole step can overshoot where predictions are near 0 or 1; a bounded one cannot leave the valley.
        coefficients -= np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < _CLOSE:
            break
    return coefficients


def _sigmoid(values: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -values))


NO_REPLY = -math.inf
"""Reward of a reply without text. It has no tokens to score, and every other reply wins against it."""

_STAGES = ("eval_reward", "oracle", "reward", "online/reward")


class ReplyRewardModel(NamedTuple):
    """A reward model by its name.

    Attributes:
        name: Folder or hub name.
        scores_tokens: Whether it is a stage's folder with a score per token; otherwise it is a sequence classifier.
    """

    name: str
    scores_tokens: bool


def find_reward_model(name: str) -> ReplyRewardModel:
    """Find out which kind of reward model a name means, without loading its weights.

    Raises:
        UserError: a whole run, a classifier with several labels, or no model at all.
    """
    folder = Path(name).expanduser()
    if (folder / MANIFEST).is_file() or is_reward_folder(folder):
        return ReplyRewardModel(name, scores_tokens=True)
    inside = [stage for stage in _STAGES if (folder / stage).is_dir()]
    if inside and not (folder / "config.json").is_file():
        named = " or ".join(str(folder / stage) for stage in inside)
        raise UserError(f"{name} is a run, which may hold several rewards. Name one of them: {named}.")
    labels = config_of(resolve(name), trust_remote_code=False).num_labels
    if labels != 1:
        raise UserError(
            f"{name} has {labels} labels, and a reward model has one. Name another, or make it a metric: a function of your "
            'own that gives one number per reply, --metric "module:name".'
        )
    return ReplyRewardModel(name, scores_tokens=False)


def rewards(model: ReplyRewardModel, examples: Sequence[Example], replies: Sequence[str]) -> list[float]:
    """The reward of each reply.

    A model that scores tokens gives the mean over the reply's tokens, since a sum would grow with the length, and -inf for a
    reply without text. A sequence classifier reads the prompt's last message and the reply, as a conversation if its
    tokenizer has a chat template.

    Raises:
        UserError: the model cannot be loaded, or a reply does not fit in its context.
    """
    if not model.scores_tokens:
        chat = bool(load_tokenizer(model.name).chat_template)
        source = SequenceClassifier(
            model=model.name, pair="prompt_completion", template_chat=chat, max_tokens=4096
        )
        prompts = [example.prompt[-1]["content"] for example in examples]
        where = [example.source for example in examples]
        return call_source(
            model.name, source, prompts, replies, [()] * len(replies), {}, where, kind="reward model"
        )
    filled = [place for place, reply in enumerate(replies) if reply.strip()]
    scorer = TokenScorer.load(model.name)
    scored = scorer.score_all([(examples[place].prompt, replies[place]) for place in filled])
    found = [NO_REPLY] * len(replies)
    for place, item in zip(filled, scored, strict=True):
        found[place] = item.total / len(item.tokens)
    return found


def reply_rows(prompts: Sequence[TokenRow], replies: Sequence[Reply]) -> list[TokenRow]:
    """Replies as rows of one response each."""
    rows = []
    for prompt, reply in zip(prompts, replies, strict=True):
        comparison = Comparison(
            key=prompt.comparison.key,
            prompt=prompt.comparison.prompt,
            tools=prompt.comparison.tools,
            responses=(reply.text,),
            ranks=(0,),
            source="sample",
        )
        rows.append(TokenRow(comparison, prompt.asked, [reply.ids], [int(reply.ended)]))
    return rows


def divergence(
    policy: LanguageModel,
    start: LanguageModel,
    rows: Sequence[TokenRow],
    *,
    tokens_per_batch: int = 8192,
    progress: Progress | None = None,
) -> list[Tensor]:
    """KL(policy || start) over the vocabulary at each token of the policy's own replies, nats.  -> [len] each"""
    results: list[Tensor] = [torch.empty(0)] * len(rows)
    both = replace(policy, layout=layout_of_both(policy, start))
    for group in budgeted(rows, layout=both.layout, tokens=tokens_per_batch):
        batch = both.collate([rows[index] for index in group]).to(policy.device)
        kl = token_kl(policy.model, policy.head, start.model, start.head, batch).cpu()
        sizes = [len(rows[index].responses[0]) for index in group]
        for index, part in zip(group, kl.split(sizes), strict=True):
            results[index] = part
        if progress is not None:
            progress(len(group))
    return results
