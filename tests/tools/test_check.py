"""What a stage leaves behind is checked: damage is named, the stage is made again, and what depends on it if it has to be."""

import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tokenward
from tests.stages.runs import LOOKS
from tokenward.artifacts import MANIFEST, OBSERVED, StageFolder, read_manifest
from tokenward.cli import app
from tokenward.errors import UserError
from tokenward.scoring.store import Shards, TokenStore
from tokenward.stages.data import DataStage
from tokenward.stages.run import Run
from tokenward.tools.check import check_run
from tokenward.tools.finished import finished_model

RUN = Path("runs/quickstart")


def contents(run: Path = RUN) -> dict[str, bytes]:
    """Every file that a stage reads or a user keeps, without what holds times."""
    files = (path for path in run.rglob("*") if path.is_file() and not path.name.startswith("."))
    kept = (path for path in files if path.name not in (*OBSERVED, MANIFEST, "index.html"))
    return {str(path.relative_to(run)): path.read_bytes() for path in kept if ".previous" not in path.parts}


def flip(path: Path, seed: int) -> None:
    """Change one bit; the size stays, and so does the time of the last change, as when a disk fails."""
    status, data = path.stat(), bytearray(path.read_bytes())
    place = random.Random(seed).randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def problems() -> list[str]:
    return [problem for item in check_run(RUN) for problem in item.problems]


def test_one_bit_in_any_file_is_found(copied_run: Path) -> None:
    assert problems() == []
    for number, name in enumerate(sorted(contents())):
        before = (RUN / name).read_bytes()
        if not before:  # a file without content
            continue
        flip(RUN / name, number)
        assert [problem.split()[0] for problem in problems()] == [name]
        (RUN / name).write_bytes(before)
    assert problems() == []


@pytest.mark.parametrize(
    "name",
    ["data/train.jsonl", "reference/tokens-00000.parquet", "oracle/model/model.safetensors"],
)
def test_a_lost_file_is_made_again_and_what_came_out_equal_stays(
    copied_run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, stage = contents(), name.partition("/")[0]
    created = {path.parent.name: read_manifest(path.parent).created for path in RUN.glob(f"*/{MANIFEST}")}
    (RUN / name).unlink()
    tokenward.run(copied_run)
    assert contents() == before
    said = " ".join(capsys.readouterr().out.split())
    assert f"{stage} runs again: {name} is missing" in said
    assert said.count("already done, nothing has changed") == len(created) - 1


def test_a_stage_reads_no_file_that_has_changed(copied_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents()
    flip(RUN / "scores" / "tokens-00000.parquet", 3)
    (RUN / "policy" / "model" / "model.safetensors").unlink()  # so the policy is trained again, on the scores
    tokenward.run(copied_run)
    assert contents() == before
    said = " ".join(capsys.readouterr().out.split())
    assert "damaged: scores/tokens-00000.parquet has other content" in said


@pytest.mark.parametrize("name", ["pairs/*/pairs.npz", "encoded/*/encoded.arrow"])
def test_the_report_of_a_finished_run_reads_no_file_that_has_changed(
    copied_run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents()
    (found,) = RUN.glob(name)
    flip(found, 5)
    with pytest.raises(UserError) as caught:
        tokenward.make_report(RUN)
    assert caught.value.code == "damaged-files"
    tokenward.run(copied_run)
    assert contents() == before
    assert f"damaged: {name.partition('/')[0]}/" in " ".join(capsys.readouterr().out.split())


def test_a_stage_whose_input_came_out_different_is_made_again(
    copied_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = DataStage.make

    def other(self: DataStage, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        facts = make(self, run, folder)
        with (folder.path / "dropped.jsonl").open("a") as file:  # as another version might write it
            file.write("\n")
        return facts

    monkeypatch.setattr(DataStage, "make", other)
    (RUN / "data" / "eval.jsonl").unlink()
    tokenward.run(copied_run, last="reference")
    said = " ".join(capsys.readouterr().out.split())
    assert "data runs again: data/eval.jsonl is missing" in said
    assert "reference runs again: input data: changed" in said


def test_a_lost_log_is_said_and_nothing_runs_again(
    copied_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (RUN / "policy" / "history.jsonl").unlink()
    tokenward.run(copied_run)
    said = " ".join(capsys.readouterr().out.split())
    assert "policy/history.jsonl is missing" in said
    assert "runs again" not in said


def test_the_log_of_a_sampled_run_has_times_and_decides_nothing(
    copied_online: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path("runs/online/online/model") / "config.json").unlink()
    tokenward.run(copied_online, ["run=runs/online", *LOOKS])
    said = " ".join(capsys.readouterr().out.split())
    assert "online runs again: online/model/config.json is missing" in said
    assert said.count("already done, nothing has changed") == 2  # the examples and the evaluation


def test_lost_figures_are_computed_again(copied_run: Path) -> None:
    before = contents()
    (RUN / "evaluation" / "metrics.json").write_text("{")
    tokenward.run(copied_run, quiet=True)
    assert contents() == before


@pytest.mark.parametrize("broken", [False, True], ids=["gone", "broken"])
def test_whatever_is_lost_the_same_command_makes_it_again(
    copied_run: Path, tmp_path: Path, broken: bool
) -> None:
    """A file of each kind, also of what only the report reads when every stage is done."""
    before = contents()
    shutil.copytree(RUN, tmp_path / "kept")
    kinds = (
        "encoded/*/encoded.arrow",
        "encoded/*/manifest.json",
        "pairs/*/pairs.npz",
        "pairs/*/manifest.json",
    )
    stages = (
        "oracle/history.jsonl",
        "oracle/preview.json",
        "evaluation/metrics.json",
        "evaluation/rows.jsonl",
    )
    for kind in (*kinds, *stages, "evaluation/recipe.json", "evaluation/samples.jsonl"):
        shutil.rmtree(RUN)
        shutil.copytree(tmp_path / "kept", RUN)
        file = next(RUN.glob(kind))
        if broken:
            file.write_text("{")
        else:
            file.unlink()
        run = tokenward.run(copied_run, quiet=True)
        assert contents() == before
        assert (RUN / "report" / "index.html").is_file()
        assert len(tokenward.read_figures(run)) > 10


@pytest.mark.parametrize("name", ["metrics.json", "rows.jsonl", "recipe.json", "samples.jsonl"])
def test_reading_a_run_with_a_broken_file_says_which(copied_run: Path, name: str) -> None:
    run = tokenward.open_run(copied_run, quiet=True)
    (RUN / "evaluation" / name).write_text("{")
    read = (
        (lambda: tokenward.read_figures(run))
        if name == "metrics.json"
        else (lambda: tokenward.make_report(str(RUN)))
    )
    with pytest.raises(UserError, match=rf"evaluation/{name} is damaged") as caught:
        read()
    assert caught.value.code == "damaged-file"


def test_an_edited_manifest_is_refused(copied_run: Path) -> None:
    path = RUN / "oracle" / MANIFEST
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match="checksum") as caught:
        tokenward.run(copied_run, quiet=True)
    assert caught.value.code == "edited-manifest"


def test_damaged_weights_are_not_loaded(copied_run: Path) -> None:
    flip(RUN / "policy" / "model" / "model.safetensors", 5)
    with pytest.raises(UserError, match=r"policy/model/model\.safetensors has other content") as caught:
        finished_model(str(RUN)).load()
    assert caught.value.code == "damaged-files"


def test_a_damaged_shard_is_written_again(copied_run: Path) -> None:
    folder = RUN / "scores"
    path = folder / "tokens-00000.parquet"
    shards, said = Shards(folder, 24, 128), []
    assert shards.without_damaged(said.append).missing() == []
    assert not said
    flip(path, 11)
    with pytest.raises(UserError, match="damaged"):
        list(TokenStore(folder).columns())
    assert shards.without_damaged(said.append).missing() == [0]
    assert str(path) in said[0]


def test_the_command_names_what_is_damaged(copied_run: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["check", str(RUN)]).exit_code == 0
    (RUN / "data" / "train.jsonl").write_text("")
    result = runner.invoke(app, ["check", str(RUN)])
    assert result.exit_code == 1
    assert "data/train.jsonl has 0 bytes instead of" in " ".join(result.output.split())
