"""What an online run trains on: prompts, a sampler, and a source that ranks the replies."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from tokenward.api.own_replies import check_same_tokens
from tokenward.config import RolloutSettings
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, load_model
from tokenward.plugins import build
from tokenward.sampling import SamplingSettings
from tokenward.sampling.checks import CheckedSampler
from tokenward.sampling.classification import (
    ClassificationGap,
    LabelledText,
    PromptTemplate,
    TaskModel,
    load_masked,
    read_labelled,
)
from tokenward.sampling.classification.source import PromptSource, prompt_context
from tokenward.sampling.engines import EngineSampler
from tokenward.sampling.registry import SAMPLERS, engine_of
from tokenward.sampling.rollouts import Context, ScoredSampler
from tokenward.sampling.sampler import Sampler
from tokenward.sampling.sources import SOURCES
from tokenward.stages.examples import read_examples
from tokenward.stages.run import Run
from tokenward.tokens.encode import encode, explanations, notes_of
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.split import SAID
from tokenward.tokens.template import Template
from tokenward.types import Comparison


class Task(NamedTuple):
    """The task of an online run.

    Attributes:
        train: Training prompts.
        development: Prompts for evaluation during training.
        rows: The policy's training rows, with the first reference as their response or without one.
        samples: Samples replies from the current policy and scores them.
    """

    train: list[Context]
    development: list[Context]
    rows: list[TokenRow]
    samples: ScoredSampler


def task_of(run: Run, policy: LanguageModel) -> Task:
    """The task that the recipe describes, with replies from this policy."""
    return example_task(run, policy) if run.recipe.prompt_task is None else prompt_task(run, policy)


def sampler_of(
    run: Run, policy: LanguageModel, rollouts: RolloutSettings, *, fixed_length: bool = False
) -> Sampler:
    """The sampler of replies that a table of the recipe describes.

    Raises:
        UserError: a custom sampler cannot be built or called.
    """
    table = rollouts.sampling
    settings = SamplingSettings(
        max_new_tokens=table.max_new_tokens,
        temperature=table.temperature,
        top_p=table.top_p,
        top_k=table.top_k,
        batch=table.batch,
        stop=tuple(table.stop),
        fixed_length=fixed_length,
    )
    asked = {"model": policy, "template": policy.template(run.style), "settings": settings}
    engine = engine_of(rollouts.sampler)
    if engine is not None:
        return EngineSampler(engine=engine.open(), tolerance=engine.tolerance, **asked)
    arguments = {**asked, "precision": table.precision, **rollouts.sampler.arguments}
    name = rollouts.sampler.name
    if name in SAMPLERS:
        return SAMPLERS[name](**arguments)
    made: Any = build("sampler", name, arguments, SAMPLERS)
    if not callable(made):
        raise UserError(
            f"the sampler {name} is a {type(made).__name__}, which cannot be called. Give it the __call__ of "
            "tokenward.sampling.Sampler.",
            code="not-callable",
            key="online.sampler",
        )
    vocabulary = policy.model.config.get_text_config().vocab_size
    return CheckedSampler(sampler=cast(Sampler, made), name=name, vocabulary=vocabulary)


def source_of(run: Run) -> Callable[..., Any]:
    """The recipe's preference source.

    Raises:
        UserError: the recipe names none, or it cannot be built.
    """
    source = run.online.source
    if source is None:
        raise UserError(
            "no source ranks the samples. Write for example source: {name: rouge}, or "
            '{name: "my_module:score"} for a function f(prompts, completions, **columns) -> list[float].',
            code="missing-key",
            key="online.source",
        )
    return build("preference source", source.name, source.arguments, SOURCES)


def ranks(run: Run) -> bool:
    """Whether a source ranks replies: to learn the reward, or to evaluate the policy during training."""
    return run.online.reward is None or run.online.evaluate_every is not None


def example_task(run: Run, policy: LanguageModel) -> Task:
    """Replies to examples, ranked by the recipe's source."""
    source, named = source_of(run) if ranks(run) else None, run.online.source
    template, longest = policy.template(run.style), run.online.sampling.max_new_tokens
    train = encoded_examples(run, template, "train", reply=longest)
    development = encoded_examples(run, template, "development", reply=longest)
    samples = ScoredSampler(
        sampler=sampler_of(run, policy, run.online), source=source, name="" if named is None else named.name
    )
    rows = train.rows
    if run.online.objective.name == "reinforce":
        rows = [TokenRow(row.comparison, row.asked, [], []) for row in rows]
    return Task(train.contexts, development.contexts, rows, samples)


class EncodedExamples(NamedTuple):
    """Examples as token ids: prompts to sample for, and rows with their first reference."""

    contexts: list[Context]
    rows: list[TokenRow]


def encoded_examples(run: Run, template: Template, part: str, *, reply: int = 0) -> EncodedExamples:
    """A part of the examples within the recipe's limits; longer ones are dropped or truncated, and counted.

    The model's context must have room for a sampled reply of ``reply`` tokens.

    Raises:
        UserError: no example is left.
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
    rows, counts = encode(comparisons, template, run.limits)
    run.display.table(part, ("", "rows"), [(name, str(count)) for name, count in counts.items()])
    _explain(run, template, counts, comparisons)
    if not template.encoder:  # an encoder's prompt takes no room of the reply's
        rows = _with_room(run, rows, part, reply)
    return EncodedExamples([Context(by_source[row.comparison.source], row.asked) for row in rows], rows)


def _explain(run: Run, template: Template, counts: Mapping[str, int], rows: Sequence[Comparison]) -> None:
    """Explain unusual ways in which the template renders prompts, each with an example."""
    found = {
        note: next(row for row in rows if notes_of(template, row) & note)
        for note, words in SAID.items()
        if counts.get(words)
    }
    for line in explanations(template, found, counts):
        run.display.line(line)


def _with_room(run: Run, rows: list[TokenRow], part: str, reply: int) -> list[TokenRow]:
    """Rows whose prompt leaves room for a reply in the model's context; the others are counted."""
    context = run.limits.context
    kept = [row for row in rows if context is None or len(row.asked) + reply <= context]
    longer = f"prompt plus a reply of {reply} tokens exceed the model's context of {context}"
    if not kept:
        raise UserError(
            f"no example of {part} is left: in all of them, {longer}. Lower max_new_tokens or max_prompt_tokens.",
            code="no-rows",
            key="tokens.max_prompt_tokens",
        )
    if len(kept) < len(rows):
        run.display.line(f"  {part}: {len(rows) - len(kept)} examples dropped: {longer}")
    return kept


DRAWS = 4096
"""Number of different subsets of the training texts for ranking prompts; a longer run reuses them."""


class LabelledParts(NamedTuple):
    """The labelled texts of a prompt task."""

    train: list[LabelledText]
    development: list[LabelledText]
    test: list[LabelledText]


def labelled_parts(run: Run) -> LabelledParts:
    """Read the three files of a prompt task.

    Raises:
        UserError: a file cannot be read, or a class has no text.
    """
    table = run.prompt_task
    classes = len(table.verbalizers)
    train, development, test = (
        read_labelled(path, table.text, table.label, classes=classes)
        for path in (table.train, table.development, table.test)
    )
    # A word whose class has no text would only take probability from the others.
    missing = sorted(set(range(classes)) - {text.label for text in [*train, *development]})
    if missing:
        labels = " or ".join(map(str, missing))
        raise UserError(
            f"there are {classes} verbalizers, but no text in {table.train} and {table.development} has the label {labels}. Write "
            "one verbalizer per class, in the order of the labels from 0.",
            code="class-without-rows",
            key="prompt_task.verbalizers",
        )
    return LabelledParts(train, development, test[: table.test_limit])


def task_model(run: Run) -> TaskModel:
    """The frozen classifier of a prompt task."""
    table, base = run.prompt_task, run.recipe.model
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


def prompt_start(run: Run, policy: LanguageModel) -> list[int]:
    """The token ids that a discrete prompt continues.

    Raises:
        UserError: the recipe's text has no tokens, or the tokenizer has neither bos nor eos.
    """
    table, tokenizer, key = run.prompt_task, policy.tokenizer, "prompt_task.start"
    if table.start is not None:
        ids = tokenizer(table.start, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(
                f"start is {table.start!r}, which has no tokens. Remove it.", code="empty-text", key=key
            )
        return list(ids)  # type: ignore[arg-type]
    special = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not isinstance(special, int):
        raise UserError(
            f"the tokenizer of {policy.name} has neither a bos nor an eos token for a prompt to continue. Write a text as start.",
            code="missing-token",
            key=key,
        )
    return [special]


def prompt_task(run: Run, policy: LanguageModel) -> Task:
    """Prompts of a fixed length for a frozen classifier, ranked by the gap between the label and its rivals."""
    table, texts, task = run.prompt_task, labelled_parts(run), task_model(run)
    check_same_tokens(policy, task.model, "task model", "prompt_task.model")
    cut, total = task.sentences_cut([text.text for part in texts for text in part]), sum(map(len, texts))
    if cut:
        run.display.line(
            f"  {cut} of {total} texts are longer than {task.max_sentence_tokens} tokens and are truncated. Raise "
            "prompt_task.max_sentence_tokens to read more of them."
        )
    factors = {"correct": table.correct, "wrong": table.wrong, "seed": run.recipe.seed}
    source = PromptSource(
        ClassificationGap(task=task, examples=texts.train, share=table.share, **factors),
        ClassificationGap(task=task, examples=texts.development, share=1.0, **factors),
    )
    start = prompt_start(run, policy)
    train = [prompt_context(start, "train", draw) for draw in range(DRAWS)]
    development = [prompt_context(start, "development", 0)] * run.online.development
    first = train[0].example
    row = TokenRow(
        Comparison(key=first.key, prompt=(), responses=(), ranks=(), source=first.source), start, [], [], []
    )
    sampler = sampler_of(run, policy, run.online, fixed_length=True)
    return Task(
        train, development, [row], ScoredSampler(sampler=sampler, source=source, name="classification_gap")
    )
