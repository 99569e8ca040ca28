"""What training changed, measured on eval rows: preference, likelihood, sampled replies, and the credit of tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenward.display import Display
from tokenward.evaluation.credit import KnownResponse, credit_figures, known_response
from tokenward.evaluation.heldout import (
    PairLogprobs,
    before_after_figures,
    preference_figures,
    preference_values,
    unpaired_values,
)
from tokenward.evaluation.metrics import METRICS, apply_metric
from tokenward.evaluation.replies import divergence, reply_rows
from tokenward.evaluation.row_values import PAIR, PROMPT, RowValues
from tokenward.evaluation.statistics import Figure, mean_figure
from tokenward.models.loading import LanguageModel
from tokenward.plugins import find
from tokenward.sampling import Reply, SamplingSettings, sample_replies
from tokenward.scoring.basic import Scorer
from tokenward.scoring.join import computed, scores_of
from tokenward.scoring.reads import is_online, scope_of_scores
from tokenward.scoring.scorers import Random, Surprisal
from tokenward.scoring.store import TokenStore
from tokenward.scoring.values import token_values
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.spans import ByteSpan
from tokenward.tokens.spelled import moved
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

Figures = dict[str, Figure]


class Samples(NamedTuple):
    """Replies to the same prompts before and after training."""

    prompts: Sequence[TokenRow]
    before: Sequence[Reply]
    after: Sequence[Reply]


class EvalReward(NamedTuple):
    """A second oracle, which judges the policy.

    Attributes:
        model: The oracle.
        reference: What it was trained from.
    """

    model: LanguageModel
    reference: LanguageModel


@dataclass(frozen=True, kw_only=True)
class Measures:
    """How figures are computed. Each has its n and a 95 % bootstrap interval.

    Attributes:
        metrics: Metrics of replies, by name.
        sampling: How replies are drawn.
        seed: Of replies and of the bootstrap.
        resamples: Of the bootstrap.
        precision: As :func:`tokenward.scoring.values.over_batches` takes it.
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

    def written(
        self,
        start: LanguageModel,
        policy: LanguageModel,
        rows: TokenTable,
        eval_reward: EvalReward | None = None,
    ) -> Figures:
        """Figures of written responses, in pairs or alone, from the log-probabilities of both models, nats.

        Args:
            start: The model before training.
            policy: After it.
            rows: Pairs, and comparisons of one response.
            eval_reward: Judges the pairs too.
        """
        pairs, alone = rows.where(rows.sizes == 2), rows.where(rows.sizes == 1)
        figures: Figures = {}
        if pairs:
            figures |= self._on_pairs(start, policy, pairs, eval_reward)
        if alone:
            figures |= self._on_unpaired(start, policy, alone)
        return figures

    def _on_pairs(
        self, start: LanguageModel, policy: LanguageModel, pairs: TokenTable, judge: EvalReward | None
    ) -> Figures:
        before = self._logprobs(start, pairs, "pairs, before")
        after = self._logprobs(policy, pairs, "pairs, after")
        figures = preference_figures(_Joined(before, after), **self._statistics)
        keys = ["-".join(keys_of(row.comparison)) for row in pairs]
        for name, values in preference_values(_Joined(before, after)).items():
            self.by_row.add(PAIR, keys, name, values.tolist())
        if judge is not None:
            judged = self._logprobs(judge.model, pairs, "pairs, eval_reward")
            same = judge.reference is start
            base = before if same else self._logprobs(judge.reference, pairs, "pairs, reference")
            found = preference_figures(_Joined(base, judged), **self._statistics)
            figures |= {
                f"eval_reward/pairs_{name}": found[f"preference/{name}"] for name in ("accuracy", "margin")
            }
        return figures

    def _on_unpaired(self, start: LanguageModel, policy: LanguageModel, rows: TokenTable) -> Figures:
        """What became of responses that stand alone. Nothing orders them, so there is no accuracy."""
        before, after = (
            [side.values("reference_logp", i)[0] for i in range(len(rows))]
            for side in (
                self._logprobs(start, rows, "responses alone, before"),
                self._logprobs(policy, rows, "responses alone, after"),
            )
        )
        figures: Figures = {}
        good = [row.comparison.ranks[0] == 0 for row in rows]
        for name, (places, values) in unpaired_values(before, after, good).items():
            keys = [keys_of(rows[place].comparison)[0] for place in places]
            self.by_row.add(PAIR, keys, name, values.tolist())
            figures[name] = mean_figure(values, **self._statistics)
        return figures

    def _logprobs(self, model: LanguageModel, rows: TokenTable, label: str) -> TokenTable:
        """Rows with the log-probabilities of a model in the place of the reference's."""
        with self.display.progress(label, len(rows.responses)) as bar:
            column = computed(
                rows,
                model,
                precision=self.precision,
                tokens_per_batch=self.tokens_per_batch,
                progress=bar.advance,
            )
        return rows.with_column("reference_logp", column)

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
        with self.display.progress(label, len(prompts)) as bar:
            ids = [row.asked for row in prompts]
            return sample_replies(model, template, ids, self.sampling, seed=self.seed, progress=bar.advance)

    def sampled(
        self,
        start: LanguageModel,
        policy: LanguageModel,
        samples: Samples,
        eval_reward: EvalReward | None = None,
    ) -> Figures:
        """Figures of sampled replies: metrics, length, KL(policy || start) in nats, before and after on the same prompts."""
        figures: Figures = {}
        texts = [row.comparison.prompt[-1]["content"] for row in samples.prompts]
        where = [row.comparison.source for row in samples.prompts]
        for name in self.metrics:
            metric = find("metric", name, METRICS)

            def quality(side: Sequence[Reply], name: str = name, metric: Any = metric) -> list[float]:
                replies, ids = [reply.text for reply in side], [reply.ids for reply in side]
                return list(apply_metric(name, metric, texts, replies, ids, columns={}, where=where))

            figures |= self._changed(name, samples, quality)
        quantities: Mapping[str, Callable[[Reply], float]] = {
            "length": lambda reply: float(len(reply.ids)),
            "ended": lambda reply: float(reply.ended),
        }
        for name, quantity in quantities.items():
            figures |= self._changed(
                name, samples, lambda side, quantity=quantity: [quantity(reply) for reply in side]
            )
        figures |= self._kl(start, policy, samples)
        return figures if eval_reward is None else figures | self._judged(eval_reward, samples)

    def _changed(
        self, name: str, samples: Samples, quantity: Callable[[Sequence[Reply]], list[float]]
    ) -> Figures:
        before, after = quantity(samples.before), quantity(samples.after)
        self.by_row.add_change(_keys(samples), name, before, after)
        return before_after_figures(name, before, after, **self._statistics)

    def _kl(self, start: LanguageModel, policy: LanguageModel, samples: Samples) -> Figures:
        rows = reply_rows(samples.prompts, samples.after)
        with self.display.progress("KL to the start", len(rows)) as bar:
            kl = divergence(policy, start, rows, tokens_per_batch=self.tokens_per_batch, progress=bar.advance)
        kinds = {
            "kl/per_token": [float(value.mean()) for value in kl],
            "kl/per_reply": [float(value.sum()) for value in kl],
        }
        for name, per_reply in kinds.items():
            self.by_row.add(PROMPT, _keys(samples), name, per_reply)
        return {name: mean_figure(per_reply, **self._statistics) for name, per_reply in kinds.items()}

    def _judged(self, judge: EvalReward, samples: Samples) -> Figures:
        """The eval reward model's log-ratio reward of the replies, per token, before and after; and who wins."""
        rewards: list[list[float]] = []
        for label, replies in (
            ("eval_reward, before", samples.before),
            ("eval_reward, after", samples.after),
        ):
            rows = reply_rows(samples.prompts, replies)
            mine, other = (self._of_replies(model, rows, label) for model in judge)
            rewards.append([float((one - two).mean()) for one, two in zip(mine, other, strict=True)])
        figures = before_after_figures("eval_reward", *rewards, **self._statistics)
        wins = [(after > before) + 0.5 * (after == before) for before, after in zip(*rewards, strict=True)]
        figures["eval_reward/win_rate"] = mean_figure(wins, **self._statistics)
        return figures

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
