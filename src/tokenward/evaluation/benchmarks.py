"""Question files of AlpacaEval 2, MT-Bench and Arena-Hard, and the answer files that their own tools read."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenward.artifacts import write_json, write_jsonl
from tokenward.data import comparison_key
from tokenward.data.fields import FieldError, Row, items, objects, required, text
from tokenward.errors import UserError
from tokenward.sampling import Reply
from tokenward.types import Example, Message

MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
MT_BENCH_TEMPERATURE = 0.7
"""Of a category that has none of its own."""


class Question(NamedTuple):
    """What is asked in one conversation.

    Attributes:
        example: The prompt up to the first reply, where it came from, and the row's columns.
        follow_ups: The user's later turns.
        temperature: That the benchmark asks for; None where it leaves it open.
        name: How the benchmark calls the question; None outside a benchmark.
    """

    example: Example
    follow_ups: tuple[str, ...] = ()
    temperature: float | None = None
    name: str | int | None = None


class _BenchmarkRow(NamedTuple):
    """A row as its benchmark means it."""

    name: str | int
    turns: Sequence[str]
    temperature: float | None = None


class Benchmark(NamedTuple):
    """How a benchmark writes questions and answers.

    Attributes:
        fields: What each row of its question file has, for messages.
        read: A row of that file.
        answer: Question, replies, the model's name and the time -> a row of the answer file.
        file: The answer file of a model, under the folder of exports.
    """

    fields: str
    read: Callable[[Row], _BenchmarkRow]
    answer: Callable[[Question, Sequence[Reply], str, float], dict[str, Any]]
    file: Callable[[str], Path]


def _alpaca_question(row: Row) -> _BenchmarkRow:
    instruction = text(required(row, "instruction"), "instruction")
    text(required(row, "dataset"), "dataset")
    return _BenchmarkRow(instruction, [instruction])


def _alpaca_answer(question: Question, replies: Sequence[Reply], model: str, now: float) -> dict[str, Any]:
    columns = question.example.columns
    return {
        "dataset": columns["dataset"],
        "instruction": columns["instruction"],
        "output": replies[0].text,
        "generator": model,
    }


def _mt_bench_question(row: Row) -> _BenchmarkRow:
    category = text(required(row, "category"), "category")
    turns = [text(turn, f"turns[{i}]") for i, turn in enumerate(items(required(row, "turns"), "turns"))]
    temperature = MT_BENCH_TEMPERATURES.get(category, MT_BENCH_TEMPERATURE)
    return _BenchmarkRow(_name(row, "question_id"), turns, temperature)


def _mt_bench_answer(question: Question, replies: Sequence[Reply], model: str, now: float) -> dict[str, Any]:
    turns = [reply.text for reply in replies]
    return _answer(question, model, now, turns)


def _arena_question(row: Row) -> _BenchmarkRow:
    if "uid" in row or "question_id" not in row:  # Arena-Hard 2.0
        return _BenchmarkRow(_name(row, "uid"), [text(required(row, "prompt"), "prompt")])
    entries = objects(required(row, "turns"), "turns")
    paths = [f"turns[{i}]." for i in range(len(entries))]
    turns = [
        text(required(entry, "content", path=path), f"{path}content")
        for entry, path in zip(entries, paths, strict=True)
    ]
    return _BenchmarkRow(_name(row, "question_id"), turns)


def _arena_answer(question: Question, replies: Sequence[Reply], model: str, now: float) -> dict[str, Any]:
    if "uid" not in question.example.columns:
        turns = [{"content": reply.text, "token_len": len(reply.ids)} for reply in replies]
        return _answer(question, model, now, turns)
    prompt = question.example.prompt[-1]
    return {
        "uid": question.name,
        "ans_id": _answer_id(question, model, replies[0].text),
        "model": model,
        "messages": [dict(prompt), {"role": "assistant", "content": {"answer": replies[0].text}}],
        "tstamp": now,
    }


def _answer(question: Question, model: str, now: float, turns: Sequence[Any]) -> dict[str, Any]:
    return {
        "question_id": question.name,
        "answer_id": _answer_id(question, model, json.dumps(turns)),
        "model_id": model,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": now,
    }


def _answer_id(question: Question, model: str, content: str) -> str:
    return hashlib.sha256(json.dumps([question.name, model, content]).encode()).hexdigest()[:22]


def _name(row: Row, field: str) -> str | int:
    value = required(row, field)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise FieldError(field, "expected text or a whole number")
    return value


BENCHMARKS: dict[str, Benchmark] = {
    "alpaca_eval": Benchmark(
        "instruction, dataset",
        _alpaca_question,
        _alpaca_answer,
        lambda model: Path("alpaca_eval") / model / "model_outputs.json",
    ),
    "mt_bench": Benchmark(
        "question_id, category, turns (a list of texts)",
        _mt_bench_question,
        _mt_bench_answer,
        lambda model: Path("mt_bench") / "model_answer" / f"{model}.jsonl",
    ),
    "arena_hard": Benchmark(
        "uid, prompt (2.0), or question_id, turns (a list of objects with content; 0.1)",
        _arena_question,
        _arena_answer,
        lambda model: Path("arena_hard") / "model_answer" / f"{model}.jsonl",
    ),
}


def read_questions(benchmark: str, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Question]:
    """The questions of a benchmark's own file.

    Args:
        benchmark: A key of ``BENCHMARKS``.
        rows: Where each row stands, and the row.

    Raises:
        UserError: a row lacks a field, has an empty turn, or the name of another row.
    """
    kind = BENCHMARKS[benchmark]
    found: list[Question] = []
    seen: dict[str | int, str] = {}
    for where, row in rows:
        try:
            asked = kind.read(row)
        except FieldError as error:
            raise UserError(
                f"{where}: {error}. A question of {benchmark} has the fields {kind.fields}; name the benchmark's own file "
                "in --prompts, or leave --export out."
            ) from error
        if not asked.turns or not all(turn.strip() for turn in asked.turns):
            raise UserError(f"{where}: a question of {benchmark} without text. Mend or delete this row.")
        if asked.name in seen:
            raise UserError(
                f"{where}: the question {asked.name!r} stands in {seen[asked.name]} already. Delete one."
            )
        seen[asked.name] = where
        found.append(_question(asked, where, row))
    return found


def _question(asked: _BenchmarkRow, where: str, row: Mapping[str, Any]) -> Question:
    first, *later = asked.turns
    prompt = (Message(role="user", content=first),)
    key = comparison_key(prompt, tuple(later))
    example = Example(key=key, prompt=prompt, source=where, columns=dict(row))
    return Question(example, tuple(later), asked.temperature, asked.name)


def write_answers(
    benchmark: str,
    folder: Path,
    model: str,
    questions: Sequence[Question],
    replies: Sequence[Sequence[Reply]],
    *,
    now: float,
) -> Path:
    """Write a model's answers as the benchmark's own tool reads them.

    Args:
        benchmark: A key of ``BENCHMARKS``.
        folder: Of all exports.
        model: The name under which the tool lists the model.
        questions: As :func:`read_questions` gave them.
        replies: To each question, one per turn.
        now: Seconds since 1970, for ``tstamp``.

    Returns:
        The file.
    """
    kind = BENCHMARKS[benchmark]
    rows = [kind.answer(q, turns, model, now) for q, turns in zip(questions, replies, strict=True)]
    path = folder / kind.file(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write = write_json if path.suffix == ".json" else write_jsonl
    write(path, rows)
    return path
