import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward import artifacts
from tokenward.artifacts import (
    MANIFEST,
    Manifest,
    StagePart,
    open_part,
    open_stage,
    read_json,
    read_jsonl,
    read_manifest,
    require,
    user_path,
    write_json,
    write_jsonl,
)
from tokenward.errors import UserError

LAWFUL = settings(derandomize=True, deadline=None, max_examples=50)
SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3),
    max_leaves=8,
)

# So few that two of them are often the same, or nearly.
FEW = st.lists(
    st.sampled_from([None, True, False, 0, 1, 1.0, 1.5, "1", "", [], [1], {}, {"1": 1}]), max_size=2
)


def opened(folder, beta=0.1, data="d1", format=1):
    return open_stage(
        folder, stage="oracle", settings={"oracle": {"beta": beta}}, inputs={"data": data}, format=format
    )


def run_stage(folder, beta=0.1, data="d1"):
    with opened(folder, beta, data) as stage:
        if not stage.done:
            (stage.path / "model.txt").write_text(f"{beta} {data}")
            stage.complete(rows=3)
    return stage


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(code, call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert caught.value.code == code
    return str(caught.value)


def test_atomic_write_replaces_the_whole_file_or_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    artifacts.atomic_write(path, "first, and long")
    artifacts.atomic_write(path, b"second")
    assert path.read_bytes() == b"second"
    with path.open("rb") as reader:  # who reads while it is written sees the old file, whole
        artifacts.atomic_write(path, b"third")
        assert reader.read() == b"second"
    artifacts.atomic_write(path, b"second")

    def fail(_descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        artifacts.atomic_write(path, "new")
    assert path.read_bytes() == b"second"
    assert names_in(tmp_path) == ["a.txt"]


def test_fingerprint_does_not_change_between_versions():
    # printf '{"a":null,"b":[1,0.5]}' | sha256sum
    assert artifacts.fingerprint({"b": (1.0, 0.5), "a": None}) == "fc2ad738648c4fb6"
    assert artifacts.fingerprint(True) != artifacts.fingerprint(1)
    with pytest.raises(ValueError, match="JSON"):
        artifacts.fingerprint(float("nan"))


@LAWFUL
@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=5))
def test_fingerprint_ignores_the_order_of_keys_and_a_trip_through_json(value):
    backwards = dict(reversed(value.items()))
    assert artifacts.fingerprint(backwards) == artifacts.fingerprint(value)
    assert artifacts.fingerprint(json.loads(json.dumps(value))) == artifacts.fingerprint(value)


@LAWFUL
@given(FEW, FEW)
def test_fingerprint_tells_values_apart(one, other):
    # `True == 1` in Python but not in JSON, so equality is decided on the text; 1.0 and 1 are one number.
    def same(a, b):
        return json.dumps(whole(a), sort_keys=True) == json.dumps(whole(b), sort_keys=True)

    def whole(v):
        return json.loads(
            json.dumps(v), parse_float=lambda t: int(float(t)) if float(t).is_integer() else float(t)
        )

    assert (artifacts.fingerprint(one) == artifacts.fingerprint(other)) == same(one, other)


def test_file_fingerprint_follows_the_content(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 3_000_000)
    first = artifacts.file_fingerprint(path)
    path.write_bytes(b"x" * 2_999_999 + b"y")
    os.utime(path, ns=(1, 1))
    assert artifacts.file_fingerprint(path) != first
    path.write_bytes(b"x" * 3_000_000)
    os.utime(path, ns=(2, 2))
    assert artifacts.file_fingerprint(path) == first


def test_folder_fingerprint_sees_names_and_contents_of_model_files_only(tmp_path):
    def model(name, **files):
        folder = tmp_path / name
        folder.mkdir()
        for stem, text in files.items():
            (folder / stem.replace("_", ".")).write_text(text)
        return artifacts.folder_fingerprint(folder)

    base = model("a", config_json="1", x_safetensors="2")
    assert model("b", x_safetensors="2", config_json="1") == base
    assert model("c", x_safetensors="2", config_json="1", readme_md="!", manifest_json="{}") == base
    assert model("d", x_safetensors="1", config_json="2") != base
    assert model("e", y_safetensors="2", config_json="1") != base


def test_missing_files_are_refused(tmp_path):
    refused("missing-file", artifacts.folder_fingerprint, tmp_path)
    refused("missing-file", artifacts.file_fingerprint, tmp_path / "nothing")
    refused("missing-manifest", read_manifest, tmp_path)


def test_manifest_round_trips(tmp_path):
    written = Manifest.begin("oracle", {"oracle": {"beta": 0.1, "names": ["ü"]}}, {"data": "d"}, 2)
    written.finished({"rows": 3, "note": "kept"}).write(tmp_path)
    read = read_manifest(tmp_path)
    assert read == written.finished({"rows": 3, "note": "kept"})
    assert (read.complete, read.facts["rows"], read.format) == (True, 3, 2)
    assert {"python", "torch", "transformers", "tokenward"} <= set(read.versions)
    assert read.created.endswith("+00:00")


def test_a_nan_fact_is_stored_as_null(tmp_path):
    with opened(tmp_path / "oracle") as stage:
        stage.complete(accuracy=float("nan"))
    assert require(tmp_path / "oracle", "oracle").facts == {"accuracy": None}


@pytest.mark.parametrize("text", ["{", "[1]", '{"version": 3}', "\x00"])
def test_foreign_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    refused("unreadable-manifest", read_manifest, tmp_path)


def test_required_stage_must_be_finished(tmp_path):
    folder = tmp_path / "oracle"
    refused("stage-missing", require, folder, "oracle")
    with opened(folder):
        refused("stage-unfinished", require, folder, "oracle")
    run_stage(folder)
    assert require(folder, "oracle").facts == {"rows": 3}
    refused("wrong-stage", require, folder, "scores")


def test_check_names_the_inputs_that_differ():
    manifest = Manifest.begin("scores", {}, {"data": "d1", "oracle": "o1", "template": "t1"}, 1)
    manifest.check({"data": "d1", "oracle": "o1"})
    message = refused("changed-inputs", manifest.check, {"data": "d1", "oracle": "o2", "tokenizer": "k"})
    assert "input oracle: changed; input tokenizer: added" in message


def test_finished_stage_is_skipped(tmp_path):
    first, again = run_stage(tmp_path / "oracle"), run_stage(tmp_path / "oracle")
    assert (first.done, first.resuming, first.changed) == (False, False, [])
    assert (again.done, again.resuming, again.changed) == (True, False, [])
    assert not (tmp_path / ".previous").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"data": "d2"}, "input data: changed"),
        ({"format": 2}, "format: 1 -> 2"),
        ({"beta": 1}, "beta: 0.1 -> 1"),
    ],
)
def test_each_input_counts(tmp_path, change, line):
    run_stage(tmp_path / "oracle")
    with opened(tmp_path / "oracle", **change) as stage:
        assert (stage.done, stage.resuming) == (False, False)
        assert [text.removeprefix("oracle.") for text in stage.changed] == [line]
    (kept,) = (tmp_path / ".previous").iterdir()
    assert kept.name.startswith("oracle-")
    assert (kept / "model.txt").read_text() == "0.1 d1"


def test_changing_a_setting_back_restores_the_stage(tmp_path):
    run_stage(tmp_path / "oracle", beta=0.1)
    run_stage(tmp_path / "oracle", beta=0.2)
    back = run_stage(tmp_path / "oracle", beta=0.1)
    assert back.done
    assert back.changed == ["oracle.beta: 0.2 -> 0.1"]
    assert (tmp_path / "oracle/model.txt").read_text() == "0.1 d1"
    (kept,) = (tmp_path / ".previous").iterdir()
    assert (kept / "model.txt").read_text() == "0.2 d1"


@pytest.mark.parametrize("between", [False, True])
def test_unfinished_stage_is_resumed(tmp_path, between):
    with opened(tmp_path / "oracle") as stage:
        (stage.path / "part").write_text("half")
    if between:
        run_stage(tmp_path / "oracle", beta=0.2)
    with opened(tmp_path / "oracle") as stage:
        assert (stage.done, stage.resuming) == (False, True)
        assert (stage.path / "part").read_text() == "half"


def test_a_copy_in_previous_is_not_overwritten(tmp_path):
    run_stage(tmp_path / "oracle", beta=0.1)
    run_stage(tmp_path / "oracle", beta=0.2)
    run_stage(tmp_path / "fresh/oracle", beta=0.1)
    (tmp_path / "oracle").rename(tmp_path / "elsewhere")
    (tmp_path / "fresh/oracle").rename(tmp_path / "oracle")
    run_stage(tmp_path / "oracle", beta=0.3)
    names = sorted(path.name for path in (tmp_path / ".previous").iterdir())
    assert len(names) == 2
    assert names[1] == f"{names[0]}.2"


def test_changes_of_format_and_of_settings_that_come_and_go():
    old = Manifest.begin("policy", {"a": {"x": 1, "same": 2}, "gone": None}, {"data": "1", "old": "1"}, 1)
    new = Manifest.begin("policy", {"a": {"x": 1.0, "same": 2}, "new": "dpo"}, {"data": "1", "more": "1"}, 2)
    assert old.changes_to(new) == [
        "format: 1 -> 2",
        "gone: null -> not set",
        'new: not set -> "dpo"',
        "input old: removed",
        "input more: added",
    ]
    assert old.changes_to(old) == []


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "oracle").mkdir()
    (tmp_path / "oracle/thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("oracle", "file"):
        refused("foreign-folder", opened(tmp_path / name).__enter__)
    assert (tmp_path / "oracle/thesis.txt").read_text() == "mine"


def test_two_stages_of_a_run_can_work_at_once(tmp_path):
    arguments = {"settings": {}, "inputs": {}, "format": 1}
    with opened(tmp_path / "oracle"), open_stage(tmp_path / "scores", stage="scores", **arguments) as scores:
        assert not scores.done


HOLDER = """
import sys
from pathlib import Path
from tokenward.artifacts import open_stage
with open_stage(Path(sys.argv[1]), stage="oracle", settings={}, inputs={}, format=1):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_process_is_refused_with_the_pid_of_the_first(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "oracle")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    assert f"pid {other.pid})" in refused("stage-locked", opened(tmp_path / "oracle").__enter__)
    other.communicate()
    run_stage(tmp_path / "oracle")
    assert not (tmp_path / ".lock-oracle.pid").exists()


def part_of(folder, text, beta=0.1):
    wanted = {"oracle": {"beta": beta}}
    return open_part(
        folder, StagePart.read(text), stage="oracle", settings=wanted, inputs={"data": "d1"}, format=1
    )


def test_parts_are_worked_on_at_once_and_the_first_to_finish_decides(tmp_path):
    folder = tmp_path / "oracle"
    with part_of(folder, "1/2") as one, part_of(folder, "2/2") as two:
        assert "part 1/2 of oracle" in refused("stage-locked", part_of(folder, "1/2").__enter__)
        assert "part 1/2 of oracle" in refused("stage-locked", opened(folder).__enter__)
        assert "oracle.beta: 0.1 -> 0.2" in refused("other-parts", part_of(folder, "1/3", beta=0.2).__enter__)
        one.complete(rows=1)
        written = (folder / "manifest.json").read_bytes()
        two.complete(rows=2)
        assert (folder / "manifest.json").read_bytes() == written
    with part_of(folder, "2/2") as again:
        assert again.done
    run_stage(folder)  # no part works any more


@pytest.mark.parametrize("text", ["0/4", "5/4", "0/0", "x", "1/", "-1/4", "1/4/4"])
def test_a_part_that_does_not_exist_is_refused(text):
    assert "1/4" in refused("bad-part", StagePart.read, text)


def test_every_file_belongs_to_one_part():
    parts = [StagePart.read(f"{number}/3") for number in (1, 2, 3)]
    assert [[place for place in range(7) if part.has(place)] for part in parts] == [[0, 3, 6], [1, 4], [2, 5]]
    assert all(part.of_place(place) == part for part in parts for place in range(7) if part.has(place))


class Crash(BaseException):
    """Like a kill: no handler catches it."""


def crash_at(monkeypatch, step):
    """Crash at the step-th change of the file system: odd steps before the change, even ones after."""
    seen = {"steps": 0}

    def guarded(original):
        def call(*args, **kwargs):
            seen["steps"] += 1
            if seen["steps"] == step:
                raise Crash
            result = original(*args, **kwargs)
            seen["steps"] += 1
            if seen["steps"] == step:
                raise Crash
            return result

        return call

    for owner, name in [(Path, "rename"), (Path, "mkdir"), (Path, "rmdir"), (os, "fsync"), (os, "replace")]:
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    return seen


def crash_everywhere(monkeypatch, prepare, interrupted):
    """Interrupt ``interrupted(run)`` at each step in turn, then yield the run's folder."""
    for step in range(1, 100):
        run = prepare(step)
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            try:
                interrupted(run)
            except Crash:
                pass
            else:
                return
        yield run
    pytest.fail("never ran to the end")


@pytest.mark.parametrize(("before", "wanted", "least"), [([0.1], 0.2, 10), ([0.1, 0.2], 0.1, 4)])
def test_crash_at_any_step_loses_nothing(tmp_path, monkeypatch, before, wanted, least):
    def prepare(step):
        for beta in before:
            run_stage(tmp_path / str(step) / "oracle", beta=beta)
        return tmp_path / str(step)

    runs = 0
    for run in crash_everywhere(monkeypatch, prepare, lambda run: run_stage(run / "oracle", beta=wanted)):
        runs += 1
        assert run_stage(run / "oracle", beta=wanted).done or wanted not in before
        assert require(run / "oracle", "oracle").settings == {"oracle": {"beta": wanted}}
        for beta in (0.1, 0.2):
            assert run_stage(run / "oracle", beta=beta).done
            assert (run / "oracle/model.txt").read_text() == f"{beta} d1"
    assert runs >= least


def test_half_written_first_manifest_is_ignored(tmp_path):
    folder = tmp_path / "oracle"
    folder.mkdir()
    (folder / ".manifest.json.99.tmp").write_text('{"stage": "or')
    assert not run_stage(folder).resuming
    assert names_in(folder) == ["manifest.json", "model.txt"]


def test_json_lines_keep_every_character_that_a_text_may_hold(tmp_path: Path) -> None:
    """str.splitlines breaks at U+2028, U+0085 and form feed; JSON lines do not."""
    records = [{"text": "a\u2028b\u0085c\fd\r\né"}, [1, 2.5, None], "x"]
    for ascii in (False, True):
        write_jsonl(tmp_path / "x.jsonl", iter(records), ascii=ascii)
        assert read_jsonl(tmp_path / "x.jsonl") == records
        assert (tmp_path / "x.jsonl").read_bytes().isascii() == ascii
        write_json(tmp_path / "x.json", records, ascii=ascii)
        assert read_json(tmp_path / "x.json") == records
        assert (tmp_path / "x.json").read_text(encoding="utf-8") == json.dumps(
            records, indent=2, ensure_ascii=ascii
        ) + "\n"
    write_jsonl(tmp_path / "y.jsonl", [{"at": tmp_path}], default=str)
    assert (tmp_path / "y.jsonl").read_bytes() == b'{"at": "%s"}\n' % str(tmp_path).encode()


def test_json_lines_that_cannot_be_written_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="set"):
        write_jsonl(tmp_path / "x.jsonl", [1, {2}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "link",
    [".lock-oracle", ".lock-oracle.pid", ".previous", "oracle", "oracle/checkpoints", "oracle/model.txt"],
)
def test_nothing_behind_a_link_is_written_or_deleted(tmp_path: Path, link: str) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    (outside / "checkpoints").mkdir(parents=True)
    (outside / "model.txt").write_text("mine")
    run.mkdir()
    if "/" in link:
        with opened(run / "oracle"):  # begun, so that it is resumed
            pass
    target = (
        outside
        if link in ("oracle", ".previous")
        else outside / "checkpoints"
        if "checkpoints" in link
        else outside / "model.txt"
    )
    (run / link).symlink_to(target)
    refused("symbolic-link", run_stage, run / "oracle")
    refused("symbolic-link", run_stage, run / "oracle", 0.2)
    assert names_in(outside) == ["checkpoints", "model.txt"]
    assert (outside / "model.txt").read_text() == "mine"


def test_a_run_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large-disk")
    run_stage(tmp_path / "run" / "oracle")
    assert (tmp_path / "large-disk" / "oracle" / "model.txt").is_file()


@pytest.mark.parametrize(
    "name", ["", "a\0b", "~nobody-here/x", "x" * 300, "runs/" + "\u20ac" * 90, "a\udabcb"]
)
def test_what_cannot_be_a_path_is_refused(name: str) -> None:
    with pytest.raises(UserError) as caught:
        user_path(name)
    assert caught.value.code == "unusable-path"
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("number", ["NaN", "1e999"])
def test_a_manifest_with_a_number_that_is_none_is_refused(tmp_path: Path, number: str) -> None:
    Manifest.begin("oracle", {"beta": 0.25}, {}, 1).write(tmp_path)
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace("0.25", number))
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert caught.value.code in ("edited-manifest", "unreadable-manifest")
