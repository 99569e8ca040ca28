"""What an online run learns from: prompts, a sampler, and what ranks the replies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

from tokenward.config import PromptTaskTable
from tokenward.data import comparison_key
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel, load_model
from tokenward.plugins import build
from tokenward.sampling import SamplingSettings, TransformersSampler
from tokenward.sampling.checks import CheckedSampler
from tokenward.sampling.classification import (
    ClassificationGap,
    LabelledText,
    MaskedModel,
    PromptTemplate,
    TaskModel,
    load_masked,
    read_labelled,
)
from tokenward.sampling.rollouts import Context, ScoredSampler
from tokenward.sampling.sampler import Sampler
from tokenward.sampling.sources import SOURCES
from tokenward.stages.examples import read_examples
from tokenward.stages.run import Run
from tokenward.tokens.encode import encode, explanations, notes_of
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.split import SAID
from tokenward.tokens.template import Template
from tokenward.types import Comparison, Example

SAMPLERS: dict[str, Any] = {"transformers": TransformersSampler}


class Task(NamedTuple):
    """An online run's task.

    Attributes:
        train: Prompts to learn on.
        development: Prompts to choose by.
        rows: Rows that the policy trains on: with the first reference as their response, or with none.
        samples: Draws replies from the policy of now and scores them.
    """

    train: list[Context]
    development: list[Context]
    rows: list[TokenRow]
    samples: ScoredSampler


def sampler_of(run: Run, policy: LanguageModel, *, fixed_length: bool = False) -> Sampler:
    """What draws replies, with the recipe's settings."""
    online = run.recipe.online
    assert online is not None
    table = online.sampling
    settings = SamplingSettings(
        max_new_tokens=table.max_new_tokens,
        temperature=table.temperature,
        top_p=table.top_p,
        top_k=table.top_k,
        batch=table.batch,
        stop=tuple(table.stop),
        fixed_length=fixed_length,
    )
    template = policy.template(run.style)
    fixed = {"model": policy, "template": template, "settings": settings, "precision": table.precision}
    name, arguments = online.sampler.name, online.sampler.arguments
    if name in SAMPLERS:
        return SAMPLERS[name](**fixed, **arguments)
    return _own_sampler(name, {**fixed, **arguments}, policy)


def _own_sampler(name: str, arguments: dict[str, Any], policy: LanguageModel) -> Sampler:
    """A sampler of the user's own, whose replies are looked at."""
    made: Any = build("sampler", name, arguments, SAMPLERS)
    if not callable(made):
        raise UserError(
            f"online.sampler {name} made a {type(made).__name__}, which cannot be called. Give it a __call__ as that of "
            "tokenward.sampling.Sampler."
        )
    vocabulary = policy.model.config.get_text_config().vocab_size
    return CheckedSampler(sampler=cast(Sampler, made), name=name, vocabulary=vocabulary)


def source_of(run: Run) -> Callable[..., Any]:
    """The preference source that the recipe names."""
    online = run.recipe.online
    assert online is not None
    if online.source is None:
        raise UserError(
            "online.source is missing: nothing ranks the samples. Write for example source: {name: rouge}, or "
            '{name: "my_module:score"} for a function f(prompts, completions, **columns) -> list[float].'
        )
    return build("preference source", online.source.name, online.source.arguments, SOURCES)


def example_task(run: Run, policy: LanguageModel) -> Task:
    """Replies to examples, ranked by the recipe's source."""
    online = run.recipe.online
    assert online is not None
    assert online.source is not None
    template = policy.template(run.style)
    longest = online.sampling.max_new_tokens
    train, development = (
        encoded_examples(run, template, part, reply=longest) for part in ("train", "development")
    )
    samples = ScoredSampler(sampler=sampler_of(run, policy), source=source_of(run), name=online.source.name)
    written = online.objective.name != "reinforce"
    rows = train.rows if written else [_without_response(row) for row in train.rows]
    return Task(train.contexts, development.contexts, rows, samples)


class EncodedExamples(NamedTuple):
    """Examples as token ids: prompts to sample for, and rows with their first reference."""

    contexts: list[Context]
    rows: list[TokenRow]


def encoded_examples(run: Run, template: Template, part: str, *, reply: int = 0) -> EncodedExamples:
    """A part of the examples within the recipe's limits; what is too long is dropped or cut, and counted.

    Args:
        run: The run.
        template: Of the policy.
        part: ``train``, ``development`` or ``test``.
        reply: Tokens of the longest reply that will be drawn, for which the model must have positions left.
    """
    examples = read_examples(run, part)
    comparisons = [
        Comparison(
            key=example.key,
            prompt=example.prompt,
            responses=example.references[:1],
            ranks=(0,) * len(example.references[:1]),
            source=example.source,
            tools=example.tools,
        )
        for example in examples
    ]
    by_source = {example.source: example for example in examples}
    encoded, counts = encode(comparisons, template, run.limits)
    run.display.table(part, ("", "rows"), [(name, str(count)) for name, count in counts.items()])
    _say_notes(run, template, counts, comparisons)
    if not template.encoder:  # whose prompt takes no positions of the reply's
        encoded = _with_room(run, encoded, part, reply)
    contexts = [Context(by_source[row.comparison.source], row.asked) for row in encoded]
    return EncodedExamples(contexts, encoded)


def _say_notes(run: Run, template: Template, counts: Mapping[str, int], rows: Sequence[Comparison]) -> None:
    """Show how prompts are written if that needs a word, each with an example."""
    found = {
        note: next(row for row in rows if notes_of(template, row) & note)
        for note, words in SAID.items()
        if counts.get(words)
    }
    for line in explanations(template, found, counts):
        run.display.line(line)


def _with_room(run: Run, rows: list[TokenRow], part: str, reply: int) -> list[TokenRow]:
    """Rows after whose prompt the model has positions left for a reply; the others are counted."""
    context = run.limits.context
    kept = [row for row in rows if context is None or len(row.asked) + reply <= context]
    if len(kept) < len(rows):
        run.display.line(
            f"  {part}: {len(rows) - len(kept)} examples dropped, whose prompt and a reply of {reply} tokens are longer than "
            f"the model's context of {context}"
        )
    if not kept:
        raise UserError(
            f"no example of {part} is left: every prompt and a reply of {reply} tokens are longer than the model's context of "
            f"{context}. Lower max_new_tokens or tokens.max_prompt_tokens."
        )
    return kept


def check_same_tokens(policy: LanguageModel, other: TokenModel | MaskedModel, what: str) -> None:
    """Refuse a model that would read the ids which the policy draws as other tokens.

    Raises:
        UserError: its vocabulary is another.
    """
    if policy.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise UserError(
            f"the {what} {other.name} has another vocabulary than {policy.name}, whose token ids it is given: they would be "
            "other tokens to it. Name a model with the same tokenizer."
        )


def _without_response(row: TokenRow) -> TokenRow:
    return TokenRow(row.comparison, row.asked, [], [])


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
