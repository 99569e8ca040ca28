"""Comparisons to ids: what is truncated, what is dropped, and that all of it is counted."""

import pytest

from tests.tiny import tiny_tokenizer
from tokenward.api.inputs import encode_rows
from tokenward.errors import UserError
from tokenward.tokens.encode import Limits, encode, encode_one, with_prompt
from tokenward.tokens.template import Template
from tokenward.types import Comparison

TEMPLATE = Template(tokenizer=tiny_tokenizer())
PLAIN = Template(tokenizer=tiny_tokenizer(), kind="plain")
SYSTEM = {"role": "system", "content": "S"}


def comparison(*responses: str, prompt="q") -> Comparison:
    messages = turns(prompt) if isinstance(prompt, str) else prompt
    ranks = tuple(range(len(responses)))
    return Comparison(
        key="k", prompt=tuple(messages), responses=responses, ranks=ranks, source="data.jsonl:1"
    )


def text(ids) -> str:
    return TEMPLATE.tokenizer.decode(ids)


def turns(*contents: str):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def encoded(row: Comparison, *limits, template=TEMPLATE, context=None):
    """Texts of the prompt and of the responses, and the notes; only the notes if the row is dropped."""
    found, notes = encode_one(row, template, Limits(*limits, context=context))
    return notes if found is None else (text(found.prompt), [text(ids) for ids in found.responses], notes)


def test_a_comparison_as_ids():
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert encoded(comparison("yes", "no", prompt="hi"), 64, 8) == (
        prompt,
        ["yes<|im_end|>", "no<|im_end|>"],
        [],
    )
    plain = encoded(comparison("xyz", "he"), 64, 8, template=PLAIN)
    assert plain == ("q", ["xyz<|im_end|>", "he<|im_end|>"], [])
    row, _ = encode_one(comparison("yes", "no", prompt="hi"), TEMPLATE, Limits(64, 8))
    assert (row.eos, row.length) == ([1, 1], len(row.prompt) + 4 + 3)


def test_a_truncated_response_has_no_eos():
    row, notes = encode_one(comparison("abcd", "abc"), TEMPLATE, Limits(64, 4, "truncate"))
    assert [text(ids) for ids in row.responses] == ["abcd", "abc<|im_end|>"]
    assert row.eos == [0, 1]
    assert notes == ["note: response truncated to max_response_tokens"]


def test_responses_that_truncation_makes_equal_are_dropped():
    same = ["dropped: responses have the same tokens after truncation"]
    assert encoded(comparison("abcd", "abce"), 64, 3, "truncate") == same
    _, responses, _ = encoded(comparison("abcd", "abce", "x"), 64, 3, "truncate")
    assert responses == ["abc", "abc", "x<|im_end|>"]


def test_what_is_longer_than_the_limits_is_dropped_or_an_error():
    long_prompt, long_response = comparison("yes", "no", prompt="h" * 50), comparison("y", "n" * 8)
    assert encoded(long_prompt, 68, 8) == ["dropped: prompt too long"]
    assert encoded(long_prompt, 69, 8)[2] == []  # 69 tokens with the template's: nothing is cut at the limit
    assert encoded(long_response, 64, 8) == ["dropped: response too long"]
    assert encoded(long_response, 64, 9)[2] == []
    for row, key in (
        (long_prompt, "tokens.max_prompt_tokens"),
        (long_response, "tokens.max_response_tokens"),
    ):
        with pytest.raises(UserError, match=r"data.jsonl:1: .*(69 tokens|response 9)") as error:
            encoded(row, 64, 8, "error")
        assert (error.value.code, error.value.key) == ("too-long", key)


def test_the_models_context_is_a_limit_of_its_own():
    # Each row has the prompt and one response: 2 + 4 tokens, not 2 + 4 + 3.
    pair = comparison("abc", "xy", prompt="qr")
    assert len(encoded(pair, 64, 8, "truncate", template=PLAIN, context=6)) == 3
    dropped = encoded(pair, 64, 8, "truncate", template=PLAIN, context=5)
    assert dropped == ["dropped: longer than the model's context"]


def test_a_long_prompt_loses_as_few_of_its_oldest_turns_as_needed():
    messages = [SYSTEM, *turns("old" * 9, "answer", "new")]
    limit = len(TEMPLATE.prompt_ids([SYSTEM, *turns("new")]))
    prompt, _, notes = encoded(comparison("y", "n", prompt=messages), limit, 8, "truncate")
    assert prompt == TEMPLATE.render([SYSTEM, *turns("new")])
    assert notes == ["note: prompt truncated to max_prompt_tokens"]
    messages = turns("one", "two", "three", "four", "five")
    limit = len(TEMPLATE.prompt_ids(messages)) - 1
    prompt, _, _ = encoded(comparison("y", "n", prompt=messages), limit, 8, "truncate")
    assert prompt == TEMPLATE.render(messages[2:])
    # A single turn loses tokens from the left.
    row, _ = encode_one(comparison("y", "n", prompt="abcdefghij"), TEMPLATE, Limits(15, 8, "truncate"))
    assert row.prompt == TEMPLATE.prompt_ids(turns("abcdefghij"))[-15:]


def test_joint_encoding_that_differs_is_noted():
    _, _, notes = encoded(comparison("x", "he", prompt="a t"), 64, 8, template=PLAIN)
    assert notes == ["note: prompt and reply are encoded apart, as in generation"]
    said: list[str] = []
    rows = [{"prompt": "a t", "chosen": "he cup", "rejected": "he tea"}]
    encode_rows(rows, None, PLAIN, Limits(64, 64), pairs="best_worst", evaluates=False, say=said.append)
    assert "note: prompt and reply are encoded apart" in said[0]
    assert "'a t' and the beginning of the reply 'he cup'" in said[1]
    assert said[1].endswith("Nothing is to be done")


def test_everything_is_counted():
    rows = [comparison("yes", "no"), comparison("yes", "n" * 20), comparison("y", "n", prompt="h" * 80)]
    found, counts = encode(rows, TEMPLATE, Limits(64, 8))
    assert [row.comparison for row in found] == rows[:1]
    assert counts == {"read": 3, "kept": 1, "dropped: response too long": 1, "dropped: prompt too long": 1}
    for rows, part in (([comparison("y", "n" * 9)] * 2, "response too long: 2"), ([], "there were none")):
        with pytest.raises(UserError, match=part) as error:
            encode(rows, TEMPLATE, Limits(64, 8))
        assert error.value.code == "no-rows"


def test_an_auxiliary_models_prompt_needs_a_user_turn():
    with pytest.raises(UserError, match=r"data.jsonl:1") as error:
        with_prompt((SYSTEM,), "Good: {prompt}", "data.jsonl:1")
    assert error.value.code == "no-user-turn"
