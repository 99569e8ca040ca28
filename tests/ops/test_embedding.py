"""The embedding whose weight goes on to the head."""

import pytest
import torch
import torch.nn.functional as F

from tokenward.ops.representation import tied_embedding

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(7, 3, dtype=torch.float64, generator=GENERATOR)
IDS = torch.tensor([[1, 5, 1], [0, 6, 6]])
FACTORS = torch.randn(2, 3, 3, dtype=torch.float64, generator=GENERATOR)


def slopes(rows_and_weight):
    weight = WEIGHT.clone().requires_grad_()
    rows, for_head = rows_and_weight(weight)
    parts = [] if rows is None else [(rows * FACTORS).sum()]
    parts += [] if for_head is None else [for_head.square().sum()]
    torch.stack(parts).sum().backward()
    return weight.grad


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("used", ["both", "rows", "head"])
def test_equals_the_embedding_and_the_weight_on_their_own(used, padding):
    def only(rows, weight):
        return rows if used != "head" else None, weight if used != "rows" else None

    found = slopes(lambda weight: only(*tied_embedding(IDS, weight, padding)))
    expected = slopes(lambda weight: only(F.embedding(IDS, weight, padding), weight))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_embeddings_one_after_another_take_each_others_weight():
    """An encoder's and a decoder's, say."""

    def chained(weight):
        first, weight = tied_embedding(IDS, weight)
        second, weight = tied_embedding(IDS.flip(0), weight)
        return first + second, weight

    expected = slopes(lambda weight: (F.embedding(IDS, weight) + F.embedding(IDS.flip(0), weight), weight))
    torch.testing.assert_close(slopes(chained), expected, rtol=0, atol=1e-12)


def test_rows_are_those_of_the_weight():
    rows, for_head = tied_embedding(IDS, WEIGHT)
    assert torch.equal(rows, WEIGHT[IDS])
    assert for_head.data_ptr() == WEIGHT.data_ptr()
