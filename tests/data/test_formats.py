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
    ("row", "parts"),
    [
        # "I say" is no prompt
        (
            {"query": "q", "chosen": "I say yes", "rejected": "I say no"},
            ["pairs", "data.columns.prompt: query", "data.format: implicit"],
        ),
        ({"promt": "q", "chosen": "I say yes", "rejected": "I say no"}, ["data.columns.prompt: promt"]),
        ({"chosen": "yes", "rejected": "no"}, ["pairs", "missing: prompt"]),
        (
            {"question": "q", "chosen": [assistant("yes")], "rejected": []},
            ["pairs", "did you mean question?"],
        ),
        ({"chosen": "yes", "rejected": HH["rejected"]}, ["pairs"]),
        ({"chosen": HH["chosen"], "rejected": "no"}, ["pairs"]),
        ({"chosen": None, "rejected": "no"}, ["pairs", "missing: prompt"]),
        (
            {"prompt": "q", "responses": ["a", "b"], "rewards": [1, 2]},
            ["ranked", "missing: ranks or scores", "data.columns.scores: rewards"],
        ),
        ({"Question": "q", "completions": []}, ["ultrafeedback", "data.columns.instruction: Question"]),
        ({"a": 1}, ["found: a", "pairs", "missing: prompt, chosen, rejected"]),
        ({}, ["found: none", "pairs"]),
    ],
)
def test_what_fits_nothing_is_told_the_nearest(row, parts):
    with pytest.raises(UserError, match="nearest format") as error:
        detect(list(row), row)
    assert [part for part in parts if part not in str(error.value)] == []


def test_a_named_format_is_taken_even_if_the_first_row_does_not_show_it():
    row = {"chosen": "yes", "rejected": "no"}
    assert find("implicit", list(row), row).name == "implicit"
    with pytest.raises(UserError, match="missing: prompt, answers"):
        find("nectar", list(row), row)
    with pytest.raises(UserError, match="Did you mean pairs"):
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


MALFORMED = {
    "pairs": (
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        [
            ({"chosen": None}, "chosen: found null"),
            ({"chosen": 3}, "chosen: found the number 3"),
            ({"prompt": {"a": 1}}, "prompt: found an object"),
            ({"chosen": [5]}, "chosen[0]: found the number 5"),
            ({"chosen": [{"role": "user"}]}, "chosen[0].content: missing"),
            ({"chosen": [{"role": "user", "content": None}]}, "chosen[0].content: found null"),
            ({"chosen": [{"role": 1, "content": ""}]}, "chosen[0].role: found the number 1"),
            ({"chosen": "a\ud83d"}, "chosen: holds half of a surrogate pair at character 1"),
            ({"score_chosen": "7", "score_rejected": 1}, "score_chosen: found text"),
        ],
    ),
    "hh": (HH, [({"rejected": [user("q")]}, "rejected: found a list of 1")]),
    "ranked": (
        RANKED,
        [
            ({"ranks": [0, 1]}, "ranks: found 2 for 3"),
            ({"ranks": [0, 1, 1.5]}, "ranks[2]: found the number 1.5"),
            ({"ranks": [0, True, 2]}, "ranks[1]: found true"),
            ({"ranks": ["0", 1, 2]}, "ranks[0]: found text"),
            ({"ranks": None}, "ranks: found null"),
            ({"scores": [1, 2, float("nan")]}, "scores[2]: found the number nan"),
            ({"responses": "abc"}, "responses: found text"),
            ({"responses": ["a", None, "c"]}, "responses[1]: found null"),
            ({"spans": [[], []]}, "spans: found 2 for 3"),
            ({"spans": [[], [[0, 1]], []]}, "spans[1][0]: found a list of 2"),
            ({"spans": [[[0, 2, 1]], [], []]}, "spans[0][0]: found characters 0 to 2"),
            ({"spans": [[[0, 0, 1]], [], []]}, "spans[0][0]: found characters 0 to 0"),
        ],
    ),
    "ultrafeedback": (
        ULTRAFEEDBACK,
        [
            ({"completions": [{"response": "a"}]}, "completions[0].fine-grained_score: missing"),
            ({"completions": ["a"]}, "completions[0]: found text"),
            ({"instruction": None}, "instruction: found null"),
        ],
    ),
    "nectar": (
        NECTAR,
        [
            ({"answers": [{"answer": "a"}]}, "answers[0].rank: missing"),
            ({"answers": [{"answer": None, "rank": 1}]}, "answers[0].answer: found null"),
        ],
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_field_is_named_with_what_was_found(name):
    row, changes = MALFORMED[name]
    for change, found in changes:
        with pytest.raises(FieldError) as error:
            parse(name, {**row, **change})
        assert str(error.value).startswith(found)


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
    with pytest.raises(UserError, match="no column instructon"):
        check_columns({"prompt": "instructon"}, present)
    with pytest.raises(UserError, match="no format reads promt"):
        check_columns({"promt": "instruction"}, present)
