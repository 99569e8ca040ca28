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
    """A text, its class (counted from 0), and its source (``file:line``)."""

    text: str
    label: int
    source: str


def read_labelled(
    path: str | Path, text: str | Sequence[str], label: str, *, classes: int
) -> list[LabelledText]:
    """The labelled texts of a file (TSV, CSV, JSONL, JSON, Parquet), in order.

    ``text`` names the text column, or several of which the file has one: the published AG News files call it ``text`` in
    one split and ``sentence`` in another.

    Raises:
        UserError: the file cannot be read, is empty or lacks a column, or a row has no text or an invalid label.
    """
    names = [text] if isinstance(text, str) else list(text)
    found = [_labelled(row, where, names, label, classes) for where, row in rows(path)]
    if not found:
        raise UserError(
            f"{path}: has no rows. It needs a header and one text with its label per line.", code="empty-file"
        )
    return found


def _labelled(row: Row, where: str, names: list[str], label: str, classes: int) -> LabelledText:
    present = [name for name in names if name in row]
    if len(present) > 1:
        raise UserError(
            f"{where}: has the columns {' and '.join(present)}. Name the one that holds the text.",
            code="ambiguous-column",
            key="prompt_task.text",
        )
    if not present or label not in row:
        wanted, key = (names, "text") if not present else ([label], "label")
        near = get_close_matches(wanted[0], list(row), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{where}: has no column {' or '.join(wanted)}.{hint} It has: {', '.join(row)}.",
            code="missing-column",
            key=f"prompt_task.{key}",
        )
    try:
        content = text_field(required(row, present[0]), present[0])
        number = integer(required(row, label), label)
    except FieldError as error:
        raise UserError(
            f"{where}: {error}. Labels are whole numbers from 0, texts are text.", code="invalid-field"
        ) from error
    if not content.strip():
        raise UserError(f"{where}: {present[0]} is empty. Fix or delete this row.", code="empty-text")
    if not 0 <= number < classes:
        raise UserError(
            f"{where}: {label} is {number}. Labels must be 0 to {classes - 1}, one per verbalizer.",
            code="invalid-label",
        )
    return LabelledText(content, number, where)


def random_prompts(
    vocabulary_size: int, length: int, count: int, seed: int, excluded: Collection[int] = ()
) -> list[list[int]]:
    """``count`` prompts of ``length`` uniformly drawn token ids, none of them excluded; two may be equal by chance."""
    allowed = sorted(set(range(vocabulary_size)) - set(excluded))
    draw = random.Random(seed)
    return [draw.choices(allowed, k=length) for _ in range(count)]


@dataclass(frozen=True, kw_only=True)
class ClassificationGap:
    """The preference source of TLM's prompt task (arXiv 2306.00398): prompts scored by their gap on training examples.

    The score is the mean piecewise gap between the label and the best other class. A call uses a random subset of the
    examples, the same for all its prompts.

    Attributes:
        share: Share of the examples in a subset, rounded half up (the published 80 % of 32 are 26); at least one example.
        correct: Factor of a positive gap.
        wrong: Factor of any other gap.
        draw: Number of the subset; the same seed and number give the same examples.
    """

    task: TaskModel
    examples: Sequence[LabelledText]
    share: float = 0.8
    correct: float = 200.0
    wrong: float = 180.0
    seed: int = 0
    draw: int = 0

    def drawn(self) -> list[LabelledText]:
        """The examples of the current subset, in their original order."""
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
        examples = self.drawn()
        logp = self.task.class_logprobs(completion_ids, [example.text for example in examples])
        return _scores(logp, _labels(examples), self.correct, self.wrong).tolist()


class Candidate(NamedTuple):
    """A prompt, its decoded text (which may encode to other ids), and its gap score and accuracy on the development split."""

    ids: list[int]
    text: str
    score: float
    accuracy: float


class Chosen(NamedTuple):
    """Ranked candidates, and the test results of the best.

    Attributes:
        candidates: All distinct ones, highest development score first; ties in the given order.
        correct: ``[k n]`` bool, which test rows the best ``k`` classify correctly.
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

    The texts of the development split also calibrate. The published TLM evaluation ranks some candidates by their training
    score and others by their development score in one list; here a single split ranks them all.
    """
    distinct = [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]
    logp = task.class_logprobs(distinct, [example.text for example in development])
    labels = _labels(development)
    scores = _scores(logp, labels, correct, wrong)
    order = torch.argsort(scores, descending=True, stable=True)
    accuracies = (predictions(logp) == labels).double().mean(-1)
    decode = task.model.tokenizer.decode
    candidates = [
        Candidate(
            distinct[i],
            str(decode(distinct[i], clean_up_tokenization_spaces=False)),
            float(scores[i]),
            float(accuracies[i]),
        )
        for i in order.tolist()
    ]
    offsets = calibration_offsets(logp[order[:best]])
    tested = task.class_logprobs([item.ids for item in candidates[:best]], [example.text for example in test])
    plain, calibrated = predictions(tested), predictions(tested, offsets[:, None])
    wanted = _labels(test)
    return Chosen(candidates, plain == wanted, calibrated == wanted, offsets)


def calibration_offsets(logp: Tensor) -> Tensor:
    """Offsets to subtract from class log-probabilities to make all classes equally likely.  [p n c] -> [p c]

    The mean class probabilities over the ``n`` texts are then uniform; no labels are used. See
    :func:`tokenward.ops.classification.prior_offsets`, whose first step is Batch Calibration (arXiv 2309.17249).
    """
    classes = logp.shape[-1]
    uniform = torch.full((classes,), 1 / classes, dtype=torch.float64)
    return torch.stack([prior_offsets(values, uniform) for values in logp])


def _scores(logp: Tensor, labels: Tensor, correct: float, wrong: float) -> Tensor:
    """Mean piecewise gap of each prompt.  [p x c], [x] -> [p]"""
    return piecewise_gap(label_gap(logp.exp(), labels), correct=correct, wrong=wrong).mean(-1)


def _labels(examples: Sequence[LabelledText]) -> Tensor:
    return torch.tensor([example.label for example in examples])
