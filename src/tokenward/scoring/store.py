"""Per-token values of responses on disk: Parquet, one row per response, never a selection."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tokenward.artifacts import atomic_write
from tokenward.errors import UserError
from tokenward.scoring.reads import MissingValue
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.segments import spelled
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

_KEPT_SHARDS = 4


class TokenRecord(NamedTuple):
    """What is stored of one response.

    Attributes:
        key: Stable name of prompt and response.
        ids: Its token ids, end-of-turn token included.
        start: First byte of each token in the response's text.
        end: Byte after the last one; equal to start for tokens that are no text.
        values: Named lists of one number per token, nats.
        text: What the bytes are counted in, where it is not the response's text as the data has it: all that stands
            between the prompt and the end of turn. What no token covers is context.
    """

    key: str
    ids: list[int]
    start: list[int]
    end: list[int]
    values: dict[str, list[float]]
    text: str | None = None

    def value(self, name: str) -> Tensor:
        """One named value as a float32 tensor.  -> [n]

        Raises:
            UserError: the store holds no such value.
        """
        if name not in self.values:
            raise MissingValue(
                name,
                f"the store holds no {name} (it holds {', '.join(self.values)}), which this scorer needs. "
                "Score again with the model that gives it.",
            )
        return torch.tensor(self.values[name], dtype=torch.float32)


class ShardColumns(NamedTuple):
    """A shard as it is stored: the numbers of all its responses laid end to end.

    Attributes:
        keys: ``[r]``, of the responses.
        starts: ``[r + 1]``, the first token of each.
        ids: ``[n]``, token ids.
        start: ``[n]``, as in :class:`TokenRecord`.
        end: ``[n]``, so too.
        values: ``[n]`` float32 each, by name.
        texts: ``[r]``, as in :class:`TokenRecord`; None where no response has one.
    """

    keys: list[str]
    starts: np.ndarray
    ids: np.ndarray
    start: np.ndarray
    end: np.ndarray
    values: dict[str, np.ndarray]
    texts: list[str | None] | None = None

    def record(self, row: int) -> TokenRecord:
        """One response."""
        mine = slice(int(self.starts[row]), int(self.starts[row + 1]))
        fixed = (column[mine].tolist() for column in (self.ids, self.start, self.end))
        return TokenRecord(
            self.keys[row],
            *fixed,
            values={name: flat[mine].tolist() for name, flat in self.values.items()},
            text=None if self.texts is None else self.texts[row],
        )


class TokenStore:
    """A folder of shards, read as a mapping from key to record, or shard by shard.

    Shards are written in order, each atomically and with a fixed number of rows, so that a run that
    was stopped goes on with the next shard and ends with the same bytes. Of each response 16 bytes stay
    in memory, and of what was read the last few shards.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = sorted(folder.glob("tokens-*.parquet"))
        hashes = [_hashes(keys) for keys in map(_keys, self._shards)]
        self._ends = np.cumsum([len(part) for part in hashes], dtype=np.int64)
        found = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        self._order = np.argsort(found, kind="stable")
        self._sorted = found[self._order]
        self._read: dict[int, ShardColumns] = {}

    def shards(self) -> list[Path]:
        """The finished shards, in order."""
        return list(self._shards)

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def __iter__(self) -> Iterator[str]:
        for shard in self._shards:
            yield from _keys(shard)

    def __getitem__(self, key: str) -> TokenRecord:
        place = self._find(key)
        if place is None:
            raise self.lacks(key)
        return self._columns(place[0]).record(place[1])

    def lacks(self, key: str) -> UserError:
        """What to say of a response that is not here."""
        return UserError(
            f"the store {self.folder} has no values for the response {key}: it was made from other data. "
            "Run the scoring stage again on this data (tokenward score RECIPE)."
        )

    def columns(self) -> Iterator[ShardColumns]:
        """The shards in order, each read at once; none of them is kept."""
        return map(_read, self._shards)

    def _find(self, key: str) -> tuple[int, int] | None:
        """Shard of a response, and its row there."""
        wanted = _hashes([key])[0]
        first = int(np.searchsorted(self._sorted, wanted))
        for number in range(first, len(self._sorted)):
            if self._sorted[number] != wanted:
                break
            place = int(self._order[number])
            shard = int(np.searchsorted(self._ends, place, side="right"))
            row = place - (int(self._ends[shard - 1]) if shard else 0)
            if self._columns(shard).keys[row] == key:
                return shard, row
        return None

    def _columns(self, shard: int) -> ShardColumns:
        if shard not in self._read:
            if len(self._read) >= _KEPT_SHARDS:
                del self._read[next(iter(self._read))]
            self._read[shard] = _read(self._shards[shard])
        return self._read[shard]


def _hashes(keys: Sequence[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def _keys(shard: Path) -> list[str]:
    return pq.read_table(shard, columns=["key"])["key"].to_pylist()


def _read(shard: Path) -> ShardColumns:
    table = pq.read_table(shard)
    names = [name for name in table.column_names if name not in ("key", "text")]
    lists = {name: table[name].combine_chunks() for name in names}
    flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in lists.items()}
    sizes = lists["ids"].value_lengths().to_numpy(zero_copy_only=False)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    fixed = (flat.pop(name) for name in ("ids", "start", "end"))
    texts = table["text"].to_pylist() if "text" in table.column_names else None
    return ShardColumns(table["key"].to_pylist(), starts, *fixed, values=flat, texts=texts)


def write_shards(
    folder: Path,
    keys: Sequence[str],
    make: Callable[[Sequence[str]], Iterable[TokenRecord]],
    *,
    rows_per_shard: int,
) -> TokenStore:
    """Write the records of ``keys``, in their order, skipping shards that are already there.

    Args:
        folder: Where the shards go.
        keys: All responses of the store; the same list as in the run that is resumed.
        make: Computes the records of one shard's keys, in their order.
        rows_per_shard: Rows of each shard but the last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, len(keys), rows_per_shard)):
        shard = folder / f"tokens-{number:05d}.parquet"
        wanted = list(keys[first : first + rows_per_shard])
        if not shard.exists():
            _write(shard, list(make(wanted)))
    return TokenStore(folder)


def _write(shard: Path, records: Sequence[TokenRecord]) -> None:
    columns: dict[str, pa.Array] = {
        "key": pa.array([record.key for record in records], pa.string()),
        "ids": pa.array([record.ids for record in records], pa.list_(pa.int32())),
        "start": pa.array([record.start for record in records], pa.list_(pa.int32())),
        "end": pa.array([record.end for record in records], pa.list_(pa.int32())),
    }
    if any(record.text is not None for record in records):
        columns["text"] = pa.array([record.text for record in records], pa.string())
    for name in records[0].values:
        columns[name] = pa.array([record.values[name] for record in records], pa.list_(pa.float32()))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    atomic_write(shard, sink.getvalue().to_pybytes())


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
