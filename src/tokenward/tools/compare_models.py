"""``tokenward compare-models``: two models on the same prompts, compared by metrics, reward models and a judge."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokenward.artifacts import user_path, write_json, write_jsonl
from tokenward.config import Recipe, parse_recipe
from tokenward.config.judge import JudgeTable, load_judge
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.evaluation.benchmarks import BENCHMARKS, Question, write_answers
from tokenward.evaluation.judge import AnswerCache, Pair, first_place, judge_pairs, open_judge
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
from tokenward.hidden import hidden
from tokenward.plugins import find
from tokenward.sampling import Reply
from tokenward.sampling.rollouts import columns_of
from tokenward.stages.evaluation import show_tables
from tokenward.tools.model_replies import (
    ComparedModel,
    fit_context,
    model_folder,
    read_prompts,
    sample_model,
    short_name,
)
from tokenward.tools.run import quiet_libraries

PLAIN: dict[str, Callable[[Reply], float]] = {
    "length": lambda reply: float(len(reply.ids)),
    "characters": lambda reply: float(len(reply.text)),
    "ended": lambda reply: float(reply.ended),
}
"""Measures that are always computed: tokens, characters, and whether the reply ended by itself."""

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


@dataclass(kw_only=True)
class ModelComparison:
    """The replies of two models to the same questions, and their measures so far.

    Attributes:
        recipe: Holds the bootstrap settings.
        display: Shows progress.
        questions: The questions.
        replies: Replies of both models, one per turn of each question.
        values: The numbers of both models, by measure.
        preferred: How much each reply of the second model is preferred, 0 to 1, by measure; None without a verdict.
        figures: Figures by name.
    """

    recipe: Recipe
    display: Display
    questions: list[Question]
    replies: tuple[list[list[Reply]], list[list[Reply]]]
    values: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    preferred: dict[str, list[float | None]] = field(default_factory=dict)
    figures: Figures = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Only the first turn is compared: both models have the same prompt there.
        self._first = [[turns[0] for turns in side] for side in self.replies]
        self._texts = [[reply.text for reply in side] for side in self._first]
        self._bootstrap = {"resamples": self.recipe.evaluation.bootstrap, "seed": self.recipe.seed}

    def add_metrics(self, metrics: Mapping[str, Callable[..., Any]]) -> None:
        """Apply metrics, and measure the length of the replies.

        Raises:
            UserError: a metric needs a column that is missing, or does not return one number per reply.
        """
        examples = [question.example for question in self.questions]
        prompts = [example.prompt[-1]["content"] for example in examples]
        where, columns = [example.source for example in examples], columns_of(examples) if metrics else {}
        for name, metric in metrics.items():
            ids = ([reply.ids for reply in side] for side in self._first)
            before, after = (
                apply_metric(name, metric, prompts, texts, side, columns=columns, where=where)
                for texts, side in zip(self._texts, ids, strict=True)
            )
            self._compare(name, before, after)
        for name, value in PLAIN.items():
            before, after = ([value(reply) for reply in side] for side in self._first)
            self.figures |= before_after_figures(name, before, after, **self._bootstrap)

    def add_rewards(self, models: Sequence[ReplyRewardModel]) -> None:
        """Apply reward models, one after the other.

        Raises:
            UserError: a model cannot be loaded.
        """
        examples = [question.example for question in self.questions]
        for model in models:
            before, after = (rewards(model, examples, texts) for texts in self._texts)
            self._compare(short_name(model.name), before, after)

    def add_judge(self, judge: JudgeTable, folder: Path) -> None:
        """Ask a judge twice per pair, in both orders. Answers are kept in ``judge.sqlite``, verdicts in ``judge.json``.

        Raises:
            UserError: the endpoint refuses the request, or fails too often in a row.
        """
        pairs = [
            Pair(question.example.prompt, before, after)
            for question, before, after in zip(self.questions, *self._texts, strict=True)
        ]
        cache = AnswerCache(folder / "judge.sqlite")
        requests = 2 * sum(pair.before != pair.after for pair in pairs)
        try:
            with self.display.progress("judge", requests) as bar:
                judged = judge_pairs(judge, pairs, cache, progress=bar.advance)
        finally:
            cache.close()
        self._prefer("judge", [item.preferred for item in judged.judgments])
        self.figures["judge/first_place"] = mean_figure(first_place(judged.judgments), **self._bootstrap)
        verdicts = [list(item.verdicts) for item in judged.judgments]
        record = {"judge": hidden(judge.model_dump()), "counts": judged.counts, "verdicts": verdicts}
        write_json(folder / "judge.json", record)
        counts = [(name.replace("_", " "), f"{value:g}") for name, value in judged.counts.items() if value]
        self.display.table("judge", ("", "count"), counts)

    def _compare(self, name: str, before: list[float], after: list[float]) -> None:
        self.values[name] = before, after
        pairs = np.array([before, after])
        finite = np.isfinite(pairs).all(
            axis=0
        )  # an empty reply has the reward -inf: it loses, and has no mean
        self.figures |= before_after_figures(name, *pairs[:, finite].tolist(), **self._bootstrap)
        self._prefer(name, preferences(before, after))

    def _prefer(self, name: str, preferred: Sequence[float | None]) -> None:
        self.preferred[name] = list(preferred)
        kept = [place for place, value in enumerate(preferred) if value is not None]
        values = [value for value in preferred if value is not None]
        before, after = ([texts[place] for place in kept] for texts in self._texts)
        self.figures |= win_figures(name, values, before, after, **self._bootstrap)

    def write(self, folder: Path) -> None:
        """Write ``figures.json`` and ``replies.jsonl``."""
        write_figures(folder / "figures.json", self.figures)
        write_jsonl(folder / "replies.jsonl", map(self._record, range(len(self.questions))))

    def _record(self, place: int) -> dict[str, Any]:
        question, (before, after) = self.questions[place], (side[place] for side in self.replies)
        return {
            "key": question.example.key,
            "source": question.example.source,
            "prompt": list(question.example.prompt),
            "follow_ups": list(question.follow_ups),
            "before": [_reply_record(reply) for reply in before],
            "after": [_reply_record(reply) for reply in after],
            "values": {
                # JSON has no infinity.
                name: [side[place] if np.isfinite(side[place]) else None for side in both]
                for name, both in self.values.items()
            },
            "preferred": {name: values[place] for name, values in self.preferred.items()},
        }


def _reply_record(reply: Reply) -> dict[str, Any]:
    return {"text": reply.text, "tokens": len(reply.ids), "ended": reply.ended}


def compare_models(
    before: str,
    after: str,
    prompts: str,
    *,
    metrics: Sequence[str] = (),
    rewards: Sequence[str] = (),
    judge: str | Path | None = None,
    export: str | None = None,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Figures:
    """Sample both models on the same prompts with the same seeds, and compare the replies by each measure.

    Writes ``replies.jsonl``, ``figures.json`` and, with a judge, ``judge.json``. Replies and the judge's answers are kept
    in the same folder, so a stopped comparison continues where it stopped.

    Args:
        before: Folder or hub name of a model, or the folder of a run.
        after: The same for the second model.
        prompts: Anything that :func:`tokenward.data.rows` reads.
        metrics: Names of metrics, or ``"module:name"``.
        rewards: Reward models: sequence classifiers, or stage folders of a run.
        judge: File with the settings of a judge.
        export: A key of ``BENCHMARKS``; the prompts must be its question file.
        output: Folder of the results; None is ``runs/BEFORE-vs-AFTER``.
        overrides: Changes ``"a.b=value"`` of the keys in ``SETTABLE``.
        quiet: Show nothing.

    Raises:
        UserError: a model, prompt, metric, reward model or judge cannot be used.
    """
    quiet_libraries()
    display, recipe = Display(quiet=quiet), _recipe(overrides)
    found = {name: find("metric", name, METRICS) for name in metrics}
    reward_models = [find_reward_model(name) for name in rewards]
    _check_names([*found, *(short_name(model.name) for model in reward_models)])
    table = None if judge is None else load_judge(judge)
    if table is not None:
        with open_judge(table, os.environ):
            pass  # report a missing key or package now, not after hours of sampling
    if export is not None and export not in BENCHMARKS:
        message = f"there is no export {export!r}. Choose one of: {', '.join(BENCHMARKS)}."
        raise UserError(message, code="unknown-name")
    sides = _name_models(before, after)
    folder = user_path(output or Path("runs") / f"{sides[0].name}-vs-{sides[1].name}")
    questions = _fitting(sides, read_prompts(prompts, export, recipe, display), recipe, export, display)
    one, other = (sample_model(side, questions, recipe, folder, display) for side in sides)
    comparison = ModelComparison(recipe=recipe, display=display, questions=questions, replies=(one, other))
    comparison.add_metrics(found)
    comparison.add_rewards(reward_models)
    if table is not None:
        comparison.add_judge(table, folder)
    comparison.write(folder)
    show_tables(display, comparison.figures, f"wins of {sides[1].name} against {sides[0].name}")
    if export is not None:
        now = time.time()
        for side, replies in zip(sides, comparison.replies, strict=True):
            path = write_answers(export, folder, side.name, questions, replies, now=now)
            display.line(f"{export}: {path}")
    display.line(f"\nreplies: {folder / 'replies.jsonl'}\nfigures: {folder / 'figures.json'}")
    return comparison.figures


def _check_names(names: Sequence[str]) -> None:
    """Refuse two measures of the same name, because their figures would overwrite each other."""
    seen = ["judge", *PLAIN]
    for name in names:
        if name in seen:
            raise UserError(
                f"two measures are called {name}. Rename a folder or a function, or leave one of them out.",
                code="duplicate-name",
            )
        seen.append(name)


def _recipe(overrides: Sequence[str]) -> Recipe:
    recipe, lines = parse_recipe(DEFAULTS, "the defaults of compare-models", overrides)
    for key in lines.overridden:
        if key == "evaluation.metrics" or not key.startswith(SETTABLE):
            advice = "Use --metric NAME." if key == "evaluation.metrics" else "Leave it out."
            raise UserError(
                f"--set {key}: this key has no effect on a comparison of two models. Keys that have one: evaluation.*, "
                f"tokens.template, tokens.chat_template_kwargs, seed, model.device, model.attention, model.trust_remote_code. {advice}",
                code="unused-key",
                key=key,
            )
    return recipe


def _name_models(before: str, after: str) -> tuple[ComparedModel, ComparedModel]:
    first, second = model_folder(before), model_folder(after)
    names = short_name(first), short_name(second)
    if names[0] == names[1]:
        names = f"{names[0]}-before", f"{names[1]}-after"
    return ComparedModel("before", first, names[0]), ComparedModel("after", second, names[1])


def _fitting(
    sides: Sequence[ComparedModel],
    questions: list[Question],
    recipe: Recipe,
    export: str | None,
    display: Display,
) -> list[Question]:
    """The questions that fit the context of both models. A benchmark must be answered completely."""
    fits = fit_context(sides, questions, recipe)
    if all(fits):
        return questions
    message = (
        f"{fits.count(False)} prompts with {recipe.evaluation.max_new_tokens} new tokens do not fit the context of a model; "
        f"the first is {questions[fits.index(False)].example.source}"
    )
    if export is not None or not any(fits):
        raise UserError(
            f"{message}. Lower --set evaluation.max_new_tokens=N.",
            code="too-long",
            key="evaluation.max_new_tokens",
        )
    display.line(f"  left out: {message}")
    return [question for question, fit in zip(questions, fits, strict=True) if fit]
