"""The evaluation stage: before and after, on the same held-out pairs and prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenward.artifacts import StageFolder, write_json, write_jsonl
from tokenward.evaluation.credit import KnownResponse, credit_figures, known_response
from tokenward.evaluation.heldout import (
    PairLogprobs,
    preference_figures,
    preference_values,
    unpaired_values,
)
from tokenward.evaluation.metrics import METRICS, apply_metric
from tokenward.evaluation.statistics import Figures, before_after_figures, mean_figure, write_figures
from tokenward.models.loading import LanguageModel
from tokenward.plugins import find
from tokenward.sampling import Reply
from tokenward.sampling.checks import check_temperature
from tokenward.scoring.join import scores_of
from tokenward.scoring.reads import is_online, scope_of_scores
from tokenward.scoring.scorers import Random, Surprisal
from tokenward.scoring.store import TokenStore
from tokenward.scoring.values import token_values
from tokenward.stages.answers import answers, divergence, prompts_to_answer, reply_rows
from tokenward.stages.base import Checks, Stage
from tokenward.stages.figures import evaluation_statistics, show_figures
from tokenward.stages.row_values import PAIR, PROMPT, RowValues
from tokenward.stages.run import Run
from tokenward.stages.scorers import scorer_of
from tokenward.stages.tables import tables
from tokenward.stages.training import logprobs
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.spans import ByteSpan
from tokenward.tokens.spelled import moved
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

RECIPE = "recipe.json"
"""The recipe as an evaluation found it, in its folder: every key, also those that no stage's manifest has."""


def keep_recipe(run: Run, folder: Path) -> None:
    """Write the run's recipe into a folder, with every default of its tables."""
    write_json(folder / RECIPE, run.recipe.model_dump(mode="json"))


class Samples(NamedTuple):
    """Replies to the same prompts before and after training."""

    prompts: list[TokenRow]
    before: list[Reply]
    after: list[Reply]


class EvaluationStage(Stage):
    """Measure what training changed; writes ``metrics.json``, ``rows.jsonl`` and ``samples.jsonl``.

    Each figure has its n and a 95 % bootstrap interval; figures named ``change`` are paired by prompt.
    """

    name, layout = "evaluation", 2

    def settings(self, run: Run) -> Mapping[str, Any]:
        """Its table."""
        return {"evaluation": run.recipe.evaluation.model_dump(), "seed": run.recipe.seed}

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The scores, the policy, and the eval reward model if there is one."""
        names = ["scores", "policy", *(["eval_reward"] if run.recipe.eval_reward is not None else [])]
        return {name: run.done(name).fingerprint for name in names}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Measure."""
        by_row = RowValues()
        figures, samples = _measure(run, by_row)
        write_figures(folder.path / "metrics.json", figures)
        write_jsonl(folder.path / "samples.jsonl", _sample_records(samples))
        by_row.write(folder.path)
        keep_recipe(run, folder.path)
        return {"figures": len(figures), "prompts": len(samples.prompts)}

    def show(self, run: Run) -> None:
        """The closing tables, and where everything is."""
        show_figures(run)
        run.display.line(f"\nmodel:   {run.path('policy') / 'model'}")
        run.display.line(f"replies: {run.path('evaluation') / 'samples.jsonl'}")
        run.display.line(f"figures: {run.path('evaluation') / 'metrics.json'}")

    def checks(self, run: Run) -> Checks:
        """Metrics and a temperature that exist."""
        return evaluation_checks(run)


def evaluation_checks(run: Run) -> Checks:
    """Metrics and a temperature that exist."""
    table = run.recipe.evaluation
    return {
        "evaluation.metrics": lambda: [find("metric", name, METRICS) for name in table.metrics],
        "evaluation.temperature": lambda: check_temperature(table.temperature, "evaluation.temperature"),
    }


def _measure(run: Run, by_row: RowValues) -> tuple[Figures, Samples]:
    start, policy = run.load(run.policy_start), run.load(str(run.path("policy") / "model"))
    template = start.template(run.style)
    rows = tables(run, template).eval
    pairs, alone = rows.where(rows.sizes == 2), rows.where(rows.sizes == 1)
    figures: Figures = {}
    if pairs:
        figures |= _on_pairs(run, start, policy, pairs, by_row)
        figures |= _credit(run, pairs)
    if alone:
        figures |= _on_unpaired(run, start, policy, alone, by_row)
    samples = _sample(run, template)
    if samples.prompts:
        figures |= _on_samples(run, start, policy, samples, by_row)
    return figures, samples


def _logprobs(run: Run, model: LanguageModel, rows: TokenTable, label: str) -> TokenTable:
    """Rows with the log-probabilities of a model in the place of the reference's."""
    return rows.with_column("reference_logp", logprobs(run, model, rows, label))


def _reference_of(run: Run, start: LanguageModel) -> LanguageModel:
    """What the eval reward model was trained from; mostly what the policy started from."""
    return start if run.reference_model == run.policy_start else run.load(run.reference_model)


class _Joined(Sequence[PairLogprobs]):
    """Values of two models on the same pairs."""

    def __init__(self, before: TokenTable, after: TokenTable) -> None:
        self._sides = before, after

    def __len__(self) -> int:
        return len(self._sides[0])

    def __getitem__(self, index: int) -> PairLogprobs:  # type: ignore[override]  # never sliced
        return PairLogprobs(*(_pair(side.values("reference_logp", index)) for side in self._sides))


def _pair(values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, rejected = values
    return chosen, rejected


def _on_pairs(
    run: Run, start: LanguageModel, policy: LanguageModel, pairs: TokenTable, by_row: RowValues
) -> Figures:
    before = _logprobs(run, start, pairs, "pairs, before")
    after = _logprobs(run, policy, pairs, "pairs, after")
    figures = preference_figures(_Joined(before, after), **evaluation_statistics(run))
    keys = ["-".join(keys_of(row.comparison)) for row in pairs]
    for name, values in preference_values(_Joined(before, after)).items():
        by_row.add(PAIR, keys, name, values.tolist())
    if run.recipe.eval_reward is not None:
        eval_reward = run.load(str(run.path("eval_reward") / "model"))
        judged = _logprobs(run, eval_reward, pairs, "pairs, eval_reward")
        reference = _reference_of(run, start)
        base = before if reference is start else _logprobs(run, reference, pairs, "pairs, reference")
        found = preference_figures(_Joined(base, judged), **evaluation_statistics(run))
        figures |= {
            f"eval_reward/pairs_{name}": found[f"preference/{name}"] for name in ("accuracy", "margin")
        }
    return figures


def _on_unpaired(
    run: Run, start: LanguageModel, policy: LanguageModel, rows: TokenTable, by_row: RowValues
) -> Figures:
    """What became of held-out responses that stand alone; nothing orders them, so there is no accuracy."""
    before, after = (
        [side.values("reference_logp", i)[0] for i in range(len(rows))]
        for side in (
            _logprobs(run, start, rows, "responses alone, before"),
            _logprobs(run, policy, rows, "responses alone, after"),
        )
    )
    figures: Figures = {}
    good = [row.comparison.ranks[0] == 0 for row in rows]
    for name, (places, values) in unpaired_values(before, after, good).items():
        by_row.add(PAIR, [keys_of(rows[place].comparison)[0] for place in places], name, values.tolist())
        figures[name] = mean_figure(values, **evaluation_statistics(run))
    return figures


def _credit(run: Run, pairs: TokenTable) -> Figures:
    """Scores against known spans; nothing where the data has none."""
    store = TokenStore(run.path("scores"))
    scorers = {"surprisal": Surprisal(), "random": Random()}
    if not (is_online(scorer_of(run)) or scope_of_scores(scorer_of(run)) != "response"):
        # Other scores are not of one response as it is stored.
        scorers = {run.recipe.scores.scorer.name: scorer_of(run), **scorers}
    known: dict[str, KnownResponse] = {}
    for row in pairs:
        if row.comparison.spans is None:
            continue
        for key, text, spans in zip(
            keys_of(row.comparison), row.comparison.responses, row.comparison.spans, strict=True
        ):
            record = store[key]
            tokens = [ByteSpan(*pair) for pair in zip(record.start, record.end, strict=True)]
            scores = {name: scores_of(scorer, record).tolist() for name, scorer in scorers.items()}
            marked = spans if record.text is None else moved(spans, text, record.text, row.comparison.source)
            known[key] = known_response(record.text or text, marked, tokens, scores)
    return credit_figures(list(known.values()), at=(), **evaluation_statistics(run))


def _sample(run: Run, template: Template) -> Samples:
    """Replies of both models to the same held-out prompts."""
    table = run.recipe.evaluation
    prompts = prompts_to_answer(run, template)
    if len(prompts) < table.prompts:
        run.display.line(
            f"  {len(prompts)} held-out prompts to reply to; evaluation.prompts asks for {table.prompts}"
        )
    if not prompts:
        return Samples([], [], [])
    models = {"before": run.policy_start, "after": str(run.path("policy") / "model")}
    replies = [
        answers(run, run.load(name, dtype=table.precision), template, prompts, label=f"replies, {side}")
        for side, name in models.items()
    ]
    return Samples(prompts, *replies)


def _on_samples(
    run: Run, start: LanguageModel, policy: LanguageModel, samples: Samples, by_row: RowValues
) -> Figures:
    figures: Figures = {}
    statistics = evaluation_statistics(run)
    texts = [row.comparison.prompt[-1]["content"] for row in samples.prompts]
    where = [row.comparison.source for row in samples.prompts]
    sides = (samples.before, samples.after)
    keys = [row.comparison.key for row in samples.prompts]
    for name in run.recipe.evaluation.metrics:
        metric = find("metric", name, METRICS)
        before, after = (
            apply_metric(
                name,
                metric,
                texts,
                [reply.text for reply in side],
                [reply.ids for reply in side],
                columns={},
                where=where,
            )
            for side in sides
        )
        figures |= before_after_figures(name, before, after, **statistics)
        by_row.add_change(keys, name, before, after)
    quantities = {"length": lambda reply: float(len(reply.ids)), "ended": lambda reply: float(reply.ended)}
    for name, quantity in quantities.items():
        before, after = ([quantity(reply) for reply in side] for side in sides)
        figures |= before_after_figures(name, before, after, **statistics)
        by_row.add_change(keys, name, before, after)
    rows = reply_rows(samples.prompts, samples.after)
    kl = divergence(run, policy, start, rows)
    kinds = {"per_token": [float(value.mean()) for value in kl], "per_reply": [float(v.sum()) for v in kl]}
    for name, per_reply in ((f"kl/{kind}", found) for kind, found in kinds.items()):
        figures[name] = mean_figure(per_reply, **statistics)
        by_row.add(PROMPT, keys, name, per_reply)
    if run.recipe.eval_reward is not None:
        figures |= _by_eval_reward(run, start, samples)
    return figures


def _by_eval_reward(run: Run, start: LanguageModel, samples: Samples) -> Figures:
    """The eval reward model's log-ratio reward of the replies, per token, before and after; and who wins."""
    eval_reward = run.load(str(run.path("eval_reward") / "model"))
    reference = _reference_of(run, start)
    rewards = []
    for label, replies in (("eval_reward, before", samples.before), ("eval_reward, after", samples.after)):
        rows = reply_rows(samples.prompts, replies)
        sides = [_of_replies(run, model, rows, label) for model in (eval_reward, reference)]
        rewards.append([float((mine - other).mean()) for mine, other in zip(*sides, strict=True)])
    figures = before_after_figures("eval_reward", *rewards, **evaluation_statistics(run))
    wins = [(after > before) + 0.5 * (after == before) for before, after in zip(*rewards, strict=True)]
    figures["eval_reward/win_rate"] = mean_figure(wins, **evaluation_statistics(run))
    return figures


def _of_replies(run: Run, model: LanguageModel, rows: Sequence[TokenRow], label: str) -> list[torch.Tensor]:
    """Log-probabilities of a model at the tokens of replies.  -> [len] each"""
    scores = run.recipe.scores
    with run.display.progress(label, len(rows)) as bar:
        found = token_values(
            model,
            rows,
            precision=scores.precision,
            tokens_per_batch=scores.tokens_per_batch,
            progress=bar.advance,
        )
    return [row[0] for row in found]


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
