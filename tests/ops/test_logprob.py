"""The log-probability kernel against plain log_softmax, and closed forms of entropy and divergence."""

import math

import pytest
import torch

from tokenward.ops.logprob import chunked_statistics, entropy_of, kl_of, logprobs_of

TOKENS, WIDTH, VOCABULARY = 7, 5, 11


@pytest.fixture
def case():
    """States, head weights, ids and a fixed weight per token, in float64."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return draw(TOKENS, WIDTH), draw(VOCABULARY, WIDTH), ids, draw(TOKENS)


def gradients(function, *inputs, weights):
    """Values, and the gradient of their weighted sum by each input."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    values = function(*leaves)
    return values.detach(), torch.autograd.grad((values * weights).sum(), leaves)


@pytest.mark.parametrize("chunk", [1, 2, 3, TOKENS - 1, TOKENS, 1024])
def test_any_chunk_gives_log_softmax_and_its_gradient(case, chunk):
    hidden, matrix, ids, weights = case

    def plain(hidden, matrix):
        return (hidden @ matrix.T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]

    def chunked(hidden, matrix):
        return chunked_statistics(hidden, ids, lambda rows: rows @ matrix.T, chunk=chunk)["logp"]

    expected, expected_gradients = gradients(plain, hidden, matrix, weights=weights)
    values, found = gradients(chunked, hidden, matrix, weights=weights)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected_gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_without_gradients_the_values_are_the_same(case, chunk):
    hidden, matrix, ids, _ = case
    expected = (hidden @ matrix.T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    with torch.inference_mode():
        values = chunked_statistics(hidden, ids, lambda rows: rows @ matrix.T, chunk=chunk)["logp"]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)


def test_the_head_sees_one_chunk_at_a_time_and_again_in_the_backward_pass(case):
    hidden, matrix, ids, _ = case
    rows_seen = []

    def head(rows):
        rows_seen.append(len(rows))
        return rows @ matrix.T

    values = chunked_statistics(hidden.clone().requires_grad_(), ids, head, chunk=3)["logp"]
    assert rows_seen == [3, 3, 1]
    values.sum().backward()
    assert sorted(rows_seen) == [1, 1, 3, 3, 3, 3]


def test_logprobs_by_hand():
    # Odds 1 : 3, so probabilities 1/4 and 3/4.
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    expected = [math.log(1 / 4), math.log(3 / 4)]
    assert logprobs_of(logits, torch.tensor([0, 1])).tolist() == pytest.approx(expected, abs=1e-7)


def test_impossible_tokens_do_not_spoil_the_others():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]] * 2, dtype=torch.float64, requires_grad=True)
    values = logprobs_of(logits, torch.tensor([0, 1]))
    assert values.tolist() == [-math.log(2), -math.inf]
    (gradient,) = torch.autograd.grad(values[0], logits)
    # onehot - softmax = [1, 0, 0] - [1/2, 0, 1/2]
    torch.testing.assert_close(gradient[0], torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64))
    assert gradient[1].tolist() == [0.0, 0.0, 0.0]


def test_huge_logits_stay_exact():
    assert logprobs_of(torch.tensor([[1e4, 0.0]] * 2), torch.tensor([0, 1])).tolist() == [0.0, -1e4]


def test_half_precision_logits_are_reduced_in_float32():
    # In bfloat16 the sum of 4096 equal terms would be rounded to 3 digits.
    values = logprobs_of(torch.zeros(1, 4000, dtype=torch.bfloat16), torch.tensor([7]))
    assert values.dtype == torch.float32
    assert values.item() == pytest.approx(-math.log(4000), abs=1e-6)


def test_entropy_closed_forms():
    # uniform over 8: log 8;  (1/4, 3/4): 1/4 log 4 + 3/4 log 4/3;  certain: 0
    uniform = entropy_of(torch.zeros(1, 8)).item()
    biased = entropy_of(torch.tensor([[0.0, math.log(3)]])).item()
    certain = entropy_of(torch.tensor([[0.0, -torch.inf, -torch.inf]])).item()
    assert uniform == pytest.approx(math.log(8), abs=1e-6)
    assert biased == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3), abs=1e-6)
    assert certain == 0.0


def test_divergence_closed_forms():
    half, biased = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    # KL(1/2, 1/2 || 1/4, 3/4) = 1/2 log 2 + 1/2 log 2/3;  the other way 1/4 log 1/2 + 3/4 log 3/2
    assert kl_of(half, biased).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    assert kl_of(biased, half).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6)
    assert kl_of(biased, biased + 3).item() == pytest.approx(0.0, abs=1e-7)


def test_divergence_where_tokens_are_impossible():
    narrow, wide = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])
    assert kl_of(narrow, wide).item() == pytest.approx(math.log(2), abs=1e-7)
    assert kl_of(narrow, narrow).item() == 0.0
    assert kl_of(wide, narrow).item() == math.inf
    assert kl_of(narrow, wide, "forward").item() == math.inf
    assert kl_of(wide, narrow, "forward").item() == pytest.approx(math.log(2), abs=1e-7)


def test_entropy_and_divergence_have_the_gradient_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).unbind()
    leaves = first.requires_grad_(), second.requires_grad_()
    assert torch.autograd.gradcheck(entropy_of, leaves[:1])
    for direction in ("forward", "reverse"):
        assert torch.autograd.gradcheck(lambda *pair, of=direction: kl_of(*pair, of), leaves)


def test_impossible_tokens_do_not_spoil_the_gradient_of_entropy_and_divergence():
    logits = [0.0, 1.0, -torch.inf]
    with_hole = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    without = torch.tensor([logits[:2]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[0.5, 0.0, -torch.inf]], dtype=torch.float64)
    kls = [lambda x, of=of: kl_of(x, reference[:, : x.shape[1]], of) for of in ("forward", "reverse")]
    for statistic in (entropy_of, *kls):
        (found,) = torch.autograd.grad(statistic(with_hole).sum(), with_hole)
        (expected,) = torch.autograd.grad(statistic(without).sum(), without)
        torch.testing.assert_close(found[:, :2], expected, rtol=0, atol=1e-12)
        assert found[0, 2].item() == 0.0


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_chunked_divergence_is_the_whole_one(case, chunk, direction):
    hidden, matrix, ids, weights = case
    reference_hidden, reference_matrix = hidden.flip(0) + 1, matrix.roll(1, 0)

    def whole(hidden, matrix):
        pair = hidden @ matrix.T, reference_hidden @ reference_matrix.T
        return kl_of(*(pair if direction == "reverse" else pair[::-1]))

    def chunked(hidden, matrix):
        head, reference = (
            (lambda rows: rows @ matrix.T),
            (reference_hidden, lambda rows: rows @ reference_matrix.T),
        )
        found = chunked_statistics(
            hidden, ids, head, ("entropy", "kl"), reference=reference, direction=direction, chunk=chunk
        )
        return found["kl"]

    expected, expected_gradients = gradients(whole, hidden, matrix, weights=weights)
    values, found = gradients(chunked, hidden, matrix, weights=weights)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected_gradients, rtol=0, atol=1e-12)
