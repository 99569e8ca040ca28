"""The arithmetic of the benchmarks, against numbers worked by hand."""

from dataclasses import replace

import pytest

from benchmarks import growth, table, vocabulary
from benchmarks.machine import family_of, shares
from benchmarks.model import (
    Cost,
    Layout,
    Pair,
    Rates,
    Shape,
    attention_operations,
    full_logits,
    product_operations,
    scoring_pass,
    separate,
    shared,
    training_peak,
    training_step,
    visible_attention,
)
from benchmarks.results import Result, holds, write
from benchmarks.statistics import bootstrap, paired_ratio, rise
from benchmarks.turns import Turns, order, same_mathematics

# Per layer, q and o: 4 x 4, k and v: 4 x 2, gate and up: 4 x 6, down: 6 x 4 = 16 + 8 + 8 + 16 + 24 + 24 + 24 = 120.
SMALL = Shape(layers=2, width=4, heads=2, kv_heads=1, head_dim=2, inner=6, vocabulary=10)
PAIRS = [Pair(3, (2, 4)), Pair(5, (10, 1))]
LAYOUT = Layout((10,), 5)
RESULT = Result(
    claim="made", target=">= 4.0", ratio=5.0, low=4.5, high=5.5, ours={"seconds": [1.0]},
    peer={"seconds": [5.0]}, repetitions=1, predicted=4.0, settings={},
)  # fmt: skip


def test_weights_and_layouts_are_counted():
    assert (SMALL.body_weights, SMALL.head_weights, SMALL.weights) == (240, 40, 280)
    default = Shape(layers=30, width=576, heads=9, kv_heads=3, head_dim=64, inner=1536, vocabulary=49152)
    assert default.weights + 61 * 576 == 134_515_008, "with the norms, the number on the model card"
    # 3 + 2 + 4 = 9 and 5 + 10 + 1 = 16; all 17 response tokens are kept.
    assert shared(PAIRS) == Layout((16, 16), 17)
    assert shared(PAIRS, padded=False) == Layout((9, 16), 17)
    # 30 % of 2, 4, 10 and 1 tokens is 0, 1, 3 and 0, and at least one is kept: 1 + 1 + 3 + 1.
    assert shared(PAIRS, fraction=0.3).head_rows == 6
    # The longest of 5, 7, 15 and 6 pads all four; the last position predicts nothing.
    assert separate(PAIRS) == Layout((15,) * 4, 56)


def test_operations_are_counted():
    layout = Layout((4, 6), 5)
    # 2 x 3 passes x 10 tokens x 240 weights; 2 x 4 x 5 rows x 40 weights.
    assert product_operations(SMALL, layout) == (14_400, 1_600)
    assert product_operations(SMALL, layout, body_passes=1, head_passes=1) == (4_800, 400)
    # 4 x 2 layers x 4 wide x (16 + 36).
    assert attention_operations(SMALL, layout, passes=1) == 1_664
    # A prompt of 2 sees 1 + 2; responses of 1 and 2 see 2 x 1 + 1 and 2 x 2 + 3: 13 in total, 4 x 2 x 4 each.
    assert visible_attention(SMALL, [Pair(2, (1, 2))], passes=1) == 32 * 13


def test_bytes_are_counted():
    # 6 x 4 + 4 x 4 + 4 x 6 = 64 floats per token and layer: 512 bytes over two layers.
    assert SMALL.saved_per_token == 512
    cost = training_step(SMALL, LAYOUT)
    # 5 x 10 x 512, 4 x 8 x 5 x 10, 4 x 7 x 280.
    assert (cost.products, cost.moved) == (14_400 + 1_600, 25_600 + 1_600 + 7_840)
    # Recomputed: 2 x 4 passes, and 4.5 instead of 3.5 times 4 x 2 x 4 x 100.
    again = training_step(SMALL, LAYOUT, recomputed=True)
    assert (cost.attention, again.attention, again.products) == (11_200, 14_400, 19_200 + 1_600)
    assert Cost(100, 20, 60).seconds(Rates(operations=10, bytes=30)) == 14.0
    # 2 x 10 x 512, and 4 x (3 x 5 x 10 + 280).
    assert scoring_pass(SMALL, LAYOUT).moved == 10_240 + 1_720
    assert scoring_pass(SMALL, LAYOUT, saves=True).moved == 15_360 + 1_720
    # 4 x 4 x 280, 10 x 512, 4 x 5 x 10 x 3.
    assert training_peak(SMALL, LAYOUT, logit_rows=5, logit_copies=3) == 4_480 + 5_120 + 600
    # Per token, 256 bytes of one layer, and 4 x 2 x 4 for the inputs of both.
    recomputed = training_peak(SMALL, LAYOUT, logit_rows=5, logit_copies=3, recomputed=True)
    assert recomputed == 4_480 + 10 * (256 + 32) + 600
    assert full_logits(8, 10) == 320
    # 100 more tokens of width 4 need 4 x 4 x 400 bytes of weights, gradients and moments.
    assert vocabulary.excess(1_000, 8_400, width=4, sizes=(50, 150)) == 1_000


def test_ratios_are_paired_within_a_repetition():
    found = paired_ratio([4.0, 8.0, 30.0], [1.0, 2.0, 6.0])
    assert (found.value, found.low, found.high) == (4.0, 4.0, 5.0)
    assert found.overall == pytest.approx(42 / 9)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_ratio([1.0], [1.0, 2.0])
    few, many = (
        bootstrap([1.0 + 0.01 * (n % 10) for n in range(count)], resamples=400) for count in (10, 1000)
    )
    assert all(low <= 1.045 <= high for low, high in (few, many))
    assert many[1] - many[0] < (few[1] - few[0]) / 2
    assert [rise([2.0, 2.0]), rise([1.0, 3.0, 2.0]), rise([4.0, 2.0, 1.0]), rise([4.0, 2.0, 3.0])] == [
        1.0, 3.0, 0.5, 1.5,
    ]  # fmt: skip
    assert [order(["a", "b"], number) for number in (0, 1)] == [["a", "b"], ["b", "a"]]
    measured = [growth.Measured(11.0, 1.0, 0, 0), growth.Measured(101.0, 1.0, 0, 0)]
    assert growth.per_pair("policy", measured, [10, 100]) == [1.0, 1.0]


def test_layouts_are_those_of_the_collator():
    lengths = [[3, [2, 4], 2], [5, [10, 1], 4], [1, [1, 1], 2]]
    facts = {"ours": {"lengths": lengths, "layouts": [[[1, 16], [1, 9]], [[1, 3]]]}}
    turns = Turns({}, {}, {}, facts, Rates(1, 1))
    assert turns.layouts("ours", 2) == [Layout((16, 9), 6), Layout((3,), 2)]
    assert turns.pairs("ours")[:2] == PAIRS


def test_sides_with_different_losses_are_not_timed():
    losses = {"a": (0.5, 0.4), "b": (0.50005, 0.4), "c": (0.6, 0.4), "d": (float("nan"), 0.4)}
    assert same_mathematics(losses, ["a", "b"], within=1e-4) == pytest.approx(5e-5)
    for other in ("c", "d"):
        with pytest.raises(ValueError, match="disagree"):
            same_mathematics(losses, ["a", other], within=1e-4)


def test_a_profile_sorts_operations_into_families():
    assert family_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert family_of("Optimizer.step#AdamW.step") == "optimizer"
    assert family_of("aten::embedding") == "other"
    found = shares([("aten::mm", 3.0), ("aten::silu", 1.0)])
    assert (found["matrix products"], sum(found.values())) == (0.75, 1.0)


def test_the_table_is_written_between_its_markers_without_trials(tmp_path):
    targets = ((">= 4.0", 4.0), (">= 4.0", 3.9), ("<= 1.15", 1.2), ("reported", 0.0))
    assert [holds(*target) for target in targets] == [True, False, False, True]
    write(RESULT, tmp_path)
    write(replace(RESULT, claim="missed", ratio=3.0, low=3.0, high=3.0, predicted=None), tmp_path)
    content = table.rendered(table.read(tmp_path))
    assert "| `made` | >= 4.0 | 5 | 4.5 to 5.5 | 4 | yes |" in content
    assert "| `missed` | >= 4.0 | 3 |  |  | **no** |" in content
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter"
    assert table.between(page, "new") == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter"
    with pytest.raises(ValueError, match="needs the lines"):
        table.between("no markers", "new")
    write(replace(RESULT, quick=True), tmp_path)
    with pytest.raises(ValueError, match="trials"):
        table.read(tmp_path)


def test_the_page_has_the_table_of_the_stored_results():
    page = table.PAGE.read_text()
    assert table.between(page, table.rendered(table.read(table.FOLDER))) == page
