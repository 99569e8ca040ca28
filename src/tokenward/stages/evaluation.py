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
from tokenward.models.loading import DTYPES, LanguageModel
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
    """Each model is loaded once. Two are held together only for the KL divergence between them."""
    start = run.load(run.policy_start)
    rows = tables(run, start.template(run.style)).eval
    parts = {"pairs": rows.where(rows.sizes == 2), "responses alone": rows.where(rows.sizes == 1)}
    parts = {name: part for name, part in parts.items() if len(part)}
    prompts = _prompts(run, start.template(run.style))
    before, first = _logprobs(run, start, parts, "before"), _replies(run, start, prompts, "before")
    policy = run.load(str(run.path("policy") / "model"))
    after, second = _logprobs(run, policy, parts, "after"), _replies(run, policy, prompts, "after")
    samples = Samples(prompts, first, second)
    kl = divergence(run, policy, start, reply_rows(prompts, second)) if prompts else []
    del policy
    base = _of_reference(run, start, parts, before, samples) if run.recipe.eval_reward else None
    del start
    judged = _Judged({}, {}) if base is None else _by_eval_reward(run, base, parts, samples)
    figures: Figures = {}
    if "pairs" in parts:
        figures |= _on_pairs(run, before["pairs"], after["pairs"], by_row) | judged.pairs
        figures |= _credit(run, parts["pairs"])
    if "responses alone" in parts:
        figures |= _on_unpaired(run, before["responses alone"], after["responses alone"], by_row)
    if prompts:
        figures |= _on_samples(run, samples, kl, by_row) | judged.samples
    return figures, samples


def _logprobs(
    run: Run, model: LanguageModel, parts: Mapping[str, TokenTable], label: str
) -> dict[str, TokenTable]:
    """Rows with the log-probabilities of a model in the place of the reference's."""
    return {
        name: rows.with_column("reference_logp", logprobs(run, model, rows, f"{name}, {label}"))
        for name, rows in parts.items()
    }


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


def _on_pairs(run: Run, before: TokenTable, after: TokenTable, by_row: RowValues) -> Figures:
    figures = preference_figures(_Joined(before, after), **evaluation_statistics(run))
    keys = ["-".join(keys_of(before.comparison(number))) for number in range(len(before))]
    for name, values in preference_values(_Joined(before, after)).items():
        by_row.add(PAIR, keys, name, values.tolist())
    return figures


def _on_unpaired(run: Run, before: TokenTable, after: TokenTable, by_row: RowValues) -> Figures:
    """What became of evaluation responses that are alone. Nothing orders them, so there is no accuracy."""
    comparisons = [before.comparison(number) for number in range(len(before))]
    first, last = (
        [side.values("reference_logp", number)[0] for number in range(len(before))]
        for side in (before, after)
    )
    figures: Figures = {}
    good = [comparison.ranks[0] == 0 for comparison in comparisons]
    for name, (places, values) in unpaired_values(first, last, good).items():
        by_row.add(PAIR, [keys_of(comparisons[place])[0] for place in places], name, values.tolist())
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


def _prompts(run: Run, template: Template) -> list[TokenRow]:
    """Evaluation prompts to reply to."""
    prompts, wanted = prompts_to_answer(run, template), run.recipe.evaluation.prompts
    if len(prompts) < wanted:
        run.display.line(
            f"  {len(prompts)} held-out prompts to reply to; evaluation.prompts asks for {wanted}"
        )
    return prompts


def _replies(run: Run, model: LanguageModel, prompts: Sequence[TokenRow], side: str) -> list[Reply]:
    """A model's replies, in the number type of the evaluation."""
    if not prompts:
        return []
    precision = run.recipe.evaluation.precision
    same = model.dtype == DTYPES[precision]
    model = model if same else run.load(model.name, dtype=precision)
    return answers(run, model, model.template(run.style), prompts, label=f"replies, {side}")


def _on_samples(run: Run, samples: Samples, kl: Sequence[torch.Tensor], by_row: RowValues) -> Figures:
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
    kinds = {"per_token": [float(value.mean()) for value in kl], "per_reply": [float(v.sum()) for v in kl]}
    for name, per_reply in ((f"kl/{kind}", found) for kind, found in kinds.items()):
        figures[name] = mean_figure(per_reply, **statistics)
        by_row.add(PROMPT, keys, name, per_reply)
    return figures


class _Judged(NamedTuple):
    """What the eval reward model says of the pairs, and of the replies."""

    pairs: Figures
    samples: Figures


class _Base(NamedTuple):
    """What the reference of the eval reward model says of the pairs, and of the replies before and after."""

    parts: Mapping[str, TokenTable]
    replies: list[list[torch.Tensor]]


def _of_reference(
    run: Run,
    start: LanguageModel,
    parts: Mapping[str, TokenTable],
    before: Mapping[str, TokenTable],
    samples: Samples,
) -> _Base:
    """Mostly the policy starts from what the eval reward model was trained from."""
    own = run.reference_model != run.policy_start
    reference = run.load(run.reference_model) if own else start
    base = _logprobs(run, reference, _pairs_of(parts), "reference") if own else before
    rows = (reply_rows(samples.prompts, side) for side in (samples.before, samples.after))
    return _Base(base, [_of_replies(run, reference, side, "replies, reference") for side in rows])


def _pairs_of(parts: Mapping[str, TokenTable]) -> dict[str, TokenTable]:
    return {name: rows for name, rows in parts.items() if name == "pairs"}


def _by_eval_reward(run: Run, base: _Base, parts: Mapping[str, TokenTable], samples: Samples) -> _Judged:
    """Its log-ratio reward: which response of a pair it prefers, and the mean per token of the replies."""
    model, pairs = run.load(str(run.path("eval_reward") / "model")), _pairs_of(parts)
    replies = [reply_rows(samples.prompts, side) for side in (samples.before, samples.after)]
    judged = _logprobs(run, model, pairs, "eval reward model")
    of_model = [_of_replies(run, model, rows, "replies, eval reward model") for rows in replies]
    on_pairs: Figures = {}
    if pairs:
        found = preference_figures(
            _Joined(base.parts["pairs"], judged["pairs"]), **evaluation_statistics(run)
        )
        on_pairs = {
            f"eval_reward/pairs_{name}": found[f"preference/{name}"] for name in ("accuracy", "margin")
        }
    if not samples.prompts:
        return _Judged(on_pairs, {})
    rewards = [
        [float((mine - other).mean()) for mine, other in zip(*sides, strict=True)]
        for sides in zip(of_model, base.replies, strict=True)
    ]
    figures = before_after_figures("eval_reward", *rewards, **evaluation_statistics(run))
    wins = [(last > first) + 0.5 * (last == first) for first, last in zip(*rewards, strict=True)]
    figures["eval_reward/win_rate"] = mean_figure(wins, **evaluation_statistics(run))
    return _Judged(on_pairs, figures)


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
