"""Reads the question files of AlpacaEval 2, MT-Bench and Arena-Hard, and writes the answer files for their tools."""

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
"""Temperature of all other categories."""


class Question(NamedTuple):
    """A question with its follow-ups.

    Attributes:
        example: The prompt up to the first reply, its source and the row's columns.
        follow_ups: The user's later turns.
        temperature: Sampling temperature of the benchmark; None if it does not set one.
        name: The benchmark's id of the question; None outside a benchmark.
    """

    example: Example
    follow_ups: tuple[str, ...] = ()
    temperature: float | None = None
    name: str | int | None = None


class _BenchmarkRow(NamedTuple):
    """The parsed row of a question file."""

    name: str | int
    turns: Sequence[str]
    temperature: float | None = None


class Benchmark(NamedTuple):
    """The file formats of a benchmark.

    Attributes:
        fields: The fields of a question row, for messages.
        read: Parses a question row.
        answer: Makes an answer row of a question, its replies, the model's name and the time.
        file: Path of a model's answer file in the folder of exports.
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
    copied = {name: question.example.columns[name] for name in ("dataset", "instruction")}
    return {**copied, "output": replies[0].text, "generator": model}


def _mt_bench_question(row: Row) -> _BenchmarkRow:
    category = text(required(row, "category"), "category")
    turns = [text(turn, f"turns[{i}]") for i, turn in enumerate(items(required(row, "turns"), "turns"))]
    temperature = MT_BENCH_TEMPERATURES.get(category, MT_BENCH_TEMPERATURE)
    return _BenchmarkRow(_name(row, "question_id"), turns, temperature)


def _mt_bench_answer(question: Question, replies: Sequence[Reply], model: str, now: float) -> dict[str, Any]:
    return _answer(question, model, now, [reply.text for reply in replies])


def _arena_question(row: Row) -> _BenchmarkRow:
    if "uid" in row or "question_id" not in row:  # Arena-Hard 2.0
        return _BenchmarkRow(_name(row, "uid"), [text(required(row, "prompt"), "prompt")])
    turns = [
        text(required(entry, "content", path=f"turns[{i}]."), f"turns[{i}].content")
        for i, entry in enumerate(objects(required(row, "turns"), "turns"))
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
    """Parse the question file of a benchmark.

    Args:
        benchmark: A key of ``BENCHMARKS``.
        rows: The source of each row, and the row.

    Raises:
        UserError: a row lacks a field, has an empty turn or repeats an id.
    """
    kind = BENCHMARKS[benchmark]
    found: list[Question] = []
    seen: dict[str | int, str] = {}
    for where, row in rows:
        try:
            parsed = kind.read(row)
        except FieldError as error:
            raise UserError(
                f"{where}: {error}. A question of {benchmark} has the fields {kind.fields}. Use the question file of the benchmark.",
                code="missing-column",
            ) from error
        if not parsed.turns or not all(turn.strip() for turn in parsed.turns):
            raise UserError(
                f"{where}: this question of {benchmark} has an empty turn. Correct or delete the row.",
                code="empty-text",
            )
        if parsed.name in seen:
            raise UserError(
                f"{where}: the question {parsed.name!r} is also in {seen[parsed.name]}. Delete one.",
                code="duplicate-row",
            )
        seen[parsed.name] = where
        first, *later = parsed.turns
        prompt = (Message(role="user", content=first),)
        key = comparison_key(prompt, tuple(later))
        example = Example(key=key, prompt=prompt, source=where, columns=dict(row))
        found.append(Question(example, tuple(later), parsed.temperature, parsed.name))
    return found


def write_answers(
    benchmark: str,
    folder: Path,
    model: str,
    questions: Sequence[Question],
    replies: Sequence[Sequence[Reply]],
    *,
    now: float,
) -> Path:
    """Write a model's answers in the format of the benchmark's tool; returns the path.

    Args:
        benchmark: A key of ``BENCHMARKS``.
        folder: Folder of all exports.
        model: Name of the model in the tool.
        questions: The result of :func:`read_questions`.
        replies: One reply per turn of each question.
        now: Seconds since 1970, for ``tstamp``.
    """
    kind = BENCHMARKS[benchmark]
    rows = [kind.answer(q, turns, model, now) for q, turns in zip(questions, replies, strict=True)]
    path = folder / kind.file(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write = write_json if path.suffix == ".json" else write_jsonl
    write(path, rows)
    return path
