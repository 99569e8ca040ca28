"""A model's replies to prompts and questions, turn by turn, kept batch by batch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tokenward.artifacts import MANIFEST, atomic_write, fingerprint, open_stage, read_json
from tokenward.config import Recipe
from tokenward.data import comparison_key, rows
from tokenward.data.fields import FieldError
from tokenward.data.parsers import PromptAndTools, asked_of
from tokenward.data.prepare import Usable, read
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.evaluation.benchmarks import Question, read_questions
from tokenward.models.identity import context_length, has_encoder, model_fingerprint
from tokenward.models.loading import LanguageModel, load_model, load_tokenizer
from tokenward.sampling import Reply, SamplingSettings, sample_replies
from tokenward.tokens.template import Style, Template
from tokenward.types import Example, Message


def read_prompts(source: str, benchmark: str | None, count: int, display: Display) -> list[Question]:
    """The prompts of a source.

    Of a benchmark all are taken, in the file's order. Otherwise a prompt that comes twice counts once, and where there are
    more than ``count`` of them those with the smallest keys are taken, which does not depend on the file's order.

    Args:
        source: What :func:`tokenward.data.rows` reads.
        benchmark: A key of ``BENCHMARKS``, whose fields the rows must have; None for anything else.
        count: Most prompts.
        display: Is told what was left out.

    Raises:
        UserError: the source cannot be read, holds no prompt, or a row lacks a field.
    """
    if benchmark is not None:
        questions = read_questions(benchmark, rows(source, say=display.line))
    else:
        found = {example.key: example for example in _examples(source, display)}
        kept = [found[key] for key in sorted(found)[:count]]
        if len(kept) < len(found):
            display.line(
                f"  {len(kept)} of {len(found)} prompts; --set evaluation.prompts=N takes another number"
            )
        questions = [Question(example) for example in kept]
    if not questions:
        raise UserError(f"{source} holds no prompts. Write one JSON object a line, with prompt.")
    return questions


def _examples(source: str, display: Display) -> Iterator[Example]:
    numbered = rows(source, say=display.line)
    first = next(numbered, None)
    if first is None:
        return
    if "prompt" not in first[1]:  # chosen and rejected that hold the prompt, or another name for it
        for result in read(source).rows:
            if isinstance(result, Usable):
                row = result.comparison
                yield _example(PromptAndTools(row.prompt, row.tools), row.source, {})
        return
    for where, row in chain([first], numbered):
        try:
            asked = asked_of(row)
        except FieldError as error:
            raise UserError(f"{where}: {error}. Mend or delete this row.") from error
        if not any(message["content"].strip() for message in asked.prompt):
            raise UserError(f"{where}: the prompt is empty. Mend or delete this row.")
        yield _example(asked, where, {name: value for name, value in row.items() if name != "prompt"})


def _example(asked: PromptAndTools, where: str, columns: Mapping[str, Any]) -> Example:
    key = comparison_key(asked.prompt, (), tools=asked.tools)
    return Example(key=key, prompt=asked.prompt, source=where, columns=columns, tools=asked.tools)


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One of the compared models.

    Attributes:
        label: ``before`` or ``after``; also its folder's name.
        model: Folder or hub name.
        name: How exports and tables call it.
    """

    label: str
    model: str
    name: str


class _Batch(NamedTuple):
    """Questions that are sampled together: of one temperature and number of turns."""

    places: list[int]
    temperature: float


def model_of(name: str) -> str:
    """The model that is meant: of a run folder its policy, of a stage folder its model, else the name itself."""
    path = Path(name).expanduser()
    for inner in ("policy/model", "online/model"):
        if (path / inner).is_dir():
            return str(path / inner)
    return str(path / "model") if (path / MANIFEST).is_file() and (path / "model").is_dir() else name


def short_name(name: str) -> str:
    """The last part of a model's name that says something: ``quickstart`` of ``runs/quickstart/policy/model``."""
    parts = [
        part for part in Path(name).expanduser().resolve().parts if part not in ("model", "policy", "online")
    ]
    return parts[-1]


def fitting(sides: Sequence[ComparedModel], questions: Sequence[Question], recipe: Recipe) -> list[bool]:
    """Whether each question's first prompt and its reply fit the context of every model."""
    fits = [True] * len(questions)
    for side in sides:
        context = context_length(side.model, trust_remote_code=recipe.model.trust_remote_code)
        template = _template(side.model, recipe)
        ids = template.rendered_ids([template.render(q.example.prompt, q.example.tools) for q in questions])
        room = float("inf") if context is None else context - recipe.evaluation.max_new_tokens
        fits = [old and len(prompt) <= room for old, prompt in zip(fits, ids, strict=True)]
    return fits


def _template(name: str, recipe: Recipe) -> Template:
    trust = recipe.model.trust_remote_code
    encoder = has_encoder(name, trust_remote_code=trust)
    tokenizer = load_tokenizer(name, trust_remote_code=trust)
    return _style(recipe).template(tokenizer, encoder=encoder)


def _style(recipe: Recipe) -> Style:
    return Style(recipe.tokens.template, recipe.tokens.chat_template_kwargs)


def replies_of(
    side: ComparedModel, questions: Sequence[Question], recipe: Recipe, folder: Path, display: Display
) -> list[list[Reply]]:
    """The replies of a model, one per turn of each question; those of an earlier, stopped run are taken over.

    Args:
        side: The model.
        questions: What to reply to.
        recipe: Its tables ``evaluation``, ``model`` and ``tokens`` and its seed say how.
        folder: Of the comparison; the replies lie in ``folder/before`` or ``folder/after``.
        display: Shows progress.
    """
    table = recipe.evaluation
    settings = {
        "evaluation": table.model_dump(exclude={"prompts", "metrics", "bootstrap"}),
        "tokens": _style(recipe).facts(),
        "seed": recipe.seed,
    }
    asked = [[list(q.example.prompt), q.follow_ups, q.temperature] for q in questions]
    inputs = {"model": model_fingerprint(side.model), "questions": fingerprint(asked)}
    with open_stage(
        folder / side.label, stage="replies", settings=settings, inputs=inputs, format=1
    ) as stage:
        batches = _batches(questions, table.temperature, table.batch)
        files = [stage.path / f"batch-{number:05d}.json" for number in range(len(batches))]
        if not stage.done:
            _sample(side, questions, recipe, list(zip(batches, files, strict=True)), display)
            stage.complete(questions=len(questions))
        else:
            display.line(f"  replies, {side.label}: taken over from {stage.path}")
        replies: list[list[Reply]] = [[] for _ in questions]
        for batch, file in zip(batches, files, strict=True):
            for place, turns in zip(batch.places, read_json(file), strict=True):
                replies[place] = [Reply(*turn) for turn in turns]
    return replies


def _batches(questions: Sequence[Question], temperature: float, size: int) -> list[_Batch]:
    """Questions of like length together, the longest last; what is in a batch does not depend on the model."""
    groups: dict[tuple[float, int], list[int]] = {}
    for place, question in enumerate(questions):
        own = temperature if question.temperature is None else question.temperature
        groups.setdefault((own, len(question.follow_ups)), []).append(place)
    batches = []
    for (own, _), places in sorted(groups.items()):
        ordered = sorted(
            places, key=lambda place: sum(len(m["content"]) for m in questions[place].example.prompt)
        )
        batches += [_Batch(ordered[start : start + size], own) for start in range(0, len(ordered), size)]
    return batches


def _sample(
    side: ComparedModel,
    questions: Sequence[Question],
    recipe: Recipe,
    work: Sequence[tuple[_Batch, Path]],
    display: Display,
) -> None:
    table = recipe.model
    model = load_model(
        side.model,
        dtype=recipe.evaluation.precision,
        device=table.device,
        attention=table.attention,
        trust_remote_code=table.trust_remote_code,
    )
    template = model.template(_style(recipe))
    with display.progress(f"replies, {side.label}", len(questions)) as bar:
        bar.begin(sum(len(batch.places) for batch, file in work if file.is_file()))
        for number, (batch, file) in enumerate(work):
            if file.is_file():
                continue
            asked = [questions[place] for place in batch.places]
            settings = _settings(recipe, batch.temperature)
            found = _conversations(model, template, asked, settings, seed=_seed(recipe.seed, number))
            # Not as lists of a reply's fields by name: the ids of thousands of replies are most of the file.
            atomic_write(
                file, json.dumps([[list(reply) for reply in turns] for turns in found], ensure_ascii=False)
            )
            bar.advance(len(batch.places))


def _settings(recipe: Recipe, temperature: float) -> SamplingSettings:
    table = recipe.evaluation
    return SamplingSettings(table.max_new_tokens, temperature, table.top_p, table.top_k, table.batch)


def _seed(seed: int, number: int) -> int:
    return int(fingerprint([seed, number])[:15], 16)


def _conversations(
    model: LanguageModel,
    template: Template,
    questions: Sequence[Question],
    settings: SamplingSettings,
    *,
    seed: int,
) -> list[list[Reply]]:
    """Each turn is asked with the model's own replies before it."""
    conversations: list[list[Message]] = [list(question.example.prompt) for question in questions]
    replies: list[list[Reply]] = [[] for _ in questions]
    context = context_length(model.name)
    for turn in range(1 + len(questions[0].follow_ups)):
        if turn:
            for messages, question, before in zip(conversations, questions, replies, strict=True):
                messages.append(Message(role="assistant", content=before[-1].text))
                messages.append(Message(role="user", content=question.follow_ups[turn - 1]))
        prompts = template.rendered_ids(
            [
                template.render(messages, q.example.tools)
                for messages, q in zip(conversations, questions, strict=True)
            ]
        )
        _check_room(prompts, questions, settings, context)
        found = sample_replies(model, template, prompts, settings, seed=seed + turn)
        for before, reply in zip(replies, found, strict=True):
            before.append(reply)
    return replies


def _check_room(
    prompts: Sequence[Sequence[int]],
    questions: Sequence[Question],
    settings: SamplingSettings,
    context: int | None,
) -> None:
    for prompt, question in zip(prompts, questions, strict=True):
        if context is not None and len(prompt) + settings.max_new_tokens > context:
            raise UserError(
                f"{question.example.source}: a prompt of {len(prompt)} tokens and {settings.max_new_tokens} new ones do not fit "
                f"in the model's {context} positions. Lower --set evaluation.max_new_tokens=N."
            )


def reply_record(reply: Reply) -> Mapping[str, Any]:
    """A reply as ``replies.jsonl`` has it."""
    return {"text": reply.text, "tokens": len(reply.ids), "ended": reply.ended}
