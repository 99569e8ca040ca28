"""A whole recipe whose oracle has another tokenizer and chat template than the policy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenward
from tests.tokenizers import byte_level, save_other
from tokenward.api.transfer import OTHER_TOKENS
from tokenward.artifacts import StagePart, read_manifest
from tokenward.errors import UserError
from tokenward.report.channels import Channels
from tokenward.report.collect import RunFolder
from tokenward.report.pairs import PairReader
from tokenward.report.show import shown_pair
from tokenward.scoring.store import TokenStore
from tokenward.stages.auxiliary import scorer_of
from tokenward.stages.lists import run_through, write_part
from tokenward.stages.run import Run
from tokenward.stages.tables import tables
from tokenward.tools.run import open_run


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_other(tmp_path_factory.mktemp("foreign") / "model", byte_level()))


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("tokens-*.parquet"))}


def test_a_recipe_whose_oracle_has_another_tokenizer(tiny_workplace: Path, foreign: str, capsys) -> None:
    changes = [
        f"oracle.model={foreign}",
        "scores.shard_rows=4",
        "eval_reward.fraction=0.2",
        "eval_reward.training.max_steps=2",
    ]
    run = tokenward.run(tiny_workplace, changes)
    screen = " ".join(capsys.readouterr().out.split())
    assert "100 % of the text has a score, 100 % of the values were placed" in screen
    own, other = (run.tokenizer_template(name) for name in (run.policy_start, foreign))
    assert own.fingerprint != other.fingerprint
    scores = run.path("scores")
    facts = read_manifest(scores).facts
    covered = facts["token_coverage"]
    assert facts["tokens"]["template"] == own.fingerprint
    assert (covered["text"], covered["scored"], covered["unscored"]) == (1.0, 1.0, 0)
    assert covered["placed"] == {"oracle_logp": 1.0, "reference_logp": 1.0}
    assert covered["segments"]
    # The store has the policy's tokens, with the sums of the oracle's.
    before, after = TokenStore(scores / OTHER_TOKENS), TokenStore(scores)
    rows = tables(run, own).everything
    assert len(after) == len(rows.responses)
    for number in range(len(rows)):
        for key, ids in zip(
            (f"{k:016x}" for k in rows.keys[rows.starts[number] : rows.starts[number + 1]].tolist()),
            rows[number].responses,
            strict=True,
        ):
            assert after[key].ids == ids
            for name in ("oracle_logp", "reference_logp"):
                assert sum(after[key].values[name]) == pytest.approx(sum(before[key].values[name]), abs=1e-12)
    # The page, the terminal and the page's data show the policy's tokens and select whole segments.
    reader = PairReader.open(RunFolder.read(run.folder))
    assert reader is not None
    places = [place for place, _ in reader.places()]
    pair = reader.pair(places[0])
    values = Channels(reader, np.zeros(1), [pair]).of(pair)
    for record, found in zip(pair.records, values, strict=True):
        segment = np.array(record.segment)
        assert all(len(set(found["weight"][segment == one])) == 1 for one in set(record.segment))
    shown = shown_pair(run.folder, 1)
    for side, text in enumerate(shown.pair.comparison.responses):
        assert "".join(token.text for token in shown.sides[side] if not token.eos) == text
        assert [token.text for token in shown.sides[side]][-1] == "<|im_end|>"
    page = (run.folder / "report" / "index.html").read_text()
    assert "The policy has another tokenizer" in page
    assert '"joint":' in page
    metrics = json.loads((run.path("evaluation") / "metrics.json").read_text())
    known = [row for row in tables(run, own).eval if row.comparison.spans is not None]
    assert metrics["credit/auroc/log_ratio"]["n"] == 2 * len(known)
    assert metrics["eval_reward/pairs_accuracy"]["n"] == len(known)
    # Started again, nothing runs.
    again = {
        stage: read_manifest(run.path(stage)).created
        for stage in ("scores", "policy", "eval_reward", "evaluation")
    }
    tokenward.run(tiny_workplace, changes, quiet=True)
    assert {stage: read_manifest(run.path(stage)).created for stage in again} == again
    # In parts, the files are the same.
    parts = Run(recipe=open_run(tiny_workplace, [*changes, "run=runs/parts"], quiet=True).recipe)
    run_through(parts, "oracle")
    assert write_part(parts, StagePart.read("2/2")) is False
    assert write_part(parts, StagePart.read("1/2")) is True
    for folder in (Path(), Path(OTHER_TOKENS)):
        assert shards(parts.path("scores") / folder) == shards(scores / folder)


def test_the_same_tokenizer_leaves_no_trace(tiny_workplace: Path, tiny_folder: Path) -> None:
    """An oracle of its own folder with the same tokenizer: float32, no segments, no second store."""
    run = tokenward.run(tiny_workplace, [f"oracle.model={tiny_folder}"], last="scores", quiet=True)
    store = TokenStore(run.path("scores"))
    assert not store.has_segments
    assert not (run.path("scores") / OTHER_TOKENS).exists()
    assert "token_coverage" not in read_manifest(run.path("scores")).facts
    assert store[next(iter(store))].value("oracle_logp").dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("scores.scorer={name: entropy, of: oracle}", "cannot-transfer"),
        ("scores.scorer={name: attention, of: oracle}", "cannot-transfer"),
        ("scores.scorer={name: probability, of: oracle}", "cannot-transfer"),
        ("oracle.model=lower", "normalized-text"),
    ],
)
def test_what_cannot_work_is_refused_before_the_oracle_trains(
    tiny_workplace: Path, foreign: str, change: str, code: str
) -> None:
    if change == "oracle.model=lower":
        save_other(Path("lower"), byte_level(lower=True))
        text = Path("pairs.jsonl").read_text()
        Path("pairs.jsonl").write_text(text.replace("good", "Good").replace("bad", "Bad"))
    run = open_run(tiny_workplace, [f"oracle.model={foreign}", change], quiet=True)
    with pytest.raises(UserError) as caught:
        run_through(run)
    assert caught.value.code == code, caught.value
    assert not run.path("reference").exists()
    assert scorer_of(run) is not None
