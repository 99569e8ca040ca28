"""From a source to comparisons: which rows are kept, dropped and counted, or are errors."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.data.prepare import comparison_key, load, read
from tokenward.errors import UserError
from tokenward.types import Comparison, Message, Span

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_test" / "test.jsonl.gz"
HARD_TEXTS = [
    '"',
    "\\",
    "\\n",
    "a\nb\r\n",
    "None",
    "null",
    "NaN",
    "👩‍👩‍👧",
    "שלום\u200f",
    "\u2028",
    "\x00",
    "[1]",
    "{}",
    "'",
]


def pair(prompt: Any = "q", chosen: Any = "yes", rejected: Any = "no", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def ranked(responses, ranks, prompt="q", **more):
    return {"prompt": prompt, "responses": responses, "ranks": ranks, **more}


def test_a_row_becomes_a_comparison(source):
    path = source(ranked(["a", "bc"], [4, 2], scores=[1, 3], spans=[[], [[0, 2, 0.5]]]))
    loaded = load(path)
    prompt = (Message(role="user", content="q"),)
    # The key: printf '[[["user","q"]],["a","bc"]]' | sha256sum
    assert loaded.comparisons == [
        Comparison(
            key="6a80cd450f74e9bc",
            prompt=prompt,
            responses=("a", "bc"),
            ranks=(1, 0),
            source=f"{path}:1",
            scores=(1.0, 3.0),
            spans=((), (Span(0, 2, 0.5),)),
        )
    ]
    assert (loaded.counts, loaded.dropped, loaded.notes) == ({"read": 1, "kept": 1}, [], {})
    assert loaded.format == "ranked"


def test_the_key_knows_content_but_not_order():
    prompt = (Message(role="user", content="q"),)
    key = comparison_key(prompt, ("a", "b"))
    assert comparison_key(prompt, ["b", "a"]) == key
    others = [((Message(role="system", content="q"),), ("a", "b")), (prompt, ("ab", "")), ((), ("a", "b"))]
    others += [(prompt, ("a", "b", "b")), (prompt * 2, ("a", "b"))]
    assert key not in {comparison_key(*other) for other in others}
    assert len(key) == 16


def test_hard_texts_come_through_unchanged(source):
    found = load(source(*(pair(f"{text}?", f"x{text}", f"{text}y") for text in HARD_TEXTS))).comparisons
    for comparison, text in zip(found, HARD_TEXTS, strict=True):
        assert comparison.prompt == ({"role": "user", "content": f"{text}?"},)
        assert comparison.responses == (f"x{text}", f"{text}y")


def test_a_pair_that_teaches_nothing_is_dropped_and_counted(source):
    no_last = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    rows = [
        (pair(prompt=" \n"), "empty prompt"),
        (pair(prompt=[]), "empty prompt"),
        (pair(prompt=[{"role": "system", "content": "s"}]), "empty prompt"),
        (pair(rejected=" \n\t"), "empty response"),
        (pair(chosen="no"), "identical responses"),
        (pair(chosen=no_last), "response does not end with the assistant"),
        (pair(chosen=[{"role": "assistant", "content": "a", "weight": 0}]), "response of weight 0"),
    ]
    path = source(pair(), *(row for row, _ in rows), pair("other"))
    loaded = load(path)
    assert [c.source for c in loaded.comparisons] == [f"{path}:1", f"{path}:9"]
    assert loaded.dropped == [(f"{path}:{line}", reason) for line, (_, reason) in enumerate(rows, 2)]
    assert loaded.counts == {"read": 9, "kept": 2, **Counter(reason for _, reason in rows)}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ranked([], []), "fewer than two responses"),
        (ranked(["a"], [0]), "fewer than two responses"),
        (ranked(["a", "b", "c"], [3, 3, 3]), "all ranks tied"),
        (ranked(["a", " ", ""], [0, 1, 2]), "empty response"),
        (ranked(["a", "b", " "], [0, 0, 1]), "all ranks tied"),  # only the removed response was worse
        (ranked(["a", "a", "b"], [0, 1, 2]), "identical responses"),  # contradict each other, leaving one
        (ranked(["a", "a", "a"], [0, 0, 0]), "identical responses"),
    ],
)
def test_a_ranked_row_that_teaches_nothing_is_dropped_and_counted(source, row, reason):
    loaded = load(source(row))
    assert (loaded.comparisons, loaded.counts, loaded.notes) == ([], {"read": 1, "kept": 0, reason: 1}, {})


def test_of_more_than_two_responses_only_the_useless_are_removed(source):
    spans = [[[0, 1, float(n)]] if n != 2 else [] for n in range(6)]
    row = ranked(["a", "b", " ", "a", "c", "b"], [3, 5, 0, 3, 4, 6], scores=[3, 1, 9, 3, 2, 0], spans=spans)
    loaded = load(source(row))
    (comparison,) = loaded.comparisons
    assert (comparison.responses, comparison.ranks, comparison.scores) == (("a", "c"), (0, 1), (3.0, 2.0))
    assert comparison.spans == ((Span(0, 1, 0.0),), (Span(0, 1, 4.0),))
    assert loaded.notes == {"empty response removed": 1, "identical response removed": 3}
    assert loaded.counts == {"read": 1, "kept": 1}


def test_notes_count_only_rows_that_were_kept(source):
    row = ranked(["a", "b", " "], [0, 1, 2])
    assert load(source(row, row)).notes == {"empty response removed": 1}
    assert load(source(ranked(["a", "b", " "], [0, 0, 2]))).notes == {}


def test_duplicates_leave_one_and_contradictions_none(source):
    same, opposite = pair("s"), pair("s", "no", "yes")
    path = source(
        pair("p"), pair("p"), same, opposite, same, pair("t"), pair("p", score_chosen=1, score_rejected=0)
    )
    loaded = load(path, format="pairs")
    assert [c.source for c in loaded.comparisons] == [f"{path}:1", f"{path}:6"]
    assert loaded.counts == {"read": 7, "kept": 2, "duplicate": 2, "contradictory": 3}
    lines = {2: "duplicate", 3: "contradictory", 4: "contradictory", 5: "contradictory", 7: "duplicate"}
    assert loaded.dropped == [(f"{path}:{line}", reason) for line, reason in lines.items()]


def test_a_ranked_list_in_another_order_is_a_duplicate(source):
    path = source(
        ranked(["a", "b", "c"], [0, 1, 1]), ranked(["c", "a", "b"], [5, 2, 5]), ranked(["a", "b"], [0, 1])
    )
    assert load(path).counts == {"read": 3, "kept": 2, "duplicate": 1}
    assert load(source(ranked(["a", "b"], [0, 1]), ranked(["b", "a"], [0, 1]))).counts == {
        "read": 2,
        "kept": 0,
        "contradictory": 2,
    }


rows_of_any_kind = st.lists(
    st.builds(
        lambda prompt, responses, ranks: ranked(responses, ranks[: len(responses)], prompt),
        st.sampled_from(["", "p", "q"]),
        st.lists(st.sampled_from(["", " ", "a", "b", "c"]), max_size=4),
        st.lists(st.integers(0, 2), min_size=4, max_size=4),
    ),
    min_size=1,
    max_size=12,
)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(rows_of_any_kind, st.randoms(use_true_random=False))
def test_every_row_is_kept_or_counted_whatever_the_order(tmp_path_factory, rows, random):
    path = tmp_path_factory.mktemp("rows") / "rows.json"

    def counted(given_rows):
        path.write_text(json.dumps(given_rows))
        return load(path)

    loaded = counted(rows)
    reasons = Counter(drop.reason for drop in loaded.dropped)
    assert loaded.counts == {"read": len(rows), "kept": len(loaded.comparisons), **reasons}
    assert len(rows) == len(loaded.comparisons) + len(loaded.dropped)
    for comparison in loaded.comparisons:
        assert set(comparison.ranks) == set(range(len(set(comparison.ranks))))
        assert len(set(comparison.responses)) == len(comparison.responses) >= 2
        assert all(response.strip() for response in comparison.responses)
    assert len({c.key for c in loaded.comparisons}) == len(loaded.comparisons)
    random.shuffle(rows)
    assert counted(rows).counts == loaded.counts


def test_malformed_rows_are_reported_together(source):
    bad = [pair(chosen=None), pair(rejected=5), {"prompt": "q", "chosen": "a"}]
    rows = [
        pair(),
        *bad,
        pair("t"),
        pair(prompt=None),
        pair(prompt=[1]),
        pair(chosen=True),
        pair(chosen=None),
    ]
    with pytest.raises(UserError, match=r"^7 rows cannot be read as pairs ") as error:
        load(path := source(*rows))
    assert error.value.code == "malformed-rows"
    _, *lines, rest = str(error.value).splitlines()
    found = [line.removeprefix(f"  {path}:").split(": ")[:2] for line in lines]
    fields = ["2", "chosen"], ["3", "rejected"], ["4", "rejected"], ["6", "prompt"], ["7", "prompt[0]"]
    assert found == list(fields)
    assert "2 more" in rest


def test_a_file_that_cannot_be_read_is_an_error_at_once(source):
    path = source(pair(), pair(chosen=None))
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:3: ") as error:
        load(path)
    assert error.value.code == "not-json"
    with pytest.raises(UserError, match="rows") as error:
        load(source())
    assert error.value.code == "no-rows"


def test_columns_are_renamed_and_errors_name_both(source):
    rows = [{"instruction": prompt, "good": "yes", "rejected": "no"} for prompt in ("q", None)]
    columns = {"prompt": "instruction", "chosen": "good"}
    (comparison,) = load(source(rows[0]), columns=columns).comparisons
    assert (comparison.prompt[0]["content"], comparison.responses) == ("q", ("yes", "no"))
    with pytest.raises(UserError, match=r":2: prompt \(column instruction\): found null"):
        load(source(*rows), columns=columns)
    with pytest.raises(UserError, match=r":1: ") as error:
        load(source(*rows), columns={"chosen": "goods"})
    assert (error.value.code, error.value.key) == ("missing-column", "data.columns.chosen")


def test_limit_reads_no_further(source):
    path = source(*[pair(str(n)) for n in range(5)])
    path.write_text(path.read_text() + "not json\n")
    assert load(path, limit=3).counts == {"read": 3, "kept": 3}
    with pytest.raises(UserError, match="got 0") as error:
        load(path, limit=0)
    assert (error.value.code, error.value.key) == ("out-of-range", "data.limit")


def test_split_and_subset_reach_the_source(source, tmp_path):
    for name in ("train", "test"):
        source(pair(name), name=f"{name}.jsonl")
    assert [c.prompt[0]["content"] for c in load(tmp_path, split="test").comparisons] == ["test"]
    with pytest.raises(UserError) as error:
        load(tmp_path, subset="en")
    assert error.value.code == "unknown-subset"
    reading = read(tmp_path)
    assert len(list(reading.rows)) == 1
    assert reading.said == [f"{tmp_path}: the split train is read; also there: test"]


@pytest.mark.skipif(not HH.exists(), reason="the shared data are not here")
def test_the_real_hh_file():
    loaded = load(str(HH))
    expected = {"read": 2312, "kept": 2303, "empty response": 4, "response has several messages": 5}
    assert (loaded.format, loaded.counts, loaded.notes) == ("hh", expected, {})
    assert {c.prompt[-1]["role"] for c in loaded.comparisons} == {"user"}
    assert [d.where.rsplit(":", 1)[1] for d in loaded.dropped if d.reason == "empty response"] == [
        "87",
        "517",
        "926",
        "1104",
    ]
    lines = gzip.decompress(HH.read_bytes()).splitlines()
    for comparison in loaded.comparisons:
        text = json.loads(lines[int(comparison.source.rsplit(":", 1)[1]) - 1])["chosen"]
        assert len(re.findall("\n\n(?:Human|Assistant):", text)) == len(comparison.prompt) + 1
        assert text.rstrip().endswith(comparison.responses[0])
