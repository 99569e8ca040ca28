"""Transforms by hand, against numpy and brute force, and their invariances."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.ops import transforms
from tokenward.ops.ragged import group_moments, group_quantile, group_ranks
from tokenward.ops.transforms import otsu_class, otsu_cuts

NAN = torch.nan
exactly = settings(derandomize=True, deadline=None, max_examples=30)
scores = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0, NAN])
tokens = st.lists(st.tuples(scores, st.integers(0, 3)), min_size=1, max_size=25)


def split(tokens):
    values = torch.tensor([token[0] for token in tokens], dtype=torch.float64)
    return values, torch.tensor([token[1] for token in tokens])


def one(values) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A single group."""
    made = torch.tensor(values, dtype=torch.float32)
    return made, torch.zeros(len(made), dtype=torch.long), 1


def by_group(tokens, group):
    return np.array([value for value, owner in tokens if owner == group and value == value])


@exactly
@given(tokens, st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.6, 1.0]))
def test_moments_and_quantiles_are_those_of_numpy(tokens, share):
    values, group = split(tokens)
    found = torch.stack((group_quantile(values, group, 4, share), *group_moments(values, group, 4)))
    for number in range(4):
        mine = by_group(tokens, number)
        expected = (
            [np.quantile(mine, share), len(mine), mine.mean(), mine.std()]
            if len(mine)
            else [NAN, 0, NAN, NAN]
        )
        assert found[:, number].tolist() == pytest.approx(expected, nan_ok=True)


@exactly
@given(tokens)
def test_rank_counts_smaller_numbers_and_half_of_the_equal_ones(tokens):
    values, group = split(tokens)
    found = group_ranks(values, group, 4)
    for (value, owner), rank in zip(tokens, found.tolist(), strict=True):
        mine = by_group(tokens, owner)
        if value != value:
            assert rank != rank
        else:
            assert rank == (mine < value).sum() + ((mine == value).sum() - 1) / 2


def test_elementwise_transforms_by_hand():
    made = torch.tensor([-2.0, 0.0, 0.5])
    assert transforms.affine(made, 0.5, 1.0).tolist() == [0.0, 1.0, 1.25]  # TGDPO: 1 + alpha r
    assert transforms.clamp(made, -0.5, 1.5).tolist() == [-0.5, 0.0, 0.5]
    assert transforms.clamp(made, None, 0.0).tolist() == [-2.0, 0.0, 0.0]
    # TIS-DPO: exp(mu s) with mu = -1 is a temperature of -1.
    assert transforms.exponential(made, -1.0).tolist() == pytest.approx([7.389056, 1.0, 0.606531])
    # T-REG: sigma(log 3) - 1/2 = 3/4 - 1/2.
    assert float(transforms.shifted_sigmoid(torch.tensor(3.0).log(), -0.5)) == pytest.approx(0.25)
    # D2PO's code begins with the power 1, and each response begins anew.
    decayed = transforms.decay(torch.ones(5), torch.tensor([0, 0, 0, 1, 1]), 0.5, 1)
    assert decayed.tolist() == [0.5, 0.25, 0.125, 0.5, 0.25]
    # Responses of 3 and 1 tokens, then of 2 and 2.
    response, comparison = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    found = transforms.beyond_shorter(torch.arange(1.0, 9.0), response, comparison, 0.5)
    assert found.tolist() == [1.0, 1.0, 1.5, 4.0, 5.0, 6.0, 7.0, 8.0]


def test_grouped_transforms_by_hand():
    made = torch.tensor([1.0, 3.0, 5.0, 10.0, NAN]), torch.tensor([0, 0, 0, 1, 1]), 2
    # Mean 3, standard deviation sqrt(8 / 3).
    for found, expected in (
        (transforms.rank_scale(*made, 0.7, 1.3), [0.7, 1.0, 1.3, 1.0, NAN]),
        (transforms.standardise(*made), [-1.224745, 0, 1.224745, 0, NAN]),
        (transforms.min_max(*made), [0.0, 0.5, 1.0, 0.0, NAN]),
    ):
        assert found.tolist() == pytest.approx(expected, nan_ok=True)
    assert transforms.rank_scale(*one([2.0, 2.0, 5.0]), 0.0, 1.0).tolist() == [0.25, 0.25, 1.0]
    assert transforms.rank_scale(*one([2.0, 2.0]), 0.0, 1.0).tolist() == [0.5, 0.5]
    assert transforms.standardise(*one([2.0, 2.0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("at", "value", "factor", "expected"),
    [
        ("value", 2.5, 0.0, 2.5),
        ("mean", 0.0, 0.0, 4.0),
        ("median", 0.0, 0.0, 3.0),
        ("quantile", 0.25, 0.0, 2.0),
        ("iqr", 0.0, 1.0, 2.0 - (4.0 - 2.0)),  # XTF: Q1 - (Q3 - Q1)
        ("iqr", 0.0, 1.5, 2.0 - 1.5 * 2.0),  # its code
        ("iqr", 0.0, -1.5, 4.0 + 1.5 * 2.0),
    ],
)
def test_thresholds_by_hand(at, value, factor, expected):
    made = one([1.0, 2.0, 3.0, 4.0, 10.0])
    found = transforms.threshold_of(*made, at, value=value, factor=factor, classes=2, cut=0)
    assert found.tolist() == [expected]


def test_sides_of_a_threshold_and_both_ends():
    made, group, _ = one([1.0, 2.0, 3.0, NAN])
    cut = torch.tensor([2.0], dtype=torch.float64)
    below, above = (transforms.keep_side(made, group, cut, side).tolist() for side in ("below", "above"))
    assert below == pytest.approx([1.0, 0.0, 0.0, NAN], nan_ok=True)
    assert above == pytest.approx([0.0, 1.0, 1.0, NAN], nan_ok=True)
    made = one([3.0, 1.0, 2.0, 5.0, NAN])
    for which, expected in (("largest", [1, 0, 0, 1, NAN]), ("smallest", [0, 1, 1, 0, NAN])):
        found = transforms.top(*made, 0.5, which=which, rule="floor", minimum=1)
        assert found.tolist() == pytest.approx(expected, nan_ok=True)


def between(values: np.ndarray, cuts) -> float:
    """Variance between classes, by its definition."""
    edges = [-np.inf, *cuts, np.inf]
    parts = [values[(values >= low) & (values < high)] for low, high in itertools.pairwise(edges)]
    return sum(len(part) * (part.mean() - values.mean()) ** 2 for part in parts if len(part))


@exactly
@given(st.lists(st.integers(-9, 9), min_size=4, max_size=14), st.integers(2, 4))
def test_multi_otsu_is_optimal(numbers, classes):
    values = np.array(numbers, float)
    levels = np.unique(values)
    cuts = otsu_cuts(torch.from_numpy(values), classes).tolist()
    assert cuts == sorted(cuts)
    middles = (levels[1:] + levels[:-1]) / 2
    tried = [between(values, some) for some in itertools.combinations(middles, min(classes, len(levels)) - 1)]
    assert between(values, [cut for cut in cuts if np.isfinite(cut)]) == pytest.approx(max(tried))
    assert len([cut for cut in cuts if np.isfinite(cut)]) == min(classes, len(levels)) - 1


def test_multi_otsu_of_a_histogram_finds_planted_clusters():
    generator = torch.Generator().manual_seed(0)
    parts = [middle + 0.1 * torch.randn(400, generator=generator) for middle in (0.0, 2.0, 5.0)]
    cuts = otsu_cuts(torch.cat(parts), 3, bins=256)  # 1,200 different values
    assert [int(otsu_class(part, cuts).unique()) for part in parts] == [0, 1, 2]


def test_cluster_of_each_group():
    made = torch.tensor([0.0, 0.1, 5.0, 5.1, 9.0, NAN, 20.0, 30.0, 40.0])
    found = transforms.cluster(made, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1]), 2, 3, (1,)).tolist()
    assert found == pytest.approx([0, 0, 1, 1, 0, NAN, 0, 1, 0], nan_ok=True)


@pytest.mark.parametrize(
    ("how", "place", "expected"),
    [
        ("mean", "all", [2.0, 2.0, NAN, 6.0, 4.0]),
        ("sum", "all", [4.0, 4.0, NAN, 6.0, 4.0]),
        ("max", "all", [3.0, 3.0, NAN, 6.0, 4.0]),
        ("min", "all", [1.0, 1.0, NAN, 6.0, 4.0]),
        ("sum", "end", [0.0, 4.0, NAN, 6.0, 4.0]),
        ("sum", "start", [4.0, 0.0, NAN, 6.0, 4.0]),
    ],
)
def test_segment_pool_by_hand(how, place, expected):
    """The third token ends the first segment but has no score, so its number goes to the second."""
    made = torch.tensor([1.0, 3.0, NAN, 6.0, 4.0])
    found = transforms.segment_pool(made, torch.tensor([0, 0, 0, 4, 9]), how, place)
    np.testing.assert_array_equal(found.numpy(), expected)


GROUPED = {
    "rank_scale": lambda *made: transforms.rank_scale(*made, 0.0, 1.0),
    "standardise": transforms.standardise,
    "min_max": transforms.min_max,
    "top": lambda *made: transforms.top(*made, 0.4, which="largest", rule="floor", minimum=1),
    "cluster": lambda *made: transforms.cluster(*made, 3, (1, 2)),
    **{
        f"threshold {at}": lambda *made, at=at: transforms.keep_side(
            *made[:2], transforms.threshold_of(*made, at, value=0.3, factor=0.5, classes=3, cut=1), "above"
        )
        for at in ("mean", "median", "quantile", "iqr", "otsu")
    },
}


@pytest.mark.parametrize("name", GROUPED)
@exactly
@given(tokens=tokens)
def test_positive_scale_and_shift_change_nothing(name, tokens):
    """Law 2: only comparisons count. Scaling these numbers is exact."""
    values, group = split(tokens)
    first = GROUPED[name](values, group, 4)
    scaled = GROUPED[name](4 * values + 8, group, 4)
    torch.testing.assert_close(scaled, first, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in GROUPED if name != "top"])
@exactly
@given(tokens=tokens, seed=st.integers(0, 5))
def test_order_of_the_tokens_does_not_matter(name, tokens, seed):
    """Except for ``top``, where it decides ties."""
    values, group = split(tokens)
    mixed = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    first = GROUPED[name](values, group, 4)
    torch.testing.assert_close(GROUPED[name](values[mixed], group[mixed], 4), first[mixed], equal_nan=True)


@pytest.mark.parametrize("name", GROUPED)
@exactly
@given(tokens=tokens)
def test_groups_are_independent(name, tokens):
    values, group = split(tokens)
    together = GROUPED[name](values, group, 4)
    for number in range(4):
        mine = group == number
        alone = GROUPED[name](values[mine], torch.zeros(int(mine.sum()), dtype=torch.long), 1)
        torch.testing.assert_close(alone, together[mine], equal_nan=True)
