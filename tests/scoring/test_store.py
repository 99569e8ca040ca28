"""The score store: what is written is read back, and an interrupted run ends with the same bytes."""

import contextlib
import math
import re
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenward.errors import UserError
from tokenward.scoring.store import TokenRecord, TokenStore, write_shards

KEYS = [f"{number:016x}" for number in range(7)]


def record(key: str) -> TokenRecord:
    """A record of 1 to 4 tokens that depends only on its key."""
    size = 1 + int(key, 16) % 4
    values = {
        "reference_logp": [-0.5 * place - int(key, 16) for place in range(size)],
        "oracle_logp": [-0.25 * place for place in range(size)],
    }
    text = "Hi" if int(key, 16) == 5 else None
    return TokenRecord(
        key, list(range(5, 5 + size)), list(range(size)), list(range(1, size + 1)), values, text
    )


class Maker:
    """Makes records and remembers for which keys; stops at one of them."""

    def __init__(self, stop: str = "") -> None:
        self.calls: list[list[str]] = []
        self._stop = stop

    def __call__(self, keys):
        self.calls.append(list(keys))
        for key in keys:
            if key == self._stop:
                raise KeyboardInterrupt
            yield record(key)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_read_back(tmp_path):
    maker = Maker()
    store = write_shards(tmp_path, KEYS, maker, rows_per_shard=3)
    assert maker.calls == [KEYS[:3], KEYS[3:6], KEYS[6:]]
    assert sorted(contents(tmp_path)) == [f"tokens-0000{n}.parquet" for n in range(3)]
    for reader in (store, TokenStore(tmp_path)):
        assert list(reader) == KEYS
        assert len(reader) == 7
        # Across shards and back, as a shuffled reader does.
        for key in (KEYS[5], KEYS[0], KEYS[6], KEYS[1]):
            assert reader[key] == record(key)
        assert KEYS[4] in reader
    with pytest.raises(UserError, match="feed") as caught:
        store["feed"]
    assert caught.value.code == "missing-response"


def test_values_are_float32_bit_for_bit(tmp_path):
    values = [0.1, -1e-40, 3.4e38, -math.inf, math.nan, 0.0]
    made = TokenRecord("k", [1] * 6, [0] * 6, [0] * 6, {"reward": values})
    found = write_shards(tmp_path, ["k"], lambda keys: [made], rows_per_shard=1)["k"]
    bits = [struct.pack("f", value) for value in values]
    assert [struct.pack("f", value) for value in found.values["reward"]] == bits
    assert found.value("reward").tolist()[:4] == [struct.unpack("f", item)[0] for item in bits[:4]]


def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path):
    write_shards(tmp_path / "whole", KEYS, Maker(), rows_per_shard=3)
    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        write_shards(folder, KEYS, Maker(stop=KEYS[4]), rows_per_shard=3)
    assert list(TokenStore(folder)) == KEYS[:3]
    for calls in ([KEYS[3:6], KEYS[6:]], []):
        again = Maker()
        write_shards(folder, KEYS, again, rows_per_shard=3)
        assert again.calls == calls
        assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda table: table.drop_columns(["end"]), "it has no column end"),
        (lambda table: table.slice(0, 0), "it has no rows"),
        (lambda table: table.set_column(1, "ids", pa.array(["a", "b"])), "ids does not have"),
        (
            lambda table: table.set_column(2, "start", pa.array([[0], []], pa.list_(pa.int32()))),
            "start does not",
        ),
        (lambda table: table.set_column(0, "key", pa.array(["a", None])), "key does not"),
        (lambda table: table.append_column("x", pa.array([[1.0, 2.0], None])), "x does not"),
        (lambda table: table.append_column("y", pa.array([["p", "q"]] * 2)), "y does not"),
    ],
)
def test_a_shard_of_another_form_is_damaged(tmp_path, change, problem):
    """Page checksums do not see a damaged index, which names the columns and counts the rows."""
    columns = {"key": pa.array(["a", "b"])} | {
        name: pa.array([[1, 2]] * 2, pa.list_(pa.int32())) for name in ("ids", "start", "end")
    }
    pq.write_table(pa.table(columns), tmp_path / "tokens-00000.parquet")
    assert [record.ids for record in map(TokenStore(tmp_path).__getitem__, "ab")] == [[1, 2]] * 2
    pq.write_table(change(pa.table(columns)), tmp_path / "tokens-00000.parquet")
    with pytest.raises(UserError, match=problem) as caught:
        list(TokenStore(tmp_path).columns())
    assert caught.value.code == "damaged-files"


def test_a_shard_whose_names_are_no_text_is_damaged(tmp_path):
    columns = {"key": pa.array(["a"]), "oracle_logp": pa.array([[0.5]])}
    path = tmp_path / "tokens-00000.parquet"
    pq.write_table(pa.table(columns), path)
    path.write_bytes(path.read_bytes().replace(b"oracle_logp", b"\xeeracle_logp"))
    with pytest.raises(UserError, match="is damaged"):
        list(TokenStore(tmp_path).columns())


def test_a_changed_name_of_a_column_is_damage(tmp_path):
    """Else its values would be there under another name, with every checksum right."""
    write_shards(
        tmp_path, ["k"], lambda keys: [TokenRecord("k", [1], [0], [1], {"reward": [0.5]})], rows_per_shard=1
    )
    path = next(tmp_path.glob("*.parquet"))
    sound = path.read_bytes()
    places = [place.start() for place in re.finditer(b"reward", sound)]
    assert len(places) > 1
    for place in places:
        path.write_bytes(sound[:place] + b"rewarg" + sound[place + 6 :])
        with contextlib.suppress(UserError):  # or it is a name that only repeats that of the schema
            assert TokenStore(tmp_path)["k"].values == {"reward": [0.5]}
    path.write_bytes(sound.replace(b"reward", b"rewarg", 1))
    with pytest.raises(UserError, match="names of its columns"):
        list(TokenStore(tmp_path).columns())


@pytest.mark.parametrize("keys", [pa.array([], pa.string()), pa.array([1, 2]), pa.array(["a", None])])
def test_the_keys_of_a_store_are_texts(tmp_path, keys):
    pq.write_table(pa.table({"key": keys}), tmp_path / "tokens-00000.parquet")
    with pytest.raises(UserError, match="it has no") as caught:
        list(TokenStore(tmp_path))
    assert caught.value.code == "damaged-files"
