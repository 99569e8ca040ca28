"""The score store: what is written is read back, and a stopped run ends with the same bytes."""

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.errors import UserError
from tokenward.scoring.store import TokenRecord, TokenStore, write_shards

KEYS = [f"{number:016x}" for number in range(7)]


def record(key: str) -> TokenRecord:
    """A record that depends on its key only, of 1 to 4 tokens."""
    size = 1 + int(key, 16) % 4
    values = {
        "reference_logp": [-0.5 * place - int(key, 16) for place in range(size)],
        "oracle_logp": [-0.25 * place for place in range(size)],
    }
    return TokenRecord(key, list(range(5, 5 + size)), list(range(size)), list(range(1, size + 1)), values)


class Maker:
    """Makes records and remembers for which keys."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, keys):
        self.asked.append(list(keys))
        return (record(key) for key in keys)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_read_back(tmp_path):
    maker = Maker()
    store = write_shards(tmp_path, KEYS, maker, rows_per_shard=3)
    assert maker.asked == [KEYS[:3], KEYS[3:6], KEYS[6:]]
    assert [path.name for path in store.shards()] == [f"tokens-0000{n}.parquet" for n in range(3)]
    for reader in (store, TokenStore(tmp_path)):
        assert len(reader) == 7
        assert list(reader) == KEYS
        # Across shards and back, as a shuffled reader does.
        for key in (KEYS[5], KEYS[0], KEYS[6], KEYS[1]):
            assert reader[key] == record(key)
        assert KEYS[4] in reader
        assert "0" not in reader


def test_values_are_float32_bit_for_bit(tmp_path):
    values = [0.1, -1e-40, 3.4e38, -math.inf, math.nan, 0.0]
    made = TokenRecord("k", [1] * 6, [0] * 6, [0] * 6, {"reward": values})
    found = write_shards(tmp_path, ["k"], lambda keys: [made], rows_per_shard=1)["k"]
    bits = [struct.pack("f", value) for value in values]
    assert [struct.pack("f", value) for value in found.values["reward"]] == bits
    assert found.value("reward").tolist()[:4] == [struct.unpack("f", item)[0] for item in bits[:4]]
    assert found.value("reward").dtype.itemsize == 4


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=9, unique=True), st.integers(1, 5))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_any_keys_and_shard_sizes(tmp_path_factory, keys, rows_per_shard):
    def make(wanted):
        return [
            TokenRecord(
                key, [ord(char) for char in key], [0] * len(key), [1] * len(key), {"reward": [0.5] * len(key)}
            )
            for key in wanted
        ]

    store = write_shards(tmp_path_factory.mktemp("store"), keys, make, rows_per_shard=rows_per_shard)
    assert list(store) == keys
    assert [store[key] for key in keys] == make(keys)
    assert len(store.shards()) == -(-len(keys) // rows_per_shard)


def test_a_stopped_run_ends_with_the_same_bytes(tmp_path):
    write_shards(tmp_path, KEYS, Maker(), rows_per_shard=3)
    before = contents(tmp_path)
    (tmp_path / "tokens-00001.parquet").unlink()
    again = Maker()
    write_shards(tmp_path, KEYS, again, rows_per_shard=3)
    assert again.asked == [KEYS[3:6]]
    assert contents(tmp_path) == before


def test_a_run_that_breaks_leaves_whole_shards_only(tmp_path):
    def breaks(keys):
        for key in keys:
            if key == KEYS[4]:
                raise KeyboardInterrupt
            yield record(key)

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "stopped", KEYS, breaks, rows_per_shard=3)
    assert list(contents(tmp_path / "stopped")) == ["tokens-00000.parquet"]
    assert list(TokenStore(tmp_path / "stopped")) == KEYS[:3]
    write_shards(tmp_path / "stopped", KEYS, Maker(), rows_per_shard=3)
    write_shards(tmp_path / "whole", KEYS, Maker(), rows_per_shard=3)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_finished_store_is_not_computed_again(tmp_path):
    write_shards(tmp_path, KEYS, Maker(), rows_per_shard=3)
    again = Maker()
    store = write_shards(tmp_path, KEYS, again, rows_per_shard=3)
    assert again.asked == []
    assert list(store) == KEYS


def test_a_response_that_was_never_scored_is_named(tmp_path):
    store = write_shards(tmp_path, KEYS, Maker(), rows_per_shard=3)
    with pytest.raises(UserError, match="no values for the response feed"):
        store["feed"]
