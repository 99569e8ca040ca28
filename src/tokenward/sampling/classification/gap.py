"""Prompts ranked by how clearly a task model gives the training examples their labels."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops.classification import label_gap, piecewise_gap
from tokenward.ops.selection import kept_count
from tokenward.sampling.classification.examples import LabelledText
from tokenward.sampling.classification.task_model import TaskModel


def gap_scores(
    task: TaskModel,
    prompts: Sequence[Sequence[int]],
    examples: Sequence[LabelledText],
    *,
    correct: float = 200.0,
    wrong: float = 180.0,
) -> Tensor:
    """Mean over the examples of the piecewise gap between the label and the best other class.  -> [p]

    Args:
        task: The frozen classifier.
        prompts: ``p`` prompts as token ids.
        examples: Labelled texts.
        correct: Factor of a positive gap.
        wrong: Factor of any other.
    """
    logp = task.class_logprobs(prompts, [example.text for example in examples])
    gaps = label_gap(logp.exp(), torch.tensor([example.label for example in examples]))
    return piecewise_gap(gaps, correct=correct, wrong=wrong).mean(-1)


@dataclass(kw_only=True)
class ClassificationGap:
    """The preference source of TLM's prompt task (arXiv 2306.00398): prompts by their gap on the training examples.

    It sees a random share of the examples, the same for all prompts of a call; the loop sets ``draw`` anew for
    each reward step. A prompt scored before in the same draw is not scored again.

    Attributes:
        task: The frozen classifier.
        examples: The training examples.
        share: Of the examples used per draw, rounded half up; at least one. The published 80 % of 32 are 26.
        correct: Factor of a positive gap.
        wrong: Factor of any other.
        seed: Of all draws.
        draw: Which draw of the examples is used; the same number gives the same examples.

    Raises:
        UserError: there are no examples, a label has no verbalizer, or a number is out of its range.
    """

    task: TaskModel
    examples: Sequence[LabelledText]
    share: float = 0.8
    correct: float = 200.0
    wrong: float = 180.0
    seed: int = 0
    draw: int = 0
    _known: dict[tuple[int, tuple[int, ...]], float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"share is {self.share}, it must be above 0 and at most 1, such as 0.8.")
        if self.correct <= 0 or self.wrong <= 0:
            raise UserError(
                f"correct is {self.correct} and wrong {self.wrong}; both must be above 0, such as 200 and 180: a "
                "negative factor would prefer the wrong class."
            )
        check_labels(self.examples, self.task)

    def drawn(self) -> list[LabelledText]:
        """The examples of the current draw, in their own order."""
        total = len(self.examples)
        count = int(kept_count(torch.tensor([total]), self.share, rule="round", minimum=1))
        chosen = random.Random(f"{self.seed}:{self.draw}").sample(range(total), count)
        return [self.examples[index] for index in sorted(chosen)]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float]:
        """Score of each completion, taken as a prompt of the task model.

        Args:
            prompts: What the completions continue; not used, a prompt does not see the text it will stand beside.
            completions: Their text; not used.
            completion_ids: Their token ids, which are what is scored.
            columns: Other columns of the data; not used.
        """
        keys = [(self.draw, tuple(ids)) for ids in completion_ids]
        missing = [key for key in dict.fromkeys(keys) if key not in self._known]
        if missing:
            scores = gap_scores(
                self.task, [ids for _, ids in missing], self.drawn(), correct=self.correct, wrong=self.wrong
            )
            self._known.update(zip(missing, scores.tolist(), strict=True))
        return [self._known[key] for key in keys]


def check_labels(examples: Sequence[LabelledText], task: TaskModel) -> None:
    """Make sure that there are examples and that each label has a verbalizer.

    Raises:
        UserError: there are none, or a label has none.
    """
    if not examples:
        raise UserError("there are no labelled examples. Give at least one for each class.")
    for example in examples:
        if not 0 <= example.label < task.classes:
            raise UserError(
                f"{example.source}: label {example.label} has no verbalizer; there are {task.classes} "
                f"({', '.join(map(repr, task.verbalizers))}), for the labels 0 to {task.classes - 1}."
            )
