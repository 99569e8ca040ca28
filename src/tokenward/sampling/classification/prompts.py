"""Discrete prompts for a frozen classifier: scored, sampled, chosen on one split and tested on another."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenward.data.fields import FieldError, Row, integer, required
from tokenward.data.fields import text as text_field
from tokenward.data.sources import rows
from tokenward.errors import UserError
from tokenward.ops.classification import label_gap, piecewise_gap, predictions, prior_offsets
from tokenward.ops.selection import kept_count
from tokenward.sampling.classification.task_model import TaskModel


class LabelledText(NamedTuple):
    """A text and its class.

    Attributes:
        text: As it stands in the file.
        label: Class, counted from 0.
        source: Where it came from, as ``file:line``, for messages to the user.
    """

    text: str
    label: int
    source: str


def read_labelled(
    path: str | Path, text: str | Sequence[str], label: str, *, classes: int | None = None
) -> list[LabelledText]:
    """The labelled texts of a file (TSV, CSV, JSONL, JSON, Parquet), in its order.

    Args:
        path: The file; text tables have a header.
        text: Name of the text column, or several, of which the file has one (the published AG News files call it
            ``text`` in one split and ``sentence`` in another).
        label: Name of the column of whole numbers from 0.
        classes: How many classes there are; None takes any label.

    Raises:
        UserError: The file cannot be read, has no rows or no such column, or a row's text is empty or its label no
            class.
    """
    names = [text] if isinstance(text, str) else list(text)
    found = [_labelled(row, where, names, label, classes) for where, row in rows(path)]
    if not found:
        raise UserError(f"{path}: holds no rows. Write a header and one text with its label per line.")
    return found


def _labelled(row: Row, where: str, names: list[str], label: str, classes: int | None) -> LabelledText:
    present = [name for name in names if name in row]
    if len(present) != 1:
        raise UserError(f"{where}: {_column_problem(row, names, present)}")
    _check_column(row, where, label)
    try:
        content = text_field(required(row, present[0]), present[0])
        number = integer(required(row, label), label)
    except FieldError as error:
        raise UserError(f"{where}: {error}. Labels are whole numbers from 0, texts are text.") from error
    if not content.strip():
        raise UserError(f"{where}: {present[0]} is empty. Mend or delete this row.")
    if number < 0 or (classes is not None and number >= classes):
        allowed = "0 or more" if classes is None else f"0 to {classes - 1}, one for each verbalizer"
        raise UserError(f"{where}: {label} is {number}. Labels must be {allowed}.")
    return LabelledText(content, number, where)


def _column_problem(row: Row, names: list[str], present: list[str]) -> str:
    if present:
        return f"has the columns {' and '.join(present)}. Name the one that holds the text."
    return _missing(row, " or ".join(names), names[0])


def _check_column(row: Row, where: str, name: str) -> None:
    if name not in row:
        raise UserError(f"{where}: {_missing(row, name, name)}")


def _missing(row: Row, wanted: str, name: str) -> str:
    near = get_close_matches(name, list(row), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"has no column {wanted}.{hint} It has: {', '.join(row)}."


def random_prompts(
    vocabulary_size: int, length: int, count: int, seed: int, excluded: Collection[int] = ()
) -> list[list[int]]:
    """Prompts of tokens drawn uniformly; two may be the same by chance.

    Args:
        vocabulary_size: Ids are below it.
        length: Tokens of each prompt, >= 1.
        count: How many prompts.
        seed: The same one gives the same prompts.
        excluded: Ids that are never drawn, such as the tokenizer's special ones.

    Raises:
        UserError: no id is left to draw, or a number is out of its range.
    """
    if length < 1 or count < 1:
        raise UserError(f"random prompts: length {length} and count {count} must be at least 1.")
    allowed = sorted(set(range(vocabulary_size)) - set(excluded))
    if not allowed:
        raise UserError(
            f"random prompts: all {vocabulary_size} ids of the vocabulary are excluded. Exclude only special ids."
        )
    draw = random.Random(seed)
    return [draw.choices(allowed, k=length) for _ in range(count)]


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
        wrong: Factor of any other gap.
    """
    logp = task.class_logprobs(prompts, [example.text for example in examples])
    gaps = label_gap(logp.exp(), _labels(examples))
    return piecewise_gap(gaps, correct=correct, wrong=wrong).mean(-1)


@dataclass(frozen=True, kw_only=True)
class ClassificationGap:
    """The preference source of TLM's prompt task (arXiv 2306.00398): prompts by their gap on the training examples.

    A call uses a random share of the examples, the same for all its prompts. ``draw`` numbers the shares.

    Attributes:
        task: The frozen classifier.
        examples: The training examples.
        share: Share of the examples that a draw uses, rounded half up; at least one example. The published 80 % of 32 are 26.
        correct: Factor of a positive gap.
        wrong: Factor of any other gap.
        seed: Seed of all draws.
        draw: Number of the draw; the same number gives the same examples.

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
        """Score each completion as a prompt of the task model; only ``completion_ids`` are read."""
        scores = gap_scores(self.task, completion_ids, self.drawn(), correct=self.correct, wrong=self.wrong)
        return scores.tolist()


def check_labels(examples: Sequence[LabelledText], task: TaskModel) -> None:
    """Raise a UserError if there are no examples, or if a label has no verbalizer."""
    if not examples:
        raise UserError("there are no labelled examples. Give at least one for each class.")
    for example in examples:
        if not 0 <= example.label < task.classes:
            raise UserError(
                f"{example.source}: label {example.label} has no verbalizer; there are {task.classes} "
                f"({', '.join(map(repr, task.verbalizers))}), for the labels 0 to {task.classes - 1}."
            )


class Candidate(NamedTuple):
    """A prompt and its figures on the development split.

    Attributes:
        ids: Its tokens.
        text: Their text. Encoding it again need not give the same ids.
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
        test: Is not read before the choice.
        best: How many to test; all if there are fewer.
        correct: Factor of a positive gap.
        wrong: Factor of any other gap.

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
    offsets = calibration_offsets(logp[order[:best]])
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


def calibration_offsets(logp: Tensor) -> Tensor:
    """What to subtract from the class log-probabilities so that all classes are equally likely.  [p n c] -> [p c]

    The mean class probabilities over the ``n`` texts are then uniform; see
    :func:`tokenward.ops.classification.prior_offsets`, whose first step is Batch Calibration (arXiv 2309.17249). No
    labels are used.

    Args:
        logp: Class log-probabilities of ``n`` development texts under ``p`` prompts.
    """
    classes = logp.shape[-1]
    uniform = torch.full((classes,), 1 / classes, dtype=torch.float64)
    return torch.stack([prior_offsets(values, uniform) for values in logp])


def _labels(examples: Sequence[LabelledText]) -> Tensor:
    return torch.tensor([example.label for example in examples])
