import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tokenward.evaluation.statistics import mean_figure

SCRIPT = Path(__file__).parents[1] / "scripts" / "planted_study.py"
SMALL = {"groups": 300, "held_out": 80, "steps": 60, "width": 16}


@pytest.fixture(scope="module")
def planted():
    spec = importlib.util.spec_from_file_location("planted_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ranks_of_equal_values_are_their_mean_and_types_are_averaged(planted):
    assert planted.in_ranks(np.array([5.0, 1.0, 5.0, 7.0])).tolist() == [2.5, 1.0, 2.5, 4.0]
    cell = planted.Cell(
        accuracy=np.zeros(1),
        longer=np.zeros(1),
        learned=np.array([0.2, 0.9, 0.4]),
        planted=np.array([0.0, 1.0, 0.0]),
        types=np.array([3, 1, 3]),
        lengths=np.array([2, 1]),
    )
    learned, scores = planted.by_type(cell)
    assert learned == pytest.approx([0.9, 0.3])
    assert scores.tolist() == [1.0, 0.0]
    found = planted.credit(cell)
    assert found.auroc == 1.0
    # The extreme so far starts anew with each sequence: 0, 1 | 0.
    assert found.running == pytest.approx(found.pearson)


@pytest.mark.parametrize(("case", "sign"), [("keyword", 1), ("worst", -1)])
def test_the_strongest_marked_token_decides_and_length_says_nothing(planted, case, sign):
    rng = np.random.default_rng(3)
    world = planted.WORLDS[case](rng)
    rows = planted.groups(world, rng, 300)
    best, sizes = [], []
    for row in rows:
        extremes = [sign * float((sign * scores).max()) for scores in row.scores]
        order = np.argsort(np.array(row.encoded.comparison.ranks), kind="stable")
        assert (np.diff(np.array(extremes)[order]) <= 0).all()
        best += extremes
        sizes += map(len, row.encoded.responses)
    assert abs(np.corrcoef(best, sizes)[0, 1]) < 0.06


def test_the_average_finds_the_planted_mean_where_the_sum_is_misled_by_length(planted):
    sizes = planted.Sizes(**SMALL)
    average, total = (
        planted.run("mean", planted.METHODS[name]._replace(learning_rate=2e-2), 7, sizes)
        for name in ("average", "sum")
    )
    lead = mean_figure(average.accuracy - total.accuracy)
    assert lead.low > 0.1
    assert planted.credit(average).spearman > 0.8
    assert total.longer.mean() > 0.9
