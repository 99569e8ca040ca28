"""Each format is detected and read. Malformed fields are named with what was found."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.data.fields import Cell, FieldError, Unusable
from tokenward.data.formats import FORMATS, check_columns, detect, find, renamed
from tokenward.data.parsers import answered
from tokenward.data.prepare import from_rows, load
from tokenward.errors import UserError
from tokenward.types import Span


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


ASKED, SYSTEM = user("Say tea."), {"role": "system", "content": "Be brief."}
TALK = {"chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}
PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}
BINARIZED = {
    "prompt": "q",
    "prompt_id": "7",
    **TALK,
    "messages": TALK["chosen"],
    "score_chosen": 8.5,
    "score_rejected": 7,
}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"}
ULTRAFEEDBACK = {
    "source": "evol",
    "instruction": "q",
    "completions": [
        {"response": "a", "overall_score": 6.5, "fine-grained_score": 4.0},
        {"response": "b", "overall_score": 8, "fine-grained_score": 3.0},
        {"response": "c", "overall_score": 6.5, "fine-grained_score": 5.0},
    ],
}
NECTAR = {
    "prompt": "\n\nHuman: p\n\nAssistant: r\n\nHuman: q\n\nAssistant: ",
    "answers": [{"answer": "a", "rank": 3.0}, {"answer": "b", "rank": 1.0}, {"answer": "c", "rank": 7}],
}
RANKED = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1, 0, 2]}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}, "pairs"),
        ({**PAIR, "score_chosen": 1, "score_rejected": 0}, "pairs"),
        (TALK, "implicit"),
        ({**TALK, "instruction": "q"}, "implicit"),
        ({"chosen": "The sky is blue", "rejected": "The sky is green", "id": 1}, "implicit"),
        (BINARIZED, "ultrafeedback_binarized"),
        (HH, "hh"),
        ({**HH, "prompt": "\n\nHuman: q\n\nAssistant:"}, "hh"),
        (RANKED, "ranked"),
        ({"prompt": "q", "responses": ["a"], "scores": [1.0], "model": "m"}, "ranked"),
        (ULTRAFEEDBACK, "ultrafeedback"),
        (NECTAR, "nectar"),
    ],
)
def test_detection(row, name):
    assert detect(list(row), row).name == name
    assert find("auto", list(row), row) is FORMATS[name]


TURNS = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Say tea."}]
GPT = [{"from": "gpt", "value": "tea"}, {"from": "gpt", "value": "no"}]
SAFETY = {"is_response_0_safe": True, "is_response_1_safe": True, "safer_response_id": 1}

SHAPES = {
    "sharegpt": ({"conversations": TURNS, "chosen": GPT[0], "rejected": GPT[1]}, [SYSTEM, ASKED], []),
    "sharegpt lists": ({"conversations": TURNS, "chosen": GPT[:1], "rejected": GPT[1:]}, [SYSTEM, ASKED], []),
    "swift": ({"messages": [SYSTEM, ASKED, assistant("tea")], "rejected_response": "no", "id": 3}, [SYSTEM, ASKED], ["id"]),
    "swift messages": ({"messages": [ASKED, assistant("tea")], "rejected_messages": [ASKED, assistant("no")]}, [ASKED], []),
    "alpaca": (
        {"instruction": "Say it.", "input": "tea", "chosen": "tea", "rejected": "no", "history": []},
        [user("Say it.\ntea")],
        ["history"],
    ),
    "alpaca without input": ({"instruction": "Say tea.", "input": "", "chosen": "tea", "rejected": "no"}, [ASKED], []),
    "safe_rlhf": (
        {"prompt": "Say tea.", "response_0": "no", "response_1": "tea", "better_response_id": 1, **SAFETY},
        [ASKED],
        list(SAFETY),
    ),
    "shp": ({"post_id": "x", "history": "Say tea.", "human_ref_A": "tea", "human_ref_B": "no", "labels": 1}, [ASKED], ["post_id"]),
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
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_each_format_is_detected_and_read(source, name):
    row, prompt, unread = SHAPES[name]
    found = load(source(row))
    assert found.format == name.split()[0]
    (comparison,) = found.comparisons
    assert list(comparison.prompt) == prompt
    assert dict(zip(comparison.responses, comparison.ranks, strict=True)) == {"tea": 0, "no": 1}
    assert found.unread == unread


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        # "I say" is not a prompt
        ({"query": "q", "chosen": "I say yes", "rejected": "I say no"}, ["pairs", "columns.prompt: query", "implicit"]),
        ({"promt": "q", "chosen": "I say yes", "rejected": "I say no"}, ["columns.prompt: promt"]),
        ({"chosen": "yes", "rejected": HH["rejected"]}, ["pairs", "missing: prompt"]),
        ({"chosen": None, "rejected": "no"}, ["pairs", "missing: prompt"]),
        ({"prompt": "q", "responses": ["a", "b"], "rewards": [1, 2]}, ["ranked", "ranks or scores", "columns.scores: rewards"]),
        ({"Question": "q", "completions": []}, ["ultrafeedback", "columns.instruction: Question"]),
        ({"a": 1}, ["found: a", "pairs", "missing: prompt, chosen, rejected"]),
        ({}, ["found: none", "pairs"]),
    ],
)  # fmt: skip
def test_the_nearest_format_is_named_if_none_fits(row, parts):
    with pytest.raises(UserError, match="nearest format") as error:
        detect(list(row), row)
    assert error.value.code == "missing-column"
    assert [part for part in parts if part not in str(error.value)] == []


def test_a_named_format_is_used_even_if_the_first_row_does_not_fit():
    row = {"chosen": "yes", "rejected": "no"}
    assert find("implicit", list(row), row).name == "implicit"
    with pytest.raises(UserError, match="missing: prompt, answers"):
        find("nectar", list(row), row)
    with pytest.raises(UserError, match="Did you mean pairs") as error:
        find("pair", list(row), row)
    assert (error.value.code, error.value.key) == ("unknown-name", "data.format")


def parse(name, row):
    return FORMATS[name].parse(row)


def test_values_of_each_format():
    assert parse("ultrafeedback_binarized", BINARIZED)[:5] == (
        (user("q"),),
        ("yes", "no"),
        (0, 1),
        (8.5, 7.0),
        None,
    )
    assert parse("ranked", RANKED)[:5] == ((user("q"),), ("a", "b", "c"), (1, 0, 2), None, None)
    assert parse("ranked", {**RANKED, "ranks": [7, -2, 7]}).ranks == (1, 0, 1)
    scored = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, 2, 0.5]}
    assert parse("ranked", scored)[:5] == ((user("q"),), ("a", "b", "c"), (1, 0, 1), (0.5, 2.0, 0.5), None)
    both = parse("ranked", {**scored, "ranks": [0, 1, 2]})
    assert (both.ranks, both.scores) == ((0, 1, 2), (0.5, 2.0, 0.5))
    assert parse("nectar", NECTAR)[:5] == (
        (user("p"), assistant("r"), user("q")), ("a", "b", "c"), (1, 0, 2), None, None,
    )  # fmt: skip
    shp = parse("shp", {**SHAPES["shp"][0], "labels": 0, "score_A": 4, "score_B": 9})
    assert (shp.responses, shp.ranks, shp.scores) == (("tea", "no"), (1, 0), (4.0, 9.0))


def test_a_pair_needs_both_scores_or_none():
    scores = {"score_chosen": 2, "score_rejected": 1}
    assert parse("pairs", PAIR).scores is None
    for name, row in (("pairs", PAIR), ("hh", HH), ("implicit", TALK)):
        assert parse(name, {**row, **scores}).scores == (2.0, 1.0)
    assert parse("pairs", {**PAIR, "score_chosen": None, "score_rejected": None}).scores is None
    with pytest.raises(FieldError, match=r"^score_rejected: found null$"):
        parse("pairs", {**PAIR, "score_chosen": 2, "score_rejected": None})


def test_spans_in_the_names_of_axolotl():
    """The example of its documentation: the end of a detail is its last character. Segments spell the reply."""
    text = "I'm doing very well, thank you!"
    detail = [
        {"begin_offset": 0, "end_offset": 8, "train": False},
        {"begin_offset": 9, "end_offset": 18, "train": True, "weight": 0.5},
        {"begin_offset": 19, "end_offset": 30, "train": False, "weight": 3},
    ]
    segments = [
        {"label": True, "text": "I'm "},
        {"label": False, "text": ""},
        {"label": True, "text": text[4:], "weight": -2},
    ]
    row = {"prompt": "q", "responses": [text, text], "ranks": [0, 1], "spans": [detail, segments]}
    first, second = parse("ranked", row).spans
    assert first == (Span(0, 9, 0.0), Span(9, 19, 0.5), Span(19, 31, 0.0))
    assert [text[span.start : span.end] for span in first] == ["I'm doing", " very well", ", thank you!"]
    assert second == (Span(0, 4, 1.0), Span(4, 31, -2.0))


def test_ranked_rows_of_conversations_with_spans():
    talk = [user("a"), assistant("b"), user("c")]
    row = {
        "prompt": talk,
        "responses": [[*talk, assistant("good word")], [assistant("bad")]],
        "ranks": [0, 1],
        "spans": [[[0, 4, 1.5], [5, 9, 1]], []],
    }
    found = parse("ranked", row)
    assert found.prompt == tuple(talk)
    assert found.responses == ("good word", "bad")
    assert found.spans == ((Span(0, 4, 1.5), Span(5, 9, 1.0)), ())
    several = [[assistant("a"), user("b"), assistant("c")], "d"]
    found = parse("ranked", {**row, "responses": several, "spans": None})
    assert (found.responses, found.turns) == (("a\nc", "d"), (tuple(several[0]), None))
    with pytest.raises(Unusable, match="does not end with the assistant"):
        parse("ranked", {**row, "responses": [[assistant("a"), user("b")], "c"]})


def test_ultrafeedback_uses_one_scale_for_all_completions():
    found = parse("ultrafeedback", ULTRAFEEDBACK)
    assert found[:5] == ((user("q"),), ("a", "b", "c"), (1, 0, 1), (6.5, 8.0, 6.5), None)
    first, *others = ULTRAFEEDBACK["completions"]
    without = {**ULTRAFEEDBACK, "completions": [{**first, "overall_score": None}, *others]}
    assert parse("ultrafeedback", without)[2:4] == ((1, 2, 0), (4.0, 3.0, 5.0))


MALFORMED = [
    ("pairs", PAIR, {"chosen": None}, "chosen: found null"),
    ("pairs", PAIR, {"chosen": 3}, "chosen: found the number 3"),
    ("pairs", PAIR, {"prompt": {"a": 1}}, "prompt: found an object"),
    ("pairs", PAIR, {"chosen": [5]}, "chosen[0]: found the number 5"),
    ("pairs", PAIR, {"chosen": [{"role": "user"}]}, "chosen[0].content: missing"),
    ("pairs", PAIR, {"chosen": [{"role": 1, "content": ""}]}, "chosen[0].role: found the number 1"),
    ("pairs", PAIR, {"chosen": "a\ud83d"}, "chosen: holds half of a surrogate pair at character 1"),
    ("pairs", PAIR, {"score_chosen": "7", "score_rejected": 1}, "score_chosen: found text"),
    ("pairs", PAIR, {"rejected": ["no", 5]}, "rejected[1]: found the number 5"),
    ("pairs", PAIR, {"rejected": ["a", "b"], "score_chosen": 1, "score_rejected": 0}, "score_chosen: is one score for several"),
    ("hh", HH, {"rejected": [user("q")]}, "rejected: found a list of 1"),
    ("ranked", RANKED, {"ranks": [0, 1]}, "ranks: found 2 for 3"),
    ("ranked", RANKED, {"ranks": [0, 1, 1.5]}, "ranks[2]: found the number 1.5"),
    ("ranked", RANKED, {"ranks": [0, True, 2]}, "ranks[1]: found true"),
    ("ranked", RANKED, {"ranks": None}, "ranks: found null"),
    ("ranked", RANKED, {"scores": [1, 2, float("nan")]}, "scores[2]: found the number nan"),
    ("ranked", RANKED, {"responses": "abc"}, "responses: found text"),
    ("ranked", RANKED, {"responses": ["a", None, "c"]}, "responses[1]: found null"),
    ("ranked", RANKED, {"spans": [[], [[0, 1]], []]}, "spans[1][0]: found a list of 2"),
    ("ranked", RANKED, {"spans": [[[0, 2, 1]], [], []]}, "spans[0][0]: found characters 0 to 2"),
    ("ranked", RANKED, {"spans": [[[0, 0, 1]], [], []]}, "spans[0][0]: found characters 0 to 0"),
    ("ranked", RANKED, {"spans": [[{"label": True, "text": "other"}], [], []]}, "spans[0][0].text: characters 0 to 5"),
    ("ranked", RANKED, {"spans": [[{"label": True, "text": ""}], [], []]}, "spans[0]: found segments of 0 characters"),
    ("ranked", RANKED, {"spans": [[{"begin_offset": 0, "train": True}], [], []]}, "spans[0][0].end_offset: missing"),
    ("ranked", RANKED, {"spans": [[{"begin_offset": 0, "end_offset": 0, "train": 1}], [], []]}, "spans[0][0].train: found the number 1"),
    ("ultrafeedback", ULTRAFEEDBACK, {"completions": [{"response": "a"}]}, "completions[0].fine-grained_score: missing"),
    ("ultrafeedback", ULTRAFEEDBACK, {"completions": ["a"]}, "completions[0]: found text"),
    ("ultrafeedback", ULTRAFEEDBACK, {"instruction": None}, "instruction: found null"),
    ("nectar", NECTAR, {"answers": [{"answer": "a"}]}, "answers[0].rank: missing"),
    ("nectar", NECTAR, {"answers": [{"answer": None, "rank": 1}]}, "answers[0].answer: found null"),
    ("safe_rlhf", SHAPES["safe_rlhf"][0], {"better_response_id": 2}, "better_response_id: found the number 2, expected 0"),
    ("shp", SHAPES["shp"][0], {"labels": 3}, "labels: found the number 3, expected 1"),
    ("openai", SHAPES["openai"][0], {"input": {"tools": []}}, "input.messages: missing; found only tools"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "change", "problem"), MALFORMED)
def test_a_malformed_field_is_named_with_what_was_found(name, row, change, problem):
    with pytest.raises(FieldError) as error:
        parse(name, {**row, **change})
    assert str(error.value).startswith(problem)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"system": 3}, "system: found the number 3, expected text"),
        (
            {"prompt": [{"role": "system", "content": "Be long."}, ASKED]},
            "system: the prompt begins with another",
        ),
        ({"tools": "weather"}, "tools: found text"),
    ],
)
def test_a_malformed_column_beside_any_format_is_named_with_its_row(source, change, problem):
    row = SHAPES["pairs"][0]
    with pytest.raises(UserError) as error:
        load(source(row, {**row, **change}))
    assert error.value.code == "malformed-rows"
    assert f"rows.jsonl:2: {problem}" in str(error.value)


def test_cells_of_a_table_are_parsed_where_numbers_or_lists_are_expected():
    def cells(name, **values):
        return parse(name, {field: Cell(value) for field, value in values.items()})

    found = cells("ranked", prompt="2", responses='["1", "[2]"]', ranks="[1, 0]", scores="", spans="")
    assert found[:5] == ((user("2"),), ("1", "[2]"), (1, 0), None, None)
    found = cells(
        "pairs", prompt="null", chosen="[1, 2]", rejected="None", score_chosen="7.5", score_rejected="1"
    )
    assert found[:5] == ((user("null"),), ("[1, 2]", "None"), (0, 1), (7.5, 1.0), None)
    assert {type(text) for text in found.responses} == {str}
    messages = '[{"role": "assistant", "content": "yes"}]'
    assert cells("pairs", prompt="q", chosen=messages, rejected="[{no").responses == ("yes", "[{no")


def test_renaming():
    row = {"a": 1, "chosen": 2, "rejected": 3, "prompt": 4}
    assert renamed(row, {"prompt": "a"}) == {"prompt": 1, "chosen": 2, "rejected": 3}
    swapped = {"a": 1, "chosen": 3, "rejected": 2, "prompt": 4}
    assert renamed(row, {"chosen": "rejected", "rejected": "chosen"}) == swapped
    present = ["instruction", "chosen", "rejected"]
    check_columns({"prompt": "instruction"}, present)
    for columns, code in (
        ({"prompt": "instructon"}, "missing-column"),
        ({"promt": "instruction"}, "unknown-name"),
    ):
        with pytest.raises(UserError, match="Did you mean") as error:
            check_columns(columns, present)
        assert (error.value.code, error.value.key) == (code, f"data.columns.{next(iter(columns))}")


def test_a_repeated_system_message_is_added_once(source):
    row = {"system": "Be brief.", "prompt": [SYSTEM, ASKED], "chosen": "tea", "rejected": "no"}
    assert list(load(source(row)).comparisons[0].prompt) == [SYSTEM, ASKED]
    row = {"rule": "Be brief.", "prompt": [ASKED], "chosen": "tea", "rejected": "no"}
    found = load(source(row), columns={"system": "rule"})
    assert (list(found.comparisons[0].prompt), found.unread) == ([SYSTEM, ASKED], [])


def test_several_replies_of_a_side_are_tied(source):
    found = load(source({"prompt": "q", "chosen": "a", "rejected": ["b", "c"]})).comparisons[0]
    assert (found.responses, found.ranks) == (("a", "b", "c"), (0, 1, 1))
    talks = [[assistant("b")], [assistant("c")]]
    found = load(source({"prompt": [ASKED], "chosen": ["a", "d"], "rejected": talks})).comparisons[0]
    assert (found.responses, found.ranks) == (("a", "d", "b", "c"), (0, 0, 1, 1))


def test_alpacas_input_is_not_lost_if_instruction_is_mapped_to_prompt(source):
    rows = [{"instruction": "Say it.", "input": f"tea {n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    found = load(source(*rows), columns={"prompt": "instruction"})
    assert [row.prompt[0]["content"] for row in found.comparisons] == [f"Say it.\ntea {n}" for n in range(3)]
    assert load(source(*rows), columns={"prompt": "instruction"}, format="pairs").unread == ["input"]


def test_columns_that_are_not_read_are_collected_over_all_rows(source):
    row = {"question": "q", "prompt": "other", "chosen": "a", "rejected": "b"}
    found = load(source(row, {**row, "question": "r", "note": 1}), columns={"prompt": "question"})
    assert found.unread == ["prompt", "note"]


def test_whole_conversations_beside_a_conversation_are_not_replies_to_it(source):
    talk = [ASKED, assistant("tea")]
    found = load(source({"conversations": talk, "chosen": talk, "rejected": [ASKED, assistant("no")]}))
    assert (found.format, found.unread) == ("implicit", ["conversations"])


ROLE = st.sampled_from(["user", "assistant", "tool", "system"])
OPTIONAL = {
    "weight": st.sampled_from([0, 1]),
    "tool_calls": st.just([{"name": "f"}]),
    "thinking": st.just("t"),
}
TURN = st.fixed_dictionaries({"role": ROLE, "content": st.sampled_from(["", "a", "b"])}, optional=OPTIONAL)
TALKS = st.lists(TURN, max_size=4)
ROW = st.fixed_dictionaries({"prompt": TALKS, "chosen": TALKS, "rejected": TALKS})


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(ROW, min_size=1, max_size=6))
def test_no_row_of_messages_is_lost(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("talks") / "rows.json"
    path.write_text(json.dumps(rows))
    found = load(path, format="pairs")
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


def test_unpaired_rows_are_good_or_bad_and_may_repeat_or_contradict(source, tmp_path):
    for label, rank in ((True, 0), (False, 1), (1, 0), (0, 1)):
        found = load(source({"prompt": "q", "completion": [assistant("a")], "label": label}))
        assert (found.format, found.comparisons[0].responses) == ("unpaired", ("a",))
        assert found.comparisons[0].ranks == (rank,)
    labels = {"a": [True, True], "b": [False, True], "c": [False], " ": [True]}
    rows = [{"prompt": "q", "completion": text, "label": label} for text in labels for label in labels[text]]
    expected = {"read": 6, "kept": 2, "duplicate": 1, "contradictory": 2, "empty response": 1}
    assert load(source(*rows)).counts == expected
    with pytest.raises(UserError, match=r"rows.jsonl:1: label: found text"):
        load(source({**rows[0], "label": "good"}))
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion,label\nq,a,True\nq,b,false\nq,c,0\n")
    assert [row.ranks for row in load(table).comparisons] == [(0,), (1,), (1,)]


def test_each_item_of_a_list_has_its_own_format(source):
    pairs = source({"prompt": "q", "chosen": "a", "rejected": "b"}, name="a.jsonl")
    alone = source({"prompt": "q", "completion": "c", "label": False, "id": 1}, name="b.jsonl")
    found = load([pairs, alone])
    assert (found.format, found.unread) == ("pairs, unpaired", ["id"])
    assert [row.ranks for row in found.comparisons] == [(0, 1), (1,)]
    assert load([pairs, alone], limit=1).counts == {"read": 1, "kept": 1}


def test_the_advice_for_stepwise_rows_works(source):
    steps = {"prompt": "q", "completions": ["a ", "b"], "labels": [True, False]}
    with pytest.raises(UserError, match=r"stepwise rows.*label true if every step is correct") as error:
        load(source(steps))
    assert error.value.code == "unknown-format"
    followed = {"prompt": "q", "completion": "".join(steps["completions"]), "label": all(steps["labels"])}
    assert load(source(followed)).comparisons[0].ranks == (1,)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "response": "tea", "label": True, "system": "Be brief."},
        {"system": "Be brief.", "question": "q", "chosen": "tea", "rejected": "no"},
    ],
)
def test_the_advice_for_a_column_with_another_name_works(source, row):
    path = source(row)
    with pytest.raises(UserError) as error:
        load(path)
    ours, theirs = str(error.value).split("set columns.")[1].split(")")[0].split(": ")
    found = load(path, columns={ours: theirs})
    assert found.comparisons[0].prompt[0] == SYSTEM
    assert found.unread == []


def test_the_advice_for_a_column_of_rows_in_memory_works():
    row = {"prompt": "q", "good": "tea", "bad": "no"}
    for _ in range(2):
        with pytest.raises(UserError) as error:
            from_rows([row], name="rows")
        theirs, ours = re.search(r"did you mean (\w+)\? rename it to (\w+)", str(error.value)).groups()
        row[ours] = row.pop(theirs)
    assert from_rows([row], name="rows").comparisons[0].responses == ("tea", "no")


@pytest.mark.parametrize(
    "row", [{"prompt": "q"}, {"prompt": "q", "system": "Be brief."}, {"prompt": "q", "id": 1}]
)
def test_rows_of_prompts_alone_are_told_who_takes_them(source, row):
    with pytest.raises(UserError, match=r"pairs .*missing: chosen, rejected · only ReinforceTrainer"):
        load(source(row))


def test_a_prompt_with_one_response():
    found = answered(
        {"system": "Be brief.", "prompt": "Say tea.", "response": [assistant("tea")], "tools": [{"a": 1}]}
    )
    assert (list(found.prompt), found.response.text, found.tools) == ([SYSTEM, ASKED], "tea", ({"a": 1},))
    with pytest.raises(FieldError, match="response: empty response"):
        answered({"prompt": "q", "response": []})
