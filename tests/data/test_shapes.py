"""Shapes that people's rows have: each is read as it is, and every column that is not read is named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.data.prepare import load
from tokenward.errors import UserError

ASKED = {"role": "user", "content": "Say tea."}
SYSTEM = {"role": "system", "content": "Be brief."}


def written(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gpt(value):
    return {"from": "gpt", "value": value}


def assistant(content):
    return {"role": "assistant", "content": content}


TALK = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Say tea."}]
SAFETY = {"is_response_0_safe": True, "is_response_1_safe": True, "safer_response_id": 1}

SHAPES = {
    "sharegpt": ({"conversations": TALK, "chosen": gpt("tea"), "rejected": gpt("no")}, [SYSTEM, ASKED], []),
    "sharegpt lists": (
        {"conversations": TALK, "chosen": [gpt("tea")], "rejected": [gpt("no")]},
        [SYSTEM, ASKED],
        [],
    ),
    "swift": (
        {"messages": [SYSTEM, ASKED, assistant("tea")], "rejected_response": "no", "id": 3},
        [SYSTEM, ASKED],
        ["id"],
    ),
    "swift messages": (
        {"messages": [ASKED, assistant("tea")], "rejected_messages": [ASKED, assistant("no")]},
        [ASKED],
        [],
    ),
    "alpaca": (
        {"instruction": "Say it.", "input": "tea", "chosen": "tea", "rejected": "no", "history": []},
        [{"role": "user", "content": "Say it.\ntea"}],
        ["history"],
    ),
    "alpaca without input": (
        {"instruction": "Say tea.", "input": "", "chosen": "tea", "rejected": "no"},
        [ASKED],
        [],
    ),
    "safe_rlhf": (
        {"prompt": "Say tea.", "response_0": "no", "response_1": "tea", "better_response_id": 1, **SAFETY},
        [ASKED],
        list(SAFETY),
    ),
    "shp": (
        {"post_id": "x", "history": "Say tea.", "human_ref_A": "tea", "human_ref_B": "no", "labels": 1},
        [ASKED],
        ["post_id"],
    ),
    "openai": (
        {
            "input": {"messages": [SYSTEM, ASKED], "tools": []},
            "preferred_output": [assistant("tea")],
            "non_preferred_output": [assistant("no")],
        },
        [SYSTEM, ASKED],
        [],
    ),
    "pairs": (
        {"system": "Be brief.", "prompt": "Say tea.", "chosen": "tea", "rejected": "no", "weight": 2},
        [SYSTEM, ASKED],
        ["weight"],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_found_and_read(tmp_path, name):
    row, prompt, unread = SHAPES[name]
    found = load(written(tmp_path, row))
    assert found.format == name.split()[0]
    (comparison,) = found.comparisons
    assert list(comparison.prompt) == prompt
    assert dict(zip(comparison.responses, comparison.ranks, strict=True)) == {"tea": 0, "no": 1}
    assert found.unread == unread


def test_shp_scores_and_labels():
    from tokenward.data.formats import FORMATS

    row = {**SHAPES["shp"][0], "labels": 0, "score_A": 4, "score_B": 9}
    found = FORMATS["shp"].parse(row)
    assert (found.responses, found.ranks, found.scores) == (("tea", "no"), (1, 0), (4.0, 9.0))


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("safe_rlhf", {"better_response_id": 2}, "better_response_id: found the number 2, expected 0 or 1"),
        ("shp", {"labels": 3}, "labels: found the number 3, expected 1"),
        ("openai", {"input": {"tools": []}}, "input.messages: missing; found only tools"),
        ("pairs", {"system": 3}, "system: found the number 3, expected text"),
        ("pairs", {"prompt": [{"role": "system", "content": "Be long."}, ASKED]}, "system: the prompt begins with another"),
        ("pairs", {"rejected": ["no", 5]}, "rejected[1]: found the number 5"),
        ("pairs", {"rejected": ["a", "b"], "score_chosen": 1, "score_rejected": 0}, "score_chosen: is one score of several"),
    ],
)  # fmt: skip
def test_what_a_shape_cannot_hold_is_named_with_its_row(tmp_path, name, change, problem):
    good = SHAPES[name][0]
    with pytest.raises(UserError) as error:
        load(written(tmp_path, good, {**good, **change}))
    assert f"rows.jsonl:2: {problem}" in str(error.value)


def test_the_same_system_message_twice_is_one(tmp_path):
    row = {"system": "Be brief.", "prompt": [SYSTEM, ASKED], "chosen": "tea", "rejected": "no"}
    assert list(load(written(tmp_path, row)).comparisons[0].prompt) == [SYSTEM, ASKED]
    renamed = {"rule": "Be brief.", "prompt": [ASKED], "chosen": "tea", "rejected": "no"}
    found = load(written(tmp_path, renamed), columns={"system": "rule"})
    assert (list(found.comparisons[0].prompt), found.unread) == ([SYSTEM, ASKED], [])


def test_several_replies_of_a_side_are_tied(tmp_path):
    found = load(written(tmp_path, {"prompt": "q", "chosen": "a", "rejected": ["b", "c"]})).comparisons[0]
    assert (found.responses, found.ranks) == (("a", "b", "c"), (0, 1, 1))
    talks = [[assistant("b")], [assistant("c")]]
    found = load(written(tmp_path, {"prompt": [ASKED], "chosen": ["a", "d"], "rejected": talks})).comparisons[
        0
    ]
    assert (found.responses, found.ranks) == (("a", "d", "b", "c"), (0, 0, 1, 1))


def test_an_input_is_not_lost_where_the_instruction_is_named_as_the_prompt(tmp_path):
    rows = [{"instruction": "Say it.", "input": f"tea {n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    found = load(written(tmp_path, *rows), columns={"prompt": "instruction"})
    assert [row.prompt[0]["content"] for row in found.comparisons] == [f"Say it.\ntea {n}" for n in range(3)]
    plain = load(written(tmp_path, *rows), columns={"prompt": "instruction"}, format="pairs")
    assert plain.unread == ["input"]


def test_columns_that_are_not_read_are_those_of_any_row(tmp_path):
    row = {"question": "q", "prompt": "other", "chosen": "a", "rejected": "b"}
    found = load(written(tmp_path, row, {**row, "question": "r", "note": 1}), columns={"prompt": "question"})
    assert found.unread == ["prompt", "note"]


def test_whole_talks_beside_conversations_are_no_replies_to_them(tmp_path):
    talk = [ASKED, assistant("tea")]
    row = {"conversations": talk, "chosen": talk, "rejected": [ASKED, assistant("no")]}
    found = load(written(tmp_path, row))
    assert (found.format, found.unread) == ("implicit", ["conversations"])


ROLE = st.sampled_from(["user", "assistant", "tool", "system"])
TURN = st.fixed_dictionaries(
    {"role": ROLE, "content": st.sampled_from(["", "a", "b"])},
    optional={
        "weight": st.sampled_from([0, 1]),
        "tool_calls": st.just([{"name": "f"}]),
        "thinking": st.just("t"),
    },
)
TALKS = st.lists(TURN, max_size=4)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.lists(
        st.fixed_dictionaries({"prompt": TALKS, "chosen": TALKS, "rejected": TALKS}), min_size=1, max_size=6
    )
)
def test_no_row_of_messages_is_lost(tmp_path_factory, rows):
    found = load(written(tmp_path_factory.mktemp("talks"), *rows), format="pairs")
    assert found.counts["read"] == len(rows) == len(found.comparisons) + len(found.dropped)
    assert sum(found.counts.values()) == 2 * len(rows)
    for row in found.comparisons:
        replies = [row.reply(place) for place in (0, 1)]
        assert replies[0] != replies[1]
        assert all(reply[0]["role"] == reply[-1]["role"] == "assistant" for reply in replies)
        assert all(
            any(turn.get("weight", 1) for turn in reply if turn["role"] == "assistant") for reply in replies
        )
        assert all(row.responses)


@pytest.mark.parametrize(("label", "rank"), [(True, 0), (False, 1), (1, 0), (0, 1)])
def test_unpaired_rows_are_good_or_bad(tmp_path, label, rank):
    found = load(written(tmp_path, {"prompt": "q", "completion": [assistant("a")], "label": label}))
    assert found.format == "unpaired"
    assert (found.comparisons[0].responses, found.comparisons[0].ranks) == (("a",), (rank,))


def test_unpaired_rows_may_repeat_and_contradict(tmp_path):
    labels = {"a": [True, True], "b": [False, True], "c": [False], " ": [True]}
    rows = [
        {"prompt": "q", "completion": text, "label": label}
        for text, given in labels.items()
        for label in given
    ]
    found = load(written(tmp_path, *rows))
    assert found.counts == {"read": 6, "kept": 2, "duplicate": 1, "contradictory": 2, "empty response": 1}
    with pytest.raises(UserError, match=r"rows.jsonl:1: label: found text"):
        load(written(tmp_path, {**rows[0], "label": "good"}))
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion,label\nq,a,True\nq,b,false\nq,c,0\n")
    assert [row.ranks for row in load(table).comparisons] == [(0,), (1,), (1,)]


def test_each_item_of_a_list_has_its_own_shape(tmp_path):
    pairs = written(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"}, name="a.jsonl")
    alone = written(tmp_path, {"prompt": "q", "completion": "c", "label": False, "id": 1}, name="b.jsonl")
    found = load([pairs, alone])
    assert (found.format, found.unread) == ("pairs, unpaired", ["id"])
    assert [row.ranks for row in found.comparisons] == [(0, 1), (1,)]
    assert load([pairs, alone], limit=1).counts == {"read": 1, "kept": 1}


def test_the_advice_for_stepwise_rows_works(tmp_path):
    steps = {"prompt": "q", "completions": ["a ", "b"], "labels": [True, False]}
    with pytest.raises(UserError, match="these are stepwise rows, a label for each step") as error:
        load(written(tmp_path, steps))
    assert "its steps joined as completion, and label true where every step is right" in str(error.value)
    followed = {"prompt": "q", "completion": "".join(steps["completions"]), "label": all(steps["labels"])}
    assert load(written(tmp_path, followed)).comparisons[0].ranks == (1,)


@pytest.mark.parametrize("chosen", ["response", "best"])
def test_the_advice_for_a_column_under_another_name_works(tmp_path, chosen):
    """What is suggested is written, until no more is suggested."""
    row = {"system": "Be brief.", "question": "q", "chosen": "tea", "rejected": "no"}
    if chosen == "response":
        row = {"prompt": "q", "response": "tea", "label": True, "system": "Be brief."}
    path = written(tmp_path, row)
    with pytest.raises(UserError) as error:
        load(path)
    ours, theirs = str(error.value).split("set data.columns.")[1].split(")")[0].split(": ")
    found = load(path, columns={ours: theirs})
    assert found.comparisons[0].prompt[0] == SYSTEM
    assert found.unread == []
