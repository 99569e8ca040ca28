"""What training changed, measured on eval rows: preference, likelihood, sampled replies and token credit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenward.artifacts import content_of, read_jsonl, write_jsonl
from tokenward.display import Display
from tokenward.distributed import first_alone
from tokenward.errors import UserError
from tokenward.evaluation.credit import KnownResponse, credit_figures, known_response
from tokenward.evaluation.replies import METRICS, apply_metric, divergence, preferences, reply_rows
from tokenward.evaluation.sampled import EvaluationReplies
from tokenward.evaluation.statistics import Figure, Figures, before_after_figures, mean_figure
from tokenward.models.loading import LanguageModel
from tokenward.plugins import find
from tokenward.sampling import Reply, SamplingSettings
from tokenward.sampling.registry import EngineSettings
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
    """Per-token log-probabilities of the chosen and the rejected response of a pair, including the end-of-turn token.

    Attributes:
        start: Under the model before training.
        policy: Under the model after training.
    """

    start: tuple[Tensor, Tensor]
    policy: tuple[Tensor, Tensor]


def preference_figures(
    pairs: Sequence[PairLogprobs], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Figure]:
    """Means of :func:`preference_values` over eval pairs."""
    values = preference_values(pairs)
    return {name: mean_figure(value, resamples=resamples, seed=seed) for name, value in values.items()}


def preference_values(pairs: Sequence[PairLogprobs]) -> dict[str, NDArray[np.float64]]:
    """Accuracy, margin and displacement of each eval pair, by figure.  -> [pairs] each

    ``preference/*`` use the log-ratio of the policy to its start, summed over tokens: the implicit reward, which is 0
    for every pair before training. ``likelihood/*`` use the mean log-probability per token before and after.
    ``logps/*`` are the changes of each side's log-probability; a negative change of chosen responses is displacement. All
    in nats.
    """
    # The pairs may be read lazily, so only sums are kept.
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


ROWS = "rows.jsonl"

PAIR, PROMPT = "pair", "prompt"
"""Kinds of rows: an eval pair, and a prompt with sampled replies."""


class RowKey(NamedTuple):
    """Identifies a row across runs."""

    kind: str
    key: str


class RowValues:
    """The values of each row behind the figures."""

    def __init__(self) -> None:
        self._rows: dict[RowKey, dict[str, float]] = {}

    def add(self, kind: str, keys: Sequence[str], name: str, values: Sequence[float]) -> None:
        """Add a value for several rows, under the name that their mean has in ``metrics.json``."""
        for key, value in zip(keys, values, strict=True):
            self._rows.setdefault(RowKey(kind, key), {})[name] = float(value)

    def add_change(
        self, keys: Sequence[str], name: str, before: Sequence[float], after: Sequence[float]
    ) -> None:
        """Add a value of replies before and after training, and its change."""
        change = [second - first for first, second in zip(before, after, strict=True)]
        for part, values in (("before", before), ("after", after), ("change", change)):
            self.add(PROMPT, keys, f"{name}/{part}", values)

    def write(self, folder: Path) -> None:
        """Write JSON lines of ``{"kind", "key", "values"}``."""
        records = ({**row._asdict(), "values": values} for row, values in self._rows.items())
        write_jsonl(folder / ROWS, records, ascii=True)


def read_row_values(folder: Path) -> dict[RowKey, dict[str, float]]:
    """Read what :meth:`RowValues.write` wrote.

    Raises:
        UserError: the evaluation has no values by row.
    """
    path = folder / ROWS
    if not path.is_file():
        raise UserError(
            f"{folder} has no {ROWS}, so its figures are not known row by row. The evaluation of a prompt_task has none; for any other "
            "evaluation, delete the folder and evaluate again.",
            code="missing-rows",
        )
    lines = content_of(path, read_jsonl)
    return {RowKey(line["kind"], line["key"]): line["values"] for line in lines}


class Samples(NamedTuple):
    """Replies to the same prompts before and after training."""

    prompts: Sequence[TokenRow]
    before: Sequence[Reply]
    after: Sequence[Reply]

    @property
    def keys(self) -> list[str]:
        """Keys of the prompts."""
        return [row.comparison.key for row in self.prompts]


Load = Callable[[], LanguageModel]
Parts = Mapping[str, TokenTable]
"""Eval rows by kind: ``pairs`` and ``unpaired``; empty kinds are left out."""


class Models(NamedTuple):
    """The models of an evaluation, each loaded when it is needed.

    Attributes:
        start: The model before training.
        policy: The model after training.
        replying: Converts a model to the number type of sampling.
        eval_reward: The eval reward model, or None.
        reference: The model that it was trained from; None is ``start``.
    """

    start: Load
    policy: Load
    replying: Callable[[LanguageModel], LanguageModel] = lambda model: model
    eval_reward: Load | None = None
    reference: Load | None = None


class _RewardBase(NamedTuple):
    """Log-probabilities under the reference of the eval reward model: of the pairs, and of the replies before and after."""

    parts: Parts
    replies: list[list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Computes the figures of an evaluation, each with its n and a 95 % bootstrap interval.

    All processes of a launch share the work, and each gets the figures of one process.

    Attributes:
        metrics: Names of metrics of replies.
        sampling: Sampling settings.
        engine: Samples the replies in place of transformers.
        seed: Seed of the replies and of the bootstrap.
        resamples: Number of bootstrap draws.
        precision: As in :func:`tokenward.scoring.reads.over_batches`.
        tokens_per_batch: Maximum number of tokens in a forward pass.
        display: Shows progress.
        by_row: Collects the values of each row.
    """

    metrics: Sequence[str] = ()
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    engine: EngineSettings | None = None
    seed: int = 0
    resamples: int = 2000
    precision: str = "float32"
    tokens_per_batch: int = 8192
    display: Display = field(default_factory=lambda: Display(quiet=True))
    by_row: RowValues = field(default_factory=RowValues)

    @cached_property
    def answering(self) -> EvaluationReplies:
        """Samples the replies, and holds what a manifest says about the engine."""
        return EvaluationReplies(settings=self.sampling, seed=self.seed, engine=self.engine)

    @property
    def _statistics(self) -> dict[str, int]:
        return {"resamples": self.resamples, "seed": self.seed}

    def __call__(
        self, models: Models, rows: TokenTable | None, template: Template, prompts: Sequence[TokenRow] = ()
    ) -> tuple[Figures, Samples]:
        """Compute the figures; returns them and the sampled replies.

        Each model is loaded once. Two are in memory at a time only for the KL divergence between them.

        Args:
            models: The models before and after training, and the eval reward model.
            rows: Pairs and unpaired responses; None has figures of replies only.
            template: The template of both models.
            prompts: Prompts to reply to.
        """
        parts: dict[str, TokenTable] = {}
        if rows is not None:
            parts = {"pairs": rows.where(rows.sizes == 2), "unpaired": rows.where(rows.sizes == 1)}
        parts = {name: part for name, part in parts.items() if len(part)}
        start = models.start()
        before = self._logprobs(start, parts, "before")
        first = self.replies(models.replying(start), template, prompts, "replies, before")
        policy = models.policy()
        after = self._logprobs(policy, parts, "after")
        second = self.replies(models.replying(policy), template, prompts, "replies, after", before=start)
        self.answering.close()
        samples = Samples(prompts, first, second)
        kl = self._kl(policy, start, samples) if prompts else []
        del policy
        judging, base = models.eval_reward, None
        if judging is not None:
            base = self._reward_base(models.reference, start, parts, before, samples)
        del start
        judged: tuple[Figures, Figures] = ({}, {})
        if judging is not None and base is not None:
            judged = self._judged(judging(), base, parts, samples)
        figures: Figures = {}
        if "pairs" in parts:
            figures |= self._on_pairs(before["pairs"], after["pairs"]) | judged[0]
        if "unpaired" in parts:
            figures |= self._on_unpaired(before["unpaired"], after["unpaired"])
        if prompts:
            figures |= self._on_samples(samples, kl) | judged[1]
        return figures, samples

    def _logprobs(self, model: LanguageModel, parts: Parts, label: str) -> dict[str, TokenTable]:
        """Rows with the log-probabilities of a model in their column ``reference_logp``."""
        found: dict[str, TokenTable] = {}
        for name, rows in parts.items():
            with self.display.progress(f"{name}, {label}", len(rows.responses)) as bar:
                column = compute_column(
                    rows,
                    model,
                    precision=self.precision,
                    tokens_per_batch=self.tokens_per_batch,
                    progress=bar.advance,
                    shared=True,
                )
            found[name] = rows.with_column("reference_logp", column)
        return found

    def _on_pairs(self, before: TokenTable, after: TokenTable) -> Figures:
        keys = ["-".join(keys_of(before.comparison(number))) for number in range(len(before))]
        found = preference_values(_Joined(before, after))
        for name, values in found.items():
            self.by_row.add(PAIR, keys, name, values.tolist())
        return {name: mean_figure(values, **self._statistics) for name, values in found.items()}

    def _on_unpaired(self, before: TokenTable, after: TokenTable) -> Figures:
        """Changes of the log-probability of good and of bad responses, nats, summed over tokens."""
        changes = np.array(
            [
                float(
                    after.values("reference_logp", row)[0].sum()
                    - before.values("reference_logp", row)[0].sum()
                )
                for row in range(len(before))
            ]
        )
        good = before.ranks == 0
        figures: Figures = {}
        for name, side in {"unpaired/good_change": good, "unpaired/bad_change": ~good}.items():
            if not side.any():
                continue
            places = np.flatnonzero(side).tolist()
            keys = [keys_of(before.comparison(place))[0] for place in places]
            self.by_row.add(PAIR, keys, name, changes[side].tolist())
            figures[name] = mean_figure(changes[side], **self._statistics)
        return figures

    def credit(self, pairs: TokenTable, store: TokenStore, scorer: Scorer, name: str) -> Figures:
        """Token credit of the scores, of surprisal and of random numbers; empty if the data has no spans.

        Args:
            pairs: The comparisons.
            store: The values of their responses.
            scorer: The scorer. One that reads the policy, or compares responses, is left out.
            name: Name of the scorer in the figures.
        """
        scorers: dict[str, Scorer] = {"surprisal": Surprisal(), "random": Random()}
        if not is_online(scorer) and scope_of_scores(scorer) == "response":
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
                found = {name: scores_of(scorer, record) for name, scorer in scorers.items()}
                if record.segment is not None:  # of an oracle with another tokenizer
                    if any(values.isnan().all() for values in found.values()):
                        continue  # the response was too long for it
                    found = {name: values.nan_to_num(0.0) for name, values in found.items()}
                scores = {name: values.tolist() for name, values in found.items()}
                marked = spans if record.text is None else moved(spans, text, record.text, comparison.source)
                known[key] = known_response(record.text or text, marked, tokens, scores)
        return credit_figures(list(known.values()), at=(), **self._statistics)

    def replies(
        self,
        model: LanguageModel,
        template: Template,
        prompts: Sequence[TokenRow],
        label: str,
        *,
        before: LanguageModel | None = None,
    ) -> list[Reply]:
        """Sample one reply to each prompt; ``before`` is the model before training, if ``model`` is not that one."""
        if not prompts:
            return []
        with self.display.progress(label, len(prompts)) as bar:
            ids = [row.asked for row in prompts]
            return self.answering(model, template, ids, before=before, progress=bar.advance)

    def _on_samples(self, samples: Samples, kl: Sequence[Tensor]) -> Figures:
        """Metrics and length before and after training, and KL(policy || start) in nats."""
        figures: Figures = {}
        texts = [row.comparison.prompt[-1]["content"] for row in samples.prompts]
        where = [row.comparison.source for row in samples.prompts]
        for name in self.metrics:
            metric = find("metric", name, METRICS)

            def quality(side: Sequence[Reply], name: str = name, metric: Any = metric) -> list[float]:
                replies, ids = [reply.text for reply in side], [reply.ids for reply in side]
                # A metric of the user's may keep a cache, or ask a service: it is called once.
                return first_alone(
                    lambda: list(apply_metric(name, metric, texts, replies, ids, columns={}, where=where))
                )

            figures |= self._changed(name, samples, quality)
        figures |= self._changed("length", samples, lambda side: [float(len(reply.ids)) for reply in side])
        figures |= self._changed("ended", samples, lambda side: [float(reply.ended) for reply in side])
        for name, values in {
            "kl/per_token": [float(value.mean()) for value in kl],
            "kl/per_reply": [float(value.sum()) for value in kl],
        }.items():
            self.by_row.add(PROMPT, samples.keys, name, values)
            figures[name] = mean_figure(values, **self._statistics)
        return figures

    def _changed(
        self, name: str, samples: Samples, quantity: Callable[[Sequence[Reply]], list[float]]
    ) -> Figures:
        before, after = quantity(samples.before), quantity(samples.after)
        self.by_row.add_change(samples.keys, name, before, after)
        return before_after_figures(name, before, after, **self._statistics)

    def _kl(self, policy: LanguageModel, start: LanguageModel, samples: Samples) -> list[Tensor]:
        rows = reply_rows(samples.prompts, samples.after)
        with self.display.progress("KL to the start", len(rows)) as bar:
            return divergence(
                policy, start, rows, tokens_per_batch=self.tokens_per_batch, progress=bar.advance
            )

    def _reward_base(
        self,
        reference: Load | None,
        start: LanguageModel,
        parts: Parts,
        before: Parts,
        samples: Samples,
    ) -> _RewardBase:
        model = start if reference is None else reference()
        base = before if reference is None else self._logprobs(model, _pairs_of(parts), "reference")
        rows = (reply_rows(samples.prompts, side) for side in (samples.before, samples.after))
        return _RewardBase(base, [self._of_replies(model, side, "replies, reference") for side in rows])

    def _judged(
        self, model: LanguageModel, base: _RewardBase, parts: Parts, samples: Samples
    ) -> tuple[Figures, Figures]:
        """Figures by the log-ratio reward of the eval reward model: of the pairs, and of the replies, per token."""
        pairs, on_pairs = _pairs_of(parts), {}
        replies = [reply_rows(samples.prompts, side) for side in (samples.before, samples.after)]
        judged = self._logprobs(model, pairs, "eval reward model")
        of_model = [self._of_replies(model, rows, "replies, eval reward model") for rows in replies]
        if pairs:
            found = preference_figures(_Joined(base.parts["pairs"], judged["pairs"]), **self._statistics)
            on_pairs = {
                f"eval_reward/pairs_{name}": found[f"preference/{name}"] for name in ("accuracy", "margin")
            }
        if not samples.prompts:
            return on_pairs, {}
        rewards = [
            [float((mine - other).mean()) for mine, other in zip(*sides, strict=True)]
            for sides in zip(of_model, base.replies, strict=True)
        ]
        figures = before_after_figures("eval_reward", *rewards, **self._statistics)
        figures["eval_reward/win_rate"] = mean_figure(preferences(*rewards), **self._statistics)
        return on_pairs, figures

    def _of_replies(self, model: LanguageModel, rows: Sequence[TokenRow], label: str) -> list[Tensor]:
        """Log-probabilities of the tokens of replies.  -> [len] each"""
        with self.display.progress(label, len(rows)) as bar:
            found = token_values(
                model,
                rows,
                precision=self.precision,
                tokens_per_batch=self.tokens_per_batch,
                progress=bar.advance,
                shared=True,
            )
        return [row[0] for row in found]


def _pairs_of(parts: Parts) -> dict[str, TokenTable]:
    return {name: rows for name, rows in parts.items() if name == "pairs"}


class _Joined(Sequence[PairLogprobs]):
    """The values of two models on the same pairs, read row by row."""

    def __init__(self, before: TokenTable, after: TokenTable) -> None:
        self._sides = before, after

    def __len__(self) -> int:
        return len(self._sides[0])

    def __getitem__(self, index: int) -> PairLogprobs:  # type: ignore[override]  # never sliced
        start, policy = (tuple(side.values("reference_logp", index)) for side in self._sides)
        return PairLogprobs(cast(Any, start), cast(Any, policy))
