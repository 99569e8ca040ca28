"""The replies of a model to prompts and questions of several turns, stored batch by batch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tokenward.artifacts import MANIFEST, atomic_write, fingerprint, open_stage, read_json, user_path
from tokenward.config import Recipe
from tokenward.data import comparison_key, rows
from tokenward.data.parsers import PromptAndTools
from tokenward.data.prepare import Usable, asked, read
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.evaluation.benchmarks import Question, read_questions
from tokenward.models.identity import context_length, has_encoder, model_fingerprint
from tokenward.models.loading import LanguageModel, load_model, load_tokenizer
from tokenward.sampling import Reply, SamplingSettings, sample_replies
from tokenward.tokens.template import Style, Template
from tokenward.types import Example, Message


def read_prompts(source: str, benchmark: str | None, recipe: Recipe, display: Display) -> list[Question]:
    """The prompts of a source.

    A benchmark gives all its questions in order. From any other source, repeated prompts count once, and at most
    ``evaluation.prompts`` are taken: those with the smallest keys, so that the order of the file does not matter.

    Raises:
        UserError: the source cannot be read, holds no prompt, or a row lacks a field.
    """
    if benchmark is not None:
        questions = read_questions(benchmark, rows(source, say=display.line))
    else:
        found = {example.key: example for example in _examples(source, display)}
        questions = [Question(found[key]) for key in sorted(found)[: recipe.evaluation.prompts]]
        if len(questions) < len(found):
            display.line(
                f"  {len(questions)} of {len(found)} prompts; change the number with --set evaluation.prompts=N"
            )
    if not questions:
        raise UserError(
            f"{source} holds no prompts. Write one JSON object per line, with the field prompt.",
            code="no-rows",
        )
    return questions


def _examples(source: str, display: Display) -> Iterator[Example]:
    numbered = rows(source, say=display.line)
    first = next(numbered, None)
    if first is None:
        return
    if (
        "prompt" not in first[1]
    ):  # preference data whose responses hold the prompt, or with another name for it
        usable = (result.comparison for result in read(source).rows if isinstance(result, Usable))
        for row in usable:
            yield _example(PromptAndTools(row.prompt, row.tools), row.source, {})
        return
    for where, row in chain([first], numbered):
        yield _example(
            asked(where, row), where, {name: value for name, value in row.items() if name != "prompt"}
        )


def _example(found: PromptAndTools, where: str, columns: Mapping[str, Any]) -> Example:
    key = comparison_key(found.prompt, (), tools=found.tools)
    return Example(key=key, prompt=found.prompt, source=where, columns=columns, tools=found.tools)


class ComparedModel(NamedTuple):
    """A compared model: ``before`` or ``after``, its folder or hub name, and its name in tables and exports."""

    label: str
    model: str
    name: str


def model_folder(name: str) -> str:
    """The model that a name stands for: the policy of a run's folder, the model of a stage's folder, or the name itself."""
    path = user_path(name)
    for inner in ("policy/model", "online/model"):
        if (path / inner).is_dir():
            return str(path / inner)
    return str(path / "model") if (path / MANIFEST).is_file() and (path / "model").is_dir() else name


def short_name(name: str) -> str:
    """The last distinctive part of a model's name, such as ``quickstart`` of ``runs/quickstart/policy/model``."""
    parts = user_path(name).resolve().parts
    return [part for part in parts if part not in ("model", "policy", "online")][-1]


def fit_context(sides: Sequence[ComparedModel], questions: Sequence[Question], recipe: Recipe) -> list[bool]:
    """Whether each question's first prompt and its reply fit the context of every model."""
    fits, trust = [True] * len(questions), recipe.model.trust_remote_code
    for side in sides:
        encoder = has_encoder(side.model, trust_remote_code=trust)
        tokenizer = load_tokenizer(side.model, trust_remote_code=trust)
        template = _style(recipe).template(tokenizer, encoder=encoder)
        ids = template.rendered_ids([template.render(q.example.prompt, q.example.tools) for q in questions])
        context = context_length(side.model, trust_remote_code=trust)
        room = float("inf") if context is None else context - recipe.evaluation.max_new_tokens
        fits = [fit and len(prompt) <= room for fit, prompt in zip(fits, ids, strict=True)]
    return fits


def _style(recipe: Recipe) -> Style:
    return Style(recipe.tokens.template, recipe.tokens.chat_template_kwargs)


class _Batch(NamedTuple):
    """Questions that are sampled together. They have the same temperature and number of turns."""

    places: list[int]
    temperature: float


def sample_model(
    side: ComparedModel, questions: Sequence[Question], recipe: Recipe, folder: Path, display: Display
) -> list[list[Reply]]:
    """The replies of a model, one per turn of each question. Replies of an earlier, stopped comparison are reused."""
    table = recipe.evaluation
    settings = {
        "evaluation": table.model_dump(exclude={"prompts", "metrics", "bootstrap"}),
        "tokens": _style(recipe).facts(),
        "seed": recipe.seed,
    }
    asked = [[list(q.example.prompt), q.follow_ups, q.temperature] for q in questions]
    inputs = {
        "model": model_fingerprint(side.model, trust_remote_code=recipe.model.trust_remote_code),
        "questions": fingerprint(asked),
    }
    with open_stage(
        folder / side.label, stage="replies", settings=settings, inputs=inputs, format=1
    ) as stage:
        batches = _batches(questions, table.temperature, table.batch)
        files = [stage.path / f"batch-{number:05d}.json" for number in range(len(batches))]
        if stage.done:
            display.line(f"  replies, {side.label}: reused from {stage.path}")
        else:
            _sample(side, questions, recipe, list(zip(batches, files, strict=True)), display)
            stage.complete(questions=len(questions))
        replies: list[list[Reply]] = [[] for _ in questions]
        for batch, file in zip(batches, files, strict=True):
            for place, turns in zip(batch.places, read_json(file), strict=True):
                replies[place] = [Reply(*turn) for turn in turns]
    return replies


def _batches(questions: Sequence[Question], temperature: float, size: int) -> list[_Batch]:
    """Batches of questions of similar length, the same for every model."""
    groups: dict[tuple[float, int], list[int]] = {}
    for place, question in enumerate(questions):
        own = temperature if question.temperature is None else question.temperature
        groups.setdefault((own, len(question.follow_ups)), []).append(place)

    def length(place: int) -> int:
        return sum(len(message["content"]) for message in questions[place].example.prompt)

    batches = []
    for (own, _), places in sorted(groups.items()):
        ordered = sorted(places, key=length)
        batches += [_Batch(ordered[start : start + size], own) for start in range(0, len(ordered), size)]
    return batches


def _sample(
    side: ComparedModel,
    questions: Sequence[Question],
    recipe: Recipe,
    work: Sequence[tuple[_Batch, Path]],
    display: Display,
) -> None:
    table, drawn = recipe.model, recipe.evaluation
    model = load_model(
        side.model,
        dtype=drawn.precision,
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
            settings = SamplingSettings(
                drawn.max_new_tokens, batch.temperature, drawn.top_p, drawn.top_k, drawn.batch
            )
            seed = int(fingerprint([recipe.seed, number])[:15], 16)
            found = _conversations(model, template, asked, settings, seed=seed)
            # Lists without field names: the ids of thousands of replies are most of the file.
            atomic_write(
                file, json.dumps([[list(reply) for reply in turns] for turns in found], ensure_ascii=False)
            )
            bar.advance(len(batch.places))


def _conversations(
    model: LanguageModel,
    template: Template,
    questions: Sequence[Question],
    settings: SamplingSettings,
    *,
    seed: int,
) -> list[list[Reply]]:
    """Replies turn by turn; each turn follows the model's own earlier replies."""
    conversations: list[list[Message]] = [list(question.example.prompt) for question in questions]
    replies: list[list[Reply]] = [[] for _ in questions]
    context = context_length(model.name)
    for turn in range(1 + len(questions[0].follow_ups)):
        if turn:
            for messages, question, before in zip(conversations, questions, replies, strict=True):
                messages.append(Message(role="assistant", content=before[-1].text))
                messages.append(Message(role="user", content=question.follow_ups[turn - 1]))
        both = zip(conversations, questions, strict=True)
        prompts = template.rendered_ids([template.render(messages, q.example.tools) for messages, q in both])
        for prompt, question in zip(prompts, questions, strict=True):
            if context is not None and len(prompt) + settings.max_new_tokens > context:
                raise UserError(
                    f"{question.example.source}: a prompt of {len(prompt)} tokens and {settings.max_new_tokens} new tokens do "
                    f"not fit the model's context of {context} tokens. Lower --set evaluation.max_new_tokens=N.",
                    code="too-long",
                    key="evaluation.max_new_tokens",
                )
        found = sample_replies(model, template, prompts, settings, seed=seed + turn)
        for before, reply in zip(replies, found, strict=True):
            before.append(reply)
    return replies
