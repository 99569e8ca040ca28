"""The task of discrete prompts: a frozen classifier judges the prompts that the policy writes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from tokenward.config import PromptTaskTable
from tokenward.data import comparison_key
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, load_model
from tokenward.sampling.classification import (
    ClassificationGap,
    LabelledText,
    PromptTemplate,
    TaskModel,
    load_masked,
    read_labelled,
)
from tokenward.sampling.rollouts import Context, ScoredSampler
from tokenward.stages.run import Run
from tokenward.stages.tasks import Task, check_same_tokens, sampler_of
from tokenward.tokens.rows import TokenRow
from tokenward.types import Comparison, Example

DRAWS = 4096
"""Different subsets of the training texts that rank prompts; a long run meets one again after so many."""


class LabelledParts(NamedTuple):
    """The labelled texts of a prompt task."""

    train: list[LabelledText]
    development: list[LabelledText]
    test: list[LabelledText]


def labelled_parts(run: Run) -> LabelledParts:
    """Read the three files of a prompt task."""
    table = run.recipe.prompt_task
    assert table is not None
    classes = len(table.verbalizers)
    train, development, test = (
        read_labelled(path, table.text, table.label, classes=classes)
        for path in (table.train, table.development, table.test)
    )
    _check_classes([*train, *development], table)
    return LabelledParts(train, development, test[: table.test_limit])


def _check_classes(texts: Sequence[LabelledText], table: PromptTaskTable) -> None:
    """Refuse a word whose class has no text: it would only draw probability from the others."""
    missing = sorted(set(range(len(table.verbalizers))) - {text.label for text in texts})
    if missing:
        raise UserError(
            f"prompt_task.verbalizers has {len(table.verbalizers)} words, and no text has the label "
            f"{' or '.join(map(str, missing))} in {table.train} and {table.development}. Write one word per class, in the "
            "order of the labels from 0."
        )


def task_model(run: Run) -> TaskModel:
    """The frozen classifier of a prompt task."""
    table, base = run.recipe.prompt_task, run.recipe.model
    assert table is not None
    load = load_masked if table.masked else load_model
    model = load(
        table.model or base.name,
        dtype=base.dtype,
        device=base.device,
        trust_remote_code=base.trust_remote_code,
    )
    return TaskModel(
        model=model,
        template=PromptTemplate(table.template),
        verbalizers=table.verbalizers,
        precision=table.precision,
        max_sentence_tokens=table.max_sentence_tokens,
    )


class PromptSource:
    """The gap of a prompt, on a fresh part of the training texts in each draw or on all development texts.

    Args:
        train: On the training texts.
        development: On the development texts.
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
        """See :class:`tokenward.sampling.sources.PreferenceSource`."""
        places: dict[tuple[str, int], list[int]] = {}
        for index, key in enumerate(zip(part, draw, strict=True)):
            places.setdefault(key, []).append(index)
        scores = [0.0] * len(completions)
        for (name, number), indices in places.items():
            # Without the scores of earlier calls: a score depends in its last bits on what is computed beside it, and
            # a run that goes on after a stop has no earlier calls.
            gap = replace(self._gaps[name], draw=number)
            found = gap([], [], [completion_ids[index] for index in indices])
            for index, score in zip(indices, found, strict=True):
                scores[index] = score
        return scores


def prompt_start(run: Run, policy: LanguageModel) -> list[int]:
    """What a discrete prompt continues."""
    table = run.recipe.prompt_task
    assert table is not None
    tokenizer = policy.tokenizer
    if table.start is not None:
        ids = tokenizer(table.start, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"prompt_task.start {table.start!r} is no token at all. Leave it out.")
        return list(ids)  # type: ignore[arg-type]
    special = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not isinstance(special, int):
        raise UserError(
            f"the tokenizer of {policy.name} has neither a first token nor an end, so a prompt has nothing to continue. "
            "Write prompt_task.start: some text."
        )
    return [special]


def prompt_task(run: Run, policy: LanguageModel) -> Task:
    """Prompts of a fixed length for a frozen classifier, ranked by the gap between label and rival."""
    table = run.recipe.prompt_task
    assert table is not None
    texts, task = labelled_parts(run), task_model(run)
    check_same_tokens(policy, task.model, "task model")
    _say_what_is_cut(run, task, texts)
    factors = {"correct": table.correct, "wrong": table.wrong, "seed": run.recipe.seed}
    source = PromptSource(
        ClassificationGap(task=task, examples=texts.train, share=table.share, **factors),
        ClassificationGap(task=task, examples=texts.development, share=1.0, **factors),
    )
    start = prompt_start(run, policy)
    train = [_prompt_context(start, "train", draw) for draw in range(DRAWS)]
    assert run.recipe.online is not None
    development = [_prompt_context(start, "development", 0)] * run.recipe.online.development
    row = TokenRow(_empty(train[0].example), start, [], [], [])
    sampler = sampler_of(run, policy, fixed_length=True)
    samples = ScoredSampler(sampler=sampler, source=source, name="classification_gap")
    return Task(train, development, [row], samples)


def _say_what_is_cut(run: Run, task: TaskModel, parts: LabelledParts) -> None:
    texts = [text.text for part in parts for text in part]
    cut = task.sentences_cut(texts)
    if cut:
        run.display.line(
            f"  {cut} of {len(texts)} texts are longer than {task.max_sentence_tokens} tokens and lose their end. To read more "
            "of them, raise prompt_task.max_sentence_tokens."
        )


def _prompt_context(start: list[int], part: str, draw: int) -> Context:
    key = comparison_key((), (part, str(draw)))
    columns = {"part": part, "draw": draw}
    return Context(Example(key=key, prompt=(), source=f"{part} prompt {draw}", columns=columns), start)


def _empty(example: Example) -> Comparison:
    return Comparison(key=example.key, prompt=example.prompt, responses=(), ranks=(), source=example.source)
