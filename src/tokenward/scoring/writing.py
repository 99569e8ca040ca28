"""Values per token of whole prompts into a score store."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from torch import Tensor

from tokenward.scoring.store import TokenRecord, TokenStore, write_shards
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.spelled import spelled
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

Found = list[list[Tensor]]
"""Per row, per response, ``[len]``."""


class ValueMaker(Protocol):
    """Gives named values of the tokens of some rows."""

    @property
    def passes(self) -> int:
        """How often each response counts as work."""
        ...

    def __call__(self, group: Sequence[TokenRow], progress: Callable[[int], None]) -> dict[str, Found]:
        """The values of some rows, by name."""
        ...


def write_store(
    folder: Path,
    makers: Sequence[ValueMaker],
    template: Template,
    rows: TokenTable,
    *,
    shard_rows: int,
    progress: Callable[[int], None],
    reference: TokenStore | None = None,
) -> TokenStore:
    """Write shards of whole prompts. A prompt's responses stay together, so its prompt is computed once.

    Args:
        folder: Where the shards go; those that are there already are kept.
        makers: What gives the values.
        template: That wrote the rows.
        rows: Every prompt with its responses.
        shard_rows: Prompts in one shard.
        progress: Called with the number of responses done, once for each value.
        reference: A store of the same responses with values that are there already.
    """
    keys = Keys(rows.keys[rows.starts[:-1]])

    def make(wanted: Sequence[str]) -> Iterator[TokenRecord]:
        group = [rows[keys.place(key)] for key in wanted]
        values = {name: found for maker in makers for name, found in maker(group, progress).items()}
        for number, row in enumerate(group):
            for place, record in enumerate(_records(template, row)):
                known = {} if reference is None else reference[record.key].values
                mine = {name: found[number][place].tolist() for name, found in values.items()}
                yield record._replace(values={**known, **mine})

    return write_shards(folder, keys, make, rows_per_shard=shard_rows)


class Keys(Sequence[str]):
    """Stable names, eight bytes each, and where each stands.

    Args:
        numbers: ``[keys]`` uint64; each stands there once.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        self._numbers = numbers
        self._order = np.argsort(numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [f"{number:016x}" for number in self._numbers[index].tolist()]
        return f"{int(self._numbers[index]):016x}"

    def place(self, key: str) -> int:
        """Where a key stands; it must be one of these."""
        wanted = np.uint64(int(key, 16))
        return int(self._order[np.searchsorted(self._numbers, wanted, sorter=self._order)])


def _records(template: Template, row: TokenRow) -> Iterator[TokenRecord]:
    for place, (key, ids) in enumerate(zip(keys_of(row.comparison), row.responses, strict=True)):
        text, spans, own = spelled(template.tokenizer, row, place)
        starts, ends = [span.start for span in spans], [span.end for span in spans]
        yield TokenRecord(key, ids, starts, ends, {}, None if own else text)
