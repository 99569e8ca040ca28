"""Two models on the same prompts: replies, metrics, rewards and a judge, with intervals; answer files for official tools."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenward.artifacts import write_jsonl
from tokenward.config import Recipe, parse_recipe
from tokenward.config.judge import load_judge
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.evaluation.answers import Endpoint
from tokenward.evaluation.benchmarks import BENCHMARKS, Question, write_answers
from tokenward.evaluation.metrics import METRICS
from tokenward.evaluation.rewards import find_reward_model
from tokenward.evaluation.statistics import Figures, write_figures
from tokenward.plugins import find
from tokenward.stages.figures import show_tables
from tokenward.stages.prompts import read_prompts
from tokenward.tools.comparison import ComparedReplies, apply_judge, apply_metrics, apply_rewards, check_names
from tokenward.tools.model_replies import (
    ComparedModel,
    fitting,
    model_of,
    replies_of,
    reply_record,
    short_name,
)
from tokenward.tools.run import quiet_libraries

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
