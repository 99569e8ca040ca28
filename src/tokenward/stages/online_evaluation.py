"""Evaluates an online run: replies to the test examples before and after training, or the learned prompts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokenward.artifacts import StageFolder, fingerprint, read_json, write_json, write_jsonl
from tokenward.display import Display
from tokenward.distributed import first_alone
from tokenward.evaluation.measures import RowValues
from tokenward.evaluation.replies import METRICS, apply_metric
from tokenward.evaluation.sampled import EvaluationReplies
from tokenward.evaluation.statistics import Figures, before_after_figures, mean_figure, write_figures
from tokenward.models.loading import LanguageModel
from tokenward.plugins import find
from tokenward.sampling import Reply, SamplingSettings, sample_replies
from tokenward.sampling.classification import Chosen, choose, random_prompts
from tokenward.sampling.rollouts import Context, columns_of, seed_of
from tokenward.sampling.sources import ChrF, Meteor, Rouge
from tokenward.scoring.reads import token_values
from tokenward.stages.data import source_fingerprint
from tokenward.stages.evaluation import (
    EvaluationStage,
    evaluation_statistics,
    keep_recipe,
    measures_of,
    sampled_by,
    show_figures,
)
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
from tokenward.tokens.template import Template


class OnlineEvaluationStage(EvaluationStage):
    """Measure what an online run changed; writes ``metrics.json``, and its replies or prompts."""

    def settings(self, run: Run) -> Mapping[str, Any]:
        table = run.recipe.prompt_task
        task = {} if table is None else {"prompt_task": table.model_dump()}
        return {**super().settings(run), **task}

    def inputs(self, run: Run) -> Mapping[str, str]:
        inputs, table = {"online": run.done("online").identity}, run.recipe.prompt_task
        if table is not None:
            texts = [source_fingerprint(path) for path in (table.development, table.test)]
            inputs["test"] = fingerprint(texts)
        return inputs

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        if run.recipe.prompt_task is not None:
            return first_alone(lambda: _evaluate_prompts(run, folder))
        by_row, answering = RowValues(), measures_of(run).answering
        figures, samples = _on_examples(run, by_row, answering)

        def write() -> None:
            write_jsonl(folder.path / "samples.jsonl", samples)
            by_row.write(folder.path)

        first_alone(write)
        return {**first_alone(lambda: _write(run, folder, figures)), **sampled_by(answering)}

    def show(self, run: Run) -> None:
        table, evaluation = run.recipe.prompt_task, run.path("evaluation")
        show_figures(run)
        if table is not None:
            _show_prompts(run, table.best)
        run.display.line(f"model:   {run.path('online') / 'model'}")
        if table is not None:
            run.display.line(f"prompts: {evaluation / 'prompts.json'}")

    def check_data(self, run: Run) -> None:
        """Try metrics that need references on the test's references, so that they do not fail after training.

        Raises:
            UserError: a metric cannot be computed.
        """
        found = {name: find("metric", name, METRICS) for name in run.recipe.evaluation.metrics}
        tried = [name for name, metric in found.items() if isinstance(metric, Rouge | Meteor | ChrF)]
        if not tried or run.recipe.examples is None or (run.path("online") / "model").is_dir():
            return
        template = run.tokenizer_template(run.recipe.model.name)
        quiet = replace(run, display=Display(quiet=True))  # the evaluation itself will show these rows
        contexts = _test_examples(quiet, template).contexts[: run.recipe.evaluation.prompts]
        perfect = [Reply([0], next(iter(context.example.references), "text"), True) for context in contexts]
        for name in tried:
            _metric_values(name, contexts, perfect)


def _test_examples(run: Run, template: Template) -> EncodedExamples:
    return encoded_examples(run, template, "test", reply=run.recipe.evaluation.max_new_tokens)


def _on_examples(
    run: Run, by_row: RowValues, answering: EvaluationReplies
) -> tuple[Figures, list[dict[str, Any]]]:
    names = [run.start_model, str(run.path("online") / "model")]
    start, policy = map(run.load, names)
    test = _test_examples(run, policy.template(run.style))
    figures = _likelihood(run, start, policy, test)
    contexts = test.contexts[: run.recipe.evaluation.prompts]
    sides = _sides(run, names, contexts, start, answering)
    metrics = run.recipe.evaluation.metrics
    values = {
        name: first_alone(lambda name=name: [_metric_values(name, contexts, side) for side in sides])
        for name in metrics
    }
    values["length"] = [[float(len(reply.ids)) for reply in side] for side in sides]
    values["ended"] = [[float(reply.ended) for reply in side] for side in sides]
    for name, (first, second) in values.items():
        figures |= before_after_figures(name, first, second, **evaluation_statistics(run))
        by_row.add_change([context.example.key for context in contexts], name, first, second)
    samples = [
        {
            "key": context.example.key,
            "prompt": list(context.example.prompt),
            "before": before.text,
            "after": after.text,
            "references": list(context.example.references),
            "values": {name: [side[index] for side in both] for name, both in values.items()},
        }
        for index, (context, before, after) in enumerate(zip(contexts, *sides, strict=True))
    ]
    return figures, samples


def _likelihood(run: Run, start: LanguageModel, policy: LanguageModel, test: EncodedExamples) -> Figures:
    """Mean log-probability per token of the first reference, before and after training."""
    rows = [row for row in test.rows if row.responses]
    if not rows:
        return {}
    sides = [
        [float(value[0].mean()) for value in token_values(model, rows, shared=True, **run.passes)]
        for model in (start, policy)
    ]
    return before_after_figures("references/logp_per_token", *sides, **evaluation_statistics(run))


def _sides(
    run: Run,
    names: Sequence[str],
    contexts: Sequence[Context],
    start: LanguageModel,
    answering: EvaluationReplies,
) -> list[list[Reply]]:
    """Replies before and after training."""
    sides, prompts = [], [context.prompt for context in contexts]
    for name, label, before in zip(names, ("before", "after"), (None, start), strict=True):
        model = run.load(name, dtype=run.recipe.evaluation.precision)
        template = model.template(run.style)
        with run.display.progress(f"replies, {label}", len(contexts)) as bar:
            sides.append(answering(model, template, prompts, before=before, progress=bar.advance))
    answering.close()
    return sides


def _metric_values(name: str, contexts: Sequence[Context], replies: Sequence[Reply]) -> list[float]:
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


def _evaluate_prompts(run: Run, folder: StageFolder) -> dict[str, int]:
    figures, prompts = _on_prompts(run)
    write_json(folder.path / "prompts.json", prompts)
    return _write(run, folder, figures)


def _write(run: Run, folder: StageFolder, figures: Figures) -> dict[str, int]:
    write_figures(folder.path / "metrics.json", figures)
    keep_recipe(run, folder.path)
    return {"figures": len(figures)}


def _on_prompts(run: Run) -> tuple[Figures, dict[str, Any]]:
    table, length = run.prompt_task, run.online.sampling.max_new_tokens
    policy, task, parts = run.load(str(run.path("online") / "model")), task_model(run), labelled_parts(run)
    special, tokenizer = policy.template("plain").special_ids, task.model.tokenizer
    prompts = {
        "learned": _sampled(run, policy),
        "untrained": _sampled(run, online_policy(run)),  # the baseline of the same model without training
        "no_prompt": [[]],
        "random": random_prompts(len(tokenizer), length, table.random, run.recipe.seed, special),
        "manual": [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in table.manual],
    }
    factors: dict[str, Any] = {"best": table.best, "correct": table.correct, "wrong": table.wrong}
    with run.display.progress("prompts", len(prompts)) as bar:
        found: dict[str, Chosen] = {}
        for name, candidates in prompts.items():
            if candidates:
                found[name] = choose(task, candidates, parts.development, parts.test, **factors)
            bar.advance()
    return _prompt_figures(run, found), {name: _prompt_record(chosen) for name, chosen in found.items()}


def _sampled(run: Run, policy: LanguageModel) -> list[list[int]]:
    """The most likely prompt of a policy, and sampled ones."""
    start, seed = prompt_start(run, policy), seed_of(run.recipe.seed, "candidates")
    sampler = sampler_of(run, policy, run.online, fixed_length=True)
    drawn = sampler([start], count=run.prompt_task.candidates, seed=seed)[0]
    length = run.online.sampling.max_new_tokens
    greedy = SamplingSettings(max_new_tokens=length, temperature=0.0, fixed_length=True)
    likeliest = sample_replies(policy, policy.template("plain"), [start], greedy, seed=seed)
    return [reply.ids for reply in [*likeliest, *drawn]]


def _prompt_figures(run: Run, found: dict[str, Chosen]) -> Figures:
    """Test accuracy of the prompts with the best development score, plain and calibrated, and paired differences."""
    statistics = evaluation_statistics(run)
    figures: Figures = {}
    for kind, label in (("correct", "accuracy"), ("calibrated", "calibrated_accuracy")):
        # Per test text, the share of the best prompts that classify it correctly.
        rows = {name: getattr(chosen, kind).double().mean(0).numpy() for name, chosen in found.items()}
        for name, values in rows.items():
            figures[f"{label}/{name}"] = mean_figure(values, **statistics)
        for name, values in rows.items():
            if name != "learned":
                difference = rows["learned"] - values
                figures[f"{label}/learned_minus_{name}"] = mean_figure(difference, **statistics)
    return figures


def _show_prompts(run: Run, best: int) -> None:
    learned = read_json(run.path("evaluation") / "prompts.json")["learned"]
    # Quoted, because a prompt may start with a space or contain a line break.
    rows = [
        (json.dumps(candidate["text"], ensure_ascii=False), f"{candidate['accuracy']:.3f}", f"{tested:.3f}")
        for candidate, tested in zip(learned["candidates"][:best], learned["test_accuracy"], strict=True)
    ]
    run.display.table("learned prompts", ("", "accuracy, development", "accuracy, test"), rows)


def _prompt_record(chosen: Chosen) -> dict[str, Any]:
    return {
        "candidates": [candidate._asdict() for candidate in chosen.candidates],
        "test_accuracy": chosen.accuracy,
        "calibrated_test_accuracy": chosen.calibrated_accuracy,
        "offsets": chosen.offsets.tolist(),
    }
