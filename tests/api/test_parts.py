"""Several jobs score one data set, a part each."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokenward
from tests.tiny import planted_rows
from tokenward.api import values

ROWS = planted_rows(12)


def test_parts_of_a_store_give_the_scores_of_one_call(
    tiny_oracle: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "SHARD_ROWS", 4)

    def score(part: str | None = None, *, rows=ROWS, folder: str = "parts", oracle=str(tiny_oracle)):
        return tokenward.score(rows, oracle=oracle, store=tmp_path / folder, part=part, quiet=True)

    def refused(*arguments, **named) -> tokenward.UserError:
        with pytest.raises(tokenward.UserError) as caught:
            score(*arguments, **named)
        return caught.value

    whole = score(folder="whole")
    assert score("2/2") is None
    assert [path.name for path in (tmp_path / "parts").glob("tokens-*")] == ["tokens-00001.parquet"]
    with pytest.raises(tokenward.UserError) as caught:
        tokenward.score(ROWS, oracle=str(tmp_path / "parts"), quiet=True)
    assert caught.value.code == "stage-unfinished"
    error = refused("1/2", rows=ROWS[:-1])
    assert error.code == "other-parts"
    assert "input rows: changed" in str(error)
    assert score("1/2")[:] == whole[:] == tokenward.score(ROWS, oracle=str(tiny_oracle), quiet=True)[:]
    for path in (tmp_path / "whole").glob("tokens-*"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    stored = tokenward.score(ROWS, oracle=str(tmp_path / "parts"), processing_class=tokenizer, quiet=True)
    assert stored["token_scores"] == whole["token_scores"]

    assert refused("0/4").code == "bad-part"
    with pytest.raises(tokenward.UserError) as caught:
        tokenward.score(ROWS, oracle=str(tiny_oracle), part="1/2", quiet=True)  # type: ignore[call-overload]
    assert caught.value.code == "missing-store"


def test_a_model_in_memory_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """No other job can know whether it has the same one."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with pytest.raises(tokenward.UserError) as caught:
        tokenward.score(
            ROWS, oracle=model, reference=str(tiny_folder), store=tmp_path / "scores", part="1/2", quiet=True
        )
    assert caught.value.code == "not-saved"
