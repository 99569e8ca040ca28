"""Layouts of comparisons, and the position that predicts each token: small cases by hand, then laws."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokens.rows import encoded
from tokenward.tokens.batches import budgeted, collate
from tokenward.tokens.layouts import predicting_positions
from tokenward.tokens.rows import response_key
from tokenward.tokens.trees import visible

PAIR = encoded([10, 11, 12], [20, 21], [30, 31, 32])
SHORT = encoded([40], [50], [60])
TRIPLE = encoded([1, 2], [3], [4, 5], [6], ranks=(1, 0, 2))
LAYOUTS = ("shared", "separate", "encoder_decoder")

lengths = st.integers(1, 6)
comparisons = st.lists(st.tuples(lengths, st.lists(lengths, min_size=2, max_size=4)), min_size=1, max_size=4)


def batch_of(*items, layout="shared", pad_id=7, **options):
    return collate(list(items), layout=layout, pad_id=pad_id, start_id=9, **options)


def check(batch, **expected):
    """Compares the named inputs and tokens of a batch."""
    for name, values in expected.items():
        part = batch.inputs if hasattr(batch.inputs, name) else batch.tokens
        assert getattr(part, name).tolist() == values, name


def test_a_shared_row_by_hand():
    batch = batch_of(PAIR)
    check(
        batch,
        input_ids=[[10, 11, 12, 20, 21, 30, 31, 32]],
        position_ids=[[0, 1, 2, 3, 4, 3, 4, 5]],  # they restart after the prompt for each response
        ids=[20, 21, 30, 31, 32],
        # 20 and 30 are predicted by the last prompt token (position 2), every other token by the one before it.
        predicted_from=[2, 3, 2, 5, 6],
        placed_at=[3, 4, 5, 6, 7],  # a reward is read where its token is read, one position later
        response=[0, 0, 1, 1, 1],
        comparison=[0, 0],
        rank=[0, 1],
        weights=[1.0] * 5,
        kept=[0, 1, 2, 3, 4],
        eos=[False, True, False, False, True],
    )
    assert (batch.tokens.comparisons, batch.tokens.responses) == (1, 2)
    assert (batch.tokens.reference_logp, batch.tokens.scores, batch.tokens.segment) == (None, None, None)
    cut = batch_of(replace(PAIR, eos=[0, 2]))
    check(cut, eos=[False, False, False, True, True])


def test_several_shared_comparisons_by_hand():
    batch = batch_of(SHORT, PAIR)
    check(
        batch,
        input_ids=[[40, 50, 60, 10, 11, 12, 20, 21, 30, 31, 32]],  # one row without padding
        position_ids=[[0, 1, 1, 0, 1, 2, 3, 4, 3, 4, 5]],
        predicted_from=[0, 0, 3 + 2, 3 + 3, 3 + 2, 3 + 5, 3 + 6],
        placed_at=[1, 2, 3 + 3, 3 + 4, 3 + 5, 3 + 6, 3 + 7],
        response=[0, 1, 2, 2, 3, 3, 3],
        comparison=[0, 0, 1, 1],
    )
    assert (batch.tokens.comparisons, batch.tokens.responses) == (2, 4)
    batch = batch_of(SHORT, TRIPLE)
    check(batch, rank=[0, 1, 1, 0, 2], comparison=[0, 0, 1, 1, 1])
    assert batch.inputs.tree.owner.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 2, 0, 0, 1, 2, 2, 3]]


def test_separate_rows_by_hand():
    batch = batch_of(PAIR, layout="separate")
    check(
        batch,
        input_ids=[[10, 11, 12, 20, 21, 7], [10, 11, 12, 30, 31, 32]],
        position_ids=[[0, 1, 2, 3, 4, 5]] * 2,
        attention_mask=[[1, 1, 1, 1, 1, 0], [1] * 6],
        predicted_from=[2, 3, 6 + 2, 6 + 3, 6 + 4],  # row 1 begins at 6 in the flattened rows
        placed_at=[3, 4, 6 + 3, 6 + 4, 6 + 5],
        ids=[20, 21, 30, 31, 32],
        response=[0, 0, 1, 1, 1],
    )
    assert batch.inputs.tree is None


def test_encoder_and_decoder_rows_by_hand():
    check(
        batch_of(SHORT, PAIR, layout="encoder_decoder"),
        input_ids=[[40, 7, 7], [40, 7, 7], [10, 11, 12], [10, 11, 12]],
        attention_mask=[[1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]],
        decoder_ids=[[9, 50, 7, 7], [9, 60, 7, 7], [9, 20, 21, 7], [9, 30, 31, 32]],
        predicted_from=[0, 4, 8, 9, 12, 13, 14],
        placed_at=[1, 5, 9, 10, 13, 14, 15],
        ids=[50, 60, 20, 21, 30, 31, 32],
    )
    with pytest.raises(ValueError, match="start_id"):
        collate([PAIR], layout="encoder_decoder", pad_id=0)


def test_the_attention_mask_of_a_packed_row_by_hand():
    # Two prompt tokens, two of the first response, one of the second; then another comparison.
    mask = visible(torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 2, 0, 1]]))
    assert ["".join(".x"[int(cell)] for cell in row) for row in mask.tolist()] == [
        "x......",
        "xx.....",
        "xxx....",
        "xxxx...",
        "xx..x..",
        ".....x.",
        ".....xx",
    ]


def test_a_common_beginning_of_responses_is_read_once():
    batch = batch_of(encoded([1, 2], [7, 8, 3], [7, 8, 4, 5]))
    check(
        batch,
        input_ids=[[1, 2, 7, 8, 3, 4, 5]],
        position_ids=[[0, 1, 2, 3, 4, 4, 5]],
        ids=[7, 8, 3, 7, 8, 4, 5],
        predicted_from=[1, 2, 3, 1, 2, 3, 5],
        placed_at=[2, 3, 4, 2, 3, 5, 6],
    )
    assert batch.inputs.tree.owner.tolist() == [[0] * 7, [0, 0, 0, 0, 1, 2, 2]]
    # One response can be the beginning of the other.
    batch = batch_of(encoded([1], [7, 8], [7, 8, 9]))
    check(batch, input_ids=[[1, 7, 8, 9]], placed_at=[1, 2, 1, 2, 3])
    assert batch.inputs.tree.owner.tolist() == [[0] * 4, [0, 0, 0, 2]]


def test_nothing_is_read_from_the_last_token_with_weight_on():
    row = replace(PAIR, weights=[torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])])
    # 20 is predicted by the prompt alone, 31 by the prompt and 30.
    expected = {
        "shared": ([[10, 11, 12, 30]], [2, 3]),
        "separate": ([[10, 11, 12, 7], [10, 11, 12, 30]], [2, 4 + 3]),
    }
    for layout, (ids, places) in expected.items():
        batch = batch_of(row, layout=layout, whole=False)
        check(batch, input_ids=ids)
        assert batch.inputs.predicted_from[batch.tokens.kept].tolist() == places
        # Using a token that was not laid out is an error.
        assert int(batch.inputs.placed_at[-1]) >= batch.inputs.input_ids.numel()
    check(batch_of(PAIR, whole=False), input_ids=[[10, 11, 12, 20, 30, 31]])


def test_the_next_token_shift_by_hand():
    # A response of 3 at positions 5, 6, 7; the prompt ends at position 2.
    assert predicting_positions(torch.tensor([5, 6, 7]), 2).tolist() == [2, 5, 6]
    assert predicting_positions(torch.tensor([3]), 2).tolist() == [2]
    assert predicting_positions(torch.tensor([], dtype=torch.int64), 2).tolist() == []


@pytest.mark.parametrize("layout", LAYOUTS)
@given(comparisons)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_each_token_is_read_at_its_position_and_predicted_by_the_token_before_it(layout, shapes):
    fresh = iter(range(100, 10_000))
    items = [
        encoded(*([next(fresh) for _ in range(n)] for n in (prompt, *sizes))) for prompt, sizes in shapes
    ]
    batch = batch_of(*items, layout=layout)
    responses = [(item.prompt, ids) for item in items for ids in item.responses]
    decoder = layout == "encoder_decoder"
    read = batch.inputs.decoder_ids if decoder else batch.inputs.input_ids
    before = [token for prompt, ids in responses for token in (9 if decoder else prompt[-1], *ids[:-1])]
    place = [(0 if decoder else len(prompt) - 1) + n for prompt, ids in responses for n in range(len(ids))]
    assert batch.tokens.ids.tolist() == [token for _, ids in responses for token in ids]
    assert read.flatten()[batch.inputs.placed_at].tolist() == batch.tokens.ids.tolist()
    assert read.flatten()[batch.inputs.predicted_from].tolist() == before
    assert batch.inputs.position_ids.flatten()[batch.inputs.predicted_from].tolist() == place


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_the_pad_id_changes_nothing_but_the_padding(layout):
    # 32 is a response token, as if padding is eos.
    one, other = (batch_of(SHORT, PAIR, layout=layout, pad_id=pad) for pad in (0, 32))
    assert one.inputs.predicted_from.tolist() == other.inputs.predicted_from.tolist()
    assert one.tokens.ids.tolist() == other.tokens.ids.tolist()
    assert one.inputs.attention_mask.tolist() == other.inputs.attention_mask.tolist()
    differ = one.inputs.input_ids != other.inputs.input_ids
    assert one.inputs.input_ids[differ].unique().tolist() == ([] if layout == "shared" else [0])


def test_values_belong_to_their_tokens():
    def values(*numbers):
        flat = torch.tensor(numbers)
        return [flat[:2], flat[2:]] if len(flat) == 5 else [flat[:1], flat[1:]]

    rows = [
        replace(
            PAIR,
            weights=values(0.0, 1.0, 2.0, 0.0, 0.5),
            reference_logp=values(-1.0, -2.0, -3.0, -4.0, -5.0),
            scores=values(9.0, 8.0, 7.0, 6.0, 5.0),
            segments=values(0, 0, 1, 4, 4),
        ),
        replace(
            SHORT,
            weights=values(0.0, 3.0),
            reference_logp=values(-6.0, -7.0),
            scores=values(4.0, 3.0),
            segments=values(0, 2),
        ),
    ]
    for layout in LAYOUTS:
        check(
            batch_of(*rows, layout=layout),
            ids=[20, 21, 30, 31, 32, 50, 60],
            weights=[0.0, 1.0, 2.0, 0.0, 0.5, 0.0, 3.0],
            kept=[1, 2, 4, 6],
            reference_logp=[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0],
            scores=[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0],
            segment=[0, 0, 1, 2, 2, 3, 4],
        )
    for name in ("scores", "segments"):
        with pytest.raises(ValueError, match="some have none"):
            batch_of(replace(rows[0], **{name: None}), rows[1])


def test_a_batch_on_another_device_is_there_completely():
    row = replace(SHORT, scores=[torch.ones(1)] * 2, segments=[torch.tensor([0])] * 2)
    for layout in ("shared", "encoder_decoder"):
        batch = batch_of(row, layout=layout)
        tokens = replace(batch.tokens, statistics={"kl": torch.ones(2)})
        batch = replace(batch, tokens=tokens).with_value("a", torch.ones(2)).to("meta")
        found = [getattr(part, item.name) for part in (batch.inputs, batch.tokens) for item in fields(part)]
        tensors = [item for item in found if isinstance(item, torch.Tensor)]
        if batch.inputs.tree is not None:
            tensors += [batch.inputs.tree.owner, batch.inputs.tree.comparisons[0].pieces[0].mask]
        tensors += [batch.tokens.values["a"], batch.tokens.statistics["kl"]]
        assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(comparisons, st.integers(1, 120))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_every_row_is_in_one_group_and_padded_groups_are_within_the_budget(layout, shapes, budget):
    rows = [encoded([1] * prompt, *([2] * n for n in sizes)) for prompt, sizes in shapes]
    groups = list(budgeted(rows, layout=layout, tokens=budget))
    assert sorted(index for group in groups for index in group) == list(range(len(rows)))
    for group in groups:
        inputs = batch_of(*(rows[index] for index in group), layout=layout).inputs
        size = inputs.input_ids.numel() + (0 if inputs.decoder_ids is None else inputs.decoder_ids.numel())
        assert size <= budget or len(group) == 1 or layout == "encoder_decoder"


def test_groups_by_hand():
    # Shared lengths 6, 3, 4, 3:  6 alone (6 + 4 > 9), then 4 + 3 (7 + 3 > 9), then 3. The longest comes first.
    shapes = [(2, [2, 2]), (1, [1, 1]), (2, [1, 1]), (1, [1, 1])]
    rows = [encoded([1] * prompt, *([2] * n for n in sizes)) for prompt, sizes in shapes]
    assert list(budgeted(rows, layout="shared", tokens=9)) == [[0], [2, 1], [3]]
    # Separate rows are 2 x 4, 2 x 2, 2 x 3, 2 x 2:  8, then 4 x 3 = 12 > 9, so 6, then 4 x 2 = 8.
    assert list(budgeted(rows, layout="separate", tokens=9)) == [[0], [2], [1, 3]]
    assert PAIR.shape("encoder_decoder") == (2, 3 + 1 + 3)  # with the start token of the decoder


def test_response_keys():
    def turns(*contents):
        return [
            {"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)
        ]

    # Stores on disk are read by these, so they never change.
    assert response_key(turns("q"), "a") == "ca6e1d07e07d9d36"
    assert response_key(turns("שלום"), "👩‍👩‍👧\n") == "aeec5d8c069fce01"
    keys = {
        response_key(turns(*prompt), text) for *prompt, text in ("qa", ["qa", ""], ["", "qa"], ["q", "a", ""])
    }
    assert len(keys | {response_key([{"role": "system", "content": "q"}], "a")}) == 5
    assert response_key([{"content": "q", "role": "user"}], "a") == response_key(turns("q"), "a")
