"""The evaluation stage: measures the policy before and after training, on the same eval pairs and prompts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenward.artifacts import StageFolder, user_path, write_json, write_jsonl
from tokenward.display import Display
from tokenward.distributed import first_alone
from tokenward.evaluation.measures import Figures, Measures, Models, Samples
from tokenward.evaluation.replies import METRICS
from tokenward.evaluation.sampled import EvaluationReplies
from tokenward.evaluation.statistics import load_figures, write_figures
from tokenward.evaluation.tables import FigureRow, figure_rows, main_note, main_rows
from tokenward.hidden import hidden
from tokenward.models.loading import DTYPES, LanguageModel
from tokenward.plugins import find
from tokenward.sampling.checks import check_temperature
from tokenward.sampling.registry import evaluation_engine
from tokenward.scoring.store import TokenStore
from tokenward.stages.auxiliary import scorer_of
from tokenward.stages.base import Checks, Stage
from tokenward.stages.other_tokens import judge_start
from tokenward.stages.run import Run
from tokenward.stages.tables import eval_comparisons, tables
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.template import Template


def read_figures(run: Run | str | Path) -> Figures:
    """The figures of a finished evaluation.

    Args:
        run: The run, from :func:`tokenward.run` or :func:`tokenward.open_run`, or its folder.

    Returns:
        Figures by name, each with its value, a 95 % bootstrap interval and n.

    Raises:
        UserError: they are missing or damaged.
    """
    folder = run.path("evaluation") if isinstance(run, Run) else user_path(run) / "evaluation"
    return load_figures(folder / "metrics.json")


def show_figures(run: Run) -> None:
    """Show the figures that say what a run did, and where the others are."""
    figures, folder = read_figures(run), run.path("evaluation")
    if main := main_rows(figures):
        run.display.table("what training changed, on eval rows", _columns("change"), map(_cells, main))
        run.display.line(main_note(figures))
        count = len(figure_rows(figures))
        run.display.line(f"\nall {count} figures: tokenward show {run.folder} --figures")
    elif figures:
        show_tables(run.display, figures, "figures on the eval rows")
    run.display.line(f"as JSON: {folder / 'metrics.json'}")


def _columns(value: str) -> tuple[str, ...]:
    return "", "before", "after", value, "95 % interval", "n"


def show_tables(display: Display, figures: Figures, title: str) -> None:
    """Show every figure under this title."""
    display.table(title, _columns("value or change"), map(_cells, figure_rows(figures)))


def _cells(row: FigureRow) -> tuple[str, ...]:
    return *row[:-1], str(row.n)


def evaluation_statistics(run: Run) -> dict[str, int]:
    """Settings of the bootstrap intervals."""
    return {"resamples": run.recipe.evaluation.bootstrap, "seed": run.recipe.seed}


RECIPE = "recipe.json"
"""File with the complete recipe in the folder of an evaluation; manifests only have the keys of their stages."""


def keep_recipe(run: Run, folder: Path) -> None:
    """Write the run's recipe into a folder, defaults included and secrets masked."""
    write_json(folder / RECIPE, hidden(run.recipe.model_dump(mode="json")))


class EvaluationStage(Stage):
    """Measure what training changed; writes ``metrics.json``, ``rows.jsonl`` and ``samples.jsonl``.

    Each figure has its n and a 95 % bootstrap interval. Figures named ``change`` are paired by prompt.
    """

    name, layout, parallel = "evaluation", 2, True

    def settings(self, run: Run) -> Mapping[str, Any]:
        return {"evaluation": run.recipe.evaluation.model_dump(), "seed": run.recipe.seed}

    def inputs(self, run: Run) -> Mapping[str, str]:
        names = ["scores", "policy", *(["eval_reward"] if run.recipe.eval_reward is not None else [])]
        return {name: run.done(name).identity for name in names}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        measures = measures_of(run)
        figures, samples = _measure(run, measures)

        def write() -> None:
            write_figures(folder.path / "metrics.json", figures)
            write_jsonl(folder.path / "samples.jsonl", _sample_records(samples))
            measures.by_row.write(folder.path)
            keep_recipe(run, folder.path)

        first_alone(write)
        return {"figures": len(figures), "prompts": len(samples.prompts), **sampled_by(measures.answering)}

    def show(self, run: Run) -> None:
        show_figures(run)
        if not read_figures(run):
            found = tables(run, run.tokenizer_template(run.policy_start))
            run.display.line(f"nothing was measured: {found.without_eval or 'no eval row is left'}")
        run.display.line(f"replies: {run.path('evaluation') / 'samples.jsonl'}")
        run.display.line(f"model:   {run.path('policy') / 'model'}")

    def checks(self, run: Run) -> Checks:
        table, key = run.recipe.evaluation, "evaluation.temperature"
        return {
            "evaluation.metrics": lambda: [find("metric", name, METRICS) for name in table.metrics],
            key: lambda: check_temperature(table.temperature, key),
            "evaluation.sampler": lambda: evaluation_engine(table.sampler),
        }


def sampled_by(answering: EvaluationReplies) -> dict[str, Any]:
    """The facts of a manifest about the engine that sampled the replies; none for transformers."""
    return {"sampler": answering.facts} if answering.facts else {}


def measures_of(run: Run) -> Measures:
    """How the recipe's evaluation computes its figures."""
    table = run.recipe.evaluation
    return Measures(
        metrics=table.metrics,
        sampling=run.reply_settings,
        engine=evaluation_engine(table.sampler),
        seed=run.recipe.seed,
        resamples=table.bootstrap,
        display=run.display,
        **run.passes,
    )


def prompts_to_answer(run: Run, template: Template) -> list[TokenRow]:
    """At most ``evaluation.prompts`` eval prompts, in an order that does not depend on the file."""
    rows, _ = eval_comparisons(run, template).fitting(run.limits)
    return rows.first_by_key(run.recipe.evaluation.prompts)


def _measure(run: Run, measures: Measures) -> tuple[Figures, Samples]:
    template = run.tokenizer_template(run.policy_start)
    rows = tables(run, template).eval
    figures, samples = measures(_models(run), rows, template, _prompts(run, template))
    if pairs := rows.where(rows.sizes == 2):
        store, name = TokenStore(run.path("scores")), run.recipe.scores.scorer.name
        figures |= measures.credit(pairs, store, scorer_of(run), name)
    return figures, samples


def _models(run: Run) -> Models:
    precision = run.recipe.evaluation.precision

    def replying(model: LanguageModel) -> LanguageModel:
        return model if model.dtype == DTYPES[precision] else run.load(model.name, dtype=precision)

    start, policy = run.policy_start, str(run.path("policy") / "model")
    judged, base = run.recipe.eval_reward is not None, judge_start(run)
    return Models(
        lambda: run.load(start),
        lambda: run.load(policy),
        replying,
        (lambda: run.load(str(run.path("eval_reward") / "model"))) if judged else None,
        (lambda: run.load(base)) if base != start else None,
    )


def _prompts(run: Run, template: Template) -> list[TokenRow]:
    prompts, wanted = prompts_to_answer(run, template), run.recipe.evaluation.prompts
    if len(prompts) < wanted:
        run.display.line(
            f"  there are {len(prompts)} eval prompts to reply to; evaluation.prompts is {wanted}"
        )
    return prompts


def _sample_records(samples: Samples) -> list[dict[str, Any]]:
    return [
        {
            "key": row.comparison.key,
            "prompt": list(row.comparison.prompt),
            "before": before.text,
            "after": after.text,
            "ended": [before.ended, after.ended],
        }
        for row, before, after in zip(*samples, strict=True)
    ]
