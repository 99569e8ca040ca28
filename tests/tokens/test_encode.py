"""Comparisons to ids: what is cut, what is dropped, and that all of it is counted."""

import pytest

from tests.tiny import tiny_tokenizer
from tokenward.errors import UserError
from tokenward.tokens.encode import Limits, encode, encode_one
from tokenward.tokens.rows import response_key
from tokenward.tokens.template import Template
from tokenward.types import Comparison

TEMPLATE = Template(tokenizer=tiny_tokenizer())
PLAIN = Template(tokenizer=tiny_tokenizer(), kind="plain")
EOS = TEMPLATE.tokenizer.eos_token_id


def comparison(*responses: str, prompt="q", source="data.jsonl:1") -> Comparison:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Comparison(
        key="k",
        prompt=tuple(messages),
        responses=responses,
        ranks=tuple(range(len(responses))),
        source=source,
    )


def text(ids) -> str:
    return TEMPLATE.tokenizer.decode(ids)


def turns(*contents: str):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_one_comparison_as_ids():
    row, notes = encode_one(comparison("yes", "no", prompt="hi"), TEMPLATE, Limits(64, 8))
    assert text(row.prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert [text(ids) for ids in row.responses] == ["yes<|im_end|>", "no<|im_end|>"]
    assert all(row.eos)
    assert row.eos == [1, 1]
    assert row.length == len(row.prompt) + 4 + 3
    assert notes == []


def test_all_responses_of_a_prompt_share_its_ids():
    pair, _ = encode_one(comparison("xyz", "he"), PLAIN, Limits(64, 8))
    assert text(pair.prompt) == "q"
    assert [text(ids) for ids in pair.responses] == ["xyz<|im_end|>", "he<|im_end|>"]


def test_a_response_that_loses_only_its_end_is_not_closed():
    row, notes = encode_one(comparison("abcd", "abc"), TEMPLATE, Limits(64, 4, "truncate"))
    assert [text(ids) for ids in row.responses] == ["abcd", "abc<|im_end|>"]
    assert row.eos[0] == 0 < row.eos[1]
    assert notes == ["note: response truncated"]


def test_what_is_at_the_limit_is_whole():
    size = len(TEMPLATE.prompt_ids([{"role": "user", "content": "q"}]))
    row, notes = encode_one(comparison("abc", "xyz"), TEMPLATE, Limits(size, 4))
    assert len(row.prompt) == size
    assert all(row.eos)
    assert notes == []


def test_responses_that_the_cut_makes_equal_are_dropped():
    limits = Limits(64, 3, "truncate")
    assert encode_one(comparison("abcd", "abce"), TEMPLATE, limits) == (
        None,
        ["dropped: responses are the same after truncation"],
    )
    row, _ = encode_one(comparison("abcd", "abce", "x"), TEMPLATE, limits)
    assert [text(ids) for ids in row.responses] == ["abc", "abc", "x<|im_end|>"]


def test_too_long_is_dropped_with_its_reason():
    long_prompt = comparison("yes", "no", prompt="h" * 50)  # 69 tokens with the template's
    assert encode_one(long_prompt, TEMPLATE, Limits(68, 8)) == (None, ["dropped: prompt too long"])
    assert len(encode_one(long_prompt, TEMPLATE, Limits(69, 8))[0].prompt) == 69
    assert encode_one(comparison("y", "n" * 8), TEMPLATE, Limits(64, 8)) == (
        None,
        ["dropped: response too long"],
    )


def test_too_long_stops_the_run_where_that_is_wished():
    with pytest.raises(UserError, match=r"data.jsonl:1: .* longest response 9"):
        encode_one(comparison("y", "n" * 8), TEMPLATE, Limits(64, 8, "error"))
    with pytest.raises(UserError, match="the prompt has 69 tokens"):
        encode_one(comparison("y", "n", prompt="h" * 50), TEMPLATE, Limits(64, 8, "error"))


def test_the_models_context_is_a_limit_of_its_own():
    # Each row holds the prompt and one response: 2 + 4 tokens, not 2 + 4 + 3.
    pair = comparison("abc", "xy", prompt="qr")
    row, _ = encode_one(pair, PLAIN, Limits(64, 8, "truncate", context=6))
    assert [len(ids) for ids in row.responses] == [4, 3]
    assert encode_one(pair, PLAIN, Limits(64, 8, "truncate", context=5)) == (
        None,
        ["dropped: longer than the model's context"],
    )


def test_a_long_prompt_loses_its_oldest_turns_but_not_the_system_message():
    system = {"role": "system", "content": "S"}
    messages = [system, *turns("old" * 9, "answer", "new")]
    limit = len(TEMPLATE.prompt_ids([system, *turns("new")]))
    row, notes = encode_one(comparison("y", "n", prompt=messages), TEMPLATE, Limits(limit, 8, "truncate"))
    assert text(row.prompt) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nnew<|im_end|>\n<|im_start|>assistant\n"
    )
    assert notes == ["note: prompt truncated"]


def test_no_more_turns_are_dropped_than_needed():
    messages = turns("one", "two", "three", "four", "five")
    limit = len(TEMPLATE.prompt_ids(messages)) - 1
    row, _ = encode_one(comparison("y", "n", prompt=messages), TEMPLATE, Limits(limit, 8, "truncate"))
    assert row.prompt == TEMPLATE.prompt_ids(messages[2:])


def test_a_single_long_turn_loses_its_left_tokens():
    whole = TEMPLATE.prompt_ids(turns("abcdefghij"))
    row, _ = encode_one(comparison("y", "n", prompt="abcdefghij"), TEMPLATE, Limits(15, 8, "truncate"))
    assert row.prompt == whole[-15:]


def test_joint_encoding_that_differs_is_noted():
    _, notes = encode_one(comparison("x", "he", prompt="a t"), PLAIN, Limits(64, 8))
    assert notes == ["note: joint encoding differs at the boundary"]


def test_everything_is_counted():
    rows = [
        comparison("yes", "no"),
        comparison("yes", "n" * 20),
        comparison("yes", "no", prompt="h" * 80),
        comparison("ye", "no"),
    ]
    result = encode(rows, TEMPLATE, Limits(64, 8))
    assert [row.comparison.responses for row in result[0]] == [("yes", "no"), ("ye", "no")]
    assert result[1] == {
        "read": 4,
        "kept": 2,
        "dropped: response too long": 1,
        "dropped: prompt too long": 1,
    }


def test_nothing_left_says_why():
    with pytest.raises(UserError, match="response too long: 2"):
        encode([comparison("y", "n" * 9)] * 2, TEMPLATE, Limits(64, 8))
    with pytest.raises(UserError, match=r"after encoding 0 \(there were none\)"):
        encode([], TEMPLATE, Limits(64, 8))


def test_response_keys_never_change():
    # Stores on disk are read by these.
    assert response_key(turns("q"), "a") == "ca6e1d07e07d9d36"
    assert response_key(turns("שלום"), "👩‍👩‍👧\n") == "aeec5d8c069fce01"


def test_response_keys_tell_prompt_and_response_apart():
    keys = {
        response_key(turns("q"), "a"),
        response_key(turns("qa"), ""),
        response_key(turns(""), "qa"),
        response_key(turns("q", "a"), ""),
        response_key([{"role": "system", "content": "q"}], "a"),
    }
    assert len(keys) == 5
    assert response_key([{"content": "q", "role": "user"}], "a") == response_key(turns("q"), "a")
