"""From rows to comparisons: which rows are kept, dropped and counted, or are errors."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.data.prepare import comparison_key, from_rows, load, read
from tokenward.errors import UserError
from tokenward.types import Comparison, Message, Span

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_test" / "test.jsonl.gz"
PROMPT = (Message(role="user", content="q"),)


def pair(prompt: Any = "q", chosen: Any = "yes", rejected: Any = "no", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def ranked(responses, ranks, prompt="q", **more):
    return {"prompt": prompt, "responses": responses, "ranks": ranks, **more}


def loaded(*rows, **options):
    return from_rows(rows, name="rows", **options)


def test_a_row_becomes_a_comparison():
    found = loaded(ranked(["a", "bc"], [4, 2], scores=[1, 3], spans=[[], [[0, 2, 0.5]]]))
    assert found.comparisons == [
        Comparison(
            key="6a80cd450f74e9bc",  # printf '[[["user","q"]],["a","bc"]]' | sha256sum
            prompt=PROMPT,
            responses=("a", "bc"),
            ranks=(1, 0),
            source="rows:row 1",
            scores=(1.0, 3.0),
            spans=((), (Span(0, 2, 0.5),)),
        )
    ]
    assert (found.counts, found.dropped, found.notes) == ({"read": 1, "kept": 1}, [], {})
    assert found.format == "ranked"


def test_the_key_depends_on_the_content_but_not_on_the_order():
    key = comparison_key(PROMPT, ("a", "b"))
    assert comparison_key(PROMPT, ["b", "a"]) == key
    others = [((Message(role="system", content="q"),), ("a", "b")), (PROMPT, ("ab", "")), ((), ("a", "b"))]
    others += [(PROMPT, ("a", "b", "b")), (PROMPT * 2, ("a", "b"))]
    assert key not in {comparison_key(*other) for other in others}


def test_a_pair_without_information_is_dropped_and_counted():
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
    found = loaded(pair(), *(row for row, _ in rows), pair("other"))
    assert [c.source for c in found.comparisons] == ["rows:row 1", "rows:row 9"]
    assert found.dropped == [(f"rows:row {number}", reason) for number, (_, reason) in enumerate(rows, 2)]
    assert found.counts == {"read": 9, "kept": 2, **Counter(reason for _, reason in rows)}


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
def test_a_ranked_row_without_information_is_dropped_and_counted(row, reason):
    found = loaded(row)
    assert (found.comparisons, found.counts, found.notes) == ([], {"read": 1, "kept": 0, reason: 1}, {})


def test_of_more_than_two_responses_only_the_useless_are_removed():
    spans = [[[0, 1, float(n)]] if n != 2 else [] for n in range(6)]
    row = ranked(["a", "b", " ", "a", "c", "b"], [3, 5, 0, 3, 4, 6], scores=[3, 1, 9, 3, 2, 0], spans=spans)
    found = loaded(row, row)
    (comparison,) = found.comparisons
    assert (comparison.responses, comparison.ranks, comparison.scores) == (("a", "c"), (0, 1), (3.0, 2.0))
    assert comparison.spans == ((Span(0, 1, 0.0),), (Span(0, 1, 4.0),))
    # Only rows that were kept are counted.
    assert found.notes == {"empty response removed": 1, "identical response removed": 3}
    assert found.counts == {"read": 2, "kept": 1, "duplicate": 1}


def test_scores_that_contradict_the_ranks_are_counted():
    """The ranks are what trains; a file whose columns were swapped shows here."""
    rows = [
        ranked(["a", "b", "c"], [0, 1, 2], scores=[3, 1, 2]),
        ranked(["a", "d"], [0, 1], scores=[1, 1]),
        ranked(["a", "e"], [0, 1], scores=[2, 1]),
        {"prompt": "q", "chosen": "y", "rejected": "n", "score_chosen": 2.0, "score_rejected": 7.0},
    ]
    assert loaded(*rows[:3]).notes == {"scores contradict the ranks, which are used": 1}
    assert loaded(rows[3]).notes == {"scores contradict the ranks, which are used": 1}


def test_duplicates_leave_one_and_contradictions_none():
    same, opposite, scored = pair("s"), pair("s", "no", "yes"), pair("p", score_chosen=1, score_rejected=0)
    found = loaded(pair("p"), pair("p"), same, opposite, same, pair("t"), scored, format="pairs")
    assert [c.source for c in found.comparisons] == ["rows:row 1", "rows:row 6"]
    assert found.counts == {"read": 7, "kept": 2, "duplicate": 2, "contradictory": 3}
    reasons = {2: "duplicate", 3: "contradictory", 4: "contradictory", 5: "contradictory", 7: "duplicate"}
    assert found.dropped == [(f"rows:row {number}", reason) for number, reason in reasons.items()]
    # A ranked list in another order is a duplicate if the ranks agree.
    lists = ranked(["a", "b", "c"], [0, 1, 1]), ranked(["c", "a", "b"], [5, 2, 5]), ranked(["a", "b"], [0, 1])
    assert loaded(*lists).counts == {"read": 3, "kept": 2, "duplicate": 1}
    contradictory = loaded(lists[2], ranked(["b", "a"], [0, 1]))
    assert contradictory.counts == {"read": 2, "kept": 0, "contradictory": 2}


ROWS = st.lists(
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
@given(ROWS, st.randoms(use_true_random=False))
def test_every_row_is_kept_or_counted_whatever_the_order(rows, random):
    found = loaded(*rows)
    reasons = Counter(drop.reason for drop in found.dropped)
    assert found.counts == {"read": len(rows), "kept": len(found.comparisons), **reasons}
    assert len(rows) == len(found.comparisons) + len(found.dropped)
    for comparison in found.comparisons:
        assert set(comparison.ranks) == set(range(len(set(comparison.ranks))))
        assert len(set(comparison.responses)) == len(comparison.responses) >= 2
        assert all(response.strip() for response in comparison.responses)
    assert len({c.key for c in found.comparisons}) == len(found.comparisons)
    random.shuffle(rows)
    assert loaded(*rows).counts == found.counts


def test_malformed_rows_are_reported_together():
    bad = [pair(chosen=None), pair(rejected=5), {"prompt": "q", "chosen": "a"}]
    more = [pair(prompt=None), pair(prompt=[1]), pair(chosen=True), pair(chosen=None)]
    with pytest.raises(UserError, match=r"^7 rows cannot be read as pairs ") as error:
        loaded(pair(), *bad, pair("t"), *more)
    assert error.value.code == "malformed-rows"
    _, *lines, rest = str(error.value).splitlines()
    found = [line.removeprefix("  rows:row ").split(": ")[:2] for line in lines]
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
        loaded()
    assert error.value.code == "no-rows"


def test_columns_are_renamed_and_errors_name_both():
    rows = [{"instruction": prompt, "good": "yes", "rejected": "no"} for prompt in ("q", None)]
    columns = {"prompt": "instruction", "chosen": "good"}
    (comparison,) = loaded(rows[0], columns=columns).comparisons
    assert (comparison.prompt, comparison.responses) == (PROMPT, ("yes", "no"))
    with pytest.raises(UserError, match=r"row 2: prompt \(column instruction\): found null"):
        loaded(*rows, columns=columns)
    with pytest.raises(UserError, match=r"row 1: ") as error:
        loaded(*rows, columns={"chosen": "goods"})
    assert (error.value.code, error.value.key) == ("missing-column", "data.columns.chosen")


def test_limit_split_and_subset_reach_the_source(source, tmp_path):
    path = source(*[pair(str(n)) for n in range(5)], name="train.jsonl")
    path.write_text(path.read_text() + "not json\n")
    assert load(path, limit=3).counts == {"read": 3, "kept": 3}
    with pytest.raises(UserError, match="got 0") as error:
        load(path, limit=0)
    assert (error.value.code, error.value.key) == ("out-of-range", "data.limit")
    source(pair("test"), name="test.jsonl")
    assert [c.prompt[0]["content"] for c in load(tmp_path, split="test").comparisons] == ["test"]
    with pytest.raises(UserError) as error:
        load(tmp_path, subset="en")
    assert error.value.code == "unknown-subset"
    reading = read(tmp_path, limit=1)
    assert len(list(reading.rows)) == 1
    assert reading.said == [f"{tmp_path}: the split train is read; also there: test"]


@pytest.mark.skipif(not HH.exists(), reason="the shared data are not here")
def test_the_real_hh_file():
    found = load(str(HH))
    expected = {"read": 2312, "kept": 2303, "empty response": 4, "response has several messages": 5}
    assert (found.format, found.counts, found.notes) == ("hh", expected, {})
    assert {c.prompt[-1]["role"] for c in found.comparisons} == {"user"}
    empty = [d.where.rsplit(":", 1)[1] for d in found.dropped if d.reason == "empty response"]
    assert empty == ["87", "517", "926", "1104"]
    lines = gzip.decompress(HH.read_bytes()).splitlines()
    for comparison in found.comparisons:
        text = json.loads(lines[int(comparison.source.rsplit(":", 1)[1]) - 1])["chosen"]
        assert len(re.findall("\n\n(?:Human|Assistant):", text)) == len(comparison.prompt) + 1
        assert text.rstrip().endswith(comparison.responses[0])
