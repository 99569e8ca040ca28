"""Metrics of generated text, with the signature of TRL's reward functions."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tokenward.evaluation.sentiment import Vader
from tokenward.sampling.sources import ChrF, Meteor, Rouge, call_source

Metric = Callable[..., Sequence[float]]
"""``f(prompts, completions, **columns) -> list[float]``: one number per completion, higher is more of it."""


def vader(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """VADER's compound sentiment of each completion, from -1 to 1."""
    scorer = Vader()
    return [scorer.compound(text) for text in completions]


def distinct_2(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Share of different word pairs among all word pairs of each completion; 1 for fewer than two words."""

    def share(text: str) -> float:
        words = text.split()
        pairs = list(pairwise(words))
        return len(set(pairs)) / len(pairs) if pairs else 1.0

    return [share(text) for text in completions]


METRICS: dict[str, Metric] = {
    "vader": vader,
    "distinct_2": distinct_2,
    # These compare with references, which an online run's examples have.
    "rouge1": Rouge(type="rouge1"),
    "rouge2": Rouge(type="rouge2"),
    "rougeL": Rouge(type="rougeL"),
    "rougeLsum": Rouge(type="rougeLsum"),
    "meteor": Meteor(),
    "chrf": ChrF(),
}


def apply_metric(
    name: str,
    metric: Metric,
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    columns: Mapping[str, Sequence[Any]],
    where: Sequence[str],
) -> list[float]:
    """Call a metric as a preference source is called, and check what it returns.

    Raises:
        UserError: it returned something else than one finite number per completion, or lacks a column.
    """
    return call_source(name, metric, prompts, completions, completion_ids, columns, where, kind="metric")
