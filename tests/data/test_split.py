"""The side of a row depends on its content and the seed alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.data.prepare import comparison_key
from tokenward.data.split import check_eval_share, fraction_places, is_eval
from tokenward.errors import UserError
from tokenward.types import Comparison, Message

laws = settings(derandomize=True, deadline=None, max_examples=50)


def comparison(number, role="user"):
    messages = (Message(role=role, content=f"p{number}"),)
    responses = (f"a{number}", f"b{number}")
    key = comparison_key(messages, responses)
    return Comparison(key=key, prompt=messages, responses=responses, ranks=(0, 1), source=f"f:{number}")


MANY = [comparison(number) for number in range(2000)]
KEYS = [row.key for row in MANY]
subsets = st.lists(st.integers(0, 300), unique=True, max_size=40).map(
    lambda numbers: [KEYS[n] for n in numbers]
)
shares = st.floats(0.001, 0.999)


def fraction(keys, share, seed, salt=""):
    return [keys[place] for place in fraction_places(keys, share, seed, salt)]


def test_known_sides():
    # Runs on disk were split by these.
    assert [n for n in range(20) if is_eval(MANY[n], 0.3, 0)] == [2, 3, 5, 6, 10, 12, 14, 16, 18]
    assert fraction_places(KEYS[:20], 0.3, 0) == [3, 6, 8, 9, 10, 12, 14]


def test_shares_are_met_on_average():
    for seed in range(3):
        assert 140 < sum(is_eval(row, 0.1, seed) for row in MANY) < 260  # 200 ± 4.5 standard deviations
        assert 900 < len(fraction(KEYS, 0.5, seed)) < 1100
    assert not any(is_eval(row, 0.0, 3) for row in MANY)


def test_the_side_depends_on_the_prompt_with_its_roles_and_on_the_seed():
    same = Comparison(key="k", prompt=MANY[2].prompt, responses=("x", "y"), ranks=(0, 1), source="f:9")
    assert is_eval(same, 0.3, 0) == is_eval(MANY[2], 0.3, 0)
    rows = range(100)
    assert any(is_eval(comparison(n), 0.5, 0) != is_eval(comparison(n, "system"), 0.5, 0) for n in rows)
    assert any(is_eval(MANY[n], 0.5, 0) != is_eval(MANY[n], 0.5, 1) for n in rows)


@laws
@given(subsets, shares, shares, st.integers(-3, 3))
def test_fractions_are_nested_ordered_never_empty_and_independent_of_the_order(keys, one, other, seed):
    small, large = (fraction(keys, share, seed) for share in sorted((one, other)))
    assert [key for key in large if key in small] == small
    assert [key for key in keys if key in large] == large
    assert bool(small) == bool(keys)
    assert fraction(keys, 1.0, seed) == keys
    assert set(fraction(keys[::-1], one, seed)) == set(fraction(keys, one, seed))


def test_another_seed_or_salt_gives_another_choice():
    choices = {tuple(fraction(KEYS, 0.5, seed, salt)) for seed in (0, 1) for salt in ("", "a")}
    assert len(choices) == 4


def test_shares_out_of_range():
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="got") as error:
            check_eval_share(share)
        assert (error.value.code, error.value.key) == ("out-of-range", "data.eval")
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(UserError, match="fraction") as error:
            fraction(KEYS[:1], share, 0)
        assert error.value.code == "out-of-range"
