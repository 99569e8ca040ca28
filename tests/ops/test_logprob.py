"""Chunked statistics against plain log_softmax; closed forms of log-probability, entropy and divergence."""

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
    """Values, and the gradients of their weighted sum."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    values = function(*leaves)
    return values.detach(), torch.autograd.grad((values * weights).sum(), leaves)


@pytest.mark.parametrize("statistic", ["logp", "entropy", "forward", "reverse"])
@pytest.mark.parametrize("chunk", [1, 3, TOKENS - 1, 1024])
def test_chunks_have_the_values_and_gradients_of_whole_logits(case, chunk, statistic):
    hidden, matrix, ids, weights = case
    other_hidden, other_matrix = hidden.flip(0) + 1, matrix.roll(1, 0)
    direction = statistic if statistic in ("forward", "reverse") else "reverse"
    name = "kl" if statistic == direction else statistic

    def plain(hidden, matrix):
        logits, other = hidden @ matrix.T, other_hidden @ other_matrix.T
        if name == "kl":
            return kl_of(logits, other, direction)
        logp = logits.log_softmax(-1)
        return logp[torch.arange(TOKENS), ids] if name == "logp" else -(logp.exp() * logp).sum(-1)

    def chunked(hidden, matrix):
        reference = (other_hidden, lambda rows: rows @ other_matrix.T)
        settings = {"reference": reference, "direction": direction, "chunk": chunk}
        return chunked_statistics(hidden, ids, lambda rows: rows @ matrix.T, ("entropy", "kl"), **settings)[
            name
        ]

    expected = gradients(plain, hidden, matrix, weights=weights)
    torch.testing.assert_close(
        gradients(chunked, hidden, matrix, weights=weights), expected, rtol=0, atol=1e-12
    )
    with torch.inference_mode():
        torch.testing.assert_close(chunked(hidden, matrix), expected[0], rtol=0, atol=1e-12)


def test_only_one_chunk_of_logits_exists_and_the_backward_pass_recomputes_it(case):
    hidden, matrix, ids, _ = case
    rows_seen = []
    head = lambda rows: rows_seen.append(len(rows)) or rows @ matrix.T  # noqa: E731
    found = chunked_statistics(hidden.clone().requires_grad_(), ids, head, chunk=3)
    assert found.keys() == {"logp"}
    assert rows_seen == [3, 3, 1]
    found["logp"].sum().backward()
    assert sorted(rows_seen) == [1, 1, 3, 3, 3, 3]


def test_log_probabilities_by_hand():
    # Odds 1 : 3, so probabilities 1/4 and 3/4.
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    expected = [math.log(1 / 4), math.log(3 / 4)]
    assert logprobs_of(logits, torch.tensor([0, 1])).tolist() == pytest.approx(expected, abs=1e-7)
    assert logprobs_of(torch.tensor([[1e4, 0.0]] * 2), torch.tensor([0, 1])).tolist() == [0.0, -1e4]
    # In bfloat16 the sum of 4000 equal terms would be rounded to 3 digits.
    values = logprobs_of(torch.zeros(1, 4000, dtype=torch.bfloat16), torch.tensor([7]))
    assert values.dtype == torch.float32
    assert values.item() == pytest.approx(-math.log(4000), abs=1e-6)


def test_impossible_tokens_do_not_affect_others():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]] * 2, dtype=torch.float64, requires_grad=True)
    values = logprobs_of(logits, torch.tensor([0, 1]))
    assert values.tolist() == [-math.log(2), -math.inf]
    (gradient,) = torch.autograd.grad(values[0], logits)
    # onehot - softmax = [1, 0, 0] - [1/2, 0, 1/2]
    assert gradient.tolist() == [pytest.approx([0.5, 0.0, -0.5]), [0.0, 0.0, 0.0]]
    with_hole = torch.tensor([[0.0, 1.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    without = torch.tensor([[0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[0.5, 0.0, -torch.inf]], dtype=torch.float64)
    kls = [lambda x, of=of: kl_of(x, reference[:, : x.shape[1]], of) for of in ("forward", "reverse")]
    for statistic in (entropy_of, *kls):
        (found,) = torch.autograd.grad(statistic(with_hole).sum(), with_hole)
        (expected,) = torch.autograd.grad(statistic(without).sum(), without)
        torch.testing.assert_close(found[:, :2], expected, rtol=0, atol=1e-12)
        assert found[0, 2].item() == 0.0


def test_entropy_and_divergence_closed_forms():
    # Uniform over 8: log 8;  (1/4, 3/4): 1/4 log 4 + 3/4 log 4/3;  certain: 0
    assert entropy_of(torch.zeros(1, 8)).item() == pytest.approx(math.log(8), abs=1e-6)
    biased = torch.tensor([[0.0, math.log(3)]])
    expected = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert entropy_of(biased).item() == pytest.approx(expected, abs=1e-6)
    assert entropy_of(torch.tensor([[0.0, -torch.inf, -torch.inf]])).item() == 0.0
    # KL(1/2, 1/2 || 1/4, 3/4) = 1/2 log 2 + 1/2 log 2/3;  the other way 1/4 log 1/2 + 3/4 log 3/2
    half = torch.tensor([[0.0, 0.0]])
    assert kl_of(half, biased).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    assert kl_of(biased, half).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6)
    assert kl_of(biased, biased + 3).item() == pytest.approx(0.0, abs=1e-7)
    narrow = torch.tensor([[0.0, -torch.inf]])
    assert kl_of(narrow, half).item() == kl_of(half, narrow, "forward").item() == pytest.approx(math.log(2))
    assert kl_of(half, narrow).item() == kl_of(narrow, half, "forward").item() == math.inf
    assert kl_of(narrow, narrow).item() == 0.0


def test_gradients_match_finite_differences():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).unbind()
    leaves = first.requires_grad_(), second.requires_grad_()
    assert torch.autograd.gradcheck(entropy_of, leaves[:1])
    for direction in ("forward", "reverse"):
        assert torch.autograd.gradcheck(lambda *pair, of=direction: kl_of(*pair, of), leaves)


def test_entropy_is_exact():
    """tlm.md 3.1: softmax + 1e-8 without renormalizing gives 10.830 and 0.0093."""
    size = 50_257
    uniform, peaked = torch.zeros(1, size, dtype=torch.float64), torch.zeros(1, size, dtype=torch.float64)
    peaked[0, 3] = 1e4
    assert entropy_of(uniform).item() == pytest.approx(math.log(size), abs=1e-10)
    assert entropy_of(peaked).item() == 0.0
