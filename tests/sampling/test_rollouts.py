"""From prompts to ranked rows: who scores what, which groups teach, and the very ids that were sampled."""

from collections import Counter

import pytest

from tests.tiny import tiny_tokenizer
from tokenward.errors import UserError
from tokenward.sampling import Reply
from tokenward.sampling.rollouts import (
    Context,
    ScoredSampler,
    chosen,
    columns_of,
    sampled_row,
    seed_of,
)
from tokenward.tokens.segments import with_segments
from tokenward.types import Example

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def context(number: int, *, references=(), **columns) -> Context:
    message = {"role": "user", "content": f"question {number}"}
    example = Example(
        key=f"{number}", prompt=(message,), source=f"file:{number}", references=references, columns=columns
    )
    return Context(example, [100 + number])


class Counting:
    """A sampler whose replies say which prompt they answer and which of its replies they are."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, prompts, *, count, seed, progress=None):
        self.calls.append((count, seed))
        return [
            [Reply([*prompt, k], f"{prompt[0]} {k}", k % 2 == 0) for k in range(count)] for prompt in prompts
        ]


def made(source, sampler=None) -> ScoredSampler:
    return ScoredSampler(sampler=sampler or Counting(), source=source, name="mine")


def test_each_reply_is_scored_with_its_own_prompt_ids_and_columns():
    seen = {}

    def source(prompts, completions, completion_ids, references, level):
        seen.update(p=prompts, c=completions, i=completion_ids, r=references, v=level)
        return list(range(len(completions)))

    contexts = [context(1, references=("x", "y"), level="low"), context(2, references=("z",), level="high")]
    sampler = Counting()
    replies, scores = made(source, sampler).draw(contexts, count=2, seed=5)
    assert sampler.calls == [(2, 5)]
    assert seen["p"] == ["question 1", "question 1", "question 2", "question 2"]
    assert seen["c"] == ["101 0", "101 1", "102 0", "102 1"]
    assert seen["i"] == [[101, 0], [101, 1], [102, 0], [102, 1]]
    assert seen["r"] == [["x", "y"], ["x", "y"], ["z"], ["z"]]
    assert seen["v"] == ["low", "low", "high", "high"]
    assert scores == [[0, 1], [2, 3]]
    assert [[reply.text for reply in group] for group in replies] == [["101 0", "101 1"], ["102 0", "102 1"]]


def test_the_last_message_is_what_a_source_is_asked_about():
    turns = tuple({"role": role, "content": role} for role in ("system", "user", "assistant", "user"))
    many = Context(Example(key="k", prompt=turns, source="s"), [1])
    none = Context(Example(key="k", prompt=(), source="s"), [1])
    asked = []
    made(lambda prompts, completions: asked.extend(prompts) or [0.0] * len(prompts)).draw(
        [many, none], count=1, seed=0
    )
    assert asked == ["user", ""]


def test_groups_are_ranked_and_tied_ones_are_dropped_and_counted():
    scores = {"101": [1.0, 3.0, 2.0], "102": [5.0, 5.0, 5.0], "103": [0.0, 0.0, -1.0]}

    def source(prompts, completions):
        return [scores[text.split()[0]][int(text.split()[1])] for text in completions]

    found = made(source).ranked([context(1), context(2), context(3)], count=3, seed=0)
    assert [row.comparison.source for row in found.rows] == ["file:1", "file:3"]
    assert [row.comparison.ranks for row in found.rows] == [(2, 0, 1), (0, 0, 1)]
    assert [row.comparison.scores for row in found.rows] == [(1.0, 3.0, 2.0), (0.0, 0.0, -1.0)]
    assert found.counts == {"dropped: all responses tied": 1}
    # Of all nine, the dropped ones too: (6 + 15 - 1) / 9.
    assert found.mean == pytest.approx(20 / 9)
    first = found.rows[0]
    assert (first.prompt, first.responses) == ([101], [[101, 0], [101, 1], [101, 2]])
    assert first.eos == [1, 0, 1]


def test_a_sampled_row_has_the_ids_that_were_sampled_not_those_of_its_text():
    ids = [*TOKENIZER.convert_tokens_to_ids(["t", "h", "e"]), EOS]  # the tokenizer would write one token
    row = sampled_row(context(1), [Reply(ids, "the", True), Reply([5], "&", False)])
    assert row.responses == [ids, [5]]
    assert row.comparison.responses == ("the", "&")
    assert row.comparison.ranks == (0, 0)
    assert row.comparison.scores is None
    assert row.eos == [1, 0]
    (first, second) = with_segments("word", TOKENIZER, row).segments
    assert (first.tolist(), second.tolist()) == ([0, 0, 0, 0], [0])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda prompts, completions: [0.0, 1.0, float("nan"), 0.0], r"^file:2: .*mine returned nan"),
        (lambda prompts, completions: [0.0] * 3, r"3 scores for 4 completions"),
        (lambda prompts, completions: [0.0, None, 0.0, 0.0], r"^file:1: .*None for this row"),
        (lambda prompts, completions: 3, "no list"),
        (lambda prompts, completions, level: [0.0] * 4, "takes 'level', which is no column of the examples"),
    ],
)
def test_what_a_source_may_not_return_names_the_row(source, message):
    with pytest.raises(UserError, match=message):
        made(source).ranked([context(1), context(2)], count=2, seed=0)


def test_progress_counts_what_was_drawn_and_what_was_scored():
    drawn, scored, sizes = [], [], []

    def source(prompts, completions):
        sizes.append(len(completions))
        return [float(text[-1]) for text in completions]

    class Told(Counting):
        def __call__(self, prompts, *, count, seed, progress=None):
            progress(len(prompts) * count)
            return super().__call__(prompts, count=count, seed=seed)

    found = made(source, Told()).ranked(
        [context(number) for number in range(40)], count=2, seed=0, drawn=drawn.append, scored=scored.append
    )
    assert len(found.rows) == 40
    assert drawn == [80]
    assert sum(scored) == sum(sizes) == 80
    assert len(scored) > 1, "a slow source shows that it goes on"
    assert [row.prompt for row in found.rows] == [[100 + number] for number in range(40)]


def test_columns_that_some_examples_lack_are_none_there():
    examples = [context(1, a=1).example, context(2, b=2, references=("r",)).example]
    assert columns_of(examples) == {"a": [1, None], "b": [None, 2], "references": [[], ["r"]]}
    assert columns_of([context(1).example]) == {}


def test_indices_are_drawn_evenly_in_a_random_order():
    assert chosen(5, 5, seed=0) != list(range(5))
    assert sorted(chosen(5, 5, seed=0)) == list(range(5))
    assert len(set(chosen(7, 100, seed=0))) == 7
    counts = Counter(chosen(17, 5, seed=1))
    assert set(counts) == set(range(5))
    assert set(counts.values()) == {3, 4}
    assert chosen(9, 30, seed=2) == chosen(9, 30, seed=2) != chosen(9, 30, seed=3)
    assert chosen(9, 30, seed=2)[:4] == chosen(4, 30, seed=2)


def test_seeds_depend_on_every_part_and_fit_torch():
    # sha256 of "(0, 'rollout', 3, 0)": it must be the same on every machine, for ever.
    assert seed_of(0, "rollout", 3, 0) == 5776370634689982350
    different = {seed_of(*parts) for parts in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), ("0", "a")]}
    assert len(different) == 5
    assert all(0 <= seed < 2**63 for seed in different)
