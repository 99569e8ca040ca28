"""Metrics of generated text, with the signature of TRL's reward functions."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from tokenward.errors import UserError
from tokenward.evaluation.sentiment import Vader

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


METRICS: dict[str, Metric] = {"vader": vader, "distinct_2": distinct_2}


def apply_metric(
    name: str, metric: Metric, prompts: Sequence[str], completions: Sequence[str]
) -> list[float]:
    """Call a metric and check what it returns.

    Raises:
        UserError: it returned something else than one finite number per completion.
    """
    returned = metric(prompts=list(prompts), completions=list(completions))
    try:
        values = [float(value) for value in returned]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the metric {name} returned something that is no list of numbers: {error}. It must return one finite "
            "number per completion."
        ) from error
    bad = [index for index, value in enumerate(values) if value - value != 0]
    if len(values) != len(completions) or bad:
        raise UserError(
            f"the metric {name} returned {len(values)} values for {len(completions)} completions"
            + (f", not finite at {bad[:5]}" if bad else "")
            + ". It must return one finite number per completion."
        )
    return values
