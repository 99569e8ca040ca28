"""A preference source for discrete prompts, and the contexts that they are sampled in."""

from collections.abc import Sequence
from dataclasses import replace

from tokenward.data import comparison_key
from tokenward.sampling.classification.prompts import ClassificationGap
from tokenward.sampling.rollouts import Context
from tokenward.types import Example


class PromptSource:
    """Scores prompts by their classification gap.

    Args:
        train: On the training texts, of which each draw takes another subset.
        development: On all development texts.
    """

    def __init__(self, train: ClassificationGap, development: ClassificationGap) -> None:
        self._gaps = {"train": train, "development": development}

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        part: Sequence[str],
        draw: Sequence[int],
    ) -> list[float]:
        """See :class:`tokenward.sampling.sources.PreferenceSource`; ``part`` and ``draw`` come from :func:`prompt_context`."""
        places: dict[tuple[str, int], list[int]] = {}
        for index, key in enumerate(zip(part, draw, strict=True)):
            places.setdefault(key, []).append(index)
        scores = [0.0] * len(completions)
        for (name, number), indices in places.items():
            # A copy, without the cached scores of earlier calls: the last bits of a score depend on its batch, and a
            # resumed run has no earlier calls.
            gap = replace(self._gaps[name], draw=number)
            found = gap([], [], [completion_ids[index] for index in indices])
            for index, score in zip(indices, found, strict=True):
                scores[index] = score
        return scores


def prompt_context(start: list[int], part: str, draw: int) -> Context:
    """What a prompt continues, with the texts that score it: ``train`` or ``development``, and which subset."""
    key = comparison_key((), (part, str(draw)))
    columns = {"part": part, "draw": draw}
    return Context(Example(key=key, prompt=(), source=f"{part} prompt {draw}", columns=columns), start)
