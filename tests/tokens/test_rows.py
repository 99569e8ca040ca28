"""How comparisons are laid out, and where each token is predicted: small cases by hand, then laws."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokens.rows import encoded
from tokenward.tokens.batches import collate
from tokenward.tokens.layouts import predicting_positions, visible

PAIR = encoded([10, 11, 12], [20, 21], [30, 31, 32])
SHORT = encoded([40], [50], [60])
TRIPLE = encoded([1, 2], [3], [4, 5], [6], ranks=(1, 0, 2))

lengths = st.integers(1, 6)
comparisons = st.lists(st.tuples(lengths, st.lists(lengths, min_size=2, max_size=4)), min_size=1, max_size=4)


def batch_of(*items, layout, pad_id=0, whole=True):
    return collate(list(items), layout=layout, pad_id=pad_id, whole=whole)


def seen(mask: torch.Tensor) -> list[str]:
    """One string per query: x where it sees the key."""
    return ["".join(".x"[int(cell)] for cell in row) for row in mask.tolist()]


def test_a_shared_row_by_hand():
    batch = batch_of(PAIR, layout="shared")
    assert batch.inputs.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32]]
    # Positions restart after the prompt, for each response.
    assert batch.inputs.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert batch.tokens.ids.tolist() == [20, 21, 30, 31, 32]
    # 20 and 30 are both predicted by the last prompt token (place 2), each other token by the one before it.
    assert batch.inputs.predicted_from.tolist() == [2, 3, 2, 5, 6]
    assert batch.tokens.response.tolist() == [0, 0, 1, 1, 1]
    assert batch.tokens.comparison.tolist() == [0, 0]
    assert batch.tokens.rank.tolist() == [0, 1]
    assert (batch.tokens.comparisons, batch.tokens.responses) == (1, 2)


def test_the_end_of_a_turn_closes_a_response_that_was_not_cut():
    cut = replace(PAIR, eos=[0, 2])
    assert batch_of(cut, layout="shared").tokens.eos.tolist() == [False, False, False, True, True]


def test_separate_rows_by_hand():
    batch = batch_of(PAIR, layout="separate", pad_id=9)
    assert batch.inputs.input_ids.tolist() == [[10, 11, 12, 20, 21, 9], [10, 11, 12, 30, 31, 32]]
    assert batch.inputs.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert batch.inputs.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    # Row 1 begins at 6 in the flattened 2 x 6 rows.
    assert batch.inputs.predicted_from.tolist() == [2, 3, 6 + 2, 6 + 3, 6 + 4]
    assert batch.tokens.ids.tolist() == [20, 21, 30, 31, 32]
    assert batch.tokens.response.tolist() == [0, 0, 1, 1, 1]


def test_two_shared_rows_by_hand():
    batch = batch_of(SHORT, PAIR, layout="shared", pad_id=7)
    # One row, end to end: nothing is padded.
    assert batch.inputs.input_ids.tolist() == [[40, 50, 60, 10, 11, 12, 20, 21, 30, 31, 32]]
    assert batch.inputs.position_ids.tolist() == [[0, 1, 1, 0, 1, 2, 3, 4, 3, 4, 5]]
    assert batch.inputs.predicted_from.tolist() == [0, 0, 3 + 2, 3 + 3, 3 + 2, 3 + 5, 3 + 6]
    assert batch.tokens.response.tolist() == [0, 1, 2, 2, 3, 3, 3]
    assert batch.tokens.comparison.tolist() == [0, 0, 1, 1]
    assert (batch.tokens.comparisons, batch.tokens.responses) == (2, 4)


def test_more_than_two_responses_by_hand():
    batch = batch_of(TRIPLE, PAIR, layout="shared")
    assert batch.inputs.input_ids[0, :6].tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.inputs.position_ids[0, :6].tolist() == [0, 1, 2, 2, 3, 2]
    assert batch.inputs.predicted_from[:4].tolist() == [1, 1, 3, 1]
    assert batch.tokens.response.tolist() == [0, 1, 1, 2, 3, 3, 4, 4, 4]
    assert batch.tokens.comparison.tolist() == [0, 0, 0, 1, 1]
    assert batch.tokens.rank.tolist() == [1, 0, 2, 0, 1]


def test_who_sees_whom_by_hand():
    # Two prompt tokens, two of the first response, one of the second; then another comparison.
    assert seen(visible(torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 2, 0, 1]]))) == [
        "x......",
        "xx.....",
        "xxx....",
        "xxxx...",
        "xx..x..",
        ".....x.",
        ".....xx",
    ]


def test_a_batch_knows_who_sees_whom():
    tree = batch_of(SHORT, TRIPLE, layout="shared").inputs.tree
    assert tree.owner.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 2, 0, 0, 1, 2, 2, 3]]
    assert batch_of(SHORT, layout="separate").inputs.tree is None


def test_a_common_beginning_is_read_once():
    batch = batch_of(encoded([1, 2], [7, 8, 3], [7, 8, 4, 5]), layout="shared")
    assert batch.inputs.input_ids.tolist() == [[1, 2, 7, 8, 3, 4, 5]]
    assert batch.inputs.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 5]]
    assert batch.inputs.tree.owner.tolist() == [[0] * 7, [0, 0, 0, 0, 1, 2, 2]]
    assert batch.tokens.ids.tolist() == [7, 8, 3, 7, 8, 4, 5]
    assert batch.inputs.predicted_from.tolist() == [1, 2, 3, 1, 2, 3, 5]
    assert batch.inputs.placed_at.tolist() == [2, 3, 4, 2, 3, 5, 6]


def test_one_response_may_begin_another():
    batch = batch_of(encoded([1], [7, 8], [7, 8, 9]), layout="shared")
    assert batch.inputs.input_ids.tolist() == [[1, 7, 8, 9]]
    assert batch.inputs.tree.owner.tolist() == [[0] * 4, [0, 0, 0, 2]]
    assert batch.inputs.placed_at.tolist() == [1, 2, 1, 2, 3]


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_nothing_is_read_from_the_last_token_with_weight_on(layout):
    weights = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])]
    row = replace(PAIR, weights=weights)
    batch = collate([row], layout=layout, pad_id=0, whole=False)
    # 20 is predicted by the prompt alone, 31 by the prompt and 30.
    if layout == "shared":
        assert batch.inputs.input_ids.tolist() == [[10, 11, 12, 30]]
        assert batch.inputs.predicted_from[batch.tokens.kept].tolist() == [2, 3]
    else:
        assert batch.inputs.input_ids.tolist() == [[10, 11, 12, 0], [10, 11, 12, 30]]
        assert batch.inputs.predicted_from[batch.tokens.kept].tolist() == [2, 4 + 3]
    # What was not laid out cannot be asked for by mistake.
    assert int(batch.inputs.placed_at[-1]) >= batch.inputs.input_ids.numel()


def test_without_weights_only_the_last_token_is_not_read():
    assert batch_of(PAIR, layout="shared", whole=False).inputs.input_ids.tolist() == [
        [10, 11, 12, 20, 30, 31]
    ]


def test_the_next_token_shift_by_hand():
    # A response of 3 at places 5, 6, 7; the prompt ends at place 2.
    assert predicting_positions(torch.tensor([5, 6, 7]), 2).tolist() == [2, 5, 6]
    assert predicting_positions(torch.tensor([3]), 2).tolist() == [2]
    assert predicting_positions(torch.tensor([], dtype=torch.int64), 2).tolist() == []


@pytest.mark.parametrize("layout", ["shared", "separate"])
@given(comparisons)
@settings(derandomize=True, deadline=None, max_examples=30)
def test_each_token_is_predicted_by_the_token_before_it(layout, shapes):
    items, fresh = [], iter(range(1, 10_000))
    for prompt, sizes in shapes:
        items.append(encoded(*([next(fresh) for _ in range(n)] for n in (prompt, *sizes))))
    batch = batch_of(*items, layout=layout)
    before = [
        token for item in items for response in item.responses for token in [item.prompt[-1], *response[:-1]]
    ]
    place = [
        len(item.prompt) - 1 + step
        for item in items
        for response in item.responses
        for step in range(len(response))
    ]
    assert batch.inputs.input_ids.flatten()[batch.inputs.predicted_from].tolist() == before
    assert batch.inputs.position_ids.flatten()[batch.inputs.predicted_from].tolist() == place
    assert batch.tokens.ids.tolist() == [
        token for item in items for response in item.responses for token in response
    ]


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_the_pad_id_changes_nothing_but_the_padding(layout):
    # 32 is a response token, as when padding is EOS.
    one, other = (batch_of(SHORT, PAIR, layout=layout, pad_id=pad) for pad in (0, 32))
    assert one.inputs.predicted_from.tolist() == other.inputs.predicted_from.tolist()
    assert one.tokens.ids.tolist() == other.tokens.ids.tolist()
    assert one.tokens.kept.tolist() == other.tokens.kept.tolist()
    assert one.inputs.attention_mask.tolist() == other.inputs.attention_mask.tolist()
    differ = one.inputs.input_ids != other.inputs.input_ids
    assert one.inputs.input_ids[differ].unique().tolist() == ([] if layout == "shared" else [0])


def test_values_travel_with_their_tokens():
    rows = [
        replace(
            PAIR,
            weights=[torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.0, 0.5])],
            reference_logp=[torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0, -5.0])],
            scores=[torch.tensor([9.0, 8.0]), torch.tensor([7.0, 6.0, 5.0])],
        ),
        replace(
            SHORT,
            weights=[torch.tensor([0.0]), torch.tensor([3.0])],
            reference_logp=[torch.tensor([-6.0]), torch.tensor([-7.0])],
            scores=[torch.tensor([4.0]), torch.tensor([3.0])],
        ),
    ]
    batch = collate(rows, layout="separate", pad_id=0)
    assert batch.tokens.ids.tolist() == [20, 21, 30, 31, 32, 50, 60]
    assert batch.tokens.weights.tolist() == [0.0, 1.0, 2.0, 0.0, 0.5, 0.0, 3.0]
    assert batch.tokens.kept.tolist() == [1, 2, 4, 6]
    assert batch.tokens.reference_logp.tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0]
    assert batch.tokens.scores.tolist() == [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]


def test_without_values_every_token_counts_once():
    batch = batch_of(PAIR, layout="shared")
    assert batch.tokens.weights.tolist() == [1.0] * 5
    assert batch.tokens.kept.tolist() == [0, 1, 2, 3, 4]
    assert (batch.tokens.reference_logp, batch.tokens.scores) == (None, None)


def test_what_only_some_rows_have_is_refused():
    some = {"scores": [torch.ones(1)] * 2, "segments": [torch.tensor([0])] * 2}
    for name, word in (("scores", "2 token values for 7"), ("segments", "some rows have segments")):
        rows = [PAIR, replace(SHORT, **{name: some[name]})]
        with pytest.raises(ValueError, match=word):
            collate(rows, layout="shared", pad_id=0)
    with pytest.raises(ValueError, match="start_id"):
        collate([PAIR], layout="encoder_decoder", pad_id=0)


def test_a_moved_batch_is_moved_whole():
    row = replace(SHORT, scores=[torch.ones(1)] * 2, segments=[torch.tensor([0])] * 2)
    for layout in ("shared", "encoder_decoder"):
        batch = collate([row], layout=layout, pad_id=0, start_id=1)
        tokens = replace(batch.tokens, statistics={"kl": torch.ones(2)})
        batch = replace(batch, tokens=tokens).with_value("a", torch.ones(2)).to("meta")
        tensors = [
            item
            for part in (batch.inputs, batch.tokens)
            for name in fields(part)
            if isinstance(item := getattr(part, name.name), torch.Tensor)
        ]
        if batch.inputs.tree is not None:
            tensors += [batch.inputs.tree.owner, batch.inputs.tree.comparisons[0].pieces[0].mask]
        tensors += [batch.tokens.values["a"], batch.tokens.statistics["kl"]]
        assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_the_shape_of_a_row():
    assert PAIR.shape("shared") == (1, 8)
    assert PAIR.shape("separate") == (2, 6)
    assert TRIPLE.shape("separate") == (3, 4)
    assert PAIR.shape("encoder_decoder") == (2, 3 + 1 + 3), "with the decoder's start"


def test_where_each_token_is_read_by_hand():
    """A reward is read where its token has been read, a log-probability one place earlier."""
    assert batch_of(PAIR, layout="shared").inputs.placed_at.tolist() == [3, 4, 5, 6, 7]
    assert batch_of(SHORT, PAIR, layout="shared").inputs.placed_at.tolist() == [
        1,
        2,
        3 + 3,
        3 + 4,
        3 + 5,
        3 + 6,
        3 + 7,
    ]
    assert batch_of(PAIR, layout="separate").inputs.placed_at.tolist() == [3, 4, 6 + 3, 6 + 4, 6 + 5]


@pytest.mark.parametrize("layout", ["shared", "separate", "encoder_decoder"])
@settings(derandomize=True, deadline=None)
@given(comparisons)
def test_every_token_is_read_at_its_place(layout, sizes):
    ids = iter(range(1, 1000))
    items = [
        encoded([next(ids) for _ in range(prompt)], *[[next(ids) for _ in range(n)] for n in lengths])
        for prompt, lengths in sizes
    ]
    batch = collate(list(items), layout=layout, pad_id=0, start_id=9999)
    read = batch.inputs.input_ids if batch.inputs.decoder_ids is None else batch.inputs.decoder_ids
    assert read.flatten()[batch.inputs.placed_at].tolist() == batch.tokens.ids.tolist()


def test_encoder_and_decoder_rows_by_hand():
    batch = collate([PAIR], layout="encoder_decoder", pad_id=7, start_id=9)
    assert batch.inputs.input_ids.tolist() == [[10, 11, 12], [10, 11, 12]]
    assert batch.inputs.decoder_ids.tolist() == [[9, 20, 21, 7], [9, 30, 31, 32]]
    assert batch.inputs.predicted_from.tolist() == [0, 1, 4 + 0, 4 + 1, 4 + 2]
    assert batch.inputs.placed_at.tolist() == [1, 2, 4 + 1, 4 + 2, 4 + 3]
    both = collate([SHORT, PAIR], layout="encoder_decoder", pad_id=7, start_id=9)
    assert both.inputs.input_ids.tolist() == [[40, 7, 7], [40, 7, 7], [10, 11, 12], [10, 11, 12]]
    assert both.inputs.attention_mask.tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert both.inputs.decoder_ids.tolist() == [[9, 50, 7, 7], [9, 60, 7, 7], [9, 20, 21, 7], [9, 30, 31, 32]]
    assert both.inputs.predicted_from.tolist() == [0, 4, 8, 9, 12, 13, 14]
    assert both.tokens.ids.tolist() == [50, 60, 20, 21, 30, 31, 32]


def test_segments_are_numbered_through_the_batch():
    rows = [
        replace(PAIR, segments=[torch.tensor([0, 0]), torch.tensor([1, 4, 4])]),
        replace(SHORT, segments=[torch.tensor([0]), torch.tensor([2])]),
    ]
    for layout in ("shared", "separate"):
        assert collate(rows, layout=layout, pad_id=0).tokens.segment.tolist() == [0, 0, 1, 2, 2, 3, 4]
    assert collate(rows[1:], layout="shared", pad_id=0).tokens.segment.tolist() == [0, 1]
    assert batch_of(PAIR, layout="shared").tokens.segment is None
