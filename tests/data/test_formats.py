"""Each published shape of row is recognised and read; what is malformed is named with what was found."""

import pytest

from tokenward.data.fields import Cell, FieldError, Unusable
from tokenward.data.formats import FORMATS, check_columns, detect, find, renamed
from tokenward.data.parsers import dense
from tokenward.errors import UserError
from tokenward.types import Span


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


TALK = {"chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}
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
        ({"prompt": "q", "chosen": "yes", "rejected": "no"}, "pairs"),
        ({"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}, "pairs"),
        ({"prompt": "q", "chosen": "yes", "rejected": "no", "score_chosen": 1, "score_rejected": 0}, "pairs"),
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


def test_names_are_the_keys():
    assert {name: shape.name for name, shape in FORMATS.items()} == {name: name for name in FORMATS}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"query": "q", "chosen": "I say yes", "rejected": "I say no"},  # "I say" is no prompt
            "columns found: query, chosen, rejected · nearest format: pairs (prompt, chosen, "
            "rejected), missing: prompt (did you mean query? set data.columns.prompt: query) · chosen and rejected "
            "begin alike: set data.format: implicit",
        ),
        (
            {"promt": "q", "chosen": "I say yes", "rejected": "I say no"},
            "missing: prompt (did you mean promt? set data.columns.prompt: promt)",
        ),
        (
            {"chosen": "yes", "rejected": "no"},
            "pairs (prompt, chosen, rejected), missing: prompt · chosen and rejected alone are read where both "
            "begin with their prompt, and here they do not",
        ),
        (
            {"question": "q", "chosen": [assistant("yes")], "rejected": [assistant("no")]},
            "nearest format: pairs (prompt, chosen, rejected), missing: prompt (did you mean question?",
        ),
        ({"chosen": "yes", "rejected": HH["rejected"]}, "nearest format: pairs"),
        ({"chosen": HH["chosen"], "rejected": "no"}, "nearest format: pairs"),
        (
            {"chosen": None, "rejected": "no"},
            "nearest format: pairs (prompt, chosen, rejected), missing: prompt",
        ),
        (
            {"prompt": "q", "responses": ["a", "b"], "rewards": [1, 2]},
            "nearest format: ranked (prompt, responses, ranks or scores), missing: ranks or scores "
            "(did you mean rewards? set data.columns.scores: rewards)",
        ),
        (
            {"Question": "q", "completions": []},
            "nearest format: ultrafeedback (instruction, completions), missing: instruction "
            "(did you mean Question? set data.columns.instruction: Question)",
        ),
        (
            {"a": 1},
            "found: a · nearest format: pairs (prompt, chosen, rejected), missing: prompt, chosen, rejected",
        ),
        ({}, "columns found: none · nearest format: pairs"),
    ],
)
def test_what_fits_nothing_is_told_the_nearest(row, message):
    with pytest.raises(UserError) as error:
        detect(list(row), row)
    assert message in str(error.value)


def test_a_named_format_is_taken_even_if_the_first_row_does_not_show_it():
    row = {"chosen": "yes", "rejected": "no"}
    assert find("implicit", list(row), row).name == "implicit"
    with pytest.raises(
        UserError, match=r"columns found: chosen, rejected · format: nectar .* missing: prompt, answers"
    ):
        find("nectar", list(row), row)
    with pytest.raises(
        UserError, match=r"data\.format: pair is no format\. Did you mean pairs\? There are: auto, hh, "
    ):
        find("pair", list(row), row)


def parse(name, row):
    return FORMATS[name].parse(row)


def test_ultrafeedback_binarized_as_it_is():
    parsed = parse("ultrafeedback_binarized", BINARIZED)
    assert parsed[:5] == ((user("q"),), ("yes", "no"), (0, 1), (8.5, 7.0), None)


def test_a_pair_needs_both_scores_or_none():
    pair = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    assert parse("pairs", pair).scores is None
    assert parse("pairs", {**pair, "score_chosen": 2, "score_rejected": 1}).scores == (2.0, 1.0)
    assert parse("hh", {**HH, "score_chosen": 2, "score_rejected": 1}).scores == (2.0, 1.0)
    assert parse("implicit", {**TALK, "score_chosen": 2, "score_rejected": 1}).scores == (2.0, 1.0)
    assert parse("pairs", {**pair, "score_chosen": None, "score_rejected": None}).scores is None
    with pytest.raises(FieldError, match=r"^score_rejected: found null$"):
        parse("pairs", {**pair, "score_chosen": 2, "score_rejected": None})


def test_ranked():
    assert parse("ranked", RANKED)[:5] == ((user("q"),), ("a", "b", "c"), (1, 0, 2), None, None)
    assert parse("ranked", {**RANKED, "ranks": [7, -2, 7]}).ranks == (1, 0, 1)
    scored = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, 2, 0.5]}
    assert parse("ranked", scored)[:5] == ((user("q"),), ("a", "b", "c"), (1, 0, 1), (0.5, 2.0, 0.5), None)
    both = parse("ranked", {**scored, "ranks": [0, 1, 2]})
    assert (both.ranks, both.scores) == ((0, 1, 2), (0.5, 2.0, 0.5))
    assert parse("ranked", {**scored, "ranks": None}).ranks == (1, 0, 1)


def test_ranked_takes_messages_and_spans():
    talk = [user("p"), assistant("r"), user("q")]
    row = {
        "prompt": talk,
        "responses": [[assistant("good word")], [*talk, assistant("bad")]],
        "ranks": [0, 1],
        "spans": [[[0, 4, 1.5], [5, 9, 1]], []],
    }
    parsed = parse("ranked", row)
    assert parsed.prompt == tuple(talk)
    assert parsed.responses == ("good word", "bad")
    assert parsed.spans == ((Span(0, 4, 1.5), Span(5, 9, 1.0)), ())
    several = [[assistant("a"), user("b"), assistant("c")], "d"]
    parsed = parse("ranked", {**row, "responses": several, "spans": None})
    assert parsed.responses == ("a\nc", "d")
    assert parsed.turns == (tuple(several[0]), None)
    with pytest.raises(Unusable, match="does not end with the assistant"):
        parse("ranked", {**row, "responses": [[assistant("a"), user("b")], "c"]})


def test_ultrafeedback_uses_one_scale_for_all_completions():
    parsed = parse("ultrafeedback", ULTRAFEEDBACK)
    assert parsed[:5] == ((user("q"),), ("a", "b", "c"), (1, 0, 1), (6.5, 8.0, 6.5), None)
    first, *others = ULTRAFEEDBACK["completions"]
    without = {**ULTRAFEEDBACK, "completions": [{**first, "overall_score": None}, *others]}
    assert parse("ultrafeedback", without)[2:4] == ((1, 2, 0), (4.0, 3.0, 5.0))


def test_nectar_counts_from_one_and_its_prompt_is_a_transcript():
    parsed = parse("nectar", NECTAR)
    assert parsed[:5] == ((user("p"), assistant("r"), user("q")), ("a", "b", "c"), (1, 0, 2), None, None)


def test_dense_ranks():
    assert dense([5, -1, 5, 2.5]) == (2, 0, 2, 1)
    assert dense([]) == ()


PAIR = {"prompt": "q", "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("pairs", {"prompt": "q", "chosen": "yes"}, "rejected: missing; found only prompt, chosen"),
        ("pairs", {**PAIR, "chosen": None}, "chosen: found null"),
        ("pairs", {**PAIR, "chosen": 3}, "chosen: found the number 3, expected text or a list of messages"),
        (
            "pairs",
            {**PAIR, "prompt": {"a": 1}},
            "prompt: found an object, expected text or a list of messages",
        ),
        ("pairs", {**PAIR, "chosen": [5]}, "chosen[0]: found the number 5, expected an object"),
        ("pairs", {**PAIR, "chosen": [{"role": "user"}]}, "chosen[0].content: missing; found only role"),
        ("pairs", {**PAIR, "chosen": [{"role": "user", "content": None}]}, "chosen[0].content: found null"),
        (
            "pairs",
            {**PAIR, "chosen": [{"role": 1, "content": ""}]},
            "chosen[0].role: found the number 1, expected text",
        ),
        ("pairs", {**PAIR, "chosen": "a\ud83d"}, "chosen: holds half of a surrogate pair at character 1"),
        (
            "pairs",
            {**PAIR, "score_chosen": "7", "score_rejected": 1},
            "score_chosen: found text, expected a finite number",
        ),
        ("hh", {**HH, "rejected": [user("q")]}, "rejected: found a list of 1, expected text"),
        ("ranked", {**RANKED, "ranks": [0, 1]}, "ranks: found 2 for 3 responses"),
        (
            "ranked",
            {**RANKED, "ranks": [0, 1, 1.5]},
            "ranks[2]: found the number 1.5, expected a whole number",
        ),
        ("ranked", {**RANKED, "ranks": [0, True, 2]}, "ranks[1]: found true, expected a finite number"),
        ("ranked", {**RANKED, "ranks": ["0", 1, 2]}, "ranks[0]: found text, expected a finite number"),
        ("ranked", {**RANKED, "ranks": None}, "ranks: found null"),
        (
            "ranked",
            {**RANKED, "scores": [1, 2, float("nan")]},
            "scores[2]: found the number nan, expected a finite",
        ),
        ("ranked", {**RANKED, "responses": "abc"}, "responses: found text, expected a list"),
        (
            "ranked",
            {**RANKED, "responses": ["a", None, "c"]},
            "responses[1]: found null, expected text or a list",
        ),
        ("ranked", {**RANKED, "spans": [[], []]}, "spans: found 2 for 3 responses"),
        (
            "ranked",
            {**RANKED, "spans": [[], [[0, 1]], []]},
            "spans[1][0]: found a list of 2, expected [start, end, value]",
        ),
        (
            "ranked",
            {**RANKED, "spans": [[[0, 2, 1]], [], []]},
            "spans[0][0]: found characters 0 to 2, expected 0 <=",
        ),
        ("ranked", {**RANKED, "spans": [[[0, 0, 1]], [], []]}, "spans[0][0]: found characters 0 to 0"),
        (
            "ultrafeedback",
            {**ULTRAFEEDBACK, "completions": [{"response": "a"}]},
            "completions[0].fine-grained_score: missing",
        ),
        (
            "ultrafeedback",
            {**ULTRAFEEDBACK, "completions": ["a"]},
            "completions[0]: found text, expected an object",
        ),
        ("ultrafeedback", {**ULTRAFEEDBACK, "instruction": None}, "instruction: found null"),
        ("nectar", {**NECTAR, "answers": [{"answer": "a"}]}, "answers[0].rank: missing; found only answer"),
        ("nectar", {**NECTAR, "answers": [{"answer": None, "rank": 1}]}, "answers[0].answer: found null"),
    ],
)
def test_a_malformed_field_is_named_with_what_was_found(name, row, message):
    with pytest.raises(FieldError) as error:
        parse(name, row)
    assert str(error.value).startswith(message)


def test_cells_of_a_table_are_parsed_where_numbers_or_lists_are_due():
    cells = {"prompt": "2", "responses": '["1", "[2]"]', "ranks": "[1, 0]", "scores": "", "spans": ""}
    parsed = parse("ranked", {name: Cell(value) for name, value in cells.items()})
    assert parsed[:5] == ((user("2"),), ("1", "[2]"), (1, 0), None, None)
    cells = {
        "prompt": "null",
        "chosen": "[1, 2]",
        "rejected": "None",
        "score_chosen": "7.5",
        "score_rejected": "1",
    }
    parsed = parse("pairs", {name: Cell(value) for name, value in cells.items()})
    assert parsed[:5] == ((user("null"),), ("[1, 2]", "None"), (0, 1), (7.5, 1.0), None)
    assert {type(text) for text in parsed.responses} == {str}
    cells = {"prompt": "q", "chosen": '[{"role": "assistant", "content": "yes"}]', "rejected": "[{no"}
    assert parse("pairs", {name: Cell(value) for name, value in cells.items()}).responses == ("yes", "[{no")


def test_renaming():
    row = {"a": 1, "chosen": 2, "rejected": 3, "prompt": 4}
    assert renamed(row, {"prompt": "a"}) == {"prompt": 1, "chosen": 2, "rejected": 3}
    assert renamed(row, {"chosen": "rejected", "rejected": "chosen"}) == {
        "a": 1,
        "chosen": 3,
        "rejected": 2,
        "prompt": 4,
    }
    assert renamed(row, {"prompt": "b"}) == {"a": 1, "chosen": 2, "rejected": 3}


def test_renaming_is_checked():
    present = ["instruction", "chosen", "rejected"]
    check_columns({"prompt": "instruction"}, present)
    with pytest.raises(UserError) as error:
        check_columns({"prompt": "instructon"}, present)
    expected = "data.columns.prompt: there is no column instructon. Did you mean instruction? columns found: "
    assert str(error.value) == expected + "instruction, chosen, rejected"
    with pytest.raises(
        UserError, match=r"data\.columns\.promt: no format reads promt\. Did you mean prompt\? .*score_chosen"
    ):
        check_columns({"promt": "instruction"}, present)
