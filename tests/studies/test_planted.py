import numpy as np
import pytest

from studies.planted.credit import by_type, credit, in_ranks
from studies.planted.learning import METHODS, Cell, Sizes, run
from studies.planted.worlds import WORLDS, groups
from tokenward.evaluation.statistics import mean_figure

SMALL = {"groups": 160, "eval": 60, "steps": 40, "width": 16}


def test_equal_values_share_their_mean_rank_and_types_are_averaged():
    assert in_ranks(np.array([5.0, 1.0, 5.0, 7.0])).tolist() == [2.5, 1.0, 2.5, 4.0]
    cell = Cell(
        accuracy=np.zeros(1),
        longer=np.zeros(1),
        learned=np.array([0.2, 0.9, 0.4]),
        planted=np.array([0.0, 1.0, 0.0]),
        types=np.array([3, 1, 3]),
        lengths=np.array([2, 1]),
    )
    learned, scores = by_type(cell)
    assert learned == pytest.approx([0.9, 0.3])
    assert scores.tolist() == [1.0, 0.0]
    found = credit(cell)
    assert found.auroc == 1.0
    # The extreme so far restarts with each sequence: 0, 1 | 0.
    assert found.running == pytest.approx(found.pearson)


@pytest.mark.parametrize(("case", "sign"), [("keyword", 1), ("worst", -1)])
def test_the_strongest_marked_token_decides_independent_of_length(case, sign):
    rng = np.random.default_rng(3)
    world = WORLDS[case](rng)
    rows = groups(world, rng, 300)
    best, sizes = [], []
    for row in rows:
        extremes = [sign * float((sign * scores).max()) for scores in row.scores]
        order = np.argsort(np.array(row.comparison.ranks), kind="stable")
        assert (np.diff(np.array(extremes)[order]) <= 0).all()
        best += extremes
        sizes += map(len, row.responses)
    assert abs(np.corrcoef(best, sizes)[0, 1]) < 0.06


@pytest.mark.slow
def test_the_average_recovers_the_planted_mean_and_the_sum_follows_length():
    sizes = Sizes(**SMALL)
    average, total = (
        run("mean", METHODS[name]._replace(learning_rate=2e-2), 7, sizes) for name in ("average", "sum")
    )
    lead = mean_figure(average.accuracy - total.accuracy)
    assert lead.low > 0.1
    assert credit(average).spearman > 0.8
    assert total.longer.mean() > 0.9
