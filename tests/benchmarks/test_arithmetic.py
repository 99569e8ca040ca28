"""The benchmarks' own arithmetic, against numbers worked by hand."""

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

# q and o: 4 x 4, k and v: 4 x 2, gate and up: 4 x 6, down: 6 x 4 = 16 + 8 + 8 + 16 + 24 + 24 + 24 = 120 a layer.
SMALL = Shape(layers=2, width=4, heads=2, kv_heads=1, head_dim=2, inner=6, vocabulary=10)
PAIRS = [Pair(3, (2, 4)), Pair(5, (10, 1))]
RESULT = Result(
    claim="made",
    target=">= 4.0",
    ratio=5.0,
    low=4.5,
    high=5.5,
    ours={"seconds": [1.0]},
    peer={"seconds": [5.0]},
    repetitions=1,
    predicted=4.0,
    settings={},
)


def test_weights_are_those_of_a_llama():
    assert SMALL.body_weights == 240
    assert SMALL.head_weights == 40
    assert SMALL.weights == 280


def test_the_default_model_has_the_weights_that_its_card_says():
    shape = Shape(layers=30, width=576, heads=9, kv_heads=3, head_dim=64, inner=1536, vocabulary=49152)
    norms = 61 * 576
    assert shape.weights + norms == 134_515_008


def test_shared_rows_hold_the_prompt_once_and_separate_rows_twice():
    # 3 + 2 + 4 = 9 and 5 + 10 + 1 = 16; all tokens of 17 are kept.
    assert shared(PAIRS) == Layout((16, 16), 17)
    assert shared(PAIRS, padded=False) == Layout((9, 16), 17)
    # Of 2, 4, 10 and 1 tokens 30 % are 0, 1, 3 and 0, and at least one is kept: 1 + 1 + 3 + 1.
    assert shared(PAIRS, fraction=0.3).head_rows == 6
    # The longest of 5, 7, 15 and 6 pads all four; the last position predicts nothing.
    assert separate(PAIRS) == Layout((15,) * 4, 56)


def test_products_and_attention_are_counted():
    layout = Layout((4, 6), 5)
    # 2 x 3 passes x 10 tokens x 240 weights; 2 x 4 x 5 rows x 40 weights.
    assert product_operations(SMALL, layout) == (14_400, 1_600)
    assert product_operations(SMALL, layout, body_passes=1, head_passes=1) == (4_800, 400)
    # 4 x 2 layers x 4 wide x (16 + 36).
    assert attention_operations(SMALL, layout, passes=1) == 1_664
    # A prompt of 2 sees 1 + 2; responses of 1 and 2 see 2 x 1 + 1 and 2 x 2 + 3: 13 in all, 4 x 2 x 4 each.
    assert visible_attention(SMALL, [Pair(2, (1, 2))], passes=1) == 32 * 13


def test_bytes_moved_by_a_step_are_counted():
    layout = Layout((10,), 5)
    # 6 x 4 + 4 x 4 + 4 x 6 = 64 floats a token and layer: 512 bytes over two layers.
    assert SMALL.saved_per_token == 512
    cost = training_step(SMALL, layout)
    # 5 x 10 x 512, 4 x 8 x 5 x 10, 4 x 7 x 280.
    assert cost.moved == 25_600 + 1_600 + 7_840
    assert cost.products == 14_400 + 1_600
    # Once more forward: 2 x 4 passes, and 4.5 instead of 3.5 times 4 x 2 x 4 x 100.
    again = training_step(SMALL, layout, recomputed=True)
    assert again.products == 19_200 + 1_600
    assert (cost.attention, again.attention) == (11_200, 14_400)
    assert Cost(100, 20, 60).seconds(Rates(operations=10, bytes=30)) == 14.0


def test_a_pass_without_gradients_moves_less():
    layout = Layout((10,), 5)
    # 2 x 10 x 512, and 4 x (3 x 5 x 10 + 280).
    assert scoring_pass(SMALL, layout).moved == 10_240 + 1_720
    assert scoring_pass(SMALL, layout, saves=True).moved == 15_360 + 1_720


def test_peak_memory_holds_state_activations_and_logits():
    # 4 x 4 x 280, 10 x 512, 4 x 5 x 10 x 3.
    assert training_peak(SMALL, Layout((10,), 5), logit_rows=5, logit_copies=3) == 4_480 + 5_120 + 600
    # Of a layer 256 bytes a token, and 4 x 2 x 4 for the inputs of both.
    recomputed = training_peak(SMALL, Layout((10,), 5), logit_rows=5, logit_copies=3, recomputed=True)
    assert recomputed == 4_480 + 10 * (256 + 32) + 600
    assert full_logits(8, 10) == 320


def test_ratios_are_paired_within_a_repetition():
    found = paired_ratio([4.0, 8.0, 30.0], [1.0, 2.0, 6.0])
    assert found.value == 4.0
    assert (found.low, found.high) == (4.0, 5.0)
    assert found.overall == pytest.approx(42 / 9)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_ratio([1.0], [1.0, 2.0])


def test_an_interval_holds_the_median_and_shrinks_with_repetitions():
    few, many = ([1.0 + 0.01 * (number % 10) for number in range(count)] for count in (10, 1000))
    widths = []
    for values in (few, many):
        low, high = bootstrap(values, resamples=400)
        assert low <= 1.045 <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_rise_is_one_where_nothing_grows_and_less_where_a_cost_falls():
    assert rise([2.0, 2.0]) == 1.0
    assert rise([1.0, 3.0, 2.0]) == 3.0
    assert rise([4.0, 2.0, 1.0]) == 0.5
    assert rise([4.0, 2.0, 3.0]) == 1.5


def test_preparation_is_what_a_training_stage_spends_beside_its_steps():
    measured = [growth.Measured(11.0, 1.0, 0, 0), growth.Measured(101.0, 1.0, 0, 0)]
    assert growth.per_pair("policy", measured, [10, 100]) == [1.0, 1.0]


def test_vocabulary_counts_what_grows_beside_the_heads_state():
    # 100 more tokens of width 4 need 4 x 4 x 400 bytes of weights, gradients and moments.
    assert vocabulary.excess(1_000, 8_400, width=4, sizes=(50, 150)) == 1_000


def test_turns_alternate():
    assert order(["a", "b"], 0) == ["a", "b"]
    assert order(["a", "b"], 1) == ["b", "a"]


def test_layouts_are_those_of_the_collator():
    lengths = [[3, [2, 4], 2], [5, [10, 1], 4], [1, [1, 1], 2]]
    facts = {"ours": {"lengths": lengths, "layouts": [[[1, 16], [1, 9]], [[1, 3]]]}}
    turns = Turns({}, {}, {}, facts, Rates(1, 1))
    assert turns.layouts("ours", 2) == [Layout((16, 9), 6), Layout((3,), 2)]
    assert turns.pairs("ours")[:2] == PAIRS


def test_sides_that_compute_something_else_are_not_timed():
    losses = {"a": (0.5, 0.4), "b": (0.50005, 0.4), "c": (0.6, 0.4), "d": (float("nan"), 0.4)}
    assert same_mathematics(losses, ["a", "b"], within=1e-4) == pytest.approx(5e-5)
    for other in ("c", "d"):
        with pytest.raises(ValueError, match="disagree"):
            same_mathematics(losses, ["a", other], within=1e-4)


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [(">= 4.0", 4.0, True), (">= 4.0", 3.9, False), ("<= 1.15", 1.2, False), ("reported", 0.0, True)],
)
def test_targets(target, value, met):
    assert holds(target, value) is met


def test_a_profile_sorts_operations_into_families():
    assert family_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert family_of("Optimizer.step#AdamW.step") == "optimizer"
    assert family_of("aten::embedding") == "other"
    found = shares([("aten::mm", 3.0), ("aten::silu", 1.0)])
    assert found["matrix products"] == 0.75
    assert sum(found.values()) == 1.0


def test_the_table_lies_between_its_markers(tmp_path):
    write(RESULT, tmp_path)
    write(replace(RESULT, claim="missed", ratio=3.0, low=3.0, high=3.0, predicted=None), tmp_path)
    content = table.rendered(table.read(tmp_path))
    assert "| `made` | >= 4.0 | 5 | 4.5 to 5.5 | 4 | yes |" in content
    assert "| `missed` | >= 4.0 | 3 |  |  | **no** |" in content
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter"
    assert table.between(page, "new") == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter"
    with pytest.raises(ValueError, match="needs the lines"):
        table.between("no markers", "new")


def test_a_trial_is_never_in_the_table(tmp_path):
    write(replace(RESULT, quick=True), tmp_path)
    with pytest.raises(ValueError, match="trials say nothing"):
        table.read(tmp_path)


def test_the_page_has_its_markers():
    page = table.PAGE.read_text()
    assert table.BEGIN in page
    assert table.END in page
