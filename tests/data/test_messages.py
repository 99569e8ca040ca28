"""Messages keep every key. A reply can be a call, reasoning or several messages."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from tokenward.data.fields import FieldError
from tokenward.data.files import from_line, to_line
from tokenward.data.messages import messages, readable, without_filled
from tokenward.data.prepare import comparison_key, from_rows, load

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
ASKED = {"role": "user", "content": "Rain in Oslo?"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def loaded(*rows):
    return from_rows([{"prompt": [ASKED], **row} for row in rows], name="rows")


def one(chosen, rejected, **more):
    """The comparison of a row, which must survive being stored."""
    (comparison,) = loaded({"chosen": chosen, "rejected": rejected, **more}).comparisons
    assert from_line(to_line(comparison)) == comparison
    return comparison


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_a_call_is_a_reply(content):
    call = {"role": "assistant", **content, "tool_calls": [CALL]}
    found = one([call], [answer("no idea")], tools=json.dumps(TOOLS))
    assert found.responses == ('weather({"city": "Oslo"})', "no idea")
    assert found.turns == (({"role": "assistant", "content": "", "tool_calls": [CALL]},), None)
    assert found.tools == tuple(TOOLS)
    assert found.reply(1) == (answer("no idea"),)
    keys = [comparison_key(found.prompt, found.responses, turns=found.turns, tools=found.tools)]
    keys += [comparison_key(found.prompt, found.responses, turns=found.turns)]
    keys += [comparison_key(found.prompt, found.responses, tools=found.tools)]
    assert [key == found.key for key in keys] == [True, False, False]


def test_calls_results_and_names_in_the_prompt_are_kept():
    result = {"role": "tool", "name": "weather", "tool_call_id": "7", "content": "rain"}
    found = one([answer("Rain.")], [answer("Sun.")], prompt=[ASKED, CALLS, result], tools=TOOLS)
    assert found.prompt == (ASKED, {**CALLS, "content": ""}, result)
    assert (found.responses, found.turns) == (("Rain.", "Sun."), None)


def test_reasoning_is_kept_and_is_enough_for_a_reply():
    replies = [answer("Rain.", reasoning_content="clouds")], [answer("", thinking="no clouds")]
    found = one(*replies)
    assert found.responses == ("Rain.", "no clouds")
    assert found.turns == tuple(map(tuple, replies))


def test_identical_replies_are_identical_in_all_their_messages():
    thoughts = [[answer("Rain.", reasoning_content=text)] for text in ("clouds", "wind")]
    assert one(*thoughts).responses == ("Rain.", "Rain.")
    same = {"chosen": thoughts[0], "rejected": thoughts[0]}
    assert loaded(same).counts == {"read": 1, "kept": 0, "identical responses": 1}
    both = [{"chosen": thoughts[a], "rejected": thoughts[1 - a]} for a in (0, 1)]
    assert loaded(*both).counts == {"read": 2, "kept": 0, "contradictory": 2}


def test_a_reply_of_several_messages():
    chosen = [CALLS, {"role": "tool", "content": "rain"}, answer("Rain.")]
    found = one(chosen, [answer("Sun."), ASKED, answer("Still sun.")])
    assert found.prompt == (ASKED,)
    assert found.responses == ('weather({"city": "Oslo"})\nRain.', "Sun.\nStill sun.")
    assert [message["role"] for message in found.reply(0)] == ["assistant", "tool", "assistant"]


@pytest.mark.parametrize("prompt", [{}, {"prompt": "Rain in Oslo?"}, {"prompt": [ASKED]}])
def test_the_common_beginning_belongs_to_the_prompt(prompt):
    head = [ASKED, CALLS, {"role": "tool", "content": "rain"}]
    row = {**prompt, "chosen": [*head, answer("Rain.")], "rejected": [*head, answer("Sun.")]}
    (found,) = from_rows([row], name="rows").comparisons
    assert [message["role"] for message in found.prompt] == ["user", "assistant", "tool"]
    assert (found.responses, found.turns) == (("Rain.", "Sun."), None)


def test_conversations_that_part_at_a_question_are_compared_from_the_reply_before_it():
    talks = [
        [ASKED, answer("Yes."), {"role": "user", "content": f"And {place}?"}, answer("No.")] for place in "ab"
    ]
    (found,) = from_rows([{"chosen": talks[0], "rejected": talks[1]}], name="rows").comparisons
    assert found.prompt == (ASKED,)
    assert found.turns == tuple(tuple(talk[1:]) for talk in talks)


def test_the_start_of_a_reply_stays_in_the_prompt():
    begun = [ASKED, answer("It is ")]
    found = one("wet.", [answer("dry.")], prompt=begun)
    assert (list(found.prompt), found.responses, found.turns) == (begun, ("wet.", "dry."), None)


def test_weights_are_kept_and_a_reply_of_weight_0_is_dropped():
    partly = [answer("Wait.", weight=0), ASKED, answer("Rain.", weight=1.0)]
    found = one(partly, "Sun.", prompt=[ASKED, answer("Hm.", weight=0), ASKED])
    assert found.prompt[1] == answer("Hm.", weight=0)
    assert [message.get("weight") for message in found.reply(0)] == [0, None, 1]
    never = {"chosen": [answer("Rain.", weight=0)], "rejected": "Sun."}
    assert loaded(never).counts == {"read": 1, "kept": 0, "response of weight 0": 1}
    replies = [[answer(text, weight=int(text != "b"))] for text in "abc"]
    ranked = loaded({"responses": replies, "ranks": [0, 1, 2]})
    assert ranked.notes == {"response of weight 0 removed": 1}
    assert ranked.comparisons[0].responses == ("a", "c")


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "Rain "}, "in ", {"type": "input_text", "text": "Oslo?", "url": None}]
    assert messages([{"role": "user", "content": parts}], "prompt") == (ASKED,)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "assistant", "content": None}, "m[0].content: found null"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "m[0].content: found null"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "m[0].content[0]: found a part of type image_url"),
        ({"role": "user", "content": {"a": 1}}, "m[0].content: found an object, expected text or a list of text parts"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "m[0].weight: found the number 0.5, expected 0 (no loss"),
        ({"role": "assistant", "content": "a", "weight": "1"}, "m[0].weight: found text"),
        ({"role": "assistant", "content": "", "tool_calls": {"a": 1}}, "m[0].tool_calls: found an object, expected a list"),
        ({"role": "user", "content": "a", "seen": b"1"}, "m[0].seen: found bytes, which JSON cannot represent"),
        ({"role": "user", "content": "a", "name": "\ud83d"}, "m[0].name: holds half of a surrogate pair"),
        ({"from": "bob", "value": "a"}, "m[0].from: found 'bob', expected human, "),
        ({"from": "function_call", "value": "f()"}, "m[0].value: is not a call"),
    ],
)  # fmt: skip
def test_malformed_messages_are_named(message, problem):
    with pytest.raises(FieldError) as error:
        messages([message], "m")
    assert str(error.value).startswith(problem)


def test_sharegpt_turns_are_messages():
    call = json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})
    talk = {"system": "s", "human": "h", "function_call": call, "observation": "rain", "gpt": "Rain."}
    found = messages([{"from": who, "value": value} for who, value in talk.items()], "m")
    assert [message["role"] for message in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert found[2].get("tool_calls") == [CALL]
    assert readable(found) == 'weather({"city": "Oslo"})\nRain.'


def test_keys_that_a_table_adds_to_calls_are_removed(tmp_path):
    """Parquet gives every object of a column the same keys."""
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "CET"}}}
    rows = [
        {"prompt": [ASKED], "chosen": [{**CALLS, "tool_calls": [call]}], "rejected": [answer("no")]}
        for call in (CALL, other)
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = load(path).comparisons
    assert [row.reply(0)[0].get("tool_calls") for row in found] == [[CALL], [other]]
    assert found[0].prompt == (ASKED,)
    assert without_filled({"a": None, "m": [{"b": None}]}) == {"a": None, "m": [{"b": None}]}
