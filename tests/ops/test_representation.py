"""Values read from a frozen model, by hand and against full logits; the embedding tied to the head."""

import pytest
import torch
import torch.nn.functional as F

from tokenward.ops.representation import (
    activation_mask,
    cosine,
    entropy_and_rank,
    mean_logit,
    other_tokens,
    received_attention,
    tied_embedding,
)


def test_entropy_and_rank_by_hand():
    # The states are the logits: of 1/2, 1/4, 1/4 the entropy is 1.5 ln 2; equal logits share the better rank.
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [1 / 3, 1 / 3, 1 / 3]]).log()
    for chunk in (1, 2, 3, 100):
        sizes = []
        head = lambda rows, sizes=sizes: sizes.append(len(rows)) or rows  # noqa: E731
        entropy, rank = entropy_and_rank(logits, torch.tensor([0, 2, 1]), head, chunk=chunk)
        assert entropy.tolist() == pytest.approx([1.0397208, 1.0397208, 1.0986123])
        assert rank.tolist() == [0.0, 1.0, 0.0]
        assert max(sizes) == min(chunk, 3)
    assert entropy_and_rank(logits[:0], torch.tensor([]).long(), lambda rows: rows).shape == (2, 0)


def test_other_tokens_and_mean_logit():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    for chunk in (1, 2):
        found = other_tokens(logits, torch.tensor([0, 2]), lambda rows: rows, 2, chunk=chunk)
        assert found.tolist() == [[1, 2], [0, 1]]
    assert mean_logit(torch.tensor([[1.0, 3.0], [0.0, -4.0]]), lambda rows: rows, chunk=1).tolist() == [2, -2]


def test_received_attention_averages_over_positions_that_see_a_token():
    """Two heads of three positions; the last position of the second row is padding, whose query does not count."""
    one = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]])
    other = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.4, 0.4, 0.2]])
    weights = torch.stack([torch.stack([one, other])] * 2)
    real = torch.tensor([[True, True, True], [True, True, False]])
    expected = [[(1 + 0.375 + 0.3) / 3, (0.625 + 0.3) / 2, 0.4], [(1 + 0.375) / 2, 0.625, 0.0]]
    torch.testing.assert_close(received_attention(weights, real), torch.tensor(expected))


def test_activation_mask_by_hand():
    response = torch.tensor([0, 0, 0, 1, 1])
    mlp = torch.tensor([[1.0, 2.0, 3.0, 5.0, 4.0], [30.0, 10.0, 20.0, 7.0, 7.0]])
    logits = torch.tensor([[0.0, 1.0, 4.0, -1.0, 1.0]])
    # Scaled layers of mlp: [0 .5 1 | 1 0] and [1 0 .5 | 0 0]; of logits: [0 .25 1 | 0 1].
    expected = [(0.5 + 0) / 2, (0.25 + 0.25) / 2, (0.75 + 1) / 2, (0.5 + 0) / 2, (0 + 1) / 2]
    torch.testing.assert_close(activation_mask([mlp, logits], response, 2), torch.tensor(expected))


def test_cosine():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    assert cosine(vectors, torch.tensor([2.0, 0.0])).tolist() == [1.0, 0.0, -1.0, 0.0]


GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(7, 3, dtype=torch.float64, generator=GENERATOR)
IDS = torch.tensor([[1, 5, 1], [0, 6, 6]])
FACTORS = torch.randn(2, 3, 3, dtype=torch.float64, generator=GENERATOR)


def gradient(function):
    weight = WEIGHT.clone().requires_grad_()
    rows, for_head = function(weight)
    parts = [] if rows is None else [(rows * FACTORS).sum()]
    parts += [] if for_head is None else [for_head.square().sum()]
    torch.stack(parts).sum().backward()
    return weight.grad


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("used", ["both", "rows", "head"])
def test_tied_embedding_has_the_gradient_of_separate_ones(used, padding):
    def only(rows, weight):
        return rows if used != "head" else None, weight if used != "rows" else None

    found = gradient(lambda weight: only(*tied_embedding(IDS, weight, padding)))
    expected = gradient(lambda weight: only(F.embedding(IDS, weight, padding), weight))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_tied_embeddings_can_be_chained():
    """As with an encoder and a decoder."""

    def chained(weight):
        first, weight = tied_embedding(IDS, weight)
        second, weight = tied_embedding(IDS.flip(0), weight)
        return first + second, weight

    expected = gradient(lambda weight: (F.embedding(IDS, weight) + F.embedding(IDS.flip(0), weight), weight))
    torch.testing.assert_close(gradient(chained), expected, rtol=0, atol=1e-12)
    rows, for_head = tied_embedding(IDS, WEIGHT)
    assert torch.equal(rows, WEIGHT[IDS])
    assert for_head.data_ptr() == WEIGHT.data_ptr(), "no copy"
