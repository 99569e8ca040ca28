"""Question files of the benchmarks, and answer files as their own tools read them."""

import json
import re

import pytest

from tokenward.data import rows
from tokenward.errors import UserError
from tokenward.evaluation.benchmarks import read_questions, write_answers
from tokenward.sampling import Reply

NOW = 1764072000.5
ALPACA = [{"dataset": "helpful_base", "instruction": "Why?", "output": "o", "generator": "g"}]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 111, "category": "math", "turns": ["2+2?", "And 3?"], "reference": ["4", "5"]},
    {"question_id": 151, "category": "stem", "turns": ["What?", "Why?"]},
    {"question_id": 200, "category": "gardening", "turns": ["When?"]},
]
ARENA = [{"uid": "a1", "category": "hard_prompt", "subcategory": "coding", "prompt": "Code."}]
ARENA_01 = [
    {"question_id": "b2", "category": "arena-hard-v0.1", "cluster": "c", "turns": [{"content": "Code."}]}
]


def numbered(found):
    return [(f"q.jsonl:{number}", row) for number, row in enumerate(found, 1)]


def reply(text):
    return Reply([1, 2, 3], text, True)


def written(tmp_path, benchmark, found, replies):
    questions = read_questions(benchmark, numbered(found))
    return write_answers(benchmark, tmp_path, "mine", questions, replies, now=NOW)


def test_alpaca_eval_is_one_list_with_the_tools_four_fields(tmp_path):
    path = written(tmp_path, "alpaca_eval", ALPACA, [[reply("Because — so.")]])
    assert path == tmp_path / "alpaca_eval" / "mine" / "model_outputs.json"
    assert json.loads(path.read_text()) == [{**ALPACA[0], "output": "Because — so.", "generator": "mine"}]


def test_mt_bench_answers_have_a_text_per_turn(tmp_path):
    texts = [["w1", "w2"], ["4", "5"], ["s1", "s2"], ["May"]]
    path = written(tmp_path, "mt_bench", MT_BENCH, [list(map(reply, turns)) for turns in texts])
    assert path == tmp_path / "mt_bench" / "model_answer" / "mine.jsonl"
    answers = list(map(json.loads, path.read_text().splitlines()))
    assert set(answers[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert [(a["question_id"], a["model_id"], a["tstamp"]) for a in answers[:1]] == [(81, "mine", NOW)]
    assert [answer["choices"] for answer in answers] == [[{"index": 0, "turns": turns}] for turns in texts]
    assert len({answer["answer_id"] for answer in answers}) == 4


def test_mt_bench_asks_for_a_temperature_by_category():
    questions = read_questions("mt_bench", numbered(MT_BENCH))
    assert [question.temperature for question in questions] == [0.7, 0.0, 0.1, 0.7]
    assert [question.follow_ups for question in questions] == [("Again.",), ("And 3?",), ("Why?",), ()]
    assert questions[0].example.prompt == ({"role": "user", "content": "Write."},)


def test_arena_hard_2_has_messages_with_the_answer_inside(tmp_path):
    path = written(tmp_path, "arena_hard", ARENA, [[reply("x = 1")]])
    row = json.loads(path.read_text())
    assert path.name == "mine.jsonl"
    assert set(row) == {"uid", "ans_id", "model", "messages", "tstamp"}
    assert (row["uid"], row["model"]) == ("a1", "mine")
    assert row["messages"] == [
        {"role": "user", "content": "Code."},
        {"role": "assistant", "content": {"answer": "x = 1"}},
    ]


def test_arena_hard_01_has_turns_with_their_length(tmp_path):
    path = written(tmp_path, "arena_hard", ARENA_01, [[reply("x = 1")]])
    row = json.loads(path.read_text())
    assert (row["question_id"], row["model_id"]) == ("b2", "mine")
    assert row["choices"] == [{"index": 0, "turns": [{"content": "x = 1", "token_len": 3}]}]


def test_the_official_files_are_read_as_they_are(tmp_path):
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(ALPACA))
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MT_BENCH))
    assert len(read_questions("alpaca_eval", rows(tmp_path / "alpaca_eval.json"))) == 1
    assert [q.name for q in read_questions("mt_bench", rows(tmp_path / "question.jsonl"))] == [
        81,
        111,
        151,
        200,
    ]


MATH = {"question_id": 1, "category": "math"}


@pytest.mark.parametrize(
    ("benchmark", "row", "code", "word"),
    [
        ("alpaca_eval", {"instruction": "x"}, "missing-column", "dataset"),
        ("alpaca_eval", {"instruction": 3, "dataset": "d"}, "missing-column", "instruction"),
        ("alpaca_eval", {"instruction": " ", "dataset": "d"}, "empty-text", "q.jsonl:2"),
        ("alpaca_eval", ALPACA[0], "duplicate-row", "q.jsonl:1"),
        ("mt_bench", {"question_id": 1, "turns": ["x"]}, "missing-column", "category"),
        ("mt_bench", {**MATH, "turns": "x"}, "missing-column", "turns"),
        ("mt_bench", {**MATH, "turns": []}, "empty-text", "q.jsonl:2"),
        ("mt_bench", {**MATH, "question_id": 1.5, "turns": ["x"]}, "missing-column", "question_id"),
        ("mt_bench", {**MATH, "turns": [{"content": "x"}]}, "missing-column", "turns[0]"),
        ("arena_hard", {"uid": "x"}, "missing-column", "prompt"),
        ("arena_hard", {"instruction": "x"}, "missing-column", "uid"),
        ("arena_hard", {"question_id": 1, "turns": [{"text": "x"}]}, "missing-column", "turns[0].content"),
    ],
)
def test_a_wrong_question_is_refused(benchmark, row, code, word):
    first = {"alpaca_eval": ALPACA, "mt_bench": MT_BENCH, "arena_hard": ARENA}[benchmark][0]
    with pytest.raises(UserError, match=re.escape(word)) as error:
        read_questions(benchmark, numbered([first, row]))
    assert error.value.code == code
