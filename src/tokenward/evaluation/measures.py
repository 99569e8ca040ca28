"""What training changed, measured on eval rows: preference, likelihood, sampled replies and token credit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenward.artifacts import read_jsonl, write_jsonl
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.evaluation.credit import KnownResponse, credit_figures, known_response
from tokenward.evaluation.replies import METRICS, apply_metric, divergence, reply_rows
from tokenward.evaluation.statistics import Figure, Figures, before_after_figures, mean_figure
from tokenward.models.loading import LanguageModel
from tokenward.plugins import find
from tokenward.sampling import Reply, SamplingSettings, sample_replies
from tokenward.scoring.basic import Scorer
from tokenward.scoring.join import compute_column, scores_of
from tokenward.scoring.reads import is_online, scope_of_scores, token_values
from tokenward.scoring.scorers import Random, Surprisal
from tokenward.scoring.store import TokenStore
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.segments import moved
from tokenward.tokens.spans import ByteSpan
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template


class PairLogprobs(NamedTuple):
    """Per-token log-probabilities of one pair, the better response first, end-of-turn token included.

    Attributes:
        start: Under the model before training.
        policy: Under the model after training.
    """

    start: tuple[Tensor, Tensor]
    policy: tuple[Tensor, Tensor]


def preference_figures(
    pairs: Sequence[PairLogprobs], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Figure]:
    """Accuracy, margin and displacement on held-out pairs: means of :func:`preference_values`."""
    values = preference_values(pairs)
    return {name: mean_figure(value, resamples=resamples, seed=seed) for name, value in values.items()}


def preference_values(pairs: Sequence[PairLogprobs]) -> dict[str, NDArray[np.float64]]:
    """Accuracy, margin and displacement of each held-out pair, by the figure's name.  -> [pairs] each

    ``accuracy`` and ``margin`` (nats) use the log-ratio of the policy to its start, summed over tokens:
    the implicit reward, 0 for every pair before training. The ``likelihood`` figures use the mean
    log-probability per token, before and after. ``logps/*`` tell what training did to the likelihood of
    each side: chosen responses that became less likely than they were are displaced.
    """
    start = np.array([[float(side.sum()) for side in pair.start] for pair in pairs]).reshape(-1, 2)
    after = np.array([[float(side.sum()) for side in pair.policy] for pair in pairs]).reshape(-1, 2)
    length = np.array([[len(side) for side in pair.start] for pair in pairs]).reshape(-1, 2)
    change = after - start
    margin = change[:, 0] - change[:, 1]
    before_gap = start[:, 0] / length[:, 0] - start[:, 1] / length[:, 1]
    after_gap = after[:, 0] / length[:, 0] - after[:, 1] / length[:, 1]
    values = {
        "preference/accuracy": (margin > 0) + 0.5 * (margin == 0),
        "preference/margin": margin,
        "likelihood/accuracy_before": before_gap > 0,
        "likelihood/accuracy_after": after_gap > 0,
        "likelihood/margin_before": before_gap,
        "likelihood/margin_after": after_gap,
        "logps/chosen_change": change[:, 0],
        "logps/rejected_change": change[:, 1],
        "logps/chosen_change_per_token": change[:, 0] / length[:, 0],
        "logps/rejected_change_per_token": change[:, 1] / length[:, 1],
    }
    return {name: np.asarray(value, dtype=np.float64) for name, value in values.items()}


def unpaired_values(
    start: Sequence[Tensor], policy: Sequence[Tensor], good: Sequence[bool]
) -> dict[str, tuple[list[int], NDArray[np.float64]]]:
    """How training changed the likelihood of unpaired eval responses, the good ones and the bad ones.

    Args:
        start: ``[len]`` each, log-probabilities of a response's tokens before training.
        policy: The same after training.
        good: Which responses are good.

    Returns:
        For each figure, the indices of its responses and their changes in nats, summed over tokens. A figure without
        responses is left out.
    """
    change = np.array(
        [float(after.sum() - before.sum()) for before, after in zip(start, policy, strict=True)]
    )
    sides = {"unpaired/good_change": True, "unpaired/bad_change": False}
    places = {name: [i for i, own in enumerate(good) if own == side] for name, side in sides.items()}
    return {name: (found, change[found]) for name, found in places.items() if found}


ROWS = "rows.jsonl"

PAIR, PROMPT = "pair", "prompt"
"""Kinds of rows: a held-out pair of written responses, and a prompt that was replied to."""


class RowKey(NamedTuple):
    """Names a row in every run that has it."""

    kind: str
    key: str


class RowValues:
    """Figures by row, collected while they are measured."""

    def __init__(self) -> None:
        self._rows: dict[RowKey, dict[str, float]] = {}

    def add(self, kind: str, keys: Sequence[str], name: str, values: Sequence[float]) -> None:
        """One figure of several rows, under the name that its mean has in ``metrics.json``."""
        for key, value in zip(keys, values, strict=True):
            self._rows.setdefault(RowKey(kind, key), {})[name] = float(value)

    def add_change(
        self, keys: Sequence[str], name: str, before: Sequence[float], after: Sequence[float]
    ) -> None:
        """A quantity of the replies to several prompts before and after training."""
        change = [second - first for first, second in zip(before, after, strict=True)]
        for part, values in (("before", before), ("after", after), ("change", change)):
            self.add(PROMPT, keys, f"{name}/{part}", values)

    def write(self, folder: Path) -> None:
        """Store them as JSON lines: ``{"kind", "key", "values"}``."""
        records = ({**row._asdict(), "values": values} for row, values in self._rows.items())
        write_jsonl(folder / ROWS, records, ascii=True)


def read_row_values(folder: Path) -> dict[RowKey, dict[str, float]]:
    """What :meth:`RowValues.write` stored.

    Raises:
        UserError: the evaluation has no figures by row.
    """
    path = folder / ROWS
    if not path.is_file():
        raise UserError(
            f"{folder} has no {ROWS}, so its figures are not known row by row. The evaluation of a prompt_task has none; any "
            "other one: delete the folder and run `tokenward evaluate RECIPE` again."
        )
    return {RowKey(line["kind"], line["key"]): line["values"] for line in read_jsonl(path)}


class Samples(NamedTuple):
    """Replies to the same prompts before and after training."""

    prompts: Sequence[TokenRow]
    before: Sequence[Reply]
    after: Sequence[Reply]


Load = Callable[[], LanguageModel]


class Models(NamedTuple):
    """What is measured, each loaded when it is asked for.

    Attributes:
        start: The model before training.
        policy: After it.
        replying: The same model in the number type in which replies are drawn.
        eval_reward: A second oracle, which judges the policy, or None.
        reference: What that was trained from; None is ``start``.
    """

    start: Load
    policy: Load
    replying: Callable[[LanguageModel], LanguageModel] = lambda model: model
    eval_reward: Load | None = None
    reference: Load | None = None


class EvalRewardFigures(NamedTuple):
    """What the eval reward model says of the pairs, and of the replies."""

    pairs: Figures
    samples: Figures


class _Base(NamedTuple):
    """What the reference of the eval reward model says of the pairs, and of the replies before and after."""

    parts: Mapping[str, TokenTable]
    replies: list[list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Measures:
    """How figures are computed. Each has its n and a 95 % bootstrap interval.

    Attributes:
        metrics: Metrics of replies, by name.
        sampling: How replies are drawn.
        seed: Of replies and of the bootstrap.
        resamples: Of the bootstrap.
        precision: As :func:`tokenward.scoring.reads.over_batches` takes it.
        tokens_per_batch: Most tokens in one pass.
        display: Where progress is shown.
        by_row: The same figures row by row, as they are measured.
    """

    metrics: Sequence[str] = ()
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    seed: int = 0
    resamples: int = 2000
    precision: str = "float32"
    tokens_per_batch: int = 8192
    display: Display = field(default_factory=lambda: Display(quiet=True))
    by_row: RowValues = field(default_factory=RowValues)

    @property
    def _statistics(self) -> dict[str, int]:
        return {"resamples": self.resamples, "seed": self.seed}

    def __call__(
        self, models: Models, rows: TokenTable, template: Template, prompts: Sequence[TokenRow] = ()
    ) -> tuple[Figures, Samples]:
        """The figures, and the replies that some of them are of.

        Each model is asked for once. Two are held together only for the KL divergence between them.

        Args:
            models: Before and after training, and what judges.
            rows: Pairs, and comparisons of one response.
            template: Of both models.
            prompts: To reply to.
        """
        parts = {"pairs": rows.where(rows.sizes == 2), "responses alone": rows.where(rows.sizes == 1)}
        parts = {name: part for name, part in parts.items() if len(part)}
        start = models.start()
        before = self._logprobs(start, parts, "before")
        first = self.replies(models.replying(start), template, prompts, "replies, before")
        policy = models.policy()
        after = self._logprobs(policy, parts, "after")
        second = self.replies(models.replying(policy), template, prompts, "replies, after")
        samples = Samples(prompts, first, second)
        kl = self._kl(policy, start, samples) if prompts else []
        del policy
        base = (
            None
            if models.eval_reward is None
            else self._base(models.reference, start, parts, before, samples)
        )
        del start
        judged = EvalRewardFigures({}, {})
        if base is not None and models.eval_reward is not None:
            judged = self._judged(models.eval_reward(), base, parts, samples)
        figures: Figures = {}
        if "pairs" in parts:
            figures |= self._on_pairs(before["pairs"], after["pairs"]) | judged.pairs
        if "responses alone" in parts:
            figures |= self._on_unpaired(before["responses alone"], after["responses alone"])
        if prompts:
            figures |= self._on_samples(samples, kl) | judged.samples
        return figures, samples

    def _logprobs(
        self, model: LanguageModel, parts: Mapping[str, TokenTable], label: str
    ) -> dict[str, TokenTable]:
        """Rows with the log-probabilities of a model in the place of the reference's."""
        found: dict[str, TokenTable] = {}
        for name, rows in parts.items():
            with self.display.progress(f"{name}, {label}", len(rows.responses)) as bar:
                column = compute_column(
                    rows,
                    model,
                    precision=self.precision,
                    tokens_per_batch=self.tokens_per_batch,
                    progress=bar.advance,
                )
            found[name] = rows.with_column("reference_logp", column)
        return found

    def _on_pairs(self, before: TokenTable, after: TokenTable) -> Figures:
        keys = ["-".join(keys_of(before.comparison(number))) for number in range(len(before))]
        for name, values in preference_values(_Joined(before, after)).items():
            self.by_row.add(PAIR, keys, name, values.tolist())
        return preference_figures(_Joined(before, after), **self._statistics)

    def _on_unpaired(self, before: TokenTable, after: TokenTable) -> Figures:
        """What became of responses that are alone. Nothing orders them, so there is no accuracy."""
        comparisons = [before.comparison(number) for number in range(len(before))]
        first, last = (
            [side.values("reference_logp", number)[0] for number in range(len(before))]
            for side in (before, after)
        )
        figures: Figures = {}
        good = [comparison.ranks[0] == 0 for comparison in comparisons]
        for name, (places, values) in unpaired_values(first, last, good).items():
            keys = [keys_of(comparisons[place])[0] for place in places]
            self.by_row.add(PAIR, keys, name, values.tolist())
            figures[name] = mean_figure(values, **self._statistics)
        return figures

    def credit(self, pairs: TokenTable, store: TokenStore, scorer: Scorer, name: str) -> Figures:
        """Scores against the spans of the data, beside surprisal and random numbers; nothing if the data has no spans.

        Args:
            pairs: Comparisons to look at.
            store: Values of their responses.
            scorer: Makes the scores. One that reads the policy, or compares responses, is left out.
            name: What the figures call it.
        """
        scorers: dict[str, Scorer] = {"surprisal": Surprisal(), "random": Random()}
        if not (is_online(scorer) or scope_of_scores(scorer) != "response"):
            # Other scores are not of one response as it is stored.
            scorers = {name: scorer, **scorers}
        known: dict[str, KnownResponse] = {}
        for row in pairs:
            comparison = row.comparison
            if comparison.spans is None:
                continue
            for key, text, spans in zip(
                keys_of(comparison), comparison.responses, comparison.spans, strict=True
            ):
                record = store[key]
                tokens = [ByteSpan(*pair) for pair in zip(record.start, record.end, strict=True)]
                scores = {name: scores_of(scorer, record).tolist() for name, scorer in scorers.items()}
                marked = spans if record.text is None else moved(spans, text, record.text, comparison.source)
                known[key] = known_response(record.text or text, marked, tokens, scores)
        return credit_figures(list(known.values()), at=(), **self._statistics)

    def replies(
        self, model: LanguageModel, template: Template, prompts: Sequence[TokenRow], label: str
    ) -> list[Reply]:
        """One sampled reply to each prompt."""
        if not prompts:
            return []
        with self.display.progress(label, len(prompts)) as bar:
            ids = [row.asked for row in prompts]
            return sample_replies(model, template, ids, self.sampling, seed=self.seed, progress=bar.advance)

    def _on_samples(self, samples: Samples, kl: Sequence[Tensor]) -> Figures:
        """Metrics, length and KL(policy || start), nats, of replies, before and after on the same prompts."""
        figures: Figures = {}
        texts = [row.comparison.prompt[-1]["content"] for row in samples.prompts]
        where = [row.comparison.source for row in samples.prompts]
        for name in self.metrics:
            metric = find("metric", name, METRICS)

            def quality(side: Sequence[Reply], name: str = name, metric: Any = metric) -> list[float]:
                replies, ids = [reply.text for reply in side], [reply.ids for reply in side]
                return list(apply_metric(name, metric, texts, replies, ids, columns={}, where=where))

            figures |= self._changed(name, samples, quality)
        figures |= self._changed("length", samples, lambda side: [float(len(reply.ids)) for reply in side])
        figures |= self._changed("ended", samples, lambda side: [float(reply.ended) for reply in side])
        kinds = {
            "kl/per_token": [float(value.mean()) for value in kl],
            "kl/per_reply": [float(value.sum()) for value in kl],
        }
        for name, per_reply in kinds.items():
            self.by_row.add(PROMPT, _keys(samples), name, per_reply)
        return figures | {
            name: mean_figure(per_reply, **self._statistics) for name, per_reply in kinds.items()
        }

    def _changed(
        self, name: str, samples: Samples, quantity: Callable[[Sequence[Reply]], list[float]]
    ) -> Figures:
        before, after = quantity(samples.before), quantity(samples.after)
        self.by_row.add_change(_keys(samples), name, before, after)
        return before_after_figures(name, before, after, **self._statistics)

    def _kl(self, policy: LanguageModel, start: LanguageModel, samples: Samples) -> list[Tensor]:
        rows = reply_rows(samples.prompts, samples.after)
        with self.display.progress("KL to the start", len(rows)) as bar:
            return divergence(
                policy, start, rows, tokens_per_batch=self.tokens_per_batch, progress=bar.advance
            )

    def _base(
        self,
        reference: Load | None,
        start: LanguageModel,
        parts: Mapping[str, TokenTable],
        before: Mapping[str, TokenTable],
        samples: Samples,
    ) -> _Base:
        """What the reference of the eval reward model says; mostly it is what the policy started from."""
        model = start if reference is None else reference()
        base = before if reference is None else self._logprobs(model, _pairs_of(parts), "reference")
        rows = (reply_rows(samples.prompts, side) for side in (samples.before, samples.after))
        return _Base(base, [self._of_replies(model, side, "replies, reference") for side in rows])

    def _judged(
        self, model: LanguageModel, base: _Base, parts: Mapping[str, TokenTable], samples: Samples
    ) -> EvalRewardFigures:
        """Its log-ratio reward: which response of a pair it prefers, and the mean per token of the replies."""
        pairs = _pairs_of(parts)
        replies = [reply_rows(samples.prompts, side) for side in (samples.before, samples.after)]
        judged = self._logprobs(model, pairs, "eval reward model")
        of_model = [self._of_replies(model, rows, "replies, eval reward model") for rows in replies]
        on_pairs: Figures = {}
        if pairs:
            found = preference_figures(_Joined(base.parts["pairs"], judged["pairs"]), **self._statistics)
            on_pairs = {
                f"eval_reward/pairs_{name}": found[f"preference/{name}"] for name in ("accuracy", "margin")
            }
        if not samples.prompts:
            return EvalRewardFigures(on_pairs, {})
        rewards = [
            [float((mine - other).mean()) for mine, other in zip(*sides, strict=True)]
            for sides in zip(of_model, base.replies, strict=True)
        ]
        figures = before_after_figures("eval_reward", *rewards, **self._statistics)
        wins = [(last > first) + 0.5 * (last == first) for first, last in zip(*rewards, strict=True)]
        figures["eval_reward/win_rate"] = mean_figure(wins, **self._statistics)
        return EvalRewardFigures(on_pairs, figures)

    def _of_replies(self, model: LanguageModel, rows: Sequence[TokenRow], label: str) -> list[Tensor]:
        """Log-probabilities of a model at the tokens of replies.  -> [len] each"""
        with self.display.progress(label, len(rows)) as bar:
            found = token_values(
                model,
                rows,
                precision=self.precision,
                tokens_per_batch=self.tokens_per_batch,
                progress=bar.advance,
            )
        return [row[0] for row in found]


def _pairs_of(parts: Mapping[str, TokenTable]) -> dict[str, TokenTable]:
    return {name: rows for name, rows in parts.items() if name == "pairs"}


def _keys(samples: Samples) -> list[str]:
    return [row.comparison.key for row in samples.prompts]


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
