"""``tokenward compare-models``: two models on the same prompts, with metrics, rewards and a judge."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokenward.artifacts import write_json, write_jsonl
from tokenward.config import Recipe, parse_recipe
from tokenward.config.judge import JudgeTable, load_judge
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.evaluation.benchmarks import BENCHMARKS, Question, write_answers
from tokenward.evaluation.judge import AnswerCache, Endpoint, Judged, Pair, first_place, judge_pairs
from tokenward.evaluation.replies import (
    METRICS,
    ReplyRewardModel,
    apply_metric,
    find_reward_model,
    preferences,
    rewards,
    win_figures,
)
from tokenward.evaluation.statistics import Figures, before_after_figures, mean_figure, write_figures
from tokenward.plugins import find
from tokenward.sampling import Reply
from tokenward.sampling.rollouts import columns_of
from tokenward.stages.evaluation import show_tables
from tokenward.tools.model_replies import (
    ComparedModel,
    fitting,
    model_of,
    read_prompts,
    replies_of,
    reply_record,
    short_name,
)
from tokenward.tools.run import quiet_libraries


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


DEFAULTS = "evaluation: {max_new_tokens: 512}"
SETTABLE = (
    "evaluation.",
    "tokens.template",
    "tokens.chat_template_kwargs",
    "model.device",
    "model.attention",
    "model.trust_remote_code",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """What is to be compared, and by what.

    Attributes:
        before: Folder or hub name of a model, or a run's folder.
        after: So too.
        prompts: What :func:`tokenward.data.rows` reads.
        metrics: Names of metrics, or ``"module:name"``.
        rewards: Reward models: sequence classifiers, or stage folders of a run.
        judge: File of a judge.
        export: A key of ``BENCHMARKS``, whose question file the prompts are.
        output: Where everything goes; None is ``runs/BEFORE-vs-AFTER``.
        overrides: ``"a.b=value"`` of ``SETTABLE``.
    """

    before: str
    after: str
    prompts: str
    metrics: Sequence[str] = ()
    rewards: Sequence[str] = ()
    judge: str | Path | None = None
    export: str | None = None
    output: str | Path | None = None
    overrides: Sequence[str] = ()


def compare_models(request: ComparisonRequest, *, quiet: bool = False) -> Figures:
    """Sample both models on the same prompts with the same seeds, and say which replies are better by each measure.

    Writes ``replies.jsonl``, ``figures.json`` and, with a judge, ``judge.json``. Replies and the judge's answers are kept in
    the same folder, so the same command goes on after a stop.

    Args:
        request: What to compare.
        quiet: Show nothing.

    Raises:
        UserError: a model, prompt, metric, reward model or judge cannot be used.
    """
    quiet_libraries()
    display, recipe = Display(quiet=quiet), _recipe(request.overrides)
    metrics = {name: find("metric", name, METRICS) for name in request.metrics}
    reward_models = [find_reward_model(name) for name in request.rewards]
    check_names(request.metrics, reward_models)
    judge = None if request.judge is None else load_judge(request.judge)
    if judge is not None:
        with Endpoint(judge, os.environ):
            pass  # a missing key or package is reported before hours of sampling
    sides = _sides(request.before, request.after)
    folder = _folder(request, sides)
    comparison = _sampled(request, sides, recipe, folder, display)
    apply_metrics(comparison, metrics)
    apply_rewards(comparison, reward_models)
    if judge is not None:
        apply_judge(comparison, judge, folder)
    _write(comparison, folder)
    show_tables(display, comparison.figures, f"how often {sides[1].name} wins against {sides[0].name}")
    if request.export is not None:
        _export(comparison, request.export, sides, folder)
    display.line(f"\nreplies: {folder / 'replies.jsonl'}\nfigures: {folder / 'figures.json'}")
    return comparison.figures


def _recipe(overrides: Sequence[str]) -> Recipe:
    recipe, lines = parse_recipe(DEFAULTS, "the defaults of evaluate", overrides)
    for key in lines.overridden:
        if key == "evaluation.metrics" or not key.startswith(SETTABLE):
            advice = (
                "Write --metric NAME." if key == "evaluation.metrics" else "Leave it out, or name a recipe."
            )
            raise UserError(
                f"--set {key}: of two models, only evaluation.*, tokens.template, tokens.chat_template_kwargs, seed, and model's device, attention and "
                f"trust_remote_code can be set. {advice}"
            )
    return recipe


def _sides(before: str, after: str) -> tuple[ComparedModel, ComparedModel]:
    first, second = model_of(before), model_of(after)
    names = short_name(first), short_name(second)
    if names[0] == names[1]:
        names = f"{names[0]}-before", f"{names[1]}-after"
    return ComparedModel(label="before", model=first, name=names[0]), ComparedModel(
        label="after", model=second, name=names[1]
    )


def _folder(request: ComparisonRequest, sides: tuple[ComparedModel, ComparedModel]) -> Path:
    default = Path("runs") / f"{sides[0].name}-vs-{sides[1].name}"
    return default if request.output is None else Path(request.output).expanduser()


def _sampled(
    request: ComparisonRequest,
    sides: tuple[ComparedModel, ComparedModel],
    recipe: Recipe,
    folder: Path,
    display: Display,
) -> ComparedReplies:
    if request.export is not None and request.export not in BENCHMARKS:
        raise UserError(f"there is no export {request.export!r}. There are: {', '.join(BENCHMARKS)}.")
    questions = read_prompts(request.prompts, request.export, recipe.evaluation.prompts, display)
    fits = fitting(sides, questions, recipe)
    kept = [question for question, fit in zip(questions, fits, strict=True) if fit]
    if len(kept) < len(questions):
        _too_long(request, questions, fits, display, recipe.evaluation.max_new_tokens)
    before, after = (replies_of(side, kept, recipe, folder, display) for side in sides)
    return ComparedReplies(recipe=recipe, display=display, questions=kept, replies=(before, after))


def _too_long(
    request: ComparisonRequest,
    questions: Sequence[Question],
    fits: Sequence[bool],
    display: Display,
    new: int,
) -> None:
    first = questions[fits.index(False)].example.source
    message = f"{fits.count(False)} prompts and {new} new tokens do not fit in a model's context, the first of {first}"
    if request.export is not None or not any(fits):
        raise UserError(f"{message}. Lower --set evaluation.max_new_tokens=N.")
    display.line(f"  left out: {message}")


def _write(comparison: ComparedReplies, folder: Path) -> None:
    write_figures(folder / "figures.json", comparison.figures)
    records = (_record(comparison, place) for place in range(len(comparison.questions)))
    write_jsonl(folder / "replies.jsonl", records)


def _record(comparison: ComparedReplies, place: int) -> dict[str, Any]:
    question = comparison.questions[place]
    return {
        "key": question.example.key,
        "source": question.example.source,
        "prompt": list(question.example.prompt),
        "follow_ups": list(question.follow_ups),
        **{
            label: [reply_record(reply) for reply in side[place]]
            for label, side in zip(("before", "after"), comparison.replies, strict=True)
        },
        "values": {
            # JSON has no infinity.
            name: [side[place] if np.isfinite(side[place]) else None for side in both]
            for name, both in comparison.values.items()
        },
        "preferred": {name: values[place] for name, values in comparison.preferred.items()},
    }


def _export(
    comparison: ComparedReplies, benchmark: str, sides: tuple[ComparedModel, ComparedModel], folder: Path
) -> None:
    now = time.time()
    for side, replies in zip(sides, comparison.replies, strict=True):
        path = write_answers(benchmark, folder, side.name, comparison.questions, replies, now=now)
        comparison.display.line(f"{benchmark}: {path}")
