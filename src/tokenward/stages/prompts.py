"""Prompts of one's own, to reply to: from rows with a prompt, any preference data, or a benchmark's question file."""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from tokenward.data import comparison_key, rows
from tokenward.data.fields import FieldError
from tokenward.data.parsers import PromptAndTools, asked_of
from tokenward.data.prepare import Usable, read
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.evaluation.benchmarks import Question, read_questions
from tokenward.types import Example


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
