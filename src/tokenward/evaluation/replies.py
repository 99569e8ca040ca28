"""Metrics of sampled replies, their rewards, win rates, and their KL divergence from another model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from vaderSentiment.vaderSentiment import BOOSTER_DICT, SentimentIntensityAnalyzer, SentiText

from tokenward.artifacts import MANIFEST, user_path
from tokenward.distributed import split
from tokenward.errors import UserError
from tokenward.evaluation.statistics import Figure, Floats, by_example, mean_figure, no_figure
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
"""``f(prompts, completions, **columns) -> list[float]``, one number per completion."""


def vader(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """VADER's compound sentiment of each completion, from -1 to 1."""
    scorer = Vader()
    return [scorer.compound(text) for text in completions]


def distinct_2(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Share of distinct word pairs among all word pairs of each completion; 1 for fewer than two words."""

    def share(text: str) -> float:
        words = text.split()
        pairs = list(pairwise(words))
        return len(set(pairs)) / len(pairs) if pairs else 1.0

    return [share(text) for text in completions]


METRICS: dict[str, Metric] = {
    "vader": vader,
    "distinct_2": distinct_2,
    # These need references, which the examples of an online run have.
    "rouge1": Rouge(type="rouge1"),
    "rouge2": Rouge(type="rouge2"),
    "rougeL": Rouge(type="rougeL"),
    "rougeLsum": Rouge(type="rougeLsum"),
    "meteor": Meteor(),
    "chrf": ChrF(),
}


apply_metric = partial(call_source, kind="metric")
"""Calls a metric as a preference source is called: one finite number per completion, or a :class:`UserError`."""


class Vader:
    """The rule-based sentiment scorer of Hutto and Gilbert (ICWSM 2014).

    It sums the valences of known words, changed by negation, boosters and "but", so the words that carry a text's score
    are known exactly.
    """

    def __init__(self) -> None:
        self._analyzer = SentimentIntensityAnalyzer()

    def compound(self, text: str) -> float:
        """Sentiment of a text, from -1 (most negative) to 1 (most positive)."""
        return self._analyzer.polarity_scores(text)["compound"]

    def word_spans(self, text: str) -> list[Span]:
        """The words that contribute to the text's score, with their valence (about -4 to 4) in this text.

        :meth:`compound` sums these values, before it accounts for punctuation and squashes the sum.
        """
        expanded, origin = self._expand_emoji(text)
        parsed = SentiText(expanded)
        words = parsed.words_and_emoticons
        valences: list[float] = []
        for index, word in enumerate(words):
            # Boosters ("very") and "kind of" change other words and have no valence.
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
        """The text as VADER reads it, with emoji in words, and the index that each character came from."""
        expanded, origin = "", []
        for index, character in enumerate(text):
            piece = self._analyzer.emojis.get(character, character)
            if character in self._analyzer.emojis and expanded and not expanded.endswith(" "):
                piece = " " + piece
            expanded += piece
            origin += [index] * len(piece)
        return expanded, origin


def _locate(text: str, words: list[str], valences: list[float]) -> list[Span]:
    # VADER splits at white space and strips punctuation in order, so words are found from left to right.
    spans, start = [], 0
    for word, valence in zip(words, valences, strict=True):
        start = text.index(word, start)
        if valence:
            spans.append(Span(start, start + len(word), float(valence)))
        start += len(word)
    return spans


_PENALTY = 0.01  # of the squared coefficients, as if each had a normal prior with a standard deviation of 10
_STEPS = 50
_CLOSE = 1e-8


def preferences(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """For each prompt 1 if the second number is higher, 0 if it is lower, 0.5 for a tie."""
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
    """The ``win_rate`` of the second model, raw and at equal length, and the share of ``ties``.

    Args:
        name: Prefix of the figures.
        preferred: 1 if the second model's reply is preferred, 0 if the first model's, 0.5 for a tie.
        before: The first model's replies.
        after: The second model's replies.
        resamples: Number of bootstrap draws.
        seed: Seed of the draws.
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
    """The win rate that a logistic regression predicts for replies of equal length.

    ``P(win) = sigmoid(a + b tanh(d / std(d)))`` is fitted to the preferences, where ``d`` is the difference in length; the
    figure is ``sigmoid(a)``, the prediction at ``d = 0``. This is AlpacaEval 2 (arXiv 2404.04475) without its term for the
    difficulty of the instruction, which is known for its own 805 instructions only, and with a weak ridge penalty instead
    of its cross-validated lasso.

    The figure is NaN if all pairs have the same nonzero difference, because length and quality cannot be separated then. It
    is the raw win rate if the replies of each pair are equally long.

    Args:
        preferred: ``[n]``, from 0 to 1.
        length_difference: ``[n]``, length of the second reply minus that of the first, in any unit.
        resamples: Number of bootstrap draws over pairs.
        seed: Seed of the draws.
    """
    target = np.asarray(preferred, dtype=np.float64)
    difference = np.asarray(length_difference, dtype=np.float64)
    spread = float(difference.std()) if len(difference) else 0.0
    if not spread:
        equal = not difference.any()
        return mean_figure(target, resamples=resamples, seed=seed) if equal else no_figure(len(target))
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
        # A full Newton step can overshoot if predictions are near 0 or 1.
        coefficients -= np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < _CLOSE:
            break
    return coefficients


def _sigmoid(values: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -values))


NO_REPLY = -math.inf
"""Reward of a reply without text, which has no tokens to score. Every other reply wins against it."""

_STAGES = ("eval_reward", "oracle", "reward", "online/reward")


class ReplyRewardModel(NamedTuple):
    """A reward model.

    Attributes:
        name: Folder or hub name.
        scores_tokens: True for a token reward or the folder of a stage, False for a sequence classifier.
    """

    name: str
    scores_tokens: bool


def find_reward_model(name: str) -> ReplyRewardModel:
    """The kind of a reward model, without loading its weights.

    Raises:
        UserError: it is the folder of a whole run, a classifier with several labels, or no model.
    """
    folder = user_path(name)
    if (folder / MANIFEST).is_file() or is_reward_folder(folder):
        return ReplyRewardModel(name, scores_tokens=True)
    inside = [stage for stage in _STAGES if (folder / stage).is_dir()]
    if inside and not (folder / "config.json").is_file():
        named = " or ".join(str(folder / stage) for stage in inside)
        raise UserError(
            f"{name} is the folder of a run, which may contain several rewards. Give one of them: {named}.",
            code="whole-run",
        )
    labels = config_of(resolve(name), trust_remote_code=False).num_labels
    if labels != 1:
        raise UserError(
            f"{name} has {labels} labels, and a reward model has one. Give another model, or use it in a custom metric, a function that "
            "returns one number per reply.",
            code="not-a-reward-model",
        )
    return ReplyRewardModel(name, scores_tokens=False)


def rewards(model: ReplyRewardModel, examples: Sequence[Example], replies: Sequence[str]) -> list[float]:
    """The reward of each reply.

    For a model that scores tokens this is the mean over the reply's tokens, because a sum would grow with length, and -inf for
    a reply without text. A sequence classifier reads the prompt's last message and the reply, as a conversation if its
    tokenizer has a chat template.

    Raises:
        UserError: the model cannot be loaded, or a reply exceeds its context.
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
    """KL(policy || start) over the vocabulary at each token of the policy's replies, nats.  -> [len] each

    The processes of a launch share the batches.
    """
    results: list[Tensor] = [torch.empty(0)] * len(rows)
    both = replace(policy, layout=layout_of_both(policy, start))

    def values_of(group: Sequence[int]) -> list[Tensor]:
        batch = both.collate([rows[index] for index in group]).to(policy.device)
        kl = token_kl(policy.model, policy.head, start.model, start.head, batch).cpu()
        return [*kl.split([len(rows[index].responses[0]) for index in group])]

    groups = [*budgeted(rows, layout=both.layout, tokens=tokens_per_batch)]
    for group, found in zip(groups, split(groups, values_of), strict=True):
        for index, part in zip(group, found, strict=True):
            results[index] = part
        if progress is not None:
            progress(len(group))
    return results
