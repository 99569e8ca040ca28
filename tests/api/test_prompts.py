"""Rows of prompts alone are read as the prompts of any other row."""

from typing import Any

import pytest

import tokenward
from tests.api.conftest import TOKENS, Script
from tests.tokens.test_table import TEMPLATE
from tokenward.api.prompts import encode_replied
from tokenward.errors import UserError
from tokenward.tokens.encode import Limits
from tokenward.tokens.rows import TokenRow

LIMITS = Limits(max_prompt_tokens=256, max_response_tokens=64)
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: and\n\nAssistant:"
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]


def first(row: Any) -> TokenRow:
    return next(iter(encode_replied([row], TEMPLATE, LIMITS, print)))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "system": "Be brief."},
        {"prompt": TRANSCRIPT},
        {"prompt": PARTS},
        {"prompt": [{"from": "human", "value": "hi"}]},
        {"prompt": "hi", "tools": None, "answer": "a column that is not read"},
    ],
    ids=["system", "transcript", "parts", "sharegpt", "more columns"],
)
def test_a_prompt_alone_is_that_of_a_pair(row: dict[str, Any]) -> None:
    pair = first({**row, "chosen": "a", "rejected": "b"})
    assert first(row).asked == pair.asked
    assert first(row).comparison.prompt == pair.comparison.prompt


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "hi"}, {"question": "hi"}],
        [{"prompt": "   "}],
        [{"prompt": [{"role": "system", "content": "Be brief."}]}],
        [{"prompt": [{"role": "user"}]}],
    ],
    ids=["missing", "blank", "system alone", "no content"],
)
def test_a_row_without_a_prompt_is_named(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=f"train_dataset:row {len(rows)}") as caught:
        list(encode_replied(rows, TEMPLATE, LIMITS, print))
    assert caught.value.code == "bad-row"


def test_a_text_among_rows_is_named() -> None:
    for rows in ([{"prompt": "hi"}, "hi"], ["hi"]):
        with pytest.raises(UserError, match=f"train_dataset:row {len(rows)}: found text") as caught:
            list(encode_replied(rows, TEMPLATE, LIMITS, print))
        assert caught.value.code == "not-an-object"


def test_replies_to_prompts_alone_are_measured_as_those_to_the_prompts_of_pairs(script: Script) -> None:
    sampling = tokenward.SamplingSettings(max_new_tokens=8, temperature=0.0)
    replying: dict[str, Any] = {"prompts": 100, "metrics": ["distinct_2"], "sampling": sampling}
    more: dict[str, Any] = {"reference": script.model, "bootstrap": 5, "tokens": TOKENS, "quiet": True}
    alone = [{"prompt": row["prompt"]} for row in script.eval for _ in range(2)]  # each is replied to once
    policy = script.folder / "oracle/model"
    found = tokenward.evaluate(policy, alone, **replying, **more)
    of_pairs = tokenward.evaluate(policy, script.eval, **replying, **more)
    assert {"distinct_2/change", "kl/per_token", "length/after"} <= found.keys()
    for name, figure in found.items():
        assert figure.n == of_pairs[name].n
        assert figure.value == pytest.approx(of_pairs[name].value, abs=1e-6)  # in another order
    with pytest.raises(UserError, match="prompts alone") as caught:
        tokenward.evaluate(policy, alone, **more)
    assert caught.value.code == "metrics-without-prompts"
    with pytest.raises(UserError, match="Leave oracle out") as caught:
        tokenward.evaluate(policy, alone, oracle=script.oracle, **replying, **more)
    assert caught.value.code == "conflicting-settings"
