"""Several jobs write one store of values, a part each."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tokenward
from tokenward.artifacts import read_manifest
from tokenward.scoring import store
from tokenward.tools.run import score_part

SHARDS = "scores.shard_rows=4"  # 6 shards of 24 prompts


def part(recipe: Path, text: str, *changes: str) -> None:
    score_part(recipe, text, ["run=runs/parts", SHARDS, *changes], quiet=True)


def whole(recipe: Path, last: str, run: str = "parts") -> None:
    tokenward.run(recipe, [f"run=runs/{run}", SHARDS], last=last, quiet=True)


def refused(recipe: Path, text: str, *changes: str) -> tokenward.UserError:
    with pytest.raises(tokenward.UserError) as caught:
        part(recipe, text, *changes)
    return caught.value


def shards(stage: str, run: str = "parts") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("runs", run, stage).glob("tokens-*")}


def test_parts_give_the_bytes_of_one_process(tiny_workplace: Path, monkeypatch) -> None:
    whole(tiny_workplace, "scores", run="whole")
    error = refused(tiny_workplace, "1/2")
    assert error.code == "stage-unfinished"
    assert "tokenward data" in str(error)
    whole(tiny_workplace, "data")

    part(tiny_workplace, "1/2")
    assert sorted(shards("reference")) == [f"tokens-0000{number}.parquet" for number in (0, 2, 4)]
    assert not read_manifest(Path("runs/parts/reference")).complete
    error = refused(tiny_workplace, "2/2", "scores.precision=bfloat16")
    assert error.code == "other-parts"
    assert 'scores.precision: "float32" -> "bfloat16"' in str(error)
    part(tiny_workplace, "2/2")  # finishes the reference; the scores wait for the oracle
    error = refused(tiny_workplace, "2/2")
    assert error.code == "stage-unfinished"
    assert "tokenward oracle" in str(error)
    whole(tiny_workplace, "oracle")

    part(tiny_workplace, "2/3")
    plain = store._write
    with monkeypatch.context() as patch:
        written = []

        def killed(path, records):
            if written:
                raise KeyboardInterrupt
            written.append(path)
            plain(path, records)

        patch.setattr(store, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            part(tiny_workplace, "1/3")
    part(tiny_workplace, "3/3")
    before = shards("scores")
    assert len(before) == 5  # the killed job has lost one shard
    part(tiny_workplace, "1/3")
    for stage in ("reference", "scores"):
        assert shards(stage) == shards(stage, "whole"), stage
        mine, other = (read_manifest(Path("runs", run, stage)) for run in ("parts", "whole"))
        assert mine.complete
        assert mine.facts == other.facts | (
            {"reference": mine.facts["reference"]} if stage == "scores" else {}
        )
        assert mine.fingerprint == other.fingerprint
    assert list(Path("runs/parts").glob("report*"))


@pytest.mark.slow
def test_two_processes_at_once_of_which_one_is_killed(tiny_workplace: Path) -> None:
    """Both begin with data that is not encoded yet. The part of the killed one is started again and finishes the stage."""
    whole(tiny_workplace, "data")
    one_each = "scores.shard_rows=1"  # 24 shards
    changes = ["--set", "run=runs/parts", "--set", one_each]
    command = [sys.executable, "-m", "tokenward", "score", str(tiny_workplace), *changes]
    lost, other = (
        subprocess.Popen([*command, "--part", name], stdout=subprocess.PIPE, text=True)
        for name in ("1/2", "2/2")
    )
    first = Path("runs/parts/reference/tokens-00000.parquet")
    while not first.exists() and lost.poll() is None:
        time.sleep(0.002)
    lost.kill()
    said = lost.communicate()[0]
    assert lost.returncode == -signal.SIGKILL, said
    said = other.communicate()[0]
    assert other.returncode == 0, said
    part(tiny_workplace, "1/2", one_each)
    assert read_manifest(Path("runs/parts/reference")).facts["responses"] == 48
    tokenward.run(tiny_workplace, ["run=runs/whole", one_each], last="reference", quiet=True)
    assert shards("reference") == shards("reference", "whole")
    assert len(shards("reference")) == 24
