"""The final choice among candidate prompts, on one split, and how the chosen ones do on another."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops.classification import label_gap, piecewise_gap, predictions
from tokenward.sampling.classification.calibration import calibration_offsets
from tokenward.sampling.classification.examples import LabelledText
from tokenward.sampling.classification.gap import check_labels
from tokenward.sampling.classification.task_model import TaskModel


class Candidate(NamedTuple):
    """A prompt and what the development split says of it.

    Attributes:
        ids: Its tokens.
        text: How they read; encoding it again need not give the same ids.
        score: Its gap score on the development split.
        accuracy: Its plain accuracy there.
    """

    ids: list[int]
    text: str
    score: float
    accuracy: float


class Chosen(NamedTuple):
    """Candidates in order, and the test rows of the best.

    Attributes:
        candidates: All distinct ones, highest development score first; the earliest of equal ones.
        correct: ``[k n]`` bool, which test rows the best ``k`` get right.
        calibrated: ``[k n]`` bool, the same with offsets fitted on the development texts.
        offsets: ``[k c]``, those offsets.
    """

    candidates: list[Candidate]
    correct: Tensor
    calibrated: Tensor
    offsets: Tensor

    @property
    def accuracy(self) -> list[float]:
        """Test accuracy of each of the best."""
        return self.correct.double().mean(-1).tolist()

    @property
    def calibrated_accuracy(self) -> list[float]:
        """The same with calibration."""
        return self.calibrated.double().mean(-1).tolist()


def choose(
    task: TaskModel,
    prompts: Sequence[Sequence[int]],
    development: Sequence[LabelledText],
    test: Sequence[LabelledText],
    *,
    best: int = 3,
    prior: Sequence[float] | None = None,
    correct: float = 200.0,
    wrong: float = 180.0,
) -> Chosen:
    """Rank the distinct prompts by the development split alone, and test the best.

    The published TLM evaluation ranks some candidates by their training score and others by their
    development score in one list; here one split ranks them all.

    Args:
        task: The frozen classifier.
        prompts: Candidates as token ids.
        development: Ranks the candidates; its texts also calibrate.
        test: Never looked at before the choice.
        best: How many to test; all where there are fewer.
        prior: Share of each class for calibration; None for equal ones.
        correct: Factor of a positive gap.
        wrong: Factor of any other.

    Raises:
        UserError: there are no candidates or examples, or ``best`` is below 1.
    """
    distinct = [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]
    if not distinct or best < 1:
        raise UserError(
            f"nothing to choose: {len(distinct)} candidates, best {best}. Both must be at least 1."
        )
    check_labels(development, task)
    check_labels(test, task)
    logp = task.class_logprobs(distinct, [example.text for example in development])
    labels = _labels(development)
    scores = piecewise_gap(label_gap(logp.exp(), labels), correct=correct, wrong=wrong).mean(-1)
    order = torch.argsort(scores, descending=True, stable=True)
    accuracies = (predictions(logp) == labels).double().mean(-1)
    candidates = [_candidate(task, distinct[i], scores[i], accuracies[i]) for i in order.tolist()]
    offsets = calibration_offsets(logp[order[:best]], prior)
    tested = task.class_logprobs(
        [candidate.ids for candidate in candidates[:best]], [example.text for example in test]
    )
    wanted = _labels(test)
    return Chosen(
        candidates, predictions(tested) == wanted, predictions(tested, offsets[:, None]) == wanted, offsets
    )


def _candidate(task: TaskModel, ids: list[int], score: Tensor, accuracy: Tensor) -> Candidate:
    text = str(task.model.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return Candidate(ids, text, float(score), float(accuracy))


def _labels(examples: Sequence[LabelledText]) -> Tensor:
    return torch.tensor([example.label for example in examples])
