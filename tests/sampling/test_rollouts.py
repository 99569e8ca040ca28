"""From prompts to ranked rows: who scores what, which groups teach, and the very ids that were sampled."""

from collections import Counter

import pytest

from tests.tiny import tiny_tokenizer
from tokenward.errors import UserError
from tokenward.sampling import Reply
from tokenward.sampling.rollouts import Context, ScoredSampler, chosen, columns_of, sampled_row, seed_of
from tokenward.tokens.segments import with_segments
from tokenward.types import Example

TOKENIZER = tiny_tokenizer()


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
        if progress is not None:
            progress(len(prompts) * count)
        return [[Reply([*p, k], f"{p[0]} {k}", k % 2 == 0) for k in range(count)] for p in prompts]


def scored(source, sampler=None) -> ScoredSampler:
    return ScoredSampler(sampler=sampler or Counting(), source=source, name="mine")


def test_each_reply_is_scored_with_its_own_prompt_ids_and_columns():
    seen = {}

    def source(prompts, completions, completion_ids, references, level):
        seen.update(p=prompts, c=completions, i=completion_ids, r=references, v=level)
        return list(range(len(completions)))

    contexts = [context(1, references=("x", "y"), level="low"), context(2, references=("z",), level="high")]
    sampler = Counting()
    replies, scores = scored(source, sampler).draw(contexts, count=2, seed=5)
    assert sampler.calls == [(2, 5)]
    assert seen == {
        "p": ["question 1", "question 1", "question 2", "question 2"],
        "c": ["101 0", "101 1", "102 0", "102 1"],
        "i": [[101, 0], [101, 1], [102, 0], [102, 1]],
        "r": [["x", "y"], ["x", "y"], ["z"], ["z"]],
        "v": ["low", "low", "high", "high"],
    }
    assert scores == [[0, 1], [2, 3]]
    assert [[reply.text for reply in group] for group in replies] == [["101 0", "101 1"], ["102 0", "102 1"]]


def test_a_source_receives_the_last_message():
    turns = tuple({"role": role, "content": role} for role in ("system", "user", "assistant", "user"))
    contexts = [Context(Example(key="k", prompt=prompt, source="s"), [1]) for prompt in (turns, ())]
    seen = []
    scored(lambda prompts, completions: seen.extend(prompts) or [0.0, 0.0]).draw(contexts, count=1, seed=0)
    assert seen == ["user", ""]


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [
        ((0.2, 0.9, 0.5), (2, 0, 1)),
        ((0.9, 0.9, 0.1, 0.3), (0, 0, 2, 1)),  # dense: 1 follows two that tie for 0
        ((-3.0, -1.0), (1, 0)),
        ((0.0, -0.0, -1.0), (0, 0, 1)),
    ],
)
def test_ranks_by_hand(scores, ranks):
    source = scored(lambda completions: list(scores))
    (row,) = source.ranked([context(1)], count=len(scores), seed=0).rows
    assert (row.comparison.ranks, row.comparison.scores) == (ranks, scores)


def test_groups_without_an_order_are_dropped_and_counted():
    """Of the fourth prompt all but one reply were empty, as a checked sampler returns it."""
    scores = {"101": [1.0, 3.0, 2.0], "102": [5.0, 5.0, 5.0], "103": [0.0, 0.0, -1.0], "104": [7.0]}

    class Short(Counting):
        def __call__(self, prompts, **settings):
            *whole, last = super().__call__(prompts, **settings)
            return [*whole, last[:1]]

    def source(prompts, completions):
        return [scores[text.split()[0]][int(text.split()[1])] for text in completions]

    found = scored(source, Short()).ranked([context(n) for n in (1, 2, 3, 4)], count=3, seed=0)
    assert [row.comparison.source for row in found.rows] == ["file:1", "file:3"]
    assert found.counts == {
        "dropped: all responses tied": 1, "dropped: one response": 1, "dropped: empty replies": 2,
    }  # fmt: skip
    assert found.mean == pytest.approx((6 + 15 - 1 + 7) / 10), "dropped groups count too"
    first = found.rows[0]
    assert (first.prompt, first.responses) == ([101], [[101, 0], [101, 1], [101, 2]])
    assert first.eos == [1, 0, 1]


def test_a_sampled_row_has_the_ids_that_were_sampled_not_those_of_its_text():
    ids = [*TOKENIZER.convert_tokens_to_ids(["t", "h", "e"]), TOKENIZER.eos_token_id]  # encoded: one token
    row = sampled_row(context(1), [Reply(ids, "the", True), Reply([5], "&", False)])
    assert row.responses == [ids, [5]]
    assert row.comparison.responses == ("the", "&")
    assert (row.comparison.ranks, row.comparison.scores, row.eos) == ((0, 0), None, [1, 0])
    first, second = with_segments("word", TOKENIZER, row).segments
    assert (first.tolist(), second.tolist()) == ([0, 0, 0, 0], [0])


def test_an_error_of_a_source_names_the_row():
    with pytest.raises(UserError, match=r"^file:2: ") as caught:
        scored(lambda completions: [0.0, 1.0, float("nan"), 0.0]).ranked(
            [context(1), context(2)], count=2, seed=0
        )
    assert caught.value.code == "wrong-scores"


def test_progress_counts_what_was_drawn_and_what_was_scored():
    drawn, done, sizes = [], [], []

    def source(prompts, completions):
        sizes.append(len(completions))
        return [float(text[-1]) for text in completions]

    contexts = [context(number) for number in range(40)]
    found = scored(source).ranked(contexts, count=2, seed=0, drawn=drawn.append, scored=done.append)
    assert drawn == [80]
    assert sum(done) == sum(sizes) == 80
    assert len(done) > 1, "a slow source shows progress"
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
    # sha256 of "(0, 'rollout', 3, 0)": the same on every machine.
    assert seed_of(0, "rollout", 3, 0) == 5776370634689982350
    different = {seed_of(*parts) for parts in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), ("0", "a")]}
    assert len(different) == 5
    assert all(0 <= seed < 2**63 for seed in different)
