"""Rows of prompts alone are read as the prompts of any other row."""

from typing import Any

import pytest

from tests.tokens.test_table import TEMPLATE
from tokenward.api.reinforce import _encoded
from tokenward.errors import UserError
from tokenward.tokens.encode import Limits
from tokenward.tokens.rows import TokenRow

LIMITS = Limits(max_prompt_tokens=256, max_response_tokens=64)
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: and\n\nAssistant:"
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]


def first(row: Any) -> TokenRow:
    return next(iter(_encoded([row], TEMPLATE, LIMITS, print)))


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
        [{"prompt": "hi"}, "hi"],
        [{"prompt": "   "}],
        [{"prompt": [{"role": "system", "content": "Be brief."}]}],
        [{"prompt": [{"role": "user"}]}],
    ],
    ids=["missing", "a text", "blank", "system alone", "no content"],
)
def test_a_row_without_a_prompt_is_named(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=f"train_dataset:row {len(rows)}") as caught:
        list(_encoded(rows, TEMPLATE, LIMITS, print))
    assert caught.value.code == "bad-row"
