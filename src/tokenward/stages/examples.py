"""The examples stage of an online run: reads prompts with references from any file, in three parts."""

from collections.abc import Iterator, Mapping
from itertools import islice
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
"""Fraction of the source for development, and for the test, if they have no source of their own."""


class ExamplesStage(Stage):
    """Read the prompts of an online run; writes ``train.jsonl``, ``development.jsonl`` and ``test.jsonl``."""

    name = "examples"

    def present(self, recipe: Recipe) -> bool:
        """Whether the run trains on examples, not on a prompt task."""
        return recipe.examples is not None

    def settings(self, run: Run) -> Mapping[str, Any]:
        return {"examples": _table(run).model_dump(), "seed": run.recipe.seed}

    def inputs(self, run: Run) -> Mapping[str, str]:
        sources = _sources(_table(run))
        return {part: source_fingerprint(source) for part, source in sources.items() if source is not None}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        try:
            parts = _parts(_table(run), run.recipe.seed, run.display.line)
        except UserError as error:  # the reader's keys are those of the table data
            key = error.key.replace("data.", "examples.", 1)
            raise UserError(str(error), code=error.code, key=key) from error
        for part, found in parts.items():
            if not found:
                file = "" if part == "train" else f"set examples.{part} to a file, or "
                raise UserError(
                    f"no example is left for {part}: {file}add rows to examples.source.",
                    code="no-rows",
                    key="examples.source",
                )
            records = ({name: getattr(example, name) for name in example.__slots__} for example in found)
            write_jsonl(folder.path / f"{part}.jsonl", records, default=str)
        return {part: len(found) for part, found in parts.items()}

    def show(self, run: Run) -> None:
        facts = run.done("examples").facts
        run.display.table("examples", ("", "rows"), [(part, str(facts[part])) for part in PARTS])


def _table(run: Run) -> ExamplesTable:
    assert run.recipe.examples is not None
    return run.recipe.examples


def read_examples(run: Run, part: str) -> list[Example]:
    """The examples of a part of the finished stage."""
    return [
        Example(
            key=record["key"],
            prompt=messages_of(record["prompt"]),
            source=record["source"],
            references=tuple(record["references"]),
            columns=record["columns"],
            tools=tuple(record.get("tools", ())),
        )
        for record in read_jsonl(run.path("examples") / f"{part}.jsonl")
    ]


def _sources(table: ExamplesTable) -> dict[str, str | list[str] | None]:
    return {"train": table.source, "development": table.development, "test": table.test}


def _parts(table: ExamplesTable, seed: int, say: Say) -> dict[str, list[Example]]:
    sources = _sources(table)
    limits = {"train": table.limit, "development": table.development_limit, "test": table.test_limit}
    missing = [part for part in PARTS if sources[part] is None]
    parts: dict[str, list[Example]] = {part: [] for part in PARTS}
    # If no part is taken from the source, rows beyond the limit need not be read.
    for example in islice(_read(table, table.source, say), None if missing else limits["train"]):
        place = uniform("examples", seed, example.key)
        # Each part without a source takes its own tenth of the rows, by a hash of the row.
        part = next((part for i, part in enumerate(missing) if place < SHARE * (i + 1)), "train")
        parts[part].append(example)
    for part in PARTS[1:]:
        source = sources[part]
        if source is not None:
            parts[part] = list(islice(_read(table, source, say), limits[part]))
    return {part: found[: limits[part]] for part, found in parts.items()}


def _read(table: ExamplesTable, source: str | list[str], say: Say) -> Iterator[Example]:
    for place, row in rows(source, split=table.split, subset=table.subset, say=say):
        try:
            _check_texts(row)
            tools = tools_of(row)
            prompt, references = _prompt(table, row), _references(table, row)
        except FieldError as error:
            raise UserError(f"{place}: {error}. Fix or delete this row.", code="bad-row") from error
        except UserError as error:
            raise error.within(place) from error
        columns = {name: value for name, value in row.items() if name != table.references}
        yield Example(
            key=comparison_key(prompt, references, tools=tools),
            prompt=prompt,
            source=place,
            references=references,
            columns=columns,
            tools=tools,
        )


def _check_texts(value: Any, path: str = "") -> None:
    """Refuse half a surrogate pair anywhere in a row: no file and no tokenizer can hold one.

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
    """The literal texts of ``examples.prompt``, each with the name of the column after it, or None.

    Raises:
        UserError: the braces do not match, or do not hold a plain name.
    """
    advice = "Write a column as {article}, and a literal brace twice."
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"the prompt is {template!r}, whose braces do not match: {error}. {advice}",
            code="bad-template",
            key="examples.prompt",
        ) from error
    for _, name, form, conversion in parts:
        if name is not None and (not name or form or conversion):
            raise UserError(
                f"the prompt is {template!r}, with braces that do not hold a plain name. {advice}",
                code="bad-template",
                key="examples.prompt",
            )
    return [(literal, name) for literal, name, _, _ in parts]


def _prompt(table: ExamplesTable, row: Mapping[str, Any]) -> tuple[Message, ...]:
    parts = prompt_parts(table.prompt)
    content = "".join(literal + ("" if name is None else _text(row, name)) for literal, name in parts)
    if not content.strip():
        raise UserError("the prompt is empty. Fix or delete this row.", code="bad-row")
    system = [Message(role="system", content=table.system)] if table.system is not None else []
    return (*system, Message(role="user", content=content))


def _text(row: Mapping[str, Any], name: str) -> str:
    """A column as text; a list of texts, such as sentences, is joined by spaces."""
    value = _column(row, name, "examples.prompt")
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        message = f"{name} is {describe(value)}; a prompt needs text or a list of texts."
        raise UserError(message, code="bad-row", key="examples.prompt")
    return str(value)


def _references(table: ExamplesTable, row: Mapping[str, Any]) -> tuple[str, ...]:
    if table.references is None:
        return ()
    value = _column(row, table.references, "examples.references")
    given = [value] if isinstance(value, str) else value
    valid = (
        isinstance(given, list) and given and all(isinstance(item, str) and item.strip() for item in given)
    )
    if not valid:
        raise UserError(
            f"{table.references} is {describe(value)}; references must be one text or a list of texts, none of them empty.",
            code="bad-row",
            key="examples.references",
        )
    return tuple(given)


def _column(row: Mapping[str, Any], name: str, key: str) -> Any:
    if name not in row:
        raise UserError(
            f"there is no column {name!r}. This row has {', '.join(map(str, row))}.",
            code="missing-column",
            key=key,
        )
    return row[name]
