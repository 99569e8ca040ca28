"""A row's side depends on its content and the seed alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.data.prepare import comparison_key
from tokenward.data.split import fraction, split
from tokenward.errors import UserError
from tokenward.types import Comparison, Message

laws = settings(derandomize=True, deadline=None, max_examples=50)


def comparison(number, prompt=None):
    messages = (Message(role="user", content=f"p{number}" if prompt is None else prompt),)
    responses = (f"a{number}", f"b{number}")
    key = comparison_key(messages, responses)
    return Comparison(key=key, prompt=messages, responses=responses, ranks=(0, 1), source=f"f:{number}")


MANY = [comparison(number) for number in range(2000)]
sets = st.lists(st.integers(0, 300), unique=True, max_size=40).map(lambda numbers: [MANY[n] for n in numbers])
HELD_OUT = ["f:2", "f:3", "f:5", "f:6", "f:10", "f:12", "f:14", "f:16", "f:18"]
CHOSEN = ["f:3", "f:6", "f:8", "f:9", "f:10", "f:12", "f:14"]
shares = st.floats(0.001, 0.999)


def test_known_sides():
    parts = split(MANY[:20], share=0.3, seed=0)
    assert [c.source for c in parts.eval] == HELD_OUT
    assert [c.source for c in fraction(MANY[:20], 0.3, 0)] == CHOSEN


def test_shares_are_met_on_average():
    for seed in range(3):
        assert 140 < len(split(MANY, share=0.1, seed=seed).eval) < 260  # 200 ± 4.5 standard deviations
        assert 900 < len(fraction(MANY, 0.5, seed)) < 1100


def test_one_prompt_stays_on_one_side():
    rows = [comparison(number, prompt=f"shared {number % 50}") for number in range(1000)]
    parts = split(rows, share=0.5, seed=1)
    sides = [{c.prompt[0]["content"] for c in side} for side in parts]
    assert not sides[0] & sides[1]
    assert min(map(len, sides)) > 10


def test_the_role_belongs_to_the_prompt():
    rows = [
        Comparison(
            key="k",
            prompt=(Message(role=role, content=f"{n}"),),
            responses=("a", "b"),
            ranks=(0, 1),
            source=role,
        )
        for n in range(100)
        for role in ("user", "system")
    ]
    sides = {(c.source, c.prompt[0]["content"]) for c in split(rows, share=0.5, seed=0).train}
    assert any((("user", f"{n}") in sides) != (("system", f"{n}") in sides) for n in range(100))


@laws
@given(sets, sets, shares, st.integers(-3, 3))
def test_adding_rows_moves_none(rows, more, share, seed):
    before, after = split(rows, share=share, seed=seed), split(more + rows, share=share, seed=seed)
    assert {c.key for c in before.train} <= {c.key for c in after.train}
    assert {c.key for c in before.eval} <= {c.key for c in after.eval}
    assert sorted(c.key for side in before for c in side) == sorted(c.key for c in rows)


@laws
@given(sets, shares, shares, st.integers(-3, 3))
def test_fractions_are_nested_ordered_and_never_empty(rows, one, other, seed):
    small, large = (fraction(rows, share, seed) for share in sorted((one, other)))
    assert [c for c in large if c in small] == small
    assert [c for c in rows if c in large] == large
    assert bool(small) == bool(rows)
    assert fraction(rows, 1.0, seed) == rows


@laws
@given(sets, shares)
def test_position_does_not_matter(rows, share):
    assert {c.key for c in fraction(rows, share, 7)} == {c.key for c in fraction(rows[::-1], share, 7)}


def test_seed_and_salt_give_other_choices():
    choices = {tuple(c.key for c in fraction(MANY, 0.5, seed, salt)) for seed in (0, 1) for salt in ("", "a")}
    assert len(choices) == 4
    assert split(MANY, share=0.5, seed=0) != split(MANY, share=0.5, seed=1)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_held_out_out_of_range(share):
    with pytest.raises(UserError, match=r"data.eval must be in"):
        split(MANY[:1], share=share, seed=0)


@pytest.mark.parametrize("share", [0.0, 1.1, float("nan")])
def test_fraction_out_of_range(share):
    with pytest.raises(UserError, match="fraction must be in"):
        fraction(MANY[:1], share, 0)


def test_nothing_held_out_at_zero():
    assert split(MANY[:5], share=0.0, seed=3) == (MANY[:5], [])
