"""The tiled head against plain logits: values, gradients, ranks, memory and number types."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenward.ops import tiles
from tokenward.ops.logprob import LogitChange, LogitStep, chunked_statistics, entropy_of, kl_of, logprobs_of
from tokenward.ops.tiles import LinearHead, Reference, linear_statistics

N, D, V = 7, 5, 23
BOTH = pytest.mark.parametrize("direction", ["forward", "reverse"])


def case(*, bias: bool = True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head = LinearHead(normal(V, D).requires_grad_(), normal(V).requires_grad_() if bias else None)
    other = Reference(normal(N, D), LinearHead(normal(V, D)))
    ids = torch.randint(V, (N,), generator=generator)
    return normal(N, D).requires_grad_(), ids, head, other


def barred_case():
    """A head that cannot produce token 0, and ids without it."""
    hidden, ids, head, other = case()
    with torch.no_grad():
        head.bias[0] = -torch.inf
    return hidden, ids.clamp(min=1), head, other


def plain(hidden, ids, head, other, direction="reverse"):
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias)
    theirs = other.hidden @ other.head.weight.T
    return logprobs_of(logits, ids), entropy_of(logits), kl_of(logits, theirs, direction)


def loss(statistics, factors):
    weights = torch.cos(torch.arange(N, dtype=torch.float64))
    return sum(factor * (item * weights).sum() for factor, item in zip(factors, statistics, strict=True))


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@BOTH
@pytest.mark.parametrize("bias", [True, False])
def test_tiles_of_any_size_have_the_plain_values_and_gradients(bias, direction):
    hidden, ids, head, other = case(bias=bias)
    inputs = [item for item in (hidden, *head[:2]) if item is not None]
    expected = plain(hidden, ids, head, other, direction)
    mixtures = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -2, 3))
    slopes = [torch.autograd.grad(loss(expected, part), inputs, retain_graph=True) for part in mixtures]
    settings = {"reference": other, "direction": direction}
    for elements in (1, N * 4, N * V, 10**6):
        made = linear_statistics(hidden, ids, head, ("entropy", "kl"), elements=elements, **settings)
        close(tuple(made.values()), expected)
        for part, slope in zip(mixtures, slopes, strict=True):
            close(torch.autograd.grad(loss(made.values(), part), inputs, retain_graph=True), slope)
    alone = linear_statistics(hidden, ids, head)
    assert alone.keys() == {"logp"}
    close(alone["logp"], expected[0])
    frozen = LinearHead(head.weight.detach(), None if head.bias is None else head.bias.detach())
    states = torch.autograd.grad(loss(linear_statistics(hidden, ids, frozen).values(), (1,)), [hidden])
    close(states, slopes[0][:1])


def test_soft_cap_by_hand():
    """Two logits, 3 and 0, under a cap of 2: 2 tanh(3/2) = 1.8103 against 0."""
    head = LinearHead(torch.tensor([[3.0], [0.0]]), None, LogitChange((LogitStep("cap", 2.0),)))
    hidden = torch.ones(1, 1, requires_grad=True)
    found = linear_statistics(hidden, torch.tensor([0]), head)["logp"]
    found.backward()
    capped = 2 * math.tanh(1.5)
    assert found.item() == pytest.approx(capped - math.log(math.exp(capped) + 1), abs=1e-6)
    # (1 - p) times the slope of the cap, 1 - tanh^2, times the weight.
    expected = (1 - math.exp(found.item())) * (1 - math.tanh(1.5) ** 2) * 3
    assert hidden.grad.item() == pytest.approx(expected, abs=1e-6)


WAYS = [{"elements": 1}, {"elements": 2 * 2}, {"elements": 10**6}, {"chunk": 1}, {"chunk": 100}]


def statistics(hidden, ids, head, names, **way):
    """By tiles of the vocabulary, or by chunks of the tokens."""
    if "elements" in way:
        return linear_statistics(hidden, ids, head, names, **way)
    return chunked_statistics(hidden, ids, lambda rows: rows @ head.weight.T, names, **way)


@pytest.mark.parametrize("way", WAYS)
def test_ranks_by_hand_and_without_gradient(way):
    """Logits 2, 5, 2, 9, 5: equal logits share a rank across tiles."""
    head = LinearHead(torch.tensor([[2.0], [5.0], [2.0], [9.0], [5.0]], dtype=torch.float64))
    one, ids = torch.ones(5, 1, dtype=torch.float64), torch.arange(5)
    assert statistics(one, ids, head, ("token_rank",), **way)["token_rank"].tolist() == [3, 1, 3, 0, 1]
    assert statistics(-one, ids, head, ("token_rank",), **way)["token_rank"].tolist() == [0, 2, 0, 4, 2]
    hidden, ids, head, _ = case(bias=False)
    with_rank, without = (statistics(hidden, ids, head, names, **way) for names in (("token_rank",), ()))
    assert not with_rank["token_rank"].requires_grad
    slopes = [torch.autograd.grad(item["logp"].sum(), [hidden, head.weight]) for item in (with_rank, without)]
    close(*slopes, atol=1e-14)


@pytest.mark.parametrize("elements", [1, N * 4, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ranks_are_those_of_whole_logits(dtype, elements):
    """In half precision many logits are equal, and no token may rank above itself or its equals."""
    hidden, ids, head, other = case(dtype=dtype)
    settings = {"reference": other, "elements": elements}
    found = linear_statistics(hidden, ids, head, ("entropy", "kl", "token_rank"), **settings)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).double()
    expected = (logits > logits.gather(1, ids[:, None])).sum(-1)
    assert found["token_rank"].tolist() == expected.tolist()
    rest = linear_statistics(hidden, ids, head, ("entropy", "kl"), **settings)
    assert rest.keys() == {"logp", "entropy", "kl"}
    assert all(torch.equal(found[name], value) for name, value in rest.items())


def test_logits_never_exist_beyond_a_tile():
    """No tensor of the forward or backward pass is larger than a tile or an input."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            made = function(*arguments, **(options or {}))
            sizes.extend(item.numel() for item in tree_leaves(made) if isinstance(item, torch.Tensor))
            return made

    hidden, ids, head, _ = case()
    many, ids = hidden.detach().repeat(60, 1).requires_grad_(), ids.repeat(60)
    with Sizes():
        linear_statistics(many, ids, head, elements=many.shape[0] * 4)["logp"].sum().backward()
    assert max(sizes) <= many.numel() < many.shape[0] * V


@BOTH
def test_token_that_neither_model_can_produce_has_no_effect(direction):
    hidden, ids, head, other = barred_case()
    bar = torch.zeros(V, dtype=torch.float64)
    bar[0] = -torch.inf
    other = Reference(other.hidden, LinearHead(other.head.weight, bar))
    settings = {"reference": other, "direction": direction, "elements": N * 4}
    found = linear_statistics(hidden, ids, head, ("entropy", "kl"), **settings)
    logits = (hidden @ head.weight.T + head.bias)[:, 1:]
    divergence = kl_of(logits, (other.hidden @ other.head.weight.T)[:, 1:], direction)
    close(found["entropy"], entropy_of(logits))
    close(found["kl"], divergence)
    grads = torch.autograd.grad(found["kl"].sum() + found["entropy"].sum(), [hidden, *head[:2]])
    assert all(grad.isfinite().all() for grad in grads)
    assert float(grads[2][0]) == 0
    (slope,) = torch.autograd.grad(divergence.sum() + entropy_of(logits).sum(), [hidden])
    close(grads[0], slope)


@pytest.mark.parametrize("elements", [N * 4, N * V])
def test_forward_divergence_where_only_the_reference_has_probability(elements):
    hidden, ids, head, other = barred_case()
    settings = {"direction": "forward", "elements": elements}
    found = linear_statistics(hidden, ids, head, ("kl",), reference=other, **settings)
    assert found["kl"].tolist() == [torch.inf] * N
    # A probability that underflows counts as 0, where the published TDPO code computes 0 times -inf.
    unlikely = torch.zeros(V, dtype=torch.float64)
    unlikely[-1] = 2000.0  # the other probabilities underflow, after the first tile had a total of 1
    other = Reference(other.hidden, LinearHead(other.head.weight, unlikely))
    found = linear_statistics(hidden, ids, head, ("kl",), reference=other, **settings)["kl"]
    logits = hidden @ head.weight.T + head.bias
    expected = -logits.log_softmax(-1)[:, -1]
    close(found, expected, atol=1e-10)
    theirs = other.hidden @ other.head.weight.T + unlikely
    close(kl_of(logits, theirs, "forward"), expected, atol=1e-10)


def test_number_types():
    """Sums over the vocabulary are in float32 even for products in bfloat16; gradients have the type of their tensor."""
    hidden, _, head, _ = case(dtype=torch.bfloat16, bias=False)
    total = sum(linear_statistics(hidden, torch.full((N,), token), head)["logp"].exp() for token in range(V))
    assert total.dtype == torch.float32
    close(total, torch.ones(N), atol=1e-5)
    hidden, ids, head, _ = case(dtype=torch.float32)
    found = linear_statistics(hidden, ids, head, dtype=torch.bfloat16)["logp"]
    assert found.dtype == torch.float32
    close(found, linear_statistics(hidden, ids, head)["logp"], atol=0.1)
    grads = torch.autograd.grad(found.sum(), [hidden, *head[:2]])
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_no_tokens():
    hidden, _, head, _ = case()
    found = linear_statistics(hidden[:0], torch.tensor([], dtype=torch.int64), head, ("entropy",))
    assert found["logp"].shape == (0,)
    found["logp"].sum().backward()
    assert float(head.weight.grad.abs().sum()) == 0


def as_cuda_multiplies(monkeypatch):
    """Make products of half-precision states as CUDA does with ``out_dtype``: summed in float32 and not rounded."""
    plain = torch.mm

    def mm(first, second, *, out_dtype=None):
        if out_dtype is None:
            return plain(first, second)
        assert first.dtype == second.dtype == torch.bfloat16
        return plain(first.to(out_dtype), second.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setitem(tiles._widening, "cpu", True)


def largest(found, expected):
    pairs = zip(found, expected, strict=True)
    return max(float((mine.detach() - theirs.detach()).abs().max()) for mine, theirs in pairs)


def test_where_the_device_can_logits_are_not_rounded_before_they_are_widened(monkeypatch):
    rounded, ids, *_ = case(dtype=torch.bfloat16)
    head = LinearHead(*(item.detach().requires_grad_() for item in case(dtype=torch.bfloat16)[2][:2]))
    wide = [item.detach().double().requires_grad_() for item in (rounded, *head[:2])]
    exact = plain(wide[0], ids, LinearHead(*wide[1:]), case()[3])[:2]
    slopes = torch.autograd.grad(loss(exact, (1, -2)), wide)

    def error():
        made = tuple(linear_statistics(rounded, ids, head, ("entropy",), elements=N * 4).values())
        found = torch.autograd.grad(loss(made, (1, -2)), (rounded, *head[:2]))
        return largest(made, exact), largest(found, slopes)

    assert not tiles.widens(rounded)  # torch on the CPU has no such product
    plainly = error()
    as_cuda_multiplies(monkeypatch)
    assert tiles.widens(rounded)
    assert not tiles.widens(rounded.float())
    widened = error()
    assert widened[0] < 2e-6 < 1e-3 < plainly[0]
    # The gradients themselves are rounded to the dtype of states and weights.
    assert widened[1] < plainly[1]


def test_logits_that_the_model_changes_are_rounded_as_it_rounds_them(monkeypatch):
    hidden, ids, head, _ = case(dtype=torch.bfloat16)
    capped = LinearHead(*head[:2], LogitChange((LogitStep("cap", 2.0),)))
    before = linear_statistics(hidden, ids, capped)["logp"]
    as_cuda_multiplies(monkeypatch)
    assert torch.equal(linear_statistics(hidden, ids, capped)["logp"], before)
