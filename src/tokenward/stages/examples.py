"""The examples stage of an online run: rows of any file to prompts with references, in three parts."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Any

from tokenward.artifacts import StageFolder, read_jsonl, write_jsonl
from tokenward.config import ExamplesTable, Recipe
from tokenward.data import comparison_key, rows, uniform
from tokenward.data.fields import FieldError, describe, text
from tokenward.data.files import messages_of
from tokenward.data.messages import tools_of
from tokenward.data.sources import Say
from tokenward.errors import UserError
from tokenward.stages.base import Stage
from tokenward.stages.data import source_fingerprint
from tokenward.stages.run import Run
from tokenward.types import Example, Message

PARTS = ("train", "development", "test")
SHARE = 0.1
"""Of the source for development, and for the test, where they have no files of their own."""


class ExamplesStage(Stage):
    """Read the prompts of an online run; writes ``train.jsonl``, ``development.jsonl`` and ``test.jsonl``."""

    name = "examples"

    def present(self, recipe: Recipe) -> bool:
        """Not in a run on a prompt task."""
        return recipe.examples is not None

    def settings(self, run: Run) -> Mapping[str, Any]:
        """Its table."""
        return {"examples": _table(run).model_dump(), "seed": run.recipe.seed}

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The files of each part."""
        found = {part: _source(_table(run), part) for part in PARTS}
        return {part: source_fingerprint(source) for part, source in found.items() if source is not None}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Write the parts.

        Raises:
            UserError: a file or a column is missing, or a row has no text there.
        """
        table = _table(run)
        sources = {part: _source(table, part) for part in PARTS}
        parts = _parts(table, sources, run.recipe.seed, run.display.line)
        for part, found in parts.items():
            if not found:
                file = "" if part == "train" else f"a file to examples.{part}, or "
                raise UserError(f"no example is left for {part}. Give {file}more rows to examples.source.")
            _write(folder.path / f"{part}.jsonl", found)
        return {part: len(found) for part, found in parts.items()}

    def show(self, run: Run) -> None:
        """How many there are."""
        facts = run.done("examples").facts
        run.display.table("examples", ("", "rows"), [(part, str(facts[part])) for part in PARTS])


def _table(run: Run) -> ExamplesTable:
    assert run.recipe.examples is not None
    return run.recipe.examples


def read_examples(run: Run, part: str) -> list[Example]:
    """The examples of a part of the finished stage."""
    return [_example(record) for record in read_jsonl(run.path("examples") / f"{part}.jsonl")]


def _source(table: ExamplesTable, part: str) -> str | list[str] | None:
    return {"train": table.source, "development": table.development, "test": table.test}[part]


def _parts(
    table: ExamplesTable, sources: Mapping[str, str | list[str] | None], seed: int, say: Say
) -> dict[str, list[Example]]:
    limits = {"train": table.limit, "development": table.development_limit, "test": table.test_limit}
    missing = [part for part in PARTS if sources[part] is None]
    parts: dict[str, list[Example]] = {part: [] for part in PARTS}
    # Without parts to take from it, no more of the source is read than is wanted.
    for example in islice(_read(table, sources["train"], say), None if missing else limits["train"]):
        place = uniform("examples", seed, example.key)
        # Each part that has no file takes its own tenth of the source, by a hash of the row.
        taken = next((part for i, part in enumerate(missing) if place < SHARE * (i + 1)), "train")
        parts[taken].append(example)
    for part in PARTS[1:]:
        if sources[part] is not None:
            parts[part] = list(islice(_read(table, sources[part], say), limits[part]))
    return {part: found[: limits[part]] for part, found in parts.items()}


def _read(table: ExamplesTable, source: str | list[str] | None, say: Say) -> Iterator[Example]:
    assert source is not None
    for where, row in rows(source, split=table.split, subset=table.subset, say=say):
        try:
            _check_texts(row)
            tools = tools_of(row)
        except FieldError as error:
            raise UserError(f"{where}: {error}. Mend or delete this row.") from error
        prompt = _prompt(table, row, where)
        references = _references(table, row, where)
        columns = {name: value for name, value in row.items() if name != table.references}
        yield Example(
            key=comparison_key(prompt, references, tools=tools),
            prompt=prompt,
            source=where,
            references=references,
            columns=columns,
            tools=tools,
        )


def _check_texts(value: Any, path: str = "") -> None:
    """Refuse half a surrogate pair anywhere in a row: no file and no tokenizer can hold it.

    Raises:
        FieldError: there is one.
    """
    if isinstance(value, str):
        text(value, path)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            text(str(name), "a column's name")
            _check_texts(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            _check_texts(inner, f"{path}[{place}]")


def prompt_parts(template: str) -> list[tuple[str, str | None]]:
    """Literal texts of ``examples.prompt``, each with the column that stands after it, or with None.

    Raises:
        UserError: braces that hold no name.
    """
    advice = "A column's name stands in braces, {article}; a brace itself is written twice."
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"examples.prompt is {template!r}, whose braces do not match: {error}. {advice}"
        ) from error
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion):
            raise UserError(
                f"examples.prompt is {template!r}, in which a brace holds no plain name. {advice}"
            )
    return [(literal, name) for literal, name, _, _ in parts]


def _prompt(table: ExamplesTable, row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    parts = [
        literal + (_text(row, name, where) if name is not None else "")
        for literal, name in prompt_parts(table.prompt)
    ]
    user = Message(role="user", content="".join(parts))
    if not user["content"].strip():
        raise UserError(f"{where}: the prompt is empty. Mend or delete this row.")
    system = [Message(role="system", content=table.system)] if table.system is not None else []
    return (*system, user)


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    """A column as text; a list of texts, such as sentences, is joined by spaces."""
    value = _column(row, name, where, "examples.prompt")
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: {name} is {describe(value)}; a prompt takes text or a list of texts.")
    return str(value)


def _references(table: ExamplesTable, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if table.references is None:
        return ()
    value = _column(row, table.references, where, "examples.references")
    given = [value] if isinstance(value, str) else value
    texts = (
        [text for text in given if isinstance(text, str) and text.strip()] if isinstance(given, list) else []
    )
    if not texts or len(texts) != len(given):
        raise UserError(
            f"{where}: {table.references} is {describe(value)}; references are one text or a list of texts, none of them empty."
        )
    return tuple(texts)


def _column(row: Mapping[str, Any], name: str, where: str, key: str) -> Any:
    if name not in row:
        raise UserError(
            f"{where}: {key} names the column {name!r}, and this row has {', '.join(map(str, row))}. Name one of them."
        )
    return row[name]


def _write(path: Path, examples: Sequence[Example]) -> None:
    records = ({name: getattr(example, name) for name in example.__slots__} for example in examples)
    write_jsonl(path, records, default=str)


def _example(record: Mapping[str, Any]) -> Example:
    return Example(
        key=record["key"],
        prompt=messages_of(record["prompt"]),
        source=record["source"],
        references=tuple(record["references"]),
        columns=record["columns"],
        tools=tuple(record.get("tools", ())),
    )
