"""The figures of an evaluation row by row, so that two runs can be compared on the same rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenward.artifacts import read_jsonl, write_jsonl
from tokenward.errors import UserError

ROWS = "rows.jsonl"

PAIR, PROMPT = "pair", "prompt"
"""Kinds of rows: a held-out pair of written responses, and a prompt that was replied to."""


class RowKey(NamedTuple):
    """Names a row in every run that has it."""

    kind: str
    key: str


class RowValues:
    """Figures by row, collected while they are measured."""

    def __init__(self) -> None:
        self._rows: dict[RowKey, dict[str, float]] = {}

    def add(self, kind: str, keys: Sequence[str], name: str, values: Sequence[float]) -> None:
        """One figure of several rows, under the name that its mean has in ``metrics.json``."""
        for key, value in zip(keys, values, strict=True):
            self._rows.setdefault(RowKey(kind, key), {})[name] = float(value)

    def add_change(
        self, keys: Sequence[str], name: str, before: Sequence[float], after: Sequence[float]
    ) -> None:
        """A quantity of the replies to several prompts before and after training."""
        change = [second - first for first, second in zip(before, after, strict=True)]
        for part, values in (("before", before), ("after", after), ("change", change)):
            self.add(PROMPT, keys, f"{name}/{part}", values)

    def write(self, folder: Path) -> None:
        """Store them as JSON lines: ``{"kind", "key", "values"}``."""
        records = ({**row._asdict(), "values": values} for row, values in self._rows.items())
        write_jsonl(folder / ROWS, records, ascii=True)


def read_row_values(folder: Path) -> dict[RowKey, dict[str, float]]:
    """What :meth:`RowValues.write` stored.

    Raises:
        UserError: the evaluation has no figures by row.
    """
    path = folder / ROWS
    if not path.is_file():
        raise UserError(
            f"{folder} has no {ROWS}, so its figures are not known row by row. The evaluation of a prompt_task has none; any "
            "other one: delete the folder and run `tokenward evaluate RECIPE` again."
        )
    return {RowKey(line["kind"], line["key"]): line["values"] for line in read_jsonl(path)}
