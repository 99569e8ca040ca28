"""What is read off a frozen model, by hand and against full logits."""

import pytest
import torch

from tokenward.ops.representation import (
    activation_mask,
    cosine,
    entropy_and_rank,
    mean_logit,
    other_tokens,
    received_attention,
)


def test_entropy_and_rank_by_hand_and_whatever_the_chunk():
    # The states are the logits: of 1/2, 1/4, 1/4 the entropy is 1.5 ln 2; equal ones share the better rank.
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [1 / 3, 1 / 3, 1 / 3]]).log()
    for chunk in (1, 2, 3, 100):
        entropy, rank = entropy_and_rank(logits, torch.tensor([0, 2, 1]), lambda rows: rows, chunk=chunk)
        assert entropy.tolist() == pytest.approx([1.0397208, 1.0397208, 1.0986123])
        assert rank.tolist() == [0.0, 1.0, 0.0]


def test_the_heads_logits_exist_a_chunk_at_a_time():
    sizes = []
    head = lambda rows: sizes.append(len(rows)) or rows  # noqa: E731
    entropy_and_rank(torch.randn(7, 4), torch.zeros(7, dtype=torch.long), head, chunk=3)
    assert sizes == [3, 3, 1]


def test_other_tokens_are_the_likeliest_but_the_one_that_is_there():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    # The first is a greedy token: its second and third candidates. The other stands third.
    for chunk in (1, 2):
        found = other_tokens(logits, torch.tensor([0, 2]), lambda rows: rows, 2, chunk=chunk)
        assert found.tolist() == [[1, 2], [0, 1]]


def test_mean_logit():
    assert mean_logit(torch.tensor([[1.0, 3.0], [0.0, -4.0]]), lambda rows: rows, chunk=1).tolist() == [
        2.0,
        -2.0,
    ]


def test_received_attention_is_the_mean_over_the_positions_that_see_a_token():
    """Two heads of three positions; the second row has one position of padding, whose look counts nowhere."""
    one = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]])
    other = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.4, 0.4, 0.2]])
    weights = torch.stack([torch.stack([one, other])] * 2)
    real = torch.tensor([[True, True, True], [True, True, False]])
    expected = [
        [(1 + 0.375 + 0.3) / 3, (0.625 + 0.3) / 2, 0.4],
        [(1 + 0.375) / 2, 0.625, 0.0],
    ]
    torch.testing.assert_close(received_attention(weights, real), torch.tensor(expected))


def test_mapos_mask_by_hand():
    """Each layer from 0 to 1 within its response, the mean over layers, then over kinds of place."""
    response = torch.tensor([0, 0, 0, 1, 1])
    mlp = torch.tensor([[1.0, 2.0, 3.0, 5.0, 4.0], [30.0, 10.0, 20.0, 7.0, 7.0]])
    logits = torch.tensor([[0.0, 1.0, 4.0, -1.0, 1.0]])
    # mlp: [0 .5 1 | 1 0] and [1 0 .5 | 0 0]; logits: [0 .25 1 | 0 1].
    expected = [(0.5 + 0) / 2, (0.25 + 0.25) / 2, (0.75 + 1) / 2, (0.5 + 0) / 2, (0 + 1) / 2]
    torch.testing.assert_close(activation_mask([mlp, logits], response, 2), torch.tensor(expected))


def test_cosine():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]])
    assert cosine(vectors, torch.tensor([2.0, 0.0])).tolist() == [1.0, 0.0, -1.0, 0.0]
