"""Per-token values of responses on disk: Parquet, one row per response, never a selection.

Columns: ``key`` (of prompt and response), ``ids``, ``start`` and ``end`` (bytes of the response's text;
empty for the end-of-turn token), and one list of float32 per value: ``reference_logp``,
``oracle_logp`` or ``reward``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tokenward.artifacts import atomic_write
from tokenward.errors import UserError


class TokenRecord(NamedTuple):
    """What is stored of one response.

    Attributes:
        key: Stable name of prompt and response.
        ids: Its token ids, end-of-turn token included.
        start: First byte of each token in the response's text.
        end: Byte after the last one; equal to start for tokens that are no text.
        values: Named lists of one number per token, nats.
    """

    key: str
    ids: list[int]
    start: list[int]
    end: list[int]
    values: dict[str, list[float]]

    def value(self, name: str) -> Tensor:
        """One named value as a float32 tensor.  -> [n]"""
        return torch.tensor(self.values[name], dtype=torch.float32)


class TokenStore:
    """A folder of shards, read as a mapping from key to record.

    Shards are written in order, each atomically and with a fixed number of rows, so that a run that
    was stopped goes on with the next shard and ends with the same bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._place: dict[str, tuple[Path, int]] = {}
        self._open: tuple[Path, pa.Table] | None = None
        for shard in self.shards():
            for row, key in enumerate(pq.read_table(shard, columns=["key"])["key"].to_pylist()):
                self._place[key] = (shard, row)

    def shards(self) -> list[Path]:
        """The finished shards, in order."""
        return sorted(self.folder.glob("tokens-*.parquet"))

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __getitem__(self, key: str) -> TokenRecord:
        if key not in self._place:
            raise UserError(
                f"the store {self.folder} has no values for the response {key}: it was made from other data. "
                "Run the scoring stage again on this data (tokenward score RECIPE)."
            )
        shard, row = self._place[key]
        if self._open is None or self._open[0] != shard:
            self._open = (shard, pq.read_table(shard, memory_map=True))
        return _record(self._open[1], row)


def _record(table: pa.Table, row: int) -> TokenRecord:
    fields = {name: table[name][row].as_py() for name in table.column_names}
    fixed = {name: fields.pop(name) for name in ("key", "ids", "start", "end")}
    return TokenRecord(**fixed, values=fields)


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
    for name in records[0].values:
        columns[name] = pa.array([record.values[name] for record in records], pa.list_(pa.float32()))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    atomic_write(shard, sink.getvalue().to_pybytes())
