"""What is measured of two models' replies to the same prompts: metrics, rewards, and a judge."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokenward.artifacts import write_json
from tokenward.config import Recipe
from tokenward.config.judge import JudgeTable
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.evaluation.answers import AnswerCache
from tokenward.evaluation.benchmarks import Question
from tokenward.evaluation.judge import Judged, Pair, first_place, judge_pairs
from tokenward.evaluation.metrics import apply_metric
from tokenward.evaluation.rewards import ReplyRewardModel, rewards
from tokenward.evaluation.statistics import Figures, before_after_figures, mean_figure
from tokenward.evaluation.winrate import preferences, win_figures
from tokenward.sampling import Reply
from tokenward.sampling.rollouts import columns_of
from tokenward.tools.model_replies import short_name


@dataclass(kw_only=True)
class ComparedReplies:
    """Two models' replies to the same questions, and what was measured of them so far.

    Attributes:
        recipe: Its table ``evaluation`` and its seed say how intervals are made.
        display: Where progress is shown.
        questions: What was asked.
        replies: Of both models, one per turn of each question.
        values: Per measure the numbers of both models, by name.
        preferred: Per measure how far each prompt is for the second model; None where it has no verdict.
        figures: By name.
    """

    recipe: Recipe
    display: Display
    questions: list[Question]
    replies: tuple[list[list[Reply]], list[list[Reply]]]
    values: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    preferred: dict[str, list[float | None]] = field(default_factory=dict)
    figures: Figures = field(default_factory=dict)

    @property
    def first(self) -> tuple[list[Reply], list[Reply]]:
        """Both models' replies to the first turn, whose prompt is the same for both."""
        before, after = ([turns[0] for turns in side] for side in self.replies)
        return before, after

    @property
    def texts(self) -> tuple[list[str], list[str]]:
        """The texts of :attr:`first`."""
        before, after = ([reply.text for reply in side] for side in self.first)
        return before, after

    @property
    def statistics(self) -> dict[str, int]:
        """Settings of every interval."""
        return {"resamples": self.recipe.evaluation.bootstrap, "seed": self.recipe.seed}


def check_names(metrics: Sequence[str], models: Sequence[ReplyRewardModel]) -> None:
    """Refuse two measures of one name: their figures would be one.

    Raises:
        UserError: there are two.
    """
    seen = ["judge", *_PLAIN]
    for name in (*dict.fromkeys(metrics), *(short_name(model.name) for model in models)):
        if name in seen:
            raise UserError(
                f"two measures are called {name}. Rename a folder or a function, or leave one of them out."
            )
        seen.append(name)


def apply_metrics(comparison: ComparedReplies, metrics: Mapping[str, Callable[..., Any]]) -> None:
    """Metrics by name, and length in tokens and characters, and the share of replies that the model ended.

    Raises:
        UserError: a metric lacks a column, or returned something else than a number per reply.
    """
    examples = [question.example for question in comparison.questions]
    prompts = [example.prompt[-1]["content"] for example in examples]
    where, columns = [example.source for example in examples], columns_of(examples) if metrics else {}
    for name, metric in metrics.items():
        before, after = (
            apply_metric(
                name,
                metric,
                prompts,
                [reply.text for reply in side],
                [reply.ids for reply in side],
                columns=columns,
                where=where,
            )
            for side in comparison.first
        )
        _compare(comparison, name, before, after)
    for name, value in _PLAIN.items():
        before, after = ([value(reply) for reply in side] for side in comparison.first)
        comparison.figures |= before_after_figures(name, before, after, **comparison.statistics)


_PLAIN: dict[str, Callable[[Reply], float]] = {
    "length": lambda reply: float(len(reply.ids)),
    "characters": lambda reply: float(len(reply.text)),
    "ended": lambda reply: float(reply.ended),
}


def apply_rewards(comparison: ComparedReplies, models: Sequence[ReplyRewardModel]) -> None:
    """Reward models, one after the other.

    Raises:
        UserError: one cannot be loaded.
    """
    examples = [question.example for question in comparison.questions]
    for model in models:
        before, after = (rewards(model, examples, texts) for texts in comparison.texts)
        _compare(comparison, short_name(model.name), before, after)


def _compare(comparison: ComparedReplies, name: str, before: list[float], after: list[float]) -> None:
    """Keep the numbers of a measure; its figures are the means, the paired change and who wins."""
    comparison.values[name] = before, after
    pairs = np.array([before, after])
    known = np.isfinite(pairs).all(axis=0)  # a reward of -inf has no mean, and loses
    comparison.figures |= before_after_figures(name, *pairs[:, known].tolist(), **comparison.statistics)
    _prefer(comparison, name, preferences(before, after))


def _prefer(comparison: ComparedReplies, name: str, preferred: Sequence[float | None]) -> None:
    comparison.preferred[name] = list(preferred)
    kept = [place for place, value in enumerate(preferred) if value is not None]
    values = [value for value in preferred if value is not None]
    before, after = ([texts[place] for place in kept] for texts in comparison.texts)
    comparison.figures |= win_figures(name, values, before, after, **comparison.statistics)


def apply_judge(comparison: ComparedReplies, judge: JudgeTable, folder: Path) -> None:
    """A judge in both orders; its answers are kept in ``judge.sqlite``, and what it said goes into ``judge.json``.

    Raises:
        UserError: the endpoint refuses the request, or fails too often in a row.
    """
    pairs = [
        Pair(question.example.prompt, before, after)
        for question, before, after in zip(comparison.questions, *comparison.texts, strict=True)
    ]
    cache = AnswerCache(folder / "judge.sqlite")
    try:
        with comparison.display.progress(
            "judge", 2 * sum(pair.before != pair.after for pair in pairs)
        ) as bar:
            judged = judge_pairs(judge, pairs, cache, progress=bar.advance)
    finally:
        cache.close()
    _prefer(comparison, "judge", [item.preferred for item in judged.judgments])
    comparison.figures["judge/first_place"] = mean_figure(
        first_place(judged.judgments), **comparison.statistics
    )
    verdicts = [list(item.verdicts) for item in judged.judgments]
    record = {"judge": judge.model_dump(), "counts": judged.counts, "verdicts": verdicts}
    write_json(folder / "judge.json", record)
    _show_counts(comparison.display, judged)


def _show_counts(display: Display, judged: Judged) -> None:
    rows = [(name.replace("_", " "), f"{value:g}") for name, value in judged.counts.items() if value]
    display.table("judge", ("", "count"), rows)
