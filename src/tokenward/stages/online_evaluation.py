"""The evaluation of an online run: replies to the test examples before and after, or the prompts that were found."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tokenward.artifacts import StageFolder, fingerprint, read_json, write_json, write_jsonl
from tokenward.display import Display
from tokenward.evaluation.measures import RowValues
from tokenward.evaluation.replies import METRICS, apply_metric
from tokenward.evaluation.statistics import Figures, before_after_figures, mean_figure, write_figures
from tokenward.models.loading import LanguageModel
from tokenward.plugins import find
from tokenward.sampling import Reply, SamplingSettings, sample_replies
from tokenward.sampling.classification import Chosen, TaskModel, choose, random_prompts
from tokenward.sampling.rollouts import Context, columns_of, seed_of
from tokenward.sampling.sources import ChrF, Meteor, Rouge
from tokenward.scoring.reads import token_values
from tokenward.stages.data import source_fingerprint
from tokenward.stages.evaluation import EvaluationStage, evaluation_statistics, keep_recipe, show_figures
from tokenward.stages.online import online_policy
from tokenward.stages.run import Run
from tokenward.stages.tasks import (
    EncodedExamples,
    encoded_examples,
    labelled_parts,
    prompt_start,
    sampler_of,
    task_model,
)


class OnlineEvaluationStage(EvaluationStage):
    """Measure what an online run changed; writes ``metrics.json``, and its replies or prompts."""

    def settings(self, run: Run) -> Mapping[str, Any]:
        """Its table, and that of the prompt task."""
        table = run.recipe.prompt_task
        task = {} if table is None else {"prompt_task": table.model_dump()}
        return {**super().settings(run), **task}

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The policy, and the texts of the prompt task."""
        inputs, table = {"online": run.done("online").fingerprint}, run.recipe.prompt_task
        if table is not None:
            texts = [source_fingerprint(path) for path in (table.development, table.test)]
            inputs["test"] = fingerprint(texts)
        return inputs

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Measure."""
        by_row, table = RowValues(), run.recipe.prompt_task
        if table is None:
            figures, samples = _on_examples(run, by_row)
            write_jsonl(folder.path / "samples.jsonl", samples)
            by_row.write(folder.path)
        else:
            figures, prompts = _on_prompts(run)
            write_json(folder.path / "prompts.json", prompts)
        write_figures(folder.path / "metrics.json", figures)
        keep_recipe(run, folder.path)
        return {"figures": len(figures)}

    def show(self, run: Run) -> None:
        """The closing tables, and where everything is."""
        table = run.recipe.prompt_task
        show_figures(run)
        if table is not None:
            _show_prompts(run, table.best)
        run.display.line(f"\nmodel:   {run.path('online') / 'model'}")
        run.display.line(f"figures: {run.path('evaluation') / 'metrics.json'}")
        if table is not None:
            run.display.line(f"prompts: {run.path('evaluation') / 'prompts.json'}")

    def check_data(self, run: Run) -> None:
        """Try the metrics that compare with references on the test's own, before hours of training."""
        check_metrics(run)


def _on_examples(run: Run, by_row: RowValues) -> tuple[Figures, list[dict[str, Any]]]:
    start, policy = run.load(run.start_model), run.load(str(run.path("online") / "model"))
    longest = run.recipe.evaluation.max_new_tokens
    test = encoded_examples(run, policy.template(run.style), "test", reply=longest)
    figures = _likelihood(run, start, policy, test)
    contexts = test.contexts[: run.recipe.evaluation.prompts]
    before, after = (_replies(run, name, contexts, label) for name, label in _sides(run))
    values: dict[str, list[list[float]]] = {}
    for name in run.recipe.evaluation.metrics:
        values[name] = [_scored(name, contexts, side) for side in (before, after)]
    values["length"] = [[float(len(reply.ids)) for reply in side] for side in (before, after)]
    values["ended"] = [[float(reply.ended) for reply in side] for side in (before, after)]
    for name, (first, second) in values.items():
        figures |= before_after_figures(name, first, second, **evaluation_statistics(run))
        by_row.add_change([context.example.key for context in contexts], name, first, second)
    samples = [
        {
            "key": context.example.key,
            "before": before[index].text,
            "after": after[index].text,
            "references": list(context.example.references),
            "values": {name: [side[index] for side in sides] for name, sides in values.items()},
        }
        for index, context in enumerate(contexts)
    ]
    return figures, samples


def check_metrics(run: Run) -> None:
    """Try the metrics that compare with references on the test's own, before hours of training.

    Raises:
        UserError: one of them could not be measured.
    """
    found = {name: find("metric", name, METRICS) for name in run.recipe.evaluation.metrics}
    tried = [name for name, metric in found.items() if isinstance(metric, Rouge | Meteor | ChrF)]
    if not tried or run.recipe.examples is None or (run.path("online") / "model").is_dir():
        return
    template = run.tokenizer_template(run.recipe.model.name)
    quiet = replace(run, display=Display(quiet=True))  # the evaluation itself will show these rows
    test = encoded_examples(quiet, template, "test", reply=run.recipe.evaluation.max_new_tokens)
    contexts = test.contexts[: run.recipe.evaluation.prompts]
    perfect = [Reply([0], next(iter(context.example.references), "text"), True) for context in contexts]
    for name in tried:
        _scored(name, contexts, perfect)


def _sides(run: Run) -> list[tuple[str, str]]:
    return [
        (run.start_model, "replies, before"),
        (str(run.path("online") / "model"), "replies, after"),
    ]


def _likelihood(run: Run, start: LanguageModel, policy: LanguageModel, test: EncodedExamples) -> Figures:
    """Mean log-probability per token of the first reference, before and after."""
    rows = [row for row in test.rows if row.responses]
    if not rows:
        return {}
    settings = {
        "precision": run.recipe.scores.precision,
        "tokens_per_batch": run.recipe.scores.tokens_per_batch,
    }
    sides = [
        [float(value[0].mean()) for value in token_values(model, rows, **settings)]  # type: ignore[arg-type]
        for model in (start, policy)
    ]
    return before_after_figures("references/logp_per_token", *sides, **evaluation_statistics(run))


def _replies(run: Run, name: str, contexts: Sequence[Context], label: str) -> list[Reply]:
    table = run.recipe.evaluation
    settings = SamplingSettings(
        table.max_new_tokens, table.temperature, table.top_p, table.top_k, table.batch
    )
    model = run.load(name, dtype=table.precision)
    template = model.template(run.style)
    with run.display.progress(label, len(contexts)) as bar:
        prompts = [context.prompt for context in contexts]
        return sample_replies(model, template, prompts, settings, seed=run.recipe.seed, progress=bar.advance)


def _scored(name: str, contexts: Sequence[Context], replies: Sequence[Reply]) -> list[float]:
    examples = [context.example for context in contexts]
    return apply_metric(
        name,
        find("metric", name, METRICS),
        [example.prompt[-1]["content"] if example.prompt else "" for example in examples],
        [reply.text for reply in replies],
        [reply.ids for reply in replies],
        columns=columns_of(examples),
        where=[example.source for example in examples],
    )


def _on_prompts(run: Run) -> tuple[Figures, dict[str, Any]]:
    table = run.recipe.prompt_task
    assert table is not None
    policy, task, parts = run.load(str(run.path("online") / "model")), task_model(run), labelled_parts(run)
    special = policy.template("plain").special_ids
    prompts = {
        "learned": _drawn(run, policy),
        # What the same policy writes before it has learned anything: what is due to the model alone.
        "untrained": _drawn(run, online_policy(run)),
        "no_prompt": [[]],
        "random": random_prompts(
            len(task.model.tokenizer), _length(run), table.random, run.recipe.seed, special
        ),
        "manual": [_ids(task, text) for text in table.manual],
    }
    with run.display.progress("prompts", len(prompts)) as bar:
        found: dict[str, Chosen] = {}
        for name, candidates in prompts.items():
            if candidates:
                found[name] = choose(
                    task,
                    candidates,
                    parts.development,
                    parts.test,
                    best=table.best,
                    correct=table.correct,
                    wrong=table.wrong,
                )
            bar.advance()
    figures = _prompt_figures(run, found)
    return figures, {name: _prompt_record(chosen) for name, chosen in found.items()}


def _length(run: Run) -> int:
    assert run.recipe.online is not None
    return run.recipe.online.sampling.max_new_tokens


def _ids(task: TaskModel, text: str) -> list[int]:
    return list(task.model.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def _drawn(run: Run, policy: LanguageModel) -> list[list[int]]:
    """Prompts drawn from a policy, and its likeliest one."""
    table = run.recipe.prompt_task
    assert table is not None
    start = prompt_start(run, policy)
    seed = seed_of(run.recipe.seed, "candidates")
    drawn = sampler_of(run, policy, fixed_length=True)([start], count=table.candidates, seed=seed)[0]
    greedy = SamplingSettings(max_new_tokens=_length(run), temperature=0.0, fixed_length=True)
    likeliest = sample_replies(policy, policy.template("plain"), [start], greedy, seed=seed)
    return [reply.ids for reply in [*likeliest, *drawn]]


def _prompt_figures(run: Run, found: dict[str, Chosen]) -> Figures:
    """Test accuracy of the best by the development score, plain and calibrated, and the paired differences."""
    statistics = evaluation_statistics(run)
    figures: Figures = {}
    for kind in ("correct", "calibrated"):
        rows = {name: _by_row(getattr(chosen, kind)) for name, chosen in found.items()}
        label = "accuracy" if kind == "correct" else "calibrated_accuracy"
        for name, values in rows.items():
            figures[f"{label}/{name}"] = mean_figure(values, **statistics)
        for name, values in rows.items():
            if name != "learned":
                difference = rows["learned"] - values
                figures[f"{label}/learned_minus_{name}"] = mean_figure(difference, **statistics)
    return figures


def _show_prompts(run: Run, best: int) -> None:
    """The learned prompts that were tested."""
    learned = read_json(run.path("evaluation") / "prompts.json")["learned"]
    # Quoted, because a prompt may begin with a space or hold a line break.
    rows = [
        (json.dumps(candidate["text"], ensure_ascii=False), f"{candidate['accuracy']:.3f}", f"{tested:.3f}")
        for candidate, tested in zip(learned["candidates"][:best], learned["test_accuracy"], strict=True)
    ]
    run.display.table("learned prompts", ("", "accuracy, development", "accuracy, test"), rows)


def _by_row(correct: torch.Tensor) -> Any:
    """Per test row, the share of the best prompts that get it right.  [k n] -> [n]"""
    return correct.double().mean(0).numpy()


def _prompt_record(chosen: Chosen) -> dict[str, Any]:
    return {
        "candidates": [candidate._asdict() for candidate in chosen.candidates],
        "test_accuracy": chosen.accuracy,
        "calibrated_test_accuracy": chosen.calibrated_accuracy,
        "offsets": chosen.offsets.tolist(),
    }
